"""
What surgery does to a model: replace q, k and v or the token table by low-rank versions, check what changed, put it back.
"""

import zlib

import torch
from tqdm import tqdm

from util_factorization import allocate, attention
from util_factorization.decompose import decompose as decompose_table


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
        self.decompositions, self.undo, self.cuts, self.table_factors = {}, [], [], None

    def decomposition(self, method, stack):
        """Of a stack, or of the table where the stack is None; kept until another method is asked for."""
        key = (method, stack and tuple((layer.name, target) for layer, target in stack))
        if key not in self.decompositions:
            self.decompositions = {k: whole for k, whole in self.decompositions.items() if k[0] == method}
            if stack is None:
                whole = decompose_table(self.subject.table.weight.detach().clone(), method, **self.table)
            else:
                W = torch.cat([layer.weight(target) for layer, target in stack])
                C, G = self.moments.of(stack) if self.moments else (None, None)
                whole = attention.decompose(W, method, C, G)
            self.decompositions[key] = whole
        return self.decompositions[key]

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

        def nats(i, k):
            self.replace(chosen[i], self.factors(point, chosen[i], k).matrix(), False)
            kl = self.probe.measure()["kl"]
            self.restore()
            return kl

        uniform = [max(1, round(point["budget"] * whole.full)) for whole in wholes]
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
        table, whole = self.subject.table.weight, self.decomposition(point["method"], None)
        k = point["rank"] or whole.rank_for(point["variance"])
        Z, P, mean = self.table_factors = whole.factors(k)
        rebuilt = Z @ P if mean is None else torch.addmm(mean, Z, P)
        facts = dict(ranks=k, full=table.shape[1], energies=whole.energy(k), errors=whole.relative_errors([k])[0])
        table.data.copy_(rebuilt)
        self.undo.append((None, "wte", whole.table, k == table.shape[1]))
        return {"wte": {fact: [value] for fact, value in facts.items()}}

    def touched(self):
        """Names of the parameters that a cut should have changed, and of those that it may have."""
        must, may = set(), set()
        for layer, target, _, whole in self.undo:
            names = {self.subject.table_name} if layer is None else layer.parameters_of(target)
            may |= names
            must |= set() if whole else names  # every component kept: it may come out bit for bit
        return must, may

    def restore(self):
        for layer, target, old, _ in self.undo:
            if layer is None:
                self.subject.table.weight.data.copy_(old)
            else:
                layer.set_weight(target, old)
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
