"""
Attending over what the cache holds of a compressed model, without restoring every position at each step.

With values v_j = R c_j + b the answer of a head, sum_j a_j v_j, is R (sum_j a_j c_j) + b, since the weights sum to one. So:

    restore   v_restore of all S positions at each step, then as in training
    late      attend over the r numbers of c_j, and restore the H sums instead of the S positions
    fold      the same with R multiplied into c_proj beforehand: one matrix [d, H r] and the bias W_o b + b_o

Likewise a score q (R k_j + b) is (R^T q) k_j and a number that is the same for all j, which the softmax drops. That serves the
part of a head that is not rotated; of the rest, rotary_pct of each head, every position is restored and rotated at each step.

The last two also read v_compress after v_proj, and k_compress after k_proj, as one smaller matrix. All three are exact (tests
hold them to 1e-4) where dropout is off.
"""

import time

import torch
import torch.nn as nn

from kv_cache import KVCache
from model import CausalSelfAttention, NoRotary, sees

WAYS = ("restore", "late", "fold")


class LateAttention(CausalSelfAttention):
    def attend(self, q, k, v):
        if q.shape[1] > 1:  # a prompt: its positions are restored once, for all of its queries
            return super().attend(q, k, v)
        return self.restore_sums(self.sums(q, k, v))

    def heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, width / H)

    def sums(self, q, k, v):
        """-> (B, H, T, r_v): what each head's weights make of the kept values, of its own part of them where they are plain."""
        T, S = q.shape[1], k.shape[1]
        scores = self.scores(self.heads(q), k) * (q.shape[-1] // self.n_head) ** -0.5
        if T > 1:
            scores = scores.masked_fill(~sees(T, S, q.device), -torch.inf)
        weights = scores.softmax(-1)
        if isinstance(self.v_restore, nn.Identity):
            return weights @ self.heads(v)
        return (weights.flatten(1, 2) @ v).unflatten(1, (self.n_head, T))  # one product for all heads

    def scores(self, q, k):
        """Queries (B, H, T, n), keys as kept (B, S, r_k) -> (B, H, T, S), up to a number for each query."""
        if isinstance(self.k_restore, nn.Identity):
            return q @ self.heads(k).transpose(-1, -2)
        dims = 0 if isinstance(self.rotary, NoRotary) else self.rotary.dims
        restore = self.k_restore.weight.unflatten(0, (self.n_head, -1))  # (H, n, r_k)
        latent = q[..., dims:] @ restore[:, dims:]  # (B, H, T, r_k)
        scores = (latent.flatten(1, 2) @ k.transpose(1, 2)).unflatten(1, (self.n_head, -1))
        if dims:
            bias = self.k_restore.bias
            bias = None if bias is None else bias.unflatten(0, (self.n_head, -1))[:, :dims].flatten()
            turned = self.rotary(nn.functional.linear(k, restore[:, :dims].flatten(0, 1), bias), 0)  # (B, S, H dims)
            scores = scores + q[..., :dims] @ self.heads(turned).transpose(-1, -2)
        return scores

    def restore_sums(self, y):
        """(B, H, T, r_v) -> (B, T, d), heads side by side."""
        if not isinstance(self.v_restore, nn.Identity):
            restore, bias = self.v_restore.weight.unflatten(0, (self.n_head, -1)), self.v_restore.bias
            y = y @ restore.transpose(1, 2)
            y = y if bias is None else y + bias.unflatten(0, (self.n_head, 1, -1))
        return y.transpose(1, 2).flatten(-2)


class FoldedAttention(LateAttention):
    def attend(self, q, k, v):
        return self.sums(q, k, v).transpose(1, 2).flatten(-2)  # (B, T, H r_v): c_proj restores


ATTENTION = dict(restore=CausalSelfAttention, late=LateAttention, fold=FoldedAttention)


def is_compressed(model):
    return any(not isinstance(part, nn.Identity) for a in attentions(model) for part in (a.v_restore, a.k_restore))


def attentions(model):
    return [block.attn for block in model.transformer.h]


@torch.no_grad()
def attend_by(model, way):
    """Make a model attend by one of WAYS from here on, for inference; a checkpoint is saved by "restore" only."""
    for attn in attentions(model):
        for name, module in attn.__dict__.pop("as_trained", {}).items():
            setattr(attn, name, module)
        attn.__class__ = ATTENTION[way]
        if way != "restore":
            parts = dict(joined(attn))
            if way == "fold" and not isinstance(attn.v_restore, nn.Identity):
                parts["c_proj"] = folded(attn)
            attn.__dict__["as_trained"] = {name: getattr(attn, name) for name in parts}  # not a submodule of the model
            for name, module in parts.items():
                setattr(attn, name, module)


def linear(weight, bias):
    out = nn.Linear(*weight.shape[::-1], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    out.weight.copy_(weight)
    if bias is not None:
        out.bias.copy_(bias)
    return out


def joined(attn):
    """k_proj and v_proj, where compressed, as one Linear(d, r) with what compresses them."""
    for kind in "kv":
        proj, compress = (getattr(attn, f"{kind}_{part}") for part in ("proj", "compress"))
        if not isinstance(compress, nn.Identity):
            bias = None if proj.bias is None else compress.weight @ proj.bias + compress.bias
            yield f"{kind}_proj", linear(compress.weight @ proj.weight, bias)
            yield f"{kind}_compress", nn.Identity()


def folded(attn):
    """c_proj after v_restore as one Linear(H r_v, d)."""
    c_proj, restore = attn.c_proj, attn.v_restore
    by_head = c_proj.weight.unflatten(1, (attn.n_head, -1)), restore.weight.unflatten(0, (attn.n_head, -1))
    bias = None if c_proj.bias is None else c_proj.bias + c_proj.weight @ restore.bias
    return linear(torch.einsum("ohn,hnr->ohr", *by_head).flatten(1), bias)


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
    for _ in range(2):  # the first warms up
        for way in WAYS:
            attend_by(model, way)
            cache.truncate(context - steps)
            start = time.perf_counter()
            for _ in range(steps):
                model.logits(model.hidden(token, cache)).argmax().item()  # waits for the device
            times[way].append((time.perf_counter() - start) / steps)
    seconds = {way: min(t) for way, t in times.items()}
    best = min(seconds, key=seconds.get)
    attend_by(model, best)
    return best, seconds
