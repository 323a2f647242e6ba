"""Measures how a model uses its token table on text: the second moments that weigh errors in whiten, joint and fisher."""

import torch
from torch.nn import functional as F


def calibrate(model, windows, device="cpu", gradients=False, sampled=False):
    """
    Run a model once over windows, an iterable of numpy (B, T) token ids and the (B, T) ids that follow them.

    Returns (C [d,d], G [d,d] or None), float64. C = E[h h^T], h: the input of the head, after ln_f. (If the model is an AtTable
    of a factorized table, h has also passed scale_down, and d is k.) With gradients, G = E[g g^T], g: the gradient of a
    window's summed loss at a looked-up row. The loss predicts the text's own next tokens (the empirical Fisher). With
    `sampled`, it predicts tokens that the model draws from torch's global generator (the true Fisher).
    """
    model.to(device).eval().requires_grad_(False)
    C, G, tokens = 0, 0, 0
    for x, y in windows:
        x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
        rows = model.lookup(x).requires_grad_(gradients)  # (B, T, d)
        h = model.trunk(rows)
        C += sum_of_squares(h.detach())
        if gradients:
            logits = model.logits(h).flatten(0, 1)
            labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0] if sampled else y.flatten()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            G += sum_of_squares(torch.autograd.grad(loss, rows)[0])
        tokens += x.numel()
    return C / tokens, G / tokens if gradients else None


def sum_of_squares(x):
    """(B, T, d) -> the sum of x x^T over tokens, [d,d] float64 on the CPU."""
    x = x.flatten(0, 1).cpu().double()
    return x.T @ x
