"""Writes the model card, README.md of an exported folder. It shows only numbers that were measured before the export."""

import json
import re
import shlex
import statistics
import sys
from pathlib import Path

from common.untrusted import COUNT, Positive, read_json

NUMBER = (float, None)
HINT = "move it away: the card then skips its numbers"
EVALUATION = {"val_loss": float, "val_ppl": float, "eval_tokens": COUNT, "tokens?": COUNT}
SUMMARY = {"dataset": str, "final": EVALUATION, "hardware?": str, "seconds?": NUMBER, "starts_from?": (dict(ckpt=str), None)}
MEASURED = {"loss": float, "ppl": float, "kl?": NUMBER, "texts?": {str: dict(ppl=float)}}
MEASURED |= {"tokens_per_second?": [Positive], "cache_bytes?": Positive}
RECORD = {
    "models": {str: MEASURED}, "method?": (str, None), "targets?": str, "mode?": str, "rank?": (int, None),
    "bytes?": dict(asked=NUMBER), "cache?": {"asked?": NUMBER}, "tokens_per_second?": {str: [Positive]},
    "made_by?": dict.fromkeys(("model", "command", "calib_text", "eval_text", "commit", "hardware"), str),
}  # fmt: skip


def facts_of_run(path, saved):
    """[(name, text)] of a checkpoint. A run's best checkpoint takes the facts from its folder, any other from the file."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if path.name != "ckpt.pt" or not path.with_name("summary.json").is_file():
        loss, tokens = saved.get("val_loss"), saved["tokens"]
        return [
            ("trained on", saved["args"]["dataset"]),
            ("tokens read", f"{tokens:,}" if tokens else None),
            ("loss, validation text", f"{loss:.4f} nats a token" if loss else None),
        ]
    found = read_json(path.with_name("summary.json"), SUMMARY, "what train.py writes", HINT)
    config = read_json(path.with_name("config.json"), {"command?": str, "commit?": str}, "a run's config.json", HINT)
    final, start = found["final"], found.get("starts_from")
    return [
        ("trained on", found["dataset"]),
        ("tokens read", f"{final['tokens']:,}" if "tokens" in final else None),
        ("loss, validation text", f"{final['val_loss']:.4f} nats a token"),
        ("perplexity", f"{final['val_ppl']:.2f}"),
        ("evaluated on", f"{final['eval_tokens']:,} tokens of it"),
        ("started from", Path(start["ckpt"]).parent.name if start else None),
        ("hardware", found.get("hardware")),
        ("trained by", code(config.get("command"))),
        ("commit", config.get("commit")),
    ]


def facts_of_smaller(folder):
    """[(name, text)] of a folder of surgery, from its measured.json."""
    path = Path(folder) / "measured.json"
    if not path.is_file():
        return []
    record = read_json(path, RECORD, "what surgery writes", HINT)
    made, models = record.get("made_by", {}), record["models"]
    last, before = models[list(models)[-1]], models.get("untouched")
    speed = statistics.median(record.get("tokens_per_second", {}).get("packed") or last.get("tokens_per_second") or [0])
    facts = [
        ("base model", made.get("model")),
        ("cut", " ".join(str(record[name]) for name in ("targets", "mode", "method") if record.get(name)) or None),
        ("rank", record.get("rank")),
        ("share of the matrices' float16 bytes", record.get("bytes", {}).get("asked")),
        ("share of the cache's float16 bytes", record.get("cache", {}).get("asked")),
        ("calibration text", names(made.get("calib_text"))),
        ("evaluation text", names(made.get("eval_text"))),
        ("perplexity", against(last, before, "ppl", ".2f")),
        ("loss, nats a token", against(last, before, "loss", ".4f")),
        ("KL from the base model, nats a token", f"{last['kl']:.4f}" if last.get("kl") is not None else None),
    ]
    facts += [(f"perplexity, {names(text)}", f"{found['ppl']:.2f}") for text, found in last.get("texts", {}).items()]
    facts += [
        ("tokens/s, greedy, in surgery's own folder", f"{speed:.1f}" if speed else None),
        ("hardware", made.get("hardware")),
    ]
    return facts + [("written by", code(made.get("command"))), ("commit", made.get("commit"))]


def names(texts):
    """Names of texts as the card shows them: a path becomes the file's name."""
    return ", ".join(Path(text).name for text in texts.split(", ")) if texts else None


def against(last, before, name, form):
    return f"{last[name]:{form}}" + (f" (base model: {before[name]:{form}})" if before else "")


def code(command):
    return f"`{' '.join(map(shown, shlex.split(command)))}`" if command else None


def shown(word):
    """A word of a command as the card shows it: a path on this machine becomes its last name."""
    return ",".join(Path(part).name if part.startswith("/") else part for part in word.split(","))


def base_model(facts):
    """The base model's id on the hub, if it has one."""
    name = dict(facts).get("base model") or ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def write_card(folder, name, hf, form, facts):
    """The lines of a folder's README.md. facts: [(name, text or None)]."""
    compact = form == "compact"
    header = dict(library_name="transformers", base_model=base_model(facts), tags=["nanopca"])
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items() if value), "---", "", f"# {name}", ""]
    trust = ", trust_remote_code=True" if compact else ""  # the tokenizer's loader reads config.json, and needs it too
    needs = "Its code is `modeling_nanopca.py`, beside the weights." if compact else "It needs only transformers."
    lines += [f"{type(hf).__name__}, written by nanoPCA's `{form}` export. {needs}", "", "```python"]
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})']
    facts = [*facts, ("exported by", code(shlex.join(["python", "-m", "export", *sys.argv[1:]])))]
    lines += ["```", "", "| | |", "|---|---|", *(f"| {key} | {str(text).replace('|', ' ')} |" for key, text in facts if text)]
    (Path(folder) / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
