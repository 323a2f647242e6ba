"""Every command of the README, at toy size; the Korean README beside it."""

import json
import re
import shutil

import pytest
from conftest import REPO
from shell import TOY, TOY_EPOCHS, succeed

from common.tokenizer import train_bpe

# The clone is the copy, the tests are these, and test_surgery_scripts.py runs surgery's chain and make's targets.
NOT_RUN = ("git clone", "cd ", "bash scripts/test.sh", "bash scripts/run_surgery.sh", "make ")
TOY_SURGERY = (
    "--model tiny --calib_text text/long.txt --eval_text text/other.txt --window 32 --eval_windows 2 --calib_tokens 1024 "
    "--answer_tokens 2"
)
TRAINS = r"train\.py|scripts/train_|scripts/run_all"
FEW = dict(PRESET="laptop13", K="8", METHODS="fisher", GPUS="0 1")


def commands_of(text):
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def readme_commands():
    return [c for c in commands_of((REPO / "README.md").read_text()) if not c.startswith(NOT_RUN)]


def test_the_readme_has_commands():
    assert len(readme_commands()) > 20


@pytest.fixture(scope="module")
def prepared(copy, main_job, thirteen, vdproj, tmp_path_factory):
    """Another copy, since the commands leave runs behind, with the runs, folders and texts that they name."""
    toys = pytest.importorskip("toys")
    copy = shutil.copytree(copy, tmp_path_factory.mktemp("readme") / "nano pca")
    (copy / "path" / "to" / "wikitext").mkdir(parents=True)
    for split in ("train", "valid"):
        text = " = Title = \n \n Some words of an article . \n" * 40
        (copy / "path" / "to" / "wikitext" / f"wiki.{split}.raw").write_text(text)
    (copy / "text").mkdir()
    (copy / "text" / "some.txt").write_text("<|endoftext|>".join(["Some words, " * 40] * 4))
    train_bpe(["Some words"], 257).save(str(copy / "tokenizer.json"))
    toys.llama().save_pretrained(copy / "tiny")
    toys.save_tokenizer(copy / "tiny")
    (copy / "text" / "long.txt").write_text(toys.TEXT)
    (copy / "text" / "other.txt").write_text(toys.TEXT[::-1])
    return copy


@pytest.mark.parametrize("command", readme_commands())
def test_a_readme_command_runs(prepared, command):
    succeed(f"{command} {toy_flags(command)}", prepared, **environment_of(command))


def toy_flags(command):
    if "bench.py train" in command:
        return "--shape laptop --vocab_size 97 --block_size 16 --steps 1 --rounds 1 --models dense --dtypes float32"
    if "bench.py decode" in command:
        size = "float32 --shape laptop --vocab_size 97" if "--shape" in command else "float32,int4"
        return f"--steps 2 --rounds 1 --context 16 --kv_dtypes {size}"
    if "surgery.eval" in command:
        return "--characters 2000"
    if "-m surgery" in command:
        steps = " --heal_steps 2" if "--heal_steps" in command else ""
        return TOY_SURGERY + (" --bytes 0.6 --cache_bytes 0.6" if "--bytes" in command else " --rank 4") + steps
    if "run_bytes" in command:
        return "--window 32 --eval_windows 2 --calib_tokens 1024 --shares 0.6"
    if "data/pile" in command:
        return "--samples 20 --sequence_length 16 --out_dir pile"
    if "wikitext103" in command:
        return "--out_dir wikitext"
    if "vdproj" in command and "scripts" in command:
        return TOY_EPOCHS
    return TOY if re.search(TRAINS, command) else ""


def environment_of(command):
    """What stands before a command on the page wins; at toy size 1-13 have one rank and one further method."""
    if "13" in command or "lowrank" in command or "_lora" in command:
        return {name: value for name, value in FEW.items() if f"{name}=" not in command}
    if "vdproj" in command:
        return dict(PRESET="laptop_pythia")
    if "run_bytes" in command:
        return dict(MODEL="tiny", TEXT="text/long.txt", EVAL="text/other.txt")
    return {} if "PRESET" in command else dict(PRESET="laptop")


def numbers_of(text):
    """Sorted. Korean counts in 만 (10,000) and writes a quarter as 4분의 1, which English has as a word."""
    text = re.sub(r"\d+분의 \d+", "", text)
    text = re.sub(r"(\d+)만", lambda found: str(int(found[1]) * 10_000), text)
    text = re.sub(r"(\d+(?:\.\d+)?) million", lambda found: str(round(float(found[1]) * 1_000_000)), text)
    return sorted(number.replace(",", "") for number in re.findall(r"\d+(?:[.,]\d+)*%?", text))


def facts_of(page):
    """
    What two languages have in common, a dict for each section: the commands, and, sorted, the numbers (also those of comments
    and tables), the names in code, and the links. The list of the folders and the links between the two pages are left out.
    """
    found = []
    for section in re.split(r"^## ", page, flags=re.M):
        if "](README" in section:
            section = re.sub(r"\]\(README[^)]*\)", "]", section)
        if section.startswith(("Files\n", "파일\n")):
            continue
        prose = re.sub(r"```.*?```", "", section, flags=re.S)
        found.append(
            dict(
                commands=commands_of(section),
                numbers=numbers_of(section),
                names=sorted(" ".join(name.split()) for name in re.findall(r"`([^`]+)`", prose)),
                links=sorted(re.findall(r"\]\(([^)]+)\)", section)),
            )
        )
    return found


def test_the_korean_readme_says_the_same():
    english, korean = (facts_of((REPO / name).read_text()) for name in ("README.md", "README.ko.md"))
    assert len(english) == len(korean)
    for here, there in zip(english, korean):
        assert here == there


def test_a_number_that_one_language_lacks_is_noticed():
    page = (REPO / "README.md").read_text()
    for old, new in (("4.859", "4.858"), ("--rank 192", "--rank 191"), ("`fisher`", "`joint`"), ("(results/vdproj)", "(x)")):
        assert facts_of(page) != facts_of(page.replace(old, new))


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(), flags=re.M).group(1)
    cited = (REPO / "CITATION.cff").read_text()
    (newest, day), *_ = re.findall(r"^## (\d[\d.]*), (\S+)", (REPO / "CHANGELOG.md").read_text(), flags=re.M)
    assert f"\nversion: {version}\n" in cited and f"\ndate-released: {day}\n" in cited and newest == version


def test_every_link_of_the_pages_leads_somewhere():
    for page in [*REPO.glob("*.md"), REPO / "results" / "README.md", *(REPO / "results").glob("*/README.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)


def test_the_numbers_of_the_first_figure_are_those_of_the_studies():
    """Every number of headline.json stands in the page that it names as its source."""
    for panel in json.loads((REPO / "results" / "headline.json").read_text()).values():
        page = (REPO / "results" / panel["source"]).read_text()
        for value in (value for name, value in panel.items() if name != "source"):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, str):
                    assert number in page, (number, panel["source"])
