"""Is a dataset what it says?  `python data.py verify DIR`: files, units and camera conventions of
every sample.

Pixels of frame t are lifted with their depth, moved to frame s and compared with the depth found
there.  The truth agrees to 1e-7 on exact renderings and to 1e-3 on recordings; a wrong convention
is off by several times that.  If views disagree, each usual suspect is undone in turn, and the one
that makes most pairs of frames agree is named.
Shapes: T frames of H x W depth pixels, P pairs (t, s) of frames, n pixels of a pair.  Cameras as in
geometry.py."""

import json
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from geometry import compose, inv_se3, pixel_rays, rotate, unproject, valid_depth
from lib.camera_files import read_table
from lib.files import (
    FAR,
    check_sample,
    check_sums,
    count_frames,
    read_arrays,
    read_video,
    relative_depth,
)

HINTS = {
    "c2w stored as w2c": "invert every matrix: w2c = [R^T | -R^T t]",
    "OpenGL camera axes": "negate rows 2 and 3 of every w2c (y up, z backward -> y down, z forward)",
    "c2w in OpenGL axes": "invert every matrix, then negate its rows 2 and 3 (a nerfstudio or Blender export)",
    "rotation transposed": "transpose the 3x3 part of every matrix, keep its last column",
    "3x4 matrix transposed": "the 12 numbers are column-major: reshape to (4, 3), transpose, write row by row",
    "pixel intrinsics": "divide fx, cx by the width and fy, cy by the height of the image",
    "depth in millimetres": "divide depth by 1000, or give the sample depth_scale 0.001 in metadata.json",
    "ray length instead of z-depth": "divide depth by the length of the pixel's ray ((u-cx)/fx, (v-cy)/fy, 1)",
    "inverse depth": "store 1 / d, or give the sample inverse_depth true in metadata.json",
    "poses one frame late": "frame t carries the camera of frame t-1: drop the first camera and the last frame",
    "poses one frame early": "frame t carries the camera of frame t+1: drop the first frame and the last camera",
    "translation scale off": "multiply every translation (last column) by the factor given",
    "relative depth": "not metric: trains with depth_mode ssi only; give depth_scale if it does have a unit",
}

RELATIVE, AGREE, PHOTO = (
    dict(data=0.03, exact=1e-4),
    dict(data=0.6, exact=0.8),
    dict(data=0.8, exact=0.3),
)

LARGE = (
    200  # metres: a median depth beyond this is in millimetres, if cameras do not tell otherwise
)

NOISE = 1e-5, 2e-4  # relative depth: what rounding leaves of an exact rendering, and of millimetres

BETTER = 0.65  # a suspect must cut the typical disagreement of a pair to this share


# --- Cross-view agreement -------------------------------------------------------------------------
def frame_pairs(num_frames):
    """Pairs of frames up to 24 apart, both directions, first and last frame spared for shifts by
    one."""
    inner = range(1, num_frames - 1) if num_frames > 4 else range(num_frames)
    a = list(inner)[:: min(8, max(1, round((num_frames - 3) / 5)))]
    pairs = [(a[i], a[j]) for i in range(len(a)) for j in range(i + 1, min(i + 4, len(a)))]
    return [p if n % 2 else p[::-1] for n, p in enumerate(pairs)] + [
        (0, 1),
        (num_frames - 1, num_frames - 2),
    ]


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


def move(g, w2c):
    """Pixels of the first frames seen from the second: uv (P, h, w, 2), z (P, h, w), usable (P, h,
    w)."""
    motion = compose(w2c[g["s"]], inv_se3(w2c[g["t"]]))[:, None, None]
    valid = valid_depth(g["z"])
    x = (
        rotate(motion[..., :3], g["rays"] * torch.where(valid, g["z"], 0)[..., None])
        + motion[..., 3]
    )
    z = x[..., 2].clamp(min=1e-6)
    K = g["K"]
    uv = torch.stack(
        [K[..., 0, 0] * x[..., 0] / z + K[..., 0, 2], K[..., 1, 1] * x[..., 1] / z + K[..., 1, 2]],
        -1,
    )
    return uv, z, valid & (x[..., 2] > 1e-6)


def sample(maps, uv, size):
    """Bilinear values (P, c, h, w) of maps (P, c, H, W) at pixels uv; 0 outside."""
    grid = uv / uv.new_tensor([size[1], size[0]]) * 2 - 1
    return F.grid_sample(maps, grid.clamp(-3, 3), align_corners=False)


