"""The additions of a compact model to its standard class. bundle.py copies one of these classes into the exported file."""

import torch
import torch.nn as nn

from bits.coded_matrix import CodedMatrix
from bits.modules import install_coded
from bits.trellis import WINDOW, Code, float16_code, shapes
from common.modules import check_complete, fresh_memory_is_nan
from kv_cache.bit_code import LayerCode
from kv_cache.hf_attention import parts_in
from kv_cache.hf_bits import install_cache
from kv_cache.hf_layers import find_layers
from surgery.rank_modules import install


class CompactModel:
    """A mixin before a standard class of Hugging Face. from_pretrained() refuses files that do not fill all of the model."""

    _supports_flash_attn = _supports_flex_attn = _can_compile_fullgraph = False

    @classmethod
    def from_pretrained(cls, *given, output_loading_info=False, **options):
        with fresh_memory_is_nan():
            model, info = super().from_pretrained(*given, output_loading_info=True, **options)
        check_complete(model, info, given[0])
        return (model, info) if output_loading_info else model


class LowRankModel(CompactModel):
    """
    A model with low-rank factors, listed in config.surgery. Its cache contains latents.

    Key positions are counted from the first key in the cache, so a text can be padded on the left. A static cache is refused.
    """

    def __init__(self, config):
        super().__init__(config)
        if hasattr(self, "embed_out"):
            raise ValueError("the head of this model is lm_head from transformers 5 on: pip install -U transformers")
        install(self, config.surgery)
        self.requires_grad_(True)
        self.post_init()


class PackedModel(CompactModel):
    """
    A model with packed matrices. config.surgery lists them and the form of the cache.

    Packed matrices are read on the CPU. If the cache is packed, give tokens as input_ids.
    """

    def __init__(self, config):
        super().__init__(config)
        plan, self.levels = config.surgery, Levels()
        layers = find_layers(self) if plan["cache"] else []
        install_coded(self, {name: blank_matrix(parts, self.levels) for name, parts in plan["coded"].items()})
        if layers:
            install_cache(self, [blank_layer_code(**code) for code in plan["cache"]], parts_in(plan), layers)
        self.post_init()
        # LayerCodes stay float32: a key must be read back exactly as it was written. This is not a class attribute, since
        # transformers 4 would look for the modules too early.
        self._keep_in_fp32_modules_strict = {"self_attn.code", "attention.code"}


class Levels(nn.Module):
    """The quantiser's levels for all bit depths, as float16: {half bits: Code}."""

    def __init__(self):
        super().__init__()
        self.numbers, self.codes = [numbers for _, numbers in shapes(WINDOW)], {}
        self.register_buffer("bits", torch.zeros(2**WINDOW, sum(self.numbers), dtype=torch.int16))

    def __getitem__(self, half_bits):
        if not self.codes:
            parts = self.bits.view(torch.float16).float().split(self.numbers, 1)
            codes = [Code(bits, levels, 0.0) for (bits, _), levels in zip(shapes(WINDOW), parts)]
            self.codes = {code.half_bits: code for code in [*codes, float16_code()]}
        return self.codes[half_bits]


def blank(parts):
    """{name: [dtype, [sizes]]} -> {name: a tensor to be filled in}."""
    return {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in parts.items()}


def blank_matrix(parts, codes):
    tensors = blank(parts)
    streams = {tuple(map(int, name.split(".")[1:])): tensors.pop(name) for name in parts if name.startswith("streams.")}
    return CodedMatrix(streams=streams, codes=codes, **tensors)


def blank_layer_code(bits, parts):
    """bits: for each stream, the number of components with 1 bit, 2 bits, ..."""
    bits = [[b for b, count in enumerate(stream, 1) for _ in range(count)] for stream in bits]
    return LayerCode(bits=bits, **blank(parts))
