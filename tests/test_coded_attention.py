"""A coded cache in the attention of a GPT-NeoX, and masks for each head."""

import pytest
import torch
from test_coded_cache import IDS, WHOLE, coded, modules, toys

from kv_cache import bit_fit
from kv_cache.decoding_speed import cache_bytes
from surgery.folder import load


def test_a_gpt_neox_is_packed_whole(operate, run_main, tmp_path):
    result = operate("--bytes", 0.6, "--cache_bytes", 0.4, "--out", tmp_path / "packed", "--answer_tokens", 0, model="neox")
    assert result.status == 0, result.err
    read, _ = load(tmp_path / "packed")
    layers, numbers = bit_fit.numbers_of(toys.neox())
    assert cache_bytes(read, IDS[0]) <= layers * numbers * 2 * (0.4 + WHOLE / 40)
    for layer in read.gpt_neox.layers:
        assert isinstance(layer.attention, modules.CodedAttention) and not hasattr(layer.attention.query_key_value, "weight")
    exported = run_main("-m", "export", "--model", tmp_path / "packed", "--out", tmp_path / "compact", "--compact")
    assert exported.status == 0 and exported.last["moved"] < 1e-3, exported.err


@pytest.mark.parametrize("kind", ["llama", "neox"])
@torch.no_grad()
def test_a_mask_of_each_head_is_obeyed_in_place_too(kind):
    with torch.enable_grad():
        model = coded(0.25, "fast", kind)[1]
    attn = next(module for module in model.modules() if isinstance(module, modules.CodedAttention))
    H, x = 4, torch.randn(1, 9, 32)
    mask = torch.ones(1, H, 9, 9, dtype=torch.bool).tril()
    mask[:, 1:, :, 2:5] = False
    whole = attn(x, mask)[0][:, -1:]
    cache = toys.transformers.DynamicCache()
    attn(x[:, :8], mask[:, :, :8, :8], past_key_values=cache)
    torch.testing.assert_close(attn(x[:, 8:], mask[:, :, 8:], past_key_values=cache)[0], whole, atol=1e-4, rtol=1e-4)
