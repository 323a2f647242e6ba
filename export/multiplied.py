"""Turns a low-rank model of surgery back into its standard architecture: each product of factors becomes one plain matrix."""

import math

import torch

from kv_cache.hf_latents import LatentAttention
from kv_cache.hf_layers import find_layers
from util_factorization.modules import LowRank, Uncut


def plain_config(hf, **changes):
    """A copy of a model's config without surgery's entries."""
    ours = ("surgery", "_name_or_path")  # the latter is a path on the machine that made it
    return type(hf.config).from_dict({name: value for name, value in hf.config.to_dict().items() if name not in ours} | changes)


@torch.no_grad()
def multiplied(small, plan):
    """A model with the modules of a low-rank plan -> a model of its standard class with the same logits, float32."""
    changes = dict(tie_word_embeddings=False) if plan["table"] else {}
    hf, kept = type(small)(plain_config(small, **changes)).float().eval(), dict(small.named_parameters(remove_duplicate=False))
    for name, p in hf.named_parameters():
        p.copy_(kept[name]) if name in kept and kept[name].shape == p.shape else p.fill_(math.nan)
    for layer in find_layers(hf) if plan["stacks"] else []:
        attn, own = small.get_submodule(layer.name), hf.get_submodule(layer.name)
        for target in "qkv":
            part = getattr(attn, f"{target}_proj", None)
            if isinstance(part, LowRank):
                layer.set(target, *product(part))
        if isinstance(attn, LatentAttention):  # its own names of the norms and the output projection
            for part, name in (
                (attn.o_proj, attn.parts.out[-1]),
                (attn.q_norm, attn.parts.q_norm),
                (attn.k_norm, attn.parts.k_norm),
            ):
                if name:
                    getattr(own, name).load_state_dict(part.state_dict())
    if plan["table"]:
        table, head = small.get_input_embeddings(), small.get_output_embeddings()
        rows = table(torch.arange(small.config.vocab_size)) / getattr(hf.get_input_embeddings(), "embed_scale", 1)
        hf.get_input_embeddings().weight.copy_(rows)
        hf.get_output_embeddings().weight.copy_(head.wte.weight @ head.scale_down.weight)
    if left := [name for name, p in hf.named_parameters() if not p.isfinite().all()]:
        raise RuntimeError(f"no factor fills {left[0]}")
    return hf


def product(part):
    """A LowRank as one matrix -> (weight [out,in], bias [out] or None)."""
    if isinstance(part, Uncut):
        return part.down.weight, part.down.bias
    return part.up.weight @ part.down.weight, part.up.bias
