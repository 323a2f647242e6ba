"""
Programs that are killed at random moments and started again: how many end as the uninterrupted one. scripts/soak.sh calls it.

    python tests/soak.py runs 20 0          training runs; the seed draws the moments
    python tests/soak.py pipelines 10 0     the scripts that train and cut many models, in turn
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from common.dataset import write_dataset
from common.tokenizer import train_bpe

REPO = Path(__file__).parents[1]
SHAPE = """--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --gradient_accumulation_steps 2 --eval_iters 3
--log_interval 7 --dropout 0.1 --device cpu --dtype float32 --no-compile --checkpoint_minutes 0.004"""
RUN = f"{SHAPE} --max_iters 600 --warmup_iters 10 --eval_interval 90"
STEPS = f"{SHAPE} --max_iters 60 --warmup_iters 10 --eval_interval 20"
EPOCHS = f"{SHAPE} --max_epochs 3 --max_train_samples 150"
WINDOWS = "--window 32 --eval_windows 2 --calib_tokens 1024 --answer_tokens 0"
RANKS = dict(K="4", KV="8", SMALL="8", WTE="8", SMALLWTE="8")
PIPELINES = {
    "run_all_experiments.sh": (f"8 {STEPS}", dict(PRESET="laptop")),
    "run_13_experiments.sh": (STEPS, dict(PRESET="laptop13", K="8", METHODS="fisher", LORA="--lora_rank 4")),
    "train_vdproj.sh": (f"16 {EPOCHS}", dict(PRESET="laptop_pythia")),
    "run_surgery.sh": (WINDOWS, dict(MODEL="llama", TEXT="text.txt", VARIANCE="0.9", BUDGET="0.5", HEAL="2") | RANKS),
}
# what differs from one machine and minute to the next
TIMED = {"seconds", "tokens_per_second", "peak_share", "peak_memory_bytes", "logged", "args", "command", "resumed"}


def outcome(folder):
    """What has to be equal: {file: its content without times}. Of a figure its name. A lock that a kill left says nothing."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != ".lock"]
    return {str(path.relative_to(folder)): content(path) for path in files}


def content(path):
    match path.suffix:
        case ".pt":
            return timeless(torch.load(path, weights_only=True))
        case ".json":
            return timeless(json.loads(path.read_text()))
        case ".jsonl":
            return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        case ".npy" | ".safetensors":
            return path.read_bytes()
        case ".npz":
            return dict(np.load(path))
        case ".md":
            return without_times(path.read_text())


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key not in TIMED}
    return [timeless(v) for v in value] if isinstance(value, (list, tuple)) else value


def without_times(report):
    """A report without its first command and what it says of seconds, speed and memory."""
    lines, dropped = [], []
    for line in report.splitlines():
        cells = line.split("|")
        if len(cells) > 1:
            if not lines or not lines[-1].startswith("|"):
                dropped = [i for i, cell in enumerate(cells) if re.search("second|tokens/s|memory", cell)]
            line = "|".join(cell for i, cell in enumerate(cells) if i not in dropped)
        lines.append(re.sub("First command: .*|.*in as few seconds.*", "", line))
    return lines


