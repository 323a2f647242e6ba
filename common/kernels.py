"""
kernels.c, compiled for this machine's processor when it is first needed. Where there is no compiler, callers use torch.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.c")
WIDEST = 1024  # numbers of a head that its loops over a cache take, as there
LANES = 16  # numbers side by side, at most: 8 or 4 where registers are shorter
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fopenmp-simd",
         "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")  # fmt: skip


@lru_cache
def library():
    """The compiled functions, or None, with a word, where they cannot be compiled. That takes seconds, so kept() is where."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        warnings.warn("no C compiler (cc) is here: what is packed is read slowly", stacklevel=2)
        return None
    # torch's own threads: those of a second OpenMP would wait for the same cores
    openmp = [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))[:1]]
    file = kept(compiler)
    with tempfile.TemporaryDirectory(dir=file and file.parent) as folder:  # nobody else can put a library there
        made, part = f"{folder}/kernels.so", f"{folder}/kernels.o"
        try:
            if file is None or not file.exists():
                compiling = ["-c", str(SOURCE), "-o", part, *["-fopenmp"] * len(openmp)]
                for command in (compiling, [part, *openmp, "-lm", "-o", made]):
                    subprocess.run([compiler, *FLAGS, *command], check=True, capture_output=True, text=True)
                if file:
                    os.replace(made, file)
            return ctypes.CDLL(str(file or made))
        except (subprocess.CalledProcessError, OSError) as error:
            why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
            warnings.warn(f"{compiler} does not compile {SOURCE.name} {why}: what is packed is read slowly", stacklevel=2)
            return None


def kept(compiler):
    """
    Where the library of these sources for this processor is kept, in the user's cache; None where others could put one.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "nanopca"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # no home, or none to write in
        return None
    made_of = repr((compiler, FLAGS, torch.__version__, processor())).encode()
    made_of += b"".join(source.read_bytes() for source in sorted(SOURCE.parent.glob("*.c")))
    ours = found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK)
    return folder / f"kernels_{hashlib.sha256(made_of).hexdigest()[:20]}.so" if ours else None


def processor():
    """What -march=native depends on: a home may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]


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
