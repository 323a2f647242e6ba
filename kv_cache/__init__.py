"""
Caches of keys and values for decoding. Files named own_* are for our GPTs, files named hf_* for Hugging Face models.

    number_formats                      rows of a cache as float32, bfloat16, float16, int8, int4; one query reads them in place
    own_cache, own_attention, generate  our cache; attention over compressed values; text, one token after the other
    hf_layers, hf_attention             finds q, k and v in a model; what attention with a smaller cache shares
    hf_latents, hf_int8                 a cache of latents; a cache of int8
    bit_code, bit_streams, bit_reader   a cache by bits: a layer's code; the bytes of a token; attention in place
    hf_bits, decoding_speed             attention over a cache by bits; tokens a second and bytes of a cache
    hf_same                             does our attention compute what the layer computes? finds its norms and its output
    bit_fit                             fits a cache by bits to calibration text

A *component* is a coordinate of a layer's keys and values after a change of basis.
A *depth* is the number of bits of a component. A *level* is a value that a quantised number can have.
A *stream* holds the bits of all components of a token in a layer, or of its keys alone and of its values alone.
A *scale* multiplies all levels of a stream, or all integers of an int8 or int4 row.
A *group* is a kv head (G of them) with the query heads that share it.

The names of the number formats are defined here, so that --help need not import torch.
"""

KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
