"""
LlamaForCausalLM with less in it: matrices, and keys and values where config.json says so, are kept by bits.

Parts of nanoPCA, MIT licence:
- common/kernels.py
- common/modules.py
- export/modeling.py
- model.py
- surgery/coded_attention.py
- surgery/coded_modules.py
- surgery/latent_cache.py
- surgery/layers.py
- surgery/low_rank_modules.py
- util_factorization/coded_matrix.py
- util_factorization/packing.py
- util_factorization/parents.py
- util_factorization/trellis.py
- value_cache/coded_cache.py
- value_cache/coded_reader.py
- value_cache/streams.py
"""

import math
import sys
import torch
import torch.nn as nn
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from functools import lru_cache
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer


def fail(message):
    raise ValueError(message)


def is_fresh(t):
    if t.is_floating_point():
        return bool(t.isnan().any())
    return t.dtype in (torch.int16, torch.int32, torch.int64) and t.numel() > 0 and bool((t == torch.iinfo(t.dtype).max).all())


def check_filled(model, source):
    """
    End in one line if a parameter or a buffer of a model has no memory, or still holds what fresh_memory_is_nan() put there.

    All numbers must come from the file that the model was read from, or be computed from its config. In bytes and booleans no
    value is free to mean "not filled", so they are not checked. source: for the message.
    """
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_meta or is_fresh(t):
            fail(f"{source}: {name} comes neither from the file nor from the config: write the file again")


def check_complete(model, info, source):
    """
    check_filled() for what from_pretrained(output_loading_info=True) returned. transformers draws missing weights at random.

    Of a model that accelerate has spread over devices, some weights may wait on the disk.
    """
    if missing := sorted(info["missing_keys"]):
        fail(f"{source} lacks {len(missing)} weights, first {missing[0]}: give a complete model")
    if not hasattr(model, "hf_device_map"):
        check_filled(model, source)


@contextmanager
def fresh_memory_is_nan():
    """
    A context in which memory that nothing has written to yet, as torch.empty() gives it, holds NaN.

    Whole numbers get the largest of their kind. So check_filled() finds what a reader forgot.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # torch.utils.deterministic.fill_uninitialized_memory, true by default
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


class CompactModel:
    """Before a standard class of Hugging Face. from_pretrained() refuses files that do not fill all of the model."""

    _supports_flash_attn = _supports_flex_attn = _can_compile_fullgraph = False

    @classmethod
    def from_pretrained(cls, *given, output_loading_info=False, **options):
        with fresh_memory_is_nan():
            model, info = super().from_pretrained(*given, output_loading_info=True, **options)
        check_complete(model, info, given[0])
        return (model, info) if output_loading_info else model


def put_dense(hf, name, made, tied):
    ends = dict(wte=[hf.get_input_embeddings()] + [hf.get_output_embeddings()] * tied, head=[hf.get_output_embeddings()])
    weight = nn.Parameter(made.matrix(), requires_grad=False)
    for module in ends.get(name) or [hf.get_submodule(name)]:
        module.weight = weight


def whole_numbers(places):
    """Places as they are stored -> long."""
    return places.long() & (0xFFFF if places.dtype == torch.int16 else -1)


OPTIONAL = ("P", "P_scale", "mean", "means", "parent", "relation")  # a linear layer has none of them


ROW_FACTORS = torch.arange(16) / 8


ROW_GAINS = 2 ** ((torch.arange(16) - 8) / 4)


def relation(factor, gain):
    """Numbers of ROW_FACTORS and of ROW_GAINS -> a byte for each row."""
    return (factor * 16 + gain).to(torch.uint8)


def factors_and_gains(relation):
    """The inverse, as values."""
    return ROW_FACTORS[relation.long() // 16], ROW_GAINS[relation.long() % 16]


SEGMENT = 1024  # numbers of a stream at most, an even number: a group's column has several, which are encoded at once


def segments(rows):
    """(Streams of a column, numbers of each) for a group of so many rows. An even number: some codes give two at once."""
    count = -(-rows // SEGMENT)
    return count, 2 * -(-rows // (2 * count))


SEGMENTS_AT_ONCE = 4  # of a column, when all rows are read


def unpack_all(packed, streams, n, bits, window):
    """The windows of whole streams, int32 [streams, n]: as unpack(), by shifts of whole rows of bytes."""
    rows = packed[:-2].view(streams, -1)
    rows = torch.nn.functional.pad(rows, (0, 2)).int()
    three = rows[:, :-2] << 16 | rows[:, 1:-1] << 8 | rows[:, 2:]
    period = 8 // math.gcd(bits, 8)  # numbers after which a window begins at the first bit of a byte again
    step = period * bits // 8
    found = torch.empty(streams, -(-n // period), period, dtype=torch.int32)
    for r in range(period):
        part = three[:, r * bits >> 3 :: step][:, : found.shape[1]]
        found[:, : part.shape[1], r] = part >> (24 - window - (r * bits & 7)) & (2**window - 1)
    return found.flatten(1)[:, :n]


TOKENS_AT_ONCE = 32  # at most, that are multiplied as the codes are read; for more, blocks are decoded and shared by all


def bind(name, *first):
    return None  # torch alone, without a C compiler


PLACES = (torch.int16, torch.int32)


BYTES = (torch.uint8,)


DTYPES = dict(place=PLACES, parent=PLACES, relation=BYTES, sizes=(torch.int32,), depths=BYTES, P=(torch.int8,))


FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # of all others


WINDOW = 12  # bits, of what is written once; each bit more takes twice as long to encode (common/trellis.c knows both)


def stream_bytes(n, bits, window):
    """Bytes of a stream of n numbers: the first window, then `bits` new bits for each number."""
    return -(-(window + (n - 1) * bits) // 8)


def bytes_of(length, code):
    """Bytes of a stream of so many numbers."""
    return stream_bytes(length // code.numbers, code.bits, code.window)


MOST_BITS = 8  # of a number


def stream_size(columns, rows, code):
    """Bytes that the columns of a Code take in a group of so many rows."""
    count, length = segments(rows)
    return columns * count * bytes_of(length, code) + 2


def unpack(packed, window, starts):
    """packed uint8 [bytes]; starts, long of any shape: the first bit of each number's window -> the windows, of that shape."""
    at = starts >> 3
    three = packed[at].int() << 16 | packed[at + 1].int() << 8 | packed[at + 2].int()
    return three >> (24 - window - (starts & 7)) & (2**window - 1)


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


