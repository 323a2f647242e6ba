"""
Every flag of train.py: name, default, help, range. The defaults are the baseline of the reference setup (GPT-2 124M,
context 2048, 10,000 steps). A preset lists the values that differ from the defaults, and comments say why.
training/rules.py refuses flags that contradict each other. This file does not import torch, so --help answers at once.
"""

from dataclasses import dataclass

from common.cli import flag, parse
from training.rules import LORA_TARGETS, check, check_given

# -- the flags, one dataclass per concern -----------------------------------------------------------------------------


@dataclass
class ModelArgs:
    """The shape of the model. Repeats model.GPTConfig as flags, because model.py imports torch and this file must not."""

    block_size: int = flag(2048, "context length in tokens", low=1)
    n_layer: int = flag(12, "number of transformer blocks", low=1)
    n_head: int = flag(12, "attention heads of each block", low=1)
    n_embd: int = flag(768, "width d of the residual stream", low=1)
    mlp_expansion_factor: int = flag(4, "width of the MLP, in multiples of --n_embd", low=1)
    activation: str = flag(
        "gelu", "activation of the MLP: gelu is exact, OpenAI's GPT-2 uses gelu_tanh", choices=("gelu", "gelu_tanh")
    )
    bias: bool = flag(True, "give linear layers and LayerNorms a bias")
    dropout: float = flag(0.1, "dropout rate in training; evaluation uses no dropout", low=0, below=1)
    n_embd_wte: int | None = flag(None, "rank k of a factorized token table [V,k] x [k,d]; default: a dense table", low=1)
    n_embd_wte_scale_tying: bool = flag(False, "use one matrix for scale_up and scale_down of the factorized table")
    factor_init: str = flag(
        "matched",
        "how to draw random factors: matched gives their product std 0.02 like a dense table, naive draws each from N(0, 0.02)",
        choices=("matched", "naive"),
    )
    rotary_pct: float = flag(0.0, "share of each head that is rotated by position; 0: learned positions instead", low=0, high=1)
    parallel_residual: bool = flag(False, "compute attention and MLP of a block from the same input, as Pythia does")
    norms_per_layer: int = flag(
        2, "LayerNorms per block; 1: attention and MLP share it (needs --parallel_residual)", choices=(1, 2)
    )
    tie_head: bool = flag(True, "use the token table as the output head")
    v_proj_dim: int | None = flag(None, "numbers per token and layer that the cache holds for values; default: n_embd", low=1)
    k_proj_dim: int | None = flag(None, "numbers per token and layer that the cache holds for keys; default: n_embd", low=1)
    v_proj_narrow: bool = flag(
        False, "make v_proj itself output --v_proj_dim numbers, with nothing restored (narrower value heads)"
    )


@dataclass
class ObjectiveArgs:
    objective: str = flag(
        "lm",
        "training loss. lm: cross-entropy; v_recon: mean (V - V_restored)^2 over elements and layers",
        choices=("lm", "v_recon"),
    )
    v_recon_weight: float = flag(0.0, "weight of the values' reconstruction error in the loss; needs --v_proj_dim", low=0)
    train_only: str = flag("", "parameters to train; give full parts of their names (attn, h.0, v_proj.bias), comma-separated")
    freeze: str = flag("", "parameters not to train, named as in --train_only")


@dataclass
class LoraArgs:
    lora_rank: int | None = flag(None, "train only LoRA adapters, of this rank; default: no adapters", low=1)
    lora_alpha: float = flag(64.0, "numerator of an adapter's scale, lora_alpha / lora_rank", above=0)
    lora_dropout: float = flag(0.1, "dropout rate on an adapter's input; evaluation uses no dropout", low=0, below=1)
    lora_targets: str = flag(
        ",".join(LORA_TARGETS),
        "matrices that get an adapter, comma-separated; the adapter of wte acts in the lookup and the tied head",
    )


