"""The GPT of a nanoGPT checkout, to measure beside ours."""

import importlib.util
import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

from common.cli import fail


def check_checkout(folder, flag):
    """folder: what the flag gave."""
    if not (Path(folder) / "model.py").is_file():
        fail(f"{flag} {folder} has no model.py: give the folder of a checkout")


def nanogpt(folder, config, flag):
    """The checkout's GPT with random weights, at the shape of a dense GPTConfig of ours. flag: what gave the folder."""
    module, names = load_module(folder, flag), ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
    try:
        shape = module.GPTConfig(**{name: getattr(config, name) for name in names}, dropout=config.dropout)
    except TypeError as error:  # a GPTConfig of other fields
        fail(f"{flag} {folder}: its model.py is not nanoGPT's ({error}): give the folder of a checkout")
    with redirect_stdout(io.StringIO()):  # it prints its size
        return module.GPT(shape)


def load_module(folder, flag):
    """The checkout's model.py; an error where it is another file."""
    try:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "GPT") or not hasattr(module, "GPTConfig"):
            raise ImportError("it has no GPT and GPTConfig")
        return module
    except Exception as error:  # whatever the file does
        fail(f"{flag} {folder}: its model.py is not nanoGPT's ({type(error).__name__}: {error}): give the folder of a checkout")
