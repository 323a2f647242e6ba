"""
LlamaForCausalLM with less in it: low-rank factors in place of matrices, latents in place of keys and values.

Parts of nanoPCA, MIT licence:
- common/kernels.py
- common/modules.py
- export/modeling.py
- model.py
- surgery/latent_cache.py
- surgery/layers.py
- surgery/low_rank_modules.py
- util_factorization/decompose_matrix.py
- value_cache/latent_attention.py
"""

import torch
import torch.nn as nn
from contextlib import contextmanager
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer


def fail(message):
    raise ValueError(message)


def is_fresh(t):
    if t.is_floating_point():
        return bool(t.isnan().any())
    return t.dtype in (torch.int16, torch.int32, torch.int64) and t.numel() > 0 and bool((t == torch.iinfo(t.dtype).max).all())


def check_filled(model, source):
    """
    End in one line if a parameter or a buffer of a model has no memory, or still holds what fresh_memory_is_nan() put there.

    All numbers must come from the file that the model was read from, or be computed from its config. In bytes and booleans no
    value is free to mean "not filled", so they are not checked. source: for the message.
    """
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_meta or is_fresh(t):
            fail(f"{source}: {name} comes neither from the file nor from the config: write the file again")


def check_complete(model, info, source):
    """
    check_filled() for what from_pretrained(output_loading_info=True) returned. transformers draws missing weights at random.

    Of a model that accelerate has spread over devices, some weights may wait on the disk.
    """
    if missing := sorted(info["missing_keys"]):
        fail(f"{source} lacks {len(missing)} weights, first {missing[0]}: give a complete model")
    if not hasattr(model, "hf_device_map"):
        check_filled(model, source)


