"""
Exact low-rank factors of attention weights W [out,in], y = W x; one decomposition for every rank and every threshold.

W ~ left @ right (+ mean), left [out,r], right [r,in]. A method says what an error costs: |G^(1/2) (W - W') C^(1/2)|^2.

    pca     C = 1, G = 1, the mean row taken off first and added back (the mean column, where there are more rows than columns)
    svd     C = 1, G = 1
    whiten  C = E[x x^T] of the input: the error of the output on text, not of the weights
    fisher  the same C, and G = E[g g^T] of the loss's gradient g at the output: twice the nats that the error costs, to
            second order, with x and g taken for independent (the two factors of K-FAC, arXiv:1503.05671). The loss is of
            next tokens that the model draws itself: on SmolLM2-135M a sixth less is lost than with the text's own

With G^(1/2) (W - mean) C^(1/2) = U S V^T, left is G^(-1/2) U_k and right U_k^T G^(1/2) (W - mean): C is never inverted.

Stacked matrices share their right factor: keys over values make a cache that keeps right @ x, r numbers a token, for both; the
same matrix of neighbouring layers shares its components over the layers.
"""

from dataclasses import dataclass

import torch

from util_factorization.decompose_table import root

METHODS = ("pca", "svd", "whiten", "fisher")
RIDGE = 1e-6  # of a moment's mean eigenvalue: directions that the text never showed keep a little weight


@dataclass
class Factors:
    """left [out,r], right [r,in], and mean: [1,in], a row that all rows share, or [out,1], or None. Float32."""

    left: torch.Tensor
    right: torch.Tensor
    mean: torch.Tensor | None

    def matrix(self):
        product = self.left @ self.right
        return product if self.mean is None else product + self.mean

    def folded(self):
        """left and right alone: a mean is one component more."""
        if self.mean is None:
            return self.left, self.right
        if len(self.mean) == 1:
            row, column = self.mean, torch.ones(len(self.left), 1)
        else:
            row, column = torch.ones(1, self.right.shape[1]), self.mean
        return torch.cat([self.left, column], 1), torch.cat([self.right, row])


@dataclass
class Decomposition:
    """What a matrix decomposed into: S [n] falling, U [out,n], the root of G (None: 1), all float64; W as it was given."""

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

    def tail(self, k):
        """The error in the method's own metric; no matrix of rank k (beside the mean) has less (Eckart-Young)."""
        return self.S[k:].square().sum().sqrt().item()

    def energy(self, k):
        """Share of the sum of squares that k components keep, in the method's own metric."""
        whole = self.tail(0)
        return 1 - (self.tail(k) / whole) ** 2 if whole else 1.0

    def rank_for(self, share):
        """The smallest rank that keeps this share, in (0, 1], of the energy; 1 keeps every component."""
        if share == 1:
            return self.full
        kept = self.S.square().cumsum(0) / self.S.square().sum()
        return min(int((kept < share).sum()) + 1, self.full)


def decompose(W, method, C=None, G=None):
    """
    Decompose W [out,in] once for every rank.

    C [in,in] for whiten and fisher, G [out,out] for fisher. Raises ValueError where a method lacks what it needs.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    for name, given, needed in (("C", C, method in METHODS[2:]), ("G", G, method == "fisher")):
        if needed and given is None:
            raise ValueError(f"method {method} needs {name}")
    whole, mean = W.double(), None
    if method == "pca":  # its mean is over the rows, or over the columns where there are more rows than columns
        mean = whole.mean(1, keepdim=True) if len(W) > W.shape[1] else whole.mean(0, keepdim=True)
        whole = whole - mean
    G_root = root(with_ridge(G)) if method == "fisher" else None
    whole = whole if G_root is None else G_root @ whole
    whole = whole @ root(with_ridge(C)) if method in METHODS[2:] else whole
    U, S, _ = torch.linalg.svd(whole, full_matrices=False)
    return Decomposition(W, mean, U, S, G_root)


def refit(factors, parts):
    """
    The left factors of stacked matrices anew, each by least squares under the input that it has: parts [(W, C [in,in])].

    A stack is decomposed under one C; matrices of several layers read different inputs. G does not enter: with right fixed,
    the best left is the same under every metric of the output.
    """
    right, left = factors.right.double(), []
    for W, C in parts:
        C_root = root(with_ridge(C))
        left.append(torch.linalg.lstsq(C_root @ right.T, C_root @ W.double().T).solution.T)
    return Factors(torch.cat(left).float(), factors.right, None)


def skeleton(left, right):
    """
    left [out,r] @ right [r,in], r <= out, with r of left's rows unit vectors (an interpolative decomposition): the same matrix
    in r (out - r) + r in numbers instead of r out + r in. What right gives are then r of the outputs themselves.

    Returns (rows [r] of the unit vectors, the other rows of left [out - r, r], right [r,in]). Rows are LU's pivots.
    """
    pivots, r = torch.linalg.lu(left.double()).P.T, left.shape[1]
    order = pivots.argmax(1)
    rows, others = order[:r].sort().values, order[r:].sort().values
    top, rest = left[rows].double(), left[others].double()
    return rows, torch.linalg.solve(top, rest, left=False).float(), (top @ right.double()).float()


def from_skeleton(rows, rest):
    """left [out,r] of what skeleton() returned."""
    left = torch.zeros(len(rows) + len(rest), len(rows))
    others = torch.ones(len(left), dtype=torch.bool)
    others[rows] = False
    left[rows], left[others] = torch.eye(len(rows)), rest
    return left


def with_ridge(M):
    M = M.double()
    return M + RIDGE * M.trace() / len(M) * torch.eye(len(M), dtype=M.dtype)


def relative_error(W, rebuilt, C=None):
    """|W - W'| / |W|, or with C that of the outputs on text."""
    square = (lambda A: (A @ C.to(A) * A).sum()) if C is not None else (lambda A: A.square().sum())
    return (square(W - rebuilt) / square(W)).sqrt().item()
