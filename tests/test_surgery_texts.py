"""Which texts surgery reads, in which windows, and how sure its numbers are."""

import lzma

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.dataset import write_dataset
from common.tokenizer import train_bpe
from surgery import texts
from surgery.evaluator import Evaluator
from surgery.predictor import rolling_windows
from surgery.texts import TextReader, bos_of, choose, documents, fixed_windows, settings, token_counts

PAGES = [f"page {i} says {'abc' * (i + 20)}. " for i in range(8)]
LENGTH = 16


def letters(text, **_):
    """A tokenizer: every character is an id."""
    return dict(input_ids=[ord(c) for c in text])


def reader(**flags):
    return TextReader(choose(**{name: str(value) for name, value in flags.items()}), letters, 128, LENGTH)


def words(windows):
    return ["".join(map(chr, x[0])) for x, _ in windows]


@pytest.fixture
def shelf(tmp_path):
    """pages.txt of eight documents, the same compressed, other.txt and a/other.txt."""
    (tmp_path / "pages.txt").write_text("\f".join(PAGES))
    (tmp_path / "pages.txt.xz").write_bytes(lzma.compress("\f".join(PAGES).encode()))
    (tmp_path / "a").mkdir()
    for name in ("other.txt", "a/other.txt"):
        (tmp_path / name).write_text(f"{name} " * 200 + "\n")
    return tmp_path


# -- which texts ------------------------------------------------------------------------------------------------------


def test_a_text_that_is_learnt_from_and_measured_on_gives_each_side_half_of_its_documents(shelf):
    pages, other = shelf / "pages.txt", shelf / "other.txt"
    ended = [page + "\f" for page in PAGES[:-1]] + PAGES[-1:]
    even, odd = "".join(ended[::2]), "".join(ended[1::2])
    for flags in (dict(calib_text=pages), dict(calib_text=other, heal_text=f"{other}, {pages}")):
        texts = reader(eval_text=f"{pages},{other}", **flags)
        learnt = texts.chosen["calib"] + texts.chosen["heal"]
        assert all(texts.ids(t).tolist() == list(map(ord, even)) for t in learnt if t.name == "pages.txt")
        assert texts.ids(texts.chosen["eval"][0]).tolist() == list(map(ord, odd))
    apart = reader(calib_text=pages, eval_text=other)
    assert [t.half for role in ("calib", "eval", "heal") for t in apart.chosen[role]] == ["all"] * 3
    mixed = settings(choose(str(pages), f"{pages},{other}"))
    assert mixed["texts"] == {"pages.txt": "other documents", "other.txt": "not calibrated on"}
    assert mixed["calib_text"] == f"{pages} (even documents)" and mixed["eval_text"] == f"{pages} (odd documents), {other}"


def test_texts_of_one_name_are_told_apart_and_one_text_under_two_paths_is_not(shelf):
    first, second = (str(shelf / name) for name in ("other.txt", "a/other.txt"))
    assert [t.name for t in choose(first, f"{first},{second},{shelf}/a/../other.txt")["eval"]] == [first, second]
    windows = reader(calib_text=shelf / "pages.txt", eval_text=f"{first},{second}").evaluation_windows(4)
    assert {name: len(some) for name, some in windows.items()} == {first: 2, second: 2}


def test_left_out_all_text_at_hand_is_read(tmp_path, monkeypatch):
    """The State of the Union, and datasets that are prepared and whose tokenizer is known: documents, without end-of-text."""
    bpe = train_bpe(PAGES, 300)
    ids = [i for page in PAGES for i in (*bpe.encode(page).ids, 0)]
    for name, meta in dict(
        wikitext103=dict(tokenizer="bpe", tokenizer_json=bpe.to_str(), end_of_text=0), pile=dict(tokenizer="none")
    ).items():
        write_dataset(tmp_path / name, ids, ids, dict(vocab_size=300) | meta)
    monkeypatch.setattr("common.dataset.ROOT", tmp_path)
    chosen = choose()
    assert {role: [(t.name, t.half) for t in found] for role, found in chosen.items()} == dict(
        calib=[("sotu", "even"), ("wikitext103", "even")],
        eval=[("sotu", "odd"), ("wikitext103", "odd")],
        heal=[("sotu", "even"), ("wikitext103", "even")],
    )
    assert documents("wikitext103", "calib_text") == [page + "\n\n" for page in PAGES]
    assert len(documents("sotu", "calib_text")) == 249


