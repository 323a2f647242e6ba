"""
Spends a budget of bits: each bit goes to the component where it lowers the error most.

In the coordinates Z of a `fisher` basis an error counts the same in every component: P (C + G) P^T = 1. A component of variance
v has the error v c(b) if its numbers are stored with b bits. c is 1 at 0 bits, where the component is dropped, and each bit
divides it by about four. The next bit of a component saves v (c(b) - c(b + 1)). We spend one bit at a time, or half a bit if
there are codebooks for it, always where it saves most: reverse water-filling. At the end all components with bits have about
the same error, the water level. A component whose variance is below the level gets no bits.

Truncation to a rank is the special case of 0 or 16 bits. Plain quantisation is the case of one depth for all components.
"""

import torch


def gains(worth, price, distortion):
    """
    Saving of each step of each component, per bit of the budget: [B,n], falling in B. A step is one bit or half a bit.

    worth [n]     importance of a component: its variance times the weight of its rows
    price [n]     bits of the budget for one bit of a component: its number of rows
    distortion    (bits b_0 = 0, b_1, ..., rising; errors c(b_0) = 1, c(b_1), ..., falling): B steps
    Raises ValueError if a later bit would save more than an earlier one.
    """
    bits, errors = (torch.tensor(part, dtype=torch.float64) for part in distortion)
    steps = -errors.diff() / bits.diff()
    if (steps.diff() > 0).any():
        raise ValueError("a later bit saves more than an earlier one: give a distortion whose steps fall")
    return steps[:, None] * worth.double() / price


def spend(worth, price, budget, distortion):
    """Number of steps that each component gets [n], within a budget of bits for all. Other arguments: see gains()."""
    found, steps = gains(worth, price, distortion), torch.tensor(distortion[0], dtype=torch.float64).diff()
    order = found.flatten().argsort(descending=True, stable=True)
    paid = (steps[:, None] * price.expand(found.shape)).flatten()[order].cumsum(0) <= budget
    bought = torch.zeros(found.numel(), dtype=torch.bool)
    bought[order[paid]] = True
    bought &= found.flatten() > 0  # a component without importance gets nothing, however large the budget
    return bought.view(found.shape).sum(0)
