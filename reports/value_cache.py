"""The report on the value cache: tables of the V-DProj experiment, verdicts on its claims, and figures."""

import math

from common.plots import Figure, Panel, Point
from reports.claims import cache_claims, judged_claims
from reports.compare import mean, shown
from reports.markdown import Table
from reports.rows import provenance_lines, read_curve
from reports.token_table import LOSS, smallest_within, without_the_start

READING = (
    "Losses, perplexities and errors are those of the best checkpoint, which was read back. It was chosen on the same fixed "
    "windows that are reported. An epoch is {epoch} steps. KV reduction counts the numbers that the cache keeps of a token; "
    "bench.py decode measures the allocated bytes. Missed: the share of the values' variance over tokens that v_restore does "
    "not restore, mean over layers. Recon: the original experiment's measure, mean (V - V_restored)^2, which depends on the "
    "scale of V. No loss term compares restored keys: only the cross-entropy trains the compression of keys. Tokens: those of "
    "the run that a run starts from + its own. ± is the standard deviation over seeds. The p values are not corrected for the "
    "number of comparisons."
)


def kv_reduction(row):
    return 1 - sum(row.one("cache_widths")) / (2 * row.one("n_embd"))


def epoch_of(row, which):
    """The epoch of the best checkpoint, or of the run's end; None for a run that counts steps."""
    return [summary[which]["iter"] / steps if (steps := summary["epoch_steps"]) else None for summary in row.summaries.values()]


def main_table(rows):
    header = ["model", "val ppl", "val loss", "best epoch", "last epoch", "KV reduction", "kept a token and layer",
              "parameters", "trained", "recon", "missed", "tokens", "seconds"]  # fmt: skip
    lines = []
    for row in rows:
        before, own = row.one("starts_from"), shown(row.values("tokens"), 0)
        restored = "v_error" in row.one("best")
        lines.append(
            [
                row.title,
                shown(row.values("best", "val_ppl"), 1),
                shown(row.losses, 4),
                shown(epoch_of(row, "best"), 1),
                shown(epoch_of(row, "last"), 1),
                f"{kv_reduction(row):.2%}",
                " + ".join(map(str, row.one("cache_widths"))),
                f"{row.one('parameters', 'total'):,}",
                f"{row.one('parameters_trained'):,}",
                shown(row.values("best", "v_recon"), 5) if restored else "-",
                shown([mean(errors) for errors in row.values("best", "v_error")], 3) if restored else "-",
                f"{shown([start['tokens'] for start in row.values('starts_from')], 0)} + {own}" if before else own,
                shown(row.values("seconds"), 0),
            ]
        )
    return Table(header, lines)


def short_table(rows):
    """A table with few columns, for the terminal."""
    lines = [
        [row.series, f"{1 - kv_reduction(row):.2%}", f"{mean(row.losses):.3f}", f"{mean(row.values('best', 'val_ppl')):.1f}"]
        for row in rows
    ]
    return Table(["model", "cache kept", "val loss", "perplexity"], lines)


def bins_of(rows):
    """All ranges of positions that the runs were evaluated at, in order."""
    bins = {bin for row in rows for losses in row.values("best", "position_loss") for bin in losses}
    return sorted(bins, key=lambda bin: [int(edge) for edge in bin.split("-")])


def position_table(rows):
    """A table of perplexity (exp of the mean loss) by position in the window."""
    bins = bins_of(rows)

    def perplexities(row, bin):
        return [math.exp(min(losses[bin], 700)) if bin in losses else None for losses in row.values("best", "position_loss")]

    lines = [[row.title, *(shown(perplexities(row, bin), 1) for bin in bins)] for row in rows]
    return Table(["perplexity at positions", *bins], lines)


def error_table(rows):
    rows = [row for row in rows if "v_error" in row.one("best")]
    lines = [[row.title, *(shown(list(errors), 4) for errors in zip(*row.values("best", "v_error")))] for row in rows]
    layers = max((len(line) - 1 for line in lines), default=0)
    lines = [line + ["-"] * (layers + 1 - len(line)) for line in lines]
    return Table(["share of V's variance missed", *(f"layer {i}" for i in range(layers))], lines) if lines else ""


def figures(rows):
    """The figures of the value cache. Each title states the answer."""
    order, first = [row.series for row in rows], next(iter(rows[0].folders))

    def kept(row):
        return sum(row.one("cache_widths"))

    points = {row.series: [Point(kept(row), row.losses)] for row in rows}
    found = [Figure("loss_against_cache", smallest_within(rows, kept, "numbers a token and layer"),
                    "Best validation loss against the numbers that the cache keeps",
                    [Panel(points, "numbers kept a token and layer", f"best {LOSS}")], order)]  # fmt: skip
    curves = {
        row.series: [Point(step / row.one("epoch_steps"), [loss]) for step, _, loss in read_curve(row.folders[first])]
        for row in rows
        if first in row.folders and row.one("epoch_steps")
    }
    if any(curves.values()):
        best = min((name for name in curves if curves[name]), key=lambda name: curves[name][-1].y)
        title = f"{best} ends lowest: {curves[best][-1].y:.3f} nats"
        panel = Panel(curves, "epoch", LOSS, ylim=without_the_start(curves.values()))
        found.append(Figure("epochs", title, f"Validation loss by epoch, seed {first}", [panel], order))
    return [*found, positions(rows, order)]


def positions(rows, order):
    by_position = {}
    for row in rows:
        bins = row.one("best", "position_loss")
        middles = [sum(map(int, bin.split("-"))) / 2 for bin in bins]
        by_position[row.series] = [
            Point(x, row.values("best", "position_loss", bin), f"positions {bin}") for x, bin in zip(middles, bins)
        ]
    best = {x: min((p.y, name) for name, points in by_position.items() for p in points if p.x == x)[1]
            for points in by_position.values() for x, *_ in points}  # fmt: skip
    counts = {name: list(best.values()).count(name) for name in dict.fromkeys(best.values())}
    title = f"Lowest loss: {', '.join(f'{name} in {n}' for name, n in counts.items())} of {len(best)} ranges of positions"
    panel = Panel(by_position, "position in the window", LOSS)
    return Figure("positions", title, "Loss by position in the window, best checkpoints", [panel], order)


def section(root, rows):
    """-> (lines for the terminal, the parts of the report, the claims that it judges)."""
    trained = [row for row in rows if not row.label.startswith("phase 1")]
    tables = [main_table(rows), "", *([position_table(trained), ""] if trained else []), error_table(rows), ""]
    seeds, ours = cache_claims(rows)
    text = ["# How far can the value cache be compressed?", "", *tables, *(f"- {row.title}: {row.what}." for row in rows), ""]
    text += ["## Figures of the cache", "", *figures(trained)] if trained else []
    epoch = shown({steps for row in rows for steps in row.values("epoch_steps")}, 0)
    text += ["## How the cache was measured", "", *provenance_lines(rows), "", READING.format(epoch=epoch), ""]
    text += ["## Which claims about V-DProj hold", "", "Claims of its authors:", "", *judged_claims(seeds, rows)]
    if ours:
        text += ["Our claims:", "", *judged_claims(ours, rows)]
    return str(short_table(trained or rows)).splitlines(), text, (seeds, ours)
