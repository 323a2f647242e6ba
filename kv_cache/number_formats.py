"""
Rows of a cache in one of five number formats, and attention of one query that reads them in place.

A row holds the keys (or the values) of one position: D numbers, all heads. float32, bfloat16 and float16 store the numbers
themselves. int8 stores integers from -127 to 127, int4 from -7 to 7, two in a byte (packing.pack_halves). A scale in bfloat16
follows: the row's largest absolute value / 127 or 7.

Compiled loops (kernels/kernels.c) read rows on a CPU, for queries in float32. Otherwise torch converts all rows first.

Shapes: B texts, S positions in the cache, H query heads, G kv heads (`groups`), n numbers per head, D = G n.
"""

import torch

from bits.packing import pack_halves, unpack_halves
from kernels import build as kernels
from kv_cache import KV_DTYPES

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEVELS = {"int8": 127, "int4": 7}
SCALE = 2  # bytes
SMALLEST = 1e-30  # scale: a row of zeros is not divided by zero


def row_of(kv_dtype, D):
    """-> (dtype, width) of a row of D numbers"""
    if kv_dtype in FLOATS:
        return FLOATS[kv_dtype], D
    return torch.int8, (D if kv_dtype == "int8" else (D + 1) // 2) + SCALE


def empty(kv_dtype, B, capacity, D, device=None):
    """Memory for rows (B, capacity, width)."""
    dtype, width = row_of(kv_dtype, D)
    return torch.empty(B, capacity, width, dtype=dtype, device=device)


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
    """Rows (..., width) -> numbers (..., D) in `dtype`; no copy if the rows have this dtype."""
    if kv_dtype in FLOATS:
        return rows.to(dtype)
    # a copy, since bytes at an odd address cannot be viewed as bfloat16
    integers, scale = rows[..., :-SCALE], rows[..., -SCALE:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    integers = integers if kv_dtype == "int8" else unpack_halves(integers, D)
    exact = torch.float32 if dtype == torch.float16 else dtype  # small scales underflow in float16
    return (integers.to(exact) * scale.to(exact)).to(dtype)


def by_loops(x):
    """Whether the loops can take x."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad and kernels.library() is not None


def scores(kv_dtype, q, rows, length, groups):
    """One scaled query per text (B, H, n) times the first `length` keys in rows (B, capacity, width) -> (B, H, length)"""
    n = q.shape[2]
    found = in_place("row_scores", kv_dtype, q, rows, length, groups, n, length)
    return found if found is not None else by_group(q, groups, heads(kv_dtype, rows, length, groups, n, q.dtype).mT)


def sums(kv_dtype, weights, rows, n, groups):
    """Each head's weighted sum of the values in rows (B, capacity, width); weights (B, H, S) -> (B, H, n)"""
    length = weights.shape[2]
    found = in_place("row_sums", kv_dtype, weights, rows, length, groups, n, n)
    return found if found is not None else by_group(weights, groups, heads(kv_dtype, rows, length, groups, n, weights.dtype))


def in_place(loop, kv_dtype, x, rows, length, groups, n, width):
    """
    Call a loop with x (B, H, ...) and rows -> (B, H, width), or None if no loop can read them. Raises ValueError if rows have
    the wrong shape or dtype, since the loops do not check.
    """
    B, H = x.shape[:2]
    fits = len(rows) == B and 0 < length <= rows.shape[1] and H % groups == 0
    if not fits or (rows.dtype, rows.shape[2]) != row_of(kv_dtype, groups * n):
        what = f"{B} texts, {H} heads, {groups} x {n} numbers of {length} positions in {kv_dtype}"
        raise ValueError(f"{what} do not fit rows of {tuple(rows.shape)}, {rows.dtype}")
    if not by_loops(x) or rows.requires_grad or n > kernels.WIDEST:
        return None
    out, row_bytes = torch.empty(B, H, width), rows.shape[2] * rows.element_size()
    call = kernels.bind(loop, KV_DTYPES.index(kv_dtype), B, H, groups, n, length, rows.shape[1], row_bytes)
    call(x.contiguous(), rows, out, torch.get_num_threads())
    return out


def heads(kv_dtype, rows, length, groups, n, dtype):
    """-> (B, G, S, n)"""
    return unpack(kv_dtype, rows[:, :length], groups * n, dtype).unflatten(-1, (groups, n)).transpose(1, 2)


def by_group(x, groups, y):
    """x (B, H, i), y (B, G, i, j), each shared by H / G heads -> their products (B, H, j)"""
    return (x.unflatten(1, (groups, -1)) @ y).flatten(1, 2)
