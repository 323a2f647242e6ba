"""
A matrix kept by bits: each column of each group of rows has the bits that it is worth.

    W ~ 1 mu^T + (1 m_g^T + Z) P        a token table: P is its `fisher` basis (decompose_table.py), columns are components
    W ~ Z                               a linear layer: no basis and no means, columns are the layer's inputs

Rows lie in groups. A column j of group g has a depth (half bits of a number), a scale, and a stream of codes over the group's
rows (trellis.py). The means m_g are those of the group's coordinates. Where rows have parents (parents.py), the streams hold
(Z_i - f_i Z_parent(i)) / gain_i, and the parent's row lies in a group before.

**Bytes** are those of the tensors(): P as integers with a scale a row, means, scales, depths, the place of each row, the
streams. The levels of the codes are the program's, the same for all matrices of all models, and are not counted. lookup() and
product() read the tensors in blocks, by compiled loops (kernels/kernels.c) or in torch. The matrix is never whole in float,
unless one asks for matrix().
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from bits.packing import stream_bytes, unpack, unpack_all
from bits.predicted_rows import ROW_FACTORS, ROW_GAINS, factors_and_gains
from bits.trellis import MOST_BITS, WINDOW
from kernels.build import bind

SEGMENT = 1024  # numbers of a stream at most, an even number: a group's column has several, which are encoded at once
SEGMENTS_AT_ONCE = 4  # of a column, when all rows are read
TOKENS_AT_ONCE = 32  # at most, that are multiplied as the codes are read; for more, blocks are decoded and shared by all
PLACES = (torch.int16, torch.int32)
BYTES = (torch.uint8,)
DTYPES = dict(place=PLACES, parent=PLACES, relation=BYTES, sizes=(torch.int32,), depths=BYTES, P=(torch.int8,))
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # of all others
OPTIONAL = ("P", "P_scale", "mean", "means", "parent", "relation")  # a linear layer has none of them


@dataclass
class CodedMatrix:
    """A packed matrix [V,d] of k columns in G groups of rows; k is less than d where components have no bits in any group."""

    place: torch.Tensor  # int16 or int32 [V]: where a row lies, counted through the groups
    sizes: torch.Tensor  # int32 [G]: rows of each group
    depths: torch.Tensor  # uint8 [G,k]: half bits of a number
    scales: torch.Tensor  # float16 [G,k]
    streams: dict  # {(g, depth): uint8}: the columns of a depth, one after the other
    codes: dict  # {depth: Code}
    P: torch.Tensor | None = None  # int8 [k,d]
    P_scale: torch.Tensor | None = None  # float16 [k]
    mean: torch.Tensor | None = None  # float16 [d]: mu
    means: torch.Tensor | None = None  # float16 [G,k]: m_g
    parent: torch.Tensor | None = None  # int16 or int32 [V]: by place, the place of the row's parent, 0 without one
    relation: torch.Tensor | None = None  # uint8 [V]: by place, factor and gain; with the factor 0 the parent tells nothing

    def tensors(self):
        """{name: tensor} of all that is kept."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return own | {f"streams.{g}.{b}": value for (g, b), value in self.streams.items()}

    @staticmethod
    def from_tensors(tensors, codes):
        """What tensors() gave, and {depth: Code} -> the CodedMatrix. Raises KeyError or ValueError where a tensor is wrong."""
        tensors = dict(tensors)
        streams = {tuple(map(int, k.split(".")[1:])): tensors.pop(k) for k in list(tensors) if k.startswith("streams.")}
        known = {"place", "sizes", "depths", "scales", *OPTIONAL}
        if unknown := tensors.keys() - known:
            raise ValueError(f"{min(unknown)} is no part of a coded matrix")
        if missing := known - {*OPTIONAL} - tensors.keys():
            raise KeyError(f"{min(missing)} is missing")
        coded = CodedMatrix(streams=streams, codes=codes, **tensors)
        coded.check()
        return coded

    def check(self):
        """Raises ValueError where the tensors do not fit one another."""
        (G, k), d = self.depths.shape, self.shape[1]
        shapes = dict(sizes=(G,), scales=(G, k), means=(G, k), P=(k, d), P_scale=(k,), mean=(d,))
        shapes |= dict(parent=self.place.shape, relation=self.place.shape)
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, it should have {shape}")
            if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{name} has a number that is not finite")
        for name, tensor in self.tensors().items():
            known = DTYPES.get(name, BYTES if name.startswith("streams.") else FLOATS)
            if tensor.dtype not in known:
                raise ValueError(f"{name} has numbers of another kind, {tensor.dtype}")
        if self.sizes.sum() != len(self.place) or (self.sizes < 1).any():
            raise ValueError("the groups do not have all rows")
        if not torch.equal(self.places(torch.arange(len(self.place))).sort().values, torch.arange(len(self.place))):
            raise ValueError("two rows lie at one place")
        if (self.parent is None) != (self.relation is None):
            raise ValueError("of parent and relation one is missing")
        if self.parent is not None:
            starts, parents = self.starts().repeat_interleave(self.sizes.long()), self.parents()
            if ((parents < 0) | (parents >= starts.clamp(min=1))).any():
                raise ValueError("a row's parent does not lie in a group before its own")
            if factors_and_gains(self.relation)[0][: self.sizes[0]].any():
                raise ValueError("a row of the first group has a parent")
        if unread := self.streams.keys() - {(g, b) for g in range(G) for b, _ in self.columns(g)}:
            raise ValueError(f"no column reads the stream of group {min(unread)[0]} at {min(unread)[1] / 2:g} bits")
        for g, rows in enumerate(self.sizes.tolist()):
            for b, columns in self.columns(g):
                if b not in self.codes or (g, b) not in self.streams:
                    raise ValueError(f"group {g} has columns of {b / 2:g} bits and no stream of them")
                if self.streams[g, b].shape != (stream_size(len(columns), rows, self.codes[b]),):
                    raise ValueError(f"the stream of group {g} at {b / 2:g} bits has {self.streams[g, b].numel()} bytes")

    @property
    def shape(self):
        return len(self.place), self.depths.shape[1] if self.P is None else self.P.shape[1]

    def bytes(self):
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_of_number(self):
        """Mean bits of a number in each group, over all d columns."""
        return [round(b.sum().item() / 2 / self.shape[1], 2) for b in self.depths]

    # -- reading ------------------------------------------------------------------------------------------------------

    def columns(self, g):
        """(depth, the columns that have it in a group), for every depth above 0."""
        return [(b, (self.depths[g] == b).nonzero()[:, 0]) for b in self.depths[g].unique().tolist() if b]

    def units(self, group, rows):
        """Group of each row, and its number there, long [m] -> the values of their codes [m,k]; 0 where there are no bits."""
        out, kernel = torch.zeros(len(rows), self.depths.shape[1]), self.kernel("coded_rows")
        if kernel:
            kernel(len(rows), torch.stack([group, rows], 1), out, torch.get_num_threads() if len(rows) > 1 else 1)
            return out
        for g in group.unique().tolist():
            here, (count, length) = (group == g).nonzero(), segments(self.sizes[g].item())
            segment, at = rows[here] // length, rows[here] % length
            for b, columns in self.columns(g):
                code = self.codes[b]
                stream = torch.arange(len(columns)) * count + segment  # (rows, columns)
                starts = 8 * stream * bytes_of(length, code) + at // code.numbers * code.bits
                out[here, columns] = code.levels[unpack(self.streams[g, b], code.window, starts).long(), at % code.numbers]
        return out

    def basis(self):
        """P [k,d], float32."""
        return self.P.float() * self.P_scale.float()[:, None]

    def places(self, ids):
        return whole_numbers(self.place[ids])

    def parents(self, places=slice(None)):
        return whole_numbers(self.parent[places])

    def starts(self):
        """The first place of each group [G]."""
        sizes = self.sizes.long()
        return sizes.cumsum(0) - sizes

    def lookup(self, ids):
        """ids, long of any shape -> their rows [..., d]."""
        places = self.places(ids.flatten())
        if self.parent is None:
            Z, group = self.rests(places)
        else:
            places, back = places.unique(return_inverse=True)
            of, every, carried = self.ancestors(places)
            Z, group = self.rests(every)
            Z = torch.zeros(len(places), Z.shape[1]).index_add_(0, of, Z * carried[:, None])[back]
            group = group[: len(places)][back]
        Z = Z if self.means is None else Z + self.means[group].float()
        Z = Z if self.P is None else torch.addmm(self.mean.float(), Z * self.P_scale.float(), self.P.float())
        return Z.unflatten(0, ids.shape)

    def rests(self, places):
        """Places [m] -> (what the streams hold of these rows [m,k], their groups [m])."""
        starts = self.starts()
        group = torch.searchsorted(starts, places, right=True) - 1
        Z = self.units(group, places - starts[group]) * self.scales[group].float()
        return Z if self.relation is None else Z * factors_and_gains(self.relation[places])[1][:, None], group

    def ancestors(self, places):
        """places [m] -> of all rows that they are told from, they themselves first: (which of the m, the place, its factor)."""
        of, at, carried = row = torch.arange(len(places)), places, torch.ones(len(places))
        found = [row]
        while len(of):
            carried = carried * factors_and_gains(self.relation[at])[0]
            of, at, carried = row = [part[carried > 0] for part in (of, self.parents(at), carried)]
            found.append(row)
        return [torch.cat(part) for part in zip(*found)]

    def add_parents(self, Z):
        """Z [n,V], as rows lie, of the streams alone, or linear in it: gains and what parents tell, in place."""
        if self.parent is None:
            return Z
        if not Z.requires_grad and (loop := bind("coded_parents")):
            shape = len(self.place), self.parent.dtype == torch.int32
            loop(*shape, self.parent, self.relation, ROW_FACTORS, ROW_GAINS, len(Z), Z, torch.get_num_threads())
            return Z
        (factor, gain), parent = factors_and_gains(self.relation), self.parents()
        Z *= gain
        for start, size in zip(self.starts().tolist(), self.sizes.tolist()):
            rows = slice(start, start + size)
            Z[:, rows] += Z.index_select(1, parent[rows]) * factor[rows]
        return Z

    def blocks(self):
        """(places of some rows, a slice; what the streams hold, transposed [k,rows]), through all rows."""
        start, kernel = 0, self.kernel("coded_columns")
        for g, size in enumerate(self.sizes.tolist()):
            count, length = segments(size)
            for first in range(0, count, SEGMENTS_AT_ONCE):
                last = min(count, first + SEGMENTS_AT_ONCE)
                Z = torch.zeros(self.depths.shape[1], min(size, last * length) - first * length)
                if kernel:
                    kernel(g, first, last, Z, torch.get_num_threads())
                else:
                    self.read_columns(g, first, last, Z)
                Z *= self.scales[g].float()[:, None]
                rows = slice(start, start + Z.shape[1])
                yield rows, Z
                start = rows.stop

    def read_columns(self, g, first, last, Z):
        """Write the values of a group's codes in segments first to last into Z [k,rows], in torch."""
        (count, length), streams = segments(self.sizes[g].item()), self.streams
        for b, columns in self.columns(g):
            code = self.codes[b]
            packed = streams[g, b][:-2].view(-1, count, bytes_of(length, code))[:, first:last]
            packed, n = torch.nn.functional.pad(packed.flatten(), (0, 2)), len(columns) * (last - first)
            windows = unpack_all(packed, n, length // code.numbers, code.bits, code.window)
            Z[columns] = code.levels.index_select(0, windows.flatten()).view(len(columns), -1)[:, : Z.shape[1]]

    def product(self, x):
        """x [..., d] -> its product with every row, [..., V]."""
        # the scales come last: one copy of P in float is twenty times as fast as two, whose memory is fresh each time
        narrow = x if self.P is None else (x @ self.P.float().T) * self.P_scale.float()
        narrow = narrow.reshape(-1, self.depths.shape[1])
        by_kernel = len(narrow) <= TOKENS_AT_ONCE and not narrow.requires_grad
        if by_kernel and (kernel := self.kernel("coded_product")):
            out = torch.zeros(len(narrow), len(self.place))
            scaled = narrow.contiguous()[:, None] * self.scales.float()  # (tokens, G, k)
            kernel(len(narrow), scaled, out, torch.get_num_threads())
        else:
            out = torch.empty(len(narrow), len(self.place))
            for rows, Z in self.blocks():
                out[:, rows] = narrow @ Z
        self.add_parents(out)
        if self.means is not None:
            out += (narrow @ self.means.float().T).repeat_interleave(self.sizes, 1, output_size=len(self.place))
        out = out.index_select(1, self.places(slice(None))).view(*x.shape[:-1], -1)
        return out if self.mean is None else out + (x @ self.mean.float())[..., None]

    def kernel(self, name):
        """A function of kernels.c for this matrix, its first arguments given; None where it cannot read it."""
        return self.kernels.get(name)

    @cached_property
    def kernels(self):
        (G, k), depths = self.depths.shape, range(2 * MOST_BITS + 1)
        codes = {b: self.codes[b] for b in self.depths.unique().tolist() if b}
        if any(code.window != WINDOW for code in codes.values()):
            return {}
        layout = torch.tensor([[rows, *segments(rows)] for rows in self.sizes.tolist()], dtype=torch.int32)
        order = self.depths.argsort(stable=True, dim=1).int()
        streams = [self.streams.get((g, b)) for g in range(G) for b in depths]
        sizes = torch.tensor([0 if stream is None else len(stream) for stream in streams])
        levels = [codes[b].levels.contiguous() if b in codes else None for b in depths]
        first = G, k, layout, self.depths.contiguous(), order, streams, sizes, levels
        return {name: bind(name, *first) for name in ("coded_product", "coded_columns", "coded_rows")}

    def __getstate__(self):
        """A copy's tensors have addresses of their own."""
        return {name: value for name, value in vars(self).items() if name != "kernels"}

    def matrix(self):
        """The whole matrix [V,d], float32."""
        Z = self.add_parents(torch.cat([Z for _, Z in self.blocks()], 1))
        if self.means is not None:
            Z += self.means.float().T.repeat_interleave(self.sizes.long(), 1)
        Z = Z.T[self.places(slice(None))]
        return Z if self.P is None else torch.addmm(self.mean.float(), Z, self.basis())


def whole_numbers(places):
    """Places as they are stored -> long."""
    return places.long() & (0xFFFF if places.dtype == torch.int16 else -1)


def segments(rows):
    """(Streams of a column, numbers of each) for a group of so many rows. An even number: some codes give two at once."""
    count = -(-rows // SEGMENT)
    return count, 2 * -(-rows // (2 * count))


def bytes_of(length, code):
    """Bytes of a stream of so many numbers."""
    return stream_bytes(length // code.numbers, code.bits, code.window)


def stream_size(columns, rows, code):
    """Bytes that the columns of a Code take in a group of so many rows."""
    count, length = segments(rows)
    return columns * count * bytes_of(length, code) + 2
