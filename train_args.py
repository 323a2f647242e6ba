"""
Every flag of train.py, once: name, default, help. The defaults are the baseline of the reference setup (GPT-2 124M, context
2048, 10,000 steps); a preset is a commented difference from them. No torch here, so that --help answers at once.
"""

import difflib
import re
import sys
from dataclasses import dataclass

from common.cli import fail, flag, parse

PRESET_NAMES = (
    "gpt2", "gpt2_finetune", "gpt2_lora", "laptop", "laptop_finetune", "laptop_lora",
    "laptop13", "laptop13_finetune", "laptop13_lora", "pythia70m", "pythia70m_recon", "laptop_pythia", "laptop_pythia_recon",
)  # fmt: skip

# Every matrix of a factorized GPT that an adapter can stand beside; a dense table has no scale_up and scale_down.
LORA_TARGETS = ("wte", "scale_up", "scale_down", "q_proj", "k_proj", "v_proj", "c_proj", "mlp_up", "mlp_down")

# -- the flags, one dataclass per concern -----------------------------------------------------------------------------


@dataclass
class ModelArgs:
    block_size: int = flag(2048, "context length in tokens")
    n_layer: int = flag(12, "transformer blocks")
    n_head: int = flag(12, "attention heads of each block")
    n_embd: int = flag(768, "width d of the residual stream")
    mlp_expansion_factor: int = flag(4, "width of the MLP in units of n_embd")
    activation: str = flag("gelu", "gelu is exact, gelu_tanh is what OpenAI's GPT-2 uses", choices=("gelu", "gelu_tanh"))
    bias: bool = flag(True, "biases in linear layers and LayerNorms")
    dropout: float = flag(0.1, "dropout while training; evaluation uses none")
    n_embd_wte: int | None = flag(None, "rank k of a factorized token table [V,k] x [k,d]; left out, the table is dense")
    n_embd_wte_scale_tying: bool = flag(False, "scale_up and scale_down are one matrix")
    factor_init: str = flag(
        "matched",
        "random factors: matched gives their product a dense table's std 0.02, naive draws each N(0, 0.02)",
        choices=("matched", "naive"),
    )
    rotary_pct: float = flag(0.0, "share of each head that is rotated by its position; 0 learns positions instead")
    parallel_residual: bool = flag(False, "attention and MLP of a block read the same stream, as in Pythia")
    norms_per_layer: int = flag(2, "LayerNorms of a block; 1 is shared, with --parallel_residual", choices=(1, 2))
    tie_head: bool = flag(True, "the head is the token table")
    v_proj_dim: int | None = flag(None, "numbers a token that the cache holds for the values; left out, n_embd of them")
    k_proj_dim: int | None = flag(None, "numbers a token that the cache holds for the keys, before they are rotated")
    v_proj_narrow: bool = flag(False, "v_proj gives --v_proj_dim numbers itself, and nothing restores them")


@dataclass
class ObjectiveArgs:
    objective: str = flag(
        "lm", "lm: cross-entropy; v_recon: mean (V - V_restored)^2 over elements and layers", choices=("lm", "v_recon")
    )
    v_recon_weight: float = flag(0.0, "what that error counts beside the cross-entropy, with --v_proj_dim")
    train_only: str = flag("", "whole parts of parameter names (attn, h.0, v_proj.bias), comma-separated: all else stays")
    freeze: str = flag("", "whole parts of parameter names, comma-separated: these stay as they are")


@dataclass
class LoraArgs:
    lora_rank: int | None = flag(None, "train adapters of this rank and nothing else; left out, there are none")
    lora_alpha: float = flag(64.0, "an adapter's scale is lora_alpha / lora_rank")
    lora_dropout: float = flag(0.1, "dropout of what an adapter reads; evaluation uses none")
    lora_targets: str = flag(
        ",".join(LORA_TARGETS), "what gets an adapter, comma-separated; wte's acts in the lookup and in the tied head"
    )
    save_adapters_only: bool = flag(
        False, "checkpoints without the frozen base, which is read from where it came from, by hash"
    )


