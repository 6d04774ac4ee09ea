"""What a training step costs, counted without a GPU: FLOPs and bytes of the real graph on fake tensors.

    python train.py CONFIG --plan=True [--plan_gpus=8 --plan_gb=80]

builds the model and one batch as fake tensors (sizes without storage), runs forward, losses and backward, and counts
every operation's FLOPs and every tensor's bytes from its allocation to its release.  A minute at the 1.3B size.
Sources: torch's FlopCounterMode and FakeTensorMode; the accounting of ZeRO, Rajbhandari et al. 2020."""

import math
import time
import weakref
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

import geometry
import wan
from lib.distributed import sharded_units
from model import CHECKPOINTING, FantasyWorld
from wan import half_precision

# Of a GPU's memory; the rest is for its context, for workspaces and for what fragments.
GPU_SHARE = 0.92

HARDWARE = ((8, 40), (8, 80), (1, 140))  # (GPUs, GB): the guide's stage 2 must fit each

# Dense bf16 FLOP/s by a part of torch.cuda.get_device_name(); the first that fits counts, so the longer names come
# first.  Source: NVIDIA's public data sheets, without sparsity (they print twice as much with it).
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A6000": 155e12,
}


# -------------------------------------------------------------------------------------------------------- counting
aten = torch.ops.aten

FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Count(TorchDispatchMode):
    """FLOPs of what runs inside (.attention: its part of them), and bytes of the tensors made inside that are alive:
    .now, and .peak per .phase.

    Recomputation counts.  A fused attention's backward counts 2.5 times its forward, for it recomputes the scores that
    were never stored.  torch's table of formulas lacks the CPU's attention: FORMULAS has it too.  (FlopCounterMode itself
    keeps tensors alive longer.)  Bytes are exact for tensors; scratch memory inside a kernel is not seen."""

    def __init__(self):
        super().__init__()
        self.flops, self.attention, self.now, self.phase, self.peak = 0, 0, 0, "", {}
        self.seen = weakref.WeakKeyDictionary()

    def release(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_iter((args, kwargs)):  # what comes from outside, weights say, is not ours
            if torch.is_tensor(x):
                self.seen.setdefault(x.untyped_storage())
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            self.flops += flops
            self.attention += flops if "attention" in func.__name__ else 0
        for x in tree_iter(out):
            if torch.is_tensor(x) and x.untyped_storage() not in self.seen:
                storage = x.untyped_storage()
                self.seen[storage] = None
                self.now += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.peak[self.phase] = max(self.peak.get(self.phase, 0), self.now)
        return out


@contextmanager
def fake_tensors():
    """Tensors made inside have shapes, strides and types but no storage."""
    tables = (geometry.rope_2d, geometry.uv_embedding, wan.rope_3d)
    for table in tables:  # they cache tensors: real ones must not meet fake ones
        table.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        for table in tables:
            table.cache_clear()


def fake(build):
    """The module that build() makes, with fake parameters; to be called inside fake_tensors()."""
    with unset_fake_temporarily(), torch.device("meta"):
        module = build()
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty_strided(p.shape, p.stride(), dtype=p.dtype),
                    requires_grad=p.requires_grad,
                )
    return module


def fake_model(cfg, stage, half=True):
    """FantasyWorld of fake tensors; frozen matrices in bf16 when half."""

    def build():
        model = FantasyWorld(cfg)
        if half and stage:
            half_precision(model.dit, torch.bfloat16)
        return model.set_stage(stage)

    return fake(build)


def example_batch(cfg, batch, num_frames, height, width, words=None):
    """Random tensors with the names and shapes of evaluate.prepare's batch, and noise: the sizes are what counts."""
    f, h, w = (num_frames - 1) // 4 + 1, height // 8, width // 8
    maps = (batch, num_frames, height, width)
    b = dict(
        latents=torch.randn(batch, 16, f, h, w),
        depth=1 + torch.rand(maps),
        mask=torch.ones(maps, dtype=torch.bool),
        points=torch.randn(*maps, 3),
        pose_enc=torch.randn(batch, num_frames, 9),
        plucker=torch.randn(batch, 6, *maps[1:]),
        y=None,
        text=[torch.randn(words or cfg.text_len, cfg.text_dim) for _ in range(batch)],
    )
    if cfg.in_dim > 16:
        b["y"] = torch.randn(batch, cfg.in_dim - 16, f, h, w)
    if cfg.has_clip:
        b["clip"] = torch.randn(batch, 257, 1280)
    return b, torch.randn(batch, 16, f, h, w), torch.rand(batch), torch.ones(batch)


