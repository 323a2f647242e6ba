"""
Exports a checkpoint of train.py, or a folder that surgery's --out wrote, as a folder that
AutoModelForCausalLM.from_pretrained() of Hugging Face opens.

    python -m export --model model_weights/gpt_baseline --out gpt --dense
    python -m export --model smaller --out small --compact

--dense writes a standard architecture (GPT-2, GPT-NeoX, or the one that surgery cut) with equal logits: it needs no code of
ours and saves no bytes. --compact keeps the smaller form. It needs trust_remote_code=True, since the folder contains its own
code, modeling_nanopca.py.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse
from common.files import claim_new


@dataclass
class Args:
    model: str = flag(help="run folder or checkpoint of train.py, or folder that surgery's --out wrote")
    out: str = flag(help="a new folder")
    dense: bool = flag(False, "write a standard architecture: equal logits, no bytes saved")
    compact: bool = flag(
        False, "write the smaller form (factors, packed bits, smaller cache), with one file of code beside the weights"
    )
    tokenizer: str = flag("", "hub id, folder or dataset of the tokenizer; default: the model's own")
    dtype: str = flag("float32", "number format of the stored weights", choices=("float32", "bfloat16", "float16"))


def check(args):
    """Refuse contradictions before anything is loaded."""
    if args.dense == args.compact:
        fail(
            "--dense and --compact: give one of them, a standard architecture or the smaller form with code beside the weights"
        )
    if not args.out or Path(args.out).exists():
        fail(f"--out {args.out or '(empty)'} exists: choose another folder, or delete it")
    for package in ("transformers", "safetensors"):
        if importlib.util.find_spec(package) is None:
            fail(f"the package {package} is not installed: pip install {package}")


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__, prog="python -m export")
    check(args)

    from transformers.utils import logging

    from export.sources import read_own, read_smaller
    from export.write import write
    from surgery.folder import WEIGHTS

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    claim = claim_new(args.out, "folder")
    made = (read_smaller if (Path(args.model) / WEIGHTS).is_file() else read_own)(args)
    written = write(args, made)
    claim.release()
    finish(**written)


if __name__ == "__main__":
    main()
