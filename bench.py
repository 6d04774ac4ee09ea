"""Measure work, time and memory against straightforward code: `python bench.py [work train sample data scaling]`.

    work      stages 1 and 2: FLOPs per clip at true size (fake tensors) beside the ideal
    train     the same steps timed at a reduced width, with their memory
    sample    a guided loop and its decoding, the same way
    data      what the loader delivers at the guide's sizes, and how long a step waits for it
    scaling   bytes that 1, 2, 4 gloo ranks send per step and when; cost against the number of tokens

Straightforward (a) is what the method's description says, taken literally: every block forward and backward with
autograd, the exchange in stage 1 too, encoders online, heads over all frames at once, one clip at a time.  Then each
optimisation is switched off alone (b).  All variants of a table are timed in turn in every round, in seconds of one
thread's processor time, and the median is given, so ratios hold on a machine that others use too.  "Ideal" is stated in
ideal().  There is no GPU part: nothing here was ever run on one."""
import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import geometry
import model as model_file
import sample
import train
from data import CachedClips, collate, save_tensors
from encoders import CLIPVision, UMT5Encoder, WanVAE
from lib.evaluate import prepare
from geometry import encode_pose, plucker_rays
from model import PRESETS, FantasyWorld, start_condition
from lib.plan import Count, count, example_batch, fake, fake_model, fake_tensors

TRUE = {1: (21, 336, 592), 2: (81, 592, 336)}           # the guide's clips: frames, height, width
# The 1.3B preset at an eighth of its widths and a third of its layers, on a small grid.
SMALL = replace(PRESETS["1.3b"], dim=192, ffn_dim=1120, head_dim=64, text_dim=512, text_len=64, freq_dim=64,
                has_clip=False, num_layers=10, num_pcb=4, taps=(1, 3, 4, 5), geo_dim=176, geo_heads=2,
                bridge_width=40, pose_hidden=80, irg_dim=144, irg_heads=2, dpt_channels=(8, 16, 32, 32), dpt_features=16,
                dpt_tail=8, camera_dim=64, camera_heads=2)
SMALL_SIZE = (21, 64, 112)
H200_PEAK = 989e12              # dense bf16 FLOP/s of an H100 or H200.  Source: NVIDIA's data sheet
OPTIONS = SimpleNamespace(**{k: v for k, v in vars(train).items() if type(v) in (int, float, str, bool, tuple, dict)})


