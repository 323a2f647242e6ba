"""Rows of the study of bytes: replaces a model's matrices, or rounds or quantises its cache, and measures the loss."""

import copy
import math
from contextlib import ExitStack, contextmanager

import torch
from tqdm import tqdm

from bits.encode import decompose_by, draft_layer, draft_table, groups_by_weight
from bits.integers import in_groups
from bits.trellis import float16_code
from kv_cache.bit_code import WHOLE
from kv_cache.bit_fit import blocks_for, cache_bits, fit, gather, kept_of_id
from kv_cache.hf_bits import install_cache
from kv_cache.hf_layers import find_layers
from surgery.bits_model import TABLES, Coder, coded_in, in_place, metrics_of
from surgery.subject import Subject

DAMPING = 0.01  # share of the mean diagonal that is added to the metric of error-aware rounding, as in GPTQ


class Measurer:
    """Measures rows of one system. A row's matrices are set, measured, and then restored."""

    def __init__(self, args, subject, targets, texts, evaluator, file):
        """targets: as in matrices_of(). texts: a TextReader. file: stores the moments for a later call."""
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
        """A context in which the model has the row's matrices. It yields their bytes."""
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
        """Coder.code() for a row. Ranks by frequency get the float16 bytes of one rank for all."""
        if row.name == "ranks by frequency":
            share = row.given[0] * sum(sum(m.weight.shape) for m in self.matrices.values()) / self.numbers
            return self.coder.code(share, codes=[float16_code()])
        return self.coder.code(*row.given, self.drafts_without(row.name))

    def drafts_without(self, name):
        """{name: Draft} of the table without one part of the method; None for the complete method."""
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
        """A row of plain quantisation or of a rank -> (the decoded matrix, its bytes)."""
        if row.name == "rank":
            decomposition = decompose_by(W, self.moments.weights, self.metrics[name])
            Z, P, mean = (part.half().float() for part in decomposition.factors(row.given[0]))
            return torch.addmm(mean, Z, P), 2 * (Z.numel() + P.numel() + mean.numel())
        bits, group = row.given
        metric = None
        if row.name == "error-aware":
            metric = self.metrics[name] if name in TABLES else self.moments.linears.of(name)[0]
            metric = metric + DAMPING * metric.diagonal().mean() * torch.eye(len(metric))
        group = W.shape[1] if group == "row" else math.gcd(group, W.shape[1])  # groups must divide the width
        return in_groups(W, bits, group, metric)


# -- caches -----------------------------------------------------------------------------------------------------------

FORMS = {"bits": "small", "bits read in place": "fast"}  # {a row's name: form of the quantised cache}


class CacheMeasurer:
    """Measures rows. A row has its own model, or hooks that round keys and values as they are computed."""

    def __init__(self, args, subject, texts, evaluator, parts):
        """texts: a TextReader. parts: of check_cache()."""
        self.subject, self.window = subject, args.window
        self.layers, self.parts = find_layers(subject.model), parts
        self.evaluator = evaluator
        self.windows, _ = texts.calibration_windows(-(-args.calib_tokens // args.window))
        self.seed, self.found = args.seed, None

    def measure(self, row):
        with self.replaced(row) as (model, share):
            record = self.evaluator.untouched if row.name == "untouched" else self.evaluator.measure(model)
        return dict(bytes=round(share * self.float16_bytes()), share=share) | record

    def float16_bytes(self):
        """Bytes of a token's keys and values in float16."""
        return 2 * sum(len(layer.rows["k"]) + len(layer.rows["v"]) for layer in self.layers)

    @contextmanager
    def replaced(self, row):
        """A context: (the model with the row's cache, its bytes over one window as a share of float16's)."""
        if row.name == "untouched":
            yield self.subject, 1.0
        elif row.name == "to nearest":
            bits, group = row.given
            widths = [len(layer.rows[part]) for layer in self.layers for part in "kv"]
            group = math.gcd(*widths, *[group] * (group != "row"))
            with rounded(self.layers, bits, group):
                yield self.subject, (bits + 32 / group) / 16
        else:
            model, taken = self.coded(row)
            yield model, taken / self.float16_bytes()

    def coded(self, row):
        """-> (a model with a quantised cache, bytes per token over one window, with the first positions, which stay exact)."""
        if self.found is None:
            torch.manual_seed(self.seed)
            self.found = gather(self.subject, self.windows)
        hf, form, whole = self.subject.model, FORMS[row.name], WHOLE / self.window
        codes = fit(*self.found, cache_bits(hf, row.given[0] - whole, form), blocks_for(hf, form))
        hf = copy.deepcopy(hf)
        install_cache(hf, codes, self.parts)
        taken = sum(code.bytes_per_token for code in codes) + kept_of_id(hf, form)
        return Subject(hf), taken + whole * self.float16_bytes()


@contextmanager
def rounded(layers, bits, group):
    """A context that rounds keys and values to the nearest integers of `bits` bits, in groups with a scale each."""

    def hook(module, inputs, output):
        return in_groups(output.flatten(0, 1), bits, group)[0].view_as(output)

    parts = [layer.linears[f"{layer.name}.{part}"] for layer in layers for part in ("k_proj", "v_proj")]
    hooks = [part.register_forward_hook(hook) for part in parts]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
