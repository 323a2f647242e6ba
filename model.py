"""
One GPT: GPT-2 by default, with an optional factorized token table and optional LoRA adapters.

Shapes: B batch, T positions, d = n_embd, k = n_embd_wte (rank of the token table), V = vocab_size, H heads, r = lora_rank.

    dense       wte [V,d]                                          logits = h @ wte^T
    factorized  wte [V,k], scale_up [d,k], scale_down [d,k]        logits = (h @ scale_down) @ wte^T

with h = ln_f(...) of shape (B, T, d). wte and lm_head are one tensor. scale_up and scale_down have one shape, so that
n_embd_wte_scale_tying can make them one tensor too.

An adapter belongs to a weight: W' = W + s B A wherever W is used, so the tied table's acts in the lookup and in the head.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """
    The shape of a model. The defaults of flags live in train_args.py; what stands behind an optional part here means a
    model without it, so that a checkpoint from before the part still loads.
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
    n_embd_wte_mean: bool = False  # the lookup adds a mean row [d] (a centred factorization); the head needs none
    factor_init: str = "matched"  # matched | naive, see GPT.init_factors
    lora_rank: int | None = None  # r; None is a model without adapters
    lora_alpha: float = 0.0  # an adapter's scale s is lora_alpha / lora_rank
    lora_dropout: float = 0.0  # on what an adapter reads
    lora_targets: str = ""  # module names, comma-separated


