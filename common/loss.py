"""The loss of a language model's head: mean cross-entropy, computed in chunks so that not all logits are in memory at once."""

import torch
from torch.nn import functional as F

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
