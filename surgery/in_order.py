"""
Coding or cutting a model's linear layers in the order in which they compute: each repairs what the ones before it have spoilt.

All at once, a layer is rounded or cut for the inputs x that it has in the untouched model. In the smaller model it reads other
inputs x', since the layers before it have errors. So the matrix that is rounded or cut is the one whose outputs from x' are
nearest to the untouched outputs W x, weighed by each token's gradient (LinearMoments) where that is known:

    W* = argmin sum_t |g_t|^2 |W x_t - W* x'_t|^2 + ridge |W* - W|^2

Its errors are fed back in the metric of x'. Groups of rows and bits stay as they were shared out.
"""

import copy

import torch
from tqdm import tqdm

from bits.encode import code, draft_layer

RIDGE = 0.01  # of the mean squared input: W* stays near W where text says little


class Stop(Exception):
    """Raised in a hook: what comes after it need not be computed."""


def code_in_order(subject, drafts, depths, codes, moments, windows):
    """
    {name: CodedMatrix} of all Drafts {name: Draft}, with the half bits {name: [G,k]} and Codes of fit().

    moments: LinearMoments, gathered on windows, a list of (x, y). Matrices outside the model's blocks are coded as they are.
    """
    cut = copy.deepcopy(subject)
    whole_blocks, inside = blocks_of(subject.model, moments.linears)
    cut_blocks, _ = blocks_of(cut.model, moments.linears)
    coded = {name: code(draft, depths[name], codes) for name, draft in drafts.items() if name not in inside}
    for name, made in coded.items():
        put(cut, name, made)
    whole, spoilt = inputs_of(subject, whole_blocks[0], windows), inputs_of(cut, cut_blocks[0], windows)
    names = {module: name for name, module in cut.model.named_modules()}
    for before, block in tqdm(list(zip(whole_blocks, cut_blocks)), "rounding in order", leave=False):
        linears = {module: names[module] for module in block.modules() if names[module] in inside}
        theirs = {subject.model.get_submodule(name): name for name in linears.values()}
        seen, whole = run(before, whole, theirs)
        for together in calls_of(block, spoilt[0], linears):
            found = inputs_at(block, spoilt, together[0])
            for module in together:
                name = linears[module]
                W, C = repaired(module.weight.data, seen[name], found, moments.sizes[name])
                draft = draft_layer(W, C, moments.of(name)[1], drafts[name].groups)
                coded[name] = code(draft, depths[name], codes)
                put(cut, name, coded[name])
        _, spoilt = run(block, spoilt, {})
    return {name: coded[name] for name in drafts}


def layers_in_order(whole, cut, windows, linears):
    """
    Yield (layer, x [N,in], x' [N,in]) block by block: what it reads in the untouched model, and in the one that is being cut.

    whole, cut: Subjects. The caller cuts the layer in `cut` before it asks for the next one. linears: {layer: name of a Linear}
    """
    (before_blocks, _), (blocks, _) = (blocks_of(subject.model, linears.values()) for subject in (whole, cut))
    untouched, spoilt = inputs_of(whole, before_blocks[0], windows), inputs_of(cut, blocks[0], windows)
    theirs = {whole.model.get_submodule(name): layer for layer, name in linears.items()}
    for before, block in tqdm(list(zip(before_blocks, blocks)), "cutting in order", leave=False):
        seen, untouched = run(before, untouched, {module: theirs[module] for module in before.modules() if module in theirs})
        for layer, x in seen.items():
            yield layer, x, inputs_at(block, spoilt, cut.model.get_submodule(linears[layer]))
        _, spoilt = run(block, spoilt, {})


def blocks_of(model, names):
    """(The list of a model's blocks, the names that lie in them). The blocks are a ModuleList, as in model.layers.0.mlp."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    held = {start: {name for name in names if name.startswith(start + ".")} for start in lists}
    start = max(held, key=lambda start: len(held[start]))
    return model.get_submodule(start), held[start]


def put(subject, name, made):
    module = dict(wte=subject.table, head=subject.head).get(name) or subject.model.get_submodule(name)
    module.weight.data.copy_(made.matrix())


@torch.no_grad()
def inputs_of(subject, block, windows):
    """[(args, kwargs)] of the calls of the first block, one for each window."""
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
    """({name: inputs [N,in] of the linears {module: name}}, the calls of the next block)."""
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
def calls_of(block, call, linears):
    """The linear layers of a block in the order of their calls; those that read the same tensor stand in one list."""
    order = {}  # by the tensor, which is kept so that no other one gets its id

    def note(module, args):
        order.setdefault(id(args[0]), (args[0], []))[1].append(module)

    handles = [module.register_forward_pre_hook(note) for module in linears]
    block(*call[0], **call[1])
    for handle in handles:
        handle.remove()
    return [together for _, together in order.values()]


@torch.no_grad()
def inputs_at(block, calls, module):
    """What a linear layer of a block reads, [N,in]."""
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


def repaired(W, x, read, sizes):
    """
    W [out,in], its inputs x [N,in] untouched, `read` in the coded model, sizes [N] of the gradients -> (W* [out,in], the C
    [in,in] of what is read, as LinearMoments has it).
    """
    weights = sizes.float()[:, None]
    read = read * weights
    S, X = (read.T @ read).double(), ((x * weights).T @ read).double()
    ridge = (RIDGE * S.diagonal().mean()).clamp(min=1e-30) * torch.eye(len(S), dtype=S.dtype)  # a dead layer has S = 0
    new = torch.linalg.solve(S + ridge, (W.double() @ (X + ridge)).T).T
    return new.float(), (S / sizes.double().square().sum().clamp(min=1e-30)).float()