ACTIVATIONS = {
    "gelu": nn.GELU,  # exact, as in the seeds and in Pythia
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),  # what OpenAI's GPT-2 weights were trained with
}


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, T, d = x.shape
        q, k, v = (
            proj(x).view(B, T, self.n_head, d // self.n_head).transpose(1, 2)  # (B, H, T, d/H)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, d)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


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
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class ScaleDown(nn.Linear):
    """A Linear(k, d) applied through its transpose, d -> k: it keeps the shape of scale_up, so the two can be tied."""

    def forward(self, x):
        return x @ self.weight


class Adapter(nn.Module):
    """
    LoRA (arXiv:2106.09685) beside a weight W [out, in]: W' = W + s B A, B [out, r] zeros, A [r, in] Kaiming-uniform.

    Raises ValueError where r is above the smaller side of W.
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
        """s B A [out, in], what merging adds to W."""
        return self.scale * self.B @ self.A

    def forward(self, x):
        """x (..., in) -> s x A^T B^T (..., out)"""
        return self.scale * F.linear(F.linear(self.dropout(x), self.A), self.B)

    def transposed(self, x):
        """x (..., out) -> s x B A (..., in)"""
        return self.scale * self.dropout(x) @ self.B @ self.A

    def rows(self, idx):
        """ids (...) -> rows of s B A (..., in); an id cannot be dropped out."""
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


def effective_weight(module):
    """A module's weight with its adapter, where it has one, merged into it."""
    return module.weight + module.lora.delta() if type(module) in PLAIN else module.weight


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        d, k = config.n_embd, config.n_embd_wte
        # A dense table passes through identities, which hold no weights: forward() is the same for both.
        scale_up = nn.Identity() if k is None else nn.Linear(k, d, bias=config.n_embd_wte_mean)
        scale_down = nn.Identity() if k is None else ScaleDown(k, d, bias=False)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, k or d),
                scale_up=scale_up,
                wpe=nn.Embedding(config.block_size, d),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(d, bias=config.bias),
                scale_down=scale_down,
            )
        )
        self.lm_head = nn.Linear(k or d, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        if k is not None and config.n_embd_wte_scale_tying:
            self.transformer.scale_down.weight = self.transformer.scale_up.weight
        self.init_weights()
        if config.lora_rank is not None:
            self.add_lora()

    # -- initialisation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: N(0, 0.02), biases 0, the projections into the residual stream scaled by 1/sqrt(2 n_layer)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_residual = name.endswith(("c_proj", "mlp_down"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if into_residual else 0.02
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if self.config.n_embd_wte is not None and self.config.factor_init == "matched":
            self.init_factors()

    def init_factors(self):
        """
        Draw the factors so that the effective table wte @ scale^T has the std 0.02 of a dense one.

        The rows of scale^T get unit norm, as a PCA's have; the naive draw, N(0, 0.02) for every factor, leaves a table
        of std 0.02^2 sqrt(k), 0.0032 at k = 64.
        """
        d, k = self.config.n_embd, self.config.n_embd_wte
        nn.init.normal_(self.transformer.wte.weight, std=0.02 * math.sqrt(d / k))
        nn.init.normal_(self.transformer.scale_up.weight, std=1 / math.sqrt(d))
        if not self.config.n_embd_wte_scale_tying:
            nn.init.normal_(self.transformer.scale_down.weight, std=1 / math.sqrt(d))

    @torch.no_grad()
    def import_factors(self, wte, scale_up, scale_down, mean=None):
        """Copy factors in the layout of the factor files: wte [V,k], scale_up and scale_down [k,d], mean [d]."""
        self.transformer.wte.weight.copy_(torch.as_tensor(wte))
        self.transformer.scale_up.weight.copy_(torch.as_tensor(scale_up).T)
        self.transformer.scale_down.weight.copy_(torch.as_tensor(scale_down).T)
        if mean is not None:
            self.transformer.scale_up.bias.copy_(torch.as_tensor(mean))

    def effective_table(self):
        """The dense table [V,d] that the head multiplies with; a centred one's mean row, which it leaves out, is added."""
        table = effective_weight(self.lm_head)
        if self.config.n_embd_wte is None:
            return table
        table = table @ effective_weight(self.transformer.scale_down).T
        return table + self.transformer.scale_up.bias if self.config.n_embd_wte_mean else table

    # -- LoRA ---------------------------------------------------------------------------------------------------------

    def add_lora(self):
        """
        Give every target's weight an adapter; modules that share a weight share its adapter, so merging keeps the tie.

        Raises ValueError for a target that names no matrix, and for a rank above a target's.
        """
        modules = [(name.split(".")[-1], module) for name, module in self.named_modules() if type(module) in ADAPTED]
        targets = set(self.config.lora_targets.split(","))
        names = {name for name, _ in modules} - {"lm_head", "wpe"}  # the head has wte's adapter
        if unknown := sorted(targets - names):
            raise ValueError(f"{unknown[0]!r} names no matrix of this model, which has {','.join(sorted(names))}: leave it out")
        adapters = {}  # by weight
        for name, module in modules:
            if name in targets and module.weight not in adapters:
                adapters[module.weight] = Adapter(*module.weight.shape, self.config)
        for _, module in modules:
            if module.weight in adapters:
                module.lora = adapters[module.weight]
                module.__class__ = ADAPTED[type(module)]  # the same weights under the same names, with an adapter beside

    @torch.no_grad()
    def merge_lora(self):
        """Add every adapter to its weight, once, and leave a plain model."""
        adapted = [module for module in self.modules() if type(module) in PLAIN]
        for weight, delta in {module.weight: module.lora.delta() for module in adapted}.items():
            weight += delta
        for module in adapted:
            del module.lora
            module.__class__ = PLAIN[type(module)]
        self.config = replace(self.config, lora_rank=None, lora_alpha=0.0, lora_dropout=0.0, lora_targets="")

    # -- forward ------------------------------------------------------------------------------------------------------

    def lookup(self, idx):
        """Token ids (B, T) -> rows of the token table (B, T, d), through (B, T, k) if factorized."""
        return self.transformer.scale_up(self.transformer.wte(idx))

    def trunk(self, x):
        """Rows of the token table (B, T, d) -> the output of ln_f (B, T, d)."""
        t = self.transformer
        pos = torch.arange(x.shape[1], device=x.device)
        x = t.drop(x + t.wpe(pos))
        for block in t.h:
            x = block(x)
        return t.ln_f(x)

    def hidden(self, idx):
        """Token ids (B, T) -> the output of ln_f (B, T, d)."""
        return self.trunk(self.lookup(idx))

    def logits(self, h):
        """The output of ln_f (B, T, d) -> logits (B, T, V)."""
        return self.lm_head(self.transformer.scale_down(h))

    def forward(self, idx, targets=None):
        """Token ids (B, T) and the next tokens (B, T) -> logits (B, T, V) and the mean cross-entropy in nats."""
        logits = self.logits(self.hidden(idx))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    # -- what it costs ------------------------------------------------------------------------------------------------

    def count_parameters(self):
        """Stored numbers by group, tied tensors once, adapters (which merging makes vanish) apart; they sum to the total."""
        group_of = dict(wte="token_table", scale_up="token_table", scale_down="token_table", wpe="positions")
        counts = dict(token_table=0, positions=0, attention=0, mlp=0, norms=0, adapters=0)
        for name, p in self.named_parameters():  # yields a tied tensor once
            parts = name.split(".")
            if "lora" in parts:
                group = "adapters"
            elif parts[1] == "h":
                group = {"attn": "attention", "mlp": "mlp"}.get(parts[3], "norms")
            else:
                group = group_of.get(parts[1], "norms")
            counts[group] += p.numel()
        return counts | dict(total=sum(counts.values()))

    def flops_per_token(self, T):
        """Forward FLOPs a token (a multiply-add is two) at context T, by part."""
        c = self.config
        d, k = c.n_embd, c.n_embd_wte
        scale = 0 if k is None else 2 * k * d
        adapted = [module for module in self.modules() if type(module) in PLAIN]
        parts = dict(
            lookup=scale,
            blocks=c.n_layer * 2 * (4 + 2 * c.mlp_expansion_factor) * d * d,
            attention=c.n_layer * 4 * d * T // 2,  # causal: half of the T x T scores are needed
            head=scale + 2 * c.vocab_size * (k or d),
            adapters=sum(2 * m.lora.A.numel() + (0 if m is self.transformer.wte else 2 * m.lora.B.numel()) for m in adapted),
        )
        return parts | dict(total=sum(parts.values()))
