"""What an operation costs: measures on fixed windows, and answers to a prompt."""

import copy
import math

import torch
from torch.nn import functional as F


class Evaluator:
    """
    Measures what a change costs on fixed windows: loss, perplexity, KL(untouched | changed), and how often both models find the
    same next token likeliest.

    It keeps the untouched model's last hidden states and a copy of its head: V / d times smaller than its log-probabilities.
    """

    def __init__(self, model, windows):
        self.model, self.windows, self.head = model, list(windows), copy.deepcopy(model.head)  # surgery may change the head
        with torch.inference_mode():
            self.hidden = [model.trunk(model.lookup(x)) for x, _ in self.windows]

    @torch.inference_mode()
    def measure(self, model=None):
        """The model as it is now, or another one -> dict(loss, ppl, kl, top1), nats per token."""
        model, loss, kl, same, tokens = model or self.model, 0, 0, 0, 0
        for (x, y), hidden in zip(self.windows, self.hidden):
            before = self.head(hidden)[0].log_softmax(-1)  # (T, V)
            after = model.logits(model.trunk(model.lookup(x)))[0].log_softmax(-1)
            loss += F.nll_loss(after, y[0].to(after.device), reduction="sum").item()
            same += (after.argmax(-1) == before.argmax(-1)).sum().item()
            kl += F.kl_div(after, before, reduction="sum", log_target=True).item()
            tokens += y.numel()
        loss = loss / tokens
        return dict(loss=loss, ppl=math.exp(min(loss, 700)), kl=kl / tokens, top1=same / tokens)


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
