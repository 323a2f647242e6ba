"""How the scripts share runs out to cards, with a python and an nvidia-smi that only pretend."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO
from shell import run

FAKE_PYTHON = r"""#!/usr/bin/env bash
# Stands in for python: notes the call, and leaves what a finished run leaves.
echo "card=${CUDA_VISIBLE_DEVICES-none} $*" >> "$CALLS"
case "$*" in
  *"print("*) exec "$REAL_PYTHON" "$@" ;;
  *"$FAILS"*) exit 1 ;;
  *"import sys, torch"*) exit "$NO_CUDA" ;;
esac
preset=$(echo "$*" | sed 's/.*--preset \([^ ]*\).*/\1/')
method=$(echo "$*" | sed -n 's/.*--method \([^ ]*\).*/\1/p' | sed 's/svd/pca/')
while [ $# -gt 0 ]; do
  if [ "$1" = --out_dir ]; then mkdir -p "$2"; touch "$2/ckpt.pt"; echo "\"preset\": \"$preset\"" > "$2/summary.json"; fi
  if [ "$1" = --rank_k ]; then ranks=${2//,/ }; fi
  if [ "$1" = --out_wte_npy ]; then
    mkdir -p "$(dirname "$2")"
    for k in $ranks; do name=${2/"{k}"/$k} && touch "${name/"{method}"/$method}"; done
  fi
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
    assert calls[-1].endswith(f"report.py --runs {tmp_path / 'out'} --html")


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


def failures(done):
    """What a pipeline names at its end -> (the stages that failed, those that were left out)."""
    part, named = "", {"failed": [], "skipped": []}
    for line in done.stderr.splitlines():
        if match := re.match(r"\w+\.sh: (failed|skipped)[:,]", line):
            part = match[1]
        elif part and line.startswith("  "):
            named[part].append(line.strip())
        else:
            part = ""
    return tuple(named.values())


def test_a_run_that_fails_stops_what_starts_from_it_and_nothing_else(pretend, tmp_path):
    out = tmp_path / "out"
    a, b, more = "train_pca_compressed.sh 64", "train_pca_finetune.sh 64", "train_baseline_more.sh"
    factors = "run_pca_factorization.sh 64 --method svd"
    for fails, failed, left_out in (
        ("gpt-pca-k64 ", [a], []),
        ("pca_factorize_wte", [factors], [a, b]),
        ("--wandb_run_name gpt-baseline ", ["train_baseline_gpt2.sh"], [factors, a, b, more]),
    ):
        shutil.rmtree(out, ignore_errors=True)
        done, calls = pretend("bash scripts/run_all_experiments.sh 64 --bias", fails=fails, SEEDS="1 2", GPUS="0 1")
        assert done.returncode == 1 and calls[-1].endswith(f"report.py --runs {out} --html")
        assert failures(done) == (
            [f"{out}/seed_{seed}: {stage} (status 1)" for seed in (1, 2) for stage in failed],
            [f"{out}/seed_{seed}: {stage}" for seed in (1, 2) for stage in left_out],
        )
        finished = {path.parent.name for path in (out / "seed_2").glob("*/summary.json")}
        assert len(finished) == 5 - len({*failed, *left_out} & {a, b, more, "train_baseline_gpt2.sh"})
        assert "gpt_random_lowrank_k64" in finished
    again, _ = pretend("bash scripts/run_all_experiments.sh 64 --bias", SEEDS="1 2")
    assert again.returncode == 0 and again.stdout.count("is done; delete the folder") == 2 and not again.stderr


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
        c.endswith(f"report.py --runs {tmp_path / 'out'} --html") for c in calls
    )
    stage = f"{tmp_path / 'out'}: train_lowrank_"
    assert failures(done) == ([f"{stage}scratch.sh 128 (status 1)"], [f"{stage}more.sh 128"])


def test_nothing_starts_from_a_baseline_that_is_not_done(pretend, tmp_path):
    (tmp_path / "out" / "gpt_baseline").mkdir(parents=True)
    (tmp_path / "out" / "gpt_baseline" / "ckpt.pt").touch()  # as after its first evaluation
    done, calls = pretend("bash scripts/run_13_experiments.sh", PRESET="laptop13", fails="--wandb_run_name baseline")
    failed, left_out = failures(done)
    assert done.returncode == 1 and len(failed) == 1 and "train_baseline_gpt2.sh" in failed[0]
    assert len(left_out) == 6 + 4 * (6 + 2 + 1) + 2  # factors of six methods; at each rank 6-9, 10-13, B; D+, baseline + LoRA
    assert not any(word in c for c in calls if "parse_args" not in c for word in ("pca_factorize", "nofinetune", "lora_k"))
    others = [c for c in calls if "--wandb_run_name lowrank-scratch" in c and "parse_args" not in c]
    assert len(others) == 4 + 4  # 2-5 and those trained on go on
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
    narrow = [f"{tmp_path / 'out'}/seed_{s}: MODEL=narrow train_vdproj_one.sh 320 (status 1)" for s in (1, 2)]
    assert failures(done) == (narrow, [])
    assert len(trained) == 2 * 8


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


def test_a_sweep_of_wandb_starts_the_script_of_its_run(pretend, copy):
    """The agent's command, with the macros that sweep.yaml uses filled in by W&B's own code."""
    yaml = pytest.importorskip("yaml")
    macros = pytest.importorskip("wandb.sdk.launch.sweeps.utils").create_sweep_command_args
    sweep = yaml.safe_load((copy / "scripts" / "sweep.yaml").read_text())
    for start in sweep["parameters"]["start"]["values"]:
        assert (copy / "scripts" / f"train_{start}.sh").exists()
    of_run = macros(dict(args=dict(start=dict(value="random_lowrank"), rank=dict(value=32)))) | dict(env=["/usr/bin/env"])
    parts = [of_run[part[2:-1]] if part.startswith("${") else [part] for part in sweep["command"]]
    done, calls = pretend(shlex.join(sum(parts, [])), PRESET="laptop")
    assert done.returncode == 0, done.stderr
    assert "gpt_random_lowrank_k32 " in calls[-1] and "--n_embd_wte 32" in calls[-1] and calls[-1].endswith("--wandb_log")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes the Linux way")
def test_no_program_outlives_its_script(tmp_path):
    """Of two scripts, one inside the other: Ctrl-C and SIGTERM are handed on; after SIGKILL the kernel ends the children."""
    pid = tmp_path / "pid"
    for name, command in (("inner", f"bash -c 'echo $$ > {pid} && exec sleep 60'"), ("outer", f"bash {tmp_path}/inner.sh")):
        (tmp_path / f"{name}.sh").write_text(f"source scripts/stages.sh\nattend {command}\n")
    kinds = [(signal.SIGTERM, 143), (signal.SIGINT, 130)] + [(signal.SIGKILL, -9)] * bool(shutil.which("setpriv"))
    for kind, status in kinds:
        pid.unlink(missing_ok=True)
        script = subprocess.Popen(
            ["bash", tmp_path / "outer.sh"], cwd=REPO, stderr=subprocess.DEVNULL, preexec_fn=listen_to_ctrl_c
        )
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        script.send_signal(kind)
        assert script.wait() == status
        end = time.time() + 5
        while works(pid.read_text().strip()):
            assert time.time() < end, kind
            time.sleep(0.01)


def listen_to_ctrl_c():
    """A shell gives its background jobs an ignored SIGINT, all that they start inherits it, and no bash can trap it then."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def works(pid):
    """Whether a process is there; one that has ended may wait for somebody to ask for its status."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
