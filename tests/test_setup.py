"""scripts/setup.sh, and the --help of every program and script."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO
from shell import run, succeed

from common import versions
from common.cli import last_words

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


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_no_torch(program):
    """So that it answers at once. -X importtime lists every module that is imported, on stderr."""
    command = [sys.executable, "-X", "importtime", *program.split(), "--help"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "--" in done.stdout
    modules = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in modules and not modules & {"torch", "transformers", "matplotlib", "datasets"}


SCRIPTS = sorted(path.name for path in (REPO / "scripts").glob("*.sh") if path.name not in ("common.sh", "stages.sh"))
NOT_FOR_USERS = {
    "SETUP_PYTHON": "setup.sh hands it to the scripts that a script calls",
    "LAUNCH": "a function of gpu_acceptance.sh sets it for another",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """scripts/ in a folder of its own: a script that did more than to print its help would fail, or leave a file there."""
    folder = tmp_path_factory.mktemp("a clone")
    shutil.copytree(REPO / "scripts", folder / "scripts")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script(clone, script):
    """Its example, minutes and variables are there, and it neither sets up nor starts anything."""
    before, start = sorted(clone.rglob("*")), time.monotonic()
    done = run(f"bash scripts/{script} --help", clone, real_python=True, SKIP_SETUP="")
    assert time.monotonic() - start < 2
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert sorted(clone.rglob("*")) == before
    assert "#" not in done.stdout and "Minutes:" in done.stdout
    assert re.search(rf"^Example: .*bash scripts/{re.escape(script)}", done.stdout, flags=re.M)
    text = (REPO / "scripts" / script).read_text()
    for name in set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?[-+]", text)) - NOT_FOR_USERS.keys():
        assert re.search(rf"^  {name} ", done.stdout, flags=re.M), name
    trains = re.search("^source scripts/common.sh", text, flags=re.M)
    for name in ("PRESET", "DATASET", "METHOD", "LORA", "GPUS") if trains else ():
        assert re.search(rf"^  {name} ", done.stdout, flags=re.M), name
    assert "SKIP_SETUP" in done.stdout
    assert run(f"bash {script} 8 -h", clone / "scripts", real_python=True, SKIP_SETUP="").stdout == done.stdout


def test_setup_keeps_a_complete_environment(copy):
    if run("source scripts/setup.sh && setup_has_all python", copy).returncode:
        pytest.skip("the tests run in an environment without the pinned packages")
    done = succeed('source scripts/setup.sh && echo "$SETUP_PYTHON"', copy, real_python=True, SKIP_SETUP="")
    assert "installing" not in done.stderr
    assert Path(done.stdout.strip()).parent == Path(sys.executable).parent and not (copy / ".venv").exists()


@pytest.fixture
def house(copy, tmp_path):
    """A folder with setup.sh and what it asks. Called with the lines of a requirements.txt."""

    def make(*lines):
        (tmp_path / "requirements.txt").write_text("\n".join(lines) + "\n# for the tests\npytest==0.1\n")
        return tmp_path

    for name in ("scripts/setup.sh", "common/versions.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(copy / name, tmp_path / name)
    return make


def test_setup_tells_a_complete_environment_from_another(house):
    """What a script checks before it takes the active environment, held against requirements it meets and does not."""
    numpy = importlib.metadata.version("numpy")
    for lines, complete in [
        ([f"numpy=={numpy}  # a comment", "torch==99.0  # any from 2.5.1 on will do"], True),
        (["numpy==0.1"], False),
        (["a-package-that-is-not-there==1.0"], False),
        (["numpy==0.1; python_version < '3.0'"], True),
        (["numpy==0.1", f"# torch<99: numpy=={numpy}"], True),
        ([f"numpy=={numpy}", "# torch<99: numpy==0.1"], False),
    ]:
        assert (run("source scripts/setup.sh && setup_has_all python", house(*lines)).returncode == 0) == complete, lines
    assert run("source scripts/setup.sh && SETUP_TESTS=1 setup_has_all python", house(f"numpy=={numpy}")).returncode


def test_a_tool_of_the_tests_that_cannot_be_had_stops_the_tests_alone(house):
    """A stub stands for the Python of .venv: what it installs of the main part is there, the tests' part cannot be had."""
    folder = house("a-package-that-is-not-there==1.0")
    (folder / ".venv" / "bin").mkdir(parents=True)
    cases = """
        *"pip install"*main.txt) touch main ;;
        *"pip install"*tests.txt) exit 1 ;;
        *"met main") [ -f main ] ;;
        *"met tests") exit 1 ;;
    """
    text = f'#!/bin/bash\ncase "$*" in {cases} *) exec {sys.executable} "$@" ;; esac\n'
    (folder / ".venv" / "bin" / "python").write_text(text)
    (folder / "uv").write_text("#!/bin/sh\nexit 1\n")
    for program in (folder / ".venv" / "bin" / "python", folder / "uv"):
        program.chmod(0o755)
    setup = 'PATH="$PWD:$PATH"; source scripts/setup.sh && echo "$SETUP_PYTHON"'
    done = succeed(setup, folder, SKIP_SETUP="")
    assert (
        done.stdout.strip() == str(folder / ".venv" / "bin" / "python") and "all runs but bash scripts/test.sh" in done.stderr
    )
    assert "cannot be had" not in succeed(setup, folder, SKIP_SETUP="").stderr  # it is not tried at each command
    refused = run(setup, folder, SKIP_SETUP="", SETUP_TESTS="1")
    assert refused.returncode == 2 and "delete .venv to start afresh" in refused.stderr


