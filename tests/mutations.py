"""Damaged and hostile versions of files of each kind: KINDS names them. trials.py gives them to readers."""

import io
import json
import os
import pickle
import re
import struct
import zipfile
from functools import partial

import numpy as np
import torch

# -- bytes ------------------------------------------------------------------------------------------------------------


def damaged_bytes(data, draw):
    """Cut short, bits flipped, zeros or noise written over a stretch, something put in or left out."""
    data, kind = bytearray(data), draw.randrange(7)
    at = draw.randrange(len(data) + 1)
    stretch = slice(at, at + draw.choice((1, 8, 100, 1000)))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for _ in range(draw.choice((1, 2, 10, 100))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        data[stretch] = bytes(len(data[stretch]))
    elif kind == 3:
        data[stretch] = draw.randbytes(len(data[stretch]))
    elif kind == 4:
        data[at:at] = draw.randbytes(draw.choice((1, 8, 1000)))
    elif kind == 5:
        del data[stretch]
    else:  # a number of 4 or 8 bytes becomes a huge one: a declared size, more often in the head
        at = draw.randrange(min(len(data), 300))
        data[at : at + 8] = struct.pack(draw.choice("<>") + "q", draw.choice((10**9, 2**40, -1, 2**62)))
    return bytes(data)


# -- values in a container --------------------------------------------------------------------------------------------

DEEP = json.loads("[" * 200 + "]" * 200)
WRONG = (None, True, -1, 0, 3, 10**9, 10**18, 0.5, 1e308, float("nan"), float("inf"), "", "x", "12", "../../outside", [], {},
         [1, 2], {"a": 1}, ["x"] * 3, DEEP)  # fmt: skip


def places(value, at=()):
    """The paths of all values inside containers."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, each in inside:
        yield (*at, key)
        yield from places(each, (*at, key))


def changed(value, path, change):
    """A copy of nested containers in which the value at a path is change(value); change(None) of a lacking one."""
    if not path:
        return change(value)
    if isinstance(value, dict):
        new = {k: v if k != path[0] else changed(v, path[1:], change) for k, v in value.items()}
        return {k: v for k, v in new.items() if v is not DROPPED}
    new = [v if i != path[0] else changed(v, path[1:], change) for i, v in enumerate(value)]
    return type(value)(v for v in new if v is not DROPPED)


DROPPED = object()


def wrong_value(value, draw):
    """A value of another type or size in the place of one."""
    kind = draw.randrange(8)
    if isinstance(value, torch.Tensor) and kind < 7:
        return wrong_tensor(value, draw)
    if kind == 0:
        return DROPPED
    if kind == 1 and isinstance(value, (int, float)) and not isinstance(value, bool):
        return draw.choice((value + 1, -value, value * 1000, str(value), [value], float(value), 2 * value))
    if kind == 2 and isinstance(value, (dict, list)) and value:
        return list(value)[:-1] if isinstance(value, list) else dict(list(value.items())[:-1])
    if kind == 3 and isinstance(value, dict):
        return value | {draw.choice(("extra", 7, "")): draw.choice(WRONG)}
    return draw.choice(WRONG)


def wrong_tensor(t, draw):
    kind, t = draw.randrange(9), t.to_dense() if t.is_sparse else t
    if kind < 2 and t.numel() and t.is_floating_point():
        t = t.contiguous().clone()
        t.view(-1)[draw.randrange(t.numel())] = draw.choice((float("nan"), float("inf"), -float("inf")))
        return t
    if kind == 2:
        return t.to(draw.choice((torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.bool)))
    if kind == 3 and t.dim():
        return t.new_zeros([n + draw.choice((-1, 1)) for n in t.shape])
    if kind == 4:
        return t.new_zeros(1).expand(draw.choice(([10**9, 10**3], [*t.shape], [10**12])))
    if kind == 5:
        return t.T.contiguous().T if t.dim() == 2 else t.new_zeros(0)
    if kind == 6:
        return t.flatten()[: t.numel() // 2].clone()
    if kind == 7:
        return draw.choice((t.to("meta"), t.to_sparse() if t.dim() else t, t[None].clone()))
    return draw.choice(WRONG)


def damaged_tree(value, draw):
    """One to three values of a tree of containers are wrong."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        paths = sorted(places(value), key=repr)
        if not paths:
            return draw.choice(WRONG)
        short = [p for p in paths if len(p) <= 2]  # half of them near the top, where the sizes are
        path = draw.choice(short if draw.random() < 0.5 else paths)
        value = changed(value, path, lambda old: wrong_value(old, draw))
    return draw.choice(WRONG) if draw.random() < 0.02 else value


# -- files ------------------------------------------------------------------------------------------------------------


class Touch:
    """Pickled, it is a program that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Huge:
    """Pickled, it asks for an array of a hundred gigabytes by a name that torch allows."""

    def __reduce__(self):
        return bytearray, (10**11,)


BOMB = 100 * 2**20  # bytes
MEMO = b"\x80\x02}r\xff\xff\xff\x7fX\x01\x00\x00\x00aK\x01s."  # a place in the memo for which 16 GB are reserved
PICKLE_BOMBS = (MEMO, b"\x80\x02\x8b\xff\xff\xff\x7f.", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x00.", b"(" * 10**5 + b".")


def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def repacked(data, change, compress=zipfile.ZIP_STORED, **extra):
    """A zip file with each member's content changed by change(name, content), and extra members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compress) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in extra.items():
            new.writestr(name, content)
    return buffer.getvalue()


def bomb(data, member):
    """A zip file that unpacks one member to more than a reader may take."""
    return repacked(data, lambda name, content: bytes(BOMB) if name.endswith(member) else content, zipfile.ZIP_DEFLATED)


def huge_storages(name, content):
    """In a data.pkl, every storage's number of elements becomes 10^9: more than is there."""
    huge = b"J" + struct.pack("<i", 10**9)
    return re.sub(rb"(X\x03\x00\x00\x00cpuq.)(?:K.|M..|J....)", lambda found: found[1] + huge, content, flags=re.S)


def hostile_torch(data, draw, canary):
    value = torch.load(io.BytesIO(data), weights_only=True)
    folder = zipfile.ZipFile(io.BytesIO(data)).namelist()[0].split("/")[0]
    yield pickle.dumps(Touch(canary))
    yield torch_bytes(dict(value, config=Touch(canary)))
    yield torch_bytes(dict(value, config=Huge()))
    yield torch_bytes(Huge())
    yield repacked(data, huge_storages)
    yield repacked(data, lambda name, content: content, zipfile.ZIP_DEFLATED)
    for member in ("data/0", "data.pkl"):
        yield partial(bomb, data, member)
    yield repacked(data, lambda name, content: content, **{"../../outside/x": b"x", "/tmp/outside": b"x"})
    yield repacked(data, lambda name, content: content, **{f"{folder}/data.pkl": pickle.dumps(Touch(canary), 2)})
    yield repacked(data, lambda name, content: MEMO if name.endswith("data.pkl") else content)
    yield data + data
    for name in ("n_layer", "n_embd", "vocab_size", "block_size", "n_head", "mlp_expansion_factor", "lora_rank"):
        if isinstance(value, dict) and isinstance(value.get("config"), dict):
            for number in (10**9, 10**5, 0, -1):
                yield torch_bytes(dict(value, config=value["config"] | {name: number}))


def mutated_torch(data, draw):
    if draw.random() < 0.4:
        return damaged_bytes(data, draw)
    return torch_bytes(damaged_tree(torch.load(io.BytesIO(data), weights_only=True), draw))


def hostile_pickle(data, draw, canary):
    value = pickle.loads(data)
    yield pickle.dumps(Touch(canary))
    yield pickle.dumps(value | dict(tokenizer=Touch(canary)))
    yield pickle.dumps(value | dict(more=Huge()))
    yield from PICKLE_BOMBS
    for size in (10**9, 10**18, -1, 0, True, 2.0, "97"):
        yield pickle.dumps(value | dict(vocab_size=size, dtype=draw.choice(("uint16", "uint32"))))


def mutated_pickle(data, draw):
    return damaged_bytes(data, draw) if draw.random() < 0.4 else pickle.dumps(damaged_tree(pickle.loads(data), draw))


def hostile_json(data, draw, canary):
    yield from (b"", b"{", b"null", b"[]", b"[" * 10**5, b"1" * 10**4, b"\xff\xfe", b'{"a":' * 10**5, b"\0" * 100)
    value = json.loads(data)
    if isinstance(value, dict):
        yield json.dumps(value | dict(method=f"../../{canary}")).encode()


def mutated_json(data, draw):
    if draw.random() < 0.3:
        return damaged_bytes(data, draw)
    return json.dumps(damaged_tree(json.loads(data), draw)).encode()


def hostile_lines(data, draw, canary):
    yield from hostile_json(data.splitlines()[0], draw, canary)


def mutated_lines(data, draw):
    if draw.random() < 0.3:
        return damaged_bytes(data, draw)
    lines = [json.loads(line) for line in data.splitlines()]
    return "".join(json.dumps(line) + "\n" for line in changed(lines, (), lambda old: tree_of_lines(old, draw))).encode()


def tree_of_lines(lines, draw):
    i = draw.randrange(len(lines))
    return [*lines[:i], damaged_tree(lines[i], draw), *lines[i + 1 :]]


def npy_bytes(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npy_header(shape, descr="<f4", order=False):
    header = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def wrong_array(a, draw):
    kind = draw.randrange(6)
    if kind == 0:
        a = a.copy()
        a.flat[draw.randrange(a.size)] = draw.choice((np.nan, np.inf, -np.inf))
        return a
    if kind == 1:
        return a.astype(draw.choice(("i8", "f2", "f8", "c8", "U5", "?", ">f4")))
    if kind == 2:
        return draw.choice((a.T, a[:-1], a[None], a.ravel(), a[:0], np.asfortranarray(a)))
    if kind == 3:
        return np.zeros(draw.choice(((), (0,), (1, 1), (3, 5, 7))), a.dtype)
    return a * draw.choice((1, 1e30, 0))


def hostile_npy(data, draw, canary):
    yield npy_bytes(np.array([Touch(canary)], dtype=object), allow_pickle=True)
    yield pickle.dumps(Touch(canary))
    for shape in ((10**9, 8), (10**12, 10**6), (2**62,), (-1, 8), (97, 10**9)):
        yield npy_header(shape) + data[128:]
    yield npy_header((97, 8), "|O") + pickle.dumps(Touch(canary))
    yield npy_header(f"__import__('os').system('touch {canary}')") + data[128:]


def mutated_npy(data, draw):
    return damaged_bytes(data, draw) if draw.random() < 0.5 else npy_bytes(wrong_array(np.load(io.BytesIO(data)), draw))


def npz_bytes(arrays, save=np.savez):
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def hostile_npz(data, draw, canary):
    arrays = dict(np.load(io.BytesIO(data)))
    yield npz_bytes(arrays | dict(scale_up=np.array([Touch(canary)], dtype=object)))
    yield npz_bytes(arrays, np.savez_compressed)
    for name, shape in dict(more=(BOMB // 4,), scale_up=(BOMB // 256, 64)).items():
        yield partial(npz_bytes, arrays | {name: np.zeros(shape, np.float32)}, np.savez_compressed)
    yield repacked(data, lambda name, content: content, **{"../../outside/x.npy": b"x", "/tmp/outside.npy": b"x"})
    yield repacked(data, lambda name, content: npy_header((10**9, 8)) + content[128:])
    yield partial(bomb, data, ".npy")


def mutated_npz(data, draw):
    if draw.random() < 0.4:
        return damaged_bytes(data, draw)
    arrays = dict(np.load(io.BytesIO(data)))
    name = draw.choice(sorted(arrays))
    if draw.random() < 0.2:
        arrays.pop(name)
    else:
        arrays[name] = wrong_array(arrays[name], draw)
    return npz_bytes(arrays)


def hostile_raw(data, draw, canary):
    yield from (b"", b"\xff", b"\xff" * 200, data + b"\0", bytes(len(data)), pickle.dumps(Touch(canary)))


def hostile_gguf(data, draw, canary):
    """Every number of eight bytes in the head may be a length."""
    yield from (b"", data[:24], b"GGUF" + bytes(100), data[:8] + struct.pack("<QQ", 2**60, 2**60) + data[24:])
    yield data[:8] + struct.pack("<QQ", 10**9, 0) + data[24:]
    for name in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type", b"tokenizer.ggml.merges"):
        at = data.index(name) + len(name) + 8
        for count in (10**9, 10**18, 2**64 - 1):
            yield data[:at] + struct.pack("<Q", count) + data[at + 8 :]
    for name in (b"block_count", b"embedding_length", b"feed_forward_length", b"vocab_size", b".head_count", b"context_length"):
        at = data.index(name) + len(name) + 4
        for count in (10**9, 2**31, 0):
            yield data[:at] + struct.pack("<I", count) + data[at + 4 :]


def damaged_head(data, draw):
    """The first bytes are damaged more often than the numbers behind them."""
    if draw.random() < 0.3:
        return damaged_bytes(data, draw)
    return damaged_bytes(data[:600], draw) + data[600:]


def hostile_safetensors(data, draw, canary):
    size = struct.unpack("<Q", data[:8])[0]
    yield from (b"", data[:8], struct.pack("<Q", 2**62) + data[8:], struct.pack("<Q", 10**9) + data[8:])
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = sorted(n for n in header if n != "__metadata__")[0]
    for change in (dict(shape=[10**9, 10**3]), dict(shape=[2**40]), dict(data_offsets=[0, 2**40]), dict(data_offsets=[8, 0]),
                   dict(dtype="F64"), dict(dtype="X")):  # fmt: skip
        yield safetensors_bytes(header | {name: header[name] | change}, rest)


def safetensors_bytes(header, rest):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def mutated_safetensors(data, draw):
    from safetensors.torch import load, save

    if draw.random() < 0.3:
        return damaged_bytes(data, draw)
    if draw.random() < 0.3:
        size = struct.unpack("<Q", data[:8])[0]
        return safetensors_bytes(damaged_tree(json.loads(data[8 : 8 + size]), draw), data[8 + size :])
    tensors = load(data)
    name = draw.choice(sorted(tensors))
    new = wrong_value(tensors[name], draw)
    del tensors[name]
    if isinstance(new, torch.Tensor) and new.numel() < 10**6 and new.layout == torch.strided and new.device.type == "cpu":
        tensors[name] = new.contiguous()
    return save(tensors)


KINDS = {  # of file -> (fixed hostile versions, a random mutation)
    "torch": (hostile_torch, mutated_torch),
    "pickle": (hostile_pickle, mutated_pickle),
    "json": (hostile_json, mutated_json),
    "lines": (hostile_lines, mutated_lines),
    "npy": (hostile_npy, mutated_npy),
    "npz": (hostile_npz, mutated_npz),
    "raw": (hostile_raw, damaged_bytes),
    "gguf": (hostile_gguf, damaged_head),
    "safetensors": (hostile_safetensors, mutated_safetensors),
}
