"""
The folder of a smaller model: surgery.safetensors, the tokenizer's files, and config.json, whose entry "surgery" is the plan.
It says what is smaller: low_rank_folder.py and coded_folder.py each have their own.
"""

import json
from pathlib import Path

from common.files import written_whole

WEIGHTS = "surgery.safetensors"  # not model.safetensors: from_pretrained would fill in what it misses with random numbers


def write_folder(folder, hf, tokenizer, tensors, plan):
    """Write a new folder, whole or not at all -> (numbers, bytes) of its weights. plan: plain JSON."""
    from safetensors.torch import save_file

    hint = "make room, or choose another folder"
    with written_whole(folder, f"--out: {hint}", errors=(Exception,)) as part:  # safetensors raises errors of its own
        part.mkdir()
        save_file(tensors, str(part / WEIGHTS), metadata=dict(format="pt"))
        config = hf.config.to_dict() | dict(surgery=plan)
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        tokenizer.save_pretrained(part)
        if hf.generation_config is not None:
            hf.generation_config.save_pretrained(part)
    return sum(t.numel() for t in tensors.values()), (Path(folder) / WEIGHTS).stat().st_size
