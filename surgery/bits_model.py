"""
Quantise all matrices of a model: its linear layers and its token table share one budget of bytes.

The cost of an error is known up to a factor for each matrix: the metric is of second order, assumes two independent factors,
and sums the layers' errors. So all matrices of one kind (q_proj, down_proj, ... or the table) are quantised alone once, at
PROBE_BITS. The KL divergence that this causes on calibration text, divided by the metric's forecast, is the kind's price.
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
from surgery.moments import LinearMoments, find_linears, finite_moments, read_moments
from util_factorization.calibrate import calibrate

PROBE_BITS = 3
PROBES = 3  # windows of calibration text on which prices are measured
TABLES = ("wte", "head")


def kind_of(name):
    """The kind of a layer: the last part of its name, such as q_proj."""
    return name.rsplit(".", 1)[-1]


@contextmanager
def in_place(module, W):
    """A context in which a module has the weight W. A module that shares the parameter, such as a tied head, has it too."""
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
    """Input of draft_all(): weights [V] of the table's rows, C and G [d,d] of calibrate(), LinearMoments of all layers."""

    weights: torch.Tensor
    C: torch.Tensor
    G: torch.Tensor
    linears: LinearMoments


def whole_moments(subject, counts, windows, file):
    """One pass over windows, a list of (x, y) -> WholeMoments. counts [V]: of the tokens. file: keeps them for later calls."""
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
    """{name: module}. targets: "wte" is the token table and an untied head; "all" adds the linear layers."""
    tables = {"wte": subject.table}
    if "head" in subject.tables:
        tables["head"] = subject.head
    return tables if targets == "wte" else {**find_linears(subject.model, subject.head), **tables}


class Coder:
    """Quantises a model's matrices, for any number of budgets."""

    def __init__(self, subject, targets, texts, tokens, seed, file):
        """texts: a TextReader. tokens: of calibration text. file: stores the moments for a later call."""
        self.matrices, self.subject, self.texts = matrices_of(subject, targets), subject, texts
        self.numbers = sum(module.weight.numel() for module in self.matrices.values())
        windows, counts = texts.calibration_windows(-(-tokens // texts.length), 2 * subject.table.weight.shape[1])
        torch.manual_seed(seed)
        self.moments = whole_moments(subject, counts, windows, file)

    @cached_property
    def drafts(self):
        """{name: Draft}. If there are several matrices, the prices of their kinds are measured."""
        drafts = draft_all(self.matrices, self.moments)
        if len(drafts) > 1:
            prices = set_prices(drafts, self.matrices, Evaluator(self.subject, self.texts.windows("calib", PROBES)))
            print("price of an error:", ", ".join(f"{kind} {price:.2f}" for kind, price in prices.items()), flush=True)
        return drafts

    def code(self, share, drafts=None, codes=None):
        """
        Quantise all matrices to `share` of their float16 bytes together -> ({name: CodedMatrix}, their bytes).

        drafts: replace the Coder's own. codes: as in fit(). Raises ValueError if the share is too small.
        """
        drafts, budget = drafts or self.drafts, share * 2 * self.numbers
        drafts = dict(zip(drafts, choose(list(drafts.values()), budget, codes)))
        depths, codes = fit(list(drafts.values()), budget, codes)
        pairs = tqdm(zip(drafts.items(), depths), "rounding", total=len(drafts), leave=False)
        coded = {name: code(draft, bits, codes) for (name, draft), bits in pairs}
        return coded, sum(made.bytes() for made in coded.values())


def metrics_of(matrices, moments):
    """{name: metric [d,d]} of the tables. Tied table: C + G. Untied: the head uses C, the lookup uses G."""
    if "head" in matrices:
        return dict(wte=moments.G, head=moments.C)
    return dict(wte=moments.C + moments.G)


def draft_all(matrices, moments):
    """{name: Draft} for matrices_of(). moments: WholeMoments"""
    metrics, drafts = metrics_of(matrices, moments), {}
    for name, module in tqdm(matrices.items(), "importance of components", leave=False):
        W = module.weight.data.float().cpu()
        if name in TABLES:
            drafts[name] = draft_table(W, moments.weights, metrics[name])
        else:
            drafts[name] = draft_layer(W, *moments.linears.of(name))
    return drafts


def set_prices(drafts, matrices, evaluator):
    """Multiply the importance (Draft.worth) of each kind of matrix by its price. evaluator: on calibration text."""
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
