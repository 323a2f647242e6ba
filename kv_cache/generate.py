"""Text, one token after the other."""

import torch

from model import NO_CACHE


def chooser(temperature, top_k=None, top_p=None, generator=None):
    """
    Return a function that chooses the next tokens: logits (B, V) -> ids (B,).

    temperature 0 takes the likeliest token. top_k keeps the k likeliest tokens. top_p keeps the likeliest tokens until their
    probabilities sum to top_p, at least one (arXiv:1904.09751). Both act after the temperature, top_k first.
    """

    def choose(logits):
        if temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / temperature
        if top_k is not None:
            kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probabilities = logits.softmax(-1)
        if top_p is not None:
            falling, order = probabilities.sort(descending=True)
            falling[falling.cumsum(-1) - falling >= top_p] = 0  # the likelier tokens already sum to top_p
            probabilities = torch.zeros_like(falling).scatter(-1, order, falling)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return choose


@torch.inference_mode()
def generate(model, idx, steps, choose, end_of_text=None, cache=NO_CACHE):
    """
    Yield the next token of every row of idx (B, T) as ids (B,), at most `steps` times.

    end_of_text: an id, a list of ids, or None. A row that has ended repeats the first of these ids; generation stops when all
    rows have ended. With a KVCache each step processes only the new token, without one the entire text. model: a GPT, or a
    decoder() of one.
    """
    ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    ends = torch.tensor([] if end_of_text is None else end_of_text, dtype=torch.long, device=idx.device).flatten()
    for _ in range(steps):
        token = choose(model.logits(model.hidden(idx, cache)[:, -1]))
        if len(ends):
            token = token.masked_fill(ended, ends[0])
            ended |= torch.isin(token, ends)
        yield token
        if ended.all():
            return
        idx = torch.cat([idx, token[:, None]], 1) if cache is NO_CACHE else token[:, None]
