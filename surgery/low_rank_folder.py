"""
A smaller model's low-rank factors on disk: config.json's entry "surgery" is the plan (low_rank_modules.py).

Each low-rank matrix is stored as a skeleton (decompose_matrix.py): fewer numbers than dense at every rank.
"""

import torch

from surgery.low_rank_modules import install, set_factors
from surgery.model_folder import write_folder
from util_factorization.decompose_matrix import from_skeleton, skeleton


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
    return write_folder(folder, hf, tokenizer, to_stored(hf, plan), plan)


def fill(hf, plan, tensors):
    """Give a model, made from its config, the modules of a plan and the tensors of save()."""
    install(hf, plan)
    from_stored(hf, plan, tensors)
