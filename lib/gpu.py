"""The true size on a GPU: `python bench.py gpu`.  Random weights, the guide's clips, the settings that --plan=True names.

Per stage: seconds of a whole step and of every variant's forward and backward, and their share of the peak.  Then the sampling loop, and how far bf16, fp32 and the CPU agree.
**No GPU was at hand so far**: on a CPU the same code runs at tiny sizes (tests/test_gpu.py), which says nothing of a GPU."""

import statistics
import time
from contextlib import nullcontext
from unittest.mock import patch

import torch
import sample
import train
from encoders import WanVAE
from lib import camera_paths, plan
from lib.variants import OPTIONS, make_encoders, raw_clips, straightforward_sample, variants
from model import FantasyWorld
from wan import half_precision


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call, device, rounds):
    """Median over rounds, and the spread (max - min) / median; None, None when it does not fit the device."""
    spent = []
    try:
        for i in range(rounds + 1):  # the first one fills caches and compiles
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            spent += [time.perf_counter() - start] if i else []
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, None
    return statistics.median(spent), (max(spent) - min(spent)) / statistics.median(spent)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


def whole_step(model, optimizer, batch, video):
    """What train.py's loop does with one micro-batch of one step."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def call():
        with autocast(batch[1].device):
            loss = train.compute_loss(model, *batch, OPTIONS, video)[0]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, train.grad_clip)
        optimizer.found_inf = (~(loss.detach().isfinite() & norm.isfinite())).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def step_table(cfg, stage, size, total, device, gigabytes, rounds):
    """One stage at its true size."""

    def loss(model, *batch):
        return train.compute_loss(model, *batch, OPTIONS, stage == 2)[0]

    counts = {
        how: {n: plan.count(cfg, stage, loss, (n, *size), checkpointing=how) for n in (1, 2)}
        for how in ("none", "selective", "full")
    }
    found = plan.settings(counts, 1, gigabytes, total)
    if not found:
        return print(f"stage {stage}: does not fit {gigabytes:.0f} GB", flush=True)
    how, _, batch_size, _, planned = found
    with device:
        model = FantasyWorld(cfg)
        half_precision(model.dit, torch.bfloat16)
        model.set_stage(stage).checkpoint_activations = how
        b, noise, sigma, keep = plan.example_batch(cfg, batch_size, *size)
        raw, encoders = raw_clips(batch_size, cfg, *size), make_encoders(cfg, small=cfg.dim < 1000)
    batch, peak = (b, noise, sigma, keep), train.matmul_peak(device)
    step = whole_step(model, train.make_optimizer(model, 1), batch, stage == 2)
    print(
        f"\nstage {stage}, {batch_size} clips of {size[0]} x {size[1]} x {size[2]}, checkpoint_activations {how}; a matrix "
        f"product reaches {peak / 1e12:.3g} TFLOP/s",
        flush=True,
    )
    print(f"  planned {planned / plan.GIB:.1f} GiB")
    flops = counts[how][1].flops * batch_size
    whole, spread = seconds(step, device, rounds)
    print(
        f"  {'whole step':34s}{whole:9.3f} s, spread {spread:.0%}, {batch_size / whole:.2f} clips/s, "
        f"{flops / whole / 1e12:.3g} TFLOP/s, MFU {flops / whole / peak:.0%}",
        flush=True,
    )
    ours = None
    for name, call in variants(model, stage, batch, (raw, encoders)).items():

        def timed(call=call):
            with autocast(device):
                call()

        took, spread = seconds(timed, device, rounds)
        ours = ours or took
        print(
            f"  {name:34s}"
            + (
                f"{took:9.3f} s forward and backward, spread {spread:.0%}, {took / ours:.2f} x ours"
                if took
                else "does not fit"
            ),
            flush=True,
        )


def sampling_table(cfg, size, device, rounds, steps=4):
    """Guided steps of both loops at true size, and decoding."""
    frames, height, width = size
    quiet = patch.object(sample, "tqdm", lambda grid, **_: grid)
    with quiet, device, torch.no_grad(), autocast(device):
        model = FantasyWorld(cfg).requires_grad_(False)
        half_precision(model.dit, torch.bfloat16)
        b, noise, *_ = plan.example_batch(cfg, 1, *size)
        vae, clip = WanVAE(96 if cfg.dim > 1000 else 12), b.get("clip")
        w2c, K = (x.to(device) for x in camera_paths.load_camera("orbit", frames, (height, width)))
        text, negative = b["text"], [torch.zeros_like(b["text"][0])]
        for stage in (1, 2):
            model.stage = stage
            rows = dict(
                ours=lambda: sample.generate(
                    model, noise, text, negative, b["y"], clip, w2c, K, "euler", steps, 5.0, 5.0
                ),
                straightforward=lambda: straightforward_sample(
                    model, noise, text, negative, b["y"], w2c, K, steps, 5.0, lambda x: x, clip
                ),
            )
            for name, call in rows.items():
                took, spread = seconds(call, device, rounds)
                print(
                    f"  sampling, stage {stage}, {steps} guided steps and read-out, {name:16s}"
                    + (f"{took:9.3f} s, spread {spread:.0%}" if took else "does not fit"),
                    flush=True,
                )
        took, spread = seconds(lambda: vae.decode(noise.float()), device, rounds)
        print(f"  decoding {frames} frames {took:9.3f} s, spread {spread:.0%}", flush=True)


def agreement(cfg, size, device):
    """Largest differences relative to the largest value: device against CPU in fp32, and bf16 against fp32."""
    torch.manual_seed(0)
    model = FantasyWorld(cfg).set_stage(2)
    with torch.no_grad():
        for p in (*model.exchange.parameters(), *model.camera_adapters.parameters()):
            p.add_(0.02 * torch.randn_like(p))
    b, noise, sigma, _ = plan.example_batch(cfg, 1, *size)

    @torch.no_grad()
    def outputs(where, half):
        at = {k: v.to(where) if torch.is_tensor(v) else v for k, v in b.items()}
        with autocast(where) if half else nullcontext():
            out = model.to(where)(
                noise.to(where),
                1000 * sigma.to(where),
                [t.to(where) for t in b["text"]],
                y=at["y"],
                clip=at.get("clip"),
                plucker=at["plucker"],
                poses=at["pose_enc"],
            )
        return {k: v.float().cpu() for k, v in out.items()}

    def compare(title, found, wanted):
        print(
            f"  {title:28s}"
            + ", ".join(
                f"{k} {(found[k] - v).abs().max() / v.abs().max():.1e}" for k, v in wanted.items()
            ),
            flush=True,
        )

    exact = outputs(device, False)
    compare(f"bf16 against fp32 on {device.type}", outputs(device, True), exact)
    if device.type == "cuda":
        compare("cuda against cpu, fp32", exact, outputs(torch.device("cpu"), False))


def tables(cfg, sizes, small, small_size, rounds, device=None, gigabytes=None, totals=(64, 112)):
    """Everything; cfg and sizes {stage: (frames, height, width)} are true, small and small_size reduced for the CPU;
    totals: global batches of the two stages."""
    if device is None and not torch.cuda.is_available():
        return print("\ngpu: none here", flush=True)
    device = device or torch.device("cuda", 0)
    if device.type == "cuda":
        gigabytes = torch.cuda.get_device_properties(device).total_memory / plan.GIB
        print(
            f"\n{torch.cuda.get_device_name(device)}, {gigabytes:.0f} GiB, torch {torch.__version__}",
            flush=True,
        )
    for (stage, size), total in zip(sizes.items(), totals):
        step_table(cfg, stage, size, total, device, gigabytes, rounds)
    sampling_table(cfg, sizes[2], device, rounds)
    print(f"  largest differences, reduced width, {small_size}:")
    agreement(small, small_size, device)