# -- windows ----------------------------------------------------------------------------------------------------------


def test_of_a_long_file_the_start_is_read_compressed_or_not(shelf, monkeypatch, capsys):
    plain, packed = (documents(str(shelf / name), "eval_text") for name in ("pages.txt", "pages.txt.xz"))
    assert plain == packed == [page + "\f" for page in PAGES[:-1]] + PAGES[-1:] and not capsys.readouterr().out
    monkeypatch.setattr(texts, "MOST", 100)
    whole = reader(calib_text=shelf / "pages.txt.xz", eval_text=shelf / "pages.txt.xz")
    for role in ("calib", "eval"):
        whole.ids(whole.chosen[role][0])
    assert capsys.readouterr().out == f"{shelf}/pages.txt.xz: only its first 100 characters are read\n"  # once
    assert "".join(whole.documents[f"{shelf}/pages.txt.xz"]) == "\f".join(PAGES)[:100]


LINE_ENDS = "a\u2028b\u2029c\x85d\x0be\x1cf\x1dg\x1eh\r\ni\rj\n"


@pytest.mark.parametrize(
    "text, count",
    [
        (LINE_ENDS, 1),
        (f" = One = \n\n{LINE_ENDS}\n = Two = \nx", 2),
        (" = One = \r\n\r\nx\r\n\r\n = Two = \r\nx", 2),
        ("one\f\ftwo\f \n\fthree\f\n", 3),
        ("\f\fone\f", 1),
        ("\f \f", 1),
        ("", 1),
    ],
)
def test_the_documents_of_a_file_joined_are_the_file(tmp_path, text, count):
    """str.splitlines() ends lines at eight more characters, and universal newlines make one of CRLF and LF."""
    for name, data in {"text.txt": text.encode(), "text.txt.xz": lzma.compress(text.encode())}.items():
        (tmp_path / name).write_bytes(data)
        found = documents(str(tmp_path / name), "eval_text")
        assert "".join(found) == texts.text_of(str(tmp_path / name), "text", 10**6) == text and len(found) == count


def test_each_window_begins_with_the_beginning_of_text():
    ids, bos = torch.arange(100, 150), 7
    for bare, (x, y) in zip(range(0, 48, 16), fixed_windows(ids, 3, 16, bos)):
        assert x[0].tolist() == [bos, *range(100 + bare, 115 + bare)] and y[0].tolist() == list(range(100 + bare, 116 + bare))
    for (x, y, new), start in zip(rolling_windows(ids, 3, 16, 8, bos), (0, 8, 16)):
        assert x[0] == bos and x[1:].equal(y[:-1]) and y[0] == 100 + start and new == (8 if start else 16)
    lm_eval = [x[0].item() for x, _, _ in rolling_windows(ids, bos, 16, 16)]
    assert lm_eval == [bos, 115, 131, 147 - 14]  # only the first; the last window is filled with tokens seen before
    surgery_eval = [(x.tolist(), y.tolist()) for x, y, _ in rolling_windows(ids[:48], bos, 16, 16, bos)]
    assert surgery_eval == [(x[0].tolist(), y[0].tolist()) for x, y in fixed_windows(ids[:48], 3, 16, bos)]


class Marked:
    """letters() as a tokenizer with a beginning of text. adds: whether it puts it before a text by itself."""

    def __init__(self, adds, bos=1):
        self.adds, self.bos_token_id = adds, bos

    def __call__(self, text, add_special_tokens=True, **_):
        return dict(input_ids=[self.bos_token_id] * (add_special_tokens and self.adds) + letters(text)["input_ids"])


def test_bos_is_what_the_tokenizer_does_by_itself_or_what_the_flag_says(capsys):
    found = {(adds, choice): bos_of(Marked(adds), choice) for adds in (True, False) for choice in ("auto", "yes", "no")}
    assert found == {(adds, c): 1 if c == "yes" or (c == "auto" and adds) else None for adds, c in found}
    assert bos_of(Marked(False, None), "auto") is None
    with pytest.raises(SystemExit):
        bos_of(Marked(False, None), "yes")
    assert "--bos yes: the tokenizer has no beginning-of-text token" in capsys.readouterr().err


