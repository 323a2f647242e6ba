"""
What two models of the same seeds say about each other: paired differences of their best losses, and what becomes of a claim.
"""

from dataclasses import dataclass

# What two runs must share for their losses to be compared, beside the text they are evaluated on.
COMMON = ("eval_tokens", "tokens_per_step", "n_embd", "positions", "mlp", "norms")
LEVEL = 0.05  # of the p values, none of which is corrected for the others


# -- numbers ----------------------------------------------------------------------------------------------------------


def mean(xs):
    return sum(xs) / len(xs)


def spread(xs):
    """Sample standard deviation."""
    return (sum((x - mean(xs)) ** 2 for x in xs) / (len(xs) - 1)) ** 0.5


def shown(xs, digits):
    xs = [x for x in xs if x is not None]
    if not xs:
        return "-"
    text = f"{mean(xs):,.{digits}f}"
    return text + (f" ± {spread(xs):,.{digits}f}" if len(xs) > 1 and spread(xs) > 0 else "")


def paired_p(differences):
    """
    Two-sided p of the paired t-test that the mean difference is zero.

    With t = sqrt(n - 1) tan(theta) Student's density becomes cos(theta)^(n - 2), which a sum integrates.
    """
    import numpy as np

    n, s = len(differences), spread(differences)
    if s == 0:
        return 1.0 if mean(differences) == 0 else 0.0
    theta = np.arctan(abs(mean(differences)) / (s / n**0.5) / (n - 1) ** 0.5)

    def integral(low, high, steps=20000):
        middles = low + (np.arange(steps) + 0.5) * (high - low) / steps
        return (np.cos(middles) ** (n - 2)).mean() * (high - low)

    return float(integral(theta, np.pi / 2) / integral(0, np.pi / 2))


# -- two models -------------------------------------------------------------------------------------------------------


def conditions(summary):
    flat = summary | summary["parameters"]
    return [summary["dataset"], summary["val_unigram_entropy"], *(flat[key] for key in COMMON)]


def training_tokens(summary):
    """A run's own and those of what it starts from, its token table's at the least."""
    return summary["tokens"] + ((summary["starts_from"] or {}).get("tokens") or 0)


@dataclass
class Difference:
    """The first model's best loss minus the second's, over the seeds that both have."""

    first: object
    second: object
    values: list  # nats, one for each seed
    more_tokens: list  # that the first has read, counting what each starts from, one for each seed
    problem: str = ""  # why the two cannot be compared
    what: str = ""  # of which number, where it is not the best loss

    @property
    def name(self):
        k = f" (k={self.first.k})" if self.first.k else ""
        return f"{self.first.label} vs {self.second.label}{k}" + (f", {self.what}" if self.what else "")

    @property
    def p(self):
        return paired_p(self.values) if len(self.values) > 1 else None

    def verdict(self, margin=0.0):
        """Of the claim that the first is less than margin above the second: holds, does not hold, inconclusive."""
        over = [value - margin for value in self.values]
        if self.problem or len(over) < 2 or paired_p(over) >= LEVEL:
            return "inconclusive"
        return "holds" if mean(over) < 0 else "does not hold"


def best_loss(summary):
    return summary["best"]["val_loss"]


def difference(first, second, what="", value=best_loss):
    seeds = [seed for seed in first.summaries if seed in second.summaries]
    if not seeds:
        return Difference(first, second, [], [], "no seed in common, so no comparison.", what)
    pairs = [(first.summaries[seed], second.summaries[seed]) for seed in seeds]
    for a, b in pairs:
        for key, x, y in zip(("dataset", "val_unigram_entropy", *COMMON), conditions(a), conditions(b)):
            if x != y:
                problem = f"not comparable, {key.replace('_', ' ')} is {x} for one and {y} for the other."
                return Difference(first, second, [], [], problem, what)
    more_tokens = [training_tokens(a) - training_tokens(b) for a, b in pairs]
    return Difference(first, second, [value(a) - value(b) for a, b in pairs], more_tokens, what=what)


