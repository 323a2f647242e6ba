"""Models out: what is written opens with plain transformers, and computes what the model did."""

import pytest
import torch

from common import checkpoint as ckpt
from surgery.low_rank_folder import save
from surgery.reading import load
from surgery.write_model import cache_bytes
from util_factorization.import_hf import from_hugging_face

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
transformers = toys.transformers
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

