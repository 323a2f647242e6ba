"""
What a bit is worth: a budget of bits goes where it lowers the error most.

In the coordinates Z of a `fisher` basis an error counts the same in every component: P (C + G) P^T = 1. A component of variance
v costs v c(b) when its numbers are kept at b bits. c falls from 1 at 0 bits, where the component is dropped, by about a factor
of four a bit. The next bit of a component is worth v (c(b) - c(b + 1)). Bits, or half bits where there are codes of them, are
spent one at a time where they are worth most: reverse water-filling. At the end every kept component has about the same error
left, the water level. Components whose variance lies below the level get no bits.

A rank is the special case of 0 or 16 bits. Plain quantisation is the case of one depth for all components.
"""

import torch


def gains(worth, price, distortion):
    """
    What each step of each component saves, for each bit of the budget: [B,n], falling in B. A step is one bit, or a part of it.

    worth [n]     the variance of a component, times the weight of its rows
    price [n]     what one bit of a component costs: its rows
    distortion    (bits b_0 = 0, b_1, ..., rising; errors c(b_0) = 1, c(b_1), ..., falling): B steps
    Raises ValueError where a later bit would be worth more than an earlier one.
    """
    bits, errors = (torch.tensor(part, dtype=torch.float64) for part in distortion)
    steps = -errors.diff() / bits.diff()
    if (steps.diff() > 0).any():
        raise ValueError("the steps of a distortion have to fall, or a later bit would be worth more than an earlier one")
    return steps[:, None] * worth.double() / price


def spend(worth, price, budget, distortion):
    """Steps for each component [n], whole numbers, up to a budget of bits in all. As gains() otherwise."""
    found, steps = gains(worth, price, distortion), torch.tensor(distortion[0], dtype=torch.float64).diff()
    order = found.flatten().argsort(descending=True, stable=True)
    paid = (steps[:, None] * price.expand(found.shape)).flatten()[order].cumsum(0) <= budget
    bought = torch.zeros(found.numel(), dtype=torch.bool)
    bought[order[paid]] = True
    bought &= found.flatten() > 0  # what is worth nothing gets nothing, however rich the budget
    return bought.view(found.shape).sum(0)
