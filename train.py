"""Train one stage of FantasyWorld: `python train.py CONFIG.py [--key=value ...]`, or the same under torchrun.

    stage 0  video branch from scratch (demo only)      writes OUT/{training.log, config.json, tensorboard/,
    stage 1  geometry branch on the frozen video branch         step-N.safetensors, step-N.optim.safetensors,
    stage 2  + camera adapters + exchange                       latest.safetensors, eval/}

Every option below is a plain global; a config file and --key=value override them.  World size 1 is the same code.
The batch of a step (clips, noise, sigma, drops) is a pure function of (seed, step, position in the global batch), so a
resumed run needs no random state, and neither the number of ranks nor of loader workers changes what is trained on."""
import json
import math
import os
import pathlib
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import config
from checkpoints import (build_model, git_hash, load_optimizer, load_trained, read_metadata, read_tensors,
                         save_checkpoint, saved_steps, whole)
from data import CachedClips, collate
from evaluate import baselines, evaluate, generator, prepare, print_table
from geometry import clip_mean, geometry_losses
from model import CHECKPOINTING, PRESETS, flow_matching_loss, shift_sigma
from plan import HARDWARE, Count, report

# ---- what
preset = "1.3b"                 # 1.3b, 14b or demo: widths in model.PRESETS
model_overrides = {}            # single fields of model.Config, e.g. {"num_pcb": 10}
stage = 1
data_dir = "data/train"         # has metadata.json and the caches that `python data.py encode` wrote
out_dir = "outputs/stage1"
wan_dir = ""                    # folder of the Wan2.1 weights (or of a stage 0 run); "" = random, stage 0 only
random_wan = False              # allow stages 1 and 2 on a random video branch (benchmarks, tests)
init_from = ""                  # stage 2: the stage 1 checkpoint, required; eval_only: one or several, comma-separated
resume = "auto"                 # "auto": newest whole checkpoint of out_dir; "": start afresh; or a file
# ---- how much
height, width, num_frames = 336, 592, 21
batch_size, grad_accum = 8, 1   # per GPU and micro-step; global batch = batch_size * grad_accum * GPUs
max_steps, save_every, keep_last, log_every, eval_every = 20000, 1000, 3, 10, 1000
eval_clips, eval_only = 16, False
eval_sigma = 0.1                # noise level of the geometry read-out; the release reads out at 0.0926
eval_more_sigmas = (0.5, 0.9)   # further noise levels of --eval_only=True
# ---- optimisation
learning_rate, min_lr, warmup_steps, lr_schedule = 1e-5, 0.0, 100, "constant"     # constant, cosine or linear
weight_decay, beta2, grad_clip = 0.01, 0.999, 1.0
shift, pose_dropout, prompt_dropout, image_dropout = 5.0, 0.1, 0.1, 0.1      # dropped for whole clips
lambda_diffusion, lambda_geo, depth_mode, alpha_tgm, beta_frame = 1.0, 1.0, "metric", 10.0, 1.0
gamma_conf, camera_delta, camera_weight = 0.2, 0.1, 3.0
geo_sigma_power = 0.0           # geometry loss of a clip is weighted by (1 - sigma) ** this
# ---- machine
device, seed, num_workers, compile = "auto", 0, 2, False
checkpoint_activations = "none" # none, selective (keeps attention and wide MLPs) or full: memory against recomputation
shard_optimizer = False         # every rank keeps AdamW's moments of its share of the parameters (ZeRO stage 1)
plan, plan_gpus, plan_gb = False, 8, 80     # print memory, FLOPs and the settings that fit, then stop; see plan.py
precision = "auto"              # bf16: frozen matrices in bf16, the rest under autocast; fp32; auto: bf16 on a GPU


# --------------------------------------------------------------------------------------------------------- one batch
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
                        order = torch.randperm(self.clips, generator=generator(seed, 1, epoch)).tolist()
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

    def send(x):                                         # a copy from memory that is not pinned waits for the device
        return (x.pin_memory() if dev.type == "cuda" else x).to(dev, non_blocking=True)

    pose_keep, image_keep = (send((u[:, i] >= p).float()) for i, p in ((1, pose_dropout), (3, image_dropout)))
    if "relative" in b:                                  # without metric depth, translations have no scene unit
        pose_keep = pose_keep * ~b["relative"]
    text = [text if keep else empty_text for text, keep in zip(b["text"], u[:, 2] >= prompt_dropout)]
    y = None if b["y"] is None else b["y"] * image_keep.view(-1, 1, 1, 1, 1)
    image = {"clip": b["clip"] * image_keep.view(-1, 1, 1)} if "clip" in b else {}
    return send(torch.stack(noise)), send(shift_sigma(u[:, 0], shift)), pose_keep, dict(b, **image, text=text, y=y)


