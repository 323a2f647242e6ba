import json

import numpy as np
import pytest

from report import comparison, paired_p, read_rows, table


def write_run(folder, loss, k=None, seed=1337, tokens=1000, **changes):
    """A run folder as train.py leaves it, with a loss of our choosing."""
    folder.mkdir(parents=True)
    counts = dict(token_table=100 if k is None else 10 * k, positions=4, attention=8, mlp=16, norms=2)
    point = dict(iter=10, tokens=tokens, val_loss=loss, val_ppl=np.exp(loss), ln_f_cosine=0.2, ln_f_cosine_full=0.3)
    summary = dict(
        run=folder.name, seed=seed, dataset="toy", n_embd=16, n_embd_wte=k, starts_from=None, val_unigram_entropy=6.5,
        parameters=counts | dict(total=sum(counts.values())), parameters_trained=sum(counts.values()), eval_tokens=64,
        flops_per_token=dict(head=2e6), best=point, final=point, tokens=tokens, tokens_per_step=10, seconds=12.0,
        tokens_per_second=83.0, peak_memory_bytes=2**29,
    )  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    (folder / "config.json").write_text(json.dumps(dict(hardware="x", versions={}, commit="c", command="python train.py")))
    lines = [dict(iter=0, tokens=0, val_loss=8.0), dict(iter=5, train_loss=7.0), dict(iter=10, tokens=tokens, val_loss=loss)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


NAMES = [
    ("gpt_baseline", None),
    ("gpt_pca_k4", 4),
    ("gpt_random_lowrank_k4", 4),
    ("gpt_pca_finetune_k4", 4),
    ("gpt_baseline_more", None),
]


def test_one_seed_is_inconclusive_and_the_words_follow_the_numbers(tmp_path, run_main):
    for (name, k), loss in zip(NAMES, (5.0, 4.9, 5.02, 4.8, 4.7), strict=True):
        write_run(tmp_path / name, loss, k)
    result = run_main("report.py", "--runs", tmp_path)
    assert result.status == 0 and result.last["runs"] == 5
    for text in (result.out, (tmp_path / "report.md").read_text()):
        assert "A vs C (k=4): the PCA start is 0.120 nats better; one seed, so inconclusive." in text
        assert "A vs D (k=4): rank 4 of 16 is 0.100 nats better; one seed, so inconclusive." in text
        assert "B vs D+ (k=4): compressing and fine-tuning is 0.100 nats worse" in text
        assert "6.5000 nats. D lies 1.500 nats under it." in text
        assert "2.50x" in text  # 100 / 40
    for figure in ("validation_curves.png", "loss_against_parameters.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG") and figure in (tmp_path / "report.md").read_text()


def test_seeds_make_one_row_with_spread_and_a_paired_test(tmp_path, run_main):
    for seed, base in ((1, 5.0), (2, 5.2), (3, 4.8)):  # the seeds differ by more than the models do
        for (name, k), better in zip(NAMES, (0, 0.10, 0.0, 0.2, 0.3), strict=True):
            jitter = 0.001 * seed if k else 0
            write_run(tmp_path / f"seed_{seed}" / name, base - better + jitter, k, seed)
    out = run_main("report.py", "--runs", tmp_path).out
    assert "5.0000 ± 0.2000" in out
    assert "A vs D (k=4): rank 4 of 16 is 0.098 nats better (spread 0.001 over 3 seeds, paired t-test p < 0.0001)" in out
    assert "A vs C (k=4): the PCA start is 0.100 nats better" in out


def test_a_comparison_says_who_saw_more_text(tmp_path):
    write_run(tmp_path / "gpt_baseline", 5.0)
    write_run(tmp_path / "gpt_pca_k4", 4.9, 4, starts_from=dict(part="token table", ckpt="x", tokens=1000))
    d, a = read_rows(tmp_path)[0]
    said = "A vs D (k=4): it is 0.100 nats better, with 1,000 training tokens more, counting what each starts from; one seed"
    assert comparison(a, d, "it").startswith(said)


def test_the_whole_table_as_factors_is_the_control_of_a(tmp_path, run_main):
    for name, k, loss in (("gpt_baseline", None, 5.0), ("gpt_pca_k4", 4, 4.9), ("gpt_pca_k16", 16, 4.85)):
        write_run(tmp_path / name, loss, k)
    out = run_main("report.py", "--runs", tmp_path).out
    assert "A vs A full (k=4): rank 4 of 16 is 0.050 nats worse; one seed" in out and out.count("A vs D") == 1


def test_runs_that_cannot_be_compared_say_so(tmp_path):
    write_run(tmp_path / "gpt_baseline", 5.0)
    write_run(tmp_path / "gpt_pca_k4", 4.9, 4, tokens_per_step=40)
    write_run(tmp_path / "gpt_random_lowrank_k4", 4.9, 4, seed=7)
    d, a, c = read_rows(tmp_path)[0]
    assert comparison(a, d, "x") == "A vs D (k=4): not comparable, tokens per step is 40 for one and 10 for the other."
    write_run(tmp_path / "gpt_pca_k8", 4.9, 8)
    summary = json.loads((tmp_path / "gpt_pca_k8" / "summary.json").read_text())
    summary["parameters"]["mlp"] = 32  # another depth
    (tmp_path / "gpt_pca_k8" / "summary.json").write_text(json.dumps(summary))
    assert "not comparable, mlp is 32 for one and 16" in comparison(read_rows(tmp_path)[0][2], d, "x")
    assert "no seed in common" in comparison(c, d, "x")


def test_unfinished_runs_are_named_and_left_out(tmp_path, run_main):
    write_run(tmp_path / "gpt_baseline", 5.0)
    write_run(tmp_path / "gpt_pca_k4", 4.9, 4)
    (tmp_path / "gpt_pca_k4" / "summary.json").unlink()
    result = run_main("report.py", "--runs", tmp_path)
    assert result.last["unfinished"] == 1 and "gpt_pca_k4" in result.out and "A vs" not in result.out


def test_mistakes(tmp_path, run_main, assert_one_line_error):
    assert_one_line_error(run_main("report.py", "--runs", tmp_path / "none"), "--runs", "run_all_experiments.sh")
    write_run(tmp_path / "seed_1" / "gpt_baseline", 5.0)
    write_run(tmp_path / "seed_2" / "gpt_baseline", 5.1)
    assert_one_line_error(run_main("report.py", "--runs", tmp_path), "one seed")
    (tmp_path / "seed_2" / "gpt_baseline" / "summary.json").write_text("{}")
    assert_one_line_error(run_main("report.py", "--runs", tmp_path), "summary.json")
    (tmp_path / "seed_2" / "gpt_baseline" / "summary.json").unlink()
    (tmp_path / "pca_factorized").mkdir()
    (tmp_path / "pca_factorized" / "factors_pca_k4.json").write_text("{}")
    assert_one_line_error(run_main("report.py", "--runs", tmp_path), "factors_pca_k4.json")
    (tmp_path / "pca_factorized" / "factors_pca_k4.json").unlink()
    (tmp_path / "seed_1" / "gpt_baseline" / "metrics.jsonl").unlink()
    assert_one_line_error(run_main("report.py", "--runs", tmp_path), "metrics.jsonl")


@pytest.mark.parametrize("t, n, p", [(4.302653, 3, 0.05), (12.7062, 2, 0.05), (2.776445, 5, 0.05), (9.924843, 3, 0.01)])
def test_paired_p_against_the_printed_tables_of_students_t(t, n, p):
    shape = np.arange(n) - (n - 1) / 2  # mean 0
    s = shape.std(ddof=1)
    assert paired_p(list(shape + t * s / n**0.5)) == pytest.approx(p, rel=1e-3)


def test_table_is_aligned():
    lines = table(["a", "b"], [["x", "1"], ["longer", "1,000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1] == "|--------|------:|"
