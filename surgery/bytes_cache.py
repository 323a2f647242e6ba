"""Rows of the study of bytes for the cache: its keys and values are rounded or quantised."""

import copy
import math
from contextlib import contextmanager

import torch

from bits.integers import in_groups
from kv_cache.bit_code import WHOLE, fit
from kv_cache.hf_bits import blocks_for, cache_bits, coded_layers, gather, install_cache, kept_of_id
from surgery.subject import Subject

FORMS = {"bits": "small", "bits read in place": "fast"}  # {a row's name: form of the quantised cache}


class CacheMeasurer:
    """Measures rows. A row has its own model, or hooks that round keys and values as they are computed."""

    def __init__(self, args, subject, texts, evaluator):
        """texts: a TextReader."""
        self.subject, self.window = subject, args.window
        self.layers = coded_layers(subject.model)
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
        install_cache(hf, codes)
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