@dataclass
class StartArgs:
    init_from: str = flag(
        "scratch",
        "scratch: random weights; resume: go on with the run in --out_dir; prev_run: the weights of --prev_run_ckpt",
        choices=("scratch", "resume", "prev_run"),
    )
    prev_run_ckpt: str = flag("", "a ckpt.pt, or the run folder that holds it, for --init_from prev_run")
    import_wte_npy: str = flag("", "factor file wte [V,k]; needs --import_scale_matrices_npz too")
    import_scale_matrices_npz: str = flag("", "factor file scale_up, scale_down [k,d] (and mean [d])")
    import_wte_freeze: bool = flag(False, "do not train the imported wte")
    import_scale_matrices_freeze: bool = flag(False, "do not train the imported scale matrices")
    seed: int = flag(1337, "draws the weights, the training windows and the dropout")


@dataclass
class OptimArgs:
    dataset: str = flag("wikitext103", "a folder under data/ with train.bin, val.bin and meta.pkl, or a path to one")
    batch_size: int = flag(4, "windows of one micro-step")
    gradient_accumulation_steps: int = flag(4, "micro-steps of one step, over all cards together")
    max_iters: int = flag(10000, "optimizer steps")
    max_epochs: int | None = flag(
        None, "epochs instead of steps: sequences that do not overlap, shuffled anew in each, an evaluation after each"
    )
    max_train_samples: int | None = flag(None, "sequences of an epoch, from the start of the text; left out, all of it")
    patience: int | None = flag(None, "stop after this many evaluations without a better one; left out, never")
    learning_rate: float = flag(1e-4, "after the warmup")
    min_lr: float = flag(5e-6, "at the end of the cosine")
    warmup_iters: int = flag(500, "steps of linear warmup")
    lr_decay_iters: int | None = flag(None, "where the cosine ends; left out, at max_iters")
    weight_decay: float = flag(0.1, "AdamW's, on matrices only")
    beta1: float = flag(0.9, "AdamW's")
    beta2: float = flag(0.95, "AdamW's")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 does not clip")


@dataclass
class RunArgs:
    preset: str = flag("", "values that differ from the defaults, see below", choices=PRESET_NAMES)
    out_dir: str = flag("model_weights/out", "the run's folder")
    eval_interval: int = flag(500, "steps between evaluations; each writes last.pt, and ckpt.pt where it is the best")
    eval_iters: int = flag(100, "batches of --batch_size fixed validation windows in one evaluation")
    eval_only: bool = flag(False, "evaluate and stop; with --init_from resume it evaluates ckpt.pt and writes nothing")
    log_interval: int = flag(10, "steps between progress lines")
    device: str = flag("cuda", "cuda, cuda:1, cpu, mps")
    dtype: str = flag(
        "float16",
        "arithmetic of the forward pass; float16 trains with a GradScaler",
        choices=("float32", "bfloat16", "float16"),
    )
    compile: bool = flag(True, "torch.compile the model")
    wandb_log: bool = flag(False, "log to Weights & Biases too; offline where there is no key")
    wandb_project: str = flag("new-small-gpt", "W&B project")
    wandb_run_name: str = flag("", "W&B run; left out, the name of out_dir")
    tensorboard_log: bool = flag(False, "log to TensorBoard too, in out_dir/tensorboard")


@dataclass
class TrainArgs(RunArgs, StartArgs, OptimArgs, ObjectiveArgs, LoraArgs, ModelArgs):
    pass


# -- presets ----------------------------------------------------------------------------------------------------------

# The baseline of the reference setup, on one RTX 3090: 4 x 4 x 2048 = 32,768 tokens a step, 10,000 steps = 328M tokens.
# Its authors report a validation loss of 3.44 on WikiText-103.
GPT2 = dict()

