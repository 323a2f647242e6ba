"""
Train or evaluate one GPT.

    python train.py --preset laptop --dataset sotu --out_dir model_weights/gpt_baseline
    python train.py --out_dir model_weights/gpt_baseline                              # the gpt2 preset, on one GPU
    torchrun --standalone --nproc_per_node=2 train.py --out_dir ...                   # one run over two GPUs
    python train.py --init_from resume --out_dir model_weights/gpt_baseline           # go on where it stopped

The same flags and seed read the same text in the same order, whatever the model, however many cards, resumed or not.
"""

from train_args import check_schedule, check_shape, parse_args, resume_args, trained_names

args, given = parse_args()  # before torch is imported, so that --help answers at once

import math
import os
import resource
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import all_reduce, broadcast, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint
from common.cli import fail, finish
from common.dataset import Dataset
from common.evaluate import Restored, evaluate
from model import GPT, GPTConfig
from common.run_folder import RunFolder, hardware
from util_factorization.factor_files import read_factors, read_facts

# -- flags ------------------------------------------------------------------------------------------------------------

resuming, previous = args.init_from == "resume", None
if resuming:
    out = Path(args.out_dir)
    mend = "start the run without --init_from resume, or give the --out_dir of one that was started"
    base_files = {name: given[name] for name in checkpoint.BASE_FILES if name in given}
    previous = checkpoint.load(out / ("ckpt.pt" if args.eval_only else "last.pt"), mend=mend, **base_files)
    args = resume_args(previous["args"], given)
elif args.init_from == "prev_run":
    mend = (
        "train it first (scripts/train_baseline_gpt2.sh trains gpt_baseline, train_lowrank_scratch.sh gpt_lowrank_scratch_k*)"
    )
    previous = checkpoint.load(args.prev_run_ckpt, mend=mend)
    args = replace(args, **checkpoint.previous_shape(previous, args, given))
    check_shape(args)
# Weights that come from another run go on in the text where they stopped, rather than read its beginning again.
steps_before = previous["data_step"] - (previous["iter_num"] if resuming else 0) if previous else 0
writes = not (resuming and args.eval_only)  # evaluating a run that is there changes nothing in its folder

# -- device -----------------------------------------------------------------------------------------------------------

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
if args.gradient_accumulation_steps % world_size:
    fail(f"--gradient_accumulation_steps {args.gradient_accumulation_steps} does not divide over {world_size} processes")
device, device_type = args.device, args.device.split(":")[0]
if device_type == "cuda":
    if not torch.cuda.is_available():
        fail(f"--device {args.device}, but no CUDA device is here: give --preset laptop, or --device cpu --dtype float32")
    if device == "cuda" or world_size > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if int(device.split(":")[1]) >= torch.cuda.device_count():
        fail(f"--device {device}, but {torch.cuda.device_count()} CUDA devices are visible: give a lower number")
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 where something stays in float32
if world_size > 1:
    init_process_group("nccl" if device_type == "cuda" else "gloo")
master = rank == 0
say = print if master else lambda *_, **__: None
if device_type == "mps" and not torch.backends.mps.is_available():
    fail("--device mps, but this machine has none: give --device cpu")
dtype = getattr(torch, args.dtype)
autocast = nullcontext() if args.dtype == "float32" else torch.autocast(device_type, dtype)
torch.manual_seed(args.seed)
hardware_name = hardware(device)

# -- data -------------------------------------------------------------------------------------------------------------

dataset = Dataset(args.dataset)
dataset.check_block_size(args.block_size)
micro_steps = args.gradient_accumulation_steps // world_size
step_size = args.gradient_accumulation_steps * args.batch_size  # windows
tokens_per_step = step_size * args.block_size
epoch_steps = None
if args.max_epochs is not None:
    epoch_steps = dataset.epoch_steps(step_size, args.block_size, args.max_train_samples)
    args = replace(args, max_iters=args.max_epochs * epoch_steps, eval_interval=epoch_steps)
    check_schedule(args)


def batch(step, micro):
    """Windows of this process's micro-step: (B, T) token ids and the (B, T) that follow them."""
    place, size = micro * world_size + rank, (args.batch_size, args.block_size)
    if args.max_epochs is None:
        x, y = dataset.batch(*size, args.seed, steps_before + step, place)
    else:
        epoch, within = divmod(step, epoch_steps)
        place = within * step_size + place * args.batch_size
        x, y = dataset.epoch_batch(*size, args.max_train_samples, place, args.seed, steps_before + epoch)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if device_type == "cuda":  # pinned memory lets the copy overlap with the step before
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


