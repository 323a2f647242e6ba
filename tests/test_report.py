import json

import numpy as np
import pytest

from reports.claims import SEEDS_CLAIMS, judge, our_claims, overall
from reports.compare import Difference, comparison, paired_p
from reports.markdown import table
from reports.rows import read_rows, total_seconds


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
    text = (tmp_path / "report.md").read_text()
    assert "A vs C (k=4): the PCA start is 0.120 nats better; one seed, so inconclusive." in text
    assert "A vs D (k=4): rank 4 of 16 is 0.100 nats better; one seed, so inconclusive." in text
    assert "B vs D+ (k=4): compressing and fine-tuning is 0.100 nats worse" in text
    assert "6.5000 nats. D is 1.500 nats under it." in text
    assert "2.50x" in text and "2.50x" in result.out  # 100 / 40
    write_run(tmp_path / "worse" / "gpt_baseline", 7.0)
    assert run_main("report.py", "--runs", tmp_path / "worse").status == 0
    assert "D is 0.500 nats over it." in (tmp_path / "worse" / "report.md").read_text()
    for figure in ("validation_curves", "loss_against_parameters", "loss_against_seconds"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{figure}.svg").read_text() and f"{figure}.png" in (tmp_path / "report.md").read_text()


def test_seeds_make_one_row_with_spread_and_a_paired_test(tmp_path, run_main):
    for seed, base in ((1, 5.0), (2, 5.2), (3, 4.8)):  # the seeds differ by more than the models do
        for (name, k), better in zip(NAMES, (0, 0.10, 0.0, 0.2, 0.3), strict=True):
            jitter = 0.001 * seed if k else 0
            write_run(tmp_path / f"seed_{seed}" / name, base - better + jitter, k, seed)
    out = run_main("report.py", "--runs", tmp_path).out
    text = (tmp_path / "report.md").read_text()
    assert "5.0000 ± 0.2000" in text
    assert "A vs D (k=4): rank 4 of 16 is 0.098 nats better (spread 0.001 over 3 seeds, paired t-test p < 0.0001)" in text
    assert "A vs C (k=4): the PCA start is 0.100 nats better" in text
    words = " ".join(out.split())
    assert "0.098 nats under the dense baseline (D), p < 0.0001 over 3 seeds, spread 0.001" in words
    assert "several seeds" not in words
    assert "- A PCA start beats a random start, compared as in the original scripts: holds" in out


def test_the_terminal_shows_a_table_four_answers_and_how_to_get_three_seeds(tmp_path, run_main):
    for (name, k), loss in zip(NAMES, (5.0, 4.9, 5.02, 4.8, 4.7), strict=True):
        write_run(
            tmp_path / name, loss, k, starts_from=dict(part="all weights", ckpt="x", tokens=1000) if "more" in name else None
        )
    *lines, last = run_main("report.py", "--runs", tmp_path).out.splitlines()
    assert json.loads(last)["runs"] == 5 and all(len(line) <= 100 for line in lines if str(tmp_path) not in line)
    assert len(lines) < 30 and "inconclusive" not in " ".join(lines)
    answers = " ".join(lines).split("- ")
    for question, found in (
        ("Does a PCA start help?", "0.120 nats under the random start (C)"),
        ("What does the smaller table cost?", "0.100 nats under the dense baseline (D)"),
        ("Is fine-tuning better than starting from scratch?", "0.100 nats under the PCA start (A, rank 4)"),
        ("Does the compressed model reach the baseline?", "with equal tokens, 0.100 nats over the baseline with the same"),
    ):
        assert any(question in " ".join(a.split()) and found in " ".join(a.split()) for a in answers), question
    assert 'A test needs several seeds. For three: SEEDS="1 2 3" bash scripts/run_all_experiments.sh 4' in lines
    assert f"{tmp_path / 'report.md'}" in lines[-1]


def test_a_comparison_says_who_saw_more_text(tmp_path):
    write_run(tmp_path / "gpt_baseline", 5.0)
    write_run(tmp_path / "gpt_pca_k4", 4.9, 4, starts_from=dict(part="token table", ckpt="x", tokens=1000))
    d, a = read_rows(tmp_path)[0]
    expected = "A vs D (k=4): it is 0.100 nats better, with 1,000 training tokens more, including those of the starting models"
    assert comparison(a, d, "it").startswith(expected)


def test_the_whole_table_as_factors_is_the_control_of_a(tmp_path, run_main):
    for name, k, loss in (("gpt_baseline", None, 5.0), ("gpt_pca_k4", 4, 4.9), ("gpt_pca_k16", 16, 4.85)):
        write_run(tmp_path / name, loss, k)
    run_main("report.py", "--runs", tmp_path)
    text = (tmp_path / "report.md").read_text().split("## Comparisons")[1]
    assert "A vs A full (k=4): rank 4 of 16 is 0.050 nats worse; one seed" in text and text.count("A vs D") == 1


def test_runs_that_cannot_be_compared_say_so(tmp_path):
    write_run(tmp_path / "gpt_baseline", 5.0)
    write_run(tmp_path / "gpt_pca_k4", 4.9, 4, tokens_per_step=40)
    write_run(tmp_path / "gpt_random_lowrank_k4", 4.9, 4, seed=7)
    d, a, c = read_rows(tmp_path)[0]
    assert comparison(a, d, "x") == "A vs D (k=4): not comparable: tokens per step is 40 for one and 10 for the other."
    write_run(tmp_path / "gpt_pca_k8", 4.9, 8)
    summary = json.loads((tmp_path / "gpt_pca_k8" / "summary.json").read_text())
    summary["parameters"]["mlp"] = 32  # another depth
    (tmp_path / "gpt_pca_k8" / "summary.json").write_text(json.dumps(summary))
    assert "not comparable: mlp is 32 for one and 16" in comparison(read_rows(tmp_path)[0][2], d, "x")
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
    assert_one_line_error(run_main("report.py", "--runs", tmp_path), "the same seed")
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


# -- experiments 1-13 -------------------------------------------------------------------------------------------------

BASE = dict(part="all weights", ckpt="model_weights/gpt_baseline", tokens=1000)


def write_13(root, seed, jitter=0.0):
    """The thirteen rows and their controls at ranks 2 and 8, with losses of our choosing."""
    write_run(root / "gpt_baseline", 5.0 + jitter, seed=seed, seconds=100.0)
    write_run(root / "gpt_baseline_more", 4.8 + jitter, seed=seed, starts_from=BASE, tokens=500)
    write_run(root / "gpt_baseline_lora", 4.9 + jitter, seed=seed, starts_from=BASE, tokens=500)
    for k, worse in ((2, 0.3), (8, 0.0)):
        noise = jitter * 1.001 + worse
        write_run(root / f"gpt_lowrank_scratch_k{k}", 5.1 + noise, k, seed)
        more = dict(part="all weights", ckpt=f"model_weights/gpt_lowrank_scratch_k{k}/ckpt.pt", tokens=1000)
        write_run(root / f"gpt_lowrank_scratch_more_k{k}", 5.05 + noise, k, seed, starts_from=more, tokens=500)
        for method, loss in (("pca", 6.0), ("freq", 5.8), ("whiten", 5.9), ("joint", 5.5), ("fisher", 5.4)):
            write_run(root / f"gpt_{method}_nofinetune_k{k}", loss + noise, k, seed, starts_from=BASE, tokens=0, seconds=0.0)
        write_run(root / f"gpt_pca_lora_k{k}", 4.95 + noise, k, seed, starts_from=BASE, tokens=500)
        write_run(root / f"gpt_fisher_lora_k{k}", 4.85 + noise, k, seed, starts_from=BASE, tokens=500)
        write_run(root / f"gpt_pca_finetune_k{k}", 4.82 + noise, k, seed, starts_from=BASE, tokens=500)


def test_thirteen_rows_by_rank_and_what_holds(tmp_path, run_main):
    for seed, jitter in ((1, 0.0), (2, 0.1), (3, -0.1)):
        write_13(tmp_path / f"seed_{seed}", seed, jitter)
    result = run_main("report.py", "--runs", tmp_path)
    assert result.status == 0, result.err
    report = (tmp_path / "report.md").read_text()
    lines = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in report.splitlines() if "|" in line
    }
    assert lines["val loss"] == ["dense", "k=2", "k=8"]
    assert lines["low-rank scratch (2-5)"] == ["-", "5.400 ± 0.100", "5.100 ± 0.100"]
    assert lines["baseline"] == ["5.000 ± 0.100", "-", "-"]
    for expected in (
        "**Fine-tuning reaches the baseline: does not hold**",  # at rank 2
        "**A PCA start beats a random start, compared as in the original scripts: holds**",
        "**joint is below whiten below freq below svd, without training: does not hold**",
        "**fisher + LoRA is below the original PCA + LoRA: holds**",
    ):
        assert expected in report
    assert "| 10-13 vs D (k=8) |    -0.0500 |" in report
    for figure in ("loss_by_rank", "loss_against_parameters", "loss_against_seconds", "ln_f_cosine", "validation_curves"):
        for kind in ("png", "svg"):
            assert (tmp_path / f"{figure}.{kind}").stat().st_size > 1000


