"""The compact form: modeling_nanopca.py beside the weights, and a config that names it."""

import json

import torch

from export.bundle import bundle
from export.multiplied import plain_config
from surgery.low_rank_modules import install, set_factors

CODE = "modeling_nanopca"
TAIL = """
class CompactConfig({config}):
    model_type = "nanopca_{kind}"


class CompactForCausalLM({mixin}, {model}):
    config_class = CompactConfig
""".strip()


@torch.no_grad()
def made_compact(hf, model, cuts):
    """Give the standard form of our GPT its factors back, in place -> the plan (low_rank_modules.py)."""
    layer = "gpt_neox.layers.{}.attention"
    stacks = [dict(parts=[[layer.format(cut.layer), cut.target]], rank=len(cut.right)) for cut in cuts]
    c, t, table = model.config, model.transformer, None
    if c.n_embd_wte is not None:
        table = dict(rank=c.n_embd_wte, mean=c.n_embd_wte_mean, head=None)
    plan = dict(stacks=stacks, table=table)
    made, ends = install(hf, plan)
    for parts, cut in zip(made, cuts):
        set_factors(parts, cut.left, cut.right)
    if ends:
        ends[0].wte.weight.copy_(t.wte.weight)
        ends[0].scale_up.load_state_dict(t.scale_up.state_dict())
        ends[1].scale_down.weight.copy_(t.scale_down.weight.T)
    return plan


def write_compact(folder, hf, plan):
    """
    Write a model's weights, its config.json and modeling_nanopca.py.

    The names of the weights are those of the modules: save_pretrained() has other ones for some kinds of models, which only a
    config of that kind reads back.
    """
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    persistent = hf.state_dict().keys()
    kept = [*hf.named_parameters(), *hf.named_buffers()]  # a shared one once
    save_torch_state_dict({name: t.detach().contiguous() for name, t in kept if name in persistent}, folder)
    kind, config = hf.config.model_type, type(hf.config)
    values = plain_config(hf).to_dict() | dict(model_type=f"nanopca_{kind}", architectures=["CompactForCausalLM"], surgery=plan)
    values |= dict(auto_map=dict(AutoConfig=f"{CODE}.CompactConfig", AutoModelForCausalLM=f"{CODE}.CompactForCausalLM"))
    values |= dict(dtype=str(hf.dtype).removeprefix("torch."))
    if plan["table"]:
        values["tie_word_embeddings"] = False  # lookup and head share wte by themselves
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if hf.generation_config is not None:
        hf.generation_config.save_pretrained(folder)
    names = dict(model=type(hf).__name__, config=config.__name__, kind=kind, mixin="LowRankModel")
    imports = [f"from transformers import {names['config']}, {names['model']}"]
    title = f"{names['model']} with less in it: low-rank factors in place of matrices, latents in place of keys and values."
    (folder / f"{CODE}.py").write_text(bundle("export.modeling", "LowRankModel", title, imports, TAIL.format(**names)))
