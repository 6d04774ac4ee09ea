"""Train one stage of FantasyWorld: `python train.py CONFIG.py [--key=value ...]`, also by torchrun.

    stage 0  video branch from scratch (it made the demo's)
    stage 1  geometry branch on the frozen video branch
    stage 2  + camera adapters + exchange

OUT receives training.log, starts.jsonl, tensorboard/, eval/, step-N.safetensors,
step-N.optim.safetensors and latest.safetensors.  World size 1 is the same code.
The batch of a step (clips, noise, sigma, drops) is a pure function of (seed, step, position in the
global batch).  So a resumed run needs no random state, and neither the number of ranks nor of
loader workers changes what is trained on.
SIGTERM or Ctrl-C saves and leaves with 128 + the signal's number.
`python train.py --check CKPT` examines a checkpoint; --help lists every option."""

import json
import math
import pathlib
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel

import config
from config import option, section
from data import CachedClips, collate, prepare
from geometry import clip_mean, geometry_losses
from lib.checkpoints import (
    describe,
    link_latest,
    load_optimizer,
    newest_valid,
    remove_leftovers,
    save_checkpoint,
    training_state,
)
from lib.distributed import end_processes, from_first, gather_full, shard, start_processes
from lib.evaluate import How, evaluate, evaluate_only
from lib.guards import BadSteps, Stop, Watch, ignore_signals, run_command
from lib.log import Records, Tally, changed_options, clock, memory_gb, provenance
from lib.plan import HARDWARE, flops_of_step, peak_flops, report
from lib.weights import load_weights, metadata_of, open_model, read_tensors
from model import CHECKPOINTING, PRESETS, flow_matching_loss, shift_sigma
from wan import LATENT

