"""Files that are written whole or not at all."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from common.cli import fail


@contextmanager
def written_whole(path, hint="make room, or give another name", errors=(OSError, RuntimeError)):
    """
    Gives a path beside `path` to write a file or a folder to; it takes the place of `path` when the block ends.

    Where writing fails, `path` stays as it was and the program ends with one line that says `hint`. errors: what counts as a
    failure to write; torch raises a RuntimeError where a disk is full.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)  # of a program that was killed
        yield part
        os.replace(part, path)
    except errors as error:
        remove(part)
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:80]
        fail(f"{path} cannot be written ({why}): {hint}")
    except BaseException:
        remove(part)
        raise


def remove(path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()
