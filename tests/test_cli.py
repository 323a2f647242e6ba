"""Flags from dataclasses, and files that are written whole."""

import json
import sys
from dataclasses import dataclass

import pytest
from conftest import REPO

from common.cli import fail, finish, flag, last_words, parse
from common.files import written_whole
from training.run_folder import command


@dataclass
class Args:
    steps: int = flag(4, "steps", low=1)
    share: float = flag(0.5, "a share", low=0, high=1)
    rank: int | None = flag(None, "a rank", low=1, high=8)
    rate: float = flag(0.1, "a rate", above=0)
    dropout: float = flag(0.1, "dropout", low=0, below=1)


@pytest.mark.parametrize(
    "argv", (["--steps", "1"], ["--share", "0"], ["--share", "1"], ["--rank", "8"], ["--dropout", "0"], [])
)
def test_a_range_includes_its_ends(argv):
    parse(Args, argv)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--steps", "0"], "--steps 0: give 1 or more\n"),
        (["--steps", "10000000000"], "--steps 10000000000: give 1000000000 or less\n"),
        (["--share", "1.5"], "--share 1.5: give 0 to 1"),
        (["--share", "nan"], "--share nan: give 0 to 1"),
        (["--rank", "9"], "--rank 9: give 1 to 8\n"),
        (["--rate", "0"], "--rate 0.0: give above 0\n"),
        (["--rate", "nan"], "--rate nan: give above 0\n"),
        (["--rate", "inf"], "--rate inf: give 1000000000 or less\n"),
        (["--dropout", "1"], "--dropout 1.0: give 0 or more, below 1\n"),
    ],
)
def test_a_number_outside_its_range_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Args, argv)
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, capsys):
    path = tmp_path / "new" / "file"
    with written_whole(path) as part:
        part.write_text("first")
    assert path.read_text() == "first"
    for error in (OSError(28, "No space left on device"), RuntimeError("a write fell short")):
        with pytest.raises(SystemExit) as end, written_whole(path) as part:
            part.write_text("half")
            raise error
        assert end.value.code == 2 and str(path) in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), written_whole(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_folder_is_written_whole(tmp_path):
    with written_whole(tmp_path / "folder") as part:
        part.mkdir()
        (part / "file").write_text("text")
    assert (tmp_path / "folder" / "file").read_text() == "text"


def test_a_message_does_not_steer_the_terminal(capsys):
    with pytest.raises(SystemExit):
        fail("\x1b]0;a title\x07 한국\nsecond line")
    assert capsys.readouterr().err.endswith("error: ?]0;a title? 한국 second line\n")


def test_a_package_that_is_not_installed_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        last_words(ModuleNotFoundError, ModuleNotFoundError(name="absent.part"), None)
    err = capsys.readouterr().err
    assert end.value.code == 2 and "package absent is not installed" in err and "pip install absent" in err
    for ours in ("common.absent", "model", None):
        last_words(ModuleNotFoundError, ModuleNotFoundError("a slip of ours", name=ours), None)
        assert "a slip of ours" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program, words",
    [("train.py", "train.py"), ("surgery/__main__.py", "-m surgery"), ("surgery/bytes_study.py", "-m surgery.bytes_study")],
)
def test_the_command_that_is_recorded_can_be_typed_again(program, words, monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr("sys.argv", [program, "--seed", "2"])
    assert command() == f"python {words} --seed 2"


def test_the_json_object_is_for_programs(monkeypatch, capsys):
    """At a terminal it is printed only if it is asked for."""
    for argv, terminal, lines in [([], False, 1), ([], True, 0), (["--json"], True, 1)]:
        _, given = parse(Args, argv)
        assert given == {}
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)  # noqa: B023
        finish(loss=1 / 3)
        out = capsys.readouterr().out.splitlines()
        assert len(out) == lines
    assert json.loads(out[0]) == dict(loss=1 / 3)
