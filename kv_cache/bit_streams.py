"""
Rows of bytes for the numbers of a token: their stream of bits, and the scale by which all of them were divided.

A stream is a trellis (trellis.py) whose step t adds bits[t] bits. A number's value is read from a window: its own bits and
those before it, FAST_WINDOW in all. Before the first number the bits are 0. Four bits at the end are the scale's index. A row
holds the bytes of this stream from last to first, so that a processor reads two neighbouring bytes as one integer.

Compiled loops (kernels/streams.c) read and write rows on a CPU in float32; otherwise torch does it.

Shapes: N rows, K numbers with bits (a list), levels (most bits + 1, 2^FAST_WINDOW): the value of each window at each depth.
"""

import torch
from torch.nn import functional as F

from bits.packing import pack_rows, row_bytes, unpack_rows
from bits.trellis import FAST_WINDOW
from kernels.build import LANES, bind

ROWS_AT_ONCE = 512  # rows encoded together
IMPOSSIBLE = 1e30  # cost of a window that no stream reaches
GAIN_BITS = 4
GAINS = 2 ** ((torch.arange(2**GAIN_BITS) - 7.5) / 2.5)  # from 1/8 to 8


class Streams:
    """The streams of a row, side by side. bits: for each stream a list of depths. A row without numbers still has one byte."""

    def __init__(self, bits):
        self.bits, self.counts, self.sizes = bits, list(map(len, bits)), list(map(size_of, bits))
        self.size, self.count = max(1, sum(self.sizes)), sum(self.counts)
        every = [b for stream in bits for b in stream]
        self.shape = [torch.tensor(part, dtype=torch.int32, device="cpu") for part in (self.counts, self.sizes, every)]
        self.layouts = list(map(layout, bits))

    def write(self, z, levels):
        """z [N, count], levels (streams, most bits + 1, 2^FAST_WINDOW) -> uint8 [N, size]"""
        if self.count and (loop := compiled("stream_write", z)):
            rows, threads = torch.empty(len(z), self.size, dtype=torch.uint8), torch.get_num_threads()
            memory = torch.empty(threads, self.count * 2**FAST_WINDOW + LANES, dtype=torch.uint8)
            shape = (len(z), len(self.bits), levels.shape[1], self.count, self.size, *self.shape)
            loop(*shape, levels, GAINS, z.contiguous(), memory, rows, threads)
            return rows
        rows = torch.cat([write_stream(*stream) for stream in zip(z.split(self.counts, 1), self.bits, levels)], 1)
        return rows if self.count else F.pad(rows, (0, 1))

    def read(self, rows, levels):
        """The inverse of write(), up to rounding: uint8 [N, size] -> [N, count]"""
        rows = rows[:, : sum(self.sizes)].split(self.sizes, 1)
        return torch.cat([read_stream(*stream) for stream in zip(rows, self.bits, levels, self.layouts)], 1)


def size_of(bits):
    """Bytes of a stream; 0 without numbers."""
    return max(2, row_bytes([*bits, GAIN_BITS])) if bits else 0  # the loops read two at once


def compiled(name, like):
    """A loop of streams.c, or None if it cannot take tensors like `like`."""
    return bind(name) if like.device.type == "cpu" and like.dtype == torch.float32 else None


def write_stream(z, bits, levels):
    """z [N,K] -> uint8 [N, size_of(bits)], in torch."""
    if not bits:
        return torch.empty(len(z), 0, dtype=torch.uint8, device=z.device)
    gain = nearest_gain(z)
    parts = (z / GAINS.to(z)[gain, None]).split(ROWS_AT_ONCE)
    windows = torch.cat([torch.cat([best_windows(part, bits, levels) for part in parts]), gain[:, None]], 1)
    stream = pack_rows(windows, [*bits, GAIN_BITS])
    return F.pad(stream, (0, size_of(bits) - stream.shape[1])).flip(-1)


def read_stream(rows, bits, levels, where):
    """uint8 [N, size_of(bits)] -> [N,K]. where: from layout()"""
    if not bits:
        return levels.new_empty(len(rows), 0)
    if loop := compiled("stream_read", levels):
        z = torch.empty(len(rows), len(bits))
        loop(*where, levels, GAINS, len(rows), rows.contiguous(), z, torch.get_num_threads())
        return z
    windows, gain = windows_and_gain(rows, bits)
    offsets = torch.tensor(bits, device=rows.device) * levels.shape[1]
    return levels.flatten()[windows + offsets] * GAINS.to(levels)[gain, None]


def windows_and_gain(rows, bits):
    """uint8 [N, size_of(bits)] -> (windows [N,K], int32; the index of each row's scale [N])"""
    windows = unpack_rows(rows.flip(-1), [*bits, GAIN_BITS], FAST_WINDOW)
    return windows[:, :-1], windows[:, -1].long() & 2**GAIN_BITS - 1


def layout(bits, numbers=slice(None)):
    """First arguments of the loops that read `numbers` of a stream: their count, its bytes, the scale's bit, their places."""
    size, bits = size_of(bits), torch.tensor(bits, dtype=torch.long, device="cpu")  # a model may be built on the meta device
    below = 8 * size - bits.cumsum(0)  # bits of the stream that lie below a number's window
    byte = (below >> 3).clamp(max=size - 2)
    places = torch.stack([byte, below - 8 * byte, bits * 2**FAST_WINDOW], 1)[numbers].int().contiguous()
    return len(places), size, 8 * size - bits.sum().item() - GAIN_BITS, places


def nearest_gain(z):
    """z [N,K] -> the index of the scale in GAINS nearest to each row's root mean square [N]."""
    size = z.square().mean(1, keepdim=True).sqrt()
    return (size.clamp(min=1e-9).log() - GAINS.to(z).log()).abs().argmin(1)


def best_windows(z, bits, levels):
    """
    z [N,K] of variance 1 -> the windows [N,K] of least squared error in each row (see trellis.viterbi).

    Here each number has its own depth, and the bits before the first number are 0.
    """
    (N, K), L, z, levels = z.shape, FAST_WINDOW, z.float().T.contiguous(), levels.float()
    cost, oldest = z.new_full((2**L, N), IMPOSSIBLE), []
    cost[0] = 0
    for t, b in enumerate(bits):
        high, kept = 2**b, 2 ** (L - b)
        names = torch.arange(high, dtype=torch.int32, device=z.device).view(-1, 1, 1)
        named = cost.view(torch.int32).view(high, kept, N).bitwise_and_(-high).bitwise_or_(names)
        best = named.view(torch.float32).amin(0)
        oldest.append((best.view(torch.int32) & high - 1).to(torch.uint8))
        best = best - best.amin(0)  # costs keep their precision
        cost = (z[t] - levels[b].view(kept, high, 1)).square_().add_(best[:, None]).flatten(0, 1)
    windows, window = torch.empty(K, N, dtype=torch.long, device=z.device), cost.argmin(0)
    for t in range(K - 1, -1, -1):
        windows[t] = window
        shared = window >> bits[t]
        window = oldest[t].gather(0, shared[None])[0].long() << (L - bits[t]) | shared
    return windows.T