# ------------------------------------------------------------------------------------------------------------ a step
def measure_step(model, loss, size, half=True):
    """Bytes and FLOPs of forward, loss and backward of one micro-batch with gradients in place.

    loss   function(model, b, noise, sigma, pose_keep) -> scalar
    size   (batch, num_frames, height, width)
    returns  dict: activations (kept by the blocks), heads (on top, heads and losses), backward (on top, one block's
             recomputation and gradients), peak of the step above weights, gradients and moments; flops"""
    live, left = Count(), set(range(4))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None

    def arrived(i):
        left.discard(i)
        live.phase = live.phase if left else "backward"

    def heads_begin(head, args):
        live.phase, kept["activations"] = "heads", live.now
        for i, taps in enumerate(
            args[0]
        ):  # when the gradients of all four have arrived, the heads are done
            taps.register_hook(lambda gradient, i=i: arrived(i))

    kept, hook = {}, model.depth_head.register_forward_pre_hook(heads_begin)
    with live:
        live.phase = "forward"
        batch = example_batch(model.cfg, *size)
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            value = loss(model, *batch)
        value.backward()
    hook.remove()
    base = kept.get("activations", live.peak["forward"])
    return dict(
        activations=base,
        heads=max(0, live.peak.get("heads", 0) - base),
        forward=live.peak["forward"] - base,
        backward=max(0, live.peak.get("backward", 0) - base),
        peak=max(live.peak.values()),
        flops=live.flops,
    )


def static_bytes(model):
    """Bytes that do not depend on the batch: frozen and trainable weights, gradients, AdamW's two moments.  Where weights
    are sharded, what is whole at a time: gathered_heads while the heads run, gathered_backward after them (two steps
    and their gradients, on the way out once more)."""

    def split(parameters):
        frozen, trained = (
            sum(p.numel() * p.element_size() for p in parameters if p.requires_grad == state)
            for state in (False, True)
        )
        return frozen, trained

    frozen, trained = split(list(model.parameters()))
    parts = [split(list(unit.parameters())) for unit in sharded_units(model)]
    steps, others = parts[: len(model.steps)], parts[len(model.steps) :]
    rest = frozen + trained - sum(f + t for f, t in parts)
    return dict(
        frozen=frozen,
        trainable=trained,
        gradients=trained,
        moments=2 * trained,
        gathered_heads=rest + sum(f + t for f, t in others),
        gathered_backward=2 * rest + 2 * max(f + 2 * t for f, t in steps),
    )


def count(cfg, stage, loss, size, checkpointing, half=True):
    """measure_step and static_bytes of a model that is never allocated."""
    with fake_tensors():
        model = fake_model(cfg, stage, half)
        model.checkpoint_activations = checkpointing
        return dict(static_bytes(model), **measure_step(model, loss, size, half))


def flops_of_step(cfg, stage, loss, size, *, checkpointing="none", half=True):
    """FLOPs of one micro-step, forward, losses and backward, counted without touching the real model.

    cfg            model.Config; of a model that is loaded already its own, model.cfg
    loss           function(model, b, noise, sigma, keep) -> scalar, as compute_loss of train.py
    size           (batch, num_frames, height, width) of the micro-batch
    checkpointing  one of model.CHECKPOINTING; what is recomputed counts
    half           bf16 autocast and frozen matrices in bf16; it decides what "selective" keeps
    returns        int, what a Count around the real step gives

    Costs one core 1 s (tests' sizes), 2 s (demo) or 9 s (1.3b, stage 2): one rank is enough, others need no
    MFU.  Nothing is cached.  Call it before anything else made fake or real tensors meet: it clears the tables of
    positions, which are made again at the next step."""
    with fake_tensors():
        model = fake_model(cfg, stage, half)
        model.checkpoint_activations = checkpointing
        batch = example_batch(cfg, *size)
        with Count() as counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                value = loss(model, *batch)
            value.backward()
    return counter.flops


