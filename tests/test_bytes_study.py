"""The study of bytes: which rows it measures, in one process, and again where it was stopped."""

import json

import pytest

from surgery.bytes_study import MORE, SHARES, SYSTEMS, Args, plan, rows_of, shares_of

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")


def keys(**flags):
    return {system: [row.key for row in rows] for system, rows in plan(Args(**flags)).items()}


def test_the_main_rows_are_those_that_are_not_more():
    main, every = keys(), keys(rows="all")
    for system in SYSTEMS:
        names = {name for row in rows_of(system, shares_of(Args(), system)) for name in (row.key, row.name)}
        assert MORE[system] <= names and main[system][0] == "untouched"
        assert set(main[system]) < set(every[system]) and len(set(every[system])) == len(every[system])
        assert sum(key.startswith("bits") for key in every[system]) >= len(SHARES[system].split(","))


def test_flags_choose_rows():
    assert keys(system="table", rows="rank,untouched") == dict(table=["untouched", "rank 256", "rank 128"])
    assert "bits 0.6" in keys(shares="0.6")["cache"] and "error-aware 2 32" in keys(shares="0.6")["weights"]
    assert keys(rows="error-aware 3 32")["cache"] == []


def test_a_stopped_study_goes_on(clinic, run_main, tmp_path):
    """A row that cannot be measured is named at the end, and the others are there."""

    def run(*argv):
        sizes = ("--window", 32, "--eval_windows", 2, "--calib_tokens", 1024, "--out_dir", tmp_path / "out")
        texts = ("--calib_text", clinic / "calib.txt", "--eval_text", clinic / "eval.txt")
        return run_main("-m", "surgery.bytes_study", "--model", clinic / "llama", *texts, *sizes, *argv)

    assert run("--system", "table", "--rows", "untouched").status == 0
    result = run("--system", "table,weights", "--shares", "0.01,0.6", "--rows", "untouched,bits")
    assert result.status == 2 and "row bits 0.01 of table" in result.err and "--shares choose others" in result.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["system"], row["row"]) for row in rows] == [
        ("table", "untouched"), ("table", "bits 0.6"), ("weights", "untouched"), ("weights", "bits 0.6")
    ]  # fmt: skip
    assert rows[2]["kl"] == rows[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_mistakes_are_one_line(clinic, run_main, assert_one_line_error):
    for argv, *words in [
        (["--system", "tabel"], "--system tabel", "table, weights, cache"),
        (["--rows", "bit"], "--rows bit", "untouched"),
        (["--shares", "7"], "--shares 7", "0.25"),
    ]:
        assert_one_line_error(run_main("-m", "surgery.bytes_study", *argv), *words)
    texts = ("--calib_text", clinic / "calib.txt", "--eval_text", clinic / "eval.txt")
    result = run_main("-m", "surgery.bytes_study", "--model", clinic / "gpt2", "--window", 32, *texts)
    assert result.status == 2 and "separate q, k and v" in result.err.strip().splitlines()[-1]