@contextmanager
def fresh_memory_is_nan():
    """
    A context in which memory that nothing has written to yet, as torch.empty() gives it, holds NaN.

    Whole numbers get the largest of their kind. So check_filled() finds what a reader forgot.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # torch.utils.deterministic.fill_uninitialized_memory, true by default
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


class CompactModel:
    """Before a standard class of Hugging Face. from_pretrained() refuses files that do not fill all of the model."""

    _supports_flash_attn = _supports_flex_attn = _can_compile_fullgraph = False

    @classmethod
    def from_pretrained(cls, *given, output_loading_info=False, **options):
        with fresh_memory_is_nan():
            model, info = super().from_pretrained(*given, output_loading_info=True, **options)
        check_complete(model, info, given[0])
        return (model, info) if output_loading_info else model


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


def linear(weight, bias=None):
    """A Linear with copies of weight [out,in] and bias [out] or None."""
    n_out, n_in = weight.shape
    made = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    made.weight.data.copy_(weight)
    if bias is not None:
        made.bias.data.copy_(bias)
    return made


def unset(n_in, n_out, bias=None):
    """A Linear whose weight is to be filled in; bias [out] or None. Without memory where the bias has none."""
    return linear(torch.empty(n_out, n_in, device=None if bias is None else bias.device), bias)


def unset_table(V, r):
    """An Embedding whose rows are to be filled in, where new tensors are made now: torch.device("meta") gives it no memory."""
    return nn.Embedding.from_pretrained(torch.empty(V, r), freeze=False)


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


class Layer:
    """
    q, k and v of one attention layer.

    linears  {parameter name: module}: their outputs side by side hold all targets
    rows     {"q": [out] indices, ...}: where each target lies in these outputs
    """

    def __init__(self, name, linears, rows):
        self.name, self.linears, self.rows = name, linears, rows

    def __repr__(self):
        return self.name

    @property
    def width(self):
        """How many numbers the layer reads of a token."""
        return next(iter(self.linears.values())).weight.shape[1]

    @property
    def joined(self):
        """The weights of all linears, one over the other: [out of all, in]."""
        return torch.cat([linear.weight.data for linear in self.linears.values()])

    def weight(self, target):
        """[out,in], a copy."""
        return self.here(self.joined[self.rows[target]])

    def set_weight(self, target, W):
        self._set("weight", target, W)

    def set(self, target, W, bias):
        """Weight [out,in] and bias [out], or None where the layer has none."""
        self._set("weight", target, W)
        if bias is not None:
            self._set("bias", target, bias)

    def _set(self, kind, target, values):
        tensors = [getattr(linear, kind).data for linear in self.linears.values()]
        joined = torch.cat(tensors)
        joined[self.rows[target]] = values.to(joined)
        for tensor, part in zip(tensors, joined.split([len(x) for x in tensors])):
            if not torch.equal(tensor, part):
                tensor.copy_(part)

    @property
    def fused(self):
        return len(self.linears) == 1

    def bias(self, target):
        """[out], a copy, or None."""
        biases = [linear.bias for linear in self.linears.values()]
        return None if biases[0] is None else self.here(torch.cat([b.data for b in biases])[self.rows[target]])

    @staticmethod
    def here(t):
        """On the CPU, unless it is of a model without memory for its weights."""
        return t if t.is_meta else t.cpu()

    def linear(self, target):
        """A target as a Linear of its own, a copy."""
        with torch.no_grad():
            return linear(self.weight(target), self.bias(target)).requires_grad_(False)

    def parameters_of(self, target):
        """Names of the parameters that hold a target."""
        ends = torch.tensor([len(x.weight) for x in self.linears.values()]).cumsum(0)
        touched = torch.unique(torch.searchsorted(ends, self.rows[target], right=True))
        return {f"{list(self.linears)[i]}.weight" for i in touched.tolist()}


def plain(name, linear):
    """A Linear of float weights, or an error that names the other kind of module."""
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        fail(f"{name} is a {type(linear).__name__} that cannot be changed in place: give a model of plain float weights")
    return linear


FUSED = ("query_key_value", "c_attn", "qkv_proj", "Wqkv", "qkv", "in_proj")  # names of q, k and v in one matrix


class Turned:
    """A Conv1D of a GPT-2, whose weight is [in,out], as a Linear has it."""

    def __init__(self, conv1d):
        self.weight, self.bias = conv1d.weight.T, conv1d.bias


def find_layers(model, conv1d=False):
    """
    Every attention layer of a model. Its q, k and v are q_proj, k_proj and v_proj, or lie in the fused matrix of a GPT-NeoX;
    conv1d: or of a GPT-2.

    Our GPT with compressed keys or values: the projections, before the compression. To add a family of models, add its names
    here; Subject in subject.py has to know its table and its head.
    """
    layers = []
    for name, module in model.named_modules():
        linears = {f"{name}.{n}": getattr(module, n.rsplit(".")[-1], None) for n in ("q_proj", "k_proj", "v_proj")}
        if all(linear is not None for linear in linears.values()):
            sizes = [len(plain(part, linear).weight) for part, linear in linears.items()]
            rows = dict(zip("qkv", torch.arange(sum(sizes)).split(sizes)))
        elif hasattr(module, "query_key_value") and model.config.model_type.endswith("gpt_neox"):
            qkv = plain(f"{name}.query_key_value", module.query_key_value)
            linears = {f"{name}.query_key_value": qkv}
            # [H 3 n, in]: every head's q, k and v lie side by side
            by_head = torch.arange(len(qkv.weight)).unflatten(0, (model.config.num_attention_heads, 3, -1))
            rows = {target: by_head[:, i].flatten() for i, target in enumerate("qkv")}
        elif conv1d and hasattr(module, "c_attn"):
            linears = {f"{name}.c_attn": Turned(module.c_attn)}
            rows = dict(zip("qkv", torch.arange(module.c_attn.weight.shape[1]).chunk(3)))
        else:
            continue
        layers.append(Layer(name, linears, rows))
    if not layers:
        kind = model.config.model_type
        fused = next((n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in FUSED), None)
        why = f"q, k and v fused in {fused}" if fused else "no q_proj, k_proj and v_proj"
        fail(f"a {kind} has {why}: give a model with separate q, k and v (Llama, Mistral, Qwen, SmolLM2) or a GPT-NeoX")
    return layers


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


def head_size(attn):
    """Numbers of a head of an attention layer of Hugging Face; None where it does not say."""
    return getattr(attn, "head_dim", getattr(attn, "head_size", None))


AT_ONCE = 256  # positions by which a buffer grows


class Buffer:
    """Memory for positions to come. filled: how many are there; a part that ends elsewhere belongs to a copy of the cache."""

    def __init__(self, kept, length):
        self.tensor = kept.new_empty(*kept.shape[:2], -(-length // AT_ONCE) * AT_ONCE, kept.shape[3])
        self.filled = kept.shape[2]
        self.tensor[:, :, : self.filled] = kept

    def takes(self, kept, length):
        """Whether positions up to `length` fit in after kept, its own beginning."""
        own = self.tensor.data_ptr() == kept.data_ptr() and len(self.tensor) == len(kept) and self.filled == kept.shape[2]
        return own and length <= self.tensor.shape[2] and self.tensor.is_inference() <= torch.is_inference_mode_enabled()

    def append(self, new):
        """new (B, 1, T, r) -> all positions (B, 1, S, r), a view"""
        start, self.filled = self.filled, self.filled + new.shape[2]
        self.tensor[:, :, start : self.filled] = new
        return self.tensor[:, :, : self.filled]


class GrowingLayer(DynamicLayer):
    """
    A DynamicLayer whose keys and values lie in Buffers.

    reader: what reads its latents of keys, a KeyReader or None. first: of a coded cache, a First or None. A coded cache has its
    first positions alone in place of the values.
    """

    buffers, reader, first = [None, None], None, None

    def update(self, key_states, value_states, *args, **kwargs):
        """(B, 1, T, r) twice -> those of all positions, (B, 1, S, r) twice"""
        if not self.get_seq_length() or any(t.requires_grad for t in (key_states, value_states, self.keys, self.values)):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self.grown(0, self.keys, key_states), self.grown(1, self.values, value_states)
        return self.keys, self.values

    def grown(self, i, kept, new):
        if not new.shape[2]:
            return kept
        end, buffer = kept.shape[2] + new.shape[2], self.buffers[i]
        if not (buffer and buffer.takes(kept, end)):
            buffer = Buffer(kept, end)
            self.buffers = [buffer if j == i else other for j, other in enumerate(self.buffers)]  # a copy's stay as they are
        return buffer.append(new)

    def crop(self, tokens_to_remove):
        values = self.values
        super().crop(tokens_to_remove)
        if values is not None:
            self.values = values[:, :, : self.keys.shape[2]]

    def reset(self):
        self.buffers, self.reader, self.first = [None, None], None, None
        super().reset()

    def offload(self):
        self.buffers = [None, None]
        super().offload()


def growing(cache, i):
    """Layer i of a cache of transformers as a GrowingLayer; None where it is filled, or of a kind that somebody chose."""
    layers = getattr(cache, "layers", [])
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:  # one that makes its layers when they are needed
        layers += [DynamicLayer() for _ in range(len(layers), i + 1)]
    if i < len(layers) and type(layers[i]) is DynamicLayer and not layers[i].is_initialized:
        layers[i] = GrowingLayer()
    return layers[i] if i < len(layers) and type(layers[i]) is GrowingLayer else None


def rotate(x, cos, sin):
    """
    Rotate the first D numbers of x (..., n) in pairs: number i and number i + D/2, as in GPT-NeoX and Llama.

    cos, sin (..., D/2): of the angle of each pair.
    """
    half = cos.shape[-1]
    a, b, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def restore_sums(sums, up, bias):
    """
    The heads' sums over latents -> their outputs, side by side.

    sums (B, H, r); up (G, r, n) of G heads of values, which H / G heads of queries share; bias (G, n) or None -> (B, 1, H n)
    """
    y = sums.unflatten(1, (len(up), -1)) @ up  # (B, G, H/G, n)
    y = y if bias is None else y + bias[:, None]
    return y.flatten(1)[:, None]


def trains(module):
    """Whether a gradient may be asked for of a module's parameters: the loops give none."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


