"""The parts of one training step that train.py and bench.py share."""

from contextlib import nullcontext

import torch
from torch.distributed import all_reduce

from common.cli import reason
from common.versions import older
from training.device import out_of_memory


def autocast_of(device, dtype):
    """A context that runs the forward pass in a dtype, e.g. "bfloat16"."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.split(":")[0], getattr(torch, dtype))


def to_device(tensors, device):
    """Copy tensors to the device. From pinned memory, the copy to a GPU overlaps with the previous step."""
    if device.startswith("cuda"):
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]


def why_it_does_not_compile(first_pass):
    """
    Call first_pass(), a forward and backward pass that makes torch compile. Returns None, or why the compiler failed.

    The random state does not change. Too little memory is not a fault of the compiler, so that error is raised again.
    """
    cards = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(cards):
            first_pass()
    except Exception as error:  # Dynamo, Inductor, Triton and a C++ compiler each raise different errors
        if out_of_memory(error):
            raise
        return reason(str(error).split("\n\n")[0])  # advice for torch's developers follows


def of_any_process(why_not, world_size):
    """
    The reason of this process, or that another one failed, or None. So all processes compile, or none does.

    Every process must call it.
    """
    failed = torch.tensor(float(why_not is not None))
    if world_size > 1:
        all_reduce(failed)
    return why_not or ("another process cannot" if failed else None)


def split_for_ddp():
    """
    Let torch split compiled graphs at DDP's buckets, so that gradients travel during the backward pass, if it can.

    Torch 2.5 cannot split a graph that has a custom function, our loss, and ends in an error. 2.13 can; the versions between
    have not been tried.
    """
    torch._dynamo.config.optimize_ddp = not older(torch.__version__, "2.13")


def trained_flops(model, T):
    """
    FLOPs of training per token at context T: forward and backward.

    Backward costs as much as one forward for the gradients of the activations, and one more for those of the trained weights.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (2 + trained / model.count_parameters()["total"]) * model.flops_per_token(T)["total"]


def spread(loss):
    """Return the loss, but make every gradient NaN if the loss is not finite. Then checking the gradient norm is enough."""
    return loss * (1 + 0 * loss.detach())


class Tally:
    """
    Sums the losses since the last progress line, and counts skipped steps, whose gradient was not finite.

    The numbers stay on the device. Only read() and state wait for it.
    """

    MOST = 20  # a run ends after this many skipped steps in a row; a GradScaler gets from 2^16 to below 1 in 17

    def __init__(self, device, world_size, state=None):
        """state: the dict of last.pt if the run is resumed. Older versions have no "tally" in it."""
        self.world_size = world_size
        start = (state or {}).get("tally", [0.0, 0.0, 0.0])
        self.loss_sum, self.skipped, self.in_a_row = (torch.tensor(x, device=device) for x in start)
        self.before = self.loss_sum.clone()

    def add(self, loss):
        """Add the loss of a micro-step, already divided by the number of micro-steps."""
        self.loss_sum += loss

    def end_step(self, norm):
        """norm: the gradient norm. Returns whether to skip the step, a 0-dim bool tensor."""
        skipped = ~torch.isfinite(norm)
        self.loss_sum = torch.where(skipped, self.before, self.loss_sum)
        self.before = self.loss_sum.clone()
        self.skipped += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        return skipped

    @property
    def state(self):
        """Three numbers for a resume. Every process must ask for them; afterwards only the first holds the sum of losses."""
        if self.world_size > 1:
            all_reduce(self.loss_sum)
            if torch.distributed.get_rank():
                self.loss_sum.zero_()
            self.before = self.loss_sum.clone()
        return dict(tally=torch.stack([self.loss_sum, self.skipped, self.in_a_row]).tolist())

    def read(self, steps):
        """
        For the `steps` since the last progress line, returns (mean loss without skipped steps, or None if all were skipped;
        number of skipped steps; skipped steps in a row until now).

        Resets the counts to zero, except the count in a row.
        """
        if self.world_size > 1:
            all_reduce(self.loss_sum)
        total, skipped, in_a_row = torch.stack([self.loss_sum, self.skipped, self.in_a_row]).tolist()
        for number in (self.loss_sum, self.before, self.skipped):
            number.zero_()
        counted = steps - int(skipped)
        return total / self.world_size / counted if counted else None, int(skipped), int(in_a_row)
