"""pca_factorize_wte.py on the main job's baseline."""

import pytest
import torch

from common.dataset import write_dataset
from util_factorization import METHODS, decompose_table
from util_factorization.spectrum import root


def test_pca_factorize_mistakes(copy, main_job, run_main, assert_one_line_error, tmp_path, tmp_path_factory):
    ckpt = copy / "model_weights" / "gpt_baseline"
    program = "util_factorization/pca_factorize_wte.py"
    to = ("--out_wte_npy", tmp_path / "wte_k{k}.npy", "--out_scale_npz", tmp_path / "scale_k{k}.npz")
    calibrated = ["--ckpt_path", ckpt, "--rank_k", "4", "--method", "joint", "--dataset", copy / "data" / "sotu", *to]
    narrow = tmp_path_factory.mktemp("narrow")
    write_dataset(narrow, [1] * 99, [1] * 99, dict(vocab_size=50))
    short = tmp_path_factory.mktemp("short")
    write_dataset(short, [1] * 9, [1] * 99, dict(vocab_size=97))
    for words, argv in [
        (["Checkpoint not found"], ["--ckpt_path", tmp_path / "none.pt", "--rank_k", "4", *to]),
        (["--rank_k", "between 1 and 160"], ["--ckpt_path", ckpt, "--rank_k", "4,161", *to]),
        (["--rank_k", "above 0 and at most 1"], ["--ckpt_path", ckpt, "--rank_k", "1.5", *to]),
        (["--rank_k", "'x'"], ["--ckpt_path", ckpt, "--rank_k", "x", *to]),
        (["--out_wte_npy", "{k}"], ["--ckpt_path", ckpt, "--rank_k", "4,8", "--out_wte_npy", tmp_path / "w.npy", *to[2:]]),
        (["--out_wte_npy", "both or none"], ["--ckpt_path", ckpt, "--rank_k", "4", *to[:2]]),
        (["{method}"], ["--ckpt_path", ckpt, "--rank_k", "4", "--out_wte_npy", tmp_path / "w_{x}.npy", *to[2:]]),
        (["two names"], ["--ckpt_path", ckpt, "--rank_k", "4", "--out_wte_npy", to[3], "--out_scale_npz", to[3]]),
        (["--dataset gone"], ["--ckpt_path", ckpt, "--rank_k", "4", "--method", "freq", "--dataset", "gone", *to]),
        (["--method", "svdd"], ["--ckpt_path", ckpt, "--method", "svdd", *to]),
        (["--method svd", "--calib_dataset"], ["--ckpt_path", ckpt, "--rank_k", "4", "--calib_tokens", "64", *to]),
        (["--joint_lambda", "--method joint"], ["--ckpt_path", ckpt, "--rank_k", "4", "--joint_lambda", "1", *to]),
        (["--calib_tokens 99999", "has 4992"], [*calibrated, "--calib_tokens", "99999"]),
        (["--calib_tokens 0"], [*calibrated, "--calib_tokens", "0"]),
        (["--calib_dataset gone"], [*calibrated, "--calib_dataset", "gone"]),
        (["--calib_dataset", "50 ids", "97"], [*calibrated, "--calib_dataset", narrow]),
        (["--joint_lambda -1"], [*calibrated, "--joint_lambda", "-1"]),
        (["--joint_lambda inf"], [*calibrated, "--joint_lambda", "inf"]),
        (["--calib_tokens", "160 directions"], [*calibrated, "--calib_tokens", "16"]),
        (["--calib_dataset", "0 tokens"], [*calibrated, "--calib_dataset", short]),
        (["--device mps"], [*calibrated, "--device", "mps"]),
        (["cannot be written"], [*calibrated[:-4], "--out_wte_npy", ckpt / "ckpt.pt" / "w.npy", *to[2:]]),
        (["factorized table already"], ["--ckpt_path", copy / "model_weights" / "gpt_pca_k128", "--rank_k", "4", *to]),
    ]:
        assert_one_line_error(run_main(program, *argv), *words)
    assert not list(tmp_path.iterdir())


def test_pca_factorize_needs_the_token_files_for_freq_only(copy, main_job, run_main, tmp_path, assert_one_line_error):
    saved = torch.load(copy / "model_weights" / "gpt_baseline" / "ckpt.pt", weights_only=True)
    saved["args"]["dataset"] = "gone"
    torch.save(saved, tmp_path / "ckpt.pt")
    to = ("--out_wte_npy", tmp_path / "wte_k{k}.npy", "--out_scale_npz", tmp_path / "scale_k{k}.npz")
    argv = ("util_factorization/pca_factorize_wte.py", "--ckpt_path", tmp_path / "ckpt.pt", "--rank_k", 8, *to)
    assert_one_line_error(run_main(*argv, "--method", "freq"), "--dataset gone")
    result = run_main(*argv)
    assert result.status == 0 and result.last["ranks"][0]["relative_error_per_token"] is None


def test_pca_factorize_by_share_of_energy(copy, main_job, run_main, tmp_path):
    to = ("--out_wte_npy", tmp_path / "wte_{method}_k{k}.npy", "--out_scale_npz", tmp_path / "scale_mats_{method}_k{k}.npz")
    result = run_main(
        "util_factorization/pca_factorize_wte.py", "--ckpt_path", copy / "model_weights" / "gpt_baseline",
        "--dataset", copy / "data" / "sotu", "--rank_k", "8,0.9", "--method", "freq", *to,
    )  # fmt: skip
    by_rank, by_share = result.last["ranks"]
    assert by_rank["k"] == 8 and by_share["energy"] >= 0.9
    k = by_share["k"]
    for name in (f"wte_freq_k{k}.npy", f"scale_mats_freq_k{k}.npz", f"factors_freq_k{k}.json", "scree_freq.png"):
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize("needs", [("lookup",), ("counts", "lookup"), ("head",), ("head", "lookup")])
def test_a_new_method_gets_what_it_says_it_needs(baseline, run_main, tmp_path, monkeypatch, needs):
    """The README's recipe: a line in METHODS, and its cost in blocks_of()."""

    def blocks_of(method, table, mean, p, head, lookup, joint_lambda, like):
        given = dict(head=head, lookup=lookup)
        return [(None, root(sum(given[name] for name in needs if name != "counts").to(like)))]

    monkeypatch.setitem(METHODS, "new", needs)
    monkeypatch.setattr(decompose_table, "blocks_of", blocks_of)
    to = ("--out_wte_npy", tmp_path / "wte_{method}_k{k}.npy", "--out_scale_npz", tmp_path / "scale_mats_{method}_k{k}.npz")
    result = run_main("util_factorization/pca_factorize_wte.py", "--ckpt_path", baseline, "--rank_k", 8, "--method", "new", *to)
    assert result.status == 0 and result.last["ranks"][0]["k"] == 8, result.err
