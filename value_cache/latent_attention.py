"""
Attending over what the cache holds of a compressed model, without restoring every position at each step.

With values v_j = R c_j + b the answer of a head, sum_j a_j v_j, is R (sum_j a_j c_j) + b, since the weights sum to one. So:

    restore   v_restore of all S positions at each step, then as in training
    late      attend over the r numbers of c_j, and restore the H sums instead of the S positions
    fold      the same with R multiplied into c_proj beforehand: one matrix [d, H r] and the bias W_o b + b_o

Likewise a score q (R k_j + b) is (R^T q) k_j and a number that is the same for all j, which the softmax drops. That serves
the part of a head that is not rotated. A rotated pair (a, b) at angle t gives the query's (e, f) the score
cos t (e a + f b) + sin t (f a - e b): two numbers of position j that are linear in k_j, so no key has to be restored. The kept
numbers are turned by an orthogonal matrix beforehand, so that the rotated part hangs on as few of them as it can.

The last two also read v_compress after v_proj, and k_compress after k_proj, as one smaller matrix. They are for single tokens:
the positions of a prompt are restored once, for all of its queries. All three are exact without dropout (tests: to 1e-4).
"""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn as nn

from model import CausalSelfAttention, NoRotary
from value_cache.kv_cache import KVCache

WAYS = ("restore", "late", "fold")


@dataclass
class Restoring:
    """k_restore and v_restore by head; None where keys or values are plain. n numbers a head, D rotated ones of all heads."""

    v: torch.Tensor | None = None  # (H, r_v, n)
    v_bias: torch.Tensor | None = None  # (H, 1, n)
    k: torch.Tensor | None = None  # (H, n - D/H, r_k), of what is not rotated
    pairs: tuple = ()  # two (H, D/2H, min(D, r_k) + 1): of a pair's first and second number, the bias last
    turns: torch.Tensor | None = None  # (block_size, D): cosines and sines of each head


