"""
A packed model on disk: surgery.safetensors holds the packed matrices, all other matrices in float16, vectors (norms, biases) in
float32. config.json's entry "surgery" is {"coded": [names of the matrices]}.
"""

from surgery.coded_modules import install
from surgery.model_folder import write_folder
from util_factorization.coded_matrix import CodedMatrix


def save(folder, hf, tokenizer, coded):
    """
    Write a new folder, whole or not at all -> (numbers, bytes) of its weights.

    hf: the model that the matrices {name: CodedMatrix} were made of; coded "wte" and "head" are its two ends.
    """
    tensors = {f"levels.{b}": levels for b, levels in next(iter(coded.values())).levels.items()}
    inside = set()
    for name, made in coded.items():
        tensors |= {f"coded.{name}.{part}": tensor.contiguous() for part, tensor in made.tensors().items()}
        inside.add(id((ends_of(hf).get(name) or hf.get_submodule(name)).weight))
    rest = {name: p.detach().cpu() for name, p in hf.named_parameters() if id(p) not in inside}
    tensors |= {name: (p if p.dim() == 1 else p.half()).contiguous() for name, p in rest.items()}
    return write_folder(folder, hf, tokenizer, tensors, dict(coded=list(coded)))


def fill(hf, plan, tensors, packed):
    """Give a model, made from its config, the tensors of save(). Raises where a name or a shape does not fit."""
    levels = {int(name.split(".")[1]): tensors.pop(name) for name in list(tensors) if name.startswith("levels.")}
    coded, inside = {}, set()
    for name in plan["coded"]:
        start = f"coded.{name}."
        own = {key[len(start) :]: tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        module = ends_of(hf).get(name) or hf.get_submodule(name)
        coded[name] = CodedMatrix.from_tensors(own, levels)
        if coded[name].shape != module.weight.shape:
            raise ValueError(f"{name} has the shape {coded[name].shape}, the model {tuple(module.weight.shape)}")
        inside.add(id(module.weight))
    for name, p in hf.named_parameters():
        if id(p) not in inside:
            stored = tensors.pop(name)
            if stored.shape != p.shape or not stored.isfinite().all():
                raise ValueError(f"{name} is damaged")
            p.data.copy_(stored)
    if tensors:
        raise ValueError(f"{min(tensors)} has no place in the model")
    install(hf, coded, packed)


def ends_of(hf):
    return dict(wte=hf.get_input_embeddings(), head=hf.get_output_embeddings())
