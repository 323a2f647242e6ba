"""
Run folders -> one table, what it says in words, and the figures: report.md and PNGs, the table on the terminal too.

    python report.py --runs model_weights

Everything is read from the folders' config.json, summary.json and metrics.jsonl and from the factor files' JSON.
Runs of one name with different seeds, as in model_weights/seed_1/gpt_baseline, make one row: mean and standard deviation.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cli import fail, finish, flag, parse


@dataclass
class Args:
    runs: str = flag("model_weights", "folder with run folders, or with seed_N folders of them; report.md goes there")


# Rows in the order of the seeds' table: label, folder name (\d+ is the rank), what it is.
ROWS = (
    ("D", r"gpt_baseline", "dense table, from scratch"),
    ("A", r"gpt_pca_k\d+", "PCA table, the rest from scratch"),
    ("C", r"gpt_random_lowrank_k\d+", "random factors, from scratch"),
    ("B", r"gpt_pca_finetune_k\d+", "D, its table factorized, trained on"),
    ("D+", r"gpt_baseline_more", "B's control: D, dense, as many steps more"),
)

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


READING = (
    "The loss is in nats per token, at the run's own best step, which is chosen on the same windows that are reported. "
    "Tokens are training tokens: those of what a run starts from + its own. ln_f_cosine lives in the head's own space, d or k "
    "wide; only ln_f_cosine_full compares between rows. ± is the standard deviation over seeds; the p values of the "
    "comparisons stand alone, none is corrected for the others."
)


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One model: the runs of one folder name, a run for each seed."""

    label: str
    name: str
    what: str
    summaries: dict  # seed -> summary.json
    folders: dict  # seed -> its folder

    def values(self, *path):
        """One number for each seed, None where a run has none."""
        out = []
        for summary in self.summaries.values():
            for key in path:
                summary = summary[key]
            out.append(summary)
        return out

    def one(self, *path):
        return self.values(*path)[0]

    @property
    def k(self):
        return self.one("n_embd_wte")


def read_rows(root):
    """Returns (the finished runs as rows, the folders of unfinished ones)."""
    configs = sorted(p for pattern in ("*/config.json", "seed_*/*/config.json") for p in root.glob(pattern))
    found, unfinished = {}, []
    for config in configs:
        folder = config.parent
        if not (folder / "summary.json").exists():
            unfinished.append(folder)
            continue
        try:
            summary = json.loads((folder / "summary.json").read_text())
            seed = summary["seed"]
        except (ValueError, KeyError):
            fail(f"{folder / 'summary.json'} is not what train.py writes: delete the folder and run it again")
        row = found.setdefault(folder.name, Row("", folder.name, "", {}, {}))
        if seed in row.summaries:
            fail(f"{folder} and {row.folders[seed]} are one run with one seed, {seed}: move one out of {root}")
        row.summaries[seed], row.folders[seed] = summary, folder
    rows = []
    for label, pattern, what in ROWS:
        names = [name for name in found if re.fullmatch(pattern, name)]
        for name in sorted(names, key=lambda name: found[name].k or 0):
            row = found.pop(name)
            row.label, row.what = label, what
            if label == "A" and row.k == row.one("n_embd"):
                row.label, row.what = "A full", "A's control: D's whole table as factors of full rank, the rest from scratch"
            rows.append(row)
    return rows + list(found.values()), unfinished


def read_curve(folder):
    """The evaluations of a run: [(tokens it had trained on itself, val_loss)]."""
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["tokens"], line["val_loss"]) for line in lines if "val_loss" in line]
    except (OSError, ValueError, KeyError) as error:
        fail(f"{folder / 'metrics.jsonl'} cannot be read ({error}): delete the folder and run it again")


def read_factors(root):
    """The JSON of every factor file, by method: {method: [facts, by rank]}."""
    found = {}
    for path in sorted([*root.glob("pca_factorized/factors_*.json"), *root.glob("seed_*/pca_factorized/factors_*.json")]):
        try:
            facts = json.loads(path.read_text())
            found.setdefault(facts["method"], {}).setdefault(facts["k"], facts)  # of several seeds, the first
        except (ValueError, KeyError, TypeError):
            fail(f"{path} is not what pca_factorize_wte.py writes: delete it, or factorize the checkpoint again")
    return {method: [ranks[k] for k in sorted(ranks)] for method, ranks in found.items()}


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


# What two runs must share for their losses to be compared, beside the text they are evaluated on.
COMMON = ("eval_tokens", "tokens_per_step", "n_embd", "positions", "attention", "mlp", "norms")


def conditions(summary):
    flat = summary | summary["parameters"]
    return [summary["dataset"], summary["val_unigram_entropy"], *(flat[key] for key in COMMON)]


def training_tokens(summary):
    """A run's own and those of what it starts from, its token table's at the least."""
    return summary["tokens"] + ((summary["starts_from"] or {}).get("tokens") or 0)