def test_claims_are_judged_by_the_paired_test(tmp_path):
    for seed, jitter in ((1, 0.0), (2, 0.1), (3, -0.1)):
        write_13(tmp_path / f"seed_{seed}", seed, jitter)
    rows = read_rows(tmp_path)[0]
    judged = {claim.text: (verdict, found) for claim, verdict, found in judge([*SEEDS_CLAIMS, *our_claims(rows)], rows)}
    verdict, found = judged["Fine-tuning is cheaper than scratch, counting the baseline's tokens"]
    assert verdict == "holds" and [d.more_tokens for d in found] == [[0, 0, 0]] * 2
    verdict, found = judged["k = 128 is enough"]  # at the rank nearest to 16 / 6
    assert verdict == "does not hold" and {d.first.k for d in found} == {2}
    order = judged["joint is below whiten below freq below svd, without training"][1]
    assert [(d.name, d.verdict()) for d in order[::2]] == [
        ("joint vs whiten (k=2)", "holds"), ("whiten vs freq (k=2)", "does not hold"), ("freq vs 6-9 (k=2)", "holds"),
    ]  # fmt: skip
    assert overall([]) == overall(["holds", "inconclusive"]) == "inconclusive"
    assert overall(["holds", "does not hold", "inconclusive"]) == "does not hold"
    one_seed = read_rows(tmp_path / "seed_1")[0]
    assert {verdict for _, verdict, _ in judge(SEEDS_CLAIMS, one_seed)} == {"inconclusive"}