def by_sigma(sigma, **per_clip):
    """Sums of per-clip values in four bins of the noise level, and counts: (4, names + 1) on the device."""
    values = torch.stack([*(v.detach().float() for v in per_clip.values()), torch.ones_like(sigma)], 1)
    return torch.zeros(4, values.shape[1], device=sigma.device).index_add(0, (4 * sigma).long().clamp(max=3), values)


def compute_loss(model, b, noise, sigma, pose_keep, options, video):
    """Forward and all losses of one micro-batch -> scalar loss, dict of detached parts, by_sigma of the main ones."""
    s = sigma.view(-1, 1, 1, 1, 1)
    x = (1 - s) * b["latents"] + s * noise
    out = model(x, 1000 * sigma, b["text"], y=b["y"], clip=b.get("clip"), plucker=b["plucker"], poses=b["pose_enc"],
                pose_keep=pose_keep, video=video)
    loss, parts, per_clip = torch.zeros((), device=x.device), {}, {}
    if out["velocity"] is not None:
        per_clip["diffusion"] = flow_matching_loss(out["velocity"], b["latents"], noise)
        diffusion = per_clip["diffusion"].mean()
        loss, parts["diffusion"] = loss + lambda_diffusion * diffusion, diffusion.detach()
    if "depth" in out:
        geo, geo_parts = geometry_losses(out, dict(b, geo_weight=(1 - sigma) ** geo_sigma_power), options)
        loss, parts = loss + lambda_geo * geo, {**parts, **geo_parts}
        per_clip["depth_l1"] = clip_mean((out["depth"] - b["depth"]).abs() * b["mask"], b["mask"])
    return loss, {**parts, "total": loss.detach()}, {name: by_sigma(sigma, value=v) for name, v in per_clip.items()}


# --------------------------------------------------------------------------------------------------------------- main
def check_options():
    """Everything that can be wrong is refused before anything slow."""
    if precision not in ("auto", "bf16", "fp32"):
        raise SystemExit(f"precision = {precision!r}: wanted auto, bf16 or fp32")
    if stage not in (0, 1, 2):
        raise SystemExit(f"stage = {stage}: wanted 0, 1 or 2")
    if preset not in PRESETS:
        raise SystemExit(f"preset = {preset!r}: wanted one of {', '.join(PRESETS)}")
    for key, known in (("lr_schedule", ("constant", "cosine", "linear")), ("depth_mode", ("metric", "ssi")),
                       ("checkpoint_activations", CHECKPOINTING)):
        if globals()[key] not in known:
            raise SystemExit(f"{key} = {globals()[key]!r}: wanted one of {', '.join(known)}")
    for key in ("batch_size", "grad_accum", "log_every", "save_every", "keep_last"):
        if globals()[key] < 1:
            raise SystemExit(f"{key} = {globals()[key]}: wanted at least 1")
    if num_frames < 5 or num_frames % 4 != 1 or height % 16 or width % 16:
        raise SystemExit(f"num_frames = {num_frames}, height x width = {height} x {width}: the video latents need "
                         f"4k + 1 frames (21, 81) and multiples of 16")
    if plan:
        return
    if stage and not wan_dir and not random_wan:
        raise SystemExit(f"stage {stage} needs --wan_dir=FOLDER (Wan2.1 weights, or the run folder of stage 0)")
    if stage == 2 and not eval_only and (not init_from or read_metadata(init_from).get("stage") not in ("1", "2")):
        raise SystemExit(f"stage 2 starts from a stage 1 checkpoint; init_from = {init_from!r} is not one. "
                         f"Train config/stage1.py first, then --init_from=outputs/stage1/latest.safetensors")
    for path in filter(None, init_from.split(",")):
        read_metadata(path)


def check_depth_kinds(clips, master):
    """Clips whose depth has no unit: their depth head trains with the ssi loss; what needs a unit refuses them."""
    count = {split: c.count_relative() for split, c in clips.items()}
    if count.get("val") and stage:
        raise SystemExit(f"{data_dir}: {count['val']} validation clips have depth without a unit; their errors would "
                         "mean nothing. Give depth_scale in metadata.json, or choose other clips for the split val.")
    if count["train"] and stage == 2:
        raise SystemExit(f"{data_dir}: {count['train']} clips have depth without a unit; stage 2 conditions on cameras "
                         "in units of the scene. Train them in stage 1, or leave them out.")
    if count["train"] and stage and master:
        print(f"warning: {count['train']} of {len(clips['train'])} clips have depth without a unit (8-bit or min-max "
              "normalised); they train the depth head alone, with depth_mode ssi", flush=True)


