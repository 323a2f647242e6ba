"""
Finds out whether our attention computes what a layer of a Hugging Face model computes, before any work is done.

Names say little: a q_norm may see a head, all heads at once, or the heads in another order; a layer may clip its queries, leave
out the rotation, or norm its output. So we look at one pass of the model (parts_of), build ours from what we saw, replay the
recorded calls, and compare the outputs (check_same). A layer that we cannot rebuild is refused in one line.

Shapes: B texts, T positions of a call, H heads, n numbers per head.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch

WINDOW = 8  # positions of a sliding window during the comparison, so that a short text goes beyond it
NOISE = 8  # limit of a difference, in units of the layer's own float32 error. Measured: equal up to 1, unequal from 10^4


# -- what a layer is called with --------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of an attention layer. real (B, T): positions that are not padding. text: calls of one text share a cache."""

    text: int
    args: tuple
    kwargs: dict
    output: torch.Tensor
    real: torch.Tensor

    def replay(self, attn, cache, dtype=torch.float32):
        """The output of another layer for the same input."""
        args, kwargs = (as_dtype(part, dtype) for part in (self.args, self.kwargs))
        kwargs = {name: cache if is_cache(value) else value for name, value in kwargs.items()}
        return first_of(attn(*args, **kwargs))


def is_cache(value):
    from transformers import Cache

    return isinstance(value, Cache)


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def as_dtype(value, dtype):
    """A value in which each float tensor has the dtype."""
    if torch.is_tensor(value):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(as_dtype(part, dtype) for part in value)
    return {name: as_dtype(part, dtype) for name, part in value.items()} if isinstance(value, dict) else value


@contextmanager
def narrow_window(hf):
    """A context in which layers with a sliding window see WINDOW positions."""
    owners = [hf.config, hf.config.get_text_config(), *hf.modules()]
    before = [(owner, found) for owner in owners if type(found := getattr(owner, "sliding_window", None)) is int]
    try:
        for owner, _ in before:
            owner.sliding_window = WINDOW
        yield
    finally:
        for owner, found in before:
            owner.sliding_window = found


@torch.no_grad()
def recorded(hf, names):
    """
    {layer: its Calls} while the model reads random tokens: a text without a cache, and two texts of different lengths with one,
    first together and padded on the left, then token by token. Both go beyond a sliding window of WINDOW positions.
    """
    from transformers import DynamicCache

    rows = hf.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (2, 2 * WINDOW + 3), generator=generator).to(hf.device)
    calls, state = {name: [] for name in names}, {}

    def hook(name):
        def record(module, args, kwargs, output):
            calls[name].append(Call(state["text"], args, kwargs, first_of(output).clone(), state["real"]))

        return record

    hooks = [hf.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :3] = False
    try:
        with narrow_window(hf):
            state |= dict(text=0, real=real[:1])
            hf.base_model(ids[:1], use_cache=False)
            cache, end = DynamicCache(config=hf.config), WINDOW + 4
            for start in [0, *range(end, ids.shape[1])]:
                here = slice(start, max(start + 1, end))
                state |= dict(text=1, real=real[:, here])
                options = dict(attention_mask=real[:, : here.stop].long(), past_key_values=cache, use_cache=True)
                positions = (real[:, : here.stop].long().cumsum(1) - 1).clamp(min=0)[:, here]
                hf.base_model(ids[:, here], position_ids=positions, **options)
    finally:
        for each in hooks:
            each.remove()
    return calls


# -- the comparison ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def difference(hf, attn, calls, ours):
    """
    The largest difference between the outputs of `ours` and those of a layer, in units of the layer's own float32 error: the
    difference between the layer in float32 and the same layer in float64.
    """
    exact, apart, error = copy.deepcopy(attn).double(), 0.0, 0.0
    for part, dtype in ((ours, torch.float32), (exact, torch.float64)):
        found = replayed(hf, calls, part, dtype)
        most = max((y - call.output)[call.real].abs().max().item() for y, call in zip(found, calls))
        apart, error = (most, error) if part is ours else (apart, most)
    size = max(call.output[call.real].abs().max().item() for call in calls)
    return apart / max(error, torch.finfo(torch.float32).eps * size)


def replayed(hf, calls, attn, dtype):
    """The outputs of another layer for the recorded calls."""
    from transformers import DynamicCache

    caches = {}
    with narrow_window(hf):
        for call in calls:
            if call.text not in caches:
                caches[call.text] = DynamicCache(config=hf.config)
            yield call.replay(attn, caches[call.text], dtype)


# -- what a layer consists of -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """
    What an attention layer does beside its matrices, by the names of its modules.

    q_norm, k_norm   norms of queries and keys before the rotation, or None
    shape            what a norm sees: "BTHn", "BHTn", or "BTD" with D = H n
    out              the modules after the attention, in order: the last is the output projection
    rotates          whether queries and keys are rotated by their position
    """

    q_norm: str | None = None
    k_norm: str | None = None
    shape: str = "BTHn"
    out: tuple = ("o_proj",)
    rotates: bool = True


def by_name(attn):
    """The Parts of a layer whose modules have the usual names, as Llama, Qwen 3 and GPT-NeoX have."""
    q_norm, k_norm = (name if getattr(attn, name, None) is not None else None for name in ("q_norm", "k_norm"))
    out = next((name for name in ("o_proj", "dense", "c_proj") if hasattr(attn, name)), None)
    return Parts(q_norm, k_norm, out=(out,))


@torch.no_grad()
def parts_of(attn, call, n):
    """
    The Parts that a layer shows in one Call. n: numbers per head.

    A norm is a module that reads the memory that q_proj or k_proj has written; its input may be a view of another shape.
    """
    seen, hooks = [], []  # the tensors stay alive until the end: no memory is used twice
    for name, module in attn.named_children():
        hooks.append(module.register_forward_hook(lambda m, x, y, name=name: seen.append((name, x[0], first_of(y)))))
    try:
        y = call.replay(attn, next((v for v in call.kwargs.values() if is_cache(v)), None))
    finally:
        for hook in hooks:
            hook.remove()
    made = {name: out for name, _, out in seen}
    q_norm, k_norm = (reader_of(seen, made.get(f"{part}_proj")) for part in "qk")
    x = next((x for name, x, _ in seen if name == (q_norm or k_norm)), None)
    out, at = [], y
    for name, before, after in reversed(seen):
        if same_memory(after, at) and name not in (q_norm, k_norm, "q_proj", "k_proj", "v_proj"):
            out, at = [name, *out], before
    return Parts(q_norm, k_norm, shape_of(x, call, n), tuple(out))


def same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def reader_of(seen, made):
    """The first module whose input is `made`, or None."""
    return made if made is None else next((name for name, x, _ in seen if same_memory(x, made)), None)


def shape_of(x, call, n):
    if x is None or x.dim() == 4 and x.shape[-1] == n and x.shape[1] == call.real.shape[1]:
        return "BTHn"
    return "BHTn" if x.dim() == 4 else "BTD"
