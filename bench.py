"""
What decoding costs: bytes that the KV cache has allocated, tokens a second, perplexity through that cache.

    python bench.py --decode --runs model_weights/vdproj                    # trained models, their perplexity too
    python bench.py --decode --shape gpt2 --context 512 --nanogpt DIR      # random weights, beside a nanoGPT checkout

Each model is measured dense, with compressed values and with compressed keys and values, by every number format of the cache.
All take turns, round after round, so that a disturbance meets all of them. The first round chooses how a compressed model
attends, the median of the rounds is its speed.
"""

import importlib.util
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse
from sample import KV_DTYPES
from train_args import PRESETS, ModelArgs

MODELS = (
    ("dense", "pythia_baseline", {}),
    ("V {r}/{d}", "vdproj_end_to_end_r*", dict(v_proj_dim="r")),
    ("K+V {r}/{d}", "kvdproj_end_to_end_r*", dict(v_proj_dim="r", k_proj_dim="r")),
)


@dataclass
class Args:
    decode: bool = flag(False, "measure decoding; training is measured by train.py itself, in its summary.json")
    runs: str = flag("", "folder with the runs of train_vdproj.sh, or a seed_N folder of it")
    shape: str = flag("", "a preset: a model of its shape with random weights instead", choices=tuple(PRESETS))
    vocab_size: int = flag(50257, "ids of that model")
    rank: int | None = flag(None, "numbers that its compressed keys and values have; left out, five eighths of its width")
    context: int | None = flag(None, "positions in the cache when the last token is read; left out, the block_size")
    kv_dtypes: str = flag("float32,float16,int8,int4", "number formats of the cache, comma-separated")
    batch_size: int = flag(1, "texts side by side")
    steps: int = flag(24, "tokens of one measurement")
    rounds: int = flag(3, "measurements of each")
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
    for name in ("batch_size", "steps", "rounds", "vocab_size"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: give 1 or more")
    if args.nanogpt and not (Path(args.nanogpt) / "model.py").is_file():
        fail(f"--nanogpt {args.nanogpt} has no model.py: give the folder of a checkout")
    if args.out and Path(args.out).is_dir():
        fail(f"--out {args.out} is a folder: give a file")
    if args.nanogpt and not args.shape:
        fail("--nanogpt is measured at a shape: give --shape gpt2 instead of --runs")


# -- models -----------------------------------------------------------------------------------------------------------


def random_models(args):
    """[(name, model, None)] of a preset's shape, dense and compressed."""
    from dataclasses import asdict, fields

    import torch

    from common import checkpoint
    from model import GPT, GPTConfig

    shape = asdict(ModelArgs()) | PRESETS[args.shape]
    shape = {f.name: shape[f.name] for f in fields(GPTConfig) if f.name in shape} | dict(
        vocab_size=args.vocab_size, dropout=0.0
    )
    shape["block_size"] = max(shape["block_size"], args.context or 0)
    d, rank = shape["n_embd"], args.rank or shape["n_embd"] * 5 // 8
    if not 1 <= rank <= d:
        fail(f"--rank {rank} lies outside 1 to the width {d} of --shape {args.shape}: change it")
    models = []
    for name, _, parts in MODELS:
        torch.manual_seed(0)
        model = checkpoint.move_to(GPT(GPTConfig(**shape | dict.fromkeys(parts, rank))).eval(), args.device)
        models.append((name.format(r=rank, d=d), model, None))
    return models


def trained_models(args):
    """[(name, model, the checkpoint it comes from)] of the runs that train_vdproj.sh leaves."""
    from common import checkpoint

    models = []
    for name, pattern, _ in MODELS:
        folders = sorted(path for path in Path(args.runs).glob(pattern) if (path / "summary.json").exists())
        if not folders:
            fail(
                f"--runs {args.runs} has no finished {pattern}: bash scripts/train_vdproj.sh makes them, OUT/seed_N with SEEDS"
            )
        for folder in folders:
            saved = checkpoint.load(folder)
            model = checkpoint.move_to(checkpoint.build(saved, dropout=0.0).eval(), args.device)
            models.append((name.format(r=model.config.v_proj_dim, d=model.config.n_embd), model, saved))
    return models


def perplexity(model, saved, kv_dtype, device):
    """Loss and perplexity on the fixed windows that the run was evaluated on, keys and values read back from such a cache."""
    from common.dataset import Dataset
    from common.evaluate import evaluate
    from train_args import TrainArgs
    from value_cache.kv_cache import KVCache
    from value_cache.latent_attention import attend_by

    args = TrainArgs(**saved["args"])
    attend_by(model, "restore")
    cache_for = lambda B: KVCache(model, B, model.config.block_size, kv_dtype)  # noqa: E731
    return evaluate(model, Dataset(args.dataset), args, device, nullcontext(), cache_for=cache_for)


# -- speed ------------------------------------------------------------------------------------------------------------


class Decoding:
    """One model with one cache and one way to attend, which reads `steps` tokens up to the context at each call."""

    def __init__(self, model, kv_dtype, way, args, context):
        import torch

        from value_cache.kv_cache import KVCache
        from value_cache.latent_attention import attend_by

        self.model, self.way, self.steps, self.start = model, way, args.steps, context - args.steps
        self.cache = KVCache(model, args.batch_size, context, kv_dtype)
        idx = torch.randint(model.config.vocab_size, (args.batch_size, context), device=args.device)
        self.tokens = idx[:, self.start :]
        attend_by(model, "restore")
        with torch.inference_mode():
            model.hidden(idx[:, : self.start], self.cache)

    def __call__(self):
        """-> tokens a second."""
        import torch

        from value_cache.latent_attention import attend_by

        attend_by(self.model, self.way)
        self.cache.truncate(self.start)
        with torch.inference_mode():
            begin = time.perf_counter()
            for i in range(self.steps):
                self.model.logits(self.model.hidden(self.tokens[:, i : i + 1], self.cache)).argmax(-1).tolist()  # waits
            return self.tokens.numel() / (time.perf_counter() - begin)


def nanogpt(args, config, context, dtype):
    """A call that measures nanoGPT's own generate at the same shape, tokens a second; a few tokens, since each takes long."""
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(args.nanogpt) / "model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {name: getattr(config, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")}
    model = module.GPT(module.GPTConfig(**shape, dropout=0.0)).eval().to(args.device)
    steps = min(args.steps, 4)
    idx = torch.randint(config.vocab_size, (args.batch_size, context - steps), device=args.device)
    autocast = torch.autocast(args.device, dtype) if dtype else nullcontext()

    def measure():
        with torch.inference_mode(), autocast:
            begin = time.perf_counter()
            model.generate(idx, steps)
            return args.batch_size * steps / (time.perf_counter() - begin)

    return measure


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    check(args)

    import torch

    from common.run_folder import hardware
    from reports.markdown import table
    from value_cache.latent_attention import WAYS, is_compressed

    models = random_models(args) if args.shape else trained_models(args)
    config = models[0][1].config
    context = args.context or config.block_size
    if not args.steps < context <= config.block_size:
        fail(f"--context {context} has to lie above --steps {args.steps}, up to the block_size {config.block_size}")
    rows, calls = [], {}
    for name, model, saved in models:
        for kv_dtype in args.kv_dtypes.split(","):
            row = dict(model=name, kv_dtype=kv_dtype)
            if saved:
                found = perplexity(model, saved, kv_dtype, args.device)
                row |= dict(val_loss=found["val_loss"], val_ppl=found["val_ppl"])
            rows.append(row)
            for way in WAYS if is_compressed(model) else WAYS[:1]:
                calls[len(rows) - 1, way] = Decoding(model, kv_dtype, way, args, context)
            row["bytes_per_token"] = calls[len(rows) - 1, way].cache.bytes_per_token()
    if args.nanogpt:
        for name, dtype in (("nanoGPT, no cache", None), ("nanoGPT, no cache, bfloat16 autocast", torch.bfloat16)):
            rows.append(dict(model=name, kv_dtype="-", bytes_per_token=0))
            calls[len(rows) - 1, "-"] = nanogpt(args, config, context, dtype)
    speeds = {key: [] for key in calls}
    for round in range(args.rounds + 1):  # the first warms up
        for key, call in calls.items():
            speed = call()
            if round:
                speeds[key].append(speed)
        print(f"round {round}/{args.rounds}", file=sys.stderr)
    for (i, way), found in speeds.items():
        rows[i].setdefault("tokens_per_second", {})[way] = round_to(statistics.median(found))
        rows[i].setdefault("first_round", {})[way] = round_to(found[0])
    text = shown(rows, table)
    print(text)
    about = (
        f"`python {' '.join(map(str, sys.argv))}`: context {context}, {args.batch_size} a batch, {args.device} "
        f"({hardware(args.device)}), torch {torch.__version__}, float32 arithmetic; median of {args.rounds} rounds of "
        f"{args.steps} tokens."
    )
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(f"# Decoding\n\n{about}\n\n{text}\n")
    finish(context=context, hardware=hardware(args.device), rows=rows)


def round_to(x):
    return float(f"{x:.4g}")


def shown(rows, table):
    """Everything as a markdown table, beside the dense model's cache in float16 and beside its speed in the first format."""
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