def setup():
    """Rank, world size and device; the process group when torchrun started us."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
    if world > 1:
        dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
    return rank, world, torch.device(name)


def make_optimizer(model, world):
    """AdamW; no decay on norms, gates, biases, modulation and tokens.  Sharded: each rank updates its share of the
    parameters and sends them to the others, so the moments are kept once in all (ZeRO, Rajbhandari et al. 2020)."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.dim() < 2 or n.endswith(("modulation", "_token", "_tokens"))]
    ids = {id(p) for p in plain}
    groups = [dict(params=[p for _, p in named if id(p) not in ids], weight_decay=weight_decay),
              dict(params=plain, weight_decay=0.0)]
    how = dict(lr=learning_rate, betas=(0.9, beta2), fused=True)
    if shard_optimizer and world > 1:
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **how)
    return torch.optim.AdamW(groups, **how)


def learning_rate_at(step):
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    down = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[lr_schedule]
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
    return 2 * n ** 3 / best


def count_flops(model, clips, dev, autocast, options, video):
    """FLOPs of one micro-step's forward and backward.  In a pass of its own: under the counter some operations take
    another path, and a resumed run would differ from an uninterrupted one in the last bit."""
    b = prepare(collate([clips[i % len(clips)] for i in range(batch_size)]), model.dit.in_dim, dev)
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
    for line in report(replace(PRESETS[preset], **model_overrides), stage,
                       lambda model, *batch: compute_loss(model, *batch, options, stage != 1)[0],
                       (num_frames, height, width), 8 * batch_size * grad_accum, hardware, precision != "fp32"):
        print(line, flush=True)