# The schedule of experiments 10-13: 5,000 further steps of the same size = 164M tokens.
GPT2_FINETUNE = GPT2 | dict(
    max_iters=5000, eval_interval=200, learning_rate=5e-5, min_lr=1e-6, warmup_iters=100, weight_decay=0.01
)

# The same schedule for adapters: rank 32 of width 768, half of the smallest table's rank, 64.
GPT2_LORA = GPT2_FINETUNE | dict(lora_rank=32)

# Two CPU cores: 1 x 8 x 128 = 1,024 tokens a step, 1,000 steps = 1.0M tokens of data/sotu, about 3 minutes. No dropout,
# since there are fewer tokens than in the text. The token table is 1.05M of the 2.66M parameters.
LAPTOP = dict(
    block_size=128, n_layer=2, n_head=4, n_embd=256, dropout=0.0, dataset="sotu",
    batch_size=8, gradient_accumulation_steps=1, max_iters=1000, learning_rate=1e-3, min_lr=5e-5, warmup_iters=50,
    eval_interval=125, eval_iters=32, log_interval=50, device="cpu", dtype="float32", compile=False,
)  # fmt: skip

# Half as many further steps, as experiments 10-13 have, at half the rate and a tenth of the decay.
LAPTOP_FINETUNE = LAPTOP | dict(
    max_iters=500, eval_interval=100, learning_rate=5e-4, min_lr=1e-5, warmup_iters=20, weight_decay=0.01
)

# Rank 8 of 256, as much of the width as the reference's, and no dropout here either.
LAPTOP_LORA = LAPTOP_FINETUNE | dict(lora_rank=8, lora_alpha=16, lora_dropout=0.0)

# Experiments 1-13 on two CPU cores: half the width, so that twice the steps fit into the same minutes (2.0M tokens, fewer
# than the text has), at four times the rate. Its table is fuller, so that what a rank costs and how it is chosen
# can be seen: ranks 8, 16, 32, 64 of 128 for the reference's 64, 128, 256, 512 of 768.
LAPTOP13 = LAPTOP | dict(n_embd=128, max_iters=2000, learning_rate=4e-3, min_lr=2e-4, eval_interval=250)

# Half as many further steps, as experiments 10-13 have, at half the rate and a tenth of the decay.
LAPTOP13_FINETUNE = LAPTOP13 | dict(
    max_iters=1000, eval_interval=125, learning_rate=2e-3, min_lr=4e-5, warmup_iters=20, weight_decay=0.01
)

# Rank 8 of 128: the reference's share of the width would be 5, and the smallest table has rank 8. Few numbers want a higher
# rate than all of them: at k = 8, seed 1, a rate of 5e-3 ends at 5.353 and 1e-2 at 5.346 (2e-3 with rank 4: 5.499).
LAPTOP13_LORA = LAPTOP13_FINETUNE | dict(learning_rate=5e-3, min_lr=1e-4, lora_rank=8, lora_alpha=16, lora_dropout=0.0)

# Pythia-70M's shape, trained as in the seed's experiment with compressed values: 9,000 sequences of 128 tokens, 8 a step,
# 1,125 steps an epoch, at a constant rate, until three epochs have brought nothing (its logs stop there, not after one).
# One LayerNorm a block, as its authors have it; Pythia's own weights have two. They report a perplexity of about 442.
PYTHIA70M = dict(
    block_size=128, n_layer=6, n_head=8, n_embd=512, dropout=0.0, rotary_pct=0.25, parallel_residual=True, norms_per_layer=1,
    tie_head=False, dataset="pile", batch_size=8, gradient_accumulation_steps=1, max_epochs=30, max_train_samples=9000,
    patience=3, learning_rate=1e-4, min_lr=1e-4, warmup_iters=0, weight_decay=0.01, eval_iters=125,
)  # fmt: skip

# Phase 1, v_compress and v_restore alone.
PYTHIA70M_RECON = PYTHIA70M | dict(
    objective="v_recon", train_only="v_compress,v_restore", max_epochs=10, learning_rate=1e-3, min_lr=1e-3
)

