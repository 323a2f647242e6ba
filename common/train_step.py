"""The parts of one training step that train.py and bench.py share."""

from contextlib import nullcontext

import torch


def autocast_of(device, dtype):
    """A context for the forward pass in an arithmetic, e.g. "bfloat16"."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.split(":")[0], getattr(torch, dtype))


def to_device(tensors, device):
    """Copy tensors to the device. From pinned memory, the copy to a card overlaps with the step before."""
    if device.startswith("cuda"):
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]


def trained_flops(model, T):
    """
    FLOPs that training needs for a token at context T: forward and backward.

    Backward costs one forward for the activations' gradients, and one for the trained weights'.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (2 + trained / model.count_parameters()["total"]) * model.flops_per_token(T)["total"]