def test_what_a_model_stores_trains_and_takes(tmp_path):
    write_13(tmp_path, 1)
    counts = dict(token_table=40, positions=4, attention=8, mlp=16, norms=2, adapters=9, total=79)
    summary = json.loads((tmp_path / "gpt_pca_lora_k2" / "summary.json").read_text())
    summary |= dict(parameters=counts, parameters_trained=9)
    (tmp_path / "gpt_pca_lora_k2" / "summary.json").write_text(json.dumps(summary))
    rows = read_rows(tmp_path)[0]
    by_name = {row.name: row for row in rows}
    lora, cut, more = (by_name[f"gpt_{n}_k2"] for n in ("pca_lora", "pca_nofinetune", "lowrank_scratch_more"))
    assert (lora.stored, lora.trained, cut.trained) == (70, 9, 0)
    assert [total_seconds(row, rows) for row in (lora, cut, more, by_name["gpt_baseline"])] == [
        [112.0],
        [100.0],
        [24.0],
        [100.0],
    ]
    assert by_name["gpt_fisher_lora_k2"].label == "fisher+LoRA" and by_name["gpt_pca_lora_k2"].label == "10-13"


def test_a_margin_is_for_claims_of_as_good_as():
    def verdict(values, margin):
        return Difference(None, None, values, []).verdict(margin)

    assert verdict([0.0010, 0.0011, 0.0009], 0.0) == "does not hold"
    assert verdict([0.0010, 0.0011, 0.0009], 0.02) == "holds"
    assert verdict([0.050, 0.051, 0.049], 0.02) == "does not hold"
    assert verdict([0.0, 0.04, 0.02], 0.02) == verdict([-1.0], 0.02) == "inconclusive"


def test_a_rank_that_cannot_be_compared_is_told_and_leaves_the_claim_open(tmp_path):
    for seed, jitter in ((1, 0.0), (2, 0.1), (3, -0.1)):
        write_13(tmp_path / f"seed_{seed}", seed, jitter)

    def change(name, **changes):
        path = tmp_path / "seed_2" / name / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        judged = judge([*SEEDS_CLAIMS, *our_claims(read_rows(tmp_path)[0])], read_rows(tmp_path)[0])
        return {claim.text: verdict for claim, verdict, _ in judged}

    fair = "fisher + LoRA is below low-rank scratch, equal tokens counted from the same start"
    assert change("gpt_baseline")[fair] == "holds"
    assert change("gpt_lowrank_scratch_more_k8", tokens=600)[fair] == "inconclusive"
    claim = "A PCA start beats a random start, compared as in the original scripts"
    assert change("gpt_pca_lora_k8", eval_tokens=999)[claim] == "inconclusive"


def test_claims_that_no_runs_speak_of_are_inconclusive(tmp_path, run_main):
    write_run(tmp_path / "gpt_baseline", 5.0)
    run_main("report.py", "--runs", tmp_path)
    assert "**k = 128 is enough: inconclusive** (not run)" in (tmp_path / "report.md").read_text()
