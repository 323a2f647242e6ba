"""The report on the token table: its tables, what holds, its figures, and the few lines for the terminal."""

import textwrap

from common.plots import Figure, draw_all
from reports.claims import SEEDS_CLAIMS, claim_lines, our_claims
from reports.compare import comparisons, difference, mean, pairs, shown, shown_p, spread
from reports.markdown import table
from reports.rows import provenance_lines, read_curve, read_factors, total_seconds

READING = (
    "The loss is in nats per token, at the run's own best step, which is chosen on the same windows that are reported. "
    "Stored counts adapters as merged. Tokens are training tokens: those of what a run starts from + its own. Seconds are its "
    "own, of training alone. ln_f_cosine lives in the head's own space, d or k wide. ln_f_cosine_full lives in d-space, "
    "yet it rises when a table shrinks and the loss gets worse: neither measures quality between tables. ± is the standard "
    "deviation over seeds. The p values are not corrected for the number of comparisons."
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
                row.title,
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


def rank_table(rows, spreads=True):
    """A line for each series, a column for each rank; spreads: with the standard deviation over seeds."""
    ranks = sorted({row.k for row in rows if row.k})

    def cell(row):
        return shown(row.losses if spreads else [mean(row.losses)], 3)

    lines = []
    for series in dict.fromkeys(row.series for row in rows):
        of_rank = {row.k: row for row in rows if row.series == series}
        lines.append([series, *(cell(of_rank[k]) if k in of_rank else "-" for k in (None, *ranks))])
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
        lines.append([row.title, *cells, shown(row.values("tokens_per_second"), 0), f"{memory:,.0f} MiB"])
    return table(header, lines)


def factor_table(factors):
    header = ["method", "k", "energy kept", "error per row", "error per token", "table parameters", "compression"]
    lines = [
        [method, f["k"], f"{f['energy']:.1%}", f"{f['relative_error']:.4f}", shown([f["relative_error_per_token"]], 4),
         f"{f['parameters']:,}", f"{f['compression']:.2f}x"]
        for method, ranks in factors.items() for f in ranks
    ]  # fmt: skip
    return table(header, lines)


# -- figures ----------------------------------------------------------------------------------------------------------


def by_series(rows, x, y):
    """{series: [(x(row), y(row) of each seed)]}, by rank. A row whose x is None has no point."""
    found = {}
    for row in sorted(rows, key=lambda row: row.k or 0):
        if x(row) is not None:
            found.setdefault(row.series, []).append((x(row), y(row)))
    return {series: found[series] for series in dict.fromkeys(row.series for row in rows) if series in found}


def losses(row):
    return row.losses


def figures(rows, factors):
    """The figures, as descriptions."""
    order = list(dict.fromkeys(row.series for row in rows))  # one style a series, in every figure
    first = " (the first seed)" if any(len(row.summaries) > 1 for row in rows) else ""
    loss, several = "best validation loss (nats per token)", len({row.k for row in rows if row.k}) > 1

    def seconds(row):
        known = [s for s in total_seconds(row, rows) if s is not None]
        return mean(known) if known else None

    def against(name, caption, x, label):
        panels = [(loss, by_series(rows, x, losses), {})]
        return Figure(name, caption, "series", dict(panels=panels, order=order, x=label, front=True))

    caption = "Best validation loss against seconds of training, those of the run a model starts from included"
    found = [
        *([loss_by_rank(rows, order, loss)] if several else []),
        against("loss_against_parameters", "Best validation loss against stored parameters", lambda row: row.stored,
                "stored parameters"),
        against("loss_against_seconds", caption, seconds, "seconds of training"),
        *([cosines_by_rank(rows, order)] if several else []),
        validation_curves(rows, order, first),
    ]  # fmt: skip
    if factors:
        spectra = {method: ranks[0]["singular_values"] for method, ranks in factors.items()}
        ranks = sorted({f["k"] for ranks in factors.values() for f in ranks})
        caption = f"Spectrum of the baseline's token table, in the metric of each method{first}"
        found.append(Figure("scree", caption, "scree", dict(spectra=spectra, ranks=ranks)))
    return found


def loss_by_rank(rows, order, loss):
    """Two panels: models as they were cut, and models that were trained after it."""
    rules = {row.series: mean(row.losses) for row in rows if row.k is None}
    as_cut = by_series(rows, lambda row: None if row.one("tokens") else row.k, losses)
    trained = by_series(rows, lambda row: row.k if row.one("tokens") else None, losses)
    baseline = {series: y for series, y in rules.items() if series == "baseline"}
    panels = (("as cut", as_cut, baseline), ("trained", trained, rules))
    panels = [(f"{loss}, {kind}", points, lines) for kind, points, lines in panels if points]
    data = dict(panels=panels, order=order, x="rank k of the token table", ranks=True)
    return Figure("loss_by_rank", "Best validation loss by rank of the token table", "series", data)


def cosines_by_rank(rows, order):
    panels = []
    for name in ("ln_f_cosine", "ln_f_cosine_full"):
        rules = {row.series: mean(row.values("best", name)) for row in rows if row.k is None}
        points = by_series(rows, lambda row: row.k, lambda row, name=name: row.values("best", name))
        panels.append((name, points, rules))
    caption = "ln_f_cosine by rank, in the head's own space and in d-space"
    return Figure("ln_f_cosine", caption, "series", dict(panels=panels, order=order, x="rank k", ranks=True))


def validation_curves(rows, order, first):
    curves = {}
    for row in (row for row in rows if row.one("tokens")):
        folder = next(iter(row.folders.values()))
        start = row.one("starts_from") or {}
        before = start["tokens"] if start.get("part") == "all weights" else 0
        curves[row.series, row.k] = [(before + tokens, value) for _, tokens, value in read_curve(folder)]
    caption = f"Validation loss over training tokens, those of the run that all weights come from included{first}"
    data = dict(curves=curves, order=order, unigram=rows[0].one("val_unigram_entropy"))
    return Figure("validation_curves", caption, "curves", data)


# -- the terminal -----------------------------------------------------------------------------------------------------

# The models of the main job in words; {k} is the rank.
IN_TABLE = {
    "D": "dense table, from scratch (D)",
    "A": "rank {k}: PCA of D's table, the rest new (A)",
    "C": "rank {k}: random factors, from scratch (C)",
    "B": "rank {k}: D, table cut by PCA, trained on (B)",
    "D+": "dense table, D with B's extra steps (D+)",
    "A full": "full rank: D's table, the rest new",
}
IN_SENTENCE = {
    "D": "the dense baseline (D)",
    "A": "the PCA start (A, rank {k})",
    "C": "the random start (C)",
    "B": "the compressed and fine-tuned model (B, rank {k})",
    "D+": "the baseline with the same extra steps (D+)",
}
QUESTIONS = (  # a question, the two models that answer it, the control that belongs into the same sentence
    ("Does a PCA start help?", "A", "C", None),
    ("What does the smaller table cost?", "A", "D", None),
    ("Is fine-tuning better than starting from scratch?", "B", "A", None),
    ("Does the compressed model reach the baseline?", "B", "D", "D+"),
)


def short_table(rows, dense):
    """Few columns, 100 characters wide at most."""
    if len({row.k for row in rows if row.k}) > 2 or any(row.label not in IN_TABLE for row in rows):
        return rank_table(rows, spreads=False)
    lines = []
    for row in rows:
        stored = row.one("parameters", "token_table")
        smaller = f"{dense / stored:.2f}x" if dense else "-"
        ppl = f"{mean(row.values('best', 'val_ppl')):.1f}"
        lines.append([IN_TABLE[row.label].format(k=row.k), f"{stored:,}", smaller, f"{mean(row.losses):.3f}", ppl])
    return table(["model", "token table", "smaller", "val loss", "perplexity"], lines)


def gap(first, second):
    """'0.120 nats under the random start (C)', with the paired test where there are seeds; None if not comparable."""
    found = difference(first, second)
    if found.problem:
        return None
    value, name = mean(found.values), IN_SENTENCE[second.label].format(k=second.k)
    test = "" if found.p is None else f", {shown_p(found.p)} over {len(found.values)} seeds, spread {spread(found.values):.3f}"
    return f"{abs(value):.3f} nats {'under' if value < 0 else 'over'} {name}{test}"


def capital(text):
    return text[0].upper() + text[1:]


def answers(rows):
    """The four answers of the main job, a sentence each, as lines of 100 characters."""
    lines = []
    for question, first, second, control in QUESTIONS:
        for a, b in pairs(rows, first, second):
            if b.label not in IN_SENTENCE or not (found := gap(a, b)):
                continue
            sentence = f"{question} {capital(IN_SENTENCE[first].format(k=a.k))} ends {found}"
            if more := round(mean(difference(a, b).more_tokens)):
                sentence += f", with {abs(more):,} training tokens {'more' if more > 0 else 'fewer'}"
            for other in (row for row in rows if row.label == control and row.k is None):
                if found := gap(a, other):
                    sentence += f"; with equal tokens, {found}"
            lines += textwrap.wrap(f"{sentence}.", 100, initial_indent="- ", subsequent_indent="  ")
    return lines


def unigram_line(rows):
    entropy = rows[0].one("val_unigram_entropy")
    sentence = f"Unigram entropy of the validation text, what a model without context can reach: {entropy:.4f} nats."
    for row in (row for row in rows if row.label == "D"):
        sentence += f" D lies {entropy - mean(row.values('best', 'val_loss')):.3f} nats under it."
    return sentence


# -- the report -------------------------------------------------------------------------------------------------------


def section(root, rows):
    """The token table's part of the report -> (lines for the terminal, lines of markdown, the claims that it judges)."""
    factors = read_factors(root)
    dense = next((row.one("parameters", "token_table") for row in rows if row.k is None), None)
    by_rank = ["## Loss by rank", "", rank_table(rows), ""] if len({row.k for row in rows if row.k}) > 1 else []
    claims, compared = (SEEDS_CLAIMS, our_claims(rows)), comparisons(rows)
    text = ["# How low-rank is the token table?", "", *provenance_lines(rows), "", result_table(rows, dense), ""]
    text += [*(f"- {row.title}: {row.what}." for row in rows if row.what), "", READING, "", unigram_line(rows), "", *by_rank]
    text += ["## What holds", "", "Of the seeds' claims:", "", *claim_lines(claims[0], rows)]
    if ours := claim_lines(claims[1], rows):
        text += ["Of ours:", "", *ours]
    text += ["## What the comparisons say", "", *compared, ""] if compared else []
    text += ["## Parameters by group, and cost", "", parameter_table(rows), ""]
    if factors:
        text += ["## The factorization", "", factor_table(factors), ""]
    text += draw_all(root, figures(rows, factors))
    return [*short_table(rows, dense).splitlines(), "", *answers(rows)], text, claims
