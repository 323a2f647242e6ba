"""
A token table kept by bits: each component of each group of rows has the bits that it is worth.

    W ~ 1 mu^T + (1 m_g^T + Z) P

P is the `fisher` basis (decompose_table.py): in Z an error counts about the same in every component. Rows lie in groups by
weight, the first few, the last many. Group g has a mean m_g in the coordinates; a component j of it has b_gj bits (bits.py), a
scale, and a stream of codes over the group's rows (trellis.py).

**Error feedback.** Within a group the errors of two components are not quite independent: the tokens of a group meet hidden
states of their own. With the group's metric M = U D U^T, U unit upper triangular, an error e costs sum_j D_j (e_j + what the
errors before j give, through U)^2. So component j is rounded after the errors before it have been added to it, and its worth is
D_j times its variance (LDLQ, as in QuIP, arXiv:2307.13304). Errors are fed on in blocks of columns.

**Bytes** are those of the tensors(): P as integers with a scale a row, means, scales, bits, levels, the place of each token,
and the streams. lookup() and logits() read them in blocks; the table is never whole in float, unless one asks for matrix().
"""

from dataclasses import dataclass

import torch

from util_factorization.bits import spend
from util_factorization.packing import pack, stream_bytes, unpack
from util_factorization.trellis import Code, distortion, encode, gaussian_codes

GROUPS = 10
GROWTH = 2**0.9  # each group has so many times the rows of the one before it
SEGMENT = 1024  # numbers of a stream at most: a group's column has several, which are encoded at once
COLUMNS = 16  # whose errors are fed on together
ROWS = 4096  # read at once
COUNT_POWER = 0.65  # of the smoothed frequencies: see row_weights()


def row_weights(counts):
    """
    counts [V] of tokens in calibration text, in whatever unit -> what an error of each row weighs; they sum to 1.

    A power below 1 lifts the rare rows: text that was not read has other rare tokens, and at a rare token the loss is steeper.
    The power was chosen on text that nothing was calibrated on (results/bytes).
    """
    p = counts.double() / counts.sum()
    p = (p + 1 / (6 * len(p))) ** COUNT_POWER
    return p / p.sum()


def groups_by_weight(weights, groups=GROUPS, growth=GROWTH):
    """Row indices of each group, the heaviest rows first. Every group has a row at least."""
    order, V = weights.argsort(descending=True, stable=True), len(weights)
    groups = min(groups, V)
    sizes = torch.tensor([growth**g for g in range(groups)], dtype=torch.float64)
    ends = (sizes.cumsum(0) / sizes.sum() * V).round().long()
    ends = torch.maximum(ends, torch.arange(1, groups + 1)).tolist()
    return [order[start:end] for start, end in zip([0, *ends], ends)]


