"""
The modules of a smaller model: low-rank factors in place of q, k, v or the token table, and attention that caches latents.

A plan says what is smaller, in plain JSON: {"stacks": [{"parts": [[layer, target], ...], "rank": r}, ...], "table": {"rank": r,
"mean": bool, "head": the rank of an untied head, or None} or None}. The parts of a stack share what they read: k and v of a
layer share one latent, neighbouring layers share one set of components.

Shapes: B texts, T positions at hand, S of them in the cache, H heads, G heads of keys and values, n numbers a head, r a rank.
"""

import sys

import torch
import torch.nn as nn
from torch.nn import functional as F

from common.cli import fail
from common.modules import linear
from model import rotate
from surgery.latent_cache import KeyReader, growing, loop_reads, norm_of, trains, turn_latents, turn_to_keys
from surgery.layers import find_layers
from value_cache.latent_attention import restore_sums


class LowRank(nn.Module):
    """y = up (down x) [+ bias], down [r,in], up [out,r]."""

    def __init__(self, down, up):
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x):
        return self.up(self.down(x))


class SharingLowRank(LowRank):
    """A LowRank with the `down` of another one, or with what takes its place there: an adapted layer of PEFT."""

    def __init__(self, owner, up):
        nn.Module.__init__(self)
        self.owner, self.up = [owner], up  # in a list, so that its weights have one name

    @property
    def down(self):
        return self.owner[0].down


class Uncut(LowRank):
    """A whole matrix where attention expects a LowRank."""

    def __init__(self, whole):
        nn.Module.__init__(self)
        self.down = whole

    def up(self, x):
        return x


