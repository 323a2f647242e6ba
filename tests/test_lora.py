import json
import re

import numpy as np
import pytest
import torch
from conftest import REPO, in_use
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, effective_weight
from train_args import LORA_TARGETS, PRESETS, TrainArgs
from training import checkpoint

ALL = ",".join(LORA_TARGETS)
PLAIN = ("q_proj", "k_proj", "v_proj", "c_proj", "mlp_up", "mlp_down")  # ordinary linear layers
DENSE = "wte," + ",".join(PLAIN)


def batch(model, B=3):
    torch.manual_seed(1)
    x = torch.randint(model.config.vocab_size, (B, model.config.block_size + 1))
    return x[:, :-1], x[:, 1:]


def adapters(model):
    return {name: p for name, p in model.named_parameters() if checkpoint.is_adapter(name)}


def adapted(tiny_model, fresh=False, **changes):
    """A model with random adapters, or fresh ones: A random, B zeros."""
    parts = dict(n_embd_wte=8, lora_rank=3, lora_alpha=6.0, lora_targets=ALL) | changes
    model = tiny_model(**parts)
    if fresh:
        for name, p in adapters(model).items():
            torch.nn.init.zeros_(p) if name.endswith(".B") else torch.nn.init.kaiming_uniform_(p, a=5**0.5)
    return model


# -- the adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tying", [False, True])
def test_a_fresh_adapter_changes_nothing(tiny_config, tying):
    parts = dict(n_embd_wte=8, n_embd_wte_scale_tying=tying)
    torch.manual_seed(0)
    plain = GPT(tiny_config(**parts)).eval()
    torch.manual_seed(0)
    model = GPT(tiny_config(**parts, lora_rank=3, lora_alpha=6.0, lora_targets=ALL)).eval()
    assert len(adapters(model)) == 2 * ((2 if tying else 3) + 2 * len(PLAIN))
    assert torch.equal(plain(batch(plain)[0])[0], model(batch(model)[0])[0])
    for name, p in adapters(model).items():  # B zeros, A uniform as wide as torch draws a Linear's weight
        bound = 0 if name.endswith(".B") else p.shape[1] ** -0.5
        assert p.abs().max() <= bound and (bound == 0 or p.abs().max() > bound / 2)


def test_every_adapter_gets_a_gradient(tiny_model):
    model = adapted(tiny_model, fresh=True)
    model(*batch(model))[1].backward()
    for name, p in adapters(model).items():
        if name.endswith(".B"):
            assert p.grad.abs().max() > 0, name
            p.data -= 0.1 * p.grad  # away from zero, so that A matters too
    model.zero_grad()
    model(*batch(model))[1].backward()
    for name, p in adapters(model).items():
        assert p.grad.abs().max() > 0, name


def test_the_adapter_of_the_table_acts_in_lookup_and_head(tiny_model):
    model = adapted(tiny_model, lora_targets="wte")
    plain = adapted(tiny_model, lora_rank=None)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not checkpoint.is_adapter(k)})
    x, _ = batch(model)
    table = effective_weight(model.transformer.wte)
    assert not torch.allclose(table, plain.transformer.wte.weight, atol=1e-2)
    rows = F.embedding(x, table) @ plain.transformer.scale_up.weight.T
    torch.testing.assert_close(model.lookup(x), rows, atol=1e-5, rtol=1e-5)
    h = torch.randn(2, 5, 16)
    head = h @ plain.transformer.scale_down.weight @ table.T
    torch.testing.assert_close(model.logits(h), head, atol=1e-4, rtol=1e-5)
    assert adapters(model).keys() == {"transformer.wte.lora.A", "transformer.wte.lora.B"}  # one adapter, listed once


