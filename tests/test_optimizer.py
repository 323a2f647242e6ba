"""Muon, and which weights each optimizer has."""

import pytest
import torch

from train_args import TrainArgs
from training.optimizer import Both, Muon, make_optimizer, orthogonal


def test_a_step_of_muon_is_that_of_torch():
    """Several matrices of several shapes, several steps, weight decay. torch has Muon from 2.9 on."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    draw = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((8, 8), (24, 8), (8, 24), (8, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    optimizers = Muon(ours, 0.1, 0.05), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.05)
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=draw)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, first in zip(ours, theirs, before):  # both compute in bfloat16
        assert (p - q).norm() < 0.02 * (p - first).norm()


def test_orthogonal_keeps_the_directions_and_evens_the_sizes():
    M = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonal(M)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    sizes = U.mT @ found @ Vh.mT  # diagonal where the singular vectors stay
    assert (sizes - torch.diag_embed(sizes.diagonal(dim1=1, dim2=2))).abs().max() < 1e-9
    assert 0.6 < sizes.diagonal(dim1=1, dim2=2).min() and sizes.max() < 1.3


@pytest.mark.parametrize("shape", [dict(), dict(n_embd_wte=8), dict(n_embd_wte=8, lora_rank=2, lora_targets="wte,q_proj")])
def test_each_trained_weight_has_one_optimizer_and_its_rate(tiny_model, shape):
    model = tiny_model(**shape)
    args = TrainArgs(optimizer="muon", learning_rate=1e-3, muon_lr=0.02, table_lr=5e-3)
    optimizer = make_optimizer(args, model)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["rate"] * 1e-3 for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        in_block = ".h." in name and model.get_parameter(name).dim() == 2
        of_table = any(part in name for part in ("wte", "scale_"))
        assert rate == pytest.approx(0.02 if in_block else 5e-3 if of_table else 1e-3), name
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name in rates if model.get_parameter(name).dim() >= 2}


@pytest.mark.parametrize("shape", [dict(), dict(n_embd_wte=8, lora_rank=2, lora_targets="wte,q_proj")])
def test_adamw_alone_is_one_optimizer_of_two_groups(tiny_model, shape):
    """As in runs that older versions began, so that they resume; adapters have no vectors."""
    optimizer = make_optimizer(TrainArgs(), tiny_model(**shape))
    assert not isinstance(optimizer, Both) and len(optimizer.param_groups) == 2


def test_a_gradient_that_overflows_skips_both(tiny_model):
    model = tiny_model()
    optimizer = make_optimizer(TrainArgs(optimizer="muon"), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for scale in (float("inf"), 1.0):
        loss = model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))[1]
        scaler.scale(loss * scale).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters() if name != "transformer.wpe.weight"]
        assert all(moved) if scale == 1.0 else not any(moved)


def test_muon_trains_and_resumes_bit_for_bit(train, tmp_path):
    flags = dict(optimizer="muon", table_lr=1e-2, eval_interval=10, log_interval=5)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(out_dir=whole, max_iters=20, lr_decay_iters=20, **flags).status == 0
    assert train(out_dir=halves, max_iters=10, lr_decay_iters=20, **flags).status == 0
    assert train(out_dir=halves, init_from="resume", max_iters=20).status == 0
    ends = [torch.load(out / "last.pt", weights_only=True)["model"] for out in (whole, halves)]
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


def test_a_rate_for_muon_without_muon_is_one_line(train, tmp_path, assert_one_line_error):
    assert_one_line_error(train(out_dir=tmp_path / "run", muon_lr=0.02), "--muon_lr 0.02", "--optimizer muon")