class Coded(nn.Module):
    """
    The tensors of a CodedMatrix as buffers. On the CPU only.

    Those in float16 are kept as the integers of the same bits: a change of the model's dtype leaves them as they are.
    """

    def __init__(self, coded):
        super().__init__()
        self.codes = [coded.codes]  # in a list, so that a module of codes has one name
        for name, tensor in coded.tensors().items():
            bits = tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor
            self.register_buffer(name.replace(".", "_"), bits)
        self.halves = [name for name, tensor in coded.tensors().items() if tensor.dtype == torch.float16]
        self.register_buffer("like", torch.empty(0), persistent=False)  # has the model's dtype
        self.made = [], None  # the buffers that were read, and their CodedMatrix

    @property
    def coded(self):
        """The CodedMatrix of the buffers as they are now, made again only for other buffers: it keeps what it has bound."""
        read, made = self.made
        buffers = list(self._buffers.values())
        if len(read) != len(buffers) or any(before is not now for before, now in zip(read, buffers)):
            made = self.matrix_of_buffers()
            self.made = buffers, made
        return made

    def _load_from_state_dict(self, *given):
        self.made = [], None  # other codes may come into the same buffers
        super()._load_from_state_dict(*given)

    def matrix_of_buffers(self):
        streams, tensors = {}, {}
        for name, tensor in self._buffers.items():
            if name.startswith("streams_"):
                streams[tuple(map(int, name.split("_")[1:]))] = tensor
            elif name != "like":
                tensors[name] = tensor.view(torch.float16) if name in self.halves else tensor
        return CodedMatrix(streams=streams, codes=self.codes[0], **tensors)


class CodedEmbedding(Coded):
    """The lookup. scale: Gemma's, of a looked-up row."""

    def __init__(self, coded, scale=1.0):
        super().__init__(coded)
        self.scale = scale

    def forward(self, ids):
        return (self.coded.lookup(ids) * self.scale).to(self.like.dtype)


class TiedCodedHead(nn.Module):
    """The head of a model whose table is a CodedEmbedding."""

    def __init__(self, table):
        super().__init__()
        self.table = [table]  # in a list, so that its buffers have one name

    def forward(self, h):
        return self.table[0].coded.product(h.float()).to(h.dtype)


class CodedLinear(Coded):
    """A linear layer, or a head of its own."""

    def __init__(self, coded, bias=None):
        super().__init__(coded)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x):
        y = self.coded.product(x.float()).to(x.dtype)
        return y if self.bias is None else y + self.bias


def install_coded(hf, coded, packed=True):
    """
    Give a model the matrices of {name: CodedMatrix}: "wte" is the table, "head" a head of its own, others name a Linear.

    packed: the modules read the packed form. Else the weights are decoded once, to float: as fast as before, and as large.
    """
    tied = "head" not in coded
    for name, made in coded.items():
        if not packed:
            put_dense(hf, name, made, tied)
        elif name == "wte":
            scale = getattr(hf.get_input_embeddings(), "embed_scale", 1.0)
            hf.set_input_embeddings(CodedEmbedding(made, float(scale)))
            if tied:
                hf.set_output_embeddings(TiedCodedHead(hf.get_input_embeddings()))
        elif name == "head":
            hf.set_output_embeddings(CodedLinear(made))
        else:
            parent, _, last = name.rpartition(".")
            setattr(hf.get_submodule(parent), last, CodedLinear(made, hf.get_submodule(name).bias))


def error(x, levels, out=None):
    """Squared error of v numbers x [v, streams] at levels [v, ..., 1] -> [..., streams]; out: where it is written to."""
    out = torch.sub(x[0], levels[0], out=out).square_()
    for number, level in zip(x[1:], levels[1:]):
        out += (number - level).square_()
    return out


@dataclass
class Code:
    """bits: b of v numbers; levels [2^L,v]: of each window; error: mean squared, on Gaussian numbers of variance 1."""

    bits: int
    levels: torch.Tensor
    error: float

    @property
    def window(self):
        return len(self.levels).bit_length() - 1

    @property
    def numbers(self):
        return self.levels.shape[1]

    @property
    def half_bits(self):
        """Half bits of one number."""
        return 2 * self.bits // self.numbers


PAIRS = (1, 3, 5, 7)  # bits for two numbers, of the codes between


def shapes(window):
    """(bits, numbers) of the codes of a window, by rising bits of a number. Fast encoders have no pairs."""
    pairs = PAIRS if window == WINDOW else ()
    found = [(bits, 1) for bits in range(1, MOST_BITS + 1)] + [(bits, 2) for bits in pairs]
    return sorted(found, key=lambda shape: shape[0] / shape[1])


@lru_cache
def float16_code():
    """Numbers of 16 bits as their own levels: with 0 or 16 bits a number, a budget buys a rank for each group of rows."""
    levels = torch.arange(2**16).int().to(torch.int16).view(torch.float16).float()
    levels = levels[levels.isfinite()].sort().values
    return Code(16, torch.nn.functional.pad(levels, (0, 2**16 - len(levels)), value=levels[-1].item())[:, None], 2.0**-24)


class Levels(nn.Module):
    """The levels of all depths' codes, in the bits of float16: {half bits: Code}."""

    def __init__(self):
        super().__init__()
        self.numbers, self.codes = [numbers for _, numbers in shapes(WINDOW)], {}
        self.register_buffer("bits", torch.zeros(2**WINDOW, sum(self.numbers), dtype=torch.int16))

    def __getitem__(self, half_bits):
        if not self.codes:
            parts = self.bits.view(torch.float16).float().split(self.numbers, 1)
            codes = [Code(bits, levels, 0.0) for (bits, _), levels in zip(shapes(WINDOW), parts)]
            self.codes = {code.half_bits: code for code in [*codes, float16_code()]}
        return self.codes[half_bits]


def linear(weight, bias=None):
    """A Linear with copies of weight [out,in] and bias [out] or None."""
    n_out, n_in = weight.shape
    made = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    made.weight.data.copy_(weight)
    if bias is not None:
        made.bias.data.copy_(bias)
    return made


