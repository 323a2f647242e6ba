"""Writes files completely or not at all, even if the power fails. A claim on a folder keeps a second program out of it."""

import errno
import os
import shutil
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path

from common.cli import fail


@contextmanager
def written_whole(path, hint="make room, or give another name", errors=(OSError, RuntimeError), previous=None):
    """
    A context that gives a temporary path in the same folder. Write a file or a folder there; at the end it replaces `path`.

    The content is on the disk before it gets its final name. If writing fails, `path` stays unchanged, and the program ends
    with one line that contains `hint`. errors: exceptions that mean a failed write; torch raises a RuntimeError if a disk is
    full. previous: the old file at `path` is kept under this name.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)  # left by a program that was killed
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
        if "unexpected pos" in why:  # torch's message for an incomplete write
            why = "no space left"
        fail(f"{path} cannot be written ({why}): {hint}")
    except BaseException:
        remove(part)
        raise


def flush(path):
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no fsync of a folder
            raise
    finally:
        os.close(descriptor)


def keep_as(path, name):
    """Give a file a second name, so that `path` exists at every moment."""
    remove(name)
    try:
        os.link(path, name)
    except OSError:  # no links on this file system: for a moment the file has only the second name
        os.replace(path, name)


def remove(path):
    """Delete a file, a folder or a link, if it exists. A link is deleted even without a target; its target never is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


try:
    import fcntl
except ImportError:
    raise SystemExit("nanoPCA runs on Linux and macOS. On Windows, use WSL: https://learn.microsoft.com/windows/wsl") from None


class Claim:
    """
    Keeps a second program from writing to the same place while this program runs. The second one ends with one line, status 2.

    The kernel holds the lock, so a crashed program holds none, even if its lock file is still there. On a file system without
    locks, the program writes without one.
    """

    def __init__(self, file, what, hint):
        """file: the lock's, in an existing folder. what: the claimed place, with its flag. hint: what a refused user can do."""
        while True:
            try:
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # never follow a link
            except OSError as error:
                fail(f"{what} cannot be written ({error.strerror}): {hint}")
            if not lock(descriptor):
                holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
                fail(f"{what} is in use by another program{f', {holder}' if holder else ''}: wait until it ends, or {hint}")
            if is_at(descriptor, file):
                break
            os.close(descriptor)  # its holder deleted the file after it was opened here
        os.ftruncate(descriptor, 0)
        with suppress(OSError):  # on a full disk the lock works without text in its file
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        self.release = weakref.finalize(self, give_up, descriptor, file, os.getpid())


def claim_folder(folder, flag, name=".lock"):
    """Make a folder and claim it -> Claim. name: the name of the lock file in it."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        fail(f"{flag} {folder} is a file: give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{flag} {folder} cannot be written ({error.strerror}): give another folder")
    return Claim(folder / name, f"{flag} {folder}", f"give another {flag}")


def claim_new(out, kind="file"):
    """Claim a program's --out, a file or folder that must not exist -> Claim. This fails before hours of work, not after."""
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
    """Try to lock a file -> whether this process has the lock now."""
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
    """Delete the file of a lock, then release the lock."""
    if os.getpid() == owner:  # a forked child has the object too, but not the lock
        Path(file).unlink(missing_ok=True)
        os.close(descriptor)
