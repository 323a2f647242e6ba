"""What models write to the same prompt, from their checkpoints."""

import textwrap

import torch

from common.dataset import Dataset, find_folder
from common.texts import codec_of
from kv_cache.generate import chooser, generate
from kv_cache.own_cache import KVCache
from training import checkpoint

PROMPT_TOKENS, NEW_TOKENS = 8, 40
WIDTH = 80  # of a line in characters: "  B (k=128) wrote: " stands before it


def one_line(text):
    """The beginning of what a model wrote, for the terminal."""
    return textwrap.shorten(text, WIDTH, placeholder=" ...")


def samples(rows):
    """[(row, the prompt, what it wrote)]; none where checkpoints, text or tokenizer are not here."""
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
    """The first words of the validation text, ids."""
    ids = Dataset(dataset).val[: 4 * PROMPT_TOKENS].tolist()
    return [i for i in ids if i != codec.end_of_text][:PROMPT_TOKENS]


@torch.inference_mode()
def written(folder, prompt, codec):
    """The same draw for every model: what it writes after the prompt, without its line breaks."""
    saved = checkpoint.load(folder)
    model = checkpoint.build(saved, dropout=0.0).eval()
    model.merge_lora()
    steps = min(NEW_TOKENS, model.config.block_size - len(prompt))
    choose = chooser(0.7, top_p=0.9, generator=torch.Generator().manual_seed(1337))
    cache = KVCache(model, 1, len(prompt) + steps, "float32")
    ids = [int(i) for i in generate(model, torch.tensor([prompt]), steps, choose, codec.end_of_text, cache)]
    return " ".join(codec.decode([i for i in ids if i != codec.end_of_text]).split())
