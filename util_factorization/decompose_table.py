"""
Exact low-rank factors of a table W [V,d], one decomposition for every rank.

A rank-k factorization with weights p on the rows (they sum to 1) is W ~ 1 mu^T + Z P, Z [V,k], P [k,d]. A method says what
an error costs: the sum over the table's uses of sum_i a_i (w_i - w'_i) M (w_i - w'_i)^T, with row weights a and a metric M.

    svd       mu = 0,           a uniform, M = 1               the seeds' "PCA"
    centered  mu = column mean, a uniform, M = 1
    freq      mu = p-mean,      a = p,     M = 1               p = smoothed token frequencies: the error per token read, not
                                                               per row (after GroupReduce, arXiv:1806.06950)
    whiten    mu = p-mean,      a = p,     M = C = E[h h^T]    what the error does to the logits of a head that reads h
    joint     mu = p-mean,      the head's a = p, M = C, and lambda times the lookup's a = p / |w|^2, M = 1 (the first
                                LayerNorm discards length); each sum divided by what it is at W' = 1 mu^T
    fisher    mu = p-mean,      a = p,     M = C + G           G = E[g g^T], g the loss's gradient at a looked-up row: both
                                                               count twice the nats lost, so no lambda is left

Side by side, the blocks diag(sqrt a) (W - mu) M^(1/2) have the singular values S and right singular vectors Q. Then
Z = diag(1 / sqrt p) U_k S_k is the rows of the blocks, scaled back and times Q_k, so no left singular vector is ever
computed: S and Q come from second moments of the rows, d x d. Summed in float64 they square a condition number that float32
storage already cuts off at 1e7, so nothing that the table holds is lost.

fisher's count is of second order and factored as K-FAC's (arXiv:1503.05671): h and g do not hang on which token it is, the
rows' errors do not add up over a window, the softmax's mean is dropped, G may be of the text's own next tokens. It ranks
directions; as a forecast of the loss it is rough.

P is the least-squares map from Z to W - mu under p, P = S_k^-2 Z^T diag(p) (W - mu), for the lookup and for the head: no
metric on the right changes a least-squares map, so what the lookup needs from scale_up is what the head needs from scale_down
(joint's lookup would weigh rows by p / |w|^2; on trained tables that changed no loss by more than 0.01).
"""

from dataclasses import dataclass

import torch

from util_factorization import CALIBRATED, JOINT_LAMBDA, METHODS

BLOCK = 8192  # rows in float64 at a time: 50 MB at d = 768


@dataclass
class Decomposition:
    """
    What a table decomposed into, and what cutting it costs. n is d times the number of blocks.

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

    def tail(self, k):
        """
        The error in the method's own metric, a square root; no factorization of rank k has less (Eckart-Young). joint's two
        blocks weigh a row differently, no Z P is their best cut: there it is a bound that the factors stay under.
        """
        return self.S[k:].square().sum().sqrt().item()

    def energy(self, k):
        """Share of the weighted sum of squares that k components keep."""
        return 1 - (self.tail(k) / self.tail(0)) ** 2

    def rank_for(self, share):
        """The smallest rank that keeps this share, in (0, 1], of the energy."""
        kept = self.S.square().cumsum(0) / self.S.square().sum()
        return min(int((kept < share - 1e-12).sum()) + 1, self.table.shape[1])

    def relative_errors(self, ranks, counts=None):
        """||W - W_k|| / ||W|| for each rank, every row counting alike, or counts [V] times."""
        weights = row_weights(counts, len(self.table), self.P)
        whole, cut, like = 0.0, [0.0] * len(ranks), self.P.float()
        for rows in row_slices(self.table):
            whole += weights[rows] @ self.table[rows].to(self.P).square().sum(1)
            block, Z = self._coordinates(rows, max(ranks), like)
            for i, k in enumerate(ranks):
                residual = torch.addmm(block, Z[:, :k], like[:k], alpha=-1)
                cut[i] += weights[rows] @ residual.square().sum(1).double()
        return [(error / whole).sqrt().item() for error in cut]


def decompose(table, method="svd", counts=None, head=None, lookup=None, joint_lambda=JOINT_LAMBDA, device="cpu"):
    """
    Decompose a table [V,d] (torch or numpy) once for every rank.

    counts [V]    how often each token occurs, for all methods but svd and centered; one is added, so that no row weighs nothing
    head [d,d]    C = E[h h^T] of what the head reads, for whiten, joint and fisher
    lookup [d,d]  G = E[g g^T] of the loss's gradient at what the lookup gives, for fisher; with a table that has one use
                  alone, fisher takes a 0 for the other's
    Raises ValueError where a method lacks what it needs.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    by_token = method not in ("svd", "centered")
    needs = dict(counts=by_token, head=method in CALIBRATED, lookup=method == "fisher")
    for name, given in dict(counts=counts, head=head, lookup=lookup).items():
        if needs[name] and given is None:
            raise ValueError(f"method {method} needs {name}")
    table = torch.as_tensor(table)
    V, d = table.shape
    like = torch.empty(0, dtype=torch.float64, device=device)
    p = row_weights(torch.as_tensor(counts) + 1 if by_token else None, V, like)
    mean = None
    if method != "svd":
        mean = sum(p[rows] @ block for rows, block in zip(row_slices(table), row_blocks(table, like)))

    # Every block as (its row scale, sqrt(a / p), and M^(1/2)).
    if method == "joint":
        lengths = torch.cat([block.norm(dim=1) for block in row_blocks(table, like)])
        inverse = torch.where(lengths > 1e-6 * lengths.max(), 1 / lengths, 0)  # a row of zeros has no direction to keep
        C, one = head.to(like), torch.eye(d).to(like)
        in_lookup = second_moment(table, mean, p * inverse**2, like).trace()
        in_head = (second_moment(table, mean, p, like) * C).sum()
        blocks = [(inverse, one * (joint_lambda / in_lookup).sqrt()), (None, root(C / in_head))]
    elif method in ("whiten", "fisher"):
        blocks = [(None, root((head if method == "whiten" else head + lookup).to(like)))]
    else:
        blocks = [(None, torch.eye(d).to(like))]

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
    # Directions that hold rounding alone give nothing back.
    P = torch.where(energies[:d, None] > 1e-14 * energies[0], P / energies[:d, None], 0)
    return Decomposition(table, mean, energies.sqrt(), maps, P)


def root(M):
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


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