class Layer:
    """
    q, k and v of one attention layer.

    linears  {parameter name: module}: their outputs side by side hold all targets
    rows     {"q": [out] indices, ...}: where each target lies in these outputs
    """

    def __init__(self, name, linears, rows):
        self.name, self.linears, self.rows = name, linears, rows

    def __repr__(self):
        return self.name

    @property
    def width(self):
        """How many numbers the layer reads of a token."""
        return next(iter(self.linears.values())).weight.shape[1]

    @property
    def joined(self):
        """The weights of all linears, one over the other: [out of all, in]."""
        return torch.cat([linear.weight.data for linear in self.linears.values()])

    def weight(self, target):
        """[out,in], a copy."""
        return self.here(self.joined[self.rows[target]])

    def set_weight(self, target, W):
        self._set("weight", target, W)

    def set(self, target, W, bias):
        """Weight [out,in] and bias [out], or None where the layer has none."""
        self._set("weight", target, W)
        if bias is not None:
            self._set("bias", target, bias)

    def _set(self, kind, target, values):
        tensors = [getattr(linear, kind).data for linear in self.linears.values()]
        joined = torch.cat(tensors)
        joined[self.rows[target]] = values.to(joined)
        for tensor, part in zip(tensors, joined.split([len(x) for x in tensors])):
            if not torch.equal(tensor, part):
                tensor.copy_(part)

    @property
    def fused(self):
        return len(self.linears) == 1

    def bias(self, target):
        """[out], a copy, or None."""
        biases = [linear.bias for linear in self.linears.values()]
        return None if biases[0] is None else self.here(torch.cat([b.data for b in biases])[self.rows[target]])

    @staticmethod
    def here(t):
        """On the CPU, unless it is of a model without memory for its weights."""
        return t if t.is_meta else t.cpu()

    def linear(self, target):
        """A target as a Linear of its own, a copy."""
        with torch.no_grad():
            return linear(self.weight(target), self.bias(target)).requires_grad_(False)

    def parameters_of(self, target):
        """Names of the parameters that hold a target."""
        ends = torch.tensor([len(x.weight) for x in self.linears.values()]).cumsum(0)
        touched = torch.unique(torch.searchsorted(ends, self.rows[target], right=True))
        return {f"{list(self.linears)[i]}.weight" for i in touched.tolist()}


def plain(name, linear):
    """A Linear of float weights, or an error that names the other kind of module."""
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        fail(f"{name} is a {type(linear).__name__} that cannot be changed in place: give a model of plain float weights")
    return linear


FUSED = ("query_key_value", "c_attn", "qkv_proj", "Wqkv", "qkv", "in_proj")  # names of q, k and v in one matrix


class Turned:
    """A Conv1D of a GPT-2, whose weight is [in,out], as a Linear has it."""

    def __init__(self, conv1d):
        self.weight, self.bias = conv1d.weight.T, conv1d.bias


def find_layers(model, conv1d=False):
    """
    Every attention layer of a model. Its q, k and v are q_proj, k_proj and v_proj, or lie in the fused matrix of a GPT-NeoX;
    conv1d: or of a GPT-2.

    Our GPT with compressed keys or values: the projections, before the compression. To add a family of models, add its names
    here; Subject in subject.py has to know its table and its head.
    """
    layers = []
    for name, module in model.named_modules():
        linears = {f"{name}.{n}": getattr(module, n.rsplit(".")[-1], None) for n in ("q_proj", "k_proj", "v_proj")}
        if all(linear is not None for linear in linears.values()):
            sizes = [len(plain(part, linear).weight) for part, linear in linears.items()]
            rows = dict(zip("qkv", torch.arange(sum(sizes)).split(sizes)))
        elif hasattr(module, "query_key_value") and model.config.model_type.endswith("gpt_neox"):
            qkv = plain(f"{name}.query_key_value", module.query_key_value)
            linears = {f"{name}.query_key_value": qkv}
            # [H 3 n, in]: every head's q, k and v lie side by side
            by_head = torch.arange(len(qkv.weight)).unflatten(0, (model.config.num_attention_heads, 3, -1))
            rows = {target: by_head[:, i].flatten() for i, target in enumerate("qkv")}
        elif conv1d and hasattr(module, "c_attn"):
            linears = {f"{name}.c_attn": Turned(module.c_attn)}
            rows = dict(zip("qkv", torch.arange(module.c_attn.weight.shape[1]).chunk(3)))
        else:
            continue
        layers.append(Layer(name, linears, rows))
    if not layers:
        kind = model.config.model_type
        fused = next((n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in FUSED), None)
        why = f"q, k and v fused in {fused}" if fused else "no q_proj, k_proj and v_proj"
        fail(f"a {kind} has {why}: give a model with separate q, k and v (Llama, Mistral, Qwen, SmolLM2) or a GPT-NeoX")
    return layers


def head_size(attn):
    """Numbers of a head of an attention layer of Hugging Face; None where it does not say."""
    return getattr(attn, "head_dim", getattr(attn, "head_size", None))


