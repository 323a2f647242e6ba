"""
The KV cache of generation: keys and values of every layer, kept in one of several number formats.

It allocates (B, capacity, r) numbers for the keys of a layer, and as many for its values, so its bytes can be counted on its
tensors. r is d, or k_proj_dim and v_proj_dim where a model compresses: then the cache holds the compressed numbers.
"""

import torch

from util_factorization.packing import pack_halves, unpack_halves

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Floats:
    """Numbers kept in one floating-point dtype."""

    def __init__(self, B, capacity, r, dtype, device):
        self.data = torch.empty(B, capacity, r, dtype=dtype, device=device)

    def write(self, start, x):
        self.data[:, start : start + x.shape[1]] = x

    def read(self, stop, dtype):
        return self.data[:, :stop].to(dtype)  # no copy where the dtype is the same

    def tensors(self):
        return [self.data]


class Int8:
    """Integers from -127 to 127, and a float16 scale for each token: the largest of its r numbers / 127."""

    levels = 127

    def __init__(self, B, capacity, r, device):
        self.data = torch.empty(B, capacity, self.stored(r), dtype=torch.int8, device=device)
        self.scale = torch.empty(B, capacity, 1, dtype=torch.float16, device=device)

    def stored(self, r):
        return r

    def write(self, start, x):
        here = slice(start, start + x.shape[1])
        scale = x.float().abs().amax(-1, keepdim=True) / self.levels
        self.scale[:, here] = scale.clamp(min=torch.finfo(torch.float16).tiny, max=torch.finfo(torch.float16).max)
        integers = (x / self.scale[:, here].float()).round().clamp(-self.levels, self.levels)
        self.data[:, here] = self.pack(integers.to(torch.int8))

    def read(self, stop, dtype):
        return self.unpack(self.data[:, :stop]) * self.scale[:, :stop].to(dtype)  # one pass, which gives dtype

    def tensors(self):
        return [self.data, self.scale]

    def pack(self, integers):
        return integers

    def unpack(self, data):
        return data


class Int4(Int8):
    """The same with integers from -7 to 7, two in a byte."""

    levels = 7

    def stored(self, r):
        self.r = r
        return (r + 1) // 2

    def pack(self, integers):
        return pack_halves(integers)

    def unpack(self, data):
        return unpack_halves(data, self.r)


class LayerCache:
    def __init__(self, k, v):
        self.k, self.v, self.length = k, v, 0

    def extend(self, k, v):
        """Append k (B, T, r_k) and v (B, T, r_v) -> all keys and all values, as read back (B, S, r)."""
        self.k.write(self.length, k)
        self.v.write(self.length, v)
        self.length += k.shape[1]
        return self.k.read(self.length, k.dtype), self.v.read(self.length, v.dtype)


class KVCache:
    """Keys and values of the positions that a model has read. Raises ValueError for a capacity above its block_size."""

    def __init__(self, model, B, capacity, kv_dtype):
        if capacity > model.config.block_size:
            raise ValueError(f"{capacity} positions are above the model's block_size {model.config.block_size}")
        device, self.capacity, self.batch = model.lm_head.weight.device, capacity, B

        def store(r):
            if kv_dtype in FLOATS:
                return Floats(B, capacity, r, FLOATS[kv_dtype], device)
            return {"int8": Int8, "int4": Int4}[kv_dtype](B, capacity, r, device)

        self.layers = [LayerCache(*(store(r) for r in model.cache_widths())) for _ in model.transformer.h]

    def __getitem__(self, layer):
        return self.layers[layer]

    @property
    def length(self):
        return self.layers[0].length

    def truncate(self, length):
        """Forget the positions from `length` on."""
        for layer in self.layers:
            layer.length = length

    def bytes(self):
        """Bytes allocated, those of the scales included."""
        tensors = [t for layer in self.layers for store in (layer.k, layer.v) for t in store.tensors()]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def bytes_per_token(self):
        return self.bytes() / (self.batch * self.capacity)
