"""
What a reader has to enter, counted: python tests/house.py. Prints a table of the numbers that tests/test_house.py holds.

It runs a baseline at toy size, loads the golden smaller models, and reads the sources.
"""

import ast
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

REPO = Path(__file__).parents[1]
ENTERED = """
import sys
from pathlib import Path
files = {getattr(module, "__file__", None) for module in list(sys.modules.values())} | {sys.argv[0]}
repo = Path.cwd()
inside = sorted({Path(f).resolve().relative_to(repo).as_posix() for f in files if f and Path(f).resolve().is_relative_to(repo)})
print([f for f in inside if not f.startswith((".venv", "tests/"))])
"""
TRAIN = """
import runpy, sys
sys.argv = ["train.py"] + %r
runpy.run_path("train.py", run_name="__main__")
"""
LOAD = """
import sys
sys.argv[0] = "surgery/__init__.py"
from surgery import load
load(%r)
"""
TOY = (
    "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 2 --gradient_accumulation_steps 1 --max_iters 2 "
    "--warmup_iters 0 --eval_interval 2 --eval_iters 1 --device cpu --dtype float32 --no-compile"
)


def entered(code):
    """The files of this repository that a piece of Python has imported when it ends, but for maps of rooms without code."""
    done = subprocess.run([sys.executable, "-c", code + ENTERED], cwd=REPO, capture_output=True, text=True, check=True)
    return [file for file in ast.literal_eval(done.stdout.splitlines()[-1]) if (REPO / file).exists() and has_code(file)]


def has_code(file):
    return len(ast.parse((REPO / file).read_text(encoding="utf-8")).body) > 1 or not file.endswith("__init__.py")


def entered_by_training():
    with tempfile.TemporaryDirectory() as folder:
        flags = [*TOY.split(), "--dataset", str(REPO / "tests" / "golden" / "text"), "--out_dir", f"{folder}/run"]
        return entered(TRAIN % flags)


def entered_by_loading(name):
    return entered(LOAD % f"tests/golden/{name}")


def tracked(*ends):
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    return [f for f in listed if f.endswith(ends) and not f.startswith("tests/") and (REPO / f).exists()]


def longest_functions():
    """[(lines, file:name)], the longest first."""
    found = []
    for file in tracked(".py"):
        for node in ast.walk(ast.parse((REPO / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found.append((node.end_lineno - node.lineno + 1, f"{file}:{node.name}"))
    return sorted(found, reverse=True)


def numbers():
    code = tracked(".py", ".c", ".sh", ".css", ".js", "Makefile")
    rooms = Counter(file.split("/")[0] for file in tracked(".py", ".c", ".npz", ".css", ".js") if "/" in file)
    lines, name = longest_functions()[0]
    room, files = rooms.most_common(1)[0]
    return {
        "files that a baseline run enters": len(entered_by_training()),
        "files that surgery.load() enters, a rank folder": len(entered_by_loading("rank")),
        "files that surgery.load() enters, a packed folder": len(entered_by_loading("packed_fast")),
        f"files of the largest room ({room})": files,
        "lines outside the tests (.py, .c, .sh, .css, .js, Makefile)": sum(
            (REPO / file).read_text(encoding="utf-8").count("\n") for file in code
        ),
        f"lines of the longest function ({name})": lines,
        "bytes of README.md": (REPO / "README.md").stat().st_size,
    }


if __name__ == "__main__":
    found = numbers()
    for name, number in found.items():
        print(f"{number:>8,}  {name}")
    print(json.dumps(found))