# The same experiment on two CPU cores.
LAPTOP_PYTHIA = PYTHIA70M | dict(
    n_layer=2, n_head=4, n_embd=128, dataset="sotu", max_epochs=20, max_train_samples=1500, learning_rate=2e-3, min_lr=2e-3,
    eval_iters=32, log_interval=50, device="cpu", dtype="float32", compile=False,
)  # fmt: skip

LAPTOP_PYTHIA_RECON = LAPTOP_PYTHIA | dict(objective="v_recon", train_only="v_compress,v_restore", max_epochs=10)

PRESETS = dict(
    zip(
        PRESET_NAMES,
        (GPT2, GPT2_FINETUNE, GPT2_LORA, LAPTOP, LAPTOP_FINETUNE, LAPTOP_LORA, LAPTOP13, LAPTOP13_FINETUNE, LAPTOP13_LORA,
         PYTHIA70M, PYTHIA70M_RECON, LAPTOP_PYTHIA, LAPTOP_PYTHIA_RECON),
    )
)  # fmt: skip

# The numbers a flag may have, both ends included.
ALMOST_1, LARGE = 0.999999, 1e9
RANGES = {
    "block_size n_layer n_head n_embd n_embd_wte mlp_expansion_factor batch_size gradient_accumulation_steps "
    "eval_iters eval_interval log_interval lr_decay_iters lora_rank v_proj_dim k_proj_dim max_epochs max_train_samples "
    "patience": (1, LARGE),
    "max_iters warmup_iters weight_decay grad_clip min_lr v_recon_weight": (0, LARGE),
    "learning_rate lora_alpha": (1e-12, LARGE),
    "dropout lora_dropout beta1 beta2": (0, ALMOST_1),
    "rotary_pct": (0, 1),
    "seed": (0, 2**63 - 1),
}

# -- contradictions ---------------------------------------------------------------------------------------------------


def check(a):
    """Refuse flags that contradict each other, naming both and the mend."""
    for names, (low, high) in RANGES.items():
        for name in names.split():
            value = getattr(a, name)
            if value is not None and not low <= value <= high:  # not a number lies nowhere
                fail(f"--{name} {value}: give a number from {low} to {high}")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", a.device):
        fail(f"--device {a.device}: give cuda, cuda:1, cpu or mps")
    if a.init_from != "prev_run":  # whose shape is that of its checkpoint
        check_shape(a)
    if a.n_embd_wte_scale_tying and a.n_embd_wte is None:
        fail("--n_embd_wte_scale_tying has no scale matrices to tie: give --n_embd_wte too")
    if a.factor_init == "naive" and (a.n_embd_wte is None or a.import_wte_npy):
        fail("--factor_init naive draws no factors here: give --n_embd_wte, and no --import_wte_npy, or leave it out")
    if bool(a.import_wte_npy) != bool(a.import_scale_matrices_npz):
        given, missing = ("wte_npy", "scale_matrices_npz") if a.import_wte_npy else ("scale_matrices_npz", "wte_npy")
        fail(f"--import_{given} without --import_{missing} would leave the other factor random: give both files")
    if a.import_wte_npy and a.n_embd_wte is None:
        fail("--import_wte_npy needs --n_embd_wte, the rank of the imported factors")
    for name in ("import_wte_freeze", "import_scale_matrices_freeze"):
        if getattr(a, name) and not a.import_wte_npy:
            fail(f"--{name} has nothing to freeze: give --import_wte_npy and --import_scale_matrices_npz too")
    if (a.init_from == "prev_run") != bool(a.prev_run_ckpt):
        fail(f"--init_from {a.init_from} and --prev_run_ckpt {a.prev_run_ckpt or '(none)'}: prev_run needs both, scratch none")
    if a.max_epochs is None:  # else the steps are known once the text is
        check_schedule(a)
        if a.max_train_samples is not None:
            fail(f"--max_train_samples {a.max_train_samples} is of whole epochs: give --max_epochs too, or leave it out")
    if a.objective == "v_recon" and a.v_recon_weight:
        fail(f"--v_recon_weight {a.v_recon_weight} weighs against the cross-entropy: leave it out with --objective v_recon")
    if a.objective == "v_recon" and not a.train_only:
        fail("--objective v_recon would let the values shrink to nothing: give --train_only v_compress,v_restore too")
    if a.lora_rank is not None:
        check_lora(a)
    elif a.save_adapters_only:
        fail("--save_adapters_only has no adapters to save: give --lora_rank too")
    if a.dtype == "float16" and not a.device.startswith("cuda"):
        fail(f"--dtype float16 needs a CUDA device, and --device is {a.device}: give --dtype float32 or bfloat16")


