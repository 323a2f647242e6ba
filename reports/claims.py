"""The claims of the original scripts and our own. The paired tests of a claim's comparisons decide its verdict."""

from dataclasses import dataclass

from reports.compare import best_loss, difference, mean, pairs, shown_p, spread
from reports.markdown import Table

EVERY, SIXTH, SMALLEST_TWO = "every rank that was run", "the rank closest to a sixth of the width", "the two smallest ranks"
MARGIN = 0.02  # nats: "enough" and "reaches" allow a loss up to this much higher


@dataclass
class Claim:
    """A claim: in each pair, the first model's loss (or another number) is less than `margin` above the second's."""

    text: str
    decide: tuple  # pairs of labels
    ranks: str = EVERY
    margin: float = 0.0
    equal_tokens: bool = False
    note: str = ""
    numbers: tuple = (("", best_loss),)  # (name of the number, function from the summary to the number)

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
                d.problem = d.problem or "not comparable: the numbers of tokens differ."
        return found


SEEDS_CLAIMS = (
    Claim("A PCA start beats a random start, compared as in the original scripts", (("A", "C"), ("10-13", "2-5")),
          note="The PCA start has an advantage: its table or its weights were trained on more tokens before."),
    Claim("A PCA start beats a random start, equal tokens counted from the same start",
          (("B", "2-5+"), ("10-13", "2-5+")), equal_tokens=True),
    Claim("k = 128 is enough", (("B", "D+"), ("10-13", "D+"), ("A", "A full")), SIXTH, MARGIN,
          note="128 is a sixth of the original width 768. Enough: at most 0.02 nats over dense with the same training."),
    Claim("Fine-tuning reaches the baseline", (("B", "D"), ("10-13", "D")), margin=MARGIN,
          note="Reaches: at most 0.02 nats over it."),
    Claim("Fine-tuning reaches the baseline with the same extra steps", (("B", "D+"), ("10-13", "D+"), ("10-13", "D+LoRA")),
          margin=MARGIN),
    Claim("Fine-tuning is cheaper than scratch, if a baseline exists already", (("10-13", "2-5"), ("B", "A")),
          margin=MARGIN, note="The columns show the savings. The verdict is only about the loss."),
    Claim("Fine-tuning is cheaper than scratch, counting the baseline's tokens", (("10-13", "2-5+"),), margin=MARGIN,
          equal_tokens=True, note="Both have read the same tokens in total, so only the number of trained parameters differs."),
)  # fmt: skip