@pytest.mark.parametrize("parts", [dict(), dict(n_embd_wte_scale_tying=True), dict(n_embd_wte=None, lora_targets=DENSE)])
def test_merging_keeps_logits_tie_and_size(tiny_model, parts):
    model = adapted(tiny_model, **parts)
    plain = adapted(tiny_model, **parts | dict(lora_rank=None))
    before, table = model(*batch(model))[0], model.effective_table()
    model.merge_lora()
    torch.testing.assert_close(model(*batch(model))[0], before, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(model.effective_table(), table, atol=1e-5, rtol=1e-5)
    assert model.lm_head.weight is model.transformer.wte.weight
    if parts.get("n_embd_wte_scale_tying"):
        assert model.transformer.scale_up.weight is model.transformer.scale_down.weight
    assert model.count_parameters() == plain.count_parameters() and model.state_dict().keys() == plain.state_dict().keys()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_lora()  # a second time adds nothing
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_plain_targets_equal_peft_in_outputs_and_gradients(tiny_model):
    peft = pytest.importorskip("peft")
    ours = adapted(tiny_model, lora_targets=",".join(PLAIN), lora_dropout=0.0)
    base = adapted(tiny_model, lora_rank=None)
    base.load_state_dict({k: v for k, v in ours.state_dict().items() if not checkpoint.is_adapter(k)})
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(PLAIN)), base).eval()

    def matched():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                yield (
                    p,
                    ours.get_parameter(
                        name.replace("lora_A.default.weight", "lora.A").replace("lora_B.default.weight", "lora.B")
                    ),
                )

    for p, q in matched():
        p.data.copy_(q.data)
    assert len(list(matched())) == 2 * 2 * len(PLAIN)
    a, b = theirs(*batch(ours)), ours(*batch(ours))
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)
    a[1].backward()
    b[1].backward()
    for p, q in matched():
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def test_dropout_of_adapters_is_of_what_they_read_and_off_in_evaluation(tiny_model):
    model = adapted(tiny_model, lora_dropout=0.5)
    x, _ = batch(model)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])
    linear = model.transformer.h[0].attn.q_proj
    torch.testing.assert_close(linear(torch.zeros(16)), linear.bias)  # nothing read, nothing added


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(lora_targets="c_attn"), "'c_attn' names no matrix of this model"),
        (dict(n_embd_wte=None), "'scale_down' names no matrix of this model"),
        (dict(lora_rank=9), "rank 9 does not fit"),
        (dict(lora_rank=0), "rank 0 does not fit"),
    ],
)
def test_what_the_model_refuses(tiny_model, changes, words):
    with pytest.raises(ValueError, match=words):
        adapted(tiny_model, **changes)


@pytest.mark.parametrize("parts", [dict(), dict(n_embd_wte=None, lora_targets=DENSE)])
def test_flops_with_adapters_are_what_torch_counts(tiny_model, parts):
    model = adapted(tiny_model, **parts)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch(model, B=1)[0])
    costs = model.flops_per_token(16)
    # causal attention needs half of the T x T scores; plain matrix products compute all of them
    assert counter.get_total_flops() / 16 == costs["total"] + costs["attention"]
    assert costs["adapters"] > 0
    counts = model.count_parameters()
    assert counts["adapters"] == sum(p.numel() for p in adapters(model).values())
    assert sum(n for group, n in counts.items() if group != "total") == counts["total"]


# -- training them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def start(train, run_main, tmp_path):
    """Flags that start from a baseline with its table factorized at rank 8."""
    base = tmp_path / "base"
    assert train(out_dir=base).status == 0
    factorize = ("util_factorization/pca_factorize_wte.py", "--ckpt_path", base, "--rank_k", 8)
    files = (base / "wte_k8.npy", base / "scale_k8.npz")
    assert run_main(*factorize, "--out_wte_npy", files[0], "--out_scale_npz", files[1]).status == 0
    return dict(
        init_from="prev_run", prev_run_ckpt=base, n_embd_wte=8, import_wte_npy=files[0], import_scale_matrices_npz=files[1]
    )


LORA = dict(lora_rank=4, lora_alpha=8, learning_rate=3e-2)


def curve(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(x["iter"], x.get("val_loss", x.get("train_loss"))) for x in lines]


@pytest.mark.parametrize("freeze", [dict(), dict(import_wte_freeze=True, import_scale_matrices_freeze=True)])
def test_adapters_train_and_everything_else_stays(train, tmp_path, start, freeze):
    result = train(out_dir=tmp_path / "lora", **start, **LORA, **freeze)
    assert result.status == 0, result.err
    assert ("freezes every weight" in result.err) == bool(freeze)
    state = checkpoint.load(tmp_path / "lora" / "last.pt")["model"]
    base = checkpoint.load(start["prev_run_ckpt"])["model"]
    untouched = [k for k in base if not k.startswith(("transformer.wte", "lm_head"))]
    assert all(torch.equal(state[k], base[k]) for k in untouched)
    np.testing.assert_array_equal(state["transformer.wte.weight"], np.load(start["import_wte_npy"]))
    assert all(tensor.abs().max() > 0 for name, tensor in state.items() if name.endswith("lora.B"))
    summary = json.loads((tmp_path / "lora" / "summary.json").read_text())
    assert summary["parameters_trained"] == summary["parameters"]["adapters"] > 0
    curve_ = curve(tmp_path / "lora")
    assert curve_[-1][1] < curve_[0][1]


