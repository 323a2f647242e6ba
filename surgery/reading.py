"""
A smaller model read from its folder.

    from surgery import load
    model, tokenizer = load("model_weights/smaller")  # a Hugging Face model, with generate() and all else
"""

from pathlib import Path

from common.cli import fail
from surgery import coded_folder, low_rank_folder
from surgery.model_folder import WEIGHTS


def load(folder, device="cpu", packed=True):
    """
    A folder that surgery's --out wrote -> (model, tokenizer); one line and status 2 where it cannot be.

    packed: of a model kept by bits. False decodes it to float at once: faster, and as large as the untouched model.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
        plan = config.surgery
    except (OSError, ValueError, AttributeError):
        fail(f"{folder} has no model that surgery's --out wrote: give its folder")
    if "coded" in plan and packed and str(device) != "cpu":
        fail(f"{folder} is kept by bits, which are read on the CPU: give load(..., packed=False) for {device}")
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    try:
        tensors = load_file(str(Path(folder) / WEIGHTS))
        if "coded" in plan:
            coded_folder.fill(hf, plan, tensors, packed)
        else:
            low_rank_folder.fill(hf, plan, tensors)
    except Exception as error:  # safetensors and torch raise their own
        fail(f"{folder}/{WEIGHTS} does not fit its config.json ({' '.join(str(error).split())[:80]}): write it again")
    return hf.to(device).eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)