def check_attention(hf, layers):
    """Refuse a model whose attention LatentAttention does not compute."""
    kind = hf.config.model_type
    rope = getattr(hf.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        fail(f"--out cannot write this {kind}, whose rotary angles change with the length of the text: drop --out")
    for attn in map(hf.get_submodule, [layer.name for layer in layers]):
        known = all(hasattr(attn, name) for name in ("scaling", "layer_idx")) and (
            hasattr(attn, "o_proj") or hasattr(attn, "dense")
        )
        n = head_size(attn)
        by_head = all(
            norm.weight.numel() == n for name in ("q_norm", "k_norm") if (norm := getattr(attn, name, None)) is not None
        )
        turn = getattr(sys.modules[type(attn).__module__], "rotate_half", None)  # some turn neighbours in place of halves
        halves = turn is None or turn(torch.arange(4, device="cpu")).tolist() == [-2, -3, 0, 1]
        rotary = getattr(attn, "use_rope", True) and hasattr(hf.base_model, "rotary_emb") and halves
        if not (known and by_head and rotary):
            fail(f"--out: {type(attn).__name__} attends otherwise than a Llama: give a Llama, Mistral, Qwen or NeoX")


def slides(config):
    """Whether a layer's cache drops positions that lie outside a window: the whole first ones would get lost."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def coded_layers(hf):
    """The attention layers of a model whose cache can be coded, or one line."""
    layers = find_layers(hf)
    check_attention(hf, layers)
    if not hasattr(hf.base_model.layers[0], "input_layernorm"):
        fail(f"a coded cache: a {hf.config.model_type} has no input_layernorm, give a Llama, Mistral, Qwen or GPT-NeoX")
    if slides(hf.config.get_text_config()):
        fail(f"a coded cache: this {hf.config.model_type} forgets what lies outside a sliding window, give another model")
    return layers


class Turns:
    """The model's own cosines and sines of all positions so far; kept, since every layer reads them at every step."""

    def __init__(self, rotary):
        self.rotary, self.made = rotary, (torch.empty(1, 0, 0),) * 2
        self.across = None, None  # what columns() was made of, and made

    def __call__(self, S, like):
        """-> cos and sin (1, S, D/2), D rotated numbers a head; a model of learned positions rotates none."""
        if self.rotary is None:
            return (like.new_empty(1, S, 0),) * 2
        return [t[:, :S] for t in self.up_to(S, like)]

    def up_to(self, S, like):
        """-> cos and sin (1, S or more, D/2)"""
        made = self.made  # read once: another thread may make more
        if made[0].shape[1] < S or made[0].device != like.device or made[0].dtype != like.dtype:
            with torch.inference_mode(False), torch.no_grad():  # a later training may read them too
                positions = torch.arange(-(-S // 32) * 64, device=like.device)[None]  # whole LANES of streams.c
                both = self.rotary(torch.empty(0, dtype=like.dtype, device=like.device), positions)
                made = self.made = [t.chunk(2, -1)[0].contiguous() for t in both]  # the two halves are the same
        return made

    def columns(self, S, like):
        """-> cos and sin [D/2, S or more]"""
        made, (source, columns) = self.up_to(S, like), self.across
        if source is not made:
            columns = [t[0].T.contiguous() for t in made]
            self.across = made, columns
        return columns


def id_bytes(hf):
    return 2 if hf.config.get_text_config().vocab_size <= 2**16 else 4


def rows_of(table, norm, ids):
    """What layer 0 reads of tokens (..., d). forward() alone, so that no hook of the table is called."""
    return norm(table.forward(ids))


LAYERS_BEFORE = 2  # that a forecast reads


def known_of(read, e):
    """What is at hand when a layer is read (..., P): the layers before, as they were read back, a list, and the token's row."""
    return torch.cat([*read[-LAYERS_BEFORE:], e], -1)


class Step:
    """What the layers of one forward step hand on: the tokens' ids and rows, and the layers before as they were read back."""

    def __init__(self, hf):
        self.table, self.norm = hf.get_input_embeddings(), hf.base_model.layers[0].input_layernorm
        self.id_bytes = id_bytes(hf)
        self.ids, self.e, self.read = None, None, []
        self.table.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        self.ids = inputs[0]

    def begin(self, like):
        """Before layer 0 writes what is at hand, like (B, T, D)."""
        if self.ids is None or self.ids.shape != like.shape[:2]:
            raise ValueError("a coded cache keeps the tokens' ids: give the model input_ids, not inputs_embeds")
        self.begin_with(self.ids)

    def begin_with(self, ids):
        self.e, self.read = rows_of(self.table, self.norm, ids), []

    def attach(self, rows):
        """Rows of layer 0 at hand, with the ids before them."""
        ids, self.ids = self.ids, None  # each is read once
        return torch.cat([(ids[..., None] >> self.places(ids)).to(torch.uint8), rows], -1)

    def detach(self, rows):
        """Rows of layer 0 of all positions, without the ids."""
        ids, rows = rows.tensor_split([self.id_bytes], -1)
        self.begin_with((ids.long() << self.places(ids)).sum(-1))
        return rows

    def places(self, like):
        """The first bit of each byte of an id."""
        return 8 * torch.arange(self.id_bytes, device=like.device)

    def known(self, like, last=0):
        """What is at hand of all positions, or of the last ones [N,P], in the dtype of `like`."""
        return known_of(self.read, self.e.to(like.dtype))[:, -last:].flatten(0, 1)

    def add(self, read):
        self.read = [*self.read[1 - LAYERS_BEFORE :], read]


class NoForecasts:
    """Stands for Step where each layer is read alone: no ids are kept."""

    def begin(self, like):
        pass

    def attach(self, rows):
        return rows

    def detach(self, rows):
        return rows

    def known(self, like, last=0):
        return None

    def add(self, read):
        pass


AT_ONCE = 256  # positions by which a buffer grows


class Buffer:
    """Memory for positions to come. filled: how many are there; a part that ends elsewhere belongs to a copy of the cache."""

    def __init__(self, kept, length):
        self.tensor = kept.new_empty(*kept.shape[:2], -(-length // AT_ONCE) * AT_ONCE, kept.shape[3])
        self.filled = kept.shape[2]
        self.tensor[:, :, : self.filled] = kept

    def takes(self, kept, length):
        """Whether positions up to `length` fit in after kept, its own beginning."""
        own = self.tensor.data_ptr() == kept.data_ptr() and len(self.tensor) == len(kept) and self.filled == kept.shape[2]
        return own and length <= self.tensor.shape[2] and self.tensor.is_inference() <= torch.is_inference_mode_enabled()

    def append(self, new):
        """new (B, 1, T, r) -> all positions (B, 1, S, r), a view"""
        start, self.filled = self.filled, self.filled + new.shape[2]
        self.tensor[:, :, start : self.filled] = new
        return self.tensor[:, :, : self.filled]


class GrowingLayer(DynamicLayer):
    """
    A DynamicLayer whose keys and values lie in Buffers.

    reader: what reads its latents of keys, a KeyReader or None. first: of a coded cache, a First or None. A coded cache has its
    first positions alone in place of the values.
    """

    buffers, reader, first = [None, None], None, None

    def update(self, key_states, value_states, *args, **kwargs):
        """(B, 1, T, r) twice -> those of all positions, (B, 1, S, r) twice"""
        if not self.get_seq_length() or any(t.requires_grad for t in (key_states, value_states, self.keys, self.values)):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self.grown(0, self.keys, key_states), self.grown(1, self.values, value_states)
        return self.keys, self.values

    def grown(self, i, kept, new):
        if not new.shape[2]:
            return kept
        end, buffer = kept.shape[2] + new.shape[2], self.buffers[i]
        if not (buffer and buffer.takes(kept, end)):
            buffer = Buffer(kept, end)
            self.buffers = [buffer if j == i else other for j, other in enumerate(self.buffers)]  # a copy's stay as they are
        return buffer.append(new)

    def crop(self, tokens_to_remove):
        values = self.values
        super().crop(tokens_to_remove)
        if values is not None:
            self.values = values[:, :, : self.keys.shape[2]]

    def reset(self):
        self.buffers, self.reader, self.first = [None, None], None, None
        super().reset()

    def offload(self):
        self.buffers = [None, None]
        super().offload()


def growing(cache, i):
    """Layer i of a cache of transformers as a GrowingLayer; None where it is filled, or of a kind that somebody chose."""
    layers = getattr(cache, "layers", [])
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:  # one that makes its layers when they are needed
        layers += [DynamicLayer() for _ in range(len(layers), i + 1)]
    if i < len(layers) and type(layers[i]) is DynamicLayer and not layers[i].is_initialized:
        layers[i] = GrowingLayer()
    return layers[i] if i < len(layers) and type(layers[i]) is GrowingLayer else None


def rotate(x, cos, sin):
    """
    Rotate the first D numbers of x (..., n) in pairs: number i and number i + D/2, as in GPT-NeoX and Llama.

    cos, sin (..., D/2): of the angle of each pair.
    """
    half = cos.shape[-1]
    a, b, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


WHOLE = 4  # first positions, which are kept whole: attention rests on them, and their numbers are of another size


@dataclass
class Kept:
    """
    What a cache holds of a layer: rows uint8 (B, S, bytes); whole (B, W, D) float16, the first positions. pads: of padding().
    """

    rows: torch.Tensor
    whole: torch.Tensor
    pads: torch.Tensor | None

    def counts(self):
        """Which of `whole` are of the first WHOLE of a text (B or 1, W): shorter texts of a batch begin later."""
        place = torch.arange(self.whole.shape[1], device=self.whole.device)[None]
        place = place if self.pads is None else place - self.pads[:, None]
        return (place >= 0) & (place < WHOLE)


def padding(mask):
    """
    Padded positions on the left of each text, long [B or 1], of an attention's mask (B or 1, 1, T, S); None without one. Where
    a text has not begun, all positions are padding.
    """
    if mask is None:
        return None
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, -1]
    return torch.where(seen.any(-1), seen.int().argmax(-1), seen.shape[-1])


def trains(module):
    """Whether a gradient may be asked for of a module's parameters: the loops give none."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


@dataclass
class First:
    """Of the first positions of each text, which are kept whole: keys, rotated, and values over their mean (B, G, WHOLE, n)."""

    whole: torch.Tensor
    pads: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor

    def is_of(self, whole, pads):
        same = self.whole.data_ptr() == whole.data_ptr() and self.whole.shape == whole.shape
        if pads is None or self.pads is None:
            return same and pads is self.pads
        return same and torch.equal(pads, self.pads)


def row_bytes(bits):
    """Bytes of a row of pack_rows()."""
    return -(-sum(bits) // 8)


GAIN_BITS = 4


def size_of(bits):
    """Bytes of a stream; 0 without numbers."""
    return max(2, row_bytes([*bits, GAIN_BITS])) if bits else 0  # the loops read two at once


FAST_WINDOW = 8  # of what is encoded again and again: a cache, a table in training


def layout(bits, numbers=slice(None)):
    """What the loops that read some of a stream's numbers take first: their count, its bytes, the gain's bit, the places."""
    size, bits = size_of(bits), torch.tensor(bits, dtype=torch.long, device="cpu")  # a model may be made without memory
    below = 8 * size - bits.cumsum(0)  # bits of the stream that lie below a number's window
    byte = (below >> 3).clamp(max=size - 2)
    places = torch.stack([byte, below - 8 * byte, bits * 2**FAST_WINDOW], 1)[numbers].int().contiguous()
    return len(places), size, 8 * size - bits.sum().item() - GAIN_BITS, places


LANES = 16  # numbers side by side, at most: 8 or 4 where registers are shorter


GAINS = 2 ** ((torch.arange(2**GAIN_BITS) - 7.5) / 2.5)  # from 1/8 to 8


KEYS = 8  # numbers of keys that are restored together, as in streams.c


class CodedReader:
    """The loops' view of a LayerCode without forecasts; its heads have n numbers."""

    def __init__(self, code, n):
        K = len(code.bits[0])
        keys, values = code.from_z[:K].chunk(2, 1)[0], code.from_z[K:].chunk(2, 1)[1]
        k_mean, v_mean = (mean.contiguous() for mean in code.mean.chunk(2))
        order = (keys != 0).int().argmax(1).argsort(stable=True)  # by their first columns: a block's stand together
        tiles = F.pad(keys[order], (0, -keys.shape[1] % KEYS)).unflatten(1, (-1, KEYS)).transpose(0, 1)  # (tiles, K, KEYS)
        used = [(tile != 0).any(1).nonzero()[:, 0].tolist() for tile in tiles]
        ranges = [(numbers[0], numbers[-1] + 1) if numbers else (0, 0) for numbers in used]
        weights = torch.cat([tile[start:end].flatten() for tile, (start, end) in zip(tiles, ranges)])
        up = values.unflatten(1, (-1, n)).transpose(0, 1).contiguous()  # (G, K, n)
        restored = ((torch.tensor(ranges, dtype=torch.int32), weights, k_mean), (up, v_mean))
        self.streams, self.starts = [], (0, code.streams.sizes[0])
        for bits, levels, some, around in zip(code.bits, code.levels, (order, slice(None)), restored):
            count, _, gain_shift, places = layout(bits, some)
            self.streams.append((count, code.bytes_per_token, gain_shift, places, levels, GAINS, *around))
        self.v_mean, self.n = v_mean.view(-1, 1, n), n

    def first_positions(self, whole, pads, turns, norm):
        """
        whole (B, W, D), as the cache keeps them; pads, long [B or 1], positions before each text, or None; turns: a Turns;
        norm: of keys, before they turn
        """
        cos, sin = turns(whole.shape[1], self.v_mean)
        k, v = (part.float().unflatten(-1, (-1, self.n)).transpose(1, 2) for part in whole.chunk(2, -1))  # (B, G, W, n)
        begin = torch.zeros(1, dtype=torch.long) if pads is None else pads
        places = (begin[:, None] + torch.arange(WHOLE)).clamp(max=k.shape[2] - 1)  # the loops do not read what is not there
        places = places[:, None, :, None].expand(len(k), k.shape[1], -1, self.n)
        keys, values = rotate(norm(k), cos, sin).gather(2, places), v.gather(2, places)
        return First(whole, pads, keys.contiguous(), (values - self.v_mean).contiguous())  # the mean is in the outputs

    def scores(self, q, rows, first, norm, columns, scale):
        """
        One query of each text over all positions, its own too: q (B, H, n), before its rotation -> (B, H, S).

        rows (B, S, bytes), all or the beginning of a buffer; norm: the keys' weights [n] or None, and epsilon; columns: cosines
        and sines [D/2, capacity], of all positions, in whole LANES of streams.c
        """
        scores = q.new_empty(*q.shape[:2], rows.shape[1])
        batch, rows = self.batch(0, q.shape[1], rows, first.pads)
        loop, threads = bind("stream_scores", *self.streams[0]), torch.get_num_threads()
        loop(*batch, *norm, *columns[0].shape, *columns, float(scale), q.contiguous(), first.keys, rows, scores, threads)
        return scores

    def outputs(self, weights, rows, first):
        """weights (B, H, S) that sum to 1 -> what the heads give, side by side (B, 1, H n). As scores() otherwise."""
        B, H, _ = weights.shape
        out = weights.new_empty(B, 1, H * self.n)
        batch, rows = self.batch(1, H, rows, first.pads)
        loop, threads = bind("stream_outputs", *self.streams[1]), torch.get_num_threads()
        sums = weights.new_empty(B + threads, H, self.streams[1][0] + LANES)
        loop(*batch, weights.contiguous(), first.values, rows, sums, out, threads)
        return out

    def batch(self, i, heads, rows, pads):
        """-> (what the loops take of a Batch, where stream i begins in the first row)"""
        B, S, size = rows.shape
        rows = rows if rows.stride()[1:] == (size, 1) else rows.contiguous()
        pads = None if pads is None else pads.expand(B).contiguous()
        return (B, heads, len(self.v_mean), self.n, S, rows.stride(0) // size, pads), rows[0, 0, self.starts[i] :]


def compiled(name, like):
    """A loop of streams.c, or None where it does not serve numbers like these."""
    return bind(name) if like.device.type == "cpu" and like.dtype == torch.float32 else None


def reader_of(code, n):
    """A CodedReader, or None where no loop serves the code."""
    served = len(code.bits) == 2 and not len(code.forecast) and compiled("stream_scores", code.levels) is not None
    return CodedReader(code, n) if served else None


def version_of(module):
    """Changes when a module's weight does, as far as torch counts that: not in inference mode."""
    weight = getattr(module, "weight", None)
    return None if weight is None or weight.is_inference() else (id(weight), weight._version)


@torch.no_grad()
def norm_of(module, n):
    """
    What the loops take of a norm of heads: (its weights [n], or None without one; epsilon). None for a norm of another kind.
    """
    if isinstance(module, torch.nn.Identity):
        return None, 0.0
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return None
    weight, x = module(torch.ones(n)) * (1 + eps) ** 0.5, torch.linspace(-1, 2, n)
    known = weight * x * (x.square().mean() + eps).rsqrt()
    return (weight, eps) if torch.allclose(module(x), known, rtol=1e-5, atol=1e-6) else None


def masked(scores, mask):
    """Scores (B, H, S) of one query under an attention's mask (B or 1, H or 1, T, S) or None; the query is its last row."""
    if mask is None:
        return scores
    mask = mask[:, :, -1]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


class CodedAttention(nn.Module):
    """
    Attention over keys and values as they are read back from their bytes; without a cache too, so that a loss is that of the
    coded cache. Gradients pass through the rounding as if it were not there.

    Scores depend on distances alone. So positions are counted from the first in the cache, and left padding does no harm.
    """

    def __init__(self, attn, code, turns, step):
        super().__init__()
        for name, module in attn.named_children():  # under their names: a packed model's plan has them
            if name in ("query_key_value", "q_proj", "k_proj", "v_proj", "o_proj", "dense"):
                setattr(self, name, module)
        self.q_norm, self.k_norm = (getattr(attn, name, nn.Identity()) for name in ("q_norm", "k_norm"))
        self.n, self.scaling, self.layer_idx = head_size(attn), attn.scaling, attn.layer_idx
        self.code, self.turns, self.step = code, turns, step
        self.reader = None  # a CodedReader; False where there is none
        self.norm = None  # version_of() the keys' norm, and its norm_of()

    def heads(self, x):
        return x.unflatten(-1, (-1, self.n)).transpose(1, 2)  # (B, heads, T, n)

    def project(self, x):
        """-> queries, keys, values (B, T, heads n)"""
        if not hasattr(self, "query_key_value"):
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        by_head = self.query_key_value(x).unflatten(-1, (-1, 3, self.n))  # every head's q, k and v lie side by side
        return tuple(part.flatten(2) for part in by_head.unbind(-2))

    def project_out(self, y):
        return self.o_proj(y) if hasattr(self, "o_proj") else self.dense(y)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, layer_past=None, **_):
        x, T = hidden_states, hidden_states.shape[1]
        cache = layer_past if past_key_values is None else past_key_values  # a GPT-NeoX has the first name for it
        if getattr(cache, "is_compileable", False):
            raise NotImplementedError("a static cache has no end to count positions from: leave cache_implementation out")
        q, *now = self.project(x)
        now = torch.cat(now, -1).to(self.code.mean.dtype)
        layer = growing(cache, self.layer_idx)
        with torch.autocast(x.device.type, enabled=False):
            kept = self.append(now, attention_mask, cache)
        q, S = self.q_norm(self.heads(q)), kept.rows.shape[1]
        if T == 1 and layer and (norm := self.norm_in_place(q)):
            return self.project_out(self.read_in_place(q[:, :, 0], kept, layer, norm, attention_mask)), None
        cos, sin = self.turns(S, x)
        q = rotate(q, cos[:, S - T :], sin[:, S - T :])
        with torch.autocast(x.device.type, enabled=False):
            read = self.read_all(kept, now).to(x.dtype)
        k, v = map(self.heads, read.chunk(2, -1))  # (B, G, S, n)
        k = rotate(self.k_norm(k), cos, sin)
        causal = attention_mask is None and T > 1
        y = F.scaled_dot_product_attention(
            q, k, v.to(q.dtype), attn_mask=attention_mask, is_causal=causal, scale=self.scaling, enable_gqa=True
        )
        return self.project_out(y.transpose(1, 2).flatten(-2)), None

    def append(self, now, mask, cache):
        """Keys and values at hand (B, T, D) -> a Kept of all positions."""
        (B, T), pads, step, first = now.shape[:2], padding(mask), self.step, self.layer_idx == 0
        start = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        whole = now[:, : max(0, WHOLE + (0 if pads is None else int(pads.max())) - start)].half()
        if first:
            step.begin(now)
        rows = self.code.write(now.detach().flatten(0, 1), step.known(now, last=T)).unflatten(0, (B, T))
        rows = step.attach(rows) if first else rows
        if cache is not None:
            rows, whole = (t[:, 0] for t in cache.update(rows[:, None], whole[:, None], self.layer_idx))
        return Kept(step.detach(rows) if first else rows, whole, pads)

    def read_all(self, kept, now):
        """-> keys and values of all positions (B, S, D). now (B, T, D): those at hand, which have the gradients."""
        (B, W), whole = kept.whole.shape[:2], kept.whole.to(now.dtype)
        read = self.code.read(kept.rows.flatten(0, 1), self.step.known(whole)).unflatten(0, (B, -1))
        read = torch.cat([torch.where(kept.counts()[..., None], whole, read[:, :W]), read[:, W:]], 1)
        self.step.add(read)
        return read + (now - now.detach()) if now.shape[1] == read.shape[1] else read

    def norm_in_place(self, q):
        """norm_of() of the keys, where the loops can take queries q (B, H, T, n): they compute in float32, and no gradients."""
        if q.dtype != torch.float32 or (torch.is_grad_enabled() and q.requires_grad) or trains(self.k_norm):
            return None
        if self.reader is None:
            self.reader = reader_of(self.code, self.n) or False
        if self.norm is None or self.norm[0] != version_of(self.k_norm):
            self.norm = version_of(self.k_norm), norm_of(self.k_norm, self.n)
        return self.norm[1] if self.reader else None

    def read_in_place(self, q, kept, layer, norm, mask):
        """One query of each text, not yet rotated (B, H, n) -> what the heads give, side by side (B, 1, H n)."""
        reader = self.reader
        if layer.first is None or not layer.first.is_of(kept.whole, kept.pads):
            layer.first = reader.first_positions(kept.whole, kept.pads, self.turns, self.k_norm)
        columns = self.turns.columns(kept.rows.shape[1], q)
        scores = reader.scores(q, kept.rows, layer.first, norm, columns, self.scaling)
        return reader.outputs(masked(scores, mask).softmax(-1), kept.rows, layer.first)

    def _apply(self, fn, recurse=True):
        """What .to() and the like call: the reader is made anew."""
        self.reader = self.norm = None
        return super()._apply(fn, recurse)


def install_cache(hf, codes, layers=None):
    """
    Give a model attention with a coded cache, in place.

    codes: a LayerCode for each layer. layers: coded_layers() from before the weights were packed, where they are.
    """
    step = Step(hf) if any(len(code.forecast) for code in codes) else NoForecasts()
    turns = Turns(hf.base_model.rotary_emb)
    for layer, code in zip(layers or coded_layers(hf), codes, strict=True):
        parent, last = layer.name.rsplit(".", 1)
        attn = hf.get_submodule(layer.name)
        setattr(hf.get_submodule(parent), last, CodedAttention(attn, code.to(hf.device), turns, step))


def blank(parts):
    """{name: [dtype, [sizes]]} -> {name: a tensor to be filled in}."""
    return {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in parts.items()}


def blank_matrix(parts, codes):
    tensors = blank(parts)
    streams = {tuple(map(int, name.split(".")[1:])): tensors.pop(name) for name in parts if name.startswith("streams.")}
    return CodedMatrix(streams=streams, codes=codes, **tensors)


def nearest_gain(z):
    """z [N,K] -> the number of the gain next to each row's root mean square [N]."""
    size = z.square().mean(1, keepdim=True).sqrt()
    return (size.clamp(min=1e-9).log() - GAINS.to(z).log()).abs().argmin(1)


ROWS_AT_ONCE = 512  # tokens encoded together


def pack_rows(windows, bits):
    """
    windows [N,K] of numbers with bits [K], a list -> uint8 [N, row_bytes()]: the low b bits of each number, side by side.

    A window is these bits and the ones before it; before the first number they are 0.
    """
    device, depth = windows.device, torch.tensor(bits, dtype=torch.long, device=windows.device)
    number = torch.repeat_interleave(torch.arange(len(bits), device=device), depth)  # of each bit of a row
    shift = depth.cumsum(0)[number] - 1 - torch.arange(len(number), device=device)
    stream = (windows[:, number] >> shift & 1).to(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    return (stream << torch.arange(7, -1, -1, dtype=torch.uint8, device=device)).sum(-1, dtype=torch.uint8)


IMPOSSIBLE = 1e30  # a cost


def best_windows(z, bits, levels):
    """
    z [N,K] of variance 1 -> the windows [N,K] of least squared error in each row (see trellis.viterbi).

    Here each number has a depth of its own, and the stream before the first number is 0.
    """
    (N, K), L, z, levels = z.shape, FAST_WINDOW, z.float().T.contiguous(), levels.float()
    cost, oldest = z.new_full((2**L, N), IMPOSSIBLE), []
    cost[0] = 0
    for t, b in enumerate(bits):
        high, kept = 2**b, 2 ** (L - b)
        names = torch.arange(high, dtype=torch.int32, device=z.device).view(-1, 1, 1)
        named = cost.view(torch.int32).view(high, kept, N).bitwise_and_(-high).bitwise_or_(names)
        best = named.view(torch.float32).amin(0)
        oldest.append((best.view(torch.int32) & high - 1).to(torch.uint8))
        best = best - best.amin(0)  # costs keep their precision
        cost = (z[t] - levels[b].view(kept, high, 1)).square_().add_(best[:, None]).flatten(0, 1)
    windows, window = torch.empty(K, N, dtype=torch.long, device=z.device), cost.argmin(0)
    for t in range(K - 1, -1, -1):
        windows[t] = window
        shared = window >> bits[t]
        window = oldest[t].gather(0, shared[None])[0].long() << (L - bits[t]) | shared
    return windows.T


def write_stream(z, bits, levels):
    """z [N,K] -> uint8 [N, size_of(bits)], in torch."""
    if not bits:
        return torch.empty(len(z), 0, dtype=torch.uint8, device=z.device)
    gain = nearest_gain(z)
    parts = (z / GAINS.to(z)[gain, None]).split(ROWS_AT_ONCE)
    windows = torch.cat([torch.cat([best_windows(part, bits, levels) for part in parts]), gain[:, None]], 1)
    stream = pack_rows(windows, [*bits, GAIN_BITS])
    return F.pad(stream, (0, size_of(bits) - stream.shape[1])).flip(-1)


def unpack_rows(packed, bits, window):
    """The inverse: uint8 [N, row_bytes()] -> windows [N,K], int32."""
    padded = torch.nn.functional.pad(packed, (3, 2)).int()
    starts = 24 + torch.tensor(bits, dtype=torch.long, device=packed.device).cumsum(0) - window
    at = starts >> 3
    three = padded[:, at] << 16 | padded[:, at + 1] << 8 | padded[:, at + 2]
    return three >> (24 - window - (starts & 7)).int() & (2**window - 1)


def windows_and_gain(rows, bits):
    """uint8 [N, size_of(bits)] -> (windows [N,K], int32; the number of each row's gain [N])"""
    windows = unpack_rows(rows.flip(-1), [*bits, GAIN_BITS], FAST_WINDOW)
    return windows[:, :-1], windows[:, -1].long() & 2**GAIN_BITS - 1


def read_stream(rows, bits, levels, where):
    """uint8 [N, size_of(bits)] -> [N,K]. where: of layout()"""
    if not bits:
        return levels.new_empty(len(rows), 0)
    if loop := compiled("stream_read", levels):
        z = torch.empty(len(rows), len(bits))
        loop(*where, levels, GAINS, len(rows), rows.contiguous(), z, torch.get_num_threads())
        return z
    windows, gain = windows_and_gain(rows, bits)
    offsets = torch.tensor(bits, device=rows.device) * levels.shape[1]
    return levels.flatten()[windows + offsets] * GAINS.to(levels)[gain, None]


class Streams:
    """The streams of a row, side by side. bits: for each a list, of its numbers. A row without numbers has a byte too."""

    def __init__(self, bits):
        self.bits, self.counts, self.sizes = bits, list(map(len, bits)), list(map(size_of, bits))
        self.size, self.count = max(1, sum(self.sizes)), sum(self.counts)
        every = [b for stream in bits for b in stream]
        self.shape = [torch.tensor(part, dtype=torch.int32, device="cpu") for part in (self.counts, self.sizes, every)]
        self.layouts = list(map(layout, bits))

    def write(self, z, levels):
        """z [N, count], levels (streams, most bits + 1, 2^FAST_WINDOW) -> uint8 [N, size]"""
        if self.count and (loop := compiled("stream_write", z)):
            rows, threads = torch.empty(len(z), self.size, dtype=torch.uint8), torch.get_num_threads()
            memory = torch.empty(threads, self.count * 2**FAST_WINDOW + LANES, dtype=torch.uint8)
            shape = (len(z), len(self.bits), levels.shape[1], self.count, self.size, *self.shape)
            loop(*shape, levels, GAINS, z.contiguous(), memory, rows, threads)
            return rows
        rows = torch.cat([write_stream(*stream) for stream in zip(z.split(self.counts, 1), self.bits, levels)], 1)
        return rows if self.count else F.pad(rows, (0, 1))

    def read(self, rows, levels):
        """The inverse, to rounding: uint8 [N, size] -> [N, count]"""
        rows = rows[:, : sum(self.sizes)].split(self.sizes, 1)
        return torch.cat([read_stream(*stream) for stream in zip(rows, self.bits, levels, self.layouts)], 1)


class LayerCode(nn.Module):
    """
    This is how a token's keys and values become bytes in one layer, and back.

    mean [D], forecast [P,D], to_z [D,K], from_z [K,D]; bits: a list for each stream, of numbers above 0, rising, K in all;
    levels (streams, most bits + 1, 2^FAST_WINDOW): the value of each window at each depth.
    """

    def __init__(self, mean, forecast, to_z, from_z, bits, levels):
        super().__init__()
        self.bits, self.streams = bits, Streams(bits)
        for name, tensor in dict(mean=mean, forecast=forecast, to_z=to_z, from_z=from_z, levels=levels).items():
            self.register_buffer(name, tensor.float())

    def tensors(self):
        """What is stored, in 16 bits. to_z is as large as differences from the forecast are small: beyond float16, at times."""
        stored = {name: getattr(self, name).half() for name in ("mean", "forecast", "from_z", "levels")}
        return stored | dict(to_z=self.to_z.bfloat16())

    def expected(self, known):
        """known [N,P]: what is at hand when the layer is read, None without forecasts -> forecast of x [N,D] or [D]."""
        return self.mean if known is None else torch.addmm(self.mean, known, self.forecast)

    def write(self, x, known):
        """x [N,D] -> uint8 [N, bytes_per_token]"""
        return self.streams.write((x - self.expected(known)) @ self.to_z, self.levels)

    def read(self, rows, known):
        """The inverse, to rounding."""
        return self.expected(known) + self.streams.read(rows, self.levels) @ self.from_z

    @property
    def bytes_per_token(self):
        return self.streams.size


def blank_layer_code(bits, parts):
    """bits: for each stream, how many components have 1 bit, 2 bits, ..."""
    bits = [[b for b, count in enumerate(stream, 1) for _ in range(count)] for stream in bits]
    return LayerCode(bits=bits, **blank(parts))


class PackedModel(CompactModel):
    """
    config.surgery says which matrices are packed, and how the cache is.

    Packed matrices are read on the CPU. Tokens are to be given as input_ids where the cache is packed.
    """

    def __init__(self, config):
        super().__init__(config)
        plan, self.levels = config.surgery, Levels()
        layers = coded_layers(self) if plan["cache"] else []
        install_coded(self, {name: blank_matrix(parts, self.levels) for name, parts in plan["coded"].items()})
        if layers:
            install_cache(self, [blank_layer_code(**code) for code in plan["cache"]], layers)
        self.post_init()
        # LayerCodes: a key must be read back as it was written. Not of the class: transformers 4 would look for them too early.
        self._keep_in_fp32_modules_strict = {"self_attn.code", "attention.code"}


class CompactConfig(LlamaConfig):
    model_type = "nanopca_llama"


class CompactForCausalLM(PackedModel, LlamaForCausalLM):
    config_class = CompactConfig
