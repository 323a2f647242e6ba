"""
Finds out whether our attention computes what a layer of a Hugging Face model computes, before any work is done.

Names say little: a q_norm may see one head, or all heads at once; a layer may clip its queries, leave out the rotation, or have
a norm before its output projection. So we record calls of each layer on random tokens (recorded), watch which modules it uses
(parts_of), build ours from them, replay the calls, and compare the outputs (check_same). A layer that ours does not repeat is
refused in one line.

Shapes: B texts, T positions of a call, H heads, n numbers per head.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from common.cli import fail
from kv_cache.hf_attention import Parts, head_size, rotary_tables, usual_parts
from kv_cache.hf_bits import CodedAttention, NoForecasts
from kv_cache.hf_latents import LatentAttention
from util_factorization.modules import Uncut

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
    return apart / max(error, torch.finfo(torch.float32).eps * size, 1e-30)  # a dead layer gives zeros


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
        y = call.replay(attn, None)
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


# -- both -------------------------------------------------------------------------------------------------------------


def check_same(hf, layers, flag, by_bits=False):
    """
    Find the Parts of each attention layer -> {layer: Parts}, where they are not the usual ones. A model with a layer that ours
    does not repeat is refused.

    layers: of find_layers(). flag: that asks for it, for the message. by_bits: compare CodedAttention, else LatentAttention
    """
    rope = getattr(hf.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in [rope, *rope.values()] if isinstance(part, dict)}
    if stretched := kinds & {"dynamic", "longrope"}:
        kind = f"{hf.config.model_type} has {min(stretched)} rotation"
        fail(f"{flag}: this {kind}, which changes with the length of a text: cut q or wte alone")
    for layer in layers:
        attn = hf.get_submodule(layer.name)
        if head_size(attn) is None or not all(hasattr(attn, name) for name in ("scaling", "layer_idx")):
            refuse(flag, layer, attn)
    calls, tables, found = recorded(hf, [layer.name for layer in layers]), rotary_tables(hf), {}
    for layer in layers:
        attn = hf.get_submodule(layer.name)
        seen = parts_of(attn, calls[layer.name][0], head_size(attn))
        for parts in (seen, replace(seen, rotates=False)):
            if same(hf, layer, attn, calls[layer.name], parts, tables, by_bits):
                break
        else:
            refuse(flag, layer, attn)
        if parts != usual_parts(attn):
            found[layer.name] = parts
    return found


def refuse(flag, layer, attn):
    fail(
        f"{flag}: {layer.name} ({type(attn).__name__}) computes attention in a way that a smaller cache does not repeat: cut q "
        "or wte alone, or give a Llama, Mistral, Qwen, Gemma 3, Phi, OLMo 2 or GPT-NeoX"
    )


def same(hf, layer, attn, calls, parts, tables, by_bits):
    """Whether our attention with uncut matrices computes what a layer computes, up to the layer's own float32 error."""
    try:
        turns = tables(attn, parts)
        if by_bits:
            ours = Exact(attn, ExactCode(sum(len(layer.rows[t]) for t in "kv")), parts, turns, NoForecasts())
        else:
            ours = LatentAttention(attn, *(Uncut(layer.linear(target)) for target in "qkv"), parts, turns)
        return difference(hf, attn, calls, ours.to(hf.device)) <= NOISE
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # ours cannot be built, or other shapes come out
        return False


class ExactCode(torch.nn.Module):
    """A LayerCode that keeps every number: its float32 bytes."""

    forecast = ()

    def __init__(self, numbers):
        super().__init__()
        self.register_buffer("mean", torch.zeros(numbers))

    def write(self, x, known):
        return x.contiguous().view(torch.uint8)

    def read(self, rows, known):
        return rows.contiguous().view(torch.float32)


class Exact(CodedAttention):
    """CodedAttention without its rounding: no first positions in float16, no loops that read codes in place."""

    def read_all(self, kept, now):
        return self.code.read(kept.rows, None)

    def norm_in_place(self, q):
        return None
