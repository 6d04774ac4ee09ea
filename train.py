"""Train one stage of FantasyWorld: `python train.py CONFIG.py [--key=value ...]`, also by torchrun.

    stage 0  video branch from scratch (it made the miniature's)
    stage 1  geometry branch on the frozen video branch
    stage 2  + camera adapters + exchange

OUT receives training.log, starts.jsonl, config.json, tensorboard/, eval/, step-N.safetensors,
step-N.optim.safetensors and latest.safetensors.  World size 1 is the same code.
The batch of a step (clips, noise, sigma, drops) is a pure function of (seed, step, position in the
global batch).  So a resumed run needs no random state, and neither the number of ranks nor of
loader workers changes what is trained on.
SIGTERM, SIGUSR1, Ctrl-C or a closed terminal saves and leaves with 128 + the signal's number.
`python train.py --check CKPT` examines a checkpoint; --help lists every option."""

import atexit
import json
import math
import pathlib
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial

import torch

import config
import sample
from config import option, section
from data import CachedClips, EmptySplit, collate, prepare
from encoders import EXPERTS, expert_folders
from geometry import clip_mean, geometry_losses
from lib import lock
from lib.checkpoints import choose_start, describe, load_optimizer, save_checkpoint, training_state
from lib.crop import check_video_size
from lib.distributed import Ranks, from_first, shard, start_processes, wrap
from lib.evaluate import How, evaluate, evaluate_only
from lib.experts import INPUTS, check_place, files_in, window_of
from lib.frozen import check_frozen, identify_frozen
from lib.guards import BadSteps, Stop, Watch, end_children, ignore_signals, run_command
from lib.log import Records, Tally, by_sigma, changed_options, memory_gb, provenance
from lib.mix import Mix, check_clips, parts_of, pick
from lib.offload import check_offload, offload
from lib.optimizer import clip_gradients, learning_rate_at, make_optimizer, take_step
from lib.plan import HARDWARE, Flops, peak_flops, report
from lib.strangers import checked_config
from lib.weights import load_weights, metadata_of, open_model, read_tensors
from model import CHECKPOINTING, PRESETS, flow_matching_loss, shift_sigma

