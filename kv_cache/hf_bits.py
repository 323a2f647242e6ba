"""
Attention with a quantised cache (kv_cache/bit_code.py), for a Llama-type model of Hugging Face or a GPT-NeoX.

Each layer stores two tensors in the model's own cache object: packed bytes in the slot for keys, and the first WHOLE positions
in float16 in the slot for values. Nothing else stays in float. There are two forms:

    fast    a single token reads each layer in place, by compiled loops (kv_cache/bit_reader.py)
    small   predicts each layer from the two previous layers and the token's embedding, so the same bytes cost less loss. Layer
            0 also stores each token's id, in 2 or 4 bytes. Each step decodes all positions of all layers in order: it is slow

Shapes: B texts, T positions of this call, S in the cache, H query heads, G kv heads, n numbers per head, D = 2 G n.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from common.cli import fail
from kv_cache.bit_code import LAYERS_BEFORE, WHOLE, blocks_of, fit, known_of, least_bits
from kv_cache.bit_reader import reader_of
from kv_cache.hf_attention import Turns, check_attention, head_size, masked
from kv_cache.hf_latents import growing, norm_of, trains
from kv_cache.hf_layers import find_layers
from model import rotate

STREAMS = dict(fast=2, small=1)  # streams per layer, for each form


class Step:
    """State that layers share in a forward pass: token ids, embeddings, decoded keys and values of the last two layers."""

    def __init__(self, hf):
        self.table, self.norm = hf.get_input_embeddings(), hf.base_model.layers[0].input_layernorm
        self.id_bytes = id_bytes(hf)
        self.ids, self.e, self.read = None, None, []
        self.table.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        self.ids = inputs[0]

    def begin(self, like):
        """Call this before layer 0 writes new keys and values; like (B, T, D) has their shape."""
        if self.ids is None or self.ids.shape != like.shape[:2]:
            raise ValueError("a cache by bits stores the tokens' ids: give the model input_ids, not inputs_embeds")
        self.begin_with(self.ids)

    def begin_with(self, ids):
        self.e, self.read = rows_of(self.table, self.norm, ids), []

    def attach(self, rows):
        """New rows of layer 0 -> the same rows, with the bytes of the ids before them."""
        ids, self.ids = self.ids, None  # so that a later call without ids is noticed
        return torch.cat([(ids[..., None] >> self.places(ids)).to(torch.uint8), rows], -1)

    def detach(self, rows):
        """Rows of layer 0, of all positions -> the same rows without the ids, from which a new pass begins."""
        ids, rows = rows.tensor_split([self.id_bytes], -1)
        self.begin_with((ids.long() << self.places(ids)).sum(-1))
        return rows

    def places(self, like):
        """The first bit of each byte of an id."""
        return 8 * torch.arange(self.id_bytes, device=like.device)

    def known(self, like, last=0):
        """Inputs of the forecast for all positions, or only the last ones [N,P], in the dtype of `like`."""
        return known_of(self.read, self.e.to(like.dtype))[:, -last:].flatten(0, 1)

    def add(self, read):
        self.read = [*self.read[1 - LAYERS_BEFORE :], read]


class NoForecasts:
    """Replaces Step if no layer has a forecast: no ids are stored."""

    def begin(self, like):
        pass

    def attach(self, rows):
        return rows

    def detach(self, rows):
        return rows

    def known(self, like, last=0):
        return None

    def add(self, read):
        pass


def id_bytes(hf):
    return 2 if hf.config.get_text_config().vocab_size <= 2**16 else 4


def rows_of(table, norm, ids):
    """ids -> normalised embeddings (..., d), the input of layer 0. Calls forward(), so that no hook of the table runs."""
    return norm(table.forward(ids))


class CodedAttention(nn.Module):
    """
    Attention over decoded keys and values. They are quantised even without a cache, so that a measured loss is the loss with
    the quantised cache. Gradients pass through the rounding as if it were not there.

    Scores depend only on distances. So positions are counted from the first in the cache, and left padding does no harm.
    """

    def __init__(self, attn, code, turns, step):
        super().__init__()
        for name, module in attn.named_children():  # keep the names: the plan of a packed model refers to them
            if name in ("query_key_value", "q_proj", "k_proj", "v_proj", "o_proj", "dense"):
                setattr(self, name, module)
        self.q_norm, self.k_norm = (getattr(attn, name, nn.Identity()) for name in ("q_norm", "k_norm"))
        self.n, self.scaling, self.layer_idx = head_size(attn), attn.scaling, attn.layer_idx
        self.code, self.turns, self.step = code, turns, step
        self.reader = None  # a CodedReader; False if the loops cannot read the code
        self.norm = None  # (version_of() the keys' norm, norm_of() it)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.n)).transpose(1, 2)  # (B, heads, T, n)

    def project(self, x):
        """-> queries, keys, values (B, T, heads n)"""
        if not hasattr(self, "query_key_value"):
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        by_head = self.query_key_value(x).unflatten(-1, (-1, 3, self.n))  # q, k and v of a head are neighbours
        return tuple(part.flatten(2) for part in by_head.unbind(-2))

    def project_out(self, y):
        return self.o_proj(y) if hasattr(self, "o_proj") else self.dense(y)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, layer_past=None, **_):
        x, T = hidden_states, hidden_states.shape[1]
        cache = layer_past if past_key_values is None else past_key_values  # layer_past: its name in GPT-NeoX
        if getattr(cache, "is_compileable", False):
            raise NotImplementedError("a static cache does not say how many positions it holds: drop cache_implementation")
        q, *now = self.project(x)
        now = torch.cat(now, -1).to(self.code.mean.dtype)
        layer = growing(cache, self.layer_idx)
        with torch.autocast(x.device.type, enabled=False):
            kept = self.append(now, attention_mask, cache)
        q, S = self.q_norm(self.heads(q)), kept.rows.shape[1]
        if T == 1 and layer and (norm := self.norm_in_place(q)):
            return self.project_out(self.read_in_place(q[:, :, 0], kept, layer, norm, attention_mask)), None
        cos, sin = self.turns(S, x)
        q = rotate(q, cos[:, S - T :], sin[:, S - T :])
        with torch.autocast(x.device.type, enabled=False):
            read = self.read_all(kept, now).to(x.dtype)
        k, v = map(self.heads, read.chunk(2, -1))  # (B, G, S, n)
        k = rotate(self.k_norm(k), cos, sin)
        causal = attention_mask is None and T > 1
        y = F.scaled_dot_product_attention(
            q, k, v.to(q.dtype), attn_mask=attention_mask, is_causal=causal, scale=self.scaling, enable_gqa=True
        )
        return self.project_out(y.transpose(1, 2).flatten(-2)), None

    def append(self, now, mask, cache):
        """Add new keys and values (B, T, D) to the cache -> a Kept of all positions."""
        (B, T), pads, step, first = now.shape[:2], padding(mask), self.step, self.layer_idx == 0
        start = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        whole = now[:, : max(0, WHOLE + (0 if pads is None else int(pads.max())) - start)].half()
        if first:
            step.begin(now)
        rows = self.code.write(now.detach().flatten(0, 1), step.known(now, last=T)).unflatten(0, (B, T))
        rows = step.attach(rows) if first else rows
        if cache is not None:
            rows, whole = (t[:, 0] for t in cache.update(rows[:, None], whole[:, None], self.layer_idx))
        return Kept(step.detach(rows) if first else rows, whole, pads)

    def read_all(self, kept, now):
        """-> keys and values of all positions (B, S, D). now (B, T, D): the new ones, which carry the gradients."""
        (B, W), whole = kept.whole.shape[:2], kept.whole.to(now.dtype)
        read = self.code.read(kept.rows.flatten(0, 1), self.step.known(whole)).unflatten(0, (B, -1))
        read = torch.cat([torch.where(kept.counts()[..., None], whole, read[:, :W]), read[:, W:]], 1)
        self.step.add(read)
        return read + (now - now.detach()) if now.shape[1] == read.shape[1] else read

    def norm_in_place(self, q):
        """norm_of() the keys' norm; None if the loops cannot take q (B, H, T, n): they need float32 and give no gradients."""
        if q.dtype != torch.float32 or (torch.is_grad_enabled() and q.requires_grad) or trains(self.k_norm):
            return None
        if self.reader is None:
            self.reader = reader_of(self.code, self.n) or False
        if self.norm is None or self.norm[0] != version_of(self.k_norm):
            self.norm = version_of(self.k_norm), norm_of(self.k_norm, self.n)
        return self.norm[1] if self.reader else None

    def read_in_place(self, q, kept, layer, norm, mask):
        """One query of each text, not yet rotated (B, H, n) -> outputs of the heads, side by side (B, 1, H n)."""
        reader = self.reader
        if layer.first is None or not layer.first.is_of(kept.whole, kept.pads):
            layer.first = reader.first_positions(kept.whole, kept.pads, self.turns, self.k_norm)
        columns = self.turns.columns(kept.rows.shape[1], q)
        scores = reader.scores(q, kept.rows, layer.first, norm, columns, self.scaling)
        return reader.outputs(masked(scores, mask).softmax(-1), kept.rows, layer.first)

    def _apply(self, fn, recurse=True):
        """Called by .to() and similar: the reader has to be rebuilt."""
        self.reader = self.norm = None
        return super()._apply(fn, recurse)


