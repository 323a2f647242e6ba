"""The part of report.py about the value cache: the V-DProj experiment's tables, what holds of it, and its figures."""

import math

from reports.compare import cache_claims, mean, shown
from reports.markdown import claim_lines, provenance_lines, table, title
from reports.rows import read_curve

READING = (
    "Losses, perplexities and errors are of the best checkpoint, read back; it is chosen on the same fixed windows that are "
    "reported. An epoch is {epoch} steps. KV reduction counts the numbers that a cache keeps of a token; bench.py --decode "
    "measures the bytes that one allocates. Missed is the share of the values' variance over the tokens that v_restore does "
    "not give back, mean over layers; recon is the experiment's own measure, mean (V - V_restored)^2, which hangs on the scale "
    "of V. Nothing asks compressed keys to be restored: the cross-entropy alone trains their bottleneck. Tokens are those of "
    "what a run starts from + its own. ± is the standard deviation over seeds; the p values stand alone, none is corrected for "
    "the others."
)


def kv_reduction(row):
    return 1 - sum(row.one("cache_widths")) / (2 * row.one("n_embd"))


def epoch_of(row, which):
    """Epochs after which the best checkpoint was kept, or the run ended; None for a run that counts steps."""
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
                title(row),
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
    return table(header, lines)


def bins_of(rows):
    """Every range of positions that a run was evaluated at, in order."""
    bins = {bin for row in rows for losses in row.values("best", "position_loss") for bin in losses}
    return sorted(bins, key=lambda bin: [int(edge) for edge in bin.split("-")])


def position_table(rows):
    """Perplexity by position in the window, exp of the mean loss there."""
    bins = bins_of(rows)

    def perplexities(row, bin):
        return [math.exp(losses[bin]) if bin in losses else None for losses in row.values("best", "position_loss")]

    lines = [[title(row), *(shown(perplexities(row, bin), 1) for bin in bins)] for row in rows]
    return table(["perplexity at positions", *bins], lines)


def error_table(rows):
    rows = [row for row in rows if "v_error" in row.one("best")]
    lines = [[title(row), *(shown(list(errors), 4) for errors in zip(*row.values("best", "v_error")))] for row in rows]
    layers = max((len(line) - 1 for line in lines), default=0)
    return table(["share of V's variance missed", *(f"layer {i}" for i in range(layers))], lines) if lines else ""


def figures(root, rows):
    """Write the figures; returns [(caption, file name)]."""
    from reports.plots import lines_plot, series_plot

    order, first = [row.series for row in rows], next(iter(rows[0].folders))
    curves = {
        row.series: [(step / row.one("epoch_steps"), loss) for step, _, loss in read_curve(row.folders[first])]
        for row in rows
        if first in row.folders and row.one("epoch_steps")
    }
    by_position = {}
    for row in rows:
        bins = row.one("best", "position_loss")
        middles = [sum(map(int, bin.split("-"))) / 2 for bin in bins]
        by_position[row.series] = [(x, mean(row.values("best", "position_loss", bin))) for x, bin in zip(middles, bins)]
    made = []
    if curves:
        lines_plot(root / "epochs", curves, order, "epoch", "validation loss (nats per token)", quantile=0.9)
        made.append((f"Validation loss by epoch, seed {first}", "epochs.png"))
    lines_plot(root / "positions", by_position, order, "position in the window", "validation loss (nats per token)")
    made.append(("Loss by position in the window, best checkpoints", "positions.png"))
    points = {row.series: [(sum(row.one("cache_widths")), row.losses)] for row in rows}
    panels = [("best validation loss (nats per token)", points, {})]
    series_plot(root / "loss_against_cache", panels, order, x="numbers kept a token and layer")
    return [("Best validation loss against what the cache keeps", "loss_against_cache.png"), *made]


def section(root, rows):
    """-> (lines for the terminal, lines of markdown, the claims that it judges)."""
    trained = [row for row in rows if not row.label.startswith("phase 1")]
    tables = [main_table(rows), "", *([position_table(trained), ""] if trained else []), error_table(rows), ""]
    seeds, ours = cache_claims(rows)
    text = ["# What can the value cache lose?", "", *provenance_lines(rows), "", *tables]
    text += [*(f"- {title(row)}: {row.what}." for row in rows), ""]
    text += [
        READING.format(epoch=shown({steps for row in rows for steps in row.values("epoch_steps")}, 0)),
        "",
        "## What holds of V-DProj",
        "",
    ]
    text += ["Of its authors' claims:", "", *claim_lines(seeds, rows)]
    if ours:
        text += ["Of ours:", "", *claim_lines(ours, rows)]
    for caption, name in figures(root, trained) if trained else []:
        text += [f"![{caption}]({name})", "", f"*{caption}*", ""]
    return tables, text, (seeds, ours)
