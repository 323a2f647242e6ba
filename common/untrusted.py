"""
Reads untrusted files, which may be cut short, damaged or malicious. A reader states the expected shape; any other content ends
the program in one line.

    with reading(path, "a checkpoint of this project", "give a ckpt.pt of train.py"):
        expect(checkpoint, dict(iter_num=COUNT, val_loss=(float, None)))

No reader runs code that a file names. No reader reserves memory because of a declared size: declared sizes are first compared
with the bytes of the file.
"""

import dataclasses
import json
import pickletools
import re
import typing
import zipfile
from contextlib import contextmanager
from pathlib import Path

from common.cli import LARGE, fail, value_type


class Positive(float):
    """In expect(): a finite number above 0."""


COUNT = range(0, 2**63)
IDS = range(2**24)  # no tokenizer has more
WHOLE = range(1, LARGE + 1)  # 1, 2, 3, ...


@contextmanager
def reading(path, what, hint):
    """A context in which any error means a damaged file: the program ends in a line with what was expected, why, and a hint."""
    try:
        yield
    except BaseException as error:  # for a damaged file, readers of pickles, archives and tensors raise many types
        if not of_reader(error):
            raise
        words = " ".join(str(error).split())[:120]
        why = words if isinstance(error, ValueError) and words else f"{type(error).__name__}: {words}".rstrip(": ")
        fail(f"{path} is not {what} ({why}): {hint}")


def of_reader(error):
    """Whether an exception is a reader's error: any Exception, or a Rust library's panic, which is not an Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def check_plain(path):
    """Raise ValueError if a path leads to a device or a pipe, which may be endless."""
    if not Path(path).is_file() and Path(path).exists():
        raise ValueError("it is not a plain file")


# -- plain values -----------------------------------------------------------------------------------------------------


def expect(value, shape, name="it"):
    """
    Raise ValueError if a value does not have the given shape:

        int, bool, str, ...     an instance of this type; a bool is not an int
        float, Positive         a finite number; one above 0
        range(1, 9), "svd"      an int in it; this text
        (shape, None, ...)      one of these
        [shape], [shape, ...]   a list of such values; with at least one
        [shape, shape]          a list of exactly these two
        {str: shape}            a dict with any keys and such values
        {"a": shape, "b?": ..}  a dict with these keys, others are allowed; b may be missing
    """
    if isinstance(shape, tuple):
        if not any(fits(value, each) for each in shape):
            raise ValueError(f"{name} is {shown(value)}")
    elif isinstance(shape, list):
        expect(value, list, name)
        shape, least = (shape[:1], 1) if shape[1:] == [...] else (shape, 0)
        if len(value) < least or len(shape) > 1 and len(value) != len(shape):
            raise ValueError(f"{name} has length {len(value)}")
        for i, each in enumerate(value):
            expect(each, shape[i % len(shape)], f"{name}[{i}]")
    elif isinstance(shape, dict):
        expect(value, dict, name)
        for key, inner in shape.items():
            if key is str:
                for its, each in value.items():
                    expect(its, str, f"a name in {name}")
                    expect(each, inner, its)
            elif key.rstrip("?") in value:
                expect(value[key.rstrip("?")], inner, key.rstrip("?"))
            elif not key.endswith("?"):
                raise ValueError(f"{name} lacks {key}")
    elif not is_a(value, shape):
        raise ValueError(f"{name} is {shown(value)}")


def fits(value, shape):
    try:
        expect(value, shape)
    except ValueError:
        return False
    return True


def is_a(value, kind):
    if kind is None or isinstance(kind, str):
        return value == kind
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if kind in (float, Positive):
        return type(value) in (int, float) and (0 if kind is Positive else -1e300) < value < 1e300
    return type(value) is int if kind is int else isinstance(value, kind)


def shown(value):
    """A short form of a wrong value, for a message."""
    return repr(value)[:40] if isinstance(value, (int, float, str, bool, type(None))) else f"a {type(value).__name__}"


def expect_fields(values, cls):
    """Raise ValueError if a dict does not fit a dataclass: unknown or missing names, a wrong type or choice."""
    hints, shape = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        kind = value_type(hints[f.name])
        shape[f.name + "?" * (f.default is not dataclasses.MISSING)] = kind if kind is hints[f.name] else (kind, None)
    expect(values, shape)
    for f in dataclasses.fields(cls):
        if (choices := f.metadata.get("choices")) and values.get(f.name, choices[0]) not in choices:
            raise ValueError(f"{f.name} is {shown(values[f.name])}")
    if unknown := sorted(map(str, values.keys() - {f.name for f in dataclasses.fields(cls)})):
        raise ValueError(f"it has the unknown entry {unknown[0][:40]}")


def read_json(path, shape, what, hint):
    """Read a JSON file -> its value, checked by expect()."""
    with reading(path, what, hint):
        check_plain(path)
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        expect(value, shape)
    return value


def read_json_lines(path, shape, what, hint):
    """Read a file with one JSON value a line -> the list of values, checked by expect(). Skips a last line that was cut off."""
    with reading(path, what, hint):
        check_plain(path)
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        values = [json.loads(line) for line in lines[:-1]]
        expect(values, [shape])
    return values


# -- pickles and archives ---------------------------------------------------------------------------------------------

UNSAFE = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")  # other ways to name or make an object
TENSORS = r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"


def check_pickle(data, allowed=r"(?!)"):
    """
    Raise ValueError if a pickle names anything except `allowed`, a pattern of "module name". Call it before unpickling.

    Also if an index of the memo is larger than the pickle, since Python reserves memory for all smaller indices.
    """
    for code, argument, _ in pickletools.genops(data):
        if code.name in UNSAFE or (code.name == "GLOBAL" and not re.fullmatch(allowed, argument)):
            raise ValueError(f"it names {argument or code.name}")
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument) > len(data):
            raise ValueError("it is damaged")


def check_archive(path, most=None):
    """Raise ValueError if a zip file would unpack to more than `most` bytes (default: its own size)."""
    with zipfile.ZipFile(path) as archive:
        most = Path(path).stat().st_size if most is None else most
        if archive.comment or (size := sum(entry.file_size for entry in archive.infolist())) > most:
            raise ValueError("it has a comment" if archive.comment else f"it would unpack to {size:,} bytes")
        if most == Path(path).stat().st_size and any(entry.compress_type for entry in archive.infolist()):
            raise ValueError("it is compressed")
        return archive.namelist()


def load_tensors(path):
    """
    Read a file of torch.save: plain containers, numbers, text and tensors on the CPU, mapped from the file. Raises otherwise.

    torch.load with weights_only is not enough: a file can make an array of any size, or declare too long a storage.
    """
    import torch

    names = [name for name in check_archive(path) if name.rpartition("/")[2] == "data.pkl"]
    with zipfile.ZipFile(path) as archive:
        for name in names:
            check_pickle(archive.read(name), TENSORS)
    found = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    check_tensors(found)
    return found


def check_tensors(value):
    """Raise ValueError if a tensor in nested containers uses a stored number twice: it is not writable, and may seem huge."""
    if isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            check_tensors(inner)
    elif hasattr(value, "stride") and str(value.layout) == "torch.strided" and value.numel():
        span = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride()))
        if span < value.numel():
            raise ValueError(f"a tensor of {tuple(value.shape)} repeats its numbers")
