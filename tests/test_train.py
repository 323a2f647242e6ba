import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, partialmethod

import numpy as np
import pytest
import shell
import torch
from conftest import REPO, TINY, as_flags

from common.dataset import Dataset
from model import GPT, GPTConfig
from train_args import TrainArgs
from training import checkpoint, run_folder
from training.evaluate import evaluate
from training.rules import check


def losses(folder):
    """Every loss that a run wrote down."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(x["iter"], x.get("val_loss", x.get("train_loss"))) for x in lines]


def weights(folder, name="last.pt"):
    return checkpoint.load(folder / name)["model"]


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_folder(train, tmp_path):
    out = tmp_path / "run"
    result = train(out_dir=out, max_iters=150, eval_interval=50, log_interval=50, dropout=0.0, n_embd_wte=8)
    assert result.status == 0
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "summary.json", "ckpt.pt", "last.pt"}
    summary, config = (json.loads((out / name).read_text()) for name in ("summary.json", "config.json"))
    curve = [loss for step, loss in losses(out)]
    assert curve[-1] < curve[0] - 2  # the next id depends on the last one, among three
    assert summary["best"]["val_loss"] == result.last["best"]["val_loss"] == min(curve_of(out))
    assert summary["tokens"] == 150 * 2 * 4 * 16 and summary["best"]["tokens"] == summary["best"]["iter"] * 128
    assert summary["parameters"]["total"] == summary["parameters_trained"]
    assert config["args"]["n_embd_wte"] == 8 and "train.py" in config["command"]
    assert {"commit", "versions", "hardware"} <= config.keys()


def curve_of(out):
    return [json.loads(line)["val_loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if "val_loss" in line]


def test_ckpt_is_the_best_and_last_is_the_last(train, tmp_path, toy_dataset):
    out = tmp_path / "run"
    train(out_dir=out, max_iters=30, eval_interval=10, learning_rate=3.0, min_lr=3.0)  # far too fast: it gets worse
    summary = json.loads((out / "summary.json").read_text())
    assert summary["best"]["iter"] < 30 and summary["best"]["val_loss"] < summary["last"]["val_loss"]
    assert summary["final"] == summary["best"]  # measured again, from the checkpoint
    data, args = Dataset(toy_dataset), TrainArgs(**TINY)
    for name, expected in (("ckpt.pt", summary["best"]), ("last.pt", summary["last"])):
        model = checkpoint.build(checkpoint.load(out / name))
        assert evaluate(model, data, args, "cpu", nullcontext())["val_loss"] == expected["val_loss"]


@pytest.mark.parametrize("parts", [dict(), dict(n_embd_wte=8), dict(n_embd_wte=8, n_embd_wte_scale_tying=True)])
@pytest.mark.parametrize("name", ["ckpt.pt", "last.pt"])
def test_either_checkpoint_alone_rebuilds_its_model(train, tmp_path, parts, name):
    train(out_dir=tmp_path / "run", **parts)
    (tmp_path / "run" / name).rename(tmp_path / "alone.pt")
    loaded = torch.load(tmp_path / "alone.pt", weights_only=True)
    model = checkpoint.build(loaded)
    assert all(torch.equal(p, loaded["model"][n]) for n, p in model.state_dict().items())
    if parts.get("n_embd_wte_scale_tying"):
        assert model.transformer.scale_up.weight is model.transformer.scale_down.weight


def test_evaluation_measures_cosines_in_both_spaces(tiny_model, toy_dataset):
    model, data, args = tiny_model(n_embd_wte=8), Dataset(toy_dataset), TrainArgs(**TINY)
    got = evaluate(model, data, args, "cpu", nullcontext())
    small, full, loss = [], [], []
    with torch.no_grad():
        for x, y in data.fixed_windows(12, 4, 16):
            h = model.hidden(torch.from_numpy(x)).flatten(0, 1).numpy()
            y = y.ravel()
            W, D = model.lm_head.weight.numpy(), model.transformer.scale_down.weight.numpy()  # [V,k], [d,k]
            small += cosines(h @ D, W[y])
            full += cosines(h, (W @ D.T)[y])
            logits = h @ D @ W.T
            loss += list(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y])
    assert got["ln_f_cosine"] == pytest.approx(np.mean(small), abs=1e-5)
    assert got["ln_f_cosine_full"] == pytest.approx(np.mean(full), abs=1e-5)
    assert got["val_loss"] == pytest.approx(np.mean(loss), rel=1e-5) and got["eval_tokens"] == len(loss)


def cosines(a, b):
    return list((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


# -- the same again ---------------------------------------------------------------------------------------------------


def test_one_seed_gives_the_same_losses_bit_for_bit_and_another_does_not(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(out_dir=tmp_path / name, seed=seed, n_embd_wte=8)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_resumed_equals_uninterrupted(train, tmp_path):
    """With dropout, so the state of the random numbers counts too."""
    complete, parts = tmp_path / "whole", tmp_path / "parts"
    train(out_dir=complete, n_embd_wte=8, lr_decay_iters=6)
    train(out_dir=parts, n_embd_wte=8, lr_decay_iters=6, max_iters=3)
    with open(parts / "metrics.jsonl", "a") as f:  # what it logged after its last checkpoint, before it was killed
        f.write(json.dumps(dict(iter=5, train_loss=0.0)) + "\n")
    result = train(out_dir=parts, init_from="resume", max_iters=6, **{k: None for k in TINY if k != "max_iters"})
    assert result.status == 0, result.err
    assert losses(complete) == losses(parts)
    assert all(torch.equal(a, b) for a, b in zip(weights(complete).values(), weights(parts).values()))
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (complete, parts))
    assert a["best"] == b["best"] and a["tokens"] == b["tokens"]


def test_micro_steps_add_up_to_the_whole_batch(train, tmp_path, toy_dataset):
    """Two micro-steps of 4 windows move the weights as one of 8 does, on the same text."""
    train(out_dir=tmp_path / "run", max_iters=1, warmup_iters=0, eval_interval=1, dropout=0.0, weight_decay=0.0)
    start = checkpoint.load(tmp_path / "run" / "last.pt")
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**start["config"]))
    data = Dataset(toy_dataset)
    x, y = (np.concatenate(parts) for parts in zip(*(data.batch(4, 16, 1337, 0, micro) for micro in (0, 1))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    model(torch.from_numpy(x), torch.from_numpy(y))[1].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, start["model"][name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes the Linux way")
def test_two_processes_train_as_one_and_one_that_dies_ends_both(train, tmp_path, toy_dataset):
    """Two processes read the same text as one, and come to the same model; one process goes on for two."""
    two, one = tmp_path / "two", tmp_path / "one"
    flags = TINY | dict(max_iters=4000, lr_decay_iters=4000, eval_interval=50, log_interval=5, dropout=0.0, compile=False)
    given = as_flags(flags | dict(dataset=toy_dataset, out_dir=two, checkpoint_minutes=0.002))
    env, piped = os.environ | dict(OMP_NUM_THREADS="1"), dict(cwd=REPO, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "train.py", *given]
    process, other = (subprocess.Popen(command, env=env | place, **piped) for place in shell.places_of_two())
    while not (two / "last.pt").exists() or checkpoint.load(two / "last.pt")["iter_num"] < 20:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    other.kill()
    other.communicate()
    err = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "another process of this run ended" in err, err
    stopped = checkpoint.load(two / "last.pt")["iter_num"]
    resume = dict.fromkeys([*flags, "dataset"]) | dict(init_from="resume", max_iters=stopped + 5)
    assert train(out_dir=two, **resume).status == 0
    train(out_dir=one, **flags | dict(max_iters=stopped + 5))
    curves = [losses(folder) for folder in (one, two)]
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    of_twenty = [[loss for step, loss in curve if step <= 20] for curve in curves]
    assert len(of_twenty[0]) == 5 and of_twenty[0] == pytest.approx(of_twenty[1], abs=1e-5)


def test_dropout_goes_on_in_every_process(train, warm_python, toy_dataset, tmp_path):
    """Two processes that are resumed draw what they would have drawn."""

    def two(folder, **flags):
        shell.train_two(REPO, as_flags(flags | dict(out_dir=folder)))

    flags = TINY | dict(dataset=toy_dataset, compile=False, dropout=0.5, lr_decay_iters=6)
    two(tmp_path / "whole", **flags)
    two(tmp_path / "parts", **flags | dict(max_iters=3))
    two(tmp_path / "parts", init_from="resume", max_iters=6)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "parts").values()))
    more = dict.fromkeys([*TINY, "dataset"]) | dict(init_from="resume", max_iters=7)
    assert train(out_dir=tmp_path / "parts", **more).status == 0  # one process goes on for two


# -- starts -----------------------------------------------------------------------------------------------------------


def test_b_is_the_baseline_with_its_table_truncated(train, factors, baseline, tmp_path):
    flags = factors(16)  # full rank: nothing may be lost
    result = train(out_dir=tmp_path / "b", init_from="prev_run", prev_run_ckpt=baseline, eval_only=True, **flags)
    assert result.last["val_loss"] == pytest.approx(
        json.loads((baseline / "summary.json").read_text())["best"]["val_loss"], 1e-5
    )
    old, new = weights(baseline, "ckpt.pt"), weights(tmp_path / "b", "ckpt.pt")
    for name in old:
        if "wte" not in name and "lm_head" not in name:
            assert torch.equal(old[name], new[name]), name
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["starts_from"]["tokens"] == checkpoint.load(baseline)["tokens"] and summary["tokens"] == 0


def test_a_centred_import_adds_its_mean(train, factors, baseline, tmp_path):
    flags = factors(8, "centered")
    train(out_dir=tmp_path / "b", init_from="prev_run", prev_run_ckpt=baseline, eval_only=True, **flags)
    model = checkpoint.build(checkpoint.load(tmp_path / "b"))
    mean = np.load(flags["import_scale_matrices_npz"])["mean"]
    np.testing.assert_array_equal(model.transformer.scale_up.bias.detach(), mean)
    np.testing.assert_allclose(mean, weights(baseline, "ckpt.pt")["transformer.wte.weight"].mean(0), atol=1e-6)
    again = train(out_dir=tmp_path / "again", init_from="prev_run", prev_run_ckpt=tmp_path / "b", eval_only=True)
    assert again.last["val_loss"] == json.loads((tmp_path / "b" / "summary.json").read_text())["best"]["val_loss"]


def test_a_has_the_factors_and_the_blocks_that_c_has(train, factors, tmp_path):
    flags = factors(8)
    train(out_dir=tmp_path / "a", eval_only=True, **flags)
    train(out_dir=tmp_path / "c", eval_only=True, n_embd_wte=8)
    a, c = (weights(tmp_path / name, "ckpt.pt") for name in "ac")
    np.testing.assert_array_equal(a["transformer.wte.weight"], np.load(flags["import_wte_npy"]))
    np.testing.assert_array_equal(
        a["transformer.scale_down.weight"].T, np.load(flags["import_scale_matrices_npz"])["scale_down"]
    )
    assert torch.equal(a["transformer.h.1.mlp.mlp_up.weight"], c["transformer.h.1.mlp.mlp_up.weight"])


def test_a_run_that_goes_on_reads_on(train, baseline, tmp_path, monkeypatch):
    """B and its control start where the baseline's text stopped, and so does what goes on from them, resumed or not."""
    from common import dataset

    keys, draw = [], dataset.Dataset.batch
    monkeypatch.setattr(dataset.Dataset, "batch", lambda self, B, T, *key: keys.append(key) or draw(self, B, T, *key))
    start = checkpoint.load(baseline)["data_step"]
    train(out_dir=tmp_path / "b", init_from="prev_run", prev_run_ckpt=baseline, max_iters=4, lr_decay_iters=6)
    train(out_dir=tmp_path / "b", init_from="resume", max_iters=6, lr_decay_iters=6)
    assert start > 0 and [step for _, step, micro in keys if micro == 0] == list(range(start, start + 6))