def version_of(module):
    """A value that changes if the module's weight changes. None if torch does not count changes (inference mode)."""
    weight = getattr(module, "weight", None)
    return None if weight is None or weight.is_inference() else (id(weight), weight._version)


@dataclass
class Kept:
    """
    Contents of a layer's cache: rows uint8 (B, S, bytes); whole (B, W, D) float16, the first positions. pads: from padding().
    """

    rows: torch.Tensor
    whole: torch.Tensor
    pads: torch.Tensor | None

    def counts(self):
        """Which of `whole` are among the first WHOLE of their text (B or 1, W): shorter texts of a batch begin later."""
        place = torch.arange(self.whole.shape[1], device=self.whole.device)[None]
        place = place if self.pads is None else place - self.pads[:, None]
        return (place >= 0) & (place < WHOLE)


def padding(mask):
    """
    Attention mask (B or 1, 1, T, S) -> number of padded positions on the left of each text, long [B or 1]; None without a mask.
    If a text has not begun, all positions are padding.
    """
    if mask is None:
        return None
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, -1]
    return torch.where(seen.any(-1), seen.int().argmax(-1), seen.shape[-1])


# -- building ---------------------------------------------------------------------------------------------------------


def coded_layers(hf):
    """The attention layers of a model. Fails with one line if its cache cannot be quantised."""
    layers = find_layers(hf)
    check_attention(hf, layers)
    if not hasattr(hf.base_model.layers[0], "input_layernorm"):
        fail(f"a cache by bits: a {hf.config.model_type} has no input_layernorm, give a Llama, Mistral, Qwen or GPT-NeoX")
    if slides(hf.config.get_text_config()):
        fail(f"a cache by bits: this {hf.config.model_type} drops positions outside a sliding window, give another model")
    return layers


