"""Sample a world: checkpoint + prompt (+ start image) + camera path -> video, depth, point cloud, cameras, a page.

    python sample.py --ckpt outputs/demo/stage2/latest.safetensors --prompt "a room with two boxes" --camera orbit

writes into --out: scene.html (open it: everything in one offline page), video.mp4, depth.mp4, depth.npz, points.ply,
cameras.txt (commanded), cameras_predicted.txt, sheet.png and report.json (how far the sample obeys its cameras and
agrees with itself); --export all adds the files of other tools.  With several prompts or seeds every sample gets a
folder of its own, and the same command again goes on where it stopped.  User errors are one line and exit status 2."""

import itertools
import json
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from encoders import cache_prefix, encode_start, make_encoders
from geometry import encode_pose
from lib.camera_paths import load_camera, mean_distance
from lib.export import EXPORTS, describe, export, export_names, make_scene
from lib.files import read_video
from lib.jobs import CORRECTIONS, check_arguments, parse_arguments, plan, read_prompts
from lib.pictures import depth_to_rgb, tile, write_png
from lib.weights import metadata_of, open_checkpoint
from model import shift_sigma
from wan import start_condition

# The default of the official Wan 2.1 code (shared_config.py, sample_neg_prompt); the demo's word hash gets "".
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

READOUT_SIGMA = 0.1  # the noise level at which geometry is read; the release's last step has 0.0926


def load_image(path, height, width, squeeze=False):
    """First frame of a picture or video file -> (1, 3, 1, H, W) in [-1, 1], centre-cropped to the aspect or squeezed."""
    frame = torch.from_numpy(read_video(path, max_frames=1)[0].copy()).permute(0, 3, 1, 2).float()
    if squeeze:
        frame = F.interpolate(frame, (height, width), mode="bicubic", antialias=True).clamp(0, 255)
        return (frame / 127.5 - 1)[:, :, None]
    h, w = frame.shape[-2:]
    scale = max(height / h, width / w)
    frame = F.interpolate(
        frame,
        (max(height, round(h * scale)), max(width, round(w * scale))),
        mode="bilinear",
        antialias=True,
    )
    top, left = (frame.shape[-2] - height) // 2, (frame.shape[-1] - width) // 2
    return (frame[..., top : top + height, left : left + width] / 127.5 - 1)[:, :, None]


def sample_euler(velocity, noise, steps=50, shift=5.0, progress=iter):
    """Integrate dx/dsigma = velocity(x, t (B,)) from sigma 1 to 0 on the shifted grid; latents stay fp32."""
    sigmas, x = (
        shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist(),
        noise,
    )
    for now, then in progress(list(zip(sigmas, sigmas[1:]))):
        t = torch.full((len(x),), 1000 * now, device=x.device)
        x = x + (then - now) * velocity(x, t).float()
    return x


def sample_unipc(velocity, noise, steps=50, shift=5.0, progress=iter):
    """UniPC of order 2 (bh2 variant, data prediction), Wan 2.1's own default.  Source: Zhao et al. 2023.

    As in the official code the grid starts at sigma 0.999 before the shift, and the model is told t rounded down to an
    integer while the step itself uses the exact sigma."""
    sigmas = shift_sigma(torch.linspace(0.999, 0, steps + 1, dtype=torch.float64), shift)
    log_snr = (
        (1 - sigmas) / sigmas
    ).log()  # half of it; infinite at the end, where order 1 is used

    def step(x, i, data, order, data_there=None):
        """x at sigma i -> sigma i+1; data: predictions of x0 at i-1 and i; data_there at i+1: correct with it."""
        h = log_snr[i + 1] - log_snr[i]
        b = torch.expm1(-h)
        phi2 = -b / h - 1
        slope = 0.0  # of the predicted data, times its weight
        if order == 2:
            ratio = (log_snr[i - 1] - log_snr[i]) / h
            rho = 0.5  # of the corrector: two equations of consistency in bh2
            if data_there is not None:
                b1, b2 = phi2 / b, 2 * (-phi2 / h - 0.5) / b
                rho = (b1 - b2) / (1 - ratio)
            slope = rho / ratio * (data[0] - data[1])
        if data_there is not None:
            slope = slope + (0.5 if order == 1 else b1 - rho) * (data_there - data[1])
        return sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * b * (data[1] + slope)

    x, before, data = noise, None, [None, None]
    for i in progress(range(steps)):
        t = torch.full((len(x),), float(int(1000 * sigmas[i])), device=x.device)
        now = x - sigmas[i] * velocity(x, t).float()
        if i:
            x = step(before, i - 1, data, min(2, i), now)
        before, data = x, [data[1], now]
        x = step(x, i, data, min(2, i + 1, steps - i))
    return x


SAMPLERS = {"euler": sample_euler, "unipc": sample_unipc}


