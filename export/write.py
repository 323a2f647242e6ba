"""Writes a model to a Hugging Face folder, completely or not at all, reads it back and compares its logits."""

import json
from pathlib import Path

import torch

from common.files import written_whole
from export.card import write_card
from export.compact import CODE, write_compact
from export.multiplied import plain_config

SAME = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 3e-1}  # allowed rounding of logits, relative to the largest
SAME_CODES = 3e-2  # for a quantized cache: a number between two levels may round to either


def write(args, source):
    """Write a Source -> the entries of the program's last line."""
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    form, dtype = "compact" if args.compact else "dense", getattr(torch, args.dtype)
    packed = source.plan and "coded" in source.plan
    numbers = sum(p.numel() for p in source.hf.parameters())
    what = "numbers beside the packed matrices" if packed else f"numbers in {args.dtype}"
    c, draw = source.hf.config, torch.Generator().manual_seed(0)
    ids = torch.randint(c.vocab_size, (2, min(8, c.max_position_embeddings)), generator=draw)
    with torch.inference_mode():
        before = source.logits(ids)
    with written_whole(args.out, "--out: make room, or choose another folder", errors=(OSError, SafetensorError)) as part:
        source.hf.config = plain_config(source.hf)
        if source.plan:
            write_compact(part, source.hf, source.plan, dtype)
        else:
            given, source.hf.generation_config = source.hf.generation_config, GenerationConfig()
            type(source.hf).save_pretrained(source.hf.to(dtype), part)  # it refuses some old settings of generation
            given.to_json_file(part / "generation_config.json")
        name_angles_twice(part / "config.json")
        save_tokenizer(source.tokenizer, part)
        size = sum(file.stat().st_size for file in part.glob("*.safetensors"))
        counted = [(what, f"{numbers:,}"), ("bytes of the weights", f"{size:,}")]
        write_card(part, Path(args.out).name, source.hf, form, counted + source.facts)
        moved = distance(part, dtype, ids, before)
        if not moved <= max(SAME[args.dtype], SAME_CODES * bool(packed and source.plan.get("cache"))):
            raise RuntimeError(f"the exported model's logits differ by {moved:.2g} of the largest")
    print(f"{args.out}: {type(source.hf).__name__}, {numbers:,} {what}, {size:,} bytes; logits moved by {moved:.1e}")
    return dict(out=args.out, form=form, architecture=type(source.hf).__name__, numbers=numbers, bytes=size, moved=moved)


def name_angles_twice(path):
    """Add the old names of the rotary settings to a config.json. Without them, transformers 4 would use its defaults."""
    values = json.loads(path.read_text(encoding="utf-8"))
    rope = values.get("rope_parameters") or {}
    if "rope_theta" not in rope:  # no rotary positions, or different ones in some layers
        return
    neox = values["model_type"].endswith("gpt_neox")
    names = dict(rope_theta="rotary_emb_base" if neox else "rope_theta")
    names |= dict(partial_rotary_factor="rotary_pct" if neox else "partial_rotary_factor")
    values |= {names[name]: value for name, value in rope.items() if name in names}
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {name: value for name, value in rope.items() if name not in names}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name before transformers 5
    values["model_input_names"] = (
        tokenizer.model_input_names
    )  # otherwise transformers 4 adds token_type_ids, which generate() refuses
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.inference_mode()
def distance(folder, dtype, ids, before):
    """The largest difference between the logits of the folder's model and of the source, relative to the largest logit."""
    from transformers import AutoModelForCausalLM

    own = (folder / f"{CODE}.py").is_file()  # this program just wrote it, so it is trusted
    after = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=own).eval()(ids).logits.float()
    return ((after - before).abs().max() / before.abs().max()).item()
