"""
Measures the cost of decoding and of training on this machine.

    python bench.py decode --runs model_weights/vdproj                      # trained models, their perplexity too
    python bench.py decode --shape gpt2 --context 512 --vs DIR              # random weights, beside a nanoGPT checkout
    python bench.py train --shape gpt2 --dtypes float32,bfloat16 --vs DIR   # a training step, beside a nanoGPT checkout
    python bench.py generate --models MODEL,smaller --contexts 512,2048     # Hugging Face models and surgery's folders
    python bench.py decode --help                                           # the flags

The models alternate: each round measures every model once, so other load on the machine slows all of them equally. A model's
speed is the median over the rounds.

decode measures the allocated bytes of the KV cache, tokens a second, and the perplexity through that cache. It measures each
model dense, with compressed values, and with compressed keys and values, in every number format of the cache. A compressed
model can attend in several ways; the first round chooses the fastest.

generate measures greedy decoding through the model's own cache and through an int8 cache, and the allocated bytes of both.

train measures one step of train.py with AdamW: tokens a second, milliseconds of each part, peak memory, FLOPs, and these FLOPs
as a share of the machine's own rate of matrix products.
"""

import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.nanogpt import check_checkout
from common.cli import fail, finish, flag, parse, rounded
from train_args import PRESETS, ModelArgs, TrainArgs
from training.rules import check_device

# -- decode -----------------------------------------------------------------------------------------------------------


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


def decode(argv):
    args, _ = parse(DecodeFlags, argv, description=__doc__, prog="bench.py decode")
    check_decode(args)

    import torch

    from benchmarks.decoding import NanoGPT, decoding_task, loss_through_cache, random_models, trained_models
    from common.timing import by_turns
    from kv_cache.own_attention import WAYS
    from training.device import hardware

    models = []
    for dtype in args.dtypes.split(","):
        found = random_models(*shape_of(args), args.device) if args.shape else trained_models(args.runs, args.device)
        models += [(name, dtype, model.to(getattr(torch, dtype)), saved) for name, model, saved in found]
    config = models[0][2].config
    context = args.context or config.block_size
    if not args.steps < context <= config.block_size:
        fail(
            f"--context {context} must be above --steps {args.steps} and at most the block_size {config.block_size}: change it"
        )
    sizes = args.batch_size, context, args.steps
    rows, tasks = [], {}
    for name, dtype, model, saved in models:
        for kv_dtype in args.kv_dtypes.split(","):
            row = dict(model=name, dtype=dtype, kv_dtype=kv_dtype)
            if saved:
                found = loss_through_cache(model, saved, kv_dtype, args.device)
                row |= dict(val_loss=found["val_loss"], val_ppl=found["val_ppl"])
            for way in WAYS:
                tasks[len(rows), way] = task = decoding_task(model, kv_dtype, way, *sizes, args.device)
            row["bytes_per_token"] = task.cache.bytes_per_token()
            rows.append(row)
    if args.vs:
        for name, dtype in (("nanoGPT, no cache", None), ("nanoGPT, no cache, bfloat16 autocast", torch.bfloat16)):
            tasks[len(rows), "-"] = NanoGPT(args.vs, config, *sizes, dtype, args.device)
            rows.append(dict(model=name, dtype="float32", kv_dtype="-", bytes_per_token=0))
    calls = {key: (task.prepare, task.run) for key, task in tasks.items()}
    seconds = by_turns(calls, args.rounds, lambda i: print(f"round {i}/{args.rounds}", file=sys.stderr))
    for (i, way), found in seconds.items():
        speeds = [tasks[i, way].tokens.numel() / s for s in found]
        rows[i].setdefault("tokens_per_second", {})[way] = rounded(statistics.median(speeds))
        rows[i].setdefault("first_round", {})[way] = rounded(speeds[0])
    about = (
        f"`python {' '.join(map(str, sys.argv))}`: context {context}, {args.batch_size} a batch, {args.device} "
        f"({hardware(args.device)}), torch {torch.__version__}; median of {args.rounds} rounds of "
        f"{args.steps} tokens."
    )
    show("Decoding", about, decoding_table(rows), args.out)
    finish(context=context, hardware=hardware(args.device), rows=rows)


