"""
Cut q, k and v of a real model, or its token table, to low rank, and measure what that costs.

    python -m surgery --model HuggingFaceTB/SmolLM2-135M --targets k/v/k,v --method pca,whiten --rank 96,128

    python -m surgery --targets k,v --mode shared_kv --method fisher --rank 192 --out smaller
    python -m surgery --bytes 0.25 --cache_bytes 0.25 --out packed

A point is one choice of what is cut, by which method, and to which level. Each point is measured, gets a line in
results.jsonl of --out_dir, and the weights are restored. The same command again skips the points that are done. report.md and
its figures are written at the end.

If the flags give one point, --out writes the smaller model to a folder, which surgery.load() reads. --heal_steps trains it
first to predict as the untouched model does (healing). --bytes quantises the linear layers and the token table of the model,
--cache_bytes its keys and values: important components get more bits.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, parse
from common.files import claim_new
from surgery.flags import OLD_SPELLINGS, SWEEP, Args, check, check_bytes
from surgery.rank_points import UNTOUCHED, Point, make_points

PROBES = 2  # windows of calibration text on which --budget measures each layer


@dataclass
class Opened:
    """What the flags name. windows: {text: its evaluation windows}. settings: those that all runs into one folder share."""

    name: str
    subject: object
    tokenizer: object
    texts: object
    windows: dict
    settings: dict


def opened(args):
    """Load what the flags name -> Opened."""
    import torch

    from surgery.checks import check_window
    from surgery.rank_cut import digest
    from surgery.subject import choose_model, load_subject
    from surgery.texts import TextReader, announced, announced_bos, bos_of, choose, settings

    if args.device != "cpu" and not torch.cuda.is_available():
        fail(f"--device {args.device}: there is no CUDA device here: give --device cpu")
    chosen = choose(args.calib_text, args.eval_text, args.heal_text)
    name = args.model or choose_model()
    print(f"model: {name}", *announced(chosen), sep="\n", flush=True)
    subject, tokenizer = load_subject(name, args.tokenizer)
    check_window(args, name, subject)
    texts = TextReader(chosen, tokenizer, len(subject.table.weight), args.window, bos_of(tokenizer, args.bos))
    print(announced_bos(tokenizer, texts.bos), flush=True)
    windows = texts.evaluation_windows(args.eval_windows)
    shared = {k: v for k, v in vars(args).items() if k not in SWEEP} | settings(chosen)
    shared |= dict(model=Path(name).name if Path(name).exists() else name, bos=texts.bos is not None)
    shared |= dict(weights=digest(subject.model), eval_windows=sum(map(len, windows.values())))
    return Opened(name, subject.to(args.device), tokenizer, texts, windows, shared)


def pack(args):
    """Write the packed model of --bytes and --cache_bytes."""
    from kv_cache.bit_fit import check_cache
    from reports.packed import packed_table
    from surgery.checks import check_subject
    from surgery.evaluator import Evaluator
    from surgery.sweep import prepare_folder
    from surgery.write import write_model, write_packed

    at = opened(args)
    check_subject(args, at.name, [], at.subject, at.tokenizer)
    parts = check_cache(at.subject.model, args.cache_bytes, args.window, args.cache_form) if args.cache_bytes else {}
    folder, _, *claims = prepare_folder(args, at.settings)
    claims.append(claim_new(args.out, "folder"))
    given = (args, at.subject, at.tokenizer, at.texts, Evaluator(at.subject, at.windows), folder, parts)
    record = write_model(args, folder, "packed.jsonl", lambda: write_packed(*given))
    print(packed_table(record))
    for claim in claims:
        claim.release()
    finish(model=at.name, out=args.out, **record["bytes"])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    argv = [OLD_SPELLINGS.get(arg, arg) for arg in argv]
    args, given = parse(Args, argv, description=__doc__)
    by_bits = args.bytes or args.cache_bytes
    if by_bits:
        check_bytes(args, given)
    points = [] if by_bits else make_points(args)
    check(args, given, points)
    if by_bits:
        return pack(args)

    from kv_cache.hf_layers import find_layers
    from kv_cache.hf_same import check_same
    from reports.surgery import write_report
    from surgery.checks import check_ranks, check_subject
    from surgery.evaluator import Evaluator
    from surgery.moments import calibration
    from surgery.rank_cut import Surgeon
    from surgery.sweep import prepare_folder, read_records, sweep
    from surgery.write import write_model, write_smaller

    at = opened(args)
    subject, tokenizer, texts, model = at.subject, at.tokenizer, at.texts, at.subject.model
    layers = find_layers(model) if not all(p.of_table for p in points) else []
    check_subject(args, at.name, points, subject, tokenizer)
    check_ranks(points, layers, subject, args.layers_per_group)
    parts = {}
    if args.out and layers and (layers[0].fused or set(points[0].targets) & {"k", "v"}):
        parts = check_same(model, layers, "--out")
    folder, records, *claims = prepare_folder(args, at.settings)
    if args.out:
        claims.append(claim_new(args.out, "folder"))

    done = [Point.of_record(r) for r in records if "answer" in r or not args.answer_tokens]
    left = [p for p in [UNTOUCHED, *points] if p not in done]
    if left or args.out:
        needed = points if args.out else left
        moments, table = calibration(args, needed, subject, layers, texts, folder / "calibration.pt")
        evaluator, probe = Evaluator(subject, at.windows), None
        if any(point.level == "budget" for point in needed):
            probe = Evaluator(subject, texts.windows("calib", PROBES))
        surgeon = Surgeon(subject, layers, args.layers_per_group, moments, table, probe)
        practice = texts.healing_windows(args.heal_steps) if args.heal_steps else []
        sweep(args, left, surgeon, evaluator, tokenizer, folder / "results.jsonl")
        if args.out:
            given = (args, points[0], surgeon, evaluator, tokenizer, practice, parts)
            write_model(args, folder, "smaller.jsonl", lambda: write_smaller(*given))
    records, smaller = (read_records(folder / f"{name}.jsonl", dict) for name in ("results", "smaller"))
    records = list({Point.of_record(r): r for r in records}.values())  # a point may have two
    print(write_report(folder, records, smaller, args.html))
    for claim in claims:
        claim.release()
    counts = dict(points=len(left), skipped=len(points) + 1 - len(left))
    finish(model=at.name, out_dir=str(folder), out=args.out or None, report=str(folder / "report.md"), **counts)


if __name__ == "__main__":
    main()
