"""
Copies the metrics and the config of a run to W&B and TensorBoard. Both get the same:

scalars   every number of metrics.jsonl under the same name; parts of a dict or list as position_loss/0-16, v_error/0
config    config.json: the flags, the command, the commit, versions, hardware

They draw the curves themselves. If one fails, we print a line and the run continues without it.
"""

import json
import os
import sys
from functools import partial

from common.cli import reason


class Copy:
    """Passes values to a tracker until the tracker fails."""

    def __init__(self, name, kind, *given):
        """name: the flag. kind(*given) makes the tracker."""
        self.name, self.tracker = name, None
        self.tracker = self._attempt(kind, *given)

    def log(self, step, values):
        if self.tracker:
            self._attempt(self.tracker.log, step, scalars(values))

    def finish(self):
        if self.tracker:
            self._attempt(self.tracker.finish)

    def _attempt(self, call, *given):
        try:
            return call(*given)
        except Exception as error:  # a missing package, a full disk, any error in their code
            self.tracker = None
            print(f"note: --{self.name}: {reason(error)}; the run continues without it", file=sys.stderr, flush=True)


class WandB:
    def __init__(self, args, folder, facts):
        """folder: the run's folder. facts: the content of its config.json."""
        import wandb

        name = args.wandb_run_name or folder.name
        start = partial(wandb.init, project=args.wandb_project, name=name, config=config_of(facts), dir=folder)
        mode, why = os.environ.get("WANDB_MODE"), ""
        try:
            if mode is not None or wandb.login(prompt=False):
                self.run = start(mode=mode)
            else:
                why = "has no key here"
        except Exception as error:  # no network, or the key is refused
            why = f"cannot be reached ({reason(error)})"
        if why:
            print(f"W&B {why}: logging offline to {folder}/wandb, `wandb sync` uploads it later")
            self.run = start(mode="offline")
        self.run.define_metric("val_loss", summary="min")  # the table of runs and a sweep use the best, not the last

    def log(self, step, values):
        self.run.log(values, step=step)

    def finish(self):
        self.run.finish()


class TensorBoard:
    def __init__(self, args, folder, facts):
        from torch.utils.tensorboard import SummaryWriter

        resumed = facts.get("resumed")
        # hide lines after the checkpoint: the resumed run logs them again
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=resumed[-1]["at"] + 1 if resumed else None)
        self.writer.add_text("config", "```json\n" + json.dumps(config_of(facts), indent=1) + "\n```")

    def log(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self):
        self.writer.close()


TRACKERS = dict(wandb_log=WandB, tensorboard_log=TensorBoard)  # flag -> class


def scalars(values, before=""):
    """Flatten a line of metrics.jsonl to {name: number}."""
    found = {}
    for name, value in values.items():
        if isinstance(value, (dict, list)):
            found |= scalars(value if isinstance(value, dict) else dict(enumerate(value)), f"{before}{name}/")
        elif isinstance(value, (int, float)):
            found[f"{before}{name}"] = value
    return found


def config_of(facts):
    """config.json with the flags moved to the top level, so that runs can be sorted by them."""
    return facts["args"] | {name: value for name, value in facts.items() if name not in ("args", "resumed")}


def copies_for(args, folder, facts):
    """The Copies that the flags ask for. folder, facts: as in WandB."""
    return [Copy(name, kind, args, folder, facts) for name, kind in TRACKERS.items() if getattr(args, name)]
