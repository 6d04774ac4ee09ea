"""The optimizer of a run: AdamW, or beside it Muon: momentum whose update is orthogonalised.

Sources: Jordan et al. 2024 (the quintic Newton-Schulz iteration and its coefficients); Liu et al.
2025 (an update of size 0.2 sqrt(larger side), so that one learning rate suits both kinds)."""

import math

import torch
import torch.distributed as dist

from lib.distributed import gather_like, is_spread, own_part, part_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95
# Embeddings and outputs of heads: their rows are not the directions of one map.
OTHERS = ("embedding", "embed_pose", "head.head", "output_conv2.2", "pose_branch.fc2", "_token")


def is_orthogonal(name, p):
    """Whether Muon updates a parameter: a matrix or kernel within the network."""
    inner = not any(part in name for part in (*OTHERS, "modulation"))
    return inner and p.dim() > 1 and p.numel() > len(p) > 1


def orthogonalise(matrices, steps=5):
    """Roughly the nearest semi-orthogonal matrices: singular values go to 0.7 .. 1.2.

    matrices   (n, rows, columns)   any float type
    returns    the same shape; bf16 on a GPU, whose rounding the iteration tolerates, fp32 on a CPU:
               without instructions for bf16 it would take 5 to 15 times as long"""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, but groups with `orthogonal` get Nesterov momentum, orthogonalised.

    Matrices of equal shape share one product: a loop over small ones costs a CPU up to 40 % of a
    step.  found_inf () = 1 leaves weights and state as they are, as in AdamW."""

    __setstate__ = torch.optim.Optimizer.__setstate__  # AdamW's wants a step beside every momentum

    def _init_group(self, group, *lists):
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:  # DTensors would cost AdamW their number squared
            if isinstance(tensors, list):  # torch 2.4 has amsgrad among them
                tensors[:] = map(own_part, tensors)
        return has_complex

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        self.param_groups = [g for g in groups if not g.get("orthogonal")]
        super().step()
        self.param_groups = groups
        for group in groups:
            shapes = {}
            for p in group["params"] if group.get("orthogonal") else ():
                if p.grad is not None:
                    shapes.setdefault((p.device, len(p), p.numel() // len(p)), []).append(p)
            for (_, rows, columns), same in shapes.items():
                self.update(same, group, (rows, columns))

    def update(self, same, group, shape):
        """One step of parameters that are all matrices of one shape; spread ones meet for it."""
        for p in same:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        weights = [own_part(p) for p in same]
        buffers = [own_part(self.state[p]["momentum"]) for p in same]
        grads, go = [own_part(p.grad) for p in same], 1.0
        if (bad := getattr(self, "found_inf", None)) is not None:
            # Its own momentum in place of a gradient that is not finite changes no momentum.
            grads = [torch.where(bad > 0, b, g) for b, g in zip(buffers, grads)]
            go = 1 - bad
        torch._foreach_lerp_(buffers, grads, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(grads, buffers, MOMENTUM)
        stacked = torch.stack([gather_like(g, p).reshape(shape) for g, p in zip(ahead, same)])
        updates = orthogonalise(stacked).to(same[0].dtype) * (0.2 * max(shape) ** 0.5 * go)
        parts = [part_like(u.view(p.shape), p) for u, p in zip(updates, same)]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"] * go)
        torch._foreach_add_(weights, parts, alpha=-group["lr"])


def make_optimizer(model, options, ranks=None):
    """AdamW or Muon; no decay on norms, gates, biases, modulation and tokens.

    Sharded: each rank updates its share of the parameters and sends them to the others, so the
    moments are kept once in all (ZeRO, Rajbhandari et al. 2020)."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    # Decay would pull gates and tokens to zero.  A gain may have axes of 1 (ChannelNorm's).
    others = ("modulation", "_token", "_tokens")
    plain = [p for n, p in named if n.endswith(others) or p.numel() == max(p.shape, default=1)]
    muon = options.optimizer == "muon"
    inner = [p for n, p in named if muon and is_orthogonal(n, p)]
    ids = {id(p) for p in (*plain, *inner)}
    matrices = [p for _, p in named if id(p) not in ids]
    groups = [dict(params=matrices, weight_decay=options.weight_decay)]
    groups += [dict(params=plain, weight_decay=0.0)]
    groups += [dict(groups[0], params=inner, orthogonal=True)] if inner else []
    how = dict(lr=options.learning_rate, betas=(0.9, options.beta2), fused=True)  # for found_inf
    if options.shard_optimizer and ranks and ranks.world > 1:
        # Imported here: it takes a second to compile TorchScript that we do not use.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        how["process_group"] = ranks.group
        return ZeroRedundancyOptimizer(groups, Muon, **how)
    return Muon(groups, **how)  # without orthogonal groups it is AdamW


def clip_gradients(parameters, most):
    """Scale gradients to a norm of at most `most` -> the norm () before, of all ranks' parts."""
    if not any(map(is_spread, parameters)):
        return torch.nn.utils.clip_grad_norm_(parameters, most)
    grads = [own_part(p.grad) for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) ** 2
    dist.all_reduce(norm, group=parameters[0].device_mesh.get_group())
    norm = norm.sqrt()
    torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1))
    return norm


def take_step(optimizer, bad, in_buckets=False):
    """A step, which leaves weights and moments as they are where bad () is 1.

    in_buckets   gradients are views of DDP's buckets, and stay so: see link_gradients"""
    getattr(optimizer, "optim", optimizer).found_inf = bad  # a sharded one steps its own part
    optimizer.step()
    optimizer.zero_grad(set_to_none=not in_buckets)  # None: no bytes until the next backward


def learning_rate_at(step, options):
    """Linear rise, then the schedule down to min_lr at max_steps."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    down = dict(constant=1.0, linear=1 - done, cosine=0.5 + 0.5 * math.cos(math.pi * done))
    return options.min_lr + (options.learning_rate - options.min_lr) * down[options.lr_schedule]
