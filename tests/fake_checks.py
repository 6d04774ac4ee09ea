"""What runs on the GPU that is not there (fake_cuda.py): training, evaluation, sampling, encoders.

    python tests/fake_checks.py [--slow] [NAME ...]     the checks whose name holds a NAME

A check fails for what fake_cuda.py fails for, and for a host wait inside a step, a type that
differs between the autocasts of a CPU and of a GPU, or a tensor of 2^31 elements; always by
file:line.  --slow adds true sizes (minutes)."""

# ruff: noqa: E402, I001
import fake_cuda
from fake_cuda import CUDA, build, fakes, move, on_a_gpu, pinned
from fake_ranks import first_of_two, parallel, two_ranks

import contextlib
import io
import itertools
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from small import TINY, options_of

import encoders
import lib.evaluate
import lib.sampled
import sample
import train
from lib import plan
from lib.distributed import Ranks
from lib.offload import offload
from model import PRESETS, FantasyWorld, half_geometry
from wan import CLIP_SHAPE, LATENT, half_precision, start_condition

SMALL = (5, 32, 48)  # frames, height, width
GUIDE = {1: (8, 21, 336, 592), 2: (1, 81, 592, 336)}
MINI = replace(TINY, num_layers=2, num_pcb=1, taps=(0, 0, 0, 0), camera_iterations=1)
RELEASE = replace(
    MINI,
    in_dim=36,
    has_clip=True,
    released=True,
    bridge_layers=0,
    ray_sizes=(8, 8, 16, 8, 8),
    adapter_sizes=(1, 8, 8),
)


def loader_batch(cfg, n, size, relative=False, pin=pinned):
    """What the loader delivers: bf16 latents and text, fp32 targets, on the host, pinned."""
    frames, height, width = size
    f, h, w = LATENT.grid_of(*size)
    half = torch.bfloat16
    b = dict(
        latents=torch.randn(n, 16, f, h, w, dtype=half),
        start_latents=torch.randn(n, 16, f if cfg.in_dim == 36 else 1, h, w, dtype=half),
        depth=torch.rand(n, frames, height, width),
        moving=torch.zeros(n, frames, height, width, dtype=torch.bool),
        w2c=torch.randn(n, frames, 3, 4),
        intrinsics=torch.rand(n, frames, 3, 3),
    )
    if relative:
        b["relative"] = torch.ones(n, dtype=torch.bool)
    if cfg.has_clip:
        b["clip"] = torch.randn(n, *CLIP_SHAPE, dtype=half)
    text = [pin(torch.randn(7 + i, cfg.text_dim, dtype=half)) for i in range(n)]
    return {k: pin(v) for k, v in b.items()} | dict(text=text, id=["a"] * n, prompt=["p"] * n)


def make_model(cfg, stage, half=True, trains=True, device=CUDA):
    def make():
        model = FantasyWorld(cfg).set_stage(stage)
        if half and stage:
            half_precision(model.dit, torch.bfloat16)
        if half and not trains and cfg.released:
            half_geometry(model, torch.bfloat16)
        return model if trains else model.requires_grad_(False)

    return build(make, device)


def on_the_host(cfg, stage, **how):
    """A model whose frozen matrices only visit the GPU."""
    model = make_model(cfg, stage, device="cpu", **how)
    with patch.object(torch.nn.Module, "to", move):
        return offload(model, CUDA)


# ---- training
def two_steps(cfg, stage, how, size, n=2, half=True, device=CUDA, count=2, ranks=None, **more):
    """Two steps by the recipe's own parts -> what was watched, without what waits only once.

    ranks  None: alone; "ddp" or "spread": the first of two"""
    if ranks:
        first_of_two()
    with fakes() as watch:
        here = on_the_host if more.get("offloaded") else partial(make_model, device=device)
        model = here(cfg, stage, half=half)
        model.checkpoint_activations = how
        options = options_of(train, stage=stage, **more.get("options", {}))
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        empty = torch.randn(1, cfg.text_dim, device=device)
        wrapped = parallel(model, ranks == "spread") if ranks else model
        # FLOPs are counted in the recipe's first step, see recipe().
        counted = SimpleNamespace(flops=1)
        job = train.Job(model, wrapped, autocast, options, empty, n, counted)
        optimizer = train.make_optimizer(model, options)
        guard = train.BadSteps(None, options, torch.zeros((), device=device))
        trained = [p for p in model.parameters() if p.requires_grad]
        for step in range(count):
            watch.waits.clear()  # tables are made once, and may wait
            batch = loader_batch(cfg, n, size, more.get("relative"))
            if device.type == "cpu":  # the types of its forward are all that is asked for
                with patch.object(torch.Tensor, "backward"):
                    job.micro_step(batch, step, range(n), last=True)
                break
            loss, _, _, ids = job.micro_step(batch, step, range(n), last=True)
            without = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert not without, f"no gradient: {without[:3]}"
            wrong = [p for p in trained if (p.grad.dtype, p.grad.device) != (p.dtype, p.device)]
            assert not wrong, f"{len(wrong)} gradients of another type or device"
            copied = [p for p in trained if ranks == "ddp" and p.grad._base is None]
            assert not copied, f"{len(copied)} gradients are there beside DDP's buckets"
            norm = train.clip_gradients(trained, 1.0)
            train.take_step(optimizer, guard.judge(step, norm, [loss], ids=[ids]))
    return watch


