"""
kernels.c, compiled for this machine's processor when it is first needed. Where there is no compiler, callers use torch.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from stat import S_ISLNK

import torch

SOURCE = Path(__file__).with_name("kernels.c")
WIDEST = 1024  # numbers of a head that its loops over a cache take, as there
LANES = 16  # numbers side by side, at most: 8 or 4 where registers are shorter
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fopenmp-simd",
         "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")  # fmt: skip
CPU = ("model name", "flags", "Features", "CPU part", "CPU implementer")  # lines of /proc/cpuinfo that tell processors apart


@lru_cache
def library():
    """
    The compiled functions, or None, with a word, where they cannot be compiled.

    To compile takes seconds, so the library stays in the file that library_file() names.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        warnings.warn("no C compiler (cc) is here: what is packed is read slowly", stacklevel=2)
        return None
    # torch's own threads: those of a second OpenMP would wait for the same cores
    openmp = [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))[:1]]
    file = library_file(compiler, openmp)
    try:
        if file and file.exists():
            return ctypes.CDLL(str(file))
    except OSError:  # damaged
        pass
    try:
        with tempfile.TemporaryDirectory() as folder:  # ours alone: nobody else can put a library there
            made, part = f"{folder}/kernels.so", f"{folder}/kernels.o"
            compiling = ["-c", str(SOURCE), "-o", part, *["-fopenmp"] * len(openmp)]
            for command in (compiling, [part, *openmp, "-lm", "-o", made]):
                subprocess.run([compiler, *FLAGS, *command], check=True, capture_output=True, text=True)
            if file:
                keep(made, file)
            return ctypes.CDLL(made)
    except (subprocess.CalledProcessError, OSError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        warnings.warn(f"{compiler} does not compile {SOURCE.name} {why}: what is packed is read slowly", stacklevel=2)
        return None


def library_file(compiler, openmp):
    """
    The file of these sources' library for this processor, in the user's cache. None where others can write there, or the
    processor is not known.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "nanopca"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # what -march=native depends on: machines may share a home
        cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(CPU)]
    except (OSError, RuntimeError):  # no home, none to write in, or no Linux
        return None
    made_of = repr((compiler, openmp, FLAGS, torch.__version__, sorted(set(cpu)))).encode()
    made_of += b"".join(source.read_bytes() for source in sorted(SOURCE.parent.glob("*.c")))
    file = folder / f"kernels_{hashlib.sha256(made_of).hexdigest()[:20]}.so"
    found = [path.lstat() for path in (folder, file) if os.path.lexists(path)]
    ours = all(stat.st_uid == os.getuid() and not S_ISLNK(stat.st_mode) and not stat.st_mode & 0o022 for stat in found)
    return file if cpu and ours else None


def keep(made, file):
    """Copy a library to its file, whole or not at all, where that can be. Nobody else may read it."""
    part = None
    try:
        number, part = tempfile.mkstemp(dir=file.parent)
        with open(number, "wb") as out:
            out.write(Path(made).read_bytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
    except OSError:
        if part:
            Path(part).unlink(missing_ok=True)


def bind(name, *first):
    """
    A function of library() with its first arguments given, or None where there is no library.

    A tensor, contiguous, stands for the address of its numbers; a list of tensors for an array of addresses. None stands for
    null, in a list too; a number for an int or a float.
    """
    if library() is None:
        return None
    function, converted = library()[name], [as_c(value) for value in first]

    def call(*rest, kept=first):  # kept: the tensors live as long as their addresses
        function(*converted, *map(as_c, rest))

    return call


def as_c(value):
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous() and value.device.type == "cpu"
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, list):
        return (ctypes.c_void_p * len(value))(*(None if item is None else item.data_ptr() for item in value))
    return value
