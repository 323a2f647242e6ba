"""
Shows which use of the table a factorization hurts: the loss without training if only the lookup, only the head, or both use
the factors.

    python util_factorization/which_side.py --ckpt_path model_weights/gpt_baseline --factors model_weights/pca_factorized
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.cli import fail, finish, flag, parse


@dataclass
class Args:
    ckpt_path: str = flag("model_weights/gpt_baseline", "dense checkpoint that was factorized, or its run folder")
    factors: str = flag("model_weights/pca_factorized", "folder of the factor files; all of them are evaluated")
    dataset: str = flag("", "dataset of the validation text; default: the checkpoint's own")


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)

    import torch
    from torch.nn import functional as F

    from common.dataset import Dataset
    from training import checkpoint as ckpt
    from training.factor_files import read_factors, read_facts

    checkpoint = ckpt.load(args.ckpt_path)
    if checkpoint["config"]["n_embd_wte"] is not None or checkpoint["config"].get("lora_rank") is not None:
        fail(f"--ckpt_path {args.ckpt_path} is not a dense model: give the baseline that was factorized")
    if not checkpoint["config"].get("tie_head", True):
        fail(f"--ckpt_path {args.ckpt_path} has an untied head: give the tied baseline that was factorized")
    files = [(p, *re.fullmatch(r"wte_(\w+)_k(\d+)", p.stem).groups()) for p in Path(args.factors).glob("wte_*_k*.npy")]
    if not files:
        fail(f"--factors {args.factors} has no wte_*_k*.npy: run scripts/run_pca_factorization.sh first")
    model = ckpt.build(checkpoint).eval().requires_grad_(False)
    dense, trained_with = model.lm_head.weight, checkpoint["args"]
    iters, batch_size = (trained_with.get(name, default) for name, default in (("eval_iters", 100), ("batch_size", 4)))
    data = Dataset(args.dataset or trained_with["dataset"])
    if data.vocab_size != len(dense):
        fail(f"--dataset {data.folder} has {data.vocab_size} ids, the table {len(dense)}: give the one it was trained on")

    def loss(lookup, head):
        """The model's loss on the run's own fixed windows, with one table [V,d] for the lookup and one for the head."""
        total, tokens = 0.0, 0
        for x, y in data.fixed_windows(iters * batch_size, batch_size, model.config.block_size):
            h = model.trunk(lookup[torch.from_numpy(x)])
            total += F.cross_entropy((h @ head.T).flatten(0, 1), torch.from_numpy(y).flatten(), reduction="sum").item()
            tokens += y.size
        return total / tokens

    print(f"{'':16} {'lookup':>8} {'head':>8} {'both':>8}   (dense: {loss(dense, dense):.4f})")
    rows = []
    for path, method, k in sorted(files, key=lambda file: (int(file[2]), file[1])):
        scale_npz = path.with_name(path.name.replace("wte_", "scale_mats_", 1)).with_suffix(".npz")
        f = read_factors(path, scale_npz, *(dense.shape[0], int(k), dense.shape[1]))
        f = {name: None if value is None else torch.from_numpy(value) for name, value in f.items()}
        lookup, head = f["wte"] @ f["scale_up"], f["wte"] @ f["scale_down"]
        lookup = lookup if f["mean"] is None else lookup + f["mean"]
        losses = dict(lookup=loss(lookup, dense), head=loss(dense, head), both=loss(lookup, head))
        rows.append(dict(method=read_facts(path).get("method", method), k=int(k)) | losses)
        print(f"{method + ' k=' + k:16} " + " ".join(f"{value:8.4f}" for value in losses.values()), flush=True)
    finish(rows=rows)


if __name__ == "__main__":
    main()
