#!/usr/bin/env bash
# N small runs, each killed by SIGKILL at random moments and resumed; says how many end bit for bit as the uninterrupted one.
#
#   bash scripts/soak.sh 20               10 seconds a run; SEED= draws other moments
set -euo pipefail
source "$(dirname "$0")/setup.sh"
PYTHONPATH=. python - "${1:-20}" "${SEED:-0}" <<'EOF'
import json, random, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch

from common.dataset import write_dataset

FLAGS = """--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --gradient_accumulation_steps 2 --max_iters 600
--warmup_iters 10 --eval_interval 90 --eval_iters 3 --log_interval 7 --dropout 0.1 --device cpu --dtype float32 --no-compile
--checkpoint_minutes 0.004"""


def start(folder, data):
    command = [sys.executable, "train.py", *FLAGS.split(), "--dataset", data, "--out_dir", folder]
    resumed = [sys.executable, "train.py", "--init_from", "resume", "--out_dir", folder]
    return subprocess.Popen(resumed if (folder / "last.pt").exists() else command, stdout=-3, stderr=subprocess.PIPE)


def finish(process):
    if process.wait():
        sys.exit(process.stderr.read().decode())


def end(folder):
    """What has to be equal: weights, optimizer, random numbers, the best, the curve."""
    files = [torch.load(folder / name, weights_only=True) for name in ("last.pt", "ckpt.pt")]
    for file in files:
        for name in ("args", "seconds", "logged"):
            file.pop(name, None)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "peak_share")
    return files, [{k: v for k, v in line.items() if k not in timed} for line in lines]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


runs, draw = int(sys.argv[1]), random.Random(int(sys.argv[2]))
with tempfile.TemporaryDirectory() as place:
    data, whole = Path(place) / "data", Path(place) / "whole"
    ids = np.cumsum(np.random.default_rng(0).integers(1, 4, size=6000)) % 97
    write_dataset(data, ids[:5000], ids[5000:], dict(vocab_size=97, tokenizer="none"))
    began = time.time()
    finish(start(whole, data))
    lasts, expected, exact, kills = time.time() - began, end(whole), 0, 0
    for run in range(runs):
        folder = Path(place) / f"run_{run}"
        for _ in range(draw.randint(2, 3)):
            process = start(folder, data)
            try:
                process.wait(lasts * draw.uniform(0.3, 0.9))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        if not (folder / "summary.json").exists():
            finish(start(folder, data))
        same = equal(end(folder), expected)
        exact += same
        print(f"run {run + 1}: {'bit-identical' if same else f'DIFFERS'}", flush=True)
    print(f"{exact} of {runs} runs, killed {kills} times, end bit-identical to the uninterrupted one")
    sys.exit(exact < runs)
EOF