def check_shape(a):
    """What hangs on the shape of the model, which a previous run may have fixed."""
    if a.n_embd % a.n_head:
        fail(f"--n_embd {a.n_embd} is not divisible by --n_head {a.n_head}: change one of the two")
    for name in ("n_embd_wte", "v_proj_dim", "k_proj_dim"):
        if (getattr(a, name) or 0) > a.n_embd:
            fail(f"--{name} {getattr(a, name)}: a rank lies between 1 and --n_embd {a.n_embd}")
    if not a.tie_head and a.n_embd_wte is not None:
        fail(f"--n_embd_wte {a.n_embd_wte} is of a table that is its own head; --no-tie_head's is not: leave one of them out")
    rotated = a.rotary_pct * a.n_embd / a.n_head
    if a.rotary_pct and (rotated < 2 or rotated % 2):
        fail(f"--rotary_pct {a.rotary_pct} turns {rotated:g} of the {a.n_embd // a.n_head} numbers of a head: they go in pairs")
    if a.norms_per_layer == 1 and not a.parallel_residual:
        fail("--norms_per_layer 1 is of blocks whose attention and MLP read the same: give --parallel_residual too")
    if a.v_proj_narrow and (a.v_proj_dim is None or a.v_proj_dim % a.n_head):
        fail(f"--v_proj_narrow needs a --v_proj_dim that --n_head {a.n_head} divides, not {a.v_proj_dim}: change it")
    if (a.objective == "v_recon" or a.v_recon_weight) and (a.v_proj_dim is None or a.v_proj_narrow):
        what = "--objective v_recon" if a.objective == "v_recon" else f"--v_recon_weight {a.v_recon_weight}"
        fail(f"{what} has no restored values to look at: give --v_proj_dim, without --v_proj_narrow")


def check_schedule(a):
    decay = a.max_iters if a.lr_decay_iters is None else a.lr_decay_iters
    if not a.eval_only and not a.warmup_iters < decay:
        fail(f"--warmup_iters {a.warmup_iters} leaves no cosine before step {decay}: lower it, or raise --max_iters")


def check_lora(a):
    if a.init_from != "prev_run":
        fail(f"--lora_rank {a.lora_rank} adapts weights that are there: give --init_from prev_run and --prev_run_ckpt too")
    targets = a.lora_targets.split(",")
    for target in targets:
        if target not in LORA_TARGETS:
            near = difflib.get_close_matches(target, LORA_TARGETS, n=1)
            mend = f"did you mean {near[0]}?" if near else f"give some of {','.join(LORA_TARGETS)}"
            fail(f"--lora_targets {a.lora_targets}: {target!r} names no matrix here, {mend}")
    if len(targets) > len(set(targets)):
        fail(f"--lora_targets {a.lora_targets} names a matrix twice: leave one out")
    if a.n_embd_wte is not None and a.lora_rank > a.n_embd_wte and set(targets) & set(LORA_TARGETS[:3]):
        fail(f"--lora_rank {a.lora_rank} is above --n_embd_wte {a.n_embd_wte}, the rank of a target's matrix: lower it")
    for name in ("train_only", "freeze"):
        if getattr(a, name):
            fail(f"--{name} {getattr(a, name)}: --lora_rank trains its adapters and nothing else, leave one of the two out")
    if a.import_wte_freeze or a.import_scale_matrices_freeze:
        print("note: --lora_rank freezes every weight, the imported ones too; adapters beside them train", file=sys.stderr)


