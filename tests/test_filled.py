"""What is read is filled: every number of a loaded model comes from its file or is computed from its config."""

import sys

import pytest
import torch
import torch.nn as nn

from common.hugging_face import read_model
from common.modules import check_filled, fresh_memory_is_nan
from surgery import rank_modules
from surgery.folder import load
from training import checkpoint

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
transformers = toys.transformers
from test_hostile_models import coded_matrices, low_rank  # noqa: E402

IDS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """llama/ of save_pretrained, and two smaller models of it: low_rank/ and packed/."""
    from surgery.bits_folder import save as save_packed

    folder = tmp_path_factory.mktemp("filled")
    toys.llama().save_pretrained(folder / "llama")
    toys.save_tokenizer(folder / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    low_rank(folder / "low_rank", tokenizer)
    packed = toys.llama(num_hidden_layers=1)
    save_packed(folder / "packed", packed, tokenizer, coded_matrices(packed), ())
    return folder


def export(source, out):
    import runpy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", "--model", str(source), "--out", str(out), "--compact"])
        runpy.run_module("export", run_name="__main__")
    return out


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def test_fresh_memory_is_nan_and_is_found():
    with fresh_memory_is_nan():
        fresh = nn.utils.skip_init(nn.Linear, 3, 2)
        whole = dict(a=torch.empty(3, dtype=torch.int16), b=torch.empty(2, dtype=torch.int64))
    assert fresh.weight.isnan().all() and not torch.are_deterministic_algorithms_enabled()
    for name, tensor in whole.items():
        model = nn.Linear(3, 2)
        model.register_buffer(name, tensor, persistent=False)
        with pytest.raises(SystemExit):
            check_filled(model, "a file")
    with pytest.raises(SystemExit):
        check_filled(fresh, "a file")
    check_filled(nn.BatchNorm1d(3), "a file")  # numbers, a count of 0


@pytest.mark.parametrize("kind", ["low_rank", "packed"])
def test_a_smaller_model_that_is_read_is_filled(folders, kind, tmp_path):
    """Memory that nobody wrote holds NaN here. Both forms, by our reader and by transformers' own."""
    compact = export(folders / kind, tmp_path / "compact")
    with fresh_memory_is_nan():
        models = [load(folders / kind)[0], opened(compact)]
    for hf in models:
        check_filled(hf, kind)
    torch.testing.assert_close(*(hf(IDS).logits for hf in models), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_that_is_read_is_filled(tiny_model, tmp_path):
    """cos and sin are buffers that no file keeps."""
    model = tiny_model(rotary_pct=0.5, n_embd_wte=4, v_proj_dim=8)
    checkpoint.save_new(tmp_path / "ckpt.pt", model, args=dict(dataset="-"), iter_num=0, data_step=0, tokens=None)
    with fresh_memory_is_nan():
        read = checkpoint.build(checkpoint.load(tmp_path / "ckpt.pt"))
    check_filled(read, "ckpt.pt")
    idx = IDS[:, :16]
    assert torch.equal(read(idx)[0], model(idx)[0])


def test_a_part_that_a_reader_forgets_is_one_line(folders, monkeypatch, capsys):
    """So it was on torch 2.5, whose torch.get_default_device() does not see torch.device("meta")."""
    monkeypatch.setattr(rank_modules, "unset_table", lambda V, r: nn.utils.skip_init(nn.Embedding, V, r, device="cpu"))
    with pytest.raises(SystemExit):
        load(folders / "low_rank")
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folders / "low_rank") in line and "embed_tokens.wte.weight has NaN, or comes neither from the file" in line


def test_a_buffer_that_transformers_forgets_is_one_line(folders, monkeypatch, capsys):
    made = transformers.LlamaForCausalLM.from_pretrained

    def forgetful(*given, **options):
        model, info = made(*given, **options)
        model.model.rotary_emb.inv_freq = torch.empty(4)
        return model, info

    assert read_model(folders / "llama", "--model")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", forgetful)
    with pytest.raises(SystemExit):
        read_model(folders / "llama", "--model")
    (line,) = capsys.readouterr().err.splitlines()
    assert "--model" in line and "rotary_emb.inv_freq has NaN, or comes neither" in line


@pytest.mark.parametrize("kind", ["low_rank", "packed"])
def test_a_compact_folder_that_lacks_a_weight_is_refused(folders, kind, tmp_path):
    """transformers draws a missing weight at random."""
    from safetensors.torch import load_file, save_file

    compact = export(folders / kind, tmp_path / "compact")
    tensors = load_file(compact / "model.safetensors")
    missing = next(name for name in tensors if "norm" in name)
    save_file({n: t for n, t in tensors.items() if n != missing}, compact / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(ValueError, match=missing):
        opened(compact)
