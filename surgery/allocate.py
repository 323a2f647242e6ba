"""
Ranks by layer for a total budget, by what the loss says.

A decomposition knows the shape of a layer's error, its singular values S in the method's metric, and not what that error costs:
second order and K-FAC's independence are rough, and layers differ in how rough. So each layer's cost is measured once: the
KL divergence when it alone is cut, over the error that this cut makes, is what one unit of its error costs, a. The layer's
component i is then worth a S_i^2, and the budget is spent on those worth most for the numbers that they store.
"""


def unit_cost(nats, tail):
    """a: nats per token that a cut cost, over the square of its error in the method's metric."""
    return max(nats, 0.0) / max(tail**2, 1e-30)


def prices(wholes):
    """What a component of each stores, and the share of all numbers that a component of every one takes."""
    each = [sum(whole.W.shape) for whole in wholes]
    return each, sum(each) / sum(price * whole.full for price, whole in zip(each, wholes))


def spend(wholes, costs, budget):
    """
    Ranks of decompositions for a share `budget` of all the numbers that their components store, a component in + out.

    Each layer's S falls, so the components that are worth most for their numbers are always its first ones. At least one each.
    """
    (each, least), ranks, full = prices(wholes), [1] * len(wholes), set()
    left = sum(each) * (budget / least - 1)
    worth = [
        (a * s * s / price, i) for i, (a, whole, price) in enumerate(zip(costs, wholes, each)) for s in whole.S[1:].tolist()
    ]
    for _, i in sorted(worth, reverse=True):
        if each[i] > left * (1 + 1e-9):
            full.add(i)  # what is left may still do for a cheaper one
        if i not in full:
            ranks[i] += 1
            left -= each[i]
    return ranks
