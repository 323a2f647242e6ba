"""
Healing: a short LoRA training that brings a cut model back towards the untouched one.

The teacher is the untouched model. The loss is KL(untouched | healed) at every position: a distribution teaches more than one
next token. This loss is 0 for the untouched model, so healing restores what surgery lost and does not fit the text. Every
linear layer gets an adapter, low-rank factors too. The adapters are merged at the end, so the model keeps its size.
"""

import math
import time
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from common.cli import fail
from model import adapt, merge_adapters
from training.device import settle_dtype
from training.step import autocast_of

WARMUP = 0.1  # of the steps


def heal(student, teacher, windows, steps, rank, lr, seed, log, dtype="float32"):
    """Train adapters on windows of tokens, a list of (x (1, T), y), and merge them -> distil()'s result."""
    torch.manual_seed(seed)
    adapters = adapters_of(student, rank)
    found = distil(student, teacher, windows, steps, [dict(params=adapters, lr=lr)], log, dtype)
    merge_adapters(student.model)
    return found


def healing_dtype(args, width):
    """--heal_dtype; auto is measured. float16 would need gradient scaling, so float32 replaces it. width: of the model."""
    dtype, why = settle_dtype(
        SimpleNamespace(dtype=args.heal_dtype, batch_size=1, block_size=args.window, n_embd=width), args.device, 1
    )
    if why:
        print(f"healing: {why}", flush=True)
    return "float32" if dtype == "float16" else dtype


def adapters_of(student, rank):
    """Give an adapter to every linear layer except the head -> the adapters' parameters. All others are frozen."""
    linears = [m for m in student.model.modules() if type(m) is nn.Linear and m is not student.head]
    for linear in linears:
        r = min(rank, *linear.weight.shape)
        adapt([linear], SimpleNamespace(lora_rank=r, lora_alpha=2 * r, lora_dropout=0.0))
    student.model.requires_grad_(False).to(student.model.device)
    adapters = list({p: None for m in linears for p in m.lora.parameters()})
    for p in adapters:
        p.requires_grad_(True)
        p.data = p.data.to(student.model.device)
    return adapters


def distil(student, teacher, windows, steps, groups, log, dtype="float32"):
    """
    Train the student towards the teacher's distribution. Each step reads one window, in random order.

    groups: AdamW's parameter groups, each with its highest learning rate. log(kl) is called after each step. dtype: of the
    matrix products; probabilities are float32. Returns dict(steps, tokens, seconds, training_kl: mean of the last tenth of the
    steps).
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    highest = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for _ in range(-(-steps // len(windows))) for i in torch.randperm(len(windows)).tolist()]
    losses, start = [], time.time()
    for step in range(steps):
        progress = (step + 0.5) / steps  # so that the first and last steps have a rate above 0
        rate = min(progress / WARMUP, 0.5 + 0.5 * math.cos(math.pi * max(progress - WARMUP, 0) / (1 - WARMUP)))
        for group, lr in zip(optimizer.param_groups, highest):
            group["lr"] = lr * rate
        x, _ = windows[order[step]]
        with autocast_of(str(student.model.device), dtype):
            with torch.no_grad():
                target = teacher.logits(teacher.trunk(teacher.lookup(x)))[0]
            found = student.logits(student.trunk(student.lookup(x)))[0]
        found, target = (logits.float().log_softmax(-1) for logits in (found, target))  # on a CPU autocast would keep bfloat16
        loss = F.kl_div(found, target, reduction="sum", log_target=True) / len(target)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            fail(f"--heal_lr: the loss is {losses[-1]} at step {step + 1}: lower it")
        log(losses[-1])
    last = losses[-max(1, steps // 10) :]
    tokens = steps * windows[0][0].numel()
    return dict(steps=steps, tokens=tokens, seconds=round(time.time() - start, 1), training_kl=sum(last) / len(last))
