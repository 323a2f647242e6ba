"""surgery.eval: every token is predicted once, in windows of a rule that a brute force and lm-eval share, by any model."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from torch.nn import functional as F

from surgery.predictor import rolling_windows

toys, models = pytest.importorskip("toys"), pytest.importorskip("test_surgery_models")
own_clinic = models.own_clinic
TEXTS = dict(a=toys.TEXT[:700], b="café \t ü\n" + toys.TEXT[9000:9300] + "\n\n")

TOY_CODE = """
from transformers import GPTNeoXForCausalLM

class Toy(GPTNeoXForCausalLM):
    def forward(self, *args, **options):
        found = super().forward(*args, **options)
        found.logits *= 0
        return found
"""


@pytest.fixture
def evaluate(own_clinic, run_main, tmp_path):
    """evaluate("neox", "--stride", 8, texts="a,b"): surgery.eval on toy texts; a Result."""
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)

    def run(model, *argv, texts="a", window=32):
        text = ",".join(str(tmp_path / f"{name}.txt") for name in texts.split(","))
        return run_main("-m", "surgery.eval", "--model", own_clinic / model, "--text", text, "--window", window, *argv)

    return run


def hugging_face(folder):
    model = models.transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = models.transformers.AutoTokenizer.from_pretrained(folder)
    return lambda ids: model(torch.tensor(ids)[None]).logits[0], lambda text: tokenizer(text)["input_ids"]


@pytest.mark.parametrize("stride", [32, 5])
@torch.no_grad()
def test_each_token_is_predicted_once_from_the_tokens_of_its_window(evaluate, own_clinic, stride):
    logits, encode = hugging_face(own_clinic / "neox")
    ids, W = encode(TEXTS["a"]), 32
    everything, losses, places = [0, *ids], [], []
    for i in range(len(ids)):
        end = W if i < W else min(W + math.ceil((i + 1 - W) / stride) * stride, len(ids))
        start = max(0, end - W)
        losses.append(F.cross_entropy(logits(everything[start : i + 1])[-1], torch.tensor(ids[i])).item())
        places.append(i - start)
    result = evaluate("neox", "--stride", stride)
    assert result.status == 0, result.err
    found, loss = result.last, np.mean(losses)
    assert found["tokens"] == len(ids) > 3 * W and found["stride"] == stride
    assert found["loss"] == pytest.approx(loss, abs=1e-5) and found["ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
    size = len(TEXTS["a"].encode())
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / size / math.log(2), rel=1e-5)
    assert math.log2(found["byte_ppl"]) == pytest.approx(found["bits_per_byte"])
    for low, high in ((0, 16), (16, 32)):
        of_range = [x for x, place in zip(losses, places) if low <= place < high]
        assert found["position_loss"][f"{low}-{high}"] == pytest.approx(np.mean(of_range), abs=1e-5)


@torch.no_grad()
def test_kl_and_agreement_with_a_reference_model(evaluate, own_clinic):
    ours = models.load_subject(own_clinic / "pythia.pt")[0].model
    for p in ours.parameters():
        p += 0.05 * torch.randn_like(p)
    models.save(own_clinic / "moved.pt", ours, own_clinic / "text")
    result = evaluate("moved.pt", "--reference", own_clinic / "neox", texts="a,b", window=64)
    assert result.status == 0, result.err
    theirs, encode = hugging_face(own_clinic / "neox")
    lost, kl, same = [], [], []
    for text in TEXTS.values():
        for x, y, new in rolling_windows(torch.tensor(encode(text)), 0, 64, 64):
            both = (theirs(x.tolist()), ours.logits(ours.hidden(x[None]))[0])
            p, q = (F.log_softmax(z.double(), -1)[-new:].numpy() for z in both)
            y = y[-new:].numpy()
            lost += list(p[np.arange(new), y] - q[np.arange(new), y])
            kl += list((np.exp(p) * (p - q)).sum(1))
            same += list(p.argmax(1) == q.argmax(1))
    found = result.last
    assert found["nats"] == pytest.approx(np.mean(lost), abs=1e-5) and found["kl"] == pytest.approx(np.mean(kl), abs=1e-5)
    assert found["top1"] == pytest.approx(np.mean(same)) and 0 < found["top1"] < 1 and found["kl"] > 1e-3
    assert found["nats"] == pytest.approx(found["loss"] - found["reference_loss"])
    parts = found["texts"].values()
    assert len(parts) == 2 and found["loss"] == pytest.approx(sum(p["loss"] * p["tokens"] for p in parts) / len(lost))
    assert found["bytes"] == sum(len(text.encode()) for text in TEXTS.values()) > sum(map(len, TEXTS.values()))
    assert "| everything |" in result.out and f"{found['kl']:.5f}" in result.out


def test_a_checkpoint_and_its_folder_of_hugging_face_are_the_same_model(evaluate, own_clinic):
    result = evaluate("pythia.pt", "--reference", own_clinic / "neox", "--batch_size", 3)
    assert result.status == 0, result.err
    found = result.last
    assert found["top1"] == 1 and abs(found["kl"]) < 1e-6 and abs(found["nats"]) < 1e-6
    assert evaluate("neox").last["loss"] == pytest.approx(found["loss"], abs=1e-6)
    for kind in models.OWN:
        assert evaluate(kind, "--characters", 50).status == 0


def test_code_in_a_folder_runs_only_where_it_is_trusted(evaluate, own_clinic, tmp_path, monkeypatch, assert_one_line_error):
    """Under another class's name, transformers does not find the head of a GPT-NeoX: its file has it as embed_out.weight."""
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(own_clinic / "neox", tmp_path / "coded")
    config = json.loads((folder / "config.json").read_text()) | dict(auto_map=dict(AutoModelForCausalLM="modeling_toy.Toy"))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_toy.py").write_text(TOY_CODE)
    assert evaluate(folder).last["loss"] == evaluate("neox").last["loss"]
    assert_one_line_error(evaluate(folder, "--trust_remote_code"), "lacks 1 weights, first lm_head.weight")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("embed_out.weight")
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
    result = evaluate(folder, "--trust_remote_code")
    assert result.status == 0, result.err
    assert result.last["loss"] == pytest.approx(math.log(300), abs=1e-5)


