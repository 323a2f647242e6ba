"""
Flags as an interface: random valid configurations train, load, evaluate, factorize, merge and sample; random invalid ones end
in one line, and nothing is written.

Few of each here; PROPERTIES=100 tries as many, HOSTILE_SEED=7 with pytest's --hypothesis-seed=7 others.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from common.dataset import Dataset
from training import checkpoint

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

RUN = dict(max_iters=2, warmup_iters=1, eval_interval=2, eval_iters=2, log_interval=1, dtype="float32", device="cpu")
NOT_GIVEN = dict.fromkeys(
    "n_layer n_head n_embd block_size batch_size gradient_accumulation_steps max_iters warmup_iters eval_interval eval_iters "
    "log_interval learning_rate dropout dtype dataset".split()
)  # what a resumed run has from its checkpoint


def tried(few):
    """The examples of a test: the same ones in every run, unless there is a seed."""
    number, same = int(os.environ.get("PROPERTIES", few)), "HOSTILE_SEED" not in os.environ
    ignored = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, derandomize=same, database=None, suppress_health_check=ignored)


@st.composite
def valid(draw):
    """Flags of a tiny model and of two steps, of every kind that go together."""
    heads, width = draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((2, 4, 6)))
    d, flags = heads * width, dict(n_head=heads, n_embd=heads * width, n_layer=draw(st.integers(1, 2)))
    flags |= {name: draw(st.booleans()) for name in ("bias", "parallel_residual", "tie_head")}
    flags |= dict(block_size=draw(st.integers(1, 17)), batch_size=draw(st.integers(1, 3)), seed=draw(st.integers(0, 2**63 - 1)))
    flags |= dict(gradient_accumulation_steps=draw(st.integers(1, 2)), mlp_expansion_factor=draw(st.integers(1, 3)))
    flags |= dict(dropout=draw(st.sampled_from((0.0, 0.3))), activation=draw(st.sampled_from(("gelu", "gelu_tanh"))))
    flags["norms_per_layer"] = draw(st.sampled_from((1, 2))) if flags["parallel_residual"] else 2
    flags["rotary_pct"] = draw(st.sampled_from([0.0, *(dims / width for dims in range(2, width + 1, 2))]))
    flags["optimizer"] = draw(st.sampled_from(("adamw", "muon")))
    if flags["tie_head"] and draw(st.booleans()):
        flags |= dict(n_embd_wte=draw(st.integers(1, d)), n_embd_wte_scale_tying=draw(st.booleans()))
        flags["factor_init"] = draw(st.sampled_from(("matched", "naive")))
    if draw(st.booleans()):
        flags["k_proj_dim"] = draw(st.integers(1, d))
    if draw(st.booleans()):
        flags["v_proj_narrow"] = narrow = draw(st.booleans())
        flags["v_proj_dim"] = heads * draw(st.integers(1, width)) if narrow else draw(st.integers(1, d))
    return flags


@tried(3)
@given(flags=valid(), rank=st.integers(1, 24), data=st.data())
def test_a_valid_configuration_does_all_that_there_is(train, run_main, toy_dataset, tmp_path, flags, rank, data):
    out = Path(tempfile.mkdtemp(dir=tmp_path))
    run = train(**RUN | flags, out_dir=out / "run")
    assert run.status == 0, run.err
    evaluated = train(**NOT_GIVEN, out_dir=out / "run", init_from="resume", eval_only=True)
    assert evaluated.status == 0, evaluated.err
    assert evaluated.last["val_loss"] == run.last["best"]["val_loss"]
    model = checkpoint.build(checkpoint.load(out / "run"), dropout=0.0).eval()
    x, y = map(torch.from_numpy, next(iter(Dataset(toy_dataset).fixed_windows(3, 3, flags["block_size"]))))
    logits = model(x)[0]

    prompt = ("--prompt_ids", ",".join(map(str, x[0, : flags["block_size"] // 2 + 1].tolist())))
    wrote = run_main("sample.py", "--ckpt_path", out / "run", *prompt, "--max_new_tokens", 2, "--temperature", 0)
    assert wrote.status == 0, wrote.err
    first = logits[0, flags["block_size"] // 2].argmax()
    assert f",{first}" in wrote.out.splitlines()[0]

    adapted = dict(init_from="prev_run", prev_run_ckpt=out / "run", lora_rank=1, lora_targets="q_proj,mlp_up", lora_alpha=2.0)
    shape = ("batch_size", "gradient_accumulation_steps", "seed", "dropout")
    kept = {name: flags.get(name) for name in (*NOT_GIVEN, *flags) if name not in RUN}
    given = {name: flags[name] if name in shape else None for name in kept} | dict(dataset=toy_dataset)
    given["learning_rate"] = 1e-2
    lora = train(**RUN | given | adapted, out_dir=out / "lora")
    assert lora.status == 0, lora.err
    merged = run_main("util_factorization/merge_lora.py", "--ckpt_path", out / "lora", "--out", out / "merged.pt")
    assert merged.status == 0, merged.err
    with torch.no_grad():
        a, b = (checkpoint.build(checkpoint.load(out / name), dropout=0.0).eval()(x)[0] for name in ("lora", "merged.pt"))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    factorized = run_main(
        "util_factorization/pca_factorize_wte.py", "--ckpt_path", out / "run", "--rank_k", min(rank, flags["n_embd"]),
        "--out_wte_npy", out / "wte_pca_k{k}.npy", "--out_scale_npz", out / "scale_mats_pca_k{k}.npz",
    )  # fmt: skip
    possible = flags["tie_head"] and "n_embd_wte" not in flags
    assert factorized.status == (0 if possible else 2), factorized.err
    if possible and rank >= flags["n_embd"]:  # all of the table
        row = factorized.last["ranks"][0]
        table = np.load(row["wte_npy"]) @ np.load(row["scale_npz"])["scale_down"]
        np.testing.assert_allclose(table, model.lm_head.weight.detach().numpy(), atol=1e-5)


BROKEN = dict(
    n_head=st.sampled_from((0, -1, 5, 7, "x", 2.5, 10**10)), n_embd=st.sampled_from((0, -8, 11, "nan", 10**12)),
    n_layer=st.sampled_from((0, -1, "", "one", 10**10)), block_size=st.sampled_from((0, -4, 5000, 10**9, "4.0")),
    batch_size=st.sampled_from((0, -1, "inf")), dropout=st.sampled_from((1, -0.1, "nan", 2)),
    learning_rate=st.sampled_from((-1, "nan", "inf", "fast")), rotary_pct=st.sampled_from((-0.5, 1.5, "nan", 0.01)),
    activation=st.sampled_from(("relu", "", "GELU")), n_embd_wte=st.sampled_from((0, -1, 999)), mlp_expansion_factor=st.just(0),
    v_proj_dim=st.sampled_from((0, 999, -2)), k_proj_dim=st.sampled_from((0, 999)), norms_per_layer=st.sampled_from((0, 3)),
    max_iters=st.sampled_from((-1, "2.0", 10**10)), warmup_iters=st.sampled_from((-1, 2, 99)),
    seed=st.sampled_from((-1, 2**64)),
    eval_interval=st.sampled_from((0, -5)), lora_rank=st.sampled_from((1, 0, -3)), lora_alpha=st.just(3.0),
    optimizer=st.sampled_from(("sgd", "")), device=st.sampled_from(("gpu", "cpu:0", "")),
    dtype=st.sampled_from(("float16", "int8")),
    init_from=st.sampled_from(("prev_run", "resume", "nothing")), prev_run_ckpt=st.just("none"), preset=st.just("desktop"),
    import_wte_npy=st.just("none.npy"), objective=st.sampled_from(("v_recon", "mlm")), train_only=st.just("nothing"),
    freeze=st.sampled_from(("h.9", ",")), dataset=st.just("no such"),
    max_epochs=st.sampled_from((0, -1)), max_train_samples=st.sampled_from((0, 1)), patience=st.sampled_from((0, -2)),
    grad_clip=st.sampled_from((-1, "nan")), beta1=st.sampled_from((1, -0.5, "nan")), n_layerz=st.just(1),
)  # fmt: skip


@tried(60)
@given(flags=valid(), name=st.sampled_from(sorted(BROKEN)), data=st.data())
def test_an_invalid_configuration_is_one_line_and_writes_nothing(train, assert_one_line_error, tmp_path, flags, name, data):
    out = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
    assert_one_line_error(train(**RUN | flags | {name: data.draw(BROKEN[name])}, out_dir=out), "--")
    assert not out.exists()
