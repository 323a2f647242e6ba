"""
Codebooks that give v numbers b bits: a trellis, or a scalar quantiser as its special case.

A stream of numbers is stored as a stream of bits. Number t is read from a *window* of L >= b bits, the state of the trellis:
the number's own b bits, after the last L - b bits of the numbers before it. Its value is levels[window]. With v = 2 a window
gives two numbers at once, so a number takes b / 2 bits, for example half a bit: one bit is too much for an unimportant number.

With L = b the windows do not overlap: a scalar quantiser with 2^b levels (Lloyd-Max's, or all float16 numbers). With L > b a
number chooses among 2^L levels, and neighbours share bits. The Viterbi algorithm finds the best stream (trellis-coded
quantisation, Marcellin and Fischer 1990; overlapping windows as in QTIP, arXiv:2406.11235). For Gaussian numbers of variance 1
at 2 bits the squared error is 0.118 with L = 2, 0.080 with L = 8 and 0.071 with L = 12; no quantiser of 2 bits can go below
0.0625. Decoding is the same for all L: one look-up per window, at any position of the stream. Encoding time grows with 2^L.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from kernels.build import LANES, bind

WINDOW = 12  # bits of a window, for weights: they are encoded once. One bit more doubles the time (also in trellis.c)
FAST_WINDOW = 8  # for numbers that are encoded again and again: a cache, a table in training
MOST_BITS = 8  # per number
PAIRS = (1, 3, 5, 7)  # bits for two numbers: codebooks of 0.5, 1.5, 2.5 and 3.5 bits per number
FITTED = Path(__file__).with_name("gaussian_codes.npz")  # for each L: levels [2^L, v of all codebooks], and their errors
COSTS_AT_ONCE = 2**17  # costs held at once, 2^L per stream: they fit into the processor's cache
RESTART = 32  # after 32 numbers the least cost is subtracted, so that costs keep their precision


@dataclass
class Code:
    """A codebook. bits: b, for v numbers; levels [2^L,v], by window; error: mean squared, on Gaussian numbers of variance 1."""

    bits: int
    levels: torch.Tensor
    error: float

    @property
    def window(self):
        return len(self.levels).bit_length() - 1

    @property
    def numbers(self):
        return self.levels.shape[1]

    @property
    def half_bits(self):
        """Half bits per number: the depth."""
        return 2 * self.bits // self.numbers


def gaussian_code(bits, window, numbers=1):
    """A Code with levels fitted to Gaussian numbers. Every run gives the same."""
    window = max(bits, window)
    starts = [spread_levels(bits, window)[:, None]] if numbers == 1 else []
    if window > bits:
        draw = torch.Generator().manual_seed(bits)
        starts.append(torch.randn(2**window, numbers, generator=draw) * math.sqrt(1 - 4.0 ** (-bits / numbers)))
    return min((fitted(Code(bits, levels, 0.0)) for levels in starts), key=lambda code: code.error)


def shapes(window):
    """(bits, numbers) of each codebook of a window length, by rising bits per number. FAST_WINDOW has no pairs."""
    pairs = PAIRS if window == WINDOW else ()
    found = [(bits, 1) for bits in range(1, MOST_BITS + 1)] + [(bits, 2) for bits in pairs]
    return sorted(found, key=lambda shape: shape[0] / shape[1])


@lru_cache
def gaussian_codes(window=WINDOW):
    """All Codes up to MOST_BITS bits per number. window=1: scalar quantisers, which encode faster and have larger errors."""
    if window not in (WINDOW, FAST_WINDOW):
        return [gaussian_code(bits, window) for bits, _ in shapes(window)]
    kept = np.load(FITTED)  # fitting them takes minutes
    levels, errors = torch.from_numpy(kept[f"levels_{window}"]).float(), kept[f"errors_{window}"].tolist()
    parts = levels.split([numbers for _, numbers in shapes(window)], 1)
    return [Code(bits, part.contiguous(), error) for (bits, _), part, error in zip(shapes(window), parts, errors)]


@lru_cache
def float16_code():
    """A Code whose levels are the float16 numbers. With 0 or 16 bits per number, spend() chooses a rank for each row group."""
    levels = torch.arange(2**16).int().to(torch.int16).view(torch.float16).float()
    levels = levels[levels.isfinite()].sort().values
    return Code(16, torch.nn.functional.pad(levels, (0, 2**16 - len(levels)), value=levels[-1].item())[:, None], 2.0**-24)


def write_fitted():
    """Fit all codebooks and rewrite FITTED: python -c "from bits.trellis import write_fitted as w; w()"."""
    found = {}
    for window in (WINDOW, FAST_WINDOW):
        codes = [gaussian_code(bits, window, numbers) for bits, numbers in shapes(window)]
        found[f"levels_{window}"] = torch.cat([code.levels for code in codes], 1).half().numpy()
        found[f"errors_{window}"] = np.array([code.error for code in codes])
    np.savez(FITTED, **found)


def distortion(codes):
    """The `distortion` of budget.spend(): bits per number [0, ...] and the error of each Code [1, ...]."""
    return [0.0, *(code.half_bits / 2 for code in codes)], [1.0, *(code.error for code in codes)]


def spread_levels(bits, window):
    """
    Levels at the quantiles of the best density for Gaussian numbers (Panter and Dite 1951: a Gaussian of variance 3).

    The new bits of a window choose a coarse value; the bits that it shares with the previous window shift it a little.
    """
    places = torch.arange(2**window)
    rank = (places % 2**bits << (window - bits)) + (places >> bits)
    return math.sqrt(6) * torch.erfinv(2 * (rank + 0.5) / 2**window - 1)


def fitted(code, rounds=12, streams=512):
    """Lloyd's algorithm on random numbers: find the best windows for the levels, then the best levels for these windows."""
    draw, levels, shrink = torch.Generator().manual_seed(1), code.levels, 2
    drawn = max(2**15, 2 ** (code.window + 5))
    for _ in range(40 if code.window == code.bits else rounds):
        x = torch.randn(streams, drawn // streams, generator=draw)
        chosen, numbers = encode(x, Code(code.bits, levels, 0.0)).flatten(), x.view(-1, code.numbers)
        sums = torch.zeros_like(levels).index_add_(0, chosen, numbers)
        counts = torch.bincount(chosen, minlength=len(levels))[:, None]
        levels = (sums + shrink * levels) / (counts + shrink)  # a level that few numbers choose moves only a little
        levels = levels.sort(0).values if code.window == code.bits else levels
    levels = levels.half().float()  # as they are stored
    return Code(code.bits, levels, measured(Code(code.bits, levels, 0.0), draw))


def measured(code, draw):
    """Mean squared error on Gaussian numbers. The streams are long, since the first window of a stream has L free bits."""
    x = torch.randn(128, 1024, generator=draw)
    return (x - code.levels[encode(x, code)].flatten(1)).square().mean().item()


def encode(x, code):
    """x [streams, n], variance 1, n a multiple of v -> the windows [streams, n / v] of least squared error."""
    if code.window == code.bits:
        levels = code.levels.flatten()
        return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)
    served = code.window in (WINDOW, FAST_WINDOW) and (code.bits, code.numbers) in shapes(code.window)
    if served and x.device.type == "cpu" and (loop := bind("trellis_write")):
        n, threads = x.shape[1] // code.numbers, torch.get_num_threads()
        windows = torch.empty(len(x), n, dtype=torch.long)
        memory = torch.empty(threads, (n << (code.window - code.bits)) + LANES, dtype=torch.uint8)
        given = x.float().contiguous(), code.levels.T.contiguous(), memory, windows, threads
        loop(len(x), n, code.window, code.bits, code.numbers, *given)
        return windows
    at_once = max(1, COSTS_AT_ONCE >> code.window)
    parts = x.unflatten(1, (-1, code.numbers)).split(at_once)
    return torch.cat([viterbi(part.permute(1, 2, 0).contiguous(), code).T for part in parts])