# fmt: off
section_1 = section("what")
preset = option("1.3b", "widths of the model, in model.PRESETS", choices=tuple(PRESETS))
model_overrides = option({}, "single fields of model.Config, such as {'num_pcb': 10}")
stage = option(1, "what trains, see the top of this file", choices=(0, 1, 2))
data_dir = option("data/train", "has metadata.json and the caches that data.py encode wrote")
skip_bad = option(False, "leave out clips whose caches are missing or damaged")
follow_links = option(False, "the dataset's files may be links that lead out of data_dir")
out_dir = option("outputs/stage1", "the run folder")
wan_dir = option("", "folder of the Wan weights, or of a stage 0 run; empty: random, for stage 0")
random_wan = option(False, "allow stages 1 and 2 on a random video branch (tests)")
init_from = option("", "stage 2: a stage 1 checkpoint or a release; eval_only: one or more, commas")
resume = option("auto", "auto: newest valid checkpoint of out_dir; empty: afresh; or a file")
section_2 = section("how much")
height = option(336, "pixels, a multiple of 16", low=16)
width = option(592, "pixels, a multiple of 16", low=16)
num_frames = option(21, "pixel frames, 4k + 1", low=5)
batch_size = option(8, "clips per GPU and micro-step", low=1)
grad_accum = option(1, "micro-steps; global batch = batch_size * grad_accum * GPUs", low=1)
max_steps = option(20000, "steps of the whole run", low=1)
save_every = option(1000, "steps between checkpoints", low=1)
log_every = option(10, "steps between lines of training.log", low=1)
eval_every = option(1000, "steps between evaluations; 0: none", low=0)
keep_last = option(3, "newest checkpoints that are kept", low=1)
keep_every = option(0, "also keep the weights of every multiple of this; 0: none", low=0)
eval_clips = option(16, "clips of an evaluation", low=1)
eval_only = option(False, "print the table of the checkpoints in init_from, and stop")
eval_sigma = option(0.1, "noise level of the geometry read-out", above=0, high=1)
eval_more_sigmas = option((0.5, 0.9), "further noise levels of eval_only")
section_3 = section("optimisation")
learning_rate = option(1e-5, "of AdamW; 5e-6 is the guide's fallback", above=0)
min_lr = option(0.0, "where a falling schedule ends", low=0)
warmup_steps = option(100, "steps of linear rise", low=0)
lr_schedule = option("constant", "after the rise", choices=("constant", "cosine", "linear"))
weight_decay = option(0.01, "of matrices; norms, gates, biases and tokens have none", low=0)
beta2 = option(0.999, "of AdamW", low=0, high=0.99999)
grad_clip = option(1.0, "largest gradient norm; 0: no clipping", low=0)
shift = option(5.0, "of the noise levels: more of them near 1", above=0)
pose_dropout = option(0.1, "share of clips that lose their camera", low=0, high=1)
prompt_dropout = option(0.1, "share of clips that lose their prompt", low=0, high=1)
image_dropout = option(0.1, "share of clips that lose their start image", low=0, high=1)
lambda_diffusion = option(1.0, "weight of the diffusion loss", low=0)
lambda_geo = option(1.0, "weight of the geometry losses together", low=0)
depth_mode = option("metric", "ssi: scale and shift are fitted first", choices=("metric", "ssi"))
alpha_tgm = option(10.0, "weight of the temporal gradient loss of depth", low=0)
beta_frame = option(1.0, "weight of the depth loss frame by frame", low=0)
gamma_conf = option(0.2, "weight of the confidence's logarithm", low=0)
camera_delta = option(0.1, "where the camera's Huber loss turns linear", above=0)
camera_weight = option(3.0, "weight of the camera loss", low=0)
tgm_signed = option(True, "False: |dp| - |dg| as the VDA paper has it, blind to the direction")
valid_quantile = option(1.0, "0.98: a clip's largest errors are wrong labels", above=0, high=1)
normal_weight = option(0.0, "weight of a loss on the surface normals of the point map", low=0)
geo_sigma_power = option(0.0, "a clip's geometry loss is weighted by (1 - sigma) ** this", low=0)
max_bad_steps = option(10, "so many steps in a row that are not finite end the run", low=1)
spike_guard = option(0.0, "skip gradient norms over this times their mean; 0: off", low=0)
section_4 = section("machine")
device = option("auto", "auto, cpu or cuda")
seed = option(0, "of everything random", low=0)
num_workers = option(2, "processes that load clips", low=0)
compile = option(False, "torch.compile the blocks")  # noqa: A001  (the option's name since the start)
checkpoint_activations = option("none", "less memory, more recomputation", choices=CHECKPOINTING)
shard_optimizer = option(False, "each rank keeps AdamW's moments of its share (ZeRO stage 1)")
shard_weights = option(False, "each rank keeps its share of all weights (FSDP2, ZeRO stage 3)")
plan = option(False, "print memory, work and the settings that fit, and stop")
plan_gpus = option(8, "of the plan: GPUs", low=1)
plan_gb = option(80, "of the plan: memory of each", low=1)
step_timeout = option(600, "seconds that a rank waits for the others in a step", low=1)
wait_timeout = option(3600, "the same around loading, saving and evaluation", low=1)
precision = option("auto", "auto: bf16 on a GPU", choices=("auto", "bf16", "fp32"))
# fmt: on


