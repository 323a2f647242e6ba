"""Finds the attention layers of a model, and q, k and v in them."""

import torch
import torch.nn as nn

from common.cli import fail
from common.modules import linear

FUSED = ("query_key_value", "c_attn", "qkv_proj", "Wqkv", "qkv", "in_proj")  # names of a matrix that holds q, k and v


class Layer:
    """
    q, k and v of one attention layer.

    linears  {parameter name: module}: their joined outputs contain q, k and v, the targets
    rows     {"q": [out] indices, ...}: of each target in the joined outputs
    """

    def __init__(self, name, linears, rows):
        self.name, self.linears, self.rows = name, linears, rows

    def __repr__(self):
        return self.name

    @property
    def width(self):
        """Number of inputs per token."""
        return next(iter(self.linears.values())).weight.shape[1]

    @property
    def joined(self):
        """The weights of all linears, stacked: [sum of out, in]."""
        return torch.cat([linear.weight.data for linear in self.linears.values()])

    def weight(self, target):
        """[out,in], a copy."""
        return self.here(self.joined[self.rows[target]])

    def set_weight(self, target, W):
        self._set("weight", target, W)

    def set(self, target, W, bias):
        """W [out,in]; bias [out], or None if the layer has none."""
        self._set("weight", target, W)
        if bias is not None:
            self._set("bias", target, bias)

    def _set(self, kind, target, values):
        tensors = [getattr(linear, kind).data for linear in self.linears.values()]
        joined = torch.cat(tensors)
        joined[self.rows[target]] = values.to(joined)
        for tensor, part in zip(tensors, joined.split([len(x) for x in tensors])):
            if not torch.equal(tensor, part):
                tensor.copy_(part)

    @property
    def fused(self):
        return len(self.linears) == 1

    def bias(self, target):
        """[out], a copy, or None."""
        biases = [linear.bias for linear in self.linears.values()]
        return None if biases[0] is None else self.here(torch.cat([b.data for b in biases])[self.rows[target]])

    @staticmethod
    def here(t):
        """t on the CPU; a meta tensor stays as it is."""
        return t if t.is_meta else t.cpu()

    def linear(self, target):
        """A copy of a target as a separate Linear."""
        with torch.no_grad():
            return linear(self.weight(target), self.bias(target)).requires_grad_(False)

    def parameters_of(self, target):
        """Names of the parameters that contain a target."""
        ends = torch.tensor([len(x.weight) for x in self.linears.values()]).cumsum(0)
        touched = torch.unique(torch.searchsorted(ends, self.rows[target], right=True))
        return {f"{list(self.linears)[i]}.weight" for i in touched.tolist()}


def plain(name, linear):
    """Return `linear` if it is a Linear with float weights; otherwise fail, naming its type."""
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        fail(f"{name} is a {type(linear).__name__} that cannot be changed in place: give a model of plain float weights")
    return linear


class Turned:
    """A GPT-2 Conv1D, whose weight is [in,out], with the weight transposed as in a Linear."""

    def __init__(self, conv1d):
        self.weight, self.bias = conv1d.weight.T, conv1d.bias


def find_layers(model, conv1d=False):
    """
    All attention layers of a model. q, k and v are q_proj, k_proj and v_proj, or parts of the fused matrix of a GPT-NeoX.
    conv1d: accept the fused matrix of a GPT-2 too.

    For our GPT with compressed keys or values these are the projections before the compression. To add a model family, add its
    names here; Subject in subject.py has to know its table and its head.
    """
    layers = []
    for name, module in model.named_modules():
        linears = {f"{name}.{n}": getattr(module, n.rsplit(".")[-1], None) for n in ("q_proj", "k_proj", "v_proj")}
        if all(linear is not None for linear in linears.values()):
            sizes = [len(plain(part, linear).weight) for part, linear in linears.items()]
            rows = dict(zip("qkv", torch.arange(sum(sizes)).split(sizes)))
        elif hasattr(module, "query_key_value") and model.config.model_type.endswith("gpt_neox"):
            qkv = plain(f"{name}.query_key_value", module.query_key_value)
            linears = {f"{name}.query_key_value": qkv}
            # [H 3 n, in]: q, k and v of a head are neighbours
            by_head = torch.arange(len(qkv.weight)).unflatten(0, (model.config.num_attention_heads, 3, -1))
            rows = {target: by_head[:, i].flatten() for i, target in enumerate("qkv")}
        elif conv1d and hasattr(module, "c_attn"):
            linears = {f"{name}.c_attn": Turned(module.c_attn)}
            rows = dict(zip("qkv", torch.arange(module.c_attn.weight.shape[1]).chunk(3)))
        else:
            continue
        layers.append(Layer(name, linears, rows))
    if not layers:
        kind = model.config.model_type
        fused = next((n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in FUSED), None)
        why = f"q, k and v fused in {fused}" if fused else "no q_proj, k_proj and v_proj"
        fail(f"a {kind} has {why}: give a model with separate q, k and v (Llama, Mistral, Qwen, SmolLM2) or a GPT-NeoX")
    return layers


def stacks(layers, targets, mode, per_group):
    """Lists of (layer, target): the matrices of a list are decomposed as one stack. per_group: layers that share one basis."""
    if mode == "shared_layers":
        groups = [layers[i : i + per_group] for i in range(0, len(layers), per_group)]
        return [[(layer, target) for layer in group] for target in targets for group in groups]
    alone = [t for t in targets if mode != "shared_kv" or t == "q"]
    found = [[(layer, target)] for target in alone for layer in layers]
    return found + ([[(layer, "k"), (layer, "v")] for layer in layers] if mode == "shared_kv" else [])


def heights(stack):
    """Rows of each matrix of a stack."""
    return [len(layer.rows[target]) for layer, target in stack]
