"""
A cache of latents that a compiled loop reads in place, on a CPU in float32: nothing is copied, and few keys are restored.

Latents can be turned so that most of them are keys themselves, as in a skeleton (decompose_matrix.py). A latent of 192 for 192
keys and 192 values needs no restoring then: it is the keys. The loop (common/kernels.c) restores what is left, rotates and
multiplies, eight positions at a time. No key is written to memory. Buffers have room for tokens to come.

Shapes: B texts, S positions in the cache, H heads, G heads of keys, n numbers a head, r latents.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from common import kernels
from common.modules import linear
from util_factorization.decompose_matrix import pivots

PREFERENCE = 10  # how much better a value has to be as a pivot than a key
LARGEST = 100  # number of a turned matrix; PREFERENCE makes 10 to 20 of it
AT_ONCE = 256  # positions by which a buffer grows
TILE = 16  # restored numbers that the compiled loop makes at once


class GrowingLayer(DynamicLayer):
    """
    A DynamicLayer whose keys and values are the beginnings of longer buffers, so that a token copies nothing but itself.

    form: the Form of what it keeps, which stays the same until it is empty again.
    """

    buffers, form = (None, None), None

    def update(self, key_states, value_states, *args, **kwargs):
        """(B, 1, T, r) twice -> those of all positions, (B, 1, S, r) twice"""
        if key_states.requires_grad or not self.get_seq_length():
            return super().update(key_states, value_states, *args, **kwargs)
        pairs = zip(self.buffers, (self.keys, self.values), (key_states, value_states))
        self.buffers, (self.keys, self.values) = zip(*(appended(*three) for three in pairs))
        return self.keys, self.values


def appended(buffer, kept, new):
    """
    (the buffer, its beginning with the new positions in it).

    kept: the beginning so far; where something else has replaced it, as a beam search does, it goes to a new buffer.
    """
    start, end = kept.shape[2], kept.shape[2] + new.shape[2]
    if buffer is None or buffer.data_ptr() != kept.data_ptr() or len(buffer) != len(kept) or end > buffer.shape[2]:
        buffer = new.new_empty(*new.shape[:2], -(-end // AT_ONCE) * AT_ONCE, new.shape[3])
        buffer[:, :, :start] = kept
    buffer[:, :, start:end] = new
    return buffer, buffer[:, :, :end]


def growing(cache, i):
    """Layer i of a cache of Hugging Face as a GrowingLayer; None where the cache is of a kind that was chosen on purpose."""
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
        cache.layers += [GrowingLayer() for _ in range(len(cache.layers), i + 1)]
    layer = cache.layers[i] if i < len(getattr(cache, "layers", [])) else None
    if type(layer) is DynamicLayer and not layer.is_initialized:
        layer = cache.layers[i] = GrowingLayer()
    return layer if type(layer) is GrowingLayer else None


@dataclass
class Form:
    """
    How a layer's latents are kept and restored.

    k_up and v_up restore keys [G n] and values from what is kept: Linears, or what stands in their place. turn [r,r]: applied
    to latents before they are kept, or None. reader: a KeyReader, or None where torch restores keys.
    """

    k_up: object
    v_up: object
    turn: torch.Tensor | None = None
    reader: object = None


def for_loop(k_up, v_up, r, shared):
    """
    The Form of r latents of keys that the compiled loop reads. k_up: a Linear, or no module where latents are keys.

    Latents are turned so that as many as possible are keys, each in the key's own place: all where k_up has rank r. If values
    share the latents, rounding one costs them up to PREFERENCE times as much: that is for float32. Latents that other layers
    read too may depend on each other here: they stay as they are.
    """
    if not isinstance(k_up, nn.Module):
        return Form(k_up, v_up, reader=KeyReader(torch.eye(r), None))
    k, v = k_up.weight, v_up.weight if shared else k_up.weight[:0]
    rows, as_stored = pivots(torch.cat([PREFERENCE * k, v]))[:r], Form(k_up, v_up, reader=KeyReader(k, k_up.bias))
    if len(rows) < r:
        return as_stored
    stays = (rows < len(k)) & (rows < r)
    order = torch.full((r,), -1)
    order[rows[stays]] = rows[stays]
    order[order < 0] = rows[~stays]
    left = torch.cat([k, v]).double()
    turned, singular = torch.linalg.solve_ex(left[order], left, left=False)
    if singular or turned.abs().max() > LARGEST:
        return as_stored
    turned[order] = torch.eye(r, dtype=turned.dtype)  # exactly
    k, v = turned.float().tensor_split([len(k)])
    ups = linear(k, k_up.bias).requires_grad_(False), linear(v, v_up.bias).requires_grad_(False) if shared else v_up
    return Form(*ups, left[order].float(), KeyReader(k, k_up.bias))


class KeyReader:
    """
    The compiled loop's view of the weight [G n, r] and the bias [G n] or None that restore keys.

    at [G n]: where a number of the keys lies in a row that has the latents first and then what is restored.
    """

    def __init__(self, weight, bias):
        unit = (weight.count_nonzero(1) == 1) & (weight.amax(1) == 1)
        self.at = torch.where(unit, weight.argmax(1), weight.shape[1] + (~unit).cumsum(0) - 1).int()
        self.rest = F.pad(weight[~unit].T, (0, -(~unit).sum().item() % TILE)).contiguous()  # [r, a multiple of TILE]
        self.bias = torch.zeros(len(weight)) if bias is None else bias.clone()

    def scores(self, q, c, cos, sin):
        """
        q (B, H, n), scaled and rotated; c (B, S, r), whole or the beginning of a buffer; cos, sin (1, S, D/2) -> (B, H, S)
        """
        (B, H, n), (S, r) = q.shape, c.shape[1:]
        c = c if c.stride()[1:] == (r, 1) else c.contiguous()
        shape = (B, H, len(self.at) // n, n, S, c.stride(0) // r, r, self.rest.shape[1], cos.shape[-1])
        scores = torch.empty(B, H, S)
        parts = (q.contiguous(), self.at, self.rest, self.bias, cos[0], sin[0], scores)
        kernels.bind("latent_scores", *shape)(kernels.Beginning(c), *parts, torch.get_num_threads())
        return scores


def loop_reads(c, n):
    """Whether there is a compiled loop for latents like c and heads of n numbers."""
    return c.device.type == "cpu" and c.dtype == torch.float32 and n <= kernels.WIDEST and kernels.library() is not None
