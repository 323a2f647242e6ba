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

from kv_cache.bit_code import LAYERS_BEFORE, WHOLE, known_of
from kv_cache.bit_reader import reader_of
from kv_cache.hf_attention import CachedAttention, growing, masked, norm_of, rotary_tables, trains, usual_parts
from kv_cache.hf_layers import find_layers
from model import rotate

STREAMS = dict(fast=2, small=1)  # streams per layer, for each form


class Step:
    """State that layers share in a forward pass: token ids, embeddings, decoded keys and values of the last two layers."""

    def __init__(self, hf):
        self.table, self.norm = hf.get_input_embeddings(), first_norm(hf)
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


def first_norm(hf):
    """The norm before the first attention layer, or None."""
    return getattr(hf.get_submodule(find_layers(hf)[0].name.rpartition(".")[0]), "input_layernorm", None)


def rows_of(table, norm, ids):
    """ids -> normalised embeddings (..., d), the input of layer 0. Calls forward(), so that no hook of the table runs."""
    return norm(table.forward(ids))


class CodedAttention(CachedAttention):
    """
    Attention over decoded keys and values. They are quantised even without a cache, so that a measured loss is the loss with
    the quantised cache. Gradients pass through the rounding as if it were not there.
    """

    def __init__(self, attn, code, parts, turns, step):
        super().__init__(attn, parts, turns)
        for name, module in attn.named_children():  # keep the names: the plan of a packed model refers to them
            if name in ("query_key_value", "q_proj", "k_proj", "v_proj"):
                setattr(self, name, module)
        self.code, self.step = code, step
        self.reader = None  # a CodedReader; False if the loops cannot read the code
        self.norm = None  # (version_of() the keys' norm, norm_of() it)

    def project(self, x):
        """-> queries, keys, values (B, T, heads n)"""
        if not hasattr(self, "query_key_value"):
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        by_head = self.query_key_value(x).unflatten(-1, (-1, 3, self.n))  # q, k and v of a head are neighbours
        return tuple(part.flatten(2) for part in by_head.unbind(-2))

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, layer_past=None, **_):
        x, T, cache = hidden_states, hidden_states.shape[1], self.cache_of(past_key_values, layer_past)
        q, *now = self.project(x)
        now = torch.cat(now, -1).to(self.code.mean.dtype)
        layer = growing(cache, self.layer_idx)
        with torch.autocast(x.device.type, enabled=False):
            kept = self.append(now, attention_mask, cache)
        q, S = self.normed(self.q_norm, q), kept.rows.shape[1]
        if T == 1 and layer and (norm := self.norm_in_place(q)):
            return self.project_out(self.read_in_place(q[:, :, 0], kept, layer, norm, attention_mask)), None
        cos, sin = self.turns(S, x)
        with torch.autocast(x.device.type, enabled=False):
            k, v = self.read_all(kept, now).to(x.dtype).chunk(2, -1)  # (B, S, G n)
        q, k = rotate(q, cos[:, S - T :], sin[:, S - T :]), rotate(self.normed(self.k_norm, k), cos, sin)
        return self.attend(q, k, self.heads(v).to(q.dtype), attention_mask), None

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
        if (
            self.turns.rotary is None
            or q.dtype != torch.float32
            or (torch.is_grad_enabled() and q.requires_grad)
            or trains(self.k_norm)
        ):
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


def install_cache(hf, codes, parts, layers=None):
    """
    Replace the attention of a model by CodedAttention, in place.

    codes: a LayerCode for each layer. parts: {layer: Parts}, where they are not the usual ones. layers: of find_layers(), found
    before the weights were packed; default: found now.
    """
    step = Step(hf) if any(len(code.forecast) for code in codes) else NoForecasts()
    turns = rotary_tables(hf)
    for layer, code in zip(layers or find_layers(hf), codes, strict=True):
        parent, last = layer.name.rsplit(".", 1)
        attn = hf.get_submodule(layer.name)
        its = parts.get(layer.name) or usual_parts(attn)
        setattr(hf.get_submodule(parent), last, CodedAttention(attn, code.to(hf.device), its, turns(attn, its), step))
