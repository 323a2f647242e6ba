"""
A cache of latents that decoding reads where it lies, by a compiled loop (kernels/kernels.c), on a CPU in float32.

The latents that keys and values share can be turned so that most of them are keys (turn_to_keys): 181 of 192 latents for 192
keys and 192 values, on average. The loop restores the other keys, rotates and multiplies. No key is written to memory, and no
position is copied for a new one: buffers have room for tokens to come.

Shapes: B texts, S positions in the cache, H heads, G heads of keys, n numbers a head, r latents.
"""

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from kernels.build import LANES, WIDEST, bind
from util_factorization.decompose_matrix import pivots

PREFERENCE = 10  # a value takes the place of a key among the latents where it is so many times as good a pivot
LONGEST = 1024  # latents that are turned: more take seconds a layer
AT_ONCE = 256  # positions by which a buffer grows


# -- the cache --------------------------------------------------------------------------------------------------------


class Buffer:
    """Memory for positions to come. filled: how many are there; a part that ends elsewhere belongs to a copy of the cache."""

    def __init__(self, kept, length):
        self.tensor = kept.new_empty(*kept.shape[:2], -(-length // AT_ONCE) * AT_ONCE, kept.shape[3])
        self.filled = kept.shape[2]
        self.tensor[:, :, : self.filled] = kept

    def takes(self, kept, length):
        """Whether positions up to `length` fit in after kept, its own beginning."""
        own = self.tensor.data_ptr() == kept.data_ptr() and len(self.tensor) == len(kept) and self.filled == kept.shape[2]
        return own and length <= self.tensor.shape[2] and self.tensor.is_inference() <= torch.is_inference_mode_enabled()

    def append(self, new):
        """new (B, 1, T, r) -> all positions (B, 1, S, r), a view"""
        start, self.filled = self.filled, self.filled + new.shape[2]
        self.tensor[:, :, start : self.filled] = new
        return self.tensor[:, :, : self.filled]


class GrowingLayer(DynamicLayer):
    """
    A DynamicLayer whose keys and values lie in Buffers.

    reader: what reads its latents of keys, a KeyReader or None. first: of a coded cache, a First or None. A coded cache has its
    first positions alone in place of the values.
    """

    buffers, reader, first = [None, None], None, None

    def update(self, key_states, value_states, *args, **kwargs):
        """(B, 1, T, r) twice -> those of all positions, (B, 1, S, r) twice"""
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
            self.buffers = [buffer if j == i else other for j, other in enumerate(self.buffers)]  # a copy's stay as they are
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
    """Layer i of a cache of transformers as a GrowingLayer; None where it is filled, or of a kind that somebody chose."""
    layers = getattr(cache, "layers", [])
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:  # one that makes its layers when they are needed
        layers += [DynamicLayer() for _ in range(len(layers), i + 1)]
    if i < len(layers) and type(layers[i]) is DynamicLayer and not layers[i].is_initialized:
        layers[i] = GrowingLayer()
    return layers[i] if i < len(layers) and type(layers[i]) is GrowingLayer else None


# -- its keys ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def turn_to_keys(down, k_up, v_up):
    """
    Turn latents in place, so that most of them are keys, each in the key's own place -> the turn [r,r], or None.

    down [r,in] makes latents, k_up and v_up restore keys and values. Rounding a latent then costs the values up to PREFERENCE
    times as much: that is for float32.
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
        part[order[here] - first] = torch.eye(r)[here]  # exactly
    return turn


@torch.no_grad()
def turn_latents(turn, down, *ups):
    """down <- turn down, up <- up turn^-1"""
    down.copy_((turn @ down.double()).float())
    for up in ups:
        up.copy_(torch.linalg.solve(turn, up.double(), left=False).float())


class KeyReader:
    """
    The loop's view of the weight [G n, r] and the bias [G n] or None that restore keys, and of their norm, a norm_of().

    at [G n]: where a number of the keys lies in a row that has the latents first and then what is restored.
    """

    def __init__(self, weight, bias, norm):
        self.norm = norm
        unit = (weight.count_nonzero(1) == 1) & (weight.amax(1) == 1)
        self.at = torch.where(unit, weight.argmax(1), weight.shape[1] + (~unit).cumsum(0) - 1).int()
        self.rest = F.pad(weight[~unit].T, (0, -(~unit).sum().item() % LANES)).contiguous()  # [r, a multiple of LANES]
        self.bias = torch.zeros(len(weight)) if bias is None else bias.clone()

    def reads(self, q, c):
        """Whether the loop can take queries q and latents c: it computes in float32, and no gradients."""
        return q.dtype == c.dtype == torch.float32 and not (torch.is_grad_enabled() and (q.requires_grad or c.requires_grad))

    def scores(self, q, c, cos, sin):
        """
        q (B, H, n), scaled and rotated; c (B, S, r), whole or the beginning of a buffer; cos, sin (1, S, D/2) -> (B, H, S)
        """
        (B, H, n), (S, r) = q.shape, c.shape[1:]
        c = c if c.stride()[1:] == (r, 1) else c.contiguous()
        shape = (B, H, len(self.at) // n, n, S, c.stride(0) // r, r, self.rest.shape[1], cos.shape[-1])
        scores = torch.empty(B, H, S)
        parts = (q.contiguous(), self.at, self.rest, self.bias, *self.norm, cos[0], sin[0], scores, torch.get_num_threads())
        bind("latent_scores", *shape)(c[0, 0], *parts)  # the loop finds the other rows from the first
        return scores


@torch.no_grad()
def norm_of(module, n):
    """
    What the loops take of a norm of heads: (its weights [n], or None without one; epsilon). None for a norm of another kind.
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
    """Whether a gradient may be asked for of a module's parameters: the loops give none."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


def loop_reads(c, n):
    """Whether there is a loop for latents like c and heads of n numbers."""
    return c.device.type == "cpu" and c.dtype == torch.float32 and n <= WIDEST and bind("latent_scores") is not None
