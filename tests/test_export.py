"""Models out: what is written opens with plain transformers, and computes what the model did."""

import json
import runpy
import shutil
import sys

import pytest
import tiktoken
import torch
from tiktoken_ext import openai_public

from common.dataset import write_dataset
from common.tokenizer import END_OF_TEXT, train_bpe
from export.tokenizer import from_tiktoken, tokenizer_for
from kv_cache.decoding_speed import cache_bytes
from kv_cache.generate import chooser, generate
from kv_cache.own_cache import KVCache
from surgery.bits_folder import save as save_coded
from surgery.folder import load
from surgery.rank_folder import save
from training import checkpoint as ckpt
from util_factorization.import_hf import from_hugging_face

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
transformers = toys.transformers
import test_coded_cache  # noqa: E402
from test_hostile_models import coded_matrices, low_rank  # noqa: E402
from test_smaller import MODELS, cut  # noqa: E402

PYTHIA = dict(rotary_pct=0.25, parallel_residual=True, tie_head=False)
FACTORS = dict(n_embd_wte=8)
OURS = dict(
    gpt2=dict(),
    gpt2_without_biases=dict(bias=False, activation="gelu_tanh"),
    own_head=dict(tie_head=False),
    factors=FACTORS,
    tied_scales=FACTORS | dict(n_embd_wte_scale_tying=True),
    mean=FACTORS | dict(n_embd_wte_scale_tying=True, n_embd_wte_mean=True),
    pythia=PYTHIA,
    rotated_whole=dict(rotary_pct=1.0, parallel_residual=True, norms_per_layer=1, bias=False),
    one_after_another=dict(rotary_pct=0.5),
    compressed=PYTHIA | dict(v_proj_dim=12, k_proj_dim=8),
    narrow=dict(v_proj_dim=8, v_proj_narrow=True),
    compressed_gpt2=dict(v_proj_dim=12, k_proj_dim=8, bias=False),
    adapters=dict(lora_rank=2, lora_alpha=4.0, lora_targets="wte,v_proj"),
)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """The folder of a tokenizer of 97 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    toys.save_tokenizer(folder, 300)
    return folder


@pytest.fixture
def export(run_main, tmp_path):
    def run(model, *argv, out="out"):
        return run_main("-m", "export", "--model", model, "--out", tmp_path / out, *argv)

    return run


def saved(model, folder):
    facts = dict(args=dict(dataset="none"), iter_num=0, data_step=0, tokens=None, starts_from=None, val_loss=None)
    ckpt.save_new(folder / "ckpt.pt", model, **facts)
    return folder


def opened(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def ids(V, B=3, T=16):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", OURS.values(), ids=OURS)
def test_every_checkpoint_as_a_standard_architecture(tiny_model, spoken, export, tmp_path, changes):
    model = tiny_model(vocab_size=300, block_size=96, **changes)
    result = export(saved(model, tmp_path / "run"), "--tokenizer", spoken, "--dense")
    assert result.status == 0, result.err
    hf, x = opened(tmp_path / "out"), ids(300)
    assert type(hf).__module__.startswith("transformers.models.") and not list((tmp_path / "out").glob("*.py"))
    with torch.no_grad():
        torch.testing.assert_close(hf(x).logits, model(x)[0], atol=1e-4, rtol=1e-4)
    assert ("adapters" in result.err) == ("lora_rank" in changes)
    if changes == OURS["gpt2"]:
        ours = generate(model, x[:1], 64, chooser(0), None, KVCache(model, 1, 80, "float32"))
        assert torch.equal(greedy(hf, x[:1], 64)[:, 16:], torch.stack(list(ours), 1))
    if changes in (OURS["gpt2"], OURS["pythia"], OURS["own_head"], OURS["one_after_another"]):
        again = from_hugging_face(hf)
        assert again.config == model.config
        assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


# -- what surgery wrote -----------------------------------------------------------------------------------------------

CUTS = [("llama", "shared_kv", "k,v"), ("neox", "separate", "q,k,v"), ("qwen2", "shared_layers", "k,v")]
CUTS += [("llama", "separate", "q")]


def smaller(folder, spoken, name="llama", mode="shared_kv", targets="k,v", **point):
    """A folder of surgery -> the model as surgery.load() reads it."""
    _, small, plan = cut(MODELS[name](), mode=mode, targets=targets, **dict(rank=5) | point)
    save(folder, small, transformers.AutoTokenizer.from_pretrained(spoken), plan)
    return load(folder)[0]


def greedy(hf, x, tokens):
    return hf.generate(x, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)


@torch.no_grad()
def assert_same(models, before, x, tokens=0, atol=1e-4):
    logits, said = before(x).logits, greedy(before, x, tokens) if tokens else None
    for hf in models:
        torch.testing.assert_close(hf(x).logits, logits, atol=atol, rtol=1e-4)
        assert not tokens or torch.equal(greedy(hf, x, tokens), said)


@pytest.mark.parametrize(("name", "mode", "targets"), [*CUTS, ("llama", "table", "wte"), ("neox", "table", "wte")])
def test_every_smaller_model_in_both_forms(spoken, export, tmp_path, name, mode, targets):
    before = smaller(tmp_path / "small", spoken, name, mode, targets)
    dense, compact = (export(tmp_path / "small", f"--{form}", out=form) for form in ("dense", "compact"))
    assert dense.status == compact.status == 0, dense.err + compact.err
    hf, untouched, x = opened(tmp_path / "dense"), MODELS[name](), ids(300, B=1)
    assert type(hf) is type(untouched) and not hasattr(hf.config, "surgery")
    small = opened(tmp_path / "compact", trust_remote_code=True)
    assert small.num_parameters() == before.num_parameters() < untouched.num_parameters()
    assert_same((small, hf), before, x, tokens=64 if (name, mode) == ("llama", "shared_kv") else 0)


# -- compact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["factors", "tied_scales", "mean", "compressed", "both", "narrow", "compressed_gpt2"])
def test_our_checkpoints_compact(tiny_model, spoken, export, tmp_path, name):
    changes = (OURS | dict(both=OURS["compressed"] | FACTORS | dict(tie_head=True)))[name]
    model = tiny_model(vocab_size=300, **changes)
    result = export(saved(model, tmp_path / "run"), "--tokenizer", spoken, "--compact")
    assert result.status == 0, result.err
    hf, x = opened(tmp_path / "out", trust_remote_code=True), ids(300)
    with torch.no_grad():
        torch.testing.assert_close(hf(x).logits, model(x)[0], atol=1e-4, rtol=1e-4)
    assert cache_bytes(hf, x[0]) == 4 * model.config.n_layer * sum(model.cache_widths())
    ours = torch.stack(list(generate(model, x[:, :8], 8, chooser(0))), 1)
    assert torch.equal(greedy(hf, x[:, :8], 8)[:, 8:], ours)


def write_compact(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", "--model", f"{folder}/small", "--out", f"{folder}/out", "--compact"])
        runpy.run_module("export", run_name="__main__")


@pytest.fixture(scope="module")
def compact(spoken, tmp_path_factory):
    """(A compact folder, k and v of a layer in one latent, the table with a mean; the model that surgery.load() reads)."""
    folder = tmp_path_factory.mktemp("compact")
    low_rank(folder / "small", transformers.AutoTokenizer.from_pretrained(spoken))
    write_compact(folder)
    return folder / "out", load(folder / "small")[0]


def test_a_compact_model_reads_padded_batches_as_it_reads_each_text_alone(compact):
    folder, before = compact
    hf, tokenizer = opened(folder, trust_remote_code=True), transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["1 is odd, and", "12 is even, and 144 is its square; 13 is"]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    together = hf.generate(**tokenizer(texts, return_tensors="pt", padding=True), **options)[:, -12:]
    for text, found in zip(texts, together):
        x = tokenizer(text, return_tensors="pt")
        assert torch.equal(hf.generate(**x, **options)[0, -12:], found)
        assert torch.equal(before.generate(**x, **options)[0, -12:], found)


def test_a_compact_model_saves_itself_again_in_half_precision_on_a_device_map(compact, tmp_path):
    folder, before = compact
    hf = opened(folder, trust_remote_code=True, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in hf.parameters()} == {torch.bfloat16}
    x = ids(300)
    torch.testing.assert_close(hf(x).logits.float(), before(x).logits, atol=0.1, rtol=0.1)
    hf.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again", trust_remote_code=True, dtype=torch.bfloat16)
    assert torch.equal(again(x).logits, hf(x).logits)
    sizes = [sum(file.stat().st_size for file in place.glob("*.safetensors")) for place in (folder, tmp_path / "again")]
    assert sizes[1] < 0.6 * sizes[0]


def test_adapters_on_a_compact_model_train_and_merge(compact):
    peft = pytest.importorskip("peft")
    hf, x = opened(compact[0], trust_remote_code=True), ids(300)
    targets = ["down", "up", "wte", "scale_up", "scale_down", "o_proj"]  # wte is the head's too
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(hf, config)
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(p, std=0.1)
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        adapted = model(x).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x).logits, adapted, atol=1e-4, rtol=1e-4)
    assert (adapted - compact[1](x).logits).abs().max() > 0.1
    assert cache_bytes(merged, x[0]) == 2 * 5 * 4  # one latent a layer, still


STANDARD = {"inspect", "contextlib", "dataclasses", "functools", "math", "sys"}


def test_the_code_beside_the_weights_needs_torch_and_transformers_alone(compact, packed):
    for folder in (compact[0], packed[0]):
        text = (folder / "modeling_nanopca.py").read_text()
        found = {part.split()[1].split(".")[0] for part in text.splitlines() if part.lstrip().startswith(("import ", "from "))}
        assert {"torch", "transformers"} <= found <= {"torch", "transformers", *STANDARD}


def test_a_compact_model_without_trust_says_what_to_pass(compact, run_main, tmp_path, assert_one_line_error):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        opened(compact[0])
    result = run_main("util_factorization/import_hf.py", "--model", compact[0], "--out", tmp_path / "ckpt.pt")
    assert_one_line_error(result, "contains code", "surgery.eval --trust_remote_code", "trust_remote_code=True")


# -- by bits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["matrices", "matrices and small cache", "matrices and fast cache"])
def packed(request, spoken, tmp_path_factory):
    """(A compact folder of a model whose table, a layer and maybe the cache are kept by bits; surgery's folder)."""
    folder, tokenizer = tmp_path_factory.mktemp("packed"), transformers.AutoTokenizer.from_pretrained(spoken)
    hf, codes = toys.llama(num_hidden_layers=1), ()
    if "cache" in request.param:
        hf, _, codes = test_coded_cache.coded(0.25, request.param.split()[2])
    save_coded(folder / "small", hf, tokenizer, coded_matrices(hf), codes)
    write_compact(folder)
    return folder / "out", folder / "small"


def test_a_packed_model_is_as_small_and_says_the_same(packed, tmp_path):
    before, hf = load(packed[1])[0], opened(packed[0], trust_remote_code=True)
    # torch writes the exported cache, and a number on the edge of two codes may fall to either side
    cached = bool(json.loads((packed[1] / "config.json").read_text())["surgery"]["cache"])
    assert_same([hf], before, ids(300, B=1), tokens=3, atol=5e-3 if cached else 1e-4)
    assert cache_bytes(hf, ids(300)[0]) == cache_bytes(before, ids(300)[0])
    held = [sum(t.nbytes for t in [*m.parameters(), *m.buffers()]) for m in (hf, before)]
    levels = 2 * 16 * 2**12
    assert held[0] <= held[1] + levels
    on_disk = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in packed]
    assert on_disk[0] < on_disk[1] + levels + 4000
    assert "| numbers beside the packed matrices |" in (packed[0] / "README.md").read_text()
    hf.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again", trust_remote_code=True, dtype=torch.bfloat16)
    x = ids(300, B=1, T=8)
    with torch.no_grad():
        rounded = again(x).logits
        torch.testing.assert_close(rounded.float(), before(x).logits, atol=0.2, rtol=0.2)
    assert rounded.dtype == torch.bfloat16
    assert {t.dtype for name, t in again.named_buffers() if ".code." in name} <= {torch.float32}


