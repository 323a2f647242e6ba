"""Converts the tokenizer of an exported model to Hugging Face's form."""

from common.cli import fail
from common.dataset import find_folder, read_meta
from common.hugging_face import read_tokenizer
from common.tokenizer import END_OF_TEXT, gpt2, read_codec

AS_TRAINED = dict(split_special_tokens=True)  # <|endoftext|> inside a text is plain text, as train.py and sample.py read it


def tokenizer_for(name, dataset, rows, source):
    """
    A Hugging Face tokenizer for a model whose table has `rows` rows; ends in one line if it does not fit.

    name: --tokenizer, a dataset, hub id or folder; "" means the tokenizer of the training dataset. source: --model.
    """
    what = name or dataset
    flag = f"--tokenizer {what}" if name else f"--model {source}: its dataset {what}"
    meta = meta_of(what)
    if meta is None and not name:
        fail(f"--model {source} was trained on {dataset}, which is not here: run its prepare.py, or give --tokenizer")
    tokenizer = read_tokenizer(name, "--tokenizer") if meta is None else of_meta(meta)
    ids = len(tokenizer) if meta is None else meta["vocab_size"]  # some datasets count extra ids that no text uses
    if ids > rows or ids < (rows if meta else 0.9 * rows):  # a table may be padded to a round number of rows
        fail(f"{flag} has {ids} tokens, the model's table {rows} rows: give the model's own --tokenizer")
    return tokenizer


def meta_of(name):
    """The checked meta.pkl of a dataset with a tokenizer; None if there is no such dataset."""
    folder = find_folder(name)
    if folder is None or not (folder / "meta.pkl").is_file():
        return None
    meta = read_meta(folder / "meta.pkl")
    read_codec(meta, folder / "meta.pkl", "give --tokenizer")
    return meta


def of_meta(meta):
    if meta["tokenizer"] == "gpt2":
        return from_tiktoken(gpt2())
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer.from_str(meta["tokenizer_json"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=bpe.id_to_token(meta["end_of_text"]), **AS_TRAINED)


def from_tiktoken(encoding):
    """A tiktoken Encoding, whose only special token is end-of-text -> a Hugging Face tokenizer."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(pattern=encoding._pat_str, extra_special_tokens=encoding._special_tokens)
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks  # instead of reading a file
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token=END_OF_TEXT, **AS_TRAINED)
