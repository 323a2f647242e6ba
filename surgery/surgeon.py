"""
What surgery does to a model: replace q, k and v or the token table by low-rank versions, check what changed, put it back.
"""

import zlib

import torch
from tqdm import tqdm

from common.cli import fail
from surgery import allocate
from util_factorization import decompose_matrix as attention
from util_factorization.decompose_table import decompose as decompose_table


def stacks(layers, targets, mode, per_group):
    """Lists of (layer, target): the matrices of a list are stacked and decomposed as one."""
    if mode == "shared_layers":
        groups = [layers[i : i + per_group] for i in range(0, len(layers), per_group)]
        return [[(layer, target) for layer in group] for target in targets for group in groups]
    alone = [t for t in targets if mode != "shared_kv" or t == "q"]
    found = [[(layer, target)] for target in alone for layer in layers]
    return found + ([[(layer, "k"), (layer, "v")] for layer in layers] if mode == "shared_kv" else [])


class Surgeon:
    """Replaces weights and puts them back; decompositions are kept while the method stays the same."""

    def __init__(self, subject, layers, moments=None, table=None, probe=None):
        """
        moments: of real_model.Moments; table: what decompose() needs of the token table, counts, head and lookup; probe: a
        Judge on calibration windows, for budgets.
        """
        self.subject, self.layers, self.moments, self.table, self.probe = subject, layers, moments, table or {}, probe
        self.decompositions, self.undo, self.cuts, self.table_factors = {}, [], [], {}

    def decomposition(self, method, stack):
        """Of a stack, or of a table as [(table, target)]; kept until another method is asked for."""
        key = (method, tuple((part.name, target) for part, target in stack))
        if key not in self.decompositions:
            self.decompositions = {k: whole for k, whole in self.decompositions.items() if k[0] == method}
            decompose = self.of_table if stack[0][1] in self.subject.tables else self.of_layers
            self.decompositions[key] = decompose(method, stack)
        return self.decompositions[key]

    def of_layers(self, method, stack):
        W = torch.cat([layer.weight(target) for layer, target in stack])
        C, G = self.moments.of(stack) if self.moments else (None, None)
        return attention.decompose(W, method, C, G)

    def of_table(self, method, stack):
        """
        A table that is the head too is weighed by both uses, one with a head beside it by its own: C of the head, G of the
        lookup. Nothing that whiten knows of reads a lookup alone, so there its rows count as often as their tokens (freq).
        """
        table = stack[0][0]
        method = "freq" if method == "whiten" and "head" not in table.uses else method
        moments = {use: self.table.get(use) if use in table.uses else 0 for use in ("head", "lookup")}
        return decompose_table(table.matrix.detach().clone(), method, self.table.get("counts"), **moments)

    def cut(self, point, per_group):
        """Replace the point's weights -> {target: {ranks, errors, output_errors, energies}}, each a list over layers."""
        if point["mode"] == "table":
            return self.cut_table(point)
        found, self.cuts = {}, []
        chosen = stacks(self.layers, point["targets"].split(","), point["mode"], per_group)
        for stack, k in zip(chosen, self.ranks(point, chosen)):
            whole, name = self.decomposition(point["method"], stack), "".join(dict.fromkeys(t for _, t in stack))
            factors = self.factors(point, stack, k)
            self.cuts.append(([(layer.name, target) for layer, target in stack], factors))
            W = factors.matrix()
            C = self.moments.of(stack)[0] if self.moments else None
            facts = dict(ranks=k, full=whole.full, energies=whole.energy(k), errors=attention.relative_error(whole.W, W))
            facts |= dict(output_errors=attention.relative_error(whole.W, W, C)) if self.moments else {}
            for fact, value in facts.items():
                rounded = value if isinstance(value, int) else float(f"{value:.4g}")
                found.setdefault(name, {}).setdefault(fact, []).append(rounded)
            self.replace(stack, W, k == whole.full)
        return found

    def replace(self, stack, W, everything):
        for (layer, target), part in zip(stack, W.split(heights(stack))):
            self.undo.append((layer, target, layer.weight(target), everything))
            layer.set_weight(target, part)

    def ranks(self, point, chosen):
        """Of every stack: the point's own, those that keep its share of the energy, or those its budget is best spent on."""
        wholes = [self.decomposition(point["method"], stack) for stack in chosen]
        if point["rank"]:
            return [point["rank"]] * len(chosen)
        if point["variance"]:
            return [whole.rank_for(point["variance"]) for whole in wholes]

        least = allocate.prices(wholes)[1]
        if point["budget"] < least:
            fail(f"--budget {point['budget']}: a component of every matrix takes {least:.3f}, give that or more")

        def nats(i, k):
            self.replace(chosen[i], self.factors(point, chosen[i], k).matrix(), False)
            kl = self.probe.measure()["kl"]
            self.restore()
            return kl

        uniform = [min(max(1, round(point["budget"] * whole.full)), whole.full - 1) for whole in wholes]
        costs = [allocate.unit_cost(nats(i, k), wholes[i].tail(k)) for i, k in enumerate(tqdm(uniform, "each layer alone"))]
        return allocate.spend(wholes, costs, point["budget"])

    def factors(self, point, stack, k):
        whole = self.decomposition(point["method"], stack)
        factors = whole.factors(k)
        factors.mean = None if point["mode"] == "seed_faithful" else factors.mean
        if point["mode"] == "shared_layers" and point["method"] in ("whiten", "fisher"):
            Ws = whole.W.split(heights(stack))
            return attention.refit(factors, [(W, self.moments.of([part])[0]) for W, part in zip(Ws, stack)])
        return factors

    def cut_table(self, point):
        found, self.table_factors = {}, {}
        for target, table in self.subject.tables.items():
            whole = self.decomposition(point["method"], [(table, target)])
            k, full = point["rank"] or whole.rank_for(point["variance"]), whole.table.shape[1]
            Z, P, mean = self.table_factors[target] = whole.factors(k)
            self.undo.append((table, target, whole.table, k == full))
            table.set_weight(target, Z @ P if mean is None else torch.addmm(mean, Z, P))
            facts = dict(ranks=k, full=full, energies=whole.energy(k), errors=whole.relative_errors([k])[0])
            found[target] = {fact: [value] for fact, value in facts.items()}
        return found

    def touched(self):
        """Names of the parameters that a cut should have changed, and of those that it may have."""
        must, may = set(), set()
        for part, target, _, whole in self.undo:
            names = part.parameters_of(target)
            may |= names
            must |= set() if whole else names  # every component kept: it may come out bit for bit
        return must, may

    def restore(self):
        for part, target, old, _ in self.undo:
            part.set_weight(target, old)
        self.undo = []


def heights(stack):
    return [len(layer.rows[target]) for layer, target in stack]


def fingerprint(model):
    """A checksum of every parameter, by name."""
    return {name: zlib.crc32(p.detach().cpu().contiguous().view(torch.uint8).numpy()) for name, p in model.named_parameters()}


def check_changes(before, model, must=frozenset(), may=frozenset()):
    """What must change has changed, and nothing has but what may."""
    changed = {name for name, crc in fingerprint(model).items() if crc != before[name]}
    for names, what in (
        (changed - may, "changed that were not asked to"),
        (must - changed, "did not change that were asked to"),
    ):
        if names:
            raise RuntimeError(f"{len(names)} weights {what}, first {sorted(names)[0]}")
