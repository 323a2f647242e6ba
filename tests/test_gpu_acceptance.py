"""scripts/gpu_acceptance.sh and its report, at toy size on a CPU: they run, they go on, and they say what is missing."""

import json
import shutil

import pytest
from shell import run, succeed

SCRIPT = "bash scripts/gpu_acceptance.sh"
PARTS = ["arithmetic", "dense", "preset", "cache", "decoding", "cards"]  # factorized and lora run as dense does


@pytest.fixture(scope="module")
def accepted(copy, tmp_path_factory):
    """The parts, of a text file -> the folder, and what the script printed."""
    folder = tmp_path_factory.mktemp("acceptance")
    (folder / "books.txt").write_text("Some words of a book.\n" * 400)
    env = dict(TOY="1", OUT=str(folder / "out"), DATA=str(folder / "books.txt"))
    return folder / "out", succeed(SCRIPT, copy, **env, PARTS=" ".join(PARTS))


def test_the_parts_run_and_the_report_has_their_numbers(accepted):
    out, done = accepted
    assert [json.loads(line)["part"] for line in (out / "results.jsonl").read_text().splitlines()] == PARTS
    assert list(json.loads(done.stdout.splitlines()[-1])["seconds"]) == PARTS
    report, numbers = (out / "report.md").read_text(), json.loads((out / "report.json").read_text())
    assert report.strip() in done.stdout and "(loss_curve.png)" in report and (out / "loss_curve.png").is_file()
    assert set(numbers) == {"hardware", "seconds", "arithmetic", "steps", "preset", "cache", "decoding"}
    (half,) = numbers["arithmetic"]
    assert half["setting"] == "bfloat16 not compiled" and 0 < half["apart"] < 0.01
    assert numbers["preset"]["steps"] == 4 and numbers["preset"]["done"]
    assert numbers["preset"]["compiled"] is False and "GB peak memory, not compiled." in report
    assert numbers["steps"][0]["fits_24gb"] and numbers["steps"][0]["model"] == "dense"
    assert all(each["as_on_the_cpu"] == 1 for each in numbers["cache"].values())


def test_the_report_compares_cards_and_stands_beside_nanogpt(accepted, run_main, tmp_path):
    out = shutil.copytree(accepted[0], tmp_path / "out")
    for name in ("one", "all"):
        shutil.copytree(out / "small" / "cpu_float32", out / "cards" / name)
    shutil.copytree(out / "gpt2", out / "cards" / "gpt2")
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    rows = next(line for line in lines if line["part"] == "dense")["result"]["rows"]
    theirs = rows[0] | dict(model="nanoGPT", best=True, peak_memory_bytes=25e9)
    theirs["tokens_per_second"] = {name: 2 * speed for name, speed in rows[0]["tokens_per_second"].items()}
    rows.append(theirs)
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run_main("-m", "reports.gpu", "--runs", out)
    assert result.status == 0, result.err
    numbers = json.loads((out / "report.json").read_text())
    assert numbers["cards"]["apart"] == 0 and numbers["cards"]["gpt2"]["steps"] == 4
    assert [row["fits_24gb"] for row in numbers["steps"]] == [True, False]
    assert "0.50" in next(line for line in result.out.splitlines() if line.startswith("| dense ") and "bfloat16" in line)


def test_finished_parts_do_not_run_again_and_mistakes_take_a_line(accepted, copy, tmp_path, run_main, assert_one_line_error):
    for env, word in (
        (dict(TOY=""), "TOY=1"),
        (dict(TOY="1", DATA=str(tmp_path / "none")), "meta.pkl"),
        (dict(TOY="1", OUT=str(accepted[0]), PARTS="dense lora", LIMIT="0"), "not done: lora"),
    ):
        done = run(SCRIPT, copy, **dict(OUT=str(tmp_path / "out")) | env)
        assert done.returncode in (1, 2) and word in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert "== dense is done; delete its line" in done.stdout
    assert_one_line_error(run_main("-m", "reports.gpu", "--runs", tmp_path), "--runs", "gpu_acceptance.sh")
