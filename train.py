"""Train one stage of FantasyWorld: `python train.py CONFIG.py [--key=value ...]`, or the same under torchrun.

    stage 0  video branch from scratch (demo only)      writes OUT/{training.log, starts.jsonl, tensorboard/, eval/,
    stage 1  geometry branch on the frozen video branch         step-N.safetensors, step-N.optim.safetensors,
    stage 2  + camera adapters + exchange                       latest.safetensors}

Every option below is a plain global; a config file and --key=value override them.  World size 1 is the same code.
The batch of a step (clips, noise, sigma, drops) is a pure function of (seed, step, position in the global batch), so a
resumed run needs no random state, and neither the number of ranks nor of loader workers changes what is trained on.
SIGTERM or Ctrl-C saves and leaves with 128 + the signal's number.  `python train.py --check CKPT` examines a file."""

import json
import math
import pathlib
import resource
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel

import config
from data import CachedClips, collate, prepare
from geometry import clip_mean, geometry_losses
from lib.checkpoints import (
    describe,
    link_latest,
    load_optimizer,
    newest_whole,
    save_checkpoint,
    tidy,
    training_state,
)
from lib.distributed import end_processes, from_first, shard, start_processes, whole
from lib.evaluate import evaluate, evaluate_only
from lib.guards import BadSteps, Stop, Watch, ignore_signals
from lib.log import Records, changed_options, provenance
from lib.plan import HARDWARE, Count, report
from lib.weights import load_weights, metadata_of, open_model, read_tensors
from model import CHECKPOINTING, PRESETS, flow_matching_loss, shift_sigma

# ---- what
preset = "1.3b"  # 1.3b, 14b or demo: widths in model.PRESETS

model_overrides = {}  # single fields of model.Config, e.g. {"num_pcb": 10}

stage = 1

data_dir = "data/train"  # has metadata.json and the caches that `python data.py encode` wrote

skip_bad = (
    False  # leave out clips whose caches are missing or damaged, instead of refusing to start
)

follow_links = False  # the dataset's files and folders may be links that lead out of data_dir

out_dir = "outputs/stage1"

wan_dir = ""  # folder of the Wan2.1 weights (or of a stage 0 run); "" = random, stage 0 only

random_wan = False  # allow stages 1 and 2 on a random video branch (benchmarks, tests)

init_from = (
    ""  # stage 2: the stage 1 checkpoint or a release's model.pth, required; stage 1: also VGGT-1B;
)

# eval_only: one or several, comma-separated
resume = "auto"  # "auto": newest whole checkpoint of out_dir; "": start afresh; or a file

# ---- how much
height, width, num_frames = 336, 592, 21

batch_size, grad_accum = (
    8,
    1,
)  # per GPU and micro-step; global batch = batch_size * grad_accum * GPUs

max_steps, save_every, log_every, eval_every = 20000, 1000, 10, 1000

keep_last, keep_every = (
    3,
    0,
)  # checkpoints to keep: the newest ones, and the weights of every multiple of keep_every

eval_clips, eval_only = 16, False

eval_sigma = 0.1  # noise level of the geometry read-out; the release reads out at 0.0926

eval_more_sigmas = (0.5, 0.9)  # further noise levels of --eval_only=True

# ---- optimisation
learning_rate, min_lr, warmup_steps, lr_schedule = (
    1e-5,
    0.0,
    100,
    "constant",
)  # constant, cosine or linear

weight_decay, beta2, grad_clip = 0.01, 0.999, 1.0

shift, pose_dropout, prompt_dropout, image_dropout = 5.0, 0.1, 0.1, 0.1  # dropped for whole clips

lambda_diffusion, lambda_geo, depth_mode, alpha_tgm, beta_frame = 1.0, 1.0, "metric", 10.0, 1.0

gamma_conf, camera_delta, camera_weight = 0.2, 0.1, 3.0

tgm_signed = True  # False: TGM as in the VDA paper, ||dp| - |dg||, blind to the direction of change

valid_quantile = (
    1.0  # 0.98: a clip's largest errors are taken for wrong labels and left out, as in VGGT
)

normal_weight = 0.0  # of a loss on the surface normals of the point map

geo_sigma_power = 0.0  # geometry loss of a clip is weighted by (1 - sigma) ** this

