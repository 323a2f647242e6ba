"""
Writes the report of scripts/gpu_acceptance.sh: report.md with its figure, and the same numbers in report.json.

    python -m reports.gpu --runs model_weights/gpu_acceptance
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from common.cli import fail, finish, flag, parse
from common.files import written_whole
from common.untrusted import COUNT, read_json, read_json_lines
from reports.markdown import table

TENSORS_OF_24GB = 23e9  # bytes: such a GPU has 25.8e9; CUDA itself and gaps between tensors take the rest
WARMUP = 20  # first steps, whose speed is not counted


@dataclass
class Args:
    runs: str = flag("model_weights/gpu_acceptance", "folder that scripts/gpu_acceptance.sh wrote")


def read_run(folder):
    """Read a run -> (its summary, None if unfinished; the lines of its metrics.jsonl), or None if it has no metrics."""
    metrics, summary = folder / "metrics.jsonl", folder / "summary.json"
    if not metrics.exists():
        return None
    words = "what train.py writes", "delete the run's folder and start the script again"
    lines = read_json_lines(metrics, dict(iter=COUNT), *words)
    return read_json(summary, dict, *words) if summary.exists() else None, lines


def losses(lines):
    return {line["iter"]: line["train_loss"] for line in lines if line.get("train_loss") is not None}


def speed(lines):
    """Tokens a second: the median of the log lines after the first steps, in which the compiler works."""
    logged = [line for line in lines if line.get("tokens_per_second")]
    return median(line["tokens_per_second"] for line in [each for each in logged if each["iter"] > WARMUP] or logged[-1:])


def apart(one, other):
    """The largest difference between the training losses of two runs, in nats."""
    one, other = losses(one), losses(other)
    return max(abs(one[step] - other[step]) for step in one.keys() & other.keys())


# -- the parts: each returns (its entry in report.json, markdown), or None if nothing was measured --------------------


def arithmetic(out):
    runs = {folder.name: read_run(folder) for folder in sorted((out / "small").glob("*"))}
    runs = {name: run for name, run in runs.items() if run and run[0]}
    if "cpu_float32" not in runs:
        return None
    _, plain = runs.pop("cpu_float32")
    rows = [
        dict(setting=name.replace("_", " "), apart=apart(lines, plain), skipped=sum(line.get("skipped", 0) for line in lines),
             val_loss=summary["final"]["val_loss"], tokens_per_second=speed(lines))
        for name, (summary, lines) in runs.items()
    ]  # fmt: skip
    cells = [[r["setting"], f"{r['apart']:.5f}", r["skipped"], f"{r['val_loss']:.4f}"] for r in rows]
    text = (
        "At the start, float16's gradient scaler may skip a step. All later steps are then one update behind, so they differ."
    )
    return rows, f"{table(['setting', 'nats apart, at most', 'steps skipped', 'val loss'], cells)}\n\n{text}"


def steps(done):
    """The rows of bench.py train, relative to nanoGPT's best; the part "dense" measured it, alternating with our models."""
    found = [name for name in ("dense", "factorized", "lora") if done.get(name)]
    rows = [row for name in found for row in done[name]["rows"]]
    if not rows:
        return None
    best = next((row for row in rows if row.get("best")), None)
    cells = []
    for row in rows:
        speed, peak = row["tokens_per_second"]["median"], row["peak_memory_bytes"]
        row["fits_24gb"] = None if peak is None else peak < TENSORS_OF_24GB
        name = row["model"] + ", compiled" * row["compiled"] + " (its best)" * (row is best)
        line = [name, row["dtype"], f"{speed:,.0f}", f"{row['mm_share']:.0%}" if "mm_share" in row else "-"]
        line += [f"{speed / best['tokens_per_second']['median']:.2f}" if best else "-", f"{peak / 1e9:.2f}" if peak else "-"]
        line += [f"{peak / best['peak_memory_bytes']:.2f}" if best and peak and best["peak_memory_bytes"] else "-"]
        cells.append([*line, {True: "yes", False: "no", None: "-"}[row["fits_24gb"]]])
    header = ["model", "dtype", "tokens/s", "of matrix rate", "/ nanoGPT best", "peak GB", "/ nanoGPT best", "fits 24 GB"]
    pages = ", ".join(f"[{name}]({name}.md)" for name in found)
    text = "Memory counts tensors only. Commands, spread and milliseconds of each part of a step:"
    return rows, f"{table(header, cells)}\n\n{text} {pages}."


