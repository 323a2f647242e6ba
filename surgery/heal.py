"""
Healing: a short LoRA training that brings a cut model back towards the untouched one.

The teacher is the untouched model. The loss is KL(untouched | healed) at every position: a distribution teaches more than one
next token. This loss is 0 for the untouched model, so healing restores what surgery lost and does not fit the text. Every
linear layer gets an adapter, low-rank factors too. The adapters are merged at the end, so the model keeps its size.

The bits of a quantised matrix stay fixed. Its scales, means, basis and mean are trained, and so are the model's norms.
"""

import math
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

from bits.encode import to_int8
from bits.predicted_rows import factors_and_gains
from common.cli import fail
from model import adapt, merge_adapters
from surgery.bits_model import TABLES
from surgery.subject import Subject
from training.device import settle_dtype
from training.step import autocast_of

WARMUP = 0.1  # of the steps
RATE = 3.0  # learning rate of the numbers around the codes, relative to their size, over that of the adapters


@dataclass(frozen=True)
class Recipe:
    """How to heal. rank: of the adapters. lr: their highest learning rate. dtype: of the matrix products."""

    steps: int
    rank: int
    lr: float
    seed: int = 0
    dtype: str = "float32"

    @classmethod
    def of(cls, args, width):
        """The recipe of the flags. --heal_dtype auto is measured here. width: of the model."""
        given = SimpleNamespace(dtype=args.heal_dtype, batch_size=1, block_size=args.window, n_embd=width)
        dtype, why = settle_dtype(given, args.device, 1)
        if why:
            print(f"healing: {why}", flush=True)
        dtype = "float32" if dtype == "float16" else dtype  # float16 would need gradient scaling
        return cls(args.heal_steps, args.heal_rank, args.heal_lr, args.seed, dtype)


def heal(student, teacher, windows, recipe):
    """Train adapters on windows of tokens, a list of (x (1, T), y), and merge them -> distil()'s result."""
    torch.manual_seed(recipe.seed)
    adapters = adapters_of(student, recipe.rank)
    found = distil(student, teacher, windows, recipe, [dict(params=adapters, lr=recipe.lr)])
    merge_adapters(student.model)
    return found


def adapters_of(student, rank):
    """Give an adapter to every linear layer except the head -> the adapters' parameters. All others are frozen."""
    linears = [m for m in student.model.modules() if type(m) is nn.Linear and m is not student.head]
    for linear in linears:
        r = min(rank, *linear.weight.shape)
        adapt([linear], SimpleNamespace(lora_rank=r, lora_alpha=2 * r, lora_dropout=0.0))
    student.model.requires_grad_(False).to(student.model.device)
    adapters = list({p: None for m in linears for p in m.lora.parameters()})
    for p in adapters:
        p.requires_grad_(True)
        p.data = p.data.to(student.model.device)
    return adapters


def distil(student, teacher, windows, recipe, groups):
    """
    Train the student towards the teacher's distribution. Each step reads one window, in random order.

    groups: AdamW's parameter groups, each with its highest learning rate. Probabilities are float32. Returns
    dict(steps, tokens, seconds, training_kl: mean of the last tenth of the steps).
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    highest = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps, losses, start = recipe.steps, [], time.time()
    order = [i for _ in range(-(-steps // len(windows))) for i in torch.randperm(len(windows)).tolist()]
    for step in (bar := tqdm(range(steps), "healing", unit="step")):
        progress = (step + 0.5) / steps  # so that the first and last steps have a rate above 0
        rate = min(progress / WARMUP, 0.5 + 0.5 * math.cos(math.pi * max(progress - WARMUP, 0) / (1 - WARMUP)))
        for group, lr in zip(optimizer.param_groups, highest):
            group["lr"] = lr * rate
        x, _ = windows[order[step]]
        with autocast_of(str(student.model.device), recipe.dtype):
            with torch.no_grad():
                target = teacher.logits(teacher.trunk(teacher.lookup(x)))[0]
            found = student.logits(student.trunk(student.lookup(x)))[0]
        found, target = (logits.float().log_softmax(-1) for logits in (found, target))  # on a CPU autocast would keep bfloat16
        loss = F.kl_div(found, target, reduction="sum", log_target=True) / len(target)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            fail(f"--heal_lr: the loss is {losses[-1]} at step {step + 1}: lower it")
        bar.set_postfix_str(f"KL {losses[-1]:.4f}")
    last = losses[-max(1, steps // 10) :]
    tokens = steps * windows[0][0].numel()
    return dict(steps=steps, tokens=tokens, seconds=round(time.time() - start, 1), training_kl=sum(last) / len(last))


# -- quantised matrices -----------------------------------------------------------------------------------------------


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
    def __init__(self, table, bias):
        super().__init__()
        self.table, self.bias = [table], bias  # a list hides it from nn.Module, so its parameters are not counted twice

    def forward(self, h):
        return F.linear(h, self.table[0].matrix, self.bias)


def make_trainable(hf, coded):
    """Replace a model's quantised matrices {name: CodedMatrix} by TrainableCodes -> {name: TrainableCodes}."""
    codes = {name: TrainableCodes(made) for name, made in coded.items()}
    for name, made in codes.items():
        if name not in TABLES:
            parent, _, last = name.rpartition(".")
            setattr(hf.get_submodule(parent), last, TrainableLinear(made, hf.get_submodule(name).bias))
    if "wte" in codes:
        table = TrainableTable(codes["wte"], float(getattr(hf.get_input_embeddings(), "embed_scale", 1.0)))
        bias = hf.get_output_embeddings().bias
        hf.set_input_embeddings(table)
        hf.set_output_embeddings(TrainableLinear(codes["head"], bias) if "head" in codes else TrainableHead(table, bias))
    return codes


def heal_coded(hf, coded, teacher, windows, recipe):
    """
    Heal a quantised copy of the model, hf -> ({name: CodedMatrix} after healing, distil()'s result).

    hf is changed in place: its norms, and its linear layers that are not quantised.
    """
    torch.manual_seed(recipe.seed)
    norms = [p for name, p in hf.named_parameters() if p.dim() == 1 and "norm" in name]
    codes = make_trainable(hf, coded)
    student = Subject(hf)
    adapters = adapters_of(student, recipe.rank)
    around = [p for made in codes.values() for p in made.parameters()] + norms
    for p in around:
        p.requires_grad_(True)
    groups = [dict(params=around, lr=RATE * recipe.lr)] + [dict(params=adapters, lr=recipe.lr)] * bool(adapters)
    found = distil(student, teacher, windows, recipe, groups)
    merge_adapters(hf)
    return {name: made.healed() for name, made in codes.items()}, found
