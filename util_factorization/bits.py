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


def spend(worth, cost, budget, distortion):
    """
    Bits for each component of each group of rows, up to the budget.

    worth [G,d]   the variance of a component in a group, times the weight of the group's rows
    cost [G]      what one bit of a component costs: the rows of its group
    budget        bits in all
    distortion    c(0) = 1, c(1), ..., falling, its steps falling too: the most bits are len(distortion) - 1

    Returns bits [G,d], whole numbers. Raises ValueError where the budget pays for less than one bit of the cheapest component.
    """
    steps = -torch.diff(torch.tensor(distortion, dtype=torch.float64))  # [B]
    if (torch.diff(steps) > 0).any():
        raise ValueError("the steps of a distortion have to fall, or a later bit would be worth more than an earlier one")
    price = cost.double()[:, None].expand(worth.shape)
    if budget < cost.min():
        raise ValueError(f"a budget of {budget:.0f} bits pays for no component: the cheapest bit costs {int(cost.min())}")
    gains = steps[:, None, None] * worth.double() / price  # [B,G,d]: error saved for each bit of budget
    order = gains.flatten().argsort(descending=True, stable=True)
    paid = price.expand(gains.shape).flatten()[order].cumsum(0) <= budget
    bought = torch.zeros(gains.numel(), dtype=torch.bool)
    bought[order[paid]] = True
    return bought.view(gains.shape).sum(0)