def disagreement(g, w2c):
    """Relative depth error of the pixels both frames see: (P, h, w), NaN elsewhere."""
    uv, z, ok = move(g, w2c)
    seen, whole = sample(g["maps"], uv, g["size"]).unbind(1)
    return torch.where(ok & (whole > 0.999), (1 / seen.clamp(min=1e-9) / z - 1).abs(), math.nan)


def per_pair(error):
    """Median error (P,), at most 1, 1 for pairs that share less than 5 % of their pixels."""
    error = error.flatten(1)
    shared = 1 - error.isnan().double().mean(1)
    return torch.where(shared > 0.05, error.nanmedian(1).values.clamp(max=1), 1)


def gain(errors, before, noise):
    """Typical factor by which the pairs' errors change; robust to pairs that nothing repairs."""
    return ((errors + noise) / (before + noise)).log().mean().exp().item()


# --- Suspects -------------------------------------------------------------------------------------
FLIP = torch.tensor([[1.0, -1, -1]], dtype=torch.float64).T


def undo(name, depth, w2c, K):
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
        errors = [
            (per_pair(disagreement(g, scaled(w2c, k))) + NOISE[1]).log().mean().item() for k in ks
        ]
        centre, width = math.log(ks[int(np.argmin(errors))]), width * 3 / count
    return math.exp(centre)


def find_suspect(depth, w2c, K, pairs):
    """The mistake that, undone, makes the views agree: name, gain, detail; (None, 1, '') if none
    does."""
    g = gather(depth, K, pairs)
    before, after = per_pair(disagreement(g, w2c)), {}
    for name in SIMPLE:
        fixed_depth, fixed = undo(name, depth, w2c, K)
        h = g if fixed_depth is depth else gather(fixed_depth, K, pairs)
        after[name, ""] = per_pair(disagreement(h, fixed))
    k = best_scale(g, w2c)
    if not 0.95 < k < 1.05:
        name = "depth in millimetres" if 800 < k < 1250 else "translation scale off"
        after[name, f"factor {k:.4g}"] = per_pair(disagreement(g, scaled(w2c, k)))
    noise = min(e.median().item() for e in (before, *after.values()))
    noise = min(max(noise, NOISE[0]), NOISE[1])
    found = [(gain(e, before, noise), rank, *name) for rank, (name, e) in enumerate(after.items())]
    # a tie goes to the commoner mistake: without travel, for instance, swapped and transposed are
    # the same
    best = min(found)
    best = min((f for f in found if f[0] < 1.1 * best[0]), key=lambda f: f[1])
    return (best[2], best[0], best[3]) if best[0] < BETTER else (None, 1.0, "")


def motion_in_pixels(g, w2c):
    """Largest over pairs of the median pixel motion: in all, and the part that only travel
    explains."""
    uv, _, ok = move(g, w2c)
    turned, _, _ = move(g, scaled(w2c, 0))
    still, _, _ = move(g, torch.eye(3, 4).to(w2c).expand_as(w2c))
    return [
        torch.where(ok, (uv - x).norm(dim=-1), math.nan)
        .flatten(1)
        .nanmedian(1)
        .values.nan_to_num()
        .max()
        .item()
        for x in (still, turned)
    ]


# --- One sample -----------------------------------------------------------------------------------
class Report:
    """Checks of one sample: status ok, warn (worth a look), skip (cannot be checked) or fail, and a
    sentence."""

    def __init__(self, name):
        self.id, self.checks, self.numbers, self.suspects = name, {}, {}, []

    def add(self, check, status, text):
        worst = max(
            (self.checks.get(check, ("ok", ""))[0], status),
            key=["ok", "skip", "warn", "fail"].index,
        )
        self.checks[check] = (
            worst,
            "; ".join(filter(None, (self.checks.get(check, ("", ""))[1], text))),
        )

    def suspect(self, check, name, text, status="fail"):
        self.suspects.append(name)
        self.add(check, status, f"{name}: {text}")

    @property
    def status(self):
        return max(
            (s for s, _ in self.checks.values()),
            key=["ok", "skip", "warn", "fail"].index,
            default="ok",
        )


