"""For surgery.eval: one interface to every kind of model, ids -> logits, and the prediction of a text by windows."""

import torch

from common.cli import fail
from common.modules import check_complete, fresh_memory_is_nan
from common.untrusted import reading
from surgery.evaluator import measured
from surgery.folder import load
from surgery.subject import check_size, is_own, is_smaller, load_hugging_face, load_own, longest_of
from training import checkpoint


class Predictor:
    """
    A run of train.py, a Hugging Face model, or a folder that surgery wrote.

    longest  largest number of tokens that it reads
    rows     V, the size of its vocabulary
    first    the token before a text: beginning of text, or end of text if there is no beginning
    """

    def __init__(self, name, flag, tokenizer=None, device="cpu", trusted=False):
        """name: of the model. flag: that gave it. tokenizer: default: the model's own. trusted: its folder's code may run."""
        if is_own(name):
            subject, its_tokenizer = load_own(name, flag)
            model, self.longest = subject.model, subject.longest
            self.logits = lambda x: model.logits(model.hidden(x))  # (B, T) ids -> (B, T, V)
        else:
            model, its_tokenizer = self._of_hugging_face(name, flag, trusted)
            self.longest, self.logits = longest_of(model), lambda x: model(x, use_cache=False).logits
        checkpoint.move_to(model, device)
        self.device, self.tokenizer = device, tokenizer or its_tokenizer()
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.first = next((mark for mark in marks if mark is not None), None)
        if self.first is None:
            fail(f"the tokenizer of {flag} {name} has no beginning and no end of text: give a --tokenizer with one of them")
        with torch.inference_mode():
            self.rows = self.logits(torch.tensor([[0]], device=device)).shape[-1]
        check_size(self.tokenizer, name, self.rows, f"{flag} {name}")

    def _of_hugging_face(self, name, flag, trusted):
        """-> (the model, a function that returns its tokenizer)"""
        if is_smaller(name):
            model, tokenizer = load(name, packed=False)  # decode once: a packed model decodes again in every window
            return model, lambda: tokenizer
        if not trusted:
            return load_hugging_face(name, flag)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with reading(f"{flag} {name}", "a model that its own code loads", "give a folder of save_pretrained"):
            options = dict(trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
            with fresh_memory_is_nan():
                model, info = AutoModelForCausalLM.from_pretrained(name, **options)
            check_complete(model, info, f"{flag} {name}")
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
        return model.eval(), lambda: tokenizer


def rolling_windows(ids, first, length, stride, bos=None):
    """
    Ids of a text (n,) -> for each window (x (T,), y (T,), new): the last `new` tokens of y are predicted here first.

    first: the token before the text. The first window predicts `length` tokens, each further one `stride` more. It sees the
    tokens before them, up to `length` in all: T is `length` if the text is long enough. bos: takes the place of the first token
    that each window sees; None: only the first window begins with `first`, as in lm-eval.
    """
    everything, end = torch.cat([torch.tensor([first]), ids]), 0
    while end < len(ids):
        new = min(stride if end else length, len(ids) - end)
        end += new
        start = max(0, end - length)
        x = everything[start:end]
        yield x if bos is None else torch.cat([torch.tensor([bos]), x[1:]]), everything[start + 1 : end + 1], new


@torch.inference_mode()
def predict(model, reference, windows, batch_size):
    """
    Yield (Measured of the new tokens, position of the first new token) for each window.

    windows: a list from rolling_windows(). reference: a Predictor, or None.
    """
    for i in range(0, len(windows), batch_size):
        some = windows[i : i + batch_size]
        x = torch.stack([x for x, _, _ in some])
        logits = model.logits(x.to(model.device))
        others = reference.logits(x.to(reference.device)) if reference else [None] * len(some)
        for (_, y, new), found, other in zip(some, logits, others):
            yield measured(found[-new:], y[-new:], other if other is None else other[-new:]), len(y) - new
