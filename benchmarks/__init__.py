"""
Measurements for bench.py.

    training     a training step: speed, parts, memory
    decoding     a step of decoding
    nanogpt      nanoGPT's model, for comparison
"""
