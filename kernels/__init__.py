"""
Loops in C for a CPU, and their compilation. Each loop has an equivalent in torch, which is used if there is no compiler.

    build        compiles kernels.c, which includes the others, into the user's cache; bind() gives one function
    kernels.c    products with quantised matrices, caches of rows, latents
    trellis.c    finds the best stream of bits
    streams.c    caches by bits

A *level* is a value that a quantised number can have; a *codebook* lists the levels of a *depth*, the bits per number.
A *stream* holds the bits of several numbers. A *scale* (`gain` in the C code) multiplies levels.
A *group* is a set of rows that share their depths (matrices), or a kv head (caches).
"""
