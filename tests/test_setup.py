"""scripts/setup.sh, and every program's --help."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from shell import run, succeed

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


def test_setup_keeps_a_complete_environment(copy):
    if run("source scripts/setup.sh && setup_has_all python", copy).returncode:
        pytest.skip("the tests run in an environment without the pinned packages")
    done = succeed('source scripts/setup.sh && echo "$SETUP_PYTHON"', copy, real_python=True, SKIP_SETUP="")
    assert "installing" not in done.stderr
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
