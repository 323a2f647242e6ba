"""
Write a smaller model: heal it if asked, save it, read it back, check it, and measure it beside the untouched model.

The work before this takes minutes. So if a check or a measurement fails, the folder is kept under another name.
"""

import copy
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from bits.modules import install_coded
from common.cli import fail
from kv_cache.bit_fit import code_cache
from kv_cache.decoding_speed import cache_bytes, decode_speeds
from surgery import bits_folder, rank_folder
from surgery.bits_model import Coder, coded_in
from surgery.evaluator import measured
from surgery.folder import load
from surgery.heal import Recipe, heal, heal_coded
from surgery.rank_cut import check_changes, fingerprint
from surgery.rank_modules import shrink
from surgery.subject import Subject
from surgery.sweep import add_line, made_by

CHECKED = 256  # tokens of each text on which the packed and the decoded form are compared


def write_model(args, folder, lines, make):
    """
    make() writes the model to --out and returns its record. Store the record beside the model and in folder / lines.

    folder: of the sweep. If anything fails after the model is written, its folder is kept under another name.
    """
    try:
        record = make() | dict(made_by=made_by(args, folder))
        for file in (Path(args.out) / "measured.json", folder / lines):
            add_line(file, record)
        return record
    except BaseException:
        keep(args.out)
        raise


def keep(out):
    """Give a folder that was written, but not checked, a name that nobody takes for a finished model."""
    if Path(out).exists():
        names = (Path(f"{out}.unchecked{i or ''}") for i in range(1000))
        kept = Path(out).rename(next(name for name in names if not name.exists()))
        print(f"the model was written but not checked: it is kept as {kept}", file=sys.stderr, flush=True)


# -- by rank ----------------------------------------------------------------------------------------------------------


def write_smaller(args, point, surgeon, evaluator, tokenizer, windows, parts):
    """
    Write the point's model to --out -> its record, with measures of the untouched, the smaller and the healed model.

    windows: for healing. parts: of check_same(). Raises RuntimeError if the smaller model loses something else than the sweep
    measured.
    """
    subject = surgeon.subject
    before = fingerprint(subject.model)
    with surgeon.cut(point) as cut:
        cut_measured = evaluator.measure()
    check_changes(before, subject.model)
    hf = copy.deepcopy(subject.model)
    plan = shrink(hf, cut.stacks, cut.tables, parts)
    small = Subject(hf)
    found = dict(untouched=evaluator.measure(), smaller=evaluator.measure(small))
    if max(abs(found["smaller"][name] - cut_measured[name]) for name in ("loss", "kl")) > 1e-4:
        raise RuntimeError(f"the factors lose {found['smaller']['loss']}, their products {cut_measured['loss']}")
    training = {}
    if args.heal_steps:
        training = heal(small, subject, windows, Recipe.of(args, subject.config.n_embd)) | dict(text=args.heal_text)
    stored = rank_folder.save(args.out, hf, tokenizer, plan)
    read, _ = load(args.out, args.device)
    last = "healed" if training else "smaller"
    found[last] = evaluator.measure(Subject(read)) | training
    prompt = next(iter(evaluator.windows.values()))[0][0][0]
    speeds = decode_speeds([subject.model, read], prompt)
    numbers = sum(p.numel() for p in subject.model.parameters())
    rows = (("untouched", subject.model, (numbers, 4 * numbers), speeds[0]), (last, read, stored, speeds[1]))
    for name, hf, (numbers, size), speed in rows:
        found[name] |= dict(numbers=numbers, bytes=size)
        found[name] |= dict(cache_bytes=cache_bytes(hf, prompt), tokens_per_second=[round(x, 2) for x in speed])
    return point.record() | dict(out=Path(args.out).name, context=len(prompt), models=found)


# -- by bits ----------------------------------------------------------------------------------------------------------


