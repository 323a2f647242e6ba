"""
Exact low-rank factors of a matrix W [out,in], y = W x. One decomposition serves every rank and every threshold.

W ~ left @ right (+ mean), left [out,r], right [r,in]. A method defines the cost of an error: |G^(1/2) (W - W') C^(1/2)|^2.

    pca     C = 1, G = 1. The mean row is subtracted first and added back; if W has more rows than columns, the mean column
    svd     C = 1, G = 1
    whiten  C = E[x x^T] of the input x: counts the error of the output on text, not of the weights
    fisher  the same C, and G = E[g g^T] of the loss's gradient g at the output: twice the nats lost, to second order, if x and
            g are independent (the two factors of K-FAC, arXiv:1503.05671). The loss predicts next tokens that the model
            draws itself: on SmolLM2-135M this loses a sixth less than the text's own next tokens
    sequential  as fisher, but W and C come from surgery/rank_in_order.py: C is measured after the earlier layers were cut

With G^(1/2) (W - mean) C^(1/2) = U S V^T, left is G^(-1/2) U_k and right is U_k^T G^(1/2) (W - mean): C is never inverted.

Stacked matrices share their right factor. If W is the key matrix over the value matrix, the cache keeps right @ x, r numbers a
token, for both. If W stacks the same matrix of neighbouring layers, these layers share their components.
"""

from dataclasses import dataclass

import torch

from util_factorization import MATRIX_METHODS, check_needs
from util_factorization.spectrum import Spectrum, root, with_ridge


@dataclass
class Factors:
    """left [out,r], right [r,in], and mean: [1,in] (added to every row), [out,1] (added to every column) or None. Float32."""

    left: torch.Tensor
    right: torch.Tensor
    mean: torch.Tensor | None

    def matrix(self):
        """[out,in]"""
        product = self.left @ self.right
        return product if self.mean is None else product + self.mean

    def folded(self):
        """(left, right), with the mean as one extra component."""
        if self.mean is None:
            return self.left, self.right
        if len(self.mean) == 1:
            row, column = self.mean, torch.ones(len(self.left), 1)
        else:
            row, column = torch.ones(1, self.right.shape[1]), self.mean
        return torch.cat([self.left, column], 1), torch.cat([self.right, row])


@dataclass
class Decomposition(Spectrum):
    """A decomposed matrix: S [n] in descending order, U [out,n], the square root of G (None: 1), all float64; W unchanged."""

    W: torch.Tensor
    mean: torch.Tensor | None
    U: torch.Tensor
    S: torch.Tensor
    G_root: torch.Tensor | None

    @property
    def full(self):
        return len(self.S)

    def factors(self, k):
        W = self.W.double() if self.mean is None else self.W.double() - self.mean
        left, right = self.U[:, :k], self.U[:, :k].T @ (W if self.G_root is None else self.G_root @ W)
        left = left if self.G_root is None else torch.linalg.solve(self.G_root, left)
        return Factors(left.float(), right.float(), None if self.mean is None else self.mean.float())


def decompose(W, method, C=None, G=None):
    """
    Decompose W [out,in] once for every rank.

    C [in,in] for whiten and fisher, G [out,out] for fisher. Raises ValueError if the method is unknown or C or G is missing.
    """
    check_needs(method, MATRIX_METHODS, C=C, G=G)
    weighted, mean = W.double(), None
    if method == "pca":  # mean over the rows, or over the columns if there are more rows than columns
        mean = weighted.mean(1, keepdim=True) if len(W) > W.shape[1] else weighted.mean(0, keepdim=True)
        weighted = weighted - mean
    needs, G_root = MATRIX_METHODS[method], None
    if "G" in needs:
        G_root = root(with_ridge(G))
        weighted = G_root @ weighted
    if "C" in needs:
        weighted = weighted @ root(with_ridge(C))
    U, S, _ = torch.linalg.svd(weighted, full_matrices=False)
    return Decomposition(W, mean, U, S, G_root)


def refit(factors, parts):
    """
    New left factors for stacked matrices of several layers. parts: [(W [out,in], C [in,in] of its own input)].

    A stack is decomposed under one C, but its layers read different inputs. So least squares fits each left under its own C.
    G has no effect: if right is fixed, the best left is the same under every metric of the output.
    """
    right, left = factors.right.double(), []
    for W, C in parts:
        C_root = root(with_ridge(C))
        left.append(torch.linalg.lstsq(C_root @ right.T, C_root @ W.double().T).solution.T)
    return Factors(torch.cat(left).float(), factors.right, None)


def skeleton(left, right):
    """
    Rewrite left [out,r] @ right [r,in], r <= out, so that r rows of left are unit vectors (an interpolative decomposition).

    The product stays the same. It takes r (out - r) + r in numbers instead of r out + r in. right then computes r outputs.
    Returns (rows [r]: positions of the unit vectors, chosen by LU's pivots; other rows of left [out - r, r]; right [r,in]).
    """
    rows, others = (part.sort().values for part in pivots(left).tensor_split([left.shape[1]]))
    top, rest = left[rows].double(), left[others].double()
    return rows, torch.linalg.solve(top, rest, left=False).float(), (top @ right.double()).float()


def pivots(left):
    """The row order of LU's pivoting on left [out,r]: the first r rows are well conditioned."""
    return torch.linalg.lu(left.double()).P.T.argmax(1)


def from_skeleton(rows, rest):
    """Rebuild the left [out,r] from the result of skeleton()."""
    left = torch.zeros(len(rows) + len(rest), len(rows))
    others = torch.ones(len(left), dtype=torch.bool)
    others[rows] = False
    left[rows], left[others] = torch.eye(len(rows)), rest
    return left


def relative_error(W, rebuilt, C=None):
    """|W - W'| / |W|; with C [in,in], the relative error of the outputs on text. 0 if W or its outputs are all zero."""
    square = (lambda A: (A @ C.to(A) * A).sum()) if C is not None else (lambda A: A.square().sum())
    whole = square(W)
    return (square(W - rebuilt) / whole).clamp(min=0).sqrt().item() if whole > 0 else 0.0
