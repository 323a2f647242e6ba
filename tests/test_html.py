"""The page of a report: whole, alone, with every value, and, where there is a Chromium, in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from test_report import write_13

from common import plots
from common.plots import Figure, Panel, Point, apart, ticks
from reports import surgery
from reports.html import inline, of_lines, page
from reports.markdown import Samples, Table

VOID = {"meta", "br", "path", "rect"}


class Reader(HTMLParser):
    """Text and attributes of a page; an error where a tag is not closed, or another one is."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.cells, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.cells and {"td", "th"} & set(self.open):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory):
    """(The markdown, the page) of experiments 1-13, without matplotlib's figures."""
    import report

    root = tmp_path_factory.mktemp("thirteen")
    for seed, jitter in ((1, 0.0), (2, 0.1), (3, -0.1)):
        write_13(root / f"seed_{seed}", seed, jitter)
    (root / "seed_1" / "gpt_<script>alert(1)<").mkdir()
    for name in ("summary.json", "config.json", "metrics.jsonl"):
        shutil.copy(root / "seed_1" / "gpt_baseline" / name, root / "seed_1" / "gpt_<script>alert(1)<")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_figure", lambda path, figure: None)
        report.main(["--runs", str(root), "--html"])
    return (root / "report.md").read_text(), (root / "report.html").read_text()


def test_a_page_is_well_formed_and_needs_nothing_else(thirteen):
    reader = Reader(thirteen[1])
    for _, attributes in reader.tags:
        assert "src" not in attributes and attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import|https?:", thirteen[1].replace("http://www.w3.org/", ""))
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in reader.tags)
    targets = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in reader.tags if tag == "a"} <= targets
    assert sum(tag == "script" for tag, _ in reader.tags) == 1 and "gpt_<script>alert(1)<" in reader.cells


def test_a_page_has_the_cells_the_claims_and_the_points_of_the_report(thirteen):
    markdown, html = thirteen
    reader = Reader(html)
    cells = [cell.strip() for line in markdown.splitlines() if line.startswith("| ") for cell in line.split("|")[1:-1]]
    assert len(cells) > 500 and [c.replace("\xa0", "") for c in reader.cells] == cells
    verdicts = re.findall(r"\*\*(.+): (holds|does not hold|inconclusive)\*\*", markdown)
    badges = [words[2:] for words in reader.words if words[:2] in ("✓ ", "✗ ", "? ")]
    assert len(verdicts) > 8 and badges == [verdict for _, verdict in verdicts]
    titles = re.findall(r"<title>(.*?)</title>", html, flags=re.S)[1:]
    assert any(t.startswith("low-rank scratch (2-5)\nrank 8\n") and "5.1 (5 to 5.2, 3 seeds)" in t for t in titles)
    figures = re.findall(r"!\[(.*)\]\((\w+)\.png\)", markdown)
    assert [a["id"] for tag, a in reader.tags if tag == "figure"] == [name for _, name in figures] and len(figures) == 5
    assert "".join(figures[0][0]) in reader.words


def test_a_figure_says_its_answer(thirteen):
    titles = dict(reversed(pair) for pair in re.findall(r"!\[(.*)\]\((\w+)\.png\)", thirteen[0]))
    assert (
        titles["loss_by_rank"] == "Nats above the best dense model: 0.320 for the best of rank 2, 0.020 for the best of rank 8"
    )
    nearest = "PCA + full fine-tuning (B), k=8, 110 of 130 parameters, 0.020 nats over it"
    found = f"No smaller model is within 0.02 nats of baseline, more steps (D+); the nearest: {nearest}"
    assert titles["loss_against_parameters"] == found
    assert titles["validation_curves"].startswith("baseline, more steps (D+) ends lowest: 4.800 nats")


def test_the_page_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw_figure", lambda path, figure: None)
    part = dict(ranks=[4, 6], full=[8, 8], energies=[0.9, 0.8], errors=[0.1, 0.2], output_errors=[0.1, 0.2])
    base = dict(method="-", mode="-", targets="-", variance=None, rank=None, budget=None, parts={}, kl=0.1, top1=0.9)

    def record(ppl, **changes):
        text = {"a.txt": dict(ppl=ppl, nats_se=0.01)}
        return base | dict(ppl=ppl, texts=text, answer=f"so <{ppl}>", sampled="it goes") | changes

    def cut(ppl, method, share, targets="k"):
        k = dict(k=part | dict(ranks=[share, share]))
        return record(ppl, method=method, mode="separate", targets=targets, variance=0.9, parts=k)

    records = [record(30.0), cut(31.0, "fisher", 4), cut(30.3, "fisher", 6), cut(90.0, "pca", 4), cut(33.0, "pca", 6, "v")]
    settings = dict(model="toy", eval_windows=3, window=32, eval_text="a.txt", calib_text="b.txt", texts={"a.txt": "other"})
    config = dict(settings=settings, hardware="x", commit="c", command="python -m surgery")
    (tmp_path / "config.json").write_text(json.dumps(config))
    surgery.write_report(tmp_path, records, [], html=True)
    reader, titles = Reader((tmp_path / "report.html").read_text()), (tmp_path / "report.md").read_text()
    assert (
        "the components kept within 5% of the perplexity: k separate 50%; none for v separate](attention_by_rank.png)" in titles
    )
    words = "".join(reader.words)
    assert "k separate: 50% kept costs +3.3%" in words and "so <31.0>" in words
    assert "fisher\n90.0%, 50.0% of the components: +3.3%, KL 0.1000\n" in words
    assert any("behind" in attributes.get("class", "") for _, attributes in reader.tags)
    assert [a["id"] for tag, a in reader.tags if tag == "figure"] == [
        "attention_by_rank",
        "attention_by_variance",
        "ranks_by_layer",
    ]


