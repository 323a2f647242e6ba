"""
Rows of a token table that are stored as their difference from a similar row: " Dogs" from " dogs", a name from other names.

The *parent* of a row is the most similar row of the earlier groups. X are the coordinates without the groups' means. We
quantise only the rest that the parent does not predict, divided by a scale of the row, so that all rows of a group have the
same size:

    X_i = f_i X_parent(i) + scale_i rest_i

To choose parents and factors f, each column is divided by its spread (root mean square) in the group. If the cosine of the two
rows is c, the rest has 1 - c^2 of the squared size and needs log2(1 / (1 - c^2)) / 2 bits per number less. A group collects
rows whose rests have the same importance: weight times scale^2. When a group is quantised, its parents are already the decoded
rows, so errors do not add up; at this point the factor weighs each column by the error that its bits leave.
"""

import torch
from torch.nn.functional import normalize

LEAST_ALIKE = 0.25  # rows with a lower cosine get no parent; at this cosine a row of 576 numbers saves 27 bits
COST = 24  # bits per row for its parent, factor and scale
ROW_FACTORS = torch.arange(16) / 8
ROW_GAINS = 2 ** ((torch.arange(16) - 8) / 4)
COSINES_AT_ONCE = 2**25  # entries of a cosine matrix, which bounds memory


def find_parents(X, groups):
    """X [V,k]; groups: row indices -> (parents [V], -1 for a row without one; bits that all parents save together)."""
    parents, saved, k = torch.full((len(X),), -1), 0.0, X.shape[1]
    for g, rows in enumerate(groups[1:], 1):
        before, by = torch.cat(groups[:g]), spread(X[rows])
        known = normalize(X[before] / by)
        for some in rows.split(max(1, COSINES_AT_ONCE // len(before))):
            alike, best = (normalize(X[some] / by) @ known.T).max(1)
            has = alike >= LEAST_ALIKE
            parents[some[has]] = before[best[has]]
            saved -= k / 2 * torch.log2(1 - alike[has].clamp(max=0.999).square()).sum().item()
    return parents, saved


def spread(X):
    """X [rows,k] -> the root mean square of each column [k], above 0."""
    return X.square().mean(0).sqrt().clamp(min=1e-9)


def told_by_parents(X, read, parents, rows, by):
    """
    -> the prediction of `rows` of X [V,k] from their parents [rows,k], the rest [rows,k], and indices into ROW_FACTORS [rows].

    read [V,k]: decoded rows; parents [V]; by [k]: each column is divided by it before the factor is fitted.
    """
    told = read[parents[rows].clamp(min=0)] * (parents[rows] >= 0)[:, None]
    u, v = X[rows] / by, told / by
    factor = nearest((u * v).sum(1) / v.square().sum(1).clamp(min=1e-9), ROW_FACTORS)
    told = told * ROW_FACTORS[factor, None]
    return told, X[rows] - told, factor


def gains_of(rest, by):
    """rest [rows,k] -> indices into ROW_GAINS [rows], nearest to each row's root mean square after division by `by` [k]."""
    if not len(by):  # no column has bits
        return torch.full((len(rest),), ROW_GAINS.tolist().index(1.0))
    return nearest((rest / by).square().mean(1).sqrt().clamp(min=1e-9).log(), ROW_GAINS.log())


def nearest(x, levels):
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def relation(factor, gain):
    """Indices into ROW_FACTORS and ROW_GAINS -> one byte per row."""
    return (factor * 16 + gain).to(torch.uint8)


def factors_and_gains(relation):
    """The inverse of relation(), as values: factors and row scales."""
    return ROW_FACTORS[relation.long() // 16], ROW_GAINS[relation.long() % 16]
