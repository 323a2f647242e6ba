"""
One GPT: GPT-2 by default, Pythia by config. Optional parts: a factorized token table, LoRA adapters, compressed keys and
values.

Shapes: B batch, T positions, S positions that a query may see, d = n_embd, k = n_embd_wte (rank of the token table),
V = vocab_size, H heads, r = a rank (lora_rank, k_proj_dim or v_proj_dim).

    dense       wte [V,d]                                          logits = h @ wte^T
    factorized  wte [V,k], scale_up [d,k], scale_down [d,k]        logits = (h @ scale_down) @ wte^T

with h = ln_f(...), (B, T, d). wte and lm_head are one tensor. n_embd_wte_scale_tying makes scale_up and scale_down one tensor.

An adapter belongs to a weight: W' = W + s B A wherever W is used. The adapter of a tied table acts in the lookup and the head.

A model may compress keys and values to r numbers per token, for all heads together. The cache keeps these numbers, and
attention restores the keys and values from them:

    v_proj -> v_compress -> [cache] -> v_restore -> heads
    k_proj -> k_compress -> [cache] -> k_restore -> rotary -> heads
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """
    The shape of a model. train_args.ModelArgs repeats the fields as flags, because that file must not import torch. Each
    default here switches an optional part off, so older checkpoints still load.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    mlp_expansion_factor: int
    activation: str  # a key of ACTIVATIONS
    bias: bool
    dropout: float
    n_embd_wte: int | None = None  # rank of the token table; None keeps it dense
    n_embd_wte_scale_tying: bool = False
    n_embd_wte_mean: bool = False  # the lookup adds a mean row [d], for a centred factorization; the head needs none
    factor_init: str = "matched"  # matched | naive, see GPT.init_factors
    rotary_pct: float = 0.0  # share of each head that is rotated by position; 0: learned positions (wpe)
    parallel_residual: bool = False  # x + attn(ln_1 x) + mlp(ln_2 x), Pythia's block
    norms_per_layer: int = 2  # 1: attention and MLP of a parallel block share ln_1
    tie_head: bool = True  # lm_head is wte
    v_proj_dim: int | None = None  # numbers per token that the cache holds for the values of all heads; None: d
    k_proj_dim: int | None = None  # the same for the keys, before their rotation
    v_proj_narrow: bool = False  # v_proj itself outputs v_proj_dim numbers: narrower heads, nothing to restore
    lora_rank: int | None = None  # r; None: no adapters
    lora_alpha: float = 0.0  # an adapter's scale s is lora_alpha / lora_rank
    lora_dropout: float = 0.0  # on an adapter's input
    lora_targets: str = ""  # module names, comma-separated


ACTIVATIONS = {
    "gelu": nn.GELU,  # exact, as in the original scripts and in Pythia
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),  # OpenAI's GPT-2 weights were trained with it
}


class NoCache:
    """Takes the place of the KV cache if there is none: all positions are computed at once."""

    length = 0

    def __getitem__(self, layer):
        return self

    def extend(self, k, v):
        return k, v


NO_CACHE = NoCache()


def rotate(x, cos, sin):
    """
    Rotate the first D numbers of x (..., n) in pairs: number i and number i + D/2, as in GPT-NeoX and Llama.

    cos, sin (..., D/2): cosine and sine of each pair's angle.
    """
    half = cos.shape[-1]
    a, b, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class Rotary(nn.Module):
    """
    Rotates the first `dims` numbers of each head by an angle that grows with the position (RoFormer, arXiv:2104.09864).
    The angle of pair i is position / 10000^(2i / dims).
    """

    def __init__(self, dims, n_head, block_size):
        super().__init__()
        self.dims, self.n_head = dims, n_head
        angles = torch.arange(block_size)[:, None] / 10000 ** (torch.arange(0, dims, 2) / dims)  # (block_size, dims/2)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, x, start):
        """Rotate x (B, T, H n), heads side by side. start: position of the first of the T tokens."""
        x = x.unflatten(-1, (self.n_head, -1))  # (B, T, H, n)
        cos, sin = (t[start : start + x.shape[1]].to(x.dtype) for t in (self.cos, self.sin))
        return rotate(x, cos, sin).flatten(-2)


