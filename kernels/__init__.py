"""
Loops in C for a CPU, and what compiles them. Each has a twin in torch, used where there is no compiler.

    build        compiles kernels.c, which includes the others, into the user's cache; bind() gives one function
    kernels.c    products with packed matrices, caches of rows, latents
    trellis.c    the best stream of codes
    streams.c    caches by bits
"""
