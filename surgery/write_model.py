"""Write the smaller model of a point: heal it if asked, read it back, and measure it beside the untouched model."""

import copy
import shutil
from pathlib import Path

from tqdm import tqdm

from surgery.decoding_speed import cache_bytes, decode_speeds
from surgery.heal import heal, healing_dtype
from surgery.low_rank_folder import save
from surgery.low_rank_modules import shrink
from surgery.reading import load
from surgery.subject import Subject
from surgery.surgeon import check_changes, fingerprint
from surgery.sweep import add_line, made_by


def write_smaller(args, point, surgeon, evaluator, tokenizer, windows, folder):
    """Call make_smaller() and write its record to both folders. If anything fails, the model's folder is removed."""
    try:
        record = make_smaller(args, point, surgeon, evaluator, tokenizer, windows) | dict(made_by=made_by(args, folder))
        for file in (Path(args.out) / "measured.json", folder / "smaller.jsonl"):
            add_line(file, record)
    except BaseException:
        shutil.rmtree(args.out, ignore_errors=True)
        raise


def make_smaller(args, point, surgeon, evaluator, tokenizer, windows):
    """
    Write the point's model to --out -> its record, with measures of the untouched, the smaller and the healed model.

    windows: for healing. Raises RuntimeError if the smaller model does not lose what the sweep measured.
    """
    subject = surgeon.subject
    before = fingerprint(subject.model)
    with surgeon.cut(point) as cut:
        measured = evaluator.measure()
    check_changes(before, subject.model)
    hf = copy.deepcopy(subject.model)
    plan = shrink(hf, cut.stacks, cut.tables)
    small = Subject(hf)
    found = dict(untouched=evaluator.measure(), smaller=evaluator.measure(small))
    if max(abs(found["smaller"][name] - measured[name]) for name in ("loss", "kl")) > 1e-4:
        raise RuntimeError(f"the factors lose {found['smaller']['loss']}, their products {measured['loss']}")
    training = heal_with_bar(args, small, subject, windows) | dict(text=args.heal_text) if args.heal_steps else None
    stored = save(args.out, hf, tokenizer, plan)
    read, _ = load(args.out, args.device)
    last = "healed" if training else "smaller"
    found[last] = evaluator.measure(Subject(read)) | (training or {})
    prompt = next(iter(evaluator.windows.values()))[0][0][0]
    speeds = decode_speeds([subject.model, read], prompt)
    numbers = sum(p.numel() for p in subject.model.parameters())
    rows = (("untouched", subject.model, (numbers, 4 * numbers), speeds[0]), (last, read, stored, speeds[1]))
    for name, hf, (numbers, size), speed in rows:
        found[name] |= dict(numbers=numbers, bytes=size)
        found[name] |= dict(cache_bytes=cache_bytes(hf, prompt), tokens_per_second=[round(x, 2) for x in speed])
    return point.record() | dict(out=Path(args.out).name, context=len(prompt), models=found)


def heal_with_bar(args, student, teacher, windows):
    dtype = healing_dtype(args, teacher.config.n_embd)
    with tqdm(total=args.heal_steps, desc="healing", unit="step") as bar:

        def log(kl):
            bar.set_postfix_str(f"KL {kl:.4f}")
            bar.update()

        return heal(student, teacher, windows, args.heal_steps, args.heal_rank, args.heal_lr, args.seed, log, dtype)
