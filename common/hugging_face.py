"""
Models and tokenizers of Hugging Face in, or one line that says why not.

A folder or a file may come from a stranger: check_source() compares what it declares with its bytes before transformers reads
it, which believes any number of layers. No code of it runs, and no file outside the folder is read.
"""

import json
import re
import struct
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn

from common.cli import fail
from common.gguf_head import check_gguf
from common.modules import check_complete, fresh_memory_is_nan
from common.tokenizer import check_definition
from common.untrusted import check_plain, expect, of_reader, read_json, reading
from common.versions import check_transformers

check_transformers(fail)
GROWTH = 2.5  # float32 over the bytes of a file in half precision, and room for what is not stored
GROWTH_GGUF = 32  # at a bit a number
GENERATION = {name: (range(1, 65), None) for name in ("num_beams?", "num_return_sequences?", "num_beam_groups?")}


def is_hub_id(name):
    """Whether a name can be an id on the hub: gpt2, or EleutherAI/pythia-70m where there is no folder EleutherAI."""
    fits = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) and not str(name).startswith(".")
    return bool(fits) and not Path(name).exists() and ("/" not in str(name) or not Path(name).parent.exists())


@lru_cache
def hub_error(name):
    """Why the hub does not know a model: the name of an error, or "" where it does. Asks once, 5 seconds at most."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=5)
        return ""
    except Exception as error:  # the network raises its own
        return type(error).__name__


def is_cached(name):
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def from_where(source, flag):
    """Options of from_pretrained: the cache alone where the hub does not answer, which it is given minutes for otherwise."""
    if not is_hub_id(source) or not (why := hub_error(str(source))):
        return {}
    if is_cached(str(source)):
        return dict(local_files_only=True)
    if why == "RepositoryNotFoundError":
        fail(f"{flag} {source} is no folder here and no model on the hub: give one of them")
    fail(
        f"{flag} {source} is no folder here, and the Hugging Face hub does not answer ({why}): give a folder of "
        "save_pretrained, or set HF_HOME to a cache that has it"
    )


def read(kind, what, source, flag, **options):
    """kind.from_pretrained(source, **options), or one line. kind: an Auto class. what: its name in the message."""
    if not Path(source).is_dir() and not is_hub_id(source):
        fail(f"{flag} {source} is no folder: give a folder of save_pretrained, or an id on the hub")
    options = from_where(source, flag) | options
    if Path(source).is_dir() and "gguf_file" not in options:
        check_files(Path(source))
    try:
        with parsed_once() if "gguf_file" in options else nullcontext():
            return kind.from_pretrained(source, trust_remote_code=False, **options)
    except BaseException as error:  # the network, the folder and every reader raise errors of their own
        if not of_reader(error):
            raise
        if "trust_remote_code" in str(error):
            fail(
                f"{flag} {source} brings code of its own, which does not run here: give the model that it was made of. To use "
                "it: python -m surgery.eval --trust_remote_code, or from_pretrained(..., trust_remote_code=True)"
            )
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        fail(f"{flag} {source} has no {what} that loads ({why}): give an id on the hub, or a folder of save_pretrained")


@contextmanager
def parsed_once():
    """
    A context in which transformers gets a GGUF file's header parsed once. It asks for it with the config, with the weights,
    and with the tokenizer: 3 s of Python each time, for 49,152 tokens.
    """
    import gguf

    plain, gguf.GGUFReader = gguf.GGUFReader, lambda path: parsed_gguf(str(path), Path(path).stat().st_mtime_ns)
    try:
        yield
    finally:
        gguf.GGUFReader = plain


@lru_cache(maxsize=1)
def parsed_gguf(path, changed):
    """changed: when the file was."""
    from gguf.gguf_reader import GGUFReader

    return GGUFReader(path)


def read_config(source, flag, **options):
    """The config of a model. Of a folder or a file, what it declares has been compared with what is there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    most, size = check_source(source, flag, **options)
    config = read(AutoConfig, "config", source, flag, **options)
    if most is not None and (options or not getattr(config, "quantization_config", None)):  # the caller refuses those
        growth = GROWTH_GGUF if options else GROWTH
        with reading(f"{flag} {source}", "a model whose config fits its weights", "give a complete model"):
            with weightless(100 + 4 * most, buffers=False):
                model = AutoModelForCausalLM.from_config(config)
            if (wanted := sum(4 * p.numel() for p in model.parameters())) > growth * size + 2**20:
                raise ValueError(f"its config wants {wanted:,} bytes, its weights have {size:,}")
    return config


def check_files(folder):
    """One line where a file leads to a device or a pipe. from_pretrained reads more files than are known here."""
    for path in folder.iterdir():
        if not path.is_dir():
            with reading(path, "a file of a model", "delete it"):
                check_plain(path)


