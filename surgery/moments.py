"""Second moments of a model's layers and of its token table, gathered on calibration text."""

import torch
import torch.nn as nn
from tqdm import tqdm

from common.cli import fail
from common.files import written_whole
from common.untrusted import COUNT, expect, load_tensors, reading
from kv_cache.hf_layers import heights
from training.checkpoint import check_tensor
from util_factorization import MATRIX_METHODS, METHODS, MOMENTS
from util_factorization.calibrate import calibrate


class Moments:
    """
    A context. While it is open, it sums for every layer C = sum x x^T over inputs x. If gradients flow, it also sums
    G = sum g g^T over the loss's gradients g at the outputs, with the rows of q, k and v side by side. float32.

    windows: calibration text, a list of (x, y).
    """

    def __init__(self, layers, windows=()):
        self.layers, self.windows, self.tokens = layers, windows, 0
        self.C, self.G = {}, {}

    def __enter__(self):
        self.hooks = [hook for layer in self.layers for hook in self._watch(layer)]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def _watch(self, layer):
        gradients = {}

        def add(to, x):
            x = x.detach().flatten(0, -2).float()
            to[layer.name] = to.get(layer.name, 0) + (x.T @ x).cpu()

        def of_gradient(name, g):
            gradients[name] = g
            if len(gradients) == len(layer.linears):
                add(self.G, torch.cat([gradients[n] for n in layer.linears], -1))
                gradients.clear()

        def of_output(name, first):
            def hook(module, inputs, output):
                if first:
                    add(self.C, inputs[0])
                    self.tokens += inputs[0][..., 0].numel() if layer is self.layers[0] else 0
                if output.requires_grad:
                    output.register_hook(lambda g: of_gradient(name, g))

            return hook

        names = list(layer.linears)
        return [layer.linears[n].register_forward_hook(of_output(n, n == names[0])) for n in names]

    def of(self, stack):
        """E[x x^T] and E[g g^T] of a stack, a list of (layer, target). The second is None if no gradients flowed."""
        C = torch.stack([self.C[layer.name] for layer, _ in stack]).mean(0) / self.tokens
        if not self.G:
            return C, None
        if len({layer.name for layer, _ in stack}) == 1:  # within a layer the targets' gradients correlate
            layer = stack[0][0]
            rows = torch.cat([layer.rows[target] for _, target in stack])
            return C, self.G[layer.name][rows][:, rows] / self.tokens
        parts = [self.of([part])[1] for part in stack]
        return C, torch.block_diag(*parts)


