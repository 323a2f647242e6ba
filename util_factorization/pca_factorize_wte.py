"""
Factorizes the token table of a checkpoint: one decomposition, then a pair of factor files for every rank.

    python util_factorization/pca_factorize_wte.py --ckpt_path model_weights/gpt_baseline/ckpt.pt --rank_k 64,128,256

train.py imports the files with --import_wte_npy and --import_scale_matrices_npz.
"""

import hashlib
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.cli import fail, finish, flag, parse
from util_factorization import JOINT_LAMBDA, METHODS, MOMENTS, reads_text
from util_factorization.import_hf import read_checkpoint

FOLDER = "model_weights/pca_factorized"
CALIB_TOKENS = 131072  # for the laptop's model, 8,192 already give the same losses to 0.01


def methods_with(*needs):
    """The methods that need one of these, for --help."""
    return ", ".join(method for method in METHODS if not set(needs).isdisjoint(METHODS[method]))


@dataclass
class Args:
    ckpt_path: str = flag(
        "model_weights/gpt_baseline/ckpt.pt",
        "checkpoint, run folder with ckpt.pt, or a GPT-2 of Hugging Face (hub id or folder)",
    )
    rank_k: str = flag("64,128,256", "ranks, comma-separated; a number with a point (0.9) is the share of the energy to keep")
    out_wte_npy: str = flag(FOLDER + "/wte_{method}_k{k}.npy", "file for wte; {k} is replaced by the rank")
    out_scale_npz: str = flag(
        FOLDER + "/scale_mats_{method}_k{k}.npz", "file for the scale matrices; {k} is replaced by the rank"
    )
    method: str = flag("svd", "method of decompose_table.py; svd is the PCA of the original scripts", choices=tuple(METHODS))
    dataset: str = flag(
        "",
        f"dataset whose tokens are counted, for {methods_with('counts')}; default: the checkpoint's own, if it is there",
    )
    calib_dataset: str = flag(
        "", f"dataset whose training text {methods_with(*MOMENTS)} read; default: the dataset of the token counts"
    )
    calib_tokens: int | None = flag(
        None, f"calibration tokens, in evenly spaced windows; default: {CALIB_TOKENS}, or all if fewer", low=1
    )
    joint_lambda: float = flag(JOINT_LAMBDA, "weight of the lookup relative to the head, for joint", above=0)
    device: str = flag("cpu", "device for calibration and decomposition: cpu or cuda")


def parse_ranks(text, d):
    """'64,0.9' -> [64, 0.9], each checked."""
    ranks = []
    for part in text.split(","):
        try:
            rank = float(part) if "." in part else int(part)
        except ValueError:
            fail(f"--rank_k {text}: {part!r} is neither a rank nor a share of the energy: give for example 64 or 0.9")
        if isinstance(rank, float) and not 0 < rank <= 1:
            fail(f"--rank_k {part}: a share of the energy is above 0 and at most 1: change it")
        if isinstance(rank, int) and not 1 <= rank <= d:
            fail(f"--rank_k {part}: the table's rank is between 1 and {d}: change it")
        ranks.append(rank)
    return ranks


def check_names(args, given, n_ranks):
    """Refuse file names if one file would overwrite another."""
    if ("out_wte_npy" in given) != ("out_scale_npz" in given):
        fail("--out_wte_npy and --out_scale_npz name a pair: give both or none")
    for name in ("out_wte_npy", "out_scale_npz"):
        path = getattr(args, name)
        if set(re.findall(r"{(.*?)}", path)) - {"k", "method"}:
            fail(f"--{name} {path}: only {{k}} and {{method}} can be filled in: drop the other braces")
        if n_ranks > 1 and "{k}" not in path:
            fail(f"--{name} {path} is one file for {n_ranks} ranks: put {{k}} into the name")
    if args.out_wte_npy == args.out_scale_npz:
        fail(f"--out_wte_npy and --out_scale_npz are both {args.out_wte_npy}: give two names")


