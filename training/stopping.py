"""When a run writes last.pt between evaluations: every so many minutes, and when a signal stops it."""

import os
import signal
import sys
import time

import torch
from torch.distributed import ReduceOp, all_reduce

from training.device import end_processes

TWICE = 0.5  # seconds within which two signals are one: a terminal sends Ctrl-C to a script's children, and so may the script


class Watch:
    """
    SIGTERM and Ctrl-C let the step end; a second one stops the program at once.

        with Watch(args, master, world_size) as watch:
            while True:
                if watch.asks_to_save():
                    ...
                    watch.leave(step)  # goes on where no signal came
    """

    def __init__(self, args, master, world_size):
        self.minutes, self.out_dir, self.installs = args.checkpoint_minutes, args.out_dir, not args.eval_only
        self.master, self.world_size = master, world_size
        self.received, self.received_at = 0, None  # by this process
        self.signal = 0  # that stops the run, known to every process
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
        """last.pt has been written."""
        self.saved_at = time.monotonic()

    def asks_to_save(self, skipped=0):
        """
        Whether last.pt is to be written now. Several processes answer alike, since one may have the signal alone.

        skipped: the steps that were skipped until now; while there are some, last.pt stays the good one unless a signal comes.
        """
        due = self.master and self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes
        due = due and not skipped  # a number on the device is waited for where a checkpoint is due, else not
        self.signal = self.received
        if self.world_size > 1:
            asked = torch.tensor([self.signal, int(due)])  # on the CPU, which waits for the other processes and for no card
            all_reduce(asked, ReduceOp.MAX)
            self.signal, due = asked.tolist()
        return bool(self.signal or due)

    def leave(self, step):
        """End the program where a signal came; last.pt has been written."""
        if not self.signal:
            return
        if self.master:
            name = signal.Signals(self.signal).name
            how = f"--init_from resume --out_dir {self.out_dir} goes on from there"
            print(f"stopped by {name} at step {step}, last.pt is written: {how}", file=sys.stderr)
        if self.world_size > 1:
            end_processes()
        sys.exit(128 + self.signal)