def calibration(args, points, subject, layers, texts, file):
    """
    Gather what the points need -> (Moments of q, k and v, or None; a dict of decompose_table's inputs).

    texts: a TextReader. file: stores the moments, so that a continued sweep reads them. They depend on the folder's settings
    only.
    """
    table_needs = set().union(*(METHODS[p.method] for p in points if p.of_table))
    matrix_needs = set().union(*(MATRIX_METHODS[p.method] for p in points if p.method and not p.of_table))
    if not table_needs and not matrix_needs:
        return None, {}
    widest = subject.config.n_embd
    for layer in layers:
        widest = max(widest, sum(heights([(layer, "k"), (layer, "v")])))
    count = -(-args.calib_tokens // args.window)
    windows, counts = texts.calibration_windows(count, 2 * widest)
    moments, table = Moments(layers if matrix_needs else [], windows), dict(counts=counts)
    if matrix_needs or table_needs & MOMENTS:
        gradients = "G" in matrix_needs or "lookup" in table_needs
        kept = read_moments(file, shapes_of(layers, subject)) if file.exists() else dict(C={}, head=None, lookup=None)
        gradients |= kept["lookup"] is not None  # keep G if an earlier sweep gathered it
        enough = kept["head"] is not None and kept["C"].keys() >= {layer.name for layer in moments.layers}
        if not enough or (gradients and kept["lookup"] is None):
            kept = finite_moments(gather(args, moments, windows, subject, gradients), shapes_of(layers, subject))
            with written_whole(file, "make room, or choose another --out_dir") as part:
                torch.save(kept, part)
        table |= {name: kept[name] for name in ("head", "lookup")}
        moments.C, moments.G, moments.tokens = kept["C"], kept["G"], kept["tokens"]
    return moments if matrix_needs else None, table


def gather(args, moments, windows, subject, gradients):
    torch.manual_seed(args.seed)
    pairs = ((x.numpy(), y.numpy()) for x, y in tqdm(windows, desc="calibration", unit="window"))
    with moments:
        head, lookup = calibrate(subject, pairs, args.device, gradients, sampled=True)
    return dict(head=head, lookup=lookup, C=moments.C, G=moments.G, tokens=moments.tokens)


# -- stored in a file ---------------------------------------------------------------------------------------------------


def shapes_of(layers, subject):
    """{path of keys into gather()'s result: shape}"""
    d = subject.table.weight.shape[1]
    shapes = {("head",): (d, d), ("lookup",): (d, d)}
    for layer in layers:
        n_out = sum(len(rows) for rows in layer.rows.values())
        shapes |= {("C", layer.name): (layer.width, layer.width), ("G", layer.name): (n_out, n_out)}
    return shapes


def check_moments(kept, shapes):
    """Raise ValueError if a stored moment has the wrong shape or contains NaN or infinity."""
    expect(kept, dict(tokens=COUNT))
    for (group, *names), shape in shapes.items():
        found = kept.get(group)
        if names and found:  # moments of layers: an earlier call may have gathered none
            expect(found, {names[0]: torch.Tensor}, group)
            found = found[names[0]]
        if found is not None and not (names and found == {}):
            expect(found, torch.Tensor, group)
            check_tensor(" of ".join([group, *names]), found, shape)


def read_moments(file, shapes):
    """The moments that an earlier call stored, checked."""
    with reading(file, "the moments of this sweep", "delete it, then they are gathered again"):
        kept = load_tensors(file)
        check_moments(kept, shapes)
    return kept


def finite_moments(kept, shapes):
    """The same moments. The program ends in one line if they contain NaN or infinity."""
    try:
        check_moments(kept, shapes)
    except ValueError as error:
        fail(f"--model computes numbers that are not finite on the calibration text ({error}): give another model")
    return kept


# -- for matrices by bits ---------------------------------------------------------------------------------------------


def find_linears(model, head):
    """{name: Linear} of the layers that have float weights, without the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and module.weight.is_floating_point()
    }


class LinearMoments:
    """
    A context. While it is open and gradients flow, it sums for every linear layer y = W x, over tokens t with the loss's
    gradient g_t at y, in float32:

        C = sum |g_t|^2 x_t x_t^T / sum |g_t|^2   [in,in]   inputs, weighted by their effect on the loss
        squares = sum g_t^2                       [out]     weight of each row

    An error E of W then costs sum_t (g_t E x_t)^2 / 2, about sum_i squares_i e_i C e_i^T / 2. K-FAC's C gives all tokens the
    same weight. That is wrong here: the largest inputs belong to tokens whose gradient is nearly 0 (attention sinks).
    """

    def __init__(self, linears):
        self.linears, self.tokens = linears, 0
        self.inputs, self.squares = {}, {}

    def __enter__(self):
        self.hooks = [module.register_forward_hook(self._hook(name)) for name, module in self.linears.items()]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def _hook(self, name):
        def hook(module, inputs, output):
            x = inputs[0].detach().flatten(0, -2).float()
            self.tokens += len(x) if name == next(iter(self.linears)) else 0
            if output.requires_grad:
                output.register_hook(lambda g: self._add(name, x, g.detach().flatten(0, -2).float()))

        return hook

    def _add(self, name, x, g):
        x = x * g.norm(dim=1, keepdim=True)
        self.inputs[name] = self.inputs.get(name, 0) + (x.T @ x).cpu()
        self.squares[name] = self.squares.get(name, 0) + g.square().sum(0).cpu()

    def of(self, name):
        """(C [in,in], squares per token [out]) of a layer."""
        return self.inputs[name] / self.squares[name].sum().clamp(min=1e-30), self.squares[name] / self.tokens

    def state(self):
        """The sums as plain values and tensors, for load()."""
        return dict(inputs=self.inputs, squares=self.squares, tokens=self.tokens)

    def load(self, state):
        self.inputs, self.squares, self.tokens = (state[k] for k in ("inputs", "squares", "tokens"))
