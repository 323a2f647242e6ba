"""bench.py train: the step that it times is that of train.py, and it counts what the model counts."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY

from benchmarks.training import PARTS, NanoGPT, NanoGPTStep, Step, Trainee, matrix_rate, measure, peak_bytes, plans, write_text
from common.timing import spread
from train_args import PRESETS, TrainArgs
from training import checkpoint
from training.start import begin

CONSTANT = dict(warmup_iters=0, min_lr=TINY["learning_rate"])  # a rate that never changes

# A model.py with what bench.py asks of nanoGPT's: it prints, its loss is cross-entropy, its optimizer is told the device.
STAND_IN = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        print("number of parameters")

    def forward(self, idx, targets):
        logits = self.lm_head(self.wte(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using fused AdamW")
        fused = device_type == "cuda"
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay, fused=fused)
"""


@pytest.fixture
def tiny_args(tmp_path):
    """tiny_args(n_embd_wte=8, ...): TrainArgs of a tiny model that reads random ids."""
    write_text(tmp_path / "text", 97, TINY["block_size"])
    return lambda **changes: TrainArgs(**TINY | CONSTANT | dict(dataset=str(tmp_path / "text")) | changes)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "model.py").write_text(STAND_IN)
    return tmp_path / "nano"


@pytest.fixture
def no_process(monkeypatch):
    """Peak memory is not measured: each model would start a process of its own."""
    monkeypatch.setattr("benchmarks.training.peak_bytes", lambda *plan: 10**6)


