"""
Quantise matrices: the importance of each column, one budget of bytes for all matrices, and the rounding.

A matrix becomes a Draft: its rows in groups, and the importance (`worth`) of each column in each group. fit() divides the bytes
between all Drafts, at one water level (budget.py). code() rounds.

    token table    P of `fisher`: in its coordinates an error costs the same in every component. Rows are grouped by the cost of
                   their errors: the first groups are small, the last large. A row may be predicted from another row, its
                   parent (predicted_rows.py)
    linear layer   an error E costs tr(G E C E^T), with C = E[x x^T] of the input and G = E[g g^T] of the loss's gradient at the
                   output. G's diagonal is the weight of each row, by which rows are grouped. G's other entries are not used

**Error feedback.** A layer's inputs correlate. A basis that decorrelates them would take as many bytes as the layer. With
C = U D U^T, U unit upper triangular, an error e of a row costs sum_j D_j (e_j + sum_{i<j} e_i U_ij)^2. So the errors of the
columns before j are added to column j, through U, before it is rounded. Its importance is D_j times its variance (LDLQ, as in
QuIP, arXiv:2307.13304; with bits by D_j it is water-filling without a rotation, as in WaterSIC). Errors are fed on by blocks of
columns.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from bits.budget import gains, spend
from bits.coded_matrix import CodedMatrix, segments, stream_size
from bits.packing import pack
from bits.predicted_rows import COST, ROW_GAINS, find_parents, gains_of, relation, spread, told_by_parents
from bits.trellis import distortion, encode, gaussian_codes
from util_factorization.decompose_table import decompose

FIRST = 40  # approximate number of rows in a token table's first group
GROWTH = 2**0.5  # each group has this many times the rows of the one before it
LAYER_GROUPS = 3  # groups of a linear layer's rows, of equal size
LEAST_ROWS = 192  # smallest group of a linear layer
COLUMNS = 32  # columns of a block of error feedback; 8 would lower the error by one percent and take twice the time
BISECTIONS = 30  # steps of the search for the water level
WHOLE_RANGE = 5  # with this many bits or more, no number of a column is clipped
INHERITED = 0.5  # about half of a parent's error is passed on to the row predicted from it
TOKENS = 1e9  # scales weights to counts: decompose() adds 1 to counts
COUNT_POWER = 0.65  # power of the smoothed frequencies: see row_weights()
RIDGE = 1e-3  # in refit(): keeps a scale near its old value if other scales can replace it
DAMPING = 0.01  # this share of a layer's C is replaced by its mean eigenvalue times the identity


def row_weights(counts):
    """
    counts [V] of tokens in calibration text, in any unit -> the weight of an error in each row [V]; they sum to 1.

    A power below 1 lifts the rare rows: other text has other rare tokens, and the loss is steeper at a rare token. The power
    was chosen on text that was not used for calibration (results/bytes).
    """
    p = counts.double() / counts.sum()
    p = (p + 1 / (6 * len(p))) ** COUNT_POWER
    return p / p.sum()


def groups_by_weight(weights, first=FIRST):
    """Row indices of each group, the heaviest rows first. Every group has at least one row."""
    order, V = weights.argsort(descending=True, stable=True), len(weights)
    groups = min(V, max(1, round(math.log(1 + V / first * (GROWTH - 1), GROWTH))))
    sizes = torch.tensor([GROWTH**g for g in range(groups)], dtype=torch.float64)
    ends = (sizes.cumsum(0) / sizes.sum() * V).round().long()
    ends = torch.maximum(ends, torch.arange(1, groups + 1)).tolist()
    return [order[start:end] for start, end in zip([0, *ends], ends)]


@dataclass
class Draft:
    """A matrix before it is quantised."""

    Z: torch.Tensor  # [V,k]: coordinates without the groups' means, or the matrix itself
    groups: list  # row indices of each group
    worth: torch.Tensor  # [G,k] float64: importance, twice the nats that a column costs if it has no bits
    U: torch.Tensor | None = None  # [k,k], from feedback()
    roots: torch.Tensor | None = None  # [k, columns of a block], with U: from feedback()
    weights: torch.Tensor | None = None  # [V], with U: the weight of an error in each row
    P: torch.Tensor | None = None  # [k,d]
    mean: torch.Tensor | None = None  # [d]
    means: torch.Tensor | None = None  # [G,k]
    parents: torch.Tensor | None = None  # [V]: the row that each is predicted from, -1 for none
    without: "Draft | None" = None  # the same matrix without parents

    @property
    def sizes(self):
        return torch.tensor([len(rows) for rows in self.groups])

    def price(self):
        """[G,k]: bits of storage that one bit per number takes, in each column of each group."""
        return self.sizes[:, None].expand(self.worth.shape)

    def bytes(self, depths, codes):
        """Bytes of the CodedMatrix with these half bits [G,k]. The levels are part of the program and not counted."""
        k = self.Z.shape[1] if self.P is None else depths.any(0).sum().item()
        total = len(self.Z) * place_type(len(self.Z)).itemsize + len(self.groups) * (4 + 3 * k)
        for code in codes:
            for size, n in zip(self.sizes.tolist(), (depths == code.half_bits).sum(1).tolist()):
                total += stream_size(n, size, code) if n else 0
        if self.P is not None:
            d = self.P.shape[1]
            total += k * (d + 2) + 2 * d + 2 * k * len(self.groups)
        if self.parents is not None:  # a place and relation() for each row
            total += len(self.Z) * (place_type(len(self.Z)).itemsize + 1)
        return total


def decompose_by(table, weights, metric):
    """Decompose a table [V,d] by `fisher`. weights [V]: of its rows. metric [d,d]: as in draft_table()."""
    return decompose(table, "fisher", weights * TOKENS, head=metric, lookup=torch.zeros_like(metric))


def draft_table(table, weights, metric, groups=None, parents=True):
    """
    A token table [V,d] -> Draft.

    weights [V]   weight of an error in each row
    metric [d,d]  tied table: C + G. Untied: C for the head, G for the lookup
    groups        row indices of each group; default: groups_by_weight()
    parents       whether rows may be predicted from other rows; ignored if groups are given
    """
    decomposition, parents = decompose_by(table, weights, metric), parents and not groups
    Z, P, mean = decomposition.factors(decomposition.full)
    draft = draft_coordinates(Z, weights, groups or groups_by_weight(weights), P, mean)
    found, saved = find_parents(draft.Z, draft.groups) if parents else (None, 0)
    if saved <= COST * len(Z):
        return draft
    groups = groups_by_rests(draft.Z, weights, draft.groups, found)
    better = draft_coordinates(Z, weights, groups, P, mean)
    better.parents, _ = find_parents(better.Z, groups)
    better.worth = torch.stack([worth_of_rests(better.Z, weights, rows, better.parents) for rows in groups])
    return replace(better, without=draft)


def draft_coordinates(Z, weights, groups, P, mean):
    """Coordinates Z [V,k] in groups, without parents -> Draft."""
    means = torch.stack([(weights[rows, None] * Z[rows]).sum(0) / weights[rows].sum() for rows in groups]).float()
    Z, worth = Z.clone(), []
    for rows, m in zip(groups, means):
        Z[rows] -= m
        worth.append((weights[rows, None] * Z[rows].double().square()).sum(0))
    return Draft(Z, groups, torch.stack(worth), P=P, mean=mean, means=means)


def choose(drafts, budget, codes=None):
    """Choose between row prediction and none for all matrices: whichever is forecast to lose less. codes: as in fit()."""
    if all(draft.parents is None for draft in drafts):
        return drafts
    plain = [draft.without or draft for draft in drafts]

    def forecast(some):
        try:
            depths, used = fit(some, budget, codes)
        except ValueError:
            return math.inf
        left, total = {0: 1.0} | {code.half_bits: code.error for code in used}, 0.0
        for draft, b in zip(some, depths):
            error = b.double().apply_(left.get)
            total += (draft.worth * error * (1 + INHERITED * error * (draft.parents is not None))).sum().item()
        return total

    return drafts if forecast(drafts) < forecast(plain) else plain


def groups_by_rests(Z, weights, groups, parents):
    """
    Group rows by the cost of their errors: the row's weight times the size of its residual, which is the part that its parent
    does not predict.

    Z [V,k]: without the means of `groups`. parents [V]: found in these groups. Columns are divided by their spread.
    """
    sizes, by = torch.empty(len(Z)), spread(Z)
    for rows in groups:
        _, rest, _ = told_by_parents(Z, Z, parents, rows, spread(Z[rows]))
        sizes[rows] = (rest / by).square().mean(1)
    return groups_by_weight(weights * sizes)


def worth_of_rests(Z, weights, rows, parents):
    """Importance [k] of the columns of a group whose residuals are scaled per row; a row's error then grows with its scale."""
    _, rest, _ = told_by_parents(Z, Z, parents, rows, spread(Z[rows]))
    gain = ROW_GAINS[gains_of(rest, spread(rest))].double()
    return (weights[rows] * gain.square()).sum() * (rest.double() / gain[:, None]).square().mean(0)