def test_a_packed_model_dense_or_in_one_line(packed, run_main, tmp_path, assert_one_line_error):
    result = run_main("-m", "export", "--model", packed[1], "--out", tmp_path / "dense", "--dense")
    if json.loads((packed[1] / "config.json").read_text())["surgery"]["cache"]:
        return assert_one_line_error(result, "--dense", "no standard architecture", "quantized cache")
    assert result.status == 0, result.err
    assert_same([opened(tmp_path / "dense")], load(packed[1], packed=False)[0], ids(300, B=1))


# -- the folder around the weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_what_transformers_4_reads_by_other_names_is_there_too(spoken, export, tmp_path, form):
    rope = dict(rope_theta=500.0, rope_type="llama3", original_max_position_embeddings=16)
    rope |= dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
    _, small, plan = cut(toys.llama(rope_parameters=rope), mode="shared_kv", targets="k,v", rank=5)
    save(tmp_path / "small", small, transformers.AutoTokenizer.from_pretrained(spoken), plan)
    assert export(tmp_path / "small", f"--{form}").status == 0
    config, names = (json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert names["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["rope_parameters"] == rope and config["rope_theta"] == rope.pop("rope_theta")
    assert config["rope_scaling"] == rope
    assert opened(tmp_path / "out", trust_remote_code=True).config.rope_parameters == rope | dict(rope_theta=500.0)


def test_the_card_has_what_was_measured_and_nothing_else(tiny_model, spoken, export, tmp_path):
    run = saved(tiny_model(vocab_size=300), tmp_path / "run")
    assert export(run, "--tokenizer", spoken, "--dense", out="bare").status == 0
    bare = (tmp_path / "bare" / "README.md").read_text()
    assert "GPT2LMHeadModel" in bare
    assert not [words for words in ("perplexity", "trust_remote_code", str(tmp_path)) if words in bare]
    final = dict(val_loss=4.25, val_ppl=70.1054, eval_tokens=48, tokens=1280)
    (run / "summary.json").write_text(json.dumps(dict(dataset="sotu", final=final)))
    (run / "config.json").write_text(json.dumps(dict(command="python train.py --seed 1", commit="abc")))
    assert export(run, "--tokenizer", spoken, "--dense", out="measured").status == 0
    card = (tmp_path / "measured" / "README.md").read_text()
    for words in ("| perplexity | 70.11 |", "| tokens read | 1,280 |", "`python train.py --seed 1`", "| trained on | sotu |"):
        assert words in card


def test_the_card_of_a_smaller_model(compact, spoken, export, tmp_path):
    small = shutil.copytree(compact[0].parent / "small", tmp_path / "small")
    measures = dict(
        untouched=dict(loss=3.3, ppl=27.11, kl=0.0), healed=dict(loss=3.4, ppl=29.96, kl=0.12, texts={"a.txt": dict(ppl=30.0)})
    )
    made = dict(model="HuggingFaceTB/SmolLM2-135M", command="python -m surgery --rank 5 --out /home/me/small")
    made |= dict(calib_text="/text/b.txt", eval_text="a.txt", commit="abc", hardware="a laptop")
    record = dict(method="fisher", mode="shared_kv", targets="k,v", rank=5, models=measures, made_by=made)
    (small / "measured.json").write_text(json.dumps(record))
    assert export(small, "--compact", "--dtype", "float16").status == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        'base_model: "HuggingFaceTB/SmolLM2-135M"',
        "| numbers in float16 |",
        "| perplexity | 29.96 (base model: 27.11) |",
        "| calibration text | b.txt |",
        "| KL from the base model, nats a token | 0.1200 |",
        "| perplexity, a.txt | 30.00 |",
        'AutoTokenizer.from_pretrained("out", trust_remote_code=True)',
        "`python -m surgery --rank 5 --out small`",
        "| cut | k,v shared_kv fisher |",
    ):
        assert words in card, words


def test_the_tokenizer_of_a_dataset_travels_along(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b" w": 256, b"or": 257, b" wor": 258, b"ds": 259, b" words": 260, b"it": 261}
    encoding = tiktoken.Encoding(
        "few", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 262}
    )
    text = "It's 1867: naïve  words with it\n\n and <|endoftext|>"
    theirs = from_tiktoken(encoding)
    assert len(theirs) == encoding.n_vocab and theirs.eos_token_id == encoding.eot_token
    assert theirs(text, split_special_tokens=True)["input_ids"] == encoding.encode_ordinary(text)
    bpe = train_bpe([toys.TEXT], 300)
    meta = dict(vocab_size=304, tokenizer="bpe", tokenizer_json=bpe.to_str(), end_of_text=0)
    write_dataset(tmp_path, [1, 2], [3], meta)
    own = tokenizer_for(str(tmp_path), "none", 304, "x")
    own.save_pretrained(tmp_path / "saved")
    for tokenizer in (own, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert tokenizer("12 is even")["input_ids"] == bpe.encode("12 is even").ids and tokenizer.eos_token == "<|endoftext|>"


def test_mistakes_of_an_export_are_one_line(tiny_model, spoken, export, tmp_path, assert_one_line_error, compact):
    run, other = saved(tiny_model(vocab_size=300), tmp_path / "run"), ("--tokenizer", spoken)
    parallel = saved(tiny_model(vocab_size=300, parallel_residual=True), tmp_path / "parallel")
    few, many = (saved(tiny_model(vocab_size=V), tmp_path / f"vocab_{V}") for V in (97, 400))
    (tmp_path / "there").mkdir()
    for model, argv, out, *words in [
        (run, other, "out", "--dense", "--compact"),
        (run, (*other, "--dense", "--compact"), "out", "give one of them"),
        (run, (*other, "--dense"), "there", "--out", "exists"),
        (run, ("--dense",), "out", "none", "--tokenizer"),
        (few, (*other, "--dense"), "out", "--tokenizer", "300 tokens", "97"),
        (many, (*other, "--dense"), "out", "--tokenizer", "300 tokens", "400"),
        (parallel, (*other, "--dense"), "out", "no standard architecture"),
        (run, (*other, "--compact"), "out", "--compact", "nothing", "--dense"),
        (tmp_path / "nothing", ("--dense",), "out", "nothing", "run folder"),
        (compact[0].parent / "small", (*other, "--dense"), "out", "--tokenizer", "its own"),
        (compact[0], ("--dense",), "out", "Hugging Face"),
    ]:
        assert_one_line_error(export(model, *argv, out=out), *words)
        assert not (tmp_path / "out").exists() and not list((tmp_path / "there").iterdir())