# -- our step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [dict(), dict(n_embd_wte=8), dict(v_proj_dim=10)], ids=("dense", "factorized", "vdproj"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_timed_step_is_that_of_train_py(train, tiny_args, tmp_path, parts, dtype):
    """The same losses and the same weights, bit for bit, dropout included."""
    args = tiny_args(dtype=dtype, **parts)
    flags = CONSTANT | parts | dict(dtype=dtype, dataset=args.dataset, log_interval=1, eval_interval=6)
    result = train(out_dir=tmp_path / "run", **flags)
    assert result.status == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [line["train_loss"] for line in lines if "train_loss" in line]
    step = Step(Trainee(args), dtype)
    assert [step.step().item() for _ in range(6)] == expected
    saved = checkpoint.load(tmp_path / "run" / "last.pt")["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in step.trainee.model.state_dict().items())


def test_a_step_in_parts_is_the_same_step(tiny_args):
    whole = Step(Trainee(tiny_args()), "float32", steps=2)
    whole.run()
    parted = Step(Trainee(tiny_args()), "float32", steps=2)
    parted.run_in_parts()
    pairs = zip(whole.trainee.model.parameters(), parted.trainee.model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert tuple(parted.timer.ms) == PARTS and all(len(ms) == 2 for ms in parted.timer.ms.values())


def test_parts_leave_out_the_run_that_warms_up(tiny_args):
    step = Step(Trainee(tiny_args()), "float32", steps=2)
    step.timer.ms = dict(data=[100.0, 90.0, 1.0, 2.0, 3.0, 4.0])
    assert step.part_ms() == dict(data=2.5)


def test_adapters_alone_train(tiny_args):
    args = tiny_args(n_embd_wte=8, lora_rank=2)
    before = begin(args, {}).model.state_dict()
    step = Step(Trainee(args), "float32", steps=3)
    step.run()
    moved = {name for name, tensor in step.trainee.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(checkpoint.is_adapter(name) for name in moved)
    trained = sum(p.numel() for p in step.trainee.trained)
    share = trained / step.trainee.model.count_parameters()["total"]
    assert step.trainee.trained_flops == (2 + share) * step.trainee.model.flops_per_token(16)["total"]


def test_flops_are_those_that_train_py_writes(train, tiny_args, tmp_path):
    args = tiny_args(n_embd_wte=8)
    assert train(out_dir=tmp_path / "run", n_embd_wte=8, dataset=args.dataset).status == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    trainee = Trainee(args)
    assert trainee.flops_per_token == summary["flops_per_token"] == trainee.model.flops_per_token(args.block_size)
    assert trainee.trained_flops == 3 * summary["flops_per_token"]["total"]


def test_peak_memory_holds_weights_gradients_and_the_optimizer(tiny_args):
    """On the CPU, in a fresh process: 4 numbers of 4 bytes for each weight, at least."""
    args = tiny_args(n_embd=512, n_layer=3)
    weights = begin(args, {}).model.count_parameters()["total"]
    found = peak_bytes(Step, Trainee, (args,), ("float32", False))
    assert 16 * weights < found < 16 * weights + 100e6
    assert peak_bytes(Step, Trainee, (args,), ("float32", True)) is None  # compiled


def test_the_rate_of_products_is_a_number_above_zero():
    assert matrix_rate(32, 16, "cpu", "float32") > 0 and matrix_rate(32, 16, "cpu", "bfloat16") > 0


# -- beside nanoGPT -----------------------------------------------------------------------------------------------------


def test_nanogpt_trains_by_its_own_optimizer(tiny_args, checkout, capsys):
    trainee = NanoGPT(checkout, tiny_args())
    default, fused = (NanoGPTStep(trainee, "float32", False, fused) for fused in (False, True))
    assert capsys.readouterr().out == ""  # what it prints would stand between our lines
    assert not default.optimizer.defaults["fused"] and fused.optimizer.defaults["fused"]
    x, y = trainee.batch()
    assert x.shape == y.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1])
    before = trainee.model.lm_head.weight.clone()
    assert torch.isfinite(default.step()) and not torch.equal(before, trainee.model.lm_head.weight)


def test_nanogpt_at_its_best_is_the_fastest_of_its_rows(tiny_args, checkout, no_process):
    dense = tiny_args()
    planned = plans(dict(dense=dense, other=replace(dense, n_embd_wte=8)), dense, ["float32"], (False,), checkout)
    assert [(name, step_args) for name, _, _, _, step_args in planned] == [
        ("dense", ("float32", False)),
        ("other", ("float32", False)),
        ("nanoGPT, default", ("float32", False, False)),
        ("nanoGPT, fused AdamW", ("float32", False, True)),
        ("nanoGPT, fused AdamW", ("bfloat16", False, True)),
    ]
    rows, rates = measure(planned, 1, 3, lambda text: None)
    theirs = [row for row in rows if row["model"].startswith("nanoGPT")]
    best = max(theirs, key=lambda row: row["tokens_per_second"]["median"])
    assert [row for row in rows if row.get("best")] == [best] and set(rates) == {"float32"}
    for row in rows[:2]:
        for name in ("over_default", "over_best"):
            assert row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert row["over_best"]["high"] <= 1.001 * row["tokens_per_second"]["high"] / best["tokens_per_second"]["low"]


def test_a_spread_is_the_median_and_both_ends():
    assert spread([3.0, 1.0, 2.0]) == dict(median=2.0, low=1.0, high=3.0)


# -- bench.py -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, no_process):
    monkeypatch.setitem(PRESETS, "laptop", PRESETS["laptop"] | dict(n_embd=64, n_layer=1))
    return ("--shape", "laptop", "--vocab_size", 50, "--block_size", 8, "--steps", 1, "--rounds", 1)


def test_bench_writes_a_row_for_each_model_and_dtype(run_main, small, checkout, tmp_path):
    result = run_main("bench.py", "train", *small, "--vs", checkout, "--out", tmp_path / "new" / "bench.md")
    assert result.status == 0, result.err
    names = ["dense", "factorized 32/64", "LoRA 32 on 32/64", "V 40/64"]
    ours = {(row["model"], row["dtype"]): row for row in result.last["rows"] if "ms" in row}
    assert list(ours) == [(name, dtype) for name in names for dtype in ("float32", "bfloat16")]
    for row in ours.values():
        assert set(row["ms"]) == set(PARTS) and row["peak_memory_bytes"] == 10**6
        rate = result.last["mm_flops"][row["dtype"]]
        assert row["mm_share"] == pytest.approx(row["tokens_per_second"]["median"] * row["trained_flops"] / rate)
    text = (tmp_path / "new" / "bench.md").read_text()
    assert "1 x 8 = 8 tokens" in text and "nanoGPT best" in text and "ms of one step" in text
    assert all(row in text for row in result.out.splitlines()[:3])


def test_bench_train_mistakes(run_main, tmp_path, checkout, assert_one_line_error):
    for name in ("other", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty" / "model.py").write_text("")
    (tmp_path / "other" / "model.py").write_text("raise ImportError('no such thing')")
    tiny = ("--vocab_size", 50, "--block_size", 8, "--models", "dense", "--dtypes", "float32")
    for words, argv in [
        (["--models", "'sparse'", "lora"], ["--models", "dense,sparse"]),
        (["--models", "''"], ["--models", ""]),
        (["--dtypes", "'int8'", "bfloat16"], ["--dtypes", "int8"]),
        (["--dtypes", "float16", "--device is cpu"], ["--dtypes", "float32,float16"]),
        (["--rank 900", "768"], ["--rank", 900]),
        (["--rank 0", "1 or more"], ["--rank", 0]),
        (["--lora_rank 200", "128"], ["--lora_rank", 200]),
        (["--models factorized", "--shape pythia70m", "dense,vdproj"], ["--shape", "pythia70m"]),
        (["--vs", "--shape pythia70m"], ["--shape", "pythia70m", "--models", "dense", "--vs", checkout]),
        (["--vs", "model.py"], ["--vs", tmp_path]),
        (["--vs", "no such thing", "checkout"], ["--shape", "laptop", *tiny, "--vs", tmp_path / "other"]),
        (["--vs", "no GPT and GPTConfig"], ["--shape", "laptop", *tiny, "--vs", tmp_path / "empty"]),
        (["--out", "folder"], ["--out", tmp_path]),
        (["--device gpu"], ["--device", "gpu"]),
        (["--device cuda"], ["--device", "cuda", *tiny]),
        (["--steps 0"], ["--steps", 0]),
        (["--batchsize", "--batch_size"], ["--batchsize", 2]),
        (["--decode"], ["--decode"]),
        (["--shape", "gpt3"], ["--shape", "gpt3"]),
    ]:
        assert_one_line_error(run_main("bench.py", "train", *argv), *words)


def test_help_names_both_words_and_their_flags(run_main):
    assert "decode" in run_main("bench.py", "--help").out and "train" in run_main("bench.py", "--help").out
    assert "usage: bench.py train" in run_main("bench.py", "train", "--help").out
    assert "--kv_dtypes" in run_main("bench.py", "decode", "--help").out
