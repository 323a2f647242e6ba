"""Models from GGUF files: what transformers leaves out of them is set, or refused by its name."""

import pytest
import torch

toys = pytest.importorskip("toys")
pytest.importorskip("gguf")

from common.hugging_face import parsed_gguf  # noqa: E402
from surgery.subject import load_subject  # noqa: E402

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3["original_max_position_embeddings"] = 8192
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


@pytest.fixture
def tokenizer(tmp_path):
    import transformers

    toys.save_tokenizer(tmp_path / "tokenizer")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(hf, **rest):
        toys.write_gguf(tmp_path / "toy.gguf", tokenizer, hf, **rest)
        parsed_gguf.cache_clear()
        return load_subject(str(tmp_path / "toy.gguf"))

    return read


def rope(**parameters):
    return toys.llama(rope_parameters=dict(rope_theta=500000.0, **parameters), max_position_embeddings=64, hidden_size=64)


def frequencies(parameters):
    """rope_freqs.weight as llama.cpp's converter writes it: what the plain frequencies are divided by."""
    plain, stretched = (rope(**p).model.rotary_emb.inv_freq for p in (dict(rope_type="default"), parameters))
    return plain / stretched


@pytest.mark.parametrize(
    "parameters, keys, freqs",
    [
        (LLAMA3, {}, True),
        (LLAMA3 | dict(factor=32.0), {}, True),
        (dict(rope_type="linear", factor=4.0), {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, False),
        (dict(rope_type="linear", factor=4.0), {"rope.scale_linear": 4.0}, False),
        (YARN, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}, False),
        (dict(rope_type="default"), {"rope.scaling.type": "none", "attention.key_length": 16, "expert_count": 0}, False),
    ],
)
def test_the_rotation_of_a_file_is_set(read, parameters, keys, freqs):
    hf = rope(**parameters)
    subject, _ = read(hf, keys=keys, tensors={"rope_freqs.weight": frequencies(parameters)} if freqs else {})
    x = torch.randint(300, (1, 60))
    ours, theirs, plain = (m.model.rotary_emb.inv_freq for m in (subject.model, hf, rope(rope_type="default")))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert parameters["rope_type"] == "default" or not torch.allclose(plain, theirs, rtol=0.1)
    with torch.no_grad():
        ours, theirs = (m(x).logits for m in (subject.model, hf))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    again = toys.transformers.LlamaForCausalLM(subject.model.config).eval()  # the config says it too
    again.load_state_dict(subject.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [("q", "k", "v"), ("q", "k", "v", "o"), ("up", "gate", "down"), ("q", "up")])
def test_biases_of_a_llama_are_set(read, parts):
    """Qwen-like files of arch llama have biases of q, k and v alone: the output projection then has a bias of 0."""
    hf = toys.llama(attention_bias=True, mlp_bias=True, hidden_size=64)
    for name, p in hf.named_parameters():
        if name.endswith(".bias") and name.split(".")[-2].removesuffix("_proj") not in parts:
            p.data.zero_()
    kept = {name: p for name, p in hf.named_parameters() if not name.endswith(".bias") or p.any()}
    hf.named_parameters = lambda: kept.items()
    subject, _ = read(hf)
    x = torch.randint(300, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(subject.model(x).logits, hf(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rest, named",
    [
        (dict(keys={"attention.sliding_window": 512}), "llama.attention.sliding_window is 512"),
        (dict(keys={"final_logit_softcapping": 30.0}), "llama.final_logit_softcapping is 30.0"),
        (dict(keys={"attention.key_length": 12}), "llama.attention.key_length is 12"),
        (dict(keys={"rope.scaling.type": "longrope"}), "rope.scaling.type longrope"),
        (dict(tensors={"rope_freqs.weight": torch.full((4,), 2.0)}), "rope_freqs.weight"),
        (dict(tensors={"blk.0.attn_q_norm.weight": torch.ones(8)}), "blk.0.attn_q_norm.weight"),
        (dict(tensors={"blk.0.attn_sinks.weight": torch.ones(4)}), "blk.0.attn_sinks.weight"),
    ],
)
def test_what_cannot_be_set_is_refused_by_its_name(read, capsys, rest, named):
    with pytest.raises(SystemExit) as end:
        read(toys.llama(), **rest)
    assert end.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert named in line and "give the float model in a Hugging Face folder" in line


@pytest.mark.parametrize("adds", [True, False])
def test_the_tokenizer_begins_a_text_as_its_file_says(read, adds, tmp_path):
    import transformers

    keys = {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.add_bos_token": adds}
    _, tokenizer = read(toys.llama(), keys=keys)
    tokenizer.save_pretrained(tmp_path / "again")
    for each in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert each("so it goes")["input_ids"] == [5] * adds + each("so it goes", add_special_tokens=False)["input_ids"]