@dataclass
class StartArgs:
    init_from: str = flag(
        "scratch",
        "initial weights. scratch: random; resume: continue the run in --out_dir; prev_run: take those of --prev_run_ckpt",
        choices=("scratch", "resume", "prev_run"),
    )
    prev_run_ckpt: str = flag("", "ckpt.pt, or its run folder, for --init_from prev_run")
    import_wte_npy: str = flag("", "factor file with wte [V,k]; needs --import_scale_matrices_npz too")
    import_scale_matrices_npz: str = flag("", "factor file with scale_up and scale_down [k,d], optionally mean [d]")
    import_wte_freeze: bool = flag(False, "do not train the imported wte")
    import_scale_matrices_freeze: bool = flag(False, "do not train the imported scale matrices")
    seed: int = flag(1337, "random seed of weights, training windows and dropout", low=0, high=2**63 - 1)


@dataclass
class OptimArgs:
    dataset: str = flag("wikitext103", "folder with train.bin, val.bin and meta.pkl: a name under data/, or a path")
    batch_size: int = flag(4, "windows (sequences of --block_size tokens) per micro-step", low=1)
    gradient_accumulation_steps: int = flag(4, "micro-steps per optimizer step, summed over all GPUs", low=1)
    max_iters: int = flag(10000, "optimizer steps", low=0)
    max_epochs: int | None = flag(
        None,
        "train this many epochs instead of --max_iters steps; sequences do not overlap and are reshuffled every epoch, "
        "and each epoch ends with an evaluation",
        low=1,
    )
    max_train_samples: int | None = flag(None, "sequences per epoch, from the start of the text; default: all of it", low=1)
    patience: int | None = flag(None, "stop after this many evaluations in a row without a new best; default: never", low=1)
    optimizer: str = flag(
        "adamw", "optimizer; muon updates the blocks' matrices and leaves the rest to AdamW", choices=("adamw", "muon")
    )
    learning_rate: float = flag(1e-4, "learning rate after the warmup", above=0)
    muon_lr: float = flag(0.03, "learning rate of Muon; needs --optimizer muon, follows the same schedule", above=0)
    table_lr: float | None = flag(
        None, "learning rate of the token table, its scale matrices and the head; default: --learning_rate", above=0
    )
    min_lr: float = flag(
        5e-6, "learning rate at the end of the cosine; the rates of Muon and the table fall in proportion", low=0
    )
    warmup_iters: int = flag(500, "steps of linear warmup", low=0)
    lr_decay_iters: int | None = flag(None, "step at which the cosine ends; default: --max_iters", low=1)
    weight_decay: float = flag(0.1, "weight decay, on matrices only", low=0)
    beta1: float = flag(0.9, "beta1 of AdamW", low=0, below=1)
    beta2: float = flag(0.95, "beta2 of AdamW", low=0, below=1)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping", low=0)


@dataclass
class RunArgs:
    preset: str = flag("", "named set of values that replace the defaults, listed below")
    out_dir: str = flag("model_weights/out", "folder of the run")
    eval_interval: int = flag(500, "steps between evaluations; each writes last.pt, and ckpt.pt if it is the best", low=1)
    checkpoint_minutes: float | None = flag(10.0, "minutes after which last.pt is written even without an evaluation", above=0)
    eval_iters: int = flag(100, "batches per evaluation, of --batch_size fixed validation windows each", low=1)
    eval_only: bool = flag(False, "evaluate and stop; with --init_from resume, evaluate ckpt.pt and write nothing")
    log_interval: int = flag(10, "steps between progress lines", low=1)
    device: str = flag("cuda", "device: cuda, cuda:1, cpu or mps")
    dtype: str = flag(
        "float16",
        "number format of the forward pass; float16 uses a GradScaler; auto takes the fastest on this machine",
        choices=("float32", "bfloat16", "float16", "auto"),
    )
    compile: bool = flag(True, "compile the model with torch.compile")
    wandb_log: bool = flag(False, "also log to Weights & Biases; offline if there is no key")
    wandb_project: str = flag("new-small-gpt", "name of the W&B project")
    wandb_run_name: str = flag("", "name of the W&B run; default: the name of --out_dir")
    tensorboard_log: bool = flag(False, "also log to TensorBoard, in out_dir/tensorboard")


