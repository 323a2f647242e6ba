"""Turns results.jsonl of a sweep into report.md: table, perplexity against the kept share, ranks by layer, sampled answers."""

import math
import os
import tempfile
from pathlib import Path

from common.cli import fail
from common.plots import Figure, Panel, Point, draw_all
from common.untrusted import WHOLE, Positive, expect, read_json, reading
from reports.compare import mean
from reports.html import page
from reports.markdown import Samples, Table

READING = (
    "Perplexity is measured on fixed windows of documents that calibration did not use. Change: relative to the untouched "
    "model, ± the standard error of the paired difference over windows. KL is KL(untouched | changed) in nats per token. "
    "Top-1 is how often both models find the same next token most likely. KL, top-1 and the figures use all windows. Share is "
    "the share of the components kept. Error is |W - W'| / |W|; output error is the same for the outputs on calibration text. "
    "All three are means over layers. If the cache keeps the latents of a shared key and value basis, it shrinks to that "
    "share of its size."
)
READING_SMALLER = (
    "Low-rank factors replace the matrices; the models were read back from disk. On disk, r rows of each left factor are unit "
    "vectors, which saves r^2 numbers; in memory they are back. MB counts float32 weights. The cache's bytes are counted on "
    "the tensors of a filled cache. Tokens/s: greedy decoding of one text after a prompt of one window, the models "
    "alternating, median. Healing trains LoRA towards the untouched model's distribution, on calibration text unless another "
    "text is named, and merges it."
)

# The fields that are read from a sweep's files, as shapes of common/untrusted.py.
TEXT = dict(ppl=Positive, nats_se=(float, None))
MEASURES = dict(ppl=Positive, kl=float, top1=float, texts={str: TEXT})
PART = {"ranks": [int, ...], "full": [WHOLE, ...], "energies": [float, ...], "errors?": [float], "output_errors?": [float]}
NAMES = dict(method=str, mode=str, targets=str)
LEVEL = {"variance": (float, None), "rank": (WHOLE, None), "budget?": (float, None)}
RECORD = {**NAMES, **LEVEL, **MEASURES, "parts": {str: PART}, "answer?": str, "sampled?": str}
ON_DISK = dict(numbers=int, bytes=int, cache_bytes=Positive, tokens_per_second=[float, ...])
MODEL = {**MEASURES, "loss": float, "steps?": int, "text?": (str, None)}
SMALLER = dict(out=str, models={"untouched": MODEL | ON_DISK, str: MODEL})
SETTINGS = dict(model=str, eval_windows=int, window=int, eval_text=str, calib_text=str, texts={str: str})
CONFIG = dict(settings=SETTINGS, hardware=str, commit=str, command=str)
SWEEP = ("the file of a sweep", "give another --out_dir, or delete it and measure again")

WITHIN = 0.05  # share of the perplexity: a title calls a change up to this "within"
FLOOR = 0.001  # nats: smaller losses are drawn here, since the noise is about as large
# Ticks of the axis of lost nats. Each tick's label is the increase of the perplexity.
TICKS = {FLOOR: "+0.1%", math.log(1.01): "+1%", math.log(1.1): "+10%", math.log(2): "x 2", math.log(10): "x 10"}
TICKS |= {math.log(1000): "x 1,000"}


def check_together(records, smaller, kinds):
    """Raise ValueError if the records do not belong to one sweep. kinds: the texts of the sweep."""
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
        if (r.get("method", "-") != "-" or any(r.get(level) for level in ("variance", "rank", "budget"))) and not r["parts"]:
            raise ValueError("it has no layers")


def label(record):
    return " ".join(record[name] for name in ("targets", "mode", "method") if record[name] not in ("-", "table"))


def level(record):
    if record.get("budget"):
        return f"budget {record['budget']:.0%}"
    return f"rank {record['rank']}" if record["rank"] else f"{record['variance']:.1%}" if record["variance"] else "-"


def kept(record):
    """The share of the components that were kept, over all cut matrices."""
    ranks = [k / full for part in record["parts"].values() for k, full in zip(part["ranks"], part["full"])]
    return mean(ranks) if ranks else 1.0


def lost(record):
    """The share of the energy, in the method's metric, that all cuts removed; at least a millionth, for the log axis."""
    energies = [energy for part in record["parts"].values() for energy in part["energies"]]
    return max(1 - mean(energies), 1e-6) if energies else 1e-6


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
    return Table([*header, *columns(untouched, kinds), "KL", "top-1"], lines)


