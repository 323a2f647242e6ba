"""Modules that replace a matrix, a token table or a head by low-rank factors: up @ down, up [out,r], down [r,in]."""

import torch
import torch.nn as nn
from torch.nn import functional as F


class LowRank(nn.Module):
    """y = up (down x) [+ bias], down [r,in], up [out,r]."""

    def __init__(self, down, up):
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x):
        return self.up(self.down(x))


class SharingLowRank(LowRank):
    """A LowRank that uses the `down` of another LowRank. That `down` may have become an adapted layer of PEFT."""

    def __init__(self, owner, up):
        nn.Module.__init__(self)
        self.owner, self.up = [owner], up  # in a list, so that its weights have one name

    @property
    def down(self):
        return self.owner[0].down


class Uncut(LowRank):
    """An uncut matrix, for attention that expects a LowRank."""

    def __init__(self, whole):
        nn.Module.__init__(self)
        self.down = whole

    def up(self, x):
        return x


class FactorizedTable(nn.Module):
    """The lookup: rows of wte [V,k], then scale_up [d,k]. Its bias is the mean row, if the method has one."""

    def __init__(self, wte, scale_up):
        super().__init__()
        self.wte, self.scale_up = wte, scale_up

    def forward(self, x):
        return self.scale_up(self.wte(x))


class FactorizedHead(nn.Module):
    """The head: scale_down [k,d], then wte [V,k]. It needs no mean. bias [V]: of the dense head, or None."""

    def __init__(self, wte, scale_down, bias=None):
        super().__init__()
        self.wte, self.scale_down, self.bias = wte, scale_down, bias

    def forward(self, h):
        return F.linear(self.scale_down(h), self.wte.weight, self.bias)


class TiedHead(FactorizedHead):
    """A FactorizedHead with the wte of a FactorizedTable."""

    def __init__(self, table, scale_down, bias=None):
        nn.Module.__init__(self)
        self.table, self.scale_down, self.bias = [table], scale_down, bias  # in a list, so that its weights have one name

    @property
    def wte(self):
        return self.table[0].wte

    def forward(self, h):
        wte = self.wte
        if isinstance(wte, nn.Embedding):
            return super().forward(h)
        rows = wte(torch.arange(len(wte.weight), device=h.device))  # so PEFT's adapters act in the head too
        return F.linear(self.scale_down(h), rows, self.bias)


def restore_sums(sums, up, bias):
    """
    Turn each head's weighted sum of latents into its output; the outputs are side by side.

    sums (B, H, r); up (G, r, n) of G value heads, each shared by H / G query heads; bias (G, n) or None -> (B, 1, H n)
    """
    y = sums.unflatten(1, (len(up), -1)) @ up  # (B, G, H/G, n)
    y = y if bias is None else y + bias[:, None]
    return y.flatten(1)[:, None]