@contextmanager
def ends_in_one_line():
    """What may stop a run from outside: an impatient user, a device that is too small."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted: --init_from resume goes on from the last evaluation", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:  # torch has a class of its own for CUDA only
        words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(w in str(error) for w in words):
            raise
        fail(f"out of memory on {hardware_name}: lower --batch_size {args.batch_size} or --block_size {args.block_size}")


# -- model ------------------------------------------------------------------------------------------------------------

if previous and previous["config"]["vocab_size"] != dataset.vocab_size:
    fail(f"--dataset {args.dataset} has {dataset.vocab_size} ids, the checkpoint {previous['config']['vocab_size']}")
factors = None
if args.import_wte_npy and not resuming:
    factors = read_factors(
        args.import_wte_npy,
        args.import_scale_matrices_npz,
        *(dataset.vocab_size, args.n_embd_wte, args.n_embd),
        tied=args.n_embd_wte_scale_tying,
    )
if resuming:
    model = checkpoint.build(previous)
else:
    shape = {f.name: getattr(args, f.name) for f in fields(GPTConfig) if hasattr(args, f.name)}
    if factors:
        mean = factors["mean"] is not None
    else:
        mean = bool(previous) and previous["config"].get("n_embd_wte_mean", False)
    try:
        model = GPT(GPTConfig(vocab_size=dataset.vocab_size, n_embd_wte_mean=mean, **shape))
    except ValueError as error:  # its message names the matrix
        if args.lora_rank is None:
            raise
        fail(f"--lora_rank {args.lora_rank} --lora_targets {args.lora_targets}: {error}")
    if previous:
        checkpoint.start_from(model, previous, args.prev_run_ckpt, factors)
    elif factors:
        model.import_factors(**factors)
with ends_in_one_line():
    model.to(device)
model.transformer.wte.requires_grad_(not args.import_wte_freeze)
for scale in (model.transformer.scale_up, model.transformer.scale_down):
    scale.requires_grad_(not args.import_scale_matrices_freeze)
if args.lora_rank is not None:
    for name, p in model.named_parameters():
        p.requires_grad_(checkpoint.is_adapter(name))
trains = trained_names(args, [name for name, _ in model.named_parameters()])
for name, p in model.named_parameters():
    p.requires_grad_(p.requires_grad and name in trains)
base = checkpoint.base_of(model, args) if args.save_adapters_only else None
parameters = model.count_parameters()
say(f"parameters: {', '.join(f'{group} {n:,}' for group, n in parameters.items())}")

# -- objective ---------------------------------------------------------------------------------------------------------

restored = None if args.v_proj_dim is None or args.v_proj_narrow else Restored(model)
criterion = "v_recon" if args.objective == "v_recon" else "val_loss"  # what the best checkpoint has least of


def objective(lm_loss):
    """The loss of a forward pass that has just given this cross-entropy."""
    if args.objective == "v_recon":
        return restored.loss()
    return lm_loss + args.v_recon_weight * restored.loss() if args.v_recon_weight else lm_loss


# -- optimizer --------------------------------------------------------------------------------------------------------

trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(
    [
        dict(params=[p for p in trained if p.dim() >= 2], weight_decay=args.weight_decay),
        dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0),  # biases and LayerNorms
    ],
    lr=args.learning_rate,
    betas=(args.beta1, args.beta2),
    fused=device_type in ("cuda", "cpu"),
)
scaler = torch.amp.GradScaler(device_type, enabled=args.dtype == "float16")


def learning_rate(step):
    """Linear warmup, then a cosine down to min_lr."""
    end = args.max_iters if args.lr_decay_iters is None else args.lr_decay_iters
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / (args.warmup_iters + 1)
    share = min((step - args.warmup_iters) / max(1, end - args.warmup_iters), 1)
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (args.learning_rate - args.min_lr)


# -- where the run stands ---------------------------------------------------------------------------------------------

last_step = 0 if args.eval_only else args.max_iters
torch.manual_seed(args.seed + rank)  # from here on it draws the dropout, another one in every process
step, best, seconds = 0, None, 0.0  # best: the evaluation with the lowest val_loss; seconds: spent on training steps
if resuming and args.eval_only:
    step = last_step = previous["iter_num"]
elif resuming:
    step, best, seconds = previous["iter_num"], previous["best"], previous["seconds"]
    optimizer.load_state_dict(previous["optimizer"])
    scaler.load_state_dict(previous["scaler"])
    if master:
        torch.set_rng_state(previous["rng"])
        if device_type == "cuda" and previous["cuda_rng"] is not None:
            torch.cuda.set_rng_state(previous["cuda_rng"], device)
    say(f"resuming {args.out_dir} at step {step}")
    if step > last_step:
        fail(f"--max_iters {last_step} lies before step {step}, where {args.out_dir} stopped: raise it")
starts_from = None  # what the run did not have to learn, and how many tokens that had cost
if resuming:
    starts_from = previous["starts_from"]
elif previous:
    earlier = (previous.get("starts_from") or dict(tokens=0))["tokens"]
    cost = None if None in (earlier, previous["tokens"]) else earlier + previous["tokens"]
    starts_from = dict(part="all weights", ckpt=args.prev_run_ckpt, tokens=cost)
elif factors:
    starts_from = dict(part="token table", ckpt=args.import_wte_npy, tokens=read_facts(args.import_wte_npy).get("ckpt_tokens"))
run = RunFolder(args, step if resuming else None) if writes and master else None
previous = factors = None  # free their memory

if args.compile:
    say("compiling: the first step takes a minute or more")
    model.compile()
trainer = DistributedDataParallel(model, device_ids=[device] if device_type == "cuda" else None) if world_size > 1 else model

# Dense half-precision peaks with float32 accumulation, in TFLOP/s, from the vendors' data sheets.
PEAKS = {"RTX 3090": 71, "RTX 4090": 165, "A100": 312, "H100 80GB HBM3": 989, "H200": 989}
peak = next((p for name, p in PEAKS.items() if name in hardware_name and args.dtype != "float32"), None)
# Forward, as much again for the gradient of what passes through, and for that of the weights as far as they train.
trained_share = sum(p.numel() for p in trained) / parameters["total"]
flops_per_step = (2 + trained_share) * model.flops_per_token(args.block_size)["total"] * tokens_per_step


def save_checkpoints(evaluation):
    """last.pt, and ckpt.pt where the evaluation is the best so far. Returns the best."""
    facts = dict(args=asdict(args), iter_num=step, data_step=steps_before + step, tokens=step * tokens_per_step)
    facts |= dict(starts_from=starts_from, val_loss=evaluation["val_loss"])
    # last.pt first, and an equal loss is the best too: a resume after a crash between the two writes ckpt.pt again
    is_best = best is None or evaluation[criterion] <= best[criterion]
    if not args.eval_only:
        state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), rng=torch.get_rng_state())
        state |= dict(cuda_rng=torch.cuda.get_rng_state(device) if device_type == "cuda" else None)
        state |= dict(best=evaluation if is_best else best, seconds=seconds)
        checkpoint.save(run.path / "last.pt", model, base, **facts, **state)
    if is_best:
        checkpoint.save(run.path / "ckpt.pt", model, base, **facts)
    return evaluation if is_best else best


def evaluation_now():
    return dict(iter=step, tokens=step * tokens_per_step) | evaluate(model, dataset, args, device, autocast, restored)


def peak_memory():
    """Bytes: the device's peak, or the process's where that is the CPU."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stop_unless_finite(name, value):
    if not math.isfinite(value):
        say(f"step {step}: the {name} is {value}, stopping; {args.out_dir} keeps its last good checkpoints", file=sys.stderr)
        sys.exit(1)


