"""
Attention of one query over a quantised cache, read in place by compiled loops (kernels/streams.c), on a CPU in float32.

A key is mean + scale sum_i z_i a_i, over the components i of its block. Scores need each key once, rotated; it is never
written to memory. A head's output is the mean, plus the restored sum of (attention weight times scale times z): one sum per
head is restored instead of S values.

Shapes: B texts, S positions in the cache, H query heads, G kv heads, n numbers per head, K components of the values.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kernels.build import LANES, bind
from kv_cache.bit_code import WHOLE
from kv_cache.bit_streams import GAINS, compiled, layout
from model import rotate

KEYS = 8  # numbers of keys that are restored together, the same as in streams.c


@dataclass
class First:
    """The first positions of each text, not quantised: rotated keys, and values minus their mean (B, G, WHOLE, n)."""

    whole: torch.Tensor
    pads: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor

    def is_of(self, whole, pads):
        same = self.whole.data_ptr() == whole.data_ptr() and self.whole.shape == whole.shape
        if pads is None or self.pads is None:
            return same and pads is self.pads
        return same and torch.equal(pads, self.pads)


class CodedReader:
    """A LayerCode without forecasts, arranged for the loops. n: numbers per head."""

    def __init__(self, code, n):
        K = len(code.bits[0])
        keys, values = code.from_z[:K].chunk(2, 1)[0], code.from_z[K:].chunk(2, 1)[1]
        k_mean, v_mean = (mean.contiguous() for mean in code.mean.chunk(2))
        order = (keys != 0).int().argmax(1).argsort(stable=True)  # by first nonzero column: blocks stay together
        tiles = F.pad(keys[order], (0, -keys.shape[1] % KEYS)).unflatten(1, (-1, KEYS)).transpose(0, 1)  # (tiles, K, KEYS)
        used = [(tile != 0).any(1).nonzero()[:, 0].tolist() for tile in tiles]
        ranges = [(numbers[0], numbers[-1] + 1) if numbers else (0, 0) for numbers in used]
        weights = torch.cat([tile[start:end].flatten() for tile, (start, end) in zip(tiles, ranges)])
        up = values.unflatten(1, (-1, n)).transpose(0, 1).contiguous()  # (G, K, n)
        restored = ((torch.tensor(ranges, dtype=torch.int32), weights, k_mean), (up, v_mean))
        self.streams, self.starts = [], (0, code.streams.sizes[0])
        for bits, levels, some, around in zip(code.bits, code.levels, (order, slice(None)), restored):
            count, _, gain_shift, places = layout(bits, some)
            self.streams.append((count, code.bytes_per_token, gain_shift, places, levels, GAINS, *around))
        self.v_mean, self.n = v_mean.view(-1, 1, n), n

    def first_positions(self, whole, pads, turns, norm):
        """
        -> First. whole (B, W, D): from the cache; pads, long [B or 1]: padded positions before each text, or None; turns: the
        rotary table; norm: the module that normalises keys before their rotation
        """
        cos, sin = turns(whole.shape[1], self.v_mean)
        k, v = (part.float().unflatten(-1, (-1, self.n)).transpose(1, 2) for part in whole.chunk(2, -1))  # (B, G, W, n)
        begin = torch.zeros(1, dtype=torch.long) if pads is None else pads
        places = (begin[:, None] + torch.arange(WHOLE)).clamp(max=k.shape[2] - 1)  # the loops skip positions that do not exist
        places = places[:, None, :, None].expand(len(k), k.shape[1], -1, self.n)
        keys, values = rotate(norm(k), cos, sin).gather(2, places), v.gather(2, places)
        return First(whole, pads, keys.contiguous(), (values - self.v_mean).contiguous())  # outputs() adds the mean

    def scores(self, q, rows, first, norm, columns, scale):
        """
        One query of each text with all positions, including its own: q (B, H, n), before its rotation -> (B, H, S).

        rows (B, S, bytes), may be the beginning of a buffer; norm: norm_of() the keys' norm; columns: cosines and sines of all
        positions [D/2, capacity], D rotated numbers per head; capacity is a multiple of LANES in streams.c
        """
        scores = q.new_empty(*q.shape[:2], rows.shape[1])
        batch, rows = self.batch(0, q.shape[1], rows, first.pads)
        loop, threads = bind("stream_scores", *self.streams[0]), torch.get_num_threads()
        loop(*batch, *norm, *columns[0].shape, *columns, float(scale), q.contiguous(), first.keys, rows, scores, threads)
        return scores

    def outputs(self, weights, rows, first):
        """weights (B, H, S) that sum to 1 -> outputs of the heads, side by side (B, 1, H n). Other arguments: see scores()."""
        B, H, _ = weights.shape
        out = weights.new_empty(B, 1, H * self.n)
        batch, rows = self.batch(1, H, rows, first.pads)
        loop, threads = bind("stream_outputs", *self.streams[1]), torch.get_num_threads()
        sums = weights.new_empty(B + threads, H, self.streams[1][0] + LANES)
        loop(*batch, weights.contiguous(), first.values, rows, sums, out, threads)
        return out

    def batch(self, i, heads, rows, pads):
        """-> (the loops' arguments for their struct Batch, a view of `rows` that begins at stream i)"""
        B, S, size = rows.shape
        rows = rows if rows.stride()[1:] == (size, 1) else rows.contiguous()
        pads = None if pads is None else pads.expand(B).contiguous()
        return (B, heads, len(self.v_mean), self.n, S, rows.stride(0) // size, pads), rows[0, 0, self.starts[i] :]


def reader_of(code, n):
    """A CodedReader, or None if the loops cannot read this LayerCode."""
    served = len(code.bits) == 2 and not len(code.forecast) and compiled("stream_scores", code.levels) is not None
    return CodedReader(code, n) if served else None
