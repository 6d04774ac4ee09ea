"""What a training step costs, counted without a GPU: FLOPs and bytes of its graph on fake tensors.

    python train.py CONFIG --plan [--plan_gpus=8 --plan_gb=80]

builds the model and one batch as fake tensors (sizes without storage), runs forward, losses and
backward, and counts every operation's FLOPs and every tensor's bytes from its allocation to its
release.  A minute at the 1.3B size.  Sources: torch's FlopCounterMode and FakeTensorMode; the
accounting of ZeRO, Rajbhandari et al. 2020."""

import timeit
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

import geometry
from lib.distributed import units
from lib.offload import visiting_bytes
from lib.optimizer import is_orthogonal
from model import CHECKPOINTING, FantasyWorld, clear_tables
from wan import CLIP_SHAPE, LATENT, half_precision

GIB = 2**30

# Beside the tensors: CUDA's context, workspaces of cuBLAS and cuDNN, buffers of NCCL.  Of the whole
# up to GPU_SHARE is planned with; the rest is for what fragments.  Both are assumptions.
CONTEXT = int(1.5 * GIB)
GPU_SHARE = 0.92

HARDWARE = ((8, 40), (8, 80), (1, 80), (1, 140))  # (GPUs, GB): the guide's runs must fit each

SHARDING = ("-", "optimizer", "weights")  # in order of what they send
OFFLOADED = "offload_frozen"  # where none of them fits

# Dense bf16 FLOP/s by a part of torch.cuda.get_device_name(); the first that fits counts, so the
# longer names come first.  Source: NVIDIA's data sheets, half of what they print with sparsity.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,  # SXM
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A6000": 155e12,
}


# ---------------------------------------------------------------------------------------- counting
aten = torch.ops.aten

FORMULAS = dict(flop_registry)
for way in ("", "_backward"):  # torch's table lacks the attention that CPU tensors ask for
    flash = getattr(aten, f"_scaled_dot_product_flash_attention{way}")
    on_cpu = getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{way}")
    FORMULAS[on_cpu] = flop_registry[flash]


class Flops(TorchDispatchMode):
    """FLOPs of what runs inside, recomputation too; attention: its part of them.

    A fused attention's backward is 2.5 times its forward, for it recomputes the scores that were
    never stored.  What torch.compile has made is not seen."""

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func.overloadpacket):
            flops = formula(*args, **(kwargs or {}), out_val=out)
            self.flops += flops
            self.attention += flops if "attention" in func.__name__ else 0
        return out


class Count(Flops):
    """FLOPs of what runs inside, and bytes of the tensors made inside that are alive.

    now, peak  bytes alive, {phase: most of them}; scratch memory inside a kernel is not seen
    start      {phase: bytes alive when it was entered}
    FlopCounterMode itself keeps tensors alive longer than the program does."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = {}
        self.start = {}
        self.seen = weakref.WeakKeyDictionary()
        self.enter("")

    def enter(self, phase):
        self.phase = phase
        self.start[phase] = self.now

    def release(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # two calls of three: what autograd asks
            return args[0].fake_device
        for x in tree_iter((args, kwargs)):  # what comes from outside, weights say, is not ours
            if torch.is_tensor(x):
                self.seen.setdefault(x.untyped_storage())
        out = super().__torch_dispatch__(func, types, args, kwargs)
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
    clear_tables()
    try:
        with FakeTensorMode():
            yield
    finally:
        clear_tables()


def fake(build):
    """The module that build() makes, with fake parameters; to be called inside fake_tensors()."""
    with unset_fake_temporarily(), torch.device("meta"):
        module = build()
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            like = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype)
            setattr(part, name, nn.Parameter(like, requires_grad=p.requires_grad))
    return module


def fake_model(cfg, stage, half=True):
    """FantasyWorld with fake parameters; frozen matrices in bf16 when half."""

    def build():
        model = FantasyWorld(cfg)
        if half and stage:
            half_precision(model.dit, torch.bfloat16)
        return model.set_stage(stage)

    return fake(build)


def example_batch(cfg, batch, num_frames, height, width):
    """Random tensors of a prepared batch's names and shapes -> batch, noise, sigma, keep."""
    grid = LATENT.grid_of(num_frames, height, width)
    maps = (batch, num_frames, height, width)
    b = dict(
        latents=torch.randn(batch, LATENT.channels, *grid),
        depth=1 + torch.rand(maps),
        mask=torch.ones(maps, dtype=torch.bool),
        points=torch.randn(*maps, 3),
        pose_enc=torch.randn(batch, num_frames, geometry.POSE_DIM),
        plucker=torch.randn(batch, 6, *maps[1:]),
        y=None,
        text=[torch.randn(cfg.text_len, cfg.text_dim) for _ in range(batch)],
    )
    if cfg.in_dim > LATENT.channels:
        b["y"] = torch.randn(batch, cfg.in_dim - LATENT.channels, *grid)
    if cfg.has_clip:
        b["clip"] = torch.randn(batch, *CLIP_SHAPE)
    return b, torch.randn_like(b["latents"]), torch.rand(batch), torch.ones(batch)


