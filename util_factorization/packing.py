"""Streams of b-bit codes in bytes; the windows of L bits overlap (trellis.py), and a number is read at any place."""

import torch

LONGEST = 17  # bits of a window: with up to 7 bits before it, it lies within three bytes


def stream_bytes(n, bits, window):
    """Bytes of a stream of n numbers: the first window, then `bits` new bits for each number."""
    return -(-(window + (n - 1) * bits) // 8)


def pack(windows, bits, window):
    """
    windows [streams, n], whole numbers below 2^window -> uint8 [streams * stream_bytes() + 2].

    Each shares window - bits bits with its neighbour. Two bytes at the end let a reader take three at once.
    """
    if not 1 <= bits <= window <= LONGEST:
        raise ValueError(f"{bits} bits in windows of {window}: give 1 <= bits <= window <= {LONGEST}")
    first = windows[:, :1] >> torch.arange(window - 1, -1, -1) & 1  # (streams, L), the highest bit first
    new = windows[:, 1:, None] >> torch.arange(bits - 1, -1, -1) & 1  # (streams, n - 1, b)
    stream = torch.cat([first, new.flatten(1)], 1).to(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    packed = (stream << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return torch.nn.functional.pad(packed.flatten(), (0, 2))


def unpack(packed, window, starts):
    """packed uint8 [bytes]; starts, long of any shape: the first bit of each number's window -> the windows, of that shape."""
    at = starts >> 3
    three = packed[at].int() << 16 | packed[at + 1].int() << 8 | packed[at + 2].int()
    return three >> (24 - window - (starts & 7)) & (2**window - 1)
