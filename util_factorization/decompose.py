"""
Exact low-rank factors of a table W [V,d], one decomposition for every rank.

A rank-k factorization with weights p on the rows (they sum to 1) is W ~ 1 mu^T + Z P, Z [V,k], P [k,d]:

    svd       mu = 0,           p uniform                        the seeds' "PCA"
    centered  mu = column mean, p uniform
    freq      mu = p-mean,      p = smoothed token frequencies   least error per token read, not per row
                                                                 (after GroupReduce, arXiv:1806.06950)

All three take the leading right singular vectors Vh of diag(sqrt p) (W - mu) and set P = Vh_k. Scaling the left side
back gives Z = diag(1 / sqrt p) U_k S_k = (W - mu) Vh_k^T, so no left singular vector is ever computed: S and Vh come
from the d x d second moment of the rows. Summed in float64 it squares a condition number that float32 storage already
cuts off at 1e7, so nothing that the table holds is lost.
"""

from dataclasses import dataclass

import torch

from util_factorization import METHODS

BLOCK = 8192  # rows in float64 at a time: 50 MB at d = 768


@dataclass
class Decomposition:
    """
    What a table decomposed into, and what cutting it costs.

    table  [V,d] as given
    mean   [d] float64, or None
    S      [d] float64, the singular values of diag(sqrt p) (W - mu), falling; their squares sum to the mean square row
    Vh     [d,d] float64, their right singular vectors, as rows
    """

    table: torch.Tensor
    mean: torch.Tensor | None
    S: torch.Tensor
    Vh: torch.Tensor

    def factors(self, k):
        """Z [V,k], P [k,d] and mean [d] or None, float32 on the CPU: the table is about Z @ P, plus the mean."""
        P = self.Vh[:k].float()
        mean = None if self.mean is None else self.mean.float()
        Z = torch.cat([((b if mean is None else b - mean) @ P.T).cpu() for b in row_blocks(self.table, P)])
        return Z, P.cpu(), None if mean is None else mean.cpu()

    def tail(self, k):
        """The weighted error ||diag(sqrt p) (W - W_k)||; no factorization of rank k has less (Eckart-Young)."""
        return self.S[k:].square().sum().sqrt().item()

    def energy(self, k):
        """Share of the weighted sum of squares that k components keep."""
        return 1 - (self.tail(k) / self.tail(0)) ** 2

    def rank_for(self, share):
        """The smallest rank that keeps this share, in (0, 1], of the energy."""
        kept = self.S.square().cumsum(0) / self.S.square().sum()
        return min(int((kept < share - 1e-12).sum()) + 1, len(kept))

    def relative_errors(self, ranks, counts=None):
        """
        ||W - W_k|| / ||W|| for each rank with every row counting alike, or counts [V] times.

        W - W_k = (W - mu) (I - P^T P), so its squared norm is a trace over the directions that were cut.
        """
        weights = row_weights(counts, len(self.table), self.Vh)
        whole = second_moment(self.table, None, weights, self.Vh).trace()
        cut = torch.einsum("id,de,ie->i", self.Vh, second_moment(self.table, self.mean, weights, self.Vh), self.Vh)
        return [(cut[k:].sum().clamp(min=0) / whole).sqrt().item() for k in ranks]


def decompose(table, method="svd", counts=None, device="cpu"):
    """
    Decompose a table [V,d] (torch or numpy) once for every rank.

    counts [V]: how often each token occurs, for `freq`; one is added to each, so that no row weighs nothing.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if method == "freq" and counts is None:
        raise ValueError("method freq needs the token counts")
    table = torch.as_tensor(table)
    like = torch.empty(0, dtype=torch.float64, device=device)
    smoothed = torch.as_tensor(counts) + 1 if method == "freq" else None
    weights = row_weights(smoothed, len(table), like)
    mean = None
    if method != "svd":
        mean = sum(weights[rows] @ block for rows, block in zip(row_slices(table), row_blocks(table, like)))
    energies, vectors = torch.linalg.eigh(second_moment(table, mean, weights, like))  # rising
    return Decomposition(table, mean, energies.clamp(min=0).sqrt().flip(0), vectors.T.flip(0))


def second_moment(table, mean, weights, like):
    """sum_i p_i (w_i - mu) (w_i - mu)^T, [d,d] in the precision and on the device of `like`."""
    moment = torch.zeros(table.shape[1], table.shape[1], dtype=like.dtype, device=like.device)
    for rows, block in zip(row_slices(table), row_blocks(table, like)):
        block = block if mean is None else block - mean
        moment.addmm_(block.T, block * weights[rows, None])
    return moment


def row_weights(counts, V, like):
    """counts [V] -> weights that sum to 1; None -> 1/V each."""
    counts = torch.ones(V) if counts is None else torch.as_tensor(counts)
    if len(counts) != V:
        raise ValueError(f"{len(counts)} counts for a table of {V} rows")
    counts = counts.to(like)
    return counts / counts.sum()


def row_slices(table):
    return [slice(i, i + BLOCK) for i in range(0, len(table), BLOCK)]


def row_blocks(table, like):
    """The table in blocks of rows, in the precision and on the device of `like`: never a whole copy in float64."""
    return (table[rows].to(like) for rows in row_slices(table))
