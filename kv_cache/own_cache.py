"""
The KV cache of our GPTs: keys and values of every layer, in one of several number formats (number_formats.py).

For each layer it allocates (B, capacity, r) numbers for keys and for values, so the size of its tensors is the cache's size. r
is d; for a model that compresses keys or values it is k_proj_dim or v_proj_dim, and the cache holds the compressed numbers.
"""

import torch

from kv_cache import number_formats as rows


class Store:
    """Memory for r numbers per position; the first `length` positions are filled."""

    def __init__(self, kv_dtype, B, capacity, r, device):
        self.kv_dtype, self.r, self.length = kv_dtype, r, 0
        self.rows = rows.empty(kv_dtype, B, capacity, r, device)

    def append(self, x):
        """x (B, T, r). Raises ValueError if the number of texts differs, or the memory is full."""
        end = self.length + x.shape[1]
        if len(x) != len(self.rows) or end > self.rows.shape[1]:
            texts, capacity = self.rows.shape[:2]
            raise ValueError(f"{len(x)} texts of {end} positions: the cache has room for {texts} of {capacity}")
        self.rows[:, self.length : end] = rows.pack(self.kv_dtype, x)
        self.length = end

    def read(self, dtype):
        """-> (B, S, r)"""
        return rows.unpack(self.kv_dtype, self.rows[:, : self.length], self.r, dtype)

    def scores(self, q, groups):
        """One query (B, H, r / groups) -> its products with all positions (B, H, S); see number_formats.py."""
        return rows.scores(self.kv_dtype, q, self.rows, self.length, groups)

    def sums(self, weights, groups):
        """weights (B, H, S) -> (B, H, r / groups); see number_formats.py."""
        return rows.sums(self.kv_dtype, weights, self.rows, self.r // groups, groups)


class LayerCache:
    def __init__(self, k, v):
        self.k, self.v = k, v

    @property
    def length(self):
        return self.k.length

    def append(self, k, v):
        self.k.append(k)
        self.v.append(v)

    def extend(self, k, v):
        """Append k (B, T, r_k) and v (B, T, r_v) -> all keys and all values, decoded (B, S, r)."""
        self.append(k, v)
        return self.k.read(k.dtype), self.v.read(v.dtype)


class InPlace:
    """A LayerCache for attention that reads Stores in place: extend() returns the Stores."""

    def __init__(self, cache):
        self.cache, self.length = cache, cache.length

    def extend(self, k, v):
        self.cache.append(k, v)
        return self.cache.k, self.cache.v


class KVCache:
    """Keys and values of the positions that a model has read. Raises ValueError for a capacity above its block_size."""

    def __init__(self, model, B, capacity, kv_dtype):
        if capacity > model.config.block_size:
            raise ValueError(f"{capacity} positions are above the model's block_size {model.config.block_size}")
        device, self.capacity, self.batch = model.lm_head.weight.device, capacity, B
        widths = model.cache_widths()
        self.layers = [LayerCache(*(Store(kv_dtype, B, capacity, r, device) for r in widths)) for _ in model.transformer.h]

    def __getitem__(self, layer):
        return self.layers[layer]

    @property
    def length(self):
        return self.layers[0].length

    def stores(self):
        return [store for layer in self.layers for store in (layer.k, layer.v)]

    def truncate(self, length):
        """Drop all positions from `length` on."""
        for store in self.stores():
            store.length = length

    def fill(self, length):
        """Fill with random numbers up to `length`, to time steps: the time does not depend on the contents."""
        for store in self.stores():
            store.append(torch.randn(self.batch, length - store.length, store.r, device=store.rows.device))

    def bytes(self):
        """Bytes allocated, including scales."""
        return sum(store.rows.untyped_storage().nbytes() for store in self.stores())

    def bytes_per_token(self):
        return self.bytes() / (self.batch * self.capacity)