# ---------------------------------------------------------------------------------------------------- the least work
def ideal(cfg, stage, size):
    """FLOPs per clip of the least work, from forward counts of the parts on fake tensors -> dict.

    stage 1   video forward up to the bridge + 3 x trainable forward
    stage 2   video forward + its gradient to the input (linear 1 x forward) + 3 x trainable forward
    ideal counts an attention's backward as 2 x its forward; fused adds the half forward of every fused kernel, which
    recomputes its scores; recomputed adds the DPT heads, whose maps for all frames take 25 GiB in stage 2."""
    with fake_tensors(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model, counts = fake_model(cfg, stage), {}
        b, noise, sigma, keep = example_batch(cfg, 1, *size)
        dit, n = model.dit, cfg.num_pcb

        def measure(name, function, *args):
            with Count() as c:
                out = function(*args)
            counts[name] = c.flops, c.attention
            return out

        (_, rows), (text, image) = dit.modulation(sigma), measure("embed", dit.embed_context, b["text"], b.get("clip"))
        x, grid = measure("embed", lambda: dit.embed(noise, b["y"], dit.control(b["plucker"])))
        keys, ropes = [block.cross_attn.keys_values(text, image) for block in dit.blocks], model.ropes(grid, x.device)

        def blocks(x, first, last):
            for i in range(first, last):
                x = dit.blocks[i](x, rows, dit.blocks[i].cross_attn.keys_values(text, image), ropes["video"])
            return x

        def geometry_blocks(z):
            taps = {}
            for i in range(cfg.geo_layers):
                _, z, taps[i] = model.irg_step(i, None, z, (rows, keys), (rows_z, grid[0]), ropes)
            return z, taps

        rows_z = torch.zeros(1, 6, cfg.geo_dim)
        x = measure("PCB", blocks, x, 0, n)
        z = measure("bridge", model.geometry_tokens, x, grid, None, 1.0)
        z, taps = measure("geometry", geometry_blocks, z)
        measure("tail", blocks, x, n, cfg.num_layers)
        measure("exchange", lambda: [e(x, z, ropes["exchange_x"], ropes["exchange_z"]) for e in model.exchange])
        measure("heads", model.read_out, taps, grid)
    trained = ("bridge", "geometry", "heads") + (("exchange",) if stage == 2 else ())
    frozen = ("embed", "PCB") + (("tail",) if stage == 2 else ())
    ideal_ = sum(counts[k][0] for k in frozen) + 3 * sum(counts[k][0] for k in trained)
    carried = ("PCB", "tail") if stage == 2 else ()              # gradient passes through, weights take none
    ideal_ += sum(counts[k][0] + counts[k][1] for k in carried)
    fused = ideal_ + sum(counts[k][1] for k in (*trained, *carried)) / 2
    return dict(ideal=ideal_, fused=fused, recomputed=fused + counts["heads"][0],
                **{k: v[0] for k, v in counts.items()})


# -------------------------------------------------------------------------------------------------------- variants
@contextmanager
def gradients_everywhere(model):
    """Autograd through the whole forward, weight gradients of the frozen branch included."""
    with patch("torch.no_grad", torch.enable_grad):
        trained = [p.requires_grad for p in model.parameters()]
        model.requires_grad_(True)
        yield
        for p, flag in zip(model.parameters(), trained):
            p.requires_grad_(flag)


@contextmanager
def whole_heads(model):
    """DPT heads over all frames at once, nothing recomputed."""
    heads = [model.depth_head, model.point_head]
    chunks = [head.chunk for head in heads]
    for head in heads:
        head.chunk = 10 ** 6
    yield
    for head, chunk in zip(heads, chunks):
        head.chunk = chunk


def make_encoders(cfg, small):
    """VAE, umT5 and the vision tower (None without CLIP) with random weights; small: an eighth of the widths, a third of
    umT5's layers."""
    width = dict(vocab=64, dim=cfg.text_dim, attn_dim=cfg.text_dim, ffn_dim=1280, heads=8, layers=8) if small else {}
    return [WanVAE(12 if small else 96), UMT5Encoder(**width), CLIPVision() if cfg.has_clip else None]


def raw_clips(batch, cfg, num_frames, height, width):
    """What the encoders read: pixels and token ids."""
    return dict(video=torch.rand(batch, 3, num_frames, height, width) * 2 - 1,
                ids=torch.randint(1, 64, (batch, cfg.text_len)))


def encode(raw, at, encoders):
    """Clips of raw (a slice) through the encoders, as data.py encode would cache them."""
    vae, text, tower = encoders
    video, ids = raw["video"][at], raw["ids"][at]
    start = vae.encode(video[:, :, :1]).bfloat16().float()
    found = dict(latents=vae.encode(video).bfloat16().float(), text=list(text(ids, torch.ones_like(ids)).float()))
    found["y"] = start_condition(start, 32, found["latents"].shape[2])
    return found if tower is None else dict(found, clip=tower(video[:, :, 0]).float())


def step(model, batch, video, each=False, online=None):
    """Forward and backward of a micro-batch -> its geometry loss.  each: one clip at a time;  online: raw, encoders."""
    b, noise, sigma, keep = batch
    n, total = len(noise), 0
    for p in model.parameters():
        p.grad = None
    for at in [slice(i, i + 1) for i in range(n)] if each else [slice(0, n)]:
        part = {k: v[at] for k, v in b.items()}
        if online:
            part.update(encode(online[0], at, online[1]))
        loss, parts, _ = train.compute_loss(model, part, noise[at], sigma[at], keep[at], OPTIONS, video)
        share = len(noise[at]) / n
        (loss * share).backward()
        total = total + share * (parts["depth"] + parts["point"] + OPTIONS.camera_weight * parts["camera"])
    return total


def variants(model, stage, batch, online):
    """name -> one step, ours first; each sets up what it needs and restores it."""
    def run(*contexts, as_stage=stage, checkpointing="none", video=stage == 2, **how):
        def call():
            model.stage, model.checkpoint_activations = as_stage, checkpointing
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context(model))
                return step(model, batch, video, **how)
        return call

    best = dict(checkpointing="selective") if stage == 2 else {}
    rows = {"ours": run(**best),
            "(a) straightforward": run(gradients_everywhere, whole_heads, as_stage=2, video=True, each=True,
                                       online=online),
            "(b) encoders online": run(**best, online=online),
            "(b) one clip at a time": run(**best, each=True),
            "(b) autograd and weights of Wan": run(gradients_everywhere, **best),
            "(b) heads over all frames": run(whole_heads, **best)}
    if stage == 1:
        rows["(b) video tail and exchange"] = run(as_stage=2, video=True)
    for how in {"none", "selective", "full"} - {best.get("checkpointing", "none")}:
        rows[f"(b) checkpointing {how}"] = run(checkpointing=how)
    return rows


