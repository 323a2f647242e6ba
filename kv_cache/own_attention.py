"""
Attention over the cache of a compressed model, without restoring all positions at each step.

Notation: c_j is the cache entry of position j, r numbers; R and b restore it. H heads, n numbers per head, S positions.

**Values.** v_j = R c_j + b, and a head has weights a_j that sum to 1. So its output is

    sum_j a_j v_j = R (sum_j a_j c_j) + b

We restore one sum per head instead of S values.

**Keys.** The score of a query q is q (R c_j + b) = (R^T q) c_j + q b. The second term is the same for all j, and the softmax
cancels it. So no key has to be restored if the head is not rotated. In a rotated head, a pair (x, y) of the key at angle t and
the pair (e, f) of the query have the score

    cos t (e x + f y) + sin t (f x - e y)

Both brackets are linear in c_j: two numbers per pair and position, and still no key is restored. An orthogonal change of basis
of the cached numbers, made beforehand, lets the rotated part depend on as few of them as possible.

Two ways to attend:

    restore   restore all S positions at each step, then attend as in training
    late      attend over the cached numbers, then restore the sums of the heads

restore converts the entire cache to the model's dtype at each step. late reads its rows in place (number_formats.py), except
compressed keys that are rotated, which it converts.

late also joins v_proj and v_compress into one smaller matrix, and k_proj and k_compress into another. It processes single
tokens; a prompt is restored once for all of its queries. Both give the same output to 1e-4. A third way multiplied R into
c_proj: it was slower than late in 28 of 30 measurements (results/speed, results/vdproj) and is gone.
"""

import statistics
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn as nn

from common.modules import linear, shared_copy
from common.timing import by_turns
from kv_cache.number_formats import FLOATS
from kv_cache.own_cache import InPlace, KVCache, LayerCache, Store
from model import NO_CACHE, CausalSelfAttention, NoRotary
from util_factorization.modules import restore_sums

WAYS = ("restore", "late")


def is_compressed(model):
    """Whether the model compresses its keys or its values."""
    return any(is_linear(part) for block in model.transformer.h for part in (block.attn.v_restore, block.attn.k_restore))


def is_linear(part):
    return not isinstance(part, nn.Identity)


@torch.no_grad()
def decoder(model, way):
    """
    A model for inference that attends by one of WAYS. It shares the weights of `model`, which is not changed.
    """
    if way == "restore":
        return model
    blocks = nn.ModuleList(shared_copy(block, attn=LateAttention(block.attn)) for block in model.transformer.h)
    return shared_copy(model, transformer=shared_copy(model.transformer, h=blocks))


@dataclass
class Restoring:
    """k_restore and v_restore by head; None for keys or values without compression. D: rotated numbers of all heads."""

    v: torch.Tensor | None = None  # (H, r_v, n)
    v_bias: torch.Tensor | None = None  # (H, n)
    k: torch.Tensor | None = None  # (H, n - D/H, r_k): for the numbers that are not rotated
    pairs: tuple = ()  # two (H, D/2H, min(D, r_k) + 1): for a pair's first and second number, bias last
    turns: torch.Tensor | None = None  # (block_size, D): the rotary table, cosines and sines per head


