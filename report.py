"""
Turns run folders into a report: report.md with tables, answers in words and figures (PNG, SVG), and a short version on the
terminal.

    python report.py --runs model_weights --html

All numbers come from the folders' config.json, summary.json and metrics.jsonl and from the factor files' JSON. Checkpoints
are read only to write a sample of text. Runs with the same name and different random seeds, for example
model_weights/seed_1/gpt_baseline, form one row with mean and standard deviation.
"""

from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse


@dataclass
class Args:
    runs: str = flag(
        "model_weights", "folder that holds run folders, or seed_N folders of run folders; report.md is written there"
    )
    html: bool = flag(False, "also write report.html: one page that shows values under the pointer and has sortable tables")


def verdict_lines(judged):
    """A line for each decided claim, and the number of undecided ones."""
    decided = [f"- {claim.text}: {verdict}" for claim, verdict, _ in judged if verdict != "inconclusive"]
    open_claims = len(judged) - len(decided)
    return decided + ([f"- {open_claims} other claims are inconclusive: the report says why"] if open_claims else [])


def seeds_line(rows):
    """Says that a test needs several seeds, with the command that repeats the main job with three."""
    rank = next((row.k for row in rows if row.label == "A"), None)
    main_job = f'SEEDS="1 2 3" bash scripts/run_all_experiments.sh {rank}'
    hint = main_job if rank else 'SEEDS="1 2 3" before the same command'
    return [f"A test needs several seeds. For three: {hint}"]


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)

    from common.files import claim_folder, written_whole
    from common.plots import draw_all
    from reports import token_table, value_cache
    from reports.claims import judge
    from reports.html import page
    from reports.markdown import Samples
    from reports.rows import read_rows
    from reports.samples import one_line, samples

    root = Path(args.runs)
    rows, unfinished = read_rows(root)
    if not rows:
        fail(f"--runs {root} has no finished run: start bash scripts/run_all_experiments.sh 128")
    claim = claim_folder(root, "--runs", ".report.lock")
    text = []
    for part, of_cache in ((token_table, False), (value_cache, True)):
        if not (some := [row for row in rows if row.of_cache == of_cache]):
            continue
        short, lines, claims = part.section(root, some)
        tested = any(len(row.summaries) > 1 for row in some)
        short += [
            "",
            *(verdict_lines(judge([claim for group in claims for claim in group], some)) if tested else seeds_line(some)),
        ]
        written = samples([row for row in some if row.label in ("D", "B")])
        if written:
            short += ["", f'To the prompt "{written[0][1]}"']
            short += [f"  {row.label}{f' (k={row.k})' if row.k else ''} wrote: {one_line(line)}" for row, _, line in written]
            found = Samples(written[0][1], [(row.title, {"": line}) for row, _, line in written])
            lines += ["## What the models write", "", "All models sample with the same random numbers.", "", found, ""]
        print("\n".join(["", *short]))
        text += lines
    notes = [f"Skipped, not finished: {folder}" for folder in unfinished]
    text += notes
    with written_whole(root / "report.md", "make room") as file:
        file.write_text("\n".join(draw_all(root, text)))
    if args.html:
        with written_whole(root / "report.html", "make room") as file:
            file.write_text(page(text))
    claim.release()
    print("", *notes, f"The full report: {root / 'report.md'}; its figures are in the same folder, as .png and .svg", sep="\n")
    if args.html:
        print(f"The same as one page: {root / 'report.html'}")
    pages = dict(html=str(root / "report.html")) if args.html else {}
    finish(report=str(root / "report.md"), **pages, runs=sum(len(row.summaries) for row in rows), unfinished=len(unfinished))


if __name__ == "__main__":
    main()