def training(cfg, stage, how="none", size=SMALL, *, count=2, **more):
    watch = two_steps(cfg, stage, how, size, count=count, **more)
    assert count == 1 or not +watch.waits, f"a step waits at {dict(+watch.waits)}"
    if how == "none":  # what is recomputed has the same types
        on_cpu = two_steps(cfg, stage, how, size, **more, device=torch.device("cpu"), count=1)
        same_types(watch, on_cpu)
    return watch


def same_types(ours, theirs):
    """The forward has the same types under the autocast of a GPU and of a CPU."""
    differ = {
        where: f"{sorted(map(str, found))} on a GPU, {sorted(map(str, theirs.types[where]))}"
        for where, found in sorted(ours.types.items())
        if where in theirs.types and found != theirs.types[where]
    }
    assert not differ, f"types differ on a GPU and on a CPU at {differ}"


class Made:
    """Clips of a run, made up."""

    sizes, weights, empty_text, datasets, turns = [8], (1.0,), "empty", (), range(8)
    told = dict(clips=sizes)
    count_relative, frames = staticmethod(lambda: 0), staticmethod(lambda i: None)
    __len__ = lambda self: 8
    __getitem__ = lambda self, i: {
        k: v[0] for k, v in loader_batch(MINI, 1, SMALL, pin=lambda x: x).items()
    }


def recipe(stage, ranks=None, **more):
    """train.main, two steps with an evaluation and a checkpoint; only the data is made up."""

    saved, loop, original = [], [], train.take_step
    written = dict(save_checkpoint=lambda *a, **_: saved.append(a[1]))
    known = dict(
        start_processes=lambda *_: ranks or Ranks(device=CUDA),
        open_clips=lambda *_: dict(train=Made(), val=Made()),
        load_batches=lambda *_: iter(lambda: loader_batch(MINI, 2, SMALL), None),
        read_tensors=lambda _: ({"text": torch.randn(1, MINI.text_dim)}, {}),
        open_model=lambda *_: make_model(MINI, stage),
        peak_flops=lambda _: 1.0,
    )

    def take_step(*args, **how):
        original(*args, **how)
        loop.append(Counter(watch.waits))
        watch.waits.clear()

    options = dict(stage=stage, random_wan=True, grad_accum=2, batch_size=2, max_steps=2)
    options |= dict(log_every=2, eval_every=2, eval_clips=1, save_every=2) | more
    with tempfile.TemporaryDirectory() as out, fakes() as watch, contextlib.ExitStack() as on:
        on.enter_context(patch.multiple(train, take_step=take_step, **known, **written))
        for where, name, value in (
            (lib.evaluate, "comparison", lambda *_: None),
            (train.Records, "picture", lambda *_: None),
            (train, "check_options", lambda _: None),
            (dist, "is_initialized", lambda: ranks is not None),  # the two ranks' group stays
        ):
            on.enter_context(patch.object(where, name, value))
        on.enter_context(contextlib.redirect_stdout(io.StringIO()))
        train.main(options_of(train, out_dir=out, **options))
    assert saved == [2], saved
    watch.waits = sum(map(Counter, loop[1:]), Counter())  # the first step makes the tables
    assert not watch.waits, f"the loop waits for the device at {dict(watch.waits)}"
    return watch


def recipe_of_two():
    first_of_two()
    with two_ranks() as ranks:
        return recipe(2, ranks, optimizer="muon", spike_guard=20.0, eval_every=0)


def planned(cfg, stage, how, size, most=0.02):
    """The plan's count on CPU tensors is that on CUDA tensors."""
    loss = train.loss_alone(options_of(train, stage=stage))
    ours = plan.count(cfg, stage, loss, size, checkpointing=how)
    with on_a_gpu(), torch.device(CUDA):
        theirs = plan.count(cfg, stage, loss, size, checkpointing=how)
    said = f"{theirs.peak / 2**20:,.2f} MiB on CUDA, {ours.peak / 2**20:,.2f} planned"
    assert abs(theirs.peak / ours.peak - 1) < most, said
    return said