class NoRotary(nn.Module):
    def forward(self, x, start):
        return x


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, bias = config.n_embd, config.bias
        self.n_head = config.n_head
        self.dropout = config.dropout
        heads_width = config.v_proj_dim if config.v_proj_narrow else d
        self.q_proj = nn.Linear(d, d, bias=bias)
        self.k_proj = nn.Linear(d, d, bias=bias)
        self.v_proj = nn.Linear(d, heads_width, bias=bias)
        self.k_compress, self.k_restore = self.bottleneck(d, config.k_proj_dim, bias)
        self.v_compress, self.v_restore = self.bottleneck(d, None if config.v_proj_narrow else config.v_proj_dim, bias)
        self.c_proj = nn.Linear(heads_width, d, bias=bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        dims = round(config.rotary_pct * d / config.n_head)
        self.rotary = Rotary(dims, config.n_head, config.block_size) if dims else NoRotary()
        # Plain keys are rotated before the cache keeps them. Compressed keys are rotated at each step, after they are restored.
        plain = config.k_proj_dim is None
        self.rotary_kept, self.rotary_read = (self.rotary, NoRotary()) if plain else (NoRotary(), self.rotary)

    @staticmethod
    def bottleneck(d, r, bias):
        """A map to r numbers and a map back. Both are identities if r is None."""
        if r is None:
            return nn.Identity(), nn.Identity()
        return nn.Linear(d, r, bias=bias), nn.Linear(r, d, bias=bias)

    def forward(self, x, cache=NO_CACHE):
        """x (B, T, d), at the positions after those in the cache -> (B, T, d). Adds their keys and values to the cache."""
        start = cache.length
        q = self.rotary(self.q_proj(x), start)
        k = self.rotary_kept(self.k_compress(self.k_proj(x)), start)  # (B, T, r_k)
        v = self.v_compress(self.v_proj(x))  # (B, T, r_v)
        k, v = cache.extend(k, v)  # (B, S, r_k) and (B, S, r_v), S = start + T
        return self.resid_dropout(self.c_proj(self.attend(q, k, v)))

    def attend(self, q, k, v):
        """q (B, T, d) of the last T positions; k, v (B, S, r) from the cache -> the heads' outputs side by side (B, T, d)."""
        T, S = q.shape[1], k.shape[1]
        k, v = self.rotary_read(self.k_restore(k), 0), self.v_restore(v)
        q, k, v = (x.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, T or S, width / H)
        mask, dropout = None if T in (1, S) else causal_mask(T, S, q.device), self.dropout * self.training
        # is_causal lets the first query see only the first key. That is right only if all positions are computed at once.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=T == S)
        return y.transpose(1, 2).flatten(-2)


def causal_mask(T, S, device):
    """Booleans (T, S): True if the query may see the key. Query t of the last T positions sees positions 0 to S - T + t."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp_up = nn.Linear(config.n_embd, config.mlp_expansion_factor * config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.mlp_down = nn.Linear(config.mlp_expansion_factor * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.mlp_down(self.activation(self.mlp_up(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        if config.norms_per_layer == 2:
            self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=NO_CACHE):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class ParallelBlock(Block):
    def forward(self, x, cache=NO_CACHE):
        return x + self.attn(self.ln_1(x), cache) + self.mlp(self.ln_2(x))


class ParallelBlockOneNorm(Block):
    def forward(self, x, cache=NO_CACHE):
        h = self.ln_1(x)
        return x + self.attn(h, cache) + self.mlp(h)


BLOCKS = {(False, 2): Block, (True, 2): ParallelBlock, (True, 1): ParallelBlockOneNorm}  # parallel_residual, norms_per_layer


class NoPositions(nn.Module):
    """Takes the place of wpe in a model that rotates its queries and keys instead."""

    def forward(self, pos):
        return 0


class ScaleDown(nn.Linear):
    """A Linear(k, d) that applies its transpose, d -> k. Its weight has the shape of scale_up's, so the two can be tied."""

    def forward(self, x):
        return x @ self.weight


class Adapter(nn.Module):
    """
    LoRA (arXiv:2106.09685) for a weight W [out, in]: W' = W + s B A. B [out, r] starts at zero, A [r, in] Kaiming-uniform.

    Raises ValueError if r is above the smaller side of W.
    """

    def __init__(self, n_out, n_in, config):
        super().__init__()
        r = config.lora_rank
        if not 1 <= r <= min(n_out, n_in):
            raise ValueError(f"rank {r} does not fit a target's matrix, {n_out} x {n_in}: lower it")
        self.scale = config.lora_alpha / r
        self.dropout = nn.Dropout(config.lora_dropout)
        self.A = nn.Parameter(torch.empty(r, n_in))
        self.B = nn.Parameter(torch.zeros(n_out, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as torch draws a Linear's weight: U(-1, 1) / sqrt(in)

    def delta(self):
        """s B A [out, in], which merging adds to W."""
        return self.scale * self.B @ self.A

    def down(self, x):
        """x (..., in) -> s x A^T (..., r)"""
        return self.scale * F.linear(self.dropout(x), self.A)

    def forward(self, x):
        """x (..., in) -> s x A^T B^T (..., out)"""
        return F.linear(self.down(x), self.B)

    def transposed(self, x):
        """x (..., out) -> s x B A (..., in)"""
        return self.scale * self.dropout(x) @ self.B @ self.A

    def rows(self, idx):
        """ids (...) -> rows of s B A (..., in). No dropout: the input is ids."""
        return self.scale * F.embedding(idx, self.B) @ self.A


class AdaptedLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.lora(x)


class AdaptedScaleDown(ScaleDown):
    def forward(self, x):
        return super().forward(x) + self.lora.transposed(x)


class AdaptedEmbedding(nn.Embedding):
    def forward(self, idx):
        return super().forward(idx) + self.lora.rows(idx)


ADAPTED = {nn.Linear: AdaptedLinear, ScaleDown: AdaptedScaleDown, nn.Embedding: AdaptedEmbedding}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


def adapt(modules, config):
    """Give every weight of the modules an adapter. Modules that share a weight share its adapter."""
    adapters = {}  # by weight
    for module in modules:
        if module.weight not in adapters:
            adapters[module.weight] = Adapter(*module.weight.shape, config)
        module.lora = adapters[module.weight]
        module.__class__ = ADAPTED[type(module)]  # the weights keep their names; the module gets an adapter


@torch.no_grad()
def merge_adapters(model):
    """Add every adapter to its weight, once, and make the modules plain again."""
    adapted = [module for module in model.modules() if type(module) in PLAIN]
    for weight, delta in {module.weight: module.lora.delta() for module in adapted}.items():
        weight += delta
    for module in adapted:
        del module.lora
        module.__class__ = PLAIN[type(module)]


def effective_weight(module):
    """A module's weight, plus its adapter if it has one."""
    return module.weight + module.lora.delta() if type(module) in PLAIN else module.weight


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        d, k = config.n_embd, config.n_embd_wte
        block = BLOCKS[config.parallel_residual, config.norms_per_layer]
        parts = dict(
            wte=nn.Embedding(config.vocab_size, k or d),
            # a dense table uses identities, so forward() is the same for both
            scale_up=nn.Identity() if k is None else nn.Linear(k, d, bias=config.n_embd_wte_mean),
            wpe=NoPositions() if config.rotary_pct else nn.Embedding(config.block_size, d),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(d, bias=config.bias),
            scale_down=nn.Identity() if k is None else ScaleDown(k, d, bias=False),
        )
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(k or d, config.vocab_size, bias=False)
        if config.tie_head:
            self.lm_head.weight = self.transformer.wte.weight
        if k is not None and config.n_embd_wte_scale_tying:
            self.transformer.scale_down.weight = self.transformer.scale_up.weight
        self.init_weights()
        if config.lora_rank is not None:
            self.add_lora()

    @torch.no_grad()
    def init_weights(self):
        """Initialise as GPT-2: N(0, 0.02), biases 0, projections into the residual stream scaled by 1/sqrt(2 n_layer)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_residual = name.endswith(("c_proj", "mlp_down"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if into_residual else 0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if self.config.n_embd_wte is not None and self.config.factor_init == "matched":
            self.init_factors()

    def init_factors(self):
        """
        Draw the factors so that the effective table wte @ scale^T has std 0.02, as a dense table has.

        The rows of scale^T get about unit norm, as in a PCA. The naive draw, N(0, 0.02) for every factor, gives a table of
        std 0.02^2 sqrt(k): 0.0032 at k = 64.
        """
        d, k, t = self.config.n_embd, self.config.n_embd_wte, self.transformer
        nn.init.normal_(t.wte.weight, std=0.02 * math.sqrt(d / k))
        for scale in dict.fromkeys((t.scale_up.weight, t.scale_down.weight)):  # one tensor if they are tied
            nn.init.normal_(scale, std=1 / math.sqrt(d))

    @torch.no_grad()
    def import_factors(self, wte, scale_up, scale_down, mean=None):
        """Copy factors in the layout of the factor files: wte [V,k], scale_up and scale_down [k,d], mean [d]."""
        self.transformer.wte.weight.copy_(torch.as_tensor(wte))
        self.transformer.scale_up.weight.copy_(torch.as_tensor(scale_up).T)
        self.transformer.scale_down.weight.copy_(torch.as_tensor(scale_down).T)
        if mean is not None:
            self.transformer.scale_up.bias.copy_(torch.as_tensor(mean))

    def effective_table(self):
        """The dense table [V,d] that the factors represent, with the mean row if the factorization is centred."""
        table = effective_weight(self.lm_head)
        if self.config.n_embd_wte is None:
            return table
        table = table @ effective_weight(self.transformer.scale_down).T
        return table + self.transformer.scale_up.bias if self.config.n_embd_wte_mean else table

    def add_lora(self):
        """Adapt the targets' weights. Raises ValueError if a target names no matrix, or one with a side below the rank."""
        modules = [(name.split(".")[-1], module) for name, module in self.named_modules() if type(module) in ADAPTED]
        targets = set(self.config.lora_targets.split(","))
        names = {name for name, _ in modules} - {"lm_head", "wpe"}  # the head has wte's adapter
        if unknown := sorted(targets - names):
            raise ValueError(f"{unknown[0]!r} names no matrix of this model, which has {','.join(sorted(names))}: drop it")
        weights = {module.weight for name, module in modules if name in targets}
        adapt([module for _, module in modules if module.weight in weights], self.config)

    def merge_lora(self):
        """Add every adapter to its weight, once, and make the model plain again."""
        merge_adapters(self)
        self.config = replace(self.config, lora_rank=None, lora_alpha=0.0, lora_dropout=0.0, lora_targets="")

    def lookup(self, idx):
        """Token ids (B, T) -> rows of the token table (B, T, d), through (B, T, k) if factorized."""
        return self.transformer.scale_up(self.transformer.wte(idx))

    def trunk(self, x, cache=NO_CACHE):
        """Rows of the token table (B, T, d) -> the output of ln_f (B, T, d). cache: keys and values of earlier positions."""
        t = self.transformer
        x = t.drop(x + t.wpe(torch.arange(cache.length, cache.length + x.shape[1], device=x.device)))
        for layer, block in enumerate(t.h):
            x = block(x, cache[layer])
        return t.ln_f(x)

    def hidden(self, idx, cache=NO_CACHE):
        """Token ids (B, T) -> the output of ln_f (B, T, d)."""
        return self.trunk(self.lookup(idx), cache)

    def logits(self, h):
        """The output of ln_f (B, T, d) -> logits (B, T, V)."""
        return self.lm_head(self.transformer.scale_down(h))

    def loss(self, h, targets):
        """The output of ln_f (B, T, d) and the next tokens (B, T) -> mean cross-entropy in nats."""
        return head_loss(self.transformer.scale_down(h), targets, self.lm_head.weight, getattr(self.lm_head, "lora", None))

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> (logits (B, T, V), None). With targets, the next tokens (B, T) -> (None, loss in nats)."""
        h = self.hidden(idx)
        return (self.logits(h), None) if targets is None else (None, self.loss(h, targets))

    def count_parameters(self):
        """Count the stored numbers by group, and in total. A tied tensor counts once. Merging empties the group of adapters."""
        group_of = dict(lora="adapters", k_compress="kv_compression", k_restore="kv_compression", v_compress="kv_compression")
        group_of |= dict(v_restore="kv_compression", wte="token_table", scale_up="token_table", scale_down="token_table")
        group_of |= dict(lm_head="head", wpe="positions", attn="attention", mlp="mlp")  # the first match counts
        counts = dict.fromkeys("token_table head positions attention kv_compression mlp norms adapters".split(), 0)
        for name, p in self.named_parameters():  # yields a tied tensor once
            parts = name.split(".")
            counts[next((group for part, group in group_of.items() if part in parts), "norms")] += p.numel()
        return counts | dict(total=sum(counts.values()))

    def cache_widths(self):
        """(numbers for keys, numbers for values) that a KV cache holds per token and layer."""
        c = self.config
        return c.k_proj_dim or c.n_embd, c.v_proj_dim or c.n_embd

    def flops_per_token(self, T):
        """Forward FLOPs per token at context T, by part. A multiply-add counts as two."""
        c, t, values_width = self.config, self.transformer, self.transformer.h[0].attn.c_proj.in_features
        scale = 0 if c.n_embd_wte is None else 2 * t.scale_up.weight.numel()
        linear = [m for m in t.h.modules() if isinstance(m, nn.Linear)]
        adapted = [m for m in self.modules() if type(m) in PLAIN]
        parts = dict(
            lookup=scale,
            blocks=sum(2 * m.weight.numel() for m in linear),
            attention=c.n_layer * 2 * (c.n_embd + values_width) * T // 2,  # causal: half of the T x T scores are needed
            head=scale + 2 * self.lm_head.weight.numel(),
            adapters=sum(2 * m.lora.A.numel() + (0 if m is t.wte else 2 * m.lora.B.numel()) for m in adapted),
        )
        return parts | dict(total=sum(parts.values()))


# -- the loss of the head, without all logits in memory --------------------------------------------------------------

CHUNK = 1024  # tokens whose logits are in memory at once; on a CPU, smaller chunks are slower: 6% at 512, 20% at 256
BLOCK = 16  # tokens of one softmax on a CPU; their logits fit into its cache


def head_loss(x, targets, table, adapter=None):
    """
    The mean cross-entropy, in nats, of the logits x @ table^T. x (B, T, m), targets: ids (B, T), table (V, m).

    adapter: the table's LoRA adapter, or None. Its r columns are appended to the table's m, so one product is enough. Logits
    have autocast's dtype. The softmax is computed in float32, a few tokens at a time.
    """
    if adapter is None:
        return HeadLoss.apply(x.flatten(0, 1), targets.flatten(), torch.is_grad_enabled(), table)
    x = torch.cat([x, adapter.down(x)], -1)
    return HeadLoss.apply(x.flatten(0, 1), targets.flatten(), torch.is_grad_enabled(), table, adapter.B)


class HeadLoss(torch.autograd.Function):
    """The forward pass also computes the gradients, chunk by chunk. Otherwise the backward pass would recompute all logits."""

    @staticmethod
    def forward(ctx, x, targets, learns, *tables):
        """x (N, m), targets (N,), tables (V, m_i), whose m_i sum to m. learns: whether gradients are needed."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        # Detached: torch 2.5 compiles forward() with gradients on, and then refuses to write into a slice of such a tensor.
        x, table = x.detach().to(dtype), [t.detach().to(dtype) for t in tables]
        table = table[0] if len(table) == 1 else torch.cat(table, 1)
        loss, dx, gradients = 0, torch.empty_like(x), [None] * len(tables)
        for start in range(0, len(x), CHUNK):
            x_c, y_c = x[start : start + CHUNK], targets[start : start + CHUNK]
            logits = x_c @ table.T
            loss += sum_and_gradient(logits, y_c)
            if learns:
                dx[start : start + CHUNK] = logits @ table
                for i, part in enumerate(x_c.split([t.shape[1] for t in tables], 1)):
                    if ctx.needs_input_grad[3 + i]:  # a frozen table needs none
                        more = (logits.T @ part).float()
                        gradients[i] = more if gradients[i] is None else gradients[i].add_(more)
        ctx.save_for_backward(dx, *gradients)
        return loss / len(targets)

    @staticmethod
    def backward(ctx, grad):
        dx, *gradients = ctx.saved_tensors
        scale = grad / len(dx)
        return dx * scale, None, None, *(None if g is None else g.mul_(scale) for g in gradients)


def sum_and_gradient(logits, targets):
    """The summed cross-entropy of logits (N, V). Overwrites them with its gradient: probabilities, minus 1 at the target."""
    loss = 0
    whole = (
        logits.device.type != "cpu" or torch.compiler.is_compiling()
    )  # a compiler would unroll all blocks, which takes minutes
    size = len(logits) if whole else BLOCK
    for z, y in zip(logits.split(size), targets.split(size)):
        p = F.log_softmax(z, 1, dtype=torch.float32)
        at_target = torch.arange(len(y), device=y.device), y
        loss -= p[at_target].sum()
        p.exp_()[at_target] -= 1
        z.copy_(p)
    return loss
