"""Measure work, time and memory against straightforward code.

    python bench.py [flops step sampling data] [--device cpu|cuda] [--rounds N]

    flops      FLOPs of a clip at true size beside the least work, counted on fake tensors
    step       seconds, memory and share of the peak of a training step
    sampling   the same of a guided video, and of its decoding
    data       clips per second of the loader at true size, beside what a GPU takes

Without a name all of them, by the same code on a CPU and on a GPU: a GPU takes the 1.3B preset and
the guide's clips, a CPU the miniature's widths and small clips.  The rows of a table are timed in
turn, round after round: medians, on a CPU of the processor time of one thread.

Straightforward is the method's description taken literally: every block forward and backward with
weight gradients, the exchange in stage 1 too, encoders in the step, heads over all frames at once,
one clip at a time.  least_work() defines the least."""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import config
import sample
import train
from data import collate
from encoders import CLIPVision, UMT5Encoder, WanVAE
from geometry import encode_pose
from lib import plan
from lib.caches import read_again, save_tensors, stamp
from lib.camera_paths import load_camera
from lib.guards import run_command
from lib.plan import GIB, Count, example_batch, fake, fake_model, fake_tensors
from model import PRESETS, Conditions, Config, FantasyWorld, clear_tables
from wan import CLIP_SHAPE, LATENT, half_precision, start_condition

OPTIONS = config.apply(vars(train), [])  # the defaults

GOAL = {1: 0.50, 2: 0.45}  # shares of a GPU's peak that the training steps are to reach


@dataclass(frozen=True)
class Case:
    """What a device runs."""

    cfg: Config
    clips: dict  # stage -> (clips of a micro-batch, frames, height, width)
    vae_dim: int = 96
    text: dict = field(default_factory=dict)  # sizes of the text encoder; by default umT5-xxl's


TRUE = Case(PRESETS["1.3b"], {1: (8, 21, 336, 592), 2: (1, 81, 592, 336)})  # of the guide's configs
SMALL = Case(
    PRESETS["tiny"],
    {1: (2, 21, 64, 112), 2: (2, 21, 64, 112)},
    vae_dim=12,
    text=dict(vocab=64, dim=64, attn_dim=64, ffn_dim=160, heads=8, layers=8),
)


# --------------------------------------------------------------------------------------- measuring
@dataclass
class Row:
    """A call: what its first run did, and the seconds of the others."""

    flops: int
    peak: int  # bytes of the tensors that it made and held at a time
    seconds: list = field(default_factory=list)


def clock(device):
    """Seconds; on a CPU of this process alone, for others run on the machine too."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def counted(call):
    with Count() as counter:
        call()
    return Row(counter.flops, counter.peak[""])


def measure(calls, device, rounds):
    """{name: function} -> {name: Row, None where it does not fit}; all run in every round."""
    rows = dict.fromkeys(calls)
    for name, call in calls.items():
        with suppress(torch.cuda.OutOfMemoryError):
            rows[name] = counted(call)  # it fills the caches too
    for _ in range(rounds):
        for name, row in rows.items():
            if row:
                start = clock(device)
                calls[name]()
                row.seconds.append(clock(device) - start)
    return rows


def print_rows(title, rows, peak):
    """A line of each row; ratios are to the first that fits, peak is the device's FLOP/s."""
    print(f"{title:34s} seconds spread  x time x FLOPs  peak    GiB", flush=True)
    first = next(filter(None, rows.values()), None)
    for name, row in rows.items():
        if row is None:
            print(f"  {name:32s} does not fit")
            continue
        seconds, work = statistics.median(row.seconds), row.flops / first.flops
        spread = (max(row.seconds) - min(row.seconds)) / seconds
        ratio = seconds / statistics.median(first.seconds)
        print(
            f"  {name:32s}{seconds:8.3f}{spread:7.0%}{ratio:8.2f}{work:8.2f}"
            f"{row.flops / seconds / peak:6.0%}{row.peak / GIB:7.2f}",
            flush=True,
        )


