"""
Exact low-rank factors of a matrix W [out,in], y = W x. One decomposition serves every rank and every threshold.

W ~ left @ right (+ mean), left [out,r], right [r,in]. A method says what an error costs: |G^(1/2) (W - W') C^(1/2)|^2.

    pca     C = 1, G = 1. The mean row is taken off first and added back; the mean column where there are more rows than columns
    svd     C = 1, G = 1
    whiten  C = E[x x^T] of the input: the error of the output on text, not of the weights
    fisher  the same C, and G = E[g g^T] of the loss's gradient g at the output: twice the nats that the error costs, to second
            order, if x and g are independent (the two factors of K-FAC, arXiv:1503.05671). The loss is that of next
            tokens which the model draws itself: on SmolLM2-135M a sixth less is lost than with the text's own
    sequential  the same; W and C are those of surgery/in_order.py, which knows what the layers before give once they are cut

With G^(1/2) (W - mean) C^(1/2) = U S V^T, left is G^(-1/2) U_k and right is U_k^T G^(1/2) (W - mean): C is never inverted.

Stacked matrices share their right factor. Keys over values: the cache keeps right @ x, r numbers a token, for both. The same
matrix of neighbouring layers: the layers share their components.
"""

from dataclasses import dataclass

import torch

from util_factorization import MATRIX_METHODS, check_needs
from util_factorization.spectrum import Spectrum, root, with_ridge


@dataclass
class Factors:
    """left [out,r], right [r,in], and mean: [1,in], a row that all rows share, or [out,1], or None. Float32."""

    left: torch.Tensor
    right: torch.Tensor
    mean: torch.Tensor | None

    def matrix(self):
        """[out,in]"""
        product = self.left @ self.right
        return product if self.mean is None else product + self.mean

    def folded(self):
        """left and right alone; a mean becomes one component more."""
        if self.mean is None:
            return self.left, self.right
        if len(self.mean) == 1:
            row, column = self.mean, torch.ones(len(self.left), 1)
        else:
            row, column = torch.ones(1, self.right.shape[1]), self.mean
        return torch.cat([self.left, column], 1), torch.cat([self.right, row])


@dataclass
class Decomposition(Spectrum):
    """A decomposed matrix: S [n] falling, U [out,n], the root of G (None: 1), all float64; W as it was given."""

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

    C [in,in] for whiten and fisher, G [out,out] for fisher. Raises ValueError for an unknown method, and where it lacks C or G.
    """
    check_needs(method, MATRIX_METHODS, C=C, G=G)
    weighted, mean = W.double(), None
    if method == "pca":  # its mean is over the rows, or over the columns where there are more rows than columns
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
    New left factors for stacked matrices of several layers: parts [(W [out,in], C [in,in] of its own input)].

    A stack is decomposed under one C, but its layers read different inputs. So each left is fitted by least squares under its
    own C. G does not enter: with right fixed, the best left is the same under every metric of the output.
    """
    right, left = factors.right.double(), []
    for W, C in parts:
        C_root = root(with_ridge(C))
        left.append(torch.linalg.lstsq(C_root @ right.T, C_root @ W.double().T).solution.T)
    return Factors(torch.cat(left).float(), factors.right, None)


def skeleton(left, right):
    """
    left [out,r] @ right [r,in], r <= out, rewritten so that r rows of left are unit vectors (an interpolative decomposition).

    The product stays the same and takes r (out - r) + r in numbers instead of r out + r in. right then gives r of the outputs.
    Returns (rows [r]: the unit vectors' places, LU's pivots; the other rows of left [out - r, r]; right [r,in]).
    """
    rows, others = (part.sort().values for part in pivots(left).tensor_split([left.shape[1]]))
    top, rest = left[rows].double(), left[others].double()
    return rows, torch.linalg.solve(top, rest, left=False).float(), (top @ right.double()).float()


def pivots(left):
    """The rows of left [out,r] as LU takes them: its first r are far from depending on each other."""
    return torch.linalg.lu(left.double()).P.T.argmax(1)


def from_skeleton(rows, rest):
    """The left [out,r] that skeleton() took apart."""
    left = torch.zeros(len(rows) + len(rest), len(rows))
    others = torch.ones(len(left), dtype=torch.bool)
    others[rows] = False
    left[rows], left[others] = torch.eye(len(rows)), rest
    return left


def relative_error(W, rebuilt, C=None):
    """|W - W'| / |W|; with C [in,in] the same of the outputs on text. 0 where W, or its outputs, are zeros."""
    square = (lambda A: (A @ C.to(A) * A).sum()) if C is not None else (lambda A: A.square().sum())
    whole = square(W)
    return (square(W - rebuilt) / whole).clamp(min=0).sqrt().item() if whole > 0 else 0.0
