"""
Reads and writes token files: data/<name>/train.bin and val.bin, uint16 without a header (uint32 for a large vocabulary), and
meta.pkl, a dict of plain values: vocab_size, dtype and the tokenizer.
"""

import os
import pickle
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.cli import fail
from common.untrusted import COUNT, IDS, check_pickle, check_plain, expect, reading

ROOT = Path(__file__).parents[1] / "data"


AGAIN = "run the dataset's prepare.py again"
META = {
    "vocab_size": IDS[1:], "dtype": str, "tokenizer?": (str, None), "tokenizer_json?": str, "end_of_text?": COUNT,
}  # fmt: skip


def read_meta(path):
    """Read meta.pkl -> a dict of plain containers, text and numbers. A file with anything else is refused, so no code runs."""
    path = Path(path)
    if not path.exists():
        fail(f"{path} does not exist: run the dataset's prepare.py first, or choose another --dataset")
    with reading(path, "a pickled dict of plain values", AGAIN):
        check_plain(path)
        data = path.read_bytes()
        check_pickle(data)
        meta = pickle.loads(data)
        expect(meta, META)
    if meta["dtype"] not in ("uint16", "uint32"):
        fail(f"{path} says dtype {meta['dtype']!r}, but uint16 or uint32 is expected: {AGAIN}")
    if meta["dtype"] == "uint16" and meta["vocab_size"] > 2**16:
        fail(f"{path} says vocab_size {meta['vocab_size']}, too large for uint16: {AGAIN}")
    return meta


def write_dataset(folder, train, val, meta):
    """Write two arrays of token ids and their meta.pkl. vocab_size decides the dtype."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    meta = meta | dict(dtype="uint16" if meta["vocab_size"] <= 2**16 - 1 else "uint32")
    for name, ids in (("train.bin", train), ("val.bin", val)):
        np.asarray(ids, dtype=meta["dtype"]).tofile(folder / name)
    with open(folder / "meta.pkl", "wb") as f:
        pickle.dump(meta, f)
    return meta


def find_folder(name):
    """The folder of a dataset: data/<name>, or else the path `name`; None if neither exists."""
    return next((folder for folder in (ROOT / name, Path(name)) if os.path.isdir(folder)), None)  # isdir accepts any text


@lru_cache(maxsize=1)
def shuffled(n, key):
    """The numbers 0 to n - 1, shuffled. Cached, since every step of an epoch needs the same order."""
    return np.random.default_rng(key).permutation(n)


class Dataset:
    def __init__(self, name, flag="--dataset"):
        """name: a folder under data/, or a folder's path. flag: the flag that gave the name. Checks every id."""
        self.folder = find_folder(name)
        if self.folder is None:
            fail(f"{flag} {name}: no such folder under data/: run data/{name}/prepare.py, or give a folder's path")
        self.meta = read_meta(self.folder / "meta.pkl")
        self.vocab_size = self.meta["vocab_size"]
        self.train = self._tokens("train.bin")
        self.val = self._tokens("val.bin")

    def _tokens(self, name):
        path, dtype = self.folder / name, np.dtype(self.meta["dtype"])
        if not path.is_file():
            fail(f"{path} does not exist: run the dataset's prepare.py first")
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            fail(f"{path} has {size} bytes, not a multiple of a {dtype} token's: run the dataset's prepare.py again")
        tokens = np.memmap(path, dtype=dtype, mode="r")
        top = max(int(tokens[i : i + 2**24].max()) for i in range(0, len(tokens), 2**24))
        if top >= self.vocab_size:
            fail(
                f"{path} has the id {top}, but meta.pkl says vocab_size {self.vocab_size}: "
                "run the dataset's prepare.py again, so that both come from one tokenizer"
            )
        return tokens

    def check_block_size(self, block_size):
        for name, tokens in (("train.bin", self.train), ("val.bin", self.val)):
            if len(tokens) <= block_size:
                fail(
                    f"{self.folder / name} has {len(tokens)} tokens, less than one block of {block_size} and its next token: "
                    "lower --block_size or prepare more text"
                )

    def batch(self, batch_size, block_size, *key):
        """
        Random training windows and their next tokens, two int64 arrays (B, T).

        The choice depends only on the key, (seed, step, micro-step). So a resumed run, a run over more GPUs and another model
        all read the same text.
        """
        return self._windows(self.train, self.starts(batch_size, block_size, *key), block_size)

    def starts(self, batch_size, block_size, *key):
        """The positions in the training text at which the windows of a batch() begin."""
        return np.random.default_rng(key).integers(len(self.train) - block_size, size=batch_size)

    def epoch_steps(self, step_size, block_size, samples=None):
        """
        Steps of an epoch: samples // step_size. samples: sequences of block_size that do not overlap; None takes all.

        The remainder is dropped; shuffling makes it a different one each epoch.
        """
        available = (len(self.train) - 1) // block_size
        samples = available if samples is None else samples
        if samples > available:
            fail(
                f"--max_train_samples {samples}: {self.folder / 'train.bin'} has {available} sequences of {block_size} tokens: "
                "lower it, or prepare more text"
            )
        if samples < step_size:
            fail(f"--max_train_samples {samples} is less than one step of {step_size}: raise it, or lower --batch_size")
        return samples // step_size

    def epoch_batch(self, batch_size, block_size, samples, place, *key):
        """
        The next sequences of an epoch, starting at `place` in its order, two int64 arrays (B, T). The order depends only on the
        key, (seed, epoch).
        """
        return self._windows(self.train, self.epoch_starts(batch_size, block_size, samples, place, *key), block_size)

    def epoch_starts(self, batch_size, block_size, samples, place, *key):
        """The positions in the training text at which the sequences of an epoch_batch() begin."""
        samples = (len(self.train) - 1) // block_size if samples is None else samples
        return shuffled(samples, key)[place : place + batch_size] * block_size

    def fixed_windows(self, count, batch_size, block_size, split="val"):
        """
        Windows of the validation file (or of the "train" file), in order and without overlap, as batches of (B, T). If the file
        has more than `count` windows, evenly spaced ones are used. They are the same for every model.
        """
        tokens = getattr(self, split)
        available = (len(tokens) - 1) // block_size
        count = min(count, available)
        starts = np.arange(count) * available // count * block_size
        for i in range(0, count, batch_size):
            yield self._windows(tokens, starts[i : i + batch_size], block_size)

    @staticmethod
    def _windows(tokens, starts, block_size):
        rows = np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def counts(self):
        """How often each id occurs in the training file, int64 [V]."""
        return np.bincount(self.train, minlength=self.vocab_size)

    def unigram_entropy(self):
        """Entropy of the validation file's token frequencies, nats per token: the lowest loss without context."""
        counts = np.bincount(self.val)
        p = counts[counts > 0] / len(self.val)
        return float(-(p * np.log(p)).sum())


