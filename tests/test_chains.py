"""The main job, experiments 1-13 and V-DProj by their scripts, at toy size, in a copy of the repository."""

import json
import re

import pytest
from shell import TOY, TOY_EPOCHS, run, succeed

FOLDERS = {"gpt_baseline", "gpt_pca_k128", "gpt_pca_finetune_k128", "gpt_random_lowrank_k128", "gpt_baseline_more"}


def test_the_main_job_makes_the_seeds_folders_and_the_report(copy, main_job):
    out = copy / "model_weights"
    others = {"laptop13", "vdproj"}  # other chains may have run in this copy before
    assert {p.name for p in out.iterdir() if p.is_dir()} - others == FOLDERS | {"pca_factorized"}
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
    for name in [*re.findall(r"\((\w+\.png)\)", report), "report.html"]:
        assert (out / name).is_file()
    assert "preset laptop, dataset sotu" in main_job.stdout and "PRESET=" in main_job.stdout
    written = [line for line in main_job.stdout.splitlines() if " wrote: " in line]
    assert [line.split(" wrote: ")[0] for line in written] == ["  D", "  B (k=128)"] and max(map(len, written)) <= 100
    assert json.loads(main_job.stdout.strip().splitlines()[-1])["runs"] == 5


def test_again_skips_what_is_done_and_resumes_what_was_interrupted(copy, main_job):
    weights = copy / "model_weights"
    (weights / "gpt_random_lowrank_k128" / "summary.json").unlink()
    untouched = (weights / "gpt_baseline" / "ckpt.pt").stat().st_mtime_ns
    done = succeed(f"bash scripts/run_all_experiments.sh 128 {TOY}", copy, real_python=True, PRESET="laptop")
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
    assert "## Which claims hold" in report and "10-13 vs 2-5+ (k=8)" in report and "loss_against_seconds.png" in report
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
    assert "How far can the value cache be compressed?" in (out / "report.md").read_text()
    again = succeed(f"bash scripts/train_vdproj.sh 80 {TOY_EPOCHS}", copy, PRESET="laptop_pythia")
    assert again.stdout.count("is done; delete the folder") == len(VDPROJ)


def test_bench_of_the_trained_models(copy, vdproj, run_main, monkeypatch):
    monkeypatch.chdir(copy)  # whose datasets are the toy ones
    monkeypatch.setattr("common.dataset.ROOT", copy / "data")
    result = run_main("bench.py", "decode", "--runs", copy / "model_weights" / "vdproj", "--steps", 2, "--rounds", 1)
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
        ("scripts/train_pca_compressed.sh 128", "train_baseline_gpt2.sh"),
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


def test_a_run_by_another_optimizer_is_not_taken_for_done(copy, tmp_path):
    """Folders of before have no flag for it: they were trained by AdamW."""
    folder = tmp_path / "runs" / "gpt_baseline"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"preset": "laptop"}')
    (folder / "config.json").write_text('{"args": {"preset": "laptop"}}')
    done = run("bash scripts/train_baseline_gpt2.sh", copy, PRESET="laptop", OUT=str(tmp_path / "runs"))
    assert done.returncode == 2 and "another optimizer" in done.stderr and "laptop_adamw" in done.stderr
