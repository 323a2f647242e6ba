"""The cache of int8: what it reads, how much it takes, and that the compiled loop computes what torch does."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from kernels import build as kernels
from kv_cache.hf_int8 import AT_ONCE, int8_cache

SHAPE = dict(vocab_size=90, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6)


@pytest.fixture(params=["llama", "neox"])
def hf(request):
    torch.manual_seed(0)
    if request.param == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)).eval()
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)).eval()


@torch.inference_mode()
def step_by_step(hf, ids, prompt=4):
    past = int8_cache(hf)
    parts = [hf(ids[:, :prompt], past_key_values=past).logits]
    for i in range(prompt, ids.shape[1]):
        parts.append(hf(ids[:, i : i + 1], past_key_values=past).logits)
    return torch.cat(parts, 1), past


def test_tokens_and_prompts_read_the_same_and_nearly_what_was_written(hf, monkeypatch):
    ids = torch.randint(90, (2, 12))
    with torch.inference_mode():
        untouched = hf(ids).logits
        prompt = hf(ids, past_key_values=int8_cache(hf)).logits
        assert torch.equal(hf(ids, use_cache=False).logits, untouched)
    steps, past = step_by_step(hf, ids)
    torch.testing.assert_close(steps, prompt, rtol=1e-5, atol=1e-5)
    assert 0 < (prompt - untouched).abs().max() < 0.02 * untouched.abs().max()
    monkeypatch.setattr(kernels, "library", lambda: None)
    torch.testing.assert_close(step_by_step(hf, ids)[0], steps, rtol=1e-5, atol=1e-5)
    layer = past.layers[0]
    assert layer.keys.dtype == torch.int8 and layer.keys.shape[2] == layer.groups * 8 + 2


def test_generate_with_left_padding_and_beams_is_that_of_single_texts(hf):
    ids, mask = torch.randint(1, 90, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    for options in (dict(num_beams=1), dict(num_beams=3)):
        options |= dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
        both = hf.generate(ids, attention_mask=mask, past_key_values=int8_cache(hf), **options)
        one = ids[:1, 3:]
        alone = hf.generate(one, attention_mask=torch.ones_like(one), past_key_values=int8_cache(hf), **options)
        assert both[0, 3:].tolist() == alone[0].tolist()


def test_a_sliding_window_is_refused(capsys):
    with pytest.raises(SystemExit):
        int8_cache(MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=8)))
    assert "sliding window" in capsys.readouterr().err


def test_bench_generate_takes_turns_and_counts_what_is_allocated(run_main, tmp_path, assert_one_line_error):
    torch.manual_seed(0)
    for name in ("one", "two"):
        LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)).save_pretrained(tmp_path / name)
    generate = ("bench.py", "generate", "--models", f"{tmp_path / 'one'},{tmp_path / 'two'}", "--contexts", "9,20")
    found = run_main(*generate, "--caches", "own,int8", "--steps", 3, "--rounds", 1, "--out", tmp_path / "bench.md")
    assert found.status == 0, found.err
    rows = found.last["rows"]
    assert [(row["context"], row["cache"]) for row in rows] == [(c, k) for c in (9, 20) for _ in "12" for k in ("own", "int8")]
    assert rows[0]["bytes_per_token"] == 2 * 2 * 16 * 4 and rows[0]["of_the_first"] == 1  # layers, k and v, numbers, float32
    assert rows[1]["bytes_per_token"] == 2 * 2 * (16 + 2) * AT_ONCE / 12  # room for further positions is counted
    assert "own" in (tmp_path / "bench.md").read_text()
    for words, argv in [
        (["--caches", "'int4'"], ["--caches", "int4"]),
        (["--contexts a"], ["--contexts", "a"]),
        (["--contexts 0"], ["--contexts", "0"]),
        (["--contexts 5000", "2048"], ["--contexts", "5000"]),
    ]:
        assert_one_line_error(run_main(*generate, *argv), *words)
