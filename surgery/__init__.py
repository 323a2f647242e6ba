"""
Surgery: cut q, k and v of a real model, or its token table, to low rank, and measure what that costs.

    from surgery import load
    model, tokenizer = load("model_weights/smaller")  # written by `python -m surgery --out model_weights/smaller`

    points, checks                   what is cut and to which level; checks of the flags against the model
    subject, texts                   the model; the texts for calibration, healing and evaluation
    moments, linears                 second moments of layers and table; the cost of errors in linear layers
    evaluator, predictor             loss and KL on fixed windows; any model behind one call
    surgeon, allocate, sweep         one cut; ranks by layer; many cuts, each with a line of results
    heal                             a short training towards the original model
    low_rank_modules, write_model    low rank: the modules of the smaller model; writes and measures it
    low_rank_folder, coded_folder    the two kinds of folders on disk
    model_folder, reading            the common parts of both kinds; load()
    coded, in_order, heal_coded      quantised matrices with one budget; cuts layer after layer; healing
    pack_model                       --bytes: from the model to the packed folder
    bytes_study, bytes_rows          program: methods at equal bytes; its rows for matrices
    bytes_cache, decoding_speed      its rows for caches; tokens per second with each cache
    eval, int8_cache                 program: any model on any text; public name of kv_cache/hf_int8.py
    __main__                         the program
"""


def load(folder, device="cpu", packed=True):
    """
    Load a folder that `python -m surgery --out` wrote -> (Hugging Face model, tokenizer).

    packed: applies to quantised models (--bytes). False decodes the model on loading: faster, and as large as the original.
    """
    from surgery import reading  # here, so that --help need not import torch

    return reading.load(folder, device, packed)
