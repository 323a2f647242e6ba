"""
Exact low-rank factors of a table W [V,d]. One decomposition serves every rank.

A rank-k factorization with weights p on the rows (they sum to 1) is W ~ 1 mu^T + Z P, with Z [V,k] and P [k,d]. A method says
what an error costs: for each use of the table, sum_i a_i (w_i - w'_i) M (w_i - w'_i)^T, with row weights a and a metric M.

    svd       mu = 0,           a uniform, M = 1             the seeds' "PCA"
    centered  mu = column mean, a uniform, M = 1
    freq      mu = p-mean,      a = p,     M = 1             p: smoothed token frequencies. The error per token read, not per
                                                             row (after GroupReduce, arXiv:1806.06950)
    whiten    mu = p-mean,      a = p,     M = C = E[h h^T]  what the error does to the logits of a head that reads h
    joint     mu = p-mean,      two uses: the head with a = p and M = C; the lookup with a = p / |w|^2 and M = 1, since
                                the first LayerNorm discards a row's length. Each is divided by its cost at W' = 1 mu^T;
                                the lookup counts lambda times
    fisher    mu = p-mean,      a = p,     M = C + G         G = E[g g^T], g: the loss's gradient at a looked-up row. Head and
                                                             lookup both count twice the nats lost, so there is no lambda

The blocks diag(sqrt a) (W - mu) M^(1/2) of all uses, side by side, have the singular values S and the right singular vectors Q.
Then Z = diag(1 / sqrt p) U_k S_k. These are the rows of the blocks, scaled back and multiplied by Q_k: no left singular vector
is ever computed. S and Q come from second moments of the rows, d x d. These square the table's condition number, which float32
storage limits to 1e7. Sums in float64 lose nothing of that.

The cost of fisher is an approximation of second order. Like K-FAC (arXiv:1503.05671) it assumes that h and g do not depend on
the token. It ignores how the rows' errors of one window add up, it drops the softmax's mean, and G may come from the text's own
next tokens. It ranks directions well; as a forecast of the loss it is rough.

P is the least-squares map from Z to W - mu under p: P = S_k^-2 Z^T diag(p) (W - mu). It serves the lookup and the head: a
metric on the right does not change a least-squares map, so scale_up and scale_down come out equal. (The lookup of joint would
weigh rows by p / |w|^2; on trained tables that changed no loss by more than 0.01.)
"""

from dataclasses import dataclass

import torch

from util_factorization import JOINT_LAMBDA, METHODS, check_needs
from util_factorization.spectrum import Spectrum, root

BLOCK = 8192  # rows in float64 at a time: 50 MB at d = 768


@dataclass
class Decomposition(Spectrum):
    """
    A decomposed table, and what a cut costs. n is d times the number of blocks.

    joint has no optimal Z P, since its two blocks weigh a row differently. There tail() is an upper bound of the error.

    table  [V,d] as given
    mean   [d] float64, or None
    S      [n] float64, the singular values of the blocks side by side, falling
    maps   a pair for every block: row scales [V] or None where they are 1, and [d,d] float64, M^(1/2) Q
    P      [d,d] float64: its first k rows are the P of rank k
    """

    table: torch.Tensor
    mean: torch.Tensor | None
    S: torch.Tensor
    maps: list
    P: torch.Tensor

    def factors(self, k):
        """Z [V,k], P [k,d] and mean [d] or None, float32 on the CPU: the table is about Z @ P, plus the mean."""
        like = self.P[:k].float()
        Z = torch.cat([self._coordinates(rows, k, like)[1].cpu() for rows in row_slices(self.table)])
        return Z, like.cpu(), None if self.mean is None else self.mean.float().cpu()

    def _coordinates(self, rows, k, like):
        """Some rows of W - mu, and of Z [rows,k], in the precision and on the device of `like`."""
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
        """||W - W_k|| / ||W|| for each rank, every row counting alike, or counts [V] times."""
        weights = row_weights(counts, len(self.table), self.P)
        complete, cut, like = 0.0, [0.0] * len(ranks), self.P.float()
        for rows in row_slices(self.table):
            complete += weights[rows] @ self.table[rows].to(self.P).square().sum(1)
            block, Z = self._coordinates(rows, max(ranks), like)
            for i, k in enumerate(ranks):
                residual = torch.addmm(block, Z[:, :k], like[:k], alpha=-1)
                cut[i] += weights[rows] @ residual.square().sum(1).double()
        return [(error / complete).sqrt().item() if complete else 0.0 for error in cut]  # a table of zeros has no error


def decompose(table, method="svd", counts=None, head=None, lookup=None, joint_lambda=JOINT_LAMBDA, device="cpu"):
    """
    Decompose a table [V,d] (torch or numpy) once for every rank.

    counts [V]    how often each token occurs; one is added, so that every row weighs something
    head [d,d]    C = E[h h^T] of what the head reads
    lookup [d,d]  G = E[g g^T] of the loss's gradient at the looked-up row
    METHODS says which of them a method needs. For fisher, give 0 for a use that the table does not have.
    Raises ValueError for an unknown method, and where it lacks what it needs.
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
    energies, vectors = torch.linalg.eigh(gram)  # rising
    energies, Q = energies.clamp(min=0).flip(0), vectors.flip(1)[:, :d]
    maps = [(scale, R @ part) for (scale, R), part in zip(blocks, Q.split(d))]
    P = sum(to_k.T @ moment(scale) for scale, to_k in maps)
    # A direction without energy holds rounding errors alone: its row of P is 0.
    P = torch.where(energies[:d, None] > 1e-14 * energies[0], P / energies[:d, None], 0)
    return Decomposition(table, mean, energies.sqrt(), maps, P)


def blocks_of(method, table, mean, p, head, lookup, joint_lambda, like):
    """What an error costs by a method: for each use of the table (row scale sqrt(a / p), or None where it is 1; M^(1/2))."""
    one = torch.eye(table.shape[1]).to(like)
    if method == "whiten":
        return [(None, root(head.to(like)))]
    if method == "fisher":
        return [(None, root((head + lookup).to(like)))]
    if method == "joint":
        lengths = torch.cat([block.norm(dim=1) for block in row_blocks(table, like)])
        inverse = torch.where(lengths > 1e-6 * lengths.max(), 1 / lengths, 0)  # a row of zeros has no direction to keep
        C = head.to(like)
        in_lookup = second_moment(table, mean, p * inverse**2, like).trace()
        in_head = (second_moment(table, mean, p, like) * C).sum()
        in_lookup, in_head = (x if x > 0 else torch.ones_like(x) for x in (in_lookup, in_head))  # rows that are all alike
        return [(inverse, one * (joint_lambda / in_lookup).sqrt()), (None, root(C / in_head))]
    return [(None, one)]


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