def peak_flops(device):
    """FLOP/s to compare with: PEAK_FLOPS where it knows the GPU, else a large matrix product, measured (a second)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [flops for part, flops in PEAK_FLOPS.items() if part in name]
        if known:
            return known[0]
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ----------------------------------------------------------------------------------------------------------- the plan
GIB = 2**30


SHARDING = ("-", "optimizer", "weights")  # in order of what they send


def needs(counts, batch, sharding="-", ranks=1):
    """Bytes of a rank at its fullest: counts is {1: count of one clip, 2: count of two}."""

    def grown(size):
        return size(counts[1]) + (batch - 1) * (size(counts[2]) - size(counts[1]))

    one = counts[1]
    weights, moments = one["frozen"] + one["trainable"] + one["gradients"], one["moments"]
    if sharding == "weights":
        return (weights + moments) / ranks + max(
            grown(lambda c: c["activations"] + c[phase]) + one[f"gathered_{phase}"]
            for phase in ("heads", "backward")
        )
    return (
        weights + moments / (ranks if sharding == "optimizer" else 1) + grown(lambda c: c["peak"])
    )


def settings(counts, gpus, gigabytes, total):
    """Cheapest setting that fits: the least recomputation, then the least sharding, then the largest micro-batch.

    counts  {checkpointing: {1: count, 2: count}};  total: the global batch
    returns  checkpointing, one of SHARDING, batch_size, grad_accum, bytes; None when nothing fits"""
    for how in (how for how in CHECKPOINTING if how in counts):
        for sharding in SHARDING if gpus > 1 else SHARDING[:1]:
            fits = [
                b
                for b in range(1, total // gpus + 1)
                if total % (b * gpus) == 0
                and needs(counts[how], b, sharding, gpus) <= GPU_SHARE * gigabytes * GIB
            ]
            if fits:
                return (
                    how,
                    sharding,
                    fits[-1],
                    total // (fits[-1] * gpus),
                    needs(counts[how], fits[-1], sharding, gpus),
                )
    return None


def report(cfg, stage, loss, size, total, hardware, half=True):
    """The plan as lines of text; size (num_frames, height, width), total: the global batch."""
    counts = {
        how: {b: count(cfg, stage, loss, (b, *size), how, half) for b in (1, 2)}
        for how in (CHECKPOINTING if stage else CHECKPOINTING[:1])
    }
    one = counts["none"][1]
    yield (
        f"stage {stage}, {size[0]} x {size[1]} x {size[2]}, global batch {total}.  GiB per rank, counted on fake "
        f"tensors in {'bf16' if half else 'fp32'}; nothing was allocated."
    )
    yield (
        f"frozen weights {one['frozen'] / GIB:.3g} | trainable weights {one['trainable'] / GIB:.3g} | gradients "
        f"{one['gradients'] / GIB:.3g} | AdamW moments {one['moments'] / GIB:.3g}; shard_optimizer divides the moments "
        f"by the number of GPUs, shard_weights all four, and gathers up to {one['gathered_backward'] / GIB:.3g}"
    )
    yield f"{'one clip':<17s} blocks    heads  backward     peak  each more  TFLOP/clip"
    for how, c in counts.items():
        more = c[2]["peak"] - c[1]["peak"]
        yield (
            f"{how:<15s}"
            + "".join(
                f"{c[1][k] / GIB:>{n}.3g}"
                for k, n in (("activations", 9), ("heads", 9), ("backward", 10), ("peak", 9))
            )
            + f"{more / GIB:>11.3g}{c[1]['flops'] / 1e12:>12.4g}"
        )
    yield (
        "blocks: kept from forward to backward; on top of them heads and losses, later backward.  "
        f"Up to {GPU_SHARE:.0%} of a GPU is planned with."
    )
    yield f"{'GPUs':<14s} checkpoint_activations  shard (shard_optimizer, shard_weights)  batch_size  grad_accum     GiB"
    for gpus, gigabytes in hardware:
        found = settings(counts, gpus, gigabytes, total)
        name = f"{gpus} x {gigabytes:g} GB"
        if not found:
            least = min(
                needs(c, 1, sharding, gpus) for c in counts.values() for sharding in SHARDING
            )
            yield f"{name:<14s}does not fit: one clip needs {least / GIB:.1f} GiB with everything sharded"
        else:
            how, sharding, batch, accum, total_bytes = found
            yield f"{name:<14s}{how:>23s}{sharding:>40s}{batch:>12d}{accum:>12d}{total_bytes / GIB:>8.1f}"
