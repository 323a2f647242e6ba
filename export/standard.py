"""
Converts our GPT to a standard architecture of Hugging Face: a GPT-2 if its positions are learned, a GPT-NeoX (Pythia) if they
are rotary. import_hf.py converts back, and has the tables of module names.

Parts that the standard architecture lacks become plain matrices with equal logits. Factors are multiplied: wte with scale_up,
wte with scale_down, k_restore with k_compress and k_proj, and the same for v. Narrow value heads are padded with zeros. A
missing bias becomes 0. The compression of keys and values is also returned, as a list of Cuts, for the compact form.

Shapes: V tokens, d = n_embd, k of the table, r of a compression, H heads, n numbers a head.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from common.cli import fail
from util_factorization.import_hf import ACTIVATION, GPT2, GPT_NEOX

THEIRS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}  # our activations -> names that both architectures have
assert all(ACTIVATION[theirs] == ours for ours, theirs in THEIRS.items())


@dataclass
class Cut:
    """A factorized weight of q, k or v in a layer: left @ right, left [d,r], right [r,d]."""

    layer: int
    target: str
    left: torch.Tensor
    right: torch.Tensor


def refuse_what_no_architecture_has(config, flag):
    """config: a GPTConfig. flag: the flag and value that named the model."""
    if not config.rotary_pct and (config.parallel_residual or config.norms_per_layer == 1):
        fail(
            f"{flag} has learned positions and a parallel residual; no standard architecture has both (GPT-2 has a "
            "sequential one, GPT-NeoX rotary positions): give another model"
        )


def standard_config(model, end_of_text):
    """The transformers config of our GPT. end_of_text: the id of the tokenizer's end-of-text, or None."""
    import transformers

    c = model.config
    shared = dict(vocab_size=c.vocab_size, bos_token_id=end_of_text, eos_token_id=end_of_text, tie_word_embeddings=is_tied(c))
    if not c.rotary_pct:
        return transformers.GPT2Config(
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_inner=c.mlp_expansion_factor * c.n_embd,
            activation_function=THEIRS[c.activation],
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout),
            **shared,
        )
    made = transformers.GPTNeoXConfig(
        max_position_embeddings=c.block_size,
        hidden_size=c.n_embd,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        intermediate_size=c.mlp_expansion_factor * c.n_embd,
        hidden_act=THEIRS[c.activation],
        use_parallel_residual=c.parallel_residual,
        **dict.fromkeys(("attention_dropout", "hidden_dropout"), c.dropout),
        **rotation(model),
        **shared,
    )
    return made


def rotation(model):
    """The arguments of a GPTNeoXConfig that set the rotated share of each head."""
    import transformers

    n, dims = model.config.n_embd // model.config.n_head, model.transformer.h[0].attn.rotary.dims
    share = model.config.rotary_pct
    if int(n * share) != dims:  # transformers rounds down
        share = (dims + 0.5) / n
    if int(transformers.__version__.split(".")[0]) < 5:
        return dict(rotary_pct=share, rotary_emb_base=10000)
    return dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=share))


def is_tied(config):
    """Whether lookup and head are one matrix [V,d]. They differ if the two scale matrices differ or the lookup adds a mean."""
    return config.tie_head and (config.n_embd_wte is None or (config.n_embd_wte_scale_tying and not config.n_embd_wte_mean))


@torch.no_grad()
def to_standard(model, end_of_text=None):
    """Our GPT without adapters, in float32 -> (a GPT2LMHeadModel or GPTNeoXForCausalLM with equal logits, [Cut])."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_config(standard_config(model, end_of_text), dtype=torch.float32).eval()
    t, rotated, cuts = model.transformer, bool(model.config.rotary_pct), []
    for i, block in enumerate(t.h):
        parts = {target: factors(block.attn, target) for target in "qkv"}
        cuts += [Cut(i, target, left, right) for target, (left, right) in parts.items() if left is not None]
        qkv = [(right if left is None else left @ right, bias_of(block.attn, x)) for x, (left, right) in parts.items()]
        if rotated:
            fill_gpt_neox(hf.gpt_neox.layers[i], block, qkv)
        else:
            fill_gpt2(hf.transformer.h[i], block, qkv)
    put(hf.gpt_neox.final_layer_norm if rotated else hf.transformer.ln_f, t.ln_f.weight, t.ln_f.bias)
    if not rotated:
        hf.transformer.wpe.weight.copy_(t.wpe.weight)
    hf.get_input_embeddings().weight.copy_(model.lookup(torch.arange(model.config.vocab_size)))
    if not is_tied(model.config):
        hf.get_output_embeddings().weight.copy_(head_of(model))
    return hf, cuts


def head_of(model):
    """The head [V,d], multiplied out if it is factorized."""
    head = model.lm_head.weight
    return head if model.config.n_embd_wte is None else head @ model.transformer.scale_down.weight.T


def factors(attn, target):
    """q, k or v -> (left [d,r], right [r,d]), or (None, weight) if it is not compressed."""
    proj, compress = getattr(attn, f"{target}_proj"), getattr(attn, f"{target}_compress", None)
    if isinstance(compress, nn.Linear):
        return getattr(attn, f"{target}_restore").weight, compress.weight @ proj.weight
    return (spread(attn) if is_narrow(attn, target) else None), proj.weight


def bias_of(attn, target):
    """The bias [d] of q, k or v: the output for a zero input."""
    proj = getattr(attn, f"{target}_proj")
    bias = proj(proj.weight.new_zeros(proj.in_features))
    if is_narrow(attn, target):
        return spread(attn) @ bias
    return bias if target == "q" else getattr(attn, f"{target}_restore")(getattr(attn, f"{target}_compress")(bias))


def is_narrow(attn, target):
    return target == "v" and attn.v_proj.out_features < attn.c_proj.out_features


def spread(attn):
    """A matrix [d,r] that pads each narrow head from r / H to d / H numbers with zeros."""
    d, r = attn.c_proj.weight.shape
    widen = torch.eye(d // attn.n_head, r // attn.n_head, dtype=attn.c_proj.weight.dtype)
    return torch.block_diag(*[widen] * attn.n_head)


def out_projection(attn):
    weight = attn.c_proj.weight
    return weight @ spread(attn).T if is_narrow(attn, "v") else weight


def fill_gpt_neox(layer, block, qkv):
    """qkv: (weight [d,d], bias [d]) of q, k and v. GPT-NeoX has q, k and v side by side in each head."""
    fused = layer.attention.query_key_value
    H = block.attn.n_head
    put(fused, *(torch.stack([x.unflatten(0, (H, -1)) for x in some], 1).flatten(0, 2) for some in zip(*qkv)))
    for ours, theirs in GPT_NEOX.items():
        put(layer.get_submodule(theirs), *weights_of(block, ours))


def fill_gpt2(layer, block, qkv):
    """A Conv1D stores its weight as [in, out]."""
    weight, bias = (torch.cat(some) for some in zip(*qkv))
    put(layer.attn.c_attn, weight.T, bias)
    for ours, theirs in GPT2.items():
        weight, bias = weights_of(block, ours)
        put(layer.get_submodule(theirs), weight.T if weight.ndim == 2 else weight, bias)


def weights_of(block, name):
    """(weight, bias or None) of a module in a block, by our name. A block with a single norm returns it for both names."""
    if name == "ln_2" and not hasattr(block, name):
        name = "ln_1"
    module = block.get_submodule(name)
    return (out_projection(block.attn) if name == "attn.c_proj" else module.weight), module.bias


def put(module, weight, bias):
    module.weight.copy_(weight)
    module.bias.zero_() if bias is None else module.bias.copy_(bias)
