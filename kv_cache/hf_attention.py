"""
Attention of a Hugging Face model that caches latents in place of keys and values.

Shapes: B texts, T positions of this call, S positions in the cache, H query heads, G kv heads, n numbers per head, r a rank.
"""

import sys

import torch
import torch.nn as nn
from torch.nn import functional as F

from common.cli import fail
from kv_cache.hf_latents import KeyReader, growing, loop_reads, norm_of, trains, turn_latents, turn_to_keys
from model import rotate
from util_factorization.modules import Uncut, restore_sums


class Turns:
    """The rotary table: the model's cosines and sines of all positions so far. Kept, since all layers read it at every step."""

    def __init__(self, rotary):
        self.rotary, self.made = rotary, (torch.empty(1, 0, 0),) * 2
        self.across = None, None  # the source and the result of columns()

    def __call__(self, S, like):
        """-> cos and sin (1, S, D/2), D rotated numbers per head. Learned positions: D is 0."""
        if self.rotary is None:
            return (like.new_empty(1, S, 0),) * 2
        return [t[:, :S] for t in self.up_to(S, like)]

    def up_to(self, S, like):
        """-> cos and sin (1, S or more, D/2)"""
        made = self.made  # read once: another thread may replace it
        if made[0].shape[1] < S or made[0].device != like.device or made[0].dtype != like.dtype:
            with torch.inference_mode(False), torch.no_grad():  # training may use them later
                positions = torch.arange(-(-S // 32) * 64, device=like.device)[None]  # a multiple of LANES in streams.c
                both = self.rotary(torch.empty(0, dtype=like.dtype, device=like.device), positions)
                made = self.made = [t.chunk(2, -1)[0].contiguous() for t in both]  # the two halves are the same
        return made

    def columns(self, S, like):
        """-> cos and sin [D/2, S or more]"""
        made, (source, columns) = self.up_to(S, like), self.across
        if source is not made:
            columns = [t[0].T.contiguous() for t in made]
            self.across = made, columns
        return columns


def masked(scores, mask):
    """Apply an attention mask (B or 1, H or 1, T, S) or None to scores (B, H, S) of one query, the mask's last row."""
    if mask is None:
        return scores
    mask = mask[:, :, -1]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


class LatentAttention(nn.Module):
    """
    Attention that caches latents in place of keys and values. A token takes r numbers if k and v share a latent, r_k + r_v if
    each has its own, instead of 2 G n. Keys are restored and rotated when they are read. Values are restored for a prompt. For
    a single token each head sums the latents with its weights, and H sums are restored instead of S values.

    Scores depend only on distances. So positions are counted from the first in the cache, and left padding does no harm.
    """

    def __init__(self, attn, q, k, v, turns):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q, k, v
        self.o_proj = next(getattr(attn, name) for name in ("o_proj", "dense", "c_proj") if hasattr(attn, name))
        self.q_norm, self.k_norm = (getattr(attn, name, nn.Identity()) for name in ("q_norm", "k_norm"))
        self.n = head_size(attn)
        self.scaling, self.layer_idx, self.turns = attn.scaling, attn.layer_idx, turns
        self.turn = None  # the change of basis that turn_to_keys() made

    def heads(self, x):
        return x.unflatten(-1, (-1, self.n))  # (B, T, heads, n)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, layer_past=None, **_):
        x, cache = hidden_states, layer_past if past_key_values is None else past_key_values
        q, c_k = self.q_norm(self.heads(self.q_proj(x))).transpose(1, 2), self.k_proj.down(x)
        c_v = c_k[..., :0] if self.shared else self.v_proj.down(x)
        if getattr(cache, "is_compileable", False):
            raise NotImplementedError("a static cache does not say how many positions it holds: drop cache_implementation")
        layer = growing(cache, self.layer_idx)
        if layer and not layer.get_seq_length():
            layer.reader = self.reader(c_k)
        if cache is not None:
            c_k, c_v = (c[:, 0] for c in cache.update(c_k[:, None], c_v[:, None], self.layer_idx))  # (B, S, r)
        c_v = c_k if self.shared else c_v
        (T, S), (cos, sin) = (q.shape[2], c_k.shape[1]), self.turns(c_k.shape[1], x)
        q = rotate(q, cos[:, S - T :], sin[:, S - T :])
        if T == 1 and isinstance(self.v_proj.up, nn.Linear):
            scores = self.scores(self.scaling * q[:, :, 0], c_k, cos, sin, layer and layer.reader)
            return self.o_proj(self.late(scores, c_v, attention_mask)), None
        k, v = self.keys(c_k, cos, sin), self.heads(self.v_proj.up(c_v)).transpose(1, 2)
        causal = attention_mask is None and T > 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, is_causal=causal, scale=self.scaling, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).flatten(-2)), None  # (B, T, d)

    @property
    def shared(self):
        """Whether keys and values share one latent."""
        return self.v_proj.down is self.k_proj.down

    def keys(self, c, cos, sin):
        """Latents (B, S, r) -> rotated keys (B, G, S, n)"""
        return rotate(self.k_norm(self.heads(self.k_proj.up(c))).transpose(1, 2), cos, sin)

    def scores(self, q, c, cos, sin, reader):
        """One query, scaled and rotated (B, H, n); c: latents of the keys (B, S, r) -> (B, H, S)"""
        if reader and reader.reads(q, c):
            return reader.scores(q, c, cos, sin)
        k = self.keys(c, cos, sin)
        return (q.unflatten(1, (k.shape[1], -1)) @ k.transpose(-1, -2)).flatten(1, 2)  # (B, G, H/G, n) times (B, G, n, S)

    def reader(self, c):
        """A KeyReader for latents like c and the present weights, or None if the loop cannot read them."""
        if not loop_reads(c, self.n) or trains(self.k_norm) or (norm := norm_of(self.k_norm, self.n)) is None:
            return None
        if isinstance(self.k_proj, Uncut):
            return KeyReader(torch.eye(c.shape[-1]), None, norm)
        up = self.k_proj.up  # PEFT replaces adapted linears by another type
        return KeyReader(up.weight.detach(), up.bias, norm) if type(up) is nn.Linear else None

    def turn_to_keys(self):
        """Change the basis of shared latents, for decoding on a CPU in float32 (hf_latents.py)."""
        if self.shared and self.turn is None:
            self.turn = turn_to_keys(*(linear.weight.data for linear in self.around_latents()))

    def around_latents(self):
        return self.k_proj.down, self.k_proj.up, self.v_proj.up

    def _apply(self, fn, recurse=True):
        """Called by .to() and similar. On another device or in another dtype, the stored basis of the latents is restored."""
        linears = [linear for linear in self.around_latents() if type(linear) is nn.Linear] if self.turn is not None else []
        if len(linears) == 3:  # none is adapted by PEFT
            moved = fn(torch.empty(0))
            if (moved.device.type, moved.dtype) != ("cpu", torch.float32):
                turn_latents(torch.linalg.inv(self.turn), *(linear.weight.data for linear in linears))
                self.turn = None
        return super()._apply(fn, recurse)

    def late(self, scores, c, mask):
        """
        Scores (B, H, S); c: latents of the values (B, S, r) -> (B, 1, H n)

        LateAttention in own_attention.py does this for our models and our cache; both use restore_sums(). Here the cache is
        Hugging Face's, with masks and grouped heads, and the scores are already computed.
        """
        sums = masked(scores, mask).softmax(-1) @ c  # (B, H, r)
        up, bias = self.heads(self.v_proj.up.weight.T).permute(1, 0, 2), self.v_proj.up.bias  # (G, r, n)
        return restore_sums(sums, up, None if bias is None else self.heads(bias))


