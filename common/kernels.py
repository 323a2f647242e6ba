"""
kernels.c, compiled for this machine's processor when it is first needed. Where there is no compiler, callers use torch.
"""

import ctypes
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
    """The compiled functions, or None, with a word, where they cannot be compiled. Takes a second, once in a process."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        warnings.warn("no C compiler (cc) is here: what is packed is read slowly", stacklevel=2)
        return None
    # torch's own threads: those of a second OpenMP would wait for the same cores
    openmp = [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))[:1]]
    with tempfile.TemporaryDirectory() as folder:  # ours alone: nobody else can put a library there
        made, part = f"{folder}/kernels.so", f"{folder}/kernels.o"
        try:
            for command in (["-c", str(SOURCE), "-o", part, *["-fopenmp"] * len(openmp)], [part, *openmp, "-lm", "-o", made]):
                subprocess.run([compiler, *FLAGS, *command], check=True, capture_output=True, text=True)
            return ctypes.CDLL(made)
        except (subprocess.CalledProcessError, OSError) as error:
            why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
            warnings.warn(f"{compiler} does not compile {SOURCE.name} {why}: what is packed is read slowly", stacklevel=2)
            return None


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
