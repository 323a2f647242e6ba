"""
Checkpoints: plain dicts that load with weights_only=True and rebuild their model alone.

ckpt.pt, the best by validation loss, has model, config, args, iter_num, data_step, tokens, starts_from and val_loss; last.pt
has the optimizer's and the random numbers' states besides, which a resume needs.
"""

import os
from dataclasses import asdict
from pathlib import Path

import torch

from cli import fail
from model import GPT, GPTConfig


def save(path, model, **rest):
    """Write a checkpoint; a crash while writing leaves the old file whole."""
    path = Path(path)
    part = path.with_suffix(".part")
    torch.save(dict(model=model.state_dict(), config=asdict(model.config), **rest), part)
    os.replace(part, path)


def load(path, mend="train the baseline first (bash scripts/train_baseline_gpt2.sh)"):
    """A file, or a run folder that holds ckpt.pt -> the checkpoint's dict. mend: what to do where there is none."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        fail(f"Checkpoint not found: {path}: {mend}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        lacking = {"model", "config", "args", "iter_num", "data_step", "tokens"} - checkpoint.keys()
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        GPTConfig(**checkpoint["config"])
    except Exception as error:  # torch raises many types for a file that is none of its own
        why = error if isinstance(error, ValueError) else type(error).__name__
        fail(f"{path} is not a checkpoint of this project ({why}): give a ckpt.pt of train.py")
    return checkpoint


def build(checkpoint, **changes):
    """The model of a checkpoint, with all of its weights. changes: fields of its config, e.g. dropout."""
    model = GPT(GPTConfig(**checkpoint["config"] | changes))
    model.load_state_dict(checkpoint["model"])
    return model


# What a previous run's weights fix; the table's rank and the dropout are the new run's own.
SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "mlp_expansion_factor", "activation", "bias")


def previous_shape(checkpoint, args, given):
    """The shape of a previous run's model as flags of the new run; a given flag that differs is refused."""
    config = checkpoint["config"]
    for name in SHAPE:
        if name in given and given[name] != config[name]:
            fail(f"--{name} {given[name]}: --prev_run_ckpt {args.prev_run_ckpt} has {config[name]}, leave the flag out")
    shape = {name: config[name] for name in SHAPE}
    if not args.import_wte_npy:
        for name in ("n_embd_wte", "n_embd_wte_scale_tying"):
            if name in given and given[name] != config[name]:
                fail(
                    f"--{name} {given[name]}: --prev_run_ckpt {args.prev_run_ckpt} has {config[name]}; to factorize its "
                    "table give --import_wte_npy and --import_scale_matrices_npz"
                )
            shape[name] = config[name]
    elif args.n_embd_wte > config["n_embd"]:
        fail(f"--n_embd_wte {args.n_embd_wte} is above the n_embd {config['n_embd']} of --prev_run_ckpt {args.prev_run_ckpt}")
    return shape


TABLE = ("transformer.wte.", "transformer.scale_up.", "transformer.scale_down.", "lm_head.")


def load_previous(model, checkpoint, path, keep_table):
    """
    Copy a previous run's weights into the model; keep_table: the token table too. A weight left out on either side is
    an error, since it would stay random in silence.
    """
    state = {k: v for k, v in checkpoint["model"].items() if keep_table or not k.startswith(TABLE)}
    wanted = {k for k in model.state_dict() if keep_table or not k.startswith(TABLE)}
    if differing := sorted(wanted ^ state.keys()):
        fail(f"{path} and the new model differ in {len(differing)} weights, first {differing[0]}: is it another model's?")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        fail(f"{path} does not fit the new model ({' '.join(str(error).split())[:160]}): is it another model's?")