class Turns:
    """The model's own cosines and sines of all positions so far; kept, since every layer reads them at every step."""

    def __init__(self, rotary):
        self.rotary, self.made = rotary, (torch.empty(1, 0, 0),) * 2
        self.across = None, None  # what columns() was made of, and made

    def __call__(self, S, like):
        """-> cos and sin (1, S, D/2), D rotated numbers a head; a model of learned positions rotates none."""
        if self.rotary is None:
            return (like.new_empty(1, S, 0),) * 2
        return [t[:, :S] for t in self.up_to(S, like)]

    def up_to(self, S, like):
        """-> cos and sin (1, S or more, D/2)"""
        made = self.made  # read once: another thread may make more
        if made[0].shape[1] < S or made[0].device != like.device or made[0].dtype != like.dtype:
            with torch.inference_mode(False), torch.no_grad():  # a later training may read them too
                positions = torch.arange(-(-S // 32) * 64, device=like.device)[None]  # whole LANES of streams.c
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
    """Scores (B, H, S) of one query under an attention's mask (B or 1, H or 1, T, S) or None; the query is its last row."""
    if mask is None:
        return scores
    mask = mask[:, :, -1]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


class LatentAttention(nn.Module):
    """
    Attention that caches latents in place of keys and values: r numbers a token where k and v share a latent, r_k + r_v where
    each has its own, instead of 2 G n. Keys are restored and rotated when they are read. Values are restored for a prompt; for
    a single token the heads weigh the latents, and H sums are restored instead of S values.

    Scores depend on distances alone. So positions are counted from the first in the cache, and left padding does no harm.
    """

    def __init__(self, attn, q, k, v, turns):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q, k, v
        self.o_proj = next(getattr(attn, name) for name in ("o_proj", "dense", "c_proj") if hasattr(attn, name))
        self.q_norm, self.k_norm = (getattr(attn, name, nn.Identity()) for name in ("q_norm", "k_norm"))
        self.n = head_size(attn)
        self.scaling, self.layer_idx, self.turns = attn.scaling, attn.layer_idx, turns
        self.turn = None  # of turn_to_keys()

    def heads(self, x):
        return x.unflatten(-1, (-1, self.n))  # (B, T, heads, n)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, layer_past=None, **_):
        x, cache = hidden_states, layer_past if past_key_values is None else past_key_values
        q, c_k = self.q_norm(self.heads(self.q_proj(x))).transpose(1, 2), self.k_proj.down(x)
        c_v = c_k[..., :0] if self.shared else self.v_proj.down(x)
        if getattr(cache, "is_compileable", False):
            raise NotImplementedError("a static cache has no end to count positions from: leave cache_implementation out")
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
        """Whether keys and values have one latent."""
        return self.v_proj.down is self.k_proj.down

    def keys(self, c, cos, sin):
        """Latents (B, S, r) -> keys, rotated (B, G, S, n)"""
        return rotate(self.k_norm(self.heads(self.k_proj.up(c))).transpose(1, 2), cos, sin)

    def scores(self, q, c, cos, sin, reader):
        """One query, scaled and rotated (B, H, n), latents of the keys (B, S, r) -> (B, H, S)"""
        if reader and reader.reads(q, c):
            return reader.scores(q, c, cos, sin)
        k = self.keys(c, cos, sin)
        return (q.unflatten(1, (k.shape[1], -1)) @ k.transpose(-1, -2)).flatten(1, 2)  # (B, G, H/G, n) times (B, G, n, S)

    def reader(self, c):
        """The KeyReader of latents c for the weights as they are now, or None."""
        if not loop_reads(c, self.n) or trains(self.k_norm) or (norm := norm_of(self.k_norm, self.n)) is None:
            return None
        if isinstance(self.k_proj, Uncut):
            return KeyReader(torch.eye(c.shape[-1]), None, norm)
        up = self.k_proj.up  # PEFT's adapted ones are of another type
        return KeyReader(up.weight.detach(), up.bias, norm) if type(up) is nn.Linear else None

    def turn_to_keys(self):
        """Turn the latents, if keys and values share them, for decoding on a CPU in float32 (latent_cache.py)."""
        if self.shared and self.turn is None:
            self.turn = turn_to_keys(*(linear.weight.data for linear in self.around_latents()))

    def around_latents(self):
        return self.k_proj.down, self.k_proj.up, self.v_proj.up

    def _apply(self, fn, recurse=True):
        """What .to() and the like call. Off the CPU, and in half precision, latents are the stored ones again."""
        linears = [linear for linear in self.around_latents() if type(linear) is nn.Linear] if self.turn is not None else []
        if len(linears) == 3:  # none is adapted by PEFT
            moved = fn(torch.empty(0))
            if (moved.device.type, moved.dtype) != ("cpu", torch.float32):
                turn_latents(torch.linalg.inv(self.turn), *(linear.weight.data for linear in linears))
                self.turn = None
        return super()._apply(fn, recurse)

    def late(self, scores, c, mask):
        """
        Scores (B, H, S), latents of the values (B, S, r) -> (B, 1, H n)

        value_cache's LateAttention does this for our own models and our cache, and shares restore_sums(). Here the cache is
        Hugging Face's, there are masks and grouped heads, and the scores are there.
        """
        sums = masked(scores, mask).softmax(-1) @ c  # (B, H, r)
        up, bias = self.heads(self.v_proj.up.weight.T).permute(1, 0, 2), self.v_proj.up.bias  # (G, r, n)
        return restore_sums(sums, up, None if bias is None else self.heads(bias))


class FactorizedTable(nn.Module):
    """The lookup: rows of wte [V,k], then scale_up [d,k], whose bias is the mean row of methods that have one."""

    def __init__(self, wte, scale_up):
        super().__init__()
        self.wte, self.scale_up = wte, scale_up

    def forward(self, x):
        return self.scale_up(self.wte(x))


class FactorizedHead(nn.Module):
    """The head: scale_down [k,d], then wte [V,k]. It needs no mean."""

    def __init__(self, wte, scale_down):
        super().__init__()
        self.wte, self.scale_down = wte, scale_down

    def forward(self, h):
        return self.scale_down(h) @ self.wte.weight.T


class TiedHead(FactorizedHead):
    """A FactorizedHead with the wte of a FactorizedTable."""

    def __init__(self, table, scale_down):
        nn.Module.__init__(self)
        self.table, self.scale_down = [table], scale_down  # in a list, so that its weights have one name

    @property
    def wte(self):
        return self.table[0].wte

    def forward(self, h):
        wte = self.wte
        if isinstance(wte, nn.Embedding):
            return super().forward(h)
        rows = wte(torch.arange(len(wte.weight), device=h.device))  # PEFT's adapters act in the lookup and in the head
        return self.scale_down(h) @ rows.T


# -- building ---------------------------------------------------------------------------------------------------------


def unset(n_in, n_out, bias=None):
    """A Linear whose weight is to be filled in; bias [out] or None. Without memory where the bias has none."""
    return linear(torch.empty(n_out, n_in, device=None if bias is None else bias.device), bias)


def unset_table(V, r):
    """An Embedding whose rows are to be filled in, where new tensors are made now: torch.device("meta") gives it no memory."""
    return nn.Embedding.from_pretrained(torch.empty(V, r), freeze=False)


def head_size(attn):
    """Numbers of a head of an attention layer of Hugging Face; None where it does not say."""
    return getattr(attn, "head_dim", getattr(attn, "head_size", None))


def check_attention(hf, layers):
    """Refuse a model whose attention LatentAttention does not compute."""
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
        turn = getattr(sys.modules[type(attn).__module__], "rotate_half", None)  # some turn neighbours in place of halves
        halves = turn is None or turn(torch.arange(4, device="cpu")).tolist() == [-2, -3, 0, 1]
        rotary = getattr(attn, "use_rope", True) and hasattr(hf.base_model, "rotary_emb") and halves
        if not (known and by_head and rotary):
            fail(f"--out: {type(attn).__name__} attends otherwise than a Llama: give a Llama, Mistral, Qwen or NeoX")


def install(hf, plan):
    """
    Give a model the modules of a plan, with biases set and factors not -> ([LowRanks of each stack], (table, head) or None).

    Attention that loses k or v, or whose q, k and v are fused, becomes a LatentAttention. In other attention only q_proj is
    replaced.
    """
    layers = {layer.name: layer for layer in find_layers(hf, conv1d=True)} if plan["stacks"] else {}
    turns, by_layer, made = Turns(getattr(hf.base_model, "rotary_emb", None)), {}, []
    for stack in plan["stacks"]:
        made.append([])
        for name, target in stack["parts"]:
            layer = layers[name]
            up = unset(stack["rank"], len(layer.rows[target]), layer.bias(target))
            first = made[-1][0] if made[-1] else None
            part = SharingLowRank(first, up) if first else LowRank(unset(layer.width, stack["rank"]), up)
            by_layer.setdefault(name, {})[target] = part
            made[-1].append(part)
    for name, parts in by_layer.items():
        layer, attn = layers[name], hf.get_submodule(name)
        if layer.fused or parts.keys() & {"k", "v"}:
            uncut = {target: Uncut(layer.linear(target)) for target in "qkv" if target not in parts}
            parent, last = name.rsplit(".", 1)
            setattr(hf.get_submodule(parent), last, LatentAttention(attn, *({**parts, **uncut}[t] for t in "qkv"), turns))
        else:
            attn.q_proj = parts["q"]
    return made, install_table(hf, plan["table"]) if plan["table"] else None


def install_table(hf, plan):
    V, d = hf.get_input_embeddings().weight.shape
    wte = unset_table(V, plan["rank"])
    table = FactorizedTable(wte, unset(plan["rank"], d, torch.zeros(d) if plan["mean"] else None))
    if plan["head"] is None:
        head = TiedHead(table, unset(d, plan["rank"]))
    else:
        head = FactorizedHead(unset_table(V, plan["head"]), unset(d, plan["head"]))
    hf.set_input_embeddings(table)
    hf.set_output_embeddings(head)
    return table, head


@torch.no_grad()
def shrink(hf, cuts, tables=None):
    """
    Make a model smaller in place -> its plan.

    cuts: [([(layer name, target), ...], Factors), ...]; tables: {"wte": (Z [V,r], P [r,d], mean [d] or None)}
    and "head" where that is another matrix, or nothing.
    """
    folded = [(parts, *narrowed(*factors.folded())) for parts, factors in cuts]
    plan = dict(stacks=[dict(parts=[list(p) for p in parts], rank=len(right)) for parts, _, right in folded], table=None)
    if tables:
        Z, P, mean = tables["wte"]
        plan["table"] = dict(rank=len(P), mean=mean is not None, head=len(tables["head"][1]) if "head" in tables else None)
        scale = getattr(hf.get_input_embeddings(), "embed_scale", 1)  # Gemma's, of a looked-up row
    made, ends = install(hf, plan)
    for modules, (_, left, right) in zip(made, folded):
        set_factors(modules, left, right)
    if ends:
        ends[0].wte.weight.copy_(Z)
        ends[0].scale_up.weight.copy_(P.T * scale)
        if mean is not None:
            ends[0].scale_up.bias.copy_(mean * scale)
        Z, P, _ = tables.get("head", tables["wte"])
        ends[1].wte.weight.copy_(Z)
        ends[1].scale_down.weight.copy_(P)
    return plan


def narrowed(left, right):
    """A mean can lift the rank above the number of outputs: then the product itself is the smaller form."""
    return (left, right) if len(right) <= len(left) else (torch.eye(len(left)), left @ right)


@torch.no_grad()
def set_factors(modules, left, right):
    """Into the LowRanks of a stack: left [out of them all, r], right [r,in]."""
    modules[0].down.weight.copy_(right)
    for module, part in zip(modules, left.split([module.up.out_features for module in modules])):
        module.up.weight.copy_(part)
