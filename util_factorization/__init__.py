"""
Low rank: the SVD of token tables and matrices, and the programs of experiments 1-13.

    spectrum, calibrate                  singular values and what a rank keeps; moments of a model, measured on text
    decompose_table, decompose_matrix    exact factors by every method, for every rank
    modules                              low-rank factors in place of a matrix, a table or a head
    pca_factorize_wte, merge_lora        programs: a table's factors on disk; adapters merged into their weights
    which_side, import_hf                programs: which use of a table a cut hurts; GPT-2 and Pythia become checkpoints

The methods stand below, so that --help need not import torch. To add one, add its line here and its cost in decompose_table.py
(or decompose_matrix.py).
"""

# Of a token table. counts: how often each token occurs; head: C of what the head reads; lookup: G of the loss's gradient at
# the looked-up row.
METHODS = dict(
    svd=(),
    centered=(),
    freq=("counts",),
    whiten=("counts", "head"),
    joint=("counts", "head"),
    fisher=("counts", "head", "lookup"),
)
MOMENTS = {"head", "lookup"}  # what has to be measured on calibration text
JOINT_LAMBDA = 0.3

# Of a matrix, y = W x. C: of its input; G: of the loss's gradient at its output. sequential is fisher, layer by layer.
MATRIX_METHODS = dict(pca=(), svd=(), whiten=("C",), fisher=("C", "G"), sequential=("C", "G"))


def reads_text(method):
    """Whether a method of a token table needs calibration text."""
    return not MOMENTS.isdisjoint(METHODS[method])


def check_needs(method, methods, **given):
    """Raises ValueError for a method that `methods` does not have, or where what it needs is None."""
    if method not in methods:
        raise ValueError(f"method {method!r} is none of {', '.join(methods)}")
    for name in methods[method]:
        if given[name] is None:
            raise ValueError(f"method {method} needs {name}")
