"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

import math
import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

from tqdm import tqdm

BAR = "{desc} |{bar}| {percentage:.0f}%{postfix}"  # short: a long name and the words fit into 80 columns


class Progress:
    """
    Counts the steps of a run and the seconds that it trains.

    The script of a longer job says in JOB_LATER_STEPS how many steps its later models take: at the rate of this run they
    give the time left of the whole job.
    """

    def __init__(self, args, shown, first, last, state, tokens_per_step):
        """shown: false in every process but the first. first, last: steps. state: of the run that goes on, or None."""
        seconds = state["seconds"] if state else 0.0  # of training before `first`
        self.shown, self.last, self.tokens_per_step = shown, last, tokens_per_step
        self.logged_step, self.logged_seconds = (state or {}).get("logged", (first, seconds))
        self.started = time.time() - seconds  # every pause moves it on, so time.time() - started is training alone
        self.paused_at = None
        self.later_steps = int(os.environ.get("JOB_LATER_STEPS") or 0)
        hidden = args.eval_only or not (shown and sys.stderr.isatty())
        name = os.path.basename(args.out_dir)
        self.bar = tqdm(total=last, initial=first, desc=name, bar_format=BAR, disable=hidden)

    def say(self, text, file=None):
        """A line that the bar does not disturb. It appears at once, in a file too."""
        if self.shown:
            file = file or sys.stdout
            tqdm.write(text, file=file)
            file.flush()

    @property
    def seconds(self):
        """Of training: without the time in paused()."""
        return (self.paused_at or time.time()) - self.started

    @contextmanager
    def paused(self):
        """A context in which no time passes."""
        self.paused_at = time.time()
        yield
        self.started += time.time() - self.paused_at
        self.paused_at = None

    @property
    def state(self):
        """What a resume needs."""
        return dict(seconds=self.seconds, logged=[self.logged_step, self.logged_seconds])

    def log(self, step, loss, peak_share):
        """
        A progress line, or its words beside the bar. loss: None where every step was skipped.

        peak_share(tokens a second) -> share of the card's peak, or None.
        """
        seconds = self.seconds
        rate = (step - self.logged_step) / (seconds - self.logged_seconds)  # steps a second
        speed = rate * self.tokens_per_step
        self.logged_step, self.logged_seconds = step, seconds
        share = peak_share(speed)
        left, left_of_job = (time_of(steps, rate) for steps in (self.last - step, self.last - step + self.later_steps))
        shown_loss = math.nan if loss is None else loss
        of_peak = [f"{share:.0%} of the peak"] if share else []
        if self.bar.disable:
            job = [f"{left_of_job} left of the whole job"] if self.later_steps else []
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
