import math
import re

import numpy as np
import pytest
import torch
from conftest import REPO
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT
from util_factorization.decompose_table import decompose

PAGE = (REPO / "results" / "laptop_k128" / "README.md").read_text()


def ids(model, B=3):
    torch.manual_seed(1)
    return torch.randint(model.config.vocab_size, (B, model.config.block_size))


def copy_to_hugging_face(model, activation):
    transformers = pytest.importorskip("transformers")
    if not transformers.utils.is_torch_available():
        pytest.skip("this transformers wants a newer torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            activation_function=activation,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )  # fmt: skip
    ).eval()
    t, state = model.transformer, {}
    for name in ("wte", "wpe"):
        state[f"transformer.{name}.weight"] = t[name].weight
    state["lm_head.weight"] = t.wte.weight

    def put(name, weight, bias):
        state[f"transformer.{name}.weight"], state[f"transformer.{name}.bias"] = weight, bias

    put("ln_f", t.ln_f.weight, t.ln_f.bias)
    for i, b in enumerate(t.h):  # Hugging Face keeps q, k, v in one matrix, and every matrix as [in, out]
        qkv = (b.attn.q_proj, b.attn.k_proj, b.attn.v_proj)
        put(f"h.{i}.ln_1", b.ln_1.weight, b.ln_1.bias)
        put(f"h.{i}.attn.c_attn", torch.cat([m.weight for m in qkv]).T, torch.cat([m.bias for m in qkv]))
        put(f"h.{i}.attn.c_proj", b.attn.c_proj.weight.T, b.attn.c_proj.bias)
        put(f"h.{i}.ln_2", b.ln_2.weight, b.ln_2.bias)
        put(f"h.{i}.mlp.c_fc", b.mlp.mlp_up.weight.T, b.mlp.mlp_up.bias)
        put(f"h.{i}.mlp.c_proj", b.mlp.mlp_down.weight.T, b.mlp.mlp_down.bias)
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not unexpected and not missing, (missing, unexpected)
    return hf


@pytest.mark.parametrize("ours, theirs", [("gelu_tanh", "gelu_new"), ("gelu", "gelu")])
def test_logits_and_loss_equal_hugging_face_gpt2(tiny_model, ours, theirs):
    model = tiny_model(activation=ours, n_layer=3)
    x = ids(model)
    logits, loss = model(x[:, :-1])[0], model(x[:, :-1], x[:, 1:])[1]
    with torch.no_grad():
        hf = copy_to_hugging_face(model, theirs)(x, labels=x)
    torch.testing.assert_close(logits, hf.logits[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, hf.loss, atol=1e-4, rtol=1e-4)


def test_no_position_sees_a_later_one(tiny_model):
    model = tiny_model(n_embd_wte=8)
    x = ids(model)
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % model.config.vocab_size
    before, after = model(x)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["dense", "factorized", "untied", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradients_are_those_of_all_logits(tiny_model, monkeypatch, parts, dtype):
    """By chunks that do not divide the tokens. In bfloat16 both round, at other places."""
    lora = dict(n_embd_wte=8, lora_rank=2, lora_alpha=3.0, lora_targets="wte,q_proj")
    model = tiny_model(**dict(dense={}, factorized=dict(n_embd_wte=8), untied=dict(tie_head=False), adapters=lora)[parts])
    for name, p in model.named_parameters():
        p.requires_grad_(parts != "adapters" or ".lora." in name)
    monkeypatch.setattr("model.CHUNK", 20)
    x, y = ids(model), ids(model).flip(0)

    def plain():
        return F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())

    found = []
    for loss in (plain, lambda: model(x, y)[1]):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        (3 * value).backward()
        found.append((value.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (value, ours) = found
    atol = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(value, expected, rtol=atol, atol=0)
    assert ours.keys() == gradients.keys()
    for name, g in gradients.items():
        if "k_proj.bias" in name:  # a softmax does not see it: its gradient is the rounding alone
            continue
        assert (ours[name] - g).norm() <= 20 * atol * g.norm(), name


def test_a_compiled_loss_has_no_blocks(tiny_model, monkeypatch):
    """Blocks are for a processor's cache; written out they took a compiler six minutes, and ran half as fast."""
    monkeypatch.setattr("model.BLOCK", 1)
    model, operations = tiny_model(), []

    def backend(graph, inputs):
        operations.append(sum(len(part.graph.nodes) for part in graph.modules() if isinstance(part, torch.fx.GraphModule)))
        return graph.forward

    x = ids(model)
    compiled = torch.compile(model.loss, backend=backend)(model.hidden(x), x)
    torch.testing.assert_close(compiled, model.loss(model.hidden(x), x))
    assert sum(operations) < 2 * x.numel()  # a block has seven


def test_training_with_the_loss_in_chunks_stays_with_plain_training(tiny_config):
    """200 steps of AdamW: float32 to 1e-6 at each, bfloat16 within the noise of its own rounding."""
    torch.manual_seed(0)
    text = torch.randint(1, 4, (200, 4 * 17)).cumsum(1).remainder(97).unflatten(1, (4, 17))

    def curve(dtype, plain):
        torch.manual_seed(1)
        model = GPT(tiny_config())
        if plain:
            model.loss = lambda h, y: F.cross_entropy(model.logits(h).flatten(0, 1), y.flatten())
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
        losses = []
        for rows in text:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(rows[:, :-1], rows[:, 1:])[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses)

    exact, rounded = curve(torch.float32, True), curve(torch.bfloat16, True)
    torch.testing.assert_close(curve(torch.float32, False), exact, atol=1e-6, rtol=0)
    assert exact[0] > 4 and exact[-1] < 2  # it has learnt
    noise = (rounded - exact).abs().max()
    assert 0 < noise and (curve(torch.bfloat16, False) - exact).abs().max() < 1.5 * noise


# -- the factorized table ---------------------------------------------------------------------------------------------


def factorized_twin(model, k, method="svd", tying=False):
    """The dense model with its table factorized at rank k."""
    counts = np.arange(model.config.vocab_size)
    Z, P, mean = decompose(model.transformer.wte.weight.detach(), method, counts).factors(k)
    config = dict(vars(model.config), n_embd_wte=k, n_embd_wte_mean=mean is not None, n_embd_wte_scale_tying=tying)
    twin = GPT(type(model.config)(**config)).eval()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "wte" not in k and "head" not in k}, strict=False)
    twin.import_factors(Z, P, P, mean)
    return twin, Z, P, mean


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("method", ["svd", "centered", "freq"])
def test_full_rank_equals_dense(tiny_model, method, tying):
    model = tiny_model()
    twin, *_ = factorized_twin(model, model.config.n_embd, method, tying)
    a, b = (m(ids(model))[0].log_softmax(-1) for m in (model, twin))  # a mean shifts all logits alike
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["svd", "centered", "freq"])
def test_imported_factors_give_the_logits_of_the_truncated_table(tiny_model, method):
    model = tiny_model()
    twin, Z, P, mean = factorized_twin(model, 6, method)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(Z @ P + (0 if mean is None else mean))
    a, b = (m(ids(model))[0].log_softmax(-1) for m in (model, twin))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.effective_table(), twin.effective_table(), atol=1e-5, rtol=1e-5)


