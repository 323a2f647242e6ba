"""Small modules, how they are made and shared, and whether all of a model has been filled."""

import copy
from contextlib import contextmanager

import torch
import torch.nn as nn

from common.cli import fail


@contextmanager
def fresh_memory_is_nan():
    """
    A context in which memory that nothing has written to yet, as torch.empty() gives it, holds NaN.

    Whole numbers get the largest of their kind. So check_filled() finds what a reader forgot.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # torch.utils.deterministic.fill_uninitialized_memory, true by default
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def check_filled(model, source):
    """
    End in one line if a parameter or a buffer of a model has no memory, or still holds what fresh_memory_is_nan() put there.

    All numbers must come from the file that the model was read from, or be computed from its config. In bytes and booleans no
    value is free to mean "not filled", so they are not checked. source: for the message.
    """
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_meta or is_fresh(t):
            fail(f"{source}: {name} comes neither from the file nor from the config: write the file again")


def check_complete(model, info, source):
    """
    check_filled() for what from_pretrained(output_loading_info=True) returned. transformers draws missing weights at random.

    Of a model that accelerate has spread over devices, some weights may wait on the disk.
    """
    if missing := sorted(info["missing_keys"]):
        fail(f"{source} lacks {len(missing)} weights, first {missing[0]}: give a complete model")
    if not hasattr(model, "hf_device_map"):
        check_filled(model, source)


def is_fresh(t):
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
    """A copy of a module that shares its parameters and submodules, save for the children that are given."""
    twin = copy.copy(module)
    twin._modules = module._modules | children
    return twin


class AtTable(nn.Module):
    """A GPT in three calls, split at its stored table wte [V,k], or [V,d] if dense. What passes between them has its width."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def lookup(self, idx):
        """Token ids (B, T) -> rows of wte (B, T, k)."""
        return self.gpt.transformer.wte(idx)

    def trunk(self, rows):
        """Rows of wte (B, T, k) -> what lm_head reads (B, T, k)."""
        t = self.gpt.transformer
        return t.scale_down(self.gpt.trunk(t.scale_up(rows)))

    def logits(self, h):
        """What lm_head reads (B, T, k) -> logits (B, T, V)."""
        return self.gpt.lm_head(h)
