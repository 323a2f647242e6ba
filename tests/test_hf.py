import numpy as np
import pytest
import torch
from conftest import in_use

from training import checkpoint as ckpt
from util_factorization.import_hf import from_hugging_face

transformers = pytest.importorskip("transformers")
if not transformers.utils.is_torch_available():
    pytest.skip("this transformers wants a newer torch", allow_module_level=True)

VOCAB, CONTEXT = 97, 16


def redrawn(hf):
    """Every weight random, biases and norms too, so that no part can hide behind zeros and ones."""
    torch.manual_seed(0)
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return hf.eval()


def neox(rotary=0.25, **changes):
    shape = dict(vocab_size=VOCAB, max_position_embeddings=CONTEXT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    rope = dict(rope_parameters=dict(rope_type="default", rope_theta=10000, partial_rotary_factor=rotary))
    if int(transformers.__version__.split(".")[0]) < 5:
        rope = dict(rotary_pct=rotary)
    return redrawn(
        transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape, **dict(intermediate_size=128) | rope | changes))
    )


def gpt2(**changes):
    shape = dict(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4)
    return redrawn(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | changes)))


def logits(model, hf):
    """Ours and theirs."""
    torch.manual_seed(1)
    x = torch.randint(VOCAB, (3, CONTEXT))
    with torch.no_grad():
        return model(x)[0], hf(x).logits.float()


def assert_same(model, hf):
    torch.testing.assert_close(*logits(model, hf), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("rotary", [0.25, 1.0])
def test_logits_equal_gpt_neox(rotary, parallel, tied):
    hf = neox(rotary, use_parallel_residual=parallel, tie_word_embeddings=tied)
    model = from_hugging_face(hf)
    assert not model.training and model.config.tie_head == tied
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert model.count_parameters()["total"] == sum(p.numel() for p in hf.parameters())
    assert_same(model, hf)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(activation_function="gelu", n_inner=64),
        dict(activation_function="gelu_pytorch_tanh"),
        dict(activation_function="gelu_fast"),
        dict(tie_word_embeddings=False),
    ],
)
def test_logits_equal_gpt2(changes):
    hf = gpt2(**changes)
    model = from_hugging_face(hf)
    assert model.count_parameters()["total"] == sum(p.numel() for p in hf.parameters())
    assert_same(model, hf)


def test_the_comparison_sees_a_layout_and_a_share_that_are_wrong():
    """Rows read as [3, H, n], q for k, one rotated pair fewer: each must show."""
    hf = neox()
    model = from_hugging_face(hf)
    qkv, attn = hf.gpt_neox.layers[0].attention.query_key_value, model.transformer.h[0].attn
    right = {name: p.clone() for name, p in attn.state_dict().items()}
    swapped = {"q_proj.weight": right["k_proj.weight"], "k_proj.weight": right["q_proj.weight"]}
    for wrong in (swapped, dict(zip(("q_proj.weight", "k_proj.weight", "v_proj.weight"), qkv.weight.chunk(3)))):
        attn.load_state_dict(right | wrong)
        ours, theirs = logits(model, hf)
        assert (ours - theirs).abs().max() > 0.1
    attn.load_state_dict(right)
    assert_same(model, hf)
    with pytest.raises(AssertionError):
        assert_same(model, neox(0.5))


def test_half_precision_becomes_float32():
    hf = neox().half()
    model = from_hugging_face(hf)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same(model, hf.float())


# -- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, tied", [(neox, False), (neox, True), (gpt2, True)])
def test_folder_to_checkpoint(run_main, tmp_path, make, tied):
    hf = make(tie_word_embeddings=tied)
    hf.save_pretrained(tmp_path / "hf")
    out = tmp_path / "new" / "ckpt.pt"
    result = run_main("util_factorization/import_hf.py", "--model", tmp_path / "hf", "--out", out, "--dataset", "sotu")
    assert result.status == 0, result.err
    checkpoint = ckpt.load(out.parent)
    assert checkpoint["tokens"] is None and checkpoint["args"]["dataset"] == "sotu"
    for name in ckpt.SHAPE:
        assert checkpoint["args"][name] == checkpoint["config"][name]
    model = ckpt.build(checkpoint).eval()
    assert result.last == dict(out=str(out), parameters=model.count_parameters())
    assert_same(model, hf)


def test_positions_are_cropped_where_asked(run_main, tmp_path, assert_one_line_error):
    hf = gpt2()
    hf.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    where = ("util_factorization/import_hf.py", "--model", tmp_path / "hf", "--out", tmp_path / "ckpt.pt", "--block_size")
    assert_one_line_error(run_main(*where, CONTEXT + 1), "--block_size 17", "16")
    assert run_main(*where, 5).status == 0
    checkpoint = ckpt.load(tmp_path / "ckpt.pt")
    assert checkpoint["config"]["block_size"] == checkpoint["args"]["block_size"] == 5
    assert checkpoint["args"]["dataset"] == "wikitext103" and checkpoint["config"]["vocab_size"] == VOCAB
    x = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(ckpt.build(checkpoint).eval()(x)[0], hf(x).logits, atol=1e-4, rtol=1e-4)