class TrainingText:
    """Chooses the text of each micro-step of each process: random windows, or with --max_epochs the sequences of an epoch."""

    def __init__(self, dataset, args, epoch_steps, steps_before, rank, world_size):
        """epoch_steps: steps of an epoch, or None. steps_before: steps that the weights were trained before this run."""
        self.dataset, self.args, self.epoch_steps, self.steps_before = dataset, args, epoch_steps, steps_before
        self.rank, self.world_size = rank, world_size

    def batch(self, step, micro):
        """Two int64 arrays (B, T): token ids, and the ids that follow them."""
        draw = self.dataset.batch if self.epoch_steps is None else self.dataset.epoch_batch
        return draw(*self._place(step, micro * self.world_size + self.rank))

    def starts(self, step):
        """The positions in train.bin at which the windows of a step begin, for all processes."""
        find = self.dataset.starts if self.epoch_steps is None else self.dataset.epoch_starts
        places = range(self.args.gradient_accumulation_steps)
        return [int(start) for place in places for start in find(*self._place(step, place))]

    def _place(self, step, place):
        """Arguments of the dataset's methods for the place-th micro-step of a step, counted over all processes."""
        a = self.args
        if self.epoch_steps is None:
            return a.batch_size, a.block_size, a.seed, self.steps_before + step, place
        epoch, within = divmod(step, self.epoch_steps)
        place = (within * a.gradient_accumulation_steps + place) * a.batch_size
        return a.batch_size, a.block_size, a.max_train_samples, place, a.seed, self.steps_before + epoch
