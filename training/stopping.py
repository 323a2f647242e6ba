"""Saves last.pt between evaluations: after --checkpoint_minutes, and if a signal stops the run."""

import os
import signal
import sys
import time

import torch
from torch.distributed import ReduceOp, all_reduce

from training.device import end_processes

TWICE = 0.5  # seconds; two signals within this time count as one: the terminal and the calling script may both send Ctrl-C


class Watch:
    """
    After SIGTERM or Ctrl-C the current step still ends. A second signal stops the program at once.

        with Watch(args, master, world_size) as watch:
            while True:
                if watch.asks_to_save():
                    ...
                    watch.leave(step)  # returns if no signal came
    """

    def __init__(self, args, master, world_size):
        self.minutes, self.out_dir, self.installs = args.checkpoint_minutes, args.out_dir, not args.eval_only
        self.master, self.world_size = master, world_size
        self.received, self.received_at = 0, None  # signal that this process received
        self.signal = 0  # signal that stops the run; the same in every process
        self.saved()

    def __enter__(self):
        kinds = (signal.SIGTERM, signal.SIGINT) if self.installs else ()  # an evaluation has nothing to save
        self.handlers = {kind: signal.signal(kind, self._receive) for kind in kinds}
        return self

    def __exit__(self, *error):
        for kind, handler in self.handlers.items():
            signal.signal(kind, handler)

    def _receive(self, number, frame):
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
        elif time.monotonic() - self.received_at > TWICE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def saved(self):
        """Call this after last.pt is written."""
        self.saved_at = time.monotonic()

    def asks_to_save(self, skipped=0):
        """
        Whether to write last.pt now. All processes get the same answer, even if only one received the signal.

        skipped: number of steps just skipped in a row. If above 0, last.pt stays the last good one, unless a signal comes.
        """
        due = self.master and self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes
        due = due and not skipped  # `skipped` is on the device: wait for it only if a checkpoint is due
        self.signal = self.received
        if self.world_size > 1:
            asked = torch.tensor([self.signal, int(due)])  # on the CPU: waits for the other processes, not for a GPU
            all_reduce(asked, ReduceOp.MAX)
            self.signal, due = asked.tolist()
        return bool(self.signal or due)

    def leave(self, step):
        """End the program if a signal came. Call this after last.pt is written."""
        if not self.signal:
            return
        if self.master:
            name = signal.Signals(self.signal).name
            how = f"--init_from resume --out_dir {self.out_dir} continues from there"
            print(f"stopped by {name} at step {step}, last.pt is written: {how}", file=sys.stderr)
        if self.world_size > 1:
            end_processes()
        sys.exit(128 + self.signal)
