"""results.jsonl of a sweep -> report.md: the table, perplexity against the share kept, ranks by layer, the answers."""

import os
import tempfile
from pathlib import Path

from common.cli import fail
from common.plots import LINES, MARKERS, Figure, draw_all, legend_beside, pyplot, save
from common.untrusted import WHOLE, Positive, expect, read_json, reading
from reports.compare import mean
from reports.markdown import table

READING = (
    "Perplexity is measured on fixed windows of documents that nothing was calibrated on. Change: from the untouched model's, "
    "± its standard error over windows, paired. KL is KL(untouched | changed) in nats per token; top-1 is how often both "
    "models find the same next token likeliest; both, and the figures, over all windows. Share is the share of the components "
    "kept, mean over layers; error is |W - W'| / |W|, output error the same of the outputs on calibration text, both mean "
    "over layers. A cache that keeps the latents of a shared key and value basis has that share of its size."
)
READING_SMALLER = (
    "Low-rank factors in place of the matrices, read back from disk. On disk each matrix is a skeleton, which saves r^2 "
    "numbers that are there again in memory; MB are of float32 weights. The cache's bytes are counted on the tensors of a "
    "cache that the model filled. Tokens/s: greedy decoding of one text after a prompt of one window, both models by turns, "
    "median. Healing: LoRA towards the untouched model's distribution, on calibration text where no other is named, merged."
)

# What is read of a sweep's folder (common/untrusted.py).
TEXT = dict(ppl=Positive, nats_se=(float, None))
MEASURES = dict(ppl=Positive, kl=float, top1=float, texts={str: TEXT})
PART = {"ranks": [int], "full": [WHOLE], "energies": [float], "errors?": [float], "output_errors?": [float]}
NAMES = dict(method=str, mode=str, targets=str)
LEVEL = {"variance": (float, None), "rank": (WHOLE, None), "budget?": (float, None)}
RECORD = {**NAMES, **LEVEL, **MEASURES, "parts": {str: PART}, "answer?": str, "sampled?": str}
ON_DISK = dict(numbers=int, bytes=int, cache_bytes=Positive, tokens_per_second=[float])
MODEL = {**MEASURES, "loss": float, "steps?": int, "text?": (str, None)}
SMALLER = dict(out=str, models={"untouched": MODEL | ON_DISK, str: MODEL})
SETTINGS = dict(model=str, eval_windows=int, window=int, eval_text=str, calib_text=str, texts={str: str})
CONFIG = dict(settings=SETTINGS, hardware=str, commit=str, command=str)
SWEEP = ("the file of a sweep", "give another --out_dir, or delete it and measure again")


def check_together(records, smaller, kinds):
    """Raise ValueError where records do not belong to one sweep. kinds: its texts."""
    if not any(r["method"] == "-" for r in records):
        raise ValueError("it has no untouched model")
    models = [model for each in smaller for model in each["models"].values()]
    for model in models:
        expect(model, (ON_DISK if "numbers" in model else {}) | (dict(steps=int, text=(str, None)) if "steps" in model else {}))
    for r in [*records, *models]:
        if r["texts"].keys() != kinds.keys():
            raise ValueError(f"it has the texts {', '.join(r['texts'])[:60]}, the sweep {', '.join(kinds)[:60]}")
        for part in r.get("parts", {}).values():
            if len({len(values) for values in part.values()}) > 1 or not part["ranks"]:
                raise ValueError("its layers do not agree")
        if r.get("method", "-") != "-" and not r["parts"]:
            raise ValueError("it has no layers")


def label(record):
    return " ".join(record[name] for name in ("targets", "mode", "method") if record[name] not in ("-", "table"))


def level(record):
    if record.get("budget"):
        return f"budget {record['budget']:.0%}"
    return f"rank {record['rank']}" if record["rank"] else f"{record['variance']:.1%}" if record["variance"] else "-"


def kept(record):
    """Share of the components that were kept, over all matrices that were cut."""
    ranks = [k / part["full"][i] for part in record["parts"].values() for i, k in enumerate(part["ranks"])]
    return mean(ranks) if ranks else 1.0


def lost(record):
    """Share of the energy, in the method's metric, that the cut took, over all matrices; at least a millionth, for the axis."""
    return max(1 - mean([energy for part in record["parts"].values() for energy in part["energies"]]), 1e-6)


def result_table(records, kinds):
    untouched = next(r for r in records if r["method"] == "-")
    lines = []
    for r in records:
        parts = [f"{name} {mean(p['ranks']):.0f}/{mean(p['full']):.0f}" for name, p in r["parts"].items()]
        errors = [
            mean([e for p in r["parts"].values() for e in p.get(which, [])] or [0]) for which in ("errors", "output_errors")
        ]
        cells = [label(r) or "untouched", level(r), ", ".join(parts) or "-", f"{kept(r):.1%}"]
        cells += [f"{error:.3f}" if error else "-" for error in errors]
        lines.append([*cells, *perplexities(r, untouched), f"{r['kl']:.4f}", f"{r['top1']:.1%}"])
    header = ["replaced", "kept", "components", "share", "error", "output error"]
    return table([*header, *columns(untouched, kinds), "KL", "top-1"], lines)


