"""
Low-rank factors of token tables and matrices by SVD, and the programs of experiments 1-13.

    spectrum, calibrate                  singular values and what a rank keeps; second moments of a model, measured on text
    decompose_table, decompose_matrix    exact factors by every method, for every rank
    modules                              low-rank factors in place of a matrix, a table or a head
    pca_factorize_wte, merge_lora        programs: write a table's factors to disk; merge adapters into their weights
    which_side, import_hf                programs: does a cut hurt lookup or head; turn GPT-2 or Pythia into a checkpoint

The methods are listed below, so --help does not import torch. To add a method, add its line here and its cost in
decompose_table.py or decompose_matrix.py.
"""

# Methods for a token table, and the inputs each needs. counts: how often each token occurs; head: C, the second moment of the
# head's input; lookup: G, the second moment of the loss's gradient at the looked-up row.
METHODS = dict(
    svd=(),
    centered=(),
    freq=("counts",),
    whiten=("counts", "head"),
    joint=("counts", "head"),
    fisher=("counts", "head", "lookup"),
)
MOMENTS = {"head", "lookup"}  # inputs that are measured on calibration text
JOINT_LAMBDA = 0.3

# Methods for a matrix, y = W x. C: second moment of its input; G: of the loss's gradient at its output. sequential is fisher,
# layer by layer.
MATRIX_METHODS = dict(pca=(), svd=(), whiten=("C",), fisher=("C", "G"), sequential=("C", "G"))


def reads_text(method):
    """Whether a method of a token table needs calibration text."""
    return not MOMENTS.isdisjoint(METHODS[method])


def check_needs(method, methods, **given):
    """Raise ValueError if `methods` lacks the method, or if an input that the method needs is None."""
    if method not in methods:
        raise ValueError(f"method {method!r} is none of {', '.join(methods)}")
    for name in methods[method]:
        if given[name] is None:
            raise ValueError(f"method {method} needs {name}")
