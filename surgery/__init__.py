"""
Surgery: q, k and v of a real model, or its token table, replaced by low-rank versions of themselves, and what that costs.

    from surgery import load
    model, tokenizer = load("model_weights/smaller")  # what `python -m surgery --out model_weights/smaller` wrote
"""

from common.cli import fail
from common.versions import check_transformers

check_transformers(fail)  # before any module of surgery imports it


def load(folder, device="cpu", packed=True):
    """
    A folder that `python -m surgery --out` wrote -> (Hugging Face model, tokenizer).

    packed: of a model kept by bits (--bytes). False decodes it at once: faster, and as large as the untouched model.
    """
    from surgery import reading  # here, so that --help need not import torch

    return reading.load(folder, device, packed)
