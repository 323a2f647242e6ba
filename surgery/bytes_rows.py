"""The rows of the study of bytes: a model's matrices replaced as a row says, and what that loses."""

import math
from contextlib import ExitStack, contextmanager

import torch
from tqdm import tqdm

from surgery.coded import TABLES, Coder, coded_in, in_place, metrics_of
from surgery.evaluator import Evaluator
from util_factorization.bits import spend
from util_factorization.coding import decompose_by, draft_layer, draft_table, groups_by_weight
from util_factorization.parents import spread, told_by_parents
from util_factorization.rounding import in_groups

DAMPING = 0.01  # of the metric of error-aware rounding, as GPTQ has it


class Measurer:
    """Measures rows of one system. A row's matrices are put in, measured, and put back."""

    def __init__(self, args, subject, texts, file):
        """texts: a TextReader. file: keeps the moments for a later call."""
        targets = "wte" if args.system == "table" else "all"
        self.coder = Coder(subject, targets, texts, args.calib_tokens, args.seed, file)
        self.matrices, self.moments, self.numbers = self.coder.matrices, self.coder.moments, self.coder.numbers
        self.metrics = metrics_of(self.matrices, self.moments)
        self.evaluator = Evaluator(subject, texts.evaluation_windows(args.eval_windows))

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
            coded, size = self.coder.code(*row.given, self.drafts_without(row.name), in_order=row.name == "bits in order")
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

    def drafts_without(self, name):
        """{name: Draft} of the table with one part of the method left out; None for the whole method."""
        if name in ("bits", "bits in order"):
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
        if row.name == "ranks by frequency":
            V, d = W.shape
            return self.by_group(name, W, row.given[0] * (V + d))
        bits, group = row.given
        metric = None
        if row.name == "error-aware":
            metric = self.metrics[name] if name in TABLES else self.moments.linears.of(name)[0]
            metric = metric + DAMPING * metric.diagonal().mean() * torch.eye(len(metric))
        group = W.shape[1] if group == "row" else math.gcd(group, W.shape[1])  # groups that fit the width
        return in_groups(W, bits, group, metric)

    def by_group(self, name, W, numbers):
        """
        Each group of rows keeps the components that are worth most to it, in float16, and takes the others from the rows'
        parents -> (the matrix, its bytes).

        numbers: that pay for everything, of 2 bytes each. A component is kept whole or not at all: a rank is the case of
        bits.spend() whose one step takes the whole error away.
        """
        draft = draft_table(W, self.moments.weights, self.metrics[name])
        around = 2 * (draft.P.numel() + draft.mean.numel() + draft.means.numel()) + -(-draft.worth.numel() // 8)
        around += draft.bytes_of_parents()
        kept = spend(draft.worth.flatten(), draft.price().flatten(), numbers - around // 2, ([0, 1], [1, 0]))
        kept = kept.view_as(draft.worth)
        read, back, P = torch.zeros_like(draft.Z), torch.empty_like(W), draft.P.half().float()
        for rows, mean, mask in zip(draft.groups, draft.means, kept.bool()):
            read[rows] = draft.Z[rows].half().float() * mask
            if draft.parents is not None:
                by = spread(draft.Z[rows]).where(~mask, torch.inf)
                read[rows] += told_by_parents(draft.Z, read, draft.parents, rows, by)[0] * ~mask
            back[rows] = draft.mean + (read[rows] + mean.half()) @ P
        return back, around + 2 * (kept * draft.sizes[:, None]).sum().item()
