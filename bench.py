"""Measure work, time and memory against straightforward code: `python bench.py [work train sample data scaling gpu]`.

    work      stages 1 and 2: FLOPs per clip at true size (fake tensors) beside the ideal
    train     the same steps timed at a reduced width on a CPU, with their memory
    sample    a guided loop and its decoding, the same way
    data      what the loader delivers at the guide's sizes
    scaling   bytes that 1, 2, 4 gloo ranks send per step and when
    gpu       the steps and the sampling loop at true size, where there is a GPU: lib/gpu.py

What is compared with what is in lib/variants.py.  All variants of a table are timed in turn in every round, on a CPU in
seconds of one thread's processor time, and the median is given, so ratios hold on a machine that others use too."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import sample
import train
from data import CachedClips, collate
from encoders import CLIPVision, UMT5Encoder, WanVAE
from lib import camera_paths, gpu
from lib.caches import save_tensors
from lib.plan import Count, example_batch, fake, fake_model, fake_tensors
from lib.variants import (
    OPTIONS,
    encode,
    ideal,
    make_encoders,
    raw_clips,
    straightforward_sample,
    variants,
)
from model import PRESETS, FantasyWorld

TRUE = {1: (21, 336, 592), 2: (81, 592, 336)}  # the guide's clips: frames, height, width

# The 1.3B preset at an eighth of its widths and a third of its layers, on a small grid.
SMALL = replace(
    PRESETS["1.3b"],
    dim=192,
    ffn_dim=1120,
    head_dim=64,
    text_dim=512,
    text_len=64,
    freq_dim=64,
    has_clip=False,
    num_layers=10,
    num_pcb=4,
    taps=(1, 3, 4, 5),
    geo_dim=176,
    geo_heads=2,
    bridge_width=40,
    pose_hidden=80,
    irg_dim=144,
    irg_heads=2,
    dpt_channels=(8, 16, 32, 32),
    dpt_features=16,
    dpt_tail=8,
    camera_dim=64,
    camera_heads=2,
)

SMALL_SIZE = (21, 64, 112)

H200_PEAK = 989e12  # dense bf16 FLOP/s of an H100 or H200.  Source: NVIDIA's data sheet


# ---------------------------------------------------------------------------------------------------------- measuring
def interleaved(rows, rounds):
    """Median processor seconds of each call and the spread (max - min) / median; every round runs all of them."""
    spent = {name: [] for name in rows}
    for name, call in rows.items():
        call()  # once for the caches
    for _ in range(rounds):
        for name, call in rows.items():
            start = time.process_time()  # not the clock's: others run on this machine
            call()
            spent[name].append(time.process_time() - start)
    return {
        name: (statistics.median(t), (max(t) - min(t)) / statistics.median(t))
        for name, t in spent.items()
    }


def counted(call):
    with Count() as c:
        value = call()
    return c, value


def train_true():
    """FLOPs per clip at true size, on fake tensors."""
    print(
        "FLOPs per clip of forward and backward at true size (1.3b, counted on fake tensors)",
        flush=True,
    )
    print(
        f"{'':34s}{'TFLOP/clip':>12s}{'over ours':>11s}{'over ideal':>12s}{'over fused ideal':>18s}"
    )
    for stage, size in TRUE.items():
        cfg, least = PRESETS["1.3b"], ideal(PRESETS["1.3b"], stage, size)
        print(
            f"stage {stage}, {size[0]} x {size[1]} x {size[2]}: forward "
            + ", ".join(
                f"{k} {least[k] / 1e12:.1f}"
                for k in ("PCB", "tail", "geometry", "exchange", "heads")
            )
        )
        with fake_tensors(), torch.autocast("cpu", torch.bfloat16):
            model = fake_model(cfg, stage)
            encoders = fake_list(cfg)
            batch, raw = example_batch(cfg, 1, *size), raw_clips(1, cfg, *size)
            rows = variants(model, stage, batch, (raw, encoders))
            flops = {name: counted(call)[0].flops for name, call in rows.items()}
        flops = {
            "ideal": least["ideal"],
            "fused ideal": least["fused"],
            "  + heads recomputed": least["recomputed"],
            **flops,
        }
        for name, value in flops.items():
            print(
                f"  {name:32s}{value / 1e12:12.1f}{value / flops['ours']:11.2f}{value / least['ideal']:12.3f}"
                f"{value / least['fused']:18.3f}",
                flush=True,
            )


def fake_list(cfg):
    return [
        fake(lambda: WanVAE()),
        fake(lambda: UMT5Encoder()),
        fake(lambda: CLIPVision()) if cfg.has_clip else None,
    ]


def train_small(rounds, batch_size=2):
    """Seconds, work and memory at the reduced width, every variant beside ours."""
    torch.manual_seed(0)
    model, encoders = FantasyWorld(SMALL), make_encoders(SMALL, small=True)
    raw = raw_clips(batch_size, SMALL, *SMALL_SIZE)
    b, *rest = example_batch(SMALL, batch_size, *SMALL_SIZE)
    batch = (dict(b, **encode(raw, slice(0, batch_size), encoders)), *rest)
    square = torch.randn(1024, 1024)
    peak = 2 * 1024**3 / interleaved({"": lambda: square @ square}, 9)[""][0]
    print(
        f"\n{batch_size} clips of {SMALL_SIZE}, an eighth of the widths, a third of the layers, fp32 on this CPU: "
        f"{peak / 1e9:.0f} GFLOP/s in a matrix product, median of {rounds} rounds"
    )
    for stage in (1, 2):
        rows = variants(model.set_stage(stage), stage, batch, (raw, encoders))
        first = {name: counted(call) for name, call in rows.items()}
        times = interleaved(rows, rounds)
        ours, base = times["ours"][0], first["ours"][0].flops
        print(
            f"stage {stage:<27d}{'s/step':>8s}{'spread':>8s}{'clips/s':>9s}{'x time':>8s}{'x FLOPs':>9s}{'MFU':>6s}"
            f"{'peak MiB':>10s}{'geometry loss':>15s}"
        )
        for name, (seconds, spread) in times.items():
            c, loss = first[name]
            print(
                f"  {name:31s}{seconds:8.2f}{spread:8.0%}{batch_size / seconds:9.2f}{seconds / ours:8.2f}"
                f"{c.flops / base:9.2f}{c.flops / seconds / peak:6.0%}{max(c.peak.values()) / 2**20:10.0f}"
                f"{float(loss):15.6f}",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------------------ sampling
def sample_table(rounds, steps=20, guidance=5.0):
    """A guided video by our loop and by the literal one: FLOPs of a step at true size, seconds at the reduced width."""
    print("\nsampling, two guided passes per step; FLOPs of a step at true size, 81 x 592 x 336")
    with fake_tensors(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model = fake_model(PRESETS["1.3b"], 2)
        b, noise, sigma, _ = example_batch(model.cfg, 1, *TRUE[2])
        given = dict(y=b["y"], clip=b["clip"], plucker=b["plucker"], poses=b["pose_enc"])
        constants = model.constants(b["text"], b["clip"], b["plucker"], b["pose_enc"])
        literal = counted(lambda: model(noise, 1000 * sigma, b["text"], **given))[0].flops
        for stage in (1, 2):
            model.set_stage(stage)
            ours = counted(
                lambda: (model if stage == 2 else model.dit)(
                    noise,
                    sigma,
                    None,
                    b["y"],
                    constants=constants,
                    **(dict(heads=False) if stage == 2 else {}),
                )
            )[0].flops
            print(
                f"  stage {stage} checkpoint: ours {2 * ours / 1e12:.0f} TFLOP, straightforward "
                f"{2 * literal / 1e12:.0f}, {literal / ours:.2f} x",
                flush=True,
            )
    torch.manual_seed(0)
    model, vae = FantasyWorld(SMALL), WanVAE(12)
    with torch.no_grad():
        for p in (*model.exchange.parameters(), *model.camera_adapters.parameters()):
            p.add_(0.02 * torch.randn_like(p))  # gates open: the exchange takes part
    frames, height, width = SMALL_SIZE
    w2c, K = camera_paths.load_camera("orbit", frames, (height, width), 65.0, 1.0, 1.0)
    noise, y = (
        torch.randn(1, 16, 6, height // 8, width // 8),
        torch.randn(1, 16, 6, height // 8, width // 8),
    )
    text, negative = ([torch.randn(20, SMALL.text_dim)] for _ in range(2))
    model.requires_grad_(False)
    with patch.object(sample, "tqdm", lambda grid, **_: grid), torch.no_grad():
        for stage in (1, 2):
            model.stage = stage
            rows = {
                "ours": lambda: sample.generate(
                    model,
                    noise,
                    text,
                    negative,
                    y,
                    None,
                    w2c,
                    K,
                    "euler",
                    steps,
                    5.0,
                    guidance,
                    vae.decode,
                ),
                "straightforward": lambda: straightforward_sample(
                    model,
                    noise,
                    text,
                    negative,
                    y,
                    w2c,
                    K,
                    steps,
                    guidance,
                    partial(vae.decode, chunk=None),
                ),
            }
            ours, literal = (call() for call in rows.values())
            off = max((ours[i] - literal[i]).abs().max().item() for i in (0, 2))
            off = max(
                off,
                *(
                    (ours[1][k] - literal[1][k]).abs().max().item()
                    for k in ("depth", "points", "pose_enc")
                ),
            )
            times = interleaved(rows, rounds)
            print(
                f"  stage {stage}, {steps} steps of {SMALL_SIZE} at reduced width: ours {times['ours'][0]:.2f} s "
                f"(spread {times['ours'][1]:.0%}), straightforward {times['straightforward'][0]:.2f} s, "
                f"{times['straightforward'][0] / times['ours'][0]:.2f} x; largest difference {off:.1e}",
                flush=True,
            )
        model.stage, once = 2, {}
        for n in (2, 4, 8):
            once[n] = lambda n=n: sample.generate(
                model, noise, text, negative, y, None, w2c, K, "euler", n, 5.0, guidance
            )
        times = interleaved(once, rounds)
        print(
            "  seconds of 2, 4, 8 steps without decoding: "
            + ", ".join(f"{times[n][0]:.2f}" for n in once),
            flush=True,
        )


# ---------------------------------------------------------------------------------------------------------------- data
def write_caches(root, clips, num_frames, height, width, cfg):
    """Cache files of a dataset as data.py encode leaves them, filled with random numbers."""
    f, h, w = (num_frames - 1) // 4 + 1, height // 8, width // 8
    folder = Path(root, "cache", f"{num_frames}x{height}x{width}-transform-bench")
    half = dict(
        latents=(16, f, h, w), start_latents=(16, 1, h, w), text=(cfg.text_len, cfg.text_dim)
    )
    half |= dict(clip=(257, 1280)) if cfg.has_clip else {}
    full = dict(
        depth=(num_frames, height, width), w2c=(num_frames, 3, 4), intrinsics=(num_frames, 3, 3)
    )
    for i in range(clips):
        tensors = {k: torch.rand(s).bfloat16() for k, s in half.items()}
        tensors |= dict(
            depth=torch.rand(full["depth"]) + 1,
            w2c=torch.eye(4)[:3].expand(full["w2c"]),
            intrinsics=100 * torch.eye(3).expand(full["intrinsics"]),
        )
        save_tensors(
            folder / f"c{i}.safetensors",
            tensors,
            dict(
                id=f"c{i}",
                sample=f"c{i}",
                prompt="",
                fps=16,
                num_frames=num_frames,
                height=height,
                width=width,
                fingerprint="transform-bench",
            ),
        )
    save_tensors(
        folder / "text_empty.safetensors", dict(text=torch.zeros(1, cfg.text_dim).bfloat16()), {}
    )
    ids = [f"c{i}" for i in range(clips)]
    Path(root, "metadata.json").write_text(
        json.dumps(dict(samples=[dict(id=i, cached=True) for i in ids], splits=dict(train=ids)))
    )
    return CachedClips(root, "train", height, width, num_frames)


def processor_seconds():
    """Of this process and of its children that have ended."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def data_table():
    """Clips per second of the loader at the guide's sizes."""
    print(
        "\ndata: two loader workers, files in the page cache; needed: one H200 at the goal of row 5"
    )
    for stage, (size, batch, share) in {1: (TRUE[1], 8, 0.50), 2: (TRUE[2], 1, 0.45)}.items():
        with tempfile.TemporaryDirectory() as root:
            clips = write_caches(root, 8, *size, PRESETS["1.3b"])
            order, spent = [[i % 8 for i in range(n, n + batch)] for n in range(0, 160, batch)], {}
            for epochs in (0, 1):  # 0: what starting the workers costs by itself
                start, clock = processor_seconds(), time.perf_counter()
                for _ in torch.utils.data.DataLoader(
                    clips,
                    batch_sampler=order[:1] + epochs * order,
                    collate_fn=collate,
                    num_workers=2,
                ):
                    pass
                spent[epochs] = processor_seconds() - start, time.perf_counter() - clock
            cost, seconds = ((spent[1][i] - spent[0][i]) / 160 for i in (0, 1))
            need = share * H200_PEAK / ideal(PRESETS["1.3b"], stage, size)["ideal"]
            print(
                f"  stage {stage}, {size}, {clips.files[0].stat().st_size / 1e6:.0f} MB a clip: {1 / seconds:.1f} "
                f"clips/s by the clock; {1e3 * cost:.1f} ms of processor time a clip, {2 / cost:.1f} clips/s on two idle "
                f"cores; an H200 at {share:.0%} of {H200_PEAK / 1e12:.0f} TFLOP/s takes {need:.1f}, {2 / cost / need:.1f} x",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------------------- scaling
def scaling_rank():
    """One gloo rank of a data-parallel step with accumulation; rank 0 prints what was sent, and when, as JSON."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, found, sent = FantasyWorld(SMALL).set_stage(1), {}, []
    # small buckets: at true size the gradient fills 140 of the usual 25 MB
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=3)
    batch = example_batch(SMALL, 1, 5, 32, 48)

    def hook(_, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, hook)
    for attempt in range(2):  # DDP arranges its buckets after the first
        sent.clear()
        for micro in range(2):
            with wrapped.no_sync() if micro == 0 else nullcontext():
                loss = train.compute_loss(wrapped, *batch, OPTIONS, False)[0]
                with torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CPU]
                ) as trace:
                    loss.backward()
                found["no_sync" if micro == 0 else "bytes"] = sum(sent)
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    if dist.get_rank() == 0:
        print(json.dumps(dict(found, gradient=trained, buckets=len(sent), **overlap(trace))))
    dist.destroy_process_group()


def overlap(trace):
    """From the profiler's trace of a backward pass: when its operations ran and when gloo's all-reduces were in flight.

    returns  first: share of the computation that is done when the first bucket leaves; hidden: share of the
             communication's time before the last one does"""
    events = [
        (e.name(), e.start_ns(), e.start_ns() + e.duration_ns())
        for e in trace.profiler.kineto_results.events()
    ]
    work, calls, sent = (
        [(a, b) for name, a, b in events if name.startswith(start)]
        for start in ("aten::", "c10d::allreduce_", "gloo:all_reduce")
    )
    begin, end = (
        min(a for a, _ in work),
        max(a for a, _ in calls),
    )  # the last bucket leaves when all gradients are there

    edges = sorted({t for span in sent for t in span} | {end})
    flying = [(a, b) for a, b in zip(edges, edges[1:]) if any(s <= a and b <= e for s, e in sent)]
    return dict(
        first=(min(a for a, _ in sent) - begin) / (end - begin),
        hidden=sum(b - a for a, b in flying if b <= end) / sum(b - a for a, b in flying),
    )


def scaling_table():
    """What ranks send."""
    print(
        "\nscaling: gloo ranks, two micro-steps, one synchronised; from a profiler trace of its backward"
    )
    for ranks in (1, 2, 4):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            __file__,
            "rank",
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode:
            raise SystemExit(result.stderr)
        r = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
        print(
            f"  {ranks} ranks: {r['bytes']:,} bytes reduced per step = {r['bytes'] / r['gradient']:.4f} x the trainable "
            f"gradient, {r['no_sync']} in the micro-step before; {r['buckets']} buckets, the first leaves after "
            f"{r['first']:.0%} of the computation, {r['hidden']:.0%} of the communication during it",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", default=["work", "train", "sample", "data", "scaling", "gpu"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.parts[0] == "rank":  # one rank of scaling_table
        return scaling_rank()
    tables = dict(
        work=train_true,
        train=lambda: train_small(args.rounds),
        sample=lambda: sample_table(args.rounds),
        data=data_table,
        scaling=scaling_table,
        gpu=lambda: gpu.tables(PRESETS["1.3b"], TRUE, SMALL, SMALL_SIZE, args.rounds),
    )
    for name in args.parts:
        if name not in tables:
            raise SystemExit(f"bench.py: no part {name!r}; wanted some of {', '.join(tables)}")
        tables[name]()


if __name__ == "__main__":
    main()
