"""A sweep: its folder, and a line in results.jsonl for every measured point."""

import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from common.cli import fail
from common.files import claim_folder, written_whole
from common.untrusted import read_json, read_json_lines
from surgery.evaluator import answers
from surgery.rank_cut import Cut, check_changes, fingerprint
from surgery.rank_points import UNTOUCHED
from training.run_folder import provenance

# Identifies the points that are measured already. Older lines have no budget.
LINE = dict(method=str, mode=str, targets=str) | {level: (float, None) for level in ("variance?", "rank?", "budget?")}
OLDER = dict(bos=False)  # settings that older folders do not name, and what they had


def prepare_folder(args, settings, line=LINE):
    """
    Open or make the folder of a sweep -> (path, records, a Claim of the folder).

    A folder with other settings is refused, with one line that names the difference. line: the fields of a line
    (common/untrusted.py).
    """
    folder = Path(args.out_dir)
    claim = claim_folder(folder, "--out_dir")
    config, records, before = folder / "config.json", read_records(folder / "results.jsonl", line), {}
    if config.exists():
        what = ("a config.json that surgery wrote", "choose another folder with --out_dir")
        before = OLDER | read_json(config, dict(settings=dict), *what)["settings"]
    differing = [k for k, v in settings.items() if before.get(k) != v]
    if differing and records:
        k = differing[0]
        fail(f"--out_dir {folder} holds a sweep with {k} {before.get(k)}, this one has {settings[k]}: choose another folder")
    if differing:
        with written_whole(config, "make room, or choose another --out_dir") as part:
            part.write_text(json.dumps(dict(settings=settings, **provenance(args.device)), indent=1) + "\n")
        for moments in folder.glob("calibration*.pt"):
            moments.unlink()
    return folder, records, claim


def made_by(args, folder):
    """How a written model was made, for its record. folder: its config.json is already written by prepare_folder()."""
    settings, known = json.loads((folder / "config.json").read_text())["settings"], provenance(args.device)
    found = {name: settings[name] for name in ("model", "calib_text", "eval_text")}
    return found | {x: known[x] for x in ("command", "commit", "hardware")}


def add_line(file, record):
    """Append a line. If that fails, no part of it remains."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with open(file, "a") as lines:
            lines.write(json.dumps(record) + "\n")
    except OSError as error:
        if file.exists():
            os.truncate(file, size)
        fail(f"{file} cannot be written ({error.strerror}): make room, then run the same command again: it goes on from here")


def read_records(results, line):
    """The records of a file of JSON lines. A last line that is incomplete, after an interruption, is removed."""
    if results.is_symlink():
        fail(f"{results} is a link, and lines are not written through links: choose another --out_dir")
    if not results.exists():
        return []
    records = read_json_lines(results, line, "the file of a sweep", "choose another --out_dir, or delete it and measure again")
    text = results.read_bytes()
    if not text.endswith(b"\n"):
        results.write_bytes(text[: text.rfind(b"\n") + 1])
    return records


def sweep(args, points, surgeon, evaluator, tokenizer, results):
    """Measure every point, and append its line to results.jsonl."""
    model = surgeon.subject.model
    before = fingerprint(model)
    bar = tqdm(points, desc="surgery", unit="point")
    for point in bar:
        started = time.time()
        if point == UNTOUCHED:
            record = measure(args, point, Cut(), surgeon.subject, evaluator, tokenizer)
        else:
            with surgeon.cut(point) as cut:
                check_changes(before, model, *cut.parameters())
                record = measure(args, point, cut, surgeon.subject, evaluator, tokenizer)
        check_changes(before, model)
        add_line(results, record | dict(seconds=round(time.time() - started, 1)))
        shown = point.record()
        level = f"{point.level} {point.value}" if point.level else ""
        names = f"{shown['method']:8} {shown['mode']:13} {shown['targets']:6} {level:13}"
        bar.write(f"{names} perplexity {record['ppl']:12.3f}", sys.stdout)


def measure(args, point, cut, subject, evaluator, tokenizer):
    """The line of a point, while the model is cut."""
    record = point.record() | evaluator.measure() | dict(parts=cut.facts)
    if args.answer_tokens:
        both = answers(subject, tokenizer, args.prompt, args.answer_tokens, (None, args.seed))
        record["answer"], record["sampled"] = both
    return record