def test_the_beginning_of_text_is_counted_once_a_window(shelf):
    chosen = choose(str(shelf / "other.txt"), str(shelf / "pages.txt"))
    bare, marked = (TextReader(chosen, letters, 128, LENGTH, bos).calibration_windows(4)[1] for bos in (None, 1))
    assert marked[1] == len(texts.text_of(str(shelf / "other.txt"), "t", 10**6)) // LENGTH
    assert (marked - bare).count_nonzero() == 1


def test_windows_come_in_equal_shares_and_counts_weigh_texts_alike(shelf, capsys):
    pages, other = shelf / "pages.txt", shelf / "other.txt"
    windows, counts = reader(calib_text=f"{pages},{other}", eval_text="sotu").calibration_windows(5)
    alone = [reader(calib_text=path, eval_text="sotu").calibration_windows(3) for path in (pages, other)]
    assert words(windows) == words(alone[0][0]) + words(alone[1][0]) and len(windows) == 6
    shares = [
        np.bincount(list(map(ord, "".join(text))), minlength=128) for text in ("\f".join(PAGES), "other.txt " * 200 + "\n")
    ]
    total = sum(share.sum() for share in shares)
    np.testing.assert_allclose(counts, np.mean([share / share.sum() for share in shares], 0) * total)
    for share, (_, one) in zip(shares, alone):  # one text: whole numbers, as they are counted
        assert one.dtype == torch.long and one.tolist() == share.tolist()
    assert token_counts([torch.tensor([0, 0]), torch.tensor([1] * 8)], 2).tolist() == [5, 5]
    assert not capsys.readouterr().out
    (shelf / "short.txt").write_text("short " * 8)
    windows, _ = reader(calib_text=f"{shelf}/short.txt,{other}", eval_text="sotu").calibration_windows(10)
    assert len(windows) == 2 + 5 and "short.txt has 2 windows, fewer than its share of 5" in capsys.readouterr().out


# -- how sure ---------------------------------------------------------------------------------------------------------


class Bigram(torch.nn.Module):
    """The next token depends on the last alone. Has the calls of a Subject."""

    def __init__(self, seed):
        super().__init__()
        weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed))
        self.table, self.head = torch.nn.Embedding.from_pretrained(torch.eye(128)), torch.nn.Linear(128, 128, bias=False)
        self.head.weight.data = weight
        self.lookup, self.trunk, self.logits = self.table, torch.nn.Identity(), self.head


def test_every_text_has_its_numbers_and_a_paired_standard_error(shelf):
    untouched, changed = Bigram(0), Bigram(1)
    windows = reader(calib_text="sotu", eval_text=f"{shelf}/pages.txt,{shelf}/other.txt").evaluation_windows(8)
    found = Evaluator(untouched, windows).measure(changed)
    losses = {
        name: [[F.cross_entropy(m.head(m.table(x))[0], y[0]).item() for x, y in some] for m in (changed, untouched)]
        for name, some in windows.items()
    }
    for name, (after, before) in losses.items():
        lost, text = np.subtract(after, before), found["texts"][name]
        assert text["nats"] == pytest.approx(lost.mean(), abs=1e-5) and text["loss"] == pytest.approx(np.mean(after), abs=1e-5)
        assert text["nats_se"] == pytest.approx(np.std(lost, ddof=1) / np.sqrt(4), abs=1e-5) and text["nats_se"] > 0
        alone = Evaluator(untouched, {name: windows[name]}).measure(changed)
        assert alone.pop("texts") == {name: text} and alone == {key: text[key] for key in ("loss", "ppl", "kl", "top1")}
    both = found["texts"].values()
    for key in ("loss", "kl", "top1"):
        assert found[key] == pytest.approx(np.mean([text[key] for text in both]))
    assert found["ppl"] == pytest.approx(np.exp(found["loss"]))
    one = Evaluator(untouched, dict(text=windows["pages.txt"][:1])).measure(changed)["texts"]["text"]
    assert one["nats_se"] is None and one["nats"] == pytest.approx(
        losses["pages.txt"][0][0] - losses["pages.txt"][1][0], abs=1e-5
    )
    same = Evaluator(untouched, windows).measure()["texts"]["pages.txt"]
    assert same["nats"] == 0 and same["nats_se"] == 0
