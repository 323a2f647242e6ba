"""
A quantised matrix: in each group of rows, each column has as many bits as its importance asks for (budget.py).

    W ~ 1 mu^T + (1 m_g^T + Z) P        a token table: P is its `fisher` basis (decompose_table.py), columns are components
    W ~ Z                               a linear layer: no basis and no means, columns are the layer's inputs

The rows are divided into groups. In group g, column j has a depth (half bits per number), a scale, and a stream with the
quantised numbers of the group's rows (trellis.py). m_g is the mean of the group's coordinates. If rows are predicted from
parent rows (predicted_rows.py), the streams hold (Z_i - f_i Z_parent(i)) / scale_i; a parent is always in an earlier group.

**Bytes** are the bytes of tensors(): P as integers with a scale per row, means, scales, depths, the place of each row, the
streams. The levels are part of the program, the same for all matrices of all models, and are not counted. lookup() and
product() read the tensors in blocks, by compiled loops (kernels/kernels.c) or in torch. Only matrix() builds the entire matrix
in float.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from bits.packing import stream_bytes, unpack, unpack_all
from bits.predicted_rows import ROW_FACTORS, ROW_GAINS, factors_and_gains
from bits.trellis import MOST_BITS, WINDOW
from kernels.build import bind

SEGMENT = 1024  # numbers in a stream at most, even: a longer column has several streams, which are encoded in parallel
SEGMENTS_AT_ONCE = 4  # segments of a column that are decoded together when all rows are read
TOKENS_AT_ONCE = 32  # up to here the loop multiplies while it reads; for more tokens, blocks are decoded once for all
PLACES = (torch.int16, torch.int32)
BYTES = (torch.uint8,)
DTYPES = dict(place=PLACES, parent=PLACES, relation=BYTES, sizes=(torch.int32,), depths=BYTES, P=(torch.int8,))
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # dtypes of all other tensors
OPTIONAL = ("P", "P_scale", "mean", "means", "parent", "relation")  # a linear layer has none of these


@dataclass
class CodedMatrix:
    """A quantised matrix [V,d] with k stored columns and G row groups. k < d if some components have no bits in any group."""

    place: torch.Tensor  # int16 or int32 [V]: position of each row when the groups are stored one after the other
    sizes: torch.Tensor  # int32 [G]: number of rows of each group
    depths: torch.Tensor  # uint8 [G,k]: half bits per number
    scales: torch.Tensor  # float16 [G,k]
    streams: dict  # {(g, depth): uint8}: the columns of this depth, one after the other
    codes: dict  # {depth: Code}
    P: torch.Tensor | None = None  # int8 [k,d]
    P_scale: torch.Tensor | None = None  # float16 [k]
    mean: torch.Tensor | None = None  # float16 [d]: mu
    means: torch.Tensor | None = None  # float16 [G,k]: m_g
    parent: torch.Tensor | None = None  # int16 or int32 [V]: for each place, the place of the row's parent; 0 if it has none
    relation: torch.Tensor | None = None  # uint8 [V]: for each place, factor and row scale; factor 0: no prediction

    def tensors(self):
        """{name: tensor} of everything that is stored."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return own | {f"streams.{g}.{b}": value for (g, b), value in self.streams.items()}

    @staticmethod
    def from_tensors(tensors, codes):
        """Inverse of tensors(). codes: {depth: Code}. Raises KeyError if a tensor is missing, ValueError if one is wrong."""
        tensors = dict(tensors)
        streams = {tuple(map(int, k.split(".")[1:])): tensors.pop(k) for k in list(tensors) if k.startswith("streams.")}
        known = {"place", "sizes", "depths", "scales", *OPTIONAL}
        if unknown := tensors.keys() - known:
            raise ValueError(f"{min(unknown)} does not belong to a quantised matrix")
        if missing := known - {*OPTIONAL} - tensors.keys():
            raise KeyError(f"{min(missing)} is missing")
        coded = CodedMatrix(streams=streams, codes=codes, **tensors)
        coded.check()
        return coded

    def check(self):
        """Raise ValueError if the tensors do not fit together."""
        (G, k), d = self.depths.shape, self.shape[1]
        shapes = dict(sizes=(G,), scales=(G, k), means=(G, k), P=(k, d), P_scale=(k,), mean=(d,))
        shapes |= dict(parent=self.place.shape, relation=self.place.shape)
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)} instead of {shape}")
            if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{name} contains NaN or infinity")
        for name, tensor in self.tensors().items():
            known = DTYPES.get(name, BYTES if name.startswith("streams.") else FLOATS)
            if tensor.dtype not in known:
                raise ValueError(f"{name} has the wrong dtype {tensor.dtype}")
        if self.sizes.sum() != len(self.place) or (self.sizes < 1).any():
            raise ValueError("the sizes of the groups do not add up to the number of rows, or one is below 1")
        if not torch.equal(self.places(torch.arange(len(self.place))).sort().values, torch.arange(len(self.place))):
            raise ValueError("two rows have the same place")
        if (self.parent is None) != (self.relation is None):
            raise ValueError("only one of parent and relation is there: both are needed")
        if self.parent is not None:
            starts, parents = self.starts().repeat_interleave(self.sizes.long()), self.parents()
            if ((parents < 0) | (parents >= starts.clamp(min=1))).any():
                raise ValueError("a row's parent is not in an earlier group")
            if factors_and_gains(self.relation)[0][: self.sizes[0]].any():
                raise ValueError("a row of the first group has a parent")
        if unread := self.streams.keys() - {(g, b) for g in range(G) for b, _ in self.columns(g)}:
            raise ValueError(f"group {min(unread)[0]} has a stream of {min(unread)[1] / 2:g} bits that no column reads")
        for g, rows in enumerate(self.sizes.tolist()):
            for b, columns in self.columns(g):
                if b not in self.codes or (g, b) not in self.streams:
                    raise ValueError(f"group {g} has columns of {b / 2:g} bits, but no stream for them")
                if self.streams[g, b].shape != (stream_size(len(columns), rows, self.codes[b]),):
                    raise ValueError(f"group {g}: the stream of {b / 2:g} bits has {self.streams[g, b].numel()} bytes")

    @property
    def shape(self):
        return len(self.place), self.depths.shape[1] if self.P is None else self.P.shape[1]

    def bytes(self):
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_of_number(self):
        """Mean bits per number in each group, over all d columns."""
        return [round(b.sum().item() / 2 / self.shape[1], 2) for b in self.depths]

    # -- reading ------------------------------------------------------------------------------------------------------

    def columns(self, g):
        """A list of (depth, columns of group g with this depth), for every depth above 0."""
        return [(b, (self.depths[g] == b).nonzero()[:, 0]) for b in self.depths[g].unique().tolist() if b]

    def units(self, group, rows):
        """Levels of rows [m,k]; 0 in columns without bits. group, rows: long [m], each row's group and its index there."""
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
        """First place of each group [G]."""
        sizes = self.sizes.long()
        return sizes.cumsum(0) - sizes

    def lookup(self, ids):
        """ids, long of any shape [...] -> their rows of the matrix [..., d]."""
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
        """Places [m] -> (stored residuals of these rows [m,k], before the prediction is added; their groups [m])."""
        starts = self.starts()
        group = torch.searchsorted(starts, places, right=True) - 1
        Z = self.units(group, places - starts[group]) * self.scales[group].float()
        return Z if self.relation is None else Z * factors_and_gains(self.relation[places])[1][:, None], group

    def ancestors(self, places):
        """places [m] -> three tensors over the m rows and all their ancestors: index of the row, place, product of factors."""
        of, at, carried = row = torch.arange(len(places)), places, torch.ones(len(places))
        found = [row]
        while len(of):
            carried = carried * factors_and_gains(self.relation[at])[0]
            of, at, carried = row = [part[carried > 0] for part in (of, self.parents(at), carried)]
            found.append(row)
        return [torch.cat(part) for part in zip(*found)]

    def add_parents(self, Z):
        """Apply row scales and add the prediction from parents, in place. Z [n,V], by place: residuals, or linear in them."""
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
        """Yield (a slice of places, the stored residuals there, transposed [k,rows]), until all rows are read."""
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
        """Decode the levels of group g, segments `first` up to `last`, into Z [k,rows], in torch."""
        (count, length), streams = segments(self.sizes[g].item()), self.streams
        for b, columns in self.columns(g):
            code = self.codes[b]
            packed = streams[g, b][:-2].view(-1, count, bytes_of(length, code))[:, first:last]
            packed, n = torch.nn.functional.pad(packed.flatten(), (0, 2)), len(columns) * (last - first)
            windows = unpack_all(packed, n, length // code.numbers, code.bits, code.window)
            Z[columns] = code.levels.index_select(0, windows.flatten()).view(len(columns), -1)[:, : Z.shape[1]]

    def product(self, x):
        """x [..., d] -> the product x W^T [..., V]."""
        # P_scale comes last: scaling P itself takes a second float copy in fresh memory, which is twenty times as slow
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
        """A function of kernels.c with this matrix bound as its first arguments. None if it cannot read this matrix."""
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
        """Leave out the bound functions: the tensors of a copy have other addresses."""
        return {name: value for name, value in vars(self).items() if name != "kernels"}

    def matrix(self):
        """The entire matrix [V,d], float32."""
        Z = self.add_parents(torch.cat([Z for _, Z in self.blocks()], 1))
        if self.means is not None:
            Z += self.means.float().T.repeat_interleave(self.sizes.long(), 1)
        Z = Z.T[self.places(slice(None))]
        return Z if self.P is None else torch.addmm(self.mean.float(), Z, self.basis())


def whole_numbers(places):
    """Stored places -> long. int16 is read as unsigned."""
    return places.long() & (0xFFFF if places.dtype == torch.int16 else -1)


def segments(rows):
    """(streams of a column, numbers in each) in a group of `rows` rows. Even: some codebooks give two numbers at once."""
    count = -(-rows // SEGMENT)
    return count, 2 * -(-rows // (2 * count))


def bytes_of(length, code):
    """Bytes of a stream of `length` numbers."""
    return stream_bytes(length // code.numbers, code.bits, code.window)


def stream_size(columns, rows, code):
    """Bytes of `columns` columns of a Code, in a group of `rows` rows."""
    count, length = segments(rows)
    return columns * count * bytes_of(length, code) + 2
