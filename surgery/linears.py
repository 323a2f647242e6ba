"""The linear layers of a model's trunk, and what an error in each of them costs."""

import torch.nn as nn


def find_linears(model, head):
    """{name: Linear} of the trunk, not of the head; those of float weights."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and module.weight.is_floating_point()
    }


class LinearMoments:
    """
    A context: while it is open it gathers, of every linear layer, C = sum x x^T of its input [in,in] and, where gradients flow,
    the sum of squares of the loss's gradient at its outputs [out]; float32. Layers that read the same tensor share one C.
    """

    def __init__(self, linears):
        self.linears, self.tokens = linears, 0
        self.inputs, self.squares = {}, {}  # C by the name of the first layer that reads this input; squares by name
        self.reads = {}  # name -> that first name

    def __enter__(self):
        self.last = None, None  # the tensor read last, and who read it first
        self.hooks = [module.register_forward_hook(self._hook(name)) for name, module in self.linears.items()]
        return self

    def __exit__(self, *error):
        self.last = None, None
        for hook in self.hooks:
            hook.remove()

    def _hook(self, name):
        def hook(module, inputs, output):
            if self.last[0] is not inputs[0]:
                self.last = inputs[0], name
                x = inputs[0].detach().flatten(0, -2).float()
                self.inputs[name] = self.inputs.get(name, 0) + (x.T @ x).cpu()
                self.tokens += len(x) if name == next(iter(self.linears)) else 0
            self.reads[name] = self.last[1]
            if output.requires_grad:
                output.register_hook(lambda g: self._add_gradient(name, g))

        return hook

    def _add_gradient(self, name, g):
        self.squares[name] = self.squares.get(name, 0) + g.detach().flatten(0, -2).float().square().sum(0).cpu()

    def of(self, name):
        """(C = E[x x^T] [in,in], E[g^2] [out]) of a layer."""
        return self.inputs[self.reads[name]] / self.tokens, self.squares[name] / self.tokens

    def state(self):
        """What load() reads: plain values and tensors."""
        return dict(inputs=self.inputs, squares=self.squares, reads=self.reads, tokens=self.tokens)

    def load(self, state):
        for name in ("inputs", "squares", "reads", "tokens"):
            setattr(self, name, state[name])
