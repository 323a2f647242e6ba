"""What an export starts from, read into one form."""

import sys
from dataclasses import dataclass

import torch

from common import checkpoint
from common.cli import fail
from export.card import facts_of_run, facts_of_smaller
from export.multiplied import multiplied
from export.standard import refuse_what_no_architecture_has, to_standard
from export.tokenizer import tokenizer_for


@dataclass
class Source:
    """
    hf         the model to write, of Hugging Face
    tokenizer  its tokenizer
    logits     ids (B, T) -> logits (B, T, V), of the model as it was
    facts      [(name, text or None)] for the card
    """

    hf: torch.nn.Module
    tokenizer: object
    logits: object
    facts: list


def read_own(args):
    """A checkpoint of train.py -> Source."""
    saved = checkpoint.load(args.model, hint="give a run folder, its ckpt.pt, or a folder that surgery's --out wrote")
    model = checkpoint.build(saved, dropout=0.0).float().eval().requires_grad_(False)
    refuse_what_no_architecture_has(model.config, f"--model {args.model}")
    if model.config.lora_rank is not None:
        print(f"{args.model} has adapters: they are merged into the weights", file=sys.stderr)
        model.merge_lora()
    tokenizer = tokenizer_for(args.tokenizer, saved["args"]["dataset"], model.config.vocab_size, args.model)
    hf, _ = to_standard(model, tokenizer.eos_token_id)
    return Source(hf, tokenizer, lambda ids: model(ids)[0], facts_of_run(args.model))


def read_smaller(args):
    """A folder that surgery's --out wrote -> Source."""
    from surgery import load

    if args.tokenizer:
        fail(f"--tokenizer: {args.model} has its own: drop the flag")
    small, tokenizer = load(args.model, packed=False)
    plan = small.config.surgery
    if plan.get("cache") and args.dense:
        fail(f"--dense: no standard architecture keeps a cache by bits, which {args.model} has: write it without --cache_bytes")
    hf = small if "coded" in plan else multiplied(small, plan)
    return Source(hf, tokenizer, lambda ids: small(ids).logits, facts_of_smaller(args.model))
