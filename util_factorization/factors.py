"""
Factor files, in the layout that other programs read:

    wte_pca_k{k}.npy          float32 [V,k]
    scale_mats_pca_k{k}.npz   scale_up, scale_down, each [k,d]; mean [d] where the method centres
    factors_pca_k{k}.json     method, V, d, k, source checkpoint, its SHA-256 and tokens, energy kept, errors, spectrum

Methods other than the seeds' own svd replace `pca` in the names. Note that the scale matrices are [k,d] here and
[d,k], their transpose, as weights of the model's Linear(k, d).
"""

import json
from pathlib import Path

import numpy as np

from cli import fail


def method_in_names(method):
    return "pca" if method == "svd" else method


def json_beside(wte_npy):
    """model_weights/pca_factorized/wte_pca_k64.npy -> .../factors_pca_k64.json"""
    path = Path(wte_npy)
    return path.with_name("factors_" + path.stem.removeprefix("wte_") + ".json")


def write_factors(wte_npy, scale_npz, Z, P, mean, facts):
    """Write the three files of one rank; facts goes into the JSON."""
    for path in (wte_npy, scale_npz):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    centre = {} if mean is None else dict(mean=np.asarray(mean))
    with open(wte_npy, "wb") as f:  # an open file, since np.save appends a suffix to names that lack it
        np.save(f, np.asarray(Z))
    with open(scale_npz, "wb") as f:
        np.savez(f, scale_up=np.asarray(P), scale_down=np.asarray(P), **centre)
    json_beside(wte_npy).write_text(json.dumps(facts, indent=1) + "\n")


def read_factors(wte_npy, scale_npz, V, k, d):
    """
    Returns dict(wte [V,k], scale_up [k,d], scale_down [k,d], mean [d] or None), float32.

    Every shape is checked, since at k = d a transposed matrix would load in silence.
    """
    wte = _load(wte_npy, "--import_wte_npy")
    scale = _load(scale_npz, "--import_scale_matrices_npz")
    if isinstance(wte, dict) or not isinstance(scale, dict):
        fail("--import_wte_npy wants the .npy file and --import_scale_matrices_npz the .npz file: are they swapped?")
    for key in ("scale_up", "scale_down"):
        if key not in scale:
            fail(f"{scale_npz} lacks {key}, it has {', '.join(scale) or 'nothing'}: factorize the checkpoint again")
    _check(wte_npy, "wte", wte, (V, k))
    for key in ("scale_up", "scale_down"):
        _check(scale_npz, key, scale[key], (k, d))
    mean = scale.get("mean")
    if mean is not None:
        _check(scale_npz, "mean", mean, (d,))
    return dict(wte=wte, scale_up=scale["scale_up"], scale_down=scale["scale_down"], mean=mean)


def read_facts(wte_npy):
    """The JSON beside a factor file; {} where another program wrote the file and left none."""
    path = json_beside(wte_npy)
    return json.loads(path.read_text()) if path.is_file() else {}


def _load(path, flag):
    try:
        file = np.load(path, allow_pickle=False)
        return dict(file) if isinstance(file, np.lib.npyio.NpzFile) else file
    except FileNotFoundError:
        fail(f"{flag} {path} does not exist: run scripts/run_pca_factorization.sh first")
    except Exception as error:  # numpy raises ValueError, EOFError, BadZipFile, ... for what it cannot read
        fail(f"{flag} {path} is not a factor file ({error}): factorize the checkpoint again")


def _check(path, name, array, expected):
    if array.shape == expected:
        if not np.isfinite(array).all():
            fail(f"{path}: {name} holds numbers that are not finite: factorize the checkpoint again")
        return
    if name == "wte":
        found_rank = array.shape[1] if array.ndim == 2 else None
    else:
        found_rank = array.shape[0] if array.ndim == 2 else None
    if array.shape == expected[::-1]:
        mend = "it is transposed, transpose it back"
    elif found_rank not in (None, expected[name == "wte"]) and array.size % found_rank == 0:
        mend = f"give --n_embd_wte {found_rank}, or factorize at this rank"
    else:
        mend = "it is from another model (vocabulary or --n_embd), factorize this one"
    fail(f"{path}: {name} has shape {list(array.shape)}, the model wants {list(expected)}: {mend}")
