"""
A model that surgery made smaller: low-rank factors instead of q, k, v or the token table, on disk, in memory and in the cache.

    from surgery.low_rank_model import load
    model, tokenizer = load("model_weights/smaller")  # a Hugging Face model: generate() and all that it can

The folder holds surgery.safetensors, where each low-rank matrix is stored as a skeleton (attention.py), so that it has fewer
numbers than the dense one at every rank; config.json, whose entry "surgery" is the plan; and the tokenizer's files. A plan is
plain JSON: {"stacks": [{"parts": [[layer, target], ...], "rank": r}, ...], "table": {"rank": r, "mean": bool, "head": the rank
of a head of its own, or None} or None}. The parts of a stack share what they read: k and v of a layer one latent, neighbouring
layers one set of components.

Shapes: B texts, T positions at hand, S of them in the cache, H heads, G of keys and values, n numbers a head, r a rank.
"""

import json
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

from common.cli import fail
from surgery.layers import find_layers
from util_factorization.decompose_matrix import from_skeleton, skeleton

WEIGHTS = "surgery.safetensors"  # not model.safetensors: from_pretrained would fill in what it misses with random numbers


class LowRank(nn.Module):
    """y = up (down x) [+ bias]: down [r,in] and up [out,r]; `down` may serve several of them."""

    def __init__(self, down, up):
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x):
        return self.up(self.down(x))


class Turns:
    """The model's own cosines and sines, of every position so far; kept, since each layer reads them at each step."""

    def __init__(self, rotary):
        self.rotary, self.cos, self.sin = rotary, torch.empty(1, 0, 0), None

    def __call__(self, S, like):
        """-> cos and sin (1, S, n), or less than n where a part of the head is not rotated"""
        if self.cos.shape[1] < S or self.cos.device != like.device or self.cos.dtype != like.dtype:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may be trained with later
                positions = torch.arange(max(64, 2 * S), device=like.device)[None]
                self.cos, self.sin = self.rotary(torch.empty(0, dtype=like.dtype, device=like.device), positions)
        return self.cos[:, :S], self.sin[:, :S]


def rotated(x, cos, sin):
    """x (B, heads, T, n): number i and number i + rot/2 of the first `rot` are a pair, as in Llama and GPT-NeoX."""
    half = cos.shape[-1] // 2  # both halves of cos and sin are the same
    a, b, rest = x.tensor_split((half, 2 * half), dim=-1)
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin), rest], dim=-1)


class LatentAttention(nn.Module):
    """
    Attention that caches what is under its keys and values: r numbers a token where both have one latent, r_k + r_v where each
    has its own, in place of 2 G n. Keys are restored and rotated on reading. A single token's values are not restored at all:
    its heads weigh the latents, and H sums are restored instead of S positions.

    Scores hang on distances alone, so positions are counted from the cache's first, which left padding does not disturb.
    """

    def __init__(self, attn, q, k, v, turns):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q, k, v
        self.o_proj = attn.o_proj if hasattr(attn, "o_proj") else attn.dense
        self.q_norm, self.k_norm = (getattr(attn, name, nn.Identity()) for name in ("q_norm", "k_norm"))
        self.n = attn.head_dim if hasattr(attn, "head_dim") else attn.head_size
        self.scaling, self.layer_idx, self.turns = attn.scaling, attn.layer_idx, turns

    def heads(self, x):
        return x.unflatten(-1, (-1, self.n))  # (B, T, heads, n)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, layer_past=None, **_):
        x, cache = hidden_states, layer_past if past_key_values is None else past_key_values
        q, c_k = self.q_norm(self.heads(self.q_proj(x))).transpose(1, 2), self.k_proj.down(x)
        shared = self.v_proj.down is self.k_proj.down
        c_v = c_k[..., :0] if shared else self.v_proj.down(x)
        if getattr(cache, "is_compileable", False):
            raise NotImplementedError("a static cache has no end to count positions from: leave cache_implementation out")
        if cache is not None:
            c_k, c_v = (c[:, 0] for c in cache.update(c_k[:, None], c_v[:, None], self.layer_idx))  # (B, S, r)
        c_v = c_k if shared else c_v
        k = self.k_norm(self.heads(self.k_proj.up(c_k))).transpose(1, 2)  # (B, G, S, n)
        (T, S), (cos, sin) = (q.shape[2], k.shape[2]), self.turns(k.shape[2], x)
        q, k = rotated(q, cos[:, S - T :], sin[:, S - T :]), rotated(k, cos, sin)
        if T == 1 and isinstance(self.v_proj.up, nn.Linear):
            y = self.late(q, k, c_v, attention_mask)
        else:
            v = self.heads(self.v_proj.up(c_v)).transpose(1, 2)
            causal = attention_mask is None and T > 1
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attention_mask, is_causal=causal, scale=self.scaling, enable_gqa=True
            ).transpose(1, 2)  # (B, T, H, n)
        return self.o_proj(y.flatten(-2)), None

    def late(self, q, k, c, mask):
        """One query (B, H, 1, n), keys (B, G, S, n), latents of the values (B, S, r) -> (B, 1, H, n)"""
        q = q.unflatten(1, (k.shape[1], -1))[:, :, :, 0]  # (B, G, H/G, n)
        scores = self.scaling * q @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        sums = scores.softmax(-1).flatten(1, 2) @ c  # (B, H, r)
        up = self.heads(self.v_proj.up.weight.T).permute(1, 0, 2)  # (G, r, n)
        y = sums.unflatten(1, (len(up), -1)) @ up  # (B, G, H/G, n)
        if self.v_proj.up.bias is not None:
            y = y + self.heads(self.v_proj.up.bias)[:, None]
        return y.flatten(1, 2)[:, None]


