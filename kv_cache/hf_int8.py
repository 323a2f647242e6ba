"""
A cache of int8 for a Hugging Face model: half of float16's bytes, and one scale per token and layer for keys and for values.

    past = int8_cache(model)
    model.generate(**tokens, past_key_values=past)

Keys are quantised after their rotation, so a step restores nothing: a single token reads the integers in place
(kv_cache/number_formats.py). A prompt attends over the integers too, decoded once, so that both use the same numbers.

Shapes: B texts, T positions of this call, S in the cache, H query heads, G kv heads, n numbers per head.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.cli import fail
from kv_cache import number_formats as rows
from kv_cache.bit_fit import slides
from kv_cache.hf_attention import CachedAttention, masked

NAME = "int8_cache"
AT_ONCE = 256  # positions by which the buffers grow


class Int8Layer(CacheLayerMixin):
    """keys and values: rows of number_formats.py, int8 (B, capacity, G n + 2)."""

    is_croppable = True

    def lazy_initialization(self, key_states, value_states):
        self.groups, self.length, self.is_initialized = key_states.shape[1], 0, True
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(self, key_states, value_states, *args, **kwargs):
        """Append keys and values (B, G, T, n). Returns the layer itself twice; attend() reads it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = rows.pack("int8", torch.stack([key_states, value_states]).transpose(2, 3).flatten(3))  # (2, B, T, G n + 2)
        start, self.length = self.length, self.length + new.shape[2]
        if self.keys is None or self.length > self.keys.shape[1]:
            more = new.new_empty(2, new.shape[1], -(-self.length // AT_ONCE) * AT_ONCE - start, new.shape[3])
            before = (new[0, :, :0],) * 2 if self.keys is None else (self.keys[:, :start], self.values[:, :start])
            self.keys, self.values = (torch.cat(pair, 1) for pair in zip(before, more))
        self.keys[:, start : self.length], self.values[:, start : self.length] = new
        return self, self

    def read(self, kept, n):
        """kept: self.keys or self.values -> (B, G, S, n) in the model's dtype"""
        found = rows.unpack("int8", kept[:, : self.length], self.groups * n, self.dtype)
        return found.unflatten(2, (self.groups, n)).transpose(1, 2)

    def get_seq_length(self):
        return self.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def get_max_length(self):
        return -1

    def reset(self):
        self.keys, self.values, self.is_initialized = None, None, False

    def crop(self, tokens_to_remove):
        self.length += tokens_to_remove  # a negative number


def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The model calls this in place of scaled dot product attention. query (B, H, T, n); key: an Int8Layer or plain keys."""
    if not isinstance(key, Int8Layer):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (T, n), layer = query.shape[2:], key
    if T > 1 or query.device.type != "cpu":
        k, v = layer.read(layer.keys, n), layer.read(layer.values, n)
        return sdpa_attention_forward(module, query, k, v, attention_mask, scaling=scaling, **kwargs)
    q = query[:, :, 0].float() * (n**-0.5 if scaling is None else scaling)
    scores = rows.scores("int8", q, layer.keys, layer.length, layer.groups)
    weights = masked(scores, attention_mask).softmax(-1)
    return rows.sums("int8", weights, layer.values, n, layer.groups)[:, None].to(query.dtype), None


def int8_cache(hf):
    """Switch the model to attention that reads this cache, if it is not yet -> an empty cache for its next texts."""
    if hf.config._attn_implementation != NAME:
        kind = hf.config.model_type
        if not getattr(hf, "_supports_attention_backend", False) or any(hasattr(m, "sinks") for m in hf.modules()):
            fail(f"an int8 cache: a {kind} computes attention in its own way, give a Llama, Mistral, Qwen, Gemma or NeoX")
        if slides(hf.config.get_text_config()):
            fail(f"an int8 cache: this {kind} drops positions outside a sliding window, give another model")
        if any(isinstance(module, CachedAttention) for module in hf.modules()):
            fail(f"an int8 cache: this {kind} already has a smaller cache, give the original model")
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        hf.set_attn_implementation(NAME)
    return Cache(layer_class_to_replicate=Int8Layer)