# ------------------------------------------------------------------------------------------ a step
@dataclass(frozen=True)
class Cost:
    """Bytes of a rank, and FLOPs of one micro-batch."""

    frozen: int  # weights
    visiting: tuple  # of these those of all steps, and the two buffers of offload_frozen
    trainable: int  # weights; their gradients take as much
    moments: int  # AdamW's two, or Muon's one
    # Where weights are sharded, what is whole at a time: while the heads run, and after them (two
    # steps and their gradients, on the way out once more).
    gathered_heads: int
    gathered_backward: int
    activations: int  # kept by the blocks from forward to backward
    heads: int  # on top of the activations: heads and losses
    backward: int  # later on top of them: one block's recomputation and gradients
    peak: int  # of the step, above weights, gradients and moments
    flops: int = 0


def step_counter(model, loss, size, half):
    """Count of forward, losses and backward of an example micro-batch, with gradients in place."""
    counter, arrived = Count(), []
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None

    def gradient_arrives(_):
        arrived.append(1)
        if len(arrived) == 4:  # those of all four levels are there: the heads are done
            counter.enter("backward")

    def heads_begin(head, args):
        counter.enter("heads")
        for level in args[0]:
            level.register_hook(gradient_arrives)

    hook = model.depth_head.register_forward_pre_hook(heads_begin)
    with counter:
        batch = example_batch(model.cfg, *size)
        with torch.autocast(batch[1].device.type, torch.bfloat16, enabled=half):
            value = loss(model, *batch)
        value.backward()
    hook.remove()
    return counter


def split_bytes(module):
    """Bytes of its frozen and of its trainable parameters."""
    trainable = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return sum(p.nbytes for p in module.parameters()) - trainable, trainable


def count(cfg, stage, loss, size, *, checkpointing="none", half=True, muon=False):
    """Cost of one micro-step, forward, losses and backward, of a model that is never allocated.

    cfg            model.Config; of a model that is loaded already its own, model.cfg
    loss           function(model, b, noise, sigma, keep) -> scalar, as compute_loss of train.py
    size           (batch, num_frames, height, width) of the micro-batch
    checkpointing  one of model.CHECKPOINTING; what is recomputed counts
    half           bf16 autocast and frozen matrices in bf16; it decides what "selective" keeps
    muon           matrices and kernels have one moment in place of AdamW's two"""
    with fake_tensors():
        model = fake_model(cfg, stage, half)
        model.checkpoint_activations = checkpointing
        counter = step_counter(model, loss, size, half)
        frozen, trained = split_bytes(model)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        single = sum(p.nbytes for n, p in named if muon and is_orthogonal(n, p))
        steps = [split_bytes(step) for step in (*model.pcb, *model.irg)]
        visiting = visiting_bytes(model)
        whole = sum(sum(split_bytes(unit)) for unit in units(model))
    rest = frozen + trained - whole
    base = counter.start.get("heads", counter.peak[""])  # stage 0 has no heads
    return Cost(
        frozen=frozen,
        visiting=visiting,
        trainable=trained,
        moments=2 * trained - single,
        gathered_heads=frozen + trained - sum(map(sum, steps)),
        gathered_backward=2 * rest + 2 * max(f + 2 * t for f, t in steps),
        activations=base,
        heads=max(0, counter.peak.get("heads", 0) - base),
        backward=max(0, counter.peak.get("backward", 0) - base),
        peak=max(counter.peak.values()),
        flops=counter.flops,
    )


