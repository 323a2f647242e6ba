"""Writes the folders beside this file, which tests/test_golden.py reads: python tests/golden/make.py"""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

HERE, REPO = Path(__file__).parent, Path(__file__).parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
import toys  # noqa: E402

from common import checkpoint  # noqa: E402
from common.dataset import write_dataset  # noqa: E402
from surgery import load  # noqa: E402

IDS = torch.arange(7, 27)[None]
KEPT = [0, 6, 15, 19]  # positions whose logits are kept, to keep the file small
SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2, device="cpu")
RUN = SHAPE | dict(dtype="float32", warmup_iters=2, eval_interval=3, eval_iters=3, log_interval=1, learning_rate=1e-2)
SIZES = "--window 32 --eval_windows 2 --calib_tokens 1024 --answer_tokens 2 --calib_text calib.txt --eval_text eval.txt"


def program(path, words, **flags):
    words = [*words.split(), *(w for name, value in flags.items() for w in (f"--{name}", str(value)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *words])
        if path.endswith(".py"):
            runpy.run_path(str(REPO / path), run_name="__main__")
        else:
            runpy.run_module(path, run_name="__main__", alter_sys=True)


def runs():
    rng = np.random.default_rng(0)
    ids = np.cumsum(rng.integers(1, 4, size=3000)) % 97
    write_dataset(Path("text"), ids[:2500], ids[2500:], dict(vocab_size=97, tokenizer="none"))
    base = RUN | dict(dataset="text", lr_decay_iters=12)
    program("train.py", "--no-compile", **base, out_dir="mid_run", max_iters=6, dropout=0.0)
    more = dict(n_embd_wte=8, rotary_pct=0.5, v_proj_dim=8)
    program("train.py", "--no-compile --n_embd_wte_scale_tying", **base | more, out_dir="compressed", max_iters=3, dropout=0.0)
    lora = dict(lora_rank=2, lora_alpha=4, lora_targets="wte,v_proj", init_from="prev_run", prev_run_ckpt="mid_run")
    program("train.py", "--no-compile", **base | lora, out_dir="adapters", max_iters=3, dropout=0.0)
    for method in ("svd", "fisher"):
        program(
            "util_factorization/pca_factorize_wte.py", "", ckpt_path="mid_run", rank_k=4, method=method,
            out_wte_npy="factors/wte_{method}_k{k}.npy", out_scale_npz="factors/scale_mats_{method}_k{k}.npz",
        )  # fmt: skip
    (last := Path("compressed/last.pt")).unlink()
    (Path("adapters") / last.name).unlink()


def surgery():
    from test_hostile_models import coded_matrices

    from surgery.coded_folder import save as save_packed

    text = toys.TEXT[: len(toys.TEXT) // 4]
    Path("calib.txt").write_text(text[: len(text) // 2])
    Path("eval.txt").write_text(text[len(text) // 2 :])
    tiny = dict(hidden_size=16, intermediate_size=24)
    toys.llama(**tiny, num_hidden_layers=2).save_pretrained("llama")
    neox = toys.transformers.GPTNeoXConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    toys.redrawn(toys.transformers.GPTNeoXForCausalLM(neox)).save_pretrained("neox")
    for name in ("llama", "neox"):
        toys.save_tokenizer(name)
    cuts = dict(
        rank="--model llama --targets k,v --mode shared_kv --method fisher --rank 8",
        rank_table="--model llama --targets wte --method fisher --rank 8",
        rank_neox="--model neox --targets q,k,v --method whiten --rank 6",
        packed_fast="--model llama --bytes 0.6 --cache_bytes 0.6 --cache_form fast",
        packed_small="--model llama --targets wte --bytes 0.6 --cache_bytes 0.6 --cache_form small",
        packed_float16="--model llama --targets wte --bytes 0.6 --numbers float16",
    )
    for name, words in cuts.items():
        program("surgery", f"{words} {SIZES} --out {name} --out_dir out_{name}")
    tokenizer = toys.transformers.AutoTokenizer.from_pretrained("llama")
    hf = toys.llama(num_hidden_layers=1)
    save_packed("packed_parents", hf, tokenizer, coded_matrices(hf))
    for name in ("rank", "packed_fast"):
        program("export", f"--model {name} --out compact_{name} --compact")


def logits_of(folder):
    if folder.startswith("compact"):
        hf = toys.transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    else:
        hf = load(folder)[0]
    with torch.inference_mode():
        once = hf(IDS, use_cache=False).logits[0]
        steps, past = [], None
        for i in range(IDS.shape[1]):
            found = hf(IDS[:, i : i + 1], past_key_values=past, use_cache=True)
            past = found.past_key_values
            steps.append(found.logits[0, -1])
    return dict(once=once[KEPT], steps=torch.stack(steps)[KEPT])


def expected():
    """What every later version has to find."""
    found = {}
    for name in ("mid_run", "compressed", "adapters"):
        model = checkpoint.build(checkpoint.load(name), dropout=0.0).eval()
        with torch.inference_mode():
            found[name] = model(IDS[:, :16])[0][0]
    for folder in sorted(Path().glob("*/config.json")):
        if folder.parent.name.startswith(("rank", "packed", "compact")):
            found |= {f"{folder.parent}.{way}": t for way, t in logits_of(str(folder.parent)).items()}
    shutil.copytree("mid_run", "whole")
    program("train.py", "--init_from resume", out_dir="whole", max_iters=12)
    lines = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    found["losses"] = torch.tensor([line.get("val_loss", line.get("train_loss")) for line in lines])
    np.savez_compressed("expected.npz", **{name: t.float().numpy() for name, t in found.items()})


if __name__ == "__main__":
    work = HERE / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    os.chdir(work)
    runs()
    surgery()
    expected()
    keep = ["text", "mid_run", "compressed", "adapters", "factors", "expected.npz"]
    keep += [f.parent.name for f in Path().glob("*/config.json") if f.parent.name.startswith(("rank", "packed", "compact"))]
    for name in keep:
        shutil.rmtree(HERE / name, ignore_errors=True)
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, HERE / name)
    for rubbish in [*HERE.glob("*/.lock"), *HERE.glob("*/last.previous.pt"), *HERE.glob("factors/scree_*")]:
        rubbish.unlink()
    os.chdir(HERE)
    shutil.rmtree(work)
