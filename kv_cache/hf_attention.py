"""
What attention with a smaller cache shares: it takes over a layer of Hugging Face with its norms, rotation and output.

    LatentAttention (hf_latents.py) caches latents; CodedAttention (hf_bits.py) caches quantised keys and values

Scores depend only on distances. So positions are counted from the first in the cache, and left padding does no harm.

Shapes: B texts, T positions of this call, S positions in the cache, H query heads, G kv heads, n numbers per head, r latents.
"""

import inspect
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

AT_ONCE = 256  # positions by which a buffer grows

# -- what a layer consists of -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """
    What an attention layer does beside its matrices, by the names of its modules. hf_same.py finds it.

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


def usual_parts(attn):
    """The Parts of a layer whose modules have the usual names, as Llama, Qwen 3 and GPT-NeoX have."""
    names = dict(attn.named_children())
    q_norm, k_norm = (name if name in names else None for name in ("q_norm", "k_norm"))
    return Parts(q_norm, k_norm, out=(next((name for name in ("o_proj", "dense", "c_proj") if name in names), "o_proj"),))


def attention_entries(parts):
    """{layer: Parts} as plain JSON, for a plan."""
    return [dict(layer=name, **asdict(its)) | dict(out=list(its.out)) for name, its in parts.items()]


def parts_in(plan):
    """{layer: its Parts}, where they differ from the usual ones. plan: of a folder, plain JSON."""
    found = {}
    for entry in plan.get("attention", []):
        values = {name: value for name, value in entry.items() if name != "layer"}
        found[entry["layer"]] = Parts(**values | dict(out=tuple(entry["out"])))
    return found


def head_size(attn):
    """Numbers per head of a Hugging Face attention layer; None if it does not say."""
    return getattr(attn, "head_dim", getattr(attn, "head_size", None))


# -- rotation ---------------------------------------------------------------------------------------------------------


