"""Which flags of train.py contradict each other, and which may change in a resume. Imports no torch, for train_args.py."""

import difflib
import re
import sys

from common.cli import check_ranges, fail

# Every matrix of a factorized GPT that can have an adapter. A GPT with a dense table has no scale_up and scale_down.
LORA_TARGETS = ("wte", "scale_up", "scale_down", "q_proj", "k_proj", "v_proj", "c_proj", "mlp_up", "mlp_down")


def check(a):
    """Refuse flags that contradict each other. One line names both and says what to change."""
    check_device(a.device)
    if a.init_from != "prev_run":  # with prev_run the checkpoint determines the shape
        check_shape(a)
    check_table(a)
    if (a.init_from == "prev_run") != bool(a.prev_run_ckpt):
        fail(f"--init_from {a.init_from} and --prev_run_ckpt {a.prev_run_ckpt or '(none)'}: give both, or neither")
    if a.max_epochs is None:  # else the number of steps depends on the text
        check_schedule(a)
        if a.max_train_samples is not None:
            fail(f"--max_train_samples {a.max_train_samples} needs --max_epochs: give both, or drop it")
    if a.objective == "v_recon" and a.v_recon_weight:
        fail(f"--v_recon_weight {a.v_recon_weight} has no effect with --objective v_recon: drop it")
    if a.objective == "v_recon" and not a.train_only:
        fail("--objective v_recon would shrink the values to nothing: give --train_only v_compress,v_restore too")
    if a.lora_rank is not None:
        check_lora(a)
    if a.dtype == "float16" and not a.device.startswith("cuda"):
        fail(f"--dtype float16 needs a CUDA device, and --device is {a.device}: give --dtype float32 or bfloat16")


def check_device(device):
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        fail(f"--device {device}: give cuda, cuda:1, cpu or mps")


def check_table(a):
    """Refuse contradictions in the flags of the factorized token table."""
    if a.n_embd_wte_scale_tying and a.n_embd_wte is None:
        fail("--n_embd_wte_scale_tying needs scale matrices: give --n_embd_wte too")
    if a.factor_init == "naive" and (a.n_embd_wte is None or a.import_wte_npy):
        fail("--factor_init naive needs random factors: give --n_embd_wte, and drop --import_wte_npy")
    if bool(a.import_wte_npy) != bool(a.import_scale_matrices_npz):
        given, missing = ("wte_npy", "scale_matrices_npz") if a.import_wte_npy else ("scale_matrices_npz", "wte_npy")
        fail(f"--import_{given} without --import_{missing} would leave the other factor random: give both files")
    if a.import_wte_npy and a.n_embd_wte is None:
        fail("--import_wte_npy needs the rank of the imported factors: give --n_embd_wte too")
    for name in ("import_wte_freeze", "import_scale_matrices_freeze"):
        if getattr(a, name) and not a.import_wte_npy:
            fail(f"--{name} has nothing to freeze: give --import_wte_npy and --import_scale_matrices_npz too")


def check_shape(a):
    """Refuse contradictions in the flags of the model's shape."""
    check_model(a)
    if (a.objective == "v_recon" or a.v_recon_weight) and (a.v_proj_dim is None or a.v_proj_narrow):
        flag = "--objective v_recon" if a.objective == "v_recon" else f"--v_recon_weight {a.v_recon_weight}"
        fail(f"{flag} needs restored values: give --v_proj_dim, and drop --v_proj_narrow")


def check_model(a, fail=fail):
    """Refuse contradictions in a GPTConfig, or in the flags of the same names. fail: called with the message."""
    if a.n_embd % a.n_head:
        fail(f"--n_embd {a.n_embd} is not divisible by --n_head {a.n_head}: change one of the two")
    for name in ("n_embd_wte", "v_proj_dim", "k_proj_dim"):
        if (getattr(a, name) or 0) > a.n_embd:
            fail(f"--{name} {getattr(a, name)}: must be from 1 to --n_embd {a.n_embd}: lower it")
    if not a.tie_head and a.n_embd_wte is not None:
        fail(f"--n_embd_wte {a.n_embd_wte} needs a tied head: drop --no-tie_head")
    rotated = a.rotary_pct * a.n_embd / a.n_head
    if a.rotary_pct and (rotated < 2 or rotated % 2):
        fail(
            f"--rotary_pct {a.rotary_pct} rotates {rotated:g} of the {a.n_embd // a.n_head} numbers of a head: "
            "give a share that makes it an even number"
        )
    if a.norms_per_layer == 1 and not a.parallel_residual:
        fail("--norms_per_layer 1 needs a block whose attention and MLP have the same input: give --parallel_residual too")
    if a.v_proj_narrow and (a.v_proj_dim is None or a.v_proj_dim % a.n_head):
        fail(f"--v_proj_narrow needs a --v_proj_dim divisible by --n_head {a.n_head}, not {a.v_proj_dim}: change it")


def check_schedule(a):
    """Refuse a warmup that ends after the cosine."""
    decay = a.max_iters if a.lr_decay_iters is None else a.lr_decay_iters
    if not a.eval_only and not a.warmup_iters < decay:
        fail(f"--warmup_iters {a.warmup_iters} leaves no step for the cosine to step {decay}: lower it, or raise --max_iters")