def autocast(device):
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def model_on(case, device):
    """Random weights, the frozen ones on a GPU in bf16."""
    torch.manual_seed(0)
    with device:
        model = FantasyWorld(case.cfg)
    if device.type == "cuda":
        half_precision(model.dit, torch.bfloat16)
    return model


# ----------------------------------------------------------------------------------- training steps
def make_encoders(case):
    """VAE, text encoder and, where the model has one, CLIP's vision tower, with random weights."""
    tower = [CLIPVision()] if case.cfg.has_clip else []
    return nn.ModuleList([WanVAE(case.vae_dim), UMT5Encoder(**case.text), *tower])


@torch.no_grad()
def encode(encoders, video, ids):
    """Clips (B, 3, T, H, W) and words (B, L) -> the part of a batch that data.py encode caches."""
    vae, text, *tower = encoders
    start = vae.encode(video[:, :, :1]).bfloat16().float()
    latents = vae.encode(video).bfloat16().float()
    found = dict(latents=latents, text=list(text(ids).float()))
    found["y"] = start_condition(start, 32, latents.shape[2])
    return dict(found, clip=tower[0](video[:, :, 0]).float()) if tower else found


class Steps:
    """A model and a micro-batch of a stage; its methods take one training step."""

    def __init__(self, model, encoders, stage, size):
        self.model, self.encoders, self.stage = model, encoders, stage
        self.b, *self.drawn = example_batch(model.cfg, *size)
        self.pixels = torch.rand(size[0], 3, *size[1:]) * 2 - 1
        self.ids = torch.randint(1, 64, (size[0], model.cfg.text_len))
        self.b.update(encode(encoders, self.pixels, self.ids))

    def configure(self, stage, checkpointing, chunk):
        self.model.set_stage(stage).checkpoint_activations = checkpointing
        for head in (self.model.depth_head, self.model.point_head):
            head.chunk = chunk
        self.model.zero_grad()

    def backward(self, stage, forward, b, drawn):
        train.loss_alone(OPTIONS.replaced(stage=stage))(forward, b, *drawn).backward()

    def ours(self, checkpointing):
        self.configure(self.stage, checkpointing, self.model.cfg.head_chunk)
        self.backward(self.stage, self.model, self.b, self.drawn)

    def straightforward(self):
        self.configure(2, "none", 10**6)
        self.model.requires_grad_(True)
        for i in range(len(self.ids)):
            at = slice(i, i + 1)
            b = {k: v[at] for k, v in self.b.items()}
            b.update(encode(self.encoders, self.pixels[at], self.ids[at]))
            forward = partial(literal_forward, self.model)
            self.backward(2, forward, b, [x[at] for x in self.drawn])

    def calls(self):
        """Name -> function of a table's rows."""
        rows = {f"ours, {how}": partial(self.ours, how) for how in ("selective", "none", "full")}
        return {**rows, "straightforward": self.straightforward}


def literal_forward(model, x, t, context, y, clip, **camera):
    """model.forward written out, with autograd through all of Wan: nothing runs under no_grad."""
    dit = model.dit
    e, modulation = dit.modulation(t)
    video = dit.conditions(context, clip, camera["plucker"]).with_keys(dit.blocks)
    conditions = Conditions(**vars(video), pose_embedding=model.pose_encoder(camera["poses"]))
    x, grid = dit.embed(x, y, conditions.control)
    shared = replace(model.shared(t, grid, conditions, None), modulation=modulation)
    for step in model.pcb:
        x = step(x, shared)
    z, outputs = model.geometry_tokens(x, shared), {}
    for layer, step in enumerate(model.irg):
        x, z, outputs[layer] = step(x, z, shared)
    return dict(velocity=dit.unpatchify(dit.head(x, e), grid), **model.read_out(outputs, grid))


