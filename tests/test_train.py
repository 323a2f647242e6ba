import ast
import inspect
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from functools import partialmethod

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, as_flags

from common import checkpoint
from common.dataset import Dataset, write_dataset
from common.evaluate import evaluate
from common.factor_files import write_factors
from common.train_rules import trained_names
from model import GPT, GPTConfig
from train_args import PRESETS, LoraArgs, ModelArgs, TrainArgs, parse_args


def losses(folder):
    """Every loss that a run wrote down."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(x["iter"], x.get("val_loss", x.get("train_loss"))) for x in lines]


def weights(folder, name="last.pt"):
    return checkpoint.load(folder / name)["model"]


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


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_folder(train, tmp_path):
    out = tmp_path / "run"
    result = train(out_dir=out, max_iters=150, eval_interval=50, log_interval=50, dropout=0.0, n_embd_wte=8)
    assert result.status == 0
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "summary.json", "ckpt.pt", "last.pt"}
    summary, config = (json.loads((out / name).read_text()) for name in ("summary.json", "config.json"))
    curve = [loss for step, loss in losses(out)]
    assert curve[-1] < curve[0] - 2  # the next id hangs on the last one, among three
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
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(out_dir=whole, n_embd_wte=8, lr_decay_iters=6)
    train(out_dir=parts, n_embd_wte=8, lr_decay_iters=6, max_iters=3)
    with open(parts / "metrics.jsonl", "a") as f:  # what it logged after its last checkpoint, before it was killed
        f.write(json.dumps(dict(iter=5, train_loss=0.0)) + "\n")
    result = train(out_dir=parts, init_from="resume", max_iters=6, **{k: None for k in TINY if k != "max_iters"})
    assert result.status == 0, result.err
    assert losses(whole) == losses(parts)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(parts).values()))
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (whole, parts))
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
def test_two_processes_train_as_one(tmp_path, toy_dataset):
    """torchrun over two processes reads the same text as one, and comes to the same model."""
    flags = TINY | dict(dataset=toy_dataset, compile=False, dropout=0.0)
    env = os.environ | dict(OMP_NUM_THREADS="1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in (("one", [sys.executable]), ("two", torchrun)):
        command = [*launcher, "train.py", *as_flags(flags | dict(out_dir=tmp_path / name))]
        subprocess.run(command, cwd=REPO, env=env, check=True, capture_output=True)
    one, two = ([loss for _, loss in losses(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 5 and one == pytest.approx(two, abs=1e-3)  # three evaluations, two training losses


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


@pytest.mark.slow
def test_compiled_equals_eager(train, tmp_path, monkeypatch):
    # The backend that traces forward and backward without generating C++, which takes half a minute on a CPU.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    for name, compiled in (("eager", False), ("compiled", True)):
        result = train(out_dir=tmp_path / name, compile=compiled, dropout=0.0, max_iters=3, n_layer=1)
        assert result.status == 0, result.err
    assert dict(losses(tmp_path / "eager")) == pytest.approx(dict(losses(tmp_path / "compiled")), abs=1e-4)
    assert weights(tmp_path / "eager").keys() == weights(tmp_path / "compiled").keys()


@pytest.mark.slow
def test_tensorboard_and_wandb_which_is_offline_without_a_key(train, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = train(out_dir=tmp_path / "run", tensorboard_log=True, wandb_log=True)
    assert result.status == 0, result.err
    assert "no key here: logging offline" in result.out
    assert list((tmp_path / "run" / "tensorboard").glob("events.*")) and list(
        (tmp_path / "run" / "wandb").glob("offline-run-*")
    )


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_flags_that_contradict_each_other(capsys):
    for words, argv in [
        (["--n_embd", "--n_head"], "--n_embd 10 --n_head 3"),
        (["--import_wte_npy", "--import_scale_matrices_npz"], "--import_wte_npy a.npy --n_embd_wte 8"),
        (["--import_scale_matrices_npz", "--import_wte_npy"], "--import_scale_matrices_npz a.npz --n_embd_wte 8"),
        (["--n_embd_wte"], "--import_wte_npy a.npy --import_scale_matrices_npz b.npz"),
        (["--n_embd_wte 800"], "--n_embd_wte 800"),
        (["--n_embd_wte"], "--n_embd_wte_scale_tying"),
        (["--import_wte_freeze", "--import_wte_npy"], "--import_wte_freeze"),
        (["prev_run", "--prev_run_ckpt"], "--init_from prev_run"),
        (["prev_run", "--prev_run_ckpt"], "--prev_run_ckpt x.pt"),
        (["--warmup_iters", "--max_iters"], "--warmup_iters 10 --max_iters 5"),
        (["--dtype float16", "--device"], "--device cpu"),
        (["--device gpu", "cuda:1"], "--device gpu"),
        (["--seed -1"], "--seed -1"),
        (["--seed"], "--seed 18446744073709551616"),
        (["--learning_rate -1"], "--learning_rate -1"),
        (["--learning_rate nan"], "--learning_rate nan"),
        (["--min_lr nan"], "--min_lr nan"),
        (["--beta1"], "--beta1 1.5"),
        (["--weight_decay"], "--weight_decay -1"),
        (["--warmup_iters"], "--warmup_iters -3"),
        (["--factor_init naive", "--n_embd_wte"], "--factor_init naive"),
        (["--batch_size 0"], "--batch_size 0"),
        (["--dropout"], "--dropout 1"),
        (["--n_layerz", "--n_layer"], "--n_layerz 3"),
        (["--preset", "laptop"], "--preset desktop"),
        (["--n_layer", "x"], "--n_layer x"),
    ]:
        with pytest.raises(SystemExit) as end:
            parse_args(argv.split())
        err = capsys.readouterr().err
        assert end.value.code == 2 and len(err.strip().splitlines()) == 1
        for word in words:
            assert word in err, (argv, err)


def test_presets_are_made_of_flags_and_give_way_to_what_is_given():
    for name, values in PRESETS.items():
        start = ["--init_from", "prev_run", "--prev_run_ckpt", "base"] if "lora_rank" in values else []
        start += ["--v_proj_dim", "8"] if "train_only" in values else []
        args, _ = parse_args(["--preset", name, *start])
        assert all(getattr(args, k) == v for k, v in values.items())
    args, given = parse_args(["--preset", "laptop", "--max_iters", "77", "--no-bias"])
    assert (args.max_iters, args.bias, args.n_embd) == (77, False, PRESETS["laptop"]["n_embd"])
    assert given == dict(preset="laptop", max_iters=77, bias=False)


def test_the_gpt2_preset_is_the_seeds_baseline():
    a, _ = parse_args(["--preset", "gpt2"])
    assert (a.n_layer, a.n_head, a.n_embd, a.block_size, a.dropout, a.bias) == (12, 12, 768, 2048, 0.1, True)
    assert (a.max_iters, a.batch_size, a.gradient_accumulation_steps, a.warmup_iters) == (10000, 4, 4, 500)
    assert (a.learning_rate, a.min_lr, a.weight_decay, a.beta1, a.beta2, a.grad_clip) == (1e-4, 5e-6, 0.1, 0.9, 0.95, 1.0)
    assert (a.dtype, a.compile, a.eval_interval, a.eval_iters) == ("float16", True, 500, 100)
    b, _ = parse_args(["--preset", "gpt2_finetune"])
    assert (b.max_iters, b.eval_interval, b.learning_rate, b.min_lr) == (5000, 200, 5e-5, 1e-6)
    assert (b.warmup_iters, b.weight_decay) == (100, 0.01)
    assert PRESETS["gpt2_lora"] == PRESETS["gpt2_finetune"] | dict(lora_rank=32)


def test_cuda_asked_for_and_absent(train, tmp_path, assert_one_line_error, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line_error(train(out_dir=tmp_path / "run", device="cuda"), "--device cuda", "--device cpu")
    assert not (tmp_path / "run").exists()


def test_no_checkpoint_yet(train, tmp_path, assert_one_line_error):
    missing = tmp_path / "none" / "ckpt.pt"
    assert_one_line_error(
        train(out_dir=tmp_path / "run", init_from="prev_run", prev_run_ckpt=missing), "Checkpoint not found", missing
    )
    assert_one_line_error(train(out_dir=tmp_path / "run", init_from="resume"), "last.pt", "--init_from resume")
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_checkpoint(train, tmp_path, assert_one_line_error):
    for content in (b"text", b"PK\x03\x04 cut short"):
        (tmp_path / "x.pt").write_bytes(content)
        result = train(out_dir=tmp_path / "run", init_from="prev_run", prev_run_ckpt=tmp_path / "x.pt")
        assert_one_line_error(result, "x.pt", "not a checkpoint")
    torch.save([1, 2], tmp_path / "x.pt")
    result = train(out_dir=tmp_path / "run", init_from="prev_run", prev_run_ckpt=tmp_path / "x.pt")
    assert_one_line_error(result, "x.pt", "not a checkpoint")


def test_a_folder_that_holds_another_run(train, baseline, assert_one_line_error):
    before = {p.name: p.read_bytes() for p in baseline.iterdir()}
    assert_one_line_error(train(out_dir=baseline, learning_rate=0.5), "--learning_rate", "another --out_dir")
    assert_one_line_error(train(out_dir=baseline), "--init_from resume")
    assert_one_line_error(train(out_dir=baseline, init_from="resume", n_layer=5), "--n_layer 5", "--init_from resume")
    assert before == {p.name: p.read_bytes() for p in baseline.iterdir()}


def test_a_folder_that_is_none_of_ours(train, tmp_path, assert_one_line_error):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ckpt.pt").write_bytes(b"nanoGPT's")
    assert_one_line_error(train(out_dir=tmp_path / "other"), "ckpt.pt that is not ours")
    assert (tmp_path / "other" / "ckpt.pt").read_bytes() == b"nanoGPT's"
    (tmp_path / "file").write_text("x")
    assert_one_line_error(train(out_dir=tmp_path / "file"), "is a file")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    assert_one_line_error(train(out_dir=tmp_path / "list"), "not a run's config.json")


def test_factors_that_are_no_pair_or_cannot_be_tied(train, factors, tmp_path, assert_one_line_error):
    one, other = factors(8), factors(8, "freq")
    mixed = one | dict(import_scale_matrices_npz=other["import_scale_matrices_npz"])
    assert_one_line_error(train(out_dir=tmp_path / "run", **mixed), "not the pair", "factors_pca_k8.json")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "wte.npy", rng.normal(size=(97, 8)).astype(np.float32))
    up, down = rng.normal(size=(2, 8, 16)).astype(np.float32)
    np.savez(tmp_path / "scale.npz", scale_up=up, scale_down=down)
    files = dict(import_wte_npy=tmp_path / "wte.npy", import_scale_matrices_npz=tmp_path / "scale.npz")
    refused = train(out_dir=tmp_path / "run", n_embd_wte=8, n_embd_wte_scale_tying=True, **files)
    assert_one_line_error(refused, "scale_up and scale_down differ", "--n_embd_wte_scale_tying")
    assert train(out_dir=tmp_path / "run", n_embd_wte=8, **files).status == 0


def test_a_checkpoint_from_before_a_flag_and_a_part_still_loads(train, baseline, tmp_path):
    for name in ("ckpt.pt", "last.pt"):
        saved = torch.load(baseline / name, weights_only=True)
        for part in ("n_embd_wte", "n_embd_wte_scale_tying", "n_embd_wte_mean", "factor_init"):
            del saved["config"][part]
            saved["args"].pop(part, None)
        torch.save(saved, baseline / name)
    checkpoint.build(checkpoint.load(baseline))
    assert train(out_dir=baseline, init_from="resume", max_iters=9).status == 0


def test_a_crash_between_the_two_checkpoints_is_mended_by_the_resume(train, baseline):
    (baseline / "ckpt.pt").unlink()
    (baseline / "summary.json").unlink()
    assert train(out_dir=baseline, init_from="resume").status == 0
    assert checkpoint.load(baseline)["iter_num"] == json.loads((baseline / "summary.json").read_text())["best"]["iter"]


def attributes_of(source, *objects):
    """The names that a Python source reads of these objects: args.n_embd gives n_embd, and not n_embd_wte."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    owners = [(node.attr, getattr(node.value, "id", getattr(node.value, "attr", None))) for node in nodes]
    return {name for name, owner in owners if owner in objects}


