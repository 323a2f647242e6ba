"""--code_wte: a table that trains as it will be coded."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY

from common import checkpoint
from common.dataset import write_dataset
from common.modules import AtTable
from surgery.coded import draft_all, matrices_of, whole_moments
from surgery.subject import OwnSubject
from util_factorization.calibrate import calibrate
from util_factorization.straight_through import StraightThrough

V = 600  # smaller tables would pay more for the levels than for the codes
IDS = torch.randint(V, (8, 16), generator=torch.Generator().manual_seed(0))
RESUME = dict.fromkeys([*TINY, "dataset"]) | dict(init_from="resume")  # no flag but these


@pytest.fixture(params=[None, 24], ids=["dense", "factorized"])
def coded(request, tiny_model):
    """A model, and its table coded."""
    model = tiny_model(vocab_size=V, n_embd=32, n_embd_wte=request.param)
    windows = [(IDS.numpy(), IDS.roll(-1).numpy())]
    moments = lambda: calibrate(AtTable(model), windows, gradients=True)  # noqa: E731
    rounding = StraightThrough(model.lm_head.weight, 0.4, 2, torch.arange(V), moments)
    rounding.calibrate(0)
    model.requires_grad_(True)
    return model, rounding


@pytest.fixture
def coding_run(train, tmp_path_factory):
    """coding_run(out_dir=...): a run that codes its table, on a text of more ids than the toy's."""
    data = tmp_path_factory.mktemp("data")
    ids = np.random.default_rng(0).integers(1, 4, size=6000).cumsum() % V
    write_dataset(data, ids[:5000], ids[5000:], dict(vocab_size=V, tokenizer="none"))
    return lambda **flags: train(**dict(dataset=data, n_embd=32, code_wte=0.4, code_wte_every=3) | flags)


def test_the_forward_pass_reads_the_coded_table(coded):
    model, rounding = coded
    table = model.lm_head.weight.detach().clone()
    with rounding.rounded():
        assert model.transformer.wte.weight is model.lm_head.weight
        rounded, logits = model.lm_head.weight.detach().clone(), model(IDS)[0]
    assert torch.equal(model.lm_head.weight, table)
    assert torch.equal(rounded, rounding.coded) and not torch.equal(rounded, table)
    model.lm_head.weight.data.copy_(rounded)
    assert torch.equal(model(IDS)[0], logits)


def test_the_gradient_passes_straight_through(coded):
    """What backward leaves in the table is the gradient of a plain table that has the rounded values."""
    model, rounding = coded
    with rounding.rounded():
        model(IDS, IDS.roll(-1))[1].backward()
    through = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.lm_head.weight.data.copy_(rounding.coded)
    model(IDS, IDS.roll(-1))[1].backward()
    assert all(torch.equal(p.grad, through[name]) for name, p in model.named_parameters())


def test_the_table_is_coded_again_every_so_many_steps(coded):
    model, rounding = coded
    read = []
    for step in range(5):
        with rounding.rounded(step):
            read.append(model.lm_head.weight.data)
        model.lm_head.weight.data += 0.1 * torch.randn(V, 1)
    assert [torch.equal(*pair) for pair in zip(read, read[1:])] == [True, False, True, False]


def test_a_run_evaluates_and_keeps_the_coded_table(coding_run, train, tmp_path):
    result = coding_run(out_dir=tmp_path / "run")
    assert result.status == 0, result.err
    saved = checkpoint.load(tmp_path / "run" / "last.pt")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < saved["coded_wte"]["share"] <= 0.4 and summary["coded_wte"]["bytes"] <= 0.4 * 2 * V * 32
    assert not torch.equal(saved["model"]["lm_head.weight"], saved["unrounded_wte"])
    again = train(**RESUME | dict(out_dir=tmp_path / "run", eval_only=True))
    assert again.status == 0, again.err
    assert again.last["val_loss"] == summary["final"]["val_loss"]


def test_a_resumed_run_has_the_table_before_its_rounding(coding_run, train, tmp_path):
    complete, parts = tmp_path / "whole", tmp_path / "parts"
    coding_run(out_dir=complete, lr_decay_iters=6)
    coding_run(out_dir=parts, lr_decay_iters=6, max_iters=3)
    result = train(**RESUME | dict(out_dir=parts, max_iters=6))
    assert result.status == 0, result.err
    a, b = (checkpoint.load(folder / "last.pt") for folder in (complete, parts))
    assert torch.equal(a["unrounded_wte"], b["unrounded_wte"]) and a["val_loss"] == b["val_loss"]


def test_a_finished_table_is_coded_without_training(coding_run, tmp_path):
    dense = coding_run(out_dir=tmp_path / "dense", code_wte=None, code_wte_every=None)
    start = dict(init_from="prev_run", prev_run_ckpt=tmp_path / "dense", eval_only=True)
    coded = coding_run(out_dir=tmp_path / "coded", **start)
    assert dense.status == coded.status == 0, dense.err + coded.err
    before, after = (checkpoint.load(tmp_path / name) for name in ("dense", "coded"))
    changed = {name for name, tensor in before["model"].items() if not torch.equal(tensor, after["model"][name])}
    assert changed == {"transformer.wte.weight", "lm_head.weight"}
    assert "coded_wte" in after and "coded_wte" not in before  # a run without the flag leaves what it left before


def test_mistakes_are_one_line(train, tmp_path, assert_one_line_error):
    out = tmp_path / "run"
    assert_one_line_error(train(out_dir=out, code_wte=1.5), "--code_wte", 1.5)
    assert_one_line_error(train(out_dir=out, code_wte=0), "--code_wte")
    assert_one_line_error(train(out_dir=out, code_wte=0.01), "--code_wte 0.01", "bytes", "give more")
    assert_one_line_error(train(out_dir=out, code_wte=0.5, tie_head=False), "--code_wte 0.5", "--no-tie_head")
    assert_one_line_error(train(out_dir=out, code_wte_every=5), "--code_wte_every 5", "--code_wte")
    lora = dict(init_from="prev_run", prev_run_ckpt=out, lora_rank=2)
    assert_one_line_error(train(out_dir=out, code_wte=0.5, **lora), "--code_wte 0.5", "--lora_rank")
    assert not out.exists()


@pytest.mark.parametrize("rank", [None, 8])
def test_the_split_at_the_table_is_the_same_model(tiny_model, rank):
    model, x = tiny_model(n_embd_wte=rank), IDS % 97
    for split in (AtTable(model), OwnSubject(model)):
        rows = split.lookup(x)
        assert rows.shape[-1] == (rank or 16)
        torch.testing.assert_close(split.logits(split.trunk(rows)), model(x)[0])


def test_a_factorized_table_of_ours_can_be_measured_by_bits(tiny_model, tmp_path):
    subject = OwnSubject(tiny_model(vocab_size=V, n_embd=32, n_embd_wte=24))
    moments = whole_moments(subject, torch.ones(V), [(IDS, IDS.roll(-1))], tmp_path / "moments.pt")
    assert moments.C.shape == moments.G.shape == (24, 24)  # of what the narrow head reads, at the narrow row
    draft = draft_all(matrices_of(subject, "wte"), moments)["wte"]
    assert draft.Z.shape == (V, 24) and draft.P.shape == (24, 24)
    C, squares = moments.linears.of("transformer.h.0.mlp.mlp_up")
    assert C.shape == (32, 32) and squares.shape == (128,)