def test_the_table_of_a_hugging_face_model_is_factorized_and_trained_on(run_main, train, tmp_path):
    """Job B from a GPT-2's own table: no checkpoint of ours between."""
    hf = gpt2(n_embd=16)
    hf.save_pretrained(tmp_path / "hf")
    names = [tmp_path / name for name in ("wte_{method}_k{k}.npy", "scale_mats_{method}_k{k}.npz")]
    out = ("--out_wte_npy", names[0], "--out_scale_npz", names[1])
    result = run_main("util_factorization/pca_factorize_wte.py", "--ckpt_path", tmp_path / "hf", "--rank_k", "8,16", *out)
    assert result.status == 0, result.err
    half, whole = result.last["ranks"]
    with np.load(whole["scale_npz"]) as scale:
        table = torch.from_numpy(np.load(whole["wte_npy"]) @ scale["scale_up"])
    torch.testing.assert_close(table, hf.transformer.wte.weight.data, atol=1e-4, rtol=1e-4)
    factors = dict(n_embd_wte=8, import_wte_npy=half["wte_npy"], import_scale_matrices_npz=half["scale_npz"])
    b = train(out_dir=tmp_path / "b", **factors)
    assert b.status == 0, b.err


def test_a_hub_that_does_not_answer_is_one_line_at_once(run_main, tmp_path, monkeypatch, assert_one_line_error):
    monkeypatch.setattr("common.hugging_face.hub_error", lambda name: "ConnectError")
    monkeypatch.setattr("common.hugging_face.is_cached", lambda name: False)
    for program, name in (("import_hf.py", "model"), ("pca_factorize_wte.py", "ckpt_path")):
        rest = ("--out", tmp_path / "ckpt.pt") if name == "model" else ()
        result = run_main(f"util_factorization/{program}", f"--{name}", "openai-community/gpt2", *rest)
        assert_one_line_error(
            result, f"--{name} openai-community/gpt2", "does not answer (ConnectError)", "folder of save_pretrained"
        )
    monkeypatch.setattr("common.hugging_face.hub_error", lambda name: "RepositoryNotFoundError")
    result = run_main("util_factorization/import_hf.py", "--model", "gpt-3", "--out", tmp_path / "ckpt.pt")
    assert_one_line_error(result, "--model gpt-3", "nor a model on the hub")


# -- refusals ---------------------------------------------------------------------------------------------------------


def llama():
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def rope(**changes):
    return dict(rope_parameters=dict(rope_type="default", rope_theta=10000, partial_rotary_factor=0.25) | changes)


@pytest.mark.parametrize(
    "make, words",
    [
        (llama, ["llama", "Pythia"]),
        (lambda: neox(hidden_act="relu"), ["activation relu", "gelu"]),
        (lambda: gpt2(activation_function="silu"), ["activation silu", "gelu"]),
        (lambda: neox(layer_norm_eps=1e-6), ["layer_norm_eps 1e-06"]),
        (lambda: gpt2(layer_norm_epsilon=1e-6), ["layer_norm_epsilon 1e-06"]),
        (lambda: neox(attention_bias=False), ["attention_bias False"]),
        (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx True"]),
        (lambda: neox(intermediate_size=48), ["48", "multiple of 32"]),
        (lambda: neox(**rope(rope_theta=500000)), ["rope_theta 500000"]),
        (lambda: neox(**rope(rope_type="linear", factor=2.0)), ["rope_type linear"]),
        (lambda: neox(rotary=0.1), ["rotates 0 of the 8"]),
    ],
)
def test_what_our_model_cannot_say_is_refused(capsys, make, words):
    hf = make()
    with pytest.raises(SystemExit) as end:
        from_hugging_face(hf)
    err = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert all(word in err[-1] for word in words), err


def test_refusals_of_the_program(run_main, tmp_path, assert_one_line_error):
    def refused(model, out, *words):
        result = run_main("util_factorization/import_hf.py", "--model", model, "--out", out)
        assert_one_line_error(result, *words)

    out = tmp_path / "ckpt.pt"
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", out, "--model", "save_pretrained")
    (tmp_path / "some.gguf").touch()
    for name in ("nowhere", "some.gguf"):
        refused(tmp_path / name, out, "--model", f"{name} is not a folder", "save_pretrained")
    llama().config.save_pretrained(tmp_path / "llama")  # without weights: the config alone says no
    refused(tmp_path / "llama", out, "llama", "Pythia")
    neox().config.save_pretrained(tmp_path / "bare")
    refused(tmp_path / "bare", out, "--model", "save_pretrained")
    assert not out.exists()
    with in_use(tmp_path / ".ckpt.pt.lock"):
        refused(tmp_path / "nothing", out, "--out", "in use")
    out.write_text("mine")
    refused(tmp_path / "nothing", out, "--out", "exists")
    assert out.read_text() == "mine"


def test_a_folder_that_lacks_weights_is_refused(run_main, tmp_path):
    hf = neox()
    state = {name: p for name, p in hf.state_dict().items() if "layers.1.mlp" not in name}
    hf.save_pretrained(tmp_path / "hf", state_dict=state)
    result = run_main("util_factorization/import_hf.py", "--model", tmp_path / "hf", "--out", tmp_path / "ckpt.pt")
    assert result.status == 2 and "lacks 4 weights, first gpt_neox.layers.1.mlp" in result.err.strip().splitlines()[-1]
    assert not (tmp_path / "ckpt.pt").exists()
