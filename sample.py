"""Sample a world: checkpoint + prompt (+ start image) + camera path -> video, depth, point cloud, cameras, pictures.

    python sample.py --ckpt outputs/demo/stage2/latest.safetensors --prompt "a room with two boxes" --camera orbit

writes into --out: video.mp4, depth.mp4 (near is bright), depth.npz (depth, conf, mask, w2c, intrinsics), points.ply,
cameras.txt (commanded) and cameras_predicted.txt (19 columns, RealEstate10K order), sheet.png (frames | depth | conf).
Lengths are scene units (mean distance of the first frame's points = 1) times --scene_scale."""
import argparse
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoints import build_model, config_from_metadata, load_trained, read_metadata
from data import (cache_prefix, depth_to_rgb, encode_start, make_encoders, read_cameras, read_video, tile,
                  write_cameras, write_png, write_video)
from geometry import camera_move, decode_pose, encode_pose, plucker_rays, pose_metrics, relative_to_first, unproject
from model import shift_sigma, start_condition

# The default of the official Wan 2.1 code (shared_config.py, sample_neg_prompt); the demo's word hash gets "".
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
            "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
            "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
READOUT_SIGMA = 0.1             # the noise level at which geometry is read; the release's last step has 0.0926


def load_image(path, height, width):
    """First frame of a picture or video file -> (1, 3, 1, H, W) in [-1, 1], centre-cropped to the aspect."""
    frame = torch.from_numpy(read_video(path, max_frames=1)[0].copy()).permute(0, 3, 1, 2).float()
    h, w = frame.shape[-2:]
    scale = max(height / h, width / w)
    frame = F.interpolate(frame, (max(height, round(h * scale)), max(width, round(w * scale))), mode="bilinear",
                          antialias=True)
    top, left = (frame.shape[-2] - height) // 2, (frame.shape[-1] - width) // 2
    return (frame[..., top:top + height, left:left + width] / 127.5 - 1)[:, :, None]


def load_camera(text, num_frames, size, fov_deg, amount, scene_scale):
    """A named move or a 19-column file -> w2c (1, T, 3, 4) relative to frame 0 in scene units, pixel intrinsics."""
    height, width = size
    if pathlib.Path(text).suffix or pathlib.Path(text).is_file():
        w2c, fractions = read_cameras(text)
        if len(w2c) < num_frames:
            raise ValueError(f"{text}: {len(w2c)} cameras; --frames {num_frames} wants at least that many")
        w2c = relative_to_first(torch.from_numpy(w2c[:num_frames])[None]).float()
        w2c = torch.cat([w2c[..., :3], w2c[..., 3:] / scene_scale], -1)
        fx, fy, cx, cy = torch.from_numpy(fractions[:num_frames]).float().unbind(-1)
        fx, fy, cx, cy = fx * width, fy * height, cx * width, cy * height
    else:
        w2c, zoom = camera_move(text, num_frames, amount)
        w2c = w2c[None].float()
        fx = fy = width / 2 / np.tan(np.radians(fov_deg) / 2) * zoom.float()
        cx, cy = torch.full_like(fx, width / 2), torch.full_like(fx, height / 2)
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    return w2c, torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], -1).view(1, num_frames, 3, 3)


def sample_euler(velocity, noise, steps=50, shift=5.0, progress=iter):
    """Integrate dx/dsigma = velocity(x, t (B,)) from sigma 1 to 0 on the shifted grid; latents stay fp32."""
    sigmas, x = shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist(), noise
    for now, then in progress(list(zip(sigmas, sigmas[1:]))):
        t = torch.full((len(x),), 1000 * now, device=x.device)
        x = x + (then - now) * velocity(x, t).float()
    return x


def sample_unipc(velocity, noise, steps=50, shift=5.0, progress=iter):
    """UniPC of order 2 (bh2 variant, data prediction), Wan 2.1's own default.  Source: Zhao et al. 2023.

    As in the official code the grid starts at sigma 0.999 before the shift, and the model is told t rounded down to an
    integer while the step itself uses the exact sigma."""
    sigmas = shift_sigma(torch.linspace(0.999, 0, steps + 1, dtype=torch.float64), shift)
    log_snr = ((1 - sigmas) / sigmas).log()                   # half of it; infinite at the end, where order 1 is used

    def step(x, i, data, order, data_there=None):
        """x at sigma i -> sigma i+1; data: predictions of x0 at i-1 and i; data_there at i+1: correct with it."""
        h = log_snr[i + 1] - log_snr[i]
        b = torch.expm1(-h)
        phi2 = -b / h - 1
        slope = 0.0                                           # of the predicted data, times its weight
        if order == 2:
            ratio = (log_snr[i - 1] - log_snr[i]) / h
            rho = 0.5                                         # of the corrector: two equations of consistency in bh2
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
def conditions(encoders, prompts, image, frames):
    """One encoder after another -> list of text (L, dim), y or None, clip (1, 257, 1280) or None, and the VAE.

    image (1, 3, 1, H, W) in [-1, 1] or None: then the model gets zeros, as for a clip whose image training dropped."""
    text = encoders.load_text()
    texts = text(prompts)
    del text                                                  # freed before the next encoder is loaded
    clip = encoders.load_image()(image[:, :, 0]) if image is not None and encoders.load_image else None
    vae = encoders.load_vae()
    return texts, None if image is None else encode_start(vae, image, frames, encoders.grey_start), clip, vae


