"""The modules of a packed model: they read a CodedMatrix at every call, and never hold it whole in float."""

import torch.nn as nn


class Coded(nn.Module):
    """A CodedMatrix whose tensors are buffers too, so that counts of memory find them. On the CPU only."""

    def __init__(self, coded):
        super().__init__()
        self.coded = coded
        for name, tensor in coded.tensors().items():
            self.register_buffer(name.replace(".", "_"), tensor)


class CodedEmbedding(Coded):
    """The lookup. scale: Gemma's, of a looked-up row."""

    def __init__(self, coded, scale=1.0):
        super().__init__(coded)
        self.scale = scale

    def forward(self, ids):
        return self.coded.lookup(ids) * self.scale


class CodedLinear(Coded):
    """A linear layer, or the head."""

    def __init__(self, coded, bias=None):
        super().__init__(coded)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x):
        y = self.coded.product(x)
        return y if self.bias is None else y + self.bias


def install(hf, coded, packed=True):
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
                hf.set_output_embeddings(CodedLinear(made))
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