def calibration(args, checkpoint, dataset):
    """(C and G or None of the checkpoint's model as in calibrate.py, facts about the calibration text)."""
    from common.dataset import Dataset
    from training import checkpoint as ckpt
    from util_factorization.calibrate import calibrate

    text = Dataset(args.calib_dataset, "--calib_dataset") if args.calib_dataset else dataset
    T, V = checkpoint["config"]["block_size"], checkpoint["config"]["vocab_size"]
    if text.vocab_size != V:
        fail(f"--calib_dataset {text.folder} has {text.vocab_size} ids, the table {V}: give text of the same tokenizer")
    available = (len(text.train) - 1) // T
    if (args.calib_tokens or 0) > available * T:
        fail(
            f"--calib_tokens {args.calib_tokens}: {text.folder / 'train.bin'} has {available * T} tokens in full windows "
            f"of {T}: lower it or give more text"
        )
    count = min(-(-(args.calib_tokens or CALIB_TOKENS) // T), available)
    d = checkpoint["config"]["n_embd"]
    if count * T < 2 * d:
        more = "--calib_tokens" if available * T >= 2 * d else f"--calib_dataset {text.folder}"
        fail(f"{more}: {count * T} tokens in full windows of {T} are too few for {d} directions: give {2 * d} or more")
    windows = text.fixed_windows(count, max(1, 4096 // T), T, split="train")
    C, G = calibrate(ckpt.build(checkpoint), windows, args.device, gradients="lookup" in METHODS[args.method])
    facts = dict(calib_dataset=text.folder.name, calib_tokens=count * T)
    return C, G, facts | (dict(joint_lambda=args.joint_lambda) if args.method == "joint" else {})


def read_dense(ckpt_path):
    """(The file or source, its checkpoint). An error unless the token table is dense, tied and without adapters."""
    from common.hugging_face import is_hub_id
    from training import checkpoint as ckpt

    path = Path(ckpt_path)
    if is_hub_id(ckpt_path) or (path / "config.json").is_file() and not (path / "ckpt.pt").is_file():
        model, facts = read_checkpoint(ckpt_path, "--ckpt_path")
        checkpoint = dict(model=model.state_dict(), config=asdict(model.config), **facts)
    else:
        path = path / "ckpt.pt" if path.is_dir() else path
        checkpoint = ckpt.load(path)
    if checkpoint["config"].get("lora_rank") is not None:
        fail(f"--ckpt_path {path} has adapters: merge them first (util_factorization/merge_lora.py)")
    if checkpoint["config"]["n_embd_wte"] is not None:
        fail(f"--ckpt_path {path} has a factorized table already: give the dense baseline's checkpoint")
    if not checkpoint["config"].get("tie_head", True):
        fail(f"--ckpt_path {path} has an untied head, but factors need a tied table: give a tied model's checkpoint")
    return path, checkpoint


def token_counts(args, checkpoint):
    """(The dataset or None, counts [V] or None). An error if the method needs counts and there are none."""
    import torch

    from common.dataset import Dataset, find_folder

    V, name = checkpoint["config"]["vocab_size"], args.dataset or checkpoint["args"]["dataset"]
    calibrated = reads_text(args.method) and not args.calib_dataset
    required, folder = bool(args.dataset) or calibrated or "counts" in METHODS[args.method], find_folder(name)
    if not required and not (folder and (folder / "meta.pkl").is_file()):
        return None, None
    dataset = Dataset(name)
    if dataset.vocab_size == V:
        return dataset, torch.from_numpy(dataset.counts())
    if required:
        fail(f"--dataset {dataset.folder} has {dataset.vocab_size} ids, the table {V}: give the one it was trained on")
    return None, None


def check_method(args, given):
    """Refuse flags that the method does not read."""
    if not reads_text(args.method) and not {"calib_dataset", "calib_tokens"}.isdisjoint(given):
        fail(f"--method {args.method} reads no calibration text: drop --calib_dataset and --calib_tokens")
    if args.method != "joint" and "joint_lambda" in given:
        fail(f"--joint_lambda has no effect in --method {args.method}: give --method joint, or drop it")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        fail(f"--device {args.device}: give cpu or cuda")


def main(argv=None):
    args, given = parse(Args, argv, description=__doc__)
    check_method(args, given)
    path, checkpoint = read_dense(args.ckpt_path)
    table = checkpoint["model"]["transformer.wte.weight"]
    V, d = table.shape
    asked = parse_ranks(args.rank_k, d)
    check_names(args, given, len(asked))

    import numpy as np
    import torch

    from common.plots import draw, scree
    from training.factor_files import method_in_names, sha256, write_factors
    from util_factorization.decompose_table import decompose

    if args.device != "cpu" and not torch.cuda.is_available():
        fail(f"--device {args.device}: there is no CUDA device here: give --device cpu")
    dataset, counts = token_counts(args, checkpoint)
    C, G, source = calibration(args, checkpoint, dataset) if reads_text(args.method) else (None, None, {})
    decomposition = decompose(table, args.method, counts, C, G, args.joint_lambda, args.device)

    ranks = [rank if isinstance(rank, int) else decomposition.rank_for(rank) for rank in asked]
    per_row = decomposition.relative_errors(ranks)
    per_token = [None] * len(ranks) if counts is None else decomposition.relative_errors(ranks, counts)
    digest = sha256(path) if path.is_file() else hashlib.sha256(table.detach().numpy().tobytes()).hexdigest()
    source |= dict(method=args.method, V=V, d=d, ckpt_path=str(path), ckpt_sha256=digest, ckpt_tokens=checkpoint["tokens"])
    source |= dict(versions=dict(torch=torch.__version__, numpy=np.__version__))
    source |= dict(singular_values=[float(f"{s:.6g}") for s in decomposition.S[:d]])
    print(f"{path}: table {V} x {d}, method {args.method}")
    print(f"{'rank':>6} {'energy':>8} {'error/row':>10} {'error/token':>12} {'parameters':>12} {'compression':>12}")
    rows = []
    for k, row_error, token_error in zip(ranks, per_row, per_token, strict=True):
        Z, P, mean = decomposition.factors(k)
        parameters = V * k + 2 * k * d + (0 if mean is None else d)
        errors = dict(relative_error=row_error, relative_error_per_token=token_error)
        facts = dict(k=k, energy=decomposition.energy(k), **errors, parameters=parameters, compression=V * d / parameters)
        names = dict(k=k, method=method_in_names(args.method))
        wte_npy, scale_npz = args.out_wte_npy.format(**names), args.out_scale_npz.format(**names)
        write_factors(wte_npy, scale_npz, Z, P, mean, source | facts)
        rows.append(facts | dict(wte_npy=wte_npy, scale_npz=scale_npz))
        shown = "-" if token_error is None else f"{token_error:.4f}"
        cost = f"{parameters:>12,} {facts['compression']:>11.2f}x"
        print(f"{k:>6} {facts['energy']:>8.1%} {row_error:>10.4f} {shown:>12} {cost}")

    name, folder = f"scree_{method_in_names(args.method)}", Path(rows[-1]["wte_npy"]).parent
    spectra = {args.method: decomposition.S[:d].tolist()}
    draw(folder, scree(name, spectra, ranks, "Spectrum of the token table"))
    finish(method=args.method, V=V, d=d, scree=str(folder / f"{name}.png"), ranks=rows)


if __name__ == "__main__":
    main()