def peak_flops(device):
    """FLOP/s that are 100 %: PEAK_FLOPS where it knows the GPU, else those of a large product."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, flops in PEAK_FLOPS.items():
        if part in name:
            return flops
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    # .item() waits for the device.
    return 2 * n**3 / min(timeit.repeat(lambda: (a @ a)[0, 0].item(), repeat=5, number=1))


# ---------------------------------------------------------------------------------------- the plan
class Setting(NamedTuple):
    checkpointing: str
    sharding: str  # one of SHARDING, or OFFLOADED
    batch_size: int
    grad_accum: int
    bytes: float  # of a rank at its fullest, CONTEXT included


def needs(counts, batch, sharding="-", ranks=1):
    """Bytes of a rank at its fullest, CONTEXT included; counts is {1: Cost of a clip, 2: of two}.

    Gradients are there once: lib.distributed.link_gradients makes them DDP's buckets."""
    one, two = counts[1], counts[2]

    def grown(*fields):
        first, second = (sum(getattr(c, field) for field in fields) for c in (one, two))
        return first + (batch - 1) * (second - first)

    weights = one.frozen + 2 * one.trainable  # and gradients
    if sharding == "weights":
        heads = grown("activations", "heads") + one.gathered_heads
        backward = grown("activations", "backward") + one.gathered_backward
        return CONTEXT + (weights + one.moments) / ranks + max(heads, backward)
    moments = one.moments / (ranks if sharding == "optimizer" else 1)
    away, buffers = one.visiting if sharding == OFFLOADED else (0, 0)
    return CONTEXT + weights - away + buffers + moments + grown("peak")


