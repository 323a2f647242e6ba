"""Evaluation: the same fixed windows of the validation file for every model."""

import math

import torch
from torch.nn import functional as F

from model import NO_CACHE, effective_weight

# Losses are reported by ranges of positions: between these edges; after the last edge the edges double.
EDGES = (0, 16, 32, 64, 96, 128)


class Restored:
    """Records each layer's values before v_compress and after v_restore in the latest forward pass."""

    def __init__(self, model):
        self.before, self.after = {}, {}  # layer -> (B, T, d)
        for layer, block in enumerate(model.transformer.h):
            compress, restore = block.attn.v_compress, block.attn.v_restore
            compress.register_forward_hook(lambda module, args, out, layer=layer: self.before.update({layer: args[0]}))
            restore.register_forward_hook(lambda module, args, out, layer=layer: self.after.update({layer: out}))

    def pairs(self):
        return [(self.before[layer].float(), self.after[layer].float()) for layer in sorted(self.before)]

    def loss(self):
        """Mean squared error over elements and layers. Gradients also flow through V to the layers below."""
        return torch.stack([F.mse_loss(after, before) for before, after in self.pairs()]).mean()

    def sums(self):
        """(layers, 2 + d) float64: sum of squared errors, sum of squared values, and d sums of the values."""
        return torch.stack([sums_of(before, after) for before, after in self.pairs()]).cpu().double()


def sums_of(before, after):
    return torch.cat([(after - before).square().sum()[None], before.square().sum()[None], before.flatten(0, 1).sum(0)])


@torch.no_grad()
def evaluate(model, dataset, args, device, autocast, restored=None, cache_for=lambda B: NO_CACHE):
    """
    Evaluate a GPT on the dataset's first args.eval_iters batches of args.batch_size fixed windows, (B, T) each.

    restored: a Restored(model), or None. cache_for: batch size -> a KV cache. Keys and values pass through this cache, so the
    loss shows the cost of its number format.

    Returns dict(val_loss [nats per token], val_ppl, ln_f_cosine, ln_f_cosine_full, eval_tokens, position_loss); with restored
    also v_recon and v_error.

    ln_f_cosine       mean cosine between the head's input and lm_head's row of the target token. It is taken in the head's
                      own space, d for a dense table and k for a factorized one, so the two are not comparable
    ln_f_cosine_full  the same in d dimensions: between ln_f's output and the target's row of the effective table. Comparable
                      between all models
    position_loss     {"0-16": nats per token, ...}: the loss by position in the window
    v_recon           mean (V - V_restored)^2 over elements and layers
    v_error           for each layer, the share of V's variance over the tokens that V_restored misses
    """
    model.eval()
    t, T = model.transformer, model.config.block_size
    rows, table = effective_weight(model.lm_head), model.effective_table()
    sums, tokens = torch.zeros(2, dtype=torch.float64), 0  # on the CPU: some devices have no float64
    by_position, lost = torch.zeros(T, dtype=torch.float64), 0
    for x, y in dataset.fixed_windows(args.eval_iters * args.batch_size, args.batch_size, T):
        x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device).flatten()
        with autocast:
            h = model.hidden(x, cache_for(len(x)))
            loss = F.cross_entropy(model.logits(h).flatten(0, 1), y, reduction="none").view(-1, T)
            small = t.scale_down(h).flatten(0, 1)  # (B T, k), or unchanged (B T, d)
        cosine = F.cosine_similarity(small.float(), rows[y], dim=-1).sum()
        cosine_full = F.cosine_similarity(h.flatten(0, 1).float(), table[y], dim=-1).sum()
        sums += torch.stack([cosine, cosine_full]).cpu()
        by_position += loss.float().sum(0).cpu()
        if restored:
            lost = lost + restored.sums()
        tokens += len(y)
    model.train()
    loss, (cosine, cosine_full) = by_position.sum().item() / tokens, (sums / tokens).tolist()
    ppl = math.exp(loss) if loss < 700 else math.inf
    values = dict(val_loss=loss, val_ppl=ppl, ln_f_cosine=cosine, ln_f_cosine_full=cosine_full, eval_tokens=tokens)
    values["position_loss"] = by_ranges(by_position, torch.full((T,), tokens / T))
    if restored:
        error, squares, mean = lost[:, 0], lost[:, 1], lost[:, 2:] / tokens
        values["v_recon"] = (error.mean() / tokens / mean.shape[1]).item()
        values["v_error"] = (error / (squares - tokens * mean.square().sum(1))).tolist()
    return values


def by_ranges(sums, counts):
    """Loss sums and token counts of T positions -> {"0-16": nats per token, ...}, without ranges that have no tokens."""
    bins = {f"{low}-{high}": slice(low, high) for low, high in position_bins(len(sums))}
    return {name: (sums[bin].sum() / counts[bin].sum()).item() for name, bin in bins.items() if counts[bin].sum()}


def position_bins(T):
    edges = [edge for edge in EDGES if edge < T]
    while edges[-1] * 2 < T and edges[-1] >= EDGES[-1]:
        edges.append(edges[-1] * 2)
    return list(zip(edges, [*edges[1:], T]))
