"""Greedy decoding of Hugging Face models, which alternate on one machine."""

from functools import partial

import torch

from common.cli import fail
from common.timing import by_turns
from kv_cache.decoding_speed import Greedy, allocated
from kv_cache.hf_int8 import int8_cache
from surgery.folder import load
from surgery.subject import is_own, is_smaller, load_hugging_face


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
