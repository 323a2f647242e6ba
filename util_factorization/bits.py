"""
What a bit is worth: a budget of bits goes where it lowers the error most.

In the coordinates Z of a `fisher` basis an error counts the same in every component: P (C + G) P^T = 1. A component of
variance v costs v c(b) when its numbers are kept at b bits. c falls from 1 at 0 bits, where the component is dropped, by about
a factor of four a bit. The next bit of a component is worth v (c(b) - c(b + 1)). Bits are spent one at a time where they are
worth most: reverse water-filling. At the end every kept component has about the same error left, the water level. Components
whose variance lies below the level get no bits.

A rank is the special case of 0 or 16 bits. Plain quantisation is the case of one depth for all components.
"""

import torch


def gains(worth, price, distortion):
    """
    What each bit of each component saves, for each bit of the budget: [B,n], falling in B.

    worth [n]     the variance of a component, times the weight of its rows
    price [n]     what one bit of a component costs: its rows
    distortion    c(0) = 1, c(1), ..., falling, its steps falling too: the most bits are B = len(distortion) - 1
    Raises ValueError where a later bit would be worth more than an earlier one.
    """
    steps = -torch.diff(torch.tensor(distortion, dtype=torch.float64))
    if (torch.diff(steps) > 0).any():
        raise ValueError("the steps of a distortion have to fall, or a later bit would be worth more than an earlier one")
    return steps[:, None] * worth.double() / price


def spend(worth, price, budget, distortion):
    """Bits for each component [n], whole numbers, up to a budget of bits in all. As gains() otherwise."""
    found = gains(worth, price, distortion)
    order = found.flatten().argsort(descending=True, stable=True)
    paid = price.expand(found.shape).flatten()[order].cumsum(0) <= budget
    bought = torch.zeros(found.numel(), dtype=torch.bool)
    bought[order[paid]] = True
    bought &= found.flatten() > 0  # what is worth nothing gets nothing, however rich the budget
    return bought.view(found.shape).sum(0)
