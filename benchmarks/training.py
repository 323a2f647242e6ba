"""Measures a training step: its speed as a task of common/timing.py, its parts, its memory, and the machine's matrix rate."""

import gc
import io
import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.nanogpt import nanogpt
from common.cli import fail
from common.dataset import Dataset, TrainingText, write_dataset
from common.timing import by_turns, spread
from model import GPTConfig
from training.checkpoint import move_to
from training.device import matrix_rate, peak_memory, wait_for
from training.optimizer import make_optimizer
from training.start import begin
from training.step import autocast_of, to_device, trained_flops

PARTS = ("data", "forward", "loss", "backward", "clip", "optimizer")
TOKENS = 2**20  # length of the random text: 2 MB


def write_text(folder, vocab_size, block_size):
    """Write a dataset of random ids. The time of a step does not depend on the text."""
    ids = np.random.default_rng(0).integers(vocab_size, size=max(TOKENS, 2 * block_size))
    write_dataset(folder, ids, ids[: block_size + 1], dict(vocab_size=vocab_size, tokenizer="none"))


def tokens_of(args):
    """Tokens of one step."""
    return args.gradient_accumulation_steps * args.batch_size * args.block_size


class PartsTimer:
    """Measures milliseconds of each part of a step. It waits for the device after each part, which makes the step slower."""

    def __init__(self, device):
        self.device, self.steps, self.ms = device, 0, {}  # ms: {part: [a number for each step]}

    def start(self):
        """Begin a step."""
        self.steps += 1
        wait_for(self.device)
        self.last = time.perf_counter()

    def __call__(self, part):
        wait_for(self.device)
        now, found = time.perf_counter(), self.ms.setdefault(part, [])
        if len(found) < self.steps:
            found.append(0.0)
        found[-1] += 1000 * (now - self.last)  # summed over the micro-steps of a step
        self.last = now


def untimed(part):
    """Replaces a PartsTimer if the entire step is timed."""


class Trainee:
    """A model set up for training as in train.py. Steps in several dtypes share it, since its weights are always float32."""

    def __init__(self, args):
        """args: TrainArgs. Its dataset is a folder of write_text()."""
        start = begin(args, {})
        self.args, self.device, self.tokens = args, args.device, tokens_of(args)
        self.model = move_to(start.model, args.device).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(args, self.model)
        self.text = TrainingText(start.dataset, args, None, 0, 0, 1)
        self.flops_per_token = self.model.flops_per_token(args.block_size)
        self.trained_flops = trained_flops(self.model, args.block_size)
        torch.manual_seed(args.seed)  # for dropout, as in train.py


class Step:
    """The step of train.py at a constant rate: a task of common/timing.py, in one dtype."""

    def __init__(self, trainee, dtype, compiled=False, steps=1):
        self.trainee, self.compiled, self.steps, self.done = trainee, compiled, steps, 0
        self.autocast = autocast_of(trainee.device, dtype)
        self.scaler = torch.amp.GradScaler(trainee.device.split(":")[0], enabled=dtype == "float16")
        self.forward = torch.compile(trainee.model) if compiled else trainee.model
        self.timer = PartsTimer(trainee.device)

    def run(self):
        for _ in range(self.steps):
            self.step()
        wait_for(self.trainee.device)

    def run_in_parts(self):
        """Run the same number of steps with each part timed by self.timer."""
        for _ in range(self.steps):
            self.timer.start()
            self.step(self.timer)

    def part_ms(self):
        """Median ms of each part, without the warm-up run. A compiled forward pass includes the loss."""
        return {part: median(found[self.steps :] or found) for part, found in self.timer.ms.items()}

    def step(self, after=untimed):
        """Run one step -> its loss, on the device. after(part) is called at the end of each part."""
        t, loss_sum = self.trainee, 0.0
        micro_steps = t.args.gradient_accumulation_steps
        for micro in range(micro_steps):
            x, y = to_device(map(torch.from_numpy, t.text.batch(self.done, micro)), t.device)
            after("data")
            with self.autocast:
                if after is untimed or self.compiled:
                    loss = self.forward(x, y)[1]
                    after("forward")
                else:  # the two halves of GPT.forward()
                    h = t.model.hidden(x)
                    after("forward")
                    loss = t.model.loss(h, y)
                    after("loss")
            self.scaler.scale(loss / micro_steps).backward()
            loss_sum += loss.detach() / micro_steps
            after("backward")
        if t.args.grad_clip > 0:
            self.scaler.unscale_(t.optimizer)
            torch.nn.utils.clip_grad_norm_(t.trained, t.args.grad_clip)
        after("clip")
        self.scaler.step(t.optimizer)
        self.scaler.update()
        t.optimizer.zero_grad(set_to_none=True)
        after("optimizer")
        self.done += 1
        return loss_sum