def draft_layer(W, C, weights, groups=None):
    """
    A matrix W [out,in] of a linear layer -> Draft.

    C [in,in]     second moments of the input
    weights [out] weight of an error in each row: G's diagonal
    groups        row indices of each group; default: groups of equal size, by weight
    """
    groups = groups or list(weights.argsort(descending=True, stable=True).tensor_split(layer_groups(len(W))))
    C = C.double() if C.any() else torch.eye(len(C), dtype=torch.double)  # a layer without any input
    C = (1 - DAMPING) * C + DAMPING * C.trace() / len(C) * torch.eye(len(C), dtype=C.dtype)
    U, roots = feedback(C)
    D = roots.double().square().sum(1)
    worth = torch.stack([(weights[rows, None] * W[rows].double().square()).sum(0) for rows in groups]) * D
    return Draft(W, groups, worth, U, roots, weights)


def layer_groups(rows):
    """Number of row groups of a linear layer. A group takes 24 bits per column for scale and bits, so it needs many rows."""
    return max(1, min(LAYER_GROUPS, rows // LEAST_ROWS))


def fit(drafts, budget, codes=None):
    """
    Divide at most `budget` bytes between all Drafts -> (half bits [G,k] of the columns of each Draft, the Codes).

    codes: default: gaussian_codes(). Raises ValueError if the budget is too small for one column and the constants of every
    matrix.
    """
    codes = codes or gaussian_codes()
    found = gains(*worth_and_price(drafts), distortion(codes))

    def at(level):
        """(Half bits at this water level; bytes of all Drafts.)"""
        depths = split(depths_of((found >= level).sum(0), codes), drafts)
        return depths, sum(draft.bytes(b, codes) for b, draft in zip(depths, drafts))

    if not found.isfinite().all() or not found.any():
        raise ValueError("the loss does not depend on these matrices, or is not finite: give another model")
    low, high = math.log(found[found > 0].min().item()), math.log(2 * found.max().item())  # all bits; none
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if at(math.exp(middle))[1] <= budget else (middle, high)
    depths, _ = at(math.exp(high))
    if not all(b.any() for b, draft in zip(depths, drafts) if draft.worth.any()):  # a layer without effect needs no bits
        raise ValueError(f"{budget:,.0f} bytes are too few for the basis, the scales and a column of each matrix: give more")
    return depths, codes


def depths_of(steps, codes):
    """Steps of gains() -> half bits of a number."""
    return torch.tensor([0, *(code.half_bits for code in codes)])[steps]


def worth_and_price(drafts):
    """[worth, price] of the columns of all groups of all Drafts, side by side [n]."""
    return [torch.cat([f(draft).flatten() for draft in drafts]) for f in (lambda x: x.worth, Draft.price)]


def split(steps, drafts):
    """Split steps [n] into [G,k] of each Draft."""
    parts = steps.split([draft.worth.numel() for draft in drafts])
    return [part.view(draft.worth.shape) for part, draft in zip(parts, drafts)]


def spend_over(drafts, budget, codes):
    """Steps [G,k] of each Draft for `budget` bits. Only the bits of the numbers are counted."""
    return split(spend(*worth_and_price(drafts), budget, distortion(codes)), drafts)


def code(draft, depths, codes):
    """Round a Draft to half bits [G,k] -> CodedMatrix."""
    by_depth = {code.half_bits: code for code in codes}
    used = depths.any(0) if draft.P is not None else torch.ones(depths.shape[1], dtype=torch.bool)
    place = torch.empty(len(draft.Z), dtype=torch.long)
    place[torch.cat(draft.groups)] = torch.arange(len(draft.Z))
    around, means = {}, draft.means
    if draft.parents is None:
        scales, streams, errors = code_groups(draft.Z, draft.groups, depths, draft.U, by_depth)
        scales = scales if draft.U is None else refit(draft, scales, errors)
    else:
        scales, streams, means, relations = code_rests(draft, depths, by_depth)
        parents = draft.parents[torch.cat(draft.groups)]
        parent = place[parents] * (parents >= 0)
        around = dict(parent=parent.to(place_type(len(place))), relation=torch.cat(relations))
    if draft.P is not None:
        P, P_scale = to_int8(draft.P[used])
        around |= dict(P=P, P_scale=P_scale, mean=draft.mean.half(), means=means[:, used].half())
    return CodedMatrix(
        place=place.to(place_type(len(place))),
        sizes=draft.sizes.int(),
        depths=depths[:, used].to(torch.uint8),
        scales=scales[:, used].half(),
        streams=streams,
        codes=by_depth,
        **around,
    )


def code_rests(draft, depths, codes):
    """
    Quantise the residuals of predicted rows, group by group -> (scales [G,k], {(g, half bits): stream}, means [G,k], a list of
    relation() of each group's rows). A row is predicted from its decoded parent, as in decoding.
    """
    read, streams, relations = torch.zeros_like(draft.Z), {}, []
    scales, means = torch.ones(depths.shape), draft.means.clone()
    left = {0: 1.0} | {b: code.error for b, code in codes.items()}
    for g, rows in enumerate(draft.groups):
        some = depths[g] > 0
        by = torch.tensor([left[b] for b in depths[g].tolist()]) ** -0.5  # a column counts by the error that its bits leave
        told, rest, factor = told_by_parents(draft.Z, read, draft.parents, rows, by)
        shift = rest.mean(0)
        rest -= shift
        means[g] += shift
        gain = gains_of(rest[:, some], spread(rest[:, some]))
        aim = rest / ROW_GAINS[gain, None]
        scales[g : g + 1], found, errors = code_groups(aim, [torch.arange(len(rows))], depths[g : g + 1], None, codes)
        streams |= {(g, b): stream for (_, b), stream in found.items()}
        read[rows] = told + ROW_GAINS[gain, None] * (aim - errors[0])
        relations.append(relation(factor, gain))
    return scales, streams, means, relations


def place_type(V):
    return torch.int16 if V <= 2**16 else torch.int32


def to_int8(P):
    """P [k,d] -> (int8 [k,d], a scale for each row [k]). The error is at most half a step."""
    scale = (P.abs().amax(1) / 127).half()
    return (P / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def feedback(M, columns=None):
    """
    M = U D U^T in blocks of columns -> (U [d,d], identity in the diagonal blocks, 0 below them; roots [d, columns], for each
    block b an upper triangular R_b with D_b = R_b R_b^T), float32.

    e M e^T is the sum over blocks of (e U)_b D_b (e U)_b^T. columns: of a block; default: COLUMNS.
    """
    columns = columns or COLUMNS
    U = torch.linalg.cholesky(M.flip(0, 1)).flip(0, 1)  # M = U U^T, upper triangular
    roots = torch.zeros(len(M), columns, dtype=M.dtype)
    out = torch.zeros_like(U)
    for start in range(0, len(M), columns):
        b = slice(start, start + columns)
        out[:, b] = torch.linalg.solve_triangular(U[b, b], U[:, b], upper=True, left=False)
        roots[b, : U[b, b].shape[1]] = U[b, b]
    return out.float(), roots.float()


def metric_of(U, roots):
    """The inverse of feedback(): M, float64."""
    L, columns = U.double(), roots.shape[1]
    for start in range(0, len(U), columns):
        b = slice(start, start + columns)
        L[:, b] = L[:, b] @ roots[b, : L[b, b].shape[1]].double()
    return L @ L.T


def code_groups(Z, groups, depths, U, codes):
    """
    Z [V,k], half bits [G,k], U of feedback() or None, {half bits: Code} -> (scales [G,k], {(g, half bits): stream}, errors: a
    list of [rows,k], one for each group).
    """
    parts, scales = [Z[rows] for rows in groups], torch.ones(depths.shape)
    errors, found = [torch.zeros_like(part) for part in parts], defaultdict(list)
    step = COLUMNS if U is not None else Z.shape[1]
    for start in range(0, Z.shape[1], step):
        block = slice(start, start + step)
        aims = [z[:, block] if U is None else z[:, block] + e[:, :start] @ U[:start, block] for z, e in zip(parts, errors)]
        read = [torch.zeros_like(aim) for aim in aims]
        for (b, _), some in alike(depths[:, block], groups).items():
            columns = [(depths[g, block] == b).nonzero()[:, 0] for g in some]
            x = [aims[g][:, c] for g, c in zip(some, columns)]
            scale = [scale_of(part, codes[b]) for part in x]
            windows = encode_columns([part / each for part, each in zip(x, scale)], codes[b])
            for g, c, each, w in zip(some, columns, scale, windows):
                read[g][:, c] = values(w, codes[b], len(parts[g])) * each
                scales[g, start + c] = each
                found[g, b].append(w)
        for z, e, q in zip(parts, errors, read):
            e[:, block] = z[:, block] - q
    streams = {(g, b): pack(torch.cat(w), codes[b].bits, codes[b].window) for (g, b), w in found.items()}
    return scales, streams, errors


def refit(draft, scales, errors):
    """
    scales [G,k] and errors, a list of [rows,k], from code_groups() with U -> the scales [G,k] that are best for the same codes.

    The decoded matrix R is linear in the scales, so this is least squares in the metric of the errors. A column's new scale is
    r times the old one. sum_i weights_i (Z - R r)_i C (Z - R r)_i^T is smallest if (C * R^T weights R) r = the diagonal of
    R^T weights Z C, with * by elements.
    """
    scales, C = scales.clone(), metric_of(draft.U, draft.roots)
    for scale, rows, e in zip(scales, draft.groups, errors):
        Z, weights = draft.Z[rows].double(), draft.weights[rows, None].double()
        R = Z - e
        M, aim = C * (R.T @ (weights * R)), (weights * R * (Z @ C)).sum(0)
        ridge = RIDGE * M.diagonal() + 1e-30  # columns without codes keep their scales
        scale *= torch.linalg.solve(M + ridge.diag(), aim + ridge).clamp(min=0.5, max=2)
    return scales.half().float()


def scale_of(x, code):
    """
    The scale [n] of columns [rows,n], rounded to float16: their standard deviation.

    A column has many bits because its errors are expensive. Then no number may lie outside the levels: one weight of 20
    standard deviations, on an input that is equally large, cost more than all other weights of its layer.
    """
    scale = x.square().mean(0).sqrt()
    if code.half_bits >= 2 * WHOLE_RANGE:
        scale = torch.maximum(scale, x.abs().amax(0) / code.levels.max())
    return scale.clamp(min=1e-7).half().float()


def alike(depths, groups):
    """{(half bits, segments()): groups} with columns of these bits and this length. They are encoded together."""
    found = defaultdict(list)
    for g, rows in enumerate(groups):
        for b in depths[g].unique().tolist():
            if b:
                found[b, segments(len(rows))].append(g)
    return found


def encode_columns(parts, code):
    """
    parts, a list of [rows,columns] with streams of one length -> the trellis states of each, [columns * segments, states of a
    segment]. The last segment of a column is padded with zeros.
    """
    count, length = segments(len(parts[0]))
    padded = [torch.nn.functional.pad(x, (0, 0, 0, count * length - len(x))).T.reshape(-1, length) for x in parts]
    return encode(torch.cat(padded), code).split([len(x) for x in padded])


def values(windows, code, rows):
    """The inverse of encode_columns() for one part: trellis states -> [rows,columns]."""
    count, length = segments(rows)
    return code.levels[windows].view(-1, count * length).T[:rows]
