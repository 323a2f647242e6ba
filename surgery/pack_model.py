"""
Carry out --bytes and --cache_bytes: quantise a model's matrices and its cache, heal it if asked, write it to a folder, read it
back, and measure it.
"""

import copy
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from bits.modules import install_coded
from common.cli import fail
from kv_cache.hf_bits import code_cache
from surgery.coded import Coder, coded_in
from surgery.coded_folder import save
from surgery.decoding_speed import cache_bytes, decode_speeds
from surgery.heal import healing_dtype
from surgery.heal_coded import heal_coded
from surgery.reading import load
from surgery.subject import Subject
from surgery.sweep import add_line, made_by


def pack_model(args, subject, tokenizer, texts, evaluator, folder):
    """
    Write the model to --out -> its record, with measures of the untouched, the packed and the healed model.

    folder: stores the moments of calibration for a later call.
    """
    coded, taken = {}, 0
    windows = texts.healing_windows(args.heal_steps) if args.heal_steps else []
    if args.bytes:
        coder = Coder(subject, args.targets, texts, args.calib_tokens, args.seed, folder / "calibration_by_bits.pt")
        try:
            coded, taken = coder.code(args.bytes)
        except ValueError as error:
            fail(f"--bytes {args.bytes}: {error}")
    found = dict(untouched=evaluator.measure())
    hf, last, training = copy.deepcopy(subject.model), "packed", {}
    if args.heal_steps:
        with coded_in(coder.matrices, coded.values()):
            found["packed"] = evaluator.measure()
        last = "healed"
        with tqdm(total=args.heal_steps, desc="healing", unit="step") as bar:
            healing = copy.deepcopy(hf)
            coded, training = heal_coded(
                Subject,
                healing,
                coded,
                subject,
                windows,
                args.heal_steps,
                args.heal_rank,
                args.heal_lr,
                args.seed,
                shown(bar),
                healing_dtype(args, subject.config.n_embd),
            )
            keep_rest(healing, hf, coded)
    cache = cache_of(args, hf, coded, texts) if args.cache_bytes else []
    try:
        record = write_and_measure(args, hf, coded, tokenizer, evaluator, found | {last: training}, last, subject, taken, cache)
        record |= dict(made_by=made_by(args, folder))
        for file in (Path(args.out) / "measured.json", folder / "packed.jsonl"):
            add_line(file, record)
    except BaseException:
        shutil.rmtree(args.out, ignore_errors=True)
        raise
    return record


def cache_of(args, hf, coded, texts):
    """A LayerCode for each layer, calibrated on the model with its matrices already quantised."""
    decoded = copy.deepcopy(hf)
    install_coded(decoded, coded, packed=False)
    windows, _ = texts.calibration_windows(-(-args.calib_tokens // texts.length))
    torch.manual_seed(args.seed)
    try:
        windows = tqdm(windows, "calibration of the cache", unit="window")
        return code_cache(Subject(decoded), windows, args.cache_bytes, args.cache_form)
    except ValueError as error:
        fail(f"--cache_bytes {args.cache_bytes}: {error}")


def shown(bar):
    def log(kl):
        bar.set_postfix_str(f"KL {kl:.4f}")
        bar.update()

    return log


def keep_rest(healed, hf, coded):
    """Copy the parameters that are not quantised from a healed model into hf, which has the untouched model's modules."""
    theirs = dict(healed.named_parameters())
    inside = {id(hf.get_input_embeddings().weight), id(hf.get_output_embeddings().weight)}
    for name, p in hf.named_parameters():
        if name.removesuffix(".weight") not in coded and id(p) not in inside:
            p.data.copy_(theirs[name])


def write_and_measure(args, hf, coded, tokenizer, evaluator, found, last, subject, taken, cache):
    """Save, read back packed and decoded, measure -> the record. taken: bytes of the quantised matrices."""
    numbers, size = save(args.out, hf, tokenizer, coded, cache)
    decoded, _ = load(args.out, packed=False)
    found[last] = evaluator.measure(Subject(decoded)) | found[last]
    packed, _ = load(args.out)
    prompt = next(iter(evaluator.windows.values()))[0][0]
    with torch.inference_mode():
        logits = [hf(prompt[:, :32]).logits for hf in (packed, decoded)]
    apart = (logits[0] - logits[1]).abs()
    if cache:  # a key on the border of two codes may get either one
        apart = apart.mean()
    if apart.max() > 1e-2:
        raise RuntimeError(f"the packed form gives other logits than the decoded one, by {apart.max()}")
    speeds = decode_speeds([subject.model, decoded, packed], prompt[0, :64], steps=4)
    memory = sum(t.numel() * t.element_size() for t in [*packed.parameters(), *packed.buffers()])
    total = 2 * sum(p.numel() for p in subject.model.parameters())
    names = ("untouched", "decoded", "packed")
    kept = [cache_bytes(hf, prompt[0]) for hf in (subject.model, packed)]
    return dict(
        out=Path(args.out).name,
        targets=args.targets,
        bytes=dict(asked=args.bytes, coded=taken, on_disk=size, in_memory=memory),
        cache=dict(
            asked=args.cache_bytes,
            form=args.cache_form,
            tokens=prompt.shape[1],
            bytes_per_token=dict(zip(["untouched", "packed"], kept)),
        )
        | dict(constants=sum(2 * t.numel() for code in cache for t in code.tensors().values())),
        float16_bytes=total,
        stored=numbers,
        bits={name: made.bits_of_number for name, made in coded.items()},
        tokens_per_second={name: [round(x, 2) for x in speed] for name, speed in zip(names, speeds)},
        models=found,
    )
