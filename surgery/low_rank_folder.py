"""
A smaller model on disk.

    from surgery import load
    model, tokenizer = load("model_weights/smaller")  # a Hugging Face model, with generate() and all else

The folder holds surgery.safetensors; config.json, whose entry "surgery" is the plan (low_rank_modules.py); and the tokenizer's
files. Each low-rank matrix is stored as a skeleton (decompose_matrix.py): fewer numbers than dense at every rank.
"""

import json
from pathlib import Path

import torch

from common.cli import fail
from common.files import written_whole
from surgery.low_rank_modules import install, set_factors
from util_factorization.decompose_matrix import from_skeleton, skeleton

WEIGHTS = "surgery.safetensors"  # not model.safetensors: from_pretrained would fill in what it misses with random numbers


def stacks_of(hf, plan):
    """The LowRanks of every stack of a plan that is installed in a model."""
    found = []
    for stack in plan["stacks"]:
        owners = [hf.get_submodule(name) for name, _ in stack["parts"]]
        found.append([getattr(owner, f"{target}_proj") for owner, (_, target) in zip(owners, stack["parts"])])
    return found


def to_stored(hf, plan):
    """The tensors of the file: each stack as a skeleton(), all others under their names, a shared one once."""
    stored, inside = {}, set()
    for i, modules in enumerate(stacks_of(hf, plan)):
        down = modules[0].down
        left = torch.cat([module.up.weight for module in modules])
        rows, rest, right = skeleton(left.detach().cpu(), down.weight.detach().cpu())
        stored |= {f"stacks.{i}.rows": rows.int(), f"stacks.{i}.rest": rest, f"stacks.{i}.right": right}
        inside |= {down.weight, *(module.up.weight for module in modules)}
    own = {p: name for name, p in reversed([*hf.named_parameters(remove_duplicate=False)]) if p not in inside}
    return stored | {name: p.detach().cpu().contiguous() for p, name in own.items()}


def from_stored(hf, plan, tensors):
    """Fill a model, the plan installed, with the tensors of to_stored(). Raises where a name or a shape does not fit."""
    for i, modules in enumerate(stacks_of(hf, plan)):
        rows, rest, right = (tensors.pop(f"stacks.{i}.{part}") for part in ("rows", "rest", "right"))
        set_factors(modules, from_skeleton(rows.long(), rest), right)
    own, factors = dict(hf.named_parameters(remove_duplicate=False)), set()
    for modules in stacks_of(hf, plan):
        factors |= {modules[0].down.weight, *(module.up.weight for module in modules)}
    for name, tensor in tensors.items():
        own[name].data.copy_(tensor)
    if missing := [name for name, p in hf.named_parameters() if name not in tensors and p not in factors]:
        raise KeyError(f"{missing[0]} is missing")


def save(folder, hf, tokenizer, plan):
    """Write a new folder, whole or not at all -> (numbers, bytes) of its weights."""
    from safetensors.torch import save_file

    tensors = to_stored(hf, plan)
    hint = "make room, or choose another folder"
    with written_whole(folder, f"--out: {hint}", errors=(Exception,)) as part:  # safetensors raises errors of its own
        part.mkdir()
        save_file(tensors, str(part / WEIGHTS), metadata=dict(format="pt"))
        config = hf.config.to_dict() | dict(surgery=plan)
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        tokenizer.save_pretrained(part)
        if hf.generation_config is not None:
            hf.generation_config.save_pretrained(part)
    return sum(t.numel() for t in tensors.values()), (Path(folder) / WEIGHTS).stat().st_size


def load(folder, device="cpu"):
    """A folder that surgery's --out wrote -> (model, tokenizer); one line and status 2 where it cannot be."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
        plan = config.surgery
    except (OSError, ValueError, AttributeError):
        fail(f"{folder} has no model that surgery's --out wrote: give its folder")
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    install(hf, plan)
    try:
        from_stored(hf, plan, load_file(str(Path(folder) / WEIGHTS)))
    except Exception as error:  # safetensors and torch raise their own
        fail(f"{folder}/{WEIGHTS} does not fit its config.json ({' '.join(str(error).split())[:80]}): write it again")
    return hf.to(device).eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)
