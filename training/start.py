"""The start of a train.py run: final flags, text, model with weights, and the step at which training starts."""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from common.cli import fail
from common.dataset import Dataset
from common.untrusted import COUNT, expect, expect_fields, reading
from model import GPT, GPTConfig
from training import checkpoint
from training.device import set_random_state
from training.factor_files import read_factors, read_facts
from training.optimizer import resume_optimizer
from training.rules import check_schedule, check_shape, resume_args, trained_names, without_gone
from training.run_folder import PREVIOUS

# Entries that last.pt has for a resume, in addition to those of ckpt.pt.
BEST = dict(iter=COUNT, tokens=COUNT, val_loss=float)
STATE = dict(best=BEST, seconds=float, optimizer=(dict, list), scaler={str: float}, rng=torch.Tensor)
STATE |= {"logged?": [COUNT, float], "tally?": [float, float, float], "other_rngs?": [dict(rng=torch.Tensor)]}

RESUMED = ("the state of a run", "resume from a copy of it, or start a new run in another --out_dir")


@dataclass
class Start:
    """
    args          the flags, with the shape of the previous run and the steps of an epoch filled in
    dataset       the text of the run
    model         on the CPU, with its weights; requires_grad marks those that train
    epoch_steps   steps per epoch, or None if the run counts steps
    steps_before  steps of text that trained the weights before step 0 of this run
    starts_from   dict(part, ckpt, tokens): which weights are already trained, their file, the tokens they saw; or None
    step          the step at which the run starts; 0 for a new run
    evaluates_at  the step of the first evaluation, even off the schedule; None if the resume starts between two evaluations
    last_step     the step at which the run ends
    state         the dict of last.pt, which a resume restores; or None
    writes        false if it only evaluates an existing run, whose folder then stays unchanged
    """

    args: object
    dataset: Dataset
    model: GPT
    epoch_steps: int | None
    steps_before: int
    starts_from: dict | None
    step: int
    evaluates_at: int | None
    last_step: int
    state: dict | None
    writes: bool

    @property
    def resumed_at(self):
        """The step at which a resumed run continues; None for a new run."""
        return self.step if self.state else None

    def restore(self, optimizer, scaler, device, rank):
        """Restore optimizer, scaler and random state from last.pt. Returns the best evaluation."""
        with reading(Path(self.args.out_dir) / "last.pt", *RESUMED):
            resume_optimizer(optimizer, self.state["optimizer"])
            scaler.load_state_dict(self.state["scaler"])
            set_random_state(self.state, device, rank)
        return self.state["best"]


def begin(args, given):
    """
    Prepare a run from scratch, from factors, from a previous run, or from the last step of a stopped run.

    given: the flags on the command line.
    """
    resuming, previous = args.init_from == "resume", None
    if resuming:
        previous, args = read_stopped(args, given)
    elif args.init_from == "prev_run":
        previous, args = read_previous(args, given)
    dataset = Dataset(args.dataset)
    dataset.check_block_size(args.block_size)
    args, epoch_steps = count_epochs(args, dataset)
    if previous and previous["config"]["vocab_size"] != dataset.vocab_size:
        fail(
            f"--dataset {args.dataset} has {dataset.vocab_size} ids, the checkpoint {previous['config']['vocab_size']}: "
            "give the dataset that it was trained on"
        )
    torch.manual_seed(args.seed)
    if resuming:
        model, starts_from = checkpoint.build(previous), previous["starts_from"]
    else:
        model, starts_from = new_model(args, dataset, previous)
    choose_trained(model, args)
    goes_on = resuming and not args.eval_only
    step = previous["iter_num"] if resuming else 0
    last_step = args.max_iters if goes_on else step if resuming else 0 if args.eval_only else args.max_iters
    if step > last_step:
        fail(f"--max_iters {last_step} is less than step {step}, at which {args.out_dir} stopped: raise it")
    return Start(
        args=args,
        dataset=dataset,
        model=model,
        epoch_steps=epoch_steps,
        # a new run continues the text of the previous run, instead of reading the beginning again
        steps_before=previous["data_step"] - step if previous else 0,
        starts_from=starts_from,
        step=step,
        evaluates_at=step
        if not goes_on or previous.get("evaluated", True)
        else None,  # older versions saved only at evaluations
        last_step=last_step,
        state=previous if goes_on else None,
        writes=goes_on or not resuming,
    )