section_1 = section("what")
preset = option("1.3b", "widths of the model, in model.PRESETS", choices=tuple(PRESETS))
model_overrides = option({}, "single fields of model.Config, such as {'num_pcb': 10}")
stage = option(1, "what trains, see the top of this file", choices=(0, 1, 2))
data_dir = option("data/train", "an encoded dataset; or several: FOLDER:WEIGHT,FOLDER:WEIGHT")
skip_bad = option(False, "leave out clips whose caches are missing or damaged")
follow_links = option(False, "the dataset's files may be links that lead out of data_dir")
out_dir = option("outputs/stage1", "the run folder", low=1)
wan_dir = option("", "folder of the Wan weights, or of a stage 0 run; empty: random, for stage 0")
expert = option("", "of a Wan2.2 pair in wan_dir: the one that trains", choices=("", "high", "low"))
lora = option("", "LoRA file merged at 0.55 into what comes from wan_dir")
other_wan = option(False, "go on although the frozen weights are not those of the checkpoint")
random_wan = option(False, "allow stages 1 and 2 on a random video branch (tests)")
init_from = option("", "a checkpoint, a release or VGGT to start from; eval_only: several, commas")
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
eval_every = option(1000, "steps between evaluations", low=1, off=0)
keep_last = option(3, "newest checkpoints that are kept", low=1)
keep_every = option(0, "also keep the weights of every multiple of this", low=1, off=0)
eval_clips = option(16, "clips of an evaluation", low=1)
eval_only = option(False, "print the table of the checkpoints in init_from, and stop")
eval_samples = option(0, "of them, clips that are sampled and compared with the truth", low=0)
eval_sigma = option(0.1, "noise level of the geometry read-out", above=0, high=1)
eval_more_sigmas = option((0.5, 0.9), "further noise levels of eval_only", above=0, high=1)
sampling = option({}, "defaults of sample.py for its checkpoints, such as {'steps': 8}")
section_3 = section("optimisation")
optimizer = option("adamw", "muon: for matrices and kernels", choices=("adamw", "muon"))
learning_rate = option(1e-5, "of either; 5e-6 is the guide's fallback", above=0)
min_lr = option(0.0, "where a falling schedule ends", low=0)
warmup_steps = option(100, "steps of linear rise", low=0)
lr_schedule = option("constant", "after the rise", choices=("constant", "cosine", "linear"))
weight_decay = option(0.01, "of matrices; norms, gates, biases and tokens have none", low=0)
beta2 = option(0.999, "of AdamW", low=0, high=0.99999)
grad_clip = option(1.0, "largest gradient norm", above=0, off=0)
shift = option(5.0, "of the noise levels: more of them near 1", above=0, high=1000)
pose_dropout = option(0.1, "share of clips that lose their camera", low=0, high=1)
prompt_dropout = option(0.1, "share of clips that lose their prompt", low=0, high=1)
image_dropout = option(0.1, "share of clips that lose their start image", low=0, high=1)
end_dropout = option(1.0, "share of clips that lose their end image", low=0, high=1)
sigma_range = option((), "noise levels, as 0.9,1.0; empty: all, or the expert's", low=0, high=1)
lambda_geo = option(1.0, "weight of the geometry losses together", low=0)
depth_mode = option("metric", "ssi: scale and shift are fitted first", choices=("metric", "ssi"))
alpha_tgm = option(10.0, "weight of the temporal gradient loss of depth", low=0)
beta_frame = option(1.0, "weight of the depth loss frame by frame", low=0)
gamma_conf = option(0.2, "weight of the confidence's logarithm", low=0)
camera_delta = option(0.1, "where the camera's Huber loss turns linear", above=0)
camera_weight = option(3.0, "weight of the camera loss", low=0)
max_bad_steps = option(10, "so many steps in a row that are not finite end the run", low=1)
spike_guard = option(0.0, "skip gradient norms over this times their mean", above=1, off=0)
section_4 = section("machine")
device = option("auto", "auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
seed = option(0, "of everything random", low=0, high=2**62)
num_workers = option(2, "processes that load clips", low=0)
compile = option(False, "torch.compile the blocks")  # noqa: A001  (an old name)
checkpoint_activations = option("none", "less memory, more recomputation", choices=CHECKPOINTING)
shard_optimizer = option(False, "each rank keeps AdamW's moments of its share (ZeRO stage 1)")
shard_weights = option(False, "each rank keeps its share of all weights (FSDP2, ZeRO stage 3)")
offload_frozen = option(False, "frozen weights lie on the host; a step's visit the GPU in turn")
plan = option(False, "print memory, work and the settings that fit, and stop")
plan_gpus = option(8, "of the plan: GPUs", low=1)
plan_gb = option(80, "of the plan: memory of each", low=1)
step_timeout = option(600, "seconds that a rank waits for the others in a step", low=1)
wait_timeout = option(3600, "the same around loading, saving and evaluation", low=1)
precision = option("auto", "auto: bf16 on a GPU", choices=("auto", "bf16", "fp32"))


# --------------------------------------------------------------------------------------- one batch
def generator(*key):
    """A CPU generator for one purpose: the same numbers on every device and rank count."""
    mixed = 0
    for k in key:
        mixed = (mixed * 0x9E3779B97F4A7C15 + k + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


@lru_cache(maxsize=16)  # of each dataset of a mix an epoch, and the one that follows
def order_of_epoch(clips, seed, epoch):
    """The order of the clips in an epoch: each comes once."""
    return torch.randperm(clips, generator=generator(seed, 1, epoch))


def global_batch(options, world):
    """Clips of a step, on all ranks."""
    return options.batch_size * options.grad_accum * world


@dataclass(frozen=True)
class Batches:
    """Index lists of this rank's micro-batches: a pure function of (seed, step), without state."""

    sizes: list  # clips of each dataset
    options: config.Options
    ranks: Ranks
    first_step: int = 0
    weights: tuple = (1.0,)

    def positions(self, micro):
        """Positions of this rank's micro-batch in the global batch."""
        size = self.options.batch_size
        start = (micro * self.ranks.world + self.ranks.rank) * size
        return range(start, start + size)

    def clip_at(self, n):
        """The clip at a place of the run's sequence."""
        dataset, k = pick(n, self.weights, self.options.seed)
        epoch, place = divmod(k, self.sizes[dataset])
        order = order_of_epoch(self.sizes[dataset], self.options.seed, epoch)
        return sum(self.sizes[:dataset]) + int(order[place])

    def __iter__(self):
        total = global_batch(self.options, self.ranks.world)
        for step in range(self.first_step, self.options.max_steps):
            for micro in range(self.options.grad_accum):
                yield [self.clip_at(step * total + place) for place in self.positions(micro)]


def draw(b, step, positions, *, total, empty_text, options):
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
    u = torch.stack(uniform)  # (B, 4)
    device = b["latents"].device

    def send(x):  # a copy from memory that is not pinned waits for the device
        return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

    keep = send((u[:, 1] >= options.pose_dropout).float())
    image_keep = send((u[:, 3] >= options.image_dropout).float())
    if "relative" in b:  # without metric depth, translations have no scene unit
        keep = keep * ~b["relative"]  # 0 hides the camera
    prompt_keep = u[:, 2] >= options.prompt_dropout
    b = dict(b, text=[t if stays else empty_text for t, stays in zip(b["text"], prompt_keep)])
    if b["y"] is not None:
        y = with_some_ends(b, step, positions, options) if options.end_dropout < 1 else b["y"]
        b["y"] = y * image_keep.view(-1, 1, 1, 1, 1)
    if "clip" in b:
        b["clip"] = b["clip"] * image_keep.view(-1, 1, 1)
    # The schedule's share of the window: shift_sigma of 1 / shift is its inverse.
    low, high = (shift_sigma(level, 1 / options.shift) for level in window_of(options))
    sigma = send(shift_sigma(low + (high - low) * u[:, 0], options.shift))  # (B,)
    return send(torch.stack(noise)), sigma, keep, b


def with_some_ends(b, step, positions, options):
    """y (B, 20, f, h, w) of a batch: of start and end image, where the end is not dropped."""
    u = [torch.rand(1, generator=generator(options.seed, 5, step, n)) for n in positions]
    keep = (torch.stack(u) >= options.end_dropout).view(-1, 1, 1, 1, 1)
    return torch.where(keep.to(b["y"].device), b["y_end"], b["y"])


def compute_loss(model, b, noise, *, sigma, keep, options):
    """The whole objective of a micro-batch -> loss, detached parts, by_sigma of the errors."""
    s = sigma.view(-1, 1, 1, 1, 1)
    x = (1 - s) * b["latents"] + s * noise  # (B, 16, f, h, w)
    how = dict(plucker=b["plucker"], poses=b["pose_enc"], keep=keep)
    how["video"] = options.stage != 1  # nothing flows into Wan in stage 1: its tail is not needed
    out = model(x, 1000 * sigma, b["text"], b["y"], b.get("clip"), **how)
    loss = torch.zeros((), device=x.device)
    parts, bins = {}, {}
    if out["velocity"] is not None:
        per_clip = flow_matching_loss(out["velocity"], b["latents"], noise)
        bins["diffusion"] = by_sigma(sigma, per_clip)
        diffusion = per_clip.mean()
        parts["diffusion"] = diffusion.detach()
        loss = loss + diffusion
    if "depth" in out:
        geo, geo_parts = geometry_losses(out, b, options)
        parts |= geo_parts
        loss = loss + options.lambda_geo * geo
        error = (out["depth"] - b["depth"]).abs() * b["mask"]  # (B, T, H, W), 0 where unknown
        bins["depth_l1"] = by_sigma(sigma, clip_mean(error, b["mask"]))
    return loss, {**parts, "total": loss.detach()}, bins


@dataclass(frozen=True)
class Examples:
    """Clips as evaluation reads them: prepared batches of one; the noise is equal in all runs."""

    clips: Mix
    model: torch.nn.Module
    device: torch.device
    seed: int

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        item = collate([self.clips[self.clips.turns[i]]])
        b = prepare(item, self.model.cfg.in_dim, self.device, self.model.rays)
        noise = torch.randn(b["latents"].shape, generator=generator(self.seed, 3, i))
        return dict(b, noise=noise.to(self.device))

    def frames(self, i):
        """uint8 (T, H, W, 3) of a clip for a picture, or None."""
        return self.clips.frames(self.clips.turns[i])

    def truth(self, i):
        """(3, T, H, W) in [-1, 1], what a sample is compared with."""
        if (frames := self.frames(i)) is None:
            raise ValueError("eval_samples compares with the true frames; a video is missing")
        return torch.from_numpy(frames).to(self.device).permute(3, 0, 1, 2) / 127.5 - 1


# ------------------------------------------------------------------------------------- the options
def model_config(options):
    """The preset, its inputs those of the expert, with model_overrides, which are checked."""
    preset, changes = PRESETS[options.preset], dict(INPUTS if options.expert else {})
    for key, value in options.model_overrides.items():
        default = config.look_up(key, vars(preset), "model_overrides")
        changes[key] = config.check(key, value, option(default, ""), "model_overrides")
    return checked_config(vars(preset) | changes, "model_overrides")


def files_to_start(options):
    """Files of init_from; for one that is gone its run's own checkpoint, once it has one."""
    own = pathlib.Path(options.out_dir, "latest.safetensors")
    goes_on = options.resume == "auto" and not options.eval_only and own.exists()
    files = filter(None, files_in(options.init_from))
    return [str(own) if goes_on and not pathlib.Path(f).exists() else f for f in files]


def check_options(options):
    """What ranges alone cannot say is refused before anything slow."""
    if options.compile and torch.__version__ < (2, 5):  # 2.4 shares no graph
        raise ValueError(f"compile needs torch 2.5 or newer, this is {torch.__version__}")
    check_offload(options)
    if options.shard_weights and options.shard_optimizer:
        raise ValueError("shard_weights shards the optimizer too: leave shard_optimizer out")
    stepwise = options.compile or options.checkpoint_activations != "none" or options.shard_weights
    if stepwise and not options.stage or options.shard_weights and options.eval_samples:
        why = "shard_weights, compile, checkpoint_activations (not none) go by steps of the model"
        raise ValueError(f"{why}; stage 0 and eval_samples do not. Fix: leave one of the two out")
    check_video_size((options.num_frames, options.height, options.width))
    model_config(options)
    sample.checked_sampling(options.sampling, "sampling")
    if window_of(options) != (0.0, 1.0) and options.eval_samples:
        why = "makes whole videos, this run knows a part of the noise levels (a pair: sample.py)"
        raise ValueError(f"eval_samples {why}. Fix: leave it out")
    if options.plan:
        return
    if options.stage and not options.wan_dir and not options.random_wan:
        folder = "FOLDER (Wan2.1 weights, or the run folder of stage 0)"
        raise ValueError(f"stage {options.stage} needs --wan_dir={folder}")
    sources = files_to_start(options)
    if options.stage == 2 and not options.eval_only:
        if not sources or metadata_of(sources[0]).get("stage") not in ("1", "2"):
            wanted = "stage 2 starts from a stage 1 checkpoint or a release's model.pth"
            cure = "Train config/stage1.py, then --init_from=outputs/stage1/latest.safetensors"
            raise ValueError(f"{wanted}; init_from = {options.init_from!r} is neither. {cure}")
    if len(sources) > 1 and not options.eval_only:
        raise ValueError(f"init_from = {options.init_from}: several checkpoints are for eval_only")
    if options.eval_only and not sources:
        raise ValueError("eval_only needs --init_from=CHECKPOINT[,CHECKPOINT ...]")
    for path in sources:  # read now, so that a bad one costs no wait
        meta = metadata_of(path)
        if meta.get("expert"):
            check_place(path, meta, options.expert)
        if options.stage and meta.get("stage") == "0" and not options.eval_only:
            cure = f"its folder is the --wan_dir of stage {options.stage}"
            raise ValueError(f"init_from = {path}: a video branch, of stage 0; {cure}")


def print_plan(options):
    """--plan=True: what the step needs and which settings fit; the global batch is 8 GPUs'."""
    hardware = dict.fromkeys((*HARDWARE, (options.plan_gpus, options.plan_gb)))
    size = (options.num_frames, options.height, options.width)
    total = 8 * options.batch_size * options.grad_accum
    kind = dict(half=options.precision != "fp32", muon=options.optimizer == "muon")
    cfg = model_config(options)
    for line in report(cfg, options.stage, loss_alone(options), size, total, hardware, **kind):
        print(line, flush=True)


def loss_alone(options):
    """What lib/plan counts: (model, b, noise, sigma, keep) -> the scalar loss of one micro-step."""
    loss = partial(compute_loss, options=options)
    return lambda model, b, noise, sigma, keep: loss(model, b, noise, sigma=sigma, keep=keep)[0]


# ------------------------------------------------------------------------------------------ resume
def keep_global_batch(meta, options, world):
    """On another number of GPUs: options whose global batch is that of the run, and a remark."""
    before = json.loads(meta["train_config"])
    total = int(meta.get("global_batch", 0))
    same = (before["batch_size"], before["grad_accum"]) == (options.batch_size, options.grad_accum)
    if not total or not same or total == global_batch(options, world):
        return options, []
    if total % world:
        found = f"the run to resume has a global batch of {total}, which {world} GPUs cannot share"
        cure = "start a number of GPUs that divides it, or set --batch_size and --grad_accum"
        raise ValueError(f"{found}; {cure}")
    size = max(b for b in range(1, options.batch_size + 1) if total % (b * world) == 0)
    accum = total // (size * world)
    remark = f"global batch kept at {total} on {world} GPUs: batch_size {size}, grad_accum {accum}"
    return options.replaced(batch_size=size, grad_accum=accum), [remark]


def resume_from(path, model, optimizer, *, options, world, frozen, clips):
    """Load a checkpoint and its optimizer state -> metadata, options with its global batch, remarks
    for the log; clips: of Mix.told."""
    meta = metadata_of(path)
    if meta.get("stage") != str(options.stage):
        found = f"is of stage {meta.get('stage')}, this run is stage {options.stage}"
        cure = "use --init_from to start a stage from another one, or another --out_dir"
        raise ValueError(f"resume = {path} {found}; {cure}")
    check_frozen(meta, "" if options.other_wan else frozen, path, lora=options.lora)
    load_weights(model, path)
    step, path = int(meta["step"]), pathlib.Path(path)
    beside = path.with_name(f"step-{step}.optim.safetensors")
    load_optimizer(beside, model, optimizer, of=(path, meta))
    before = clips | json.loads(meta["train_config"])  # older ones say nothing of clips
    changes = changed_options(before, vars(options) | clips)
    remarks = [f"changed since step {step}: {change}" for change in changes]
    known = {key: value for key, value in before.items() if key in vars(options)}
    old, new = (learning_rate_at(step, o) for o in (options.replaced(**known), options))
    if old != new:
        rates = f"{old:.4g} before, {new:.4g} now"
        remarks.append(f"warning: the learning rate changes at this resume: {rates}")
    options, kept = keep_global_batch(meta, options, world)
    return meta, options, remarks + kept


# -------------------------------------------------------------------------------------------- main
def open_clips(options, text_dim):
    """split -> Mix of CachedClips; val only where something evaluates it, and it has clips."""
    size = (options.height, options.width, options.num_frames)
    clips, how = {}, (options.wan_dir, options.skip_bad, options.follow_links)
    for split in ("train", "val") if options.eval_every or options.eval_only else ("train",):
        found = []
        for folder, weight in parts_of(options.data_dir):
            try:
                found.append((CachedClips(folder, split, size, *how), weight))
            except EmptySplit as error:
                empty = error
        least = 1 if options.eval_only else (split == "train") * len(parts_of(options.data_dir))
        if len(found) < least:  # each dataset of a mix has its share of the training
            raise empty
        if found:
            clips[split] = Mix(*zip(*found), text_dim)
    return clips


def load_batches(clips, batches, device, workers):
    """Iterator over this rank's micro-batches, read ahead by worker processes."""
    # Last registered, first called: before Python waits for workers that ignore its signal.
    atexit.register(end_children)
    how = dict(pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)
    how |= dict(batch_sampler=batches, collate_fn=collate, num_workers=workers)
    return iter(torch.utils.data.DataLoader(clips, **how))


def compile_steps(model, backend="inductor"):
    """Steps, with the checkpoint inside what is compiled; equal ones share their graph."""
    for step in (*model.pcb, *model.irg):
        step.step = torch.compile(step.step, backend=backend, fullgraph=True)


def describe_run(options, trained, clips, world):
    """The first line of a start in training.log."""
    millions = sum(p.numel() for p in trained) / 1e6
    val = f"{len(clips['val'])} val" if "val" in clips else "no val: nothing is evaluated"
    what = f"stage {options.stage}, {millions:.1f}M trainable, clips {len(clips['train'])} + {val}"
    product = f"{options.batch_size} x {options.grad_accum} x {world}"
    return f"{what}, global batch {product} = {global_batch(options, world)}"


@dataclass(frozen=True)
class Job:
    """What every micro-step of a run needs."""

    model: torch.nn.Module
    wrapped: torch.nn.Module  # the model, or DDP around it
    autocast: object
    options: config.Options
    empty_text: torch.Tensor  # (L, D) text of clips that lose their prompt
    total: int  # clips of the global batch
    counter: Flops = field(default_factory=Flops)

    def micro_step(self, b, step, positions, *, last):
        """Forward and backward of a loaded batch -> its loss, parts, bins and clip ids.

        last   the gradients are reduced over the ranks only in a step's last micro-step"""
        options, model = self.options, self.model
        # On the device, in scene units.
        b = prepare(b, model.cfg.in_dim, self.empty_text.device, model.rays)
        drops = dict(total=self.total, empty_text=self.empty_text, options=options)
        noise, sigma, keep, b = draw(b, step, positions, **drops)
        how = dict(sigma=sigma, keep=keep, options=options)
        waits = not last and self.wrapped is not model
        # The run's first micro-step shows its FLOPs, not yet compiled; no bit changes.
        counting = nullcontext() if self.counter.flops else self.counter
        with self.wrapped.no_sync() if waits else nullcontext(), counting:
            with self.autocast:
                loss, parts, bins = compute_loss(self.wrapped, b, noise, **how)
            # The sum over micro-steps is the mean over clips.
            (loss / options.grad_accum).backward()
        return loss.detach(), parts, bins, b["id"]  # all still on the device


def settled(options):
    """Options with the expert's folder, and with the LoRA of the checkpoint that a run starts from
    where none is given; the files to start from; metadata of the first: ours, a release, VGGT."""
    sources = files_to_start(options)
    origin = metadata_of(sources[0]) if sources else {}
    pair = expert_folders(options.wan_dir) if options.expert else []
    folder = str(pair[EXPERTS.index(options.expert)]) if pair else options.wan_dir
    options = options.replaced(wan_dir=folder, lora=options.lora or origin.get("lora", ""))
    return options, sources, dict(origin, lora=options.lora)


def how_to_evaluate(options, autocast, ranks):
    """How evaluation reads and samples clips."""
    window = window_of(options)
    level = sorted((options.eval_sigma, *window))[1]  # an expert reads geometry where it is at home
    draw = None  # samples a clip, by the settings that sample.py will have with the checkpoint
    if options.eval_samples and (options.eval_every or options.eval_only):
        draw = sample.clip_sampler(options.sampling, options.wan_dir, ranks.device, autocast)
    return How(autocast, options.eval_clips, level, ranks, window, options.eval_samples, draw)


def main(options):
    check_options(options)
    if options.plan:
        return print_plan(options)  # nothing is allocated
    options, sources, origin = settled(options)

    # ---- device, ranks
    ranks = start_processes(options.device, options.step_timeout, options.wait_timeout)
    device, master = ranks.device, ranks.rank == 0
    out = pathlib.Path(options.out_dir)
    torch.manual_seed(options.seed)  # of the fresh weights: equal on all ranks
    remarks = from_first(lock.acquire(out) if master and not options.eval_only else [])

    # ---- model and data
    half = options.precision == "bf16" or options.precision == "auto" and device.type == "cuda"
    spread = options.shard_weights and ranks.world > 1
    autocast = nullcontext()
    if half:  # its cache would keep a bf16 copy of every weight that was gathered
        autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=not spread)
    where = "cpu" if spread or options.offload_frozen else device
    kind = torch.bfloat16 if half and options.stage else None
    model = open_model(origin, model_config(options), options.wan_dir, where, kind)
    model.set_stage(options.stage).checkpoint_activations = options.checkpoint_activations
    frozen = identify_frozen(options, sources, master)
    if spread:
        shard(model, ranks)
    if options.offload_frozen:
        offload(model, device)
    clips = open_clips(options, model.cfg.text_dim)
    check_clips(clips, options, master)
    examples = {split: Examples(c, model, device, options.seed) for split, c in clips.items()}
    how = how_to_evaluate(options, autocast, ranks)
    if options.eval_only:
        return evaluate_only(model, examples, out, sources, how, options.eval_more_sigmas)

    # ---- optimizer, resume
    optimizer = make_optimizer(model, options, ranks)  # after sharding: it holds the shares
    asked, meta = options, {}
    start_from = from_first(choose_start(out, options.resume) if master else None)
    if start_from:
        now = dict(options=options, world=ranks.world, frozen=frozen, clips=clips["train"].told)
        meta, options, more = resume_from(start_from, model, optimizer, **now)
        remarks += more
    elif sources and origin.get("foreign") != "release":  # a release's weights are in it already
        load_weights(model, sources[0])
    first_step = int(meta.get("step", 0))  # 0 for a fresh start
    total = global_batch(options, ranks.world)
    peak = peak_flops(device) if master else math.inf
    wrapped = wrap(model, ranks, spread)
    trained = [p for p in model.parameters() if p.requires_grad]

    # ---- records
    facts = dict(format="fantasyworld", stage=str(options.stage), release=origin.get("release", ""))
    facts |= dict(expert=options.expert, lora=options.lora, frozen=frozen, world=str(ranks.world))
    facts |= dict(global_batch=str(total), model_config=json.dumps(asdict(model.cfg)))
    metadata = provenance(vars(asked) | clips["train"].told) | facts
    records = Records(out if master else None, metadata, first_step)
    log = records.line
    headline = describe_run(options, trained, clips, ranks.world)
    log(f"# {headline}, {device}, git {metadata['git']}, steps {first_step} .. {options.max_steps}")
    for remark in remarks:  # what differs from the run so far
        log(f"# {remark}")
    watch = Watch(options.max_steps, log)
    norm_mean = torch.tensor(float(meta.get("norm_mean", 0)), device=device)
    guard = BadSteps(ranks.group, options, norm_mean)

    def save(step):
        """Write a step's checkpoint on rank 0 while every rank waits -> whether it was written."""
        guard.report(log)  # skipped steps are named before their checkpoint
        records.flush()
        state, error = training_state(model, optimizer), ""  # on all ranks
        if master:
            told = dict(metadata, norm_mean=repr(float(guard.mean)))
            keep = dict(keep_last=options.keep_last, keep_every=options.keep_every)
            try:
                save_checkpoint(out, step, state, told, **keep)
            except OSError as full:  # the disk: it costs a checkpoint, not the run
                error = f"step {step} is not saved ({full}). Make room in {out}, or permit to write"
        error = from_first(error)  # every rank learns of it
        if error:
            log(f"# warning: {error}")
        if error and step == options.max_steps:
            raise SystemExit(f"{error}, then start the same command again")
        return not error

    # ---- loop
    batches = Batches(clips["train"].sizes, options, ranks, first_step, clips["train"].weights)
    data = load_batches(clips["train"], batches, device, options.num_workers)
    empty_text = read_tensors(clips["train"].empty_text)[0]["text"].float().to(device)
    job = Job(model, wrapped, autocast, options, empty_text, total)
    stop = Stop(ranks.group)  # signals wait from here
    tally, stopped = Tally(), 0
    done = saved = first_step
    for step in range(first_step, options.max_steps):
        # ---- one step of the recipe
        lr = learning_rate_at(step, options)  # a function of the step alone
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr  # both groups: only their decay differs
        losses, names = [], []
        tally.parts = {}
        for micro in range(options.grad_accum):
            if stopped := stop.agreed():
                break
            last = micro == options.grad_accum - 1
            positions = batches.positions(micro)
            loss, parts, bins, ids = job.micro_step(next(data), step, positions, last=last)
            if options.compile and not losses and step == first_step:
                compile_steps(model)
            tally.add(parts, bins, options.grad_accum)
            losses.append(loss)
            names.append(ids)
        if stopped:  # the micro-steps of an unfinished step are repeated by the resume
            break
        norm = clip_gradients(trained, options.grad_clip or math.inf)
        take_step(optimizer, guard.judge(step, norm, losses, ids=names), wrapped is not model)
        done = step + 1
        tally.steps += 1

        if done % options.log_every == 0 or done == options.max_steps:
            guard.report(log)
            spent = (time.perf_counter() - tally.since) / tally.steps
            scalars = tally.scalars(ranks.group) | dict(learning_rate=lr, gradient_norm=float(norm))
            scalars |= dict(samples_per_second=total / spent, gpu_memory=memory_gb(device))
            scalars["mfu"] = job.counter.flops * options.grad_accum / (peak * spent)
            records.step(done, scalars, options.max_steps, spent)
            watch.update(done, scalars)  # the guide's warnings
            tally = Tally()  # the next line begins
        if done % options.save_every == 0 or done == options.max_steps:
            saved = done if save(done) else saved
        # After saving: it can take longer than a preemption's grace.
        if "val" in clips and options.eval_every and done % options.eval_every == 0:
            rows = evaluate(model, examples["val"], how, partial(records.picture, done))
            records.rows(done, rows)
            tally.steps, tally.since = 0, time.perf_counter()

    # ---- end: what was done since the last save is kept
    if stopped and done > saved and save(done):
        saved = done
    if stopped:
        name = signal.Signals(stopped).name
        cure = f"the same command goes on from step {saved}"
        log(f"# stopped by {name} after step {done}; {cure}")
    else:
        log(f"# done: {out / 'latest.safetensors'}, {records.clock()}")
    records.flush()
    lock.release()
    ranks.leave()  # waits for the others first
    if stopped:
        raise SystemExit(128 + stopped)


def command():
    if sys.argv[1:2] == ["--check"]:
        if not sys.argv[2:]:
            raise ValueError("--check: wanted checkpoints: --check CKPT ...")
        for path in sys.argv[2:]:
            print(describe(path))
    else:
        main(config.apply(globals(), sys.argv[1:]))


if __name__ == "__main__":
    advice = "Halve --batch_size and double --grad_accum, or set --checkpoint_activations=full"
    run_command("train.py", command, advice)