max_bad_steps, spike_guard = (
    10,
    0.0,
)  # end after so many non-finite steps in a row; skip norms over guard * mean

late_limits = {
    "depth": 0.2,
    "point": 0.5,
    "camera": 0.1,
}  # warn when a loss is above this late in the run

# ---- machine
device, seed, num_workers, compile = "auto", 0, 2, False

checkpoint_activations = "none"  # or selective (keeps attention, wide MLPs), attention, full: less memory, more recomputation

shard_optimizer = (
    False  # every rank keeps AdamW's moments of its share of the parameters (ZeRO stage 1)
)

shard_weights = (
    False  # every rank keeps its share of all weights, gradients and moments (FSDP2, ZeRO stage 3)
)

plan, plan_gpus, plan_gb = (
    False,
    8,
    80,
)  # print memory, FLOPs and the settings that fit, then stop; see lib/plan.py

step_timeout, wait_timeout = (
    600,
    3600,
)  # seconds a rank waits for the others: in a step; around saving, evaluating

on_save_error = "continue"  # or "stop", when the disk is full

precision = (
    "auto"  # bf16: frozen matrices in bf16, the rest under autocast; fp32; auto: bf16 on a GPU
)


# --------------------------------------------------------------------------------------------------------- one batch
def generator(*key):
    """A CPU generator for one purpose: the same numbers on every device, rank count and after every resume."""
    mixed = 0
    for k in key:
        mixed = (mixed * 0x9E3779B97F4A7C15 + k + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


class Batches:
    """Index lists of this rank's micro-batches from a step on: a pure function of (seed, step), no state to save."""

    def __init__(self, clips, first_step, rank, world):
        self.clips, self.first_step, self.rank, self.world = clips, first_step, rank, world

    def positions(self, step, micro):
        """Positions of this rank's micro-batch in the global batch of a step."""
        start = (micro * self.world + self.rank) * batch_size
        return range(start, start + batch_size)

    def __iter__(self):
        epoch, order = -1, None
        for step in range(self.first_step, max_steps):
            for micro in range(grad_accum):
                indices = []
                for position in self.positions(step, micro):
                    n = step * batch_size * grad_accum * self.world + position
                    if n // self.clips != epoch:
                        epoch = n // self.clips
                        order = torch.randperm(
                            self.clips, generator=generator(seed, 1, epoch)
                        ).tolist()
                    indices.append(order[n % self.clips])
                yield indices


def draw(b, step, positions, total, empty_text):
    """The random part of a step, keyed by (seed, step, position): noise, sigma stratified over the global batch, and
    which clips lose their camera, prompt or start image -> noise, sigma, pose_keep, batch."""
    noise, uniform = [], []
    for position in positions:
        g = generator(seed, 2, step, position)
        u = torch.rand(4, generator=g)
        u[0] = (position + u[0]) / total
        uniform.append(u)
        noise.append(torch.randn(b["latents"].shape[1:], generator=g))
    u, dev = torch.stack(uniform), b["latents"].device

    def send(x):  # a copy from memory that is not pinned waits for the device
        return (x.pin_memory() if dev.type == "cuda" else x).to(dev, non_blocking=True)

    pose_keep, image_keep = (
        send((u[:, i] >= p).float()) for i, p in ((1, pose_dropout), (3, image_dropout))
    )
    if "relative" in b:  # without metric depth, translations have no scene unit
        pose_keep = pose_keep * ~b["relative"]
    text = [
        text if keep else empty_text for text, keep in zip(b["text"], u[:, 2] >= prompt_dropout)
    ]
    y = None if b["y"] is None else b["y"] * image_keep.view(-1, 1, 1, 1, 1)
    image = {"clip": b["clip"] * image_keep.view(-1, 1, 1)} if "clip" in b else {}
    return (
        send(torch.stack(noise)),
        send(shift_sigma(u[:, 0], shift)),
        pose_keep,
        dict(b, **image, text=text, y=y),
    )


def by_sigma(sigma, **per_clip):
    """Sums of per-clip values in four bins of the noise level, and counts: (4, names + 1) on the device."""
    values = torch.stack(
        [*(v.detach().float() for v in per_clip.values()), torch.ones_like(sigma)], 1
    )
    return torch.zeros(4, values.shape[1], device=sigma.device).index_add(
        0, (4 * sigma).long().clamp(max=3), values
    )


def compute_loss(model, b, noise, sigma, pose_keep, options, video):
    """Forward and all losses of one micro-batch -> scalar loss, dict of detached parts, by_sigma of the main ones."""
    s = sigma.view(-1, 1, 1, 1, 1)
    x = (1 - s) * b["latents"] + s * noise
    out = model(
        x,
        1000 * sigma,
        b["text"],
        y=b["y"],
        clip=b.get("clip"),
        plucker=b["plucker"],
        poses=b["pose_enc"],
        keep=pose_keep,
        video=video,
    )
    loss, parts, per_clip = torch.zeros((), device=x.device), {}, {}
    if out["velocity"] is not None:
        per_clip["diffusion"] = flow_matching_loss(out["velocity"], b["latents"], noise)
        diffusion = per_clip["diffusion"].mean()
        loss, parts["diffusion"] = loss + lambda_diffusion * diffusion, diffusion.detach()
    if "depth" in out:
        geo, geo_parts = geometry_losses(
            out, dict(b, geo_weight=(1 - sigma) ** geo_sigma_power), options
        )
        loss, parts = loss + lambda_geo * geo, {**parts, **geo_parts}
        per_clip["depth_l1"] = clip_mean((out["depth"] - b["depth"]).abs() * b["mask"], b["mask"])
    return (
        loss,
        {**parts, "total": loss.detach()},
        {name: by_sigma(sigma, value=v) for name, v in per_clip.items()},
    )


class Examples:
    """Clips as evaluation reads them: batches of one, prepared, with noise that is the same in every run."""

    def __init__(self, clips, model, dev):
        self.clips, self.model, self.dev = clips, model, dev

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        b = prepare(collate([self.clips[i]]), self.model.dit.in_dim, self.dev, self.model.rays)
        noise = torch.randn(b["latents"].shape, generator=generator(seed, 3, i))
        return dict(b, noise=noise.to(self.dev))

    def frames(self, i):
        """uint8 (T, H, W, 3) of a clip for a picture, or None."""
        return self.clips.frames(i)


# --------------------------------------------------------------------------------------------------------------- main
def check_options():
    """Everything that can be wrong is refused before anything slow."""
    if precision not in ("auto", "bf16", "fp32"):
        raise SystemExit(f"precision = {precision!r}: wanted auto, bf16 or fp32")
    if stage not in (0, 1, 2):
        raise SystemExit(f"stage = {stage}: wanted 0, 1 or 2")
    if preset not in PRESETS:
        raise SystemExit(f"preset = {preset!r}: wanted one of {', '.join(PRESETS)}")
    for key, known in (
        ("lr_schedule", ("constant", "cosine", "linear")),
        ("depth_mode", ("metric", "ssi")),
        ("checkpoint_activations", CHECKPOINTING),
    ):
        if globals()[key] not in known:
            raise SystemExit(f"{key} = {globals()[key]!r}: wanted one of {', '.join(known)}")
    if on_save_error not in ("continue", "stop"):
        raise SystemExit(f"on_save_error = {on_save_error!r}: wanted continue or stop")
    for key in (
        "batch_size",
        "grad_accum",
        "log_every",
        "save_every",
        "keep_last",
        "max_bad_steps",
        "step_timeout",
    ):
        if globals()[key] < 1:
            raise SystemExit(f"{key} = {globals()[key]}: wanted at least 1")
    needed = (2, 10) if checkpoint_activations in ("selective", "attention") else (2, 5)
    if (
        compile and torch.__version__ < needed
    ):  # older ones skip blocks under a policy of checkpointing; 2.4 shares no graph
        raise SystemExit(
            f"compile with checkpoint_activations = {checkpoint_activations} needs torch "
            f"{'.'.join(map(str, needed))} or newer, this is {torch.__version__}; leave compile out"
        )
    if shard_weights and shard_optimizer:
        raise SystemExit("shard_weights shards the optimizer too: leave shard_optimizer out")
    if not 0 < valid_quantile <= 1:
        raise SystemExit(
            f"valid_quantile = {valid_quantile}: wanted a share above 0, at most 1 (all)"
        )
    if num_frames < 5 or num_frames % 4 != 1 or height % 16 or width % 16:
        raise SystemExit(
            f"num_frames = {num_frames}, height x width = {height} x {width}: the video latents need "
            f"4k + 1 frames (21, 81) and multiples of 16"
        )
    if plan:
        return
    if stage and not wan_dir and not random_wan:
        raise SystemExit(
            f"stage {stage} needs --wan_dir=FOLDER (Wan2.1 weights, or the run folder of stage 0)"
        )
    if (
        stage == 2
        and not eval_only
        and (not init_from or metadata_of(init_from).get("stage") not in ("1", "2"))
    ):
        raise SystemExit(
            f"stage 2 starts from a stage 1 checkpoint or a release's model.pth; init_from = "
            f"{init_from!r} is neither. "
            f"Train config/stage1.py first, then --init_from=outputs/stage1/latest.safetensors"
        )
    if eval_only and not init_from:
        raise SystemExit("eval_only needs --init_from=CHECKPOINT[,CHECKPOINT ...]")
    for path in filter(None, init_from.split(",")):
        metadata_of(path)


def check_depth_kinds(clips, master):
    """Clips whose depth has no unit: their depth head trains with the ssi loss; what needs a unit refuses them."""
    count = {split: c.count_relative() for split, c in clips.items()}
    if count.get("val") and stage:
        raise SystemExit(
            f"{data_dir}: {count['val']} validation clips have depth without a unit; their errors would "
            "mean nothing. Give depth_scale in metadata.json, or choose other clips for the split val."
        )
    if count["train"] and stage == 2:
        raise SystemExit(
            f"{data_dir}: {count['train']} clips have depth without a unit; stage 2 conditions on cameras "
            "in units of the scene. Train them in stage 1, or leave them out."
        )
    if count["train"] and stage and master:
        print(
            f"warning: {count['train']} of {len(clips['train'])} clips have depth without a unit (8-bit or min-max "
            "normalised); they train the depth head alone, with depth_mode ssi",
            flush=True,
        )


def make_optimizer(model, world, group=None):
    """AdamW; no decay on norms, gates, biases, modulation and tokens.  Sharded: each rank updates its share of the
    parameters and sends them to the others, so the moments are kept once in all (ZeRO, Rajbhandari et al. 2020)."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.dim() < 2 or n.endswith(("modulation", "_token", "_tokens"))]
    ids = {id(p) for p in plain}
    groups = [
        dict(params=[p for _, p in named if id(p) not in ids], weight_decay=weight_decay),
        dict(params=plain, weight_decay=0.0),
    ]
    how = dict(lr=learning_rate, betas=(0.9, beta2), fused=True)
    if shard_optimizer and world > 1:
        from torch.distributed.optim import (
            ZeroRedundancyOptimizer,
        )  # a second: it compiles TorchScript we do not use

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, process_group=group, **how)
    return torch.optim.AdamW(groups, **how)


def compile_blocks(model):
    """Half blocks, which the exchange lies between; equal ones share their graphs."""
    for block in [*model.dit.blocks, *model.frame_blocks, *model.global_blocks]:
        block.attend, block.feed_forward = (
            torch.compile(block.attend),
            torch.compile(block.feed_forward),
        )


def learning_rate_at(step):
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    down = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[
        lr_schedule
    ]
    return min_lr + (learning_rate - min_lr) * down


def matmul_peak(dev):
    """Measured FLOP/s of one large matrix product: the yardstick of the MFU column."""
    n, dtype = (8192, torch.bfloat16) if dev.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=dev, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def count_flops(model, clips, dev, autocast, options, video):
    """FLOPs of one micro-step's forward and backward.  In a pass of its own: under the counter some operations take
    another path, and a resumed run would differ from an uninterrupted one in the last bit."""
    b = prepare(
        collate([clips[i % len(clips)] for i in range(batch_size)]),
        model.dit.in_dim,
        dev,
        model.rays,
    )
    noise, sigma, pose_keep, b = draw(b, 0, range(batch_size), batch_size, b["text"][0])
    with Count() as counter:
        with autocast:
            loss, *_ = compute_loss(model, b, noise, sigma, pose_keep, options, video)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.flops


def print_plan(options):
    """--plan=True: what the configured step needs and which settings fit; the global batch is the config's on 8 GPUs."""
    hardware = dict.fromkeys((*HARDWARE, (plan_gpus, plan_gb)))
    for line in report(
        replace(PRESETS[preset], **model_overrides),
        stage,
        lambda model, *batch: compute_loss(model, *batch, options, stage != 1)[0],
        (num_frames, height, width),
        8 * batch_size * grad_accum,
        hardware,
        precision != "fp32",
    ):
        print(line, flush=True)


def memory_gb(dev):
    if dev.type == "cuda":
        return torch.cuda.max_memory_allocated(dev) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def clock(seconds):
    return f"{int(seconds) // 3600:d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def choose_start(out):
    """The checkpoint to go on from ("" = none), after tidying what a killed run left; for rank 0."""
    if out.is_dir():
        tidy(out)
    newest = newest_whole(out)
    if resume == "auto":
        if newest is not None:
            link_latest(out, newest)
        return "" if newest is None else f"{out}/step-{newest}.safetensors"
    first = int(metadata_of(resume).get("step", 0)) if resume else 0
    if newest is not None and newest > first:
        raise SystemExit(
            f"{out} holds checkpoints later than step {first}, up to {newest}; this run would mix with them. "
            f"Use another --out_dir, or delete them"
        )
    return resume


def keep_global_batch(meta, world):
    """On another number of GPUs: set batch_size and grad_accum so that the run's global batch stays; returns a remark."""
    global batch_size, grad_accum
    before, total = json.loads(meta["train_config"]), int(meta.get("global_batch", 0))
    same = (before["batch_size"], before["grad_accum"]) == (batch_size, grad_accum)
    if not total or not same or total == batch_size * grad_accum * world:
        return []
    if total % world:
        raise SystemExit(
            f"the run to resume has a global batch of {total}, which {world} GPUs cannot share; start a "
            f"number of GPUs that divides it, or set --batch_size and --grad_accum to change it"
        )
    batch_size = max(b for b in range(1, batch_size + 1) if total % (b * world) == 0)
    grad_accum = total // (batch_size * world)
    return [
        f"global batch kept at {total} on {world} GPUs: batch_size {batch_size}, grad_accum {grad_accum}"
    ]


def resume_from(path, model, optimizer, options, world):
    """Load a checkpoint of this stage and its optimizer state -> its metadata, remarks for the log."""
    meta = metadata_of(path)
    if meta.get("stage") != str(stage):
        raise SystemExit(
            f"resume = {path} is of stage {meta.get('stage')}, this run is stage {stage}; "
            f"use --init_from to start a stage from another one, or another --out_dir"
        )
    load_weights(model, path)
    load_optimizer(
        pathlib.Path(path).with_name(f"step-{meta['step']}.optim.safetensors"), model, optimizer
    )
    changes = changed_options(json.loads(meta["train_config"]), options)
    remarks = [f"changed since step {meta['step']}: {c}" for c in changes]
    for name in ("learning_rate", "min_lr", "warmup_steps", "lr_schedule"):
        remarks += [
            f"warning: the learning rate changes at this resume: {c}"
            for c in changes
            if c.startswith(name + " ")
        ]
    return meta, remarks + keep_global_batch(meta, world)


def average(values, group):
    """Dict of scalars of this rank -> means over the ranks, floats."""
    stacked = torch.stack([torch.as_tensor(v, dtype=torch.float32) for v in values.values()])
    if group is not None:
        dist.all_reduce(stacked, group=group)
        stacked /= dist.get_world_size()
    return dict(zip(values, stacked.tolist()))


def by_bin(seen, group):
    """Sums of by_sigma since the last line of the log -> {"sigma/NAME 0.25-0.50": mean over all ranks}."""
    scalars = {}
    for key, value in seen.items():
        if group is not None:
            dist.all_reduce(value, group=group)
        scalars.update(
            {
                f"sigma/{key} {k / 4:.2f}-{(k + 1) / 4:.2f}": total / n
                for k, (total, n) in enumerate(value.tolist())
                if n
            }
        )
    return scalars


def main(options):
    check_options()
    if plan:
        return print_plan(SimpleNamespace(**options))
    rank, world, dev, group = start_processes(device, step_timeout, wait_timeout)
    torch.manual_seed(seed)
    out, master = pathlib.Path(out_dir), rank == 0

    # ---- model and data
    cfg = replace(PRESETS[preset], **model_overrides)
    half = precision == "bf16" or precision == "auto" and dev.type == "cuda"
    spread = (
        shard_weights and world > 1
    )  # autocast would keep a bf16 copy of every weight once gathered
    autocast = (
        torch.autocast(dev.type, torch.bfloat16, cache_enabled=not spread)
        if half
        else nullcontext()
    )
    origin = metadata_of(init_from.split(",")[0]) if init_from else {}
    model = open_model(
        origin, cfg, wan_dir, "cpu" if spread else dev, torch.bfloat16 if half and stage else None
    )
    model.set_stage(stage).checkpoint_activations = checkpoint_activations
    if spread:
        shard(model, group, dev)
    sources = list(filter(None, init_from.split(",")))
    splits = ("train", "val") if eval_every or eval_only else ("train",)
    clips = {
        split: CachedClips(
            data_dir, split, height, width, num_frames, wan_dir, skip_bad, follow_links
        )
        for split in splits
    }
    in_dim, settings = model.dit.in_dim, SimpleNamespace(**options)
    check_depth_kinds(clips, master)
    if eval_only:
        examples = {split: Examples(c, model, dev) for split, c in clips.items()}
        return evaluate_only(model, examples, out, sources, dev, autocast, settings, rank, world)

    # ---- optimizer, resume
    optimizer, meta, remarks = make_optimizer(model, world, group), {}, []
    start_from = from_first(choose_start(out) if master else None)
    if start_from:
        meta, remarks = resume_from(start_from, model, optimizer, options, world)
    elif (
        sources and origin.get("foreign") != "release"
    ):  # a release's weights are in the model already
        load_weights(model, sources[0])
    first_step, total = int(meta.get("step", 0)), batch_size * grad_accum * world
    video, wrapped = stage != 1, model
    flops = count_flops(model, clips["train"], dev, autocast, settings, video)
    if compile:
        compile_blocks(model)
    if world > 1:
        dist.barrier()  # loading took each rank its own time; a step must not
        wrapped = (
            model
            if spread
            else DistributedDataParallel(
                model,
                gradient_as_bucket_view=True,
                process_group=group,
                device_ids=[dev] if dev.type == "cuda" else None,
            )
        )

    # ---- records
    metadata = dict(
        provenance(options),
        format="fantasyworld",
        stage=str(stage),
        global_batch=str(total),
        world=str(world),
        model_config=json.dumps(asdict(model.cfg)),
        release=origin.get("release", ""),
    )
    records = Records(out if master else None, metadata, first_step)
    log, watch = records.line, Watch(max_steps, late_limits, records.line)
    trained = [p for p in model.parameters() if p.requires_grad]
    log(
        f"# stage {stage}, {sum(p.numel() for p in trained) / 1e6:.1f}M trainable, clips {len(clips['train'])} + "
        f"{len(clips.get('val', ()))} val, global batch {batch_size} x {grad_accum} x {world} = {total}, {dev}, "
        f"git {metadata['git']}, steps {first_step} .. {max_steps}"
    )
    for remark in remarks:
        log(f"# {remark}")

    bad = BadSteps(group, spike_guard, max_bad_steps, float(meta.get("norm_mean", 0)), dev)

    def save(step):
        """Write the checkpoint of a step on rank 0, every rank waiting; a failed write ends the run if it should."""
        bad.report(log)
        records.flush()
        content, error = training_state(model, optimizer), ""
        if master:
            try:
                told = dict(metadata, norm_mean=repr(float(bad.mean)))
                save_checkpoint(out, step, *content, told, keep_last, keep_every)
            except (OSError, SafetensorError) as caught:
                error = f"step {step} is not saved ({caught}); earlier checkpoints in {out} are untouched. Free some space"
                log(f"# warning: {error}")
        if (error := from_first(error)) and (on_save_error == "stop" or step == max_steps):
            raise SystemExit(f"{error}, then start the same command again")
        return not error

    # ---- loop
    batches = Batches(len(clips["train"]), first_step, rank, world)
    loader = torch.utils.data.DataLoader(
        clips["train"],
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=dev.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    seen, peak, started, tick, since = (
        {},
        matmul_peak(dev),
        time.perf_counter(),
        time.perf_counter(),
        0,
    )
    stop, stopped, done, saved = Stop(group), 0, first_step, first_step
    data = iter(loader)
    empty_text = read_tensors(clips["train"].empty_text)[0]["text"].float().to(dev)
    for step in range(first_step, max_steps):
        lr = learning_rate_at(step)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        sums, losses, names = {}, [], []
        for micro in range(grad_accum):
            if stopped := stop.agreed():
                break
            b = prepare(next(data), in_dim, dev, model.rays)
            noise, sigma, pose_keep, b = draw(
                b, step, batches.positions(step, micro), total, empty_text
            )
            last = micro == grad_accum - 1
            with nullcontext() if last or wrapped is model else wrapped.no_sync():
                with autocast:
                    loss, parts, bins = compute_loss(
                        wrapped, b, noise, sigma, pose_keep, settings, video
                    )
                (loss / grad_accum).backward()
            losses.append(loss.detach())
            names.append(b["id"])
            for key, value in bins.items():
                seen[key] = seen.get(key, 0) + value
            for (
                key,
                value,
            ) in parts.items():  # stays on the device: .item() here would stall every step
                sums[key] = sums.get(key, 0) + value / grad_accum
        if stopped:  # the micro-steps of an unfinished step are repeated by the resume
            break
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, grad_clip))
        bad.judge(optimizer, step, norm, losses, names)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done, since = step + 1, since + 1

        if done % log_every == 0 or done == max_steps:
            bad.report(log)
            scalars = {f"loss/{k}": v for k, v in average(sums, group).items()}
            scalars.update(by_bin(seen, group))
            seen, spent = {}, (time.perf_counter() - tick) / since
            scalars.update(
                learning_rate=lr,
                gradient_norm=float(norm),
                samples_per_second=total / spent,
                gpu_memory=memory_gb(dev),
                mfu=flops * grad_accum / spent / peak,
            )
            left = clock((max_steps - done) * (time.perf_counter() - started) / (done - first_step))
            log(
                f"step {done}/{max_steps} | "
                + " | ".join(
                    f"{k} {v:.4g}" for k, v in scalars.items() if not k.startswith("sigma/")
                )
                + f" | {spent:.3f} s/step | {left} left"
            )
            log(
                f"# sigma step {done} | "
                + " | ".join(
                    f"{k.removeprefix('sigma/')} {v:.4g}"
                    for k, v in scalars.items()
                    if k.startswith("sigma/")
                )
            )
            records.scalars(done, scalars)
            watch.update(done, scalars)
            tick, since = time.perf_counter(), 0
        if done % save_every == 0 or done == max_steps:
            saved = done if save(done) else saved
        if (
            eval_every and done % eval_every == 0
        ):  # after saving: it can take longer than a preemption's grace
            rows = evaluate(
                model,
                Examples(clips["val"], model, dev),
                dev,
                autocast,
                settings,
                rank,
                world,
                lambda image: records.picture(done, image),
            )
            for name, row in rows.items():
                log(
                    f"# val step {done} {name} | "
                    + " | ".join(f"{k} {v:.4g}" for k, v in row.items())
                )
                records.scalars(done, {f"val {name}/{key}": value for key, value in row.items()})
            tick, since = time.perf_counter(), 0
    if stopped and done > saved and save(done):
        saved = done
    log(
        f"# stopped by {signal.Signals(stopped).name} after step {done}; the same command goes on from step {saved}"
        if stopped
        else f"# done: {out / 'latest.safetensors'}, {clock(time.perf_counter() - started)}"
    )
    records.close()
    if world > 1:
        end_processes()
    if stopped:
        raise SystemExit(128 + stopped)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--check"]:
            for path in sys.argv[2:]:
                print(describe(path))
        else:
            main(config.apply(globals(), sys.argv[1:]))
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(
            f"train.py: {str(error).splitlines()[0]} Halve --batch_size and double --grad_accum, or set "
            f"--checkpoint_activations=full"
        ) from None
    except ValueError as error:  # bad input: one line that names it, no traceback
        raise SystemExit(f"train.py: {error}") from None