def settings(counts, gpus, gigabytes, total, stage=1):
    """Cheapest Setting that fits: the least recomputation, then the least sharding, then the
    largest micro-batch; frozen weights are offloaded where nothing else fits.  None: not even then.

    counts  {checkpointing: {1: Cost, 2: Cost}};  total: the global batch"""
    batches = [b for b in range(total // gpus, 0, -1) if total % (b * gpus) == 0]
    for how, sharding in ways(counts, gpus, stage):
        for batch in batches:
            size = needs(counts[how], batch, sharding, gpus)
            if size <= GPU_SHARE * gigabytes * GIB:
                return Setting(how, sharding, batch, total // (batch * gpus), size)
    return None


def network_bytes(cost, sharding, ranks, grad_accum=1):
    """Bytes that a rank, or a node of several, sends in a step: a ring leaves each node once.

    A sum takes twice (ranks - 1) / ranks of its bytes, gathering and scattering once."""
    part = (ranks - 1) / ranks
    if sharding == "weights":  # every micro-step gathers twice and scatters the gradients
        return grad_accum * part * (2 * cost.frozen + 3 * cost.trainable)
    sent = 2 * part * cost.trainable  # DDP, in the last micro-step alone
    return sent + part * cost.trainable if sharding == "optimizer" else sent


def network_lines(cost, setting, gpus):
    """For more GPUs than one machine has: what a Setting sends between machines."""
    if gpus > 8:
        sent = network_bytes(cost, setting.sharding, gpus, setting.grad_accum)
        seconds = [f"{sent / (speed * 1e9 / 8):.3g}" for speed in (100, 200, 400)]
        took = f"{', '.join(seconds)} s at 100, 200, 400 Gbit/s, on paper"
        yield f"  each machine sends {sent / 1e9:.3g} GB a step: {took}"


def ways(counts, gpus, stage):
    """(checkpointing, sharding) in order of what they cost."""
    known = [how for how in CHECKPOINTING if how in counts]
    sharding = SHARDING if stage else SHARDING[:2]  # stage 0 bypasses the steps that are gathered
    yield from ((how, s) for how in known for s in (sharding if gpus > 1 else sharding[:1]))
    # In stage 2 what is not recomputed would keep the weights that have left.
    yield from ((how, OFFLOADED) for how in known if stage == 1 or stage and how != "none")


def cost_lines(counts):
    """What a clip takes, one line for each kind of recomputation."""
    one = counts["none"][1]
    yield (
        f"frozen weights {one.frozen / GIB:.3g} | trainable weights {one.trainable / GIB:.3g} | "
        f"gradients {one.trainable / GIB:.3g} | moments {one.moments / GIB:.3g}; "
        f"shard_optimizer divides the moments by the number of GPUs, shard_weights all four, and "
        f"gathers up to {one.gathered_backward / GIB:.3g}; offload_frozen takes "
        f"{one.visiting[0] / GIB:.3g} of the frozen ones away and makes buffers of "
        f"{one.visiting[1] / GIB:.3g}"
    )
    yield f"{'one clip':<17s} blocks    heads  backward     peak  each more  TFLOP/clip"
    for how, costs in counts.items():
        c, more = costs[1], costs[2].peak - costs[1].peak
        yield (
            f"{how:<15s}{c.activations / GIB:>9.3g}{c.heads / GIB:>9.3g}{c.backward / GIB:>10.3g}"
            f"{c.peak / GIB:>9.3g}{more / GIB:>11.3g}{c.flops / 1e12:>12.4g}"
        )
    yield (
        "blocks: kept from forward to backward; on top of them heads and losses, later backward.  "
        f"GiB below: {CONTEXT / GIB:.1f} for CUDA's context and workspaces included; up to "
        f"{GPU_SHARE:.0%} of a GPU is planned with."
    )


def report(cfg, stage, loss, size, total, hardware, **kind):
    """The plan as lines; size (num_frames, height, width), total: clips, kind: half, muon."""
    counts = {
        how: {b: count(cfg, stage, loss, (b, *size), checkpointing=how, **kind) for b in (1, 2)}
        for how in (CHECKPOINTING if stage else CHECKPOINTING[:1])
    }
    yield (
        f"stage {stage}, {size[0]} x {size[1]} x {size[2]}, global batch {total}.  GiB per rank, "
        f"counted on fake tensors in {'bf16' if kind['half'] else 'fp32'}; nothing was allocated."
    )
    yield from cost_lines(counts)
    yield (
        f"{'GPUs':<14s} checkpoint_activations  shard (shard_optimizer, shard_weights)  "
        "batch_size  grad_accum     GiB  planned, not measured"
    )
    for gpus, gigabytes in hardware:
        found = settings(counts, gpus, gigabytes, total, stage)
        line = f"{f'{gpus} x {gigabytes:g} GB':<14s}"
        if total % gpus:
            yield f"{line}cannot share a global batch of {total}"
        elif found:
            yield (
                f"{line}{found.checkpointing:>23s}{found.sharding:>40s}{found.batch_size:>12d}"
                f"{found.grad_accum:>12d}{found.bytes / GIB:>8.1f}"
            )
            yield from network_lines(counts[found.checkpointing][1], found, gpus)
        else:
            tried = ways(counts, gpus, stage)
            least = min(needs(counts[how], 1, sharding, gpus) for how, sharding in tried)
            yield f"{line}does not fit: one clip needs {least / GIB:.1f} GiB in every way"