def shown_p(p):
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def comparison(first, second, subject):
    """A sentence about the first row against the second, which follows from the best losses of the seeds both have."""
    found = difference(first, second)
    if found.problem:
        return f"{found.name}: {found.problem}"
    gap, more = mean(found.values), round(mean(found.more_tokens))
    said = f"{found.name}: {subject} is {abs(gap):.3f} nats {'better' if gap < 0 else 'worse'}"
    if abs(gap) < 0.0005:
        said = f"{found.name}: {subject} makes no difference to 0.001 nats"
    if more:
        said += f", with {abs(more):,} training tokens {'more' if more > 0 else 'fewer'}, counting what each starts from"
    if found.p is None:
        return f"{said}; one seed, so inconclusive."
    verdict = "" if found.p < LEVEL else ", so inconclusive"
    seeds = f"spread {spread(found.values):.3f} over {len(found.values)} seeds"
    return f"{said} ({seeds}, paired t-test {shown_p(found.p)}{verdict})."


# label, label, the question; the answer is about the first of the two.
COMPARISONS = (
    ("A", "C", "Does a PCA start help?", "the PCA start"),
    ("A", "D", "What does the smaller table cost, when it starts trained?", "rank {k} of {d}"),
    ("A", "A full", "And against the whole table with the same start?", "rank {k} of {d}"),
    ("C", "D", "And when everything starts random?", "rank {k} of {d}"),
    ("B", "A", "Is fine-tuning better than scratch?", "fine-tuning"),
    ("B", "D", "Does the compressed model reach the baseline?", "compressing and fine-tuning"),
    ("B", "D+", "And when the baseline gets the same extra steps?", "compressing and fine-tuning"),
)


def pairs(rows, first, second):
    """The rows of the two labels that belong together: of one rank, or the second of none (or of full rank)."""
    for a in (row for row in rows if row.label == first):
        for b in (row for row in rows if row.label == second and (second == "A full" or row.k in (None, a.k))):
            yield a, b


def comparisons(rows):
    """The main job's questions, for every rank that was run: markdown lines."""
    return [
        f"- {question} {comparison(a, b, subject.format(k=a.k, d=a.one('n_embd')))}"
        for first, second, question, subject in COMPARISONS
        for a, b in pairs(rows, first, second)
    ]


# -- claims -----------------------------------------------------------------------------------------------------------

EVERY, SIXTH, SMALLEST_TWO = "every rank that was run", "the rank nearest to a sixth of the width", "the two smallest ranks"
MARGIN = 0.02  # nats: what "enough" and "reaches" may lack


@dataclass
class Claim:
    """Of each pair, that the first model's loss (or other number) is below the second's, or less than margin above it."""

    text: str
    decide: tuple  # pairs of labels
    ranks: str = EVERY
    margin: float = 0.0
    equal_tokens: bool = False
    note: str = ""
    numbers: tuple = (("", best_loss),)  # what it is, summary -> it

    def differences(self, rows):
        ranks = sorted({row.k for row in rows if row.k and any(row.label == a for a, _ in self.decide)})
        if self.ranks == SIXTH:
            ranks = sorted(ranks, key=lambda k: abs(k - rows[0].one("n_embd") / 6))[:1]
        elif self.ranks == SMALLEST_TWO:
            ranks = ranks[:2]
        found = [
            difference(a, b, *number)
            for first, second in self.decide
            for a, b in pairs(rows, first, second)
            if a.k in ranks
            for number in self.numbers
        ]
        for d in found:
            if self.equal_tokens and any(d.more_tokens):
                d.problem = d.problem or "not comparable, the tokens differ."
        return found


SEEDS_CLAIMS = (
    Claim("A PCA start beats a random start, the seeds' way", (("A", "C"), ("10-13", "2-5")),
          note="The PCA start has the tokens that its table or its weights were trained on before."),
    Claim("A PCA start beats a random start, equal tokens counted from the same start",
          (("B", "2-5+"), ("10-13", "2-5+")), equal_tokens=True),
    Claim("k = 128 is enough", (("B", "D+"), ("10-13", "D+"), ("A", "A full")), SIXTH, MARGIN,
          note="The seeds' 128 is a sixth of their width, 768. Enough: at most 0.02 nats over dense with the same training."),
    Claim("Fine-tuning reaches the baseline", (("B", "D"), ("10-13", "D")), margin=MARGIN,
          note="Reaches: at most 0.02 nats over it."),
    Claim("Fine-tuning reaches the baseline with the same extra steps", (("B", "D+"), ("10-13", "D+"), ("10-13", "D+LoRA")),
          margin=MARGIN),
    Claim("Fine-tuning is cheaper than scratch, where a baseline is there already", (("10-13", "2-5"), ("B", "A")),
          margin=MARGIN, note="How much cheaper, the columns say; decided is whether it costs loss."),
    Claim("Fine-tuning is cheaper than scratch, counting the baseline's tokens", (("10-13", "2-5+"),), margin=MARGIN,
          equal_tokens=True, note="Both have read the same tokens in all, so what it saves is trained parameters."),
)  # fmt: skip