@torch.no_grad()
def conditions(encoders, prompts, image, frames, progress=iter):
    """One encoder after another -> list of text (L, dim), y or None, clip (1, 257, 1280) or None, and the VAE.

    image (1, 3, 1, H, W) in [-1, 1] or None: then the model gets zeros, as for a clip whose image training dropped."""
    text = encoders.load_text()
    texts = [text([prompt])[0] for prompt in progress(prompts)]
    del text  # freed before the next encoder is loaded
    clip = (
        encoders.load_image()(image[:, :, 0]) if image is not None and encoders.load_image else None
    )
    vae = encoders.load_vae()
    return (
        texts,
        None if image is None else encode_start(vae, image, frames, encoders.start_pad),
        clip,
        vae,
    )


@torch.no_grad()
def generate(
    model,
    noise,
    text,
    negative,
    y,
    clip,
    w2c,
    K,
    sampler,
    steps,
    shift,
    guidance,
    decode=None,
    watch=None,
    last_step=False,
):
    """Sample latents (1, 16, f, h, w), then read the geometry once at READOUT_SIGMA -> latents, geometry dict, video.

    Guidance is v_neg + g (v_pos - v_neg), both in one batch; camera and image are the same in both.  What does not
    change with the noise level is computed once.  watch(look) is called at every step; look() is one more forward and
    returns the geometry seen so far.  last_step: that of the last step is the result, as in the release.
    decode(latents) -> video runs beside the read-out (None: no video)."""
    size = (8 * noise.shape[-2], 8 * noise.shape[-1])
    contexts = [*text, *negative][: 1 if guidance == 1 else 2]
    if clip is not None:
        clip = clip.expand(len(contexts), -1, -1)
    constants = model.constants(contexts, clip, model.rays(w2c, K, size), encode_pose(w2c, K, size))
    first = replace(
        constants, keys=[[(k[:1], v[:1]) for k, v in block] for block in constants.keys]
    )
    second = replace(
        constants, keys=[[(k[1:], v[1:]) for k, v in block] for block in constants.keys]
    )
    passes, seen, count = [constants], {}, itertools.count(1)

    def read(x, t):
        return model(x, t, None, y, constants=first, video=model.stage == 2)

    def velocity(x, t, given):
        x, t = (z.expand(len(given.keys[0][0][0]), *z.shape[1:]) for z in (x, t))
        image = None if y is None else y.expand(len(x), *y.shape[1:])
        if model.stage == 2:
            return model(x, t, None, image, heads=False, constants=given)["velocity"]
        return model.dit(
            x, t, None, image, constants=given
        )  # stage 1: geometry does not reach the video

    def guided(x, t):
        try:
            v = torch.cat([velocity(x, t, given) for given in passes])
        except torch.cuda.OutOfMemoryError:
            if guidance == 1 or len(passes) == 2:
                raise
            passes[:] = first, second  # no room for a batch of two: one after the other
            return guided(x, t)
        return v if guidance == 1 else torch.lerp(v[1:], v[:1], guidance)

    def step(x, t):
        if watch:
            watch(lambda: read(x, t))
        if last_step and next(count) == steps:
            seen.update(read(x, t))
        return guided(x, t)

    latents = SAMPLERS[sampler](
        step, noise, steps, shift, lambda grid: bar("sampling", grid, "step")
    )
    t = torch.full((1,), 1000 * READOUT_SIGMA, device=noise.device)
    x = (1 - READOUT_SIGMA) * latents + READOUT_SIGMA * noise
    with ThreadPoolExecutor(1) as beside:
        video = beside.submit(decode, latents) if decode else None
        geometry = seen or read(x, t)
        return latents, geometry, video.result() if video else None


def bar(phase, items, unit):
    """Progress with the time left; one bar for each phase."""
    return tqdm(items, desc=f"{phase:8s}", unit=unit, dynamic_ncols=True)


def previewer(folder, every):
    """watch() of generate: the depth of up to 5 frames as folder/step-0008.png, bright is near."""
    count = itertools.count(1)

    def watch(look):
        n = next(count)
        if n % every == 0:
            depth = look()["depth"][0].float().cpu().numpy()
            pick = np.linspace(0, len(depth) - 1, min(5, len(depth))).round().astype(int)
            folder.mkdir(parents=True, exist_ok=True)
            pictures = depth_to_rgb(depth[pick], *np.quantile(depth, (0.01, 0.99)))
            write_png(folder / f"step-{n:04d}.png", tile([list(pictures)]))

    return watch if every else None


def load(args, meta, jobs, wan_dir, device):
    """Everything that the jobs share: model, vae, texts by prompt, negative (its text), start latents and CLIP tokens
    of the image or None, half (whether to run in bf16)."""
    real = cache_prefix(wan_dir) != "transform"
    negative = (
        args.negative_prompt if args.negative_prompt is not None else NEGATIVE if real else ""
    )
    image = (
        load_image(args.image, args.height, args.width, "image" in args.quirks)
        if args.image
        else None
    )
    encoders = make_encoders(
        wan_dir=wan_dir if real else "", device="cpu" if args.low_memory else device
    )
    prompts = list(dict.fromkeys([job["prompt"] for job in jobs] + [negative]))
    texts, start, clip, vae = conditions(
        encoders, prompts, image, args.frames, lambda p: bar("text", p, "prompt")
    )
    texts = dict(zip(prompts, texts))

    half = args.dtype == "bf16" or args.dtype == "auto" and device.type == "cuda"
    for path in bar("load", (args.ckpt,), "model"):
        model = open_checkpoint(
            path,
            wan_dir,
            device,
            torch.bfloat16 if half else None,
            args.offload,
            "rays" in args.correct,
            args.release,
        )
    if args.low_memory:
        model.depth_head.chunk = model.point_head.chunk = 4
    if image is not None and model.dit.in_dim == 16:
        raise ValueError(
            f"--image {args.image}: {wan_dir} is a text-to-video family; leave the image out"
        )
    return SimpleNamespace(
        model=model,
        vae=vae,
        texts=texts,
        negative=texts[negative],
        start=start,
        clip=clip,
        half=half,
    )


