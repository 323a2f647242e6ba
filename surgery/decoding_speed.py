"""Speed of decoding with Hugging Face models, which alternate on one machine, and the bytes of their caches."""

from functools import partial

import torch

from common.cli import fail
from common.timing import by_turns
from kv_cache.hf_int8 import int8_cache
from surgery.reading import load
from surgery.subject import is_own, is_smaller, load_hugging_face


@torch.inference_mode()
def cache_bytes(hf, ids):
    """Bytes per token of the cache that a model fills with ids [n], counted on the cache's tensors."""
    return allocated(hf(ids[None].to(hf.device), use_cache=True).past_key_values) / len(ids)


def allocated(cache):
    """Bytes of a cache, including free space in its buffers for later tokens."""
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


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


def open_model(name):
    """A Hugging Face model or a folder that surgery wrote, in float32 on the CPU."""
    if is_own(name):
        fail(f"--models {name} is a run of train.py: python bench.py decode --runs measures those")
    return load(name)[0] if is_smaller(name) else load_hugging_face(name, "--models")[0]


def compare(models, caches, context, B, steps, rounds, after_round):
    """
    Decode greedily after `context` random ids, with models and caches alternating.

    models: {name: model}. caches: "own" (the model's) or "int8" -> a dict for each model and cache, with the bytes that the
    cache allocates per token and the seconds of each round.
    """
    tasks = {}
    for name, hf in models.items():
        torch.manual_seed(0)
        ids = torch.randint(hf.get_input_embeddings().weight.shape[0], (B, context))
        new_caches = dict(own=None, int8=partial(int8_cache, hf))
        tasks |= {(name, cache): Greedy(hf, ids, steps, new_caches[cache]) for cache in caches}
    seconds = by_turns({key: (task.prepare, task.run) for key, task in tasks.items()}, rounds, after_round)
    rows = []
    for (name, cache), task in tasks.items():
        size = allocated(task.out.past_key_values) / (B * (context + steps))
        rows.append(dict(context=context, model=name, cache=cache, bytes_per_token=size, seconds=seconds[name, cache]))
    return rows
