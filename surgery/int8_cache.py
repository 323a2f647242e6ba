"""
A cache of int8 for a model of Hugging Face: half of float16's bytes, and a scale for each token of a layer.

    past = int8_cache(model)
    model.generate(**tokens, past_key_values=past)

Keys are quantised after their rotation, so a step restores nothing: it reads integers, by a compiled loop for single tokens
(common/kernels.c). A prompt attends over the integers too, decoded once, so that both see the same numbers.

Shapes: B texts, T positions at hand, S in the cache, H heads, G heads of keys and values, n numbers a head.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common import kernels
from common.cli import fail
from surgery.coded_attention import CodedAttention, slides
from surgery.low_rank_modules import LatentAttention

NAME = "int8_cache"
AT_ONCE = 256  # positions by which the buffers grow
LEVELS = 127


class Int8Layer(CacheLayerMixin):
    """keys and values: int8 (B, capacity, G n + 2). A row's last two bytes are its scale, a bfloat16."""

    is_croppable = True

    def lazy_initialization(self, key_states, value_states):
        self.groups, self.length, self.is_initialized = key_states.shape[1], 0, True
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(self, key_states, value_states, *args, **kwargs):
        """(B, G, T, n) twice -> the layer itself twice, which attend() reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = packed(torch.stack([key_states, value_states]).transpose(2, 3).flatten(3))  # (2, B, T, G n + 2)
        start, self.length = self.length, self.length + rows.shape[2]
        if self.keys is None or self.length > self.keys.shape[1]:
            more = rows.new_empty(2, rows.shape[1], -(-self.length // AT_ONCE) * AT_ONCE - start, rows.shape[3])
            before = (rows[0, :, :0],) * 2 if self.keys is None else (self.keys[:, :start], self.values[:, :start])
            self.keys, self.values = (torch.cat(pair, 1) for pair in zip(before, more))
        self.keys[:, start : self.length], self.values[:, start : self.length] = rows
        return self, self

    def read(self, rows):
        """-> (B, G, S, n) in the model's dtype"""
        rows = rows[:, : self.length]
        found = rows[..., :-2].to(self.dtype) * rows[..., -2:].contiguous().view(torch.bfloat16).to(self.dtype)
        return found.unflatten(2, (self.groups, -1)).transpose(1, 2)

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


def by_kernels(x):
    return x.device.type == "cpu" and x.dtype == torch.float32 and kernels.library() is not None


def packed(x):
    """(..., D) -> int8 (..., D + 2)"""
    if by_kernels(x):
        out = torch.empty(*x.shape[:-1], x.shape[-1] + 2, dtype=torch.int8)
        kernels.bind("int8_pack")(x[..., 0].numel(), x.shape[-1], x.contiguous(), out)
        return out
    scale = (x.float().abs().amax(-1, keepdim=True).clamp(min=LEVELS * 1e-30) / LEVELS).bfloat16()
    integers = (x / scale.to(x.dtype)).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return torch.cat([integers, scale.view(torch.int8)], -1)


def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What a model calls in place of scaled dot product attention. query (B, H, T, n); key: an Int8Layer, or plain keys."""
    if not isinstance(key, Int8Layer):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (B, H, T, n), layer = query.shape, key
    if T > 1 or n > kernels.WIDEST or not by_kernels(query):
        k, v = layer.read(layer.keys), layer.read(layer.values)
        return sdpa_attention_forward(module, query, k, v, attention_mask, scaling=scaling, **kwargs)
    shape, threads = (B, H, layer.groups, n, layer.length, layer.keys.shape[1]), torch.get_num_threads()
    scores, y = torch.empty(B, H, 1, layer.length), torch.empty(B, 1, H, n)
    query = (query * (n**-0.5 if scaling is None else scaling)).contiguous()
    kernels.bind("int8_scores", *shape)(query, layer.keys, scores, threads)
    if attention_mask is not None:
        mask = attention_mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    kernels.bind("int8_sums", *shape)(scores.softmax(-1), layer.values, y, threads)
    return y, None


def int8_cache(hf):
    """Give a model, once, attention that reads this cache -> an empty cache for its next texts."""
    if hf.config._attn_implementation != NAME:
        kind = hf.config.model_type
        if slides(hf.config.get_text_config()):
            fail(f"an int8 cache: this {kind} forgets what lies outside a sliding window, give another model")
        if any(isinstance(module, (CodedAttention, LatentAttention)) for module in hf.modules()):
            fail(f"an int8 cache: this {kind} was written with a smaller cache of its own, give the untouched model")
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        hf.set_attn_implementation(NAME)
    return Cache(layer_class_to_replicate=Int8Layer)