def our_claims(rows):
    """What the factorizations that were run beside the seeds' svd have to show for themselves."""
    claims = [
        Claim("joint is below whiten below freq below svd, without training",
              (("joint", "whiten"), ("whiten", "freq"), ("freq", "6-9")), SMALLEST_TWO),
        Claim("fisher is below joint, and below svd, without training", (("fisher", "joint"), ("fisher", "6-9"))),
    ]  # fmt: skip
    for label in dict.fromkeys(row.label for row in rows if row.label.endswith("+LoRA") and row.k):
        name = label.replace("+", " + ")
        claims += [
            Claim(f"{name} is below the seeds' PCA + LoRA", ((label, "10-13"),)),
            Claim(f"{name} is below low-rank scratch, equal tokens counted from the same start", ((label, "2-5+"),),
                  equal_tokens=True),
            Claim(f"{name} is below low-rank scratch, the seeds' way", ((label, "2-5"),)),
            Claim(f"{name} reaches the baseline with the same extra steps", ((label, "D+"),), margin=MARGIN),
        ]  # fmt: skip
    return [claim for claim in claims if claim.differences(rows)]


def at_position(bin):
    return lambda summary: summary["best"]["position_loss"][bin]


def rise(summary):
    return summary["last"]["val_loss"] - summary["best"]["val_loss"]


def mean_error(summary):
    return mean(summary["best"]["v_error"])


def cache_claims(rows):
    """What the V-DProj experiment says of itself, then ours."""
    bins = set.intersection(*({*losses} for row in rows for losses in row.values("best", "position_loss")))
    bins = sorted(bins, key=lambda bin: int(bin.split("-")[0]))
    seeds = (
        Claim("2-phase is better than end to end", (("2-phase", "end to end"),),
              note="Its authors: a perplexity of 415.1 against 428.7, 0.032 nats, one seed."),
        Claim("2-phase is better than Pythia", (("2-phase", "Pythia"),),
              note="Its authors: 415.1 against about 442, 0.063 nats."),
        Claim("End to end is better than Pythia", (("end to end", "Pythia"),), note="Its authors: 428.7 against about 442."),
        Claim("2-phase is better than end to end at every position", (("2-phase", "end to end"),),
              numbers=tuple((f"positions {bin}", at_position(bin)) for bin in bins),
              note="Nats per token, of the best checkpoint; its authors' table is of the last epoch."),
        Claim("2-phase overfits more gently than end to end", (("2-phase", "end to end"),),
              numbers=(("loss of the last epoch - best", rise),)),
        Claim("2-phase restores the values better than end to end", (("2-phase", "end to end"),),
              numbers=(("share of V's variance missed", mean_error),),
              note="By the share of the variance; its authors compare the squared error, which hangs on the scale of V."),
    )  # fmt: skip
    ours = (
        Claim("Compressed values cost at most 0.02 nats against Pythia", (("end to end", "Pythia"), ("2-phase", "Pythia"),
              ("2-phase trained", "Pythia"), ("narrow", "Pythia")), margin=MARGIN),
        Claim("Compressed keys and values cost at most 0.02 nats against Pythia", (("K+V", "Pythia"),), margin=MARGIN),
        Claim("Restoring is worth its parameters: end to end is better than narrow heads", (("end to end", "narrow"),)),
        Claim("Phase 1 misses less of a trained network's values than of a random one's", (("phase 1 trained", "phase 1"),),
              numbers=(("share of V's variance missed", mean_error),)),
        Claim("2-phase is better when phase 1 has seen a trained network", (("2-phase trained", "2-phase"),),
              note="It has the baseline's training besides."),
        Claim("2-phase from a trained network is better than the network that it starts from",
              (("2-phase trained", "Pythia"),), note="It has phase 1 and further epochs besides."),
    )  # fmt: skip
    return seeds, tuple(claim for claim in ours if claim.differences(rows))


def overall(verdicts):
    """holds where every comparison does; does not hold where one is against it; else inconclusive."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and set(verdicts) == {"holds"} else "inconclusive"


def judge(claims, rows):
    """(claim, verdict, its differences) for every claim; one that no runs speak of is inconclusive."""
    judged = []
    for claim in claims:
        found = claim.differences(rows)
        judged.append((claim, overall([d.verdict(claim.margin) for d in found]), found))
    return judged
