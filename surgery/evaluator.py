"""What an operation costs: measures on fixed windows, and answers to a prompt."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from common.cli import fail


@dataclass
class Measured:
    """What was found at the tokens of a window, (T,) each; the last three where there is a reference model."""

    loss: torch.Tensor
    before: torch.Tensor | None = None  # the reference's loss
    kl: torch.Tensor | None = None  # KL(reference | model)
    same: torch.Tensor | None = None  # whether both find the same token likeliest


def measured(logits, labels, reference=None):
    """A model's logits (T, V) for the tokens `labels` (T,), and those of a reference model or None -> Measured, in nats."""
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
    Measures what a change costs on fixed windows of some texts: loss, perplexity, KL(untouched | changed), and how often both
    models find the same next token likeliest.

    It keeps the untouched model's last hidden states and a copy of its head: V / d times smaller than its log-probabilities.
    """

    def __init__(self, model, windows):
        """windows: {name of a text: [(x [1,T], y [1,T]), ...]}"""
        self.model, self.windows, self.head = model, windows, copy.deepcopy(model.head)  # surgery may change the head
        with torch.inference_mode():
            self.hidden = {name: [model.trunk(model.lookup(x)) for x, _ in some] for name, some in windows.items()}

    @torch.inference_mode()
    def measure(self, model=None):
        """
        The model as it is now, or another one -> dict(loss, ppl, kl, top1, texts), nats per token.

        texts: {name: the same four of this text alone, and nats and nats_se: what was lost, see paired()}
        """
        model = model or self.model
        texts = {
            name: [self.window(model, *xy, hidden) for xy, hidden in zip(some, self.hidden[name])]
            for name, some in self.windows.items()
        }
        everything = summary(sum(texts.values(), []))
        if not math.isfinite(everything["loss"] + everything["kl"]):
            fail(f"a model's loss on the evaluation text is {everything['loss']}: its numbers are not finite, give another")
        return everything | dict(texts={name: summary(found) | paired(found) for name, found in texts.items()})

    def window(self, model, x, y, hidden):
        return measured(model.logits(model.trunk(model.lookup(x)))[0], y[0], self.head(hidden)[0])


def summary(windows):
    """Means over all tokens of a list of Measured -> dict(loss, ppl), and of those with a reference also kl and top1."""
    found = dict(loss=over_tokens(windows, "loss"))
    found["ppl"] = perplexity(found["loss"])
    if windows[0].before is not None:
        found |= dict(kl=over_tokens(windows, "kl"), top1=over_tokens(windows, "same"))
    return found


def perplexity(nats):
    return math.exp(min(nats, 700))  # beyond, a float overflows


def over_tokens(windows, name):
    """The mean of a part of Measured over all tokens."""
    return torch.cat([getattr(w, name) for w in windows]).double().mean().item()


def paired(windows):
    """Nats per token over the reference model, and their standard error over windows; None where one window has none."""
    lost = np.array([(w.loss - w.before).double().mean().item() for w in windows])
    error = float(lost.std(ddof=1) / len(lost) ** 0.5) if len(lost) > 1 else math.nan
    nats = over_tokens(windows, "loss") - over_tokens(windows, "before")
    return dict(nats=nats, nats_se=error if math.isfinite(error) else None)


def prompt_ids(tokenizer, prompt):
    """Ids [T] of a prompt, in the chat template where there is one."""
    if tokenizer.chat_template:
        messages = [dict(role="user", content=prompt)]
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    else:
        found = tokenizer(prompt)
    return torch.tensor(found["input_ids"], dtype=torch.long)


def answer(subject, tokenizer, prompt, tokens, seed=None):
    """The model's answer to a prompt: greedy, or with a seed a sample."""
    out = subject.generate(prompt_ids(tokenizer, prompt), tokens, tokenizer.eos_token_id, seed)
    return tokenizer.decode(out, skip_special_tokens=True).strip()