# -- loop -------------------------------------------------------------------------------------------------------------

loss_sum = torch.zeros((), device=device)  # of the steps since the last progress line, on the device
stopped = False  # whether patience has run out
first_step = logged_step = step
logged_seconds, evaluation = seconds, None
started = time.time() - seconds  # moved on by every evaluation, so that time.time() - started is spent on training steps
with ends_in_one_line():
    while True:
        # 1. the rate
        lr = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 2. evaluate and save
        if step % args.eval_interval == 0 or step in (first_step, last_step):
            paused = time.time()
            seconds = paused - started
            if master:
                evaluation = evaluation_now()
                stop_unless_finite("validation loss", evaluation["val_loss"])
                say(
                    f"step {step}: val loss {evaluation['val_loss']:.4f}, ppl {evaluation['val_ppl']:.2f}, "
                    f"ln_f cosine {evaluation['ln_f_cosine']:.3f}, full {evaluation['ln_f_cosine_full']:.3f}"
                    + (f", values restored to {evaluation['v_recon']:.3g}" if restored else "")
                )
                if writes:
                    run.log(step, seconds=seconds, **{k: v for k, v in evaluation.items() if k != "iter"})
                    best = save_checkpoints(evaluation)
            started += time.time() - paused
            if args.patience is not None and not args.eval_only:
                stopped = master and (step - best["iter"]) // args.eval_interval >= args.patience
                if world_size > 1:  # the other processes have not evaluated
                    told = torch.tensor(int(stopped), device=device)
                    broadcast(told, 0)
                    stopped = bool(told)
        if step == last_step or stopped:
            break

        # 3. forward and backward
        for micro in range(micro_steps):
            x, y = batch(step, micro)
            trainer.require_backward_grad_sync = micro == micro_steps - 1  # DDP's own switch; a plain model ignores it
            with autocast:
                loss = objective(trainer(x, y)[1])
            scaler.scale(loss / micro_steps).backward()
            loss_sum += loss.detach() / micro_steps

        # 4. clip, step, zero
        if args.grad_clip > 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, args.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # 5. log; reading the loss is the only wait for the device
        if step % args.log_interval == 0 or step == last_step:
            if world_size > 1:
                all_reduce(loss_sum)
            train_loss = loss_sum.item() / world_size / (step - logged_step)
            stop_unless_finite("training loss", train_loss)
            seconds = time.time() - started
            tokens_per_second = (step - logged_step) * tokens_per_step / (seconds - logged_seconds)
            share = tokens_per_second / tokens_per_step * flops_per_step / (peak * 1e12 * world_size) if peak else None
            left = timedelta(seconds=round((last_step - step) * tokens_per_step / tokens_per_second))
            say(
                f"step {step}/{last_step}: loss {train_loss:.4f}, {tokens_per_second:,.0f} tokens/s, "
                + (f"{share:.0%} of the peak, " if peak else "")
                + f"{left} left"
            )
            if master:
                values = dict(train_loss=train_loss, lr=lr, tokens_per_second=tokens_per_second)
                run.log(step, **values | (dict(peak_share=share) if peak else {}))
            loss_sum.zero_()
            logged_step, logged_seconds = step, seconds

