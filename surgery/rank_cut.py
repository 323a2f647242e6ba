"""The operation: replace q, k and v or the token table by low-rank versions, check the change, and restore the weights."""

import copy
import hashlib
import json
import zlib
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from common.cli import fail, rounded
from kv_cache.hf_layers import heights, stacks
from surgery.rank_in_order import layers_in_order, repaired
from util_factorization import MATRIX_METHODS, METHODS, MOMENTS, decompose_matrix, decompose_table


@dataclass
class Cut:
    """
    The record of an operation. It is also a context, which undoes the operation at its end.

    facts    {target: {ranks, full, energies, errors, output_errors}}, each a list over layers or groups of layers
    stacks   [([(layer name, target), ...], Factors), ...] of q, k and v
    tables   {"wte" or "head": (Z [V,r], P [r,d], mean [d] or None)}
    changed  [(layer or table, target, its weight before, whether every component was kept)]
    """

    facts: dict = field(default_factory=dict)
    stacks: list = field(default_factory=list)
    tables: dict = field(default_factory=dict)
    changed: list = field(default_factory=list)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.undo()

    def replace(self, stack, W, everything=False):
        """Give each layer of the stack its part of W. everything: whether every component was kept."""
        for (layer, target), part in zip(stack, W.split(heights(stack))):
            self.changed.append((layer, target, layer.weight(target), everything))
            layer.set_weight(target, part)

    def undo(self):
        """Restore the weights."""
        for part, target, before, _ in self.changed:
            part.set_weight(target, before)

    def add_facts(self, name, **facts):
        for fact, value in facts.items():
            self.facts.setdefault(name, {}).setdefault(fact, []).append(value)

    def parameters(self):
        """Names of the parameters that must have changed, and of those that may have."""
        must, may = set(), set()
        for part, target, _, everything in self.changed:
            names = part.parameters_of(target)
            may |= names
            must |= set() if everything else names  # if every component is kept, a weight may come out unchanged
        return must, may


class Surgeon:
    """Cuts a model and restores it. Decompositions are kept while the method stays the same."""

    def __init__(self, subject, layers, per_group, moments=None, table=None, probe=None):
        """
        per_group: layers that share components in mode shared_layers. moments: Moments of the layers. table:
        counts, head and lookup of the token table, for decompose_table. probe: an Evaluator on calibration text, for budgets.
        """
        self.subject, self.layers, self.per_group = subject, layers, per_group
        self.moments, self.table, self.probe = moments, table or {}, probe
        self.decompositions = {}

    def cut(self, point):
        """Replace the point's weights -> the Cut."""
        chosen = [] if point.of_table else stacks(self.layers, point.targets, point.mode, self.per_group)
        ranks, cut = self.ranks(point, chosen), Cut()
        try:
            if point.of_table:
                self.cut_tables(point, cut)
            if point.method == "sequential":
                self.cut_in_order(point, chosen, ranks, cut)
            else:
                for stack, rank in zip(chosen, ranks):
                    self.cut_stack(stack, self.decomposition(point.method, stack), self.factors(point, stack, rank), cut)
        except BaseException:
            cut.undo()
            raise
        return cut

    def cut_in_order(self, point, chosen, ranks, cut):
        """Fit each stack to its inputs after the layers before it have been cut (rank_in_order.py)."""
        stacks_of, layers = {}, {stack[0][0].name: stack[0][0] for stack in chosen}
        for stack, rank in zip(chosen, ranks):
            stacks_of.setdefault(stack[0][0].name, []).append((stack, rank))
        linears = {name: next(iter(layer.linears)) for name, layer in layers.items()}
        for name, x, read in layers_in_order(copy.deepcopy(self.subject), self.subject, self.moments.windows, linears):
            for stack, rank in stacks_of[name]:
                W = torch.cat([layer.weight(target) for layer, target in stack])
                W, C = repaired(W, x.cpu(), read.cpu())
                decomposition = decompose_matrix.decompose(W, point.method, C, self.moments.of(stack)[1])
                self.cut_stack(stack, decomposition, decomposition.factors(rank), cut)

    def cut_stack(self, stack, decomposition, factors, cut):
        before, W, rank = torch.cat([layer.weight(t) for layer, t in stack]), factors.matrix(), factors.left.shape[1]
        facts = dict(ranks=rank, full=decomposition.full, energies=rounded(decomposition.energy(rank)))
        facts |= dict(errors=rounded(decompose_matrix.relative_error(before, W)))
        if self.moments:
            facts |= dict(output_errors=rounded(decompose_matrix.relative_error(before, W, self.moments.of(stack)[0])))
        cut.add_facts("".join(dict.fromkeys(target for _, target in stack)), **facts)
        cut.stacks.append(([(layer.name, target) for layer, target in stack], factors))
        cut.replace(stack, W, rank == decomposition.full)

    def cut_tables(self, point, cut):
        for target, table in self.subject.tables.items():
            decomposition = self.decomposition(point.method, [(table, target)])
            rank = point.at("rank") or decomposition.rank_for(point.value)
            Z, P, mean = cut.tables[target] = decomposition.factors(rank)
            cut.changed.append((table, target, decomposition.table, rank == decomposition.full))
            table.set_weight(target, Z @ P if mean is None else torch.addmm(mean, Z, P))
            error = decomposition.relative_errors([rank])[0]
            cut.add_facts(target, ranks=rank, full=decomposition.full, energies=decomposition.energy(rank), errors=error)

    def decomposition(self, method, stack):
        """The decomposition of a stack, or of a table as [(table, target)]; kept until another method is used."""
        key = (method, tuple((part.name, target) for part, target in stack))
        if key not in self.decompositions:
            self.decompositions = {k: found for k, found in self.decompositions.items() if k[0] == method}
            decompose = self.decompose_table if stack[0][1] in self.subject.tables else self.decompose_layers
            self.decompositions[key] = decompose(method, stack)
        return self.decompositions[key]

    def decompose_layers(self, method, stack):
        W = torch.cat([layer.weight(target) for layer, target in stack])
        C, G = self.moments.of(stack) if self.moments else (None, None)
        return decompose_matrix.decompose(W, method, C, G)

    def decompose_table(self, method, stack):
        """
        Tied table: use C and G. Untied: the head uses C, the lookup uses G. whiten has no cost for an untied lookup; freq
        replaces it.
        """
        table = stack[0][0]
        needs = MOMENTS & {*METHODS[method]}
        method = "freq" if needs and needs.isdisjoint(table.uses) else method
        moments = {use: self.table.get(use) if use in table.uses else 0 for use in ("head", "lookup")}
        return decompose_table.decompose(table.matrix.detach().clone(), method, self.table.get("counts"), **moments)

    def factors(self, point, stack, rank):
        decomposition = self.decomposition(point.method, stack)
        factors = decomposition.factors(rank)
        factors.mean = None if point.mode == "seed_faithful" else factors.mean
        if point.mode == "shared_layers" and "C" in MATRIX_METHODS[point.method]:
            matrices = decomposition.W.split(heights(stack))
            return decompose_matrix.refit(factors, [(W, self.moments.of([part])[0]) for W, part in zip(matrices, stack)])
        return factors

    def ranks(self, point, chosen):
        """The rank of every stack: the point's rank, or the rank for its share of the energy or for its budget."""
        if point.level == "rank":
            return [point.value] * len(chosen)
        decompositions = [self.decomposition(point.method, stack) for stack in chosen]
        if point.level == "variance":
            return [decomposition.rank_for(point.value) for decomposition in decompositions]
        least = prices(decompositions)[1]
        if point.value < least:
            fail(f"--budget {point.value}: one component of every matrix takes {least:.3f} of the numbers: give that or more")
        uniform = [min(max(1, round(point.value * d.full)), d.full - 1) for d in decompositions]
        costs = []
        for stack, rank, d in zip(tqdm(chosen, "each layer alone"), uniform, decompositions):
            costs.append(unit_cost(self.nats_alone(point, stack, rank), d.tail(rank)))
        return ranks_for(decompositions, costs, point.value)

    def nats_alone(self, point, stack, rank):
        """KL divergence on calibration text if only this stack is cut."""
        with Cut() as cut:
            cut.replace(stack, self.factors(point, stack, rank).matrix())
            return self.probe.measure()["kl"]


