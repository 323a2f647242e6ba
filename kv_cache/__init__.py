"""
Keys and values while a model decodes. Files that begin with own are for our GPTs, with hf for models of Hugging Face.

    number_formats                      rows of a cache in float32, bfloat16, float16, int8, int4, and one query that reads them
    own_cache, own_attention, generate  our cache; attention over compressed values; text, one token after the other
    hf_layers                           where q, k and v are in a model
    hf_latents, hf_attention            a cache of latents; attention that fills and reads it
    hf_int8                             a cache of int8
    bit_code, bit_streams, bit_reader   a cache by bits: how many for each component; a token's bytes; reading them
    hf_bits                             attention over a cache by bits

The names of the number formats stand below, so that --help need not import torch.
"""

KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
