"""
Merges the adapters of a LoRA checkpoint into its weights. The result has the size of the base model and the same logits.

    python util_factorization/merge_lora.py --ckpt_path model_weights/gpt_pca_lora_k64 --out merged.pt
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.cli import fail, finish, flag, parse
from common.files import claim_new


@dataclass
class Args:
    ckpt_path: str = flag(help="checkpoint with adapters, or the run folder that holds ckpt.pt")
    out: str = flag(help="file to write; an existing file is not overwritten")


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)

    from training import checkpoint as ckpt

    checkpoint = ckpt.load(args.ckpt_path, hint="give the ckpt.pt of a run with --lora_rank")
    if checkpoint["config"].get("lora_rank") is None:
        fail(f"--ckpt_path {args.ckpt_path} has no adapters, or they are merged: give the ckpt.pt of a run with --lora_rank")
    claim = claim_new(args.out)
    model = ckpt.build(checkpoint)
    before = model.count_parameters()
    model.merge_lora()
    kept = ("args", "iter_num", "data_step", "tokens", "starts_from", "val_loss")
    facts = {name: checkpoint[name] for name in kept if name in checkpoint}
    facts["args"] = facts["args"] | dict(lora_rank=None)
    ckpt.save_new(args.out, model, **facts)
    claim.release()
    after = model.count_parameters()
    print(f"{args.ckpt_path}: {before['adapters']:,} adapter parameters merged, {after['total']:,} parameters stored")
    finish(out=args.out, adapters_merged=before["adapters"], parameters=after)


if __name__ == "__main__":
    main()
