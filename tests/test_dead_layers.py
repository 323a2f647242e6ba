"""Surgery on models with layers that do nothing, and with numbers that are not finite: it works, or ends in one line."""

import math

import pytest
import torch

from surgery.folder import load

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
DEAD = [  # weights that are zeros
    "model.layers.0.self_attn.o_proj.weight",  # no gradient reaches q, k and v: G is 0
    *(f"model.layers.1.self_attn.{target}_proj.weight" for target in "qkv"),
    "model.layers.2.input_layernorm.weight",  # C is 0
]


@pytest.fixture
def model(tmp_path):
    """model(name=number): a model with weights that are zeros, or a row of its table that is a number."""

    def make(**wrong):
        hf = toys.llama(num_hidden_layers=4)
        for name in [] if wrong else DEAD:
            hf.get_parameter(name).data.zero_()
        for number in wrong.values():
            hf.model.embed_tokens.weight.data[5] = number
        hf.save_pretrained(tmp_path / "model")
        toys.save_tokenizer(tmp_path / "model")
        return tmp_path / "model"

    return make


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [x for each in value for x in numbers(each)] if isinstance(value, list) else [value]


def test_dead_layers_are_cut_like_any_other(operate, model):
    result = operate("--targets", "k,v", "--mode", "shared_kv,shared_layers", "--method", "fisher", "--rank", "8",
                     "--variance", "0.9", "--answer_tokens", 0, model=model())  # fmt: skip
    assert result.status == 0, result.err
    assert len(result.records) == 5
    assert all(math.isfinite(x) for x in numbers(result.records) if isinstance(x, float))


def test_dead_layers_are_coded_like_any_other(operate, model, tmp_path):
    out = tmp_path / "packed"
    result = operate("--bytes", 0.6, "--cache_bytes", 0.6, "--out", out, "--answer_tokens", 0, model=model())
    assert result.status == 0, result.err
    assert load(out)[0](torch.arange(20)[None]).logits.isfinite().all()


def test_a_row_that_is_not_finite_is_refused(operate, model, assert_one_line_error):
    result = operate("--targets", "wte", "--method", "svd", "--rank", "8", model=model(row=math.nan))
    assert_one_line_error(result, "--model", "embed_tokens", "NaN or infinite")
    assert not result.records
