"""
Ranks by layer for a budget of numbers.

A decomposition knows the shape of a layer's error, its singular values S in the method's metric. It does not know what that
error costs: the metric is of second order, assumes two independent factors, and is rougher for some layers than for others.
So each layer is cut alone once. The KL divergence of that cut over its squared error is the price a of the layer's error. Its
component i is then worth a S_i^2, and the budget goes to the components that are worth most for the numbers that they store.
"""


def unit_cost(nats, tail):
    """The price a: nats per token that a cut cost, over the square of its error in the method's metric."""
    return max(nats, 0.0) / max(tail**2, 1e-30)


def prices(decompositions):
    """Returns (numbers per component of each, the share of all numbers that one component of each takes)."""
    each = [sum(decomposition.W.shape) for decomposition in decompositions]
    return each, sum(each) / sum(price * d.full for price, d in zip(each, decompositions))


def spend(decompositions, costs, budget):
    """
    The ranks for a share `budget` of the numbers of all components. A component stores in + out numbers.

    S falls, so a layer's first components are worth most for their numbers. Every layer gets at least one.
    """
    (each, least), ranks, full = prices(decompositions), [1] * len(decompositions), set()
    left = sum(each) * (budget / least - 1)
    worth = [
        (a * s * s / price, i)
        for i, (a, decomposition, price) in enumerate(zip(costs, decompositions, each))
        for s in decomposition.S[1:].tolist()
    ]
    for _, i in sorted(worth, reverse=True):
        if each[i] > left * (1 + 1e-9):
            full.add(i)  # what is left may still do for a cheaper one
        if i not in full:
            ranks[i] += 1
            left -= each[i]
    return ranks
