"""
Train or evaluate one GPT.

    python train.py --preset laptop --dataset sotu --out_dir model_weights/gpt_baseline
    python train.py --out_dir model_weights/gpt_baseline                              # the gpt2 preset, on one GPU
    torchrun --standalone --nproc_per_node=2 train.py --out_dir ...                   # one run over two GPUs
    python train.py --init_from resume --out_dir model_weights/gpt_baseline           # continue a stopped run

Runs with the same flags and seed read the same text in the same order. The model, the number of GPUs and a resume do not
change that.
"""

from train_args import parse_args

args, given = parse_args()  # before torch is imported, so that --help answers at once

import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed import broadcast
from torch.nn.parallel import DistributedDataParallel

from training import checkpoint
from common.cli import fail, finish
from common.dataset import TrainingText
from training.device import (
    end_processes,
    ends_in_one_line,
    hardware,
    peak_flops,
    peak_memory,
    random_state,
    settle_dtype,
    start_processes,
)
from training.evaluate import Restored, evaluate
from training.optimizer import make_optimizer, skip_where
from training.progress import Progress
from training.run_folder import NoRunFolder, RunFolder
from training.start import begin
from training.stopping import Watch
from training.step import (
    Tally,
    autocast_of,
    of_any_process,
    split_for_ddp,
    spread,
    to_device,
    trained_flops,
    why_it_does_not_compile,
)

# -- start and device -------------------------------------------------------------------------------------------------

start = begin(args, given)
args, model, dataset = start.args, start.model, start.dataset
rank, world_size, device = start_processes(args)
device_type = device.split(":")[0]
args.dtype, dtype_reason = settle_dtype(args, device, world_size)
master = rank == 0  # this process evaluates, writes files and prints
autocast = autocast_of(device, args.dtype)

# -- data -------------------------------------------------------------------------------------------------------------

micro_steps = args.gradient_accumulation_steps // world_size
tokens_per_step = args.gradient_accumulation_steps * args.batch_size * args.block_size
text = TrainingText(dataset, args, start.epoch_steps, start.steps_before, rank, world_size)


def batch(step, micro):
    """Token ids (B, T) of a micro-step and the next tokens (B, T), on the device. Each process reads its own."""
    return to_device(map(torch.from_numpy, text.batch(step, micro)), device)


# -- objective --------------------------------------------------------------------------------------------------------

restored = None if args.v_proj_dim is None or args.v_proj_narrow else Restored(model)
criterion = "v_recon" if args.objective == "v_recon" else "val_loss"  # the best checkpoint has the lowest


def objective(x, y):
    """The training loss for token ids x (B, T) and the next tokens y (B, T)."""
    if args.objective == "v_recon":
        trainer(x)
        return spread(restored.loss())
    lm_loss = trainer(x, y)[1]
    return spread(lm_loss + args.v_recon_weight * restored.loss() if args.v_recon_weight else lm_loss)


# -- optimizer --------------------------------------------------------------------------------------------------------

with ends_in_one_line(args, device):
    model.to(device)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = make_optimizer(args, model)
scaler = torch.amp.GradScaler(device_type, enabled=args.dtype == "float16")


def learning_rate(step):
    """Linear warmup, then a cosine down to min_lr."""
    end = args.max_iters if args.lr_decay_iters is None else args.lr_decay_iters
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / (args.warmup_iters + 1)
    share = min((step - args.warmup_iters) / max(1, end - args.warmup_iters), 1)
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (args.learning_rate - args.min_lr)


# -- state of the run -------------------------------------------------------------------------------------------------

step, last_step, best = start.step, start.last_step, None  # best: the evaluation with the lowest criterion
torch.manual_seed(args.seed + rank)  # from here on: dropout, different in each process
if start.state:
    best = start.restore(optimizer, scaler, device, rank)
run = RunFolder(args, start.resumed_at) if start.writes and master else NoRunFolder()
progress = Progress(args, master, step, last_step, start.state, tokens_per_step)
tally = Tally(device, world_size, start.state if master else None)
if dtype_reason:
    progress.say(dtype_reason)