def read_stopped(args, given):
    """Load a stopped run: last.pt to resume it, ckpt.pt to evaluate it. Returns (the dict, the flags)."""
    hint = "drop --init_from resume to start the run, or give the --out_dir of a run that was started"
    path = Path(args.out_dir) / "ckpt.pt" if args.eval_only else whole_last(Path(args.out_dir))
    previous = checkpoint.load(path, hint=hint)
    with reading(path, *RESUMED):
        previous["args"] = without_gone(previous["args"])
        expect_fields(previous["args"], type(args))
        for name in (*checkpoint.SHAPE, "n_embd_wte", "k_proj_dim", "v_proj_dim"):
            if name in previous["args"] and previous["args"][name] != previous["config"].get(name):
                raise ValueError(f"its flags have {name} {previous['args'][name]}, its model {previous['config'].get(name)}")
        if not args.eval_only:
            expect(previous, STATE)
    return previous, resume_args(previous["args"], given, type(args))


def whole_last(folder):
    """The file to resume from: last.pt, or the previous one if last.pt is damaged or missing."""
    last, previous = folder / "last.pt", folder / PREVIOUS
    if checkpoint.is_whole(last) or not (last.exists() or previous.exists()):
        return last
    state = "damaged" if last.exists() else "missing"
    if not checkpoint.is_whole(previous):
        fail(f"{last} is {state}, and so is {PREVIOUS}: delete {folder} and start the run again")
    print(f"{last} is {state}: resuming from {PREVIOUS}", file=sys.stderr)
    return previous


def read_previous(args, given):
    """Load the run whose weights the new run starts with. Returns (its dict, the new run's flags with its shape)."""
    hint = "train it first: scripts/train_baseline_gpt2.sh makes gpt_baseline, train_lowrank_scratch.sh gpt_lowrank_scratch_k*"
    previous = checkpoint.load(args.prev_run_ckpt, hint=hint)
    args = replace(args, **checkpoint.previous_shape(previous, args, given))
    check_shape(args)
    return previous, args


def count_epochs(args, dataset):
    """Convert --max_epochs to steps. Returns (the flags, steps per epoch or None)."""
    if args.max_epochs is None:
        return args, None
    step_size = args.gradient_accumulation_steps * args.batch_size
    epoch_steps = dataset.epoch_steps(step_size, args.block_size, args.max_train_samples)
    args = replace(args, max_iters=args.max_epochs * epoch_steps, eval_interval=epoch_steps)
    check_schedule(args)
    return args, epoch_steps


def new_model(args, dataset, previous):
    """Make a model from scratch, from factors, from a previous run, or from both. Returns (model, starts_from)."""
    factors, starts_from = None, None
    if args.import_wte_npy:
        files, shape = (args.import_wte_npy, args.import_scale_matrices_npz), (args.n_embd_wte, args.n_embd)
        factors = read_factors(*files, dataset.vocab_size, *shape, tied=args.n_embd_wte_scale_tying)
        tokens = read_facts(args.import_wte_npy).get("ckpt_tokens")
        starts_from = dict(part="token table", ckpt=args.import_wte_npy, tokens=tokens)
    if factors:
        mean = factors["mean"] is not None
    else:
        mean = bool(previous) and previous["config"].get("n_embd_wte_mean", False)
    shape = {f.name: getattr(args, f.name) for f in fields(GPTConfig) if hasattr(args, f.name)}
    try:
        model = GPT(GPTConfig(vocab_size=dataset.vocab_size, n_embd_wte_mean=mean, **shape))
    except ValueError as error:  # from an adapter, which names the matrix
        if args.lora_rank is None:
            raise
        fail(f"--lora_rank {args.lora_rank} --lora_targets {args.lora_targets}: {error}")
    if previous:
        checkpoint.start_from(model, previous, args.prev_run_ckpt, factors)
        earlier = (previous.get("starts_from") or dict(tokens=0))["tokens"]
        tokens = None if None in (earlier, previous["tokens"]) else earlier + previous["tokens"]
        starts_from = dict(part="all weights", ckpt=args.prev_run_ckpt, tokens=tokens)
    elif factors:
        model.import_factors(**factors)
    return model, starts_from


def choose_trained(model, args):
    """Set requires_grad. With adapters, only these train; otherwise all weights that no flag freezes."""
    t = model.transformer
    t.wte.requires_grad_(not args.import_wte_freeze)
    for scale in (t.scale_up, t.scale_down):
        scale.requires_grad_(not args.import_scale_matrices_freeze)
    if args.lora_rank is not None:
        for name, p in model.named_parameters():
            p.requires_grad_(checkpoint.is_adapter(name))
    trained = trained_names(args, [name for name, _ in model.named_parameters()])
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and name in trained)