def decoding_table(rows):
    """A markdown table with bytes relative to the dense model and speed relative to the first row."""
    from reports.markdown import table

    dense = {row["kv_dtype"]: row for row in rows if row["model"] == "dense"}
    bytes_16 = dense["float16"]["bytes_per_token"] if "float16" in dense else None
    plain = rows[0]  # dense, in the first format
    first = {row["model"]: row for row in reversed(rows)}  # each model in the first formats
    header = ["model", "weights", "cache", "bytes a token", "of dense, same format", "dense float16 / this", "tokens/s",
              "speed, first row = 1", "attends by", "restore / late", "val loss", "perplexity",
              f"nats over {plain['kv_dtype']}", "nats over the first row"]  # fmt: skip
    lines = []
    for row in rows:
        ways, stored = row["tokens_per_second"], row["bytes_per_token"]
        best = max(row["first_round"], key=row["first_round"].get)  # chosen on one round, reported over all
        line = [row["model"], row["dtype"], row["kv_dtype"]]
        if row["kv_dtype"] in dense:
            line += [f"{stored:,.0f}", f"{stored / dense[row['kv_dtype']]['bytes_per_token']:.2%}"]
            line += [f"{bytes_16 / stored:.2f}x" if bytes_16 else "-"]
        else:
            line += ["-"] * 3
        line += [f"{ways[best]:,.1f}", f"{ways[best] / max(plain['tokens_per_second'].values()):.2f}", best]
        line += [" / ".join(f"{s:,.1f}" for s in ways.values()) if len(ways) > 1 else "-"]
        if "val_loss" in row:
            line += [f"{row['val_loss']:.4f}", f"{row['val_ppl']:.2f}"]
            line += [f"{row['val_loss'] - other['val_loss']:+.4f}" for other in (first[row["model"]], plain)]
        else:
            line += ["-"] * 4
        lines.append(line)
    return table(header, lines)


# -- generate ---------------------------------------------------------------------------------------------------------

CACHES = ("own", "int8")


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


def generate(argv):
    args, _ = parse(GenerateFlags, argv, description=__doc__, prog="bench.py generate")
    check_names(args, "caches", CACHES)
    check_out(args)
    try:
        contexts = [int(part) for part in args.contexts.split(",")]
    except ValueError:
        fail(f"--contexts {args.contexts}: give integers, comma-separated")
    if min(contexts) < 1:
        fail(f"--contexts {args.contexts}: a prompt has at least 1 token: raise it")

    import torch

    from reports.markdown import table
    from surgery.decoding_speed import compare, open_model
    from surgery.subject import choose_model, longest_of
    from training.device import hardware

    models = {name: open_model(name) for name in (args.models or choose_model()).split(",")}
    for name, hf in models.items():
        if max(contexts) + args.steps > longest_of(hf):
            fail(
                f"--contexts {max(contexts)} and --steps {args.steps}: {name} reads at most {longest_of(hf)} tokens: give less"
            )
    rows, lines, sizes = [], [], (args.batch_size, args.steps, args.rounds)
    for context in contexts:
        found = compare(models, args.caches.split(","), context, *sizes, lambda i: print(f"round {i}", file=sys.stderr))
        for row in found:
            speeds = sorted(first / own for first, own in zip(found[0]["seconds"], row["seconds"]))
            tokens = args.batch_size * args.steps / statistics.median(row["seconds"])
            row |= dict(tokens_per_second=rounded(tokens), of_the_first=rounded(statistics.median(speeds)))
            line = [context, Path(row["model"]).name, row["cache"], f"{row['bytes_per_token']:,.0f}", f"{tokens:,.1f}"]
            lines.append([*line, f"{row['of_the_first']:.2f} ({speeds[0]:.2f} - {speeds[-1]:.2f})"])
        rows += found
    about = (
        f"`python {' '.join(map(str, sys.argv))}`: {args.batch_size} a batch, float32 arithmetic, {hardware('cpu')}, "
        f"torch {torch.__version__}; median of {args.rounds} rounds of {args.steps} tokens, the models alternating. "
        "The last column is the ratio to the first row within a round: median (lowest - highest)."
    )
    header = ["context", "model", "cache", "allocated bytes a token", "tokens/s", "speed, first row of the context = 1"]
    show("Decoding of Hugging Face models", about, table(header, lines), args.out)
    finish(hardware=hardware("cpu"), rows=rows)


# -- train ------------------------------------------------------------------------------------------------------------

MODELS = ("dense", "factorized", "lora", "vdproj")
DTYPES = ("float32", "bfloat16", "float16")


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


