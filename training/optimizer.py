"""
The optimizers of train.py: AdamW for all weights, or Muon for the matrices of the blocks and AdamW for the rest.

Muon (K. Jordan, 2024) keeps a running mean of the gradient (momentum). It steps along the nearest matrix whose singular values
are all about 1. So the model learns directions with a weak gradient as fast as the others. A Newton-Schulz iteration finds that
matrix with products only. AdamW trains the token table, scale matrices, positions, biases and norms.
"""

import torch

from common.untrusted import expect

MOMENTUM = 0.95
A, B, C = 3.4445, -4.7750, 2.0315  # x -> A x + B x^3 + C x^5, repeated, moves singular values to 0.7 ... 1.2
ROUNDS = 5
TABLES = ("wte", "lm_head", "scale_up", "scale_down")


def make_optimizer(args, model):
    """
    Make the optimizer of a model's trained parameters. Each param_group has "rate": its learning rate / args.learning_rate.

    Weight decay acts on matrices only.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own_rate = {name for name in trained if args.table_lr and set(name.split(".")) & set(TABLES)}
    muon = {name for name, p in trained.items() if args.optimizer == "muon" and p.dim() == 2 and ".h." in name}
    matrices = {name for name, p in trained.items() if p.dim() >= 2} - own_rate - muon

    def group(names, lr=args.learning_rate, decay=args.weight_decay):
        params = [p for name, p in trained.items() if name in names]
        return dict(params=params, rate=lr / args.learning_rate, weight_decay=decay)

    # Always make the first two groups, even if empty: a resumed run must have the same number of groups.
    groups = [group(matrices), group(trained.keys() - matrices - own_rate - muon, decay=0.0)]  # biases and LayerNorms last
    if own_rate:
        groups.append(group(own_rate, args.table_lr))
    adamw = torch.optim.AdamW(groups, args.learning_rate, (args.beta1, args.beta2), fused=args.device != "mps")
    if not muon:
        return adamw
    plain = args.device == "cpu" and args.dtype == "float32"  # some CPUs are very slow in bfloat16
    return Both(Muon([group(muon, args.muon_lr)], args.muon_lr, dtype=torch.float32 if plain else torch.bfloat16), adamw)


def skip_where(optimizer, skipped):
    """
    Make the next step() change nothing if `skipped` is true, a 0-dim bool tensor on the device.

    Fused AdamW and Muon read it on the device. An optimizer that is not fused cannot, so the program waits for the value.
    """
    for part in getattr(optimizer, "parts", [optimizer]):
        if part.defaults.get("fused", True):
            part.found_inf = skipped.float()  # the name that GradScaler uses
        elif skipped:
            part.zero_grad(set_to_none=True)


class Both:
    """Several optimizers with the interface of one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]


class Muon(torch.optim.Optimizer):
    """Only for matrices. torch.optim.Muon (from torch 2.9) gives the same result, but computes one matrix at a time."""

    found_inf = None  # see skip_where()

    def __init__(self, params, lr, weight_decay=0.0, dtype=torch.bfloat16):
        """dtype: number format of the products in orthogonal()."""
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), some in by_shape.items():
                for p in some:
                    if p not in self.state:
                        self.state[p]["mean"] = torch.zeros_like(p)
                    p.grad = self.unless_skipped(p.grad, self.state[p]["mean"])
                    self.state[p]["mean"].lerp_(p.grad, 1 - MOMENTUM)
                ahead = torch.stack([p.grad.lerp(self.state[p]["mean"], MOMENTUM) for p in some])  # Nesterov momentum
                size = group["lr"] * max(1, rows / columns) ** 0.5
                decay = self.unless_skipped(1 - group["lr"] * group["weight_decay"], 1.0)
                for p, direction in zip(some, self.unless_skipped(orthogonal(ahead.to(self.dtype)), 0.0)):
                    p.mul_(decay)
                    p.sub_(direction, alpha=size)

    def unless_skipped(self, value, otherwise):
        """value, or `otherwise` if skip_where() asked to skip. Does not wait for the device."""
        return value if self.found_inf is None else torch.where(self.found_inf > 0, otherwise, value)


def orthogonal(M):
    """M [n,a,b] -> approximately U V^T [n,a,b], for each matrix U S V^T."""
    if M.shape[1] > M.shape[2]:
        return orthogonal(M.mT).mT
    X = M / M.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), X, beta=A)
    return X


KEPT = {"exp_avg": torch.Tensor, "exp_avg_sq": torch.Tensor, "step": torch.Tensor}  # AdamW's state of each weight


def resume_optimizer(optimizer, state):
    """
    Load the running means of a state_dict() into an optimizer. Its groups stay unchanged: the run's flags determine them.

    Raises ValueError if the state belongs to other weights or another optimizer.
    """
    if isinstance(optimizer, Both):
        for part, its in zip(optimizer.parts, state, strict=True):
            resume_optimizer(part, its)
        return
    expect(state, dict(state=dict, param_groups=[dict(params=[int])]))
    groups, weights = optimizer.state_dict()["param_groups"], [p for group in optimizer.param_groups for p in group["params"]]
    if [group["params"] for group in state["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("its optimizer has other weights")
    for i, kept in state["state"].items():
        expect(i, range(len(weights)), "a number in its optimizer")
        expect(kept, dict(mean=torch.Tensor) if isinstance(optimizer, Muon) else KEPT)
        for name, tensor in kept.items():
            shape = () if name == "step" else weights[i].shape
            if tensor.shape != shape or not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ValueError(f"the {name} of its optimizer is damaged")
    optimizer.load_state_dict(dict(state=state["state"], param_groups=groups))
