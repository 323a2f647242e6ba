"""Models out: what is written opens with plain transformers, and computes what the model did."""

import pytest
import torch

from common import checkpoint as ckpt
from export.__main__ import main
from surgery.low_rank_folder import save
from surgery.reading import load
from surgery.write_model import cache_bytes
from util_factorization.import_hf import from_hugging_face

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
transformers = toys.transformers
from test_hostile_models import low_rank  # noqa: E402
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
    model = tiny_model(vocab_size=300, **changes)
    result = export(saved(model, tmp_path / "run"), "--tokenizer", spoken, "--dense")
    assert result.status == 0, result.err
    hf, x = opened(tmp_path / "out"), ids(300)
    assert type(hf).__module__.startswith("transformers.models.") and not list((tmp_path / "out").glob("*.py"))
    with torch.no_grad():
        torch.testing.assert_close(hf(x).logits, model(x)[0], atol=1e-4, rtol=1e-4)
    assert ("adapters" in result.err) == ("lora_rank" in changes)
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


def assert_same(hf, before, x):
    with torch.no_grad():
        torch.testing.assert_close(hf(x).logits, before(x).logits, atol=1e-4, rtol=1e-4)
    options = dict(max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(hf.generate(x, **options), before.generate(x, **options))


@pytest.mark.parametrize(("name", "mode", "targets"), [*CUTS, ("llama", "table", "wte"), ("neox", "table", "wte")])
def test_every_smaller_model_as_its_standard_architecture(spoken, export, tmp_path, name, mode, targets):
    before = smaller(tmp_path / "small", spoken, name, mode, targets)
    result = export(tmp_path / "small", "--dense")
    assert result.status == 0, result.err
    hf = opened(tmp_path / "out")
    assert type(hf) is type(MODELS[name]()) and not hasattr(hf.config, "surgery")
    assert_same(hf, before, ids(300))


# -- compact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode", "targets"), [*CUTS, ("llama", "table", "wte"), ("neox", "table", "wte")])
def test_every_smaller_model_compact(spoken, export, tmp_path, name, mode, targets):
    before = smaller(tmp_path / "small", spoken, name, mode, targets)
    result = export(tmp_path / "small", "--compact")
    assert result.status == 0, result.err
    hf = opened(tmp_path / "out", trust_remote_code=True)
    assert hf.num_parameters() == before.num_parameters() < MODELS[name]().num_parameters()
    assert_same(hf, before, ids(300))


@pytest.mark.parametrize("name", ["factors", "tied_scales", "mean", "compressed", "both"])
def test_our_checkpoints_compact(tiny_model, spoken, export, tmp_path, name):
    changes = (OURS | dict(both=OURS["compressed"] | FACTORS | dict(tie_head=True)))[name]
    model = tiny_model(vocab_size=300, **changes)
    result = export(saved(model, tmp_path / "run"), "--tokenizer", spoken, "--compact")
    assert result.status == 0, result.err
    hf, x = opened(tmp_path / "out", trust_remote_code=True), ids(300)
    with torch.no_grad():
        torch.testing.assert_close(hf(x).logits, model(x)[0], atol=1e-4, rtol=1e-4)
    assert cache_bytes(hf, x[0]) == 4 * model.config.n_layer * sum(model.cache_widths())


@pytest.fixture(scope="module")
def compact(spoken, tmp_path_factory):
    """(A compact folder, k and v of a layer in one latent, the table with a mean; the model that surgery.load() reads)."""
    folder = tmp_path_factory.mktemp("compact")
    low_rank(folder / "small", transformers.AutoTokenizer.from_pretrained(spoken))
    main(["--model", str(folder / "small"), "--out", str(folder / "out"), "--compact"])
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
    config = peft.LoraConfig(r=2, target_modules=["down", "up", "scale_up", "scale_down", "o_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(hf, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
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


def test_a_compact_model_without_trust_says_what_to_pass(compact):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        opened(compact[0])
