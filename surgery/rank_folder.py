"""
A model with low-rank factors on disk. config.json's entry "surgery" is the plan (rank_modules.py).

Each low-rank matrix is stored as a skeleton (decompose_matrix.py), which has fewer numbers than the dense matrix at every rank.
"""

import torch

from kv_cache.hf_latents import LatentAttention
from surgery.folder import check_tensors, put, write_folder
from surgery.rank_modules import install
from util_factorization.decompose_matrix import from_skeleton, skeleton


def stacks_of(hf, plan):
    """The LowRank modules of each stack, in a model that has the plan installed."""
    found = []
    for stack in plan["stacks"]:
        owners = [hf.get_submodule(name) for name, _ in stack["parts"]]
        found.append([getattr(owner, f"{target}_proj") for owner, (_, target) in zip(owners, stack["parts"])])
    return found


def own_names(hf, plan):
    """{parameter: its name} of all parameters outside the stacks. A shared parameter counts once."""
    inside = {p for modules in stacks_of(hf, plan) for m in modules for p in (m.down.weight, m.up.weight)}
    return {p: name for name, p in reversed([*hf.named_parameters(remove_duplicate=False)]) if p not in inside}


def to_stored(hf, plan):
    """The tensors of the file: each stack as a skeleton(), all other parameters under their names."""
    stored = {}
    for i, modules in enumerate(stacks_of(hf, plan)):
        left = torch.cat([module.up.weight for module in modules])
        rows, rest, right = skeleton(left.detach().cpu(), modules[0].down.weight.detach().cpu())
        stored |= {f"stacks.{i}.rows": rows.int(), f"stacks.{i}.rest": rest, f"stacks.{i}.right": right}
    return stored | {name: p.detach().cpu().contiguous() for p, name in own_names(hf, plan).items()}


def save(folder, hf, tokenizer, plan):
    """Write a new folder -> (numbers, bytes) of its weights. If that fails, no folder remains."""
    return write_folder(folder, hf, tokenizer, to_stored(hf, plan), plan)


def check(hf, plan, tensors):
    """Raise an error if to_stored()'s tensors do not fit a model that was made from its config on the meta device."""
    with torch.device("meta"):
        install(hf, plan)
    wanted, heights = {name: p.shape for p, name in own_names(hf, plan).items()}, []
    for i, modules in enumerate(stacks_of(hf, plan)):
        (r, n_in), height = modules[0].down.weight.shape, sum(module.up.out_features for module in modules)
        wanted |= {f"stacks.{i}.rows": (r,), f"stacks.{i}.rest": (height - r, r), f"stacks.{i}.right": (r, n_in)}
        heights.append(height)
    check_tensors(tensors, wanted)
    for i, height in enumerate(heights):
        rows = tensors[f"stacks.{i}.rows"]
        if rows.min() < 0 or rows.max() >= height or len(rows.unique()) < len(rows):
            raise ValueError(f"stacks.{i}.rows is damaged")


def fill(hf, plan, tensors):
    """Install a plan and save()'s tensors in a model that was made from its config on the meta device."""
    with torch.device("meta"):
        install(hf, plan)
    for i, modules in enumerate(stacks_of(hf, plan)):
        rows, rest, right = (tensors[f"stacks.{i}.{part}"] for part in ("rows", "rest", "right"))
        put(modules[0].down.weight, right)
        left = from_skeleton(rows.long(), rest).split([module.up.out_features for module in modules])
        for module, part in zip(modules, left):
            put(module.up.weight, part.clone())
    for p, name in own_names(hf, plan).items():
        if p.is_meta:
            put(p, tensors[name])


def latents_to_keys(hf):
    """Change the basis of each latent that keys and values share: decoding on a CPU in float32 is then faster."""
    for module in hf.modules():
        if isinstance(module, LatentAttention):
            module.latents_to_keys()
