"""Smaller models, models of Hugging Face and GGUF files that are damaged or made to harm. See test_hostile.py."""

import json
from functools import partial

import pytest
import torch
from trials import all_survive

from surgery.coded_folder import save as save_coded
from surgery.low_rank_folder import save as save_low_rank
from surgery.low_rank_modules import shrink
from surgery.reading import load
from surgery.subject import Subject, load_subject
from util_factorization.coding import code, draft_layer, draft_table, fit
from util_factorization.decompose_matrix import decompose as decompose_matrix

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
FEW = 8  # mutations of a file; each reads a whole model


@pytest.fixture
def survives(tmp_path):
    return partial(all_survive, tmp_path / "work", number=FEW)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    toys.save_tokenizer(folder)
    return toys.transformers.AutoTokenizer.from_pretrained(folder)


def used(model, tokenizer):
    """Reads a text and writes one."""
    ids = torch.tensor([tokenizer("12 is even", add_special_tokens=False)["input_ids"][:5] or [1]])
    with torch.no_grad():
        model(ids)
        tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)[0])


SMALLER = {
    "surgery.safetensors": "safetensors",
    "config.json": "json",
    "tokenizer.json": "json",
    "tokenizer_config.json": "json",
}


def low_rank(folder, tokenizer):
    hf = toys.llama(num_hidden_layers=2)
    cuts = [([(f"model.layers.{i}.self_attn", t) for t in "kv"], factors(hf, i)) for i in range(2)]
    plan = shrink(hf, cuts, dict(wte=(torch.randn(300, 6), torch.randn(6, 32), torch.randn(32))))
    save_low_rank(folder, hf, tokenizer, plan)


def factors(hf, i):
    attn = hf.model.layers[i].self_attn
    return decompose_matrix(torch.cat([attn.k_proj.weight, attn.v_proj.weight]), "svd").factors(5)


def coded(folder, tokenizer):
    hf = toys.llama(num_hidden_layers=1)
    torch.manual_seed(0)
    metric = torch.eye(32) + 0.1
    layer = hf.model.layers[0].mlp.up_proj.weight.data
    drafts = {
        "wte": draft_table(hf.model.embed_tokens.weight.data, torch.ones(300), metric),
        "model.layers.0.mlp.up_proj": draft_layer(layer, metric, torch.ones(len(layer))),
    }
    bits, codes = fit(list(drafts.values()), 2 * 0.6 * sum(300 * 32 + layer.numel() for _ in (1,)))
    save_coded(folder, hf, tokenizer, {name: code(draft, b, codes) for (name, draft), b in zip(drafts.items(), bits)})


@pytest.mark.parametrize("write", [low_rank, coded])
def test_smaller_models(survives, tmp_path, tokenizer, write):
    write(tmp_path / "small", tokenizer)
    survives(f"smaller model, {write.__name__}", tmp_path / "small", SMALLER, lambda folder: used(*load(folder)))


def test_models_of_hugging_face(survives, tmp_path, tokenizer):
    toys.llama(num_hidden_layers=1).save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")

    def read(folder):
        subject, tokenizer = load_subject(str(folder))
        used(subject.model, tokenizer)

    files = {
        "model.safetensors": "safetensors",
        "config.json": "json",
        "tokenizer.json": "json",
        "generation_config.json": "json",
    }
    survives("Hugging Face folder", tmp_path / "hf", files, read)


def write_gguf(path, tokenizer):
    """A llama of one layer in float32, under llama.cpp's names."""
    import gguf

    hf = toys.llama(num_hidden_layers=1)
    out = gguf.GGUFWriter(path, "llama")
    for name, value in dict(block_count=1, context_length=64, embedding_length=32, feed_forward_length=48, head_count=4,
                            head_count_kv=2, layer_norm_rms_eps=1e-6, rope_dimension_count=8, vocab_size=300).items():  # fmt: skip
        getattr(out, f"add_{name}")(value)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    out.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    out.add_token_types([1] * len(bpe["vocab"]))
    out.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, p in hf.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        out.add_tensor(f"{names.get_name(stem)}.{suffix}", p.detach().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_gguf_files(survives, tmp_path, tokenizer):
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "toy.gguf", tokenizer)

    def read(folder):
        subject, tokenizer = load_subject(str(folder / "toy.gguf"))
        used(subject.model, tokenizer)

    survives("GGUF", tmp_path / "gguf", {"toy.gguf": "gguf"}, read)