def test_best_starts_afresh(train, baseline, tmp_path):
    """A run that starts from another and only gets worse has its own start as its best, not the other's."""
    result = train(
        out_dir=tmp_path / "worse", init_from="prev_run", prev_run_ckpt=baseline, learning_rate=5.0, min_lr=5.0, max_iters=6
    )
    assert result.last["best"]["iter"] == 0


@pytest.mark.parametrize(
    "frozen, still",
    [
        (dict(import_wte_freeze=True), {"transformer.wte.weight", "lm_head.weight"}),
        (dict(import_scale_matrices_freeze=True), {"transformer.scale_up.weight", "transformer.scale_down.weight"}),
    ],
)
def test_only_what_is_not_frozen_moves(train, factors, tmp_path, frozen, still):
    flags = factors(8)
    train(out_dir=tmp_path / "start", eval_only=True, **flags)
    train(out_dir=tmp_path / "run", **flags, **frozen)
    before, after = weights(tmp_path / "start", "ckpt.pt"), weights(tmp_path / "run")
    assert {name for name in before if torch.equal(before[name], after[name])} == still
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["parameters_trained"] == summary["parameters"]["total"] - sum(
        before[name].numel() for name in still - {"lm_head.weight"}
    )


def test_evaluating_a_run_changes_nothing_in_it(train, baseline):
    before = {p.name: p.read_bytes() for p in baseline.iterdir()}
    result = train(out_dir=baseline, init_from="resume", eval_only=True)
    assert result.last["val_loss"] == json.loads(before["summary.json"])["best"]["val_loss"]
    assert before == {p.name: p.read_bytes() for p in baseline.iterdir()}


