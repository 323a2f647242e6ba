"""The rows of the study of bytes: a model's matrices replaced as a row says, and what that loses."""

import math
from contextlib import ExitStack, contextmanager

import torch
from tqdm import tqdm

from bits.encode import decompose_by, draft_layer, draft_table, groups_by_weight
from bits.integers import in_groups
from bits.trellis import float16_code
from surgery.coded import TABLES, Coder, coded_in, in_place, metrics_of

DAMPING = 0.01  # of the metric of error-aware rounding, as GPTQ has it


class Measurer:
    """Measures rows of one system. A row's matrices are put in, measured, and put back."""

    def __init__(self, args, subject, targets, texts, evaluator, file):
        """targets: of matrices_of(). texts: a TextReader. file: keeps the moments for a later call."""
        self.coder = Coder(subject, targets, texts, args.calib_tokens, args.seed, file)
        self.matrices, self.moments, self.numbers = self.coder.matrices, self.coder.moments, self.coder.numbers
        self.metrics = metrics_of(self.matrices, self.moments)
        self.evaluator = evaluator

    def measure(self, row):
        with self.replaced(row) as size:
            record = self.evaluator.untouched if row.name == "untouched" else self.evaluator.measure()
        return dict(bytes=size, share=size / (2 * self.numbers)) | record

    @contextmanager
    def replaced(self, row):
        """A context in which the matrices are the row's; gives their bytes."""
        if row.name == "untouched":
            yield 2 * self.numbers
        elif row.name.startswith("bits") or row.name == "ranks by frequency":
            coded, size = self.coded(row)
            with coded_in(self.matrices, coded.values()):
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
        """What Coder.code() gives for a row. Of ranks by frequency the bytes are those of one rank for all, in float16."""
        if row.name == "ranks by frequency":
            share = row.given[0] * sum(sum(m.weight.shape) for m in self.matrices.values()) / self.numbers
            return self.coder.code(share, codes=[float16_code()])
        return self.coder.code(*row.given, self.drafts_without(row.name))

    def drafts_without(self, name):
        """{name: Draft} of the table with one part of the method left out; None for the whole method."""
        if name == "bits":
            return None
        weights, found = self.moments.weights, {}
        for table, metric in self.metrics.items():
            W = self.matrices[table].weight.data.float()
            if name == "bits in one group":
                found[table] = draft_table(W, weights, metric, [weights.argsort(descending=True)])
            elif name == "bits without parents":
                found[table] = draft_table(W, weights, metric, parents=False)
            else:  # no rotation
                found[table] = draft_layer(W, metric, weights, groups_by_weight(weights))
        return found

    def plain(self, row, name, W):
        """A row of plain quantisation or of a rank -> (the matrix as read back, its bytes)."""
        if row.name == "rank":
            decomposition = decompose_by(W, self.moments.weights, self.metrics[name])
            Z, P, mean = (part.half().float() for part in decomposition.factors(row.given[0]))
            return torch.addmm(mean, Z, P), 2 * (Z.numel() + P.numel() + mean.numel())
        bits, group = row.given
        metric = None
        if row.name == "error-aware":
            metric = self.metrics[name] if name in TABLES else self.moments.linears.of(name)[0]
            metric = metric + DAMPING * metric.diagonal().mean() * torch.eye(len(metric))
        group = W.shape[1] if group == "row" else math.gcd(group, W.shape[1])  # groups that fit the width
        return in_groups(W, bits, group, metric)
