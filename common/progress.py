"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from datetime import timedelta

from tqdm import tqdm

BAR = "{desc} |{bar}| {percentage:.0f}%{postfix}"  # short: a long name and the words fit into 80 columns


class Progress:
    """
    Counts the steps of a run and the seconds that it trains.

    The script of a longer job says in JOB_LATER_STEPS how many steps its later models take: at the rate of this run they
    give the time left of the whole job.
    """

    def __init__(self, args, shown, first, last, seconds, tokens_per_step):
        """shown: false in every process but the first. first, last: steps. seconds: of training before `first`."""
        self.shown, self.last, self.tokens_per_step = shown, last, tokens_per_step
        self.logged_step, self.logged_seconds = first, seconds
        self.started = time.time() - seconds  # every pause moves it on, so time.time() - started is training alone
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
        return time.time() - self.started

    def pause(self, seconds):
        """Leave out the last `seconds`, which were not spent on training."""
        self.started += seconds

    def log(self, step, loss, peak_share):
        """A progress line, or its words beside the bar. peak_share(tokens a second) -> share of the card's peak, or None."""
        seconds = self.seconds
        rate = (step - self.logged_step) / (seconds - self.logged_seconds)  # steps a second
        speed = rate * self.tokens_per_step
        self.logged_step, self.logged_seconds = step, seconds
        share = peak_share(speed)
        left, left_of_job = (time_of(steps, rate) for steps in (self.last - step, self.last - step + self.later_steps))
        of_peak = [f"{share:.0%} of the peak"] if share else []
        if self.bar.disable:
            job = [f"{left_of_job} left of the whole job"] if self.later_steps else []
            words = [f"loss {loss:.4f}", f"{speed:,.0f} tokens/s", *of_peak, f"{left} left", *job]
            self.say(f"step {step}/{self.last}: {', '.join(words)}")
        else:
            job = [f"job {short(left_of_job)}"] if self.later_steps else []
            words = [f"loss {loss:.2f}", f"{speed / 1000:,.1f}k tok/s", f"left {short(left)}", *job, *of_peak]
            self.bar.set_postfix_str(", ".join(words), refresh=False)
        return dict(train_loss=loss, tokens_per_second=speed) | (dict(peak_share=share) if share else {})


def time_of(steps, rate):
    return timedelta(seconds=round(steps / rate))


def short(time):
    """0:02:10 -> 02:10"""
    return str(time).removeprefix("0:")