def comparison(first, second, subject):
    """A sentence about the first row against the second, which follows from the best losses of the seeds both have."""
    seeds = [seed for seed in first.summaries if seed in second.summaries]
    name = f"{first.label} vs {second.label}" + (f" (k={first.k})" if first.k else "")
    if not seeds:
        return f"{name}: no seed in common, so no comparison."
    pairs = [(first.summaries[seed], second.summaries[seed]) for seed in seeds]
    for a, b in pairs:
        for key, x, y in zip(("dataset", "val_unigram_entropy", *COMMON), conditions(a), conditions(b)):
            if x != y:
                return f"{name}: not comparable, {key.replace('_', ' ')} is {x} for one and {y} for the other."
    diffs = [first.summaries[s]["best"]["val_loss"] - second.summaries[s]["best"]["val_loss"] for s in seeds]
    gap = mean(diffs)
    said = f"{name}: {subject} is {abs(gap):.3f} nats {'better' if gap < 0 else 'worse'}"
    if abs(gap) < 0.0005:
        said = f"{name}: {subject} makes no difference to 0.001 nats"
    more = training_tokens(a) - training_tokens(b)
    if more:
        said += f", with {abs(more):,} training tokens {'more' if more > 0 else 'fewer'}, counting what each starts from"
    if len(seeds) == 1:
        return f"{said}; one seed, so inconclusive."
    p = paired_p(diffs)
    shown_p = f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"
    verdict = "" if p < 0.05 else ", so inconclusive"
    return f"{said} (spread {spread(diffs):.3f} over {len(seeds)} seeds, paired t-test {shown_p}{verdict})."


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
    header = ["model", "token table", "compression", "all parameters", "val loss", "perplexity", "best step",
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
                f"{row.one('parameters', 'total'):,}",
                shown(row.values("best", "val_loss"), 4),
                shown(row.values("best", "val_ppl"), 2),
                shown(row.values("best", "iter"), 0),
                tokens,
                shown(row.values("seconds"), 0),
                shown(row.values("best", "ln_f_cosine"), 3),
                shown(row.values("best", "ln_f_cosine_full"), 3),
            ]
        )
    return table(header, lines)


def parameter_table(rows):
    groups = list(rows[0].one("parameters"))
    header = ["model", *(g.replace("_", " ") for g in groups), "trained", "head MFLOP/token", "tokens/s", "peak memory"]
    lines = []
    for row in rows:
        counts = row.one("parameters")
        head = row.one("flops_per_token", "head") / 1e6
        cells = [*(f"{counts[g]:,}" for g in groups), f"{row.one('parameters_trained'):,}", f"{head:.2f}"]
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


def comparisons(rows):
    """The seeds' four questions and the control, for every rank that was run: markdown lines."""
    lines = []
    for first, second, question, subject in COMPARISONS:
        for a in (row for row in rows if row.label == first):
            for b in (row for row in rows if row.label == second and (row.label == "A full" or row.k in (None, a.k))):
                lines.append(f"- {question} {comparison(a, b, subject.format(k=a.k, d=a.one('n_embd')))}")
    return lines


def unigram_line(rows):
    entropy = rows[0].one("val_unigram_entropy")
    said = f"Unigram entropy of the validation text, what a model without context can reach: {entropy:.4f} nats."
    for row in rows:
        if row.label == "D":
            said += f" D lies {entropy - mean(row.values('best', 'val_loss')):.3f} nats under it."
    return said


def figures(root, rows, factors):
    """Write the PNGs; returns [(caption, file name)]."""
    from plots import curves_plot, parameters_plot, scree_plot

    entropy = rows[0].one("val_unigram_entropy")
    first = " (the first seed)" if any(len(row.summaries) > 1 for row in rows) else ""
    curves = {}
    for row in rows:
        seed, folder = next(iter(row.folders.items()))
        start = row.one("starts_from") or {}
        before = start["tokens"] if start.get("part") == "all weights" else 0
        curves[title(row)] = [(before + tokens, loss) for tokens, loss in read_curve(folder)]
    curves_plot(root / "validation_curves.png", curves, entropy)
    points = {title(row): (row.one("parameters", "total"), row.values("best", "val_loss")) for row in rows}
    parameters_plot(root / "loss_against_parameters.png", points)
    made = [
        (
            f"Validation loss over training tokens, those of the run that all weights come from included{first}",
            "validation_curves.png",
        ),
        ("Best validation loss against stored parameters", "loss_against_parameters.png"),
    ]
    if factors:
        spectra = {method: ranks[0]["singular_values"] for method, ranks in factors.items()}
        scree_plot(root / "scree.png", spectra, sorted({f["k"] for ranks in factors.values() for f in ranks}))
        made.append((f"Spectrum of the baseline's token table{first}", "scree.png"))
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
    notes = [unigram_line(rows)] + [f"Not finished, so left out: {folder}" for folder in unfinished]
    legend = [f"- {title(row)}: {row.what}." for row in rows if row.what]

    print("\n".join([results, "", *answers, "", *notes]))
    text = ["# How low-rank is the token table?", "", *provenance_lines(rows), "", results, ""]
    text += [*legend, "", READING, ""]
    text += [*notes, "", "## What the comparisons say", "", *answers, ""]
    text += ["## Parameters by group, and cost", "", parameter_table(rows), ""]
    if factors:
        text += ["## The factorization", "", factor_table(factors), ""]
    for caption, name in figures(root, rows, factors):
        text += [f"![{caption}]({name})", "", f"*{caption}*", ""]
    (root / "report.md").write_text("\n".join(text))
    finish(report=str(root / "report.md"), runs=sum(len(row.summaries) for row in rows), unfinished=len(unfinished))


if __name__ == "__main__":
    main()
