"""
Loads models and tokenizers of Hugging Face, or ends with one line that says why it cannot.

A folder or file may be untrusted, and transformers trusts any declared number of layers. So check_source() compares the
declared sizes with the bytes before transformers reads them. Code in the folder does not run, and no file outside the folder is
read.
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
from common.modules import check_complete, fresh_memory_is_nan
from common.tokenizer import check_definition
from common.untrusted import check_plain, expect, of_reader, read_json, reading
from common.versions import check_transformers, refuse_import

check_transformers(refuse_import)  # a program says it in one line: cli.last_words()
GROWTH = 2.5  # float32 bytes relative to a half-precision file, and some more for tensors that are not stored
GROWTH_GGUF = 32  # float32 bytes relative to 1 bit a number
GENERATION = {name: (range(1, 65), None) for name in ("num_beams?", "num_return_sequences?", "num_beam_groups?")}


def is_hub_id(name):
    """Whether a name can be an id on the hub: gpt2, or EleutherAI/pythia-70m if there is no folder EleutherAI."""
    fits = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) and not str(name).startswith(".")
    return bool(fits) and not Path(name).exists() and ("/" not in str(name) or not Path(name).parent.exists())


@lru_cache
def hub_error(name):
    """Ask the hub for a model, once, at most 5 seconds -> "" if the hub has it, otherwise the name of the error."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=5)
        return ""
    except Exception as error:  # the network library raises its own types
        return type(error).__name__


def is_cached(name):
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def from_where(source, flag):
    """Options of from_pretrained: use only the cache if the hub does not answer. Without them, transformers waits minutes."""
    if not is_hub_id(source) or not (why := hub_error(str(source))):
        return {}
    if is_cached(str(source)):
        return dict(local_files_only=True)
    if why == "RepositoryNotFoundError":
        fail(f"{flag} {source} is neither a folder here nor a model on the hub: give one of them")
    fail(
        f"{flag} {source} is not a folder here, and the Hugging Face hub does not answer ({why}): give a folder of "
        "save_pretrained, or set HF_HOME to a cache that has it"
    )


def read(kind, what, source, flag, **options):
    """kind.from_pretrained(source, **options), or end in one line. kind: an Auto class. what: its name in the message."""
    if not Path(source).is_dir() and not is_hub_id(source):
        fail(f"{flag} {source} is not a folder: give a folder of save_pretrained, or an id on the hub")
    options = from_where(source, flag) | options
    if Path(source).is_dir() and "gguf_file" not in options:
        check_files(Path(source))
    try:
        with parsed_once() if "gguf_file" in options else nullcontext():
            return kind.from_pretrained(source, trust_remote_code=False, **options)
    except BaseException as error:  # the network library and every reader raise their own types
        if not of_reader(error):
            raise
        if "trust_remote_code" in str(error):
            fail(
                f"{flag} {source} contains code, which does not run here: give its base model. To use it "
                "as it is: python -m surgery.eval --trust_remote_code, or from_pretrained(..., trust_remote_code=True)"
            )
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        fail(f"{flag} {source} has no {what} that loads ({why}): give an id on the hub, or a folder of save_pretrained")


@contextmanager
def parsed_once():
    """
    A context in which a GGUF file's header is parsed only once. transformers parses it for the config, for the weights and for
    the tokenizer; each time takes 3 s of Python for 49,152 tokens.
    """
    import gguf

    plain, gguf.GGUFReader = gguf.GGUFReader, lambda path: parsed_gguf(str(path), Path(path).stat().st_mtime_ns)
    try:
        yield
    finally:
        gguf.GGUFReader = plain


@lru_cache(maxsize=1)
def parsed_gguf(path, changed):
    """changed: the time of the file's last change."""
    from gguf.gguf_reader import GGUFReader

    return GGUFReader(path)


