"""
Surgery: cut q, k and v of a real model, or its token table, to low rank, and measure what that costs.

    from surgery import load
    model, tokenizer = load("model_weights/smaller")  # written by `python -m surgery --out model_weights/smaller`

    flags, checks, __main__         what a user asks for; can the model do it; the program
    subject, texts                  the model; the texts for calibration, healing and evaluation
    moments                         second moments of layers and table on calibration text
    evaluator, predictor            loss and KL on fixed windows; any model behind one call
    rank_points, rank_cut           one choice of what is cut, and to which level; the cut
    rank_in_order, sweep            cuts layer after layer; many cuts, each with a line of results
    bits_model                      quantised matrices with one budget of bytes
    heal                            a short training towards the original model
    write                           write the smaller model, read it back, measure it
    rank_modules, rank_folder       low rank: the modules of the smaller model; their tensors on disk
    bits_folder, folder             quantised matrices and caches on disk; the folder of either kind, and load()
    eval, int8_cache                program: any model on any text; public name of kv_cache/hf_int8.py
    bytes_study, study_rows         program: methods at equal bytes; its rows
"""


def load(folder, device="cpu", packed=True):
    """
    Load a folder that `python -m surgery --out` wrote -> (Hugging Face model, tokenizer).

    packed: applies to quantised models (--bytes). False decodes the model on loading: faster, and as large as the original.
    """
    from surgery import folder as folder_of  # here, so that --help need not import torch

    return folder_of.load(folder, device, packed)