class FactorizedTable(nn.Module):
    """The lookup: rows of wte [V,k], then scale_up [d,k], whose bias is the mean row of methods that have one."""

    def __init__(self, wte, scale_up):
        super().__init__()
        self.wte, self.scale_up = wte, scale_up

    def forward(self, x):
        return self.scale_up(self.wte(x))


class FactorizedHead(nn.Module):
    """The head: scale_down [k,d], then wte [V,k], the table's own where they are tied. It needs no mean."""

    def __init__(self, wte, scale_down):
        super().__init__()
        self.wte, self.scale_down = wte, scale_down

    def forward(self, h):
        return self.scale_down(h) @ self.wte.weight.T


# -- building ---------------------------------------------------------------------------------------------------------


def linear(n_in, n_out, bias=None):
    """A Linear whose weight is not set yet; bias [out] or None."""
    made = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias is not None)
    if bias is not None:
        made.bias.data.copy_(bias)
    return made


def check_attention(hf, layers):
    """Refuse, in a line, attention that a LatentAttention would not compute."""
    kind = hf.config.model_type
    rope = getattr(hf.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        fail(f"--out: the rotary angles of this {kind} change with the length of the text, and latents are rotated anew")
    for attn in map(hf.get_submodule, [layer.name for layer in layers]):
        whole = all(hasattr(attn, name) for name in ("scaling", "layer_idx")) and (
            hasattr(attn, "o_proj") or hasattr(attn, "dense")
        )
        n = getattr(attn, "head_dim", getattr(attn, "head_size", None))
        by_head = all(
            norm.weight.numel() == n for name in ("q_norm", "k_norm") if (norm := getattr(attn, name, None)) is not None
        )
        if not (whole and by_head and getattr(attn, "use_rope", True) and hasattr(hf.base_model, "rotary_emb")):
            fail(f"--out: {type(attn).__name__} attends in a way of its own: give a Llama, Mistral, Qwen or NeoX")


def install(hf, plan):
    """
    Give a model the modules of a plan, with biases set and factors not -> ([LowRanks of each stack], (table, head) or None).

    Attention that loses k or v, or whose q, k and v are fused, becomes a LatentAttention; of others the one projection changes.
    """
    layers = {layer.name: layer for layer in find_layers(hf)} if plan["stacks"] else {}
    turns, by_layer, made = Turns(getattr(hf.base_model, "rotary_emb", None)), {}, []
    for stack in plan["stacks"]:
        down = linear(layers[stack["parts"][0][0]].width, stack["rank"])
        made.append([])
        for name, target in stack["parts"]:
            layer = layers[name]
            part = LowRank(down, linear(stack["rank"], len(layer.rows[target]), layer.bias(target)))
            by_layer.setdefault(name, {})[target] = part
            made[-1].append(part)
    for name, parts in by_layer.items():
        layer, attn = layers[name], hf.get_submodule(name)
        if layer.fused or parts.keys() & {"k", "v"}:
            whole = {target: LowRank(layer.linear(target), nn.Identity()) for target in "qkv" if target not in parts}
            parent, last = name.rsplit(".", 1)
            setattr(hf.get_submodule(parent), last, LatentAttention(attn, *({**parts, **whole}[t] for t in "qkv"), turns))
        else:
            attn.q_proj = parts["q"]
    return made, install_table(hf, plan["table"]) if plan["table"] else None


def install_table(hf, plan):
    V, d = hf.get_input_embeddings().weight.shape
    wte = nn.utils.skip_init(nn.Embedding, V, plan["rank"])
    table = FactorizedTable(wte, linear(plan["rank"], d, torch.zeros(d) if plan["mean"] else None))
    own = wte if plan["head"] is None else nn.utils.skip_init(nn.Embedding, V, plan["head"])
    head = FactorizedHead(own, linear(d, own.embedding_dim))
    hf.set_input_embeddings(table)
    hf.set_output_embeddings(head)
    return table, head


@torch.no_grad()
def shrink(hf, cuts, tables=None):
    """
    Make a model smaller in place -> its plan.

    cuts: [([(layer name, target), ...], Factors), ...]; tables: {"wte": (Z [V,r], P [r,d], mean [d] or None)}
    and "head" where that is another matrix, or nothing.
    """
    folded = [(parts, *narrowed(*factors.folded())) for parts, factors in cuts]
    plan = dict(stacks=[dict(parts=[list(p) for p in parts], rank=len(right)) for parts, _, right in folded], table=None)
    if tables:
        Z, P, mean = tables["wte"]
        plan["table"] = dict(rank=len(P), mean=mean is not None, head=len(tables["head"][1]) if "head" in tables else None)
        scale = getattr(hf.get_input_embeddings(), "embed_scale", 1)  # Gemma's, of a looked-up row
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
    """A rank above the outputs, which a mean can make of full rank, is none."""
    return (left, right) if len(right) <= len(left) else (torch.eye(len(left)), left @ right)


@torch.no_grad()
def set_factors(modules, left, right):
    """Into the LowRanks of a stack: left [out of them all, r], right [r,in]."""
    modules[0].down.weight.copy_(right)
    for module, part in zip(modules, left.split([module.up.out_features for module in modules])):
        module.up.weight.copy_(part)


# -- on disk ----------------------------------------------------------------------------------------------------------


def stacks_of(hf, plan):
    """The LowRanks of every stack of the plan, which a model has had installed."""
    found = []
    for stack in plan["stacks"]:
        owners = [hf.get_submodule(name) for name, _ in stack["parts"]]
        found.append([getattr(owner, f"{target}_proj") for owner, (_, target) in zip(owners, stack["parts"])])
    return found


def to_stored(hf, plan):
    """The tensors of a file: each stack as a skeleton(), everything else under its own name, a shared one once."""
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
    """Fill an installed model with what to_stored() gave. Raises where a name or a shape does not fit."""
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
    """Write a folder, whole or not at all; one that exists is refused. Returns (numbers, bytes) of its weights."""
    from safetensors.torch import save_file

    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        tensors = to_stored(hf, plan)
        save_file(tensors, str(part / WEIGHTS), metadata=dict(format="pt"))
        config = hf.config.to_dict() | dict(surgery=plan)
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        tokenizer.save_pretrained(part)
        if hf.generation_config is not None:
            hf.generation_config.save_pretrained(part)
        size = sum(t.numel() for t in tensors.values()), (part / WEIGHTS).stat().st_size
        os.replace(part, folder)
    except Exception as error:  # safetensors, tokenizers and the file system raise their own
        shutil.rmtree(part, ignore_errors=True)
        fail(f"--out {folder} cannot be written ({' '.join(str(error).split())[:80]}): make room, or choose another folder")
    return size


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


# -- measures ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def cache_bytes(hf, ids):
    """Bytes a token of the cache that a model fills with ids [n]: counted on its tensors."""
    cache = hf(ids[None].to(hf.device), use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors) / len(ids)


@torch.inference_mode()
def decode_speeds(models, ids, steps=24, rounds=3):
    """Tokens/s of greedy decoding after the prompt ids [n], by turns -> for each model a list, one number a round."""
    speeds = [[] for _ in models]
    for _ in range(rounds + 1):  # the first warms up
        for hf, found in zip(models, speeds):
            out = hf(ids[None].to(hf.device), use_cache=True, logits_to_keep=1)
            out.logits[0, -1].argmax().item()  # waits for the device
            start = time.perf_counter()
            for _ in range(steps):
                token = out.logits[:, -1:].argmax(-1)
                out = hf(token, past_key_values=out.past_key_values, use_cache=True)
            out.logits[0, -1].argmax().item()  # waits for the device
            found.append(steps / (time.perf_counter() - start))
    return [found[1:] for found in speeds]