class RotaryTable:
    """The rotary table: the model's cosines and sines of all positions so far. Kept, since all layers read it at every step."""

    def __init__(self, rotary, layer_type=None):
        """rotary: the model's, or None without rotation. layer_type: of its layers, if it has a rotation for each type."""
        self.rotary = rotary if layer_type is None else partial(rotary, layer_type=layer_type)
        self.made = (torch.empty(1, 0, 0),) * 2
        self.across = None, None  # the source and the result of columns()

    def __call__(self, S, like):
        """-> cos and sin (1, S, D/2), D rotated numbers per head. Learned positions: D is 0."""
        if self.rotary is None:
            return (like.new_empty(1, S, 0),) * 2
        return [t[:, :S] for t in self.up_to(S, like)]

    def up_to(self, S, like):
        """-> cos and sin (1, S or more, D/2)"""
        made = self.made  # read once: another thread may replace it
        if made[0].shape[1] < S or made[0].device != like.device or made[0].dtype != like.dtype:
            with torch.inference_mode(False), torch.no_grad():  # training may use them later
                positions = torch.arange(-(-S // 32) * 64, device=like.device)[None]  # a multiple of LANES in streams.c
                both = self.rotary(torch.empty(0, dtype=like.dtype, device=like.device), positions)
                made = self.made = [t.chunk(2, -1)[0].contiguous() for t in both]  # the two halves are the same
        return made

    def columns(self, S, like):
        """-> cos and sin [D/2, S or more]"""
        made, (source, columns) = self.up_to(S, like), self.across
        if source is not made:
            columns = [t[0].T.contiguous() for t in made]
            self.across = made, columns
        return columns


def rotary_tables(hf):
    """-> a function of a layer and its Parts, which gives its RotaryTable. Layers with the same rotation share one."""
    rotary, made = getattr(hf.base_model, "rotary_emb", None), {}
    by_type = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters

    def table_of(attn, parts):
        kind = hf.config.get_text_config().layer_types[attn.layer_idx] if by_type and parts.rotates else None
        if (parts.rotates, kind) not in made:
            made[parts.rotates, kind] = RotaryTable(rotary if parts.rotates else None, kind)
        return made[parts.rotates, kind]

    return table_of


# -- attention --------------------------------------------------------------------------------------------------------


def masked(scores, mask):
    """Apply an attention mask (B or 1, H or 1, T, S) or None to scores (B, H, S) of one query, the mask's last row."""
    if mask is None:
        return scores
    mask = mask[:, :, -1]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


class CachedAttention(nn.Module):
    """Norms, rotation and output of a layer of Hugging Face. parts: its Parts. turns: its RotaryTable."""

    def __init__(self, attn, parts, turns, last=None):
        """last: a name for the output projection; default: its own."""
        super().__init__()
        modules = dict(attn.named_children())
        self.parts, self.turns, self.out = parts, turns, (*parts.out[:-1], last or parts.out[-1])
        self.n, self.scaling, self.layer_idx = head_size(attn), attn.scaling, attn.layer_idx
        for name, own in zip(self.out, parts.out):
            setattr(self, name, modules[own])
        self.q_norm, self.k_norm = (modules[name] if name else nn.Identity() for name in (parts.q_norm, parts.k_norm))

    @staticmethod
    def cache_of(past_key_values, layer_past):
        """The cache of a call, or None. layer_past: its name in GPT-NeoX."""
        cache = layer_past if past_key_values is None else past_key_values
        if getattr(cache, "is_compileable", False):
            raise NotImplementedError("a static cache does not say how many positions it holds: drop cache_implementation")
        return cache

    def heads(self, x):
        return x.unflatten(-1, (-1, self.n)).transpose(1, 2)  # (B, heads, T, n)

    def normed(self, norm, x):
        """Queries or keys (B, T, heads n) -> (B, heads, T, n), after their norm."""
        if self.parts.shape == "BTD":
            return self.heads(norm(x))
        if self.parts.shape == "BHTn":
            return norm(self.heads(x))
        return norm(x.unflatten(-1, (-1, self.n))).transpose(1, 2)

    def attend(self, q, k, v, mask):
        """q (B, H, T, n), k and v (B, G, S, n), rotated -> the layer's output (B, T, d)"""
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scaling, enable_gqa=True)
        return self.project_out(y.transpose(1, 2).flatten(-2))

    def project_out(self, y):
        """Outputs of the heads, side by side (B, T, H n) -> (B, T, d)"""
        for name in self.out:
            y = getattr(self, name)(y)
        return y


@torch.no_grad()
def norm_of(module, n):
    """
    A norm of heads, for the loops -> (weights [n], or None without a norm; epsilon). None if it is not an RMS norm.
    """
    if isinstance(module, torch.nn.Identity):
        return None, 0.0
    if [p.shape for p in module.parameters()] != [(n,)]:  # a norm of all heads at once, or with weights of its own for each
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return None
    weight, x = module(torch.ones(n)) * (1 + eps) ** 0.5, torch.linspace(-1, 2, n)
    known = weight * x * (x.square().mean() + eps).rsqrt()
    return (weight, eps) if torch.allclose(module(x), known, rtol=1e-5, atol=1e-6) else None


def trains(module):
    """Whether a module's parameters may need a gradient: the loops give none."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


# -- the cache --------------------------------------------------------------------------------------------------------


class Buffer:
    """Memory with room for later positions. filled: positions stored. A view of another length belongs to a copied cache."""

    def __init__(self, kept, length):
        self.tensor = kept.new_empty(*kept.shape[:2], -(-length // AT_ONCE) * AT_ONCE, kept.shape[3])
        self.filled = kept.shape[2]
        self.tensor[:, :, : self.filled] = kept

    def takes(self, kept, length):
        """Whether `kept` is this buffer's filled part and positions up to `length` fit after it."""
        own = self.tensor.data_ptr() == kept.data_ptr() and len(self.tensor) == len(kept) and self.filled == kept.shape[2]
        return own and length <= self.tensor.shape[2] and self.tensor.is_inference() <= torch.is_inference_mode_enabled()

    def append(self, new):
        """new (B, 1, T, r) -> all positions (B, 1, S, r), a view"""
        start, self.filled = self.filled, self.filled + new.shape[2]
        self.tensor[:, :, start : self.filled] = new
        return self.tensor[:, :, : self.filled]


class GrowingLayer(DynamicLayer):
    """
    A DynamicLayer whose keys and values are stored in Buffers.

    reader: a KeyReader for latents of keys, or None. first: a First, for a cache by bits, or None; such a cache has only its
    first positions in place of the values.
    """

    buffers, reader, first = [None, None], None, None

    def update(self, key_states, value_states, *args, **kwargs):
        """Append keys and values (B, 1, T, r) -> keys and values of all positions, (B, 1, S, r) each"""
        if not self.get_seq_length() or any(t.requires_grad for t in (key_states, value_states, self.keys, self.values)):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self.grown(0, self.keys, key_states), self.grown(1, self.values, value_states)
        return self.keys, self.values

    def grown(self, i, kept, new):
        if not new.shape[2]:
            return kept
        end, buffer = kept.shape[2] + new.shape[2], self.buffers[i]
        if not (buffer and buffer.takes(kept, end)):
            buffer = Buffer(kept, end)
            self.buffers = [buffer if j == i else other for j, other in enumerate(self.buffers)]  # copies share the old list
        return buffer.append(new)

    def crop(self, tokens_to_remove):
        values = self.values
        super().crop(tokens_to_remove)
        if values is not None:
            self.values = values[:, :, : self.keys.shape[2]]

    def reset(self):
        self.buffers, self.reader, self.first = [None, None], None, None
        super().reset()

    def offload(self):
        self.buffers = [None, None]
        super().offload()


def growing(cache, i):
    """Layer i of a transformers cache as a GrowingLayer. None if it already has content or is not a plain DynamicLayer."""
    layers = getattr(cache, "layers", [])
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:  # a cache that makes its layers on demand
        layers += [DynamicLayer() for _ in range(len(layers), i + 1)]
    if i < len(layers) and type(layers[i]) is DynamicLayer and not layers[i].is_initialized:
        layers[i] = GrowingLayer()
    return layers[i] if i < len(layers) and type(layers[i]) is GrowingLayer else None