# -- nanoGPT ----------------------------------------------------------------------------------------------------------


def nanogpt_default(device):
    """(dtype, compiled, fused) of nanoGPT's train.py. On a CPU: as its README recommends, without the compiler."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16", True, True
    return "float32", False, False  # on a CPU it has no autocast; it fuses AdamW only on GPUs


class NanoGPT:
    """The model of a nanoGPT checkout, set up for training, with the shape of our dense model. Its steps share it."""

    def __init__(self, folder, args):
        """args: TrainArgs of the dense model. Its dataset is a folder of write_text()."""
        dataset = Dataset(args.dataset)
        shape = {f.name: getattr(args, f.name) for f in fields(GPTConfig) if hasattr(args, f.name)}
        torch.manual_seed(args.seed)
        model = nanogpt(folder, GPTConfig(vocab_size=dataset.vocab_size, **shape))
        self.args, self.device, self.tokens = args, args.device, tokens_of(args)
        self.model = move_to(model, args.device).train()
        self.ids = dataset.folder / "train.bin", dataset.train.dtype
        self.optimizers = {}  # {fused: optimizer}

    def optimizer(self, fused):
        if fused not in self.optimizers:
            a = self.args
            with redirect_stdout(io.StringIO()):  # it prints the decayed tensors
                self.optimizers[fused] = self.model.configure_optimizers(
                    a.weight_decay, a.learning_rate, (a.beta1, a.beta2), "cuda" if fused else "cpu"
                )  # it fuses AdamW if device_type is "cuda"
        return self.optimizers[fused]

    def batch(self):
        """A copy of nanoGPT's get_batch(): a new memmap for each batch, two int64 tensors (B, T)."""
        path, dtype = self.ids
        B, T = self.args.batch_size, self.args.block_size
        data = np.memmap(path, dtype=dtype, mode="r")
        starts = torch.randint(len(data) - T, (B,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        return to_device((x, y), self.device)


class NanoGPTStep:
    """
    The step of nanoGPT's train.py as a task of common/timing.py. That file is a script, so its loop is copied here.

    The copy skips the log line of each step, which would wait for the device.
    """

    def __init__(self, trainee, dtype, compiled, fused, steps=1):
        self.trainee, self.steps, self.optimizer = trainee, steps, trainee.optimizer(fused)
        self.autocast = autocast_of(trainee.device, dtype)
        self.scaler = torch.amp.GradScaler(trainee.device.split(":")[0], enabled=dtype == "float16")
        self.forward = torch.compile(trainee.model) if compiled else trainee.model
        self.next = trainee.batch()

    def run(self):
        for _ in range(self.steps):
            self.step()
        wait_for(self.trainee.device)

    def step(self):
        """Run one step -> the loss of its last micro-step, on the device."""
        t = self.trainee
        for _ in range(t.args.gradient_accumulation_steps):
            with self.autocast:
                loss = self.forward(*self.next)[1] / t.args.gradient_accumulation_steps
            self.next = t.batch()  # read while a GPU still computes
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(t.model.parameters(), t.args.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach() * t.args.gradient_accumulation_steps


# -- memory -----------------------------------------------------------------------------------------------------------


def high_water(device):
    """The peak number of bytes so far: of the GPU's tensors, or on the CPU of this process."""
    status = Path("/proc/self/status")
    if device == "cpu" and status.exists():  # getrusage() would also count the parent process
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1))
    return peak_memory(device)


def load_libraries():
    """Run a tiny step, so that the code that torch loads at a first step is not counted as the model's memory."""
    tiny = torch.nn.Linear(8, 8)
    tiny(torch.ones(1, 8)).sum().backward()
    torch.optim.AdamW(tiny.parameters(), fused=True).step()


def peak_of_two_steps(step_class, trainee_class, trainee_args, step_args):
    """Peak bytes of a model, its optimizer and two steps."""
    device = trainee_args[-1].device
    if device.startswith("cuda"):
        gc.collect()  # earlier compiled models are in reference cycles
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        load_libraries()
        before = high_water(device)
    step = step_class(trainee_class(*trainee_args), *step_args)
    for _ in range(2):  # the first step makes the optimizer's state
        step.step()
    wait_for(device)
    return high_water(device) - before


def peak_bytes(step_class, trainee_class, trainee_args, step_args):
    """
    Peak memory of a training step in bytes; None if it cannot be measured.

    On a GPU, the tensors are counted. On the CPU, it is the resident memory of a fresh process minus its memory before the
    model was built. A compiled step cannot be measured on the CPU, since the compiler runs in the same process.

    trainee_args: arguments of the trainee, TrainArgs last. step_args: further arguments of the step, (dtype, compiled, ...).
    """
    args, compiled = trainee_args[-1], step_args[1]
    if args.device.startswith("cuda"):
        return peak_of_two_steps(step_class, trainee_class, trainee_args, step_args)
    if args.device != "cpu" or compiled:
        return None
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peak_of_two_steps, step_class, trainee_class, trainee_args, step_args).result()
    except BrokenProcessPool:
        sizes = f"--batch_size {args.batch_size} or --block_size {args.block_size}"
        fail(f"{sizes}: the system ended the process of a step, probably for lack of memory: lower one of them")


