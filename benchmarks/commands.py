"""
What bench.py's words do: measure, and print the tables.

Each takes the words after its own, and the page of help. torch is imported after the flags are checked.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.flags import (
    CACHES,
    DecodeFlags,
    GenerateFlags,
    TrainFlags,
    check_decode,
    check_names,
    check_out,
    check_train,
    models_to_train,
    preset_shape,
    shape_of,
)
from common.cli import fail, finish, parse, rounded

# -- decode -----------------------------------------------------------------------------------------------------------


def decode(argv, page):
    args, _ = parse(DecodeFlags, argv, description=page, prog="bench.py decode")
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
    """
    Two markdown tables: bytes relative to the dense model, and speed relative to the first row; losses, and the speed of each
    way to attend, if a model has several.
    """
    from reports.markdown import table

    dense = {row["kv_dtype"]: row["bytes_per_token"] for row in rows if row["model"] == "dense"}
    plain = rows[0]  # dense, in the first format
    first = {row["model"]: row for row in reversed(rows)}  # each model in the first formats
    names = ["model", "weights", "cache"]
    header = [*names, "bytes a token", "of dense", "float16 / this", "tokens/s", "first row = 1", "attends by"]
    losses = ["val loss", "perplexity", f"nats over {plain['kv_dtype']}", "nats over first row"]
    lines, more = [], []
    for row in rows:
        ways, stored = row["tokens_per_second"], row["bytes_per_token"]
        best = max(row["first_round"], key=row["first_round"].get)  # chosen on one round, reported over all
        line, other = ([row["model"], row["dtype"], row["kv_dtype"]] for _ in range(2))
        if row["kv_dtype"] in dense:
            line += [f"{stored:,.0f}", f"{stored / dense[row['kv_dtype']]:.2%}"]
            line += [f"{dense['float16'] / stored:.2f}x" if "float16" in dense else "-"]
        else:
            line += ["-"] * 3
        lines.append([*line, f"{ways[best]:,.1f}", f"{ways[best] / max(plain['tokens_per_second'].values()):.2f}", best])
        if len(ways) > 1 or "val_loss" in row:
            other += [" / ".join(f"{s:,.1f}" for s in ways.values()) if len(ways) > 1 else "-"]
            other += [f"{row['val_loss']:.4f}", f"{row['val_ppl']:.2f}"] if "val_loss" in row else ["-"] * 2
            lost = [f"{row['val_loss'] - than['val_loss']:+.4f}" for than in (first[row["model"]], plain) if "val_loss" in row]
            more.append([*other, *(lost or ["-"] * 2)])
    second = table([*names, "restore / late", *losses], more)
    return table(header, lines) + (f"\n\n{second}" if more else "")


# -- generate ---------------------------------------------------------------------------------------------------------


def generate(argv, page):
    args, _ = parse(GenerateFlags, argv, description=page, prog="bench.py generate")
    check_names(args, "caches", CACHES)
    check_out(args)
    try:
        contexts = [int(part) for part in args.contexts.split(",")]
    except ValueError:
        fail(f"--contexts {args.contexts}: give integers, comma-separated")
    if min(contexts) < 1:
        fail(f"--contexts {args.contexts}: a prompt has at least 1 token: raise it")

    import torch

    from benchmarks.generation import compare, open_model
    from reports.markdown import table
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


def train(argv, page):
    args, _ = parse(TrainFlags, argv, description=page, prog="bench.py train")
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
    """Markdown tables: speed, with ratios to nanoGPT; memory and FLOPs; milliseconds of each part of our steps."""
    from benchmarks.training import PARTS
    from reports.markdown import table

    versus = any("over_best" in row for row in rows)
    speeds, costs, parts = [], [], []
    for row in rows:
        speed, memory = row["tokens_per_second"], row["peak_memory_bytes"]
        name = [row["model"] + ", compiled" * row["compiled"] + " (its best)" * row.get("best", False), row["dtype"]]
        ratios = [row.get("over_default"), row.get("over_best")] if versus else []
        ratios = [f"{r['median']:.2f} ({r['low']:.2f} - {r['high']:.2f})" if r else "-" for r in ratios]
        speeds.append([*name, f"{speed['median']:,.4g}", f"{speed['low']:,.4g} - {speed['high']:,.4g}", *ratios])
        cost = [*name, f"{memory / 1e6:,.0f}" if memory is not None else "-"]
        if "ms" in row:
            cost += [f"{row['flops_per_token']['total'] / 1e6:,.4g} M", f"{row['trained_flops'] / 1e6:,.4g} M"]
            cost += [f"{row['mm_share']:.0%}"]
            parts.append([*name, *(f"{row['ms'][part]:,.4g}" if part in row["ms"] else "in forward" for part in PARTS)])
        costs.append(cost + ["-"] * (6 - len(cost)))
    header = ["model", "dtype", "tokens/s", "lowest - highest"] + ["/ nanoGPT default", "/ nanoGPT best"] * versus
    tables = [table(header, speeds), table(["model", "dtype", "peak MB", "FLOPs a token", "trained", "of products"], costs)]
    return "\n\n".join([*tables, table(["ms of one step", "dtype", *PARTS], parts)])


# -- all --------------------------------------------------------------------------------------------------------------


def show(title, about, text, out):
    """Print a table; with --out, also write it to that file, with its title and description."""
    from common.files import written_whole

    print(text)
    if out:
        with written_whole(out, "give another --out") as part:
            part.write_text(f"# {title}\n\n{about}\n\n{text}\n")
