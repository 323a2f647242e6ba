"""
Hugging Face out: a checkpoint of train.py, or a folder that surgery's --out wrote -> a folder that
AutoModelForCausalLM.from_pretrained() opens.

    python -m export --model model_weights/gpt_baseline --out gpt --dense
    python -m export --model smaller --out small --compact

--dense is a standard architecture (GPT-2, GPT-NeoX, or the one that surgery cut) with equal logits: no code of ours, no bytes
saved. --compact keeps what is smaller, and needs trust_remote_code=True: modeling_nanopca.py lies beside the weights.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse
from common.files import claim_new


@dataclass
class Args:
    model: str = flag(help="a run folder or checkpoint of train.py, or a folder that surgery's --out wrote")
    out: str = flag(help="a new folder")
    dense: bool = flag(False, "a standard architecture: equal logits, no bytes saved")
    compact: bool = flag(False, "factors, packed bits and the smaller cache, with one file of code beside the weights")
    tokenizer: str = flag("", "hub id, folder or dataset; left out, the model's own")
    dtype: str = flag("float32", "of the numbers that are stored", choices=("float32", "bfloat16", "float16"))


def check(args):
    """Refuse contradictions before anything is loaded."""
    if args.dense == args.compact:
        fail("there are two forms: give --dense (a standard architecture) or --compact (smaller, with code beside the weights)")
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
    from surgery.model_folder import WEIGHTS

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    claim = claim_new(args.out, "folder")
    made = (read_smaller if (Path(args.model) / WEIGHTS).is_file() else read_own)(args)
    written = write(args, made)
    claim.release()
    finish(**written)


if __name__ == "__main__":
    main()
