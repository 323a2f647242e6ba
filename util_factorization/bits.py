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


def spend(worth, price, budget, distortion):
    """
    Bits for each component, up to the budget.

    worth [n]     the variance of a component, times the weight of its rows
    price [n]     what one bit of a component costs: its rows
    budget        bits in all
    distortion    c(0) = 1, c(1), ..., falling, its steps falling too: the most bits are len(distortion) - 1

    Returns bits [n], whole numbers. Raises ValueError where a later bit would be worth more than an earlier one.
    """
    steps = -torch.diff(torch.tensor(distortion, dtype=torch.float64))  # [B]
    if (torch.diff(steps) > 0).any():
        raise ValueError("the steps of a distortion have to fall, or a later bit would be worth more than an earlier one")
    gains = steps[:, None] * worth.double() / price  # [B,n]: error saved for each bit of budget
    order = gains.flatten().argsort(descending=True, stable=True)
    paid = price.expand(gains.shape).flatten()[order].cumsum(0) <= budget
    bought = torch.zeros(gains.numel(), dtype=torch.bool)
    bought[order[paid]] = True
    return bought.view(gains.shape).sum(0)
