"""Compressed keys and values in training: objectives, what trains, whole epochs, and the report."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import shell
import torch
from conftest import REPO, TINY, as_flags
from torch.nn import functional as F

from common.dataset import Dataset
from model import GPT, GPTConfig
from reports.claims import cache_claims, judge
from reports.rows import Row, read_rows
from train_args import PRESETS, TrainArgs, parse_args
from training import checkpoint
from training.evaluate import Restored, evaluate, position_bins
from training.rules import trained_names

SHAPE = dict(rotary_pct=0.25, parallel_residual=True, norms_per_layer=1, tie_head=False, n_embd=16, n_head=2, dropout=0.0)
EPOCHS = dict(max_iters=None, eval_interval=None, max_epochs=3, max_train_samples=40, warmup_iters=0, min_lr=1e-2)
RECON = dict(objective="v_recon", train_only="v_compress,v_restore")


def weights(folder, name="ckpt.pt"):
    return checkpoint.load(folder / name)["model"]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(norms_per_layer=2), dict(total=70_426_624, kv_compression=0)),
        (dict(), dict(total=70_420_480, kv_compression=0)),
        (dict(v_proj_dim=320), dict(total=72_391_552, kv_compression=1_971_072)),
        (dict(v_proj_dim=320, v_proj_narrow=True), dict(total=69_239_680, kv_compression=0)),
        (dict(v_proj_dim=320, k_proj_dim=320), dict(total=74_362_624, kv_compression=2 * 1_971_072)),
    ],
)
def test_the_pythia_preset_has_the_seeds_parameters(changes, expected):
    args = TrainArgs(**PRESETS["pythia70m"] | changes)
    fields = {name: getattr(args, name) for name in GPTConfig.__dataclass_fields__ if hasattr(args, name)}
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304, **fields))
    counts = model.count_parameters()
    assert {name: counts[name] for name in expected} == expected
    assert sum(n for name, n in counts.items() if name != "total") == counts["total"]


def test_rotary_attention_sees_distances_only(tiny_model):
    """Two keys and a query further along a text are the same to each other."""
    attn = tiny_model(**SHAPE | dict(rotary_pct=1.0)).transformer.h[0].attn
    q, k = torch.randn(2, 1, 1, 16)
    at = lambda x, place: attn.rotary(x, place).view(2, 8)  # noqa: E731
    near = (at(q, 5) * at(k, 2)).sum(-1)
    torch.testing.assert_close((at(q, 12) * at(k, 9)).sum(-1), near)
    assert not torch.allclose((at(q, 12) * at(k, 8)).sum(-1), near)


def test_a_bottleneck_as_wide_as_the_model_can_be_the_identity(tiny_model):
    model = tiny_model(**SHAPE, v_proj_dim=16, k_proj_dim=16)
    plain = tiny_model(**SHAPE)
    with torch.no_grad():
        for block in model.transformer.h:
            for kind in "vk":
                turn = torch.linalg.qr(torch.randn(16, 16)).Q
                for part, weight in (("compress", turn), ("restore", turn.T)):
                    part = getattr(block.attn, f"{kind}_{part}")
                    part.weight.copy_(weight)
                    part.bias.zero_()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    x = torch.randint(97, (2, 16))
    torch.testing.assert_close(model(x)[0], plain(x)[0], atol=1e-4, rtol=1e-4)


# -- what a bottleneck loses ------------------------------------------------------------------------------------------


def test_reconstruction_is_what_the_layers_hold(tiny_model, toy_dataset):
    model = tiny_model(**SHAPE, v_proj_dim=10)
    watch, data = Restored(model), Dataset(toy_dataset)
    inputs = []
    for block in model.transformer.h:
        block.attn.v_proj.register_forward_hook(lambda module, args, out: inputs.append(out))
    found = evaluate(model, data, TrainArgs(**TINY), "cpu", nullcontext(), watch)
    V = [torch.cat(inputs[layer::2]).flatten(0, 1).double() for layer in range(2)]  # (tokens, d) of each layer
    W = [F.linear(F.linear(v, a.v_compress.weight.double(), a.v_compress.bias.double()), a.v_restore.weight.double(),
                  a.v_restore.bias.double()) for v, a in zip(V, (b.attn for b in model.transformer.h))]  # fmt: skip
    errors = [((w - v) ** 2).sum() / ((v - v.mean(0)) ** 2).sum() for v, w in zip(V, W)]
    assert found["v_error"] == pytest.approx([e.item() for e in errors], rel=1e-4)
    assert found["v_recon"] == pytest.approx(sum(((w - v) ** 2).mean().item() for v, w in zip(V, W)) / 2, rel=1e-5)


def test_loss_by_position_adds_up(tiny_model, toy_dataset):
    model, data = tiny_model(block_size=160), Dataset(toy_dataset)
    args = TrainArgs(**TINY | dict(block_size=160))
    found = evaluate(model, data, args, "cpu", nullcontext())
    parts = found["position_loss"]
    assert list(parts) == ["0-16", "16-32", "32-64", "64-96", "96-128", "128-160"]
    widths = [high - low for low, high in position_bins(160)]
    assert sum(loss * n for loss, n in zip(parts.values(), widths)) / 160 == pytest.approx(found["val_loss"])
    x, y = next(data.fixed_windows(12, 12, 160))
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.from_numpy(x))[0].transpose(1, 2), torch.from_numpy(y), reduction="none")
    assert parts["16-32"] == pytest.approx(loss[:, 16:32].mean().item(), rel=1e-5)
    assert position_bins(2048)[-4:] == [(128, 256), (256, 512), (512, 1024), (1024, 2048)]
    assert position_bins(16) == [(0, 16)] and position_bins(20) == [(0, 16), (16, 20)]


# -- training ---------------------------------------------------------------------------------------------------------


def test_phase_1_moves_its_own_parameters_and_no_other(train, tmp_path):
    train(out_dir=tmp_path / "base", **SHAPE)
    train(out_dir=tmp_path / "one", init_from="prev_run", prev_run_ckpt=tmp_path / "base", v_proj_dim=10, max_iters=60,
          eval_interval=20, **RECON)  # fmt: skip
    before, after = weights(tmp_path / "base"), weights(tmp_path / "one", "last.pt")
    assert set(after) - set(before) == {f"transformer.h.{i}.attn.v_{part}.{w}" for i in (0, 1)
                                        for part in ("compress", "restore") for w in ("weight", "bias")}  # fmt: skip
    assert all(torch.equal(after[name], before[name]) for name in before)
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    recon = [line["v_recon"] for line in lines if "v_recon" in line]
    assert recon[-1] < 0.7 * recon[0] and summary(tmp_path / "one")["best"]["v_recon"] == min(recon)

    train(out_dir=tmp_path / "two", init_from="prev_run", prev_run_ckpt=tmp_path / "one", freeze="v_compress,v_restore",
          weight_decay=0.5)  # fmt: skip
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two", "last.pt")
    for name in one:
        frozen = ".v_compress." in name or ".v_restore." in name
        assert torch.equal(one[name], two[name]) == frozen, name
    found = summary(tmp_path / "two")
    assert found["starts_from"]["tokens"] == (6 + 60) * 4 * 2 * 16 and found["cache_widths"] == [16, 10]
    assert found["parameters_trained"] == found["parameters"]["total"] - found["parameters"]["kv_compression"]


def test_the_weight_of_the_reconstruction_counts(train, tmp_path):
    """With a large weight the error gets smaller than without, and the training loss is the sum of the two."""
    errors = {}
    for weight in (0.0, 30.0):
        out = tmp_path / str(weight)
        train(out_dir=out, **SHAPE, v_proj_dim=4, max_iters=60, eval_interval=60, log_interval=1, v_recon_weight=weight)
        errors[weight] = summary(out)["last"]["v_recon"]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        first = next(line["train_loss"] for line in lines if "train_loss" in line)
        model = GPT(GPTConfig(**checkpoint.load(out)["config"]))
        torch.manual_seed(1337)
        start = GPT(model.config)
        watch, data = Restored(start), Dataset(TrainArgs(**checkpoint.load(out)["args"]).dataset)
        losses = []
        for micro in (0, 1):
            x, y = (torch.from_numpy(a) for a in data.batch(4, 16, 1337, 0, micro))
            losses.append((start(x, y)[1] + weight * watch.loss()).item())
        assert first == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert errors[30.0] < 0.5 * errors[0.0]


def test_values_and_reconstruction_train_compiled_as_eager(train, tmp_path, monkeypatch):
    calls, compile = [], torch.nn.Module.compile  # the backend that traces without generating C++
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: calls.append(1) or compile(self, backend="aot_eager"))
    out = []
    for compiled in (False, True):
        name = tmp_path / str(compiled)
        result = train(out_dir=name, compile=compiled, **SHAPE, v_proj_dim=10, k_proj_dim=8, v_recon_weight=1.0)
        assert result.status == 0, result.err
        out.append([summary(name)["last"][key] for key in ("val_loss", "v_recon")])
    assert out[0] == pytest.approx(out[1], rel=1e-4) and calls == [1]


def test_an_epoch_reads_every_sequence_once_in_another_order_each_time(toy_dataset):
    data = Dataset(toy_dataset)
    assert data.epoch_steps(8, 16, 40) == 5 and data.epoch_steps(8, 16) == (4999 // 16) // 8
    orders = []
    for epoch in (0, 1):
        windows = [data.epoch_batch(8, 16, 40, place, 7, epoch) for place in range(0, 40, 8)]
        x, y = (np.concatenate([w[i] for w in windows]) for i in (0, 1))
        expected = {tuple(data.train[i * 16 : i * 16 + 16].tolist()): i for i in range(40)}
        orders.append([expected[tuple(row)] for row in x.tolist()])
        assert sorted(orders[-1]) == list(range(40))
        assert all(y[j].tolist() == data.train[i * 16 + 1 : i * 16 + 17].tolist() for j, i in enumerate(orders[-1]))
    assert orders[0] != orders[1]


def test_epochs_resume_as_if_uninterrupted_and_evaluate_after_each(train, tmp_path):
    complete, parts = tmp_path / "whole", tmp_path / "parts"
    train(out_dir=complete, **EPOCHS)
    train(out_dir=parts, **EPOCHS | dict(max_epochs=2, lr_decay_iters=15))
    train(out_dir=parts, init_from="resume", **EPOCHS | dict(lr_decay_iters=15))
    assert all(torch.equal(a, b) for a, b in zip(weights(complete, "last.pt").values(), weights(parts, "last.pt").values()))
    lines = [json.loads(line) for line in (complete / "metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines if "val_loss" in line] == [0, 5, 10, 15]  # 40 sequences, 8 a step
    assert summary(complete)["epoch_steps"] == 5 and summary(complete)["tokens"] == 15 * 8 * 16


def test_patience_stops_and_the_best_is_read_back(train, tmp_path):
    out = tmp_path / "run"
    result = train(out_dir=out, **EPOCHS | dict(max_epochs=30, patience=2, learning_rate=3.0, min_lr=3.0))
    found = summary(out)
    assert found["last"]["iter"] == found["best"]["iter"] + 2 * 5 < 30 * 5
    assert found["final"] == found["best"] and result.last["val_loss"] == found["best"]["val_loss"] < found["last"]["val_loss"]
    again = train(out_dir=out, init_from="resume", **EPOCHS | dict(max_epochs=30, learning_rate=3.0, min_lr=3.0))
    assert again.status == 0 and summary(out)["last"]["iter"] == found["last"]["iter"]


def test_a_previous_run_gets_a_bottleneck_and_keeps_the_rest(train, tmp_path, assert_one_line_error):
    train(out_dir=tmp_path / "base", **SHAPE)
    start = dict(init_from="prev_run", prev_run_ckpt=tmp_path / "base")
    train(out_dir=tmp_path / "kv", **start, k_proj_dim=8, v_proj_dim=8, max_iters=0, warmup_iters=0, eval_only=True)
    base, kv = weights(tmp_path / "base"), weights(tmp_path / "kv")
    assert all(torch.equal(base[name], kv[name]) for name in base) and len(kv) == len(base) + 2 * 8
    for words, more in [
        (["--v_proj_narrow", "drop the flag"], dict(v_proj_dim=8, v_proj_narrow=True)),
        (["--v_proj_dim 17"], dict(v_proj_dim=17)),
        (["--v_proj_dim 6", "has 8"], dict(v_proj_dim=6, prev_run_ckpt=tmp_path / "kv")),
        (["--objective v_recon", "--v_proj_dim"], RECON),
    ]:
        assert_one_line_error(train(out_dir=tmp_path / "no", **start | more), *words)
    assert not (tmp_path / "no").exists()


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_flags_that_contradict_each_other(capsys):
    for words, argv in [
        (["--v_proj_dim 900", "--n_embd 768"], "--v_proj_dim 900"),
        (["--v_proj_dim 0"], "--v_proj_dim 0"),
        (["--k_proj_dim -3"], "--k_proj_dim -3"),
        (["--v_proj_narrow", "--v_proj_dim"], "--v_proj_narrow"),
        (["--v_proj_narrow", "--n_head 12"], "--v_proj_narrow --v_proj_dim 100"),
        (["--rotary_pct 0.3"], "--rotary_pct 0.3"),
        (["--rotary_pct 0.01"], "--rotary_pct 0.01"),
        (["--norms_per_layer 1", "--parallel_residual"], "--norms_per_layer 1"),
        (["--no-tie_head", "--n_embd_wte"], "--no-tie_head --n_embd_wte 8"),
        (["--objective v_recon", "--train_only"], "--objective v_recon --v_proj_dim 8"),
        (["--objective v_recon", "--v_proj_dim"], "--objective v_recon --train_only v_compress"),
        (["--v_recon_weight 0.1", "--objective"],
         "--objective v_recon --v_recon_weight 0.1 --v_proj_dim 8 --train_only v_compress"),
        (["--v_recon_weight 0.1", "--v_proj_dim"], "--v_recon_weight 0.1"),
        (["--max_train_samples 8", "--max_epochs"], "--max_train_samples 8"),
        (["--max_iters 8", "--max_epochs 2"], "--max_epochs 2 --max_iters 8"),
        (["--eval_interval 8", "--max_epochs 30"], "--preset pythia70m --eval_interval 8"),
        (["--patience 0"], "--patience 0"),
        (["--lora_rank", "--freeze wte"], "--lora_rank 4 --init_from prev_run --prev_run_ckpt a --freeze wte"),
    ]:  # fmt: skip
        with pytest.raises(SystemExit) as end:
            parse_args(argv.split())
        err = capsys.readouterr().err
        assert end.value.code == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), (argv, err)


def test_patterns_that_match_nothing_or_everything(train, tmp_path, assert_one_line_error):
    for words, flags in [
        (["--freeze", "'v_compress' names no parameter", "v_proj"], dict(freeze="v_compress")),
        (["--train_only", "attn.z"], dict(train_only="wte,attn.z")),
        (["--freeze transformer", "every parameter"], dict(freeze="transformer", n_embd_wte=None)),
        (["--train_only", "'wt'", "names no parameter"], dict(train_only="wt")),
        (["--train_only", "''"], dict(train_only=",")),
        (["--train_only", "''"], dict(v_proj_dim=8, objective="v_recon", train_only=",")),
        (["--freeze ln_f", "--train_only ln_f"], dict(freeze="ln_f", train_only="ln_f")),
        (["--objective v_recon", "v_compress,v_restore"],
         dict(v_proj_dim=8, objective="v_recon", train_only="v_compress,v_proj")),
        (["--max_train_samples 999", "312 sequences"], EPOCHS | dict(max_train_samples=999)),
        (["--max_train_samples 4", "one step of 8"], EPOCHS | dict(max_train_samples=4)),
        (["--warmup_iters 15"], EPOCHS | dict(warmup_iters=15)),
    ]:  # fmt: skip
        assert_one_line_error(train(out_dir=tmp_path / "no", **flags), *words)
    assert not (tmp_path / "no").exists()


def test_a_layer_is_named_by_whole_parts():
    names = [f"transformer.h.{i}.{part}.weight" for i in (1, 10, 11) for part in ("attn.v_proj", "mlp.mlp_up")]
    assert trained_names(TrainArgs(freeze="h.1"), names) == {n for n in names if ".h.1." not in n}
    assert trained_names(TrainArgs(train_only="v_proj.weight,h.10", freeze="h.1"), names) == {*names[2:4], names[4]}


def test_adapters_beside_a_bottleneck_that_is_new_are_refused(train, tmp_path, assert_one_line_error):
    train(out_dir=tmp_path / "base", **SHAPE)
    new = dict(init_from="prev_run", prev_run_ckpt=tmp_path / "base", lora_rank=2, lora_targets="q_proj", v_proj_dim=8)
    assert_one_line_error(train(out_dir=tmp_path / "no", **new), "--v_proj_dim 8", "--lora_rank")


def test_a_resume_keeps_counting_what_it_counted(train, tmp_path, assert_one_line_error):
    train(out_dir=tmp_path / "steps")
    train(out_dir=tmp_path / "epochs", **EPOCHS)
    for name, words, flags in [
        ("steps", ["--max_epochs 3", "steps"], dict(max_epochs=3)),
        ("epochs", ["--max_iters 6", "epochs"], dict()),  # TINY's
        ("epochs", ["--eval_interval 3", "epochs"], dict(max_iters=None)),
    ]:
        assert_one_line_error(train(out_dir=tmp_path / name, init_from="resume", **flags), *words)


def test_a_rotary_model_starts_again_at_another_length(train, tmp_path):
    train(out_dir=tmp_path / "base", **SHAPE)
    start = dict(init_from="prev_run", prev_run_ckpt=tmp_path / "base", eval_only=True)
    for length, flags in ((16, dict(block_size=None)), (8, dict(block_size=8)), (128, dict(block_size=None, preset="laptop"))):
        out = tmp_path / str(length)
        shape = {name: None for name in ("n_layer", "n_head", "n_embd", "dropout")}
        assert train(out_dir=out, **start | shape | flags).status == 0
        assert checkpoint.load(out)["config"]["block_size"] == length


def test_every_sequence_of_an_epoch_is_trained_on_and_a_later_run_shuffles_anew(train, tmp_path, monkeypatch):
    read, draw = [], Dataset.epoch_batch

    def noted(self, *args):
        read.append((args[4:], draw(self, *args)[0]))
        return read[-1][1], draw(self, *args)[1]

    monkeypatch.setattr(Dataset, "epoch_batch", noted)
    train(out_dir=tmp_path / "first", **EPOCHS | dict(max_epochs=1))
    rows = np.concatenate([x for _, x in read])
    assert len(rows) == 40 and len({tuple(row) for row in rows.tolist()}) == 40
    keys = {key for key, _ in read}
    read.clear()
    train(out_dir=tmp_path / "second", init_from="prev_run", prev_run_ckpt=tmp_path / "first", **EPOCHS | dict(max_epochs=1))
    assert not keys & {key for key, _ in read}


@pytest.mark.slow
def test_two_processes_stop_together_and_train_as_one(train, warm_python, tmp_path, toy_dataset):
    flags = TINY | EPOCHS | SHAPE | dict(dataset=toy_dataset, max_epochs=30, patience=1, learning_rate=1.0, min_lr=1.0,
                                         v_proj_dim=10, v_recon_weight=0.1, compile=False)  # fmt: skip
    flags = {name: value for name, value in flags.items() if value is not None}
    assert train(out_dir=tmp_path / "one", **dict.fromkeys(TINY) | flags).status == 0
    shell.train_two(REPO, as_flags(flags | dict(out_dir=tmp_path / "two")))
    losses = []
    for name in ("one", "two"):
        found = summary(tmp_path / name)
        assert found["last"]["iter"] == found["best"]["iter"] + 5 < 150
        losses.append(found["best"]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- the report -------------------------------------------------------------------------------------------------------


def test_report_of_the_cache(train, tmp_path, run_main):
    for seed in (1, 2):
        out, flags = tmp_path / f"seed_{seed}", SHAPE | EPOCHS | dict(seed=seed, max_epochs=2)
        train(out_dir=out / "pythia_baseline", **flags)
        train(out_dir=out / "vdproj_end_to_end_r10", v_proj_dim=10, v_recon_weight=0.1, **flags)
        train(out_dir=out / "vdproj_phase1_r10", v_proj_dim=10, **flags | RECON)
        train(out_dir=out / "vdproj_two_phase_r10", init_from="prev_run", prev_run_ckpt=out / "vdproj_phase1_r10",
              freeze="v_compress,v_restore", **flags)  # fmt: skip
        train(out_dir=out / "kvdproj_end_to_end_r10", v_proj_dim=10, k_proj_dim=10, **flags)
    result = run_main("report.py", "--runs", tmp_path, "--html")
    assert result.status == 0, result.err
    text = (tmp_path / "report.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    column = next(line for line in lines if "KV reduction" in line).index("KV reduction")
    reduction = {line[1].split()[0]: line[column] for line in lines if len(line) > 12 and line[1]}
    assert reduction["Pythia"] == "0.00%" and reduction["K+V"] == "37.50%"
    assert "How low-rank is the token table" not in text and "How far can the value cache be compressed?" in text
    row = next(row for row in read_rows(tmp_path)[0] if row.label == "end to end")
    assert row.k == 10 and row.series == "V-DProj, end to end"
    assert f"{np.exp(row.values('best', 'position_loss', '0-16')).mean():,.1f}" in text
    assert "2-phase vs end to end (k=10), positions 0-16" in text and "of V's variance missed" in text
    for figure in ("loss_against_cache", "epochs", "positions"):
        assert (tmp_path / f"{figure}.png").is_file() and f"({figure}.png)" in text
        assert f'<figure id="{figure}"' in Path(result.last["html"]).read_text()


def cache_row(label, loss, **changes):
    """A row of three seeds that differ by 0.1, with the paired noise of a thousandth."""
    summaries = {}
    for seed in (1, 2, 3):
        value = loss + 0.1 * seed + 0.001 * ((seed * len(label)) % 3)
        best = dict(val_loss=value, position_loss={"0-16": value + 1, "16-32": value}, v_error=[changes.get("missed", 0.1)] * 2)
        parameters = dict(positions=0, mlp=1, norms=1, total=2)
        summaries[seed] = dict(
            dataset="d", val_unigram_entropy=6.0, eval_tokens=1, tokens_per_step=1, n_embd=16, parameters=parameters, best=best,
            last=dict(val_loss=value + changes.get("rise", 0.2)), cache_widths=(16, 16 if label == "Pythia" else 10), tokens=10,
            starts_from=None, seconds=1.0,
        )  # fmt: skip
    return Row(label, label, label, "", summaries, {}, of_cache=True)


def test_claims_of_the_cache_follow_from_the_numbers():
    def verdicts(*rows):
        return {claim.text: verdict for group in cache_claims(rows) for claim, verdict, _ in judge(group, rows)}

    good = verdicts(cache_row("Pythia", 5.0), cache_row("end to end", 4.9, missed=0.3, rise=0.4), cache_row("2-phase", 4.8),
                    cache_row("narrow", 5.1), cache_row("2-phase trained", 4.7), cache_row("K+V", 5.01),
                    cache_row("phase 1", 8.0), cache_row("phase 1 trained", 5.0, missed=0.01))  # fmt: skip
    for text, verdict in good.items():
        assert verdict == ("does not hold" if text.startswith("Compressed values cost") else "holds"), text  # narrow's 0.1
    assert len(good) == 12
    bad = verdicts(cache_row("Pythia", 4.5), cache_row("end to end", 4.9), cache_row("2-phase", 5.1, missed=0.3, rise=0.4),
                   cache_row("narrow", 4.8), cache_row("2-phase trained", 5.2), cache_row("K+V", 5.01),
                   cache_row("phase 1", 8.0), cache_row("phase 1 trained", 5.0, missed=0.2))  # fmt: skip
    assert set(bad.values()) == {"does not hold"} and bad.keys() == good.keys()


def test_report_of_what_is_there(train, tmp_path, run_main, assert_one_line_error):
    """Phase 1 alone, a run that counts steps, runs of two lengths, beside a token table's."""
    flags = SHAPE | EPOCHS | dict(max_epochs=1)
    train(out_dir=tmp_path / "vdproj_phase1_r10", v_proj_dim=10, **flags | RECON)
    assert run_main("report.py", "--runs", tmp_path).status == 0
    assert "perplexity at positions" not in (tmp_path / "report.md").read_text()
    train(out_dir=tmp_path / "pythia_baseline", **SHAPE)
    train(out_dir=tmp_path / "vdproj_end_to_end_r10", v_proj_dim=10, **flags | dict(block_size=32))
    train(out_dir=tmp_path / "gpt_baseline")
    result = run_main("report.py", "--runs", tmp_path)
    assert result.status == 0, result.err
    text = (tmp_path / "report.md").read_text()
    assert (
        "How low-rank is the token table?" in text and "How far can the value cache be compressed?" in text and "16-32" in text
    )
    (tmp_path / "vdproj_end_to_end_r10" / "metrics.jsonl").unlink()
    assert_one_line_error(run_main("report.py", "--runs", tmp_path), "metrics.jsonl")