@dataclass
class TrainArgs(RunArgs, StartArgs, OptimArgs, ObjectiveArgs, LoraArgs, ModelArgs):
    pass


# -- presets ----------------------------------------------------------------------------------------------------------

PRESETS = {}

# The baseline of the reference setup, on one RTX 3090: 4 x 4 x 2048 = 32,768 tokens per step, 10,000 steps = 328M tokens.
# Its authors report a validation loss of 3.44 on WikiText-103.
PRESETS["gpt2"] = dict()

# The schedule of experiments 10-13: 5,000 more steps of the same size = 164M tokens.
PRESETS["gpt2_finetune"] = PRESETS["gpt2"] | dict(
    max_iters=5000, eval_interval=200, learning_rate=5e-5, min_lr=1e-6, warmup_iters=100, weight_decay=0.01
)

# The same schedule for adapters. Their rank 32 is half of the smallest table's rank, 64.
PRESETS["gpt2_lora"] = PRESETS["gpt2_finetune"] | dict(lora_rank=32)

# For two CPU cores: 1 x 8 x 128 = 1,024 tokens per step, 1,000 steps = 1.0M tokens of data/sotu, about 3 minutes. No dropout,
# because the run reads less than one epoch of the text. The token table is 1.05M of the 2.66M parameters. results/laptop_ranks
# and results/bytes/own_tables.md used this preset.
PRESETS["laptop_adamw"] = dict(
    block_size=128, n_layer=2, n_head=4, n_embd=256, dropout=0.0, dataset="sotu",
    batch_size=8, gradient_accumulation_steps=1, max_iters=1000, learning_rate=1e-3, min_lr=5e-5, warmup_iters=50,
    eval_interval=125, eval_iters=32, log_interval=50, device="cpu", dtype="float32", compile=False,
)  # fmt: skip

# As in experiments 10-13: half as many steps again, at half the learning rate and a tenth of the weight decay.
PRESETS["laptop_adamw_finetune"] = PRESETS["laptop_adamw"] | dict(
    max_iters=500, eval_interval=100, learning_rate=5e-4, min_lr=1e-5, warmup_iters=20, weight_decay=0.01
)

# Rank 8 of width 256, about the share of the reference (32 of 768). No dropout here either.
PRESETS["laptop_adamw_lora"] = PRESETS["laptop_adamw_finetune"] | dict(lora_rank=8, lora_alpha=16, lora_dropout=0.0)

# The README's laptop run, on two CPU cores: the same model, Muon, and two fifths of the steps. The rates were chosen on the
# last twentieth of the training text (results/speed). For a dense table 2e-2 and 4e-2 are equally good; a table of rank 128
# needs 2e-2.
PRESETS["laptop"] = PRESETS["laptop_adamw"] | dict(
    optimizer="muon", dtype="auto", max_iters=400, learning_rate=3e-3, muon_lr=0.02, table_lr=0.02, min_lr=0.0, warmup_iters=20,
    eval_interval=100,
)  # fmt: skip

# Half as many steps again, at a quarter of the rates. At half of the rates D ends at the loss that it began with: the first
# steps damage it.
PRESETS["laptop_finetune"] = PRESETS["laptop"] | dict(
    max_iters=200, eval_interval=50, learning_rate=7.5e-4, muon_lr=5e-3, table_lr=5e-3, warmup_iters=10, weight_decay=0.01
)

# As many steps as laptop_finetune. AdamW trains the adapters; its rate was not tuned.
PRESETS["laptop_lora"] = PRESETS["laptop_adamw_lora"] | dict(
    dtype="auto", max_iters=200, eval_interval=50, learning_rate=1e-3, warmup_iters=10
)

