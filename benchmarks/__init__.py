"""
Measurements for bench.py.

    flags, commands         bench.py's words: their flags; what they do and print
    training                a step of training: speed, parts, memory
    decoding, generation    decoding with our models; greedy decoding of Hugging Face models
    nanogpt                 nanoGPT's model, for comparison
"""
