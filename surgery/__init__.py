"""
Surgery: q, k and v of a real model, or its token table, replaced by low-rank versions of themselves, and what that costs.

    from surgery import load
    model, tokenizer = load("model_weights/smaller")  # what `python -m surgery --out model_weights/smaller` wrote
"""


def load(folder, device="cpu"):
    """A folder that `python -m surgery --out` wrote -> (Hugging Face model, tokenizer)."""
    from surgery import low_rank_folder  # here, so that --help need not import torch

    return low_rank_folder.load(folder, device)