# ---- evaluation, sampling, encoders
def sampling(
    cfg, stage, sampler="euler", size=SMALL, offloaded=False, one_by_one=False, last=False
):
    grid = LATENT.grid_of(*size)
    with fakes() as watch, torch.no_grad():
        how = dict(trains=False)
        model = on_the_host(cfg, stage, **how) if offloaded else make_model(cfg, stage, **how)
        noise = torch.randn(1, 16, *grid, device=CUDA)
        start = torch.randn(1, 16, grid[0] if cfg.in_dim == 36 else 1, *grid[1:], device=CUDA)
        text = torch.randn(5, cfg.text_dim, dtype=torch.bfloat16)  # of a list, on the CPU
        clip = torch.randn(1, *CLIP_SHAPE).bfloat16() if cfg.has_clip else None
        w2c = torch.randn(1, size[0], 3, 4, device=CUDA)
        K = torch.rand(1, size[0], 3, 3, device=CUDA)
        y = start_condition(start, cfg.in_dim, grid[0])
        inputs = sample.Inputs(noise, text, text, y, clip, w2c, K)
        how = sample.Sampling(sampler, steps=2, read_last_step=last)
        full = [torch.cuda.OutOfMemoryError("full")] if one_by_one else []
        one_pass = sample.Denoiser.one_pass

        def often(*args):
            if full:
                raise full.pop()
            return one_pass(*args)

        with patch.object(sample.Denoiser, "one_pass", often):
            with torch.autocast("cuda", torch.bfloat16):
                latents, geometry, _ = sample.generate(model, inputs, how)
    assert latents.dtype == torch.float32 and latents.device == CUDA
    assert all(v.device == CUDA for v in geometry.values() if v is not None)
    return watch


def evaluation(whole=False):
    """A clip that is sampled and compared; whole: all of its rows, and the baselines.  What an
    evaluation reads waits for the device, and may."""

    class Clips(Made):
        frames = staticmethod(lambda i: np.zeros((SMALL[0], *SMALL[1:], 3), np.uint8))

    vae = SimpleNamespace(decode=lambda z, **_: torch.zeros(1, 3, *SMALL, device=z.device))
    once = patch.multiple("lib.align", STEPS=1, LEVELS=(1,))  # more take no other way
    unread = patch("lib.pictures.as_pixels", lambda x: x)  # there are no pixels
    with fakes() as watch, torch.no_grad(), once, unread:
        model, negative = make_model(MINI, 2, trains=False), torch.randn(3, MINI.text_dim)
        autocast, how = torch.autocast("cuda", torch.bfloat16), sample.Sampling(steps=1, guidance=1)
        draw = sample.ClipSampler(vae, negative.to(CUDA), how, autocast)
        how = lib.evaluate.How(autocast, 1, 0.1, eval_samples=1, draw=draw)
        clips = train.Examples(Clips(), model, CUDA, 0)
        if not whole:  # the way there and back is sampled alike: once
            b = clips[0]
            made = draw(model, b)
            row = lib.sampled.sampled_row(model, b, clips.truth(0), lambda *_: made)[0]
            assert {"psnr", "warp_psnr", "align_rot", "revisit"} < set(row)
            return watch
        rows = lib.evaluate.evaluate(model, clips, how) | lib.evaluate.baselines(clips, clips, how)
    assert {"poses given", "no poses", "sampled"} < set(rows), rows.keys()
    return watch


def encoding():
    with fakes() as watch, torch.no_grad():
        vae = build(lambda: encoders.WanVAE(8))
        z = vae.encode(torch.randn(1, 3, 9, 64, 96))
        assert z.shape == (1, 16, 3, 8, 12) and z.device == CUDA
        assert vae.decode(z.cpu()).shape == (1, 3, 9, 64, 96)
        sizes = dict(vocab=64, dim=64, attn_dim=64, ffn_dim=128, heads=4, layers=2)
        t5 = build(lambda: encoders.UMT5Encoder(**sizes).to(torch.bfloat16))
        ids = torch.ones(1, 512, dtype=torch.long, device=CUDA)
        assert t5(ids).dtype == torch.bfloat16
        clip = build(lambda: encoders.CLIPVision(64, 3, 4).to(torch.bfloat16))
        assert clip(torch.randn(1, 3, 64, 96, device=CUDA)).shape == (1, 257, 64)
    return watch


