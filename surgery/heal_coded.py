"""
Healing of a quantised model: the codes stay fixed, the few numbers around them are trained.

Each quantised matrix trains its scales, means, basis and mean. The model trains its norms. All follow the untouched model's
distribution. Linear layers that are not quantised get adapters (heal.py), which are merged. The size stays the same.
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

RATE = 3.0  # learning rate of the numbers around the codes, relative to their size, over that of the adapters


class TrainableCodes(nn.Module):
    """A CodedMatrix with trainable scales, means, basis and mean; each parameter is a change relative to its number's size."""

    def __init__(self, coded):
        super().__init__()
        self.coded, sizes = coded, coded.sizes.tolist()
        units = [coded.units(torch.full((size,), g), torch.arange(size)).half() for g, size in enumerate(sizes)]
        self.register_buffer("units", torch.cat(units), persistent=False)  # (V, k), in the order of the groups
        self.sizes, self.places = sizes, coded.places(torch.arange(len(coded.place)))
        self.scales = nn.Parameter(torch.zeros(coded.scales.shape))
        if coded.P is not None:
            self.means, self.P, self.mean = (nn.Parameter(torch.zeros(t.shape)) for t in (coded.means, coded.P, coded.mean))

    def numbers(self):
        """The trained scales [G,k]; with a basis also means [G,k], P [k,d] and mean [d]."""
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
            if self.coded.parent is not None:  # like add_parents(), whose gradient takes seven times as long
                factor, gain = (part[:, None] for part in factors_and_gains(self.coded.relation[rows]))
                before = torch.cat(parts)[self.coded.parents(rows)] if factor.any() else 0
                parts[-1] = parts[-1] * gain + factor * before
        if "P" in n:
            parts = [torch.addmm(n["mean"], part + means, n["P"]) for part, means in zip(parts, n["means"])]
        return torch.cat(parts)[self.places]

    @torch.no_grad()
    def healed(self):
        """The CodedMatrix with the trained numbers, rounded to their stored types."""
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
    """The lookup. It keeps the decoded matrix for a tied head, which runs later in the same step."""

    def __init__(self, codes, scale=1.0):
        super().__init__()
        self.codes, self.scale = codes, scale

    def forward(self, ids):
        self.matrix = self.codes.weight()
        return F.embedding(ids, self.matrix) * self.scale


class TrainableHead(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = [table]  # a list hides it from nn.Module, so its parameters are not counted twice

    def forward(self, h):
        return F.linear(h, self.table[0].matrix)


def make_trainable(hf, coded):
    """Replace a model's quantised matrices {name: CodedMatrix} by TrainableCodes -> {name: TrainableCodes}."""
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
    Heal a quantised copy of the model, hf -> ({name: CodedMatrix} after healing, distil()'s result).

    hf is changed in place: its norms, and its linear layers that are not quantised. subject_of(hf) has the three calls lookup,
    trunk and logits.
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
