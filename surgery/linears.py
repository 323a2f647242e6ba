"""The linear layers of a model's trunk, and the cost of an error in each of them."""

import torch.nn as nn


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
