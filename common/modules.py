"""Makes and shares small modules, and checks that every part of a loaded model has been filled."""

import copy
from contextlib import contextmanager

import torch
import torch.nn as nn

from common.cli import fail


@contextmanager
def fresh_memory_is_nan():
    """
    A context in which new memory, for example from torch.empty(), contains NaN.

    Integers get the largest value of their dtype. So check_filled() finds tensors that a reader did not fill.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # torch.utils.deterministic.fill_uninitialized_memory, true by default
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def check_filled(model, source, on_disk=False):
    """
    End in one line if a parameter or a buffer of a model has no memory, or still has the value of fresh_memory_is_nan().

    All numbers must come from the model's file or be computed from its config. Bytes and booleans are not checked, since each
    of their values is valid. source: the model's name in the message. on_disk: some weights may be there, without memory.
    """
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if (t.is_meta and not on_disk) or is_fresh(t):
            fail(f"{source}: {name} has NaN, or comes neither from the file nor from the config: write the file again")


def check_complete(model, info, source):
    """
    check_filled() for the results of from_pretrained(output_loading_info=True). transformers makes missing weights random.

    If accelerate has spread a model over devices, some weights may still be on the disk.
    """
    if missing := sorted(info["missing_keys"]):
        fail(f"{source} lacks {len(missing)} weights, first {missing[0]}: give a complete model")
    if other := sorted(name for name, *_ in info.get("mismatched_keys") or []):
        fail(f"{source} has {other[0]} in another shape than its config: give a complete model")
    check_filled(model, source, on_disk=hasattr(model, "hf_device_map"))


def is_fresh(t):
    if t.is_meta:
        return False
    if t.is_floating_point():
        return bool(t.isnan().any())
    return t.dtype in (torch.int16, torch.int32, torch.int64) and t.numel() > 0 and bool((t == torch.iinfo(t.dtype).max).all())


def linear(weight, bias=None):
    """A Linear with copies of weight [out,in] and bias [out] or None."""
    n_out, n_in = weight.shape
    made = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    made.weight.data.copy_(weight)
    if bias is not None:
        made.bias.data.copy_(bias)
    return made


def shared_copy(module, **children):
    """A copy of a module that shares its parameters and submodules, except for the given children."""
    twin = copy.copy(module)
    twin._modules = module._modules | children
    return twin


class AtTable(nn.Module):
    """A GPT in three calls, split at its stored table wte [V,k] ([V,d] if dense). Vectors in between have width k (or d)."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def lookup(self, idx):
        """Token ids (B, T) -> rows of wte (B, T, k)"""
        return self.gpt.transformer.wte(idx)

    def trunk(self, rows):
        """Rows of wte (B, T, k) -> the input of lm_head (B, T, k)"""
        t = self.gpt.transformer
        return t.scale_down(self.gpt.trunk(t.scale_up(rows)))

    def logits(self, h):
        """The input of lm_head (B, T, k) -> logits (B, T, V)"""
        return self.gpt.lm_head(h)
