"""
Exact low-rank factors of a table W [V,d]. One decomposition serves every rank.

A rank-k factorization with weights p on the rows (they sum to 1) is W ~ 1 mu^T + Z P, with Z [V,k] and P [k,d]. A method
defines the cost of an error: for each use of the table, sum_i a_i (w_i - w'_i) M (w_i - w'_i)^T, row weights a, metric M.

    svd       mu = 0,           a uniform, M = 1             "PCA" in the original scripts
    centered  mu = column mean, a uniform, M = 1
    freq      mu = p-mean,      a = p,     M = 1             p: smoothed token frequencies. Counts the error per token of
                                                             text, not per row (after GroupReduce, arXiv:1806.06950)
    whiten    mu = p-mean,      a = p,     M = C = E[h h^T]  the error of the logits; h: the input of the head
    joint     mu = p-mean,      two uses: the head with a = p and M = C; the lookup with a = p / |w|^2 and M = 1, since
                                the first LayerNorm discards a row's length. Each is divided by its cost at W' = 1 mu^T,
                                and the lookup is multiplied by lambda
    fisher    mu = p-mean,      a = p,     M = C + G         G = E[g g^T], g: the loss's gradient at a looked-up row. Both
                                                             costs are twice the nats lost, so no lambda is needed

Each use gives a block diag(sqrt a) (W - mu) M^(1/2). The blocks side by side have the singular values S and the right singular
vectors Q. Then Z = diag(1 / sqrt p) U_k S_k: the rows of the blocks, scaled back and multiplied by Q_k. So no left singular
vector is computed. S and Q come from the d x d second moments of the rows. These square the table's condition number, which
float32 storage limits to 1e7, so sums in float64 are exact enough.

The cost of fisher is a second-order approximation. Like K-FAC (arXiv:1503.05671), it assumes that h and g do not depend on the
token. It ignores that the errors of one window's rows add up. It drops the softmax's mean. G may come from the text's own next
tokens. It ranks directions well, but predicts the loss only roughly.

P is the least-squares map from Z to W - mu under p: P = S_k^-2 Z^T diag(p) (W - mu). Lookup and head use the same P, since a
metric on the right does not change a least-squares map; so scale_up equals scale_down. (For joint, the lookup's own map would
weigh rows by p / |w|^2. On trained tables this changed no loss by more than 0.01.)
"""

from dataclasses import dataclass

import torch

from util_factorization import JOINT_LAMBDA, METHODS, check_needs
from util_factorization.spectrum import Spectrum, root

BLOCK = 8192  # rows converted to float64 at a time: 50 MB at d = 768


@dataclass
class Decomposition(Spectrum):
    """
    A decomposed table, and the error of every rank. n is d times the number of blocks.

    joint has no optimal Z P, since its two blocks weigh a row differently. There tail() is an upper bound of the error.

    table  [V,d], unchanged
    mean   [d] float64, or None
    S      [n] float64, the singular values of the blocks side by side, in descending order
    maps   for every block: (row scales [V], None if all are 1; M^(1/2) Q [d,d] float64)
    P      [d,d] float64: its first k rows are the P of rank k
    """

    table: torch.Tensor
    mean: torch.Tensor | None
    S: torch.Tensor
    maps: list
    P: torch.Tensor

    def factors(self, k):
        """Z [V,k], P [k,d] and mean [d] or None, float32 on the CPU. The table is approximately Z @ P + mean."""
        like = self.P[:k].float()
        Z = torch.cat([self._coordinates(rows, k, like)[1].cpu() for rows in row_slices(self.table)])
        return Z, like.cpu(), None if self.mean is None else self.mean.float().cpu()

    def _coordinates(self, rows, k, like):
        """(Some rows of W - mu, the same rows of Z [rows,k]), with the dtype and device of `like`."""
        block = self.table[rows].to(like)
        block = block if self.mean is None else block - self.mean.to(like)
        parts = (
            block @ to_k[:, :k].to(like) if scale is None else scale[rows, None].to(like) * (block @ to_k[:, :k].to(like))
            for scale, to_k in self.maps
        )
        return block, sum(parts)

    @property
    def full(self):
        return self.table.shape[1]

    def relative_errors(self, ranks, counts=None):
        """||W - W_k|| / ||W|| for each rank. All rows weigh the same, or by counts [V]."""
        weights = row_weights(counts, len(self.table), self.P)
        complete, cut, like = 0.0, [0.0] * len(ranks), self.P.float()
        for rows in row_slices(self.table):
            complete += weights[rows] @ self.table[rows].to(self.P).square().sum(1)
            block, Z = self._coordinates(rows, max(ranks), like)
            for i, k in enumerate(ranks):
                residual = torch.addmm(block, Z[:, :k], like[:k], alpha=-1)
                cut[i] += weights[rows] @ residual.square().sum(1).double()
        return [(error / complete).sqrt().item() if complete else 0.0 for error in cut]  # a zero table has no error


