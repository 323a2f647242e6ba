"""Shell commands in a copy of the repository."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

warm_python = None  # stands in for python in the commands, see conftest.warm_python

# wider than the rank of the README's commands
TOY = (
    "--n_layer 1 --n_head 2 --n_embd 160 --block_size 16 --batch_size 2 --gradient_accumulation_steps 2 --max_iters 4 "
    "--warmup_iters 1 --eval_interval 2 --eval_iters 2 --device cpu --dtype float32 --no-compile"
)


TOY_EPOCHS = (
    "--n_layer 1 --n_head 2 --n_embd 96 --block_size 16 --batch_size 2 --gradient_accumulation_steps 2 --max_epochs 1 "
    "--max_train_samples 8 --eval_iters 2 --device cpu --dtype float32 --no-compile"
)
# what whoever runs the tests may have set
CHOICES = (
    "PRESET", "DATASET", "OUT", "SEEDS", "K", "METHOD", "METHODS", "BEST", "ONLY13", "ONLY5", "MODEL", "LORA", "GPUS", "PICKED",
    "SETUP_PYTHON", "CUDA_VISIBLE_DEVICES", "TOY", "VS", "DATA", "PARTS", "LIMIT", "CARDS",
)  # fmt: skip


def run(command, folder, real_python=False, **env):
    """A bash command in a folder; env: further variables. real_python: starts python itself, as a user does."""
    base = {name: value for name, value in os.environ.items() if name not in CHOICES}
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if warm_python and not real_python:
        folders.insert(0, str(warm_python.parent))
    env = base | dict(SKIP_SETUP="1", OMP_NUM_THREADS="1", PATH=":".join(folders)) | env
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)


def places_of_two():
    """What torchrun sets for two processes on this machine -> the environment of each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    return [place | dict(RANK=str(rank)) for rank in (0, 1)]


def train_two(folder, flags):
    """train.py with flags, a list, by two processes."""
    command = shlex.join(["python", "train.py", *flags])
    first, second = (" ".join(f"{name}={value}" for name, value in place.items()) for place in places_of_two())
    return succeed(f"{second} {command} & {first} {command} && wait $!", folder)


def succeed(*args, **options):
    done = run(*args, **options)
    assert done.returncode == 0, (args, done.stdout[-2000:], done.stderr[-3000:])
    return done