# Experiments 1-13 on two CPU cores. Half the width, so that twice the steps fit into the same minutes (2.0M tokens, less than
# one epoch), at four times the rate. More of the table's rank is in use, so the cost of a low rank and the choice of method
# become visible. Ranks 8, 16, 32, 64 of 128 take the place of the reference's 64, 128, 256, 512 of 768.
PRESETS["laptop13"] = PRESETS["laptop_adamw"] | dict(
    n_embd=128, max_iters=2000, learning_rate=4e-3, min_lr=2e-4, eval_interval=250
)

# As in experiments 10-13: half as many steps again, at half the learning rate and a tenth of the weight decay.
PRESETS["laptop13_finetune"] = PRESETS["laptop13"] | dict(
    max_iters=1000, eval_interval=125, learning_rate=2e-3, min_lr=4e-5, warmup_iters=20, weight_decay=0.01
)

# Rank 8 of width 128: the reference's share of the width would be 5, and the smallest table has rank 8. Adapters need a higher
# learning rate than all weights do: at k = 8, seed 1, a rate of 5e-3 ends at a loss of 5.353 and 1e-2 at 5.346 (2e-3 with
# rank 4: 5.499).
PRESETS["laptop13_lora"] = PRESETS["laptop13_finetune"] | dict(
    learning_rate=5e-3, min_lr=1e-4, lora_rank=8, lora_alpha=16, lora_dropout=0.0
)

# Pythia-70M's shape, trained as in the original scripts' experiment with compressed values: 9,000 sequences of 128 tokens, 8
# per step, 1,125 steps per epoch, at a constant rate. It stops after three epochs without a new best, as the logs of that
# experiment do. One LayerNorm per block, as its authors have it; Pythia's own weights have two. They report a perplexity of
# about 442.
PRESETS["pythia70m"] = dict(
    block_size=128, n_layer=6, n_head=8, n_embd=512, dropout=0.0, rotary_pct=0.25, parallel_residual=True, norms_per_layer=1,
    tie_head=False, dataset="pile", batch_size=8, gradient_accumulation_steps=1, max_epochs=30, max_train_samples=9000,
    patience=3, learning_rate=1e-4, min_lr=1e-4, warmup_iters=0, weight_decay=0.01, eval_iters=125,
)  # fmt: skip

# Phase 1 of 2: train only v_compress and v_restore.
PRESETS["pythia70m_recon"] = PRESETS["pythia70m"] | dict(
    objective="v_recon", train_only="v_compress,v_restore", max_epochs=10, learning_rate=1e-3, min_lr=1e-3
)

# The same experiment on two CPU cores.
PRESETS["laptop_pythia"] = PRESETS["pythia70m"] | dict(
    n_layer=2, n_head=4, n_embd=128, dataset="sotu", max_epochs=20, max_train_samples=1500, learning_rate=2e-3, min_lr=2e-3,
    eval_iters=32, log_interval=50, device="cpu", dtype="float32", compile=False,
)  # fmt: skip

PRESETS["laptop_pythia_recon"] = PRESETS["laptop_pythia"] | dict(
    objective="v_recon", train_only="v_compress,v_restore", max_epochs=10
)


def parse_args(argv=None):
    """Returns (TrainArgs, dict of the flags that the command line gives)."""
    args, given = parse(TrainArgs, argv, presets=PRESETS, description="Train or evaluate one GPT.", epilog=describe_presets())
    if args.init_from != "resume":  # a resumed run reads its flags from the checkpoint, see resume_args
        check_given(args, given)
        check(args)
    return args, given


def describe_presets():
    lines = [f"  {name}: {' '.join(f'--{k} {v}' for k, v in p.items()) or 'the defaults'}" for name, p in PRESETS.items()]
    return "presets:\n" + "\n".join(lines)
