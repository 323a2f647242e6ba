"""What a cut at a rank costs: the singular values of a decomposition. Also roots of second moments."""

import torch

ROUNDING = 1e-12  # of the energy: where no more than this is missing, the share counts as reached
RIDGE = 1e-6  # of a moment's mean eigenvalue: a little weight for directions that do not occur in the text


class Spectrum:
    """
    Part of a decomposition. S [n]: its singular values, falling, in the method's own metric. full: its largest rank.
    """

    def tail(self, k):
        """The error of rank k in the method's own metric, a square root; no factorization of rank k has less (Eckart-Young)."""
        return self.S[k:].square().sum().sqrt().item()

    def energy(self, k):
        """Share of the sum of squares that k components keep; 1 where the matrix is zero."""
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
    """A second moment in float64 that can be inverted. One of zeros, of a layer that nothing reaches, weighs all alike."""
    M = M.double()
    if not M.any():
        return torch.eye(len(M), dtype=M.dtype)
    return M + RIDGE * M.trace() / len(M) * torch.eye(len(M), dtype=M.dtype)