# ---------------------------------------------------------------------------------------------------------- measuring
def interleaved(rows, rounds):
    """Median processor seconds of each call and the spread (max - min) / median; every round runs all of them."""
    spent = {name: [] for name in rows}
    for name, call in rows.items():
        call()                                              # once for the caches
    for _ in range(rounds):
        for name, call in rows.items():
            start = time.process_time()                     # not the clock's: others run on this machine
            call()
            spent[name].append(time.process_time() - start)
    return {name: (statistics.median(t), (max(t) - min(t)) / statistics.median(t)) for name, t in spent.items()}


def counted(call):
    with Count() as c:
        value = call()
    return c, value


def train_true():
    """FLOPs per clip at true size, on fake tensors."""
    print("FLOPs per clip of forward and backward at true size (1.3b, counted on fake tensors)", flush=True)
    print(f"{'':34s}{'TFLOP/clip':>12s}{'over ours':>11s}{'over ideal':>12s}{'over fused ideal':>18s}")
    for stage, size in TRUE.items():
        cfg, least = PRESETS["1.3b"], ideal(PRESETS["1.3b"], stage, size)
        print(f"stage {stage}, {size[0]} x {size[1]} x {size[2]}: forward "
              + ", ".join(f"{k} {least[k] / 1e12:.1f}" for k in ("PCB", "tail", "geometry", "exchange", "heads")))
        with fake_tensors(), torch.autocast("cpu", torch.bfloat16):
            model = fake_model(cfg, stage)
            encoders = fake_list(cfg)
            batch, raw = example_batch(cfg, 1, *size), raw_clips(1, cfg, *size)
            rows = variants(model, stage, batch, (raw, encoders))
            flops = {name: counted(call)[0].flops for name, call in rows.items()}
        flops = {"ideal": least["ideal"], "fused ideal": least["fused"], "  + heads recomputed": least["recomputed"],
                 **flops}
        for name, value in flops.items():
            print(f"  {name:32s}{value / 1e12:12.1f}{value / flops['ours']:11.2f}{value / least['ideal']:12.3f}"
                  f"{value / least['fused']:18.3f}", flush=True)


def fake_list(cfg):
    return [fake(lambda: WanVAE()), fake(lambda: UMT5Encoder()), fake(lambda: CLIPVision()) if cfg.has_clip else None]


def train_small(rounds, batch_size=2):
    """Seconds, work and memory at the reduced width, every variant beside ours."""
    torch.manual_seed(0)
    model, encoders = FantasyWorld(SMALL), make_encoders(SMALL, small=True)
    raw = raw_clips(batch_size, SMALL, *SMALL_SIZE)
    b, *rest = example_batch(SMALL, batch_size, *SMALL_SIZE)
    batch = (dict(b, **encode(raw, slice(0, batch_size), encoders)), *rest)
    square = torch.randn(1024, 1024)
    peak = 2 * 1024 ** 3 / interleaved({"": lambda: square @ square}, 9)[""][0]
    print(f"\n{batch_size} clips of {SMALL_SIZE}, an eighth of the widths, a third of the layers, fp32 on this CPU: "
          f"{peak / 1e9:.0f} GFLOP/s in a matrix product, median of {rounds} rounds")
    for stage in (1, 2):
        rows = variants(model.set_stage(stage), stage, batch, (raw, encoders))
        first = {name: counted(call) for name, call in rows.items()}
        times = interleaved(rows, rounds)
        ours, base = times["ours"][0], first["ours"][0].flops
        print(f"stage {stage:<27d}{'s/step':>8s}{'spread':>8s}{'clips/s':>9s}{'x time':>8s}{'x FLOPs':>9s}{'MFU':>6s}"
              f"{'peak MiB':>10s}{'geometry loss':>15s}")
        for name, (seconds, spread) in times.items():
            c, loss = first[name]
            print(f"  {name:31s}{seconds:8.2f}{spread:8.0%}{batch_size / seconds:9.2f}{seconds / ours:8.2f}"
                  f"{c.flops / base:9.2f}{c.flops / seconds / peak:6.0%}{max(c.peak.values()) / 2 ** 20:10.0f}"
                  f"{float(loss):15.6f}", flush=True)


