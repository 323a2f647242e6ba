"""
Load a smaller model from its folder.

    from surgery import load
    model, tokenizer = load("model_weights/smaller")  # a Hugging Face model, with generate() and all its other methods

The folder holds surgery.safetensors, the tokenizer's files, and config.json. Its entry "surgery" is the plan: a list of the
replaced parts, in the form of rank_folder.py or of bits_folder.py.
"""

import json
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn

from common.cli import fail
from common.files import written_whole
from common.hugging_face import check_layers, check_works, read, read_tokenizer, weightless
from common.modules import check_filled, fresh_memory_is_nan
from common.untrusted import WHOLE, read_json, reading

WEIGHTS = "surgery.safetensors"  # not model.safetensors: from_pretrained would fill missing weights with random numbers


def load(folder, device="cpu", packed=True):
    """
    Load a folder that surgery's --out wrote -> (model, tokenizer). If that fails, the program ends in one line, with status 2.

    The folder may come from a stranger. The weights are compared with the model that the config describes before any memory is
    allocated, and no code of the folder runs. packed: applies to quantised models. False decodes the model to float on loading:
    faster, and as large as the untouched model.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(folder) / WEIGHTS
    if not path.is_file() or not path.with_name("config.json").is_file():
        fail(f"{folder} has no model that surgery's --out wrote: give its folder")
    with reading(path, "what its config.json describes", "write the folder again"):
        tensors = load_file(str(path))
        plan, most = read_plan(folder, len(tensors)), 100 + 4 * len(tensors)
        by_bits = "coded" in plan
        kind = import_module("surgery.bits_folder" if by_bits else "surgery.rank_folder")  # import only the kind that is needed
        if by_bits and packed and str(device) != "cpu":
            fail(f"{folder} is quantised, and packed models run on the CPU only: give load(..., packed=False) for {device}")
        config = read(AutoConfig, "config", folder, "", local_files_only=True)
        with fresh_memory_is_nan():
            for buffers in (False, True):
                with weightless(most, buffers):
                    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                if not buffers:
                    kind.check(hf, plan, tensors)
            kind.fill(hf, plan, tensors, *([packed] if by_bits else []))
        check_filled(hf, folder)
        tokenizer = read_tokenizer(folder, "", local_files_only=True)
        hf.eval().requires_grad_(False)
        if not by_bits:
            kind.latents_to_keys(hf)  # for the CPU; .to(another device) restores the stored latents
        check_works(hf)
    if not by_bits or packed or plan.get("cache"):
        hf.save_pretrained = not_a_standard_model
    return hf.to(device), tokenizer


def not_a_standard_model(*given, **options):
    """In place of save_pretrained(): the standard class would fill the parts that are smaller here with random numbers."""
    raise ValueError("a smaller model is not saved by save_pretrained(): python -m export --model FOLDER --out NEW --dense")


# -- writing ----------------------------------------------------------------------------------------------------------


def write_folder(folder, hf, tokenizer, tensors, plan):
    """Write a new folder -> (numbers, bytes) of its weights. If that fails, no folder remains. plan: plain JSON."""
    from safetensors.torch import save_file

    hint = "make room, or choose another folder"
    with written_whole(folder, f"--out: {hint}", errors=(Exception,)) as part:  # safetensors raises errors of its own
        part.mkdir()
        save_file(tensors, str(part / WEIGHTS), metadata=dict(format="pt"))
        config = hf.config.to_dict() | dict(surgery=plan)
        config.pop("_name_or_path", None)  # a path on this machine
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        tokenizer.save_pretrained(part)
        if hf.generation_config is not None:
            hf.generation_config.to_json_file(part / "generation_config.json")  # save_pretrained() refuses some old ones
    return sum(t.numel() for t in tensors.values()), (Path(folder) / WEIGHTS).stat().st_size


# -- the plan ---------------------------------------------------------------------------------------------------------

STACK = dict(parts=[[str, ("q", "k", "v")]], rank=WHOLE)
PARTS = dict(layer=str, q_norm=(str, None), k_norm=(str, None), shape=("BTHn", "BHTn", "BTD"), out=[str], rotates=bool)
LOW_RANK = {"stacks": [STACK], "table": (dict(rank=WHOLE, mean=bool, head=(WHOLE, None)), None), "attention?": [PARTS]}
CODED = {"coded": [str], "cache?": [([[range(1, 17)]], [range(1, 17)])], "attention?": [PARTS]}  # cache: older: one stream


def read_plan(folder, most):
    """
    The plan in config.json, a dict. most: the largest number of layers that the weights can have.

    The file is checked before transformers reads it, since transformers makes a list of as many layers as the file says.
    """
    path = Path(folder) / "config.json"
    what = "the config.json of a model that surgery's --out wrote"
    config = read_json(path, dict(model_type=str, surgery=(LOW_RANK, CODED)), what, "write the folder again")
    check_layers(config, most)
    return config["surgery"]


def put(p, tensor):
    """Fill a parameter of the meta device in place, in float32: all modules that share it get the numbers."""
    torch.utils.swap_tensors(p, nn.Parameter(tensor.float(), requires_grad=False))


def check_tensors(tensors, wanted):
    """Raise ValueError if the tensors' names, shapes or types differ from {name: shape}, or a float is not finite."""
    if differing := sorted(tensors.keys() ^ wanted.keys()):
        raise ValueError(f"{differing[0]} {'is missing' if differing[0] in wanted else 'has no place in the model'}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, it should have {tuple(wanted[name])}")
        if tensor.is_floating_point() == name.endswith(".rows") or not tensor.isfinite().all():
            raise ValueError(f"{name} is damaged")
