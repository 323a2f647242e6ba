"""
Attention whose cache is kept by bits (value_cache/coded_cache.py), for a Llama-type model of Hugging Face.

The model's own cache object keeps uint8 bytes in place of a layer's keys; in place of its values it keeps the first positions
whole, in float16. Layer 0 also keeps each token's id, in 2 or 4 bytes: all layers forecast from the token's row. Each step
reads the layers in order, all positions of a layer at once. Nothing that was read stays in float.

Shapes: B texts, T positions at hand, S of them in the cache, H heads, G heads of keys and values, n numbers a head, D = 2 G n.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F

from common.cli import fail
from model import rotate
from surgery.layers import find_layers
from surgery.low_rank_modules import Turns, check_attention
from value_cache.coded_cache import LAYERS_BEFORE, WHOLE, fit, known_of, least_bits


class Step:
    """What the layers of one forward step hand on: the tokens' ids and rows, and the layers before as they were read back."""

    def __init__(self, hf):
        self.table, self.norm = hf.get_input_embeddings(), hf.base_model.layers[0].input_layernorm
        self.id_bytes = id_bytes(hf)
        self.ids, self.e, self.read = None, None, []
        self.table.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        self.ids = inputs[0]

    def packed_ids(self, like):
        """-> uint8 (B, T, 2 or 4)"""
        if self.ids is None or self.ids.shape != like.shape[:2]:
            raise ValueError("a coded cache keeps the tokens' ids: give the model input_ids, not inputs_embeds")
        ids, self.ids = self.ids, None  # each is read once
        return (ids[..., None] >> self.places(ids)).to(torch.uint8)

    def places(self, like):
        """The first bit of each byte of an id."""
        return 8 * torch.arange(self.id_bytes, device=like.device)

    def begin(self, packed_ids):
        ids = (packed_ids.long() << self.places(packed_ids)).sum(-1)
        self.e, self.read = rows_of(self.table, self.norm, ids), []

    def known(self, like):
        return known_of(self.read, self.e.to(like.dtype))


def id_bytes(hf):
    return 2 if hf.config.get_text_config().vocab_size <= 2**16 else 4


def rows_of(table, norm, ids):
    """What layer 0 reads of tokens (..., d). forward() alone, so that no hook of the table is called."""
    return norm(table.forward(ids))


class CodedAttention(nn.Module):
    """
    Attention over keys and values as they are read back from their bytes; without a cache too, so that a loss is that of the
    coded cache. Gradients pass through the rounding as if it were not there.

    Scores depend on distances alone. So positions are counted from the first in the cache, and left padding does no harm.
    """

    def __init__(self, attn, code, turns, step):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
        self.q_norm, self.k_norm = (getattr(attn, name, nn.Identity()) for name in ("q_norm", "k_norm"))
        self.n, self.scaling, self.layer_idx = attn.head_dim, attn.scaling, attn.layer_idx
        self.code, self.turns, self.step = code, turns, step

    def heads(self, x):
        return x.unflatten(-1, (-1, self.n)).transpose(1, 2)  # (B, heads, T, n)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **_):
        x, T = hidden_states, hidden_states.shape[1]
        if getattr(past_key_values, "is_compileable", False):
            raise NotImplementedError("a static cache has no end to count positions from: leave cache_implementation out")
        now = torch.cat([self.k_proj(x), self.v_proj(x)], -1)
        with torch.autocast(x.device.type, enabled=False):
            read = self.through_cache(now.to(self.code.mean.dtype), attention_mask, past_key_values).to(now.dtype)
        k, v = map(self.heads, read.chunk(2, -1))  # (B, G, S, n)
        S = k.shape[2]
        cos, sin = self.turns(S, x)
        q, k = self.q_norm(self.heads(self.q_proj(x))), self.k_norm(k)
        q, k = rotate(q, cos[:, S - T :], sin[:, S - T :]), rotate(k, cos, sin)
        causal = attention_mask is None and T > 1
        y = F.scaled_dot_product_attention(
            q, k, v.to(q.dtype), attn_mask=attention_mask, is_causal=causal, scale=self.scaling, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).flatten(-2)), None

    def through_cache(self, now, mask, cache):
        """Keys and values at hand (B, T, D) -> those of all positions, as read back (B, S, D)."""
        (B, T, _), pads, step, first = now.shape, padding(mask, now), self.step, self.layer_idx == 0
        start = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        whole = now[:, : max(0, int(pads.max()) + WHOLE - start)].half()
        ids = step.packed_ids(now) if first else now[..., :0].to(torch.uint8)
        if first:
            step.begin(ids)
        windows = self.code.encode(now.detach().flatten(0, 1), step.known(now)[:, -T:].flatten(0, 1))
        packed = torch.cat([ids, self.code.pack(windows).unflatten(0, (B, T))], -1)
        if cache is not None:
            packed, whole = (t[:, 0] for t in cache.update(packed[:, None], whole[:, None], self.layer_idx))
        ids, packed = packed.tensor_split([ids.shape[-1]], -1)
        if first:
            step.begin(ids)  # of all positions now
        known = step.known(now).flatten(0, 1)
        read = self.code.decode(self.code.unpack(packed.flatten(0, 1)), known).unflatten(0, (B, -1))
        place = torch.arange(whole.shape[1], device=now.device) - pads[:, None]
        kept = ((place >= 0) & (place < WHOLE))[..., None]  # shorter texts of a batch begin later
        read = torch.cat([torch.where(kept, whole.to(read.dtype), read[:, : whole.shape[1]]), read[:, whole.shape[1] :]], 1)
        step.read = [*step.read[1 - LAYERS_BEFORE :], read]
        return read + (now - now.detach()) if cache is None else read