def viterbi(x, code):
    """
    x [n, v, streams] -> the windows [n, streams] of least squared error.

    The window after w is (w << b | new bits) mod 2^L: it keeps the low L - b bits of w. Among the 2^b windows w with the same
    low bits only the cheapest can be on the best path. The high bits of w are written into the lowest bits of its cost, so
    that one minimum gives both.
    """
    (n, _, streams), kept, high = x.shape, 2 ** (code.window - code.bits), 2**code.bits  # kept: patterns of the shared bits
    levels, names = code.levels.T.reshape(-1, kept, high, 1), torch.arange(high, dtype=torch.int32).view(-1, 1, 1)
    oldest = torch.empty(n, kept, streams, dtype=torch.uint8)
    cost = error(x[0], levels)  # (shared bits, new bits, streams): a window consists of both, in this order
    for t in range(1, n):
        named = cost.view(torch.int32).view(high, kept, streams).bitwise_and_(-high).bitwise_or_(names)
        best = named.view(torch.float32).amin(0)
        oldest[t] = best.view(torch.int32) & high - 1
        if t % RESTART == 0:
            best = best - best.amin(0)
        cost = error(x[t], levels, out=cost).add_(best[:, None])
    windows = torch.empty(n, streams, dtype=torch.long)
    windows[-1] = cost.view(-1, streams).argmin(0)
    for t in range(n - 1, 0, -1):
        shared = windows[t] >> code.bits
        windows[t - 1] = oldest[t].gather(0, shared[None])[0].long() * kept + shared
    return windows


def error(x, levels, out=None):
    """Squared error between x [v, streams] and levels [v, ..., 1] -> [..., streams]; out: optional output tensor."""
    out = torch.sub(x[0], levels[0], out=out).square_()
    for number, level in zip(x[1:], levels[1:]):
        out += (number - level).square_()
    return out
