"""
Plain quantisation, the control for bits by component: integers of b bits, in blocks of neighbours along a row.

A block of n numbers has a scale and a lowest value, both float16: b + 32 / n bits per number. Each number is rounded to the
nearest step. If a metric M is given, the error of a column is passed on to the later columns, so that the cost e M e^T of a
row's error e becomes small (GPTQ, arXiv:2210.17323, in the form of LDLQ: see encode.py).
"""

import torch

from bits.encode import feedback


def in_groups(W, bits, group, metric=None):
    """
    W [V,d] -> (W after quantisation [V,d], its bytes).

    group: numbers that share a scale; a divisor of d. metric: M [d,d], positive definite; None: round to nearest.
    Raises ValueError if `group` does not divide d.
    """
    V, d = W.shape
    if d % group:
        raise ValueError(f"blocks of {group} numbers do not divide a row of {d}: give a divisor of {d}")
    read, top = torch.empty_like(W, dtype=torch.float32), 2**bits - 1
    U = feedback(metric.double(), columns=1)[0] if metric is not None else None
    errors = torch.zeros_like(read)
    for start in range(0, d, group):
        here = slice(start, start + group)
        aim = W[:, here].float() if U is None else W[:, here] + errors[:, :start] @ U[:start, here]
        low, high = aim.amin(1, keepdim=True).half().float(), aim.amax(1, keepdim=True)
        scale = ((high - low) / top).clamp(min=1e-7).half().float()
        for j in range(start, start + group) if U is not None else [here]:
            column = aim if U is None else (aim[:, j - start] + errors[:, start:j] @ U[start:j, j])[:, None]
            rounded = low + scale * ((column - low) / scale).round().clamp(0, top)
            read[:, j] = rounded if U is None else rounded[:, 0]
            if U is not None:
                errors[:, j] = W[:, j] - rounded[:, 0]
    return read, V * d * bits // 8 + V * (d // group) * 4
