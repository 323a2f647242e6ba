"""
Reads and writes factor files, in a layout that other programs read too:

    wte_pca_k{k}.npy          float32 [V,k]
    scale_mats_pca_k{k}.npz   scale_up, scale_down, each [k,d]; mean [d] if the method centres
    factors_pca_k{k}.json     method, V, d, k, source checkpoint, its SHA-256 and tokens, energy kept, errors, spectrum

Method svd is the PCA of the original scripts. Other methods put their name in place of `pca`. The scale matrices are [k,d]
here; as weights of the model's Linear(k, d) they are [d,k].
"""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

from common.cli import fail
from common.files import written_whole
from common.untrusted import COUNT, check_archive, read_json, reading

AGAIN = "factorize the checkpoint again"
FACTS = {
    "sha256?": dict(wte=str, scale_mats=str),
    "ckpt_tokens?": (COUNT, None),
    "method?": str,
}  # entries of the JSON that are read


def method_in_names(method):
    return "pca" if method == "svd" else method


def json_beside(wte_npy):
    """model_weights/pca_factorized/wte_pca_k64.npy -> .../factors_pca_k64.json"""
    path = Path(wte_npy)
    return path.with_name("factors_" + path.stem.removeprefix("wte_") + ".json")


def write_factors(wte_npy, scale_npz, Z, P, mean, facts):
    """
    Write the three files of one rank: Z [V,k], P [k,d], mean [d] or None. The JSON gets facts and the hashes of the files.

    Each file is written completely or not at all. The wte file gets its name last: if it exists, so do the others.
    """
    hint, centre = "give another name, or make room", {} if mean is None else dict(mean=np.asarray(mean))
    with written_whole(wte_npy, hint) as wte_part:
        with open(wte_part, "wb") as f:  # an open file: numpy adds a suffix to names without one
            np.save(f, np.asarray(Z))
        with written_whole(scale_npz, hint) as part, open(part, "wb") as f:
            np.savez(f, scale_up=np.asarray(P), scale_down=np.asarray(P), **centre)
        facts = facts | dict(sha256=dict(wte=sha256(wte_part), scale_mats=sha256(scale_npz)))
        with written_whole(json_beside(wte_npy), hint) as part:
            part.write_text(json.dumps(facts, indent=1) + "\n")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_factors(wte_npy, scale_npz, V, k, d, tied=False):
    """
    Returns dict(wte [V,k], scale_up [k,d], scale_down [k,d], mean [d] or None), float32. tied: scale_up and scale_down must be
    equal.

    ReaLLMASIC/nanoGPT exports scale matrices as [d,k]. We transpose them and print a note. At k = d the two layouts cannot be
    distinguished.
    """
    most = 16 * (2 * k + 1) * d + 2**16  # bytes: the widest floats, plus headers
    wte, scale = (
        _load(path, f"--import_{name}", most) for path, name in ((wte_npy, "wte_npy"), (scale_npz, "scale_matrices_npz"))
    )
    if isinstance(wte, dict) or not isinstance(scale, dict):
        fail("--import_wte_npy wants the .npy file and --import_scale_matrices_npz the .npz file: are they swapped?")
    for key in ("scale_up", "scale_down"):
        if key not in scale:
            fail(f"{scale_npz} lacks {key}, it has {', '.join(scale) or 'nothing'}: factorize the checkpoint again")
        if scale[key].shape == (d, k) != (k, d):
            print(
                f"note: {scale_npz}: {key} is [{d},{k}], as ReaLLMASIC/nanoGPT exports it: transposed to [{k},{d}]",
                file=sys.stderr,
            )
            scale[key] = scale[key].T
    _check(wte_npy, "wte", wte, (V, k))
    for key in ("scale_up", "scale_down"):
        _check(scale_npz, key, scale[key], (k, d))
    mean = scale.get("mean")
    if mean is not None:
        _check(scale_npz, "mean", mean, (d,))
    if tied and not np.array_equal(scale["scale_up"], scale["scale_down"]):
        fail(f"{scale_npz}: scale_up and scale_down differ, so one tensor cannot hold both: drop --n_embd_wte_scale_tying")
    hashes = read_facts(wte_npy).get("sha256")
    if hashes and hashes != dict(wte=sha256(wte_npy), scale_mats=sha256(scale_npz)):
        fail(
            f"--import_wte_npy {wte_npy} and --import_scale_matrices_npz {scale_npz} are not the pair that "
            f"{json_beside(wte_npy).name} describes: give both files of one factorization"
        )
    return dict(wte=wte, scale_up=scale["scale_up"], scale_down=scale["scale_down"], mean=mean)


def read_facts(wte_npy):
    """The facts in the JSON beside a factor file. {} if there is no JSON: another program wrote the file."""
    path = json_beside(wte_npy)
    return read_json(path, FACTS, "what pca_factorize_wte.py writes", AGAIN) if path.is_file() else {}


def _load(path, flag, most):
    """Load an array, or a dict of arrays. most: largest size of an archive after decompression, in bytes."""
    if not Path(path).is_file():
        fail(f"{flag} {path} does not exist: run scripts/run_pca_factorization.sh first")
    with reading(f"{flag} {path}", "a factor file", AGAIN):
        if zipfile.is_zipfile(path):
            check_archive(path, most)
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in ("scale_up", "scale_down", "mean") if name in file}
        return np.array(
            np.load(path, allow_pickle=False, mmap_mode="r")
        )  # mapping fails if the header claims more than the file holds


def _check(path, name, array, expected):
    if array.shape == expected:
        if array.dtype.kind != "f" or not np.isfinite(array).all() or not np.isfinite(array.astype(np.float32)).all():
            fail(f"{path}: {name} has numbers that are not finite floats: factorize the checkpoint again")
        return
    if name == "wte":
        found_rank = array.shape[1] if array.ndim == 2 else None
    else:
        found_rank = array.shape[0] if array.ndim == 2 else None
    if array.shape == expected[::-1]:
        hint = "it is transposed, transpose it back"
    elif found_rank and found_rank != expected[name == "wte"] and array.size % found_rank == 0:
        hint = f"give --n_embd_wte {found_rank}, or factorize at this rank"
    else:
        hint = "it belongs to another model (vocabulary or --n_embd), factorize this one"
    fail(f"{path}: {name} has shape {list(array.shape)}, the model wants {list(expected)}: {hint}")
