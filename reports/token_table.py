"""The report on the token table: tables, verdicts on claims, figures, and a short version for the terminal."""

import textwrap

from common.plots import Figure, Panel, Point, front, scree
from reports.claims import MARGIN, SEEDS_CLAIMS, judged_claims, our_claims
from reports.compare import comparisons, difference, mean, pairs, shown, shown_p, spread
from reports.markdown import Table
from reports.rows import provenance_lines, read_curve, read_factors, total_seconds

READING = (
    "The loss is in nats per token, at the run's best step, which was chosen on the same windows that are reported. Stored: "
    "parameters after adapters are merged. Tokens are training tokens: those of the run that a run starts from + its own. "
    "Seconds are the run's own training time. ln_f_cosine is measured in the head's space, d or k wide, ln_f_cosine_full in d "
    "dimensions. Neither measures the quality of a table: ln_f_cosine_full rises when a table shrinks and the loss gets worse. "
    "± is the standard deviation over seeds. The p values are not corrected for the number of comparisons."
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
    return Table(header, lines)


def rank_table(rows, spreads=True):
    """A table with a row for each series and a column for each rank. spreads: add the standard deviation over seeds."""
    ranks = sorted({row.k for row in rows if row.k})

    def cell(row):
        return shown(row.losses if spreads else [mean(row.losses)], 3)

    lines = []
    for series in dict.fromkeys(row.series for row in rows):
        of_rank = {row.k: row for row in rows if row.series == series}
        lines.append([series, *(cell(of_rank[k]) if k in of_rank else "-" for k in (None, *ranks))])
    return Table(["val loss", "dense", *(f"k={k}" for k in ranks)], lines)


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
    return Table(header, lines)


def factor_table(factors):
    header = ["method", "k", "energy kept", "error per row", "error per token", "table parameters", "compression"]
    lines = [
        [method, f["k"], f"{f['energy']:.1%}", f"{f['relative_error']:.4f}", shown([f["relative_error_per_token"]], 4),
         f"{f['parameters']:,}", f"{f['compression']:.2f}x"]
        for method, ranks in factors.items() for f in ranks
    ]  # fmt: skip
    return Table(header, lines)


# -- figures ----------------------------------------------------------------------------------------------------------

FEW = 7  # the most lines that one panel shows clearly
LOSS = "validation loss (nats per token)"


def by_series(rows, x, y):
    """{series: [Point(x(row), y(row) of each seed)]}, sorted by rank. A row whose x is None has no point."""
    found = {}
    for row in sorted(rows, key=lambda row: row.k or 0):
        if x(row) is not None:
            found.setdefault(row.series, []).append(Point(x(row), y(row), f"rank {row.k}" if row.k else ""))
    return {series: found[series] for series in dict.fromkeys(row.series for row in rows) if series in found}


def losses(row):
    return row.losses


def loss_of(row):
    return mean(row.losses)


def rank_of(row):
    return row.k


def named(row):
    return f"{row.series}{f', k={row.k}' if row.k else ''}"


def groups(rows):
    """{title: rows}, one entry for each panel: all rows together if they are few, otherwise by how their tables were made."""
    if len({row.series for row in rows}) <= FEW:
        return {"": rows}
    return {group: [r for r in rows if r.group == group] for group in dict.fromkeys(r.group for r in rows if r.k)}


def figures(rows, factors):
    """The figures of the token table. Each title states the answer."""
    order = list(dict.fromkeys(row.series for row in rows))  # a series has the same style in every figure
    first = " (the first seed)" if any(len(row.summaries) > 1 for row in rows) else ""
    several = len({row.k for row in rows if row.k}) > 1

    def seconds(row):
        known = [s for s in total_seconds(row, rows) if s is not None]
        return mean(known) if known else None

    dense = [row for row in rows if row.k is None]

    def against(name, title, caption, x, label):
        panels = [
            Panel(by_series([*dense, *some], x, losses), label, LOSS, group, front=True, xscale="log")
            for group, some in groups([row for row in rows if row.k] or rows).items()
        ]
        return Figure(name, title, caption, panels, order)

    of_seconds = "Best validation loss against seconds of training, including those of the starting model"
    found = [
        *([loss_by_rank(rows, order)] if several else []),
        against("loss_against_parameters", smallest_within(rows, lambda row: row.stored, "parameters"),
                "Best validation loss against stored parameters", lambda row: row.stored, "stored parameters"),
        against("loss_against_seconds", best_for_its(seconds, rows, "seconds"), of_seconds, seconds, "seconds of training"),
        *([cosines_by_rank(rows, order)] if several else []),
        *validation_curves(rows, order, first),
    ]  # fmt: skip
    if factors:
        spectra = {method: ranks[0]["singular_values"] for method, ranks in factors.items()}
        ranks = sorted({f["k"] for ranks in factors.values() for f in ranks})
        caption = f"Spectrum of the baseline's token table, in the metric of each method{first}"
        found.append(scree("scree", spectra, ranks, caption))
    return found


def smallest_within(rows, size, what):
    """A sentence: the smallest model that loses at most MARGIN to the best dense one. size: row -> a count of `what`."""
    dense = min((row for row in rows if row.k is None), key=loss_of, default=None)
    smaller = [row for row in rows if dense and size(row) < size(dense)]
    if not smaller:
        return "No dense and smaller models to compare"
    near = [row for row in smaller if loss_of(row) - loss_of(dense) <= MARGIN]
    best = min(near, key=size) if near else min(smaller, key=loss_of)
    gap = loss_of(best) - loss_of(dense)
    kept = f"{named(best)}, {size(best):,} of {size(dense):,} {what}, {abs(gap):.3f} nats {'under' if gap < 0 else 'over'} it"
    which = "Smallest" if near else "No smaller model is"
    return f"{which} within {MARGIN} nats of {dense.series}{': ' if near else '; the nearest: '}{kept}"


def best_for_its(size, rows, what):
    """A sentence: the models that no other beats in both loss and `what`. size: row -> a count of `what`, or None."""
    points = {(size(row), loss_of(row)): named(row) for row in rows if size(row) is not None}
    names = [points[corner] for corner in front(Panel({"": [Point(x, [y]) for x, y in points]}, "", ""))]
    some = names if len(names) < 5 else [names[0], f"{len(names) - 2} others", names[-1]]
    return f"Lowest loss for their {what}: {'; '.join(some)}"


def loss_by_rank(rows, order):
    """The figure of losses by rank: one panel for models right after the cut, others for models that were trained."""
    rules = {row.series: loss_of(row) for row in rows if row.k is None}
    baseline = {series: y for series, y in rules.items() if series == "baseline"}
    low, panels = [row for row in rows if row.k], []
    for group in dict.fromkeys(row.group for row in low):
        some = [row for row in low if row.group == group]
        ranks = {k: min((r for r in some if r.k == k), key=loss_of).series for k in sorted({row.k for row in some})}
        best = {name: ", ".join(f"{k}" for k in ranks if ranks[k] == name) for name in ranks.values()}
        lowest = "; ".join(f"{name}{f' at {ks}' if len(best) > 1 else ''}" for name, ks in best.items())
        panels.append(Panel(by_series(some, rank_of, losses), "rank k of the token table", LOSS,
                            f"{group}, lowest: {lowest}", baseline if group == "as cut" else rules,
                            xscale="ranks"))  # fmt: skip
    title, dense = "Best validation loss by rank of the token table", min(rules.values(), default=None)
    if dense is not None:
        ranks = sorted({row.k for row in low})
        costs = [min(loss_of(row) for row in low if row.k == k) - dense for k in (ranks[0], ranks[-1])]
        title = f"Nats above the best dense model: {costs[0]:.3f} for the best of rank {ranks[0]}, "
        title += f"{costs[1]:.3f} for the best of rank {ranks[-1]}"
    return Figure("loss_by_rank", title, "Best validation loss by rank of the token table", panels, order, same_y=False)


def cosines_by_rank(rows, order):
    panels, low = [], [row for row in rows if row.k]
    for name in ("ln_f_cosine", "ln_f_cosine_full"):
        rules = {row.series: mean(row.values("best", name)) for row in rows if row.label == "D"}
        for group, some in groups(low).items():
            points = by_series(some, rank_of, lambda row, name=name: row.values("best", name))
            panels.append(Panel(points, "rank k", name, group, rules, xscale="ranks"))
    pairs = [(some[0], some[-1]) for some in of_series(low).values() if len(some) > 1]
    odd = [1 for a, b in pairs if mean(a.values("best", "ln_f_cosine_full")) > mean(b.values("best", "ln_f_cosine_full"))
           and loss_of(a) > loss_of(b)]  # fmt: skip
    title = f"ln_f_cosine_full is larger at the smallest rank, where the loss is worse, in {len(odd)} of {len(pairs)} series"
    caption = "ln_f_cosine by rank, in the head's space and in d dimensions"
    return Figure("ln_f_cosine", title, caption, panels, order, same_y=False)


def of_series(rows):
    """{series: rows sorted by rank}"""
    found = {}
    for row in sorted(rows, key=rank_of):
        found.setdefault(row.series, []).append(row)
    return found


def curve(row):
    """The evaluations of a row's first run as points. x includes the tokens of the run that all its weights come from."""
    start = row.one("starts_from") or {}
    before = start["tokens"] if start.get("part") == "all weights" else 0
    evaluations = read_curve(next(iter(row.folders.values())))
    return [Point((before or 0) + tokens, [value], f"step {step:,}") for step, tokens, value in evaluations]


def without_the_start(curves):
    """Limits of the y axis. They cut off the first evaluations, whose high losses would flatten the rest."""
    every = sorted(point.y for points in curves for point in points)
    high = every[round(0.8 * (len(every) - 1))]
    room = 0.05 * (high - every[0]) or 0.1
    return every[0] - room, high + room


def validation_curves(rows, order, first):
    """[The figure], or [] if nothing was trained. It has a panel for each rank and group; each also shows the dense models."""
    curves = {row.name: curve(row) for row in rows if row.one("tokens")}
    rows = [row for row in rows if curves.get(row.name)]
    if not rows:
        return []
    unigram, ylim = rows[0].one("val_unigram_entropy"), without_the_start(curves.values())
    rules = {"unigram entropy": unigram} if unigram < ylim[1] else {}
    dense, panels = [row for row in rows if row.k is None], []
    for group, some in groups([row for row in rows if row.k] or rows).items():
        for k in sorted({row.k for row in some if row.k}) or [None]:
            lines = {row.series: curves[row.name] for row in [*dense, *(row for row in some if row.k == k and k)]}
            title = ", ".join(filter(None, (group, f"k = {k}" if k else "dense")))
            panels.append(Panel(lines, "training tokens", LOSS, title, rules, ylim=ylim))
    best = min(rows, key=lambda row: curves[row.name][-1].y)
    title = f"{named(best)} ends lowest: {curves[best.name][-1].y:.3f} nats after {curves[best.name][-1].x:,} tokens"
    caption = f"Validation loss over training tokens, including those of the run that all weights come from{first}"
    return [Figure("validation_curves", title, caption, panels, order)]


# -- the terminal -----------------------------------------------------------------------------------------------------

# Names of the main job's models; {k} is the rank.
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
QUESTIONS = (  # a question, the two models that answer it, the control with equal tokens
    ("Does a PCA start help?", "A", "C", None),
    ("What does the smaller table cost?", "A", "D", None),
    ("Is fine-tuning better than starting from scratch?", "B", "A", None),
    ("Does the compressed model reach the baseline?", "B", "D", "D+"),
)


def short_table(rows, dense):
    """A table with few columns, at most 100 characters wide."""
    if len({row.k for row in rows if row.k}) > 2 or any(row.label not in IN_TABLE for row in rows):
        return rank_table(rows, spreads=False)
    lines = []
    for row in rows:
        stored = row.one("parameters", "token_table")
        smaller = f"{dense / stored:.2f}x" if dense else "-"
        ppl = f"{mean(row.values('best', 'val_ppl')):.1f}"
        lines.append([IN_TABLE[row.label].format(k=row.k), f"{stored:,}", smaller, f"{mean(row.losses):.3f}", ppl])
    return Table(["model", "token table", "smaller", "val loss", "perplexity"], lines)


def gap(first, second):
    """'0.120 nats under the random start (C)', with the paired test if there are several seeds; None if not comparable."""
    found = difference(first, second)
    if found.problem:
        return None
    value, name = mean(found.values), IN_SENTENCE[second.label].format(k=second.k)
    test = "" if found.p is None else f", {shown_p(found.p)} over {len(found.values)} seeds, spread {spread(found.values):.3f}"
    return f"{abs(value):.3f} nats {'under' if value < 0 else 'over'} {name}{test}"


def capital(text):
    return text[0].upper() + text[1:]


def answers(rows):
    """The main job's four questions with one sentence as answer, in lines of at most 100 characters."""
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
    sentence = f"Unigram entropy of the validation text, the lowest loss without context: {entropy:.4f} nats."
    for row in (row for row in rows if row.label == "D"):
        under = entropy - mean(row.values("best", "val_loss"))
        sentence += f" D is {abs(under):.3f} nats {'over' if under < 0 else 'under'} it."
    return sentence


# -- the report -------------------------------------------------------------------------------------------------------


def kinds(rows):
    """The meaning of the labels: a line for each, with the ranks that were run."""
    ranks = {}
    for row in (row for row in rows if row.what):
        ranks.setdefault((row.label, row.what), []).append(row.k)
    return [f"- {label}: {what}{at(ks)}." for (label, what), ks in ranks.items()]


def at(ranks):
    return f" (rank {', '.join(map(str, ranks))})" if any(ranks) else ""


def section(root, rows):
    """The token table's part of the report -> (lines for the terminal, its parts, the claims that it judges)."""
    factors, found = read_factors(root), answers(rows)
    dense = next((row.one("parameters", "token_table") for row in rows if row.k is None), None)
    by_rank = ["## Loss by rank", "", rank_table(rows), ""] if len({row.k for row in rows if row.k}) > 1 else []
    claims, compared = (SEEDS_CLAIMS, our_claims(rows)), comparisons(rows)
    text = ["# How low-rank is the token table?", "", *found, *([""] if found else [])]
    text += [result_table(rows, dense), "", *kinds(rows), "", *by_rank]
    text += ["## Figures", "", *figures(rows, factors)]
    text += ["## How it was measured", "", *provenance_lines(rows), "", READING, "", unigram_line(rows), ""]
    text += ["## Which claims hold", "", "Claims of the original scripts:", "", *judged_claims(claims[0], rows)]
    if ours := judged_claims(claims[1], rows):
        text += ["Our claims:", "", *ours]
    text += ["## Comparisons", "", *compared, ""] if compared else []
    text += ["## Parameters by group and cost", "", parameter_table(rows), ""]
    if factors:
        text += ["## The factorization", "", factor_table(factors), ""]
    return [*str(short_table(rows, dense)).splitlines(), "", *found], text, claims
