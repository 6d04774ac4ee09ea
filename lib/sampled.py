"""Sampled worlds against the truth: what a model makes of a clip's first frame, prompt and cameras.

Is it the true video, does it obey the camera, does it come back?  Answers that our own heads cannot
flatter; docs/evaluation.md says what each number is and how it could be cheated.  Two baselines:
the first frame held still, and the true video through the codec, which no sample can beat."""

import math

import torch
import torch.nn.functional as F

from geometry import project
from lib import metrics
from lib.align import align_frames

STILL, CODEC = "baseline still (first frame held)", "ceiling (true video through the codec)"
# The headline metrics of samples and the words above them.
COLUMNS = dict(psnr="PSNR", ssim="SSIM", motion="motion", warp_psnr="warp", align_rot="al. deg")
COLUMNS |= dict(align_trans="al. tr", revisit="revisit", abs_rel="AbsRel", points="points")
COLUMNS |= dict(rot_deg="rot deg", trans="transl")


def meet(points, w2c, K, depth, tolerance=0.05):
    """Where points land in other frames, and whether those frames see them.

    points     (T, H, W, 3) world;  w2c (T, 3, 4), K (T, 3, 3), depth (T, H, W) of the other frames
    returns    grid (T, H, W, 2) for grid_sample, seen (T, H, W): inside, and the depth there is
               theirs within `tolerance`"""
    uv, z = (x[0] for x in project(points[None], w2c[None], K[None]))
    grid = 2 * uv / uv.new_tensor([depth.shape[2], depth.shape[1]]) - 1
    how = dict(mode="nearest", align_corners=False)
    there = F.grid_sample(depth[:, None], grid, **how)[:, 0]
    inside = (z > 1e-3) & (grid.abs() < 1).all(-1) & (there > 0)
    return grid, inside & ((there - z).abs() < tolerance * z)


def known(b):
    """(T, H, W) pixels of a batch's one clip of known depth that do not move by themselves."""
    return (b["mask"] & ~b["moving"] if "moving" in b else b["mask"])[0]


def carry_first(b, first):
    """The true first frame (3, H, W) as later cameras see it (T-1, 3, H, W), and where they do."""
    later = len(b["depth"][0]) - 1
    names = ("w2c", "intrinsics", "depth")
    w2c, K, depth = (b[name][0, :1].expand(later, *b[name].shape[2:]) for name in names)
    grid, seen = meet(b["points"][0, 1:], w2c, K, depth * known(b)[:1])
    pictures = first.expand(later, -1, -1, -1)
    carried = F.grid_sample(pictures, grid, align_corners=False, padding_mode="border")
    return carried, seen & known(b)[1:]


def alignment(b, first, video):
    """Poses (T-1, 3, 4) that best explain frames 1 .. T-1 of a video (3, T, H, W), given the first
    frame and its true depth.  The commanded cameras are a guess among others."""
    frames = video.movedim(0, 1)[1:]
    later = (b[name][0, 1:] for name in ("w2c", "intrinsics", "depth"))
    _, seen = meet(b["points"][0, :1].expand(len(frames), -1, -1, -1), *later)
    K, depth = b["intrinsics"][0], b["depth"][0, 0] * known(b)[0]
    still = torch.eye(4).to(b["w2c"])[:3].expand_as(b["w2c"][0, 1:])
    return align_frames(first, depth, frames, K, seen, [b["w2c"][0, 1:], still])


def video_row(b, truth, video):
    """Metrics of a video (3, T, H, W) in [-1, 1] against the true one, of a batch of one clip."""
    first, frames, true = truth[:, 0], video[:, 1:].movedim(0, 1), truth[:, 1:].movedim(0, 1)
    carried, seen = carry_first(b, first)
    row = dict(psnr=metrics.psnr(frames, true), ssim=metrics.ssim(frames, true))
    row["motion"] = 50 * (frames - video[:, :1].movedim(0, 1)).abs().mean().item()
    row["warp_psnr"] = metrics.psnr(frames, carried, seen[:, None])
    row["seen"] = 100 * seen.double().mean().item()
    pose = alignment(b, first, video)
    pose = torch.cat([torch.eye(4)[None, :3].to(pose), pose])[None]
    # A frame of one colour, or that shares next to nothing with the first one, tells no camera.
    low, high = torch.cat([first[None], frames]).flatten(2).aminmax(dim=2)
    told = (high - low).amax(1) > 0.02
    told[1:] &= told[0] & (seen.double().mean((1, 2)) > 0.01)
    found = dict(rot_deg=math.nan, trans=math.nan)
    if told.sum() > 1:
        found = metrics.pose_metrics(pose[:, told], b["w2c"].to(pose)[:, told])
    return row | dict(align_rot=found["rot_deg"], align_trans=found["trans"])


def out_and_back(b):
    """The batch with cameras that go the path at twice the speed, and return."""
    last = b["w2c"].shape[1] - 1
    pick = [min(2 * t, 2 * (last - t)) for t in range(last + 1)]
    return dict(b, w2c=b["w2c"][:, pick], intrinsics=b["intrinsics"][:, pick])


def sampled_row(model, b, truth, draw):
    """Metrics of a sample made from a batch's first frame, prompt and cameras.

    draw      (model, batch) -> video (3, T, H, W) in [-1, 1], the model's output at the read-out
    returns   the row without geometry, the video, the output"""
    video, out = draw(model, b)
    row = video_row(b, truth, video)
    again, _ = draw(model, out_and_back(b))
    row["revisit"] = metrics.psnr(again[:, -1], again[:, 0])
    if not (video.isfinite().all() and again.isfinite().all()):  # the worst of each
        row = {k: math.inf if k.startswith("align") else -math.inf for k in row}
    return row, video, out


def baseline_rows(b, truth, codec):
    """Rows of the first frame held still and of the true video through the codec."""
    still = truth[:, :1].expand_as(truth)
    return {STILL: video_row(b, truth, still), CODEC: video_row(b, truth, codec)}