# ------------------------------------------------------------------------------------------------------------ sampling
def straightforward_sample(model, noise, text, negative, y, w2c, K, steps, guidance, decode):
    """The literal loop: every forward embeds prompt and camera, makes its tables and runs the heads; two passes per
    step; the geometry of the last forward is not the read-out's, so one more forward follows; then decode the video."""
    size = (8 * noise.shape[-2], 8 * noise.shape[-1])
    given = dict(y=y, plucker=plucker_rays(w2c, K, size), poses=encode_pose(w2c, K, size))

    def velocity(x, t, context):
        for table in (geometry.rope_2d, geometry.uv_embedding, model_file.rope_3d):
            table.cache_clear()
        return model(x, t, context, **given)["velocity"]

    def guided(x, t):
        return torch.lerp(velocity(x, t, negative), velocity(x, t, text), guidance)

    latents = sample.sample_euler(guided, noise, steps)
    sigma = sample.READOUT_SIGMA
    out = model((1 - sigma) * latents + sigma * noise, torch.full((1,), 1000 * sigma), text, **given)
    return latents, out, decode(latents)


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
            ours = counted(lambda: (model if stage == 2 else model.dit)(
                noise, sigma, None, b["y"], constants=constants, **(dict(heads=False) if stage == 2 else {})))[0].flops
            print(f"  stage {stage} checkpoint: ours {2 * ours / 1e12:.0f} TFLOP, straightforward "
                  f"{2 * literal / 1e12:.0f}, {literal / ours:.2f} x", flush=True)
    torch.manual_seed(0)
    model, vae = FantasyWorld(SMALL), WanVAE(12)
    with torch.no_grad():
        for p in (*model.exchange.parameters(), *model.camera_adapters.parameters()):
            p.add_(0.02 * torch.randn_like(p))                  # gates open: the exchange takes part
    frames, height, width = SMALL_SIZE
    w2c, K = sample.load_camera("orbit", frames, (height, width), 65.0, 1.0, 1.0)
    noise, y = torch.randn(1, 16, 6, height // 8, width // 8), torch.randn(1, 16, 6, height // 8, width // 8)
    text, negative = ([torch.randn(20, SMALL.text_dim)] for _ in range(2))
    model.requires_grad_(False)
    with patch.object(sample, "tqdm", lambda grid, **_: grid), torch.no_grad():
        for stage in (1, 2):
            model.stage = stage
            rows = {"ours": lambda: sample.generate(model, noise, text, negative, y, None, w2c, K, "euler", steps, 5.0,
                                                    guidance, vae.decode),
                    "straightforward": lambda: straightforward_sample(model, noise, text, negative, y, w2c, K, steps,
                                                                      guidance, partial(vae.decode, chunk=None))}
            ours, literal = (call() for call in rows.values())
            off = max((ours[i] - literal[i]).abs().max().item() for i in (0, 2))
            off = max(off, *((ours[1][k] - literal[1][k]).abs().max().item() for k in ("depth", "points", "pose_enc")))
            times = interleaved(rows, rounds)
            print(f"  stage {stage}, {steps} steps of {SMALL_SIZE} at reduced width: ours {times['ours'][0]:.2f} s "
                  f"(spread {times['ours'][1]:.0%}), straightforward {times['straightforward'][0]:.2f} s, "
                  f"{times['straightforward'][0] / times['ours'][0]:.2f} x; largest difference {off:.1e}", flush=True)
        model.stage, once = 2, {}
        for n in (2, 4, 8):
            once[n] = lambda n=n: sample.generate(model, noise, text, negative, y, None, w2c, K, "euler", n, 5.0,
                                                  guidance)
        times = interleaved(once, rounds)
        print("  seconds of 2, 4, 8 steps without decoding: " + ", ".join(f"{times[n][0]:.2f}" for n in once),
              flush=True)


# ---------------------------------------------------------------------------------------------------------------- data
def write_caches(root, clips, num_frames, height, width, cfg):
    """Cache files of a dataset as data.py encode leaves them, filled with random numbers."""
    f, h, w = (num_frames - 1) // 4 + 1, height // 8, width // 8
    folder = Path(root, "cache", f"{num_frames}x{height}x{width}-transform-bench")
    half = dict(latents=(16, f, h, w), start_latents=(16, 1, h, w), text=(cfg.text_len, cfg.text_dim))
    half |= dict(clip=(257, 1280)) if cfg.has_clip else {}
    full = dict(depth=(num_frames, height, width), w2c=(num_frames, 3, 4), intrinsics=(num_frames, 3, 3))
    for i in range(clips):
        tensors = {k: torch.rand(s).bfloat16() for k, s in half.items()}
        tensors |= dict(depth=torch.rand(full["depth"]) + 1, w2c=torch.eye(4)[:3].expand(full["w2c"]),
                        intrinsics=100 * torch.eye(3).expand(full["intrinsics"]))
        save_tensors(folder / f"c{i}.safetensors", tensors,
                     dict(id=f"c{i}", sample=f"c{i}", prompt="", fps=16, num_frames=num_frames, height=height,
                          width=width, fingerprint="transform-bench"))
    save_tensors(folder / "text_empty.safetensors", dict(text=torch.zeros(1, cfg.text_dim).bfloat16()), {})
    ids = [f"c{i}" for i in range(clips)]
    Path(root, "metadata.json").write_text(json.dumps(dict(samples=[dict(id=i, cached=True) for i in ids],
                                                           splits=dict(train=ids))))
    return CachedClips(root, "train", height, width, num_frames)


def processor_seconds():
    """Of this process and of its children that have ended."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def data_table():
    """Clips per second of the loader at the guide's sizes, and the share of a reduced step that waits for it."""
    print("\ndata: two loader workers, files in the page cache; needed: one H200 at the goal of row 5")
    for stage, (size, batch, share) in {1: (TRUE[1], 8, 0.50), 2: (TRUE[2], 1, 0.45)}.items():
        with tempfile.TemporaryDirectory() as root:
            clips = write_caches(root, 8, *size, PRESETS["1.3b"])
            order, spent = [[i % 8 for i in range(n, n + batch)] for n in range(0, 160, batch)], {}
            for epochs in (0, 1):                               # 0: what starting the workers costs by itself
                start, clock = processor_seconds(), time.perf_counter()
                for _ in torch.utils.data.DataLoader(clips, batch_sampler=order[:1] + epochs * order,
                                                     collate_fn=collate, num_workers=2):
                    pass
                spent[epochs] = processor_seconds() - start, time.perf_counter() - clock
            cost, seconds = ((spent[1][i] - spent[0][i]) / 160 for i in (0, 1))
            need = share * H200_PEAK / ideal(PRESETS["1.3b"], stage, size)["ideal"]
            print(f"  stage {stage}, {size}, {clips.files[0].stat().st_size / 1e6:.0f} MB a clip: {1 / seconds:.1f} "
                  f"clips/s by the clock; {1e3 * cost:.1f} ms of processor time a clip, {2 / cost:.1f} clips/s on two idle "
                  f"cores; an H200 at {share:.0%} of {H200_PEAK / 1e12:.0f} TFLOP/s takes {need:.1f}, {2 / cost / need:.1f} x",
                  flush=True)
    with tempfile.TemporaryDirectory() as root:
        clips = write_caches(root, 8, *SMALL_SIZE, SMALL)
        model = FantasyWorld(SMALL).set_stage(1)
        loader = iter(torch.utils.data.DataLoader(clips, batch_sampler=[[0, 1]] * 100, collate_fn=collate,
                                                  num_workers=2))
        wait = spent = 0.0
        for i in range(8):
            start = time.perf_counter()
            batch = next(loader)
            ready = time.perf_counter()
            b = prepare(batch, 32, torch.device("cpu"))
            step(model, (b, torch.randn_like(b["latents"]), torch.rand(2), torch.ones(2)), False)
            if i:                                               # the first fetch starts the workers
                wait, spent = wait + ready - start, spent + time.perf_counter() - start
        print(f"  waiting for the loader: {wait / spent:.2%} of the time of 7 reduced stage 1 steps", flush=True)
        del loader


# ------------------------------------------------------------------------------------------------------------- scaling
def scaling_rank():
    """One gloo rank of a data-parallel step with accumulation; rank 0 prints what was sent, and when, as JSON."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, found = FantasyWorld(SMALL).set_stage(1), {}
    wrapped, sent = DistributedDataParallel(model, gradient_as_bucket_view=True), []
    batch = example_batch(SMALL, 1, 5, 32, 48)

    def hook(state, bucket):
        entry = [bucket.buffer().nbytes, time.perf_counter(), 0.0]
        sent.append(entry)
        future = allreduce_hook(None, bucket)
        return future.then(lambda f: (entry.__setitem__(2, time.perf_counter()), f.value()[0])[1])

    wrapped.register_comm_hook(None, hook)
    for attempt in range(2):                                    # DDP arranges its buckets after the first
        sent.clear()
        for micro in range(2):
            with wrapped.no_sync() if micro == 0 else nullcontext():
                loss = train.compute_loss(wrapped, *batch, OPTIONS, False)[0]
                found["before" if micro == 0 else "begin"] = time.perf_counter()
                loss.backward()
                found["no_sync" if micro == 0 else "bytes"] = sum(n for n, *_ in sent)
        end = time.perf_counter()
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    if dist.get_rank() == 0:
        busy = sum(stop - start for _, start, stop in sent)
        hidden = sum(min(stop, sent[-1][1]) - start for _, start, stop in sent)
        print(json.dumps(dict(bytes=found["bytes"], no_sync=found["no_sync"], gradient=trained,
                              buckets=len(sent), first=(sent[0][1] - found["begin"]) / (end - found["begin"]),
                              hidden=hidden / busy)))
    dist.destroy_process_group()


def scaling_table(rounds):
    """What ranks send, and how cost grows with the number of tokens."""
    print("\nscaling: gloo ranks, two micro-steps, one synchronised")
    for ranks in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__,
                   "rank"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode:
            raise SystemExit(result.stderr)
        r = json.loads(result.stdout.strip().splitlines()[-1])
        print(f"  {ranks} ranks: {r['bytes']:,} bytes reduced per step = {r['bytes'] / r['gradient']:.4f} x the trainable "
              f"gradient, {r['no_sync']} in the micro-step before; {r['buckets']} buckets, the first sent after "
              f"{r['first']:.0%} of the backward, {r['hidden']:.0%} of the communication before the last bucket was ready",
              flush=True)
    model, rows, tokens, flops = FantasyWorld(SMALL), {}, {}, {}
    model.set_stage(2)
    for frames in (21, 41, 81):
        batch = example_batch(SMALL, 1, frames, *SMALL_SIZE[1:])
        tokens[frames] = ((frames - 1) // 4 + 1) * SMALL_SIZE[1] * SMALL_SIZE[2] // 256
        rows[frames] = lambda batch=batch: step(model, batch, True)
        flops[frames] = counted(rows[frames])[0].flops
    times = interleaved(rows, rounds)
    true = {frames: count(PRESETS["1.3b"], 2, lambda m, *b: train.compute_loss(m, *b, OPTIONS, True)[0],
                          (1, frames, 592, 336), "none")["flops"] for frames in (21, 41, 81)}
    print("  stage 2, exponent of cost against tokens, 4n + 1 frames of 592 x 336 and of the reduced size:")
    for a, b in ((21, 41), (41, 81)):
        def exponent(values, a=a, b=b):
            return math.log(values[b] / values[a]) / math.log(tokens[b] / tokens[a])
        print(f"    {a} -> {b} frames: FLOPs at true size {exponent(true):.2f}; reduced width: FLOPs "
              f"{exponent(flops):.2f}, measured time {exponent({k: v[0] for k, v in times.items()}):.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["work", "train", "sample", "data", "scaling"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.parts == ["rank"]:
        return scaling_rank()
    tables = dict(work=train_true, train=lambda: train_small(args.rounds), sample=lambda: sample_table(args.rounds),
                  data=data_table, scaling=lambda: scaling_table(args.rounds))
    for name in args.parts:
        if name not in tables:
            raise SystemExit(f"bench.py: no part {name!r}; wanted some of {', '.join(tables)}")
        tables[name]()


if __name__ == "__main__":
    main()
