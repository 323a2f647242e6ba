import json
import lzma
import sys
from types import SimpleNamespace

import pytest

from common.dataset import Dataset
from common.tokenizer import END_OF_TEXT, train_bpe

# Documents that can be told apart, of 5 to 33 words.
TEXTS = [f"Document {i} says: " + " ".join(f"word{i}.{j}" for j in range(i * 7 % 29 + 2)) for i in range(60)]
T = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small tokenizer.json, and the tokenizer."""
    pytest.importorskip("tokenizers")
    bpe = train_bpe(TEXTS, 300)
    path = tmp_path_factory.mktemp("tokenizer") / "common.tokenizer.json"
    bpe.save(str(path))
    return path, bpe


@pytest.fixture
def prepare(run_main, tokenizer, tmp_path):
    """prepare(folder, samples=...): runs the program. Returns a Result; the files are in tmp_path/out."""

    def run(folder, *more, samples=100):
        flags = ("--samples", samples, "--sequence_length", T, "--out_dir", tmp_path / "out", *more)
        return run_main("data/pile/prepare.py", "--local_dir", folder, "--tokenizer", tokenizer[0], *flags)

    return run


def write_jsonl(path, texts, opened=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(dict(text=text, meta=dict(pile_set_name="none"))) + "\n" for text in texts)


def split_at(ids, end):
    """Ids -> (the documents that end, what is left of the one that does not)."""
    parts = [[]]
    for i in ids.tolist():
        if i == end:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts[:-1], parts[-1]


def test_order_split_and_boundaries(prepare, tokenizer, tmp_path):
    write_jsonl(tmp_path / "text" / "00.jsonl", TEXTS)
    result = prepare(tmp_path / "text")
    assert result.status == 0, result.err
    assert result.last["samples"] == dict(train=90, val=10) and result.last["tokens"] == dict(train=90 * T + 1, val=10 * T + 1)

    data, bpe = Dataset(tmp_path / "out"), tokenizer[1]
    assert sum(len(x) for x, _ in data.fixed_windows(10**6, 7, T, split="train")) == 90  # each with its next token
    assert sum(len(x) for x, _ in data.fixed_windows(10**6, 7, T)) == 10
    end = data.meta["end_of_text"]
    assert end == bpe.token_to_id(END_OF_TEXT)
    used = result.last["documents"]
    texts = iter(TEXTS)
    for split, ids in (("train", data.train), ("val", data.val)):  # documents in their order, the last of a file cut short
        complete, rest = split_at(ids, end)
        assert len(complete) + bool(rest) == used[split]
        for document in complete:
            assert bpe.decode(document) == next(texts)
        if rest:
            assert next(texts).startswith(bpe.decode(rest))
    assert split_at(data.train, end)[1]  # else the last one of train.bin is not cut, and nothing is seen here


def test_meta_holds_the_tokenizer_and_the_padded_vocabulary(prepare, tokenizer, tmp_path):
    from tokenizers import Tokenizer

    write_jsonl(tmp_path / "text" / "00.jsonl", TEXTS)
    assert prepare(tmp_path / "text").last["vocab_size"] == 384  # the next multiple of 128 above 300
    meta = Dataset(tmp_path / "out").meta
    assert (meta["vocab_size"], meta["tokenizer"], meta["dtype"]) == (384, "bpe", "uint16")
    again = Tokenizer.from_str(meta["tokenizer_json"])
    assert again.encode(TEXTS[0]).ids == tokenizer[1].encode(TEXTS[0]).ids


def test_a_text_that_says_end_of_text_does_not_end_there(prepare, tokenizer, tmp_path):
    words = [f"{text} {END_OF_TEXT} and goes on" for text in TEXTS]
    write_jsonl(tmp_path / "text" / "00.jsonl", words)
    assert prepare(tmp_path / "text").status == 0
    data = Dataset(tmp_path / "out")
    complete, _ = split_at(data.train, data.meta["end_of_text"])
    assert [tokenizer[1].decode(document) for document in complete] == words[: len(complete)]


def test_every_kind_of_file_gives_the_same(prepare, tmp_path):
    import pyarrow
    import pyarrow.parquet

    folders = {name: tmp_path / name for name in ("jsonl", "jsonl.xz", "txt", "txt.xz", "parquet", "several")}
    for folder in folders.values():
        folder.mkdir()
    write_jsonl(folders["jsonl"] / "a.jsonl", [*TEXTS[:3], " \n", *TEXTS[3:]])  # a blank one is none
    write_jsonl(folders["jsonl.xz"] / "a.jsonl.xz", TEXTS, lzma.open)
    (folders["txt"] / "a.txt").write_text(END_OF_TEXT.join(TEXTS))
    with lzma.open(folders["txt.xz"] / "a.txt.xz", "wt") as f:
        f.write(END_OF_TEXT.join(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table(dict(text=TEXTS, n=range(60))), folders["parquet"] / "a.parquet")
    for i, text in enumerate(TEXTS[:3]):
        (folders["several"] / f"a{i}.txt").write_text(text)
    write_jsonl(folders["several"] / "b" / "c.jsonl", TEXTS[3:])
    (folders["several"] / "README.md").write_text("not text of it")

    first = None
    for name, folder in folders.items():
        result = prepare(folder)
        assert result.status == 0, (name, result.err)
        files = [(tmp_path / "out" / f).read_bytes() for f in ("train.bin", "val.bin")]
        first = first or files
        assert files == first, name


def test_zst(prepare, tmp_path, monkeypatch, assert_one_line_error):
    zstandard = pytest.importorskip("zstandard")
    write_jsonl(tmp_path / "text" / "00.jsonl.zst", TEXTS, zstandard.open)
    assert prepare(tmp_path / "text").status == 0
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert_one_line_error(prepare(tmp_path / "text"), "00.jsonl.zst", "pip install zstandard")


# -- refusals, none of which writes anything --------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, assert_one_line_error):
    def check(result, *words):
        assert_one_line_error(result, *words)
        assert not (tmp_path / "out").exists()

    return check


def no_hub(*args, **kwargs):
    raise ConnectionError("no route\nto the hub")


def test_without_the_hub(run_main, tokenizer, tmp_path, monkeypatch, refused):
    datasets, tokenizers = pytest.importorskip("datasets"), pytest.importorskip("tokenizers")
    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    monkeypatch.setitem(sys.modules, "zstandard", sys)  # any module will do
    out = ("--out_dir", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers, "Tokenizer", SimpleNamespace(from_pretrained=no_hub))
        refused(run_main("data/pile/prepare.py", *out), "--local_dir", "--tokenizer", "DATASET=sotu", "pythia-70m")
    result = run_main("data/pile/prepare.py", "--tokenizer", tokenizer[0], *out)
    refused(result, "--local_dir", "DATASET=sotu", "monology/pile-uncopyrighted")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    result = run_main("data/pile/prepare.py", "--tokenizer", tokenizer[0], *out)
    refused(result, "--local_dir", "pip install datasets zstandard")


def test_a_stream_that_breaks_off(run_main, tokenizer, tmp_path, monkeypatch, refused):
    def some():
        yield dict(text=TEXTS[0])
        no_hub()

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", lambda *args, **kwargs: some())
    monkeypatch.setitem(sys.modules, "zstandard", sys)  # any module will do
    result = run_main("data/pile/prepare.py", "--tokenizer", tokenizer[0], "--out_dir", tmp_path / "out")
    refused(result, "--local_dir", "DATASET=sotu", "ConnectionError")


def test_text_that_does_not_do(prepare, tmp_path, refused):
    folder = tmp_path / "text"
    refused(prepare(folder), "--local_dir", "not a folder")
    folder.mkdir()
    refused(prepare(folder), "--local_dir", ".jsonl")
    (folder / "a.jsonl").write_text('{"content": "no text"}\n')
    refused(prepare(folder), "a.jsonl", "KeyError", "text")
    (folder / "a.jsonl").unlink()
    (folder / "a.parquet").write_text("no parquet")
    refused(prepare(folder), "a.parquet", "cannot be read")
    (folder / "a.parquet").unlink()
    write_jsonl(folder / "a.jsonl", TEXTS)
    refused(prepare(folder, samples=10**6), "train.bin", "--samples")
    refused(prepare(folder, "--val_share", 0.9, samples=300), "val.bin", "--samples")


def test_bad_flags(prepare, tokenizer, tmp_path, refused):
    write_jsonl(tmp_path / "text" / "a.jsonl", TEXTS)
    refused(prepare(tmp_path / "text", samples=0), "--samples 0")
    refused(prepare(tmp_path / "text", samples=4), "--samples 4", "--val_share")
    refused(prepare(tmp_path / "text", "--val_share", 1), "--val_share 1.0")
    (tmp_path / "no.json").write_text("{}")
    refused(prepare(tmp_path / "text", "--tokenizer", tmp_path / "no.json"), "--tokenizer", "no.json")
    without = json.loads(tokenizer[0].read_text().replace(END_OF_TEXT, "<s>"))
    (tmp_path / "without.json").write_text(json.dumps(without))
    refused(prepare(tmp_path / "text", "--tokenizer", tmp_path / "without.json"), "--tokenizer", END_OF_TEXT)