def test_every_flag_is_read_somewhere_documented_and_kept(train, tmp_path):
    files = [
        "train.py",
        *(f"common/{name}.py" for name in ("start", "dataset", "device", "evaluate", "progress", "run_folder")),
    ]
    read = set().union(*(attributes_of((REPO / file).read_text(), "args", "a") for file in files))
    read |= attributes_of(inspect.getsource(trained_names), "args")  # the rest of train_rules.py only checks
    read |= attributes_of((REPO / "model.py").read_text(), "config", "c") & {f.name for f in fields(GPTConfig)}
    read |= {"preset"}  # read by cli.parse
    train(out_dir=tmp_path / "run", eval_only=True)
    kept = checkpoint.load(tmp_path / "run")["args"]
    for f in fields(TrainArgs):
        assert f.name in read, f.name
        assert len(f.metadata["help"]) > 5 and f.name in kept, f.name


def test_the_shape_of_a_model_stands_twice_and_equal():
    """ModelArgs must not import torch, GPTConfig is the model's own: the two lists hold the same names and types."""
    of_adapters = {f.name for f in fields(LoraArgs)}
    in_config = {f.name: f.type for f in fields(GPTConfig)} | dict(n_embd_wte_mean=None)
    not_a_flag = {"vocab_size", "n_embd_wte_mean"}  # of the dataset, of the factor files
    flags = {f.name: f.type for f in fields(ModelArgs)}
    assert flags == {name: kind for name, kind in in_config.items() if name not in of_adapters | not_a_flag}


