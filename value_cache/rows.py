"""
Rows of a cache, what it keeps of a position, in one of five number formats; and one query that reads them where they lie.

A row is D numbers, of all heads. float32, bfloat16 and float16 store the numbers themselves. int8 has whole numbers from -127
to 127, int4 from -7 to 7, two in a byte (packing.pack_halves). The row's scale follows, a bfloat16: the largest number / 127
or 7.

Compiled loops (common/kernels.c) read rows on a CPU, for queries in float32. Elsewhere torch converts all rows first.

Shapes: B texts, S positions in the cache, H heads of queries, G heads of keys and values, n numbers a head, D = G n.
"""

import torch

from common import kernels
from util_factorization.packing import pack_halves, unpack_halves
from value_cache import KV_DTYPES

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEVELS = {"int8": 127, "int4": 7}
SCALE = 2  # bytes
SMALLEST = 1e-30  # a scale: a row of zeros is not divided by zero


def empty(kv_dtype, B, capacity, D, device=None):
    """Memory for rows (B, capacity, width)."""
    if kv_dtype in FLOATS:
        return torch.empty(B, capacity, D, dtype=FLOATS[kv_dtype], device=device)
    width = (D if kv_dtype == "int8" else (D + 1) // 2) + SCALE
    return torch.empty(B, capacity, width, dtype=torch.int8, device=device)


def pack(kv_dtype, x):
    """Numbers (..., D) -> rows (..., width)"""
    if kv_dtype in FLOATS:
        return x.to(FLOATS[kv_dtype])
    levels, x = LEVELS[kv_dtype], x.float()
    if by_loops(x):
        out = empty(kv_dtype, x[..., 0].numel(), 1, x.shape[-1])
        kernels.bind("row_pack")(KV_DTYPES.index(kv_dtype), levels, len(out), x.shape[-1], out.shape[2], x.contiguous(), out)
        return out.view(*x.shape[:-1], -1)
    scale = (x.abs().amax(-1, keepdim=True) / levels).clamp(min=SMALLEST).bfloat16()
    integers = (x / scale.float()).round().clamp(-levels, levels).to(torch.int8)
    return torch.cat([integers if kv_dtype == "int8" else pack_halves(integers), scale.view(torch.int8)], -1)


def unpack(kv_dtype, rows, D, dtype):
    """Rows (..., width) -> numbers (..., D) of a dtype; no copy where rows are of this dtype."""
    if kv_dtype in FLOATS:
        return rows.to(dtype)
    # a copy, since bytes at an odd place cannot be read as a bfloat16
    integers, scale = rows[..., :-SCALE], rows[..., -SCALE:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    integers = integers if kv_dtype == "int8" else unpack_halves(integers, D)
    exact = torch.float32 if dtype == torch.float16 else dtype  # float16 has no small scales
    return (integers.to(exact) * scale.to(exact)).to(dtype)


def by_loops(x):
    """Whether the loops take numbers x."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad and kernels.library() is not None


def reads(x, rows, n):
    """Whether the loops take queries or weights x, and heads of n numbers."""
    return by_loops(x) and not rows.requires_grad and n <= kernels.WIDEST


def scores(kv_dtype, q, rows, length, groups):
    """One query of each text, scaled (B, H, n); the first `length` of rows (B, capacity, width) are keys -> (B, H, length)"""
    (B, H, n), threads = q.shape, torch.get_num_threads()
    given = first_arguments(kv_dtype, B, H, groups, n, length, rows)
    if reads(q, rows, n):
        out = torch.empty(B, H, length)
        kernels.bind("row_scores", *given)(q.contiguous(), rows, out, threads)
        return out
    k = unpack(kv_dtype, rows[:, :length], groups * n, q.dtype).unflatten(-1, (groups, n)).transpose(1, 2)  # (B, G, S, n)
    return (q.unflatten(1, (groups, -1)) @ k.transpose(-1, -2)).flatten(1, 2)


def sums(kv_dtype, weights, rows, n, groups):
    """Each head's sum of the values in rows (B, capacity, width), by weights (B, H, S) -> (B, H, n)"""
    (B, H, length), threads = weights.shape, torch.get_num_threads()
    given = first_arguments(kv_dtype, B, H, groups, n, length, rows)
    if reads(weights, rows, n):
        out = torch.empty(B, H, n)
        kernels.bind("row_sums", *given)(weights.contiguous(), rows, out, threads)
        return out
    v = unpack(kv_dtype, rows[:, :length], groups * n, weights.dtype).unflatten(-1, (groups, n)).transpose(1, 2)
    return (weights.unflatten(1, (groups, -1)) @ v).flatten(1, 2)


def first_arguments(kv_dtype, B, H, groups, n, length, rows):
    """The first arguments of row_scores and row_sums, which do not look at rows. Raises ValueError where these do not fit."""
    like = empty(kv_dtype, 0, 0, groups * n)
    fits = len(rows) == B and 0 < length <= rows.shape[1] and H % groups == 0
    if not fits or (rows.dtype, rows.shape[2]) != (like.dtype, like.shape[2]):
        what = f"{B} texts, {H} heads, {groups} x {n} numbers of {length} positions in {kv_dtype}"
        raise ValueError(f"{what} do not fit rows of {tuple(rows.shape)}, {rows.dtype}")
    return KV_DTYPES.index(kv_dtype), B, H, groups, n, length, rows.shape[1], rows.shape[2] * rows.element_size()
