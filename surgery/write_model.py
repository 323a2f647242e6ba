"""A point of surgery made into a smaller model on disk: healed where asked, read back, measured beside the untouched one."""

import copy
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from common.timing import by_turns
from surgery.heal import heal, healing_dtype
from surgery.low_rank_folder import save
from surgery.low_rank_modules import shrink
from surgery.reading import load
from surgery.subject import Subject
from surgery.surgeon import check_changes, fingerprint
from surgery.sweep import add_line, made_by


def write_smaller(args, point, surgeon, evaluator, tokenizer, windows, folder):
    """make_smaller(), and its record in both folders. A model that was not measured to its end is removed."""
    try:
        record = make_smaller(args, point, surgeon, evaluator, tokenizer, windows) | dict(made_by=made_by(args, folder))
        for file in (Path(args.out) / "measured.json", folder / "smaller.jsonl"):
            add_line(file, record)
    except BaseException:
        shutil.rmtree(args.out, ignore_errors=True)
        raise


def make_smaller(args, point, surgeon, evaluator, tokenizer, windows):
    """
    Write the point's model to --out -> its record: a dict of measures for each of untouched, smaller and healed.

    windows: for healing. Raises RuntimeError where the smaller model is not the one that the sweep
    measured.
    """
    subject = surgeon.subject
    before = fingerprint(subject.model)
    with surgeon.cut(point) as cut:
        measured = evaluator.measure()
    check_changes(before, subject.model)
    hf = copy.deepcopy(subject.model)
    plan = shrink(hf, cut.stacks, cut.tables)
    small = Subject(hf)
    found = dict(untouched=evaluator.measure(), smaller=evaluator.measure(small))
    if max(abs(found["smaller"][name] - measured[name]) for name in ("loss", "kl")) > 1e-4:
        raise RuntimeError(f"the factors lose {found['smaller']['loss']}, their products {measured['loss']}")
    training = heal_with_bar(args, small, subject, windows) | dict(text=args.heal_text) if args.heal_steps else None
    stored = save(args.out, hf, tokenizer, plan)
    read, _ = load(args.out, args.device)
    last = "healed" if training else "smaller"
    found[last] = evaluator.measure(Subject(read)) | (training or {})
    prompt = next(iter(evaluator.windows.values()))[0][0][0]
    speeds = decode_speeds([subject.model, read], prompt)
    numbers = sum(p.numel() for p in subject.model.parameters())
    rows = (("untouched", subject.model, (numbers, 4 * numbers), speeds[0]), (last, read, stored, speeds[1]))
    for name, hf, (numbers, size), speed in rows:
        found[name] |= dict(numbers=numbers, bytes=size)
        found[name] |= dict(cache_bytes=cache_bytes(hf, prompt), tokens_per_second=[round(x, 2) for x in speed])
    return point.record() | dict(out=Path(args.out).name, context=len(prompt), models=found)


def heal_with_bar(args, student, teacher, windows):
    dtype = healing_dtype(args, teacher.config.n_embd)
    with tqdm(total=args.heal_steps, desc="healing", unit="step") as bar:

        def log(kl):
            bar.set_postfix_str(f"KL {kl:.4f}")
            bar.update()

        return heal(student, teacher, windows, args.heal_steps, args.heal_rank, args.heal_lr, args.seed, log, dtype)


@torch.inference_mode()
def cache_bytes(hf, ids):
    """Bytes a token of the cache that a model fills with ids [n]: counted on its tensors."""
    cache = hf(ids[None].to(hf.device), use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors) / len(ids)


class Greedy:
    """Greedy decoding of a Hugging Face model after the prompt ids [n]."""

    def __init__(self, hf, ids, steps):
        self.hf, self.ids, self.steps = hf, ids, steps

    @torch.inference_mode()
    def prepare(self):
        self.out = self.hf(self.ids[None].to(self.hf.device), use_cache=True, logits_to_keep=1)
        self.out.logits[0, -1].argmax().item()  # waits for the device

    @torch.inference_mode()
    def run(self):
        out = self.out
        for _ in range(self.steps):
            out = self.hf(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        out.logits[0, -1].argmax().item()  # waits for the device


def decode_speeds(models, ids, steps=24, rounds=3):
    """Tokens/s of greedy decoding after the prompt ids [n], by turns -> for each model a list, one number a round."""
    tasks = [Greedy(hf, ids, steps) for hf in models]
    seconds = by_turns({i: (task.prepare, task.run) for i, task in enumerate(tasks)}, rounds)
    return [[steps / s for s in found] for found in seconds.values()]
