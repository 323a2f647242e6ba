"""The singular values of a decomposition: how much each rank loses and keeps. Also square roots of second moments."""

import torch

ROUNDING = 1e-12  # share of the energy that may be missing when a share counts as reached
RIDGE = 1e-6  # share of a moment's mean eigenvalue: gives a little weight to directions that do not occur in the text


class Spectrum:
    """
    Base class of a decomposition. S [n]: its singular values in the method's metric, descending. full: its largest rank.
    """

    def tail(self, k):
        """The error of rank k in the method's metric (not squared). No factorization of rank k has less (Eckart-Young)."""
        return self.S[k:].square().sum().sqrt().item()

    def energy(self, k):
        """The share of the sum of squares that k components keep; 1 if the matrix is zero."""
        total = self.tail(0)
        return 1 - (self.tail(k) / total) ** 2 if total else 1.0

    def rank_for(self, share):
        """The smallest rank that keeps this share, in (0, 1], of the energy. A share of 1 keeps every component."""
        if share == 1:  # also components whose energy rounds to zero
            return self.full
        kept = self.S.square().cumsum(0) / self.S.square().sum()
        return min(int((kept < share - ROUNDING).sum()) + 1, self.full)


def root(M):
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def with_ridge(M):
    """A second moment in float64, made invertible. A zero moment (no input reaches the layer) becomes the identity."""
    M = M.double()
    if not M.any():
        return torch.eye(len(M), dtype=M.dtype)
    return M + RIDGE * M.trace() / len(M) * torch.eye(len(M), dtype=M.dtype)
