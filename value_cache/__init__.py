"""The cache of keys and values. The names of its number formats stand here, where --help reads them without importing torch."""

KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