class LateAttention(CausalSelfAttention):
    def attend(self, q, k, v):
        if q.shape[1] > 1:
            return super().attend(q, k, v)
        return self.restore_sums(self.sums(q, k, v))

    def heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, S, width / H)

    def sums(self, q, k, v):
        """-> (B, H, r_v): what each head's weights make of the kept values, of its own part of them where they are plain."""
        q = self.heads(q)[:, :, 0] * (q.shape[-1] // self.n_head) ** -0.5  # (B, H, n)
        weights = self.scores(q, k).softmax(-1)
        if self.restoring.v is None:
            return (weights[:, :, None] @ self.heads(v))[:, :, 0]
        return weights @ v  # one product for all heads

    def scores(self, q, k):
        """A query (B, H, n), keys as kept (B, S, r_k) -> (B, H, S), up to a number that is the same for all S."""
        R = self.restoring
        if R.k is None:
            return (q[:, :, None] @ self.heads(k).transpose(-1, -2))[:, :, 0]
        dims = q.shape[-1] - R.k.shape[1]
        scores = (q[:, :, None, dims:] @ R.k)[:, :, 0] @ k.transpose(1, 2)
        if dims:
            e, f = q[..., :dims, None].chunk(2, 2)  # (B, H, dims/2, 1)
            a, b = R.pairs
            products = torch.cat([e * a + f * b, f * a - e * b], 2).flatten(1, 2)  # (B, D, min(D, r_k) + 1)
            found = torch.baddbmm(products[:, None, :, -1], k[..., : a.shape[-1] - 1], products[..., :-1].transpose(1, 2))
            found = (found * R.turns[: k.shape[1]]).unflatten(-1, (self.n_head, -1))  # (B, S, H, dims)
            scores = scores + found.sum(-1).transpose(1, 2)
        return scores

    def restore_sums(self, y):
        """(B, H, r_v) -> (B, 1, d), heads side by side."""
        y = y[:, :, None]
        if self.restoring.v is not None:
            y = y @ self.restoring.v
            y = y if self.restoring.v_bias is None else y + self.restoring.v_bias
        return y.transpose(1, 2).flatten(-2)


class FoldedAttention(LateAttention):
    def attend(self, q, k, v):
        if q.shape[1] > 1:
            return super().attend(q, k, v)
        return self.sums(q, k, v).flatten(1)[:, None]  # (B, 1, H r_v): the folded c_proj restores


class FoldedProjection(nn.Module):
    """c_proj for a prompt, whose values have been restored, and c_proj after v_restore for a single token."""

    def __init__(self, prompt, token):
        super().__init__()
        self.prompt, self.token = prompt, token

    def forward(self, y):
        return self.prompt(y) if y.shape[1] > 1 else self.token(y)


ATTENTION = dict(restore=CausalSelfAttention, late=LateAttention, fold=FoldedAttention)


def attentions(model):
    return [block.attn for block in model.transformer.h]


def is_compressed(model):
    return any(is_linear(part) for attn in attentions(model) for part in (attn.v_restore, attn.k_restore))


def is_linear(part):
    return not isinstance(part, nn.Identity)


@torch.no_grad()
def attend_by(model, way):
    """Make a model attend by one of WAYS from here on, for inference; a checkpoint is saved by "restore" only."""
    for attn in attentions(model):
        for name, module in attn.__dict__.pop("as_trained", {}).items():
            setattr(attn, name, module)
        attn.__class__ = ATTENTION[way]
        if way == "restore":
            continue
        parts = joined(attn)
        if way == "fold" and is_linear(attn.v_restore):
            parts["c_proj"] = FoldedProjection(attn.c_proj, folded(attn))
        attn.__dict__["as_trained"] = {name: getattr(attn, name) for name in parts}  # not a submodule of the model
        for name, module in parts.items():
            setattr(attn, name, module)
        attn.restoring = restoring(attn)


def rotated_dims(attn):
    return 0 if isinstance(attn.rotary, NoRotary) else attn.rotary.dims


def linear(weight, bias):
    out = nn.utils.skip_init(nn.Linear, *weight.shape[::-1], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    out.weight.copy_(weight)
    if bias is not None:
        out.bias.copy_(bias)
    return out


def joined(attn):
    """{name: module}: k_proj and v_proj, where compressed, as one Linear(d, r) with what compresses them; keys in the basis."""
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
    """Orthogonal Q [r, r] with R Q = [L, 0], R being the D rows of k_restore that are rotated: L is [D, min(D, r)]."""
    rows = attn.k_restore.weight.unflatten(0, (attn.n_head, -1))[:, : rotated_dims(attn)].flatten(0, 1)
    return torch.linalg.qr(rows.T.double(), mode="complete").Q


def folded(attn):
    """c_proj after v_restore as one Linear(H r_v, d)."""
    c_proj, restore = attn.c_proj, attn.v_restore
    by_head = c_proj.weight.unflatten(1, (attn.n_head, -1)), restore.weight.unflatten(0, (attn.n_head, -1))
    bias = None if c_proj.bias is None else c_proj.bias + c_proj.weight @ restore.bias
    return linear(torch.einsum("ohn,hnr->ohr", *by_head).flatten(1), bias)


def restoring(attn):
    H, dims, out = attn.n_head, rotated_dims(attn), Restoring()
    if is_linear(attn.v_restore):
        out.v = attn.v_restore.weight.unflatten(0, (H, -1)).transpose(1, 2).contiguous()
        if attn.v_restore.bias is not None:
            out.v_bias = attn.v_restore.bias.unflatten(0, (H, 1, -1))
    if is_linear(attn.k_restore):
        weight, bias = attn.k_restore.weight, attn.k_restore.bias
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        weight, bias = weight.unflatten(0, (H, -1)), bias.unflatten(0, (H, -1, 1))  # (H, n, r_k), (H, n, 1)
        out.k = weight[:, dims:].contiguous()
        if dims:
            out.pairs = torch.cat([weight[:, :dims, : H * dims], bias[:, :dims]], -1).chunk(2, 1)
            out.turns = torch.cat([attn.rotary.cos, attn.rotary.sin], -1).expand(-1, H, -1).flatten(1).to(weight)
    return out


@torch.inference_mode()
def fastest(model, B, context, kv_dtype, steps=8):
    """Time a few steps of each way at a context -> (the name of the fastest, {way: seconds a step}). Leaves the model by it."""
    if not is_compressed(model):
        return "restore", {}
    cache, device = KVCache(model, B, context, kv_dtype), model.lm_head.weight.device
    steps = min(steps, context - 1) or 1
    token = torch.zeros(B, 1, dtype=torch.long, device=device)
    model.hidden(token.expand(B, context - steps), cache)
    times = {way: [] for way in WAYS}
    for _ in range(4):  # the first warms up
        for way in WAYS:
            attend_by(model, way)
            cache.truncate(context - steps)
            start = time.perf_counter()
            for _ in range(steps):
                model.logits(model.hidden(token, cache)).argmax().item()  # waits for the device
            times[way].append((time.perf_counter() - start) / steps)
    seconds = {way: statistics.median(t[1:]) for way, t in times.items()}
    best = min(seconds, key=seconds.get)
    attend_by(model, best)
    return best, seconds
