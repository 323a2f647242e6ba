"""The modules of a packed model. They read a CodedMatrix at every call; the entire matrix never exists in float."""

import torch
import torch.nn as nn

from bits.coded_matrix import CodedMatrix


class Coded(nn.Module):
    """
    The tensors of a CodedMatrix as buffers. On the CPU only.

    float16 tensors are stored as int16 with the same bits, so that a change of the model's dtype does not convert them.
    """

    def __init__(self, coded):
        super().__init__()
        self.codes = [coded.codes]  # in a list, so that torch does not register it as a submodule
        for name, tensor in coded.tensors().items():
            bits = tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor
            self.register_buffer(name.replace(".", "_"), bits)
        self.halves = [name for name, tensor in coded.tensors().items() if tensor.dtype == torch.float16]
        self.register_buffer("like", torch.empty(0), persistent=False)  # has the model's dtype
        self.made = [], None  # the buffers, and the CodedMatrix made of them

    @property
    def coded(self):
        """The CodedMatrix of the present buffers. It is rebuilt only if they change, since it keeps its bound functions."""
        read, made = self.made
        buffers = list(self._buffers.values())
        if len(read) != len(buffers) or any(before is not now for before, now in zip(read, buffers)):
            made = self.matrix_of_buffers()
            self.made = buffers, made
        return made

    def _load_from_state_dict(self, *given):
        self.made = [], None  # loading may write other bits into the same buffers
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
    """The token embedding. scale: Gemma multiplies each looked-up row by it."""

    def __init__(self, coded, scale=1.0):
        super().__init__(coded)
        self.scale = scale

    def forward(self, ids):
        return (self.coded.lookup(ids) * self.scale).to(self.like.dtype)


class CodedLinear(Coded):
    """A linear layer, or an untied head."""

    def __init__(self, coded, bias=None):
        super().__init__(coded)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x):
        y = self.coded.product(x.float()).to(x.dtype)
        return y if self.bias is None else y + self.bias


class TiedCodedHead(nn.Module):
    """The head of a model that is tied to its CodedEmbedding."""

    def __init__(self, table, bias=None):
        super().__init__()
        self.table, self.bias = [table], bias  # in a list, so that its buffers are registered once

    def forward(self, h):
        y = self.table[0].coded.product(h.float()).to(h.dtype)
        return y if self.bias is None else y + self.bias


def install_coded(hf, coded, packed=True):
    """
    Put quantised matrices into a model. coded {name: CodedMatrix}: "wte" is the table, "head" an untied head; any other name
    is the path of a Linear.

    packed: the modules read the packed form. Otherwise the weights are decoded once to float: same speed and memory as before.
    """
    tied, bias = "head" not in coded, hf.get_output_embeddings().bias
    for name, made in coded.items():
        if not packed:
            put_dense(hf, name, made, tied)
        elif name == "wte":
            hf.set_input_embeddings(CodedEmbedding(made, scale_of(hf.get_input_embeddings())))
            if tied:
                hf.set_output_embeddings(TiedCodedHead(hf.get_input_embeddings(), bias))
        elif name == "head":
            hf.set_output_embeddings(CodedLinear(made, bias))
        else:
            parent, _, last = name.rpartition(".")
            setattr(hf.get_submodule(parent), last, CodedLinear(made, hf.get_submodule(name).bias))
    if not any(p.is_floating_point() for p in hf.parameters()):  # transformers reads a model's dtype from its parameters
        hf.register_parameter("like", nn.Parameter(torch.empty(0), requires_grad=False))


def scale_of(table):
    """The number by which Gemma multiplies each row that it looks up, or 1.0. A buffer on the meta device has none."""
    return float(getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0)))


def put_dense(hf, name, made, tied):
    ends = dict(wte=[hf.get_input_embeddings()] + [hf.get_output_embeddings()] * tied, head=[hf.get_output_embeddings()])
    weight = nn.Parameter(made.matrix(), requires_grad=False)
    for module in ends.get(name) or [hf.get_submodule(name)]:
        module.weight = weight
