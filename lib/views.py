"""Do the views of a clip agree?  And if not, which usual mistake, undone, makes them agree?

Pixels of frame t are lifted with their depth, moved to frame s and compared with the depth found
there.  The truth agrees to 1e-7 on exact renderings and to 1e-3 on recordings; a wrong convention
is off by several times that.  If views disagree, each usual suspect is undone in turn, and the one
that makes most pairs of frames agree is named.
Shapes: T frames of H x W depth pixels, P pairs (t, s) of frames, n pixels of a pair.  Cameras as in
geometry.py."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from geometry import compose, inv_se3, pixel_rays, rotate, valid_depth

# What to do about each mistake.
HINTS = {
    "c2w stored as w2c": "invert every matrix: w2c = [R^T | -R^T t]",
    "OpenGL camera axes": "negate rows 2 and 3 of every w2c "
    "(y up, z backward -> y down, z forward)",
    "c2w in OpenGL axes": "invert every matrix, then negate its rows 2 and 3 "
    "(a nerfstudio or Blender export)",
    "rotation transposed": "transpose the 3x3 part of every matrix, keep its last column",
    "3x4 matrix transposed": "the 12 numbers are column-major: reshape to (4, 3), transpose, "
    "write row by row",
    "pixel intrinsics": "divide fx, cx by the width and fy, cy by the height of the image",
    "depth in millimetres": "divide depth by 1000, or give the sample depth_scale 0.001 in "
    "metadata.json",
    "ray length instead of z-depth": "divide depth by the length of the pixel's ray "
    "((u-cx)/fx, (v-cy)/fy, 1)",
    "inverse depth": "store 1 / d, or give the sample inverse_depth true in metadata.json",
    "poses one frame late": "frame t carries the camera of frame t-1: drop the first camera and "
    "the last frame",
    "poses one frame early": "frame t carries the camera of frame t+1: drop the first frame and "
    "the last camera",
    "translation scale off": "multiply every translation (last column) by the factor given",
    "relative depth": "not metric: trains with depth_mode ssi only; give depth_scale if it does "
    "have a unit",
}

# Relative depth: what rounding leaves of an exact rendering, and of millimetres.
NOISE = 1e-5, 2e-4
BETTER = 0.65  # a suspect must cut the typical disagreement of a pair to this share


# --- Cross-view agreement -------------------------------------------------------------------------
def frame_pairs(num_frames):
    """Pairs of frames up to 24 apart, both directions, first and last frame spared for shifts by
    one."""
    inner = range(1, num_frames - 1) if num_frames > 4 else range(num_frames)
    a = list(inner)[:: min(8, max(1, round((num_frames - 3) / 5)))]
    pairs = [(a[i], a[j]) for i in range(len(a)) for j in range(i + 1, min(i + 4, len(a)))]
    last = num_frames - 1
    return [p if n % 2 else p[::-1] for n, p in enumerate(pairs)] + [(0, 1), (last, last - 1)]


def gather(depth, K, pairs, count=1200):
    """What every suspect shares: about `count` pixels of the first frames, inverse depth of the
    second ones."""
    (t, s), size = map(list, zip(*pairs)), depth.shape[1:]
    step = max(1, round(math.sqrt(depth[0].numel() / count)))
    grid = (slice(None), slice(step // 2, None, step), slice(step // 2, None, step))
    valid = valid_depth(depth)
    inverse = torch.where(valid, 1 / torch.where(valid, depth, 1), 0)  # linear on planes, unlike z
    return dict(
        t=t,
        s=s,
        rays=pixel_rays(K, size)[t][grid],
        z=depth[t][grid],
        K=K[s][:, None, None],
        grid=grid,
        maps=torch.stack([inverse[s], valid[s].to(inverse)], 1),
        size=size,
    )


def reproject(g, w2c):
    """Pixels of the first frames seen from the second: uv (P, h, w, 2), z (P, h, w), usable (P, h,
    w)."""
    motion = compose(w2c[g["s"]], inv_se3(w2c[g["t"]]))[:, None, None]
    valid = valid_depth(g["z"])
    here = g["rays"] * torch.where(valid, g["z"], 0)[..., None]
    x = rotate(motion[..., :3], here) + motion[..., 3]
    z, K = x[..., 2].clamp(min=1e-6), g["K"]
    u = K[..., 0, 0] * x[..., 0] / z + K[..., 0, 2]
    v = K[..., 1, 1] * x[..., 1] / z + K[..., 1, 2]
    uv = torch.stack([u, v], -1)
    return uv, z, valid & (x[..., 2] > 1e-6)


def sample_maps(maps, uv, size):
    """Bilinear values (P, c, h, w) of maps (P, c, H, W) at pixels uv; 0 outside."""
    grid = uv / uv.new_tensor([size[1], size[0]]) * 2 - 1
    return F.grid_sample(maps, grid.clamp(-3, 3), align_corners=False)


def disagreement(g, w2c):
    """Relative depth error of the pixels both frames see: (P, h, w), NaN elsewhere."""
    uv, z, ok = reproject(g, w2c)
    seen, whole = sample_maps(g["maps"], uv, g["size"]).unbind(1)
    return torch.where(ok & (whole > 0.999), (1 / seen.clamp(min=1e-9) / z - 1).abs(), math.nan)


def per_pair(error):
    """Median error (P,), at most 1, 1 for pairs that share less than 5 % of their pixels."""
    error = error.flatten(1)
    shared = 1 - error.isnan().double().mean(1)
    return torch.where(shared > 0.05, error.nanmedian(1).values.clamp(max=1), 1)


def error_ratio(errors, before, noise):
    """Typical factor by which the pairs' errors change; robust to pairs that nothing repairs."""
    return ((errors + noise) / (before + noise)).log().mean().exp().item()


