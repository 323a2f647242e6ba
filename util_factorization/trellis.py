"""
Codes of b bits a number: a trellis, and as its special case a scalar quantiser.

A stream of numbers is stored as a stream of bits, b for each number. Number t is read from a *window* of L >= b bits: the
number's own b bits, and before them bits of the numbers before it. The value is levels[window].

With L = b the windows do not overlap: a scalar quantiser with 2^b levels (Lloyd-Max). With L > b the numbers choose among 2^L
levels, and neighbours share bits. The Viterbi algorithm finds the best stream (trellis-coded quantisation, Marcellin and
Fischer 1990; overlapping windows as in QTIP, arXiv:2406.11235). On Gaussian numbers of variance 1 at 2 bits the squared error
is 0.118 with L = 2 and 0.081 with L = 8; no code of 2 bits can reach less than 0.0625. Both codes are read alike: one look-up a
number, at any place of the stream.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

WINDOW = 8  # bits; 11 lowers the error by another tenth and takes ten times as long to encode
MOST_BITS = 8  # of a number
FITTED = Path(__file__).with_name("gaussian_codes.npz")  # levels [8, 2^WINDOW] and errors [8] of the codes
STREAMS_AT_ONCE = 2**9  # times 2^(8 - L): the costs of all windows of these streams fit the processor's cache
RESTART = 32  # numbers after which the least cost is taken off, so that costs keep their precision


@dataclass
class Code:
    """bits: b of a number; levels [2^L]: the value of each window; error: mean squared, on Gaussian numbers of variance 1."""

    bits: int
    levels: torch.Tensor
    error: float

    @property
    def window(self):
        return len(self.levels).bit_length() - 1


@lru_cache
def gaussian_code(bits, window=WINDOW):
    """A Code whose levels are fitted to Gaussian numbers; the same in every run."""
    window = max(bits, window)
    starts = [spread_levels(bits, window)]
    if window > bits:
        draw = torch.Generator().manual_seed(bits)
        starts.append(torch.randn(2**window, generator=draw) * math.sqrt(1 - 4.0**-bits))
    return min((fitted(Code(bits, levels, 0.0)) for levels in starts), key=lambda code: code.error)


@lru_cache
def gaussian_codes(window=WINDOW):
    """The Codes of 1 to MOST_BITS bits; with window=1 scalar quantisers, which encode at once and err more."""
    if window == WINDOW:  # fitting them takes seconds
        kept = np.load(FITTED)
        levels, errors = torch.from_numpy(kept["levels"]).float(), kept["errors"].tolist()
        return [Code(bits, *both) for bits, both in enumerate(zip(levels, errors), 1)]
    return [gaussian_code(bits, window) for bits in range(1, MOST_BITS + 1)]


def write_fitted():
    """Write gaussian_codes() to FITTED: python -c "from util_factorization.trellis import write_fitted as w; w()"."""
    codes = [gaussian_code(bits) for bits in range(1, MOST_BITS + 1)]
    levels = torch.stack([code.levels for code in codes]).half().numpy()
    np.savez(FITTED, levels=levels, errors=np.array([code.error for code in codes]))


def distortion(codes):
    """[1, error at 1 bit, error at 2 bits, ...], what bits.spend() reads."""
    return [1.0, *(code.error for code in codes)]


def spread_levels(bits, window):
    """
    Levels at the quantiles of the best density for Gaussian numbers (Panter and Dite 1951: a Gaussian of variance 3).

    The new bits of a window choose the coarse place, the bits that it shares with its neighbour shift it a little.
    """
    places = torch.arange(2**window)
    rank = (places % 2**bits << (window - bits)) + (places >> bits)
    return math.sqrt(6) * torch.erfinv(2 * (rank + 0.5) / 2**window - 1)


def fitted(code, rounds=12, streams=512):
    """Lloyd's algorithm on drawn numbers: the best windows for the levels, then the best levels for the windows."""
    draw, levels, shrink = torch.Generator().manual_seed(1), code.levels, 2
    for _ in range(40 if code.window == code.bits else rounds):
        x = torch.randn(streams, 2**15 // streams, generator=draw)
        chosen = encode(x, Code(code.bits, levels, 0.0)).flatten()
        sums = torch.zeros(len(levels)).scatter_add_(0, chosen, x.flatten())
        counts = torch.bincount(chosen, minlength=len(levels))
        levels = (sums + shrink * levels) / (counts + shrink)  # a level that few numbers choose moves little
        levels = levels.sort().values if code.window == code.bits else levels
    levels = levels.half().float()  # as they are stored
    x = torch.randn(streams, 256, generator=draw)
    chosen = encode(x, Code(code.bits, levels, 0.0))
    return Code(code.bits, levels, (x - levels[chosen]).square().mean().item())


def encode(x, code):
    """x [streams, n], of variance 1 -> the windows [streams, n] whose values are nearest to x."""
    if code.window == code.bits:
        return torch.bucketize(x.contiguous(), (code.levels[1:] + code.levels[:-1]) / 2)
    at_once = max(1, STREAMS_AT_ONCE * 2**WINDOW >> code.window)
    return torch.cat([viterbi(part.T.contiguous(), code).T for part in x.split(at_once)])


def viterbi(x, code):
    """
    x [n, streams] -> the windows [n, streams] of least squared error.

    After window w comes (w << b | new bits) mod 2^L: the low L - b bits of w stay. Of the 2^b windows that share them, only the
    best one can go on. Its high bits are written into the lowest bits of its cost, so that one minimum gives both.
    """
    (n, streams), kept, high = x.shape, 2 ** (code.window - code.bits), 2**code.bits  # kept: values of the shared bits
    levels, names = code.levels.view(kept, high, 1), torch.arange(high, dtype=torch.int32).view(-1, 1, 1)
    oldest = torch.empty(n, kept, streams, dtype=torch.uint8)
    cost = (x[0] - levels).square()  # (shared bits, new bits, streams): a window is both, in this order
    for t in range(1, n):
        named = cost.view(torch.int32).view(high, kept, streams).bitwise_and_(-high).bitwise_or_(names)
        best = named.view(torch.float32).amin(0)
        oldest[t] = best.view(torch.int32) & high - 1
        if t % RESTART == 0:
            best = best - best.amin(0)
        cost = torch.sub(x[t], levels, out=cost).square_().add_(best[:, None])
    windows = torch.empty(n, streams, dtype=torch.long)
    windows[-1] = cost.view(-1, streams).argmin(0)
    for t in range(n - 1, 0, -1):
        shared = windows[t] >> code.bits
        windows[t - 1] = oldest[t].gather(0, shared[None])[0].long() * kept + shared
    return windows
