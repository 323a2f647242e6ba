"""Splits texts into documents, and finds the tokenizer of a dataset."""

import io
import re

from common.dataset import find_folder, read_meta
from common.tokenizer import TOKENIZERS, read_codec


def documents_of(text):
    """
    A text -> its documents; joined, they are the text. A form feed ends a document. Without one, they are WikiText's articles.

    Blank documents do not occur: blank space between two form feeds belongs to the document after it.
    """
    if "\f" in text:
        return re.findall(r"\s*\S[^\f]*(?:\f\s*\Z|\f*)", text) or [text]
    return list(articles(io.StringIO(text, newline="\n")))  # str.splitlines() would end lines at U+2028 and others too


def articles(lines):
    """Lines with their ends -> articles. An article begins with a first-level heading, ' = Title = ', after a blank line."""
    article, blank = [], True
    for line in lines:
        if blank and any(map(str.strip, article)) and re.fullmatch(r" = [^=].*[^=] = \r?\n?", line):
            yield "".join(article)
            article = []
        blank = not line.strip()
        article.append(line)
    yield "".join(article)


def codec_of(name, hint, required=True):
    """
    The tokenizer of a dataset -> (Codec, vocab_size); None if there is no such dataset.

    hint: see read_codec(). required: if the dataset names no known tokenizer, end in an error; if false, return None.
    """
    folder = find_folder(name)
    if folder is None or not (folder / "meta.pkl").is_file():
        return None
    meta = read_meta(folder / "meta.pkl")
    if not required and meta.get("tokenizer") not in TOKENIZERS:
        return None
    return read_codec(meta, folder / "meta.pkl", hint), meta["vocab_size"]
