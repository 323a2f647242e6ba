"""torch.compile: it computes what eager does, and a compiler that fails does not end a run that did not ask for it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO, TINY, as_flags
from shell import places_of_two

from model import GPT
from training import step as train_step

DTYPES = dict(float32=(1e-5, 1e-5), bfloat16=(1e-3, 3e-2), float16=(1e-4, 3e-3))  # of losses; of gradients, relative
MODELS = dict(dense={}, tied=dict(n_embd_wte=4, n_embd_wte_scale_tying=True), adapters=dict(lora_rank=2, lora_alpha=4.0))


BACKEND = os.environ.get("COMPILE_BACKEND", "aot_eager")  # traces forward and backward, and generates no C++


def ten_steps(config, dtype, backend):
    """As train.py makes them -> (ten losses, the gradient of the first step). backend: None does not compile."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(config)
    trained = [p for name, p in model.named_parameters() if config.lora_rank is None or ".lora." in name]
    optimizer, scaler = torch.optim.AdamW(trained, 1e-2, fused=True), torch.amp.GradScaler("cpu", enabled=dtype == "float16")
    if backend:
        model.compile(backend=backend)
    losses, first = [], None
    for i in range(10):
        x = (torch.arange(2 * 40) * (i + 1) % 97).unflatten(0, (2, 40))
        with train_step.autocast_of("cpu", dtype):
            loss = model(x, (x + 3) % 97)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        first = torch.cat([p.grad.flatten() for p in trained]) if first is None else first
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_loss_gradients_and_ten_steps_equal_eager(tiny_config, monkeypatch, changes, dtype):
    """The loss is in three chunks. scripts/test_oldest.sh runs this by torch's default backend."""
    monkeypatch.setattr("model.CHUNK", 32)
    config = tiny_config(block_size=40, lora_targets="wte,v_proj", n_layer=1, **changes)
    (losses, gradient), (compiled_losses, compiled_gradient) = (ten_steps(config, dtype, b) for b in (None, BACKEND))
    close, close_gradient = DTYPES[dtype]
    assert compiled_losses == pytest.approx(losses, abs=close) and losses[-1] < losses[0]
    assert (compiled_gradient - gradient).norm() <= close_gradient * gradient.norm()


@pytest.fixture
def broken_compiler(monkeypatch, tmp_path):
    """A g++ that fails, first in PATH, and no library that a working one has left."""
    (tmp_path / "bin").mkdir()
    for name in ("g++", "c++", "clang++"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho no compiler today >&2\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiler_that_fails_does_not_end_a_run_that_did_not_ask_for_it(
    train, broken_compiler, tmp_path, assert_one_line_error
):
    """Compiling is the gpt2 preset's choice here, as in the main job on a card."""
    plain = train(out_dir=tmp_path / "plain", preset="gpt2", n_layer=1)
    result = train(out_dir=tmp_path / "run", preset="gpt2", n_layer=1, compile=None)
    assert result.status == 0, result.err
    assert result.out.count("torch cannot compile here") == 1 and "--no-compile" in result.out
    assert result.last["val_loss"] == plain.last["val_loss"]  # the dropout's random numbers are those of a run without a try
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert facts["compiled"] is False

    result = train(out_dir=tmp_path / "typed", n_layer=1, compile=True)
    assert_one_line_error(result, "--compile", "drop --compile")
    assert not (tmp_path / "typed" / "config.json").exists()
    assert train(out_dir=tmp_path / "typed", n_layer=1).status == 0  # in the same folder


def test_too_little_memory_is_not_the_compilers_fault():
    def first_pass():
        torch.rand(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        train_step.why_it_does_not_compile(first_pass)
    torch.manual_seed(0)
    assert train_step.why_it_does_not_compile(lambda: torch.rand(1)) is None
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


TWO = """
import functools, os, runpy, sys, torch
def broken(graph, inputs):
    raise RuntimeError("no compiler in this process")
backend = broken if os.environ["RANK"] == os.environ.get("BROKEN") else "aot_eager"
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend=backend)
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("broken", ["", "1"])
def test_two_processes_compile_as_one_or_not_at_all(train, toy_dataset, tmp_path, broken):
    """DDP is around the model when it is compiled; torch 2.5 cannot split a graph that has our loss."""
    flags = TINY | dict(dataset=toy_dataset, n_layer=1, dropout=0.0, max_iters=3, warmup_iters=0)
    assert train(**flags | dict(out_dir=tmp_path / "one")).status == 0
    argv = [sys.executable, "-c", TWO, *as_flags(flags | dict(out_dir=tmp_path / "two", preset="gpt2"))]
    env = os.environ | dict(BROKEN=broken, OMP_NUM_THREADS="1")
    processes = [subprocess.Popen(argv, cwd=REPO, env=env | place, stdout=subprocess.PIPE) for place in places_of_two()]
    said = [process.communicate(timeout=120)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    facts, alone = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one"))
    assert facts["compiled"] is not bool(broken) and ("another process cannot" in said[0]) == bool(broken)
    assert facts["final"]["val_loss"] == pytest.approx(alone["final"]["val_loss"], abs=1e-4)
