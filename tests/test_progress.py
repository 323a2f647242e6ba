import re
import sys
import time
from types import SimpleNamespace

import pytest

from training.progress import Progress

STEPS = 1000


@pytest.fixture
def halfway(monkeypatch):
    """A run of the longest name after half of its steps, in a job that goes on after it."""
    monkeypatch.setenv("JOB_LATER_STEPS", "3000")
    args = SimpleNamespace(eval_only=False, out_dir="model_weights/gpt_random_lowrank_k128")

    def make():
        progress = Progress(args, True, 0, STEPS, 0.0, 1024)
        progress.started = time.time() - 170
        return progress

    return make


def test_a_line_is_in_the_file_while_the_run_goes_on(halfway, monkeypatch, tmp_path):
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        halfway().log(STEPS // 2, 7.1123, lambda speed: 0.35)
        line = (tmp_path / "log").read_text()
    left = "0:02:50 left, 0:19:50 left of the entire job"
    assert re.fullmatch(rf"step 500/1000: loss 7.1123, 3,01\d tokens/s, 35% of the peak, {left}\n", line)


@pytest.mark.parametrize("columns", [80, 100])
def test_the_bar_and_its_words_fit_the_terminal(halfway, monkeypatch, columns):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = halfway()
    progress.bar.ncols = columns
    progress.bar.update(STEPS // 2)
    progress.log(STEPS // 2, 7.1123, lambda speed: None)
    shown = str(progress.bar)
    progress.bar.close()
    assert len(shown) == columns and shown.endswith("k tok/s, left 02:50, job 19:50")
    assert len(shown.split("|")[1]) >= 4
