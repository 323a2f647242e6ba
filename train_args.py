"""
Every flag of train.py, once: name, default, help, range. The defaults are the baseline of the reference setup (GPT-2 124M,
context 2048, 10,000 steps). A preset is a commented difference from the defaults. training/rules.py refuses flags that
contradict each other. No torch here, so that --help answers at once.
"""

from dataclasses import dataclass

from common.cli import flag, parse
from training.rules import LORA_TARGETS, check, check_given

# -- the flags, one dataclass per concern -----------------------------------------------------------------------------


@dataclass
class ModelArgs:
    """The shape of the model: model.GPTConfig again, with help. That file needs torch, and this one must not import it."""

    block_size: int = flag(2048, "context length in tokens", low=1)
    n_layer: int = flag(12, "transformer blocks", low=1)
    n_head: int = flag(12, "attention heads of each block", low=1)
    n_embd: int = flag(768, "width d of the residual stream", low=1)
    mlp_expansion_factor: int = flag(4, "width of the MLP in units of n_embd", low=1)
    activation: str = flag("gelu", "gelu is exact, gelu_tanh is what OpenAI's GPT-2 uses", choices=("gelu", "gelu_tanh"))
    bias: bool = flag(True, "biases in linear layers and LayerNorms")
    dropout: float = flag(0.1, "dropout while training; evaluation uses none", low=0, below=1)
    n_embd_wte: int | None = flag(None, "rank k of a factorized token table [V,k] x [k,d]; left out, the table is dense", low=1)
    n_embd_wte_scale_tying: bool = flag(False, "scale_up and scale_down are one matrix")
    factor_init: str = flag(
        "matched",
        "random factors: matched gives their product a dense table's std 0.02, naive draws each N(0, 0.02)",
        choices=("matched", "naive"),
    )
    rotary_pct: float = flag(
        0.0, "share of each head that is rotated by its position; 0 learns positions instead", low=0, high=1
    )
    parallel_residual: bool = flag(False, "attention and MLP of a block read the same stream, as in Pythia")
    norms_per_layer: int = flag(2, "LayerNorms of a block; 1 is shared, with --parallel_residual", choices=(1, 2))
    tie_head: bool = flag(True, "the head is the token table")
    v_proj_dim: int | None = flag(None, "numbers a token that the cache holds for the values; left out, n_embd of them", low=1)
    k_proj_dim: int | None = flag(None, "numbers a token that the cache holds for the keys, before they are rotated", low=1)
    v_proj_narrow: bool = flag(False, "v_proj gives --v_proj_dim numbers itself, and nothing restores them")


@dataclass
class ObjectiveArgs:
    objective: str = flag(
        "lm", "lm: cross-entropy; v_recon: mean (V - V_restored)^2 over elements and layers", choices=("lm", "v_recon")
    )
    v_recon_weight: float = flag(0.0, "weight of the reconstruction error in the loss; needs --v_proj_dim", low=0)
    train_only: str = flag("", "whole parts of parameter names (attn, h.0, v_proj.bias), comma-separated: all else stays")
    freeze: str = flag("", "whole parts of parameter names, comma-separated: these stay as they are")


