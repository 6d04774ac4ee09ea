"""Muon: momentum with an orthogonalised update, for matrices and convolutions; AdamW for the rest.

Source: Jordan et al. 2024 (the quintic Newton-Schulz iteration and its coefficients); the
update's size follows Liu et al. 2025 (0.2 sqrt(larger side)), so that one learning rate suits
both kinds of parameters."""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices, steps=5):
    """Nearest semi-orthogonal matrices, roughly: singular values go to about 1.

    matrices   (n, rows, columns)   any float type
    returns    the same shape, bf16: the iteration tolerates its rounding"""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; matrices of equal shape share one product."""

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((len(p), p[0].numel()), []).append(p)
            for (rows, columns), same in shapes.items():
                self.update(same, rows, columns, group)

    def update(self, same, rows, columns, group):
        momentum = group["momentum"]
        for p in same:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in same]
        buffers = [self.state[p]["momentum"] for p in same]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum)
        stacked = torch.stack([g.reshape(rows, columns) for g in ahead])
        updates = orthogonalise(stacked).to(same[0].dtype).mul_(0.2 * max(rows, columns) ** 0.5)
        torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(same, [u.view_as(p) for u, p in zip(updates, same)], alpha=-group["lr"])
