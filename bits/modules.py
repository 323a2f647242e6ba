"""The modules of a packed model: they read a CodedMatrix at every call, and never hold it whole in float."""

import torch
import torch.nn as nn

from bits.coded_matrix import CodedMatrix


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


class CodedLinear(Coded):
    """A linear layer, or a head of its own."""

    def __init__(self, coded, bias=None):
        super().__init__(coded)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x):
        y = self.coded.product(x.float()).to(x.dtype)
        return y if self.bias is None else y + self.bias


class TiedCodedHead(nn.Module):
    """The head of a model whose table is a CodedEmbedding."""

    def __init__(self, table):
        super().__init__()
        self.table = [table]  # in a list, so that its buffers have one name

    def forward(self, h):
        return self.table[0].coded.product(h.float()).to(h.dtype)


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


def put_dense(hf, name, made, tied):
    ends = dict(wte=[hf.get_input_embeddings()] + [hf.get_output_embeddings()] * tied, head=[hf.get_output_embeddings()])
    weight = nn.Parameter(made.matrix(), requires_grad=False)
    for module in ends.get(name) or [hf.get_submodule(name)]:
        module.weight = weight
