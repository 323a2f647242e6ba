"""Reads the source of an export, a run or a folder of surgery, into one form."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common.cli import fail
from export.card import facts_of_run, facts_of_smaller
from export.compact import made_compact
from export.multiplied import multiplied
from export.standard import refuse_what_no_architecture_has, to_standard
from export.tokenizer import tokenizer_for
from training import checkpoint


@dataclass
class Source:
    """
    hf         the model to write, a Hugging Face model
    plan       its smaller parts (low_rank_modules.py), or None if it is dense
    tokenizer  its tokenizer
    logits     ids (B, T) -> logits (B, T, V), of the source model
    facts      [(name, text or None)] for the card
    """

    hf: torch.nn.Module
    plan: dict | None
    tokenizer: object
    logits: object
    facts: list


def read_own(args):
    """Read a checkpoint of train.py -> Source."""
    if (Path(args.model) / "config.json").is_file() and not checkpoint.file_of(args.model).is_file():
        fail(f"--model {args.model} is a folder of Hugging Face already: give a run folder, or one that surgery's --out wrote")
    saved = checkpoint.load(args.model, hint="give a run folder, its ckpt.pt, or a folder that surgery's --out wrote")
    model = checkpoint.build(saved, dropout=0.0).float().eval().requires_grad_(False)
    refuse_what_no_architecture_has(model.config, f"--model {args.model}")
    if args.compact:
        refuse_what_is_not_smaller(model.config, args.model)
    if model.config.lora_rank is not None:
        print(f"{args.model} has adapters; the export merges them into the weights", file=sys.stderr)
        model.merge_lora()
    tokenizer = tokenizer_for(args.tokenizer, saved["args"]["dataset"], model.config.vocab_size, args.model)
    tokenizer.model_max_length = model.config.block_size
    hf, cuts = to_standard(model, tokenizer.eos_token_id)
    plan = made_compact(hf, model, cuts) if args.compact else None
    return Source(hf, plan, tokenizer, lambda ids: model(ids)[0], facts_of_run(args.model, saved))


def refuse_what_is_not_smaller(config, name):
    if config.k_proj_dim is None and config.v_proj_dim is None and config.n_embd_wte is None:
        fail(f"--compact: nothing of {name} is smaller than in its standard architecture: give --dense")


def read_smaller(args):
    """Read a folder that surgery's --out wrote -> Source."""
    from surgery import load

    if args.tokenizer:
        fail(f"--tokenizer: {args.model} has its own: drop the flag")
    small, tokenizer = load(args.model, packed=args.compact)
    plan = small.config.surgery
    if plan.get("cache") and args.dense:
        fail(f"--dense: {args.model} has a quantized cache, which no standard architecture has: write it without --cache_bytes")
    if args.compact:
        return Source(small, plan, tokenizer, lambda ids: small(ids).logits, facts_of_smaller(args.model))
    hf = small if "coded" in plan else multiplied(small, plan)
    return Source(hf, None, tokenizer, lambda ids: small(ids).logits, facts_of_smaller(args.model))
