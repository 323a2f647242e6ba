"""
A token table that trains as it will be coded: the forward pass reads the table rounded, the gradient passes straight through.

    with rounding.rounded(step):  # the parameter has the values table + (coded - table).detach(): those of the last coding
        loss(...).backward()
    optimizer.step()  # moves the table itself, by the gradient at the coded one

The gradient passes as if the rounding were not there (Bengio et al. 2013, arXiv:1308.3432). Between two codings the forward
pass reads the values of the last one. Table + the last *error* would follow each step, but training would undo that error.
"""

from contextlib import contextmanager, nullcontext

import torch

from util_factorization.coding import code, draft_table, fit, row_weights
from util_factorization.trellis import FAST_WINDOW, gaussian_codes


class NoRounding:
    """Stands for StraightThrough where the table trains as it is."""

    facts = state = {}

    def calibrate(self, step):
        pass

    def rounded(self, step=None):
        return nullcontext()


class StraightThrough:
    """A tied token table [V,k] that is coded again every so many steps."""

    def __init__(self, parameter, share, every, counts, moments, state=None):
        """
        parameter   of the table and the head
        share       bytes that the coded table may take, as a share of its float16 bytes
        every       steps from one coding to the next
        counts [V]  how often each token occurs in the training text
        moments     a function -> (C, G), [k,k], of calibrate() at the table as it trains
        state       of the run that goes on, a dict with what its state had; the parameter gets the table back
        """
        self.parameter, self.budget, self.every = parameter, share * 2 * parameter.numel(), every
        self.weights, self.moments = row_weights(torch.as_tensor(counts)), moments
        self.calibrated_at, self.coded_at = None, None
        if state is not None:
            self.metric, self.calibrated_at, self.coded_at, self.size = state.get("coding") or (None, None, None, None)
            self.coded = parameter.data.clone()
            parameter.data.copy_(state["unrounded_wte"])

    @property
    def facts(self):
        """What a checkpoint says about the table in it."""
        return dict(coded_wte=dict(bytes=self.size, share=self.size / (2 * self.parameter.numel())))

    @property
    def state(self):
        """What a resume needs: the table in the checkpoint is the rounded one. Runs that older versions began lack `coding`."""
        return dict(unrounded_wte=self.unrounded, coding=(self.metric, self.calibrated_at, self.coded_at, self.size))

    def calibrate(self, step):
        """Measure anew what an error costs, and code the table. Raises ValueError where the share pays for too little."""
        if step != self.calibrated_at:
            self.metric, self.calibrated_at = sum(self.moments()), step
            self.code(step)

    @torch.no_grad()
    def code(self, step):
        table = self.parameter.detach().float().cpu()
        draft = draft_table(table, self.weights, self.metric, parents=False)  # sought again at each coding, they cost too much
        (depths,), codes = fit([draft], self.budget, gaussian_codes(FAST_WINDOW))
        coded = code(draft, depths, codes)
        self.size, self.coded_at = coded.bytes(), step
        self.coded = coded.matrix().to(self.parameter)

    @contextmanager
    def rounded(self, step=None):
        """A context in which the parameter has its rounded values. step: codes first where the step is one for it."""
        if step is not None and step % self.every == 0 and step != self.coded_at:
            self.code(step)
        self.unrounded = self.parameter.data
        try:
            self.parameter.data = self.coded
            yield
        finally:
            self.parameter.data = self.unrounded