def head_size(attn):
    """Numbers per head of a Hugging Face attention layer; None if it does not say."""
    return getattr(attn, "head_dim", getattr(attn, "head_size", None))


def check_attention(hf, layers):
    """Refuse a model whose attention LatentAttention cannot replace."""
    kind = hf.config.model_type
    rope = getattr(hf.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        fail(f"--out cannot write this {kind}, whose rotary angles change with the length of the text: drop --out")
    for attn in map(hf.get_submodule, [layer.name for layer in layers]):
        known = all(hasattr(attn, name) for name in ("scaling", "layer_idx")) and (
            hasattr(attn, "o_proj") or hasattr(attn, "dense")
        )
        n = head_size(attn)
        by_head = all(
            norm.weight.numel() == n for name in ("q_norm", "k_norm") if (norm := getattr(attn, name, None)) is not None
        )
        turn = getattr(sys.modules[type(attn).__module__], "rotate_half", None)  # some models rotate neighbours, not halves
        halves = turn is None or turn(torch.arange(4, device="cpu")).tolist() == [-2, -3, 0, 1]
        rotary = getattr(attn, "use_rope", True) and hasattr(hf.base_model, "rotary_emb") and halves
        if not (known and by_head and rotary):
            fail(f"--out: {type(attn).__name__} computes attention otherwise than a Llama: give a Llama, Mistral, Qwen or NeoX")
