"""
Checkpoints: plain dicts that load with weights_only=True and rebuild their model alone.

ckpt.pt, the best by validation loss, has model, config, args, iter_num, data_step, tokens, starts_from and val_loss; last.pt
has the optimizer's and the random numbers' states besides, which a resume needs. With --save_adapters_only, model holds the
adapters alone, and base the files that the frozen weights come from and their hash.
"""

import hashlib
import zipfile
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import torch

from common.cli import fail
from common.factor_files import read_factors
from common.files import written_whole
from model import GPT, GPTConfig

# The flags that name the files of a frozen base.
BASE_FILES = ("prev_run_ckpt", "import_wte_npy", "import_scale_matrices_npz")


def save(path, model, base=None, hint="make room, then resume the run", previous=None, **rest):
    """
    Write a checkpoint, whole or not at all.

    base: see base_of(); with it, adapters alone are saved. previous: the name that the file there keeps. rest: other entries.
    """
    state = model.state_dict()
    if base is not None:
        state = {name: tensor for name, tensor in state.items() if is_adapter(name)}
        rest = dict(base=base, **rest)
    with written_whole(path, hint, previous=previous) as part:
        torch.save(dict(model=state, config=asdict(model.config), **rest), part)


def is_whole(path):
    """Whether a checkpoint's file is as it was written: its checksums hold. torch.load does not look at them."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # a damaged archive can raise nearly anything
        return False


def save_new(out, model, **facts):
    """Write the --out of a program."""
    save(out, model, hint="give another --out", **facts)


def is_adapter(name):
    return ".lora." in name


def base_of(model, args):
    """The files that the frozen weights come from, and the SHA-256 by which they are recognised."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not is_adapter(name):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    files = {name: getattr(args, name) for name in BASE_FILES}
    return {name: file and str(Path(file).resolve()) for name, file in files.items()} | dict(sha256=digest.hexdigest())


def load(path, hint="train the baseline first (bash scripts/train_baseline_gpt2.sh)", **base_files):
    """
    A file, or a run folder that holds ckpt.pt -> the checkpoint's dict. Adapters that were saved alone get their base.

    hint: what the error tells to do where there is no file. base_files: where files of the base lie now, by name (BASE_FILES).
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        fail(f"Checkpoint not found: {path}: {hint}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        lacking = {"model", "config", "args", "iter_num", "data_step", "tokens"} - checkpoint.keys()
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        GPTConfig(**checkpoint["config"])
    except Exception as error:  # torch raises many types for a file that it cannot read
        why = error if isinstance(error, ValueError) else type(error).__name__
        fail(f"{path} is not a checkpoint of this project ({why}): give a ckpt.pt of train.py")
    if "base" in checkpoint:
        checkpoint["model"] |= read_base(path, checkpoint["base"] | base_files, plain_config(checkpoint)).state_dict()
    return checkpoint


def plain_config(checkpoint):
    return GPTConfig(**checkpoint["config"] | dict(lora_rank=None))


def read_base(path, base, config):
    """The model that the adapters in `path` belong to; an error where its files have changed."""
    previous = load(base["prev_run_ckpt"], hint=f"{path} holds adapters of it; say with --prev_run_ckpt where it lies now")
    factors = None
    if base["import_wte_npy"]:
        shape = (config.vocab_size, config.n_embd_wte, config.n_embd)
        files = (base["import_wte_npy"], base["import_scale_matrices_npz"])
        factors = read_factors(*files, *shape, tied=config.n_embd_wte_scale_tying)
    model = start_from(GPT(config), previous, base["prev_run_ckpt"], factors)
    if base_of(model, SimpleNamespace(**base))["sha256"] != base["sha256"]:
        files = ", ".join(base[name] for name in BASE_FILES if base[name])
        fail(f"{path} holds adapters of another base than {files} (the hashes differ): give the files that it was trained with")
    return model


def start_from(model, previous, path, factors=None):
    """Fill a model with a previous run's weights; given factors replace the table's. path: for messages."""
    load_previous(model, previous, path, keep_table=factors is None)
    if factors:
        model.import_factors(**factors)
    return model


def build(checkpoint, **changes):
    """The model of a checkpoint, with all of its weights. changes: fields of its config, e.g. dropout."""
    model = GPT(GPTConfig(**checkpoint["config"] | changes))
    model.load_state_dict(checkpoint["model"])
    return model


def move_to(model, device, dtype=None):
    """Move a model to a device, or end in one line where there is no such device."""
    try:
        return model.to(device, dtype)
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
