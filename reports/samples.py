"""Lets the checkpoints of several models write text to the same prompt."""

import textwrap

import torch

from common.dataset import Dataset, find_folder
from common.texts import codec_of
from kv_cache.generate import chooser, generate
from kv_cache.own_cache import KVCache
from training import checkpoint

PROMPT_TOKENS, NEW_TOKENS = 8, 40
WIDTH = 80  # characters of a line, after "  B (k=128) wrote: "


def one_line(text):
    """The beginning of a model's text, for the terminal."""
    return textwrap.shorten(text, WIDTH, placeholder=" ...")


def samples(rows):
    """[(row, the prompt, the text it wrote)]; empty if checkpoints, dataset or tokenizer are missing."""
    found = []
    for row in rows:
        folder, dataset = next(iter(row.folders.values())), row.one("dataset")
        codec = codec_of(dataset, hint="", required=False) if find_folder(dataset) else None
        if codec is None or not (folder / "ckpt.pt").is_file():
            return []
        prompt = opening(dataset, codec[0])
        found.append((row, " ".join(codec[0].decode(prompt).split()), written(folder, prompt, codec[0])))
    return found


def opening(dataset, codec):
    """The ids of the first words of the validation text."""
    ids = Dataset(dataset).val[: 4 * PROMPT_TOKENS].tolist()
    return [i for i in ids if i != codec.end_of_text][:PROMPT_TOKENS]


@torch.inference_mode()
def written(folder, prompt, codec):
    """The text that a model writes after the prompt, without line breaks. Every model samples with the same random numbers."""
    saved = checkpoint.load(folder)
    model = checkpoint.build(saved, dropout=0.0).eval()
    model.merge_lora()
    steps = min(NEW_TOKENS, model.config.block_size - len(prompt))
    choose = chooser(0.7, top_p=0.9, generator=torch.Generator().manual_seed(1337))
    cache = KVCache(model, 1, len(prompt) + steps, "float32")
    ids = [int(i) for i in generate(model, torch.tensor([prompt]), steps, choose, codec.end_of_text, cache)]
    return " ".join(codec.decode([i for i in ids if i != codec.end_of_text]).split())
