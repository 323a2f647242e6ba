"""Compares two models over the same random seeds: the paired difference of their best losses, and its t-test."""

from dataclasses import dataclass
from statistics import fmean as mean

# Two runs can be compared if they share these settings and the evaluation text.
COMMON = ("eval_tokens", "tokens_per_step", "n_embd", "positions", "mlp", "norms")
LEVEL = 0.05  # of p; not corrected for the number of tests


# -- numbers ----------------------------------------------------------------------------------------------------------


def spread(xs):
    """Sample standard deviation. (statistics.stdev fails on infinite numbers; a perplexity may be infinite.)"""
    return (sum((x - mean(xs)) ** 2 for x in xs) / (len(xs) - 1)) ** 0.5


def shown(xs, digits):
    xs = [x for x in xs if x is not None]
    if not xs:
        return "-"
    text = f"{mean(xs):,.{digits}f}"
    return text + (f" ± {spread(xs):,.{digits}f}" if len(xs) > 1 and spread(xs) > 0 else "")


def paired_p(differences):
    """
    The two-sided p of the paired t-test that the mean difference is zero.

    With t = sqrt(n - 1) tan(theta), Student's density becomes cos(theta)^(n - 2); a sum integrates it. This avoids installing
    scipy (113 MB) for one function. Its ttest_1samp gives the same p to a relative 4e-8.
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
    """The training tokens of a run and of the run that it starts from."""
    return summary["tokens"] + ((summary["starts_from"] or {}).get("tokens") or 0)


@dataclass
class Difference:
    """The first model's best loss minus the second's, for each seed that both have."""

    first: object
    second: object
    values: list  # nats, one for each seed
    more_tokens: list  # training_tokens() of the first minus the second, one for each seed
    problem: str = ""  # why the two cannot be compared
    what: str = ""  # the compared number, if it is not the best loss

    @property
    def name(self):
        k = f" (k={self.first.k})" if self.first.k else ""
        return f"{self.first.label} vs {self.second.label}{k}" + (f", {self.what}" if self.what else "")

    @property
    def p(self):
        return paired_p(self.values) if len(self.values) > 1 else None

    def verdict(self, margin=0.0):
        """Whether the first is less than margin above the second: holds, does not hold, or inconclusive."""
        over = [value - margin for value in self.values]
        if self.problem or len(over) < 2 or paired_p(over) >= LEVEL:
            return "inconclusive"
        return "holds" if mean(over) < 0 else "does not hold"


def best_loss(summary):
    return summary["best"]["val_loss"]


def difference(first, second, what="", value=best_loss):
    seeds = [seed for seed in first.summaries if seed in second.summaries]
    if not seeds:
        return Difference(first, second, [], [], "not comparable: no seed in common.", what)
    pairs = [(first.summaries[seed], second.summaries[seed]) for seed in seeds]
    for a, b in pairs:
        for key, x, y in zip(("dataset", "val_unigram_entropy", *COMMON), conditions(a), conditions(b)):
            if x != y:
                problem = f"not comparable: {key.replace('_', ' ')} is {x} for one and {y} for the other."
                return Difference(first, second, [], [], problem, what)
    more_tokens = [training_tokens(a) - training_tokens(b) for a, b in pairs]
    return Difference(first, second, [value(a) - value(b) for a, b in pairs], more_tokens, what=what)


def shown_p(p):
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def comparison(first, second, subject):
    """A sentence that compares the first row with the second by the best losses of the seeds that both have."""
    found = difference(first, second)
    if found.problem:
        return f"{found.name}: {found.problem}"
    gap, more = mean(found.values), round(mean(found.more_tokens))
    sentence = f"{found.name}: {subject} is {abs(gap):.3f} nats {'better' if gap < 0 else 'worse'}"
    if abs(gap) < 0.0005:
        sentence = f"{found.name}: {subject} makes no difference to 0.001 nats"
    if more:
        sentence += (
            f", with {abs(more):,} training tokens {'more' if more > 0 else 'fewer'}, including those of the starting models"
        )
    if found.p is None:
        return f"{sentence}; one seed, so inconclusive."
    verdict = "" if found.p < LEVEL else ", so inconclusive"
    seeds = f"spread {spread(found.values):.3f} over {len(found.values)} seeds"
    return f"{sentence} ({seeds}, paired t-test {shown_p(found.p)}{verdict})."


# Label, label, question, and the subject of the answer: the first model.
COMPARISONS = (
    ("A", "C", "Does a PCA start help?", "the PCA start"),
    ("A", "D", "What does the smaller table cost if it starts from a trained one?", "rank {k} of {d}"),
    ("A", "A full", "And against the full-rank table with the same start?", "rank {k} of {d}"),
    ("C", "D", "And if all weights start random?", "rank {k} of {d}"),
    ("B", "A", "Is fine-tuning better than scratch?", "fine-tuning"),
    ("B", "D", "Does the compressed model reach the baseline?", "compressing and fine-tuning"),
    ("B", "D+", "And if the baseline trains for the same extra steps?", "compressing and fine-tuning"),
)


def pairs(rows, first, second):
    """Pairs of rows with equal rank. The second row may also be dense."""
    for a in (row for row in rows if row.label == first):
        for b in (row for row in rows if row.label == second and (second == "A full" or row.k in (None, a.k))):
            yield a, b


def comparisons(rows):
    """The main job's questions and answers for every rank that was run: markdown lines."""
    return [
        f"- {question} {comparison(a, b, subject.format(k=a.k, d=a.one('n_embd')))}"
        for first, second, question, subject in COMPARISONS
        for a, b in pairs(rows, first, second)
    ]
