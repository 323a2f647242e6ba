"""
Surgery: q, k and v of a real model, or its token table, replaced by low-rank versions of themselves, and what that costs.

    from surgery import load
    model, tokenizer = load("model_weights/smaller")  # what `python -m surgery --out model_weights/smaller` wrote

    points, checks                   what is cut and to which level; flags held against the model
    subject, texts                   the model; what it is calibrated, healed and measured on
    moments, linears                 second moments of layers and table; the linear layers and what their errors cost
    evaluator, predictor             loss and KL on fixed windows; any model behind one call
    surgeon, allocate, sweep         one cut; ranks by layer; many cuts, a line of results for each
    heal                             a short training towards the original model
    low_rank_modules, write_model    low rank: the smaller model; written, read back, measured
    low_rank_folder, coded_folder    the two kinds of folders on disk
    model_folder, reading            what both kinds share; load()
    coded, in_order, heal_coded      by bits: one budget for all matrices; in order; healing
    pack_model                       --bytes: from the model to the packed folder
    bytes_study, bytes_rows          programs: at equal bytes; its rows of matrices
    bytes_cache, decoding_speed      its rows of caches; tokens a second through each cache
    eval, int8_cache                 program: any model on any text; the documented name of kv_cache/hf_int8.py
    __main__                         the program
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