# --------------------------------------------------------------------------------------- one batch
def generator(*key):
    """A CPU generator for one purpose: the same numbers on every device and rank count."""
    mixed = 0
    for k in key:
        mixed = (mixed * 0x9E3779B97F4A7C15 + k + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


class Batches:
    """Index lists of this rank's micro-batches: a pure function of (seed, step), without state."""

    def __init__(self, clips, first_step, rank, world, options):
        self.clips, self.first_step, self.options = clips, first_step, options
        self.rank, self.world = rank, world

    def positions(self, step, micro):
        """Positions of this rank's micro-batch in the global batch of a step."""
        size = self.options.batch_size
        start = (micro * self.world + self.rank) * size
        return range(start, start + size)

    def __iter__(self):
        total = self.options.batch_size * self.options.grad_accum * self.world
        epoch, order = -1, None
        for step in range(self.first_step, self.options.max_steps):
            for micro in range(self.options.grad_accum):
                indices = []
                for position in self.positions(step, micro):
                    n = step * total + position
                    if n // self.clips != epoch:
                        epoch = n // self.clips
                        g = generator(self.options.seed, 1, epoch)
                        # every clip once an epoch
                        order = torch.randperm(self.clips, generator=g).tolist()
                    indices.append(order[n % self.clips])
                yield indices


def draw(b, step, positions, total, empty_text, options):
    """The random part of a micro-batch, keyed by (seed, step, position).

    b         prepared batch;  positions, total: its place in the global batch of `total` clips
    returns   noise as the latents; sigma (B,), stratified over the global batch; keep (B,) 0/1, 0
              for clips that lose their camera; the batch with some prompts and images taken away"""
    noise, uniform = [], []
    for position in positions:
        g = generator(options.seed, 2, step, position)
        u = torch.rand(4, generator=g)
        u[0] = (position + u[0]) / total  # stratified: the batch covers all noise levels evenly
        uniform.append(u)
        # (16, f, h, w), on the CPU: device-independent
        noise.append(torch.randn(b["latents"].shape[1:], generator=g))
    u, dev = torch.stack(uniform), b["latents"].device

    def send(x):  # a copy from memory that is not pinned waits for the device
        return (x.pin_memory() if dev.type == "cuda" else x).to(dev, non_blocking=True)

    keep = send((u[:, 1] >= options.pose_dropout).float())
    image_keep = send((u[:, 3] >= options.image_dropout).float())
    if "relative" in b:  # without metric depth, translations have no scene unit
        keep = keep * ~b["relative"]  # 0 hides the camera
    told = u[:, 2] >= options.prompt_dropout
    text = [text if stays else empty_text for text, stays in zip(b["text"], told)]
    changed = dict(text=text, y=None)
    if b["y"] is not None:
        changed["y"] = b["y"] * image_keep.view(-1, 1, 1, 1, 1)
    if "clip" in b:
        changed["clip"] = b["clip"] * image_keep.view(-1, 1, 1)
    sigma = send(shift_sigma(u[:, 0], options.shift))  # (B,)
    return send(torch.stack(noise)), sigma, keep, {**b, **changed}


def by_sigma(sigma, value):
    """Sums of per-clip values in four bins of the noise level, and counts: (4, 2) on the device."""
    values = torch.stack([value.detach().float(), torch.ones_like(sigma)], 1)
    bins = (4 * sigma).long().clamp(max=3)
    return torch.zeros(4, 2, device=sigma.device).index_add(0, bins, values)


def compute_loss(model, b, noise, *, sigma, keep, options, video):
    """Forward and all losses of one micro-batch: the whole objective.

    returns  scalar loss; dict of detached parts; by_sigma of the diffusion and depth errors"""
    s = sigma.view(-1, 1, 1, 1, 1)
    x = (1 - s) * b["latents"] + s * noise  # (B, 16, f, h, w)
    camera = dict(plucker=b["plucker"], poses=b["pose_enc"], keep=keep)
    out = model(x, 1000 * sigma, b["text"], b["y"], b.get("clip"), video=video, **camera)
    loss, parts, bins = torch.zeros((), device=x.device), {}, {}
    if out["velocity"] is not None:
        per_clip = flow_matching_loss(out["velocity"], b["latents"], noise)
        bins["diffusion"] = by_sigma(sigma, per_clip)
        diffusion = per_clip.mean()
        # no loss there in stage 1
        loss, parts["diffusion"] = loss + options.lambda_diffusion * diffusion, diffusion.detach()
    if "depth" in out:
        weighted = dict(b, geo_weight=(1 - sigma) ** options.geo_sigma_power)
        geo, geo_parts = geometry_losses(out, weighted, options)
        loss, parts = loss + options.lambda_geo * geo, {**parts, **geo_parts}
        error = (out["depth"] - b["depth"]).abs() * b["mask"]  # (B, T, H, W), 0 where unknown
        bins["depth_l1"] = by_sigma(sigma, clip_mean(error, b["mask"]))
    return loss, {**parts, "total": loss.detach()}, bins


class Examples:
    """Clips as evaluation reads them: prepared batches of one; the noise is equal in all runs."""

    def __init__(self, clips, model, dev, seed):
        self.clips, self.model, self.dev, self.seed = clips, model, dev, seed

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        b = prepare(collate([self.clips[i]]), self.model.cfg.in_dim, self.dev, self.model.rays)
        noise = torch.randn(b["latents"].shape, generator=generator(self.seed, 3, i))
        return dict(b, noise=noise.to(self.dev))

    def frames(self, i):
        """uint8 (T, H, W, 3) of a clip for a picture, or None."""
        return self.clips.frames(i)


# ------------------------------------------------------------------------------------- the options
def check_options(options):
    """What ranges alone cannot say is refused before anything slow."""
    recompute = options.checkpoint_activations
    # Older ones skip blocks under a policy of checkpointing; 2.4 shares no graph.
    needed = (2, 10) if recompute in ("selective", "attention") else (2, 5)
    if options.compile and torch.__version__ < needed:
        raise ValueError(
            f"compile with checkpoint_activations = {recompute} needs torch "
            f"{'.'.join(map(str, needed))} or newer, this is {torch.__version__}; leave compile out"
        )
    if options.shard_weights and options.shard_optimizer:
        raise ValueError("shard_weights shards the optimizer too: leave shard_optimizer out")
    size = options.num_frames, options.height, options.width
    if size != LATENT.nearest(*size):
        found = "num_frames = {}, height x width = {} x {}".format(*size)
        raise ValueError(f"{found}; wanted 4k + 1 frames (21, 81) and multiples of 16")
    if options.plan:
        return
    if options.stage and not options.wan_dir and not options.random_wan:
        folder = "FOLDER (Wan2.1 weights, or the run folder of stage 0)"
        raise ValueError(f"stage {options.stage} needs --wan_dir={folder}")
    origin = options.init_from
    if options.stage == 2 and not options.eval_only:
        if not origin or metadata_of(origin).get("stage") not in ("1", "2"):
            raise ValueError(
                f"stage 2 starts from a stage 1 checkpoint or a release's model.pth; init_from = "
                f"{origin!r} is neither. Train config/stage1.py first, then "
                f"--init_from=outputs/stage1/latest.safetensors"
            )
    if options.eval_only and not origin:
        raise ValueError("eval_only needs --init_from=CHECKPOINT[,CHECKPOINT ...]")
    for path in filter(None, origin.split(",")):
        metadata_of(path)


def check_depth_kinds(clips, options, master):
    """Clips whose depth has no unit train the depth head alone; what needs a unit refuses them."""
    count = {split: c.count_relative() for split, c in clips.items()}
    where = options.data_dir
    if count.get("val") and options.stage:
        raise ValueError(
            f"{where}: {count['val']} validation clips have depth without a unit; their errors "
            "would mean nothing. Give depth_scale in metadata.json, or choose other clips for the "
            "split val."
        )
    if count["train"] and options.stage == 2:
        raise ValueError(
            f"{where}: {count['train']} clips have depth without a unit; stage 2 conditions on "
            "cameras in units of the scene. Train them in stage 1, or leave them out."
        )
    if count["train"] and options.stage and master:
        print(
            f"warning: {count['train']} of {len(clips['train'])} clips have depth without a unit "
            "(8-bit or min-max normalised); they train the depth head alone, with depth_mode ssi",
            flush=True,
        )


def print_plan(options):
    """--plan=True: what the step needs and which settings fit; the global batch is 8 GPUs'."""
    hardware = dict.fromkeys((*HARDWARE, (options.plan_gpus, options.plan_gb)))
    size = (options.num_frames, options.height, options.width)
    total = 8 * options.batch_size * options.grad_accum
    cfg = replace(PRESETS[options.preset], **options.model_overrides)
    half = options.precision != "fp32"
    for line in report(cfg, options.stage, loss_alone(options), size, total, hardware, half):
        print(line, flush=True)


def loss_alone(options):
    """What lib/plan counts: (model, b, noise, sigma, keep) -> the scalar loss of one micro-step."""

    def loss(model, b, noise, sigma, keep):
        how = dict(sigma=sigma, keep=keep, options=options, video=options.stage != 1)
        return compute_loss(model, b, noise, **how)[0]

    return loss


# ---------------------------------------------------------------------------------- the optimizer
def make_optimizer(model, options, world=1, group=None):
    """AdamW; no decay on norms, gates, biases, modulation and tokens.

    Sharded: each rank updates its share of the parameters and sends them to the others, so the
    moments are kept once in all (ZeRO, Rajbhandari et al. 2020)."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    # Decay would pull gates and tokens to zero.
    plain = [p for n, p in named if p.dim() < 2 or n.endswith(("modulation", "_token", "_tokens"))]
    ids = {id(p) for p in plain}
    matrices = [p for _, p in named if id(p) not in ids]
    groups = [
        dict(params=matrices, weight_decay=options.weight_decay),
        dict(params=plain, weight_decay=0.0),
    ]
    # fused takes found_inf
    how = dict(lr=options.learning_rate, betas=(0.9, options.beta2), fused=True)
    if options.shard_optimizer and world > 1:
        # Imported here: it takes a second to compile TorchScript that we do not use.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, process_group=group, **how)
    return torch.optim.AdamW(groups, **how)


def compile_blocks(model):
    """Half blocks, which the exchange lies between; equal ones share their graphs."""
    for block in [*model.dit.blocks, *model.frame_blocks, *model.global_blocks]:
        block.attend = torch.compile(block.attend)
        block.feed_forward = torch.compile(block.feed_forward)


def learning_rate_at(step, options):
    """Linear rise, then the schedule down to min_lr at max_steps."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    down = dict(constant=1.0, linear=1 - done, cosine=0.5 + 0.5 * math.cos(math.pi * done))
    share = down[options.lr_schedule]
    return options.min_lr + (options.learning_rate - options.min_lr) * share


# ------------------------------------------------------------------------------------------ resume
def choose_start(out, asked):
    """The checkpoint to go on from ("" = none), after a killed run's leftovers; for rank 0."""
    if out.is_dir():
        remove_leftovers(out)
    newest = newest_valid(out)  # damaged ones are passed over
    if asked == "auto":
        if newest is not None:
            link_latest(out, newest)  # a kill may have come between the file and its link
        return "" if newest is None else f"{out}/step-{newest}.safetensors"
    first = int(metadata_of(asked).get("step", 0)) if asked else 0
    if newest is not None and newest > first:
        found = f"{out} holds checkpoints later than step {first}, up to {newest}"
        cure = "this run would mix with them. Use another --out_dir, or delete them"
        raise ValueError(f"{found}; {cure}")
    return asked


def keep_global_batch(meta, options, world):
    """On another number of GPUs: options whose global batch is that of the run, and a remark."""
    before, total = json.loads(meta["train_config"]), int(meta.get("global_batch", 0))
    size, accum = options.batch_size, options.grad_accum
    same = (before["batch_size"], before["grad_accum"]) == (size, accum)
    if not total or not same or total == size * accum * world:
        return options, []
    if total % world:
        raise ValueError(
            f"the run to resume has a global batch of {total}, which {world} GPUs cannot share; "
            f"start a number of GPUs that divides it, or set --batch_size and --grad_accum"
        )
    size = max(b for b in range(1, size + 1) if total % (b * world) == 0)
    accum = total // (size * world)
    remark = f"global batch kept at {total} on {world} GPUs: batch_size {size}, grad_accum {accum}"
    return options.replaced(batch_size=size, grad_accum=accum), [remark]


def resume_from(path, model, optimizer, options, world):
    """Load a checkpoint of this stage and its optimizer state.

    returns  its metadata, options with its global batch, remarks for the log"""
    meta = metadata_of(path)
    if meta.get("stage") != str(options.stage):
        raise ValueError(
            f"resume = {path} is of stage {meta.get('stage')}, this run is stage {options.stage}; "
            f"use --init_from to start a stage from another one, or another --out_dir"
        )
    load_weights(model, path)
    moments = pathlib.Path(path).with_name(f"step-{meta['step']}.optim.safetensors")
    load_optimizer(moments, model, optimizer)
    before = json.loads(meta["train_config"])
    changes = changed_options(before, vars(options))
    remarks = [f"changed since step {meta['step']}: {c}" for c in changes]
    rates = ("learning_rate", "min_lr", "warmup_steps", "lr_schedule")
    remarks += [
        f"warning: the learning rate changes at this resume: {c}"
        for c in changes
        if c.split(" ")[0] in rates
    ]
    options, kept = keep_global_batch(meta, options, world)
    return meta, options, remarks + kept


def flops_share(model, options, master):
    """FLOPs of a micro-step over the device's FLOP/s, in seconds: the MFU column; rank 0 alone.

    Counted on fake tensors, so that it costs no step and changes no bit of the run."""
    if not master:
        return 0.0
    size = (options.batch_size, options.num_frames, options.height, options.width)
    half = next(model.dit.blocks.parameters()).dtype == torch.bfloat16
    how = dict(checkpointing=options.checkpoint_activations, half=half)
    flops = flops_of_step(model.cfg, options.stage, loss_alone(options), size, **how)
    return flops / peak_flops(model.dit.patch_embedding.weight.device)


# -------------------------------------------------------------------------------------------- main
def open_clips(options):
    """split -> CachedClips; the validation split only where something evaluates."""
    splits = ("train", "val") if options.eval_every or options.eval_only else ("train",)
    size = (options.height, options.width, options.num_frames)
    how = (options.wan_dir, options.skip_bad, options.follow_links)
    return {split: CachedClips(options.data_dir, split, size, *how) for split in splits}


def load_batches(clips, batches, dev, options):
    """Iterator over this rank's micro-batches, read ahead by worker processes."""
    return iter(
        torch.utils.data.DataLoader(
            clips,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=options.num_workers,
            pin_memory=dev.type == "cuda",
            worker_init_fn=ignore_signals,
        )
    )


def describe_run(options, trained, clips, world):
    """The first line of a start in training.log."""
    millions = sum(p.numel() for p in trained) / 1e6
    size, accum = options.batch_size, options.grad_accum
    return (
        f"stage {options.stage}, {millions:.1f}M trainable, clips {len(clips['train'])} + "
        f"{len(clips.get('val', ()))} val, global batch {size} x {accum} x {world} = "
        f"{size * accum * world}"
    )


@dataclass(frozen=True)
class Job:
    """What every micro-step of a run needs."""

    model: torch.nn.Module
    wrapped: torch.nn.Module  # the model, or DDP around it
    autocast: object
    options: config.Options
    empty_text: torch.Tensor  # (L, D) text of clips that lose their prompt
    total: int  # clips of the global batch

    def micro_step(self, b, step, positions, last):
        """Forward and backward of a loaded batch -> its loss, parts, bins and clip ids.

        last   the gradients are reduced over the ranks only in a step's last micro-step"""
        options, model = self.options, self.model
        # on the device, in scene units
        b = prepare(b, model.cfg.in_dim, self.empty_text.device, model.rays)
        noise, sigma, keep, b = draw(b, step, positions, self.total, self.empty_text, options)
        how = dict(sigma=sigma, keep=keep, options=options, video=options.stage != 1)
        waits = not last and self.wrapped is not model
        with self.wrapped.no_sync() if waits else nullcontext():
            with self.autocast:
                loss, parts, bins = compute_loss(self.wrapped, b, noise, **how)
            # the sum over micro-steps is the mean over clips
            (loss / options.grad_accum).backward()
        return loss.detach(), parts, bins, b["id"]  # all still on the device


def wrap(model, group, dev, spread):
    """DDP around a model, or the model itself where it is alone or its weights are spread."""
    if group is None:
        return model
    dist.barrier()  # loading took each rank its own time; a step must not
    if spread:  # before the optimizer sees the parameters
        return model
    ids = [dev] if dev.type == "cuda" else None
    how = dict(gradient_as_bucket_view=True, process_group=group, device_ids=ids)
    return DistributedDataParallel(model, **how)


def main(options):
    check_options(options)
    if options.plan:
        return print_plan(options)  # nothing is allocated

    # ---- device, ranks
    timeouts = (options.step_timeout, options.wait_timeout)
    rank, world, dev, group = start_processes(options.device, *timeouts)
    torch.manual_seed(options.seed)  # of the fresh weights: equal on all ranks
    out, master = pathlib.Path(options.out_dir), rank == 0

    # ---- model and data
    cfg = replace(PRESETS[options.preset], **options.model_overrides)
    half = options.precision == "bf16" or options.precision == "auto" and dev.type == "cuda"
    spread = options.shard_weights and world > 1
    autocast = nullcontext()
    if half:  # its cache would keep a bf16 copy of every weight that was gathered
        autocast = torch.autocast(dev.type, torch.bfloat16, cache_enabled=not spread)
    sources = list(filter(None, options.init_from.split(",")))
    origin = metadata_of(sources[0]) if sources else {}  # ours, a release, or VGGT
    dtype = torch.bfloat16 if half and options.stage else None
    model = open_model(origin, cfg, options.wan_dir, "cpu" if spread else dev, dtype)
    model.set_stage(options.stage).checkpoint_activations = options.checkpoint_activations
    if spread:
        shard(model, group, dev)
    clips = open_clips(options)
    check_depth_kinds(clips, options, master)
    examples = {split: Examples(c, model, dev, options.seed) for split, c in clips.items()}
    how = How(dev, autocast, options.eval_clips, options.eval_sigma, rank, world)
    if options.eval_only:
        return evaluate_only(model, examples, out, sources, how, options.eval_more_sigmas)

    # ---- optimizer, resume
    optimizer = make_optimizer(model, options, world, group)  # after sharding: it holds the shares
    asked, meta, remarks = options, {}, []
    start_from = from_first(choose_start(out, options.resume) if master else None)
    if start_from:
        meta, options, remarks = resume_from(start_from, model, optimizer, options, world)
    elif sources and origin.get("foreign") != "release":  # a release's weights are in it already
        load_weights(model, sources[0])
    first_step = int(meta.get("step", 0))  # 0 for a fresh start
    total = options.batch_size * options.grad_accum * world
    mfu_unit = flops_share(model, options, master)  # before compiling
    if options.compile:
        compile_blocks(model)
    wrapped = wrap(model, group, dev, spread)

    # ---- records
    metadata = dict(
        provenance(vars(asked)),
        format="fantasyworld",
        stage=str(options.stage),
        global_batch=str(total),
        world=str(world),
        model_config=json.dumps(asdict(model.cfg)),
        release=origin.get("release", ""),
    )
    records = Records(out if master else None, metadata, first_step)
    log, watch = records.line, Watch(options.max_steps, records.line)
    trained = [p for p in model.parameters() if p.requires_grad]
    headline = describe_run(options, trained, clips, world)
    log(f"# {headline}, {dev}, git {metadata['git']}, steps {first_step} .. {options.max_steps}")
    for remark in remarks:  # what differs from the run so far
        log(f"# {remark}")
    guard = (options.spike_guard, options.max_bad_steps, float(meta.get("norm_mean", 0)))
    bad = BadSteps(group, *guard, dev)

    def save(step):
        """Write a step's checkpoint on rank 0 while every rank waits -> whether it was written."""
        bad.report(log)  # skipped steps are named before their checkpoint
        records.flush()
        content, error = training_state(model, optimizer), ""  # on all ranks
        if master:
            try:
                told = dict(metadata, norm_mean=repr(float(bad.mean)))
                keep = (options.keep_last, options.keep_every)
                save_checkpoint(out, step, *content, told, *keep)
            except (OSError, SafetensorError) as caught:
                error = f"step {step} is not saved ({caught}); earlier checkpoints in {out} are "
                error += "untouched. Free some space"
                log(f"# warning: {error}")
        error = from_first(error)  # every rank learns of it
        if error and step == options.max_steps:
            raise SystemExit(f"{error}, then start the same command again")
        return not error

    # ---- loop
    batches = Batches(len(clips["train"]), first_step, rank, world, options)
    data = load_batches(clips["train"], batches, dev, options)  # starts at first_step
    empty_text = read_tensors(clips["train"].empty_text)[0]["text"].float().to(dev)
    job = Job(model, wrapped, autocast, options, empty_text, total)
    stop, stopped, done, saved = Stop(group), 0, first_step, first_step  # signals wait from here
    tally, started = Tally(), time.perf_counter()
    for step in range(first_step, options.max_steps):
        lr = learning_rate_at(step, options)  # a function of the step alone
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr  # both groups: only their decay differs
        tally.parts, losses, names = {}, [], []
        for micro in range(options.grad_accum):
            if stopped := stop.agreed():
                break
            positions, last = batches.positions(step, micro), micro == options.grad_accum - 1
            loss, parts, bins, ids = job.micro_step(next(data), step, positions, last)
            tally.add(parts, bins, options.grad_accum)
            losses.append(loss)
            names.append(ids)
        if stopped:  # the micro-steps of an unfinished step are repeated by the resume
            break
        norm = gather_full(torch.nn.utils.clip_grad_norm_(trained, options.grad_clip or math.inf))
        bad.judge(optimizer, step, norm, losses, names)  # the verdict stays on the device
        optimizer.step()  # skips itself where the verdict is bad
        optimizer.zero_grad(set_to_none=True)  # frees the gradients until the next backward
        done, tally.steps = step + 1, tally.steps + 1

        if done % options.log_every == 0 or done == options.max_steps:
            bad.report(log)
            spent = (time.perf_counter() - tally.since) / tally.steps
            scalars = dict(
                tally.scalars(group),
                learning_rate=lr,
                gradient_norm=float(norm),
                samples_per_second=total / spent,
                gpu_memory=memory_gb(dev),
                mfu=mfu_unit * options.grad_accum / spent,
            )
            passed = (time.perf_counter() - started) / (done - first_step)
            left = clock((options.max_steps - done) * passed)  # as if the rest took as long
            tail = (options.max_steps, f"{spent:.3f} s/step", f"{left} left")
            records.step(done, scalars, tail)
            watch.update(done, scalars)  # the guide's warnings
            tally = Tally()  # the next line begins
        if done % options.save_every == 0 or done == options.max_steps:
            saved = done if save(done) else saved
        # After saving: it can take longer than a preemption's grace.
        if options.eval_every and done % options.eval_every == 0:
            rows = evaluate(model, examples["val"], how, lambda i, at=done: records.picture(at, i))
            records.rows(done, rows)
            tally.steps, tally.since = 0, time.perf_counter()
    if stopped and done > saved and save(done):
        saved = done
    if stopped:
        name = signal.Signals(stopped).name
        log(f"# stopped by {name} after step {done}; the same command goes on from step {saved}")
    else:
        log(f"# done: {out / 'latest.safetensors'}, {clock(time.perf_counter() - started)}")
    records.close()  # TensorBoard writes in a thread
    if world > 1:
        end_processes()  # waits for the others first
    if stopped:
        raise SystemExit(128 + stopped)


def command():
    if sys.argv[1:2] == ["--check"]:
        for path in sys.argv[2:]:
            print(describe(path))
    else:
        main(config.apply(globals(), sys.argv[1:]))


if __name__ == "__main__":
    advice = "Halve --batch_size and double --grad_accum, or set --checkpoint_activations=full"
    run_command("train.py", command, advice)