# -- arithmetic and loggers -------------------------------------------------------------------------------------------


def test_bfloat16_trains(train, tmp_path):
    assert train(out_dir=tmp_path / "run", dtype="bfloat16").status == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_skips_steps_and_goes_on_with_its_scale(train, tmp_path, monkeypatch, optimizer):
    """As on a card, for which train.py keeps it. The scale begins so high that the first steps overflow."""
    for place in ("train_args.check", "training.rules.check"):
        monkeypatch.setattr(place, lambda args, *more: check(replace(args, dtype="float32"), *more))
    monkeypatch.setattr("torch.amp.GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**26))
    flags = dict(dtype="float16", optimizer=optimizer, lr_decay_iters=12, eval_interval=6, log_interval=3)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(out_dir=whole, max_iters=12, **flags).status == 0
    assert train(out_dir=halves, max_iters=6, **flags).status == 0
    assert train(out_dir=halves, init_from="resume", max_iters=12, dtype=None).status == 0
    one, two = (checkpoint.load(out / "last.pt") for out in (whole, halves))
    assert one["scaler"] == two["scaler"] and one["scaler"]["scale"] < 2.0**26
    skipped = sum(json.loads(line).get("skipped", 0) for line in (whole / "metrics.jsonl").read_text().splitlines())
    assert skipped == math.log2(2.0**26 / one["scaler"]["scale"])
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    assert dict(losses(whole))[12] < dict(losses(whole))[0]


def test_auto_settles_on_an_arithmetic_that_the_checkpoint_keeps(train, tmp_path):
    result = train(out_dir=tmp_path / "run", dtype="auto")
    assert result.status == 0 and "GFLOP/s in float32" in result.out
    settled = checkpoint.load(tmp_path / "run" / "last.pt")["args"]["dtype"]
    assert settled in ("float32", "bfloat16") and f"dtype {settled}:" in result.out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["args"]["dtype"] == settled


@pytest.mark.slow
def test_compiled_equals_eager(train, tmp_path, monkeypatch):
    # The backend that traces forward and backward without generating C++, which takes half a minute on a CPU.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name, compiled in (("eager", False), ("compiled", True)):
        result = train(out_dir=tmp_path / name, compile=compiled, dropout=0.0, max_iters=3, eval_interval=2, n_layer=1)
        assert result.status == 0, result.err
    # one graph: an evaluation amid the steps compiles nothing, and nothing anew after it
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    assert dict(losses(tmp_path / "eager")) == pytest.approx(dict(losses(tmp_path / "compiled")), abs=1e-4)
    assert weights(tmp_path / "eager").keys() == weights(tmp_path / "compiled").keys()


@pytest.mark.slow
def test_tensorboard_and_wandb_which_is_offline_without_a_key(train, tmp_path, monkeypatch):
    Run = pytest.importorskip("wandb.sdk.wandb_run").Run
    EventAccumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    copies, log = dict(wandb={}, tensorboard={}), Run.log

    def noted(run, values, step):
        copies["wandb"].setdefault(step, {}).update(values)
        log(run, values, step=step)

    monkeypatch.setattr(Run, "log", noted)
    result = train(out_dir=tmp_path / "run", tensorboard_log=True, wandb_log=True)
    assert result.status == 0, result.err
    assert "no key here: logging offline" in result.out and "continues without" not in result.err
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), dict(scalars=0, tensors=0)).Reload()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            copies["tensorboard"].setdefault(event.step, {})[name] = event.value
    expected = {}
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        at_step = expected.setdefault(line.pop("iter"), {})
        at_step |= {f"position_loss/{name}": loss for name, loss in line.pop("position_loss", {}).items()} | line
    assert sorted(expected) == [0, 3, 6]
    for copy in copies.values():
        assert {step: pytest.approx(values) for step, values in expected.items()} == copy
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (text,) = events.Tensors("config/text_summary")
    assert config["command"] in json.loads(text.tensor_proto.string_val[0].decode().strip("`json\n"))["command"]


def test_every_key_of_the_metrics_is_explained(train, tmp_path):
    result = train(out_dir=tmp_path / "run", v_proj_dim=8)
    assert result.status == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    explained = re.findall(r"^    (\w+)  ", run_folder.__doc__, flags=re.M)
    assert {key for line in lines for key in line} == set(explained) - {"peak_share", "skipped"}  # a GPU's, and after a failure
