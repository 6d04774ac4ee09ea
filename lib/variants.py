"""What bench.py compares: the least work a step needs, the straightforward step, and each optimisation switched off.

Straightforward (a) is what the method's description says, taken literally: every block forward and backward with
autograd, the exchange in stage 1 too, encoders online, heads over all frames at once, one clip at a time.  Then each
optimisation is switched off alone (b).  "Ideal" is stated in ideal()."""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch

import geometry
import sample
import train
import wan
from encoders import CLIPVision, UMT5Encoder, WanVAE
from geometry import encode_pose, plucker_rays
from lib.plan import Count, example_batch, fake_model, fake_tensors
from wan import start_condition

OPTIONS = SimpleNamespace(
    **{k: v for k, v in vars(train).items() if type(v) in (int, float, str, bool, tuple, dict)}
)


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

        (_, rows), (text, image) = (
            dit.modulation(sigma),
            measure("embed", dit.embed_context, b["text"], b.get("clip")),
        )
        x, grid = measure("embed", lambda: dit.embed(noise, b["y"], dit.control(b["plucker"])))
        ropes = model.ropes(grid, x.device)
        given = dict(
            rows=rows,
            rows_z=torch.zeros(1, 6, cfg.geo_dim),
            ropes=ropes,
            frames=grid[0],
            camera=None,
        )

        def blocks(x, first, last):
            for i in range(first, last):
                x = dit.blocks[i](
                    x, rows, dit.blocks[i].cross_attn.keys_values(text, image), ropes["video"]
                )
            return x

        def geometry_blocks(z):
            taps = {}
            for i, step in enumerate(model.steps[n:]):
                _, z, taps[i] = step.run(None, z, given, None)
            return z, taps

        x = measure("PCB", blocks, x, 0, n)
        z = measure("bridge", model.geometry_tokens, x, grid, None, 1.0)
        z, taps = measure("geometry", geometry_blocks, z)
        measure("tail", blocks, x, n, cfg.num_layers)
        measure(
            "exchange",
            lambda: [e(x, z, ropes["exchange_x"], ropes["exchange_z"]) for e in model.exchange],
        )
        measure("heads", model.read_out, taps, grid)
    trained = ("bridge", "geometry", "heads") + (("exchange",) if stage == 2 else ())
    frozen = ("embed", "PCB") + (("tail",) if stage == 2 else ())
    ideal_ = sum(counts[k][0] for k in frozen) + 3 * sum(counts[k][0] for k in trained)
    carried = ("PCB", "tail") if stage == 2 else ()  # gradient passes through, weights take none
    ideal_ += sum(counts[k][0] + counts[k][1] for k in carried)
    fused = ideal_ + sum(counts[k][1] for k in (*trained, *carried)) / 2
    return dict(
        ideal=ideal_,
        fused=fused,
        recomputed=fused + counts["heads"][0],
        **{k: v[0] for k, v in counts.items()},
    )


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
        head.chunk = 10**6
    yield
    for head, chunk in zip(heads, chunks):
        head.chunk = chunk


def make_encoders(cfg, small):
    """VAE, umT5 and the vision tower (None without CLIP) with random weights; small: an eighth of the widths, a third of
    umT5's layers."""
    width = (
        dict(vocab=64, dim=cfg.text_dim, attn_dim=cfg.text_dim, ffn_dim=1280, heads=8, layers=8)
        if small
        else {}
    )
    return [
        WanVAE(12 if small else 96),
        UMT5Encoder(**width),
        CLIPVision() if cfg.has_clip else None,
    ]


def raw_clips(batch, cfg, num_frames, height, width):
    """What the encoders read: pixels and token ids."""
    return dict(
        video=torch.rand(batch, 3, num_frames, height, width) * 2 - 1,
        ids=torch.randint(1, 64, (batch, cfg.text_len)),
    )


def encode(raw, at, encoders):
    """Clips of raw (a slice) through the encoders, as data.py encode would cache them."""
    vae, text, tower = encoders
    video, ids = raw["video"][at], raw["ids"][at]
    start = vae.encode(video[:, :, :1]).bfloat16().float()
    found = dict(
        latents=vae.encode(video).bfloat16().float(),
        text=list(text(ids, torch.ones_like(ids)).float()),
    )
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
        loss, parts, _ = train.compute_loss(
            model, part, noise[at], sigma[at], keep[at], OPTIONS, video
        )
        share = len(noise[at]) / n
        (loss * share).backward()
        total = total + share * (
            parts["depth"] + parts["point"] + OPTIONS.camera_weight * parts["camera"]
        )
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
    rows = {
        "ours": run(**best),
        "(a) straightforward": run(
            gradients_everywhere, whole_heads, as_stage=2, video=True, each=True, online=online
        ),
        "(b) encoders online": run(**best, online=online),
        "(b) one clip at a time": run(**best, each=True),
        "(b) autograd and weights of Wan": run(gradients_everywhere, **best),
        "(b) heads over all frames": run(whole_heads, **best),
    }
    if stage == 1:
        rows["(b) video tail and exchange"] = run(as_stage=2, video=True)
    for how in {"none", "selective", "full"} - {best.get("checkpointing", "none")}:
        rows[f"(b) checkpointing {how}"] = run(checkpointing=how)
    return rows


# ------------------------------------------------------------------------------------------------------------ sampling
def straightforward_sample(
    model, noise, text, negative, y, w2c, K, steps, guidance, decode, clip=None
):
    """The literal loop: every forward embeds prompt and camera, makes its tables and runs the heads; two passes per
    step; the geometry of the last forward is not the read-out's, so one more forward follows; then decode the video."""
    size = (8 * noise.shape[-2], 8 * noise.shape[-1])
    given = dict(
        y=y, clip=clip, plucker=plucker_rays(w2c, K, size), poses=encode_pose(w2c, K, size)
    )

    def velocity(x, t, context):
        for table in (geometry.rope_2d, geometry.uv_embedding, wan.rope_3d):
            table.cache_clear()
        return model(x, t, context, **given)["velocity"]

    def guided(x, t):
        return torch.lerp(velocity(x, t, negative), velocity(x, t, text), guidance)

    latents = sample.sample_euler(guided, noise, steps)
    sigma = sample.READOUT_SIGMA
    t = torch.full((1,), 1000 * sigma, device=noise.device)
    out = model((1 - sigma) * latents + sigma * noise, t, text, **given)
    return latents, out, decode(latents)
