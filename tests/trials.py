"""
What a reader makes of damaged and hostile versions of its files (mutations.py).

A Case names a reader, the files that it reads and the function that reads them. try_case() writes one mutation after another
over one of the files, reads, and counts what came of it: refused (status 2 and one line), read, or one of four failures.
Every mutation follows from its number alone, so a failure can be repeated.
"""

import io
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from mutations import KINDS

SECONDS = 10  # until a reader counts as hanging
SLACK = 64 * 2**20  # bytes that a reader may take beside twice the files' size: its libraries' own
FATES = ("refused", "read", "traceback", "hang", "memory", "touched")


@dataclass
class Case:
    """
    name    of the reader
    folder  holds honest files, which read() accepts
    files   {name in the folder: a key of KINDS}: each of them is mutated
    read    a function of the folder; what it does is a program's reading
    """

    name: str
    folder: Path
    files: dict
    read: object


@dataclass
class Count:
    name: str
    fates: Counter = field(default_factory=Counter)
    bad: list = field(default_factory=list)  # (what was mutated, fate, words)

    def __str__(self):
        return f"{self.name}: {sum(self.fates.values())} mutations, " + ", ".join(f"{self.fates[f]} {f}" for f in FATES)


class Hang(BaseException):
    """No Exception, so that no reader takes it for a damaged file."""


def try_case(case, number, work, seed=0):
    """`number` mutations of each file of a case, one at a time, in the folder `work` -> Count."""
    count = Count(case.name)
    shutil.rmtree(work, ignore_errors=True)
    (work / "outside").mkdir(parents=True)
    canary, folder = work / "outside" / "canary", work / "inside"
    shutil.copytree(case.folder, folder)
    fate_of(case.read, folder, work)  # what a library makes once is made now
    fate, words = fate_of(case.read, folder, work)
    if fate != "read":
        count.bad.append(("the honest files", fate, words))
        return count
    for name, kind in case.files.items():
        honest = (case.folder / name).read_bytes()
        for what, data in versions(name, kind, honest, number, seed, canary):
            path = folder / name
            if data is None:  # a link to a file outside
                path.unlink()
                path.symlink_to(work / "outside")
            else:
                path.write_bytes(data)
            fate, words = fate_of(case.read, folder, work)
            count.fates[fate] += 1
            if fate not in ("refused", "read"):
                count.bad.append((what, fate, words))
            shutil.rmtree(folder)
            shutil.copytree(case.folder, folder)
            canary.unlink(missing_ok=True)
    return count


def all_survive(work, name, folder, files, read, number=12):
    """
    No mutation makes a reader fail: an assertion. number: mutations of each file; HOSTILE=200 overrules it, HOSTILE_SEED=7
    draws others.

    Prints the counts, and adds them to the file HOSTILE_COUNTS.
    """
    number, seed = int(os.environ.get("HOSTILE", number)), int(os.environ.get("HOSTILE_SEED", 0))
    count = try_case(Case(name, folder, files, read), number, work, seed)
    print(f"\n{count}")
    if "HOSTILE_COUNTS" in os.environ:
        with open(os.environ["HOSTILE_COUNTS"], "a") as lines:
            lines.write(f"{count}\n")
    assert not count.bad, "\n".join(map(str, [count, *count.bad[:20]]))
    assert count.fates["refused"]


def versions(name, kind, honest, number, seed, canary):
    """(what it is, its bytes) of `number` mutations of a file: up to half of them are the hostile ones of its kind."""
    hostile, mutated = KINDS[kind]
    fixed = list(hostile(honest, random.Random(f"{seed} {name}"), canary))
    if len(fixed) > number // 2:
        fixed = random.Random(f"{seed} {name} which").sample(fixed, number // 2)
    yield f"{name}: a link to a folder outside", None
    for i, data in enumerate(fixed):
        yield f"{name}: hostile {i}", data() if callable(data) else data
    for i in range(number - len(fixed) - 1):
        yield f"{name}: random {i}", mutated(honest, random.Random(f"{seed} {name} {i}"))


def fate_of(read, folder, work):
    """What a reader makes of a folder -> (a fate, words about it)."""
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    err, out, before = io.StringIO(), io.StringIO(), peak_memory(reset=True)
    fate, words = "read", ""
    WATCHED.update(work=str(work), seen=[])
    try:
        with at_most(SECONDS), redirect_stderr(err), redirect_stdout(out):
            read(folder)
    except SystemExit as end:
        lines = [line for line in err.getvalue().splitlines() if "error:" in line]
        fate = "refused" if end.code == 2 and len(lines) == 1 else "traceback"
        words = err.getvalue()[-300:] if fate == "traceback" else lines[0]
    except Hang:
        fate = "hang"
    except BaseException as error:
        fate, words = "traceback", f"{type(error).__name__}: {str(error)[:200]} {where(error)}"
    finally:
        seen, WATCHED["work"] = WATCHED["seen"], None
    if seen or (work / "outside" / "canary").exists():
        return "touched", f"{seen}"
    if (grown := peak_memory() - before) > 2 * size + SLACK:
        return "memory", f"{grown:,} bytes for {size:,}; {fate} {words}"
    return fate, words


def where(error):
    """The last line of ours in a traceback."""
    trace, found = error.__traceback__, ""
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if "site-packages" not in file and "tests" not in file:
            found = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


@contextmanager
def at_most(seconds):
    def stop(*_):
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def peak_memory(reset=False):
    """Bytes that this process has had at most, since the last reset where the system can reset it."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


WATCHED = dict(work=None, seen=[])


def watch(event, arguments):
    """An audit hook: programs that are started, and files that are written outside of the folder of the trial."""
    if WATCHED["work"] is None:
        return
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
        if event != "subprocess.Popen" or arguments[1][0] != "git":  # of the commit that a run notes down
            WATCHED["seen"].append(event)
    elif (
        event == "open"
        and isinstance(arguments[0], str)
        and not arguments[0].startswith((WATCHED["work"], "/dev/null", "/proc"))
    ):
        if isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            WATCHED["seen"].append(arguments[0])


sys.addaudithook(watch)
