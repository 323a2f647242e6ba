"""Speed of decoding with Hugging Face models, which alternate on one machine, and the bytes of their caches."""

import torch

from common.timing import by_turns


@torch.inference_mode()
def cache_bytes(hf, ids):
    """Bytes per token of the cache that a model fills with ids [n], counted on the cache's tensors."""
    return allocated(hf(ids[None].to(hf.device), use_cache=True).past_key_values) / len(ids)


def allocated(cache):
    """Bytes of a cache, including free space in its buffers for later tokens."""
    tensors = [t for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t)]  # recurrent layers have states
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Greedy:
    """
    Greedy decoding of a Hugging Face model after prompts, ids (B, n).

    new_cache: a function that makes an empty cache. None: the model makes it.
    """

    def __init__(self, hf, ids, steps, new_cache=None):
        self.hf, self.ids, self.steps, self.new_cache = hf, ids.to(hf.device), steps, new_cache

    @torch.inference_mode()
    def prepare(self):
        past = self.new_cache and self.new_cache()
        self.out = self.hf(self.ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        self.out.logits[0, -1].argmax().item()  # waits for the device

    @torch.inference_mode()
    def run(self):
        out = self.out
        for _ in range(self.steps):
            out = self.hf(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        out.logits[0, -1].argmax().item()  # waits for the device


def decode_speeds(models, ids, steps=24, rounds=3):
    """Tokens/s of greedy decoding after ids [n], the models alternating -> a list for each model, one number per round."""
    tasks = [Greedy(hf, ids[None], steps) for hf in models]
    seconds = by_turns({i: (task.prepare, task.run) for i, task in enumerate(tasks)}, rounds)
    return [[steps / s for s in found] for found in seconds.values()]
