"""
Ranks by layer for a budget of numbers.

A decomposition gives the shape of a layer's error: its singular values S in the method's metric. It does not give the cost of
that error: the metric is of second order, assumes two independent factors, and is rougher for some layers than for others.
So each layer is cut alone once. The KL divergence of that cut, divided by its squared error, is the price a of the layer's
error. The importance of its component i is a S_i^2. The budget goes to the components with the highest importance per stored
number.
"""


def unit_cost(nats, tail):
    """The price a: nats per token that a cut costs, divided by the square of its error in the method's metric."""
    return max(nats, 0.0) / max(tail**2, 1e-30)


def prices(decompositions):
    """-> (numbers in a component of each decomposition, the share of all numbers that one component of each takes)."""
    each = [sum(decomposition.W.shape) for decomposition in decompositions]
    return each, sum(each) / sum(price * d.full for price, d in zip(each, decompositions))


def spend(decompositions, costs, budget):
    """
    The ranks for a share `budget` of the numbers of all components. A component stores in + out numbers.

    S falls, so a layer's first components are the most important ones. Every layer gets at least one.
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
            full.add(i)  # the rest may still be enough for a smaller component
        if i not in full:
            ranks[i] += 1
            left -= each[i]
    return ranks
