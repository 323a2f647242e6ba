"""
Folders that an earlier version wrote: they are read, give the same logits, and the run in them goes on to the same losses.

Nothing here is written again: a change of a format has to read these. The program that wrote them is in the commit that
`git log --diff-filter=A -- tests/golden/make.py` names.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from surgery import load
from training import checkpoint

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
GOLDEN = Path(__file__).parent / "golden"
EXPECTED = np.load(GOLDEN / "expected.npz")
IDS = torch.arange(7, 27)[None]
KEPT = [0, 6, 15, 19]
SAME_CODES = 3e-2  # of the largest logit, through a cache by bits: on another processor a number may fall to the code beside
NO_FLAGS = dict.fromkeys([*TINY, "dataset", "compile"])  # of those that the fixture `train` gives
FOLDERS = sorted({name.split(".")[0] for name in EXPECTED.files if "." in name})


@pytest.fixture
def here(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")


def close(found, name, share=1e-5):
    wanted = torch.from_numpy(EXPECTED[name])
    assert (found - wanted).abs().max() <= share * wanted.abs().max(), name


@pytest.mark.parametrize("run", ["mid_run", "compressed", "adapters"])
def test_a_run_computes_what_it_did(here, run):
    model = checkpoint.build(checkpoint.load(run), dropout=0.0).eval()
    with torch.inference_mode():
        close(model(IDS[:, :16])[0][0], run)


def test_a_run_goes_on_to_the_same_losses(here, train):
    result = train(**NO_FLAGS | dict(init_from="resume", out_dir="mid_run", max_iters=12))
    assert result.status == 0, result.err
    lines = [json.loads(line) for line in Path("mid_run/metrics.jsonl").read_text().splitlines()]
    losses = [line.get("val_loss", line.get("train_loss")) for line in lines]
    assert losses == pytest.approx(list(EXPECTED["losses"]), abs=1e-5)


@pytest.mark.parametrize("method", ["pca", "fisher"])
def test_factors_start_a_run(here, train, method):
    """Evaluated without training, they are the table that the run had, cut to rank 4."""
    names = [f"factors/{kind}_{method}_k4.{end}" for kind, end in (("wte", "npy"), ("scale_mats", "npz"))]
    files = dict(zip(("import_wte_npy", "import_scale_matrices_npz"), names))
    start = dict(init_from="prev_run", prev_run_ckpt="mid_run", dataset="text", dropout=0.0, n_embd_wte=4)
    result = train(out_dir="cut", eval_only=True, max_iters=6, **files, **start)
    assert result.status == 0, result.err
    table = checkpoint.build(checkpoint.load("cut")).effective_table()
    scale = np.load(names[1])
    wanted = np.load(names[0]) @ scale["scale_down"] + (scale["mean"] if "mean" in scale else 0)
    np.testing.assert_allclose(table.detach().numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_smaller_model_computes_what_it_did(here, folder):
    """At once, and token by token through its cache."""
    if folder.startswith("compact"):
        hf = toys.transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    else:
        hf = load(folder)[0]
    steps, past = [], None
    with torch.inference_mode():
        once = hf(IDS, use_cache=False).logits[0]
        for i in range(IDS.shape[1]):
            found = hf(IDS[:, i : i + 1], past_key_values=past, use_cache=True)
            past = found.past_key_values
            steps.append(found.logits[0, -1])
    by_bits = json.loads(Path(folder, "config.json").read_text())["surgery"].get("cache")
    close(once[KEPT], f"{folder}.once", SAME_CODES if by_bits else 1e-5)
    close(torch.stack(steps)[KEPT], f"{folder}.steps", SAME_CODES if by_bits else 1e-5)


def test_a_run_with_a_flag_that_is_gone_is_one_line(here, train, assert_one_line_error):
    """The run's own checkpoint has code_wte: null and save_adapters_only: false. One that used a flag cannot go on."""
    saved = torch.load("mid_run/last.pt", weights_only=True)
    assert saved["args"]["code_wte"] is None and saved["args"]["save_adapters_only"] is False
    torch.save(saved | dict(args=saved["args"] | dict(code_wte=0.125)), "mid_run/last.pt")
    result = train(**NO_FLAGS | dict(init_from="resume", out_dir="mid_run"))
    assert_one_line_error(result, "--code_wte 0.125", "older versions")
    torch.save(saved | dict(base=dict(prev_run_ckpt="elsewhere")), "mid_run/ckpt.pt")
    result = train(**NO_FLAGS | dict(init_from="resume", out_dir="mid_run", eval_only=True))
    assert_one_line_error(result, "--save_adapters_only", "older versions")


def test_ranks_by_frequency_are_read_in_both_forms(here):
    """A table whose numbers are kept whole or not at all, which nothing writes any more."""
    found = [load("packed_float16", packed=as_packed)[0].eval() for as_packed in (True, False)]
    with torch.inference_mode():
        torch.testing.assert_close(*(hf(IDS).logits for hf in found), rtol=1e-4, atol=1e-4)
    assert set(found[0].get_input_embeddings().coded.depths.unique().tolist()) == {0, 32}