def check_lora(a):
    """Refuse contradictions in the flags of adapters."""
    if a.init_from != "prev_run":
        fail(f"--lora_rank {a.lora_rank} adapts the weights of a trained run: give --init_from prev_run and --prev_run_ckpt")
    targets = a.lora_targets.split(",")
    for target in targets:
        if target not in LORA_TARGETS:
            near = difflib.get_close_matches(target, LORA_TARGETS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"give some of {','.join(LORA_TARGETS)}"
            fail(f"--lora_targets {a.lora_targets}: {target!r} names no matrix, {hint}")
    if len(targets) > len(set(targets)):
        fail(f"--lora_targets {a.lora_targets} names a matrix twice: name it once")
    if a.n_embd_wte is not None and a.lora_rank > a.n_embd_wte and set(targets) & set(LORA_TARGETS[:3]):
        fail(f"--lora_rank {a.lora_rank} is above --n_embd_wte {a.n_embd_wte}, the rank of a target's matrix: lower it")
    for name in ("train_only", "freeze"):
        if getattr(a, name):
            fail(f"--{name} {getattr(a, name)} contradicts --lora_rank, which trains only adapters: drop one of the two")
    if a.import_wte_freeze or a.import_scale_matrices_freeze:
        print("note: --lora_rank freezes every weight, also imported ones, and trains only the adapters", file=sys.stderr)


def check_given(a, given):
    """Refuse flags on the command line that have no effect."""
    inert = sorted({"lora_alpha", "lora_dropout", "lora_targets"} & given.keys())
    if inert and a.lora_rank is None:
        fail(f"--{inert[0]} needs adapters: give --lora_rank too, or drop it")
    if "muon_lr" in given and a.optimizer != "muon":
        fail(f"--muon_lr {a.muon_lr} has nothing to train: give --optimizer muon too, or drop it")
    counted = sorted({"max_iters", "eval_interval"} & given.keys())
    if counted and a.max_epochs is not None:
        fail(f"--{counted[0]} {given[counted[0]]} counts steps, and --max_epochs {a.max_epochs} counts epochs: drop one")


def trained_names(args, names):
    """The names of the parameters to train, by --train_only and --freeze. Refuses a pattern that has no effect."""

    def matched(flag, patterns):
        found = set()
        for pattern in patterns.split(",") if patterns else []:
            some = {name for name in names if f".{pattern}." in f".{name}."}  # h.1 is not h.10
            if not some:
                parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
                fail(f"--{flag}: {pattern!r} names no parameter of this model: give one of {', '.join(parts)}")
            found |= some
        if len(found) == len(names):
            fail(f"--{flag} {patterns} names every parameter of this model: drop it, or name some of them")
        return found

    left = (matched("train_only", args.train_only) or set(names)) - matched("freeze", args.freeze)
    if not left:
        fail(f"--freeze {args.freeze} freezes all parameters that --train_only {args.train_only} trains: drop one of the two")
    if args.objective == "v_recon" and not all(".v_compress." in name or ".v_restore." in name for name in left):
        fail(f"--objective v_recon --train_only {args.train_only} would shrink the values: give v_compress,v_restore")
    return left


# Flags of older versions, with the value that switched them off.
GONE = {"code_wte": None, "code_wte_every": 10, "save_adapters_only": False}


def without_gone(stored):
    """The flags in a checkpoint, without those in GONE. Raises ValueError if the run used one of these."""
    for name, off in GONE.items():
        if stored.get(name, off) != off:
            raise ValueError(f"it was trained with --{name} {stored[name]}, a flag of older versions")
    return {name: value for name, value in stored.items() if name not in GONE}


# A resume may change only flags that do not affect the steps already done.
MAY_CHANGE = {"init_from", "out_dir", "max_iters", "max_epochs", "patience", "lr_decay_iters", "eval_interval",
              "eval_only", "checkpoint_minutes", "log_interval", "device", "compile", "wandb_log", "wandb_project",
              "wandb_run_name", "tensorboard_log"}  # fmt: skip
MAY_CHANGE_EVAL_ONLY = MAY_CHANGE | {"dataset", "batch_size", "eval_iters", "dtype"}


def resume_args(stored, given, kind):
    """
    The flags of a resumed run, as an instance of kind: the stored flags, changed by the given ones that may change.

    stored: the flags in last.pt. given: the flags on the command line.
    """
    may_change = MAY_CHANGE_EVAL_ONLY if given.get("eval_only") else MAY_CHANGE
    counted = ("max_iters", "eval_interval") if stored.get("max_epochs") else ("max_epochs",)
    for name in counted:
        if given.get(name, stored.get(name)) != stored.get(name):
            unit = "epochs" if stored.get("max_epochs") else "steps"
            fail(f"--{name} {given[name]}: the run of --init_from resume counts {unit}, drop the flag")
    given = {
        name: value for name, value in given.items() if (name, value) != ("dtype", "auto")
    }  # the stored dtype is what auto chose
    for name, value in given.items():
        if name not in may_change and value != stored.get(name, value):
            began = "(none)" if stored[name] in (None, "") else stored[name]
            fail(
                f"--{name} {value} contradicts --init_from resume, because the run started with {began}: "
                "drop the flag, or start a new run in another --out_dir"
            )
    here = dict(out_dir=kind.out_dir) | given  # the folder that we read, which may have moved since the file was written
    args = kind(**(stored | here | dict(init_from=stored.get("init_from", kind.init_from))))
    check_ranges(args)
    check(args)
    return args