def test_scale_tying_makes_one_tensor(tiny_model):
    tied, untied = tiny_model(n_embd_wte=8, n_embd_wte_scale_tying=True), tiny_model(n_embd_wte=8)
    assert tied.transformer.scale_up.weight is tied.transformer.scale_down.weight
    assert untied.count_parameters()["total"] - tied.count_parameters()["total"] == 8 * 16


def test_wte_and_head_are_one_tensor_dense_or_not(tiny_model):
    for k in (None, 8):
        model = tiny_model(n_embd_wte=k)
        assert model.lm_head.weight is model.transformer.wte.weight


def test_matched_draw_has_the_std_of_a_dense_table_and_the_naive_draw_has_not(tiny_config):
    torch.manual_seed(0)
    for k in (8, 64):
        config = tiny_config(vocab_size=4000, n_embd=128, n_embd_wte=k)
        for tying in (False, True):
            config.n_embd_wte_scale_tying = tying
            model = GPT(config)
            up = model.transformer.wte.weight @ model.transformer.scale_up.weight.T
            for table in (model.effective_table(), up):
                assert table.std().item() == pytest.approx(0.02, rel=0.05)
        config.factor_init = "naive"
        assert GPT(config).effective_table().std().item() == pytest.approx(0.02**2 * math.sqrt(k), rel=0.05)
    config.n_embd_wte = None
    assert GPT(config).effective_table().std().item() == pytest.approx(0.02, rel=0.05)


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, tying, expected",
    [  # V = 50257, d = 768, worked out by hand: Vd, Vk + 2kd, Vk + kd
        (None, False, 38_597_376),
        (64, False, 3_314_752),
        (128, False, 6_629_504),
        (128, True, 6_531_200),
        (256, False, 13_259_008),
        (384, False, 19_888_512),
        (512, False, 26_518_016),
    ],
)
def test_token_table_counts(tiny_config, k, tying, expected):
    with torch.device("meta"):
        model = GPT(tiny_config(vocab_size=50257, n_embd=768, n_head=12, n_embd_wte=k, n_embd_wte_scale_tying=tying))
    assert model.count_parameters()["token_table"] == expected


def test_parameter_table_of_the_results(tiny_config):
    lines = re.findall(r"^\| (\d+|dense) +\| +([\d,]+) \| +([\d.]+)x \| +([\d,]+) \| +([\d.]+)x \|$", PAGE, flags=re.M)
    assert len(lines) == 6
    for rank, *cells in lines:
        for tying, (count, ratio) in zip((False, True), (cells[:2], cells[2:])):
            k = None if rank == "dense" else int(rank)
            with torch.device("meta"):
                shape = dict(vocab_size=50257, n_embd=768, n_head=12, n_layer=1)
                model = GPT(tiny_config(**shape, n_embd_wte=k, n_embd_wte_scale_tying=tying and k is not None))
            stored = model.count_parameters()["token_table"]
            assert (f"{stored:,}", f"{38_597_376 / stored:.2f}") == (count, ratio)


def test_groups_sum_to_the_total_and_gpt2_has_124m(tiny_config):
    shape = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    with torch.device("meta"):
        for k, mean in ((None, False), (128, False), (128, True)):
            model = GPT(tiny_config(**shape, n_embd_wte=k, n_embd_wte_mean=mean))
            counts = model.count_parameters()
            total = counts.pop("total")
            assert sum(counts.values()) == total == sum(p.numel() for p in model.parameters())
            assert all(counts.pop(group) == 0 for group in ("adapters", "head", "kv_compression")) and min(counts.values()) > 0
            if k is None:
                assert total == 124_439_808  # GPT-2 small, as published by OpenAI


@pytest.mark.parametrize("k", [None, 8])
def test_flops_are_what_torch_counts(tiny_model, k):
    model, T = tiny_model(n_embd_wte=k), 16
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids(model, B=1))
    parts = model.flops_per_token(T)
    assert parts["total"] == sum(v for name, v in parts.items() if name != "total")
    # causal attention needs half of the T x T scores; plain matrix products compute all of them
    assert counter.get_total_flops() / T == parts["total"] + parts["attention"]
