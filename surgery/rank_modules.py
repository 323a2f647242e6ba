"""
Replace q, k, v or the token table of a model by low-rank modules, in place.

A plan lists the replaced parts as plain JSON: {"stacks": [{"parts": [[layer, target], ...], "rank": r}, ...], "table":
{"rank": r, "mean": bool, "head": the rank of an untied head, or None} or None, "attention": layers whose Parts
(hf_attention.py) are not the usual ones}. The parts of a stack share their components: k and v of a layer share one latent,
neighbouring layers share one basis.
"""

import torch
import torch.nn as nn

from common.modules import linear
from kv_cache.hf_attention import attention_entries, parts_in, rotary_tables, usual_parts
from kv_cache.hf_latents import LatentAttention
from kv_cache.hf_layers import find_layers
from util_factorization.modules import FactorizedHead, FactorizedTable, LowRank, SharingLowRank, TiedHead, Uncut


def unset(n_in, n_out, bias=None):
    """A Linear with an unset weight and a bias [out] or None. It is on the bias's device, which may be meta."""
    return linear(torch.empty(n_out, n_in, device=None if bias is None else bias.device), bias)


def unset_table(V, r):
    """An Embedding with unset rows, on torch's present default device: within torch.device("meta") it takes no memory."""
    return nn.Embedding.from_pretrained(torch.empty(V, r), freeze=False)


def install(hf, plan):
    """
    Install the modules of a plan; biases are set, factors are not -> ([LowRanks of each stack], (table, head) or None).

    If k or v is cut, or q, k and v are fused, the attention becomes a LatentAttention. Otherwise only q_proj is replaced.
    """
    layers = {layer.name: layer for layer in find_layers(hf, conv1d=True)} if plan["stacks"] else {}
    turns, others, by_layer, made = rotary_tables(hf), parts_in(plan), {}, []
    for stack in plan["stacks"]:
        made.append([])
        for name, target in stack["parts"]:
            layer = layers[name]
            up = unset(stack["rank"], len(layer.rows[target]), layer.bias(target))
            first = made[-1][0] if made[-1] else None
            part = SharingLowRank(first, up) if first else LowRank(unset(layer.width, stack["rank"]), up)
            by_layer.setdefault(name, {})[target] = part
            made[-1].append(part)
    for name, parts in by_layer.items():
        layer, attn = layers[name], hf.get_submodule(name)
        if layer.fused or parts.keys() & {"k", "v"}:
            its = others.get(name) or usual_parts(attn)
            uncut = {target: Uncut(layer.linear(target)) for target in "qkv" if target not in parts}
            parent, last = name.rsplit(".", 1)
            ours = LatentAttention(attn, *({**parts, **uncut}[target] for target in "qkv"), its, turns(attn, its))
            setattr(hf.get_submodule(parent), last, ours)
        else:
            attn.q_proj = parts["q"]
    return made, install_table(hf, plan["table"]) if plan["table"] else None


def install_table(hf, plan):
    V, d = hf.get_input_embeddings().weight.shape
    wte = unset_table(V, plan["rank"])
    table = FactorizedTable(wte, unset(plan["rank"], d, torch.zeros(d) if plan["mean"] else None))
    bias = hf.get_output_embeddings().bias
    if plan["head"] is None:
        head = TiedHead(table, unset(d, plan["rank"]), bias)
    else:
        head = FactorizedHead(unset_table(V, plan["head"]), unset(d, plan["head"]), bias)
    hf.set_input_embeddings(table)
    hf.set_output_embeddings(head)
    return table, head


@torch.no_grad()
def shrink(hf, cuts, tables=None, parts=None):
    """
    Make a model smaller in place -> its plan.

    cuts: [([(layer name, target), ...], Factors), ...]; tables: {"wte": (Z [V,r], P [r,d], mean [d] or None)}
    and "head" if it is untied, or None. parts: {layer: Parts}, where they are not the usual ones.
    """
    folded = [(parts, *narrowed(*factors.folded())) for parts, factors in cuts]
    plan = dict(stacks=[dict(parts=[list(p) for p in parts], rank=len(right)) for parts, _, right in folded], table=None)
    if tables:
        Z, P, mean = tables["wte"]
        plan["table"] = dict(rank=len(P), mean=mean is not None, head=len(tables["head"][1]) if "head" in tables else None)
        scale = getattr(hf.get_input_embeddings(), "embed_scale", 1)  # Gemma scales each row that it looks up
    if parts:
        plan["attention"] = attention_entries(parts)
    made, ends = install(hf, plan)
    for modules, (_, left, right) in zip(made, folded):
        set_factors(modules, left, right)
    if ends:
        ends[0].wte.weight.copy_(Z)
        ends[0].scale_up.weight.copy_(P.T * scale)
        if mean is not None:
            ends[0].scale_up.bias.copy_(mean * scale)
        Z, P, _ = tables.get("head", tables["wte"])
        ends[1].wte.weight.copy_(Z)
        ends[1].scale_down.weight.copy_(P)
    return plan


def narrowed(left, right):
    """If the mean lifts the rank above the number of outputs, the product itself is smaller: use it."""
    return (left, right) if len(right) <= len(left) else (torch.eye(len(left)), left @ right)


@torch.no_grad()
def set_factors(modules, left, right):
    """Fill the LowRanks of a stack with left [sum of their outputs, r] and right [r,in]."""
    modules[0].down.weight.copy_(right)
    for module, part in zip(modules, left.split([module.up.out_features for module in modules])):
        module.up.weight.copy_(part)