def check_cameras(report, table, size):
    """Orthonormal rotations and sensible intrinsics -> w2c (T, 3, 4), K (T, 3, 3) at `size`,
    repaired to go on."""
    (h, w), table = size, torch.from_numpy(table)

    def off(m):  # (..., 3, 4): distance from a rotation
        R = m[..., :3]
        det = torch.linalg.det(R)
        return (
            ((R @ R.mT - torch.eye(3).to(R)).abs().amax((1, 2)) + (det - 1).abs())
            .nan_to_num(9)
            .max()
            .item()
        )

    w2c, columns = table[:, 7:].reshape(-1, 3, 4), table[:, 7:].reshape(-1, 4, 3).mT
    if off(w2c) > 1e-3 and off(columns) < 1e-3:
        report.suspect(
            "rotations", "3x4 matrix transposed", f"rows as they stand are off by {off(w2c):.2g}"
        )
        w2c = columns
    elif off(w2c) > 1e-3:
        report.add(
            "rotations", "fail", f"not orthonormal with determinant +1 (off by {off(w2c):.2g})"
        )
    else:
        report.add("rotations", "ok", f"orthonormal to {off(w2c):.1g}")
    fractions = table[:, 1:5].clone()
    if fractions[:, :2].max() > 20:
        report.suspect("intrinsics", "pixel intrinsics", f"focal length {fractions[0, 0]:.4g}")
        fractions /= table.new_tensor([w, h, w, h])
    elif fractions[:, :2].min() <= 0 or (fractions[:, 2:] - 0.5).abs().max() > 0.5:
        report.add(
            "intrinsics",
            "fail",
            f"fx fy cx cy {fractions[0].tolist()}: wanted fractions of the image size",
        )
    fx, fy, cx, cy = (fractions * fractions.new_tensor([w, h, w, h])).unbind(1)
    if not 0.8 < (fx / fy).median() < 1.25:
        report.add(
            "intrinsics", "warn", f"pixels are not square: focal {fx[0]:.4g} x {fy[0]:.4g} px"
        )
    report.add(
        "intrinsics",
        "ok",
        f"field of view {2 * math.degrees(math.atan(w / 2 / fx[0].item())):.0f} degrees",
    )
    if not w2c[..., 3].abs().max() <= FAR:
        report.add(
            "first pose", "fail", f"translations up to {w2c[..., 3].abs().max():.3g}; wanted metres"
        )
    identity = (w2c[0] - torch.eye(3, 4).to(w2c)).abs().max() < 1e-6
    report.add("first pose", "ok", "identity" if identity else "made the identity on loading")
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    K = torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], -1).unflatten(-1, (3, 3))
    report.numbers.update(fov_deg=2 * math.degrees(math.atan(w / 2 / fx[0].item())))
    return w2c, K


def check_jumps(report, w2c):
    """A single step of the camera twice as long as both neighbours looks like a dropped frame."""
    if len(w2c) > 4:
        step = inv_se3(w2c)[:, :, 3].diff(dim=0).norm(dim=-1)
        around = torch.maximum(step[:-2], step[2:])
        jump = torch.nonzero(step[1:-1] > 1.8 * around + 0.02 * step.mean() + 1e-6).flatten() + 1
        if len(jump):
            i = int(jump[0])
            report.add(
                "rotations",
                "warn",
                f"the camera jumps between frames {i} and {i + 1}: a dropped frame?",
            )


def check_depth(report, depth):
    """Range and valid share of depth (T, H, W) -> float64 depth, 0 = invalid; None where there is
    none."""
    valid = np.isfinite(depth) & (depth > 0)
    share = valid.mean()
    report.numbers.update(valid=float(share))
    if share == 0 or not valid[0].any():
        report.add(
            "depth",
            "fail",
            "no valid pixel" + (" in frame 0, which sets the scene's scale" if share else ""),
        )
        return None
    low, middle, high = (float(x) for x in np.quantile(depth[valid][::17], (0.02, 0.5, 0.98)))
    if depth[valid].max() > FAR:
        report.add(
            "depth",
            "fail",
            f"up to {depth[valid].max():.3g} m; wanted at most {FAR:.0e}, and 0 where it is "
            "unknown",
        )
    report.numbers.update(depth_low=low, depth_median=middle, depth_high=high)
    report.add(
        "depth",
        "ok" if share > 0.5 and 0.02 < middle < LARGE else "warn",
        f"{low:.4g} to {high:.4g}, {share:.0%} valid"
        + ("" if 0.02 < middle < LARGE else ": metres?"),
    )
    return torch.from_numpy(np.where(valid, depth, 0).astype(np.float64))


