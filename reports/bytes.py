"""
results.jsonl of a study of bytes -> report.md and a figure for each system: nats lost against bytes.

    python -m reports.bytes --runs model_weights/bytes
"""

from dataclasses import dataclass
from pathlib import Path

from common.cli import finish, flag, parse
from common.files import claim_folder, written_whole
from common.plots import Figure, draw, pyplot, save
from common.untrusted import WHOLE, Positive, read_json, read_json_lines, reading
from reports.markdown import table

# What is read of the study's folder (common/untrusted.py).
SETTINGS = dict(model=str, eval_windows=int, window=int, eval_text=str, calib_tokens=int, calib_text=str)
CONFIG = dict(settings=SETTINGS, hardware=str, commit=str, command=str)
RECORD = dict(row=str, system=str, name=str, bytes=WHOLE, share=Positive, kl=float, top1=float)
RECORD |= dict(texts={str: dict(nats=float, nats_se=(float, None))})

FLOOR = 0.001  # nats: what is less is drawn here, since chance is about as large
TITLES = dict(
    table="The token table alone, kept smaller", weights="All linear layers and the table, kept smaller",
    cache="The cache of keys and values, kept smaller",
)  # fmt: skip
LABELS = {
    "bits": "bits by component", "error-aware": "integers, error-aware rounding", "to nearest": "integers, to nearest",
    "rank": "a rank for all, float16", "ranks by frequency": "ranks by frequency, float16",
    "bits in one group": "without groups of rows", "bits without a basis": "without the basis",
    "bits without forecasts": "without the forecast",
}  # fmt: skip
STYLES = {
    "bits": dict(color="#1f5fa8", marker="o", linewidth=2.2), "error-aware": dict(color="#c8541c", marker="s"),
    "to nearest": dict(color="#8a6d3b", marker="^", linestyle="--"), "rank": dict(color="#555555", marker="D", linestyle=":"),
    "ranks by frequency": dict(color="#2e7d4f", marker="v", linestyle="-."),
}  # fmt: skip
READING = (
    "Bytes are those of everything that is kept, as a share of the same matrices in float16. Lost: nats per token over the "
    "untouched model, ± its standard error over windows, paired. Front: no row of as many bytes or fewer loses less."
)


@dataclass
class Args:
    runs: str = flag("model_weights/bytes", "the folder of scripts/run_bytes.sh")


def worst(record):
    """Nats that were lost on the text that lost most."""
    return max(text["nats"] for text in record["texts"].values())


def on_front(record, records):
    """Whether no other row with as few bytes loses as little."""
    return not any(r["bytes"] <= record["bytes"] and worst(r) < worst(record) for r in records)


def system_table(records):
    texts = list(records[0]["texts"])
    lines = []
    for r in sorted(records, key=lambda r: -r["bytes"]):
        lost = [f"{r['texts'][t]['nats']:+.4f} ± {r['texts'][t]['nats_se'] or 0:.4f}" for t in texts]
        front = "front" if r["name"] != "untouched" and on_front(r, [x for x in records if x["name"] != "untouched"]) else ""
        lines.append([r["row"], f"{r['share']:.2%}", *lost, f"{r['kl']:.4f}", f"{r['top1']:.1%}", front])
    return table(["kept", "bytes", *(f"lost, {name}" for name in texts), "KL", "top-1", ""], lines)


def system_figure(path, system, records):
    """A line for each method, named at its end; the front as a broad grey line."""
    fig, ax = pyplot().subplots(figsize=(9, 5.4), layout="constrained")
    rows = [r for r in records if r["name"] != "untouched"]
    front = sorted((r["share"], max(worst(r), FLOOR)) for r in rows if on_front(r, rows))
    ax.plot(*zip(*front), color="grey", linewidth=9, alpha=0.25, solid_capstyle="round")
    for name in dict.fromkeys(r["name"] for r in rows):
        points = sorted((r["share"], max(worst(r), FLOOR)) for r in rows if r["name"] == name)
        style = STYLES.get(name, dict(color="#7a4fa3", marker="x"))
        ax.plot(*zip(*points), **style)
        place = dict(xytext=(-6, 6))
        if points[0][0] > 0.4:  # at the right edge
            place = dict(xytext=(6, -14 if name == "ranks by frequency" else 6), ha="right")
        ax.annotate(LABELS.get(name, name), points[0], textcoords="offset points", fontsize=9, color=style["color"], **place)
    beside = dict(xytext=(-12, -10), textcoords="offset points", ha="right", fontsize=8, color="grey")
    ax.annotate("front: nothing is left of it and below", front[len(front) // 2], **beside)
    ax.set(xscale="log", yscale="log", xlabel="bytes, share of float16", ylabel="nats lost per token, the worst text")
    ticks = (0.08, 0.125, 0.1875, 0.25, 0.3125, 0.5)
    ax.set_xticks(ticks, [f"{t:.0%}" if t in (0.08, 0.25, 0.5) else f"{t:.1%}" for t in ticks])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.margins(x=0.14)  # room for the labels
    ax.grid(alpha=0.3)
    ax.set_title(TITLES[system])
    save(fig, path)


def write_report(folder):
    """report.md and the figures in the folder of results.jsonl -> the tables."""
    finished = ("a file of finished rows", "run scripts/run_bytes.sh first")
    settings = read_json(folder / "config.json", CONFIG, *finished)
    records = read_json_lines(folder / "results.jsonl", RECORD, *finished)
    with reading(folder / "results.jsonl", *finished):
        if not records or not records[0]["texts"] or any(r["texts"].keys() != records[0]["texts"].keys() for r in records):
            raise ValueError("its rows have different texts")
    s, parts = settings["settings"], []
    text = ["# At equal bytes", "", f"{s['model']}, {s['eval_windows']} windows of {s['window']} tokens of {s['eval_text']}."]
    text += [f"Calibrated on {s['calib_tokens']:,} tokens of {s['calib_text']}.", ""]
    text += [f"{settings['hardware']}; commit {settings['commit']}. First command: `{settings['command']}`", "", READING, ""]
    for system in TITLES:
        some = [r for r in records if r["system"] == system]
        if len(some) > 1:
            figure = Figure(system, TITLES[system], "system", dict(system=system, records=some))
            parts.append(system_table(some))
            text += [f"## {TITLES[system]}", "", draw(folder, figure, dict(system=system_figure)), "", parts[-1], ""]
    with written_whole(folder / "report.md", "make room") as part:
        part.write_text("\n".join(text))
    return "\n\n".join(parts)


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    folder = Path(args.runs)
    claim = claim_folder(folder, "--runs", ".report.lock") if folder.is_dir() else None
    print(write_report(folder))
    if claim:
        claim.release()
    finish(report=str(folder / "report.md"))


if __name__ == "__main__":
    main()
