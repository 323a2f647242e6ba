"""
What decoding costs: bytes that the KV cache has allocated, tokens a second, perplexity through that cache.

    python bench.py --decode --runs model_weights/vdproj                    # trained models, their perplexity too
    python bench.py --decode --shape gpt2 --context 512 --nanogpt DIR      # random weights, beside a nanoGPT checkout

Each model is measured dense, with compressed values and with compressed keys and values, by every number format of the cache.
All take turns, round after round, so that other load slows all alike. The first round chooses how a compressed model
attends; the median of all rounds is its speed.
"""

import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse, rounded
from train_args import PRESETS, ModelArgs
from value_cache import KV_DTYPES


@dataclass
class Args:
    decode: bool = flag(False, "measure decoding; training is measured by train.py itself, in its summary.json")
    runs: str = flag("", "folder with the runs of train_vdproj.sh, or a seed_N folder of it")
    shape: str = flag("", "a preset: a model of its shape with random weights instead", choices=tuple(PRESETS))
    vocab_size: int = flag(50257, "ids of that model", low=1)
    rank: int | None = flag(
        None, "numbers that its compressed keys and values have; left out, five eighths of its width", low=1
    )
    context: int | None = flag(None, "positions in the cache when the last token is read; left out, the block_size", low=1)
    kv_dtypes: str = flag("float32,float16,int8,int4", "number formats of the cache, comma-separated")
    batch_size: int = flag(1, "texts side by side", low=1)
    steps: int = flag(24, "tokens of one measurement", low=1)
    rounds: int = flag(3, "measurements of each", low=1)
    nanogpt: str = flag("", "a checkout of nanoGPT, which has no cache, to measure beside it at the same shape and context")
    device: str = flag("cpu", "cpu, cuda, mps")
    out: str = flag("", "a file for the table, as markdown")


def check(args):
    if not args.decode:
        fail("bench.py measures decoding: give --decode")
    if bool(args.runs) == bool(args.shape):
        fail("--runs and --shape: give one of the two, trained models or a shape")
    for name in args.kv_dtypes.split(","):
        if name not in KV_DTYPES:
            fail(f"--kv_dtypes {args.kv_dtypes}: {name!r} is none of {','.join(KV_DTYPES)}")
    if args.nanogpt and not (Path(args.nanogpt) / "model.py").is_file():
        fail(f"--nanogpt {args.nanogpt} has no model.py: give the folder of a checkout")
    if args.out and Path(args.out).is_dir():
        fail(f"--out {args.out} is a folder: give a file")
    if args.nanogpt and not args.shape:
        fail("--nanogpt is measured at a shape: give --shape gpt2 instead of --runs")


def shape_of(args):
    """The fields of GPTConfig at --shape, nothing compressed, and the rank of what is compressed."""
    shape = {name: value for name, value in (asdict(ModelArgs()) | PRESETS[args.shape]).items() if hasattr(ModelArgs, name)}
    shape |= dict(vocab_size=args.vocab_size, dropout=0.0, block_size=max(shape["block_size"], args.context or 0))
    rank = args.rank or shape["n_embd"] * 5 // 8
    if not 1 <= rank <= shape["n_embd"]:
        fail(f"--rank {rank} lies outside 1 to the width {shape['n_embd']} of --shape {args.shape}: change it")
    return shape, rank


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    check(args)

    import torch

    from common.device import hardware
    from common.files import written_whole
    from reports.markdown import table
    from value_cache.decoding_cost import NanoGPT, decoding_task, loss_through_cache, random_models, trained_models
    from value_cache.latent_attention import WAYS, is_compressed
    from value_cache.timing import by_turns

    models = random_models(*shape_of(args), args.device) if args.shape else trained_models(args.runs, args.device)
    config = models[0][1].config
    context = args.context or config.block_size
    if not args.steps < context <= config.block_size:
        fail(f"--context {context} has to lie above --steps {args.steps}, up to the block_size {config.block_size}")
    sizes = args.batch_size, context, args.steps
    rows, tasks = [], {}
    for name, model, saved in models:
        for kv_dtype in args.kv_dtypes.split(","):
            row = dict(model=name, kv_dtype=kv_dtype)
            if saved:
                found = loss_through_cache(model, saved, kv_dtype, args.device)
                row |= dict(val_loss=found["val_loss"], val_ppl=found["val_ppl"])
            for way in WAYS if is_compressed(model) else WAYS[:1]:
                tasks[len(rows), way] = task = decoding_task(model, kv_dtype, way, *sizes, args.device)
            row["bytes_per_token"] = task.cache.bytes_per_token()
            rows.append(row)
    if args.nanogpt:
        for name, dtype in (("nanoGPT, no cache", None), ("nanoGPT, no cache, bfloat16 autocast", torch.bfloat16)):
            tasks[len(rows), "-"] = NanoGPT(args.nanogpt, config, *sizes, dtype, args.device)
            rows.append(dict(model=name, kv_dtype="-", bytes_per_token=0))
    calls = {key: (task.prepare, task.run) for key, task in tasks.items()}
    seconds = by_turns(calls, args.rounds, lambda i: print(f"round {i}/{args.rounds}", file=sys.stderr))
    for (i, way), found in seconds.items():
        speeds = [tasks[i, way].tokens.numel() / s for s in found]
        rows[i].setdefault("tokens_per_second", {})[way] = rounded(statistics.median(speeds))
        rows[i].setdefault("first_round", {})[way] = rounded(speeds[0])
    text = rows_table(rows, table)
    print(text)
    about = (
        f"`python {' '.join(map(str, sys.argv))}`: context {context}, {args.batch_size} a batch, {args.device} "
        f"({hardware(args.device)}), torch {torch.__version__}, float32 arithmetic; median of {args.rounds} rounds of "
        f"{args.steps} tokens."
    )
    if args.out:
        with written_whole(args.out, "give another --out") as part:
            part.write_text(f"# Decoding\n\n{about}\n\n{text}\n")
    finish(context=context, hardware=hardware(args.device), rows=rows)


def rows_table(rows, table):
    """A markdown table: bytes beside the dense model's, speed beside the dense model's in the first format."""
    dense = {row["kv_dtype"]: row for row in rows if row["model"] == "dense"}
    bytes_16 = dense["float16"]["bytes_per_token"] if "float16" in dense else None
    plain = rows[0]  # dense, in the first format
    first = {row["model"]: row for row in reversed(rows)}  # each model in the first format
    header = ["model", "cache", "bytes a token", "of dense, same format", "dense float16 / this", "tokens/s",
              f"of dense, {plain['kv_dtype']}", "attends by", "restore / late / fold", "val loss", "perplexity",
              f"nats over {plain['kv_dtype']}", f"over dense, {plain['kv_dtype']}"]  # fmt: skip
    lines = []
    for row in rows:
        ways, stored = row["tokens_per_second"], row["bytes_per_token"]
        best = max(row["first_round"], key=row["first_round"].get)  # chosen apart from most of what is reported
        line = [row["model"], row["kv_dtype"]]
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


if __name__ == "__main__":
    main()