def test_mistakes_are_one_line(evaluate, own_clinic, tmp_path, assert_one_line_error):
    for name, size, rows in (("coarse", 280, 300), ("wide", 300, 310)):
        models.redrawn(toys.llama(vocab_size=rows)).save_pretrained(tmp_path / name)
        toys.save_tokenizer(tmp_path / name, size)
    (tmp_path / "b.txt").write_text("")
    for argv, words in (
        (["--stride", 33], ["surgery.eval: error: --stride 33", "--window 32"]),
        (["--reference", tmp_path / "coarse"], ["--reference", "a.txt", "different tokens"]),
        (["--reference", tmp_path / "wide"], ["310", "300", "same tokenizer"]),
        (["--reference", tmp_path / "nowhere"], ["--reference", "nowhere"]),
        (["--reference", tmp_path / "nowhere.pt"], ["--reference", "nowhere.pt"]),
        (["--lm_eval", tmp_path], ["--lm_eval", "exists"]),
    ):
        assert_one_line_error(evaluate("neox", *argv), *words)
    assert_one_line_error(evaluate("neox", window=65), "--window 65", "64 tokens")
    assert_one_line_error(evaluate("neox", texts="a,b"), "b.txt", "empty")
    assert_one_line_error(evaluate("neox", texts="nothing"), "--text", "nothing.txt")


@pytest.mark.parametrize("reads", [32, 33])
def test_lm_eval_measures_the_same_by_the_command_that_is_printed(evaluate, own_clinic, tmp_path, reads):
    """Texts that end with a window's end, and ones that do not; a tokenizer that would add a beginning of text by itself."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval==0.4.13, in an environment of its own")
    result = evaluate("neox", "--lm_eval", tmp_path / "task", "--bos", "no", texts="a,b", window=reads)
    assert result.status == 0, result.err
    command = result.out.split("lm_eval --model hf")[1].splitlines()[0]
    argv = [sys.executable, "-m", "lm_eval", "--model", "hf", *shlex.split(command), "--output_path", str(tmp_path / "out")]
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path / "cache"))
    done = subprocess.run(argv, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = Path(tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]["task"]
    for name, ours in dict(word_perplexity="word_ppl", byte_perplexity="byte_ppl", bits_per_byte="bits_per_byte").items():
        assert theirs[f"{name},none"] == pytest.approx(result.last[ours], rel=1e-4), name
