"""
Checkpoints: plain dicts that load with weights_only=True. The model can be rebuilt from its checkpoint alone.

ckpt.pt is the best model by validation loss. It has model, config, args, iter_num, data_step, tokens, starts_from, val_loss.
last.pt also has the states of the optimizer and of the random numbers, which a resume needs.

A checkpoint may come from a stranger. So we check its config, and compare the weights in the file with the model that the
config describes, before we allocate memory for a model.
"""

import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from common.cli import LARGE, fail
from common.files import written_whole
from common.modules import check_filled, fresh_memory_is_nan
from common.untrusted import COUNT, WHOLE, check_plain, expect, expect_fields, load_tensors, reading
from model import ACTIVATIONS, BLOCKS, GPT, GPTConfig
from training.rules import check_model


def save(path, model, hint="make room, then resume the run", previous=None, **rest):
    """
    Write a checkpoint completely or not at all.

    previous: new name for a file that is already at `path`. rest: other entries of the dict.
    """
    with written_whole(path, hint, previous=previous) as part:
        torch.save(dict(model=model.state_dict(), config=asdict(model.config), **rest), part)


def is_whole(path):
    """Whether a checkpoint file is undamaged: its checksums match. torch.load does not check them."""
    try:
        check_plain(path)
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # a damaged archive can raise nearly anything
        return False


def save_new(out, model, **facts):
    """Write a checkpoint to the --out of a program."""
    save(out, model, hint="give another --out", **facts)


def is_adapter(name):
    return ".lora." in name


# Entries of a checkpoint that are read. ARGS: entries of `args` that programs other than a resume read.
ARGS = {"dataset": str, "eval_iters?": WHOLE, "batch_size?": WHOLE, str: object}
STARTS_FROM = dict(part=str, ckpt=str, tokens=(COUNT, None))  # which weights were already trained
ENTRIES = {
    "model": {str: torch.Tensor}, "config": dict, "args": ARGS, "iter_num": COUNT, "data_step": COUNT, "tokens": (COUNT, None),
    "starts_from?": (STARTS_FROM, None), "val_loss?": (float, None),
}  # fmt: skip


def load(path, hint="train the baseline first (bash scripts/train_baseline_gpt2.sh)"):
    """Load a checkpoint dict from a file, or from ckpt.pt in a run folder. hint: advice if there is no file."""
    path = file_of(path)
    if not path.is_file():
        fail(f"Checkpoint not found: {path}: {hint}")
    with reading(path, "a checkpoint of this project", "give a ckpt.pt of train.py"):
        checkpoint = load_tensors(path)
        expect(checkpoint, ENTRIES)
        if "base" in checkpoint:
            raise ValueError("it holds only adapters, written by --save_adapters_only of older versions")
        check_weights(checkpoint["model"], checked_config(checkpoint["config"]), path.stat().st_size)
    return checkpoint


def file_of(path):
    """The path of a checkpoint file. For a run folder: its ckpt.pt."""
    path = Path(path)
    return path / "ckpt.pt" if path.is_dir() else path


def checked_config(values):
    """GPTConfig of a file's dict. Raises ValueError for names, types, numbers or combinations that train.py refuses."""
    expect_fields(values, GPTConfig)
    config = GPTConfig(**values)
    for f in fields(GPTConfig):
        value = getattr(config, f.name)
        if f.type in (int, int | None):
            allowed = value is None or value in WHOLE
        else:
            allowed = f.type is not float or 0 <= value <= (LARGE if f.name == "lora_alpha" else 1)
        if not allowed:
            raise ValueError(f"{f.name} is {value}")
    choices = dict(activation=ACTIVATIONS, factor_init=("matched", "naive"))
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)[:40]}")
    if (config.parallel_residual, config.norms_per_layer) not in BLOCKS:
        raise ValueError(f"norms_per_layer is {config.norms_per_layer}")
    check_model(config, refuse)
    return config


def refuse(message):
    """Raise ValueError for a mistake that check_model() finds in a file. Its message names flags; a file has none."""
    raise ValueError(message.split(":")[0].replace("--", ""))


def blueprint(config, state, size):
    """
    The model of a config, without memory for its numbers. Raises ValueError if it has more layers than the state has weights,
    or if it needs more than twice the bytes of its files (size): a config alone could ask for any amount.
    """
    if config.n_layer > len(state):
        raise ValueError(f"n_layer is {config.n_layer}, it has {len(state)} weights")
    with torch.device("meta"):
        model = GPT(config)
    wanted = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    if wanted > 2 * size:
        raise ValueError(f"its config wants {wanted:,} bytes, it has {size:,}")
    return model


