"""
Compiles kernels.c for this machine's processor on first use. If there is no compiler, callers use torch.
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
WIDEST = 1024  # most numbers per head for the loops over a cache, the same as in kernels.c
LANES = 16  # floats in a register, at most: 8 or 4 on processors with shorter registers
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fopenmp-simd",
         "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")  # fmt: skip
CPU = ("model name", "flags", "Features", "CPU part", "CPU implementer")  # lines of /proc/cpuinfo that distinguish processors


@lru_cache
def library():
    """
    The compiled functions. None, with a warning, if they cannot be compiled.

    Compilation takes seconds, so the library is kept in the file that library_file() names.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        warnings.warn("no C compiler (cc) found: packed weights and caches are read slowly", stacklevel=2)
        return None
    # use torch's OpenMP: threads of a second one would compete for the same cores
    openmp = [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))[:1]]
    file = library_file(compiler, openmp)
    try:
        if file and file.exists():
            return ctypes.CDLL(str(file))
    except OSError:  # damaged
        pass
    try:
        with tempfile.TemporaryDirectory() as folder:  # private: nobody else can put a library there
            made, part = f"{folder}/kernels.so", f"{folder}/kernels.o"
            compiling = ["-c", str(SOURCE), "-o", part, *["-fopenmp"] * len(openmp)]
            for command in (compiling, [part, *openmp, "-lm", "-o", made]):
                subprocess.run([compiler, *FLAGS, *command], check=True, capture_output=True, text=True)
            if file:
                keep(made, file)
            return ctypes.CDLL(made)
    except (subprocess.CalledProcessError, OSError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        warnings.warn(f"{compiler} cannot compile {SOURCE.name} {why}: packed weights and caches are read slowly", stacklevel=2)
        return None


def library_file(compiler, openmp):
    """
    The file in the user's cache for the library of these sources and this processor. None if other users can write there, or
    if the processor is unknown.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "nanopca"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # -march=native depends on the processor, and machines may share a home
        cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(CPU)]
    except (OSError, RuntimeError):  # no home, not writable, or no Linux
        return None
    made_of = repr((compiler, openmp, FLAGS, torch.__version__, sorted(set(cpu)))).encode()
    made_of += b"".join(source.read_bytes() for source in sorted(SOURCE.parent.glob("*.c")))
    file = folder / f"kernels_{hashlib.sha256(made_of).hexdigest()[:20]}.so"
    found = [path.lstat() for path in (folder, file) if os.path.lexists(path)]
    ours = all(stat.st_uid == os.getuid() and not S_ISLNK(stat.st_mode) and not stat.st_mode & 0o022 for stat in found)
    return file if cpu and ours else None


def keep(made, file):
    """Copy a library to its file, atomically; do nothing if that fails. Only the user may read it."""
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
    A function of library() with its first arguments bound, or None if there is no library.

    Arguments: a contiguous tensor becomes its address, a list of tensors an array of addresses, None a null pointer (also in a
    list), a number an int or a float.
    """
    if library() is None:
        return None
    function, converted = library()[name], [as_c(value) for value in first]

    def call(*rest, kept=first):  # kept: keeps the tensors alive while their addresses are used
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