def check_source(source, flag, gguf_file=None):
    """
    Weights and bytes of a folder of save_pretrained, or of a GGUF file in it; (None, None) for an id on the hub, or for weights
    that are no safetensors. One line where it declares more than it has, or names files outside.
    """
    folder = Path(source)
    if gguf_file:
        with reading(f"{flag} {folder / gguf_file}", "a GGUF file", "give a whole one"):
            return check_gguf(folder / gguf_file), (folder / gguf_file).stat().st_size
    if not folder.is_dir():
        return None, None
    check_files(folder)
    if (folder / "adapter_config.json").exists():  # from_pretrained would read the model that it names, wherever that is
        fail(f"{flag} {source} holds adapters of another model: merge them, and give the merged model")
    hint = "give a folder of save_pretrained"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index, dict(weight_map={str: str}), "an index of weights", hint)["weight_map"].values()
        with reading(index, "an index of weights", hint):
            if outside := sorted(name for name in names if Path(name).name != name):
                raise ValueError(f"it names {outside[0][:60]}")
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").exists():
        return None, None
    with reading(f"{flag} {source}", "a model with weights", hint):
        count = sum(count_tensors(file) for file in files)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        expect(config, dict)
        check_layers(config, count)
    return count, sum(file.stat().st_size for file in files)


def count_tensors(file):
    """Tensors that a safetensors file names. Raises ValueError where the names would lie beyond its end."""
    with open(file, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"{file.name} is cut short")
        return len(json.loads(f.read(length)))


def check_layers(config, most):
    """Raise ValueError where a config.json has more than `most` layers: transformers makes lists of that length."""
    for part in [config, *(part for part in config.values() if isinstance(part, dict))]:
        for name, value in part.items():
            if name.endswith(("layers", "n_layer")) and type(value) in (int, float) and value > most:
                raise ValueError(f"config.json has {name} {value}, it has {most} weights")


@contextmanager
def weightless(most, buffers=True):
    """
    A context in which modules are made without memory for their parameters (device meta). buffers: make these in memory.

    Raises ValueError where there are more than `most` parameters. Without this, a config makes any number of layers.
    """
    register, made = nn.Module.register_parameter, 0

    def registered(module, name, p):
        nonlocal made
        made += 1
        if made > most:
            raise ValueError(f"config.json wants more than {most} weights")
        register(module, name, p if p is None or p.is_meta else nn.Parameter(p.to("meta"), p.requires_grad))

    nn.Module.register_parameter = registered
    try:
        with torch.device("cpu" if buffers else "meta"):
            yield
    finally:
        nn.Module.register_parameter = register


def read_tokenizer(source, flag, **options):
    """A tokenizer that can read a text and write it. A damaged one may load, and fail at its first text."""
    from transformers import AutoTokenizer

    definition = Path(source) / "tokenizer.json"
    if definition.is_file() and "gguf_file" not in options:
        with reading(definition, "the definition of a tokenizer", "give a whole one"):
            check_definition(definition.read_text(encoding="utf-8"))
    tokenizer = read(AutoTokenizer, "tokenizer", source, flag, **options)
    with reading(f"{flag} {source}".strip(), "the source of a tokenizer that works", "give a whole one"):
        ids = tokenizer("so it goes 1 2", add_special_tokens=False, truncation=False)["input_ids"]
        expect(tokenizer.decode(ids), str, "its decoded text")
        expect(tokenizer.eos_token_id, (int, None), "its end of text")
        len(tokenizer)
    return tokenizer


def read_model(source, flag, **options):
    """A causal language model with all of its weights -> (the model, from_pretrained's report on its weights)."""
    from transformers import AutoModelForCausalLM

    with fresh_memory_is_nan():
        model, info = read(AutoModelForCausalLM, "weights", source, flag, output_loading_info=True, **options)
    for name, p in model.named_parameters():
        if name not in info["missing_keys"] and not p.isfinite().all():
            fail(f"{flag} {source} has numbers in {name} that are not finite: give a whole model")
    check_complete(model, info, f"{flag} {source}".strip())
    settings = Path(source) / "generation_config.json"
    if settings.is_file() and "gguf_file" not in options:
        read_json(settings, GENERATION, "the settings of a generation", "delete it, or give a whole model")
    with reading(f"{flag} {source}", "a model that computes", "give a whole model"):
        rows = len(model.get_input_embeddings().weight)
        expect(model.config.get_text_config().vocab_size, range(1, rows + 1), "vocab_size")
        check_works(model)
    return model, info


@torch.no_grad()
def check_works(model):
    """Raise an error where a model cannot read two tokens and write one: its config may fit the weights, and be wrong."""
    ids = torch.arange(2)[None]
    if not model(ids).logits.isfinite().all():
        raise ValueError("it computes numbers that are not finite")
    model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