def least_work(cfg, stage, size):
    """FLOPs per clip of the least work, from forward counts on fake tensors -> dict.

    stage 1   video forward up to the bridge + 3 x trainable forward
    stage 2   video forward + its gradient to the input (linear 1 x forward) + 3 x trainable forward
    ideal counts an attention's backward as 2 x its forward; fused adds the half forward of every
    fused kernel, which recomputes its scores.  PCB and geometry: forward of these blocks alone."""
    with fake_tensors(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model = fake_model(cfg, stage)
        b, noise, sigma, _ = example_batch(cfg, 1, *size)
        given = dict(y=b["y"], clip=b.get("clip"), plucker=b["plucker"])
        blocks, irg = model.dit.blocks, model.irg

        def work(forward, **more):
            with Count() as counter:
                forward(noise, 1000 * sigma, b["text"], **given, **more)
            return np.array([counter.flops, counter.attention])

        def dit(last):
            model.dit.blocks = blocks[:last]
            return work(model.dit)

        def whole(steps, heads=True):
            model.irg = irg[:steps]
            return work(model, poses=b["pose_enc"], video=stage == 2, heads=heads)

        embed, pcb, tail = dit(0), dit(cfg.num_pcb), dit(None)
        geometry = whole(None, heads=False) - whole(0, heads=False)
        total = whole(None)
    frozen = tail if stage == 2 else pcb
    trained = total - frozen
    passing = tail - embed if stage == 2 else 0 * embed  # the gradient passes, no weight takes one
    ideal = frozen[0] + 3 * trained[0] + passing.sum()
    fused = ideal + (trained[1] + passing[1]) / 2
    return dict(ideal=ideal, fused=fused, PCB=(pcb - embed)[0], geometry=geometry[0])


# ---------------------------------------------------------------------------------- tables of steps
def flops_table():
    """FLOPs of the steps of one clip at true size beside the least work."""
    print("TFLOP of a clip, forward and backward, 1.3b at true size", flush=True)
    for stage, (_, *size) in TRUE.clips.items():
        with fake_tensors(), torch.autocast("cpu", torch.bfloat16):
            encoders = fake(lambda: make_encoders(TRUE))
            steps = Steps(fake_model(TRUE.cfg, stage), encoders, stage, (1, *size))
            rows = {name: counted(call).flops for name, call in steps.calls().items()}
        least = least_work(TRUE.cfg, stage, size)
        rows = {"least work": least["ideal"], "least work, fused": least["fused"], **rows}
        print(f"stage {stage}, {size[0]} x {size[1]} x {size[2]:<12d}  TFLOP  x least  x fused")
        for name, flops in rows.items():
            ratios = flops / least["ideal"], flops / least["fused"]
            print(f"  {name:28s}{flops / 1e12:7.1f}{ratios[0]:9.2f}{ratios[1]:9.2f}", flush=True)


def step_rows(case, stage, device, rounds):
    """Rows of a stage; its model and encoders are freed before the next stage makes its own."""
    with autocast(device):
        with device:  # left before the clock starts: it looks at every call
            model, encoders = model_on(case, device), make_encoders(case)
            encoders[1].to(torch.bfloat16 if device.type == "cuda" else torch.float32)
            steps = Steps(model, encoders, stage, case.clips[stage])
        return measure(steps.calls(), device, rounds)


def step_table(case, device, rounds):
    """Seconds, memory and share of the peak of training steps."""
    for stage, (clips, *size) in case.clips.items():
        title = f"stage {stage}, {clips} x {size[0]} x {size[1]} x {size[2]}"
        print_rows(title, step_rows(case, stage, device, rounds), plan.peak_flops(device))


# ---------------------------------------------------------------------------------------- sampling
def literal_sample(model, inputs, sampling):
    """sample.generate taken literally -> latents, geometry.

    Every forward embeds prompt and camera, makes its tables and runs the heads; a step takes two;
    the last one's geometry is not the read-out's, so one more forward follows."""
    camera = inputs.w2c, inputs.K, tuple(LATENT.space * n for n in inputs.noise.shape[-2:])
    rays, poses = model.rays(*camera), encode_pose(*camera)

    def forward(x, t, text):
        clear_tables()
        return model(x, t, [text], inputs.y, inputs.clip, rays, poses)

    def guided(x, t):
        negative, positive = (forward(x, t, text) for text in (inputs.negative, inputs.text))
        return torch.lerp(negative["velocity"], positive["velocity"], sampling.guidance)

    latents = sample.sample_euler(guided, inputs.noise, sampling.steps, shift=sampling.shift)
    t = torch.full((1,), 1000 * sample.READOUT_SIGMA, device=latents.device)
    x = torch.lerp(latents, inputs.noise, sample.READOUT_SIGMA)
    return latents, forward(x, t, inputs.text)


def sampling_table(case, device, rounds, steps=4):
    """A guided video by our loop and by the literal one, without its decoding, and that."""
    _, frames, height, width = case.clips[2]
    w2c, K = load_camera("orbit", frames, (height, width))  # on the CPU, where its files are read
    model, how = model_on(case, device), sample.Sampling(steps=steps)
    with device:
        vae = WanVAE(case.vae_dim).requires_grad_(False)
        b, noise, *_ = example_batch(case.cfg, 1, frames, height, width)
    texts, image = (b["text"][0], 0 * b["text"][0]), (b["y"], b.get("clip"))
    inputs = sample.Inputs(noise, *texts, *image, w2c.to(device), K.to(device))
    calls = {
        "ours": lambda: sample.generate(model, inputs, how),
        "straightforward": lambda: literal_sample(model, inputs, how),
        "decoding": lambda: vae.decode(noise),
    }
    for stage in (1, 2):
        model.set_stage(stage).requires_grad_(False)
        with torch.no_grad(), autocast(device):
            rows = measure(calls, device, rounds)
        title = f"stage {stage}, {steps} guided steps, read-out"
        print_rows(title, rows, plan.peak_flops(device))


# -------------------------------------------------------------------------------------------- data
def write_cache(path, size, cfg):
    """The large tensors of a clip as data.py encode leaves them, filled with random numbers."""
    tensors = dict(
        depth=torch.rand(*size) + 1,
        latents=torch.rand(LATENT.channels, *LATENT.grid_of(*size)).bfloat16(),
        text=torch.rand(cfg.text_len, cfg.text_dim).bfloat16(),
        clip=torch.rand(CLIP_SHAPE).bfloat16(),
    )
    save_tensors(path, tensors, {})


def read_batch(paths):
    return collate([read_again(path, stamp(path))[0] for path in paths])


def data_table(case, count=160):
    """Clips per second of the loader, and how many a GPU takes that reaches its goal."""
    print("\nloader: two workers on two idle cores, files in the page cache", flush=True)
    for stage, (batch, *size) in case.clips.items():
        order = [[i % 8 for i in range(n, n + batch)] for n in range(0, count, batch)]
        with tempfile.TemporaryDirectory() as folder:
            paths, spent = [Path(folder, f"{i}.safetensors") for i in range(8)], []
            for path in paths:
                write_cache(path, size, case.cfg)
            how = dict(collate_fn=read_batch, num_workers=2)
            for batches in (order[:1], order[:1] + order):  # what starting the workers costs alone
                start = sum(os.times()[:4])  # of this process and of its children that have ended
                for _ in DataLoader(paths, batch_sampler=batches, **how):
                    pass
                spent.append(sum(os.times()[:4]) - start)
            megabytes = paths[0].stat().st_size / 1e6
        rate = 2 * count / (spent[1] - spent[0])
        need = GOAL[stage] * plan.PEAK_FLOPS["H200"] / least_work(case.cfg, stage, size)["ideal"]
        print(
            f"  stage {stage}, {megabytes:.0f} MB a clip: {rate:.1f} clips/s; an H200 at "
            f"{GOAL[stage]:.0%} of its peak takes {need:.1f}",
            flush=True,
        )


TABLES = ("flops", "step", "sampling", "data")


def main():
    devices = ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}; else all")
    parser.add_argument("--device", default=devices[-1], choices=devices, help="else a GPU if any")
    how = dict(type=int, default=3, choices=range(1, 100), metavar="N")
    parser.add_argument("--rounds", **how, help="of step and sampling; medians (default 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    device, case = torch.device(args.device), TRUE if args.device == "cuda" else SMALL
    calls = dict(
        flops=flops_table,
        step=lambda: step_table(case, device, args.rounds),
        sampling=lambda: sampling_table(case, device, args.rounds),
        data=lambda: data_table(TRUE),
    )
    for name in args.tables or TABLES:
        calls[name]()


if __name__ == "__main__":
    run_command("bench.py", main)
