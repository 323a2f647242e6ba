"""
Text out of a checkpoint, through the KV cache.

    python sample.py --ckpt_path model_weights/gpt_baseline --prompt "My fellow citizens"
    python sample.py --ckpt_path model_weights/vdproj/kvdproj_end_to_end_r80 --kv_dtype int8 --num_samples 4

The cache holds what the model compresses to. A text stops at end-of-text, after --max_new_tokens, or where the model's
block_size is full: positions do not slide, since learned ones cannot.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse

KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")


@dataclass
class Args:
    ckpt_path: str = flag(help="a ckpt.pt, or the run folder that holds it")
    prompt: str | None = flag(None, "text to go on with; left out, it starts after end-of-text")
    prompt_file: str | None = flag(None, "a file with that text")
    prompt_ids: str | None = flag(None, "token ids, comma-separated, instead of text")
    num_samples: int = flag(1, "texts, side by side in one batch; a single one streams")
    max_new_tokens: int = flag(100, "tokens of each text after the prompt")
    temperature: float = flag(0.8, "the logits are divided by it; 0 takes the likeliest token")
    top_k: int | None = flag(None, "draw from so many of the likeliest tokens")
    top_p: float | None = flag(None, "draw from the fewest tokens that have this share of the probability together")
    seed: int = flag(1337, "of the draws")
    kv_cache: bool = flag(True, "keep keys and values; without, every token reads the whole text again")
    kv_dtype: str | None = flag(None, "what the cache keeps; left out, the model's own dtype", choices=KV_DTYPES)
    attend: str = flag(
        "auto",
        "how a compressed model reads its cache, see value_cache/latent_attention.py; auto takes the fastest here",
        choices=("auto", "restore", "late", "fold"),
    )
    dataset: str | None = flag(None, "whose tokenizer to take; left out, that of the checkpoint's training")
    device: str = flag("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = flag("float32", "of weights and arithmetic", choices=KV_DTYPES[:3])


def check(args, given):
    prompts = [f"--{name}" for name in ("prompt", "prompt_file", "prompt_ids") if name in given]
    if len(prompts) > 1:
        fail(f"{prompts[0]} and {prompts[1]} are two prompts: leave one out")
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("top_k", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name} {getattr(args, name)}: give {least} or more")
    if args.temperature and not 1e-6 <= args.temperature < float("inf"):
        fail(f"--temperature {args.temperature}: give 0 for the likeliest token, or a number from 1e-6 on")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        fail(f"--top_p {args.top_p}: give a share above 0, up to 1")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed {args.seed}: give a number from 0 to 2^63 - 1")
    if args.temperature == 0 and (args.top_k or args.top_p):
        fail("--temperature 0 takes the likeliest token, --top_k and --top_p change nothing: leave them out")
    if not args.kv_cache and (args.kv_dtype or args.attend != "auto"):
        fail("--no-kv_cache leaves --kv_dtype and --attend nothing to act on: leave them out")


def load_model(args):
    """-> the model of a checkpoint, plain, where and as it is to run; what it was trained on."""
    import torch

    from common import checkpoint

    saved = checkpoint.load(args.ckpt_path, hint="train it first, or give another --ckpt_path")
    model = checkpoint.build(saved, dropout=0.0).eval()
    model.merge_lora()
    checkpoint.move_to(model, args.device, getattr(torch, args.dtype))
    return model, saved["args"]["dataset"]


def load_codec(args, trained_on):
    """The tokenizer of the dataset; None where ids are given and there is none."""
    from common.dataset import find_folder, read_meta
    from common.tokenizer import read_codec

    name = args.dataset or trained_on
    folder = find_folder(name)
    if folder is None and args.prompt_ids is not None and args.dataset is None:
        return None
    if folder is None:
        fail(f"--dataset {name}: no such folder under data/, so no tokenizer; run data/{name}/prepare.py, or give --prompt_ids")
    meta = read_meta(folder / "meta.pkl")
    if args.prompt_ids is not None and meta.get("tokenizer") not in ("gpt2", "bpe"):
        return None
    return read_codec(meta, folder / "meta.pkl")


def read_prompt(args, codec):
    """-> (token ids, the flag they come from)."""
    if args.prompt_ids is not None:
        try:
            return [int(i) for i in args.prompt_ids.split(",")], "--prompt_ids"
        except ValueError:
            fail(f"--prompt_ids {args.prompt_ids!r}: give whole numbers, comma-separated")
    if args.prompt is None and args.prompt_file is None:
        return [codec.end_of_text], f"--dataset {args.dataset}"
    text, source = args.prompt, "--prompt"
    if args.prompt_file is not None:
        source = f"--prompt_file {args.prompt_file}"
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"{source} cannot be read ({type(error).__name__}): give a text file")
    if not text:
        fail(f"{source} is empty: give some text, or leave the flag out to start after end-of-text")
    try:
        return codec.encode(text.encode().decode()), source
    except UnicodeError:
        fail(f"{source} is no valid text in UTF-8: give another")


def open_cache(args, model, positions):
    """-> (a KVCache, the way to attend that the model is left by)."""
    from value_cache.kv_cache import KVCache
    from value_cache.latent_attention import attend_by, fastest, is_compressed

    way, kv_dtype = args.attend, args.kv_dtype or args.dtype
    if way == "auto":
        way, seconds = fastest(model, args.num_samples, positions, kv_dtype)
        if seconds:
            times = ", ".join(f"{name} {1000 * s:.2f}" for name, s in seconds.items())
            print(f"attending by {way}, the fastest here (ms a token: {times})", file=sys.stderr)
    elif way != "restore" and not is_compressed(model):
        fail(f"--attend {way} is of compressed models, and {args.ckpt_path} keeps plain keys and values: leave it out")
    attend_by(model, way)
    return KVCache(model, args.num_samples, positions, kv_dtype), way


class Printer:
    """Shows a text as it grows. Bytes that are not yet a whole character wait for the next token."""

    def __init__(self, codec):
        self.codec, self.shown = codec, 0

    def show(self, ids, last=False):
        text = self.codec.decode(ids) if self.codec else ",".join(map(str, ids))
        if last or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self.shown :], end="\n" if last else "", flush=True)
            self.shown = len(text)


def main(argv=None):
    args, given = parse(Args, argv, description=__doc__)
    check(args, given)

    import torch

    from model import NO_CACHE
    from value_cache.generation import chooser, generate

    model, trained_on = load_model(args)
    codec = load_codec(args, trained_on)
    prompt, source = read_prompt(args, codec)
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    if outside := [i for i in prompt if not 0 <= i < vocab_size]:
        fail(f"{source} has id {outside[0]}, the model has {vocab_size} ids: give the --dataset that it trained on")
    if len(prompt) > block_size:
        fail(f"{source} has {len(prompt)} tokens, more than the model's block_size {block_size}: shorten it")
    steps = min(args.max_new_tokens, block_size - len(prompt) + 1)  # the last token need not be read
    cache, way = open_cache(args, model, len(prompt) + steps - 1) if args.kv_cache else (NO_CACHE, None)
    if steps < args.max_new_tokens:
        print(f"note: stops after {steps} tokens, where the model's block_size {block_size} is full", file=sys.stderr)

    choose = chooser(args.temperature, args.top_k, args.top_p, torch.Generator(args.device).manual_seed(args.seed))
    end = codec.end_of_text if codec else None
    begin = [] if prompt == [end] else prompt
    texts, printer = [list(begin) for _ in range(args.num_samples)], Printer(codec)
    start, made = time.perf_counter(), 0
    idx = torch.tensor([prompt] * args.num_samples, device=args.device)
    for tokens in generate(model, idx, steps, choose, end, cache):
        made += 1
        for text, token in zip(texts, tokens.tolist()):
            if token != end:  # which a text that has ended repeats
                text.append(token)
        if args.num_samples == 1:
            printer.show(texts[0])
    seconds = time.perf_counter() - start
    for text in texts:
        if args.num_samples > 1:
            print("-" * 80)
            printer = Printer(codec)
        printer.show(text, last=True)
    finish(
        prompt_tokens=len(prompt),
        new_tokens=[len(text) - len(begin) for text in texts],
        seconds=round(seconds, 3),
        tokens_per_second=round(made * args.num_samples / seconds, 2),
        attend=way,
        cache_bytes=cache.bytes() if args.kv_cache else 0,
        cache_bytes_per_token=cache.bytes_per_token() if args.kv_cache else 0,
    )


if __name__ == "__main__":
    main()
