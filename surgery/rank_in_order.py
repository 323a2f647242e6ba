"""
Cut a model's layers in the order in which they compute: each layer repairs errors of the layers before it.

If all layers are cut at once, each is cut for its inputs x in the untouched model. In the smaller model it reads other inputs
x', since the layers before it have errors. So we first replace W by the matrix W* whose outputs from x' are nearest to the
untouched outputs W x:

    W* = argmin sum_t |W x_t - W* x'_t|^2 + ridge |W* - W|^2

Then W* is cut, in the metric of x'.
"""

import torch
from tqdm import tqdm

RIDGE = 0.01  # share of the mean squared input: keeps W* near W in directions that the text hardly reaches


class Stop(Exception):
    """Raised in a hook to skip the rest of the computation."""


def layers_in_order(whole, cut, windows, linears):
    """
    Yield (layer, x [N,in], x' [N,in]) block by block: the layer's inputs in the untouched model, and in the one being cut.

    whole, cut: Subjects, untouched and being cut. The caller must cut a layer in `cut` before it asks for the next one.
    linears: {layer: name of a Linear}
    """
    before_blocks, blocks = (blocks_of(subject.model, linears.values()) for subject in (whole, cut))
    untouched, spoilt = inputs_of(whole, before_blocks[0], windows), inputs_of(cut, blocks[0], windows)
    theirs = {whole.model.get_submodule(name): layer for layer, name in linears.items()}
    for before, block in tqdm(list(zip(before_blocks, blocks)), "cutting in order", leave=False):
        seen, untouched = run(before, untouched, {module: theirs[module] for module in before.modules() if module in theirs})
        for layer, x in seen.items():
            yield layer, x, inputs_at(block, spoilt, cut.model.get_submodule(linears[layer]))
        _, spoilt = run(block, spoilt, {})


def blocks_of(model, names):
    """The model's list of blocks: the ModuleList that contains most of the names, such as model.layers."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    return model.get_submodule(max(lists, key=lambda start: sum(name.startswith(start + ".") for name in names)))


@torch.no_grad()
def inputs_of(subject, block, windows):
    """[(args, kwargs)]: how the first block is called, for each window."""
    found = []

    def take(module, args, kwargs):
        found.append((args, kwargs))
        raise Stop

    handle = block.register_forward_pre_hook(take, with_kwargs=True)
    for x, _ in windows:
        try:
            subject.trunk(subject.lookup(x))
        except Stop:
            pass
    handle.remove()
    return found


@torch.no_grad()
def run(block, calls, linears):
    """Run a block -> ({name: inputs [N,in]} of the linears {module: name}, the calls of the next block)."""
    seen = {name: [] for name in linears.values()}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for module, name in linears.items()
    ]
    after = []
    for args, kwargs in calls:
        out = block(*args, **kwargs)
        after.append(((out[0] if isinstance(out, tuple) else out, *args[1:]), kwargs))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}, after


@torch.no_grad()
def inputs_at(block, calls, module):
    """Inputs [N,in] of a linear layer of a block."""
    found = []

    def take(_, args):
        found.append(args[0].flatten(0, -2))
        raise Stop

    handle = module.register_forward_pre_hook(take)
    for args, kwargs in calls:
        try:
            block(*args, **kwargs)
        except Stop:
            pass
    handle.remove()
    return torch.cat(found)


def repaired(W, x, read):
    """W [out,in], its inputs x [N,in] in the untouched model, `read` in the cut one -> (W* [out,in], C [in,in] of `read`)."""
    S, X = (read.T @ read).double(), (x.T @ read).double()
    ridge = (RIDGE * S.diagonal().mean()).clamp(min=1e-30) * torch.eye(len(S), dtype=S.dtype)  # a dead layer has S = 0
    new = torch.linalg.solve(S + ridge, (W.double() @ (X + ridge)).T).T
    return new.float(), (S / len(x)).float()
