"""The parts of one training step that train.py and bench.py share."""

from contextlib import nullcontext

import torch
from torch.distributed import all_reduce

from common.cli import reason
from training.device import out_of_memory


def autocast_of(device, dtype):
    """A context for the forward pass in an arithmetic, e.g. "bfloat16"."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.split(":")[0], getattr(torch, dtype))


def to_device(tensors, device):
    """Copy tensors to the device. From pinned memory, the copy to a card overlaps with the step before."""
    if device.startswith("cuda"):
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]


def why_it_does_not_compile(first_pass):
    """
    Call what makes torch compile, a first forward and backward pass -> None, or in a few words why the compiler failed.

    The random numbers stay as they were. Too little memory is not the compiler's fault: it stays an error.
    """
    cards = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(cards):
            first_pass()
    except Exception as error:  # Dynamo, Inductor, Triton and a C++ compiler each raise errors of their own
        if out_of_memory(error):
            raise
        return reason(str(error).split("\n\n")[0])  # advice for torch's developers follows


def trained_flops(model, T):
    """
    FLOPs that training needs for a token at context T: forward and backward.

    Backward costs one forward for the activations' gradients, and one for the trained weights'.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (2 + trained / model.count_parameters()["total"]) * model.flops_per_token(T)["total"]


def spread(loss):
    """The loss itself; where it is not finite, no gradient is either, so that looking at the gradient is enough."""
    return loss * (1 + 0 * loss.detach())


class Tally:
    """
    The losses since the last progress line, and the steps that were skipped since their gradient was not finite.

    Kept on the device: read() and state alone wait for it.
    """

    MOST = 20  # skipped steps in a row, after which a run ends; a GradScaler comes from 2^16 to below 1 in 17

    def __init__(self, device, world_size, state=None):
        """state: of the run that goes on, a dict with what its state had; older versions had no tally."""
        self.world_size = world_size
        start = (state or {}).get("tally", [0.0, 0.0, 0.0])
        self.loss_sum, self.skipped, self.in_a_row = (torch.tensor(x, device=device) for x in start)
        self.before = self.loss_sum.clone()

    def add(self, loss):
        """The loss of a micro-step, as its share of the step's."""
        self.loss_sum += loss

    def end_step(self, norm):
        """norm: of the gradient -> whether the step is skipped, a 0-dim bool tensor."""
        skipped = ~torch.isfinite(norm)
        self.loss_sum = torch.where(skipped, self.before, self.loss_sum)
        self.before = self.loss_sum.clone()
        self.skipped += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        return skipped

    @property
    def state(self):
        """What a resume needs: three numbers. The first process alone has the sum of all; every process has to ask."""
        if self.world_size > 1:
            all_reduce(self.loss_sum)
            if torch.distributed.get_rank():
                self.loss_sum.zero_()
            self.before = self.loss_sum.clone()
        return dict(tally=torch.stack([self.loss_sum, self.skipped, self.in_a_row]).tolist())

    def read(self, steps):
        """
        Of the `steps` since the last line -> (mean loss without the skipped ones, or None; skipped; skipped in a row by now).

        Counts from zero again, but for those in a row.
        """
        if self.world_size > 1:
            all_reduce(self.loss_sum)
        total, skipped, in_a_row = torch.stack([self.loss_sum, self.skipped, self.in_a_row]).tolist()
        for number in (self.loss_sum, self.before, self.skipped):
            number.zero_()
        counted = steps - int(skipped)
        return total / self.world_size / counted if counted else None, int(skipped), int(in_a_row)