def test_import_of_another_rank_or_shape(train, factors, tmp_path, assert_one_line_error):
    flags = factors(8)
    result = train(out_dir=tmp_path / "run", **flags | dict(n_embd_wte=4))
    assert_one_line_error(result, "[97, 8]", "[97, 4]", "--n_embd_wte 8")
    wrong = np.load(flags["import_scale_matrices_npz"])["scale_up"].T
    np.savez(flags["import_scale_matrices_npz"], scale_up=wrong, scale_down=wrong)
    assert_one_line_error(train(out_dir=tmp_path / "run", **flags), "[16, 8]", "[8, 16]", "transposed")
    assert not (tmp_path / "run").exists()


def test_a_previous_run_of_another_shape(train, baseline, tmp_path, assert_one_line_error):
    start = dict(init_from="prev_run", prev_run_ckpt=baseline, out_dir=tmp_path / "run")
    assert_one_line_error(train(**start, n_layer=3), "--n_layer 3", "has 2")
    assert_one_line_error(train(**start, n_embd_wte=8), "--n_embd_wte 8", "--import_wte_npy")
    write_dataset(tmp_path / "data", [1] * 99, [1] * 99, dict(vocab_size=50))
    assert_one_line_error(train(**start, dataset=tmp_path / "data"), "--dataset", 50, 97)


