import json
import os

import numpy as np
import pytest

from training.factor_files import json_beside, read_factors, write_factors

V, k, d = 11, 3, 5


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = str(tmp_path / f"wte_pca_k{k}.npy"), str(tmp_path / f"scale_mats_pca_k{k}.npz")
    Z, P = rng.normal(size=(V, k)).astype(np.float32), rng.normal(size=(k, d)).astype(np.float32)
    write_factors(*paths, Z, P, None, dict(k=k))
    return paths, Z, P


def refused(capsys, *args):
    with pytest.raises(SystemExit) as end:
        read_factors(*args)
    assert end.value.code == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1
    return err


def test_what_is_written_is_read_back_by_us_and_by_plain_numpy(files):
    paths, Z, P = files
    got = read_factors(*paths, V, k, d)
    assert np.array_equal(got["wte"], Z) and got["mean"] is None
    assert np.array_equal(got["scale_up"], P) and np.array_equal(got["scale_down"], P)
    wte, scale = np.load(paths[0]), np.load(paths[1])
    assert wte.dtype == scale["scale_up"].dtype == np.float32
    assert wte.shape == (V, k) and scale["scale_up"].shape == scale["scale_down"].shape == (k, d)
    assert sorted(scale) == ["scale_down", "scale_up"]
    assert json_beside(paths[0]).name == f"factors_pca_k{k}.json" and json.loads(json_beside(paths[0]).read_text())["k"] == k


def test_a_mean_row_travels_along(files):
    paths, Z, P = files
    mean = np.arange(d, dtype=np.float32)
    write_factors(*paths, Z, P, mean, {})
    assert np.array_equal(read_factors(*paths, V, k, d)["mean"], mean)


def test_another_rank_names_both_shapes_and_the_flag(files, capsys):
    err = refused(capsys, *files[0], V, 4, d)
    assert "[11, 3]" in err and "[11, 4]" in err and "--n_embd_wte 3" in err


def test_another_vocabulary_or_width(files, capsys):
    assert "[12, 3]" in refused(capsys, *files[0], 12, k, d)
    err = refused(capsys, *files[0], V, k, 6)
    assert "[3, 5]" in err and "[3, 6]" in err and "another model" in err


def test_wrong_orientation(files, capsys):
    paths, Z, P = files
    os.remove(json_beside(paths[0]))
    np.savez(paths[1], scale_up=P.T, scale_down=P)  # as ReaLLMASIC/nanoGPT exports it, and as it imports it
    found = read_factors(*paths, V, k, d)
    assert np.array_equal(found["scale_up"], P) and np.array_equal(found["scale_down"], P)
    err = capsys.readouterr().err
    assert err.count("note") == 1 and "scale_up" in err and "[5,3]" in err and "transposed to [3,5]" in err
    np.savez(paths[1], scale_up=P, scale_down=P)
    np.save(paths[0], Z.T)
    assert "transposed" in refused(capsys, *paths, V, k, d)


def test_files_that_are_no_factor_files(files, capsys, tmp_path):
    paths, Z, P = files
    assert "swapped" in refused(capsys, paths[1], paths[0], V, k, d)
    assert "does not exist" in refused(capsys, str(tmp_path / "none.npy"), paths[1], V, k, d)
    np.savez(paths[1], scale_up=P)
    assert "lacks scale_down" in refused(capsys, *paths, V, k, d)
    with open(paths[0], "wb") as f:
        f.write(b"\x93NUMPY cut short")
    assert "not a factor file" in refused(capsys, *paths, V, k, d)
    np.save(paths[0], np.array([{"a": 1}]), allow_pickle=True)
    assert "not a factor file" in refused(capsys, *paths, V, k, d)


def test_numbers_that_are_not_finite(files, capsys):
    paths, Z, P = files
    Z[0, 0] = np.nan
    np.save(paths[0], Z)
    assert "finite" in refused(capsys, *paths, V, k, d)
