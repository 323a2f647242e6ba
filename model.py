"""
One GPT: GPT-2 by default, with an optional factorized token table.

Shapes: B batch, T positions, d = n_embd, k = n_embd_wte (rank of the token table), V = vocab_size, H heads.

    dense       wte [V,d]                                          logits = h @ wte^T
    factorized  wte [V,k], scale_up [d,k], scale_down [d,k]        logits = (h @ scale_down) @ wte^T

with h = ln_f(...) of shape (B, T, d). wte and lm_head are one tensor. scale_up and scale_down have one shape, so that
n_embd_wte_scale_tying can make them one tensor too.
"""

import math
from dataclasses import dataclass

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
        if self.config.n_embd_wte is None:
            return self.lm_head.weight
        table = self.lm_head.weight @ self.transformer.scale_down.weight.T
        return table + self.transformer.scale_up.bias if self.config.n_embd_wte_mean else table

    # -- forward ------------------------------------------------------------------------------------------------------

    def hidden(self, idx):
        """Token ids (B, T) -> the output of ln_f (B, T, d)."""
        t = self.transformer
        pos = torch.arange(idx.shape[1], device=idx.device)
        x = t.scale_up(t.wte(idx))  # (B, T, d), through (B, T, k) if factorized
        x = t.drop(x + t.wpe(pos))
        for block in t.h:
            x = block(x)
        return t.ln_f(x)

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
        """Stored numbers by group, tied tensors once; the groups sum to the total."""
        group_of = dict(wte="token_table", scale_up="token_table", scale_down="token_table", wpe="positions")
        counts = dict(token_table=0, positions=0, attention=0, mlp=0, norms=0)
        for name, p in self.named_parameters():  # yields a tied tensor once
            parts = name.split(".")
            if parts[1] == "h":
                group = {"attn": "attention", "mlp": "mlp"}.get(parts[3], "norms")
            else:
                group = group_of.get(parts[1], "norms")
            counts[group] += p.numel()
        return counts | dict(total=sum(counts.values()))

    def flops_per_token(self, T):
        """Forward FLOPs a token (a multiply-add is two) at context T, by part; training costs three times as much."""
        c = self.config
        d, k = c.n_embd, c.n_embd_wte
        scale = 0 if k is None else 2 * k * d
        parts = dict(
            lookup=scale,
            blocks=c.n_layer * 2 * (4 + 2 * c.mlp_expansion_factor) * d * d,
            attention=c.n_layer * 4 * d * T // 2,  # causal: half of the T x T scores are needed
            head=scale + 2 * c.vocab_size * (k or d),
        )
        return parts | dict(total=sum(parts.values()))
