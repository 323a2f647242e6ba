"""Where a run of train.py starts: its flags settled, its text, its model with weights, and how far an earlier run had come."""

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

# What last.pt has for a resume, besides what ckpt.pt has.
BEST = dict(iter=COUNT, tokens=COUNT, val_loss=float)
STATE = dict(best=BEST, seconds=float, optimizer=(dict, list), scaler={str: float}, rng=torch.Tensor)
STATE |= {"logged?": [COUNT, float], "tally?": [float, float, float], "other_rngs?": [dict(rng=torch.Tensor)]}

RESUMED = ("the state of a run", "go on from a copy of it, or start anew in another --out_dir")


@dataclass
class Start:
    """
    args          the flags; the previous run fills in the shape, the text the steps of an epoch
    dataset       what the run reads
    model         on the CPU, with its weights; requires_grad says which of them train
    epoch_steps   steps of an epoch, or None where the run counts steps
    steps_before  steps of text that the weights had read before step 0 of this run
    starts_from   dict(part, ckpt, tokens): which weights are trained already, where they are from, on how many tokens; or None
    step          where the run goes on; 0 for a new one
    evaluates_at  the step that it evaluates first, whatever it is; None where it goes on between two evaluations
    last_step     where it ends
    state         what a resume restores, the dict of last.pt; or None
    writes        false where it evaluates a run that is there, whose folder then stays as it is
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
        """The step at which the run goes on; None where it is new."""
        return self.step if self.state else None

    def restore(self, optimizer, scaler, device, rank):
        """Give a resumed run what last.pt has besides the weights -> the best evaluation."""
        with reading(Path(self.args.out_dir) / "last.pt", *RESUMED):
            resume_optimizer(optimizer, self.state["optimizer"])
            scaler.load_state_dict(self.state["scaler"])
            set_random_state(self.state, device, rank)
        return self.state["best"]


def begin(args, given):
    """
    The start of a run from scratch, from factors, from a previous run, or from where it stopped.

    given: the flags that were given on the command line.
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
        fail(f"--max_iters {last_step} lies before step {step}, where {args.out_dir} stopped: raise it")
    return Start(
        args=args,
        dataset=dataset,
        model=model,
        epoch_steps=epoch_steps,
        # a new run goes on in the text where the run of its weights stopped, rather than read the beginning again
        steps_before=previous["data_step"] - step if previous else 0,
        starts_from=starts_from,
        step=step,
        evaluates_at=step if not goes_on or previous.get("evaluated", True) else None,  # older versions saved at evaluations
        last_step=last_step,
        state=previous if goes_on else None,
        writes=goes_on or not resuming,
    )


def read_stopped(args, given):
    """What a run left behind: last.pt to go on with, ckpt.pt to evaluate -> (its dict, its flags)."""
    hint = "start the run without --init_from resume, or give the --out_dir of one that was started"
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
    """The file to go on with: last.pt, or the one before it where that is damaged."""
    last, previous = folder / "last.pt", folder / PREVIOUS
    if checkpoint.is_whole(last) or not (last.exists() or previous.exists()):
        return last
    state = "damaged" if last.exists() else "missing"
    if not checkpoint.is_whole(previous):
        fail(f"{last} is {state}, and so is {PREVIOUS}: delete {folder} and start the run again")
    print(f"{last} is {state}: going on from {PREVIOUS}", file=sys.stderr)
    return previous


def read_previous(args, given):
    """The run whose weights the new one starts with -> (its dict, the new run's flags with its shape)."""
    hint = "train it first: scripts/train_baseline_gpt2.sh makes gpt_baseline, train_lowrank_scratch.sh gpt_lowrank_scratch_k*"
    previous = checkpoint.load(args.prev_run_ckpt, hint=hint)
    args = replace(args, **checkpoint.previous_shape(previous, args, given))
    check_shape(args)
    return previous, args


def count_epochs(args, dataset):
    """Epochs in steps -> (the flags, steps of an epoch or None)."""
    if args.max_epochs is None:
        return args, None
    step_size = args.gradient_accumulation_steps * args.batch_size
    epoch_steps = dataset.epoch_steps(step_size, args.block_size, args.max_train_samples)
    args = replace(args, max_iters=args.max_epochs * epoch_steps, eval_interval=epoch_steps)
    check_schedule(args)
    return args, epoch_steps


def new_model(args, dataset, previous):
    """A model from scratch, from factors, from a previous run, or from both -> (model, starts_from)."""
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
    except ValueError as error:  # an adapter raises it and names the matrix
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
    """Set requires_grad: adapters alone where there are adapters, else what the freezing flags leave."""
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
