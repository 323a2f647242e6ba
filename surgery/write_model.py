"""A point of surgery made into a smaller model on disk: healed where asked, read back, measured beside the untouched one."""

import copy
from pathlib import Path

from tqdm import tqdm

from reports.markdown import table
from surgery.heal import heal
from surgery.low_rank_model import cache_bytes, decode_speeds, load, save, shrink
from surgery.subject import Subject
from surgery.surgeon import check_changes, fingerprint


def make_smaller(args, point, surgeon, judge, tokenizer, windows):
    """
    Write the point's model to --out -> its record: a dict of measures for each of untouched, smaller and healed.

    windows: of calibration text, what healing trains on. Raises RuntimeError where the smaller model is not the one that the
    sweep measured.
    """
    subject = surgeon.subject
    before = fingerprint(subject.model)
    surgeon.cut(point, args.layers_per_group)
    cut = judge.measure()
    surgeon.restore()
    check_changes(before, subject.model)
    hf = copy.deepcopy(subject.model)
    plan = shrink(hf, surgeon.cuts, surgeon.table_factors)
    small = Subject(hf)
    found = dict(untouched=judge.measure(), smaller=judge.measure(small))
    if max(abs(found["smaller"][name] - cut[name]) for name in ("loss", "kl")) > 1e-4:
        raise RuntimeError(f"the factors lose {found['smaller']['loss']}, the matrices that they make {cut['loss']}")
    training = None
    if args.heal_steps:
        bar = tqdm(total=args.heal_steps, desc="healing", unit="step")

        def log(kl):
            bar.set_postfix_str(f"KL {kl:.4f}")
            bar.update()

        training = heal(small, subject, windows, args.heal_steps, args.heal_rank, args.heal_lr, args.seed, log)
        bar.close()
    stored = save(args.out, hf, tokenizer, plan)
    read, _ = load(args.out, args.device)
    last = "healed" if training else "smaller"
    found[last] = judge.measure(Subject(read)) | (training or {})
    prompt = judge.windows[0][0][0]
    speeds = decode_speeds([subject.model, read], prompt)
    whole = [p.numel() for p in subject.model.parameters()]
    rows = (("untouched", subject.model, (sum(whole), 4 * sum(whole)), speeds[0]), (last, read, stored, speeds[1]))
    for name, hf, (numbers, size), speed in rows:
        found[name] |= dict(numbers=numbers, bytes=size)
        found[name] |= dict(cache_bytes=cache_bytes(hf, prompt), tokens_per_second=[round(x, 2) for x in speed])
    return point | dict(out=Path(args.out).name, context=len(prompt), models=found)


def smaller_table(records):
    """Every smaller model beside the untouched one."""
    lines = []
    for r in records:
        for name, m in r["models"].items():
            whole = r["models"]["untouched"]
            cells = [r["out"] if name != "untouched" else "", name]
            known = "numbers" in m
            speed = sorted(m["tokens_per_second"])[len(m["tokens_per_second"]) // 2] if known else 0
            cells += [f"{m['numbers']:,}", f"{m['bytes'] / 1e6:.1f}"] if known else ["", ""]
            cells += [f"{m['cache_bytes']:,.0f}", f"{m['cache_bytes'] / whole['cache_bytes']:.1%}"] if known else ["", ""]
            cells += [f"{speed:.1f}"] if known else [""]
            cells += [
                f"{m['loss']:.4f}",
                f"{m['ppl']:.2f}",
                f"{m['ppl'] / whole['ppl'] - 1:+.1%}",
                f"{m['kl']:.4f}",
                f"{m['top1']:.1%}",
            ]
            lines.append([*cells, f"{m['steps']}" if "steps" in m else "-"])
    header = ["model", "", "numbers on disk", "MB", "cache bytes a token", "of untouched", "tokens/s", "loss", "perplexity",
              "change", "KL", "top-1", "healing steps"]  # fmt: skip
    return table(header, lines)