def bind(name, *first):
    return None  # torch alone, without a C compiler


LANES = 16  # numbers side by side, at most: 8 or 4 where registers are shorter


class KeyReader:
    """
    The loop's view of the weight [G n, r] and the bias [G n] or None that restore keys, and of their norm, a norm_of().

    at [G n]: where a number of the keys lies in a row that has the latents first and then what is restored.
    """

    def __init__(self, weight, bias, norm):
        self.norm = norm
        unit = (weight.count_nonzero(1) == 1) & (weight.amax(1) == 1)
        self.at = torch.where(unit, weight.argmax(1), weight.shape[1] + (~unit).cumsum(0) - 1).int()
        self.rest = F.pad(weight[~unit].T, (0, -(~unit).sum().item() % LANES)).contiguous()  # [r, a multiple of LANES]
        self.bias = torch.zeros(len(weight)) if bias is None else bias.clone()

    def reads(self, q, c):
        """Whether the loop can take queries q and latents c: it computes in float32, and no gradients."""
        return q.dtype == c.dtype == torch.float32 and not (torch.is_grad_enabled() and (q.requires_grad or c.requires_grad))

    def scores(self, q, c, cos, sin):
        """
        q (B, H, n), scaled and rotated; c (B, S, r), whole or the beginning of a buffer; cos, sin (1, S, D/2) -> (B, H, S)
        """
        (B, H, n), (S, r) = q.shape, c.shape[1:]
        c = c if c.stride()[1:] == (r, 1) else c.contiguous()
        shape = (B, H, len(self.at) // n, n, S, c.stride(0) // r, r, self.rest.shape[1], cos.shape[-1])
        scores = torch.empty(B, H, S)
        parts = (q.contiguous(), self.at, self.rest, self.bias, *self.norm, cos[0], sin[0], scores, torch.get_num_threads())
        bind("latent_scores", *shape)(c[0, 0], *parts)  # the loop finds the other rows from the first
        return scores


LONGEST = 1024  # latents that are turned: more take seconds a layer


@torch.no_grad()
def turn_latents(turn, down, *ups):
    """down <- turn down, up <- up turn^-1"""
    down.copy_((turn @ down.double()).float())
    for up in ups:
        up.copy_(torch.linalg.solve(turn, up.double(), left=False).float())


def pivots(left):
    """The rows of left [out,r] as LU takes them: its first r are far from depending on each other."""
    return torch.linalg.lu(left.double()).P.T.argmax(1)


PREFERENCE = 10  # a value takes the place of a key among the latents where it is so many times as good a pivot


@torch.no_grad()
def turn_to_keys(down, k_up, v_up):
    """
    Turn latents in place, so that most of them are keys, each in the key's own place -> the turn [r,r], or None.

    down [r,in] makes latents, k_up and v_up restore keys and values. Rounding a latent then costs the values up to PREFERENCE
    times as much: that is for float32.
    """
    left, r = torch.cat([k_up, v_up]).double(), len(down)
    if r > LONGEST:
        return None
    rows = pivots(torch.cat([PREFERENCE * left[: len(k_up)], left[len(k_up) :]]))[:r]
    stays = (rows < len(k_up)) & (rows < r)
    order = torch.full((r,), -1)
    order[rows[stays]] = rows[stays]
    order[order < 0] = rows[~stays]
    turn = left[order]
    turn_latents(turn, down, k_up, v_up)
    for part, first in ((k_up, 0), (v_up, len(k_up))):
        here = (order >= first) & (order < first + len(part))
        part[order[here] - first] = torch.eye(r)[here]  # exactly
    return turn


WIDEST = 1024  # numbers of a head that its loops over a cache take, as there


def loop_reads(c, n):
    """Whether there is a loop for latents like c and heads of n numbers."""
    return c.device.type == "cpu" and c.dtype == torch.float32 and n <= WIDEST and bind("latent_scores") is not None


@torch.no_grad()
def norm_of(module, n):
    """
    What the loops take of a norm of heads: (its weights [n], or None without one; epsilon). None for a norm of another kind.
    """
    if isinstance(module, torch.nn.Identity):
        return None, 0.0
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return None
    weight, x = module(torch.ones(n)) * (1 + eps) ** 0.5, torch.linspace(-1, 2, n)
    known = weight * x * (x.square().mean() + eps).rsqrt()
    return (weight, eps) if torch.allclose(module(x), known, rtol=1e-5, atol=1e-6) else None


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


class LowRankModel(CompactModel):
    """
    config.surgery says which parts have factors, and the cache holds latents.

    Keys are counted from the first in the cache, so a text can be padded on the left. A static cache is refused.
    """

    def __init__(self, config):
        super().__init__(config)
        if hasattr(self, "embed_out"):
            raise ValueError("the head of this model is lm_head from transformers 5 on: pip install -U transformers")
        install(self, config.surgery)
        self.requires_grad_(True)
        self.post_init()


class CompactConfig(LlamaConfig):
    model_type = "nanopca_llama"


class CompactForCausalLM(LowRankModel, LlamaForCausalLM):
    config_class = CompactConfig
