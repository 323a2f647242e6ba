"""Prepares the measurement of decoding: dense and compressed models, their loss through a cache, tasks for common/timing.py."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.nanogpt import nanogpt
from common.cli import fail
from common.dataset import Dataset
from kv_cache.own_attention import Decode, decoder
from kv_cache.own_cache import KVCache
from model import GPT, GPTConfig
from training import checkpoint
from training.evaluate import evaluate

# name in the table, folder of the trained model, settings of the compressed parts
MODELS = (
    ("dense", "pythia_baseline", ()),
    ("V {r}/{d}", "vdproj_end_to_end_r*", ("v_proj_dim",)),
    ("K+V {r}/{d}", "kvdproj_end_to_end_r*", ("v_proj_dim", "k_proj_dim")),
)


def random_models(shape, rank, device):
    """[(name, model, None)], dense and compressed to `rank` numbers. shape: the fields of an uncompressed GPTConfig."""
    models = []
    for name, _, parts in MODELS:
        torch.manual_seed(0)
        model = GPT(GPTConfig(**shape | dict.fromkeys(parts, rank))).eval()
        models.append((name.format(r=rank, d=shape["n_embd"]), checkpoint.move_to(model, device), None))
    return models


def trained_models(runs, device):
    """[(name, model, its checkpoint)] of the runs that train_vdproj.sh wrote into a folder."""
    models = []
    for name, pattern, _ in MODELS:
        folders = sorted(path for path in Path(runs).glob(pattern) if (path / "summary.json").exists())
        if not folders:
            fail(f"--runs {runs} has no finished {pattern}: run bash scripts/train_vdproj.sh; with SEEDS, give OUT/seed_N")
        for folder in folders:
            saved = checkpoint.load(folder)
            model = checkpoint.move_to(checkpoint.build(saved, dropout=0.0).eval(), device)
            models.append((name.format(r=model.config.v_proj_dim, d=model.config.n_embd), model, saved))
    return models


def loss_through_cache(model, saved, kv_dtype, device):
    """Loss and perplexity on the run's own evaluation windows. Keys and values are read back from a cache of kv_dtype."""

    def cache_for(B):
        return KVCache(model, B, model.config.block_size, kv_dtype)

    args = SimpleNamespace(**saved["args"])
    return evaluate(model, Dataset(args.dataset), args, device, nullcontext(), cache_for=cache_for)


@torch.inference_mode()
def decoding_task(model, kv_dtype, way, B, context, steps, device):
    """A task that decodes the last `steps` tokens of the context, with its own cache."""
    cache = KVCache(model, B, context, kv_dtype)
    cache.fill(context - steps)
    return Decode(decoder(model, way), cache, torch.randint(model.config.vocab_size, (B, steps), device=device))


class NanoGPT:
    """The generate() of a nanoGPT checkout at the same shape, as a task. It has no cache, so the task has few tokens."""

    def __init__(self, folder, config, B, context, steps, dtype, device):
        self.model = nanogpt(folder, config).eval().to(device)
        self.steps = min(steps, 4)
        self.idx = torch.randint(config.vocab_size, (B, context - self.steps), device=device)
        self.autocast = torch.autocast(device, dtype) if dtype else nullcontext()
        self.tokens = self.idx.new_empty(B, self.steps)  # only its size is used

    def prepare(self):
        pass

    @torch.inference_mode()
    def run(self):
        with self.autocast:
            self.model.generate(self.idx, self.steps)
