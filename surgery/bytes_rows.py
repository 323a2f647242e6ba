"""The rows of the study of bytes: a model's matrices replaced as a row says, and what that loses."""

from contextlib import ExitStack, contextmanager

import torch
from tqdm import tqdm

from surgery.coded import TABLES, coded_in, draft_all, draft_of_table, in_place, matrices_of, set_prices, whole_model_moments
from surgery.evaluator import Evaluator
from util_factorization.coding import code, draft_layer, fit, levels_bytes
from util_factorization.decompose_table import decompose
from util_factorization.rounding import in_groups

PROBES = 3  # windows of calibration text on which prices are measured


class Measurer:
    """Measures rows of one system. A row's matrices are put in, measured, and put back."""

    def __init__(self, args, subject, texts, file):
        """texts: a TextReader. file: keeps the moments for a later call."""
        self.system, self.subject = args.system, subject
        self.matrices = matrices_of(subject, ("wte",) if args.system == "table" else ("all",))
        self.numbers = sum(module.weight.numel() for module in self.matrices.values())
        windows, counts = texts.calibration_windows(-(-args.calib_tokens // args.window))
        self.evaluator = Evaluator(subject, texts.evaluation_windows(args.eval_windows))
        self.probe = Evaluator(subject, texts.windows("calib", PROBES)) if args.system == "weights" else None
        torch.manual_seed(args.seed)
        linears = {name: module for name, module in self.matrices.items() if name not in TABLES}
        self.moments, self.drafts = whole_model_moments(subject, linears, counts, windows, file), {}

    def measure(self, row):
        with self.replaced(row) as size:
            record = self.evaluator.measure()
        return dict(bytes=size, share=size / (2 * self.numbers)) | record

    @contextmanager
    def replaced(self, row):
        """A context in which the matrices are the row's; gives their bytes."""
        if row.name == "untouched":
            yield 2 * self.numbers
        elif row.name.startswith("bits"):
            coded, size = self.coded(row)
            with coded_in(self.matrices, coded):
                yield size
        else:
            size = 0
            with ExitStack() as stack:
                for name, module in tqdm(self.matrices.items(), row.key, leave=False):
                    W, taken = self.plain(row, name, module.weight.data.float())
                    stack.enter_context(in_place(module, W))
                    size += taken
                yield size

    def coded(self, row):
        """A row of bits by component -> (CodedMatrix objects in the order of the matrices, their bytes)."""
        if row.name not in self.drafts:
            self.drafts = {row.name: list(self.draft(row.name).values())}
        drafts = self.drafts[row.name]
        bits, codes = fit(drafts, row.given[0] * 2 * self.numbers)
        coded = [code(*both, codes) for both in tqdm(list(zip(drafts, bits)), row.key, leave=False)]
        return coded, sum(made.bytes() for made in coded) + levels_bytes(codes)

    def draft(self, name):
        """{name: Draft} of all matrices, or of the table with one part of the method left out."""
        m = self.moments
        if name == "bits":
            drafts = draft_all(self.matrices, m)
            if self.probe:
                print("prices:", set_prices(drafts, self.matrices, self.probe), flush=True)
            return drafts
        W, metrics = self.matrices["wte"].weight.data.float(), m.C + m.G
        if name == "bits, no rotation":
            return dict(wte=draft_layer(W, metrics.sum(0), m.weights, m.groups))
        groups = [torch.cat(m.groups)] if name == "bits, one group" else m.groups
        metrics = metrics.sum(0)[None] if name == "bits, one group" else metrics
        return dict(wte=draft_of_table(W, m.weights, groups, metrics, feedback=name != "bits, no feedback"))

    def plain(self, row, name, W):
        """A row of plain quantisation or of a rank -> (the matrix as read back, its bytes)."""
        if row.name == "rank":
            total = (self.moments.C + self.moments.G).sum(0)
            decomposition = decompose(W, "fisher", self.moments.weights * 1e9, head=total, lookup=0 * total)
            Z, P, mean = (part.half().float() for part in decomposition.factors(row.given[0]))
            return torch.addmm(mean, Z, P), 2 * (Z.numel() + P.numel() + mean.numel())
        bits, group = row.given
        metric = None
        if row.name == "error-aware":
            metric = (self.moments.C + self.moments.G).sum(0) if name in TABLES else self.moments.linears.of(name)[0]
            metric = metric + 0.01 * metric.diagonal().mean() * torch.eye(len(metric))
        return in_groups(W, bits, min(group, W.shape[1]), metric)
