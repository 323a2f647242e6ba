"""Our factor files in ReaLLMASIC/nanoGPT. Its own model.py was tried by scripts/reallmasic.sh; this stand-in has its names."""

import numpy as np
import pytest

# What matters of its model.py: the names of its weights, and how it imports wte [V,k] and scale matrices [k,d].
STAND_IN = """
from types import SimpleNamespace

import neighbour
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

GPTConfig = SimpleNamespace


def named(**modules):
    return nn.ModuleDict(modules)


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, d = c, c.n_embd
        self.transformer = named(wte=nn.Embedding(c.vocab_size, c.n_embd_wte), wpe=nn.Embedding(c.block_size, d))
        qkv = {f"c_attn_{x}": lambda: nn.Linear(d, d, bias=c.bias) for x in "qkv"}
        self.transformer["h"] = nn.ModuleList(
            named(
                pre_ln_attn=nn.LayerNorm(d),
                pre_ln_mlp=nn.LayerNorm(d),
                attn=named(c_proj=nn.Linear(d, d), **{name: make() for name, make in qkv.items()}),
                mlp=named(c_fc=nn.Linear(d, c.mlp_expansion_factor * d), c_proj=nn.Linear(c.mlp_expansion_factor * d, d)),
            )
            for _ in range(c.n_layer)
        )
        self.transformer["ln_f"] = nn.LayerNorm(d)
        for name in ("scale_up", "scale_down"):
            self.transformer[name] = nn.Linear(c.n_embd_wte, d, bias=False)
            self.transformer[name].weight.data.copy_(torch.from_numpy(np.load(c.import_scale_matrices_npz)[name]).T)
        self.transformer.wte = nn.Embedding.from_pretrained(torch.from_numpy(np.load(c.import_wte_npy)))
        print("number of parameters")

    def forward(self, idx, targets=None):
        t, heads = self.transformer, lambda x: x.unflatten(-1, (self.c.n_head, -1)).transpose(1, 2)
        x = t.scale_up(t.wte(idx)) + t.wpe.weight[: idx.shape[1]]
        for block in t.h:
            y, a = block.pre_ln_attn(x), block.attn
            y = F.scaled_dot_product_attention(heads(a.c_attn_q(y)), heads(a.c_attn_k(y)), heads(a.c_attn_v(y)), is_causal=True)
            x = x + a.c_proj(y.transpose(1, 2).flatten(-2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.pre_ln_mlp(x))))
        return t.scale_down.weight.T.matmul(t.ln_f(x)[..., None])[..., 0] @ t.wte.weight.T, None
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "model.py").write_text(STAND_IN)
    (tmp_path / "checkout" / "neighbour.py").write_text("")
    return tmp_path / "checkout"


def test_its_import_of_our_factors_gives_our_logits(
    baseline, factors, checkout, train, run_main, tmp_path, assert_one_line_error
):
    files = factors(8)
    where = [f"--{name}={files[name]}" for name in ("import_wte_npy", "import_scale_matrices_npz")]
    argv = ("-m", "export.reallmasic", "--checkout", checkout, "--model", baseline, *where)
    result = run_main(*argv)
    assert result.status == 0, result.err
    assert result.last["positions"] == 4 * 16 and result.last["apart"] < 1e-5
    scale = dict(np.load(files["import_scale_matrices_npz"]))
    np.savez(tmp_path / "theirs.npz", **{name: part.T for name, part in scale.items()})  # as it exports them
    np.save(tmp_path / "wte.npy", np.load(files["import_wte_npy"]))
    theirs = dict(n_embd_wte=8, import_wte_npy=tmp_path / "wte.npy", import_scale_matrices_npz=tmp_path / "theirs.npz")
    runs = [train(out_dir=tmp_path / name, **flags) for name, flags in dict(ours=files, theirs=theirs).items()]
    assert runs[0].last["val_loss"] == runs[1].last["val_loss"] and "transposed" in runs[1].err
    (checkout / "model.py").write_text(STAND_IN.replace("c_fc", "c_up"))
    assert_one_line_error(run_main(*argv), "--checkout", "c_fc")
    (checkout / "model.py").unlink()
    assert_one_line_error(run_main(*argv), "--checkout", "model.py")