def decompose(table, method="svd", counts=None, head=None, lookup=None, joint_lambda=JOINT_LAMBDA, device="cpu"):
    """
    Decompose a table [V,d] (torch or numpy) once for every rank.

    counts [V]    how often each token occurs; one is added, so no row has weight 0
    head [d,d]    C = E[h h^T], h: the input of the head
    lookup [d,d]  G = E[g g^T], g: the loss's gradient at the looked-up row
    METHODS lists which of them a method needs. For fisher, give 0 for a use that the table does not have.
    Raises ValueError if the method is unknown or an input that it needs is missing.
    """
    check_needs(method, METHODS, counts=counts, head=head, lookup=lookup)
    table = torch.as_tensor(table)
    V, d = table.shape
    like = torch.empty(0, dtype=torch.float64, device=device)
    p = row_weights(torch.as_tensor(counts) + 1 if "counts" in METHODS[method] else None, V, like)
    mean = None
    if method != "svd":
        mean = sum(p[rows] @ block for rows, block in zip(row_slices(table), row_blocks(table, like)))

    blocks = blocks_of(method, table, mean, p, head, lookup, joint_lambda, like)

    def moment(*scales):
        weights = p
        for scale in scales:
            weights = weights if scale is None else weights * scale
        return second_moment(table, mean, weights, like)

    gram = torch.cat([torch.cat([R.T @ moment(a, b) @ T for b, T in blocks], 1) for a, R in blocks])
    energies, vectors = torch.linalg.eigh(gram)  # ascending
    energies, Q = energies.clamp(min=0).flip(0), vectors.flip(1)[:, :d]
    maps = [(scale, R @ part) for (scale, R), part in zip(blocks, Q.split(d))]
    P = sum(to_k.T @ moment(scale) for scale, to_k in maps)
    # A direction without energy contains only rounding errors: its row of P is 0.
    P = torch.where(energies[:d, None] > 1e-14 * energies[0], P / energies[:d, None], 0)
    return Decomposition(table, mean, energies.sqrt(), maps, P)


def blocks_of(method, table, mean, p, head, lookup, joint_lambda, like):
    """The cost of an error by a method: for each use of the table, (row scales sqrt(a / p), None if all are 1; M^(1/2))."""
    one = torch.eye(table.shape[1]).to(like)
    if method == "whiten":
        return [(None, root(head.to(like)))]
    if method == "fisher":
        return [(None, root((head + lookup).to(like)))]
    if method == "joint":
        lengths = torch.cat([block.norm(dim=1) for block in row_blocks(table, like)])
        inverse = torch.where(lengths > 1e-6 * lengths.max(), 1 / lengths, 0)  # a zero row has no direction
        C = head.to(like)
        in_lookup = second_moment(table, mean, p * inverse**2, like).trace()
        in_head = (second_moment(table, mean, p, like) * C).sum()
        in_lookup, in_head = (x if x > 0 else torch.ones_like(x) for x in (in_lookup, in_head))  # if all rows are equal
        return [(inverse, one * (joint_lambda / in_lookup).sqrt()), (None, root(C / in_head))]
    return [(None, one)]


def second_moment(table, mean, weights, like):
    """sum_i p_i (w_i - mu) (w_i - mu)^T, [d,d], with the dtype and device of `like`."""
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
    """The table in blocks of rows, with the dtype and device of `like`. This avoids a float64 copy of the entire table."""
    return (table[rows].to(like) for rows in row_slices(table))
