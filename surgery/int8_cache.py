"""The public name of kv_cache/hf_int8.py: from surgery.int8_cache import int8_cache."""

from kv_cache.hf_int8 import int8_cache  # noqa: F401
