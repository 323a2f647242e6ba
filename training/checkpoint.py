"""
Checkpoints: plain dicts that load with weights_only=True and rebuild their model alone.

ckpt.pt, the best by validation loss, has model, config, args, iter_num, data_step, tokens, starts_from and val_loss; last.pt
has the optimizer's and the random numbers' states besides, which a resume needs.

A checkpoint may come from a stranger. Its config is checked, and the model that it describes is compared with the weights in
the file, before any memory is taken for a model.
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
    Write a checkpoint, whole or not at all.

    previous: the name that the file there keeps. rest: other entries.
    """
    with written_whole(path, hint, previous=previous) as part:
        torch.save(dict(model=model.state_dict(), config=asdict(model.config), **rest), part)


def is_whole(path):
    """Whether a checkpoint's file is as it was written: its checksums hold. torch.load does not look at them."""
    try:
        check_plain(path)
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # a damaged archive can raise nearly anything
        return False


def save_new(out, model, **facts):
    """Write the --out of a program."""
    save(out, model, hint="give another --out", **facts)


def is_adapter(name):
    return ".lora." in name


# What is read of a file; of its flags, args, by others than a resume.
ARGS = {"dataset": str, "eval_iters?": WHOLE, "batch_size?": WHOLE, str: object}
STARTS_FROM = dict(part=str, ckpt=str, tokens=(COUNT, None))  # which weights were trained already
ENTRIES = {
    "model": {str: torch.Tensor}, "config": dict, "args": ARGS, "iter_num": COUNT, "data_step": COUNT, "tokens": (COUNT, None),
    "starts_from?": (STARTS_FROM, None), "val_loss?": (float, None),
}  # fmt: skip


def load(path, hint="train the baseline first (bash scripts/train_baseline_gpt2.sh)"):
    """A file, or a run folder that holds ckpt.pt -> the checkpoint's dict. hint: what to do if there is no file."""
    path = file_of(path)
    if not path.is_file():
        fail(f"Checkpoint not found: {path}: {hint}")
    with reading(path, "a checkpoint of this project", "give a ckpt.pt of train.py"):
        checkpoint = load_tensors(path)
        expect(checkpoint, ENTRIES)
        if "base" in checkpoint:
            raise ValueError("it holds adapters alone, by --save_adapters_only, which only older versions have")
        check_weights(checkpoint["model"], checked_config(checkpoint["config"]), path.stat().st_size)
    return checkpoint


def file_of(path):
    """A checkpoint's file, or that of a run folder."""
    path = Path(path)
    return path / "ckpt.pt" if path.is_dir() else path


def checked_config(values):
    """GPTConfig of a dict from a file. Raises ValueError for a name, type, number or combination that train.py refuses."""
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
    """A mistake in flags, as check_model() words it, found in a file."""
    raise ValueError(message.split(":")[0].replace("--", ""))


def blueprint(config, state, size):
    """
    The model of a config without memory for its numbers. Raises ValueError where it has more layers than the state has weights,
    or would take more than twice the bytes of its files: a config alone could ask for any amount.
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
    """Raise ValueError where a state does not fit the model of a config, or has a number that is not finite."""
    wanted = blueprint(config, state, size).state_dict()
    if differing := sorted(wanted.keys() ^ state.keys()):
        raise ValueError(f"it {'lacks' if differing[0] in wanted else 'has'} {differing[0][:80]}")
    for name, tensor in state.items():
        check_tensor(name, tensor, wanted[name].shape)


def check_tensor(name, tensor, shape):
    """Raise ValueError where a tensor is not of finite floats in this shape, one after the other in memory."""
    if tensor.shape != shape:
        raise ValueError(f"{name[:80]} has shape {list(tensor.shape)}, its config wants {list(shape)}")
    if not tensor.is_floating_point() or tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"{name[:80]} is no plain tensor of floats")
    if not tensor.isfinite().all():
        raise ValueError(f"{name[:80]} has numbers that are not finite")


def start_from(model, previous, path, factors=None):
    """Fill a model with a previous run's weights; given factors replace the table's. path: for messages."""
    load_previous(model, previous, path, keep_table=factors is None)
    if factors:
        model.import_factors(**factors)
    return model


def build(checkpoint, **changes):
    """The model of a checkpoint, with all of its weights. changes: fields of its config, e.g. dropout."""
    with fresh_memory_is_nan():
        model = GPT(GPTConfig(**checkpoint["config"] | changes))
        model.load_state_dict(checkpoint["model"])
    check_filled(model, "the checkpoint")
    return model


def move_to(model, device):
    """Move a model to a device, or end in one line where there is no such device."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch without it
        fail(f"--device {device} cannot be used here ({str(error).splitlines()[0][:80]}): give --device cpu")


# A new run that starts from a previous run's weights chooses these fields itself. The weights fix all others.
OF_THE_NEW_RUN = {
    "vocab_size", "dropout", "factor_init", "n_embd_wte", "n_embd_wte_scale_tying", "n_embd_wte_mean", "v_proj_dim",
    "k_proj_dim", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets",
}  # fmt: skip
SHAPE = [f.name for f in fields(GPTConfig) if f.name not in OF_THE_NEW_RUN]


def previous_shape(checkpoint, args, given):
    """The shape of a previous run's model as flags of the new run; a given flag that differs is refused."""
    config, ckpt = asdict(GPTConfig(**checkpoint["config"])), f"--prev_run_ckpt {args.prev_run_ckpt}"
    if config["lora_rank"] is not None:
        fail(f"{ckpt} has adapters: merge them first (util_factorization/merge_lora.py)")
    if config["rotary_pct"] and ("block_size" in given or args.block_size != type(args).block_size):
        config["block_size"] = args.block_size  # rotated positions are computed: a new run may have a length of its own
    kept = list(SHAPE)
    for name in ("v_proj_dim", "k_proj_dim"):
        if config[name] is not None:
            kept.append(name)
        elif getattr(args, name) is not None and args.lora_rank is not None:  # a new part beside frozen weights
            fail(f"--{name} {getattr(args, name)} beside --lora_rank would stay random: train it without adapters first")
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
    Copy a previous run's weights into the model; keep_table: the token table too.

    A weight that only one side has is an error, since it would stay random in silence. New adapters may stay random, and so
    may the new compression of keys or values.
    """
    state = {k: v for k, v in checkpoint["model"].items() if keep_table or not k.startswith(TABLE)}
    before = GPTConfig(**checkpoint["config"])
    fresh = [kind for kind in "kv" if getattr(before, f"{kind}_proj_dim") is None]
    fresh = [f"{kind}_{part}" for kind in fresh for part in ("compress", "restore")]
    wanted = {k for k in model.state_dict() if not is_adapter(k) and (keep_table or not k.startswith(TABLE))}
    wanted = {k for k in wanted if k.split(".")[-2] not in fresh}
    if differing := sorted(wanted ^ state.keys()):
        fail(f"{path} and the new model differ in {len(differing)} weights, first {differing[0]}: is it another model's?")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        fail(f"{path} does not fit the new model ({' '.join(str(error).split())[:160]}): is it another model's?")
