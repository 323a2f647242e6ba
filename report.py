"""
Run folders -> tables, what they say in words, and the figures: report.md, PNGs and SVGs, and a short version on the terminal.

    python report.py --runs model_weights --html

Everything is read from the folders' config.json, summary.json and metrics.jsonl and from the factor files' JSON; checkpoints
serve for a sample of text alone. Runs of one name with different seeds, as in model_weights/seed_1/gpt_baseline, make one row:
mean and standard deviation.
"""

from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse


@dataclass
class Args:
    runs: str = flag("model_weights", "folder with run folders, or with seed_N folders of them; report.md goes there")
    html: bool = flag(False, "also report.html: the same as one page, with values under the pointer and tables that sort")


def verdict_lines(judged):
    """The decided claims, and how many are not."""
    decided = [f"- {claim.text}: {verdict}" for claim, verdict, _ in judged if verdict != "inconclusive"]
    open_claims = len(judged) - len(decided)
    return decided + ([f"- {open_claims} further claims are inconclusive: the report says why"] if open_claims else [])


def seeds_line(rows):
    """That one seed is not enough, and the command that repeats the main job with three."""
    rank = next((row.k for row in rows if row.label == "A"), None)
    main_job = f'SEEDS="1 2 3" bash scripts/run_all_experiments.sh {rank}'
    hint = main_job if rank else 'SEEDS="1 2 3" before the same command'
    return [f"One seed cannot be tested, three can: {hint}"]


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
        fail(f"--runs {root} has no finished run: bash scripts/run_all_experiments.sh 128 makes them")
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
            lines += ["## What the models write", "", "The same draw for all.", "", found, ""]
        print("\n".join(["", *short]))
        text += lines
    notes = [f"Not finished, so left out: {folder}" for folder in unfinished]
    text += notes
    with written_whole(root / "report.md", "make room") as file:
        file.write_text("\n".join(draw_all(root, text)))
    if args.html:
        with written_whole(root / "report.html", "make room") as file:
            file.write_text(page(text))
    claim.release()
    print("", *notes, f"The whole report: {root / 'report.md'}; its figures are beside it, as .png and .svg", sep="\n")
    if args.html:
        print(f"The same as one page: {root / 'report.html'}")
    pages = dict(html=str(root / "report.html")) if args.html else {}
    finish(report=str(root / "report.md"), **pages, runs=sum(len(row.summaries) for row in rows), unfinished=len(unfinished))


if __name__ == "__main__":
    main()
