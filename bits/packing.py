"""
Packs streams of b-bit numbers into bytes, and reads a number at any position.

A number is read from a *window* of L bits, its trellis state; the windows of neighbours overlap (trellis.py).
pack() stores many numbers of one depth in a stream. pack_rows() stores rows in which each number has its own depth.
pack_halves() stores two 4-bit numbers in a byte.
"""

import math

import torch

LONGEST = 17  # bits of a window at most: with up to 7 bits before it, it fits into three bytes


def stream_bytes(n, bits, window):
    """Bytes of a stream of n numbers: the first window, then `bits` new bits for each number."""
    return -(-(window + (n - 1) * bits) // 8)


def pack(windows, bits, window):
    """
    windows [streams, n], integers below 2^window -> uint8 [streams * stream_bytes() + 2].

    Neighbours share (window - bits) bits. Two bytes are added at the end, since unpack() reads three bytes at once.
    """
    if not 1 <= bits <= window <= LONGEST:
        raise ValueError(f"{bits} bits per number in windows of {window}: give 1 <= bits <= window <= {LONGEST}")
    first = windows[:, :1] >> torch.arange(window - 1, -1, -1) & 1  # (streams, L), the highest bit first
    new = windows[:, 1:, None] >> torch.arange(bits - 1, -1, -1) & 1  # (streams, n - 1, b)
    stream = torch.cat([first, new.flatten(1)], 1).to(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    packed = (stream << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return torch.nn.functional.pad(packed.flatten(), (0, 2))


def unpack(packed, window, starts):
    """packed uint8 [bytes]; starts, long of any shape: the first bit of each window -> the windows, of the same shape."""
    at = starts >> 3
    three = packed[at].int() << 16 | packed[at + 1].int() << 8 | packed[at + 2].int()
    return three >> (24 - window - (starts & 7)) & (2**window - 1)


def row_bytes(bits):
    """Bytes of a row that pack_rows() makes."""
    return -(-sum(bits) // 8)


def pack_rows(windows, bits):
    """
    windows [N,K]; bits, a list of K depths -> uint8 [N, row_bytes()]: the low b bits of each window, side by side.

    A window consists of a number's own bits and the bits before them; before the first number the bits are 0.
    """
    device, depth = windows.device, torch.tensor(bits, dtype=torch.long, device=windows.device)
    number = torch.repeat_interleave(torch.arange(len(bits), device=device), depth)  # which number each bit of a row belongs to
    shift = depth.cumsum(0)[number] - 1 - torch.arange(len(number), device=device)
    stream = (windows[:, number] >> shift & 1).to(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    return (stream << torch.arange(7, -1, -1, dtype=torch.uint8, device=device)).sum(-1, dtype=torch.uint8)


def unpack_rows(packed, bits, window):
    """The inverse of pack_rows(): uint8 [N, row_bytes()] -> windows [N,K], int32."""
    padded = torch.nn.functional.pad(packed, (3, 2)).int()
    starts = 24 + torch.tensor(bits, dtype=torch.long, device=packed.device).cumsum(0) - window
    at = starts >> 3
    three = padded[:, at] << 16 | padded[:, at + 1] << 8 | padded[:, at + 2]
    return three >> (24 - window - (starts & 7)).int() & (2**window - 1)


def unpack_all(packed, streams, n, bits, window):
    """All windows of uncut streams, int32 [streams, n]. Same result as unpack(), by shifting all bytes at once."""
    rows = packed[:-2].view(streams, -1)
    rows = torch.nn.functional.pad(rows, (0, 2)).int()
    three = rows[:, :-2] << 16 | rows[:, 1:-1] << 8 | rows[:, 2:]
    period = 8 // math.gcd(bits, 8)  # after this many numbers a window begins at the first bit of a byte again
    step = period * bits // 8
    found = torch.empty(streams, -(-n // period), period, dtype=torch.int32)
    for r in range(period):
        part = three[:, r * bits >> 3 :: step][:, : found.shape[1]]
        found[:, : part.shape[1], r] = part >> (24 - window - (r * bits & 7)) & (2**window - 1)
    return found.flatten(1)[:, :n]


def pack_halves(integers):
    """int8 (..., r) from -8 to 7 -> int8 (..., (r + 1) // 2): number i in a byte's low half, i + r/2 in its high half."""
    low, high = integers.split((integers.shape[-1] + 1) // 2, dim=-1)
    packed = low & 15
    packed[..., : high.shape[-1]] |= high << 4
    return packed


def unpack_halves(packed, r):
    """The inverse of pack_halves(): int8 (..., r). It takes two shifts per byte, fast enough for a cache read at every step."""
    return torch.cat([packed << 4 >> 4, packed >> 4], dim=-1)[..., :r]  # shifting right keeps the sign