def check_points(report, points, depth, w2c, K, level):
    """Given points must be unproject(depth, cameras) in the frame of the first camera: to a pixel,
    exact ones to 1e-4."""
    if points.shape[:3] != depth.shape or points.shape[-1] != 3:
        return report.add(
            "points", "fail", f"shape {points.shape[1:]}; wanted {(*depth.shape[1:], 3)}"
        )
    points = torch.from_numpy(points.astype(np.float64))[None]
    relative = compose(w2c, inv_se3(w2c[:1]))[None]
    frames = dict(ok=relative, camera=torch.eye(3, 4).to(w2c).expand_as(relative), file=w2c[None])
    used = valid_depth(depth)[None] & torch.isfinite(points).all(-1)

    def off(cameras):
        want = unproject(depth[None], cameras, K[None])
        return (
            ((points - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-9))[used].median().item()
        )

    error = {name: off(cameras) for name, cameras in frames.items()}
    limit, best = dict(data=1 / K[0, 0, 0].item(), exact=1e-4)[level], min(error, key=error.get)
    report.numbers.update(points_error=error["ok"])
    why = (
        ""
        if best == "ok" or error[best] > limit
        else dict(
            camera="; they fit in each camera's own frame",
            file="; they fit in the file's world frame",
        )[best]
    )
    report.add(
        "points",
        "ok" if error["ok"] < limit else "fail",
        f"off from unproject(depth, cameras) by {error['ok']:.1e} of their distance{why}",
    )


def leave_out(report, depth, moving):
    """Depth without what moves by itself: cameras alone do not explain where that is seen from
    another frame."""
    rows, cols = (
        ((np.arange(n) + 0.5) * m / n).astype(int)
        for n, m in zip(depth.shape[1:], moving.shape[1:])
    )
    moving = torch.from_numpy(moving[:, rows][:, :, cols] > 0)
    share = moving.double().mean().item()
    report.numbers.update(moving=share)
    report.add(
        "moving",
        "ok" if share < 0.7 else "warn",
        f"{share:.1%} of the pixels are left out of the views"
        + ("" if share < 0.7 else ": is the mask inverted?  True marks what moves"),
    )
    return torch.where(moving, 0, depth)


def check_views(report, depth, w2c, K, rgb, level):
    """Cross-view reprojection; where views disagree, the usual suspects."""
    pairs = frame_pairs(len(depth))
    inner, g = pairs[:-2], gather(depth, K, pairs)
    error = disagreement(g, w2c)
    flow, parallax = motion_in_pixels(g, w2c)
    B, shared = per_pair(error), (~error.isnan()).double().mean().item()
    agree = (error < 0.02).double().sum().item() / max(1, (~error.isnan()).sum().item())
    report.numbers.update(
        relative=B[:-2].median().item(),
        shared=shared,
        agree=agree,
        motion_px=flow,
        parallax_px=parallax,
    )
    text = f"depth disagrees by {B[:-2].median():.1e}, {agree:.0%} of pixels within 2 %, {shared:.0%} shared"
    name, better, detail = find_suspect(depth, w2c, K, inner)
    if not name and report.numbers["depth_median"] > LARGE and parallax < 0.5:
        report.suspect(
            "views", "depth in millimetres", f"median {report.numbers['depth_median']:.0f}"
        )
    if name:
        report.suspect(
            "views",
            name,
            ", ".join(
                filter(
                    None,
                    (
                        f"undoing it cuts the disagreement of {B[:-2].median():.1e} to "
                        f"{better:.0%}",
                        detail,
                    ),
                )
            ),
        )
        return
    bad = B[:-2].median() > RELATIVE[level] or agree < AGREE[level]
    if bad:
        report.add(
            "views",
            "fail",
            text + "; no usual suspect explains it: look at poses, depth and focal length",
        )
    elif flow < 0.5:
        report.add(
            "views",
            "skip",
            f"cameras stand still ({flow:.1f} px): poses and depth kind not checkable",
        )
    elif parallax < 0.5:
        report.add(
            "views",
            "skip",
            text + f"; cameras do not travel ({parallax:.1f} px): scale not checkable",
        )
    else:
        report.add("views", "ok", text)
    for (t, s), b in zip(pairs[-2:], B[-2:].tolist()):
        if b > 10 * B[:-2].max() + 1e-3 and not bad:
            report.add(
                "views",
                "fail",
                f"frame {t} disagrees with its neighbour by {b:.1e}, the others by "
                f"{B[:-2].max():.1e}: is its pose a repetition, shifted by one frame?",
            )
    if rgb is not None and not bad:
        check_photo(report, g, error, w2c, rgb, level)


