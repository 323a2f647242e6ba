"""
The inside of bench.py.

    training     a training step: speed, its parts, memory
    decoding     a step of decoding
    nanogpt      nanoGPT's model beside ours
"""