def read_config(source, flag, **options):
    """The config of a model. For a folder or a file, its declared sizes are checked against its bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    most, size = check_source(source, flag, **options)
    config = read(AutoConfig, "config", source, flag, **options)
    if most is not None and (
        options or not getattr(config, "quantization_config", None)
    ):  # the caller refuses quantized models
        growth = GROWTH_GGUF if options else GROWTH
        with reading(f"{flag} {source}", "a model whose config fits its weights", "give a complete model"):
            with weightless(100 + 4 * most, buffers=False):
                model = AutoModelForCausalLM.from_config(config)
            if (wanted := sum(4 * p.numel() for p in model.parameters())) > growth * size + 2**20:
                raise ValueError(f"its config needs {wanted:,} bytes, its weights have {size:,}")
    return config


def check_files(folder):
    """End in one line if any file is a device or a pipe. from_pretrained may read any file of the folder."""
    for path in folder.iterdir():
        if not path.is_dir():
            with reading(path, "a file of a model", "delete it"):
                check_plain(path)


def check_source(source, flag, gguf_file=None):
    """
    (Number of weights, bytes) of a folder of save_pretrained, or of a GGUF file in it; (None, None) for an id on the hub, or
    for weights that are not safetensors. Ends in one line if it declares more than it has, or names files outside the folder.
    """
    folder = Path(source)
    if gguf_file:
        from common.gguf_file import check_gguf

        with reading(f"{flag} {folder / gguf_file}", "a GGUF file", "give a complete one"):
            return check_gguf(folder / gguf_file), (folder / gguf_file).stat().st_size
    if not folder.is_dir():
        return None, None
    check_files(folder)
    if (folder / "adapter_config.json").exists():  # from_pretrained would read the model named there, from anywhere
        fail(f"{flag} {source} has adapters of another model: merge them, and give the merged model")
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
    """The tensors that a safetensors file names. Raises ValueError if its list of names would go beyond the file's end."""
    with open(file, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"{file.name} is cut short")
        return len(json.loads(f.read(length)))


def check_layers(config, most):
    """Raise ValueError if a config.json has more than `most` layers, since transformers makes lists of that length."""
    for part in [config, *(part for part in config.values() if isinstance(part, dict))]:
        for name, value in part.items():
            counts = name.endswith(("layers", "n_layer")) and name != "max_window_layers"  # Qwen 2's may be any number
            if counts and type(value) in (int, float) and value > most:
                raise ValueError(f"config.json has {name} {value}, but there are {most} weights")


@contextmanager
def weightless(most, buffers=True):
    """
    A context in which modules are made without memory for their parameters (device meta). buffers: give buffers memory.

    Raises ValueError if there are more than `most` parameters. Without this limit, a config could make any number of layers.
    """
    register, made = nn.Module.register_parameter, 0

    def registered(module, name, p):
        nonlocal made
        made += 1
        if made > most:
            raise ValueError(f"config.json needs more than {most} weights")
        register(module, name, p if p is None or p.is_meta else nn.Parameter(p.to("meta"), p.requires_grad))

    nn.Module.register_parameter = registered
    try:
        with torch.device("cpu" if buffers else "meta"):
            yield
    finally:
        nn.Module.register_parameter = register


def read_tokenizer(source, flag, **options):
    """Load a tokenizer and test it on a text: a damaged tokenizer may load, and fail at its first text."""
    from transformers import AutoTokenizer

    definition = Path(source) / "tokenizer.json"
    if definition.is_file() and "gguf_file" not in options:
        with reading(definition, "the definition of a tokenizer", "give a complete one"):
            check_definition(definition.read_text(encoding="utf-8"))
    tokenizer = read(AutoTokenizer, "tokenizer", source, flag, **options)
    with reading(f"{flag} {source}".strip(), "the source of a tokenizer that works", "give a complete one"):
        ids = tokenizer("so it goes 1 2", add_special_tokens=False, truncation=False)["input_ids"]
        expect(tokenizer.decode(ids), str, "its decoded text")
        expect(tokenizer.eos_token_id, (int, None), "its end of text")
        len(tokenizer)
    return tokenizer


def read_model(source, flag, **options):
    """Load a causal language model with all its weights -> (the model, from_pretrained's report on its weights)."""
    from transformers import AutoModelForCausalLM

    with fresh_memory_is_nan():
        model, info = read(AutoModelForCausalLM, "weights", source, flag, output_loading_info=True, **options)
    for name, p in model.named_parameters():
        if name not in info["missing_keys"] and not p.isfinite().all():
            fail(f"{flag} {source} has NaN or infinite numbers in {name}: give an undamaged model")
    check_complete(model, info, f"{flag} {source}".strip())
    settings = Path(source) / "generation_config.json"
    if settings.is_file() and "gguf_file" not in options:
        read_json(settings, GENERATION, "the settings of generation", "delete it, or give an undamaged model")
    with reading(f"{flag} {source}", "a model that computes", "give an undamaged model"):
        rows = len(model.get_input_embeddings().weight)
        expect(model.config.get_text_config().vocab_size, range(1, rows + 1), "vocab_size")
        check_works(model)
    return model, info


@torch.no_grad()
def check_works(model):
    """Raise an error if a model cannot read two tokens and write one. A config may fit the weights and still be wrong."""
    ids = torch.arange(2)[None]
    if not model(ids).logits.isfinite().all():
        raise ValueError("it computes NaN or infinite numbers")
    model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