def columns(measures, kinds):
    """Two column names for each text. kinds: {name of the text: how it relates to the calibration text}."""
    names = [f", {name} ({kinds[name]})" for name in measures["texts"]] if len(measures["texts"]) > 1 else [""]
    return [column for name in names for column in (f"perplexity{name}", "change")]


def perplexities(measures, untouched):
    """The cells of columns(). The standard error of exp(nats) is exp(nats) times that of nats."""
    cells = []
    for name, m in measures["texts"].items():
        ratio = m["ppl"] / untouched["texts"][name]["ppl"]
        error = f" ± {ratio * m['nats_se']:.1%}" if m["nats_se"] else ""
        cells += [f"{m['ppl']:.2f}", f"{ratio - 1:+.1%}{error}"]
    return cells


def smaller_table(records, kinds):
    """The table of every smaller model and the untouched one."""
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
    return Table(header, lines)


def what(record):
    """The replaced parts, in words: targets and their bases."""
    return " ".join(record[name] for name in ("targets", "mode") if record[name] != "table")


def series(record):
    """The name of a record's line in a figure."""
    return record["method"] + ", ranks by layer" * bool(record.get("budget"))


def nats(record, untouched):
    return math.log(record["ppl"]) - math.log(untouched["ppl"])


def cost(record, untouched):
    """The change of perplexity in words: +7.6%, or 13 times."""
    ratio = record["ppl"] / untouched["ppl"]
    return f"{ratio - 1:+.1%}" if ratio < 2 else f"{ratio:,.1f} times" if ratio < 10 else f"{ratio:,.0f} times"


def sweep_figure(name, caption, records, untouched, by_energy):
    """A panel for each set of replaced parts, a line for each method; x is the share kept, or the share of the energy lost."""
    x = lost if by_energy else kept
    share = "the energy lost, in each method's own metric" if by_energy else "the components kept"
    panels, near, far = [], [], []
    for replaced in dict.fromkeys(map(what, records)):
        some, lines = [r for r in records if what(r) == replaced], {}
        for r in sorted(some, key=x):
            words = f"{level(r)}, {kept(r):.1%} of the components: {cost(r, untouched)}, KL {r['kl']:.4f}"
            lines.setdefault(series(r), []).append(Point(x(r), [max(nats(r, untouched), FLOOR)], words))
        within = [r for r in some if r["ppl"] / untouched["ppl"] - 1 <= WITHIN]
        best = (max if by_energy else min)(within, key=x, default=None)  # the strongest cut
        found = (
            f"{x(best):.0%} {'lost' if by_energy else 'kept'} costs {cost(best, untouched)}"
            if best
            else f"none within {WITHIN:.0%}"
        )
        panels.append(Panel(lines, f"share of {share}", "perplexity over the untouched model's", f"{replaced}: {found}",
                            xscale="log" if by_energy else "linear", yscale="log", yticks=TICKS))  # fmt: skip
        near += [f"{replaced} {x(best):.0%}"] if best else []
        far += [] if best else [replaced]
    title = f"Share of {share} within {WITHIN:.0%} of the perplexity: {', '.join(near)}"
    title += f"; none for {', '.join(far)}" if far else ""
    if len(panels) == 1:
        panels[0].title = ""  # the figure's title has it
    if not near:
        best = min(records, key=lambda r: r["ppl"])
        title = f"Nothing is within {WITHIN:.0%} of the perplexity: the nearest, {label(best)} {level(best)}, is at "
        title += cost(best, untouched)
    return Figure(name, title, caption, panels, list(dict.fromkeys(map(series, records))), behind=len(panels) > 1)


def layer_figure(records):
    """The figure of ranks: a panel for each record, with the share of the components that every layer keeps."""
    panels = []
    for r in records:
        lines = {}
        for name, part in r["parts"].items():
            shares = zip(part["ranks"], part["full"])
            lines[name] = [Point(i, [k / full], f"{k} of {full}") for i, (k, full) in enumerate(shares)]
        every = [(p.y, p.x) for points in lines.values() for p in points]
        (low, least), (high, most) = min(every), max(every)
        unit = "group" if r["mode"] == "shared_layers" else "layer"
        title = f"{label(r)}, {level(r)}: {low:.0%} ({unit} {least}) to {high:.0%} ({unit} {most})"
        panels.append(Panel(lines, unit, "share of the components kept", title, ylim=(0, 1.02)))
    order = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    shares = {(label(r), level(r), name): [k / full for k, full in zip(part["ranks"], part["full"])]
              for r in records for name, part in r["parts"].items()}  # fmt: skip
    (replaced, at, name), share = max(shares.items(), key=lambda item: max(item[1]) - min(item[1]))
    title = f"Layers differ most in {name} ({replaced}, {at}): they keep {min(share):.0%} to {max(share):.0%}"
    return Figure("ranks_by_layer", title, "Share of the components that each layer keeps", panels, order)


