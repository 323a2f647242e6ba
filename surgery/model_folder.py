"""
The folder of a smaller model: surgery.safetensors, the tokenizer's files, and config.json. Its entry "surgery" is the plan: a
list of the replaced parts, in the form of low_rank_folder.py or of coded_folder.py.
"""

import json
from pathlib import Path

import torch
import torch.nn as nn

from common.files import written_whole
from common.hugging_face import check_layers
from common.untrusted import WHOLE, read_json

WEIGHTS = "surgery.safetensors"  # not model.safetensors: from_pretrained would fill missing weights with random numbers


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
            hf.generation_config.save_pretrained(part)
    return sum(t.numel() for t in tensors.values()), (Path(folder) / WEIGHTS).stat().st_size


# -- reading ----------------------------------------------------------------------------------------------------------

STACK = dict(parts=[[str, ("q", "k", "v")]], rank=WHOLE)
LOW_RANK = dict(stacks=[STACK], table=(dict(rank=WHOLE, mean=bool, head=(WHOLE, None)), None))
CODED = {"coded": [str], "cache?": [([[range(1, 17)]], [range(1, 17)])]}  # the latter: one stream, in older folders


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
