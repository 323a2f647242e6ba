"""
Writes WikiText-103 (raw) to train.bin, val.bin and meta.pkl in GPT-2's tokens.

    python data/wikitext103/prepare.py                          # Salesforce/wikitext from the Hugging Face hub
    python data/wikitext103/prepare.py --local_dir wikitext     # wiki.train.raw and wiki.valid.raw, or the hub's parquet files

The official split is kept: wiki.valid.raw becomes val.bin; the test text is not used. End-of-text separates the articles.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.cli import fail, finish, flag, parse

SPLITS = dict(train=("wiki.train.raw", "train*.parquet"), val=("wiki.valid.raw", "validation*.parquet"))
ARTICLES_AT_ONCE = 512


@dataclass
class Args:
    local_dir: str = flag("", "folder with wiki.{train,valid}.raw or parquet files; default: download from the hub")
    out_dir: str = flag(str(Path(__file__).parent), "folder for train.bin, val.bin and meta.pkl")
    threads: int = flag(os.cpu_count() or 1, "threads of the tokenizer", low=1)


def local_lines(folder, split):
    """The lines of a split, from the folder's .raw file or parquet files."""
    raw, parquet = SPLITS[split]
    if (folder / raw).is_file():
        with open(folder / raw, encoding="utf-8") as f:
            yield from f
        return
    files = sorted(folder.rglob(parquet))
    files = [f for f in files if f.parent.name == "wikitext-103-raw-v1"] or files  # the hub's folder has four corpora
    if not files:
        fail(f"--local_dir {folder} has neither {raw} nor {parquet}: unpack WikiText-103 raw there")
    if len({f.parent for f in files}) > 1:
        fail(f"--local_dir {folder} has {parquet} in several folders, {files[0].parent} and others: give one of them")
    import pyarrow.parquet

    for file in files:
        for rows in pyarrow.parquet.ParquetFile(file).iter_batches(columns=["text"]):
            yield from rows.column("text").to_pylist()


def hub_lines(split):
    try:
        from datasets import load_dataset
    except ImportError:
        fail("the package datasets is not installed: pip install datasets, or give --local_dir")
    try:
        part = load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split={"val": "validation"}.get(split, split))
    except Exception as error:  # the network library raises many types
        why = str(error).splitlines()[0][:100]
        fail(f"Salesforce/wikitext cannot be loaded from the hub ({type(error).__name__}: {why}): give --local_dir")
    yield from part["text"]


def complete(lines):
    """The lines, each with its end: the hub has lines without."""
    return (line if line.endswith("\n") else line + "\n" for line in lines)


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    if args.local_dir and not Path(args.local_dir).is_dir():
        fail(f"--local_dir {args.local_dir} is not a folder")

    import numpy as np
    from tqdm import tqdm

    from common.dataset import write_dataset
    from common.texts import articles
    from common.tokenizer import END_OF_TEXT, gpt2

    t0 = time.time()
    encoding = gpt2()
    end = encoding.encode_single_token(END_OF_TEXT)
    tokens, documents = {}, {}
    for split in SPLITS:
        lines = local_lines(Path(args.local_dir), split) if args.local_dir else hub_lines(split)
        texts = list(articles(complete(lines)))
        parts = []
        with tqdm(total=len(texts), desc=split, unit=" articles") as bar:
            for i in range(0, len(texts), ARTICLES_AT_ONCE):
                some = texts[i : i + ARTICLES_AT_ONCE]
                for ids in encoding.encode_ordinary_batch(some, num_threads=args.threads):
                    parts.append(np.array([*ids, end], dtype=np.uint16))
                bar.update(len(some))
        tokens[split], documents[split] = np.concatenate(parts), len(texts)

    meta = dict(vocab_size=encoding.n_vocab, tokenizer="gpt2", end_of_text=end)
    write_dataset(args.out_dir, tokens["train"], tokens["val"], meta)
    finish(
        dataset="wikitext103",
        vocab_size=meta["vocab_size"],
        documents=documents,
        tokens={split: len(ids) for split, ids in tokens.items()},
        seconds=round(time.time() - t0, 1),
    )


if __name__ == "__main__":
    main()
