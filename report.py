"""
Run folders -> tables, what they say in words, and the figures: report.md, PNGs and SVGs, the tables on the terminal too.

    python report.py --runs model_weights

Everything is read from the folders' config.json, summary.json and metrics.jsonl and from the factor files' JSON.
Runs of one name with different seeds, as in model_weights/seed_1/gpt_baseline, make one row: mean and standard deviation.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cli import fail, finish, flag, parse
from compare import SEEDS_CLAIMS, comparisons, judge, mean, our_claims, shown, shown_p, spread
from runs import read_curve, read_factors, read_rows, total_seconds


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


def table(header, lines):
    """A markdown table that is aligned, so that it reads on a terminal too."""
    cells = [header, *lines]
    widths = [max(len(str(row[i])) for row in cells) for i in range(len(header))]

    def line(row):
        padded = (str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2 if i == 0 else w + 1) + ("" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in lines)])


def title(row):
    return f"{row.label} {row.name}".strip()


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


def claim_lines(claims, rows):
    """A verdict for each claim, and the numbers that it follows from: markdown lines."""
    lines = []
    for claim, verdict, found in judge(claims, rows):
        at = claim.ranks if found else "not run"
        lines += [f"**{claim.text}: {verdict}** ({at}). {claim.note}".strip(), ""]
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
        lines += [table(header, cells), ""] if cells else []
    return lines


def unigram_line(rows):
    entropy = rows[0].one("val_unigram_entropy")
    said = f"Unigram entropy of the validation text, what a model without context can reach: {entropy:.4f} nats."
    for row in rows:
        if row.label == "D":
            said += f" D lies {entropy - mean(row.values('best', 'val_loss')):.3f} nats under it."
    return said


def figures(root, rows, factors):
    """Write the figures as PNG and SVG; returns [(caption, file name)]."""
    from plots import curves_plot, scree_plot, series_plot

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
        curves[row.series, row.k] = [(before + tokens, value) for tokens, value in read_curve(folder)]
    curves_plot(root / "validation_curves", curves, order, rows[0].one("val_unigram_entropy"))
    caption = f"Validation loss over training tokens, those of the run that all weights come from included{first}"
    made.append((caption, "validation_curves.png"))
    if factors:
        spectra = {method: ranks[0]["singular_values"] for method, ranks in factors.items()}
        scree_plot(root / "scree", spectra, sorted({f["k"] for ranks in factors.values() for f in ranks}))
        caption = f"Spectrum of the baseline's token table, in the metric of each method{first}"
        made.append((caption, "scree.png"))
    return made


def provenance_lines(rows):
    configs = [json.loads((folder / "config.json").read_text()) for row in rows for folder in row.folders.values()]

    def all_of(values):
        return ", ".join(sorted(set(map(str, values))))

    def over_runs(*path):
        return all_of(f"{x:,}" if isinstance(x, int) else x for row in rows for x in row.values(*path))

    versions = all_of(f"{name} {version}" for config in configs for name, version in config["versions"].items())
    seeds = all_of(seed for row in rows for seed in row.summaries)
    return [
        f"Dataset {over_runs('dataset')}, {over_runs('tokens_per_step')} tokens a step, evaluated on "
        f"{over_runs('eval_tokens')} tokens. Seeds: {seeds}.",
        f"{all_of(config['hardware'] for config in configs)}; {versions}; commit {all_of(c['commit'] for c in configs)}. "
        f"First command: `{configs[0]['command']}`",
    ]


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    root = Path(args.runs)
    rows, unfinished = read_rows(root)
    if not rows:
        fail(f"--runs {root} has no finished run: bash scripts/run_all_experiments.sh 128 makes them")
    factors = read_factors(root)
    dense = next((row.one("parameters", "token_table") for row in rows if row.k is None), None)
    results, answers = result_table(rows, dense), comparisons(rows)
    by_rank = ["## Loss by rank", "", rank_table(rows), ""] if len({row.k for row in rows if row.k}) > 1 else []
    holds = ["## What holds", "", "Of the seeds' claims:", "", *claim_lines(SEEDS_CLAIMS, rows)]
    if ours := claim_lines(our_claims(rows), rows):
        holds += ["Of ours:", "", *ours]
    notes = [unigram_line(rows)] + [f"Not finished, so left out: {folder}" for folder in unfinished]
    legend = [f"- {title(row)}: {row.what}." for row in rows if row.what]

    print("\n".join([results, "", *by_rank, *answers, "", *notes]))
    for claims in (SEEDS_CLAIMS, our_claims(rows)):
        for claim, verdict, _ in judge(claims, rows):
            print(f"- {claim.text}: {verdict}")
    text = ["# How low-rank is the token table?", "", *provenance_lines(rows), "", results, ""]
    text += [*legend, "", READING, ""]
    text += [*notes, "", *by_rank, *holds]
    text += ["## What the comparisons say", "", *answers, ""] if answers else []
    text += ["## Parameters by group, and cost", "", parameter_table(rows), ""]
    if factors:
        text += ["## The factorization", "", factor_table(factors), ""]
    for caption, name in figures(root, rows, factors):
        text += [f"![{caption}]({name})", "", f"*{caption}*", ""]
    (root / "report.md").write_text("\n".join(text))
    finish(report=str(root / "report.md"), runs=sum(len(row.summaries) for row in rows), unfinished=len(unfinished))


if __name__ == "__main__":
    main()
