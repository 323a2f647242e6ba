"""Measure the cost of a change: losses on fixed windows, and answers to a prompt."""

import copy
import math
import sys
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from common.cli import fail


@dataclass
class Measured:
    """Measures at the tokens of a window, (T,) each. The last three need a reference model."""

    loss: torch.Tensor
    before: torch.Tensor | None = None  # the reference's loss
    kl: torch.Tensor | None = None  # KL(reference | model)
    same: torch.Tensor | None = None  # whether both rank the same token first


def measured(logits, labels, reference=None):
    """Logits (T, V) of a model, labels (T,), and logits of a reference model or None -> Measured, in nats."""
    after, labels = logits.float().log_softmax(-1), labels.to(logits.device)
    loss = F.nll_loss(after, labels, reduction="none")
    if reference is None:
        return Measured(loss)
    before = reference.float().log_softmax(-1)
    kl = F.kl_div(after, before, reduction="none", log_target=True).sum(-1)
    same = after.argmax(-1) == before.argmax(-1)
    return Measured(loss, F.nll_loss(before, labels, reduction="none"), kl, same)


class Evaluator:
    """
    Measures the cost of a change on fixed windows of some texts: loss, perplexity, KL(untouched | changed), and how often both
    models rank the same next token first.

    It keeps the untouched model's last hidden states, a copy of its head, and a Prediction, which is as large as the hidden
    states. The model's log-probabilities would take V / 2d times as much memory.
    """

    def __init__(self, model, windows):
        """windows: {name of a text: [(x [1,T], y [1,T]), ...]}"""
        self.model, self.windows, self.head = model, windows, copy.deepcopy(model.head)  # surgery may change the head
        self.predictions = {}
        with torch.inference_mode():
            self.hidden = {name: [model.trunk(model.lookup(x)) for x, _ in some] for name, some in windows.items()}

    @cached_property
    def untouched(self):
        """Measurements of the original model. Access this before you modify the model."""
        return self.measure()

    @torch.inference_mode()
    def measure(self, model=None):
        """
        The model in its present state, or another one -> dict(loss, ppl, kl, top1, texts), nats per token.

        texts: {name: the same four for this text alone, and paired()'s nats and nats_se}
        """
        model = model or self.model
        same_head = equal(model.head, self.head)
        texts = {
            name: [self.window(model, name, i, same_head) for i in range(len(some))] for name, some in self.windows.items()
        }
        everything = summary(sum(texts.values(), []))
        if not math.isfinite(everything["loss"] + everything["kl"]):
            fail(f"the loss on the evaluation text is {everything['loss']}: its numbers are not finite: give another model")
        return everything | dict(texts={name: summary(found) | paired(found) for name, found in texts.items()})

    def window(self, model, name, i, same_head):
        (x, y), hidden = self.windows[name][i], self.hidden[name][i]
        h = model.trunk(model.lookup(x))
        if not same_head:
            return measured(model.logits(h)[0], y[0], self.head(hidden)[0])
        if (name, i) not in self.predictions:
            self.predictions[name, i] = Prediction(hidden[0], y[0], self.head)
        return self.predictions[name, i].beside(h[0], model.logits(h)[0], y[0])


def equal(head, other):
    """Whether two heads are Linears with the same numbers."""
    if type(head) is not nn.Linear or type(other) is not nn.Linear:
        return False
    parts, others = head.state_dict(), other.state_dict()
    return parts.keys() == others.keys() and all(torch.equal(parts[name], others[name]) for name in parts)


class Prediction:
    """
    The untouched model's predictions for a window. They are kept in a form that compares a model with the same head, logits
    W h + b, without storing the probabilities p. With A(h) = log sum exp(W h + b), whose gradient is E_p[W],

        KL(untouched | other) = A(h') - A(h) - E_p[W] (h' - h)

    A token's KL has an error of about 1e-6 times its largest logit: 2e-5 on SmolLM2; the mean over tokens, about 1e-7.
    """

    def __init__(self, hidden, labels, head):
        """hidden (T, d), labels (T,), head: a Linear"""
        logits = head(hidden).float()
        self.hidden, self.total, self.likeliest = hidden, log_total(logits), logits.argmax(-1)
        self.loss = self.total - of_labels(logits, labels)
        self.row = (logits - self.total[:, None].float()).exp_() @ head.weight.float()

    def beside(self, h, logits, labels):
        """The other model's last hidden states (T, d) and logits (T, V) -> Measured"""
        logits = logits.float()
        total = log_total(logits)
        kl = total - self.total - (self.row.double() * (h - self.hidden)).sum(-1)
        return Measured(total - of_labels(logits, labels), self.loss, kl, logits.argmax(-1) == self.likeliest)


def log_total(logits):
    """Logits (T, V) -> log sum exp (T,), float64: float32 has an error of 8e-6. A few tokens at a time fit a CPU's cache."""
    found = []
    for some in logits.split(16):
        most = some.amax(-1, keepdim=True)
        found.append((some - most).exp_().sum(-1, dtype=torch.float64).log_() + most[:, 0])
    return torch.cat(found)


def of_labels(logits, labels):
    """Logits (T, V), labels (T,) -> each label's logit (T,)."""
    return logits.gather(1, labels[:, None].to(logits.device))[:, 0]


def summary(windows):
    """A list of Measured -> means over all tokens, dict(loss, ppl); with a reference model also kl and top1."""
    found = dict(loss=over_tokens(windows, "loss"))
    found["ppl"] = perplexity(found["loss"])
    if windows[0].before is not None:
        found |= dict(kl=over_tokens(windows, "kl"), top1=over_tokens(windows, "same"))
    return found


def perplexity(nats):
    return math.exp(min(nats, 700))  # a float overflows above


def over_tokens(windows, name):
    """The mean over all tokens of one field of Measured."""
    return torch.cat([getattr(w, name) for w in windows]).double().mean().item()


def paired(windows):
    """Nats per token above the reference model, and their standard error over windows; None for a single window."""
    lost = np.array([(w.loss - w.before).double().mean().item() for w in windows])
    error = float(lost.std(ddof=1) / len(lost) ** 0.5) if len(lost) > 1 else math.nan
    nats = over_tokens(windows, "loss") - over_tokens(windows, "before")
    return dict(nats=nats, nats_se=error if math.isfinite(error) else None)


def prompt_ids(tokenizer, prompt):
    """Ids [T] of a prompt, in the tokenizer's chat template if it has one."""
    found = None
    if tokenizer.chat_template:
        messages = [dict(role="user", content=prompt)]
        try:
            found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template is a program: it may raise anything
            print(f"note: the chat template fails ({type(error).__name__}): the prompt is given without it", file=sys.stderr)
    found = found or tokenizer(prompt)
    return torch.tensor(found["input_ids"], dtype=torch.long)


def answers(subject, tokenizer, prompt, tokens, seeds):
    """The model's answer to a prompt for each random seed: a sample, or greedy if the seed is None."""
    ends = {tokenizer.eos_token_id, *subject.ends} - {None}
    out = subject.generate(prompt_ids(tokenizer, prompt), tokens, sorted(ends), seeds)
    found = []
    for ids in out:
        over = torch.isin(ids.cpu(), torch.tensor(sorted(ends), dtype=ids.dtype)).nonzero()
        found.append(tokenizer.decode(ids[: over[0, 0]] if len(over) else ids, skip_special_tokens=True).strip())
    return found