class LateAttention(CausalSelfAttention):
    """
    Attends over the cached numbers. It shares all weights of a CausalSelfAttention except those that compress.

    It reads Stores in place and restores no key. LatentAttention.late() in hf_attention.py does this for values in Hugging
    Face's cache, with masks and grouped heads.
    """

    def __init__(self, attn):
        nn.Module.__init__(self)
        self.n_head, self.dropout = attn.n_head, attn.dropout
        for name, module in (attn._modules | joined(attn)).items():
            setattr(self, name, module)
        weight = self.c_proj.weight
        # small products in half precision are slow on a CPU
        self.arithmetic = torch.float32 if weight.device.type == "cpu" else weight.dtype
        self.restoring = restoring(self, self.arithmetic)

    def forward(self, x, cache=NO_CACHE):
        if x.shape[1] > 1:
            return super().forward(x, cache)
        if cache is NO_CACHE:
            cache = LayerCache(
                *(Store("float32", len(x), 1, proj.out_features, x.device) for proj in (self.k_proj, self.v_proj))
            )
        return super().forward(x, InPlace(cache))

    def attend(self, q, k, v):
        if not isinstance(k, Store):
            return super().attend(q, k, v)
        return self.single(q.to(self.arithmetic), k, v).to(q.dtype)

    def single(self, q, k, v):
        """attend() for one query over Stores."""
        sums, R = self.sums(q, k, v), self.restoring
        return sums.flatten(1)[:, None] if R.v is None else restore_sums(sums, R.v, R.v_bias)

    def sums(self, q, k, v):
        """-> (B, H, r_v): each head's weighted sum of the cached values; without compression, of its own n numbers."""
        q = q.unflatten(-1, (self.n_head, -1))[:, 0] * (q.shape[-1] // self.n_head) ** -0.5  # (B, H, n)
        return v.sums(self.scores(q, k).softmax(-1), self.n_head if self.restoring.v is None else 1)

    def scores(self, q, k):
        """A query (B, H, n), keys in a Store -> (B, H, S), up to a constant that is the same for all S."""
        R = self.restoring
        if R.k is None:
            return k.scores(q, self.n_head)
        dims = q.shape[-1] - R.k.shape[1]
        if not dims:
            return k.scores((q[:, :, None] @ R.k)[:, :, 0], 1)
        kept, (e, f), (a, b) = k.read(q.dtype), q[..., :dims, None].chunk(2, 2), R.pairs  # e and f (B, H, dims/2, 1)
        products = torch.cat([e * a + f * b, f * a - e * b], 2).flatten(1, 2)  # (B, D, min(D, r_k) + 1)
        found = torch.baddbmm(products[:, None, :, -1], kept[..., : a.shape[-1] - 1], products[..., :-1].transpose(1, 2))
        found = (found * R.turns[: k.length]).unflatten(-1, (self.n_head, -1))  # (B, S, H, dims)
        return (q[:, :, None, dims:] @ R.k)[:, :, 0] @ kept.transpose(1, 2) + found.sum(-1).transpose(1, 2)


def rotated_dims(attn):
    return 0 if isinstance(attn.rotary, NoRotary) else attn.rotary.dims


def joined(attn):
    """{name: module}: k_proj or v_proj and its compression as one Linear(d, r); keys in the basis of rotation_basis()."""
    parts = {}
    for kind in "kv":
        proj, compress, restore = (getattr(attn, f"{kind}_{part}") for part in ("proj", "compress", "restore"))
        if is_linear(compress):
            weight, bias = compress.weight @ proj.weight, proj.bias
            bias = None if bias is None else compress.weight @ bias + compress.bias
            if kind == "k":
                basis = rotation_basis(attn).to(weight)
                weight, bias = basis.T @ weight, None if bias is None else basis.T @ bias
                parts["k_restore"] = linear(restore.weight @ basis, restore.bias)
            parts[f"{kind}_proj"], parts[f"{kind}_compress"] = linear(weight, bias), nn.Identity()
    return parts


def rotation_basis(attn):
    """Orthogonal Q [r, r] with R Q = [L, 0]. R are the D rows of k_restore that are rotated; L is [D, min(D, r)]."""
    rows = attn.k_restore.weight.unflatten(0, (attn.n_head, -1))[:, : rotated_dims(attn)].flatten(0, 1)
    return torch.linalg.qr(rows.T.double(), mode="complete").Q


def restoring(attn, dtype):
    H, dims, out = attn.n_head, rotated_dims(attn), Restoring()
    if is_linear(attn.v_restore):
        out.v = attn.v_restore.weight.to(dtype).unflatten(0, (H, -1)).transpose(1, 2).contiguous()
        if attn.v_restore.bias is not None:
            out.v_bias = attn.v_restore.bias.to(dtype).unflatten(0, (H, -1))
    if is_linear(attn.k_restore):
        weight, bias = attn.k_restore.weight.to(dtype), attn.k_restore.bias
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.to(dtype)
        weight, bias = weight.unflatten(0, (H, -1)), bias.unflatten(0, (H, -1, 1))  # (H, n, r_k), (H, n, 1)
        out.k = weight[:, dims:].contiguous()
        if dims:
            out.pairs = torch.cat([weight[:, :dims, : H * dims], bias[:, :dims]], -1).chunk(2, 1)
            out.turns = torch.cat([attn.rotary.cos, attn.rotary.sin], -1).expand(-1, H, -1).flatten(1).to(weight)
    return out


class Decode:
    """A task to time: decode the same tokens after the same context."""

    def __init__(self, model, cache, tokens):
        """model: a decoder(). cache: contains the context. tokens (B, steps), read one after the other."""
        self.model, self.cache, self.tokens, self.context = model, cache, tokens, cache.length

    def prepare(self):
        self.cache.truncate(self.context)

    @torch.inference_mode()
    def run(self):
        for i in range(self.tokens.shape[1]):
            self.model.logits(self.model.hidden(self.tokens[:, i : i + 1], self.cache)).argmax(-1).tolist()  # waits for a GPU


def fastest(model, B, context, kv_dtype):
    """-> (name of the fastest way at this context length, {way: seconds per step}; empty if nothing was timed)."""
    if not is_compressed(model) and model.lm_head.weight.dtype == torch.float32 and kv_dtype == "float32":
        return "restore", {}  # torch's attention is nearly always fastest, and measuring takes seconds
    seconds = time_ways(model, WAYS, B, context, kv_dtype)
    return min(seconds, key=seconds.get), seconds


def fastest_dtype(model, B, context, kv_dtype=None):
    """
    -> (the dtype of weights and arithmetic in which a float32 model decodes fastest on this machine, {name: seconds per step}).

    kv_dtype: number format of the cache; None: the same as the weights.
    """
    seconds = {}
    for name, dtype in FLOATS.items():
        copied = model if dtype == torch.float32 else deepcopy(model).to(dtype)
        seconds[name] = min(time_ways(copied, WAYS, B, context, kv_dtype or name).values())
    return min(seconds, key=seconds.get), seconds


@torch.inference_mode()
def time_ways(model, ways, B, context, kv_dtype, steps=8):
    """Time a few steps of each way at a context length -> {way: seconds per step}."""
    cache, device = KVCache(model, B, context, kv_dtype), model.lm_head.weight.device
    steps = min(steps, context - 1) or 1
    tokens = torch.zeros(B, steps, dtype=torch.long, device=device)
    cache.fill(context - steps)
    tasks = {way: Decode(decoder(model, way), cache, tokens) for way in ways}
    found = by_turns({way: (task.prepare, task.run) for way, task in tasks.items()}, rounds=3)
    return {way: statistics.median(times) / steps for way, times in found.items()}
