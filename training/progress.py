"""Progress of a run: a bar on a terminal, plain lines otherwise."""

import math
import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

from tqdm import tqdm

BAR = "{desc} |{bar}| {percentage:.0f}%{postfix}"  # short, so that a long name and the text fit into 80 columns


class Progress:
    """
    Counts the steps of a run and its seconds of training.

    A script that trains several models sets JOB_LATER_STEPS to the number of steps of the later models. From it and the speed
    of this run we estimate the time left for the entire job.
    """

    def __init__(self, args, shown, first, last, state, tokens_per_step):
        """shown: true only in the first process. first, last: steps. state: last.pt of a resumed run, or None."""
        seconds = state["seconds"] if state else 0.0  # of training before the step `first`
        self.shown, self.last, self.tokens_per_step = shown, last, tokens_per_step
        self.logged_step, self.logged_seconds = (state or {}).get("logged", (first, seconds))
        self.started = time.time() - seconds  # every pause moves it forward, so time.time() - started is only training
        self.paused_at = None
        self.later_steps = int(os.environ.get("JOB_LATER_STEPS") or 0)
        hidden = args.eval_only or not (shown and sys.stderr.isatty())
        name = os.path.basename(args.out_dir)
        self.bar = tqdm(total=last, initial=first, desc=name, bar_format=BAR, disable=hidden)

    def say(self, text, file=None):
        """Print a line without disturbing the bar. It is flushed at once, also into a file."""
        if self.shown:
            file = file or sys.stdout
            tqdm.write(text, file=file)
            file.flush()

    @property
    def seconds(self):
        """Seconds of training, without the time in paused()."""
        return (self.paused_at or time.time()) - self.started

    @contextmanager
    def paused(self):
        """A context whose time does not count as training."""
        self.paused_at = time.time()
        yield
        self.started += time.time() - self.paused_at
        self.paused_at = None

    @property
    def state(self):
        """The values that a resume needs."""
        return dict(seconds=self.seconds, logged=[self.logged_step, self.logged_seconds])

    def log(self, step, loss, peak_share):
        """
        Print a progress line, or show its text beside the bar. Returns the numbers for metrics.jsonl.

        loss: None if every step was skipped. peak_share(tokens per second) -> share of the GPU's peak FLOP/s, or None.
        """
        seconds = self.seconds
        rate = (step - self.logged_step) / (seconds - self.logged_seconds)  # steps per second
        speed = rate * self.tokens_per_step
        self.logged_step, self.logged_seconds = step, seconds
        share = peak_share(speed)
        left, left_of_job = (time_of(steps, rate) for steps in (self.last - step, self.last - step + self.later_steps))
        shown_loss = math.nan if loss is None else loss
        of_peak = [f"{share:.0%} of the peak"] if share else []
        if self.bar.disable:
            job = [f"{left_of_job} left of the entire job"] if self.later_steps else []
            words = [f"loss {shown_loss:.4f}", f"{speed:,.0f} tokens/s", *of_peak, f"{left} left", *job]
            self.say(f"step {step}/{self.last}: {', '.join(words)}")
        else:
            job = [f"job {short(left_of_job)}"] if self.later_steps else []
            words = [f"loss {shown_loss:.2f}", f"{speed / 1000:,.1f}k tok/s", f"left {short(left)}", *job, *of_peak]
            self.bar.set_postfix_str(", ".join(words), refresh=False)
        return dict(train_loss=loss, tokens_per_second=speed) | (dict(peak_share=share) if share else {})


def time_of(steps, rate):
    return timedelta(seconds=round(steps / rate))


def short(time):
    """0:02:10 -> 02:10"""
    return str(time).removeprefix("0:")