def trained_names(args, names):
    """Which of a model's parameters --train_only and --freeze leave to train; patterns that say nothing are a mistake."""

    def matched(flag, patterns):
        found = set()
        for pattern in patterns.split(",") if patterns else []:
            some = {name for name in names if f".{pattern}." in f".{name}."}  # h.1 is not h.10
            if not some:
                parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
                fail(f"--{flag}: {pattern!r} names no parameter of this model: give a part of a name, of {', '.join(parts)}")
            found |= some
        if len(found) == len(names):
            fail(f"--{flag} {patterns} names every parameter of this model: leave it out, or name some of them")
        return found

    left = (matched("train_only", args.train_only) or set(names)) - matched("freeze", args.freeze)
    if not left:
        fail(f"--freeze {args.freeze} leaves nothing of --train_only {args.train_only} to train: leave one of the two out")
    if args.objective == "v_recon" and not all(".v_compress." in name or ".v_restore." in name for name in left):
        fail(f"--objective v_recon --train_only {args.train_only} would let the values shrink: give v_compress,v_restore")
    return left


# What may change when a run is resumed: nothing that alters the steps already planned, save for how many there are.
MAY_CHANGE = {"init_from", "out_dir", "max_iters", "max_epochs", "patience", "lr_decay_iters", "eval_interval",
              "eval_only", "log_interval", "device", "compile", "wandb_log", "wandb_project", "wandb_run_name",
              "tensorboard_log"}  # fmt: skip
MAY_CHANGE_EVAL_ONLY = MAY_CHANGE | {"dataset", "batch_size", "eval_iters", "dtype"}


def resume_args(stored, given):
    """The flags of a resumed run: those it was started with, and what was given anew where that may change."""
    may_change = MAY_CHANGE_EVAL_ONLY if given.get("eval_only") else MAY_CHANGE
    if stored.get("save_adapters_only"):  # the files of its base may have moved, a hash tells whether they are the same
        may_change = may_change | {"prev_run_ckpt", "import_wte_npy", "import_scale_matrices_npz"}
    counted = ("max_iters", "eval_interval") if stored.get("max_epochs") else ("max_epochs",)
    for name in counted:
        if given.get(name, stored.get(name)) != stored.get(name):
            unit = "epochs" if stored.get("max_epochs") else "steps"
            fail(f"--{name} {given[name]}: the run with --init_from resume counts {unit}, leave the flag out")
    for name, value in given.items():
        if name not in may_change and value != stored.get(name, value):
            fail(
                f"--{name} {value} contradicts --init_from resume, the run was started with {stored[name] or '(none)'}: "
                "leave the flag out, or start a new run in another --out_dir"
            )
    args = TrainArgs(**(stored | given | dict(init_from=stored["init_from"])))
    check(args)
    return args


def parse_args(argv=None):
    """Returns (TrainArgs, the dict of flags that were given on the command line)."""
    args, given = parse(TrainArgs, argv, presets=PRESETS, description="Train or evaluate one GPT.", epilog=describe_presets())
    if args.init_from != "resume":  # whose flags are in its checkpoint, see resume_args
        inert = sorted({"lora_alpha", "lora_dropout", "lora_targets"} & given.keys())
        if inert and args.lora_rank is None:
            fail(f"--{inert[0]} is of adapters, and there are none: give --lora_rank too, or leave it out")
        counted = sorted({"max_iters", "eval_interval"} & given.keys())
        if counted and args.max_epochs is not None:
            fail(f"--{counted[0]} {given[counted[0]]} counts steps, and --max_epochs {args.max_epochs} epochs: leave one out")
        check(args)
    return args, given


def describe_presets():
    lines = [f"  {name}: {' '.join(f'--{k} {v}' for k, v in p.items()) or 'the defaults'}" for name, p in PRESETS.items()]
    return "presets:\n" + "\n".join(lines)
