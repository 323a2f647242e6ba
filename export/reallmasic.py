"""
Imports our factor files with ReaLLMASIC/nanoGPT's own code, and compares its logits with ours.

    python -m export.reallmasic --checkout path/to/nanoGPT --model model_weights/gpt_baseline \
        --import_wte_npy model_weights/pca_factorized/wte_pca_k128.npy \
        --import_scale_matrices_npz model_weights/pca_factorized/scale_mats_pca_k128.npz

The checkout's code runs in this process.
"""

from dataclasses import asdict, dataclass

from common.cli import fail, finish, flag, parse


@dataclass
class Args:
    checkout: str = flag(help="folder of a ReaLLMASIC/nanoGPT checkout")
    import_wte_npy: str = flag(help="factor file of wte")
    import_scale_matrices_npz: str = flag(help="factor file of the scale matrices")
    model: str = flag("model_weights/gpt_baseline", "dense model that was factorized: run folder or checkpoint")


def factorized(args):
    """The dense model of --model, with the table of the factor files."""
    import numpy as np

    from model import GPT, GPTConfig
    from training import checkpoint
    from training.factor_files import read_factors

    saved = checkpoint.load(args.model)
    config = asdict(GPTConfig(**saved["config"]))
    if config["rotary_pct"] or config["parallel_residual"] or config["activation"] != "gelu" or config["n_embd_wte"]:
        fail(f"--model {args.model}: give a dense GPT-2 (learned positions, gelu), which both repositories have")
    try:
        k = np.load(args.import_wte_npy, mmap_mode="r", allow_pickle=False).shape[1]
    except (OSError, ValueError, IndexError, AttributeError) as error:
        fail(f"--import_wte_npy {args.import_wte_npy} is not a factor file ({type(error).__name__}): factorize the checkpoint")
    files = args.import_wte_npy, args.import_scale_matrices_npz
    factors = read_factors(*files, config["vocab_size"], k, config["n_embd"])
    if factors["mean"] is not None:
        fail(f"{files[1]} has a mean, which ReaLLMASIC/nanoGPT does not add: factorize with --method svd")
    model = GPT(GPTConfig(**config | dict(n_embd_wte=k, dropout=0.0)))
    return checkpoint.start_from(model, saved, args.model, factors).eval()


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__, prog="python -m export.reallmasic")

    import torch

    from benchmarks.nanogpt import check_checkout, reallmasic

    check_checkout(args.checkout, "--checkout")
    ours = factorized(args)
    theirs = reallmasic(args.checkout, ours, args.import_wte_npy, args.import_scale_matrices_npz, "--checkout")
    c = ours.config
    x = torch.randint(c.vocab_size, (4, c.block_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours(x)[0], theirs(x, x)[0]  # without targets it returns only the last position's logits
    apart = (a - b).abs().max().item()
    print(f"{x.numel():,} positions: the logits differ by {apart:.1e} at most; the largest logit is {a.abs().max():.1f}")
    if not apart <= 1e-4 * max(1, a.abs().max().item()):
        raise RuntimeError("the logits differ")
    finish(positions=x.numel(), apart=apart)


if __name__ == "__main__":
    main()