def sample_one(args, job, meta, have, w2c, K, device):
    """Run one job -> Scene with its report."""
    model, frames = have.model.to(device), args.frames
    noise = torch.randn(
        1,
        16,
        (frames - 1) // 4 + 1,
        args.height // 8,
        args.width // 8,
        generator=torch.Generator().manual_seed(job["seed"]),
    ).to(device)
    y = (
        None
        if have.start is None
        else start_condition(have.start.to(device), model.dit.in_dim, noise.shape[2])
    )

    def decode(latents):
        return have.vae.decode(
            latents.float().cpu(), progress=lambda steps: bar("decode", steps, "step")
        )[0].cpu()

    with torch.autocast(device.type, torch.bfloat16, enabled=have.half):
        latents, geometry, video = generate(
            model,
            noise,
            [have.texts[job["prompt"]]],
            [have.negative],
            y,
            have.clip,
            w2c.to(device),
            K.to(device),
            args.sampler,
            args.steps,
            args.shift,
            args.guidance,
            None if args.low_memory else decode,
            previewer(job["out"] / "preview", args.preview_every),
            "readout" in args.quirks,
        )
    if args.low_memory:
        model.to("cpu")
        video = decode(latents)
    geometry = {k: v.cpu() for k, v in geometry.items() if k != "velocity"}
    scene = make_scene(video, geometry, w2c, K, args.fps, args.scene_scale, args.drop, args.lift)
    scene.unit, warning = args.unit, scene.report["unit"]["warning"]
    scene.report.update(
        prompt=job["prompt"],
        settings=job["settings"],
        warnings=[warning] if warning else [],
        facts=f"{frames} frames of {args.height} x {args.width}, camera {args.camera}, {args.sampler} {args.steps} steps, "
        f"guidance {args.guidance:g}, seed {job['seed']}; checkpoint stage {meta['stage']}, step {meta['step']}",
    )
    return scene


def main():
    args = parse_arguments()
    meta = metadata_of(args.ckpt)
    if meta.get("stage") not in ("1", "2"):
        raise ValueError(
            f"{args.ckpt}: stage {meta.get('stage')}; wanted a stage 1 or stage 2 checkpoint"
        )
    trained = json.loads(meta["train_config"])
    check_arguments(args, trained)
    names, size, device = (
        export_names(args.export),
        (args.height, args.width),
        torch.device(args.device),
    )
    wan_dir = args.wan_dir or trained["wan_dir"]
    if meta.get("release") and not wan_dir:
        raise ValueError(
            f"{args.ckpt}: a release needs --wan_dir, the folder of Wan2.1-I2V-14B-480P, for its encoders"
        )
    args.quirks = sorted(set(CORRECTIONS) - set(args.correct)) if meta.get("release") else []
    args.lift = args.lift or ("predicted" if meta.get("release") else "commanded")
    if meta.get("release") and args.camera.endswith(".json"):
        args.camera_format = args.camera_format or "fantasyworld"
    if isinstance(args.scene_scale, pathlib.Path):
        _, K = load_camera(
            args.camera, args.frames, size, args.fov, args.amount, 1.0, args.camera_format
        )
        args.scene_scale = mean_distance(args.scene_scale, K, size)
    w2c, K = load_camera(
        args.camera, args.frames, size, args.fov, args.amount, args.scene_scale, args.camera_format
    )
    jobs = plan(args, read_prompts(args.prompt), meta)
    have = load(args, meta, jobs, wan_dir, device) if jobs else None
    for i, job in enumerate(jobs):
        if len(jobs) > 1:
            print(f"{i + 1} of {len(jobs)}: {job['prompt']}, seed {job['seed']}", flush=True)
        scene = sample_one(args, job, meta, have, w2c, K, device)
        export(scene, job["out"], names, lambda n: bar("export", n, "file"))
        print(
            f"{job['out']}: {' '.join(EXPORTS[n][0] for n in names)} report.json",
            *describe(scene.report, args.unit),
            sep="\n",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except torch.cuda.OutOfMemoryError as error:
        print(
            f"sample.py: {str(error).splitlines()[0]}; try --low_memory, fewer --frames or a smaller size",
            file=sys.stderr,
        )
        sys.exit(2)
    except ValueError as error:
        print(f"sample.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
