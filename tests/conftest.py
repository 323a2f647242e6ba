import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.dataset import write_dataset
from model import GPT, GPTConfig

REPO = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models here are tiny

# Flags of a model and a run that take a second.
TINY = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2, max_iters=6, warmup_iters=2,
    eval_interval=3, eval_iters=3, log_interval=3, learning_rate=1e-2, dropout=0.1, device="cpu", dtype="float32",
)  # fmt: skip


def as_flags(flags):
    out = []
    for name, value in flags.items():
        out += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return out


@pytest.fixture
def tiny_config():
    """A GPTConfig for tests, with whatever fields are given."""

    def make(**changes):
        base = dict(
            vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=16, mlp_expansion_factor=4, activation="gelu", bias=True,
            dropout=0.0, n_embd_wte=None, n_embd_wte_scale_tying=False, n_embd_wte_mean=False, factor_init="matched",
        )  # fmt: skip
        return GPTConfig(**base | changes)

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """A GPT whose every weight is random, biases and norms too, so that no part can hide behind zeros and ones."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        model = GPT(tiny_config(**changes)).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        return model

    return make


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory):
    """A folder with text that can be learnt: a walk over 97 ids in which the next id hangs on the last."""
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 4, size=6000)
    ids = np.cumsum(steps) % 97
    write_dataset(folder, ids[:5000], ids[5000:], dict(vocab_size=97, tokenizer="none"))
    return folder


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    @property
    def last(self):
        return json.loads(self.out.strip().splitlines()[-1])


@pytest.fixture
def train(toy_dataset, monkeypatch, capsys):
    """train(out_dir=..., n_embd_wte=8, ...): runs train.py in this process. Returns a Result."""

    def run(**flags):
        flags = TINY | dict(dataset=toy_dataset, compile=False) | flags
        flags = {k: v for k, v in flags.items() if v is not None}
        monkeypatch.setattr(sys, "argv", ["train.py", *as_flags(flags)])
        return run_path("train.py", capsys)

    return run


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main("report.py", "--runs", ...): runs a program in this process. Returns a Result."""

    def run(path, *argv):
        if path == "-m":
            path, *argv = argv
        monkeypatch.setattr(sys, "argv", [path, *map(str, argv)])
        return run_path(path, capsys)

    return run


def run_path(path, capsys):
    """path: of a file, or the name of a package with a __main__.py"""
    capsys.readouterr()
    status = 0
    try:
        if path.endswith(".py"):
            runpy.run_path(str(REPO / path), run_name="__main__")
        else:
            runpy.run_module(path, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    out, err = capsys.readouterr()
    return Result(status, out, err)


@pytest.fixture
def assert_one_line_error():
    def check(result, *words):
        assert result.status == 2, (result.status, result.err)
        assert len(result.err.strip().splitlines()) == 1, result.err
        for word in words:
            assert str(word) in result.err, (word, result.err)

    return check
