"""
A whole model by bits: its linear layers and its token table share one budget of bytes.

What an error of each matrix costs is known up to a factor: the metric is of second order, takes two factors for independent,
and adds the layers' errors up. So the layers of each kind (q_proj, down_proj, ... and the table) are coded alone
once, at PROBE_BITS. The KL divergence that this costs on calibration text, over what the metric forecast, is the kind's price.
"""

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from tqdm import tqdm

from bits.encode import (
    choose,
    code,
    depths_of,
    draft_layer,
    draft_table,
    fit,
    row_weights,
    spend_over,
)
from bits.trellis import distortion, gaussian_codes
from common.files import written_whole
from surgery.evaluator import Evaluator
from surgery.linears import LinearMoments, find_linears
from surgery.moments import finite_moments, read_moments
from util_factorization.calibrate import calibrate

PROBE_BITS = 3
PROBES = 3  # windows of calibration text on which prices are measured
TABLES = ("wte", "head")


def kind_of(name):
    """What layers of one kind share: the last part of the name, as in q_proj."""
    return name.rsplit(".", 1)[-1]


@contextmanager
def in_place(module, W):
    """A context in which a module has the weight W. Who shares the weight's parameter, as a tied head does, has it too."""
    before = module.weight.data
    try:
        module.weight.data = W.to(before)
        yield
    finally:
        module.weight.data = before


@contextmanager
def coded_in(matrices, coded):
    """A context in which the modules of `matrices` have the weights of the CodedMatrix objects, in the same order."""
    with ExitStack() as stack:
        for module, made in zip(matrices.values(), coded):
            stack.enter_context(in_place(module, made.matrix()))
        yield


@dataclass
class WholeMoments:
    """What draft_all() reads: weights [V] of the table's rows, C and G [d,d] of calibrate(), LinearMoments of all layers."""

    weights: torch.Tensor
    C: torch.Tensor
    G: torch.Tensor
    linears: LinearMoments


def whole_moments(subject, counts, windows, file):
    """One pass over windows, a list of (x, y) -> WholeMoments. counts [V]: of the text. file: keeps them for a later call."""
    linears = LinearMoments(find_linears(subject.model, subject.head))
    names = {name: module.weight.shape for name, module in linears.linears.items()}
    d = subject.table.weight.shape[1]
    shapes = {("C",): (d, d), ("G",): (d, d)}
    shapes |= {("inputs", name): (n_in, n_in) for name, (_, n_in) in names.items()}
    shapes |= {("squares", name): (n_out,) for name, (n_out, _) in names.items()}
    if file.exists():
        kept = read_moments(file, shapes)
    else:
        pairs = ((x.numpy(), y.numpy()) for x, y in tqdm(windows, "calibration", unit="window"))
        with linears:
            C, G = calibrate(subject, pairs, subject.table.weight.device, gradients=True, sampled=True)
        kept = finite_moments(dict(C=C, G=G, **linears.state()), shapes)
        with written_whole(file, "make room, or choose another --out_dir") as part:
            torch.save(kept, part)
    linears.load(kept)
    return WholeMoments(row_weights(counts), kept["C"], kept["G"], linears)


def matrices_of(subject, targets):
    """{name: module}. targets: "wte", the token table, and the head where that is another matrix; "all": linear layers too."""
    tables = {"wte": subject.table}
    if "head" in subject.tables:
        tables["head"] = subject.head
    return tables if targets == "wte" else {**find_linears(subject.model, subject.head), **tables}


class Coder:
    """Codes a model's matrices at one budget after another."""

    def __init__(self, subject, targets, texts, tokens, seed, file):
        """texts: a TextReader; tokens: of calibration text; file: keeps the moments for a later call."""
        self.matrices, self.subject, self.texts = matrices_of(subject, targets), subject, texts
        self.numbers = sum(module.weight.numel() for module in self.matrices.values())
        windows, counts = texts.calibration_windows(-(-tokens // texts.length), 2 * subject.table.weight.shape[1])
        torch.manual_seed(seed)
        self.moments = whole_moments(subject, counts, windows, file)

    @cached_property
    def drafts(self):
        """{name: Draft}; where there are several kinds of matrices, their prices are measured."""
        drafts = draft_all(self.matrices, self.moments)
        if len(drafts) > 1:
            prices = set_prices(drafts, self.matrices, Evaluator(self.subject, self.texts.windows("calib", PROBES)))
            print("price of an error:", ", ".join(f"{kind} {price:.2f}" for kind, price in prices.items()), flush=True)
        return drafts

    def code(self, share, drafts=None, codes=None):
        """
        {name: CodedMatrix} that take `share` of the matrices' float16 bytes together, and their bytes.

        drafts: others than the Coder's own. codes: of fit(). Raises ValueError where the share does not pay.
        """
        drafts, budget = drafts or self.drafts, share * 2 * self.numbers
        drafts = dict(zip(drafts, choose(list(drafts.values()), budget, codes)))
        depths, codes = fit(list(drafts.values()), budget, codes)
        pairs = tqdm(zip(drafts.items(), depths), "rounding", total=len(drafts), leave=False)
        coded = {name: code(draft, bits, codes) for (name, draft), bits in pairs}
        return coded, sum(made.bytes() for made in coded.values())


def metrics_of(matrices, moments):
    """{name: metric [d,d]} of the tables: C + G of a tied one, else of each use its own."""
    if "head" in matrices:
        return dict(wte=moments.G, head=moments.C)
    return dict(wte=moments.C + moments.G)


def draft_all(matrices, moments):
    """{name: Draft} of matrices_of(). moments: WholeMoments"""
    metrics, drafts = metrics_of(matrices, moments), {}
    for name, module in tqdm(matrices.items(), "what bits are worth", leave=False):
        W = module.weight.data.float().cpu()
        if name in TABLES:
            drafts[name] = draft_table(W, moments.weights, metrics[name])
        else:
            drafts[name] = draft_layer(W, *moments.linears.of(name))
    return drafts


def set_prices(drafts, matrices, evaluator):
    """Multiply the worth of the Drafts of each kind by its price. evaluator: on calibration text."""
    codes, kinds = gaussian_codes(window=1), defaultdict(list)
    for name in drafts:
        kinds[kind_of(name)].append(name)
    found = {}
    for kind, names in kinds.items():
        chosen = [drafts[name] for name in names]
        steps = spend_over(chosen, PROBE_BITS * sum(draft.Z.numel() for draft in chosen), codes)
        errors = torch.tensor(distortion(codes)[1], dtype=torch.float64)
        forecast = sum((draft.worth * errors[s]).sum().item() for draft, s in zip(chosen, steps)) / 2
        made = [code(draft, depths_of(s, codes), codes) for draft, s in zip(chosen, steps)]
        with coded_in({name: matrices[name] for name in names}, made):
            found[kind] = max(evaluator.measure()["kl"], 0.0) / forecast if forecast else 0.0
    for name, draft in drafts.items():
        for each in filter(None, (draft, draft.without)):
            each.worth *= found[kind_of(name)]
    return found