@torch.no_grad()
def generate(model, noise, text, negative, y, clip, w2c, K, sampler, steps, shift, guidance, decode=None):
    """Sample latents (1, 16, f, h, w), then read the geometry once at READOUT_SIGMA -> latents, geometry dict, video.

    Guidance is v_neg + g (v_pos - v_neg), both in one batch; camera and image are the same in both.  What does not
    change with the noise level is computed once.  decode(latents) -> video runs beside the read-out (None: no video)."""
    size = (8 * noise.shape[-2], 8 * noise.shape[-1])
    contexts = [*text, *negative][:1 if guidance == 1 else 2]
    if clip is not None:
        clip = clip.expand(len(contexts), -1, -1)
    constants = model.constants(contexts, clip, plucker_rays(w2c, K, size), encode_pose(w2c, K, size))
    first = dict(constants, keys=[[(k[:1], v[:1]) for k, v in block] for block in constants["keys"]])
    second = dict(constants, keys=[[(k[1:], v[1:]) for k, v in block] for block in constants["keys"]])
    passes = [constants]

    def velocity(x, t, given):
        x, t = (z.expand(len(given["keys"][0][0][0]), *z.shape[1:]) for z in (x, t))
        image = None if y is None else y.expand(len(x), *y.shape[1:])
        if model.stage == 2:
            return model(x, t, None, image, heads=False, constants=given)["velocity"]
        return model.dit(x, t, None, image, constants=given)      # stage 1: geometry does not reach the video

    def guided(x, t):
        try:
            v = torch.cat([velocity(x, t, given) for given in passes])
        except torch.cuda.OutOfMemoryError:
            if guidance == 1 or len(passes) == 2:
                raise
            passes[:] = first, second                         # no room for a batch of two: one after the other
            return guided(x, t)
        return v if guidance == 1 else torch.lerp(v[1:], v[:1], guidance)

    latents = SAMPLERS[sampler](guided, noise, steps, shift, lambda grid: tqdm(grid, desc="sampling", unit="step"))
    t = torch.full((1,), 1000 * READOUT_SIGMA, device=noise.device)
    x = (1 - READOUT_SIGMA) * latents + READOUT_SIGMA * noise
    with ThreadPoolExecutor(1) as beside:
        video = beside.submit(decode, latents) if decode else None
        geometry = model(x, t, None, y, constants=first, video=model.stage == 2)
        return latents, geometry, video.result() if video else None


def trusted(depth, conf, drop=0.2):
    """Pixels worth drawing (T, H, W): not among the least confident share, no depth edge of 5 % beside them."""
    keep = conf >= np.quantile(conf, drop)
    for axis in (1, 2):
        nearer = np.minimum(depth, np.roll(depth, -1, axis))
        edge = np.abs(np.roll(depth, -1, axis) - depth) > 0.05 * nearer
        keep &= ~edge & ~np.roll(edge, 1, axis)               # the last row or column meets the first: a border anyway
    return keep