def fingerprint(model):
    """{name: checksum} of every parameter."""
    return {name: zlib.crc32(p.detach().cpu().contiguous().view(torch.uint8).numpy()) for name, p in model.named_parameters()}


def digest(model):
    """A checksum of all parameters together. A folder of results identifies its model by it."""
    return hashlib.sha256(json.dumps(sorted(fingerprint(model).items())).encode()).hexdigest()[:12]


def check_changes(before, model, must=frozenset(), may=frozenset()):
    """Raise RuntimeError unless all of `must` has changed since `before`, and nothing outside `may`."""
    changed = {name for name, crc in fingerprint(model).items() if crc != before[name]}
    must = {name for name in must if name in changed or model.get_parameter(name).any()}  # a layer of zeros stays zero
    for names, problem in ((changed - may, "changed and should not have"), (must - changed, "should have changed and did not")):
        if names:
            raise RuntimeError(f"{len(names)} weights {problem}, first {sorted(names)[0]}")


# -- ranks for a budget -----------------------------------------------------------------------------------------------
#
# A decomposition gives the shape of a layer's error: its singular values S in the method's metric. It does not give the cost of
# that error: the metric is of second order, assumes two independent factors, and is rougher for some layers than for others.
# So each layer is cut alone once. The KL divergence of that cut, divided by its squared error, is the price a of the layer's
# error. The importance of its component i is a S_i^2. The budget goes to the components with the highest importance per stored
# number.


def unit_cost(nats, tail):
    """The price a: nats per token that a cut costs, divided by the square of its error in the method's metric."""
    return max(nats, 0.0) / max(tail**2, 1e-30)


def prices(decompositions):
    """-> (numbers in a component of each decomposition, the share of all numbers that one component of each takes)."""
    each = [sum(decomposition.W.shape) for decomposition in decompositions]
    return each, sum(each) / sum(price * d.full for price, d in zip(each, decompositions))


def ranks_for(decompositions, costs, budget):
    """
    The ranks for a share `budget` of the numbers of all components. A component stores in + out numbers.

    S falls, so a layer's first components are the most important ones. Every layer gets at least one.
    """
    (each, least), ranks, full = prices(decompositions), [1] * len(decompositions), set()
    left = sum(each) * (budget / least - 1)
    importance = [
        (a * s * s / price, i)
        for i, (a, decomposition, price) in enumerate(zip(costs, decompositions, each))
        for s in decomposition.S[1:].tolist()
    ]
    for _, i in sorted(importance, reverse=True):
        if each[i] > left * (1 + 1e-9):
            full.add(i)  # the rest may still be enough for a smaller component
        if i not in full:
            ranks[i] += 1
            left -= each[i]
    return ranks