if start.state:
    progress.say(f"resuming {args.out_dir} at step {step}")
    start.state = None  # frees its memory
parameters = model.count_parameters()
progress.say(f"parameters: {', '.join(f'{group} {n:,}' for group, n in parameters.items())}")

# -- processes and compiling ------------------------------------------------------------------------------------------

trainer, compiled = model, args.compile and step < last_step  # a run that only evaluates is not compiled
if world_size > 1:
    trainer = DistributedDataParallel(model, device_ids=[device] if device_type == "cuda" else None)
    if compiled:
        split_for_ddp()


def first_pass():
    """Run one forward and backward pass, so that torch compiles the model."""
    trainer.require_backward_grad_sync = False
    model.compile()
    with autocast:
        loss = objective(*batch(step, 0))
    loss.backward()


if compiled:
    progress.say("compiling: this takes a minute or more")
    with progress.paused(), ends_in_one_line(args, device):
        why_not = of_any_process(why_it_does_not_compile(first_pass), world_size)
    optimizer.zero_grad(set_to_none=True)
    if why_not and given.get("compile"):
        fail(f"--compile: torch cannot compile here ({why_not}): drop --compile, or repair the compiler")
    if why_not:
        compiled, model._compiled_call_impl = False, None  # undoes compile(); torch has no call for that
        progress.say(
            f"torch cannot compile here ({why_not}): training without, which is slower. --no-compile skips the attempt"
        )
run.open()

# -- evaluating, saving, stopping -------------------------------------------------------------------------------------

flops_trained = trained_flops(model, args.block_size)  # per token
peak = peak_flops(device, args.dtype)


def peak_share(tokens_per_second):
    return tokens_per_second * flops_trained / (peak * world_size) if peak else None


def evaluation_now():
    return dict(iter=step, tokens=step * tokens_per_step) | evaluate(model, dataset, args, device, autocast, restored)


def evaluate_and_log():
    """Evaluate and log. Returns (this evaluation, the best so far)."""
    found = evaluation_now()
    stop_unless_finite(found["val_loss"])
    progress.say(
        f"step {step}: val loss {found['val_loss']:.4f}, "
        + (f"ppl {found['val_ppl']:.2f}, " if found["val_ppl"] < 10 * dataset.vocab_size else "worse than a guess, ")
        + f"ln_f cosine {found['ln_f_cosine']:.3f}, full {found['ln_f_cosine_full']:.3f}"
        + (f", error of restored values {found['v_recon']:.3g}" if restored else "")
    )
    run.log(step, seconds=progress.seconds, **{k: v for k, v in found.items() if k != "iter"})
    return found, found if best is None or found[criterion] <= best[criterion] else best


def keep(evaluated):
    """Write last.pt, and ckpt.pt if this is the best. evaluated: whether this step was just evaluated."""
    kept = tally.state | progress.state | random_state(device, world_size)  # every process must call these
    if master:
        facts = dict(args=asdict(args), iter_num=step, data_step=start.steps_before + step, tokens=step * tokens_per_step)
        facts |= dict(starts_from=start.starts_from, val_loss=evaluation["val_loss"] if evaluated else None)
        state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), best=best, evaluated=evaluated)
        state |= kept
        run.keep(model, facts, None if args.eval_only else state, evaluated and best["iter"] == step)
    watch.saved()


def patience_has_ended():
    """Whether the last `patience` evaluations brought no new best. The master decides and sends it to the other processes."""
    ended = torch.zeros((), dtype=torch.int, device=device)
    if master:
        ended += (step - best["iter"]) // args.eval_interval >= args.patience
    if world_size > 1:
        broadcast(ended, 0)
    return bool(ended)


def stop_unless_finite(val_loss):
    if not math.isfinite(val_loss):
        progress.say(f"step {step}: the validation loss is {val_loss}, stopping; {run.last_good()}", sys.stderr)
        sys.exit(1)


