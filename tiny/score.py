"""How good the miniature is, on rendered rooms that no training saw:

    python tiny/score.py [--ckpt CKPT] [--wan_dir DIR] [--rooms 256] [--seed N] [--size 96x160]

PSNR of the codec, of holding the first frame still, and of sampled videos (frames 1 .. T - 1, made
from the true first frame, prompt and cameras, against the true rendering); then geometry read out
of the true video, with the cameras given and without, beside the mean depth of other rooms.
Lengths are in scene units.  Without --ckpt: the video branch alone."""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample  # noqa: E402
from data import collate, prepare  # noqa: E402
from encoders import MINIATURE, WanFolder, encode_start  # noqa: E402
from geometry import decode_pose, normalize_scene, unproject  # noqa: E402
from lib.camera_files import size_of  # noqa: E402
from lib.evaluate import How, geometry_row, mean_rows, output_at  # noqa: E402
from lib.guards import run_command  # noqa: E402
from lib.metrics import depth_metrics, psnr  # noqa: E402
from lib.rooms import render_clip  # noqa: E402
from lib.weights import open_checkpoint, open_model  # noqa: E402
from model import PRESETS  # noqa: E402

FRAMES = 9
HOW = How(torch.no_grad(), 1, sample.READOUT_SIGMA)


def open_room(seed, size, encoders, model):
    """A rendered room as the model gets it (batch of 1), video (1, 3, T, H, W), mask of objects."""
    text, vae, pad = encoders
    clip = render_clip(seed, FRAMES, *size, "simple")
    video = torch.from_numpy(clip["rgb"]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    item = dict(
        latents=vae.encode(video)[0],
        start_latents=encode_start(vae, video[:, :, :1], FRAMES, pad)[0],
        text=text([clip["prompt"]])[0],
        depth=torch.from_numpy(clip["depth"]),
        w2c=torch.from_numpy(clip["w2c"]).float(),
        intrinsics=torch.from_numpy(clip["intrinsics"]).float().expand(FRAMES, 3, 3),
    )
    b = prepare(collate([item]), model.cfg.in_dim, torch.device("cpu"), model.rays)
    noise = torch.randn(b["latents"].shape, generator=torch.Generator().manual_seed(seed))
    return dict(b, noise=noise), video, torch.from_numpy(clip["objects"])[None]


def video_row(b, video, encoders, model, sampling):
    """PSNR of codec, still frame and sample."""
    text, vae, _ = encoders
    camera = (b["w2c"], b["intrinsics"])
    inputs = sample.Inputs(b["noise"], b["text"][0], text([""])[0], b["y"], None, *camera)
    denoise = sample.Denoiser(model, inputs, sampling)
    run = sample.SAMPLERS[sampling.sampler]
    made = vae.decode(run(denoise, b["noise"], sampling.steps, shift=sampling.shift))
    shown = dict(
        codec=vae.decode(b["latents"]), still=video[:, :, :1].expand_as(video), sample=made
    )
    return {name: psnr(x[:, :, 1:], video[:, :, 1:]) for name, x in shown.items()}


def geometry_rows(b, objects, model, mean_depth):
    """Rows of the model, and of the mean depth of other rooms with a camera that stands still;
    objects: AbsRel on boxes and spheres alone."""
    still, flat = torch.eye(4)[:3].expand_as(b["w2c"]), torch.full_like(b["depth"], mean_depth)
    found = {"mean depth, still": (flat, unproject(flat, still, b["intrinsics"]), still)}
    for name, given in (("poses given", True), ("no poses", False)):
        out = output_at(model, b, HOW.eval_sigma, HOW, given=given, video=model.stage == 2)
        w2c, _ = decode_pose(out["pose_enc"][-1], b["depth"].shape[-2:])
        found[name] = (out["depth"], out["points"], w2c)
    rows, here = {}, objects & b["mask"]
    for name, (depth, points, w2c) in found.items():
        rows[name] = geometry_row(depth, points, w2c, b)
        if here.any():
            rows[name]["objects"] = depth_metrics(depth, b["depth"], here)["abs_rel"]
    return rows


def mean_depth_of(seeds, size):
    """Mean depth of rooms, scene units."""
    means = []
    for seed in seeds:
        clip = render_clip(seed, 2, *size, "simple")
        depth, w2c = torch.from_numpy(clip["depth"])[None], torch.from_numpy(clip["w2c"])[None]
        K = torch.from_numpy(clip["intrinsics"]).expand(1, 2, 3, 3)
        means.append(normalize_scene(depth.double(), w2c, K, depth > 0)[0].mean())
    return torch.stack(means).mean().item()


@torch.no_grad()
def score(ckpt, wan_dir, seeds, size, sampling):
    """{name: row} of means over the rooms of some seeds."""
    folder = WanFolder(wan_dir, "cpu")
    encoders = folder.load_text(), folder.load_vae(), folder.start_pad
    if ckpt:
        model = open_checkpoint(ckpt, wan_dir, torch.device("cpu"))
    else:
        model = open_model({}, PRESETS["tiny"], wan_dir, "cpu", None).set_stage(0)
    mean_depth, found = mean_depth_of(range(70_000_000, 70_000_032), size) if ckpt else 0.0, []
    for seed in tqdm(seeds, unit="room", disable=None):
        b, video, objects = open_room(seed, size, encoders, model)
        rows = dict(video=video_row(b, video, encoders, model, sampling))
        if ckpt:
            rows |= geometry_rows(b, objects, model, mean_depth)
        found.append(rows)
    return mean_rows(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", type=int, default=256)
    parser.add_argument("--seed", type=int, default=60_000_000)
    parser.add_argument("--size", type=size_of, default=(96, 160), metavar="HxW")
    parser.add_argument("--ckpt", default="")
    parser.add_argument("--wan_dir", default=MINIATURE)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shift", type=float, default=3.0)
    how = parser.parse_args()
    seeds = range(how.seed, how.seed + how.rooms)
    sampling = sample.Sampling(steps=how.steps, shift=how.shift, guidance=1.0)
    for name, row in score(how.ckpt, how.wan_dir, seeds, how.size, sampling).items():
        print(name, {k: round(v, 3) for k, v in row.items() if not k.startswith("delta")})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_command("tiny/score.py", main)
