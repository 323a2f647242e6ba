"""
GGUF files: the header checked against the file's size, and what transformers leaves out of a model.

    check_gguf   the package gguf trusts every declared length: a declared list of 10^18 numbers fills the memory
    complete     transformers maps a file's names to those of a model, and drops the others in silence. Dropped were the
                 stretched rotation of every Llama 3.1 file (rope_freqs.weight), rope.scaling.*, and the biases of a Llama's
                 attention. They are set here, or the file is refused by their name
    set_bos      the tokenizer's rule for the beginning of text, dropped too

Keys and tensors: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
import struct
from pathlib import Path

import torch
import torch.nn as nn

# -- the header -------------------------------------------------------------------------------------------------------

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type number -> bytes of a value
TEXT, LIST = 8, 9
MOST_DIMS = 4


class Head:
    """Reads a file's bytes one after the other."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def skip(self, count):
        """Skip bytes -> the position of the first. Raises ValueError if the file is too short."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,}, but declares more")
        return start

    def number(self, form):
        return struct.unpack_from(f"<{form}", self.data, self.skip(struct.calcsize(form)))[0]

    def text(self):
        length = self.number("Q")
        start = self.skip(length)
        return bytes(self.data[start : start + length])

    def value(self, kind):
        """Skip a value -> the value if it is an integer of 4 bytes, otherwise None."""
        if kind == TEXT:
            self.text()
        elif kind == LIST:
            inner, count = self.number("I"), self.number("Q")
            if inner in WIDTHS:
                self.skip(WIDTHS[inner] * count)
            elif inner != TEXT:
                raise ValueError("it has a list of lists")
            else:
                for _ in range(count):
                    self.text()
        elif kind in (4, 5):
            return self.number("I")
        else:
            self.skip(WIDTHS[kind])


def check_gguf(path):
    """Raise an error if a GGUF file declares more than it has -> the number of its tensors."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    head, size = Head(np.memmap(path, mode="r")), Path(path).stat().st_size
    if bytes(head.data[head.skip(4) : head.at]) != b"GGUF" or head.number("I") not in (2, 3):
        raise ValueError("it does not begin with GGUF and a version")
    tensors, values, stored = head.number("Q"), head.number("Q"), 0
    for _ in range(values):
        name = head.text()
        found = head.value(head.number("I"))
        if name.endswith(b".block_count") and (found or 0) > tensors:
            raise ValueError(f"{name.decode()} is {found}, but it has {tensors} tensors")
    for _ in range(tensors):
        name, dims = head.text(), head.number("I")
        if not 1 <= dims <= MOST_DIMS:
            raise ValueError(f"a tensor has {dims} dimensions")
        numbers = math.prod(head.number("Q") for _ in range(dims))
        in_block, width = GGML_QUANT_SIZES[GGMLQuantizationType(head.number("I"))]
        stored += numbers // in_block * width
        if head.number("Q") > size or stored > size:
            raise ValueError(f"{name[:40].decode(errors='replace')} is beyond its end")
    return tensors


# -- what transformers leaves out ------------------------------------------------------------------------------------

# Keys that say nothing about what the model computes, or that the tensors' shapes say again.
HARMLESS = ("vocab_size", "context_length", "feed_forward_length", "tensor_data_layout", "attention.causal", "pooling_type")
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)  # all files by Meta


class NotRead(ValueError):
    """A key or a tensor of the file that would be lost."""


def complete(model, reader):
    """
    Set in a model what transformers left out of its file. Raises NotRead with the name of what cannot be set.

    reader: a gguf.GGUFReader of the file.
    """
    arch = reader.fields["general.architecture"].contents()
    keys = {key[len(arch) + 1 :]: field.contents() for key, field in reader.fields.items() if key.startswith(f"{arch}.")}
    names = read_names(model, arch)
    unread = {tensor.name: tensor for tensor in reader.tensors if tensor.name not in names}
    set_rotation(model, keys, unread.pop("rope_freqs.weight", None))
    set_biases(model, arch, names, unread)
    if lost := sorted(name for name in unread if "_exps." not in name):  # experts: merged into tensors of other names
        raise NotRead(f"the tensor {lost[0]} has no place in a {model.config.model_type} of transformers")
    check_keys(model.config, arch, keys)


