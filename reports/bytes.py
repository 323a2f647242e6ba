"""
Turns results.jsonl of a study of bytes into report.md and a figure for each system: nats lost against bytes.

    python -m reports.bytes --runs model_weights/bytes
"""

from dataclasses import dataclass
from pathlib import Path

from common.cli import finish, flag, parse
from common.files import claim_folder, written_whole
from common.plots import Figure, Panel, Point, draw_all
from common.untrusted import WHOLE, Positive, read_json, read_json_lines, reading
from reports.html import page
from reports.markdown import Table

# The fields that are read from the study's files, as shapes of common/untrusted.py.
SETTINGS = dict(model=str, eval_windows=int, window=int, eval_text=str, calib_tokens=int, calib_text=str)
CONFIG = dict(settings=SETTINGS, hardware=str, commit=str, command=str)
RECORD = dict(row=str, system=str, name=str, bytes=WHOLE, share=Positive, kl=float, top1=float)
RECORD |= dict(texts={str: dict(nats=float, nats_se=(float, None))})

FLOOR = 0.001  # nats: smaller losses are drawn here, since the noise is about as large
WITHIN = 0.02  # nats: a title calls a loss up to this "within"
TITLES = dict(
    table="Only the token table compressed", weights="All linear layers and the token table compressed",
    cache="The key/value cache compressed",
)  # fmt: skip
LABELS = {
    "bits": "bits by component", "error-aware": "integers, error-aware rounding", "to nearest": "integers, rounded to nearest",
    "rank": "one rank for all, float16", "ranks by frequency": "ranks by token frequency, float16",
    "bits in one group": "bits, without row groups", "bits without a basis": "bits, without a change of basis",
    "bits without parents": "bits, without row prediction",
    "bits read in place": "bits, read in place",
}  # fmt: skip
READING = (
    "Bytes counts everything that is stored, as a share of the same matrices in float16. Lost: nats per token more than the "
    "untouched model, ± the standard error of the paired difference over windows. Front: no row with at most these bytes "
    "loses less."
)


@dataclass
class Args:
    runs: str = flag("model_weights/bytes", "folder that scripts/run_bytes.sh wrote")
    html: bool = flag(False, "also write report.html: one page that shows values under the pointer and has sortable tables")


def worst(record):
    """The nats lost on the text with the largest loss."""
    return max(text["nats"] for text in record["texts"].values())


def on_front(record, records):
    """Whether no other row loses as little with as few bytes (compared to 0.01% of float16's bytes)."""
    return not any(round(r["share"], 4) <= round(record["share"], 4) and worst(r) < worst(record) for r in records)


def system_table(records):
    texts = list(records[0]["texts"])
    lines = []
    for r in sorted(records, key=lambda r: -r["bytes"]):
        lost = [f"{r['texts'][t]['nats']:+.4f} ± {r['texts'][t]['nats_se'] or 0:.4f}" for t in texts]
        front = "front" if r["name"] != "untouched" and on_front(r, [x for x in records if x["name"] != "untouched"]) else ""
        lines.append([r["row"], f"{r['share']:.2%}", *lost, f"{r['kl']:.4f}", f"{r['top1']:.1%}", front])
    return Table(["kept", "bytes", *(f"lost, {name}" for name in texts), "KL", "top-1", ""], lines)


def system_figure(system, records):
    """The figure of a system: a line for each method, nats lost against bytes."""
    rows, lines = sorted((r for r in records if r["name"] != "untouched"), key=lambda r: r["share"]), {}
    for r in rows:
        words = f"{r['row']}, {r['share']:.2%} of the bytes: {worst(r):+.4f} nats, KL {r['kl']:.4f}"
        lines.setdefault(LABELS.get(r["name"], r["name"]), []).append(Point(r["share"], [max(worst(r), FLOOR)], words))
    panel = Panel(
        lines, "bytes, share of float16", "nats lost per token, the worst text", front=True, xscale="log", yscale="log"
    )
    near = [r for r in rows if worst(r) <= WITHIN]
    best = min(near, key=lambda r: (round(r["share"], 3), worst(r))) if near else min(rows, key=worst)
    found = f"{LABELS.get(best['name'], best['name'])}, {best['share']:.0%} of the bytes, {max(worst(best), 0):.3f} nats"
    title = f"{'Smallest within' if near else 'Nothing is within'} {WITHIN} nats{'' if near else '; the nearest'}: {found}"
    return Figure(system, title, TITLES[system], [panel], list(dict.fromkeys([*LABELS.values(), *lines])))


def write_report(folder, html=False):
    """Write report.md and the figures into the folder of results.jsonl, with `html` report.html too -> the tables."""
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
            parts.append(system_table(some))
            text += [f"## {TITLES[system]}", "", system_figure(system, some), parts[-1], ""]
    with written_whole(folder / "report.md", "make room") as file:
        file.write_text("\n".join(draw_all(folder, text)))
    if html:
        with written_whole(folder / "report.html", "make room") as file:
            file.write_text(page(text))
    return "\n\n".join(map(str, parts))


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    folder = Path(args.runs)
    claim = claim_folder(folder, "--runs", ".report.lock") if folder.is_dir() else None
    print(write_report(folder, args.html))
    if claim:
        claim.release()
    finish(report=str(folder / "report.md"))


if __name__ == "__main__":
    main()