def by_layer(records):
    """The records to show layer by layer: every budget, and for each method and mode the threshold closest to 0.9."""
    shown = {}
    for r in records:
        if r["variance"] and r["mode"] != "table":
            other = shown.setdefault(label(r), r)
            shown[label(r)] = min(other, r, key=lambda each: abs(each["variance"] - 0.9))
    return [*shown.values(), *(r for r in records if r.get("budget"))]


def layer_table(record):
    """A table of kept components and weight errors, for every target and every layer (or group of layers)."""
    parts, layers = record["parts"], len(next(iter(record["parts"].values()))["ranks"])
    cells = [[i, *(f"{p['ranks'][i]}/{p['full'][i]}, {p['errors'][i]:.3f}" for p in parts.values())] for i in range(layers)]
    header = ["group" if record["mode"] == "shared_layers" else "layer", *parts]
    return Table(header, cells, f"By layer: {label(record)}, {level(record)}: components kept, relative error of the weights")


def figures(records):
    """The figures of a sweep. Each title states the answer."""
    untouched = next(r for r in records if r["method"] == "-")
    of_table = [r for r in records if r["mode"] == "table"]
    of_layers = [r for r in records if r["mode"] not in ("table", "-")]
    found = []
    for part, some in (("attention", of_layers), ("table", of_table)):
        for name, by_energy in (("rank", False), ("variance", True)) if some else ():
            caption = (
                f"Perplexity against the share of the {'energy lost' if by_energy else 'components kept'}, mean over matrices"
            )
            found.append(sweep_figure(f"{part}_by_{name}", caption, some, untouched, by_energy))
    return [*found, *([layer_figure(shown)] if (shown := by_layer(records)) else [])]


def answers(records):
    """The models' answers to the prompt, as parts of the report."""
    answered = [r for r in records if "answer" in r and "sampled" in r]
    written = [
        (f"{label(r) or 'untouched'} {level(r) if label(r) else ''}".strip() + f", perplexity {r['ppl']:.1f}",
         {how: " ".join(r[name].split()) or "(nothing)" for how, name in (("greedy", "answer"), ("sampled", "sampled"))})
        for r in answered
    ]  # fmt: skip
    return ["## Answers to the prompt", "", Samples("", written), ""] if written else []


def parts_of(settings, facts, records, smaller):
    """-> (the parts of the report, its tables for the terminal)."""
    results = result_table(records, settings["texts"])
    about = f"{settings['model']}, {settings['eval_windows']} windows of {settings['window']} tokens of {settings['eval_text']}"
    text = ["# Surgery", "", f"{about}, calibrated on {settings['calib_text']}.", ""]
    text += [f"{facts['hardware']}; commit {facts['commit']}. First command: `{facts['command']}`", ""]
    text += ["## In figures", "", *figures(records)] if len(records) > 1 else []
    text += ["## What was measured", "", results, "", READING, ""]
    smaller = list({r["out"]: r for r in smaller}.values())  # if a folder was written twice, the last record counts
    tables = [results, *([smaller_table(smaller, settings["texts"])] if smaller else [])]
    text += ["## Really smaller", "", tables[1], "", READING_SMALLER, ""] if smaller else []
    text += answers(records)
    for r in by_layer(records):
        text += [layer_table(r), ""]
    return text, tables


def write_report(folder, records, smaller, html=False):
    """Write report.md and its figures into the folder, with `html` report.html too: all files or none -> the tables."""
    facts = read_json(folder / "config.json", CONFIG, *SWEEP)
    settings = facts["settings"]
    with reading(folder / "results.jsonl", *SWEEP):
        expect(records, [RECORD])
        expect(smaller, [SMALLER])
        check_together(records, smaller, settings["texts"])
    text, tables = parts_of(settings, facts, records, smaller)
    # written_whole() replaces one file or an entire folder. Here several files are added to a folder whose other files stay.
    try:
        with tempfile.TemporaryDirectory(dir=folder) as part:
            (Path(part) / "report.md").write_text("\n".join(draw_all(Path(part), text)))
            if html:
                (Path(part) / "report.html").write_text(page(text))
            for file in Path(part).iterdir():
                os.replace(file, folder / file.name)
    except OSError as error:
        fail(f"{folder}/report.md cannot be written ({error.strerror or error}): make room, then repeat the command")
    return "\n\n".join(map(str, tables))