def padding(mask, like):
    """Padded positions on the left of each text, long [B], from an attention's mask (B or 1, 1, T, S) or None."""
    if mask is None:
        return torch.zeros(len(like), dtype=torch.long, device=like.device)
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return allowed[:, 0, -1].int().argmax(-1).expand(len(like))


# -- building ---------------------------------------------------------------------------------------------------------


def coded_layers(hf):
    """The attention layers of a model whose cache can be coded, or one line."""
    layers = find_layers(hf)
    check_attention(hf, layers)
    if any(layer.fused for layer in layers) or not hasattr(hf.base_model.layers[0], "input_layernorm"):
        fail(f"a coded cache: a {hf.config.model_type} has q, k and v in one matrix, give a Llama, Mistral or Qwen")
    if slides(hf.config.get_text_config()):
        fail(f"a coded cache: this {hf.config.model_type} forgets what lies outside a sliding window, give another model")
    return layers


def slides(config):
    """Whether a layer's cache drops positions that lie outside a window: the whole first ones would get lost."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def gather(subject, windows):
    """
    What fit() needs, of windows, a list of (x (1, T), y): (keys and values, a list over layers of (windows, T, D) float16; e;
    G, a list over layers of [D,D]). The loss is of tokens that the model draws.
    """
    hf, layers = subject.model, coded_layers(subject.model)
    made, x, G = {}, [[] for _ in layers], [0] * len(layers)
    linears = [layer.linears[f"{layer.name}.{part}"] for layer in layers for part in ("k_proj", "v_proj")]
    hooks = [m.register_forward_hook(lambda m, inputs, output: made.__setitem__(m, output)) for m in linears]
    try:
        for ids, _ in windows:
            logits = subject.logits(subject.trunk(subject.lookup(ids).requires_grad_(True)))[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
            loss, outputs = F.cross_entropy(logits, labels, reduction="sum"), [made[m] for m in linears]
            gradients = torch.autograd.grad(loss, outputs)
            for i, found in enumerate(x):
                found.append(torch.cat(outputs[2 * i : 2 * i + 2], -1).detach().half().cpu())
                g = torch.cat(gradients[2 * i : 2 * i + 2], -1)[0, WHOLE:].double().cpu()
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
    Give a model attention with a coded cache, in place.

    codes: a LayerCode for each layer. layers: coded_layers() from before the weights were packed, where they are.
    """
    step, turns = Step(hf), Turns(hf.base_model.rotary_emb)
    for layer, code in zip(layers or coded_layers(hf), codes, strict=True):
        parent, last = layer.name.rsplit(".", 1)
        attn = hf.get_submodule(layer.name)
        setattr(hf.get_submodule(parent), last, CodedAttention(attn, code.to(hf.device), turns, step))


def code_cache(subject, windows, share):
    """
    Calibrate on windows and give the model, in place, a cache of at most this share of its float16 bytes -> the codes.

    The share counts all that is kept of a token, its id too. The first WHOLE positions come on top of it.
    """
    x, e, G = gather(subject, windows)
    codes = fit(x, e, G, cache_bits(subject.model, len(x), x[0].shape[-1], share))
    install_cache(subject.model, codes)
    return codes


def cache_bits(hf, layers, numbers, share):
    """
    Bits for the codes of a token in a cache of this share of float16's bytes: what its id leaves, and the ends of bytes.

    numbers: of a token's keys and values in one of the layers.
    """
    ends = 7 * layers  # bits at most: a layer's bits fill whole bytes
    return share * 16 * layers * numbers - 8 * id_bytes(hf) - ends


def check_cache(hf, share, window):
    """Refuse a model, a --cache_bytes share or a --window that no cache can be made of, before anything is measured."""
    layers = coded_layers(hf)
    numbers, count = len(layers[0].rows["k"]) + len(layers[0].rows["v"]), len(layers)
    least = least_bits(count)
    if (found := cache_bits(hf, count, numbers, share)) < least:
        lowest = share + (least - found) / (16 * count * numbers)
        fail(f"--cache_bytes {share} does not pay for a token's id, gains and a component: give {lowest + 0.0005:.3f} or more")
    if window <= WHOLE:
        fail(f"--window {window}: the first {WHOLE} positions of a coded cache are kept whole, give a longer one")
