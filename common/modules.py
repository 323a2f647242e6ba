"""Small modules, and how they are made and shared."""

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


class AtTable(nn.Module):
    """A GPT in three calls, split at its stored table wte [V,k], or [V,d] if dense. What passes between them has its width."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def lookup(self, idx):
        """Token ids (B, T) -> rows of wte (B, T, k)."""
        return self.gpt.transformer.wte(idx)

    def trunk(self, rows):
        """Rows of wte (B, T, k) -> what lm_head reads (B, T, k)."""
        t = self.gpt.transformer
        return t.scale_down(self.gpt.trunk(t.scale_up(rows)))

    def logits(self, h):
        """What lm_head reads (B, T, k) -> logits (B, T, V)."""
        return self.gpt.lm_head(h)