def read_names(model, arch):
    """{tensor of a file: its name in the model}, as transformers reads it."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=model.config.to_dict())
    return get_gguf_hf_weights_map(model, processor)


def numbers(tensor):
    from gguf import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()


# -- rotation ---------------------------------------------------------------------------------------------------------


def set_rotation(model, keys, factors):
    """
    Set the stretching of the rotation for long texts.

    keys: of the file, without the architecture's name. factors: the tensor rope_freqs.weight [n/2], or None: Llama 3.1's form
    """
    found = {}
    kind = keys.get("rope.scaling.type", "linear" if keys.get("rope.scale_linear", 1) != 1 else "none")
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1)))
    if factors is not None:
        found = dict(rope_type="llama3", factor=numbers(factors).max().item(), **LLAMA3)
    elif kind == "linear" and factor != 1:
        found = dict(rope_type="linear", factor=factor)
    elif kind == "yarn":
        found = dict(rope_type="yarn", factor=factor)
        found["original_max_position_embeddings"] = int(keys["rope.scaling.original_context_length"])
    elif kind not in ("none", "linear"):
        raise NotRead(f"rope.scaling.type {kind} cannot be set in a {model.config.model_type} of transformers")
    if found:
        parameters = model.config.rope_parameters
        parameters = parameters.get("full_attention", parameters)  # Gemma 3: only layers without a window are stretched
        parameters.update(found)
        rotary = model.base_model.rotary_emb = type(model.base_model.rotary_emb)(model.config)
        if factors is not None:
            plain = float(parameters["rope_theta"]) ** -(
                torch.arange(0, 2 * len(rotary.inv_freq), 2) / 2 / len(rotary.inv_freq)
            )
            if not torch.allclose(plain / numbers(factors), rotary.inv_freq, rtol=1e-4):
                raise NotRead("the tensor rope_freqs.weight is not that of a Llama 3.1, 3.2 or 3.3")


# -- biases -----------------------------------------------------------------------------------------------------------

BIASED = dict(attn="attention_bias", ffn="mlp_bias")  # a tensor's family -> the config's entry that makes the biases


def set_biases(model, arch, names, unread):
    """Give linear layers the biases of the file, and remove them from `unread`. A layer of the same kind without one gets 0."""
    at = {name: param.rpartition(".")[0] for name, param in names.items() if name.endswith(".weight")}
    biases = {name: at[weight] for name in unread if (weight := re.sub(r"\.bias$", ".weight", name)) in at and weight != name}
    for family, entry in BIASED.items():
        mine = {name: path for name, path in biases.items() if f".{family}_" in name}
        if not mine or not hasattr(model.config, entry):
            continue
        setattr(model.config, entry, True)
        like = {name: path for name, path in at.items() if f".{family}_" in name and "norm" not in name}
        for path in like.values():
            linear = model.get_submodule(path)
            linear.bias = nn.Parameter(torch.zeros(linear.out_features), requires_grad=False)
        for name, path in mine.items():
            values = numbers(unread.pop(name))
            heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
            if arch == "llama" and (count := heads.get(name.split(".")[-2])):  # llama.cpp stores pairs of numbers side by side
                values = values.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten()
            model.get_submodule(path).bias.data.copy_(values)


# -- other keys -------------------------------------------------------------------------------------------------------


def check_keys(config, arch, keys):
    """Raise NotRead for a key that transformers does not read, unless the config has its value anyway."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    read = [name for kind in (arch, config.model_type, config.model_type.removesuffix("_text")) for name in
            GGUF_CONFIG_MAPPING.get(kind, {}).items()]  # fmt: skip
    read = {key for key, entry in read if entry is not None}
    for key, value in keys.items():
        if key in read or key in HARMLESS or key.startswith("rope.scal") or not value or value == "none":
            continue
        ours = in_config(config, key)
        if ours is None or abs(float(ours) - float(value)) > 1e-5 * abs(float(value)):
            raise NotRead(f"{arch}.{key} is {value}, and a {config.model_type} of transformers has {ours}")


def in_config(config, key):
    """The config's value for a GGUF key, or None."""
    n = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    local, rope = rope.get("sliding_attention", rope), rope.get("full_attention", rope)
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1)
    known = {
        "attention.key_length": n,
        "attention.value_length": n,
        "rope.dimension_count": int(n * share),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": local.get("rope_theta"),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attention.clamp_kqv": getattr(config, "clip_qkv", None),
        "attention.layer_norm_epsilon": getattr(config, "layer_norm_eps", getattr(config, "layer_norm_epsilon", None)),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "expert_count": getattr(config, "num_experts", getattr(config, "num_local_experts", None)),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", None),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None),
        "attention.scale": getattr(config, "attention_multiplier", None),
        "embedding_scale": getattr(config, "embedding_multiplier", None),
        "residual_scale": getattr(config, "residual_multiplier", None),
    }
    return known.get(key, getattr(config, key, None))  # logit_scale, attn_logit_softcapping and others have the same name


# -- tokenizer --------------------------------------------------------------------------------------------------------


def set_bos(tokenizer, reader):
    """
    Let a tokenizer put the beginning of text before a text if its file says so. SentencePiece files do so by default.
    """
    from tokenizers.processors import TemplateProcessing

    fields = reader.fields
    model, adds = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "add_bos_token"))
    adds = adds.contents() if adds is not None else model is not None and model.contents() == "llama"
    bos = tokenizer.bos_token
    if bos is not None and adds != (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id):
        before = f"{bos} " if adds else ""
        special = [(bos, tokenizer.bos_token_id)] if adds else []
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=f"{before}$A", pair=f"{before}$A {before}$B:1", special_tokens=special
        )