def train(argv):
    args, _ = parse(TrainFlags, argv, description=__doc__, prog="bench.py train")
    args.block_size = args.block_size or min(256, preset_shape(args.shape)["block_size"])
    check_train(args)
    models_to_train(args, "")  # refuse unfit ranks before the slow import of torch

    import torch

    from benchmarks.nanogpt import load_module
    from benchmarks.training import measure, plans, write_text
    from training.checkpoint import move_to
    from training.device import ends_in_one_line, hardware
    from training.step import why_it_does_not_compile

    move_to(torch.zeros(1), args.device)  # ends the program if there is no such device
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # as train.py does
    if args.compile:
        tiny, ones = torch.nn.Linear(8, 8, device=args.device), torch.ones(1, 8, device=args.device)
        if why_not := why_it_does_not_compile(lambda: torch.compile(tiny)(ones).sum().backward()):
            fail(f"--compile: torch cannot compile here ({why_not}): drop --compile, or repair the compiler")
        torch._dynamo.config.cache_size_limit = 64  # all models share one forward(), and each is compiled separately
    if args.vs:
        load_module(args.vs, "--vs")  # ends the program if it is not nanoGPT's
    with tempfile.TemporaryDirectory() as folder, ends_in_one_line(args, args.device, "start again with fewer --rounds"):
        write_text(folder, args.vocab_size, args.block_size)
        planned = plans(
            *models_to_train(args, folder),
            list(dict.fromkeys(args.dtypes.split(","))),
            (False, True) if args.compile else (False,),
            args.vs,
        )
        rows, rates = measure(planned, args.steps, args.rounds, lambda text: print(text, file=sys.stderr))
    step = f"{args.micro_steps} x " * (args.micro_steps > 1) + f"{args.batch_size} x {args.block_size}"
    tokens = args.micro_steps * args.batch_size * args.block_size
    about = (
        f"`python {' '.join(map(str, sys.argv))}`: one step is {step} = {tokens:,} tokens, {args.device} "
        f"({hardware(args.device)}), torch {torch.__version__}; "
        f"median of {args.rounds} rounds of {args.steps} steps, with the lowest and highest. {READING}"
        + "".join(f" {dtype} products: {rate / 1e9:,.4g} GFLOP/s." for dtype, rate in rates.items())
    )
    show("Training", about, training_tables(rows), args.out)
    finish(hardware=hardware(args.device), tokens_per_step=tokens, mm_flops=rates, rows=rows)


READING = (
    "Memory is the peak with model, optimizer and two steps: on a GPU of the tensors, on the CPU the resident memory that a "
    "fresh process adds. FLOPs a token: of the forward pass, and of the entire step. The share is the step's FLOPs a second "
    "divided by this machine's own rate of matrix products in the same dtype."
)


def training_tables(rows):
    """Two markdown tables: speed, memory and FLOPs, with ratios to nanoGPT; and milliseconds of each part of our steps."""
    from benchmarks.training import PARTS
    from reports.markdown import table

    versus = any("over_best" in row for row in rows)
    header = ["model", "dtype", "tokens/s", "lowest - highest", "peak MB", "FLOPs a token", "trained", "of products"]
    header += ["/ nanoGPT default", "/ nanoGPT best"] if versus else []
    speeds, parts = [], []
    for row in rows:
        speed, memory = row["tokens_per_second"], row["peak_memory_bytes"]
        name = [row["model"] + ", compiled" * row["compiled"] + " (its best)" * row.get("best", False), row["dtype"]]
        line = [*name, f"{speed['median']:,.4g}", f"{speed['low']:,.4g} - {speed['high']:,.4g}"]
        line += [f"{memory / 1e6:,.0f}" if memory is not None else "-"]
        if "ms" in row:
            line += [f"{row['flops_per_token']['total'] / 1e6:,.4g} M", f"{row['trained_flops'] / 1e6:,.4g} M"]
            line += [f"{row['mm_share']:.0%}"]
            ms = row["ms"]
            parts.append([*name, *(f"{ms[part]:,.4g}" if part in ms else "in forward" for part in PARTS)])
        else:
            line += ["-"] * 3
        if versus:
            ratios = [row.get("over_default"), row.get("over_best")]
            line += [f"{r['median']:.2f} ({r['low']:.2f} - {r['high']:.2f})" if r else "-" for r in ratios]
        speeds.append(line)
    milliseconds = table(["ms of one step", "dtype", *PARTS], parts)
    return f"{table(header, speeds)}\n\n{milliseconds}"


# -- both -------------------------------------------------------------------------------------------------------------


def show(title, about, text, out):
    """Print a table; with --out, also write it to that file, with its title and description."""
    from common.files import written_whole

    print(text)
    if out:
        with written_whole(out, "give another --out") as part:
            part.write_text(f"# {title}\n\n{about}\n\n{text}\n")


COMMANDS = dict(decode=decode, generate=generate, train=train)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip())
    elif argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        fail(f"give decode, generate or train as the first word{f', not {argv[0]}' if argv else ''}")


if __name__ == "__main__":
    main()
