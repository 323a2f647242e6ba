"""Files that are written whole or not at all, and stay so when the power fails; a claim that keeps a second program out."""

import errno
import fcntl
import os
import shutil
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path

from common.cli import fail


@contextmanager
def written_whole(path, hint="make room, or give another name", errors=(OSError, RuntimeError), previous=None):
    """
    Gives a path beside `path` to write a file or a folder to; it takes the place of `path` when the block ends.

    What was written is on the disk before it gets its name. Where writing fails, `path` stays as it was and the program ends
    with one line that says `hint`. errors: what counts as a failure to write; torch raises a RuntimeError where a disk is
    full. previous: the file that was at `path` stays under this name.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)  # of a program that was killed
        yield part
        for file in [*part.rglob("*"), part] if part.is_dir() else [part]:
            flush(file)
        if previous and path.exists():
            keep_as(path, path.with_name(previous))
        os.replace(part, path)
        flush(path.parent)
    except errors as error:
        remove(part)
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:80]
        if "unexpected pos" in why:  # torch's words for a write that fell short
            why = "no space left"
        fail(f"{path} cannot be written ({why}): {hint}")
    except BaseException:
        remove(part)
        raise


def flush(path):
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know no fsync of a folder
            raise
    finally:
        os.close(descriptor)


def keep_as(path, name):
    """Give a file a second name, so that there is a file at `path` at every moment."""
    remove(name)
    try:
        os.link(path, name)
    except OSError:  # a file system without links: for a moment the file has the second name alone
        os.replace(path, name)


def remove(path):
    """Delete a file, a folder or a link, if it is there. What a link leads to stays, even if that is nothing yet."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


class Claim:
    """
    Keeps a second program from writing to the same place while this one lives; it is refused in one line, status 2.

    The lock is the kernel's, so a program that crashed holds none, whatever file it left. A file system without locks is
    written to without one.
    """

    def __init__(self, file, what, hint):
        """file: of the lock, in a folder that exists. what: is claimed, with its flag. hint: what the refused one can do."""
        while True:
            try:
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # no stranger's link
            except OSError as error:
                fail(f"{what} cannot be written ({error.strerror}): {hint}")
            if not lock(descriptor):
                holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
                fail(f"{what} is in use by another program{f', {holder}' if holder else ''}: wait until it ends, or {hint}")
            if is_at(descriptor, file):
                break
            os.close(descriptor)  # its holder has deleted the file since it was opened here
        os.ftruncate(descriptor, 0)
        with suppress(OSError):  # a full disk: the lock holds without a word in its file
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        self.release = weakref.finalize(self, give_up, descriptor, file, os.getpid())


def claim_folder(folder, flag, name=".lock"):
    """Make a folder, and claim it -> Claim. name: of the lock in it."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        fail(f"{flag} {folder} is a file: give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{flag} {folder} cannot be written ({error.strerror}): give another folder")
    return Claim(folder / name, f"{flag} {folder}", f"give another {flag}")


def claim_new(out, kind="file"):
    """Claim the --out of a program, a file or a folder that is not there yet -> Claim. Tried now, not after hours of work."""
    if not out:
        fail(f"--out is empty: give a {kind}")
    path = Path(out).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out} cannot be written ({error.strerror}): choose another {kind}")
    claim = Claim(path.with_name(f".{path.name}.lock"), f"--out {out}", f"choose another {kind}")
    if path.exists():
        fail(f"--out {out} exists: choose another {kind}, or delete it")
    return claim


def lock(descriptor):
    """Whether this process has the lock of a file now."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def is_at(descriptor, file):
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def give_up(descriptor, file, owner):
    """Delete the file of a lock, then let go of it."""
    if os.getpid() == owner:  # a child that was forked has the object too, and no lock
        Path(file).unlink(missing_ok=True)
        os.close(descriptor)
