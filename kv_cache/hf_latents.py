"""
Attention of a Hugging Face model that caches latents in place of keys and values.

On a CPU in float32, decoding reads them in place by a compiled loop (kernels/kernels.c). A change of basis can make most
latents equal to keys, if keys and values share the latents (change_basis_to_keys): 181 of 192 latents for 192 keys and 192
values, on average. The loop restores the other keys, rotates, and multiplies by the query. No key is written to memory, and a
new position copies no old one, since buffers have spare room.

Shapes: B texts, T positions of this call, S positions in the cache, H query heads, G kv heads, n numbers per head, r a rank.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F

from kernels.build import LANES, WIDEST, bind
from kv_cache.hf_attention import CachedAttention, growing, masked, norm_of, trains
from model import rotate
from util_factorization.decompose_matrix import pivots
from util_factorization.modules import Uncut, restore_sums

PREFERENCE = 10  # a value becomes a latent in place of a key only if it is 10 times as good a pivot
LONGEST = 1024  # latents at most for a change of basis: more take seconds per layer


class LatentAttention(CachedAttention):
    """
    Attention that caches latents in place of keys and values. A token takes r numbers if k and v share a latent, r_k + r_v if
    each has its own, instead of 2 G n. Keys are restored and rotated when they are read. Values are restored for a prompt. For
    a single token each head sums the latents with its weights, and H sums are restored instead of S values.
    """

    def __init__(self, attn, q, k, v, parts, turns):
        super().__init__(attn, parts, turns, last="o_proj")  # the name in the files
        self.q_proj, self.k_proj, self.v_proj = q, k, v
        self.basis = None  # the change of basis that latents_to_keys() made

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, layer_past=None, **_):
        x, cache = hidden_states, self.cache_of(past_key_values, layer_past)
        q, c_k = self.normed(self.q_norm, self.q_proj(x)), self.k_proj.down(x)
        c_v = c_k[..., :0] if self.shared else self.v_proj.down(x)
        layer = growing(cache, self.layer_idx)
        if layer and not layer.get_seq_length():
            layer.reader = self.reader(c_k)
        if cache is not None:
            c_k, c_v = (c[:, 0] for c in cache.update(c_k[:, None], c_v[:, None], self.layer_idx))  # (B, S, r)
        c_v = c_k if self.shared else c_v
        (T, S), (cos, sin) = (q.shape[2], c_k.shape[1]), self.turns(c_k.shape[1], x)
        q = rotate(q, cos[:, S - T :], sin[:, S - T :])
        if T == 1 and isinstance(self.v_proj.up, nn.Linear):
            scores = self.scores(self.scaling * q[:, :, 0], c_k, cos, sin, layer and layer.reader)
            return self.project_out(self.late(scores, c_v, attention_mask)), None
        return self.attend(q, self.keys(c_k, cos, sin), self.heads(self.v_proj.up(c_v)), attention_mask), None

    @property
    def shared(self):
        """Whether keys and values share one latent."""
        return self.v_proj.down is self.k_proj.down

    def keys(self, c, cos, sin):
        """Latents (B, S, r) -> rotated keys (B, G, S, n)"""
        return rotate(self.normed(self.k_norm, self.k_proj.up(c)), cos, sin)

    def scores(self, q, c, cos, sin, reader):
        """One query, scaled and rotated (B, H, n); c: latents of the keys (B, S, r) -> (B, H, S)"""
        if reader and reader.reads(q, c):
            return reader.scores(q, c, cos, sin)
        k = self.keys(c, cos, sin)
        return (q.unflatten(1, (k.shape[1], -1)) @ k.transpose(-1, -2)).flatten(1, 2)  # (B, G, H/G, n) times (B, G, n, S)

    def reader(self, c):
        """A KeyReader for latents like c and the present weights, or None if the loop cannot read them."""
        if not loop_reads(c, self.n) or trains(self.k_norm) or (norm := norm_of(self.k_norm, self.n)) is None:
            return None
        if isinstance(self.k_proj, Uncut):
            return KeyReader(torch.eye(c.shape[-1]), None, norm)
        up = self.k_proj.up  # PEFT replaces adapted linears by another type
        return KeyReader(up.weight.detach(), up.bias, norm) if type(up) is nn.Linear else None

    def latents_to_keys(self):
        """Change the basis of shared latents, for decoding on a CPU in float32 (hf_latents.py)."""
        if self.shared and self.basis is None:
            self.basis = change_basis_to_keys(*(linear.weight.data for linear in self.around_latents()))

    def around_latents(self):
        return self.k_proj.down, self.k_proj.up, self.v_proj.up

    def _apply(self, fn, recurse=True):
        """Called by .to() and similar. On another device or in another dtype, the stored basis of the latents is restored."""
        linears = [linear for linear in self.around_latents() if type(linear) is nn.Linear] if self.basis is not None else []
        if len(linears) == 3:  # none is adapted by PEFT
            moved = fn(torch.empty(0))
            if (moved.device.type, moved.dtype) != ("cpu", torch.float32):
                change_basis(torch.linalg.inv(self.basis), *(linear.weight.data for linear in linears))
                self.basis = None
        return super()._apply(fn, recurse)

    def late(self, scores, c, mask):
        """
        Scores (B, H, S); c: latents of the values (B, S, r) -> (B, 1, H n)

        LateAttention in own_attention.py does this for our models and our cache; both use restore_sums(). Here the cache is
        Hugging Face's, with masks and grouped heads, and the scores are already computed.
        """
        sums = masked(scores, mask).softmax(-1) @ c  # (B, H, r)
        up, bias = self.v_proj.up.weight.T.unflatten(-1, (-1, self.n)).permute(1, 0, 2), self.v_proj.up.bias  # (G, r, n)
        return restore_sums(sums, up, None if bias is None else bias.unflatten(-1, (-1, self.n)))


# -- its keys ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def change_basis_to_keys(down, k_up, v_up):
    """
    Change the basis of latents in place, so that most latents are keys, each at the key's index -> the basis [r,r], or None.

    down [r,in] makes latents; k_up and v_up restore keys and values. Afterwards a rounding error of a latent hurts the values
    up to PREFERENCE times more, so use it in float32 only.
    """
    left, r = torch.cat([k_up, v_up]).double(), len(down)
    if r > LONGEST:
        return None
    rows = pivots(torch.cat([PREFERENCE * left[: len(k_up)], left[len(k_up) :]]))[:r]
    stays = (rows < len(k_up)) & (rows < r)
    order = torch.full((r,), -1)
    order[rows[stays]] = rows[stays]
    order[order < 0] = rows[~stays]
    basis = left[order]
    change_basis(basis, down, k_up, v_up)
    for part, first in ((k_up, 0), (v_up, len(k_up))):
        here = (order >= first) & (order < first + len(part))
        part[order[here] - first] = torch.eye(r)[here]  # removes rounding
    return basis


@torch.no_grad()
def change_basis(basis, down, *ups):
    """Change of basis by `basis` [r,r], in place: down <- basis down, up <- up basis^-1."""
    down.copy_((basis @ down.double()).float())
    for up in ups:
        up.copy_(torch.linalg.solve(basis, up.double(), left=False).float())


class KeyReader:
    """
    The weight [G n, r] and the bias [G n] or None that restore keys, and norm_of() their norm, arranged for the loop.

    at [G n]: the index of each number of the keys in a row that holds the latents, then the restored numbers.
    """

    def __init__(self, weight, bias, norm):
        self.norm = norm
        unit = (weight.count_nonzero(1) == 1) & (weight.amax(1) == 1)
        self.at = torch.where(unit, weight.argmax(1), weight.shape[1] + (~unit).cumsum(0) - 1).int()
        self.rest = F.pad(weight[~unit].T, (0, -(~unit).sum().item() % LANES)).contiguous()  # [r, a multiple of LANES]
        self.bias = torch.zeros(len(weight)) if bias is None else bias.clone()

    def reads(self, q, c):
        """Whether the loop can take queries q and latents c: it needs float32 and gives no gradients."""
        return q.dtype == c.dtype == torch.float32 and not (torch.is_grad_enabled() and (q.requires_grad or c.requires_grad))

    def scores(self, q, c, cos, sin):
        """
        q (B, H, n), scaled and rotated; c (B, S, r), may be the beginning of a buffer; cos, sin (1, S, D/2) -> (B, H, S)
        """
        (B, H, n), (S, r) = q.shape, c.shape[1:]
        c = c if c.stride()[1:] == (r, 1) else c.contiguous()
        shape = (B, H, len(self.at) // n, n, S, c.stride(0) // r, r, self.rest.shape[1], cos.shape[-1])
        scores = torch.empty(B, H, S)
        parts = (q.contiguous(), self.at, self.rest, self.bias, *self.norm, cos[0], sin[0], scores, torch.get_num_threads())
        bind("latent_scores", *shape)(c[0, 0], *parts)  # the loop takes the address of the first row
        return scores


def loop_reads(c, n):
    """Whether the loop can read latents like c, with n numbers per head."""
    return c.device.type == "cpu" and c.dtype == torch.float32 and n <= WIDEST and bind("latent_scores") is not None