# -- the best checkpoint ----------------------------------------------------------------------------------------------

last = evaluation
if master and writes and best["iter"] != step:
    with ends_in_one_line():
        model.load_state_dict(checkpoint.load(run.path / "ckpt.pt")["model"])
        evaluation = evaluation_now() | dict(iter=best["iter"], tokens=best["tokens"])
    say(f"the best was step {best['iter']}: val loss {evaluation['val_loss']:.4f}, ppl {evaluation['val_ppl']:.2f}")

# -- summary ----------------------------------------------------------------------------------------------------------

if master and writes:
    trained_tokens = step * tokens_per_step
    run.finish(
        dict(
            run=run.path.name,
            seed=args.seed,
            preset=args.preset,
            dataset=dataset.folder.name,
            n_embd=args.n_embd,
            n_embd_wte=args.n_embd_wte,
            init_from=args.init_from,
            imported=args.import_wte_npy or None,
            starts_from=starts_from,
            parameters=parameters,
            parameters_trained=sum(p.numel() for p in trained),
            flops_per_token=model.flops_per_token(args.block_size),
            val_unigram_entropy=dataset.unigram_entropy(),
            eval_tokens=evaluation["eval_tokens"],
            best=best,
            final=evaluation,
            last=last,
            epoch_steps=epoch_steps,
            cache_widths=model.cache_widths(),
            tokens=trained_tokens,
            tokens_per_step=tokens_per_step,
            seconds=seconds,
            tokens_per_second=trained_tokens / seconds if step else None,
            peak_memory_bytes=peak_memory(),
            hardware=hardware_name,
        )
    )
if master:
    finish(out_dir=args.out_dir, **evaluation, **(dict(best=best) if writes else {}))
if world_size > 1:
    destroy_process_group()
