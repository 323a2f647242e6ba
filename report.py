"""
Run folders -> tables, what they say in words, and the figures: report.md, PNGs and SVGs, the tables on the terminal too.

    python report.py --runs model_weights

Everything is read from the folders' config.json, summary.json and metrics.jsonl and from the factor files' JSON.
Runs of one name with different seeds, as in model_weights/seed_1/gpt_baseline, make one row: mean and standard deviation.
"""

from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse
from reports import value_cache as cache_report
from reports.compare import SEEDS_CLAIMS, comparisons, judge, mean, our_claims, shown
from reports.markdown import claim_lines, provenance_lines, table, title
from reports.rows import read_curve, read_factors, read_rows, total_seconds


@dataclass
class Args:
    runs: str = flag("model_weights", "folder with run folders, or with seed_N folders of them; report.md goes there")


READING = (
    "The loss is in nats per token, at the run's own best step, which is chosen on the same windows that are reported. "
    "Stored counts adapters as merged. Tokens are training tokens: those of what a run starts from + its own; seconds are its "
    "own, of training alone. ln_f_cosine lives in the head's own space, d or k wide. ln_f_cosine_full lives in d-space, "
    "yet it rises when a table shrinks and the loss gets worse: neither measures quality between tables. ± is the standard "
    "deviation over seeds; the p values stand alone, none is corrected for the others."
)


# -- tables -----------------------------------------------------------------------------------------------------------


def result_table(rows, dense):
    header = ["model", "token table", "compression", "stored", "trained", "val loss", "perplexity", "best step",
              "tokens", "seconds", "ln_f_cosine", "ln_f_cosine_full"]  # fmt: skip
    lines = []
    for row in rows:
        tokens, before = f"{row.one('tokens'):,}", row.one("starts_from")
        if before:
            known = "?" if before["tokens"] is None else f"{before['tokens']:,}"
            tokens = f"{known} {'for its table ' if before['part'] == 'token table' else ''}+ {tokens}"
        stored = row.one("parameters", "token_table")
        lines.append(
            [
                title(row),
                f"{stored:,}",
                f"{dense / stored:.2f}x" if dense else "-",
                f"{row.stored:,}",
                f"{row.trained:,}",
                shown(row.losses, 4),
                shown(row.values("best", "val_ppl"), 2),
                shown(row.values("best", "iter"), 0),
                tokens,
                shown(row.values("seconds"), 0),
                shown(row.values("best", "ln_f_cosine"), 3),
                shown(row.values("best", "ln_f_cosine_full"), 3),
            ]
        )
    return table(header, lines)


def rank_table(rows):
    """The seeds' figure in numbers: a line for each series, a column for each rank."""
    ranks = sorted({row.k for row in rows if row.k})
    lines = []
    for series in dict.fromkeys(row.series for row in rows):
        of_rank = {row.k: row for row in rows if row.series == series}
        dense = [shown(of_rank[None].losses, 3)] if None in of_rank else ["-"]
        lines.append([series, *dense, *(shown(of_rank[k].losses, 3) if k in of_rank else "-" for k in ranks)])
    return table(["val loss", "dense", *(f"k={k}" for k in ranks)], lines)


def parameter_table(rows):
    groups = list(dict.fromkeys(group for row in rows for group in row.one("parameters") if group != "total"))
    header = ["model", *(g.replace("_", " ") for g in groups), "total", "head MFLOP/token", "tokens/s", "peak memory"]
    lines = []
    for row in rows:
        counts = row.one("parameters")
        head = row.one("flops_per_token", "head") / 1e6
        cells = [*(f"{counts.get(g, 0):,}" for g in groups), f"{counts['total']:,}", f"{head:.2f}"]
        memory = max(row.values("peak_memory_bytes")) / 2**20
        lines.append([title(row), *cells, shown(row.values("tokens_per_second"), 0), f"{memory:,.0f} MiB"])
    return table(header, lines)


def factor_table(factors):
    header = ["method", "k", "energy kept", "error per row", "error per token", "table parameters", "compression"]
    lines = [
        [method, f["k"], f"{f['energy']:.1%}", f"{f['relative_error']:.4f}", shown([f["relative_error_per_token"]], 4),
         f"{f['parameters']:,}", f"{f['compression']:.2f}x"]
        for method, ranks in factors.items() for f in ranks
    ]  # fmt: skip
    return table(header, lines)


# -- the report -------------------------------------------------------------------------------------------------------


def unigram_line(rows):
    entropy = rows[0].one("val_unigram_entropy")
    said = f"Unigram entropy of the validation text, what a model without context can reach: {entropy:.4f} nats."
    for row in rows:
        if row.label == "D":
            said += f" D lies {entropy - mean(row.values('best', 'val_loss')):.3f} nats under it."
    return said