def check_weights(state, config, size):
    """Raise ValueError if a state does not fit the model of a config, or has a number that is not finite."""
    wanted = blueprint(config, state, size).state_dict()
    if differing := sorted(wanted.keys() ^ state.keys()):
        raise ValueError(f"it {'lacks' if differing[0] in wanted else 'has'} {differing[0][:80]}")
    for name, tensor in state.items():
        check_tensor(name, tensor, wanted[name].shape)


def check_tensor(name, tensor, shape):
    """Raise ValueError if a tensor is not a contiguous tensor of finite floats in this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name[:80]} has shape {list(tensor.shape)}, its config wants {list(shape)}")
    if not tensor.is_floating_point() or tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"{name[:80]} is not a plain tensor of floats")
    if not tensor.isfinite().all():
        raise ValueError(f"{name[:80]} has numbers that are not finite")


def start_from(model, previous, path, factors=None):
    """Copy a previous run's weights into a model. If factors are given, they replace the token table. path: for messages."""
    load_previous(model, previous, path, keep_table=factors is None)
    if factors:
        model.import_factors(**factors)
    return model


def build(checkpoint, **changes):
    """Build the model of a checkpoint, with its weights. changes: config fields to override, e.g. dropout."""
    with fresh_memory_is_nan():
        model = GPT(GPTConfig(**checkpoint["config"] | changes))
        model.load_state_dict(checkpoint["model"])
    check_filled(model, "the checkpoint")
    return model


def move_to(model, device):
    """Move a model to a device. If there is no such device, end with a one-line message."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        fail(f"--device {device} cannot be used here ({str(error).splitlines()[0][:80]}): give --device cpu")


# If a new run starts from a previous run's weights, its flags choose these fields. The weights determine all others.
OF_THE_NEW_RUN = {
    "vocab_size", "dropout", "factor_init", "n_embd_wte", "n_embd_wte_scale_tying", "n_embd_wte_mean", "v_proj_dim",
    "k_proj_dim", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets",
}  # fmt: skip
SHAPE = [f.name for f in fields(GPTConfig) if f.name not in OF_THE_NEW_RUN]


def previous_shape(checkpoint, args, given):
    """The shape of a previous run's model, as flags of the new run. Refuses a flag on the command line that differs."""
    config, ckpt = asdict(GPTConfig(**checkpoint["config"])), f"--prev_run_ckpt {args.prev_run_ckpt}"
    if config["lora_rank"] is not None:
        fail(f"{ckpt} has adapters: merge them first (util_factorization/merge_lora.py)")
    if config["rotary_pct"] and ("block_size" in given or args.block_size != type(args).block_size):
        config["block_size"] = args.block_size  # rotated positions are computed, so a new run may choose its length
    kept = list(SHAPE)
    for name in ("v_proj_dim", "k_proj_dim"):
        if config[name] is not None:
            kept.append(name)
        elif getattr(args, name) is not None and args.lora_rank is not None:  # a new part among frozen weights
            fail(f"--{name} {getattr(args, name)} with --lora_rank would stay random: train it without adapters first")
    for name in kept:
        if name in given and given[name] != config[name]:
            fail(f"--{name} {given[name]}: {ckpt} has {config[name]}, drop the flag")
    table = ["n_embd_wte", "n_embd_wte_scale_tying"]
    if args.import_wte_npy:
        if args.n_embd_wte > config["n_embd"]:
            fail(f"--n_embd_wte {args.n_embd_wte} is above the n_embd {config['n_embd']} of {ckpt}: lower it")
        table = []
    for name in table:
        if name in given and given[name] != config[name]:
            fail(
                f"--{name} {given[name]}: {ckpt} has {config[name]}; to factorize its table give --import_wte_npy and "
                "--import_scale_matrices_npz"
            )
    return {name: config[name] for name in kept + table}


TABLE = ("transformer.wte.", "transformer.scale_up.", "transformer.scale_down.", "lm_head.")


def load_previous(model, checkpoint, path, keep_table):
    """
    Copy a previous run's weights into the model. keep_table: also copy the token table.

    A weight that only one of the two has is an error: it would stay random without notice. New adapters and a new compression
    of keys or values may stay random.
    """
    state = {k: v for k, v in checkpoint["model"].items() if keep_table or not k.startswith(TABLE)}
    before = GPTConfig(**checkpoint["config"])
    fresh = [kind for kind in "kv" if getattr(before, f"{kind}_proj_dim") is None]
    fresh = [f"{kind}_{part}" for kind in fresh for part in ("compress", "restore")]
    wanted = {k for k in model.state_dict() if not is_adapter(k) and (keep_table or not k.startswith(TABLE))}
    wanted = {k for k in wanted if k.split(".")[-2] not in fresh}
    if differing := sorted(wanted ^ state.keys()):
        fail(f"{path} and the new model differ in {len(differing)} weights, first {differing[0]}: give one of the same model")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        fail(f"{path} does not fit the new model ({' '.join(str(error).split())[:160]}): give one of the same model")
