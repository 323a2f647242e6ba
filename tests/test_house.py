"""The rooms: each has a map of its files, imports go one way, and a reader has to enter few of them."""

import ast
import re

import house
import pytest
from conftest import REPO

# From the lowest to the highest: a file imports from its own room and from those before it.
ORDER = """
    common kernels model training util_factorization bits kv_cache reports surgery benchmarks export
""".split()
ROOMS = [room for room in ORDER if room != "model"]


def modules(room):
    return sorted((REPO / room).glob("*.py")) if room in ROOMS else [REPO / f"{room}.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_the_map_of_a_room_names_each_file_once(room):
    lines = ast.get_docstring(ast.parse((REPO / room / "__init__.py").read_text())).splitlines()
    rows = [re.match(r"    ([\w.]+(?:, [\w.]+)*)  +\S", line) for line in lines]
    named = [word for row in rows if row for word in row[1].split(", ")]
    files = [path for path in (REPO / room).iterdir() if path.suffix in (".py", ".c", ".npz") and path.name != "__init__.py"]
    assert sorted(named) == sorted(path.stem if path.suffix == ".py" else path.name for path in files)


def test_the_readme_names_every_room():
    tracked = {file.split("/")[0] for file in house.tracked("") if not file.startswith(".")}
    section = (REPO / "README.md").read_text().split("## Files")[1].split("## ")[0]
    for name in tracked | {"tests"}:
        if (REPO / name).is_dir() or name.endswith(".py"):
            assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", section), name


def imported(path):
    """The rooms that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize("room", ORDER)
def test_imports_go_one_way(room):
    for path in modules(room):
        for other in imported(path):
            assert other not in ORDER or ORDER.index(other) <= ORDER.index(room), (path.name, other)


def test_a_baseline_run_enters_few_files_and_none_that_it_does_not_need():
    entered = house.entered_by_training()
    assert len(entered) <= 20 and not [
        file for file in entered if file.startswith(("surgery/", "kernels/", "bits/", "kv_cache/"))
    ]
