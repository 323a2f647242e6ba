"""What is not ours may fail: W&B, TensorBoard and matplotlib cost a copy or a figure, never a run or a table."""

import errno
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from test_report import write_run

from reports import bytes as bytes_report
from reports import surgery as surgery_report


def fails(error):
    def call(*args, **kwargs):
        raise error

    return call


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["iter"] for line in lines if "val_loss" in line]


@pytest.fixture
def wandb(monkeypatch):
    """A W&B that has a key, and logs online; .started: the modes of its runs."""
    module = ModuleType("wandb")
    module.started, module.logged = [], []
    run = SimpleNamespace(log=lambda values, step: module.logged.append(step), finish=lambda: None)
    run.define_metric = lambda name, summary: None
    module.login = lambda prompt: True
    module.init = lambda mode, **settings: module.started.append(mode) or run
    module.run = run
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_logs_without_their_package_cost_a_line(train, tmp_path, monkeypatch):
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    result = train(out_dir=tmp_path / "run", wandb_log=True, tensorboard_log=True)
    assert result.status == 0 and evaluations(tmp_path / "run") == [0, 3, 6]
    notes = [line for line in result.err.splitlines() if "the run continues without it" in line]
    assert len(notes) == 2 and "--wandb_log" in notes[0] and "--tensorboard_log" in notes[1], result.err


def test_logs_that_break_off_cost_a_line(train, tmp_path, monkeypatch, wandb):
    full = OSError(errno.ENOSPC, "No space left on device")
    calls = []
    writer = SimpleNamespace(add_scalar=lambda *given: fails(full)() if len(calls) > 6 else calls.append(given))
    writer.add_text = lambda *given: None
    module = SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    wandb.run.log = fails(RuntimeError("the service\nis gone"))
    result = train(out_dir=tmp_path / "run", wandb_log=True, tensorboard_log=True)
    assert result.status == 0 and evaluations(tmp_path / "run") == [0, 3, 6] and wandb.started == [None]
    notes = [line for line in result.err.splitlines() if "the run continues without it" in line]
    assert len(notes) == 2 and "the service is gone" in notes[0] and "No space left" in notes[1], result.err


@pytest.mark.parametrize("part", ["login", "init"])
def test_wandb_without_a_network_logs_offline(train, tmp_path, wandb, part):
    online = wandb.init
    if part == "login":
        wandb.login = fails(ConnectionError("no route to host"))
    else:
        wandb.init = lambda mode, **settings: online(mode, **settings) if mode else fails(TimeoutError("90 seconds"))()
    result = train(out_dir=tmp_path / "run", wandb_log=True)
    assert result.status == 0 and wandb.started == ["offline"] and wandb.logged[-1] == 6
    assert "logging offline to" in result.out and "the run continues without it" not in result.err


# -- figures ------------------------------------------------------------------------------------------------------------


def test_a_report_without_matplotlib_has_its_tables(tmp_path, run_main, monkeypatch):
    for name, k, loss in (("gpt_baseline", None, 5.0), ("gpt_pca_k4", 4, 4.9)):
        write_run(tmp_path / name, loss, k)
    whole = run_main("report.py", "--runs", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (tmp_path / "validation_curves.png").exists() and "not drawn" not in text
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run_main("report.py", "--runs", tmp_path)
    assert result.status == 0 and result.last == whole.last
    without = (tmp_path / "report.md").read_text()
    changed = [(a, b) for a, b in zip(text.splitlines(), without.splitlines(), strict=True) if a != b]
    assert changed and all(a.startswith("![") and "is not drawn" in b for a, b in changed)
    assert result.err.count("is not drawn") == len(changed) and not list(tmp_path.glob("*.png"))


def test_a_figure_that_breaks_leaves_no_half_of_itself(tmp_path, run_main, monkeypatch):
    from matplotlib.figure import Figure

    def half(self, path, **options):
        open(path, "w").write("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    write_run(tmp_path / "gpt_baseline", 5.0)
    result = run_main("report.py", "--runs", tmp_path)
    assert result.status == 0 and "| D gpt_baseline |" in (tmp_path / "report.md").read_text()
    assert "No space left" in result.err and not list(tmp_path.glob("*.png"))


def test_the_studies_of_surgery_and_of_bytes_have_their_tables_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    settings = dict(model="toy", eval_windows=3, window=32, eval_text="a.txt", calib_tokens=99, calib_text="b.txt")
    config = dict(settings=settings | dict(texts={"a.txt": "other"}), hardware="x", commit="c", command="python -m surgery")
    (tmp_path / "config.json").write_text(json.dumps(config))
    row = dict(row="bits 0.25", system="table", name="bits", given=[0.25], bytes=25, share=0.25, kl=0.1, top1=0.9)
    row |= dict(texts={"a.txt": dict(nats=0.01, nats_se=0.001)})
    rows = [row, row | dict(row="bits 0.5", bytes=50, share=0.5)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "25.00%" in bytes_report.write_report(tmp_path)
    assert "is not drawn" in (tmp_path / "report.md").read_text()
    measured = dict(ppl=30.0, kl=0.1, top1=0.9, texts={"a.txt": dict(ppl=30.0, nats_se=0.1)})
    part = dict(ranks=[4, 5], full=[8, 8], energies=[0.9, 0.8], errors=[0.1, 0.2], output_errors=[0.1, 0.2])
    untouched = dict(method="-", mode="-", targets="-", variance=None, rank=None, budget=None, parts={})
    cut = dict(method="fisher", mode="separate", targets="k", variance=0.9, rank=None, budget=None, parts=dict(k=part))
    assert "56.2%" in surgery_report.write_report(tmp_path, [untouched | measured, cut | measured], [])
    assert "is not drawn" in (tmp_path / "report.md").read_text() and "is not drawn" in capsys.readouterr().err
