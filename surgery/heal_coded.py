"""
Healing of a model by bits: the codes stay, the few numbers around them are trained.

Scales, means, the basis and the mean of every coded matrix, and the model's norms, are trained towards the untouched model's
distribution. Linear layers that are not coded get adapters (heal.py), which are merged. The size stays the same.
"""

from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from bits.encode import to_int8
from bits.predicted_rows import factors_and_gains
from model import merge_adapters
from surgery.coded import TABLES
from surgery.heal import adapters_of, distil

RATE = 3.0  # of the numbers around the codes, each relative to its size, over that of the adapters


class TrainableCodes(nn.Module):
    """A CodedMatrix whose scales, means, basis and mean are parameters, each as a change relative to its size."""

    def __init__(self, coded):
        super().__init__()
        self.coded, sizes = coded, coded.sizes.tolist()
        units = [coded.units(torch.full((size,), g), torch.arange(size)).half() for g, size in enumerate(sizes)]
        self.register_buffer("units", torch.cat(units), persistent=False)  # (V, k), by place
        self.sizes, self.places = sizes, coded.places(torch.arange(len(coded.place)))
        self.scales = nn.Parameter(torch.zeros(coded.scales.shape))
        if coded.P is not None:
            self.means, self.P, self.mean = (nn.Parameter(torch.zeros(t.shape)) for t in (coded.means, coded.P, coded.mean))

    def numbers(self):
        """scales and means [G,k], P [k,d], mean [d] as trained so far; the last three only with a basis."""
        coded = self.coded
        found = dict(scales=coded.scales.float() * (1 + self.scales))
        if coded.P is not None:
            P = coded.basis()
            found |= dict(means=coded.means.float() + self.means * coded.scales.float())
            found |= dict(P=P + self.P * P.square().mean(1, keepdim=True).sqrt())
            found |= dict(mean=coded.mean.float() + self.mean * coded.mean.float().square().mean().sqrt())
        return found

    def weight(self):
        """The matrix [V,d]."""
        n, parts, start = self.numbers(), [], 0
        for units, scales in zip(self.units.split(self.sizes), n["scales"]):
            rows = slice(start, start := start + len(units))
            parts.append(units.float() * scales)
            if self.coded.parent is not None:  # as add_parents() does, by rows: its gradient takes seven times as long
                factor, gain = (part[:, None] for part in factors_and_gains(self.coded.relation[rows]))
                before = torch.cat(parts)[self.coded.parents(rows)] if factor.any() else 0
                parts[-1] = parts[-1] * gain + factor * before
        if "P" in n:
            parts = [torch.addmm(n["mean"], part + means, n["P"]) for part, means in zip(parts, n["means"])]
        return torch.cat(parts)[self.places]

    @torch.no_grad()
    def healed(self):
        """The CodedMatrix with the trained numbers, rounded as they are stored."""
        n = self.numbers()
        changed = {name: n[name].half() for name in ("scales", "means", "mean") if name in n}
        if "P" in n:
            changed["P"], changed["P_scale"] = to_int8(n["P"])
        return replace(self.coded, **changed)


class TrainableLinear(nn.Module):
    def __init__(self, codes, bias=None):
        super().__init__()
        self.codes, self.bias = codes, bias

    def forward(self, x):
        return F.linear(x, self.codes.weight(), self.bias)


class TrainableTable(nn.Module):
    """The lookup. It keeps the matrix for a tied head, which comes after it in a step."""

    def __init__(self, codes, scale=1.0):
        super().__init__()
        self.codes, self.scale = codes, scale

    def forward(self, ids):
        self.matrix = self.codes.weight()
        return F.embedding(ids, self.matrix) * self.scale


class TrainableHead(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = [table]  # a list, so that its parameters are not counted twice

    def forward(self, h):
        return F.linear(h, self.table[0].matrix)


def make_trainable(hf, coded):
    """Put TrainableCodes in place of a model's coded matrices {name: CodedMatrix} -> {name: TrainableCodes}."""
    codes = {name: TrainableCodes(made) for name, made in coded.items()}
    for name, made in codes.items():
        if name not in TABLES:
            parent, _, last = name.rpartition(".")
            setattr(hf.get_submodule(parent), last, TrainableLinear(made, hf.get_submodule(name).bias))
    if "wte" in codes:
        table = TrainableTable(codes["wte"], float(getattr(hf.get_input_embeddings(), "embed_scale", 1.0)))
        hf.set_input_embeddings(table)
        hf.set_output_embeddings(TrainableLinear(codes["head"]) if "head" in codes else TrainableHead(table))
    return codes


def heal_coded(subject_of, hf, coded, teacher, windows, steps, rank, lr, seed, log, dtype="float32"):
    """
    Heal a copy of the model, hf, whose matrices were coded -> ({name: CodedMatrix} as healed, what distil() returns).

    hf is changed in place: norms, and linear layers that are not coded. subject_of(hf) gives the three calls lookup, trunk and
    logits.
    """
    torch.manual_seed(seed)
    norms = [p for name, p in hf.named_parameters() if p.dim() == 1 and "norm" in name]
    codes = make_trainable(hf, coded)
    student = subject_of(hf)
    adapters = adapters_of(student, rank)
    around = [p for made in codes.values() for p in made.parameters()] + norms
    for p in around:
        p.requires_grad_(True)
    groups = [dict(params=around, lr=RATE * lr)] + [dict(params=adapters, lr=lr)] * bool(adapters)
    found = distil(student, teacher, windows, steps, groups, log, dtype)
    merge_adapters(hf)
    return {name: made.healed() for name, made in codes.items()}, found
