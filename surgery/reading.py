"""
Load a smaller model from its folder.

    from surgery import load
    model, tokenizer = load("model_weights/smaller")  # a Hugging Face model, with generate() and all its other methods
"""

from importlib import import_module
from pathlib import Path

import torch

from common.cli import fail
from common.hugging_face import check_works, read, read_tokenizer, weightless
from common.modules import check_filled, fresh_memory_is_nan
from common.untrusted import reading
from surgery.model_folder import WEIGHTS, read_plan


def load(folder, device="cpu", packed=True):
    """
    Load a folder that surgery's --out wrote -> (model, tokenizer). If that fails, the program ends in one line, with status 2.

    The folder may come from a stranger. The weights are compared with the model that the config describes before any memory is
    allocated, and no code of the folder runs. packed: applies to quantised models. False decodes the model to float on loading:
    faster, and as large as the untouched model.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(folder) / WEIGHTS
    if not path.is_file() or not path.with_name("config.json").is_file():
        fail(f"{folder} has no model that surgery's --out wrote: give its folder")
    with reading(path, "what its config.json describes", "write the folder again"):
        tensors = load_file(str(path))
        plan, most = read_plan(folder, len(tensors)), 100 + 4 * len(tensors)
        by_bits = "coded" in plan
        kind = import_module(
            "surgery.coded_folder" if by_bits else "surgery.low_rank_folder"
        )  # import only the kind that is needed
        if by_bits and packed and str(device) != "cpu":
            fail(f"{folder} is quantised, and packed models run on the CPU only: give load(..., packed=False) for {device}")
        config = read(AutoConfig, "config", folder, "", local_files_only=True)
        with fresh_memory_is_nan():
            for buffers in (False, True):
                with weightless(most, buffers):
                    hf = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
                if not buffers:
                    kind.check(hf, plan, tensors)
            kind.fill(hf, plan, tensors, *([packed] if by_bits else []))
        check_filled(hf, folder)
        tokenizer, rows = read_tokenizer(folder, "", local_files_only=True), config.get_text_config().vocab_size
        if len(tokenizer) > rows:
            raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, its table {rows}")
        hf.eval().requires_grad_(False)
        if not by_bits:
            kind.turn_to_keys(hf)  # for the CPU; .to(another device) restores the stored latents
        check_works(hf)
    return hf.to(device), tokenizer
