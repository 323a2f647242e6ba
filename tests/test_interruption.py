"""Runs of train.py that are stopped, killed, damaged, given numbers that break, or started twice."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, TINY, as_flags

from common.cli import last_words
from train_args import parse_args
from training import checkpoint, stopping
from training.optimizer import Both, Muon, skip_where
from training.rules import resume_args


def lines(folder):
    """metrics.jsonl without the times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in found]


def assert_same_end(a, b):
    assert lines(a) == lines(b)
    for name in ("last.pt", "ckpt.pt"):
        one, two = (checkpoint.load(folder / name) for folder in (a, b))
        assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
        assert one.get("best") == two.get("best") and one.get("tally") == two.get("tally")


FLAGS = TINY | dict(compile=False, max_iters=200, eval_interval=50, log_interval=7)
RESUME = dict.fromkeys([*FLAGS, "dataset"]) | dict(init_from="resume")  # no flag but these


def start(folder, **flags):
    command = [sys.executable, "train.py", *as_flags({k: v for k, v in flags.items() if v is not None} | dict(out_dir=folder))]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen(command, cwd=REPO, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


@pytest.fixture
def whole(train, tmp_path):
    assert train(out_dir=tmp_path / "whole", **FLAGS).status == 0
    return tmp_path / "whole"


@pytest.mark.slow
def test_signals_and_a_kill_end_as_the_uninterrupted_run(train, whole, toy_dataset, tmp_path, assert_one_line_error):
    parts = tmp_path / "parts"
    for kind, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        first = not parts.exists()
        flags = FLAGS | dict(dataset=toy_dataset, checkpoint_minutes=1e-5) if first else dict(init_from="resume")
        process, before = start(parts, **flags), None
        while process.poll() is None and (
            not (parts / "last.pt").exists() or before in (None, os.stat(parts / "last.pt").st_mtime_ns)
        ):
            time.sleep(0.02)
            if before is None and (parts / ".lock").exists() and (parts / "last.pt").exists():
                before = os.stat(parts / "last.pt").st_mtime_ns
        if first:
            assert_one_line_error(train(out_dir=parts, **RESUME), f"process {process.pid} on", "in use")
        process.send_signal(kind)
        err = process.communicate(timeout=20)[1]
        assert process.returncode == status, err
        if first:
            assert "stopped by SIGTERM at step" in err and f"--init_from resume --out_dir {parts}" in err
            assert checkpoint.load(parts / "last.pt")["iter_num"] < 200
    assert (parts / ".lock").exists()  # what the kill left does not count
    assert train(out_dir=parts, **RESUME).status == 0
    assert_same_end(whole, parts)


def test_a_second_signal_stops_at_once(monkeypatch):
    """In a child, since it dies of it. Two signals at one moment are one: a script hands on what a terminal sent to both."""
    monkeypatch.setattr(stopping, "TWICE", 0.1)
    args, (read, write) = SimpleNamespace(checkpoint_minutes=None, out_dir="run", eval_only=False), os.pipe()
    child = os.fork()
    if not child:
        try:
            with stopping.Watch(args, master=True, world_size=1) as watch:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                os.write(write, b"saves" if watch.asks_to_save() else b"goes on")
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGINT and os.read(read, 9) == b"saves"
    os.close(read), os.close(write)


def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(train, tmp_path, monkeypatch, assert_one_line_error):
    from training.run_folder import RunFolder

    assert train(out_dir=tmp_path / "whole").status == 0
    parts = tmp_path / "parts"
    monkeypatch.setattr(RunFolder, "finish", lambda self, summary: None)  # a run that does not come to its end
    assert train(out_dir=parts).status == 0
    monkeypatch.undo()
    last = parts / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    result = train(out_dir=parts, **dict.fromkeys([*TINY, "dataset"]) | dict(init_from="resume"))
    assert result.status == 0 and "is damaged: resuming from last.previous.pt" in result.err, result.err
    assert_same_end(tmp_path / "whole", parts)
    last.write_bytes(content)
    assert_one_line_error(train(out_dir=parts, init_from="resume"), "is damaged", "last.previous.pt")


def test_a_full_disk_is_one_line_and_keeps_what_is_there(train, baseline, monkeypatch, assert_one_line_error):
    before, limit = (baseline / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        result = train(out_dir=baseline, init_from="resume", max_iters=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    result.err = result.err.strip().splitlines()[-1]
    assert_one_line_error(result, "last.pt", "make room")
    assert (baseline / "last.pt").read_bytes() == before and not list(baseline.glob("*.part"))


@pytest.mark.parametrize("kind", ["adamw", "muon", "plain"])
def test_a_step_that_is_skipped_changes_nothing(kind):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4))
    made = dict(adamw=lambda: torch.optim.AdamW([p], 0.1, fused=True), plain=lambda: torch.optim.AdamW([p], 0.1, fused=False),
                muon=lambda: Both(Muon([p], 0.1, 0.1, dtype=torch.float32)))  # fmt: skip
    optimizer = made[kind]()

    def step(gradient):
        p.grad = gradient
        skip_where(optimizer, ~torch.isfinite(gradient.norm()))
        optimizer.step()
        return p.detach().clone()

    gradients = torch.randn(2, 6, 4)
    first = step(gradients[0])
    assert torch.equal(step(torch.full((6, 4), torch.nan)), first)
    assert torch.equal(step(torch.full((6, 4), torch.inf)), first)
    second = step(gradients[1])
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = made[kind]()
    assert torch.equal(step(gradients[0]), first) and torch.equal(step(gradients[1]), second)


def break_losses(monkeypatch, step, factor):
    """From a step on, every loss in training is multiplied by a factor that is not finite."""
    from model import GPT

    forward, calls = GPT.forward, []

    def breaks(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        if self.training:
            calls.append(1)
        return logits, loss * factor if self.training and len(calls) > 2 * step else loss  # two micro-steps a step

    monkeypatch.setattr(GPT, "forward", breaks)


def test_twenty_broken_steps_end_the_run(train, tmp_path, monkeypatch):
    break_losses(monkeypatch, 10, math.inf)
    out = tmp_path / "run"
    result = train(out_dir=out, max_iters=100, eval_interval=10, log_interval=10)
    assert result.status == 1
    assert "step 30: 20 steps in a row" in result.err and "The first was step 10," in result.err, result.err
    assert "begin at tokens" in result.err and f"{out / 'last.pt'} of step 20" in result.err
    assert all(torch.isfinite(p).all() for p in checkpoint.load(out / "last.pt")["model"].values())
    assert lines(out)[-1]["train_loss"] is None and lines(out)[-1]["skipped"] == 10


def test_broken_steps_leave_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    """Checkpoints between evaluations would put one that cannot go on in its place."""
    break_losses(monkeypatch, 4, math.nan)
    out = tmp_path / "run"
    result = train(out_dir=out, max_iters=100, eval_interval=50, log_interval=30, checkpoint_minutes=1e-7)
    assert result.status == 1 and f"{out / 'last.pt'} of step 4" in result.err, result.err
    assert checkpoint.load(out / "last.pt")["iter_num"] == 4


def test_an_early_kill_and_another_dtype_by_measure(train, tmp_path):
    """--dtype auto may measure otherwise the second time; nothing is lost as long as there is no checkpoint."""
    assert train(out_dir=tmp_path, max_iters=3).status == 0
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    assert train(out_dir=tmp_path, max_iters=3).status == 2
    (tmp_path / "last.pt").unlink(), (tmp_path / "ckpt.pt").unlink()
    assert train(out_dir=tmp_path, max_iters=3).status == 0


@pytest.mark.parametrize("error, words", [
    (KeyboardInterrupt(), "interrupted"), (OSError(28, "No space left on device"), "stopped: the output cannot be written"),
    (OSError(28, "No space left on device", "file"), "OSError: [Errno 28] No space left on device: 'file'")])  # fmt: skip
def test_last_words(error, words, capsys):
    last_words(type(error), error, None)
    err = capsys.readouterr().err
    assert err.startswith(words) and len(err.splitlines()) == 1


def test_a_run_that_was_moved_goes_on_where_it_lies(train, tmp_path):
    """Its last.pt names the folder from before, which may be anyone's."""
    assert train(out_dir=tmp_path / "before", max_iters=3).status == 0
    (tmp_path / "before").rename(tmp_path / "now")
    args, given = parse_args(["--init_from", "resume", "--max_iters", "5"])
    stored = checkpoint.load(tmp_path / "now" / "last.pt")["args"]
    assert resume_args(stored, given, type(args)).out_dir == args.out_dir