def memory_gb(dev):
    if dev.type == "cuda":
        return torch.cuda.max_memory_allocated(dev) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def clock(seconds):
    return f"{int(seconds) // 3600:d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def main(options):
    check_options()
    if plan:
        return print_plan(SimpleNamespace(**options))
    rank, world, dev = setup()
    torch.manual_seed(seed)
    out, master = pathlib.Path(out_dir), rank == 0

    # ---- model and data
    cfg = replace(PRESETS[preset], **model_overrides)
    half = precision == "bf16" or precision == "auto" and dev.type == "cuda"
    autocast = torch.autocast(dev.type, torch.bfloat16) if half else nullcontext()
    model = build_model(cfg, wan_dir, dev, torch.bfloat16 if half and stage else None).set_stage(stage)
    model.checkpoint_activations = checkpoint_activations
    sources = list(filter(None, init_from.split(",")))
    splits = ("train", "val") if eval_every or eval_only else ("train",)
    clips = {split: CachedClips(data_dir, split, height, width, num_frames, wan_dir) for split in splits}
    in_dim, settings = model.dit.in_dim, SimpleNamespace(**options)
    check_depth_kinds(clips, master)
    if eval_only:
        rows = baselines(clips["train"], clips["val"], in_dim, dev, eval_clips) if master else {}
        for source in sources:
            meta = load_trained(model, source)
            model.set_stage(int(meta["stage"]))
            found = evaluate(model, clips["val"], dev, autocast, settings, rank, world,
                             more_sigmas=eval_more_sigmas)
            rows.update({f"stage {meta['stage']} step {meta['step']}, {name}": row for name, row in found.items()})
        if master:
            out.mkdir(parents=True, exist_ok=True)
            (out / "eval.json").write_text(json.dumps(rows, indent=2))
            print_table(rows)
        return
    start_from = resume
    if resume == "auto":
        newest = next((step for step in reversed(saved_steps(out)) if whole(out, step)), None)
        start_from = out / f"step-{newest}.safetensors" if newest else ""
    if sources and not start_from:
        load_trained(model, sources[0])

    # ---- optimizer, resume
    optimizer, first_step = make_optimizer(model, world), 0
    if start_from:
        meta = load_trained(model, start_from)
        if meta["stage"] != str(stage):
            raise SystemExit(f"resume = {start_from} is of stage {meta['stage']}, this run is stage {stage}; "
                             f"use --init_from to start a stage from another one, or another --out_dir")
        first_step = int(meta["step"])
        load_optimizer(pathlib.Path(start_from).with_name(f"step-{first_step}.optim.safetensors"), model, optimizer)
    if any(step > first_step and whole(out, step) for step in saved_steps(out)):
        raise SystemExit(f"{out} holds checkpoints later than step {first_step}, which pruning would keep in place of this "
                         f"run's; use another --out_dir, or delete them")
    video, wrapped = stage != 1, model
    flops = count_flops(model, clips["train"], dev, autocast, settings, video)
    if compile:
        for block in [*model.dit.blocks, *model.frame_blocks, *model.global_blocks]:
            block.attend, block.feed_forward = torch.compile(block.attend), torch.compile(block.feed_forward)
    if world > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True,
                                          device_ids=[dev] if dev.type == "cuda" else None)

    # ---- records
    total = batch_size * grad_accum * world
    metadata = dict(format="fantasyworld", stage=str(stage), model_config=json.dumps(asdict(model.cfg)),
                    train_config=json.dumps(options), git=git_hash(), torch=torch.__version__,
                    command=" ".join(sys.argv))
    board, log = None, print if master else lambda line: None
    if master:
        from torch.utils.tensorboard import SummaryWriter
        (out / "eval").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dict(metadata, first_step=first_step), indent=2))
        board = SummaryWriter(out / "tensorboard", purge_step=first_step + 1)
        log_file = open(out / "training.log", "a", buffering=1)
        log = lambda line: (print(line, flush=True), log_file.write(line + "\n"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"# stage {stage}, {trained / 1e6:.1f}M trainable, clips {len(clips['train'])} + {len(clips.get('val', ()))} val, "
        f"global batch {batch_size} x {grad_accum} x {world} = {total}, {dev}, git {metadata['git']}, "
        f"steps {first_step} .. {max_steps}")

    # ---- loop
    batches = Batches(len(clips["train"]), first_step, rank, world)
    loader = torch.utils.data.DataLoader(clips["train"], batch_sampler=batches, collate_fn=collate,
                                         num_workers=num_workers, pin_memory=dev.type == "cuda")
    seen, peak, started, tick, since = {}, matmul_peak(dev), time.perf_counter(), time.perf_counter(), 0
    data = iter(loader)
    empty_text = read_tensors(clips["train"].empty_text)[0]["text"].float().to(dev)
    for step in range(first_step, max_steps):
        lr = learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = {}
        for micro in range(grad_accum):
            b = prepare(next(data), in_dim, dev)
            noise, sigma, pose_keep, b = draw(b, step, batches.positions(step, micro), total, empty_text)
            last = micro == grad_accum - 1
            with nullcontext() if last or world == 1 else wrapped.no_sync():
                with autocast:
                    loss, parts, bins = compute_loss(wrapped, b, noise, sigma, pose_keep, settings, video)
                (loss / grad_accum).backward()
            for key, value in bins.items():
                seen[key] = seen.get(key, 0) + value
            for key, value in parts.items():          # stays on the device: .item() here would stall every step
                sums[key] = sums.get(key, 0) + value / grad_accum
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        since += 1

        if (step + 1) % log_every == 0 or step + 1 == max_steps:
            values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=dev) for v in sums.values()])
            if world > 1:
                dist.all_reduce(values, dist.ReduceOp.AVG if dev.type == "cuda" else dist.ReduceOp.SUM)
                values = values if dev.type == "cuda" else values / world
            scalars = {f"loss/{k}": v for k, v in zip(sums, values.tolist())}
            for key, value in seen.items():           # since the last line of the log
                if world > 1:
                    dist.all_reduce(value)
                scalars.update({f"sigma/{key} {k / 4:.2f}-{(k + 1) / 4:.2f}": total_ / n
                                for k, (total_, n) in enumerate(value.tolist()) if n})
            seen, spent = {}, (time.perf_counter() - tick) / since
            scalars.update(learning_rate=lr, gradient_norm=float(norm), samples_per_second=total / spent,
                           gpu_memory=memory_gb(dev), mfu=flops * grad_accum / spent / peak)
            left = clock((max_steps - step - 1) * (time.perf_counter() - started) / (step + 1 - first_step))
            log(f"step {step + 1}/{max_steps} | " + " | ".join(
                f"{k} {v:.4g}" for k, v in scalars.items() if not k.startswith("sigma/"))
                + f" | {spent:.3f} s/step | {left} left")
            if master:
                for key, value in scalars.items():
                    board.add_scalar(key, value, step + 1)
            tick, since = time.perf_counter(), 0
        if eval_every and (step + 1) % eval_every == 0:
            rows = evaluate(model, clips["val"], dev, autocast, settings, rank, world,
                            out / "eval" / f"step-{step + 1}.png")
            for name, row in rows.items():
                log(f"# val step {step + 1} {name} | " + " | ".join(f"{k} {v:.4g}" for k, v in row.items()))
                for key, value in row.items() if master else ():
                    board.add_scalar(f"val {name}/{key}", value, step + 1)
            tick, since = time.perf_counter(), 0
        saving = (step + 1) % save_every == 0 or step + 1 == max_steps
        if saving and hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()              # sharded: every rank sends its moments to rank 0
        if master and saving:
            save_checkpoint(out, step + 1, model, optimizer, metadata, keep_last)
    log(f"# done: {out / 'latest.safetensors'}, {clock(time.perf_counter() - started)}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(config.apply(globals(), sys.argv[1:]))
    except ValueError as error:                 # bad input: one line that names it, no traceback
        raise SystemExit(f"train.py: {error}") from None