def figures(root, rows, factors):
    """Write the figures as PNG and SVG; returns [(caption, file name)]."""
    from reports.plots import curves_plot, scree_plot, series_plot

    first = " (the first seed)" if any(len(row.summaries) > 1 for row in rows) else ""
    dense = [row for row in rows if row.k is None]
    loss, made = "best validation loss (nats per token)", []

    def by_series(x, y):
        """{series: [(x, ys of the seeds)]}, by rank; a row that lacks its x has no point."""
        out = {}
        for row in sorted(rows, key=lambda row: row.k or 0):
            if x(row) is not None:
                out.setdefault(row.series, []).append((x(row), y(row)))
        return {series: out[series] for series in dict.fromkeys(row.series for row in rows) if series in out}

    order = list(dict.fromkeys(row.series for row in rows))  # one style a series, in every figure

    def draw(name, caption, panels, **how):
        series_plot(root / name, panels, order, **how)
        made.append((caption, f"{name}.png"))

    def seconds(row):
        known = [s for s in total_seconds(row, rows) if s is not None]
        return mean(known) if known else None

    several = len({row.k for row in rows if row.k}) > 1
    if several:
        rules = {row.series: mean(row.losses) for row in dense}
        as_cut = by_series(lambda row: None if row.one("tokens") else row.k, lambda row: row.losses)
        trained = by_series(lambda row: row.k if row.one("tokens") else None, lambda row: row.losses)
        baseline = {series: y for series, y in rules.items() if series == "baseline"}
        kinds = (("as cut", as_cut, baseline), ("trained", trained, rules))
        panels = [(f"{loss}, {kind}", points, lines) for kind, points, lines in kinds if points]
        draw(
            "loss_by_rank", "Best validation loss by rank of the token table", panels, x="rank k of the token table", ranks=True
        )
    points = by_series(lambda row: row.stored, lambda row: row.losses)
    panels = [(loss, points, {})]
    draw("loss_against_parameters", "Best validation loss against stored parameters", panels, x="stored parameters", front=True)
    caption = "Best validation loss against seconds of training, those of the run a model starts from included"
    panels = [(loss, by_series(seconds, lambda row: row.losses), {})]
    draw("loss_against_seconds", caption, panels, x="seconds of training", front=True)
    if several:
        panels = [
            (
                key,
                by_series(lambda row: row.k, lambda row, key=key: row.values("best", key)),
                {row.series: mean(row.values("best", key)) for row in dense},
            )
            for key in ("ln_f_cosine", "ln_f_cosine_full")
        ]
        draw("ln_f_cosine", "ln_f_cosine by rank, in the head's own space and in d-space", panels, x="rank k", ranks=True)
    curves = {}
    for row in (row for row in rows if row.one("tokens")):
        seed, folder = next(iter(row.folders.items()))
        start = row.one("starts_from") or {}
        before = start["tokens"] if start.get("part") == "all weights" else 0
        curves[row.series, row.k] = [(before + tokens, value) for _, tokens, value in read_curve(folder)]
    curves_plot(root / "validation_curves", curves, order, rows[0].one("val_unigram_entropy"))
    caption = f"Validation loss over training tokens, those of the run that all weights come from included{first}"
    made.append((caption, "validation_curves.png"))
    if factors:
        spectra = {method: ranks[0]["singular_values"] for method, ranks in factors.items()}
        scree_plot(root / "scree", spectra, sorted({f["k"] for ranks in factors.values() for f in ranks}))
        caption = f"Spectrum of the baseline's token table, in the metric of each method{first}"
        made.append((caption, "scree.png"))
    return made


def table_section(root, rows):
    """The token table's part of the report -> (lines for the terminal, lines of markdown, the claims that it judges)."""
    factors = read_factors(root)
    dense = next((row.one("parameters", "token_table") for row in rows if row.k is None), None)
    results, answers = result_table(rows, dense), comparisons(rows)
    by_rank = ["## Loss by rank", "", rank_table(rows), ""] if len({row.k for row in rows if row.k}) > 1 else []
    claims = SEEDS_CLAIMS, our_claims(rows)
    text = ["# How low-rank is the token table?", "", *provenance_lines(rows), "", results, ""]
    text += [*(f"- {title(row)}: {row.what}." for row in rows if row.what), "", READING, "", unigram_line(rows), "", *by_rank]
    text += ["## What holds", "", "Of the seeds' claims:", "", *claim_lines(claims[0], rows)]
    if ours := claim_lines(claims[1], rows):
        text += ["Of ours:", "", *ours]
    text += ["## What the comparisons say", "", *answers, ""] if answers else []
    text += ["## Parameters by group, and cost", "", parameter_table(rows), ""]
    if factors:
        text += ["## The factorization", "", factor_table(factors), ""]
    for caption, name in figures(root, rows, factors):
        text += [f"![{caption}]({name})", "", f"*{caption}*", ""]
    return [results, "", *by_rank, *answers, "", unigram_line(rows)], text, claims


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    root = Path(args.runs)
    rows, unfinished = read_rows(root)
    if not rows:
        fail(f"--runs {root} has no finished run: bash scripts/run_all_experiments.sh 128 makes them")
    text = []
    for part, of_cache in ((table_section, False), (cache_report.section, True)):
        if some := [row for row in rows if row.of_cache == of_cache]:
            said, lines, claims = part(root, some)
            print("\n".join(said))
            for claim, verdict, _ in judge([claim for group in claims for claim in group], some):
                print(f"- {claim.text}: {verdict}")
            text += lines
    notes = [f"Not finished, so left out: {folder}" for folder in unfinished]
    print(*notes, sep="\n")
    (root / "report.md").write_text("\n".join([*text, *notes]))
    finish(report=str(root / "report.md"), runs=sum(len(row.summaries) for row in rows), unfinished=len(unfinished))


if __name__ == "__main__":
    main()