TRANSFORMERS = ["torch>=2.6; extra == 'torch'", "numpy>=1.17", "torch>=9.9; extra == 'all'"]


def test_what_goes_with_an_older_torch(monkeypatch):
    """On the project's own requirements.txt."""
    pins = {part: versions.wanted(None, part) for part in ("main", "tests")}
    older, newer = versions.wanted("2.5.1+cu121"), versions.wanted("2.13.0+cpu")
    assert any(line.startswith("torch==") for line in pins["main"]) and any("hypothesis" in line for line in pins["tests"])
    assert newer == [line for line in pins["main"] if not line.startswith("torch==")]
    (kept, pinned), *more = [pair for pair in zip(older, newer) if pair[0] != pair[1]]
    assert kept.startswith("transformers==") and pinned.startswith("transformers==") and not more

    monkeypatch.setattr(versions, "driver", lambda: None)
    for python, torch, words in [
        ((3, 12, 1), "2.4.1", ["torch 2.4.1 is too old for Python 3.12, which needs 2.5.1"]),
        ((3, 13, 0), "2.5.1", ["torch 2.5.1 is too old for Python 3.13, which needs 2.6", "Python 3.12 works"]),
    ]:
        monkeypatch.setattr(sys, "version_info", python)
        monkeypatch.setattr(versions, "installed", dict(torch=torch).get)
        (note,) = versions.notes(None)
        assert all(part in note for part in words) and "gigabytes" in note
    monkeypatch.setattr(versions, "installed", {}.get)
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    for version, said in (("555.42.02", 1), ("580.65.06", 0)):  # of the first users' machine; of CUDA 13
        monkeypatch.setattr(versions, "driver", lambda version=version: version)
        assert len([note for note in versions.notes(None) if version in note and "torch==2.5.1" in note]) == said
    monkeypatch.setattr(versions, "installed", {}.get)
    (note,) = versions.notes("2.5.1")
    assert kept in note and pinned in note and not list(versions.notes("2.6.0"))
    monkeypatch.setattr(sys, "version_info", (3, 15, 0))
    assert "3.10 to 3.13" in "".join(versions.notes("2.13.0"))


def test_an_environment_that_cannot_work_is_one_line_with_the_command(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    monkeypatch.setattr(versions.metadata, "requires", lambda name: TRANSFORMERS)
    for torch, tests in {"2.4.1": (True, True), "2.5.1+cu124": (False, True), "2.6.0": (False, False)}.items():
        monkeypatch.setattr(versions, "installed", dict(torch=torch, transformers="5.20.2").get)
        for check, fails in zip((versions.check_torch, versions.check_transformers), tests):
            check(said.append)
            assert bool(said) == fails, (torch, said)
            assert all("setup.sh" in line and "pip install" in line and torch in line for line in said)
            said.clear()
    monkeypatch.setattr(versions, "installed", dict(torch="2.5.1").get)
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    versions.check_torch(said.append)
    assert "torch>=2.6" in said.pop()
    monkeypatch.setattr(versions, "installed", {}.get)  # other lines say that a package is missing
    versions.check_torch(said.append)
    versions.check_transformers(said.append)
    assert not said
    monkeypatch.setattr(versions.metadata, "requires", lambda name: ["torch>=2.5; extra == 'torch'"])  # as 5.19.0 says
    for transformers, fails in {"5.18.0": False, "5.19.0": True}.items():
        monkeypatch.setattr(versions, "installed", dict(torch="2.5.1", transformers=transformers).get)
        versions.check_transformers(said.append)
        assert bool(said) == fails


def test_the_build_of_torch_in_words(monkeypatch):
    assert versions.build_of_torch().startswith(importlib.metadata.version("torch").split("+")[0] + ", built ")
    monkeypatch.setattr(versions, "installed", {}.get)
    assert versions.build_of_torch() == "not installed"


def test_a_program_ends_in_one_line_where_torch_is_too_old(monkeypatch, run_main, assert_one_line_error):
    monkeypatch.setattr(versions, "installed", dict(torch="2.4.1").get)
    assert_one_line_error(run_main("train.py", "--max_iters", 1), "train.py: error: torch 2.4.1", f"torch>={versions.oldest()}")


def test_a_transformers_that_is_too_new_is_one_line_in_programs_and_an_import_error_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(versions.metadata, "requires", lambda name: TRANSFORMERS)
    monkeypatch.setattr(versions, "installed", dict(torch="2.5.1", transformers="5.20.2").get)
    with pytest.raises(ImportError, match="transformers 5.20.2 needs a newer torch"):
        versions.check_transformers(versions.refuse_import)
    error = ImportError("cannot import name 'TransformGetItemToIndex'")
    with pytest.raises(SystemExit):
        last_words(type(error), error, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "transformers 5.20.2 needs a newer torch" in line and "pip install transformers==" in line
