"""
A cache of latents that decoding reads in place, by a compiled loop (kernels/kernels.c), on a CPU in float32.

A change of basis can make most latents equal to keys, if keys and values share the latents (turn_to_keys): 181 of 192 latents
for 192 keys and 192 values, on average. The loop restores the other keys, rotates, and multiplies by the query. No key is
written to memory, and a new position copies no old one, since buffers have spare room.

Shapes: B texts, S positions in the cache, H query heads, G kv heads, n numbers per head, r latents.
"""

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from kernels.build import LANES, WIDEST, bind
from util_factorization.decompose_matrix import pivots

PREFERENCE = 10  # a value becomes a latent in place of a key only if it is 10 times as good a pivot
LONGEST = 1024  # latents at most for a change of basis: more take seconds per layer
AT_ONCE = 256  # positions by which a buffer grows


# -- the cache --------------------------------------------------------------------------------------------------------


class Buffer:
    """Memory with room for later positions. filled: positions stored. A view of another length belongs to a copied cache."""

    def __init__(self, kept, length):
        self.tensor = kept.new_empty(*kept.shape[:2], -(-length // AT_ONCE) * AT_ONCE, kept.shape[3])
        self.filled = kept.shape[2]
        self.tensor[:, :, : self.filled] = kept

    def takes(self, kept, length):
        """Whether `kept` is this buffer's filled part and positions up to `length` fit after it."""
        own = self.tensor.data_ptr() == kept.data_ptr() and len(self.tensor) == len(kept) and self.filled == kept.shape[2]
        return own and length <= self.tensor.shape[2] and self.tensor.is_inference() <= torch.is_inference_mode_enabled()

    def append(self, new):
        """new (B, 1, T, r) -> all positions (B, 1, S, r), a view"""
        start, self.filled = self.filled, self.filled + new.shape[2]
        self.tensor[:, :, start : self.filled] = new
        return self.tensor[:, :, : self.filled]


class GrowingLayer(DynamicLayer):
    """
    A DynamicLayer whose keys and values are stored in Buffers.

    reader: a KeyReader for latents of keys, or None. first: a First, for a cache by bits, or None; such a cache has only its
    first positions in place of the values.
    """

    buffers, reader, first = [None, None], None, None

    def update(self, key_states, value_states, *args, **kwargs):
        """Append keys and values (B, 1, T, r) -> keys and values of all positions, (B, 1, S, r) each"""
        if not self.get_seq_length() or any(t.requires_grad for t in (key_states, value_states, self.keys, self.values)):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self.grown(0, self.keys, key_states), self.grown(1, self.values, value_states)
        return self.keys, self.values

    def grown(self, i, kept, new):
        if not new.shape[2]:
            return kept
        end, buffer = kept.shape[2] + new.shape[2], self.buffers[i]
        if not (buffer and buffer.takes(kept, end)):
            buffer = Buffer(kept, end)
            self.buffers = [buffer if j == i else other for j, other in enumerate(self.buffers)]  # copies share the old list
        return buffer.append(new)

    def crop(self, tokens_to_remove):
        values = self.values
        super().crop(tokens_to_remove)
        if values is not None:
            self.values = values[:, :, : self.keys.shape[2]]

    def reset(self):
        self.buffers, self.reader, self.first = [None, None], None, None
        super().reset()

    def offload(self):
        self.buffers = [None, None]
        super().offload()


def growing(cache, i):
    """Layer i of a transformers cache as a GrowingLayer. None if it already has content or is not a plain DynamicLayer."""
    layers = getattr(cache, "layers", [])
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:  # a cache that makes its layers on demand
        layers += [DynamicLayer() for _ in range(len(layers), i + 1)]
    if i < len(layers) and type(layers[i]) is DynamicLayer and not layers[i].is_initialized:
        layers[i] = GrowingLayer()
    return layers[i] if i < len(layers) and type(layers[i]) is GrowingLayer else None


# -- its keys ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def turn_to_keys(down, k_up, v_up):
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
    turn = left[order]
    turn_latents(turn, down, k_up, v_up)
    for part, first in ((k_up, 0), (v_up, len(k_up))):
        here = (order >= first) & (order < first + len(part))
        part[order[here] - first] = torch.eye(r)[here]  # removes rounding
    return turn


@torch.no_grad()
def turn_latents(turn, down, *ups):
    """Change of basis by `turn` [r,r], in place: down <- turn down, up <- up turn^-1."""
    down.copy_((turn @ down.double()).float())
    for up in ups:
        up.copy_(torch.linalg.solve(turn, up.double(), left=False).float())


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


@torch.no_grad()
def norm_of(module, n):
    """
    A norm of heads, for the loops -> (weights [n], or None without a norm; epsilon). None if it is not an RMS norm.
    """
    if isinstance(module, torch.nn.Identity):
        return None, 0.0
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return None
    weight, x = module(torch.ones(n)) * (1 + eps) ** 0.5, torch.linspace(-1, 2, n)
    known = weight * x * (x.square().mean() + eps).rsqrt()
    return (weight, eps) if torch.allclose(module(x), known, rtol=1e-5, atol=1e-6) else None


def trains(module):
    """Whether a module's parameters may need a gradient: the loops give none."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


def loop_reads(c, n):
    """Whether the loop can read latents like c, with n numbers per head."""
    return c.device.type == "cpu" and c.dtype == torch.float32 and n <= WIDEST and bind("latent_scores") is not None