def check_photo(report, g, error, w2c, rgb, level):
    """Colours must agree where depth does, better than without moving the pixels."""
    size = tuple(g["size"])
    rgb = (
        torch.cat(
            [
                F.interpolate(
                    torch.from_numpy(f).permute(2, 0, 1)[None].double(),
                    size,
                    mode="bilinear",
                    antialias=True,
                )
                for f in rgb
            ]
        )
        / 255
    )

    def differences(shift):
        t, s = ([min(max(i + shift, 0), len(rgb) - 1) for i in g[k]] for k in "ts")
        here = rgb[t].permute(0, 2, 3, 1)[g["grid"]]
        moved = sample(rgb[s], move(g, w2c)[0], size).permute(0, 2, 3, 1)
        keep = error < 0.02
        return [
            (x - here).abs().mean(-1)[keep].mean().item()
            for x in (moved, rgb[s].permute(0, 2, 3, 1)[g["grid"]])
        ]

    warped, still = differences(0)
    if still < 0.01 or (error < 0.02).double().mean() < 0.02:
        return report.add(
            "photo", "skip", f"the picture hardly changes ({still:.3f}): not checkable"
        )
    report.numbers.update(photo=warped / still)
    text = f"colour difference {warped:.3f}, {still:.3f} without moving pixels"
    shifts = {k: differences(k)[0] for k in (-1, 1)}
    best = min(shifts, key=shifts.get)
    if shifts[best] < 0.6 * warped:
        text += f"; the video fits {'late' if best > 0 else 'early'} by a frame: {shifts[best]:.3f}"
    failed = warped > PHOTO[level] * still or shifts[best] < 0.6 * warped
    report.add("photo", "fail" if failed else "ok", text)


def inspect(raw, level="data"):
    """Every check of one sample.

    raw   id, table (T, 19) as read_table gives it, depth (T, H, W), size (H, W) of the video;
          optional rgb (T, H, W, 3) uint8, points (T, H, W, 3), scale (metres per unit), inverse,
          moving (T, H, W): what moves by itself
    level data: thresholds for recordings and estimates; exact: for renderings"""
    report, kinds = Report(raw["id"]), ("rgb", "table", "depth", "points", "moving")
    counts = {k: len(raw[k]) for k in kinds if raw.get(k) is not None}
    n = min(counts.values())
    text = " ".join(f"{dict(table='cameras').get(k, k)} {c}" for k, c in counts.items())
    report.add("frames", "ok" if len(set(counts.values())) == 1 else "fail", text)
    if n < 5:
        report.add("frames", "fail", "wanted at least 5 = 4k + 1")
        return report
    report.add(
        "frames",
        "ok",
        "" if n % 4 == 1 else f"the first {(n - 1) // 4 * 4 + 1} = 4k + 1 are usable",
    )
    (h, w), (hv, wv) = raw["depth"].shape[1:], raw["size"]
    report.numbers.update(frames=n, height=hv, width=wv)
    report.add(
        "sizes",
        "ok" if abs(h * wv / (w * hv) - 1) < 0.02 else "fail",
        f"video {hv}x{wv}" + (f", depth {h}x{w}" if (h, w) != (hv, wv) else ""),
    )
    # pixel intrinsics are pixels of the video; fractions are free of size
    table = raw["table"][:n].copy()
    if table[:, 1:3].max() > 20:
        table[:, 1:5] *= np.array([w / wv, h / hv] * 2)
    w2c, K = check_cameras(report, table, (h, w))
    check_jumps(report, w2c)
    if (reason := relative_depth(raw["depth"])) and raw.get("scale") is None:
        report.suspect("depth", "relative depth", reason, "warn")
        report.add("views", "skip", "relative depth: not checkable")
        return report
    depth = raw["depth"][:n]
    if depth.dtype.kind != "f" and raw.get("scale") is None:
        report.add(
            "depth",
            "fail",
            f"{depth.dtype} without a unit: give the sample depth_scale (0.001 for millimetres)",
        )
        return report
    with np.errstate(divide="ignore"):
        depth = (1 / depth.astype(np.float64) if raw.get("inverse") else depth) * (
            raw.get("scale") or 1
        )
    depth = np.where(depth <= FAR, depth, 0) if raw.get("inverse") else depth
    depth = check_depth(report, depth)
    if depth is None:
        return report
    if raw.get("points") is not None:
        check_points(report, raw["points"][:n], depth, w2c, K, level)
    if raw.get("moving") is not None:
        depth = leave_out(report, depth, raw["moving"][:n])
    check_views(
        report, depth, w2c, K, raw["rgb"][:n] if raw.get("rgb") is not None else None, level
    )
    return report


