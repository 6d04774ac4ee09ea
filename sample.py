"""Sample a world: checkpoint + prompt (+ start image) + camera path -> video, depth, point cloud, cameras, pictures.

    python sample.py --ckpt outputs/demo/stage2/latest.safetensors --prompt "a room with two boxes" --camera orbit

writes into --out: video.mp4, depth.mp4 (near is bright), depth.npz (depth, conf, mask, w2c, intrinsics), points.ply,
cameras.txt (commanded) and cameras_predicted.txt (19 columns, RealEstate10K order), sheet.png (frames | depth | conf).
Lengths are scene units (mean distance of the first frame's points = 1) times --scene_scale."""
import argparse
import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import cameras
from data import (cache_prefix, depth_to_rgb, encode_start, make_encoders, read_depth, read_video, tile, write_cameras,
                  write_png, write_video)
from foreign import metadata_of, open_checkpoint
from geometry import (decode_pose, encode_pose, normalize_scene, pose_metrics, relative_to_first, unproject,
                      valid_depth)
from model import shift_sigma, start_condition

# The default of the official Wan 2.1 code (shared_config.py, sample_neg_prompt); the demo's word hash gets "".
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
            "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
            "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
READOUT_SIGMA = 0.1             # the noise level at which geometry is read; the release's last step has 0.0926
# What the release's sampling does unlike ours, by default with its weights; --correct NAME does it our way.
CORRECTIONS = {
    "rays": "true per-pixel rays; the release shows one ray per frame, and its weights have seen nothing else",
    "readout": "geometry in one extra forward on the finished sample; the release reads it in its last step",
    "image": "start image cropped to the aspect; the release squeezes it",
    "points": "points lifted with the commanded cameras; the release uses the predicted ones"}


def load_image(path, height, width, squeeze=False):
    """First frame of a picture or video file -> (1, 3, 1, H, W) in [-1, 1], centre-cropped to the aspect or squeezed."""
    frame = torch.from_numpy(read_video(path, max_frames=1)[0].copy()).permute(0, 3, 1, 2).float()
    if squeeze:
        frame = F.interpolate(frame, (height, width), mode="bicubic", antialias=True).clamp(0, 255)
        return (frame / 127.5 - 1)[:, :, None]
    h, w = frame.shape[-2:]
    scale = max(height / h, width / w)
    frame = F.interpolate(frame, (max(height, round(h * scale)), max(width, round(w * scale))), mode="bilinear",
                          antialias=True)
    top, left = (frame.shape[-2] - height) // 2, (frame.shape[-1] - width) // 2
    return (frame[..., top:top + height, left:left + width] / 127.5 - 1)[:, :, None]


def load_camera(text, num_frames, size, fov_deg, amount, scene_scale):
    """A named move or a camera file -> w2c (1, T, 3, 4) relative to frame 0 in scene units, pixel intrinsics."""
    height, width = size
    if pathlib.Path(text).suffix or pathlib.Path(text).is_file():
        released = text.endswith(".json") and "cameras_interp" in pathlib.Path(text).read_text()
        w2c, fractions, _ = cameras.read(text, "fantasyworld" if released else None, size)
        if len(w2c) < num_frames:
            raise ValueError(f"{text}: {len(w2c)} cameras; --frames {num_frames} wants at least that many")
        w2c = relative_to_first(torch.from_numpy(w2c[:num_frames])[None]).float()
        w2c = torch.cat([w2c[..., :3], w2c[..., 3:] / scene_scale], -1)
        fx, fy, cx, cy = torch.from_numpy(fractions[:num_frames]).float().unbind(-1)
        fx, fy, cx, cy = fx * width, fy * height, cx * width, cy * height
    else:
        w2c, zoom = cameras.camera_move(text, num_frames, amount)
        w2c = w2c[None].float()
        fx = fy = width / 2 / np.tan(np.radians(fov_deg) / 2) * zoom.float()
        cx, cy = torch.full_like(fx, width / 2), torch.full_like(fx, height / 2)
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    return w2c, torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], -1).view(1, num_frames, 3, 3)


def scale_of(text, K, size):
    """--scene_scale: a number, or a depth map of the start image (.npy, .npz, .png) whose mean distance it becomes."""
    try:
        return float(text)
    except ValueError:
        depth = torch.from_numpy(read_depth(text, frames=[0]))[None]                   # (1, 1, h, w)
        depth = F.interpolate(depth, size, mode="nearest-exact")
        return normalize_scene(depth, torch.eye(4)[None, None, :3], K[:, :1], valid_depth(depth))[2].item()


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
def generate(model, noise, text, negative, y, clip, w2c, K, sampler, steps, shift, guidance, last_step=False):
    """Sample latents (1, 16, f, h, w), then read the geometry once at READOUT_SIGMA -> latents, geometry dict.

    Guidance is v_neg + g (v_pos - v_neg); camera and image are the same in both passes.  last_step: read the geometry in
    the last step's pass with the prompt instead, as the release does."""
    size = (8 * noise.shape[-2], 8 * noise.shape[-1])
    given, poses = dict(y=y, clip=clip, plucker=model.rays(w2c, K, size)), encode_pose(w2c, K, size)
    passes, geometry = [], {}

    def velocity(x, t, context):
        passes.extend([1] * (context is text))
        if last_step and context is text and len(passes) == steps:
            geometry.update(model(x, t, context, **given, poses=poses))
            return geometry["velocity"]
        if model.stage == 2:
            return model(x, t, context, **given, poses=poses, heads=False)["velocity"]
        return model.dit(x, t, context, **given)              # stage 1: geometry does not reach the video

    def guided(x, t):
        v = velocity(x, t, text)
        return v if guidance == 1 else torch.lerp(velocity(x, t, negative), v, guidance)

    latents = SAMPLERS[sampler](guided, noise, steps, shift, lambda grid: tqdm(grid, desc="sampling", unit="step"))
    if last_step:
        return latents, geometry
    t = torch.full((1,), 1000 * READOUT_SIGMA, device=noise.device)
    x = (1 - READOUT_SIGMA) * latents + READOUT_SIGMA * noise
    return latents, model(x, t, text, **given, poses=poses, video=model.stage == 2)


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


