"""
A run's folder: config.json (flags, command, commit, versions, hardware), metrics.jsonl (an object per log line or
evaluation), summary.json (what report.py reads, written when the run is done). W&B and TensorBoard are copies (trackers.py).

The keys of metrics.jsonl. Every line has
    iter               optimizer steps done
A line of --log_interval
    lr                 learning rate of that step
    train_loss         nats per token, the mean since the line before; null where every step was skipped
    tokens_per_second  of training since the line before, over all cards
    peak_share         share of the cards' peak arithmetic that this is; only where the peak is known
    skipped            steps since the line before whose loss or gradient was not finite; only where there are some
An evaluation
    seconds            of training so far, without evaluations
    tokens             of training so far
    val_loss           nats per token, the mean over eval_tokens
    val_ppl            perplexity, e to the val_loss
    ln_f_cosine        mean cosine of what the head reads and the target's row, in the head's own space (evaluate.py)
    ln_f_cosine_full   the same in the space of ln_f
    eval_tokens        tokens that were predicted
    position_loss      {"0-16": nats per token, ...}: val_loss by position in the window
    v_recon            mean squared error of restored values; only with --v_proj_dim
    v_error            for each layer the share of the values' variance that is missed; only with --v_proj_dim
"""

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from common.cli import fail
from common.files import claim_folder, flush, remove, written_whole
from common.untrusted import COUNT, read_json, read_json_lines
from training import checkpoint, trackers
from training.device import hardware

ANOTHERS = ("a run's config.json", "choose another --out_dir")
PREVIOUS = "last.previous.pt"  # the last.pt before the last one, should that be damaged


class NoRunFolder:
    """Stands for the folder of a process or a run that writes nothing."""

    writes = False

    def open(self):
        pass

    def log(self, step, **values):
        pass

    def keep(self, model, facts, state, is_best):
        pass

    def last_good(self):
        return ""

    def finish(self, summary):
        pass


class RunFolder:
    writes = True

    def __init__(self, args, resumed_at=None):
        """
        Claim args.out_dir, or end in one line. open() writes the first files.

        resumed_at: the step a resume goes on from; None claims the folder for a new run.
        """
        self.args, self.path, self.resumed_at = args, Path(args.out_dir), resumed_at
        self.claim = claim_folder(self.path, "--out_dir")
        if resumed_at is None:
            self._refuse_another_run(self.path / "config.json", args)

    def open(self):
        """Write config.json, and begin metrics.jsonl or go on with it."""
        args, resumed_at, config = self.args, self.resumed_at, self.path / "config.json"
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
        chosen = [(name, kind) for name, kind in trackers.TRACKERS.items() if getattr(args, name)]
        self.copies = [trackers.Copy(name, kind, args, self.path, facts) for name, kind in chosen]

    def _refuse_another_run(self, config, args):
        """A folder with checkpoints, or with other flags, belongs to another run and stays as it is."""
        checkpoints = [name for name in ("last.pt", "ckpt.pt") if (self.path / name).exists()]
        if not config.exists():
            if checkpoints:
                fail(f"--out_dir {self.path} holds a {checkpoints[0]} that is not ours: choose another --out_dir")
            return
        before = read_json(config, dict(args=dict), *ANOTHERS)["args"]
        measured = set() if checkpoints else {"dtype"}  # by --dtype auto, perhaps otherwise before a kill
        differing = [k for k, v in asdict(args).items() if before.get(k) != v and k not in measured]
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

    def keep(self, model, facts, state, is_best):
        """Write last.pt, unless there is no state to go on with, and ckpt.pt where the model is the best so far."""
        flush(self.path / "metrics.jsonl")  # a resume keeps its lines up to this step
        if state:  # last.pt first: a resume after a crash between the two files writes ckpt.pt again
            checkpoint.save(self.path / "last.pt", model, previous=PREVIOUS, **facts, **state)
            self.kept = facts["iter_num"]
        if is_best:
            checkpoint.save(self.path / "ckpt.pt", model, **facts)

    def last_good(self):
        """Which checkpoint there is to go on with, in words."""
        if self.kept is None:
            return "there is no good checkpoint yet"
        return f"the last good checkpoint is {self.path / 'last.pt'} of step {self.kept}"

    def finish(self, summary):
        with written_whole(self.path / "summary.json") as part:
            part.write_text(json.dumps(summary, indent=1) + "\n")
        remove(self.path / PREVIOUS)
        for copy in self.copies:
            copy.finish()
        self.claim.release()


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
    return dict(command=command(), commit=commit or "unknown", versions=versions, hardware=hardware(device))


def command():
    """The line that started this program, as it can be typed again: python -m surgery, not the file that it names."""
    path = Path(sys.argv[0])
    module = f"{path.parent.name}.{path.stem}".removesuffix(".__main__")
    program = ["-m", module] if (path.parent / "__init__.py").exists() else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])
