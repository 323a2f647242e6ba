import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import shell
import torch

from common.dataset import write_dataset
from common.tokenizer import train_bpe
from model import GPT, GPTConfig

REPO = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models here are tiny

# Flags of a model and a run that take a second.
TINY = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2, max_iters=6, warmup_iters=2,
    eval_interval=3, eval_iters=3, log_interval=3, learning_rate=1e-2, dropout=0.1, device="cpu", dtype="float32",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Tests that run whole programs on models of Hugging Face, or chains of scripts, are slow: --quick leaves them out."""
    for item in items:
        if {"copy", "clinic", "own_clinic"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


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
    """A folder with text that can be learnt: a walk over 97 ids in which the next id depends on the last."""
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 4, size=6000)
    ids = np.cumsum(steps) % 97
    write_dataset(folder, ids[:5000], ids[5000:], dict(vocab_size=97, tokenizer="none"))
    return folder


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    """Lets shell.run() start python without importing torch again."""
    folder = tmp_path_factory.mktemp("warm")
    server, place, python = REPO / "tests" / "warm_python.py", folder / "socket", folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "{server}" call "{place}" "$@"\n')
    python.chmod(0o755)
    process = subprocess.Popen([sys.executable, server, "serve", place], env=os.environ | dict(OMP_NUM_THREADS="1"))
    while not place.exists():
        assert process.poll() is None
        time.sleep(0.05)
    shell.warm_python = python
    yield
    process.kill()
    process.wait()


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
def baseline(train, tmp_path):
    result = train(out_dir=tmp_path / "base")
    assert result.status == 0, result.err
    return tmp_path / "base"


@pytest.fixture
def factors(baseline, run_main):
    """factors(k, method): the two flags that import the baseline's table at rank k."""

    def make(k, method="svd"):
        result = run_main(
            "util_factorization/pca_factorize_wte.py", "--ckpt_path", baseline, "--rank_k", k, "--method", method,
            "--out_wte_npy", baseline / "wte_{method}_k{k}.npy", "--out_scale_npz", baseline / "scale_{method}_k{k}.npz",
        )  # fmt: skip
        assert result.status == 0, result.err
        row = result.last["ranks"][0]
        return dict(n_embd_wte=k, import_wte_npy=row["wte_npy"], import_scale_matrices_npz=row["scale_npz"])

    return make


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
        assert len([line for line in result.err.splitlines() if not line.startswith("note: ")]) == 1, result.err
        for word in words:
            assert str(word) in result.err, (word, result.err)

    return check


@contextmanager
def in_use(lock):
    """Another process holds a lock."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-S", "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield
        process.stdin.close()


# -- the scripts' chains ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def copy(tmp_path_factory, toy_dataset, warm_python):
    """A copy of the repository whose datasets are the toy one."""
    folder = tmp_path_factory.mktemp("repo") / "nano pca"  # a space, which shell scripts like to trip over
    ignored = shutil.ignore_patterns(".git", ".venv", "model_weights", "__pycache__", "*.bin", "meta.pkl", ".*_cache")
    shutil.copytree(REPO, folder, ignore=ignored)
    for name in ("sotu", "wikitext103", "pile"):
        shutil.copytree(toy_dataset, folder / "data" / name, dirs_exist_ok=True)
    letters = train_bpe(["a"], 257)  # end-of-text, then bytes in the order of their characters: ASCII's lie under the toy's 97
    meta = dict(vocab_size=97, dtype="uint16", tokenizer="bpe", tokenizer_json=letters.to_str(), end_of_text=0)
    (folder / "data" / "sotu" / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def main_job(copy):
    """The main job over two cards, which a CPU takes for names: A and C, B and its control run side by side."""
    return shell.succeed(f"bash scripts/run_all_experiments.sh 128 {shell.TOY}", copy, PRESET="laptop", GPUS="0 1")


@pytest.fixture(scope="session")
def thirteen(copy):
    """Experiments 1-13 at one rank, with one further method, over two cards that a CPU takes for names."""
    few = dict(PRESET="laptop13", K="8", METHODS="fisher", GPUS="0 1")
    return few, shell.succeed(f"bash scripts/run_13_experiments.sh {shell.TOY}", copy, **few)


@pytest.fixture(scope="session")
def vdproj(copy):
    return shell.succeed(f"bash scripts/train_vdproj.sh {shell.TOY_EPOCHS}", copy, PRESET="laptop_pythia", GPUS="0 1")


# -- surgery ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def clinic(tmp_path_factory):
    """A folder with llama/, neox/, gpt2/, calib.txt and eval.txt."""
    from toys import TEXT, llama, neox, save_tokenizer, transformers

    folder = tmp_path_factory.mktemp("clinic")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))
    for name, model in dict(llama=llama(), neox=neox(), gpt2=gpt2, biased=llama(attention_bias=True)).items():
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
    (folder / "calib.txt").write_text(TEXT[: len(TEXT) // 2])
    (folder / "eval.txt").write_text(TEXT[len(TEXT) // 2 :])
    return folder


@pytest.fixture
def operate(clinic, run_main, tmp_path):
    """operate("--rank", 8, model="neox"): surgery at toy size; its Result also has the lines of results.jsonl."""

    def run(*argv, model="llama", out="out", calib="calib.txt", evaluate="eval.txt"):
        sizes = ("--window", 32, "--eval_windows", 3, "--calib_tokens", 1024, "--answer_tokens", 3)
        texts = ("--calib_text", clinic / calib, "--eval_text", clinic / evaluate)
        places = ("--model", clinic / model, "--out_dir", tmp_path / out)
        result = run_main("-m", "surgery", *places, *texts, *sizes, *argv)
        lines = tmp_path / out / "results.jsonl"
        result.records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        return result

    return run