# -- all of it --------------------------------------------------------------------------------------------------------


def plans(models, dense, dtypes, compiles, checkout):
    """
    The plans of all measurements: [(name, step_class, trainee_class, trainee_args, step_args)]. nanoGPT's are last, with its
    default first.

    models: {name: TrainArgs}. dense: TrainArgs of nanoGPT's model. compiles: (False,) or (False, True).
    """
    found = [
        (name, Step, Trainee, (args,), (dtype, compiled))
        for name, args in models.items()
        for compiled in compiles
        for dtype in dtypes
    ]
    if checkout:
        default = nanogpt_default(dense.device)
        better = [(dtype, compiled, True) for compiled in compiles for dtype in dict.fromkeys((*dtypes, "bfloat16"))]
        for setting in (default, *(setting for setting in better if setting != default)):
            name = "nanoGPT, default" if setting == default else "nanoGPT, fused AdamW"
            found.append((name, NanoGPTStep, NanoGPT, (checkout, dense), setting))
    return found


def measure(planned, steps, rounds, say):
    """
    Measure the plans alternately -> one row each: a dict of tokens a second, ms of the parts, peak bytes, FLOPs and ratios.

    A plan is an entry of plans(). say(text) reports progress.
    """
    rows, trainees, tasks = [], {}, {}
    for name, _, _, _, (dtype, compiled, *_) in planned:
        rows.append(dict(model=name, dtype=dtype, compiled=compiled))
    for row, (_, *plan) in zip(rows, planned):  # while no other models are in memory
        say(f"peak memory of {row['model']}, {row['dtype']}")
        row["peak_memory_bytes"] = peak_bytes(*plan)
    for i, (name, step_class, trainee_class, trainee_args, step_args) in enumerate(planned):
        key = name if trainee_class is Trainee else trainee_class
        if key not in trainees:
            trainees[key] = trainee_class(*trainee_args)
        tasks[i] = step_class(trainees[key], *step_args, steps=steps)
    runs = {i: (lambda: None, task.run) for i, task in tasks.items()}
    runs |= {(i, PARTS): (lambda: None, task.run_in_parts) for i, task in tasks.items() if isinstance(task, Step)}
    seconds = by_turns(runs, rounds, lambda i: say(f"round {i}/{rounds}"))
    rates = {}  # FLOP/s by dtype
    for i, task in tasks.items():
        row, trainee = rows[i], task.trainee
        row["tokens_per_second"] = spread([steps * trainee.tokens / s for s in seconds[i]])
        if isinstance(task, Step):
            if row["dtype"] not in rates:
                size = trainee.args.batch_size * trainee.args.block_size, trainee.args.n_embd
                rates[row["dtype"]] = matrix_rate(*size, trainee.device, row["dtype"])
            row |= dict(ms=task.part_ms(), flops_per_token=trainee.flops_per_token, trained_flops=trainee.trained_flops)
            row["mm_share"] = row["tokens_per_second"]["median"] * trainee.trained_flops / rates[row["dtype"]]
    add_ratios(rows, seconds)
    return rows, rates


def add_ratios(rows, seconds):
    """Add to each of our rows the speed relative to nanoGPT's default and to its fastest row, round by round."""
    theirs = [i for i, row in enumerate(rows) if "ms" not in row]
    if not theirs:
        return
    best = min(theirs, key=lambda i: median(seconds[i]))
    for i, row in enumerate(rows):
        if "ms" in row:
            for name, other in (("over_default", theirs[0]), ("over_best", best)):
                row[name] = spread([b / a for a, b in zip(seconds[i], seconds[other])])
    rows[best]["best"] = True