# --- The command ----------------------------------------------------------------------------------
def load_raw(sample):
    """What is in the files of a sample, unconverted: the input of inspect."""
    for field in ("video", "camera"):
        if not sample[field]:
            raise ValueError(f"no {field}; --cache_only renderings hold none")
    count_frames(sample["video"])  # damage anywhere in it is named
    (rgb, _), table = read_video(sample["video"]), read_table(sample["camera"], pixels=True)
    points = read_arrays(sample["points"]) if sample["points"] else None
    if sample["depth"]:
        depth = read_arrays(sample["depth"])
    elif points is not None:
        w2c = table[: len(points), 7:].reshape(-1, 3, 4)
        depth = np.einsum("tc,thwc->thw", w2c[:, 2, :3], points) + w2c[:, 2, 3, None, None] * (
            points != 0
        ).any(-1)
    else:
        raise ValueError("neither depth nor points")
    if depth.ndim != 3:
        raise ValueError(
            f"{sample['depth']}: array of shape {depth.shape}; wanted z-depth (T, H, W)"
        )
    return dict(
        id=sample["id"],
        table=table,
        depth=depth,
        size=rgb.shape[1:3],
        rgb=rgb,
        points=points,
        scale=sample["depth_scale"],
        inverse=sample["inverse_depth"],
        moving=read_arrays(sample["moving"], mask=True) if sample["moving"] else None,
    )


def verify(root, samples, bad, inside, fix_hints=False, as_json=False, exact=False):
    """Check every sample, print a table (or JSON); returns how many failed.

    samples, bad, inside   of data.load_samples: what to check, (id, problem) of bad entries, the
                           folder not to leave"""
    reports = []
    for sample, problem in [
        *((s, None) for s in samples),
        *((dict(id=name), problem) for name, problem in bad),
    ]:
        try:
            if problem:
                raise ValueError(problem)
            check_sums(root, check_sample(inside, sample))
            reports.append(inspect(load_raw(sample), "exact" if exact else "data"))
        except ValueError as error:
            reports.append(Report(sample["id"]))
            reports[-1].add("files", "fail", str(error))
        if not as_json:
            print_report(reports[-1], fix_hints, header=len(reports) == 1)
    failed = sum(r.status == "fail" for r in reports)
    if as_json:
        print(
            json.dumps(
                dict(
                    root=str(root),
                    failed=failed,
                    samples=[
                        dict(
                            id=r.id,
                            status=r.status,
                            suspects=r.suspects,
                            hints=[HINTS[s] for s in r.suspects],
                            **r.numbers,
                            checks={k: dict(status=s, text=t) for k, (s, t) in r.checks.items()},
                        )
                        for r in reports
                    ],
                ),
                indent=1,
            )
        )
    else:
        named = ", ".join(
            f"{n} x {s}" for s, n in Counter(s for r in reports for s in r.suspects).items()
        )
        print(
            f"{root}: {len(reports)} samples, {failed} failed"
            + (f"; suspects: {named}" if named else "")
        )
    return failed


COLUMNS = dict(
    frames="6d",
    depth_low="8.3g",
    depth_high="8.3g",
    valid="6.0%",
    shared="7.0%",
    relative="9.1e",
    photo="6.2f",
)


def print_report(report, fix_hints, header):
    if header:
        print(
            f"{'sample':24s}"
            + "".join(
                f" {k.replace('depth_', ''):>{int(f.split('.')[0].rstrip('d'))}s}"
                for k, f in COLUMNS.items()
            )
            + "  verdict"
        )
    numbers = "".join(
        " "
        + (
            format(report.numbers[k], f)
            if k in report.numbers and report.numbers[k] is not None
            else "-".rjust(int(f.split(".")[0].rstrip("d")))
        )
        for k, f in COLUMNS.items()
    )
    print(
        f"{report.id[:24]:24s}{numbers}  {report.status}"
        + "".join(f", {s}" for s in report.suspects),
        flush=True,
    )
    for check, (status, text) in report.checks.items():
        if status != "ok":
            print(f"    {status} {check}: {text}")
    for s in dict.fromkeys(report.suspects) if fix_hints else ():
        print(f"    cure of {s}: {HINTS[s]}")
