"""What every run is measured by: the same fixed windows of the validation file, for every model."""

import math

import torch
from torch.nn import functional as F

from model import effective_weight


@torch.no_grad()
def evaluate(model, dataset, args, device, autocast):
    """
    Evaluate a GPT on the dataset's first args.eval_iters batches of args.batch_size fixed windows, (B, T) each.

    Returns dict(val_loss [nats per token], val_ppl, ln_f_cosine, ln_f_cosine_full, eval_tokens).

    ln_f_cosine       mean cosine between what the head reads and lm_head's row of the target token, in the head's own
                      space: d for a dense table, k for a factorized one, so not comparable between them
    ln_f_cosine_full  the same in d-space: between ln_f's output and the target's row of the effective table,
                      comparable between all
    """
    model.eval()
    t = model.transformer
    rows, table = effective_weight(model.lm_head), model.effective_table()
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0  # on the CPU: not every device has float64
    for x, y in dataset.fixed_windows(args.eval_iters * args.batch_size, args.batch_size, model.config.block_size):
        x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device).flatten()
        with autocast:
            h = model.hidden(x)
            loss = F.cross_entropy(model.logits(h).flatten(0, 1), y, reduction="sum")
            small = t.scale_down(h).flatten(0, 1)  # (B T, k), or (B T, d) as it was
        cosine = F.cosine_similarity(small.float(), rows[y], dim=-1).sum()
        cosine_full = F.cosine_similarity(h.flatten(0, 1).float(), table[y], dim=-1).sum()
        sums += torch.stack([loss.float(), cosine, cosine_full]).cpu()
        tokens += len(y)
    model.train()
    loss, cosine, cosine_full = (sums / tokens).tolist()
    ppl = math.exp(loss) if loss < 700 else math.inf
    return dict(val_loss=loss, val_ppl=ppl, ln_f_cosine=cosine, ln_f_cosine_full=cosine_full, eval_tokens=tokens)