def test_resumed_equals_uninterrupted(train, tmp_path, start):
    flags = start | LORA
    assert train(out_dir=tmp_path / "whole", **flags).status == 0
    train(out_dir=tmp_path / "parts", **flags, max_iters=3, lr_decay_iters=6)
    # the first half's cosine has to be the whole's
    resumed = train(out_dir=tmp_path / "parts", dataset=None, init_from="resume", max_iters=6, **NOT_GIVEN)
    assert resumed.status == 0, resumed.err
    a, b = (checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


NOT_GIVEN = dict.fromkeys(
    "n_layer n_head n_embd block_size batch_size gradient_accumulation_steps warmup_iters eval_iters learning_rate dropout "
    "dtype".split()
)  # what a resumed run has from its checkpoint


def test_merged_reloaded_and_unmerged_evaluate_alike(train, tmp_path, start, run_main, assert_one_line_error):
    out, merged = tmp_path / "lora", tmp_path / "merged" / "ckpt.pt"
    unmerged = train(out_dir=out, **start, **LORA).last["best"]["val_loss"]
    program = "util_factorization/merge_lora.py"
    result = run_main(program, "--ckpt_path", out, "--out", merged)
    assert result.status == 0 and result.last["parameters"]["adapters"] == 0
    saved, plain = (torch.load(path, weights_only=True) for path in (merged, out / "ckpt.pt"))
    assert saved["tokens"] == plain["tokens"] and not any(checkpoint.is_adapter(name) for name in saved["model"])

    reloaded = train(out_dir=out, init_from="resume", eval_only=True, dataset=None, max_iters=None, **NOT_GIVEN).last[
        "val_loss"
    ]
    flags = dict(init_from="prev_run", prev_run_ckpt=merged, eval_only=True)
    after = train(out_dir=tmp_path / "evaluated", **flags).last["val_loss"]
    assert reloaded == unmerged and after == pytest.approx(unmerged, abs=1e-4)
    a, b = (checkpoint.build(checkpoint.load(path)).eval() for path in (merged, out))
    torch.testing.assert_close(a(*batch(a))[0], b(*batch(b))[0], atol=1e-5, rtol=1e-5)

    assert_one_line_error(
        run_main(program, "--ckpt_path", merged, "--out", tmp_path / "twice.pt"), "no adapters", "they are merged"
    )
    assert_one_line_error(run_main(program, "--ckpt_path", out, "--out", merged), "--out", "exists")
    with in_use(tmp_path / ".m.pt.lock"):
        assert_one_line_error(run_main(program, "--ckpt_path", out, "--out", tmp_path / "m.pt"), "--out", "in use")
    assert_one_line_error(run_main(program, "--ckpt_path", tmp_path / "none.pt", "--out", tmp_path / "x.pt"), "not found")
    assert not (tmp_path / "twice.pt").exists() and not (tmp_path / "m.pt").exists()
    # what starts from adapters has to merge them first
    assert_one_line_error(train(out_dir=tmp_path / "x", init_from="prev_run", prev_run_ckpt=out), "merge_lora.py")
    again = ("util_factorization/pca_factorize_wte.py", "--ckpt_path", out, "--rank_k", 4)
    assert_one_line_error(run_main(*again), "merge_lora.py")


def test_a_dense_baseline_can_have_adapters_too(train, tmp_path, start):
    flags = dict(init_from="prev_run", prev_run_ckpt=start["prev_run_ckpt"], lora_targets=DENSE)
    assert train(out_dir=tmp_path / "lora", **flags, **LORA).status == 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(lora_targets="wte,c_attn"), ["--lora_targets", "'c_attn'"]),
        (dict(lora_targets="q_prj"), ["--lora_targets", "did you mean q_proj?"]),
        (dict(lora_targets="wte,wte"), ["--lora_targets", "twice"]),
        (dict(lora_targets=""), ["--lora_targets", "names no matrix"]),
        (dict(lora_rank=0), ["--lora_rank 0"]),
        (dict(lora_rank=9), ["--lora_rank 9", "--n_embd_wte 8"]),
        (dict(lora_rank=17, lora_targets="q_proj"), ["--lora_rank 17", "16 x 16"]),
        (dict(lora_alpha=0), ["--lora_alpha"]),
        (dict(lora_dropout=1.0), ["--lora_dropout"]),
        (dict(lora_rank=None), ["--lora_alpha", "--lora_rank"]),
    ],
)
def test_mistakes(train, tmp_path, start, assert_one_line_error, flags, words):
    assert_one_line_error(train(out_dir=tmp_path / "lora", **start | LORA | flags), *words)
    assert not (tmp_path / "lora").exists()


def test_more_mistakes(train, tmp_path, start, assert_one_line_error):
    out = tmp_path / "lora"
    assert_one_line_error(train(out_dir=out, **LORA), "--lora_rank", "--init_from prev_run")
    dense = dict(init_from="prev_run", prev_run_ckpt=start["prev_run_ckpt"])
    assert_one_line_error(train(out_dir=out, **dense, **LORA), "--lora_targets", "'scale_down'")
    assert not out.exists()


def test_presets_have_the_seeds_adapters_and_fit_the_smallest_rank():
    a = TrainArgs(**PRESETS["gpt2_lora"])
    assert (a.lora_rank, a.lora_alpha, a.lora_dropout, a.lora_targets) == (32, 64, 0.1, ALL)
    runner = (REPO / "scripts" / "run_13_experiments.sh").read_text()
    ranks = dict(zip(("gpt2", "laptop", "laptop13"), re.findall(r"K=\$\{K:-(\d+) [\d ]+\}", runner), strict=True))
    for preset, smallest in ranks.items():
        assert PRESETS[f"{preset}_lora"]["lora_rank"] <= int(smallest)