def hopper(check):
    with patch.object(fake_cuda, "CUDNN_FIRST", True):
        return check()


# ---- the list
def checks():
    """What CI runs, in one to two minutes on an idle core."""
    yield "train stage 0 none", partial(training, MINI, 0)
    # Its types alone: that a step waits for nothing, the recipe of two and "spread" see.
    yield "train stage 2 none", partial(training, MINI, 2, count=1)
    yield "train release", partial(training, RELEASE, 2)
    yield "train spread", partial(training, MINI, 2, "selective", ranks="spread")
    yield "recipe of two", recipe_of_two
    yield "sample", partial(sampling, MINI, 2, "unipc")
    yield "sample one pass after the other", partial(sampling, MINI, 2, one_by_one=True)
    yield "sample release", partial(sampling, RELEASE, 2, last=True)
    yield "sample offloaded", partial(sampling, RELEASE, 2, offloaded=True)
    yield "evaluation of a sample", evaluation
    yield "encoders", encoding
    yield "plan mini", partial(planned, MINI, 2, "selective", (2, *SMALL))


def slow_checks():
    """Every way of small sizes, then true sizes."""
    yield "train ddp", partial(training, MINI, 2, "selective", ranks="ddp")
    for stage in (0, 1, 2):
        yield f"recipe stage {stage}, evaluation", partial(recipe, stage)
    yield "evaluation", partial(evaluation, whole=True)
    for stage in (1, 2):
        yield f"train stage {stage} none, two steps", partial(training, MINI, stage)
    for stage, how in itertools.product((1, 2), ("attention", "selective", "full")):
        yield f"train stage {stage} {how}", partial(training, MINI, stage, how)
    yield "train stage 2 cudnn", lambda: hopper(partial(training, MINI, 2, "selective"))
    yield "train stage 2 fp32", partial(training, MINI, 2, half=False)
    how = dict(offloaded=True)
    yield "train offloaded", partial(training, MINI, 2, "full", **how)
    yield "train ddp offloaded", partial(training, MINI, 2, "full", ranks="ddp", **how)
    losses = dict(depth_mode="ssi")
    yield "train without units", partial(training, MINI, 1, relative=True, options=losses)
    for ways in ("none", "to_geometry", "to_video"):
        yield f"train exchange {ways}", partial(training, replace(MINI, exchange=ways), 2)
    yield "train release full", partial(training, RELEASE, 2, "full")
    yield "sample stage 1", partial(sampling, MINI, 1)
    yield "sample release, true rays", partial(sampling, replace(RELEASE, true_rays=True), 2)
    true, large = PRESETS["1.3b"], PRESETS["14b"]
    for stage, (n, *size) in GUIDE.items():
        size = tuple(size)
        yield f"true 1.3b stage {stage}", partial(training, true, stage, "selective", size, n=n)
        for how in ("none", "selective"):
            yield f"plan 1.3b {stage} {how}", partial(planned, true, stage, how, (1, *size))
    size, release = (81, 336, 592), replace(large, released=True)
    yield "true 14b", partial(training, large, 2, "full", size, n=1)
    yield "true 14b release", partial(training, release, 2, "full", size, n=1)
    yield "plan 14b full", partial(planned, large, 2, "full", (1, *size))
    yield "true sample 1.3b", partial(sampling, true, 2, size=(81, 592, 336))
    yield "true sample 14b", partial(sampling, release, 2, size=size)
    yield "true sample 14b offloaded", partial(sampling, release, 2, size=size, offloaded=True)


def main(*names):
    slow = "--slow" in names
    names = [name for name in names if name != "--slow"]
    sample.bar = lambda phase, items, unit: items  # nobody watches
    failed = 0
    for name, check in [*checks(), *(slow_checks() if slow else ())]:
        if names and not any(part in name for part in names):
            continue
        since = time.perf_counter()
        try:
            found = check()
            faults = getattr(found, "faults", {})
            said = f"{faults}" if faults else found if isinstance(found, str) else "ok"
        except Exception as error:  # every one of them is a finding
            root = str(Path(train.__file__).parent)
            frames = [f for f in traceback.extract_tb(error.__traceback__) if root in f.filename]
            at = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1][:4])
            said = f"{type(error).__name__}: {str(error).splitlines()[0][:1500]} at {at}"
            faults = True
        failed += bool(faults)
        verdict, spent = "FAIL" if faults else "ok  ", time.perf_counter() - since
        print(f"{verdict} {name} ({spent:.1f} s): {said}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(min(1, main(*sys.argv[1:])))
