"""Loads the GPT of a nanoGPT checkout for comparison, and the GPT of ReaLLMASIC/nanoGPT, which reads our factor files."""

import importlib.util
import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

from common.cli import fail


def check_checkout(folder, flag):
    """folder: the value of the flag."""
    if not (Path(folder) / "model.py").is_file():
        fail(f"{flag} {folder} has no model.py: give the folder of a checkout")


def nanogpt(folder, config):
    """The checkout's GPT with random weights, at the shape of a dense GPTConfig of ours. folder: the value of --vs."""
    module, names = load_module(folder, "--vs"), ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
    try:
        shape = module.GPTConfig(**{name: getattr(config, name) for name in names}, dropout=config.dropout)
    except TypeError as error:  # its GPTConfig has other fields
        fail(f"--vs {folder}: its model.py is not nanoGPT's ({error}): give the folder of a checkout")
    with redirect_stdout(io.StringIO()):  # it prints its size
        return module.GPT(shape)


# Our module names -> those of ReaLLMASIC/nanoGPT.
REALLMASIC = {
    "ln_1": "pre_ln_attn", "ln_2": "pre_ln_mlp", "attn.q_proj": "attn.c_attn_q", "attn.k_proj": "attn.c_attn_k",
    "attn.v_proj": "attn.c_attn_v", "mlp.mlp_up": "mlp.c_fc", "mlp.mlp_down": "mlp.c_proj",
}  # fmt: skip
TABLE = ("transformer.wte.", "transformer.scale_up.", "transformer.scale_down.", "lm_head.")


def reallmasic(folder, ours, wte_npy, scale_npz, flag):
    """
    The GPT of a ReaLLMASIC/nanoGPT checkout. It imports the factor files itself; all other weights come from our GPT.

    ours: a model with a factorized table, learned positions and a sequential residual.
    """
    module, c = load_module(folder, flag), ours.config
    shape = {
        name: getattr(c, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_embd_wte", "bias")
    }
    shape |= dict(n_kv_group=c.n_head, mlp_expansion_factor=c.mlp_expansion_factor, n_embd_wte_scale_tying=False, dropout=0.0)
    shape |= dict(norm_variant_attn="layernorm", norm_variant_output="layernorm", activation_variant="gelu")
    files = dict(import_wte_npy=str(wte_npy), import_scale_matrices_npz=str(scale_npz))
    try:
        with redirect_stdout(io.StringIO()):  # it prints its size
            theirs = module.GPT(module.GPTConfig(**shape, **files)).eval()
        state = {renamed(name): p for name, p in ours.state_dict().items() if not name.startswith(TABLE)}
        unknown = theirs.load_state_dict(state, strict=False).unexpected_keys  # it also has settings of its own
    except (TypeError, AttributeError, RuntimeError) as error:  # it has other fields or other shapes
        fail(f"{flag} {folder}: its model.py is not that of ReaLLMASIC/nanoGPT ({first_line(error)}): give its checkout")
    if unknown:
        fail(f"{flag} {folder}: its model.py has no {unknown[0]}: check out another commit")
    return theirs


def first_line(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def renamed(name):
    """Rename a parameter: transformer.h.0.ln_1.weight -> transformer.h.0.pre_ln_attn.weight"""
    for ours, theirs in REALLMASIC.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def load_module(folder, flag):
    """Import the checkout's model.py, which may import files beside it. An error if it is not nanoGPT's."""
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "GPT") or not hasattr(module, "GPTConfig"):
            raise ImportError("it has no GPT and GPTConfig")
        return module
    except Exception as error:  # the file may raise any type
        fail(f"{flag} {folder}: its model.py is not nanoGPT's ({type(error).__name__}: {error}): give the folder of a checkout")
    finally:
        sys.path.pop(0)