def write_ply(path, points, rgb):
    """Binary point cloud; points (N, 3), rgb uint8 (N, 3)."""
    vertex = np.empty(len(points), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertex["xyz"], vertex["rgb"] = points, rgb
    names = [f"property float {c}" for c in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *names, "end_header", ""]
    path.write_bytes("\n".join(header).encode() + vertex.tobytes())


def export(out, video, geometry, w2c, K, fps, scale):
    """Write every file of a sample; video (3, T, H, W) in [-1, 1], geometry of one clip on the CPU.

    returns  pose_metrics of the predicted against the commanded cameras"""
    out.mkdir(parents=True, exist_ok=True)
    rgb = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    height, width = rgb.shape[1:3]
    depth, conf = (geometry[k][0].float().numpy() for k in ("depth", "depth_conf"))
    predicted, predicted_K = decode_pose(geometry["pose_enc"][-1].float(), (height, width))
    mask = trusted(depth, conf)
    points = unproject(geometry["depth"].float(), w2c, K)[0].numpy() * scale
    coloured = depth_to_rgb(depth, np.quantile(depth, 0.01), np.quantile(depth, 0.99))
    sure = depth_to_rgb(conf.max() / conf, 1, conf.max() / conf.min())
    write_video(out / "video.mp4", rgb, fps)
    write_video(out / "depth.mp4", coloured, fps)
    in_units = [torch.cat([E[..., :3], E[..., 3:] * scale], -1)[0].numpy() for E in (w2c, predicted)]
    np.savez_compressed(out / "depth.npz", depth=depth * scale, conf=conf, mask=mask, w2c=in_units[0],
                        intrinsics=K[0].numpy())
    write_ply(out / "points.ply", points[mask], rgb[mask])
    write_cameras(out / "cameras.txt", in_units[0], K[0].numpy(), (height, width))
    write_cameras(out / "cameras_predicted.txt", in_units[1], predicted_K[0].numpy(), (height, width))
    pick = np.linspace(0, len(rgb) - 1, min(5, len(rgb))).round().astype(int)
    rows = [[x[t] for t in pick] for x in (rgb, coloured, sure)]
    write_png(out / "sheet.png", tile(rows, zoom=max(1, round(240 / width))))
    return pose_metrics(predicted, w2c)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint of stage 1 or 2")
    add("--wan_dir", help="folder of the video branch; default: the one it was trained with")
    add("--prompt", default="a room")
    add("--negative_prompt", help="default: Wan's official one, in Chinese; empty for the demo")
    add("--image", help="picture or video file whose first frame starts the video")
    add("--camera", default="orbit", help="a move (orbit, forward, left, pan_left, zoom_in, ...) or a 19-column file")
    add("--amount", type=float, default=1.0, help="strength of a named move")
    add("--fov", type=float, default=65.0, help="horizontal field of view of a named move, degrees")
    add("--scene_scale", type=float, default=1.0, help="user units per scene unit: divides a camera file's translations")
    for name, what in (("frames", "4k + 1"), ("height", "multiple of 16"), ("width", "multiple of 16")):
        add(f"--{name}", type=int, help=f"{what}; default: the training size")
    add("--steps", type=int, default=50)
    add("--sampler", default="euler", choices=SAMPLERS)
    add("--guidance", type=float, default=5.0, help="1 = no guidance, half the work")
    add("--shift", type=float, default=5.0)
    add("--seed", type=int, default=0)
    add("--fps", type=float, default=16)
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 on a GPU, fp32 on a CPU")
    add("--out", default="outputs/sample", type=pathlib.Path)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main():
    args = parse_arguments()
    meta = read_metadata(args.ckpt)
    if meta.get("stage") not in ("1", "2"):
        raise ValueError(f"{args.ckpt}: stage {meta.get('stage')}; wanted a stage 1 or stage 2 checkpoint")
    trained = json.loads(meta["train_config"])
    frames = args.frames or trained["num_frames"]
    height, width = args.height or trained["height"], args.width or trained["width"]
    if frames < 5 or frames % 4 != 1 or height % 16 or width % 16:
        raise ValueError(f"--frames {frames} --height {height} --width {width}: wanted 4k + 1 frames, multiples of 16")
    w2c, K = load_camera(args.camera, frames, (height, width), args.fov, args.amount, args.scene_scale)
    device = torch.device(args.device)
    wan_dir = args.wan_dir or trained["wan_dir"]
    real = cache_prefix(wan_dir) != "transform"
    negative = args.negative_prompt if args.negative_prompt is not None else NEGATIVE if real else ""
    image = load_image(args.image, height, width) if args.image else None
    encoders = make_encoders(wan_dir=wan_dir if real else "", device=device)
    text, start, clip, vae = conditions(encoders, [args.prompt, negative], image, frames)
    half = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
    model = build_model(config_from_metadata(meta), wan_dir, device, torch.bfloat16 if half else None)
    load_trained(model, args.ckpt)
    model.set_stage(int(meta["stage"])).requires_grad_(False)

    noise = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8,
                        generator=torch.Generator().manual_seed(args.seed)).to(device)
    if image is not None and model.dit.in_dim == 16:
        raise ValueError(f"--image {args.image}: {wan_dir} is a text-to-video family; leave the image out")
    y = None if start is None else start_condition(start.to(device), model.dit.in_dim, noise.shape[2])
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        _, geometry, video = generate(model, noise, text[:1], text[1:], y, clip, w2c.to(device), K.to(device),
                                      args.sampler, args.steps, args.shift, args.guidance,
                                      lambda latents: vae.decode(latents.float().cpu()).cpu())
    geometry = {k: v.cpu() for k, v in geometry.items() if k != "velocity"}
    metric = export(args.out, video[0], geometry, w2c, K, args.fps, args.scene_scale)
    print(f"{args.out}: video.mp4 depth.mp4 depth.npz points.ply cameras.txt sheet.png | predicted against commanded "
          f"cameras: rotation {metric['rot_deg']:.2f} deg, translation {metric['trans']:.3f} scene units")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"sample.py: {error}") from None