def our_claims(rows):
    """Our claims about the factorizations that were run."""
    claims = [
        Claim("joint is below whiten below freq below svd, without training",
              (("joint", "whiten"), ("whiten", "freq"), ("freq", "6-9")), SMALLEST_TWO),
        Claim("fisher is below joint, and below svd, without training", (("fisher", "joint"), ("fisher", "6-9"))),
    ]  # fmt: skip
    for label in dict.fromkeys(row.label for row in rows if row.label.endswith("+LoRA") and row.k):
        name = label.replace("+", " + ")
        claims += [
            Claim(f"{name} is below the original PCA + LoRA", ((label, "10-13"),)),
            Claim(f"{name} is below low-rank scratch, equal tokens counted from the same start", ((label, "2-5+"),),
                  equal_tokens=True),
            Claim(f"{name} is below low-rank scratch, compared as in the original scripts", ((label, "2-5"),)),
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
    """(The claims of V-DProj's authors, our own claims about it)."""
    bins = set.intersection(*({*losses} for row in rows for losses in row.values("best", "position_loss")))
    bins = sorted(bins, key=lambda bin: int(bin.split("-")[0]))
    seeds = (
        Claim("2-phase is better than end to end", (("2-phase", "end to end"),),
              note="Its authors report a perplexity of 415.1 against 428.7, which is 0.032 nats, with one seed."),
        Claim("2-phase is better than Pythia", (("2-phase", "Pythia"),),
              note="Its authors report a perplexity of 415.1 against about 442, which is 0.063 nats."),
        Claim("End to end is better than Pythia", (("end to end", "Pythia"),),
              note="Its authors report a perplexity of 428.7 against about 442."),
        Claim("2-phase is better than end to end at every position", (("2-phase", "end to end"),),
              numbers=tuple((f"positions {bin}", at_position(bin)) for bin in bins),
              note="Nats per token of the best checkpoint. Its authors' table shows the last epoch."),
        Claim("2-phase overfits less than end to end", (("2-phase", "end to end"),),
              numbers=(("loss of the last epoch - best", rise),)),
        Claim("2-phase restores the values better than end to end", (("2-phase", "end to end"),),
              numbers=(("share of V's variance missed", mean_error),),
              note="We compare the share of the variance. Its authors compare the squared error, which depends on V's scale."),
    )  # fmt: skip
    ours = (
        Claim("Compressed values cost at most 0.02 nats against Pythia", (("end to end", "Pythia"), ("2-phase", "Pythia"),
              ("2-phase trained", "Pythia"), ("narrow", "Pythia")), margin=MARGIN),
        Claim("Compressed keys and values cost at most 0.02 nats against Pythia", (("K+V", "Pythia"),), margin=MARGIN),
        Claim("Restoring the values helps: end to end is better than narrow heads", (("end to end", "narrow"),)),
        Claim("Phase 1 misses a smaller share of a trained network's values than of a random network's",
              (("phase 1 trained", "phase 1"),), numbers=(("share of V's variance missed", mean_error),)),
        Claim("2-phase is better if phase 1 is fitted to a trained network", (("2-phase trained", "2-phase"),),
              note="It has the baseline's training in addition."),
        Claim("2-phase from a trained network is better than the trained network",
              (("2-phase trained", "Pythia"),), note="It has phase 1 and more epochs in addition."),
    )  # fmt: skip
    return seeds, tuple(claim for claim in ours if claim.differences(rows))


def overall(verdicts):
    """holds if every comparison holds; does not hold if one does not hold; otherwise inconclusive."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and set(verdicts) == {"holds"} else "inconclusive"


def judge(claims, rows):
    """[(claim, verdict, its differences)]. A claim without runs is inconclusive."""
    judged = []
    for claim in claims:
        found = claim.differences(rows)
        judged.append((claim, overall([d.verdict(claim.margin) for d in found]), found))
    return judged


@dataclass
class Judged:
    """A claim, its verdict, and the table of numbers that decided it (None if nothing was run)."""

    text: str
    verdict: str
    note: str
    numbers: Table | None

    def __str__(self):
        return f"**{self.text}: {self.verdict}** {self.note}\n" + (f"\n{self.numbers}\n" if self.numbers else "")


def judged_claims(claims, rows):
    """The parts of a report that judge the claims."""
    parts = []
    for claim, verdict, found in judge(claims, rows):
        note = f"({claim.ranks if found else 'not run'}). {claim.note}".strip()
        parts.append(Judged(claim.text, verdict, note, numbers(claim, found) if found else None))
    return parts


def numbers(claim, found):
    """The table of a claim's differences."""
    cells = []
    for d in found:
        if d.problem:
            cells.append([d.name, "-", "-", len(d.values), "-", "-", "-", "-", f"inconclusive: {d.problem}"])
            continue
        pair = (d.first, d.second)
        tokens = dict.fromkeys(f"{more:+,}" for more in (min(d.more_tokens), max(d.more_tokens)))
        cells.append(
            [
                d.name,
                f"{mean(d.values):+.4f}",
                f"{spread(d.values):.4f}" if len(d.values) > 1 else "-",
                len(d.values),
                shown_p(d.p) if d.p is not None else "-",
                " to ".join(tokens),
                " / ".join(f"{mean(row.values('seconds')):,.0f}" for row in pair),
                " / ".join(f"{row.trained:,}" for row in pair),
                d.verdict(claim.margin),
            ]
        )
    header = ["", "difference", "spread", "seeds", "paired t-test", "more tokens", "own seconds", "trained", "claim"]
    return Table(header, cells)
