"""
Rows of a token table that are told from other rows: " Dogs" from " dogs", a name from other names.

Each row's *parent* is the row of an earlier group that is most like it. With X the coordinates without the groups' means, the
codes keep only what the parent does not tell, over a gain of the row, so that all rows of a group are equally large:

    X_i = f_i X_parent(i) + gain_i rest_i

A draft chooses parents and factors by each column over its spread in the group. Where the cosine of the two is c, the rest has
1 - c^2 of the squares, and takes log2(1 / (1 - c^2)) / 2 bits a number less. Groups are made of rows whose rests are worth the
same: weight times gain^2. When a group is coded, its parents are read as they will be, so errors do not add up; then the factor
counts each column by the error that its bits leave.
"""

import torch
from torch.nn.functional import normalize

LEAST_ALIKE = 0.25  # rows with a lower cosine have no parent; here it saves 27 bits of a row of 576 numbers
COST = 24  # bits of a row's parent, factor and gain
ROW_FACTORS = torch.arange(16) / 8
ROW_GAINS = 2 ** ((torch.arange(16) - 8) / 4)
COSINES_AT_ONCE = 2**25  # of rows with others


def find_parents(X, groups):
    """X [V,k], groups of row indices -> (parents [V], -1 where a row has none; bits that all of them save)."""
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
    """X [rows,k] -> the root of each column's mean square [k], above 0."""
    return X.square().mean(0).sqrt().clamp(min=1e-9)


def told_by_parents(X, read, parents, rows, by):
    """
    What parents tell of `rows` of X [V,k], the rest, and the factors: [rows,k], [rows,k], the numbers of ROW_FACTORS [rows].

    read [V,k]: the parents' rows; parents [V]; by [k]: what a difference of each column is divided by when it is counted.
    """
    told = read[parents[rows].clamp(min=0)] * (parents[rows] >= 0)[:, None]
    u, v = X[rows] / by, told / by
    factor = nearest((u * v).sum(1) / v.square().sum(1).clamp(min=1e-9), ROW_FACTORS)
    told = told * ROW_FACTORS[factor, None]
    return told, X[rows] - told, factor


def gains_of(rest, by):
    """rest [rows,k] -> the numbers of ROW_GAINS [rows] next to the size of each row, over the spread `by` of the columns."""
    if not len(by):  # no column has bits
        return torch.full((len(rest),), ROW_GAINS.tolist().index(1.0))
    return nearest((rest / by).square().mean(1).sqrt().clamp(min=1e-9).log(), ROW_GAINS.log())


def nearest(x, levels):
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def relation(factor, gain):
    """Numbers of ROW_FACTORS and of ROW_GAINS -> a byte for each row."""
    return (factor * 16 + gain).to(torch.uint8)


def factors_and_gains(relation):
    """The inverse, as values."""
    return ROW_FACTORS[relation.long() // 16], ROW_GAINS[relation.long() % 16]