def test_a_page_is_for_a_sweep_only(run_main, assert_one_line_error, tmp_path):
    result = run_main("-m", "surgery", "--bytes", "0.5", "--out", tmp_path / "out", "--html")
    assert_one_line_error(result, "--html", "--bytes")


def test_text_is_escaped_and_marked():
    assert inline("`a*b*<` **b** *c d* 2 * 3 * 4 x_y") == "<code>a*b*&lt;</code> <b>b</b> <em>c d</em> 2 * 3 * 4 x_y"
    assert of_lines(["# A & B", "one", "two", "", "- x", "  y", "- z"]) == (
        '<h1 id="a-b">A &amp; B</h1><p>one two</p><ul><li>x y</li><li>z</li></ul>'
    )


@pytest.mark.parametrize("low, high, scale", [(0, 1, ""), (4.7, 5.1, ""), (-3, 8e6, ""), (3e-4, 40, "log"), (2e6, 3e6, "log")])
def test_ticks_are_few_and_inside(low, high, scale):
    found = ticks(low, high, scale)
    assert 2 <= len(found) <= 8 and low <= min(found) and max(found) <= high * (1 + 1e-9)


def test_labels_keep_their_order_and_do_not_cover_each_other():
    assert apart([5.0, 1.0], [2, 2], 0, 10) == [5.0, 1.0]
    for wished in ([3.0, 3.0, 3.1, 9.9], [0.0] * 4, [10.0, 9.0, 9.5, 2.0]):
        places = apart(wished, [1, 2, 1, 2], 0, 10)
        by_place = sorted(range(4), key=lambda i: places[i])
        gaps = [(places[b] - places[a]) / (([1, 2, 1, 2][a] + [1, 2, 1, 2][b]) / 2) for a, b in zip(by_place, by_place[1:])]
        assert min(gaps) > 1 - 1e-9 and 0 <= min(places) and max(places) <= 10
        assert [wished[i] for i in by_place] == sorted(wished)


# -- a browser ----------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Runs in the page after its own script, and leaves what it saw in the title.
ROBOT = """
const seen = {}, first = (what) => document.querySelector(what), all = (what) => [...document.querySelectorAll(what)];
const column = (i) => all("tbody tr").map((row) => row.cells[i].textContent);
seen.width = innerWidth; seen.wide = document.documentElement.scrollWidth - innerWidth;
seen.dark = getComputedStyle(document.body).backgroundColor;
all("thead button")[1].click(); seen.rising = column(1);
all("thead button")[1].click(); seen.falling = column(1);
const shown = () => all(".panel .dot").filter((dot) => getComputedStyle(dot).display !== "none").length;
seen.before = shown(); all(".series button")[1].click(); seen.after = shown();
all(".series button")[1].click(); seen.again = shown();
const dot = all(".dot")[0].getBoundingClientRect();
const at = {clientX: dot.x + dot.width / 2 + 3, clientY: dot.y + dot.height / 2, bubbles: true};
all(".panel svg")[0].dispatchEvent(new PointerEvent("pointermove", at));
seen.tip = first("#tip").textContent; seen.tipShown = getComputedStyle(first("#tip")).display;
seen.titles = all(".dot title").length;
document.title = JSON.stringify(seen);
"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
def test_a_page_in_a_browser(tmp_path):
    lines = {"ours": [Point(2, [0.5, 0.7], "rank 2"), Point(4, [0.25])], "theirs": [Point(2, [0.9]), Point(4, [0.3])]}
    figure = Figure("toy", "Ours is lower", "Loss", [Panel(lines, "rank", "loss", xscale="ranks")], ["ours", "theirs"])
    rows = [["a", "1,000 ± 3", "x" * 90], ["b", "-", "y"], ["c", "90.5%", "z"], ["d", "-2", "w"]]
    text = page(["# Toy", figure, Table(["model", "loss", "long"], rows), Samples("So", [("a", {"": "it goes"})])])
    (tmp_path / "toy.html").write_text(text.replace("</script></body>", f"</script><script>{ROBOT}</script></body>"))
    phone = tmp_path / "phone.html"  # a window is 500 wide at least
    phone.write_text('<iframe src="toy.html" width="390" height="844"></iframe><script>onload = () => '
                     "{document.title = frames[0].document.title}</script>")  # fmt: skip
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --allow-file-access-from-files --blink-settings=preferredColorScheme=0"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", phone.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    seen = json.loads(re.search(r"<title>(\{.*?\})</title>", dom, flags=re.S).group(1).replace("&amp;", "&"))
    assert seen["width"] == 390 and seen["wide"] <= 0 and seen["dark"] == "rgb(20, 23, 26)"
    assert seen["rising"] == ["-2", "90.5%", "1,000 ± 3", "-"] and seen["falling"] == ["1,000 ± 3", "90.5%", "-2", "-"]
    assert (seen["before"], seen["after"], seen["again"], seen["titles"]) == (4, 2, 4, 0)
    assert seen["tip"] == "ours\nrank 2\nloss: 0.6 (0.5 to 0.7, 2 seeds)\nrank: 2" and seen["tipShown"] == "block"
