"""Writes the compact form: weights, modeling_nanopca.py, and a config that names this file."""

import json

import torch

from bits.trellis import gaussian_codes
from export.bundle import bundle
from export.multiplied import plain_config
from kv_cache.bit_code import LayerCode
from kv_cache.hf_latents import LatentAttention
from surgery.rank_folder import stacks_of
from surgery.rank_modules import install, set_factors

CODE = "modeling_nanopca"
TITLE = {
    False: "{model}, compressed: low-rank factors replace matrices, latents replace keys and values.",
    True: "{model}, compressed: matrices, and keys and values if config.json says so, are stored in few bits.",
}
TAIL = """
class CompactConfig({config}):
    model_type = "nanopca_{kind}"


class CompactForCausalLM({mixin}, {model}):
    config_class = CompactConfig
""".strip()


@torch.no_grad()
def made_compact(hf, model, cuts):
    """Put the factors back into the standard form of our GPT, in place -> the plan (low_rank_modules.py)."""
    layer = "gpt_neox.layers.{}.attention" if model.config.rotary_pct else "transformer.h.{}.attn"
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


def write_compact(folder, hf, plan, dtype):
    """
    Write a model's weights, its config.json and modeling_nanopca.py.

    The weights are named like the modules. For some model types save_pretrained() uses other names, which can only be read back
    with a config of that type.
    """
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    packed = "coded" in plan
    if not packed:
        balance(hf, plan)
    tensors = packed_tensors(hf) if packed else {name: t.to(dtype) for name, t in stored(hf)}
    save_torch_state_dict({name: t.detach().contiguous() for name, t in tensors.items()}, folder)
    kind, config = hf.config.model_type, type(hf.config)
    values = plain_config(hf).to_dict() | dict(model_type=f"nanopca_{kind}", architectures=["CompactForCausalLM"])
    values |= dict(auto_map=dict(AutoConfig=f"{CODE}.CompactConfig", AutoModelForCausalLM=f"{CODE}.CompactForCausalLM"))
    values |= dict(dtype=str(dtype).removeprefix("torch."), surgery=packed_plan(hf, plan) if packed else plan)
    if plan.get("table") or "wte" in plan.get("coded", []):
        values["tie_word_embeddings"] = False  # the code ties the head itself
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if hf.generation_config is not None:
        hf.generation_config.to_json_file(folder / "generation_config.json")  # save_pretrained() refuses some old ones
    names = dict(model=type(hf).__name__, config=config.__name__, kind=kind, mixin="PackedModel" if packed else "LowRankModel")
    imports = [f"from transformers import {names['config']}, {names['model']}"]
    text = bundle("export.modeling", names["mixin"], TITLE[packed].format(**names), imports, TAIL.format(**names))
    (folder / f"{CODE}.py").write_text(text, encoding="utf-8")


@torch.no_grad()
def balance(hf, plan):
    """
    Give both factors of each stack the singular values' roots, in place: their product stays.

    The forms in surgery's folders, a skeleton and latents that are keys, have large entries: in bfloat16 they lose 0.1 nats.
    """
    for modules in stacks_of(hf, plan):
        left, right = torch.cat([module.up.weight for module in modules]).double(), modules[0].down.weight.double()
        (Q, R), (P, S) = torch.linalg.qr(left), torch.linalg.qr(right.T)
        U, values, Vt = torch.linalg.svd(R @ S.T)
        set_factors(modules, (Q @ U * values.sqrt()).float(), (values.sqrt()[:, None] * Vt @ P.T).float())
    for module in hf.modules():
        if isinstance(module, LatentAttention):
            module.basis = None  # the latents are no keys any more


def stored(hf):
    """(name, tensor) of all parameters and stored buffers. A shared tensor appears once."""
    kept = hf.state_dict().keys()
    return [(name, t) for name, t in [*hf.named_parameters(), *hf.named_buffers()] if name in kept]


def packed_tensors(hf):
    """The stored tensors of a packed model. As in surgery, unpacked matrices and those of the cache have 16 bits."""
    tensors = {name: t.half() if t.is_floating_point() and t.dim() > 1 else t for name, t in stored(hf)}
    for name, code in layer_codes(hf):
        tensors |= {f"{name}.{part}": t for part, t in code.tensors().items()}
    levels = torch.cat([code.levels for code in gaussian_codes()], 1)
    return tensors | {"levels.bits": levels.half().view(torch.int16)}


def layer_codes(hf):
    return [(name, module) for name, module in hf.named_modules() if isinstance(module, LayerCode)]


def packed_plan(hf, plan):
    """The plan of a packed model with the sizes of all tensors (modeling.py)."""
    ends = dict(wte=hf.get_input_embeddings(), head=hf.get_output_embeddings())
    coded = {name: (ends.get(name) or hf.get_submodule(name)).coded.tensors() for name in plan["coded"]}
    cache = [dict(bits=list(map(counts, code.bits)), parts=sizes(code.tensors())) for _, code in layer_codes(hf)]
    others = dict(attention=plan["attention"]) if "attention" in plan else {}
    return dict(coded={name: sizes(tensors) for name, tensors in coded.items()}, cache=cache, **others)


def sizes(tensors):
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def counts(bits):
    """bits of all components, ascending -> how many components have 1 bit, 2 bits, ..."""
    return [bits.count(b) for b in range(1, max(bits, default=0) + 1)]