# --- Suspects -------------------------------------------------------------------------------------
FLIP = torch.tensor([[1.0, -1, -1]], dtype=torch.float64).T


def without_mistake(name, depth, w2c, K):
    """Depth and cameras as they would be if the named mistake had been made."""
    R, t, c2w = w2c[..., :3], w2c[..., 3:], inv_se3(w2c)
    if name == "ray length instead of z-depth":
        return depth / pixel_rays(K, depth.shape[-2:]).norm(dim=-1), w2c
    if name == "inverse depth":
        return torch.where(valid_depth(depth), 1 / depth.clamp(min=1e-9), 0), w2c
    return depth, {
        "c2w stored as w2c": c2w,
        "OpenGL camera axes": FLIP * w2c,
        "c2w in OpenGL axes": FLIP * c2w,
        "rotation transposed": torch.cat([R.mT, t], -1),
        "poses one frame late": torch.cat([w2c[1:], w2c[-1:]]),
        "poses one frame early": torch.cat([w2c[:1], w2c[:-1]]),
    }[name]


SIMPLE = (
    "c2w stored as w2c",
    "OpenGL camera axes",
    "poses one frame late",
    "poses one frame early",
    "ray length instead of z-depth",
    "inverse depth",
    "c2w in OpenGL axes",
    "rotation transposed",
)


def scaled(w2c, k):
    return torch.cat([w2c[..., :3], k * w2c[..., 3:]], -1)


def best_scale(g, w2c):
    """The factor on translations that makes the views agree best: a search from 1/3000 to 3000,
    three times finer."""
    centre, width = 0.0, math.log(3000)
    for count in (49, 13, 13):
        ks = [math.exp(centre + width * x) for x in torch.linspace(-1, 1, count).tolist()]
        found = (per_pair(disagreement(g, scaled(w2c, k))) for k in ks)
        errors = [(error + NOISE[1]).log().mean().item() for error in found]
        centre, width = math.log(ks[int(np.argmin(errors))]), width * 3 / count
    return math.exp(centre)


def find_suspect(depth, w2c, K, pairs):
    """The mistake that, undone, makes the views agree: name, ratio of errors, detail; (None, 1, '')
    if none does."""
    g = gather(depth, K, pairs)
    before, after = per_pair(disagreement(g, w2c)), {}
    for name in SIMPLE:
        fixed_depth, fixed = without_mistake(name, depth, w2c, K)
        h = g if fixed_depth is depth else gather(fixed_depth, K, pairs)
        after[name, ""] = per_pair(disagreement(h, fixed))
    k = best_scale(g, w2c)
    if not 0.95 < k < 1.05:
        name = "depth in millimetres" if 800 < k < 1250 else "translation scale off"
        after[name, f"factor {k:.4g}"] = per_pair(disagreement(g, scaled(w2c, k)))
    noise = min(e.median().item() for e in (before, *after.values()))
    noise = min(max(noise, NOISE[0]), NOISE[1])
    found = [
        (error_ratio(e, before, noise), rank, *name) for rank, (name, e) in enumerate(after.items())
    ]
    # a tie goes to the commoner mistake: without travel, for instance, swapped and transposed are
    # the same
    best = min(found)
    best = min((f for f in found if f[0] < 1.1 * best[0]), key=lambda f: f[1])
    return (best[2], best[0], best[3]) if best[0] < BETTER else (None, 1.0, "")


def motion_in_pixels(g, w2c):
    """Largest over pairs of the median pixel motion: in all, and the part that only travel
    explains."""
    uv, _, ok = reproject(g, w2c)
    turned, _, _ = reproject(g, scaled(w2c, 0))
    still, _, _ = reproject(g, torch.eye(3, 4).to(w2c).expand_as(w2c))
    motions = (torch.where(ok, (uv - x).norm(dim=-1), math.nan) for x in (still, turned))
    return [m.flatten(1).nanmedian(1).values.nan_to_num().max().item() for m in motions]