def write_packed(args, subject, tokenizer, texts, evaluator, folder, parts):
    """
    Quantise a model's matrices and its cache, and write it to --out -> its record, with measures of the untouched, the packed
    and the healed model.

    folder: stores the moments of calibration for a later call. parts: of check_cache().
    """
    coded, taken, hf = {}, 0, copy.deepcopy(subject.model)
    windows = texts.healing_windows(args.heal_steps) if args.heal_steps else []
    if args.bytes:
        coder = Coder(subject, args.targets, texts, args.calib_tokens, args.seed, folder / "calibration_by_bits.pt")
        try:
            coded, taken = coder.code(args.bytes)
        except ValueError as error:
            fail(f"--bytes {args.bytes}: {error}")
    found, last, training = dict(untouched=evaluator.measure()), "packed", {}
    if args.heal_steps:
        with coded_in(coder.matrices, coded.values()):
            found["packed"] = evaluator.measure()
        last, healing = "healed", copy.deepcopy(hf)
        coded, training = heal_coded(healing, coded, subject, windows, Recipe.of(args, subject.config.n_embd))
        keep_rest(healing, hf, coded)
    cache = cache_of(args, hf, coded, texts, parts) if args.cache_bytes else []
    numbers, size = bits_folder.save(args.out, hf, tokenizer, coded, cache, parts)
    decoded, packed = (load(args.out, packed=form)[0] for form in (False, True))
    found[last] = evaluator.measure(Subject(decoded)) | training
    windows = [some[0] for some in evaluator.windows.values()]
    check_packed(packed, decoded, windows, lossy=bool(cache))
    prompt = windows[0][0][0]
    speeds = decode_speeds([subject.model, decoded, packed], prompt[:64], steps=4)
    memory = sum(t.numel() * t.element_size() for t in [*packed.parameters(), *packed.buffers()])
    kept = {name: cache_bytes(hf, prompt) for name, hf in dict(untouched=subject.model, packed=packed).items()}
    constants = sum(2 * t.numel() for code in cache for t in code.tensors().values())
    in_cache = dict(asked=args.cache_bytes, form=args.cache_form, tokens=len(prompt), bytes_per_token=kept, constants=constants)
    return dict(
        out=Path(args.out).name,
        targets=args.targets,
        bytes=dict(asked=args.bytes, coded=taken, on_disk=size, in_memory=memory),
        cache=in_cache,
        float16_bytes=2 * sum(p.numel() for p in subject.model.parameters()),
        stored=numbers,
        bits={name: made.bits_of_number for name, made in coded.items()},
        tokens_per_second={
            name: [round(x, 2) for x in speed] for name, speed in zip(("untouched", "decoded", "packed"), speeds)
        },
        models=found,
    )


def keep_rest(healed, hf, coded):
    """Copy the parameters that are not quantised from a healed model into hf, which has the untouched model's modules."""
    theirs = dict(healed.named_parameters())
    inside = {id(hf.get_input_embeddings().weight), id(hf.get_output_embeddings().weight)}
    for name, p in hf.named_parameters():
        if name.removesuffix(".weight") not in coded and id(p) not in inside:
            p.data.copy_(theirs[name])


def cache_of(args, hf, coded, texts, parts):
    """A LayerCode for each layer, calibrated on the model with its matrices already quantised."""
    decoded = copy.deepcopy(hf)
    install_coded(decoded, coded, packed=False)
    windows, _ = texts.calibration_windows(-(-args.calib_tokens // texts.length))
    torch.manual_seed(args.seed)
    try:
        windows = tqdm(windows, "calibration of the cache", unit="window")
        return code_cache(Subject(decoded), windows, args.cache_bytes, args.cache_form, parts)
    except ValueError as error:
        fail(f"--cache_bytes {args.cache_bytes}: {error}")


@torch.inference_mode()
def check_packed(packed, decoded, windows, lossy):
    """
    Raise RuntimeError if the packed model does not compute what the decoded one does.

    windows: a list of (x (1, T), y (1, T)).

    lossy: the cache is quantised. A number on the border of two levels may then get either one, so single logits differ. The
    mean loss does not: it may differ by 4 standard errors, and by 0.02 nats.
    """
    most, lost = 0.0, []
    for x, y in windows:
        x, y = x[:, :CHECKED], y[0, :CHECKED]
        ours, theirs = (hf(x).logits[0] for hf in (packed, decoded))
        most = max(most, (ours - theirs).abs().max().item())
        lost.append(measured(ours, y).loss.double() - measured(theirs, y).loss)
    lost = torch.cat(lost)
    mean, error = lost.mean().item(), lost.std().item() / len(lost) ** 0.5
    if not lossy and not most < 1e-2:
        raise RuntimeError(f"the packed form gives other logits than the decoded one, by {most}")
    if not abs(mean) <= min(4 * error + 1e-5, 0.02):
        raise RuntimeError(f"the packed form loses {mean:.4f} +/- {error:.4f} nats more than the decoded one")