@dataclass
class LoraArgs:
    lora_rank: int | None = flag(None, "train adapters of this rank and nothing else; left out, there are none", low=1)
    lora_alpha: float = flag(64.0, "an adapter's scale is lora_alpha / lora_rank", above=0)
    lora_dropout: float = flag(0.1, "dropout of what an adapter reads; evaluation uses none", low=0, below=1)
    lora_targets: str = flag(
        ",".join(LORA_TARGETS), "what gets an adapter, comma-separated; wte's acts in the lookup and in the tied head"
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
    seed: int = flag(1337, "draws the weights, the training windows and the dropout", low=0, high=2**63 - 1)


@dataclass
class OptimArgs:
    dataset: str = flag("wikitext103", "a folder under data/ with train.bin, val.bin and meta.pkl, or a path to one")
    batch_size: int = flag(4, "windows of one micro-step", low=1)
    gradient_accumulation_steps: int = flag(4, "micro-steps of one step, over all cards together", low=1)
    max_iters: int = flag(10000, "optimizer steps", low=0)
    max_epochs: int | None = flag(
        None,
        "epochs instead of steps: sequences that do not overlap, shuffled anew in each, an evaluation after each",
        low=1,
    )
    max_train_samples: int | None = flag(None, "sequences of an epoch, from the start of the text; left out, all of it", low=1)
    patience: int | None = flag(None, "stop after this many evaluations without a better one; left out, never", low=1)
    optimizer: str = flag("adamw", "adamw, or muon for the blocks' matrices and adamw for the rest", choices=("adamw", "muon"))
    learning_rate: float = flag(1e-4, "after the warmup", above=0)
    muon_lr: float = flag(0.03, "Muon's learning rate, with --optimizer muon; it follows the same schedule", above=0)
    table_lr: float | None = flag(
        None, "learning rate of the token table, its scale matrices and the head; left out, --learning_rate", above=0
    )
    min_lr: float = flag(5e-6, "at the end of the cosine; Muon's and the table's rates fall in proportion", low=0)
    warmup_iters: int = flag(500, "steps of linear warmup", low=0)
    lr_decay_iters: int | None = flag(None, "where the cosine ends; left out, at max_iters", low=1)
    weight_decay: float = flag(0.1, "on matrices only", low=0)
    beta1: float = flag(0.9, "AdamW's", low=0, below=1)
    beta2: float = flag(0.95, "AdamW's", low=0, below=1)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 does not clip", low=0)


@dataclass
class RunArgs:
    preset: str = flag("", "values that differ from the defaults, see below")
    out_dir: str = flag("model_weights/out", "the run's folder")
    eval_interval: int = flag(500, "steps between evaluations; each writes last.pt, and ckpt.pt where it is the best", low=1)
    checkpoint_minutes: float | None = flag(
        10.0, "minutes of training without an evaluation after which last.pt is written all the same", above=0
    )
    eval_iters: int = flag(100, "batches of --batch_size fixed validation windows in one evaluation", low=1)
    eval_only: bool = flag(False, "evaluate and stop; with --init_from resume it evaluates ckpt.pt and writes nothing")
    log_interval: int = flag(10, "steps between progress lines", low=1)
    device: str = flag("cuda", "cuda, cuda:1, cpu, mps")
    dtype: str = flag(
        "float16",
        "arithmetic of the forward pass; float16 trains with a GradScaler; auto measures which is fastest here",
        choices=("float32", "bfloat16", "float16", "auto"),
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

PRESETS = {}

# The baseline of the reference setup, on one RTX 3090: 4 x 4 x 2048 = 32,768 tokens a step, 10,000 steps = 328M tokens.
# Its authors report a validation loss of 3.44 on WikiText-103.
PRESETS["gpt2"] = dict()

# The schedule of experiments 10-13: 5,000 further steps of the same size = 164M tokens.
PRESETS["gpt2_finetune"] = PRESETS["gpt2"] | dict(
    max_iters=5000, eval_interval=200, learning_rate=5e-5, min_lr=1e-6, warmup_iters=100, weight_decay=0.01
)

# The same schedule for adapters: rank 32 of width 768, half of the smallest table's rank, 64.
PRESETS["gpt2_lora"] = PRESETS["gpt2_finetune"] | dict(lora_rank=32)

# Two CPU cores: 1 x 8 x 128 = 1,024 tokens a step, 1,000 steps = 1.0M tokens of data/sotu, about 3 minutes. No dropout,
# since there are fewer tokens than in the text. The token table is 1.05M of the 2.66M parameters. results/laptop_ranks and
# results/bytes/own_tables.md were made with it.
PRESETS["laptop_adamw"] = dict(
    block_size=128, n_layer=2, n_head=4, n_embd=256, dropout=0.0, dataset="sotu",
    batch_size=8, gradient_accumulation_steps=1, max_iters=1000, learning_rate=1e-3, min_lr=5e-5, warmup_iters=50,
    eval_interval=125, eval_iters=32, log_interval=50, device="cpu", dtype="float32", compile=False,
)  # fmt: skip

# Half as many further steps, as experiments 10-13 have, at half the rate and a tenth of the decay.
PRESETS["laptop_adamw_finetune"] = PRESETS["laptop_adamw"] | dict(
    max_iters=500, eval_interval=100, learning_rate=5e-4, min_lr=1e-5, warmup_iters=20, weight_decay=0.01
)

# Rank 8 of 256, as much of the width as the reference's, and no dropout here either.
PRESETS["laptop_adamw_lora"] = PRESETS["laptop_adamw_finetune"] | dict(lora_rank=8, lora_alpha=16, lora_dropout=0.0)

# The main job on two CPU cores: the same model, Muon, and two fifths of the steps. The rates were chosen on the last twentieth
# of the training text (results/speed): for a dense table 2e-2 and 4e-2 do as well, a table of rank 128 wants 2e-2.
PRESETS["laptop"] = PRESETS["laptop_adamw"] | dict(
    optimizer="muon", dtype="auto", max_iters=400, learning_rate=3e-3, muon_lr=0.02, table_lr=0.02, min_lr=0.0, warmup_iters=20,
    eval_interval=100,
)  # fmt: skip

# Half as many further steps, at a quarter of the rates: at half of them D ends where it began, it is undone first.
PRESETS["laptop_finetune"] = PRESETS["laptop"] | dict(
    max_iters=200, eval_interval=50, learning_rate=7.5e-4, muon_lr=5e-3, table_lr=5e-3, warmup_iters=10, weight_decay=0.01
)

# As many further steps. Adapters train by AdamW; its rate was not tuned.
PRESETS["laptop_lora"] = PRESETS["laptop_adamw_lora"] | dict(
    dtype="auto", max_iters=200, eval_interval=50, learning_rate=1e-3, warmup_iters=10
)

# Experiments 1-13 on two CPU cores: half the width, so that twice the steps fit into the same minutes (2.0M tokens, fewer
# than the text has), at four times the rate. Its table is fuller, so that what a rank costs and how it is chosen
# can be seen: ranks 8, 16, 32, 64 of 128 for the reference's 64, 128, 256, 512 of 768.
PRESETS["laptop13"] = PRESETS["laptop_adamw"] | dict(
    n_embd=128, max_iters=2000, learning_rate=4e-3, min_lr=2e-4, eval_interval=250
)

# Half as many further steps, as experiments 10-13 have, at half the rate and a tenth of the decay.
PRESETS["laptop13_finetune"] = PRESETS["laptop13"] | dict(
    max_iters=1000, eval_interval=125, learning_rate=2e-3, min_lr=4e-5, warmup_iters=20, weight_decay=0.01
)

# Rank 8 of 128: the reference's share of the width would be 5, and the smallest table has rank 8. Few numbers want a higher
# rate than all of them: at k = 8, seed 1, a rate of 5e-3 ends at 5.353 and 1e-2 at 5.346 (2e-3 with rank 4: 5.499).
PRESETS["laptop13_lora"] = PRESETS["laptop13_finetune"] | dict(
    learning_rate=5e-3, min_lr=1e-4, lora_rank=8, lora_alpha=16, lora_dropout=0.0
)

# Pythia-70M's shape, trained as in the seed's experiment with compressed values: 9,000 sequences of 128 tokens, 8 a step,
# 1,125 steps an epoch, at a constant rate, until three epochs have brought nothing (its logs stop there, not after one).
# One LayerNorm a block, as its authors have it; Pythia's own weights have two. They report a perplexity of about 442.
PRESETS["pythia70m"] = dict(
    block_size=128, n_layer=6, n_head=8, n_embd=512, dropout=0.0, rotary_pct=0.25, parallel_residual=True, norms_per_layer=1,
    tie_head=False, dataset="pile", batch_size=8, gradient_accumulation_steps=1, max_epochs=30, max_train_samples=9000,
    patience=3, learning_rate=1e-4, min_lr=1e-4, warmup_iters=0, weight_decay=0.01, eval_iters=125,
)  # fmt: skip

# Phase 1, v_compress and v_restore alone.
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
    """Returns (TrainArgs, the dict of flags that were given on the command line)."""
    args, given = parse(TrainArgs, argv, presets=PRESETS, description="Train or evaluate one GPT.", epilog=describe_presets())
    if args.init_from != "resume":  # the flags of a resumed run are in its checkpoint, see resume_args
        check_given(args, given)
        check(args)
    return args, given


def describe_presets():
    lines = [f"  {name}: {' '.join(f'--{k} {v}' for k, v in p.items()) or 'the defaults'}" for name, p in PRESETS.items()]
    return "presets:\n" + "\n".join(lines)