def first_steps(out, folder="gpt2"):
    """The first steps of the gpt2 preset; the run may be unfinished."""
    run = read_run(out / folder)
    if run is None or not losses(run[1]):
        return None
    summary, lines = run
    evaluated = [(line["iter"], line["val_loss"]) for line in lines if "val_loss" in line]
    shares = [line["peak_share"] for line in lines if line.get("peak_share")]
    steps, loss = list(losses(lines).items())[-1]
    found = dict(steps=steps, train_loss=loss, val_loss=evaluated[-1][1], tokens_per_second=speed(lines))
    found |= dict(peak_share=median(shares) if shares else None, done=summary is not None)
    kept = ("peak_memory_bytes", "hardware", "compiled")
    found |= {name: summary.get(name) for name in kept} if summary else {}
    share = f", {found['peak_share']:.1%} of the GPU's peak FLOPs" if shares else ""
    memory = f", {found['peak_memory_bytes'] / 1e9:.2f} GB peak memory" if summary else ", not finished"
    memory += ", not compiled" * (found.get("compiled") is False)
    text = f"Step {steps}: training loss {loss:.4f}, validation loss {found['val_loss']:.4f}; "
    return found, text + f"{found['tokens_per_second']:,.0f} tokens/s{share}{memory}."


def curve(out):
    """Draw the losses of the first steps -> markdown."""
    from common.plots import Figure, Panel, Point, draw_all

    _, lines = read_run(out / "gpt2")
    evaluated = {line["iter"]: line["val_loss"] for line in lines if "val_loss" in line}
    found = dict(training=losses(lines), validation=evaluated)
    curves = {name: [Point(step, [loss]) for step, loss in points.items()] for name, points in found.items()}
    panel = Panel(curves, "step", "loss (nats per token)")
    title = f"{max(evaluated)} steps take the validation loss to {evaluated[max(evaluated)]:.3f} nats"
    figure = Figure("loss_curve", title, "Loss of the gpt2 preset's first steps", [panel], list(curves))
    return "\n".join(draw_all(out, [figure]))


def cache(out, done):
    """One model's text, decoded in three ways. The texts may differ from a point where two tokens are almost equally likely."""
    if "cache" not in done:
        return None
    found = {}
    for way in ("cpu", "without_cache", "through_cache"):
        *text, last = (out / f"text_{way}").read_text().splitlines()
        found[way] = dict(text="\n".join(text), tokens_per_second=json.loads(last)["tokens_per_second"])
    plain = found["cpu"]["text"]
    for each in found.values():
        each["as_on_the_cpu"] = len(os.path.commonprefix([plain, each["text"]])) / max(1, len(plain))
    cells = [
        [way.replace("_", " "), f"{each['as_on_the_cpu']:.0%}", f"{each['tokens_per_second']:,.1f}"]
        for way, each in found.items()
    ]
    return found, table(["64 tokens", "same start as on the CPU", "tokens/s"], cells)


def decoding(out, done):
    return (done["decoding"], (out / "decoding.md").read_text()[len("# Decoding") :].strip()) if done.get("decoding") else None


def cards(out):
    one, all_cards, large = (read_run(out / "cards" / name) for name in ("one", "all", "gpt2"))
    if not (one and all_cards and all_cards[0]):
        return None
    found, text = dict(apart=apart(one[1], all_cards[1])), ""
    if large and large[0]:
        found["gpt2"], text = first_steps(out, "cards/gpt2")
    return found, f"The small model's training losses differ by {found['apart']:.6f} nats at most. The gpt2 preset: {text}"


# -- all of it --------------------------------------------------------------------------------------------------------


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    out = Path(args.runs)
    if not (out / "results.jsonl").exists():
        fail(f"--runs {out} has no results.jsonl: run scripts/gpu_acceptance.sh first")
    shape = dict(part=str, seconds=COUNT, result=(dict, None))
    lines = read_json_lines(out / "results.jsonl", shape, "what the script writes", "delete it and start the script again")
    done, seconds = ({line["part"]: line[key] for line in lines} for key in ("result", "seconds"))

    import torch

    from training.device import hardware

    sections = dict(
        arithmetic=("Arithmetic: 20 steps, compared with float32 on the CPU", arithmetic(out)),
        steps=("A training step", steps(done)),
        preset=("The first steps of the gpt2 preset", first_steps(out)),
        cache=("The same text with and without a cache", cache(out, done)),
        decoding=("Decoding", decoding(out, done)),
        cards=("Several cards", cards(out)),
    )
    sections = {part: (title, *found) for part, (title, found) in sections.items() if found}
    where = f"{hardware('cuda' if torch.cuda.is_available() else 'cpu')}, torch {torch.__version__}"
    text = ["# What a GPU shows", f"By `scripts/gpu_acceptance.sh` on {where}."]
    text.append(table(["part", "seconds"], list(seconds.items())))
    for part, (title, _, page) in sections.items():
        text += [f"## {title}", page, *([curve(out)] if part == "preset" else [])]
    report = dict(hardware=where, seconds=seconds) | {part: numbers for part, (_, numbers, _) in sections.items()}
    for name, content in (("report.md", "\n\n".join(text)), ("report.json", json.dumps(report, indent=1))):
        with written_whole(out / name, "make room") as part:
            part.write_text(content + "\n")
    print("\n\n".join(text))
    finish(report=str(out / "report.md"), numbers=str(out / "report.json"), seconds=seconds)


if __name__ == "__main__":
    main()