def differences(a, b, at=""):
    """Where two outcomes differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f"{at} {key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{at} {i}")]
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) else [at]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [at]
    return [] if a == b else [f"{at}: {str(a)[:90]!r} and {str(b)[:90]!r}"]


class Run:
    """One run of train.py."""

    def __init__(self, place):
        self.data = place / "data"

    def start(self, folder, log):
        command = [sys.executable, "train.py", *RUN.split(), "--dataset", self.data, "--out_dir", folder]
        resumed = [sys.executable, "train.py", "--init_from", "resume", "--out_dir", folder]
        return subprocess.Popen(resumed if (folder / "last.pt").exists() else command, cwd=REPO, stdout=log, stderr=log)

    def is_done(self, folder):
        return (folder / "summary.json").exists()


class Pipeline:
    """One script of PIPELINES."""

    def __init__(self, script, place):
        self.flags, environment = PIPELINES[script]
        self.command = ["bash", f"scripts/{script}", *self.flags.split()]
        self.env = os.environ | dict(SKIP_SETUP="1", DATASET=str(place / "data"), CUDA_VISIBLE_DEVICES="") | environment
        for name in {"MODEL", "TEXT"} & environment.keys():
            self.env[name] = str(place / environment[name])

    def start(self, folder, log):
        env = self.env | dict(OUT=str(folder))
        return subprocess.Popen(self.command, cwd=REPO, env=env, stdout=log, stderr=log)

    def is_done(self, folder):
        return False  # started again it finds nothing to do


def prepare(place):
    """The data and the model that the programs take."""
    ids = np.cumsum(np.random.default_rng(0).integers(1, 4, size=6000)) % 97
    letters = train_bpe(["a"], 257)
    write_dataset(place / "data", ids[:5000], ids[5000:], dict(vocab_size=97, tokenizer="bpe", tokenizer_json=letters.to_str()))


def prepare_model(place):
    from toys import TEXT, llama, save_tokenizer

    llama().save_pretrained(place / "llama")
    save_tokenizer(place / "llama")
    (place / "text.txt").write_text("\f".join(TEXT[i : i + 9000] for i in range(0, 72000, 9000)))


@contextmanager
def ended_with(process):
    """Where this program is stopped, so is the process."""
    try:
        yield
    finally:
        process.terminate()


def left_alive(folder):
    """Processes that work on a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in process.joinpath("cmdline").read_text():
                found.append(process.name)
        except OSError:
            pass  # it has ended
    return found


def trial(program, folder, lasts, draw, kinds):
    """
    Start, stop at two or three random moments, go on to the end -> (stops, processes that outlived one).

    lasts: seconds of the whole program. kinds: the signals to draw from; without any it is not stopped.
    """
    folder.mkdir()
    stops = orphans = 0
    with open(folder.with_suffix(".log"), "w+") as log:
        for _ in range(draw.randint(2, 3) if kinds else 0):
            with program.start(folder, log) as process, ended_with(process):
                try:
                    process.wait(lasts * draw.uniform(0.2, 0.9))
                except subprocess.TimeoutExpired:
                    process.send_signal(draw.choice(kinds))
                    process.wait()
                    stops += 1
                    time.sleep(0.2)  # the kernel ends the children of a script that was killed
                    orphans += len(left_alive(folder))
        if not program.is_done(folder):
            with program.start(folder, log) as process, ended_with(process):
                if process.wait():
                    sys.exit(log.seek(0) or log.read()[-3000:])
    return stops, orphans


def soak(programs, runs, draw, place, kinds):
    """Trials of programs {name: program} in turn -> whether all end as the uninterrupted one, with no process left alive."""
    folder = place / "out"  # one for all, since files name it
    lasts, expected, exact, kills, orphans = {}, {}, 0, 0, 0
    for i in range(runs):
        name = list(programs)[i % len(programs)]
        if name not in expected:
            began = time.time()
            trial(programs[name], folder, 0, draw, [])
            lasts[name], expected[name] = time.time() - began, outcome(folder)
            shutil.rmtree(folder)
        killed, left = trial(programs[name], folder, lasts[name], draw, kinds)
        found = differences(outcome(folder), expected[name])
        shutil.rmtree(folder)
        kills, orphans, exact = kills + killed, orphans + left, exact + (not found)
        print(f"{name} {i + 1}: {'DIFFERS: ' + '; '.join(found[:9]) if found else 'the same'}", flush=True)
    counts = f"{exact} of {runs}, stopped {kills} times, end bit for bit as the uninterrupted one"
    print(f"{counts}; {orphans} processes outlived a stop")
    return exact == runs and not orphans


def main(what, number, seed):
    with tempfile.TemporaryDirectory() as place:
        place, kinds = Path(place), [signal.SIGKILL]
        prepare(place)
        programs = dict(run=Run(place))
        if what == "pipelines":
            prepare_model(place)
            programs, kinds = {script: Pipeline(script, place) for script in PIPELINES}, [*kinds, signal.SIGTERM, signal.SIGINT]
        return soak(programs, int(number), random.Random(int(seed)), place, kinds)


if __name__ == "__main__":
    for kind in (signal.SIGTERM, signal.SIGINT):  # a background job ignores SIGINT, and what it starts would too
        signal.signal(kind, signal.default_int_handler)
    sys.exit(not main(*sys.argv[1:]))
