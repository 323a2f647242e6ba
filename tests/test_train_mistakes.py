"""train.py refuses what cannot work: flags, files and folders that contradict each other, and numbers that break."""

import ast
import inspect
import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, as_flags

from common.dataset import write_dataset
from model import GPTConfig
from train_args import PRESETS, LoraArgs, ModelArgs, TrainArgs, parse_args
from training import checkpoint
from training.factor_files import write_factors
from training.rules import trained_names
from training.trackers import TRACKERS


def losses(folder):
    """Every loss that a run wrote down."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(x["iter"], x.get("val_loss", x.get("train_loss"))) for x in lines]


def weights(folder, name="last.pt"):
    return checkpoint.load(folder / name)["model"]


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
        (["--batch_size 0: give 1 or more\n"], "--batch_size 0"),
        (["--n_layer", "1000000000 or less\n"], "--n_layer 99999999999"),
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
    assert_one_line_error(train(out_dir=tmp_path / "other"), "ckpt.pt without a config.json")
    assert (tmp_path / "other" / "ckpt.pt").read_bytes() == b"nanoGPT's"
    (tmp_path / "file").write_text("x")
    assert_one_line_error(train(out_dir=tmp_path / "file"), "is a file")
    assert_one_line_error(train(out_dir=tmp_path / "file" / "run"), "--out_dir", "cannot be written", "another folder")
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
    names = "start device evaluate optimizer progress run_folder step stopping trackers".split()
    files = ["train.py", "common/dataset.py", *(f"training/{name}.py" for name in names)]
    read = set().union(*(attributes_of((REPO / file).read_text(), "args", "a") for file in files))
    read |= attributes_of(inspect.getsource(trained_names), "args")  # the rest of rules.py only checks
    read |= attributes_of((REPO / "model.py").read_text(), "config", "c") & {f.name for f in fields(GPTConfig)}
    read |= {"preset"} | TRACKERS.keys()  # read by cli.parse and by RunFolder
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
    np.save(flags["import_wte_npy"], np.load(flags["import_wte_npy"]).T)
    assert_one_line_error(train(out_dir=tmp_path / "run", **flags), "[8, 97]", "[97, 8]", "transposed")
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
    from training import run_folder

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