def stop_if_stuck(skipped, in_a_row):
    """Stop after many skipped steps in a row. A skipped step changes nothing, so the following ones would fail too."""
    if skipped:
        progress.say(f"step {step}: skipped {skipped} steps, because their loss or gradient was not finite", sys.stderr)
    if in_a_row >= tally.MOST:
        first = step - in_a_row
        place = ", ".join(map(str, text.starts(first)[:8]))
        progress.say(
            f"step {step}: {in_a_row} steps in a row had a loss or gradient that is not finite, stopping. The first was step "
            f"{first}, whose windows begin at tokens {place} of {dataset.folder / 'train.bin'}; {run.last_good()}",
            sys.stderr,
        )
        sys.exit(1)


# -- loop -------------------------------------------------------------------------------------------------------------

stopped, evaluation = False, None  # stopped: whether patience has ended
with ends_in_one_line(args, device), Watch(args, master, world_size) as watch:
    while True:
        # 1. the rate
        lr = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)  # checkpoints of older versions have no "rate"

        # 2. evaluate and save
        if step != start.evaluates_at and watch.asks_to_save(tally.in_a_row):  # --checkpoint_minutes are over, or a signal came
            with progress.paused():
                keep(evaluated=False)
            watch.leave(step)
        if step % args.eval_interval == 0 or step in (start.evaluates_at, last_step):
            with progress.paused():
                if master:
                    evaluation, best = evaluate_and_log()
                keep(evaluated=True)
            stopped = args.patience is not None and not args.eval_only and patience_has_ended()
        if step == last_step or stopped:
            break

        # 3. forward and backward
        for micro in range(micro_steps):
            x, y = batch(step, micro)
            trainer.require_backward_grad_sync = micro == micro_steps - 1  # a switch of DDP; a plain model ignores it
            with autocast:
                loss = objective(x, y)
            scaler.scale(loss / micro_steps).backward()
            tally.add(loss.detach() / micro_steps)

        # 4. clip, step, zero; a step with a gradient that is not finite is skipped
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.grad_clip or math.inf)
        skip_where(optimizer, tally.end_step(norm))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress.bar.update()

        # 5. log; only tally.read() waits for the device
        if step % args.log_interval == 0 or step == last_step:
            train_loss, skipped, in_a_row = tally.read(step - progress.logged_step)
            run.log(step, lr=lr, **progress.log(step, train_loss, peak_share), **(dict(skipped=skipped) if skipped else {}))
            stop_if_stuck(skipped, in_a_row)
progress.bar.close()
seconds = progress.seconds  # of training, without evaluations

# -- the best checkpoint, and the summary -----------------------------------------------------------------------------

last = evaluation
if run.writes and best["iter"] != step:
    with ends_in_one_line(args, device):
        model.load_state_dict(checkpoint.load(run.path / "ckpt.pt")["model"])
        evaluation = evaluation_now() | dict(iter=best["iter"], tokens=best["tokens"])
    progress.say(f"the best was step {best['iter']}: val loss {evaluation['val_loss']:.4f}, ppl {evaluation['val_ppl']:.2f}")
if master:
    summary = dict(
        run=Path(args.out_dir).name,
        seed=args.seed,
        preset=args.preset,
        dataset=dataset.folder.name,
        n_embd=args.n_embd,
        n_embd_wte=args.n_embd_wte,
        init_from=args.init_from,
        imported=args.import_wte_npy or None,
        starts_from=start.starts_from,
        parameters=parameters,
        parameters_trained=sum(p.numel() for p in trained),
        flops_per_token=model.flops_per_token(args.block_size),
        val_unigram_entropy=dataset.unigram_entropy(),
        eval_tokens=evaluation["eval_tokens"],
        best=best,
        final=evaluation,
        last=last,
        epoch_steps=start.epoch_steps,
        cache_widths=model.cache_widths(),
        tokens=step * tokens_per_step,
        tokens_per_step=tokens_per_step,
        seconds=seconds,
        tokens_per_second=step * tokens_per_step / seconds if step else None,
        compiled=compiled,
        peak_memory_bytes=peak_memory(device),
        hardware=hardware(device),
    )
    run.finish(summary)
    finish(out_dir=args.out_dir, **evaluation, **(dict(best=best) if run.writes else {}))
if world_size > 1:
    end_processes()