def columns(measures, kinds):
    """Two for each text. kinds: {its name: what calibration has to do with it}."""
    names = [f", {name} ({kinds[name]})" for name in measures["texts"]] if len(measures["texts"]) > 1 else [""]
    return [column for name in names for column in (f"perplexity{name}", "change")]


def perplexities(measures, untouched):
    """The cells of columns(): of exp(nats) the standard error is exp(nats) times that of nats."""
    cells = []
    for name, m in measures["texts"].items():
        ratio = m["ppl"] / untouched["texts"][name]["ppl"]
        error = f" ± {ratio * m['nats_se']:.1%}" if m["nats_se"] else ""
        cells += [f"{m['ppl']:.2f}", f"{ratio - 1:+.1%}{error}"]
    return cells


def smaller_table(records, kinds):
    """Every smaller model beside the untouched one."""
    lines = []
    for r in records:
        for name, m in r["models"].items():
            untouched = r["models"]["untouched"]
            cells = [r["out"] if name != "untouched" else "", name]
            known = "numbers" in m
            speed = sorted(m["tokens_per_second"])[len(m["tokens_per_second"]) // 2] if known else 0
            cells += [f"{m['numbers']:,}", f"{m['bytes'] / 1e6:.1f}"] if known else ["", ""]
            cells += [f"{m['cache_bytes']:,.0f}", f"{m['cache_bytes'] / untouched['cache_bytes']:.1%}"] if known else ["", ""]
            cells += [f"{speed:.1f}"] if known else [""]
            cells += [f"{m['loss']:.4f}", *perplexities(m, untouched), f"{m['kl']:.4f}", f"{m['top1']:.1%}"]
            healed = f"{m['steps']}" + (f" on {m['text']}" if m["text"] else "") if "steps" in m else "-"
            lines.append([*cells, healed])
    header = ["model", "", "numbers on disk", "MB", "cache bytes a token", "of untouched", "tokens/s", "loss",
              *columns(records[0]["models"]["untouched"], kinds), "KL", "top-1", "healing steps"]  # fmt: skip
    return table(header, lines)


def by_series(records):
    """{(what was replaced, method): records}; the untouched model's is none of them."""
    series = {}
    for r in records:
        if r["method"] != "-":
            what = " ".join(r[name] for name in ("targets", "mode") if r[name] != "table")
            series.setdefault((what + " by budget" * bool(r.get("budget")), r["method"]), []).append(r)
    return series


def line_styles(series):
    """Colour and marker: what was replaced; line: by which method. Where one thing was replaced, all three say the method."""
    whats, methods = (list(dict.fromkeys(key[i] for key in series)) for i in (0, 1))
    styles = {}
    for what, method in series:
        j = methods.index(method)
        i = whats.index(what) if len(whats) > 1 else j
        style = dict(color=f"C{i % 10}", marker=MARKERS[i % len(MARKERS)], linestyle=LINES[j % len(LINES)])
        styles[what, method] = style | dict(label=f"{what} {method}")
    return styles


def perplexity_plot(path, records, x, xlabel, xscale, near):
    """A line for every choice of targets, mode and method: perplexity over x(record). Right: up to `near` times the least."""
    untouched = next(r for r in records if r["method"] == "-")["ppl"]
    fig, axes = pyplot().subplots(1, 2, figsize=(14, 4.8), layout="constrained")
    series = by_series(records)
    for ax in axes:
        for key, style in line_styles(series).items():
            ax.plot(*zip(*sorted((x(r), r["ppl"]) for r in series[key])), markersize=5, **style)
        ax.axhline(untouched, color="black", linewidth=1.2, label="untouched")
        ax.set(xlabel=xlabel, ylabel="perplexity", xscale=xscale)
        ax.grid(alpha=0.3, which="both")
    axes[0].set(yscale="log", title="all")
    axes[1].set(ylim=(0.97 * untouched, near * untouched), title=f"up to {near} times the untouched model's")
    legend_beside(axes[1], axes[1].get_legend_handles_labels())
    save(fig, path)


def heat_map(path, record):
    """Share of the components that each layer keeps, a row for each target."""
    parts = record["parts"]
    fig, axes = pyplot().subplots(len(parts), 1, figsize=(10, 0.9 + 0.8 * len(parts)), layout="constrained", squeeze=False)
    for ax, (name, part) in zip(axes[:, 0], parts.items()):
        shares = [k / full for k, full in zip(part["ranks"], part["full"])]
        image = ax.imshow([shares], aspect="auto", cmap="viridis", vmin=0, vmax=1)
        for i, (k, share) in enumerate(zip(part["ranks"], shares)):
            ax.text(i, 0, k, ha="center", va="center", fontsize=6, color="white" if share < 0.6 else "black")
        ax.set(yticks=[0], yticklabels=[name], xlabel="layer" if part is list(parts.values())[-1] else "")
    fig.colorbar(image, ax=axes, label="share kept")
    axes[0][0].set_title(f"Components kept by layer: {label(record)}, {level(record)}")
    save(fig, path)


def by_layer(records):
    """The records to show layer by layer: every budget, and of each choice the threshold nearest to 0.9."""
    shown = {}
    for r in records:
        if r["variance"] and r["mode"] != "table":
            other = shown.setdefault(label(r), r)
            shown[label(r)] = min(other, r, key=lambda each: abs(each["variance"] - 0.9))
    return [*shown.values(), *(r for r in records if r.get("budget"))]


def layer_table(record):
    """Components kept and error of the weights of every layer, or group of layers, and target."""
    parts, layers = record["parts"], len(next(iter(record["parts"].values()))["ranks"])
    cells = [[i, *(f"{p['ranks'][i]}/{p['full'][i]}, {p['errors'][i]:.3f}" for p in parts.values())] for i in range(layers)]
    return table(["group" if record["mode"] == "shared_layers" else "layer", *parts], cells)


def figures(records):
    """The figures, as descriptions."""
    untouched = [r for r in records if r["method"] == "-"]
    of_table = [r for r in records if r["mode"] == "table"]
    of_layers = [r for r in records if r["mode"] not in ("table", "-")]
    axes = (
        ("rank", kept, "components kept", "linear"),
        ("variance", lost, "energy lost, in each method's own metric", "log"),
    )
    found = []
    for part, some, near in (("attention", of_layers, 1.5), ("table", of_table, 4)):
        for name, x, label_of_x, scale in axes if some else ():
            caption = f"Perplexity against the share of the {label_of_x}, mean over matrices"
            data = dict(records=untouched + some, x=x, xlabel=f"share of the {label_of_x}", xscale=scale, near=near)
            found.append(Figure(f"{part}_by_{name}", caption, "perplexity", data))
    for r in by_layer(records):
        words = f"{label(r)} {level(r) if r.get('budget') else ''}".strip()
        name = "ranks_" + "".join(c for c in words.replace(" ", "_") if c.isalnum() or c == "_")
        found.append(Figure(name, f"Ranks by layer, {label(r)} at {level(r)}", "heat map", dict(record=r)))
    return found


DRAW = {"perplexity": perplexity_plot, "heat map": heat_map}


def answer_table(records):
    answered = [r for r in records if "answer" in r]
    cells = [
        [f"{label(r) or 'untouched'} {level(r)}", f"{r['ppl']:.1f}", *(one_line(r[name]) for name in ("answer", "sampled"))]
        for r in answered
    ]
    lines = ["| | perplexity | greedy | sampled |", "|---|---:|---|---|", *(f"| {' | '.join(row)} |" for row in cells)]
    return ["## What it answers", "", *lines, ""] if cells else []


def one_line(answer):
    """On one line of a table."""
    return " ".join(answer.split()).replace("|", "\\|") or "(nothing)"


def write_report(folder, records, smaller):
    """report.md and its figures in the folder, all of them or none; returns the tables."""
    facts = read_json(folder / "config.json", CONFIG, *SWEEP)
    s = facts["settings"]
    with reading(folder / "results.jsonl", *SWEEP):
        expect(records, [RECORD])
        expect(smaller, [SMALLER])
        check_together(records, smaller, s["texts"])
    results = result_table(records, s["texts"])
    text = ["# Surgery", "", f"{s['model']}, {s['eval_windows']} windows of {s['window']} tokens"]
    text[-1] += f" of {s['eval_text']}, calibrated on {s['calib_text']}."
    text += [
        "",
        f"{facts['hardware']}; commit {facts['commit']}. First command: `{facts['command']}`",
        "",
        results,
        "",
        READING,
        "",
    ]
    smaller = list({r["out"]: r for r in smaller}.values())  # a folder that was deleted and written again counts once
    tables = [results, *([smaller_table(smaller, s["texts"])] if smaller else [])]
    if smaller:
        text += ["## Really smaller", "", tables[1], "", READING_SMALLER, ""]
    # Not written_whole(), which replaces one file or a whole folder: here several files go beside others that stay.
    try:
        with tempfile.TemporaryDirectory(dir=folder) as part:
            text += draw_all(Path(part), figures(records) if len(records) > 1 else [], DRAW)
            text += answer_table(records)
            for r in by_layer(records):
                text += [f"## By layer: {label(r)}, {level(r)}", "", "Components kept, relative error of the weights.", ""]
                text += [layer_table(r), ""]
            (Path(part) / "report.md").write_text("\n".join(text))
            for file in Path(part).iterdir():
                os.replace(file, folder / file.name)
    except OSError as error:
        fail(f"{folder}/report.md cannot be written ({error.strerror or error}): make room; the same command writes it again")
    return "\n\n".join(tables)