def export(out, video, geometry, w2c, K, fps, scale, lift_predicted=False):
    """Write every file of a sample; video (3, T, H, W) in [-1, 1], geometry of one clip on the CPU.

    lift_predicted  points are lifted with the predicted cameras, not with the commanded w2c, K
    returns  pose_metrics of the predicted against the commanded cameras"""
    out.mkdir(parents=True, exist_ok=True)
    rgb = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    height, width = rgb.shape[1:3]
    depth, conf = (geometry[k][0].float().numpy() for k in ("depth", "depth_conf"))
    predicted, predicted_K = decode_pose(geometry["pose_enc"][-1].float(), (height, width))
    mask = trusted(depth, conf)
    lift = (predicted, predicted_K) if lift_predicted else (w2c, K)
    points = unproject(geometry["depth"].float(), *lift)[0].numpy() * scale
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
    add("--ckpt", required=True, help="checkpoint of stage 1 or 2, or a release's model.pth")
    add("--wan_dir", help="folder of the video branch; default: the one it was trained with; a release needs it")
    add("--release", help="model.pth of the release that --ckpt was fine-tuned from, if it was moved since")
    add("--correct", nargs="+", choices=CORRECTIONS, default=[], metavar="NAME",
        help="with a release's weights, do not as the release does: "
             + "; ".join(f"{name}: {what}" for name, what in CORRECTIONS.items()))
    add("--offload", type=float, metavar="GB", help="keep so many GB of weights on the device (0 = none), the others "
        "visit it layer by layer; for a GPU that is smaller than the model")
    add("--prompt", default="a room")
    add("--negative_prompt", help="default: Wan's official one, in Chinese; empty for the demo")
    add("--image", help="picture or video file whose first frame starts the video")
    add("--camera", default="orbit", help="a move (orbit, forward, left, pan_left, zoom_in, ...) or a camera file")
    add("--amount", type=float, default=1.0, help="strength of a named move")
    add("--fov", type=float, default=65.0, help="horizontal field of view of a named move, degrees")
    add("--scene_scale", default="1", help="user units per scene unit: divides a camera file's translations; a number, "
        "or a depth map of the start image (.npy, .npz, .png), whose mean distance it becomes")
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
    meta = metadata_of(args.ckpt)
    if meta.get("stage") not in ("1", "2"):
        raise ValueError(f"{args.ckpt}: stage {meta.get('stage')}; wanted a stage 1 or stage 2 checkpoint")
    trained = json.loads(meta["train_config"])
    frames = args.frames or trained["num_frames"]
    height, width = args.height or trained["height"], args.width or trained["width"]
    if frames < 5 or frames % 4 != 1 or height % 16 or width % 16:
        raise ValueError(f"--frames {frames} --height {height} --width {width}: wanted 4k + 1 frames, multiples of 16")
    _, K = load_camera(args.camera, frames, (height, width), args.fov, args.amount, 1.0)
    scale = scale_of(args.scene_scale, K, (height, width))
    w2c, K = load_camera(args.camera, frames, (height, width), args.fov, args.amount, scale)
    device = torch.device(args.device)
    wan_dir = args.wan_dir or trained["wan_dir"]
    quirks = set(CORRECTIONS) - set(args.correct) if meta.get("release") else set()
    if meta.get("release") and not wan_dir:
        raise ValueError(f"{args.ckpt}: a release needs --wan_dir, the folder of Wan2.1-I2V-14B-480P, for its encoders")
    real = cache_prefix(wan_dir) != "transform"
    negative = args.negative_prompt if args.negative_prompt is not None else NEGATIVE if real else ""
    image = load_image(args.image, height, width, "image" in quirks) if args.image else None
    encoders = make_encoders(wan_dir=wan_dir if real else "", device=device)
    text, start, clip, vae = conditions(encoders, [args.prompt, negative], image, frames)
    half = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
    model = open_checkpoint(args.ckpt, wan_dir, device, torch.bfloat16 if half else None, args.offload,
                            "rays" in args.correct, args.release)
    noise = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8,
                        generator=torch.Generator().manual_seed(args.seed)).to(device)
    if image is not None and model.dit.in_dim == 16:
        raise ValueError(f"--image {args.image}: {wan_dir} is a text-to-video family; leave the image out")
    y = None if start is None else start_condition(start.to(device), model.dit.in_dim, noise.shape[2])
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        latents, geometry = generate(model, noise, text[:1], text[1:], y, clip, w2c.to(device), K.to(device),
                                     args.sampler, args.steps, args.shift, args.guidance, "readout" in quirks)
    del model
    video = vae.decode(latents.float().cpu())[0].cpu()
    geometry = {k: v.cpu() for k, v in geometry.items() if k != "velocity"}
    metric = export(args.out, video, geometry, w2c, K, args.fps, scale, "points" in quirks)
    print(f"{args.out}: video.mp4 depth.mp4 depth.npz points.ply cameras.txt sheet.png | predicted against commanded "
          f"cameras: rotation {metric['rot_deg']:.2f} deg, translation {metric['trans']:.3f} scene units")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"sample.py: {error}") from None
