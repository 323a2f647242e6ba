import collections
import pickle

import numpy as np
import pytest

from common.dataset import Dataset, read_meta, write_dataset


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    write_dataset(tmp_path, rng.integers(50, size=400), rng.integers(50, size=101), dict(vocab_size=50, tokenizer="none"))
    return tmp_path


def refused(capsys, call):
    with pytest.raises(SystemExit) as end:
        call()
    assert end.value.code == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1
    return err


def test_files_are_headerless_and_as_wide_as_the_vocabulary_needs(tmp_path):
    for vocab_size, dtype in ((50, np.uint16), (65_535, np.uint16), (65_536, np.uint32)):
        meta = write_dataset(tmp_path, [1, 2, 3], [vocab_size - 1] * 2, dict(vocab_size=vocab_size))
        assert meta["dtype"] == np.dtype(dtype).name
        assert np.fromfile(tmp_path / "val.bin", dtype=dtype).tolist() == [vocab_size - 1] * 2
        assert Dataset(tmp_path).val.tolist() == [vocab_size - 1] * 2


def test_a_batch_hangs_on_its_key_alone(folder):
    data = Dataset(folder)
    x, y = data.batch(6, 10, 1337, 5, 0)
    again, _ = data.batch(6, 10, 1337, 5, 0)
    other, _ = data.batch(6, 10, 1337, 6, 0)
    assert np.array_equal(x, again) and not np.array_equal(x, other)
    assert np.array_equal(x[:, 1:], y[:, :-1]) and x.shape == y.shape == (6, 10)


def test_batches_reach_the_first_and_the_last_token(tmp_path):
    write_dataset(tmp_path, np.arange(20), np.arange(20), dict(vocab_size=20))
    x, y = Dataset(tmp_path).batch(2000, 5, 0)
    assert x.min() == 0 and y.max() == 19


def test_fixed_windows_tile_the_file_in_order_or_spread_evenly(folder):
    data = Dataset(folder)
    val = data.val.astype(np.int64)
    x = np.concatenate([x for x, _ in data.fixed_windows(99, 3, 10)])
    y = np.concatenate([y for _, y in data.fixed_windows(99, 3, 10)])
    assert np.array_equal(x.ravel(), val[:100]) and np.array_equal(y.ravel(), val[1:101])
    some = np.concatenate([x for x, _ in data.fixed_windows(4, 3, 10)])
    assert np.array_equal(some, x[[0, 2, 5, 7]])


def test_counts_and_unigram_entropy(tmp_path):
    write_dataset(tmp_path, [0, 1, 1, 3], [0, 0, 1, 1], dict(vocab_size=5))
    data = Dataset(tmp_path)
    assert data.counts().tolist() == [1, 2, 0, 1, 0]
    assert data.unigram_entropy() == pytest.approx(np.log(2))


def test_bad_token_files(folder, capsys):
    (folder / "val.bin").write_bytes(b"\x01\x00\x02")
    assert "val.bin has 3 bytes" in refused(capsys, lambda: Dataset(folder))
    (folder / "val.bin").write_bytes(b"")
    assert "val.bin has 0 bytes" in refused(capsys, lambda: Dataset(folder))
    (folder / "val.bin").write_bytes(b"\x32\x00" * 99)
    assert "id 50, but meta.pkl says vocab_size 50" in refused(capsys, lambda: Dataset(folder))
    (folder / "val.bin").unlink()
    assert "val.bin does not exist" in refused(capsys, lambda: Dataset(folder))


def test_text_shorter_than_one_block(folder, capsys):
    data = Dataset(folder)
    data.check_block_size(100)
    assert "--block_size" in refused(capsys, lambda: data.check_block_size(101))


def test_no_such_dataset(capsys):
    assert "--dataset nowhere" in refused(capsys, lambda: Dataset("nowhere"))


@pytest.mark.parametrize(
    "content",
    [
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps(dict(dtype="uint16")),
        pickle.dumps(dict(vocab_size="50", dtype="uint16")),
        pickle.dumps(dict(vocab_size=50, dtype="float32")),
        pickle.dumps(collections.OrderedDict(vocab_size=50)),
        pickle.dumps(dict(vocab_size=50, dtype="uint16", call=print)),
    ],
)
def test_a_meta_that_is_no_plain_dict(folder, capsys, content):
    (folder / "meta.pkl").write_bytes(content)
    assert "meta.pkl" in refused(capsys, lambda: read_meta(folder / "meta.pkl"))


def test_reading_a_meta_runs_no_code(folder, capsys):
    class Harmful:
        def __reduce__(self):
            return (open, (str(folder / "harm"), "w"))

    (folder / "meta.pkl").write_bytes(pickle.dumps(dict(vocab_size=50, dtype="uint16", x=Harmful())))
    refused(capsys, lambda: read_meta(folder / "meta.pkl"))
    assert not (folder / "harm").exists()
