"""
Write text with the model of a checkpoint, using a KV cache.

    python sample.py --ckpt_path model_weights/gpt_baseline --prompt "My fellow citizens"
    python sample.py --ckpt_path model_weights/vdproj/kvdproj_end_to_end_r80 --kv_dtype int8 --num_samples 4

The cache holds the model's keys and values, compressed if the model compresses them. A text stops at end-of-text, after
--max_new_tokens, or if it fills the model's block_size: learned positions end there.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse
from common.texts import codec_of
from kv_cache import KV_DTYPES


@dataclass
class Args:
    ckpt_path: str = flag(help="ckpt.pt, or its run folder")
    prompt: str | None = flag(None, "text to continue; default: start after an end-of-text token")
    prompt_file: str | None = flag(None, "file with the text to continue")
    prompt_ids: str | None = flag(None, "token ids to continue, comma-separated, instead of text")
    num_samples: int = flag(1, "number of texts, computed in one batch; a single text is printed as it grows", low=1)
    max_new_tokens: int = flag(100, "largest number of new tokens of each text", low=1)
    temperature: float = flag(0.8, "divisor of the logits; 0: always take the likeliest token", low=0)
    top_k: int | None = flag(None, "draw only from this many of the likeliest tokens; default: from all", low=1)
    top_p: float | None = flag(
        None, "draw only from the fewest tokens whose probabilities sum to at least this; default: from all", above=0, high=1
    )
    seed: int = flag(1337, "random seed of the draws", low=0, high=2**63 - 1)
    kv_cache: bool = flag(True, "keep keys and values; without a cache, each new token recomputes all earlier ones")
    kv_dtype: str | None = flag(None, "number format of the cache; default: --dtype", choices=KV_DTYPES)
    attend: str = flag(
        "auto",
        "how attention reads the cache, see kv_cache/own_attention.py; auto takes the fastest on this machine",
        choices=("auto", "restore", "late"),
    )
    dataset: str | None = flag(None, "dataset whose tokenizer is used; default: the one that the checkpoint trained on")
    device: str = flag("cpu", "device: cpu, cuda, cuda:1 or mps")
    dtype: str = flag(
        "float32",
        "number format of weights and arithmetic; auto takes the fastest on this machine",
        choices=("auto", *KV_DTYPES[:3]),
    )


def check(args, given):
    prompts = [f"--{name}" for name in ("prompt", "prompt_file", "prompt_ids") if name in given]
    if len(prompts) > 1:
        fail(f"{prompts[0]} and {prompts[1]} both give a prompt: drop one")
    if 0 < args.temperature < 1e-6:  # the logits would grow beyond float32
        fail(f"--temperature {args.temperature}: give 0 for the likeliest token, or a number from 1e-6 on")
    if args.temperature == 0 and (args.top_k or args.top_p):
        fail("--temperature 0 takes the likeliest token, so --top_k and --top_p have no effect: drop them")
    if not args.kv_cache and (args.kv_dtype or args.attend != "auto"):
        fail("--kv_dtype and --attend have no effect with --no-kv_cache: drop them")
    if not args.kv_cache and args.dtype == "auto":
        fail("--dtype auto measures decoding with the cache: drop --no-kv_cache, or name a --dtype")


def load_codec(args, trained_on):
    """The tokenizer of --dataset, or of the dataset that the model trained on. None if it is missing and ids are given."""
    name = args.dataset or trained_on
    found = codec_of(name, "give --prompt_ids", required=args.prompt_ids is None)
    if found is None and (args.prompt_ids is None or args.dataset):
        fail(f"--dataset {name}: no such folder under data/, so no tokenizer; run data/{name}/prepare.py, or give --prompt_ids")
    return found and found[0]


def read_prompt(args, codec):
    """Returns (token ids, the flag that they come from)."""
    if args.prompt_ids is not None:
        try:
            return [int(i) for i in args.prompt_ids.split(",")], "--prompt_ids"
        except ValueError:
            fail(f"--prompt_ids {args.prompt_ids!r}: give integers, comma-separated")
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
        fail(f"{source} is empty: give some text, or drop the flag to start after end-of-text")
    try:
        return codec.encode(text.encode().decode()), source
    except UnicodeError:
        fail(f"{source} is not valid UTF-8: give another text")


def check_prompt(prompt, source, config):
    """Refuse ids that the model does not have, and prompts longer than its block_size."""
    if outside := [i for i in prompt if not 0 <= i < config.vocab_size]:
        fail(f"{source} has id {outside[0]}, the model has {config.vocab_size} ids: give the --dataset that it trained on")
    if len(prompt) > config.block_size:
        fail(f"{source} has {len(prompt)} tokens, more than the model's block_size {config.block_size}: shorten it")


class Printer:
    """Prints a text as it grows. An incomplete UTF-8 character waits for the next token."""

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

    from kv_cache.generate import chooser, generate
    from kv_cache.own_attention import decoder, fastest, fastest_dtype
    from kv_cache.own_cache import KVCache
    from model import NO_CACHE
    from training import checkpoint

    saved = checkpoint.load(args.ckpt_path, hint="train it first, or give another --ckpt_path")
    model = checkpoint.build(saved, dropout=0.0).eval()
    model.merge_lora()
    checkpoint.move_to(model, args.device)
    codec = load_codec(args, saved["args"]["dataset"])
    prompt, source = read_prompt(args, codec)
    check_prompt(prompt, source, model.config)
    block_size = model.config.block_size
    steps = min(args.max_new_tokens, block_size - len(prompt) + 1)  # the last token is not fed back

    cache, way, dtype, positions = NO_CACHE, None, args.dtype, len(prompt) + steps - 1
    if dtype == "auto":
        dtype = told("dtype", *fastest_dtype(model, args.num_samples, positions, args.kv_dtype))
    model.to(getattr(torch, dtype))
    if args.kv_cache:
        way, kv_dtype = args.attend, args.kv_dtype or dtype
        if way == "auto":
            way = told("attend", *fastest(model, args.num_samples, positions, kv_dtype))
        model, cache = decoder(model, way), KVCache(model, args.num_samples, positions, kv_dtype)

    if steps < args.max_new_tokens:
        print(f"note: stops after {steps} tokens, because the model's block_size {block_size} is full then", file=sys.stderr)
    choose = chooser(args.temperature, args.top_k, args.top_p, torch.Generator(args.device).manual_seed(args.seed))
    end = codec.end_of_text if codec else None
    begin = [] if prompt == [end] else prompt
    idx = torch.tensor([prompt] * args.num_samples, device=args.device)
    start = time.perf_counter()
    texts, made = write_texts(generate(model, idx, steps, choose, end, cache), args.num_samples, begin, end, codec)
    seconds = time.perf_counter() - start
    finish(
        prompt_tokens=len(prompt),
        new_tokens=[len(text) - len(begin) for text in texts],
        seconds=round(seconds, 3),
        tokens_per_second=round(made * args.num_samples / seconds, 2),
        attend=way,
        cache_bytes=cache.bytes() if args.kv_cache else 0,
        cache_bytes_per_token=cache.bytes_per_token() if args.kv_cache else 0,
    )


def told(what, name, seconds):
    """Print the choice and the measured times. Returns the chosen name."""
    times = ", ".join(f"{name} {1000 * s:.2f}" for name, s in seconds.items())
    print(f"{what} {name}" + f", the fastest here (ms per token: {times})" * bool(seconds), file=sys.stderr)
    return name


def write_texts(steps, count, begin, end, codec):
    """Print the tokens of generate(): one text as it grows, several at the end. Returns (ids of each text, steps taken)."""
    texts, printer, made = [list(begin) for _ in range(count)], Printer(codec), 0
    for tokens in steps:
        made += 1
        for text, token in zip(texts, tokens.tolist()):
            if token != end:  # generate() repeats the end token after the end
                text.append(token)
        if count == 1:
            printer.show(texts[0])
    for text in texts:
        if count > 1:
            print("-" * 80)
            printer = Printer(codec)
        printer.show(text, last=True)
    return texts, made


if __name__ == "__main__":
    main()
