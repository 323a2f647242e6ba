"""
A run's folder: config.json (flags, command, commit, versions, hardware), metrics.jsonl (an object per log line or
evaluation), summary.json (what report.py reads, written when the run is done). W&B and TensorBoard are copies, and may fail.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import checkpoint
from common.cli import fail, reason
from common.device import hardware
from common.files import claim_folder, flush, remove, written_whole
from common.untrusted import COUNT, read_json, read_json_lines

ANOTHERS = ("a run's config.json", "choose another --out_dir")
PREVIOUS = "last.previous.pt"  # the last.pt before the last one, should that be damaged


class NoRunFolder:
    """Stands for the folder of a process or a run that writes nothing."""

    writes = False

    def log(self, step, **values):
        pass

    def keep(self, model, base, facts, state, is_best):
        pass

    def last_good(self):
        return ""

    def finish(self, summary):
        pass


class RunFolder:
    writes = True

    def __init__(self, args, resumed_at=None):
        """Claim args.out_dir. resumed_at: the step a resume goes on from; None claims the folder for a new run."""
        self.path = Path(args.out_dir)
        config = self.path / "config.json"
        self.claim = claim_folder(self.path, "--out_dir")
        if resumed_at is None:
            self._refuse_another_run(config, args)
        facts = dict(args=asdict(args), **provenance(args.device))
        if resumed_at is not None and config.exists():
            before = read_json(config, {"resumed?": list, "args": dict}, *ANOTHERS)
            facts["resumed"] = before.pop("resumed", []) + [before | dict(at=resumed_at)]
        (self.path / "summary.json").unlink(missing_ok=True)  # it says that a run is done
        with written_whole(config, "give another --out_dir") as part:
            part.write_text(json.dumps(facts, indent=1) + "\n")
        self.kept = resumed_at  # the step of last.pt
        self._keep_lines_before(resumed_at)
        self.metrics = open(self.path / "metrics.jsonl", "a", buffering=1)
        starts = dict(wandb_log=wandb_log, tensorboard_log=tensorboard_log)
        self.copies = [Copy(name, start, args, self.path) for name, start in starts.items() if getattr(args, name)]

    def _refuse_another_run(self, config, args):
        """A folder with checkpoints, or with other flags, belongs to another run and stays as it is."""
        checkpoints = [name for name in ("last.pt", "ckpt.pt") if (self.path / name).exists()]
        if not config.exists():
            if checkpoints:
                fail(f"--out_dir {self.path} holds a {checkpoints[0]} that is not ours: choose another --out_dir")
            return
        before = read_json(config, dict(args=dict), *ANOTHERS)["args"]
        differing = [k for k, v in asdict(args).items() if before.get(k) != v]
        if differing:
            k = differing[0]
            fail(
                f"--out_dir {self.path} holds another run, with --{k} {before.get(k)} where this one has {getattr(args, k)}: "
                "choose another --out_dir, or delete the folder"
            )
        if checkpoints and not args.eval_only:  # an evaluation comes out the same again
            fail(
                f"--out_dir {self.path} holds this run already: go on with --init_from resume, choose another --out_dir, "
                "or delete the folder"
            )

    def _keep_lines_before(self, resumed_at):
        """
        Drop the lines after the last checkpoint, and the evaluation at it: the resumed run logs them again. A crash may have
        cut the last line off.
        """

        def stays(line):
            return line["iter"] < resumed_at or (line["iter"] == resumed_at and "train_loss" in line)

        path = self.path / "metrics.jsonl"
        resumes = resumed_at is not None and path.exists()
        lines = read_json_lines(path, dict(iter=COUNT), "what train.py logs", "move it away") if resumes else []
        with written_whole(path, "make room") as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines if stays(line)))

    def log(self, step, **values):
        try:
            self.metrics.write(json.dumps(dict(iter=step, **values)) + "\n")
        except OSError as error:
            fail(f"{self.path / 'metrics.jsonl'} cannot be written ({error.strerror}): make room, then resume the run")
        for copy in self.copies:
            copy.log(step, values)

    def keep(self, model, base, facts, state, is_best):
        """Write last.pt, unless there is no state to go on with, and ckpt.pt where the model is the best so far."""
        flush(self.path / "metrics.jsonl")  # a resume keeps its lines up to this step
        if state:  # last.pt first: a resume after a crash between the two files writes ckpt.pt again
            checkpoint.save(self.path / "last.pt", model, base, previous=PREVIOUS, **facts, **state)
            self.kept = facts["iter_num"]
        if is_best:
            checkpoint.save(self.path / "ckpt.pt", model, base, **facts)

    def last_good(self):
        """Which checkpoint there is to go on with, in words."""
        if self.kept is None:
            return "there is no good checkpoint yet"
        return f"the last good checkpoint is {self.path / 'last.pt'} of step {self.kept}"

    def finish(self, summary):
        with written_whole(self.path / "summary.json") as part:
            part.write_text(json.dumps(summary, indent=1) + "\n")
        remove(self.path / PREVIOUS)
        self.claim.release()


class Copy:
    """What W&B or TensorBoard gets of a run. They are not ours: where one fails, a line says so and the run goes on without."""

    def __init__(self, name, start, args, folder):
        """name: of the flag. start(args, folder) -> write(step, values)"""
        self.name, self.write = name, None
        self.write = self._attempt(start, args, folder)

    def log(self, step, values):
        if self.write:
            self._attempt(self.write, step, values)

    def _attempt(self, call, *given):
        try:
            return call(*given)
        except Exception as error:  # a missing package, a full disk, whatever their code raises
            self.write = None
            print(f"note: --{self.name}: {reason(error)}; the run goes on without it", file=sys.stderr, flush=True)


def wandb_log(args, folder):
    import wandb

    start = partial(
        wandb.init, project=args.wandb_project, name=args.wandb_run_name or folder.name, config=asdict(args), dir=folder
    )
    mode, why = os.environ.get("WANDB_MODE"), ""
    try:
        if mode is not None or wandb.login(prompt=False):
            run = start(mode=mode)
        else:
            why = "has no key here"
    except Exception as error:  # no network, or a key that is refused
        why = f"cannot be reached ({reason(error)})"
    if why:
        print(f"W&B {why}: logging offline to {folder}/wandb, `wandb sync` uploads it later")
        run = start(mode="offline")
    return lambda step, values: run.log(values, step=step)


def tensorboard_log(args, folder):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")
    return lambda step, values: [
        writer.add_scalar(name, value, step) for name, value in values.items() if isinstance(value, (int, float))
    ]


def provenance(device):
    """What a reader needs to judge a number: command, commit, versions, hardware."""
    git = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **git).stdout.strip()
        if commit and subprocess.run(["git", "status", "--porcelain", "-uno"], **git).stdout.strip():
            commit += " with changes"
    except OSError:
        commit = ""
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    return dict(
        command=shlex.join(["python", *sys.argv]), commit=commit or "unknown", versions=versions, hardware=hardware(device)
    )
