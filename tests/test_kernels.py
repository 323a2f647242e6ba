"""The compiled loops: where their library is kept, and what happens without a compiler."""

import os
from functools import partial

import pytest

from kernels import build as kernels


def test_without_a_compiler_there_is_a_word(monkeypatch):
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    kernels.library.cache_clear()
    with pytest.warns(UserWarning, match="no C compiler"):
        assert kernels.bind("coded_product") is None
    monkeypatch.undo()
    kernels.library.cache_clear()


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
def test_the_library_is_compiled_once_and_never_read_where_others_write(monkeypatch, tmp_path, request):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-O0"))
    request.addfinalizer(kernels.library.cache_clear)
    ran, compile_ = [], kernels.subprocess.run
    monkeypatch.setattr(kernels.subprocess, "run", lambda *args, **given: (ran.append(1), compile_(*args, **given)))
    request.addfinalizer(partial(os.umask, os.umask(0o002)))  # a compiler's files are open to the group then
    for calls in (2, 2):  # to compile and to link
        kernels.library.cache_clear()
        assert kernels.library() is not None and len(ran) == calls
    (file,) = (tmp_path / "nanopca").iterdir()
    assert kernels.library_file("another", []) not in (None, file)
    (tmp_path / "nanopca").chmod(0o777)
    kernels.library.cache_clear()
    assert kernels.library() is not None and len(ran) == 4
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"no library")
    with monkeypatch.context() as m:
        m.setattr(kernels, "library_file", lambda *given: damaged)
        kernels.library.cache_clear()
        assert kernels.library() is not None and len(ran) == 6 and damaged.read_bytes() == file.read_bytes()

    def no_home(path):
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(kernels.Path, "expanduser", no_home)
    assert kernels.library_file("cc", []) is None