@dataclass
class CodedTable:
    """A packed table [V,d] of k components that got bits somewhere, in G groups. bits_of_number: mean of each group."""

    place: torch.Tensor  # int16 or int32 [V]: where a token's row lies, counted through the groups
    sizes: torch.Tensor  # int32 [G]: rows of each group
    P: torch.Tensor  # int8 [k,d]
    P_scale: torch.Tensor  # float16 [k]
    mean: torch.Tensor  # float16 [d]: mu
    means: torch.Tensor  # float16 [G,k]: m_g
    bits: torch.Tensor  # uint8 [G,k]
    scales: torch.Tensor  # float16 [G,k]
    levels: dict  # {b: float16 [2^L]}
    streams: dict  # {(g, b): uint8}: the columns of b bits, one after the other

    def tensors(self):
        """{name: tensor} of all that is kept."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        own |= {f"levels.{b}": value for b, value in self.levels.items()}
        return own | {f"streams.{g}.{b}": value for (g, b), value in self.streams.items()}

    @staticmethod
    def from_tensors(tensors):
        """What tensors() gave -> the CodedTable. Raises KeyError or ValueError where one is missing or does not fit."""
        tensors = dict(tensors)
        levels = {int(k.split(".")[1]): tensors.pop(k) for k in list(tensors) if k.startswith("levels.")}
        streams = {tuple(map(int, k.split(".")[1:])): tensors.pop(k) for k in list(tensors) if k.startswith("streams.")}
        try:
            table = CodedTable(levels=levels, streams=streams, **tensors)
        except TypeError as error:
            raise KeyError(str(error).split("__init__() ")[-1]) from None
        table.check()
        return table

    def check(self):
        """Raises ValueError where the tensors do not fit one another."""
        for g, rows in enumerate(self.sizes.tolist()):
            for b in self.bits[g].unique().tolist():
                if b and (b not in self.levels or (g, b) not in self.streams):
                    raise ValueError(f"group {g} has columns of {b} bits and no stream of them")
                if b and self.streams[g, b].numel() != self.stream_size(g, b, rows):
                    raise ValueError(f"the stream of group {g} at {b} bits has {self.streams[g, b].numel()} bytes")
        if self.sizes.sum() != len(self.place) or self.P.shape != (self.bits.shape[1], len(self.mean)):
            raise ValueError("the groups, the basis and the tokens have different sizes")

    def stream_size(self, g, b, rows):
        count, length = segments(rows)
        columns = (self.bits[g] == b).sum().item()
        return columns * count * stream_bytes(length, b, len(self.levels[b]).bit_length() - 1) + 2

    def bytes(self):
        return sum(t.untyped_storage().nbytes() for t in self.tensors().values())

    @property
    def bits_of_number(self):
        """Mean bits of a number in each group, over all d components."""
        return [round(b.sum().item() / len(self.mean), 2) for b in self.bits]

    # -- reading ------------------------------------------------------------------------------------------------------

    def coordinates(self, g, rows):
        """Rows of a group, long [m], counted from its first -> Z + m_g [m,k], float32."""
        out = torch.zeros(len(rows), self.bits.shape[1])
        count, length = segments(self.sizes[g].item())
        segment, at = rows // length, rows % length
        for b in self.bits[g].unique().tolist():
            if not b:
                continue
            columns, levels = (self.bits[g] == b).nonzero()[:, 0], self.levels[b].float()
            window = len(levels).bit_length() - 1
            stream = (torch.arange(len(columns)) * count + segment[:, None]) * stream_bytes(length, b, window)  # (m, columns)
            out[:, columns] = levels[unpack(self.streams[g, b], window, 8 * stream + at[:, None] * b)]
        return torch.addcmul(self.means[g].float(), out, self.scales[g].float())

    def basis(self):
        return self.P.float() * self.P_scale.float()[:, None]

    def places(self, ids):
        return self.place[ids].long() & (0xFFFF if self.place.dtype == torch.int16 else -1)

    def lookup(self, ids):
        """ids, long of any shape -> their rows [..., d]."""
        places, ends = self.places(ids.flatten()), self.sizes.long().cumsum(0)
        group, Z = torch.searchsorted(ends, places, right=True), torch.empty(ids.numel(), len(self.P))
        for g in group.unique().tolist():
            here = group == g
            Z[here] = self.coordinates(g, places[here] - ends[g] + self.sizes[g])
        return (Z @ self.basis() + self.mean.float()).unflatten(0, ids.shape)

    def blocks(self):
        """(slice of places, Z + m_g of these rows), block by block through all rows."""
        start = 0
        for g, size in enumerate(self.sizes.tolist()):
            for rows in torch.arange(size).split(ROWS):
                yield slice(start + rows[0], start + rows[-1] + 1), self.coordinates(g, rows)
            start += size

    def logits(self, h):
        """h [..., d] -> its product with every row, [..., V]."""
        narrow = h @ self.basis().T
        out = torch.empty(*h.shape[:-1], len(self.place))
        for rows, Z in self.blocks():
            out[..., rows] = narrow @ Z.T
        return out[..., self.places(torch.arange(len(self.place)))] + (h @ self.mean.float())[..., None]

    def matrix(self):
        """The whole table [V,d], float32."""
        Z = torch.cat([Z for _, Z in self.blocks()])[self.places(torch.arange(len(self.place)))]
        return torch.addmm(self.mean.float(), Z, self.basis())


def segments(rows):
    """(streams of a column, numbers of each) for a group of so many rows."""
    count = -(-rows // SEGMENT)
    return count, -(-rows // count)


# -- writing ----------------------------------------------------------------------------------------------------------


def code_table(decomposition, weights, groups, budget, metrics=None):
    """
    A decomposed table (method fisher) -> CodedTable of at most `budget` bytes.

    weights [V]   what an error of each row weighs
    groups        row indices of each group
    metrics       for each group C + G [d,d] of its own tokens, or None: then without error feedback
    Raises ValueError where the budget does not pay for the basis and one column.
    """
    Z, P, mean = decomposition.factors(decomposition.full)
    means = torch.stack([(weights[rows, None] * Z[rows]).sum(0) / weights[rows].sum() for rows in groups]).float()
    parts = [Z[rows] - m for rows, m in zip(groups, means)]
    masses = torch.stack([weights[rows].sum() for rows in groups])
    variances = torch.stack([weighted_square(z, weights[rows]) for z, rows in zip(parts, groups)])
    feedbacks = [feedback(in_coordinates(M, P)) for M in metrics] if metrics else [(None, torch.ones(len(P)))] * len(groups)
    worth = masses[:, None] * variances * torch.stack([D for _, D in feedbacks])
    sizes = torch.tensor([len(rows) for rows in groups])

    bits, codes = fit_bits(worth, sizes, budget, len(Z), len(mean))
    used = bits.any(0)
    coded = [code_group(z, b, U, codes) for z, b, (U, _) in zip(parts, bits, feedbacks)]
    P, P_scale = to_int8(P[used])
    place = torch.empty(len(Z), dtype=torch.long)
    place[torch.cat(groups)] = torch.arange(len(Z))
    return CodedTable(
        place=place.to(place_type(len(Z))),
        sizes=sizes.int(),
        P=P,
        P_scale=P_scale,
        mean=mean.half(),
        means=means[:, used].half(),
        bits=bits[:, used].to(torch.uint8),
        scales=torch.stack([scales for scales, _ in coded])[:, used].half(),
        levels={code.bits: code.levels.half() for code in codes if (bits == code.bits).any()},
        streams={(g, b): stream for g, (_, streams) in enumerate(coded) for b, stream in streams.items()},
    )


def place_type(V):
    return torch.int16 if V <= 2**16 else torch.int32


def to_int8(P):
    """[k,d] -> integers and a scale a row, which give it back to half a step."""
    scale = (P.abs().amax(1) / 127).half()
    return (P / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def weighted_square(z, weights):
    return (weights[:, None] * z.double().square()).sum(0) / weights.sum()


def fit_bits(worth, sizes, budget, V, d):
    """bits [G,d] whose table has at most `budget` bytes, and the Codes."""
    codes = gaussian_codes()
    bits_left = 8 * (budget - V * place_type(V).itemsize - 2 * d - 4 * len(sizes))
    spent = bits_left
    for _ in range(20):  # what the basis and the ends of streams take depends on the bits
        if spent < sizes.min():
            raise ValueError(f"{budget:,.0f} bytes do not pay for the basis and a column of each group: give more")
        bits = spend(worth, sizes, spent, distortion(codes))
        excess = size_of(bits, sizes, codes, d) - bits_left
        if excess <= 0:
            return bits, codes
        spent -= excess
    raise ValueError(f"{budget:,.0f} bytes do not pay for the basis and a column of each group: give more")


def size_of(bits, sizes, codes, d):
    """Bits that all but places, mean and sizes of groups take."""
    k, G, total = bits.any(0).sum().item(), len(sizes), 0
    for code in codes:
        columns = (bits == code.bits).sum(1)
        total += 16 * len(code.levels) * bool(columns.any())
        for size, n in zip(sizes.tolist(), columns.tolist()):
            count, length = segments(size)
            total += 8 * (n * count * stream_bytes(length, code.bits, code.window) + 2 * bool(n))
    return total + k * (8 * d + 16) + G * k * (16 + 8 + 16)


def in_coordinates(M, P):
    """A metric [d,d] in the coordinates of P, scaled to trace d, a tenth of it the identity, as a guard against noise."""
    M = P.double() @ M @ P.double().T
    return 0.9 * M * (len(M) / M.trace()) + 0.1 * torch.eye(len(M), dtype=M.dtype)


def feedback(M, columns=COLUMNS):
    """
    M = U D U^T in blocks of columns -> (U [d,d] float32, 1 on the diagonal of blocks, 0 below them; the diagonal of D [d]).

    e M e^T is the sum over blocks of (e U)_b D_b (e U)_b^T.
    """
    U = torch.linalg.cholesky(M.flip(0, 1)).flip(0, 1)  # M = U U^T, upper triangular
    D = torch.empty(len(M), dtype=M.dtype)
    out = torch.zeros_like(U)
    for start in range(0, len(M), columns):
        b = slice(start, start + columns)
        out[:, b] = torch.linalg.solve_triangular(U[b, b], U[:, b], upper=True, left=False)
        D[b] = U[b, b].square().sum(1)
    return out.float(), D


def code_group(z, bits, U, codes):
    """z [rows,d], bits [d], U of feedback() or None -> (scales [d], {b: packed stream})."""
    scales, errors = torch.ones(z.shape[1]), torch.zeros_like(z)
    found = {b: [] for b in bits.unique().tolist() if b}
    step = COLUMNS if U is not None else z.shape[1]
    for start in range(0, z.shape[1], step):
        block = slice(start, start + step)
        aim = z[:, block] if U is None else z[:, block] + errors[:, :start] @ U[:start, block]
        q = torch.zeros_like(aim)
        for b in bits[block].unique().tolist():
            if b:
                columns = (bits[block] == b).nonzero()[:, 0]
                x = aim[:, columns]
                scale = x.square().mean(0).sqrt().clamp(min=1e-7).half().float()
                windows = encode_columns(x / scale, codes[b - 1])
                q[:, columns] = values(windows, codes[b - 1], len(z)) * scale
                scales[start + columns] = scale
                found[b].append(windows)
        errors[:, block] = z[:, block] - q
    return scales, {b: pack(torch.cat(w), b, codes[b - 1].window) for b, w in found.items()}


def encode_columns(x, code):
    """x [rows,columns] -> windows [columns * segments, numbers of a segment]; the last segment is filled with zeros."""
    count, length = segments(len(x))
    x = torch.nn.functional.pad(x, (0, 0, 0, count * length - len(x)))
    return encode(x.T.reshape(-1, length), code)


def values(windows, code: Code, rows):
    """The inverse: windows -> [rows,columns]."""
    return code.levels[windows].view(-1, segments(rows)[0] * windows.shape[1]).T[:rows]
