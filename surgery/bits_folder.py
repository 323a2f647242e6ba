"""
A packed model on disk. surgery.safetensors holds the packed matrices, all other matrices in float16, vectors (norms, biases) in
float32, and the constants of a quantised cache in 16 bits. config.json's entry "surgery" is {"coded": [names of the matrices],
"window": bits of a trellis state, "cache": [bits of the components, for each stream of each layer]}.
"""

from bits.coded_matrix import CodedMatrix
from bits.modules import install_coded
from bits.trellis import FAST_WINDOW, WINDOW, float16_code, gaussian_codes
from kv_cache.bit_code import LAYERS_BEFORE, LayerCode
from kv_cache.hf_attention import attention_entries, parts_in
from kv_cache.hf_bits import install_cache
from kv_cache.hf_layers import find_layers
from surgery.folder import check_tensors, put, write_folder


def save(folder, hf, tokenizer, coded, cache=(), parts=None):
    """
    Write a new folder -> (numbers, bytes) of its weights. If that fails, no folder remains.

    hf: the original model. coded: {name: CodedMatrix} of its matrices; "wte" and "head" are its token table and its head.
    cache: a LayerCode for each layer, or none. parts: of the attention layers, see install_cache().
    """
    tensors, inside = {}, set()
    for name, made in coded.items():
        tensors |= {f"coded.{name}.{part}": tensor.contiguous() for part, tensor in made.tensors().items()}
        inside.add(id((ends_of(hf).get(name) or hf.get_submodule(name)).weight))
    rest = {name: p.detach().cpu() for name, p in hf.named_parameters() if id(p) not in inside}
    tensors |= {name: (p if p.dim() == 1 else p.half()).contiguous() for name, p in rest.items()}
    for i, code in enumerate(cache):
        tensors |= {f"cache.{i}.{part}": tensor.cpu().contiguous() for part, tensor in code.tensors().items()}
    plan = dict(coded=list(coded), window=WINDOW, cache=[code.bits for code in cache])
    plan |= dict(attention=attention_entries(parts)) if parts else {}
    return write_folder(folder, hf, tokenizer, tensors, plan)


def parts_of(hf, plan, tensors):
    """
    Parse save()'s tensors -> ({name: CodedMatrix}, a LayerCode for each layer, {parameter's name: tensor} of the rest).

    hf: a model made from the config, possibly on the meta device. Raises an error if a name or a shape does not fit.
    """
    if plan.get("window") != WINDOW:
        raise ValueError("its codes belong to another version of this program: write the folder again")
    tensors, codes = dict(tensors), {code.half_bits: code for code in [*gaussian_codes(), float16_code()]}
    coded, inside = {}, set()
    layers = find_layers(hf) if plan.get("cache") else []
    if len(layers) != len(plan.get("cache", [])):
        raise ValueError(f"it has codes for {len(plan['cache'])} layers of {len(layers)}")
    cache = [layer_code(i, bits, taken(tensors, f"cache.{i}."), layers) for i, bits in enumerate(plan.get("cache", []))]
    for name in plan["coded"]:
        module = ends_of(hf).get(name) or hf.get_submodule(name)
        coded[name] = CodedMatrix.from_tensors(taken(tensors, f"coded.{name}."), codes)
        if coded[name].shape != module.weight.shape:
            raise ValueError(f"{name} has the shape {coded[name].shape}, the model {tuple(module.weight.shape)}")
        inside.add(id(module.weight))
    check_tensors(tensors, {name: p.shape for name, p in hf.named_parameters() if id(p) not in inside})
    return coded, cache, tensors


def check(hf, plan, tensors):
    parts_of(hf, plan, tensors)


def fill(hf, plan, tensors, packed=True):
    """Load save()'s tensors into a model that was made from its config on the meta device."""
    coded, cache, rest = parts_of(hf, plan, tensors)
    layers = find_layers(hf) if cache else []
    for name, tensor in rest.items():
        put(hf.get_parameter(name), tensor)
    install_coded(hf, coded, packed)
    if cache:
        install_cache(hf, cache, parts_in(plan), layers)


def taken(tensors, start):
    """Remove the tensors whose names begin with `start` from the dict -> {rest of the name: tensor}."""
    return {name[len(start) :]: tensors.pop(name) for name in list(tensors) if name.startswith(start)}


def layer_code(i, bits, tensors, layers):
    """Stored tensors -> LayerCode of layer i. Raises ValueError if they do not fit the layers."""
    bits = bits if bits and isinstance(bits[0], list) else [bits]  # older folders have one stream
    levels = tensors["levels"] if tensors["levels"].dim() == 3 else tensors["levels"][None]
    K, D, d = sum(map(len, bits)), len(layers[i].rows["k"]) + len(layers[i].rows["v"]), layers[i].width
    known = len(tensors["forecast"]) and d + D * min(i, LAYERS_BEFORE)
    shapes = dict(mean=(D,), forecast=(known, D), to_z=(D, K), from_z=(K, D))
    shapes["levels"] = (len(bits), levels.shape[1], 2**FAST_WINDOW)
    tensors = tensors | dict(levels=levels)
    if any(tensors[name].shape != shape or not tensors[name].isfinite().all() for name, shape in shapes.items()):
        raise ValueError(f"layer {i} of the cache is damaged")
    whole = all(type(b) is int and 0 < b < levels.shape[1] for stream in bits for b in stream)
    if not whole or any(stream != sorted(stream) for stream in bits) or levels.shape[1] > FAST_WINDOW + 1:
        raise ValueError(f"layer {i} of the cache has damaged bits")
    if len(bits) != (1 if known else 2) or (len(bits) == 2 and mixed(len(bits[0]), tensors["from_z"])):
        raise ValueError(f"layer {i} of the cache has damaged streams")
    return LayerCode(bits=bits, **tensors)


def mixed(K, from_z):
    """Whether the first K numbers affect more than keys, or the others more than values."""
    D = from_z.shape[1]
    return bool(from_z[:K, D // 2 :].any() or from_z[K:, : D // 2].any())


def ends_of(hf):
    return dict(wte=hf.get_input_embeddings(), head=hf.get_output_embeddings())