def test_a_weight_left_unloaded_is_an_error(baseline, tmp_path, train, assert_one_line_error):
    saved = torch.load(baseline / "ckpt.pt", weights_only=True)
    del saved["model"]["transformer.h.1.ln_1.bias"]
    torch.save(saved, baseline / "ckpt.pt")
    result = train(out_dir=tmp_path / "run", init_from="prev_run", prev_run_ckpt=baseline)
    assert_one_line_error(result, "transformer.h.1.ln_1.bias")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(train, tmp_path):
    Z = np.full((97, 8), 1e30, dtype=np.float32)
    files = dict(import_wte_npy=tmp_path / "wte.npy", import_scale_matrices_npz=tmp_path / "scale.npz")
    write_factors(*files.values(), Z, np.full((8, 16), 1e30, dtype=np.float32), None, {})
    result = train(out_dir=tmp_path / "run", n_embd_wte=8, **files)
    assert result.status == 1 and "validation loss is nan" in result.err and "val loss" not in result.out
    assert not (tmp_path / "run" / "ckpt.pt").exists()
    blown = train(out_dir=tmp_path / "blown", learning_rate=1e8, grad_clip=0.0, max_iters=9)
    assert blown.status == 1
    assert all(torch.isfinite(p).all() for p in weights(tmp_path / "blown").values())


def test_an_interrupted_run_says_how_to_go_on(train, tmp_path, monkeypatch):
    from common import run_folder

    def interrupt(self, step, **values):
        if "train_loss" in values:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.RunFolder, "log", interrupt)
    result = train(out_dir=tmp_path / "run")
    assert result.status == 130 and "interrupted: --init_from resume" in result.err
    monkeypatch.undo()
    assert train(out_dir=tmp_path / "run", init_from="resume").status == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory the Linux way")
def test_out_of_memory_names_the_flags(toy_dataset, tmp_path):
    flags = TINY | dict(dataset=toy_dataset, compile=False, out_dir=tmp_path / "run", batch_size=20_000)
    limited = """
import resource, runpy, sys, torch
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", limited, *as_flags(flags)], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 2 and "out of memory" in result.stderr, result.stderr
    assert "--batch_size" in result.stderr and "--block_size" in result.stderr
