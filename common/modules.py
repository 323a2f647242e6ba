"""Small things that torch.nn lacks."""

import copy

import torch.nn as nn


def linear(weight, bias=None):
    """A Linear with copies of weight [out,in] and bias [out] or None."""
    n_out, n_in = weight.shape
    made = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    made.weight.data.copy_(weight)
    if bias is not None:
        made.bias.data.copy_(bias)
    return made


def shared_copy(module, **children):
    """A copy of a module that shares its parameters and submodules, save for the children that are given."""
    twin = copy.copy(module)
    twin._modules = module._modules | children
    return twin
