"""The flags of bench.py's words, and their checks. Nothing here imports torch."""

from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.nanogpt import check_checkout
from common.cli import fail, flag
from train_args import PRESETS, ModelArgs, TrainArgs
from training.rules import check_device

DTYPES = ("float32", "bfloat16", "float16")
CACHES = ("own", "int8")
MODELS = ("dense", "factorized", "lora", "vdproj")


@dataclass
class Flags:
    """Flags of all commands."""

    rounds: int = flag(3, "measured rounds; one extra warm-up round runs first", low=1)
    out: str = flag("", "file to write the tables to, as markdown")


@dataclass
class OurFlags(Flags):
    """Flags of decode and train."""

    vocab_size: int = flag(50257, "vocabulary size of models with random weights", low=1)
    device: str = flag("cpu", "cpu, cuda, mps")
    vs: str = flag(
        "", "folder of a nanoGPT checkout to measure too: decoding without a cache, training by its defaults and at its best"
    )


@dataclass
class DecodeFlags(OurFlags):
    runs: str = flag("", "folder with the runs of train_vdproj.sh, or a seed_N folder of it")
    shape: str = flag("", "preset whose shape to measure with random weights, instead of --runs", choices=tuple(PRESETS))
    rank: int | None = flag(None, "numbers of each compressed key or value; default: five eighths of the model's width", low=1)
    context: int | None = flag(None, "positions in the cache at the last token; default: the model's block_size", low=1)
    dtypes: str = flag("float32", "number formats of weights and arithmetic, comma-separated")
    kv_dtypes: str = flag("float32,float16,int8,int4", "number formats of the cache, comma-separated")
    batch_size: int = flag(1, "texts decoded in parallel", low=1)
    steps: int = flag(24, "tokens of one measurement", low=1)


def check_decode(args):
    from kv_cache import KV_DTYPES

    if bool(args.runs) == bool(args.shape):
        fail("--runs and --shape: give one of them, trained models or a shape")
    for name, known in (("kv_dtypes", KV_DTYPES), ("dtypes", DTYPES)):
        check_names(args, name, known)
    check_out(args)
    check_vs(args)
    if args.vs and not args.shape:
        fail("--vs needs a shape: give --shape gpt2 instead of --runs")


def check_names(args, flag_name, known):
    """Refuse a comma-separated flag that has an unknown name."""
    given = getattr(args, flag_name)
    if unknown := [part for part in given.split(",") if part not in known]:
        fail(f"--{flag_name} {given}: {unknown[0]!r} is unknown: choose from {','.join(known)}")


def check_out(args):
    if args.out and Path(args.out).is_dir():
        fail(f"--out {args.out} is a folder: give a file")


def check_vs(args):
    if args.vs:
        check_checkout(args.vs, "--vs")


def preset_shape(name):
    """The fields of ModelArgs for a preset."""
    return asdict(ModelArgs()) | {field: value for field, value in PRESETS[name].items() if hasattr(ModelArgs, field)}


def shape_of(args):
    """(The fields of an uncompressed GPTConfig of --shape, the rank of compressed keys and values)."""
    shape = preset_shape(args.shape)
    shape |= dict(vocab_size=args.vocab_size, dropout=0.0, block_size=max(shape["block_size"], args.context or 0))
    rank = args.rank or shape["n_embd"] * 5 // 8
    if not 1 <= rank <= shape["n_embd"]:
        fail(f"--rank {rank} is not between 1 and the width {shape['n_embd']} of --shape {args.shape}: change it")
    return shape, rank


@dataclass
class GenerateFlags(Flags):
    models: str = flag(
        "",
        "hub ids, folders, .gguf files, or surgery's --out folders, comma-separated; default: as in python -m surgery",
    )
    contexts: str = flag("512", "tokens of the prompt, comma-separated")
    caches: str = flag("own", "caches, comma-separated. own: the model's own; int8: one scale for each token and layer")
    batch_size: int = flag(1, "texts decoded in parallel", low=1)
    steps: int = flag(16, "tokens of one measurement", low=1)


@dataclass
class TrainFlags(OurFlags):
    shape: str = flag("gpt2", "preset whose shape the models have; their weights are random", choices=tuple(PRESETS))
    micro_steps: int = flag(1, "micro-steps in one step, like train.py's --gradient_accumulation_steps", low=1)
    batch_size: int = flag(1, "windows in one micro-step", low=1)
    block_size: int | None = flag(None, "tokens in one window; default: the shape's, at most 256", low=1)
    dropout: float = flag(0.0, "dropout of all models; train.py uses the preset's, nanoGPT uses 0", low=0, below=1)
    models: str = flag(
        ",".join(MODELS),
        "models to measure, comma-separated. factorized: low-rank token table; lora: this model, only adapters train; "
        "vdproj: values compressed to five eighths of the width",
    )
    rank: int | None = flag(None, "rank of the factorized table; default: 128, or half the width if that is less", low=1)
    lora_rank: int | None = flag(None, "rank of the adapters; default: 32, or the table's rank if that is less", low=1)
    dtypes: str = flag("float32,bfloat16", "number formats of the forward pass, comma-separated; the weights are float32")
    compile: bool = flag(False, "measure each model also with torch.compile")
    steps: int = flag(2, "steps of one measurement", low=1)


def check_train(args):
    for name, known in (("models", MODELS), ("dtypes", DTYPES)):
        check_names(args, name, known)
    check_device(args.device)
    if "float16" in args.dtypes.split(",") and not args.device.startswith("cuda"):
        fail(f"--dtypes {args.dtypes}: float16 needs a GPU, but --device is {args.device}: drop float16")
    check_out(args)
    check_vs(args)
    shape = preset_shape(args.shape)
    if args.vs and (shape["rotary_pct"] or shape["parallel_residual"] or not shape["tie_head"]):
        fail(f"--vs: nanoGPT cannot build --shape {args.shape}: give --shape gpt2 or laptop")
    needs_tie = [name for name in ("factorized", "lora") if name in args.models.split(",")]
    if needs_tie and not shape["tie_head"]:
        fail(f"--models {needs_tie[0]} needs a tied head, but --shape {args.shape} has none: give --models dense,vdproj")


def models_to_train(args, dataset):
    """({name: TrainArgs} of --models, the TrainArgs of a dense model). All read the folder `dataset`."""
    shape = preset_shape(args.shape)
    d = shape["n_embd"]
    shape |= dict(dropout=args.dropout, block_size=args.block_size, batch_size=args.batch_size)
    shape |= dict(gradient_accumulation_steps=args.micro_steps, dataset=dataset, device=args.device)
    rank = args.rank or min(128, max(1, d // 2))
    if rank > d:
        fail(f"--rank {rank} is not between 1 and the width {d} of --shape {args.shape}: change it")
    top = min(rank, args.vocab_size)
    adapters = args.lora_rank or min(32, top)
    if adapters > top and "lora" in args.models.split(","):
        fail(f"--lora_rank {adapters} is above {top}, the smaller side of the adapted table: lower it")
    values = max(1, d * 5 // 8)
    known = dict(
        dense=("dense", {}),
        factorized=(f"factorized {rank}/{d}", dict(n_embd_wte=rank)),
        lora=(f"LoRA {adapters} on {rank}/{d}", dict(n_embd_wte=rank, lora_rank=adapters, lora_dropout=args.dropout)),
        vdproj=(f"V {values}/{d}", dict(v_proj_dim=values)),
    )
    chosen = [known[name] for name in dict.fromkeys(args.models.split(","))]
    return {name: TrainArgs(**shape | parts) for name, parts in chosen}, TrainArgs(**shape)
