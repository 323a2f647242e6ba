"""Smaller models, models of Hugging Face and GGUF files that are damaged or made to harm. See test_hostile.py."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from trials import all_survive

import reports.bytes as bytes_report
import reports.surgery as report
from bits import encode as coding
from bits.encode import code, draft_layer, draft_table, fit
from common.hugging_face import parsed_gguf
from kv_cache.hf_layers import find_layers
from reports.html import page
from surgery.bits_folder import save as save_coded
from surgery.folder import load
from surgery.moments import read_moments, shapes_of
from surgery.rank_folder import save as save_low_rank
from surgery.rank_modules import shrink
from surgery.rank_points import Point
from surgery.subject import Subject, load_subject
from surgery.sweep import prepare_folder, read_records
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


def coded_matrices(hf):
    """The table, with parents, and a layer of a toy by bits."""
    torch.manual_seed(0)
    metric, layer = torch.eye(32) + 0.1, hf.model.layers[0].mlp.up_proj.weight.data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coding, "COST", 0)
        wte = draft_table(hf.model.embed_tokens.weight.data, torch.ones(300), metric)
    assert wte.parents is not None
    drafts = {"wte": wte, "model.layers.0.mlp.up_proj": draft_layer(layer, metric, torch.ones(len(layer)))}
    bits, codes = fit(list(drafts.values()), 2 * 0.6 * (300 * 32 + layer.numel()))
    return {name: code(draft, b, codes) for (name, draft), b in zip(drafts.items(), bits)}


def coded(folder, tokenizer):
    hf = toys.llama(num_hidden_layers=1)
    save_coded(folder, hf, tokenizer, coded_matrices(hf))


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


def test_gguf_files(survives, tmp_path, tokenizer):
    (tmp_path / "gguf").mkdir()
    toys.write_gguf(tmp_path / "gguf" / "toy.gguf", tokenizer, toys.llama(num_hidden_layers=1))

    def read(folder):
        subject, tokenizer = load_subject(str(folder / "toy.gguf"))
        used(subject.model, tokenizer)

    parsed_gguf.cache_clear()
    read(tmp_path / "gguf")
    assert parsed_gguf.cache_info().misses == 1  # config, weights and tokenizer need its header, and one parses it
    survives("GGUF", tmp_path / "gguf", {"toy.gguf": "gguf"}, read)


def write_lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_sweeps(survives, tmp_path, monkeypatch):
    """The folder of a sweep: which points are measured already, the moments, and the tables of the report."""
    folder, hf = tmp_path / "sweep", toys.llama(num_hidden_layers=1)
    folder.mkdir()
    text = {"a.txt": dict(ppl=30.0, nats_se=0.1)}
    measured = dict(ppl=30.0, kl=0.1, top1=0.9, texts=text, loss=3.4, answer="so", sampled="it goes")
    part = dict(ranks=[4, 5], full=[8, 8], energies=[0.9, 0.8], errors=[0.1, 0.2], output_errors=[0.1, 0.2])
    nothing = dict(method="-", mode="-", targets="-", variance=None, rank=None, budget=None, parts={})
    cut = dict(method="fisher", mode="separate", targets="k", variance=0.9, rank=None, budget=None, parts=dict(k=part))
    write_lines(folder / "results.jsonl", [nothing | measured, cut | measured, cut | measured | dict(variance=None, rank=4)])
    speed = dict(numbers=9, bytes=36, cache_bytes=8.0, tokens_per_second=[3.0, 2.0, 4.0])
    models = dict(untouched=measured | speed, smaller=measured | speed, healed=measured | dict(steps=2, text="a.txt"))
    write_lines(folder / "smaller.jsonl", [dict(out="small", models=models)])
    settings = dict(model="toy", eval_windows=3, window=32, eval_text="a.txt", calib_text="b.txt", texts={"a.txt": "other"})
    config = dict(settings=settings, hardware="x", commit="c", command="python -m surgery")
    (folder / "config.json").write_text(json.dumps(config))
    layers, subject = find_layers(hf), Subject(hf.requires_grad_(False))
    layer = layers[0]
    moments = dict(C={layer.name: torch.eye(32)}, G={layer.name: torch.eye(64)}, head=torch.eye(32), lookup=torch.eye(32))
    torch.save(moments | dict(tokens=9), folder / "calibration.pt")
    monkeypatch.setattr(report, "draw_all", lambda folder, text: [page(text)])

    def read(folder):
        args = SimpleNamespace(out_dir=str(folder), device="cpu")
        _, records, claim = prepare_folder(args, settings)
        assert len({Point.of_record(r) for r in records}) == len(records)
        report.write_report(folder, *(read_records(folder / f"{name}.jsonl", dict) for name in ("results", "smaller")))
        kept = read_moments(folder / "calibration.pt", shapes_of(layers, subject))
        if kept.get("C"):  # else they are gathered
            decompose_matrix(layer.weight("k"), "whiten", kept["C"][layer.name])
        claim.release()

    kinds = {"results.jsonl": "lines", "smaller.jsonl": "lines", "config.json": "json", "calibration.pt": "torch"}
    survives("sweep", folder, kinds, read, number=16)


def test_studies_of_bytes(survives, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    folder.mkdir()
    row = dict(row="bits 0.25", system="table", name="bits", given=[0.25], bytes=25, share=0.25, kl=0.1, top1=0.9)
    texts = dict(texts={"a.txt": dict(nats=0.01, nats_se=0.001)})
    write_lines(folder / "results.jsonl", [row | texts, row | texts | dict(row="bits 0.5", bytes=50, share=0.5)])
    settings = dict(model="toy", eval_windows=3, window=32, eval_text="a.txt", calib_tokens=99, calib_text="b.txt")
    config = dict(settings=settings, hardware="x", commit="c", command="python -m surgery.bytes_study")
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(bytes_report, "draw_all", lambda folder, text: [page(text)])
    kinds = {"results.jsonl": "lines", "config.json": "json"}
    survives("study of bytes", folder, kinds, bytes_report.write_report, number=16)
