"""
The folder of a run. config.json has flags, command, commit, versions, hardware. metrics.jsonl has one object per log line or
evaluation. summary.json is written when the run is done; report.py reads it. W&B and TensorBoard get copies (trackers.py).

The keys of metrics.jsonl. Every line has
    iter               optimizer steps done
A line of --log_interval
    lr                 learning rate of that step
    train_loss         nats per token, mean since the previous log line; null if every step was skipped
    tokens_per_second  tokens trained on per second since the previous log line, over all GPUs
    peak_share         share of the GPUs' peak FLOP/s; only if the peak is known
    skipped            steps since the previous log line whose loss or gradient was not finite; only if above 0
An evaluation
    seconds            seconds of training so far, without evaluations
    tokens             tokens trained on so far
    val_loss           nats per token, mean over eval_tokens
    val_ppl            perplexity, e^val_loss
    ln_f_cosine        mean cosine of the head's input and the target's row, in the head's own space (evaluate.py)
    ln_f_cosine_full   the same in the d dimensions of ln_f
    eval_tokens        number of predicted tokens
    position_loss      {"0-16": nats per token, ...}: val_loss by position in the window
    v_recon            mean squared error of restored values; only with --v_proj_dim
    v_error            for each layer the share of the values' variance that is lost; only with --v_proj_dim
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
from training import checkpoint
from training.device import hardware

ANOTHERS = ("a run's config.json", "choose another --out_dir")
PREVIOUS = "last.previous.pt"  # the previous last.pt, in case the newest is damaged


class NoRunFolder:
    """Takes the place of RunFolder in a process or run that writes nothing."""

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
        Claim args.out_dir, or end with a one-line message. open() writes the first files.

        resumed_at: the step from which a resume continues; None for a new run.
        """
        self.args, self.path, self.resumed_at = args, Path(args.out_dir), resumed_at
        self.claim = claim_folder(self.path, "--out_dir")
        if resumed_at is None:
            self._refuse_another_run(self.path / "config.json", args)

    def open(self):
        """Write config.json, and begin or continue metrics.jsonl."""
        args, resumed_at, config = self.args, self.resumed_at, self.path / "config.json"
        facts = dict(args=asdict(args), **provenance(args.device))
        if resumed_at is not None and config.exists():
            before = read_json(config, {"resumed?": list, "args": dict}, *ANOTHERS)
            facts["resumed"] = before.pop("resumed", []) + [before | dict(at=resumed_at)]
        (self.path / "summary.json").unlink(missing_ok=True)  # it means that a run is done
        with written_whole(config, "give another --out_dir") as part:
            part.write_text(json.dumps(facts, indent=1) + "\n")
        self.kept = resumed_at  # the step of last.pt
        self._keep_lines_before(resumed_at)
        self.metrics = open(self.path / "metrics.jsonl", "a", buffering=1)
        self.copies = []
        if args.wandb_log or args.tensorboard_log:
            from training.trackers import copies_for

            self.copies = copies_for(args, self.path, facts)

    def _refuse_another_run(self, config, args):
        """Refuse a folder that has checkpoints or other flags: it belongs to another run."""
        checkpoints = [name for name in ("last.pt", "ckpt.pt") if (self.path / name).exists()]
        if not config.exists():
            if checkpoints:
                fail(f"--out_dir {self.path} holds a {checkpoints[0]} without a config.json: choose another --out_dir")
            return
        before = read_json(config, dict(args=dict), *ANOTHERS)["args"]
        measured = set() if checkpoints else {"dtype"}  # --dtype auto may have chosen another one before the run was killed
        differing = [k for k, v in asdict(args).items() if before.get(k) != v and k not in measured]
        if differing:
            k = differing[0]
            fail(
                f"--out_dir {self.path} holds another run, with --{k} {before.get(k)}, and this one has {getattr(args, k)}: "
                "choose another --out_dir, or delete the folder"
            )
        if checkpoints and not args.eval_only:  # repeating an evaluation gives the same result
            fail(
                f"--out_dir {self.path} holds this run already: continue it with --init_from resume, choose another --out_dir, "
                "or delete the folder"
            )

    def _keep_lines_before(self, resumed_at):
        """
        Drop the lines after the last checkpoint, and the evaluation at that step: the resumed run logs them again. A crash may
        have left the last line incomplete.
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
        """Write last.pt if there is a state to resume from, and ckpt.pt if the model is the best so far."""
        flush(self.path / "metrics.jsonl")  # a resume keeps its lines up to this step
        if state:  # last.pt first: after a crash between the two, a resume writes ckpt.pt again
            checkpoint.save(self.path / "last.pt", model, previous=PREVIOUS, **facts, **state)
            self.kept = facts["iter_num"]
        if is_best:
            checkpoint.save(self.path / "ckpt.pt", model, **facts)

    def last_good(self):
        """A sentence that names the checkpoint to resume from."""
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
    """Command, commit, versions and hardware, which a reader needs to judge a number."""
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
    """The command line of this program, ready to be typed again: python -m surgery, not the path of its file."""
    path = Path(sys.argv[0])
    module = f"{path.parent.name}.{path.stem}".removesuffix(".__main__")
    program = ["-m", module] if (path.parent / "__init__.py").exists() else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])
