"""
A whole model by bits: its linear layers and its token table share one budget of bytes.

What an error of each matrix costs is known up to a factor: the metric is of second order, takes two factors for independent,
and adds the layers' errors up. So the layers of each kind (q_proj, down_proj, ... and the table) are coded alone
once, at PROBE_BITS. The KL divergence that this costs on calibration text, over what the metric forecast, is the kind's price.
"""

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.files import written_whole
from surgery.linears import LinearMoments, find_linears
from util_factorization.calibrate import calibrate_groups
from util_factorization.coding import code, draft_layer, draft_table, groups_by_weight, row_weights, spend_over
from util_factorization.decompose_table import decompose
from util_factorization.trellis import distortion, gaussian_codes

PROBE_BITS = 3
TABLES = ("wte", "head")
TOKENS = 1e9  # weights as counts, to which decompose() adds 1


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
    """What draft_all() reads: weights [V] and groups of the table's rows, C and G of each group, LinearMoments."""

    weights: torch.Tensor
    groups: list
    C: torch.Tensor
    G: torch.Tensor
    linears: LinearMoments


def whole_model_moments(subject, linears, counts, windows, file):
    """
    One pass over windows -> WholeMoments. counts [V]: of the text; linears: {name: Linear}. file: keeps them for a later call.
    """
    weights = row_weights(counts)
    groups, moments = groups_by_weight(weights), LinearMoments(linears)
    kept = torch.load(file, weights_only=True) if file.exists() else None
    if kept is None or not kept["squares"].keys() >= linears.keys():
        pairs = tqdm(windows, "calibration", unit="window")
        with moments:
            C, G = calibrate_groups(subject, pairs, groups)
        kept = dict(C=C, G=G, **moments.state())
        with written_whole(file, "make room, or choose another --out_dir") as part:
            torch.save(kept, part)
    moments.load(kept)
    return WholeMoments(weights, groups, kept["C"], kept["G"], moments)


def matrices_of(subject, targets):
    """{name: module} of what `targets` asks for: "wte", or "all": every linear layer and the table, a head of its own too."""
    tables = {"wte": subject.table}
    if "head" in subject.tables:
        tables["head"] = subject.head
    return tables if targets == ("wte",) else {**find_linears(subject.model), **tables}


def draft_all(matrices, moments):
    """{name: Draft} of matrices_of(). moments: WholeMoments"""
    uses = dict(wte=(moments.C if "head" not in matrices else 0 * moments.C) + moments.G, head=moments.C)
    drafts = {}
    for name, module in tqdm(matrices.items(), "what bits are worth", leave=False):
        W = module.weight.data.float().cpu()
        if name in TABLES:
            drafts[name] = draft_of_table(W, moments.weights, moments.groups, uses[name])
        else:
            drafts[name] = draft_layer(W, *moments.linears.of(name))
    return drafts


def draft_of_table(W, weights, groups, metrics, feedback=True):
    """metrics [G,d,d]: of each group; their sum is the metric of the basis. feedback: of errors, in the groups' metrics"""
    total = metrics.sum(0)
    decomposition = decompose(W, "fisher", weights * TOKENS, head=total, lookup=torch.zeros_like(total))
    return draft_table(decomposition, weights, groups, metrics if feedback else None)


def set_prices(drafts, matrices, evaluator):
    """Multiply the worth of the Drafts of each kind by its price. evaluator: on calibration text."""
    codes, kinds = gaussian_codes(window=1), defaultdict(list)
    for name in drafts:
        kinds[kind_of(name)].append(name)
    found = {}
    for kind, names in kinds.items():
        chosen = [drafts[name] for name in names]
        bits = spend_over(chosen, PROBE_BITS * sum(draft.Z.numel() for draft in chosen), codes)
        errors = torch.tensor(distortion(codes), dtype=torch.float64)
        forecast = sum((draft.worth * errors[b]).sum().item() for draft, b in zip(chosen, bits)) / 2
        with coded_in({name: matrices[name] for name in names}, [code(*both, codes) for both in zip(chosen, bits)]):
            found[kind] = max(evaluator.measure()["kl"], 0.0) / forecast
    for name, draft in drafts.items():
        draft.worth *= found[kind_of(name)]
    return found
