"""
Checks the header of a GGUF file against the file's size: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The package gguf trusts every declared length: a declared list of 10^18 numbers fills the memory, even if the file is short.
"""

import math
import struct
from pathlib import Path

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type number -> bytes of a value
TEXT, LIST = 8, 9
MOST_DIMS = 4


class Head:
    """Reads a file's bytes one after the other."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def skip(self, count):
        """Skip bytes -> the position of the first. Raises ValueError if the file is too short."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,}, but declares more")
        return start

    def number(self, form):
        return struct.unpack_from(f"<{form}", self.data, self.skip(struct.calcsize(form)))[0]

    def text(self):
        length = self.number("Q")
        start = self.skip(length)
        return bytes(self.data[start : start + length])

    def value(self, kind):
        """Skip a value -> the value if it is an integer of 4 bytes, otherwise None."""
        if kind == TEXT:
            self.text()
        elif kind == LIST:
            inner, count = self.number("I"), self.number("Q")
            if inner in WIDTHS:
                self.skip(WIDTHS[inner] * count)
            elif inner != TEXT:
                raise ValueError("it has a list of lists")
            else:
                for _ in range(count):
                    self.text()
        elif kind in (4, 5):
            return self.number("I")
        else:
            self.skip(WIDTHS[kind])


def check_gguf(path):
    """Raise an error if a GGUF file declares more than it has -> the number of its tensors."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    head, size = Head(np.memmap(path, mode="r")), Path(path).stat().st_size
    if bytes(head.data[head.skip(4) : head.at]) != b"GGUF" or head.number("I") not in (2, 3):
        raise ValueError("it does not begin with GGUF and a version")
    tensors, values, stored = head.number("Q"), head.number("Q"), 0
    for _ in range(values):
        name = head.text()
        found = head.value(head.number("I"))
        if name.endswith(b".block_count") and (found or 0) > tensors:
            raise ValueError(f"{name.decode()} is {found}, but it has {tensors} tensors")
    for _ in range(tensors):
        name, dims = head.text(), head.number("I")
        if not 1 <= dims <= MOST_DIMS:
            raise ValueError(f"a tensor has {dims} dimensions")
        numbers = math.prod(head.number("Q") for _ in range(dims))
        in_block, width = GGML_QUANT_SIZES[GGMLQuantizationType(head.number("I"))]
        stored += numbers // in_block * width
        if head.number("Q") > size or stored > size:
            raise ValueError(f"{name[:40].decode(errors='replace')} is beyond its end")
    return tensors