def slides(config):
    """Whether a layer's cache drops positions outside a sliding window: the first positions would get lost."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def gather(subject, windows):
    """
    Collect the inputs of fit() on windows of text, a list of (x (1, T), y) -> (keys and values, a list over layers of
    (windows, T, D) float16; e; G, a list over layers of [D,D]). The loss is that of labels drawn from the model's predictions.
    """
    hf, layers = subject.model, coded_layers(subject.model)
    made, x, G = {}, [[] for _ in layers], [0] * len(layers)
    linears = [list(layer.linears.values()) for layer in layers]
    rows = [torch.cat([layer.rows["k"], layer.rows["v"]]) for layer in layers]  # of the linears' joined outputs
    hooks = [m.register_forward_hook(lambda m, inputs, output: made.__setitem__(m, output)) for m in sum(linears, [])]
    try:
        for ids, _ in windows:
            logits = subject.logits(subject.trunk(subject.lookup(ids).requires_grad_(True)))[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            gradients = dict(zip(made, torch.autograd.grad(loss, list(made.values()))))
            for i, found in enumerate(x):
                found.append(torch.cat([made[m] for m in linears[i]], -1)[..., rows[i]].detach().half().cpu())
                g = torch.cat([gradients[m] for m in linears[i]], -1)[0, WHOLE:, rows[i]].double().cpu()
                G[i] = G[i] + g.T @ g / (len(g) * len(windows))
    finally:
        for hook in hooks:
            hook.remove()
    ids = torch.cat([ids for ids, _ in windows]).to(hf.device)
    with torch.no_grad():
        e = rows_of(hf.get_input_embeddings(), hf.base_model.layers[0].input_layernorm, ids)
    return [torch.cat(found) for found in x], e.float().cpu(), G


def install_cache(hf, codes, layers=None):
    """
    Replace the attention of a model by CodedAttention, in place.

    codes: a LayerCode for each layer. layers: coded_layers(), found before the weights were packed; default: found now.
    """
    step = Step(hf) if any(len(code.forecast) for code in codes) else NoForecasts()
    turns = Turns(hf.base_model.rotary_emb)
    for layer, code in zip(layers or coded_layers(hf), codes, strict=True):
        parent, last = layer.name.rsplit(".", 1)
        attn = hf.get_submodule(layer.name)
        setattr(hf.get_submodule(parent), last, CodedAttention(attn, code.to(hf.device), turns, step))


def code_cache(subject, windows, share, form):
    """
    Calibrate on windows of text, and give the model, in place, a cache of at most this share of its float16 bytes -> the codes.

    The share counts all bytes of a token, including its id. The first WHOLE positions are not counted. form: a key of STREAMS.
    """
    codes = fit(*gather(subject, windows), cache_bits(subject.model, share, form), blocks_for(subject.model, form))
    install_cache(subject.model, codes)
    return codes


def blocks_for(hf, form):
    """The argument `blocks` of fit(): None for the form `small`."""
    if form == "small":
        return None
    layer, (cos, _) = coded_layers(hf)[0], Turns(hf.base_model.rotary_emb)(1, hf.get_input_embeddings().weight)
    n = head_size(hf.get_submodule(layer.name))
    return blocks_of(len(layer.rows["k"]) // n, n, 2 * cos.shape[-1])


def numbers_of(hf):
    """(number of layers, numbers of a token's keys and values in a layer)"""
    layers = coded_layers(hf)
    return len(layers), len(layers[0].rows["k"]) + len(layers[0].rows["v"])


def cache_bits(hf, share, form):
    """
    Bits per token that fit() may spend: the share of float16's bytes, minus the id and the padding of streams to bytes.
    """
    layers, numbers = numbers_of(hf)
    ends = 7 * layers * STREAMS[form]  # padding bits at most: a stream fills entire bytes
    return share * 16 * layers * numbers - 8 * kept_of_id(hf, form) - ends


def kept_of_id(hf, form):
    """Bytes of a token's id in the cache: forecasts need it."""
    return id_bytes(hf) if form == "small" else 0


def check_cache(hf, share, window, form):
    """Refuse a model, a --cache_bytes share or a --window that allows no cache, before anything is measured."""
    layers, numbers = numbers_of(hf)
    least = least_bits(layers, STREAMS[form])
    if (found := cache_bits(hf, share, form)) < least:
        lowest = share + (least - found) / (16 * layers * numbers)
        fail(f"--cache_bytes {share} is too small for the scales and one component: give {lowest + 0.0005:.3f} or more")
    if window <= WHOLE:
        fail(f"--window {window}: the first {WHOLE} positions are not quantised, give a longer one")
