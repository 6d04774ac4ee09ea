"""Metrics: errors of depth, cameras and points, flicker, warped colours, quality of confidence,
likeness of pictures.

Shapes: B clips, T frames of H x W pixels; lengths in the unit of the input, scene units in
train.py.  Results are Python floats (fp64 inside, fp32 in warp_error), averaged over clips; a clip
without a valid pixel is left out, and NaN comes back if none is left."""

import math

import torch
import torch.nn.functional as F

from geometry import (
    clip_mean,
    compose,
    fit_scale_shift,
    inv_se3,
    pixel_rays,
    project,
    relative_to_first,
    rotate,
    unproject,
    valid_depth,
)


def average(has_pixels, **per_clip):
    return {name: value[has_pixels].mean().item() for name, value in per_clip.items()}


def fit_scale(pred, gt, mask, steps=10):
    """The factor (B,) that brings pred closest to gt in L1: least squares, reweighted `steps` times
    by 1 / |residual|, from the least-squares factor on.   Source: CUT3R 2025's protocol."""
    weight = mask.double()
    for _ in range(steps + 1):
        top, below = ((weight * pred * x).flatten(1).sum(1) for x in (gt, pred))
        scale = top / below.clamp(min=1e-12)
        gap = (scale[:, None, None, None] * pred - gt).abs()
        weight = mask / gap.clamp(min=1e-6)
    return scale


@torch.no_grad()
def depth_metrics(pred, gt, mask, align="none", max_depth=math.inf):
    """abs_rel = mean |p - g| / g; delta1, 2, 3 = share within a factor of 1.25 ** k; rmse.

    pred, gt, mask  (B, T, H, W)   gt > 0 where valid
    align           per clip: none; median; scale: of least L1; scale_shift: of least squares
    max_depth       pixels that are truly farther do not count, in gt's unit (70 and 80 m are usual)
    Source: Eigen et al. 2014; one alignment for all frames of a clip as in Video Depth Anything."""
    mask = mask & (gt <= max_depth)
    pred, gt = (torch.where(mask, x.double(), 1) for x in (pred, gt))
    if align == "median":
        scale = torch.where(mask, gt / pred, math.nan).flatten(1).nanmedian(1).values
        pred = pred * scale[:, None, None, None]
    elif align == "scale":
        pred = pred * fit_scale(pred, gt, mask)[:, None, None, None]
    elif align == "scale_shift":
        s, b = fit_scale_shift(pred, gt, mask)
        pred = s * pred + b
    elif align != "none":
        raise ValueError(f"align {align!r}; known: none, median, scale, scale_shift.")
    error = (pred - gt).abs() * mask
    ratio = pred.clamp(min=1e-3) / gt  # a shift can push depth below zero
    ratio = torch.maximum(ratio, 1 / ratio)
    return average(
        mask.flatten(1).any(1),
        abs_rel=clip_mean(error / gt, mask),
        rmse=clip_mean(error.square(), mask).sqrt(),
        **{f"delta{k}": clip_mean((ratio < 1.25**k) & mask, mask) for k in (1, 2, 3)},
    )


def rotation_angle(a, b):
    """Degrees between rotations (..., 3, 3); exact near 0, where arccos of the trace is not."""
    distance = (a - b).square().sum((-2, -1)).sqrt()
    return torch.rad2deg(2 * torch.asin((distance / 8**0.5).clamp(max=1)))


def align_sim3(source, target):
    """scale (B,), R (B, 3, 3), t (B, 3) that bring points (B, N, 3) closest: scale R source + t.

    A source without extent gets scale 0: all goes to the target's mean.   Source: Umeyama 1991."""
    mean_s, mean_t = source.mean(1, keepdim=True), target.mean(1, keepdim=True)
    s, t = source - mean_s, target - mean_t
    U, D, Vt = torch.linalg.svd(t.mT @ s)
    sign = torch.ones_like(D)
    sign[:, 2] = torch.det(U @ Vt).sign()  # a rotation, never a reflection
    R, extent = (U * sign[:, None]) @ Vt, s.square().sum((1, 2))
    scale = torch.where(extent > 1e-12, (D * sign).sum(1) / extent.clamp(min=1e-12), 0)
    return scale, R, (mean_t - scale[:, None, None] * mean_s @ R.mT)[:, 0]


def pair_accuracy(pred, gt, max_deg=30):
    """Mean share (B,) of frame pairs whose turn and direction of travel are within 1 .. max_deg."""
    i, j = torch.triu_indices(pred.shape[1], pred.shape[1], 1)
    a, b = (compose(x[:, j], inv_se3(x[:, i])) for x in (pred, gt))  # (B, pairs, 3, 4)
    u, v = a[..., 3], b[..., 3]
    cross = torch.linalg.cross(u, v, dim=-1).norm(dim=-1)
    travel = torch.rad2deg(torch.atan2(cross, (u * v).sum(-1).abs()))  # up to sign, like VGGT
    travel = torch.where(u.norm(dim=-1) < 1e-6, 90, travel)
    travel = torch.where(v.norm(dim=-1) < 1e-4, 0, travel)  # gt stands still: rotation decides
    worst = torch.maximum(rotation_angle(a[..., :3], b[..., :3]), travel)
    within = worst[..., None] < torch.arange(1, max_deg + 1, device=pred.device)
    return within.double().mean((1, 2))


@torch.no_grad()
def pose_metrics(pred_w2c, gt_w2c):
    """Trajectory errors (B, T >= 2, 3, 4) after both are made relative to frame 0.

    returns  rot_deg    mean rotation error in degrees
             trans      mean distance of the camera centres, gt's unit, no alignment
             ate        RMSE of the centres after the best similarity, which undoes any scale
             rpe_trans  RMSE of motion from frame to frame at that scale
             rpe_rot    mean angle of that motion's error, degrees
             auc30      pair accuracy averaged over 1 .. 30 degrees, in [0, 1]; auc3 over 1 .. 3
             rot_err, trans_err, cam_mc   sums over the frames, without alignment: radians, distance
                        of the camera centres, Frobenius distance of the 3x4 camera-to-world matrix
    Source: CameraCtrl (rot, trans, sums), CamI2V (cam_mc), Sturm 2012 (ATE, RPE), VGGT (AUC)."""
    assert pred_w2c.shape == gt_w2c.shape and gt_w2c.shape[1] > 1, (pred_w2c.shape, gt_w2c.shape)
    pred, gt = relative_to_first(pred_w2c.double()), relative_to_first(gt_w2c.double())
    p, g = inv_se3(pred), inv_se3(gt)  # camera-to-world
    scale, R, t = align_sim3(p[..., 3], g[..., 3])
    gap = scale[:, None, None] * p[..., 3] @ R.mT + t[:, None] - g[..., 3]
    scaled = torch.cat([p[..., :3], p[..., 3:] * scale[:, None, None, None]], -1)
    step_p, step_g = (compose(inv_se3(x[:, :-1]), x[:, 1:]) for x in (scaled, g))
    drift = compose(inv_se3(step_g), step_p)  # identity for a perfect step
    ate, rpe = (x.square().sum(-1).mean(1).sqrt() for x in (gap, drift[..., 3]))  # RMSE (B,)
    turn = rotation_angle(p[..., :3], g[..., :3])
    found = dict(ate=ate, rpe_trans=rpe, auc30=pair_accuracy(pred, gt), rot_deg=turn)
    found["auc3"] = pair_accuracy(pred, gt, 3)
    found["trans"] = (p - g)[..., 3].norm(dim=-1)
    found |= dict(rot_err=torch.deg2rad(turn).sum(1), trans_err=found["trans"].sum(1))
    found["cam_mc"] = (p - g).flatten(2).norm(dim=-1).sum(1)
    found["rpe_rot"] = rotation_angle(step_p[..., :3], step_g[..., :3])
    return average(slice(None), **found)


@torch.no_grad()
def point_metrics(pred, gt, mask):
    """Point map errors without alignment: rel = mean |P - P_hat| / |P|, dist = mean |P - P_hat|.

    pred, gt  (B, T, H, W, 3)   same frame and unit;   mask  (B, T, H, W).   Source: MoGe (rel)."""
    pred, gt = (torch.where(mask[..., None], x.double(), 0) for x in (pred, gt))
    dist = (pred - gt).norm(dim=-1)  # 0 where masked
    rel = dist / gt.norm(dim=-1).clamp(min=1e-6)
    return average(mask.flatten(1).any(1), rel=clip_mean(rel, mask), dist=clip_mean(dist, mask))


def nearest(a, b, chunk=2048):
    """Distance of every point a (N, 3) to its nearest one of b (M, 3): (N,)."""
    return torch.cat([torch.cdist(part, b).amin(1) for part in a.split(chunk)])


def thin(points, count):
    """At most `count` points, evenly spaced in the list: the same ones at every call."""
    last = len(points) - 1
    index = torch.linspace(0, last, min(count, len(points)), device=points.device).round().long()
    return points[index.clamp(max=last)]  # fp32 rounds the end of more than 2^24 points up


@torch.no_grad()
def cloud_metrics(pred, gt, mask, threshold=0.05, count=2048):
    """Point clouds regardless of which pixel a point belongs to; clips of three points or more.

    pred, gt  (B, T, H, W, 3)   same frame and unit;   mask  (B, T, H, W)
    count     points of a clip that are compared, evenly spaced: fewer cost less, chamfer grows
    returns   accuracy      mean distance of a predicted point to the nearest true one
              completeness  mean distance of a true point to the nearest predicted one
              chamfer       mean of the two
              f_score       harmonic mean of both shares within `threshold` (Knapitsch 2017)
              ..._percent   the first three after the similarity that brings each predicted point
                            closest to its true one, in percent of the true cloud's extent (the
                            diagonal of its bounding box).   Source: Gen3R's protocol"""
    names = ("accuracy", "completeness", "chamfer")
    names, rows = (*names, *(f"{name}_percent" for name in names), "f_score"), []
    for p, g, m in zip(pred.double(), gt.double(), mask):
        if m.sum() > 2:
            p, g = thin(p[m], count), thin(g[m], count)
            scale, R, t = (x[0] for x in align_sim3(p[None], g[None]))
            percent = 100 / (g.amax(0) - g.amin(0)).norm().clamp(min=1e-12)
            row = []
            for cloud, unit in ((scale * p @ R.mT + t, percent), (p, 1)):
                there, back = nearest(cloud, g), nearest(g, cloud)
                means = unit * there.mean(), unit * back.mean()
                row = [*means, sum(means) / 2, *row]
            precision, recall = ((x < threshold).double().mean() for x in (there, back))
            row.append(2 * precision * recall / (precision + recall).clamp(min=1e-12))
            rows.append(torch.stack(row))
    mean = torch.stack(rows).mean(0).tolist() if rows else [math.nan] * len(names)
    return dict(zip(names, mean))


def psnr(a, b, mask=None):
    """dB between pictures (..., H, W) with values in [-1, 1] (clamped), over all pixels or those of
    a mask that broadcasts; inf for equal ones, NaN for an empty mask."""
    assert a.is_floating_point() and b.is_floating_point(), (a.dtype, b.dtype)  # bytes: all are 1
    error = (a.double().clamp(-1, 1) - b.double().clamp(-1, 1)).square() / 4
    if mask is not None:
        error = error[mask.expand_as(error)]
    return -10 * error.mean().log10().item()


def ssim(a, b, sigma=1.5, radius=5):
    """Structural similarity of pictures (N, 3, H, W) with values in [-1, 1], mean over windows that
    lie inside, channels and pictures: a Gaussian window of 11 pixels, K1 = 0.01, K2 = 0.03, range
    1, population variances.   Source: Wang et al. 2004."""
    assert a.is_floating_point() and b.is_floating_point(), (a.dtype, b.dtype)
    a, b = ((x.double().clamp(-1, 1).flatten(0, 1)[:, None] + 1) / 2 for x in (a, b))
    window = torch.arange(-radius, radius + 1, device=a.device, dtype=a.dtype)
    window = (-window.square() / (2 * sigma**2)).softmax(0)

    def blur(x):
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    one, two = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + one) * (2 * both + two)
    return (top / ((mean_a**2 + mean_b**2 + one) * (var_a + var_b + two))).mean().item()


def warp_depth(depth, motion, K, size):
    """Depth of one frame as a second camera sees it: (H, W), inf where no point lands.

    depth (H, W);  motion (3, 4) from the first to the second camera;  K (2, 3, 3) of the two
    The nearest surface wins where several points land."""
    valid = valid_depth(depth)
    points = pixel_rays(K[0], size) * torch.where(valid, depth, 0)[..., None]
    x = rotate(motion[:, :3], points) + motion[:, 3]  # (H, W, 3) in the second camera's frame
    z = x[..., 2].clamp(min=1e-6)
    j, i = ((K[1, a, a] * x[..., a] / z + K[1, a, 2]).floor() for a in (0, 1))
    hit = valid & (x[..., 2] > 1e-6) & (i >= 0) & (i < size[0]) & (j >= 0) & (j < size[1])
    seen = torch.full((size[0] * size[1],), torch.inf, dtype=z.dtype, device=z.device)
    return seen.scatter_reduce(0, (i * size[1] + j)[hit].long(), z[hit], "amin").view(size)


@torch.no_grad()
def temporal_error(depth, w2c, K, mask):
    """TAE: 100 * mean |D - warped neighbour| / D over neighbouring frames, both ways.

    depth, mask  (B, T >= 2, H, W)   depth in the unit of w2c; mask without what moves by itself
    w2c, K       (B, T, 3, 4), (B, T, 3, 3)   the true cameras: only their motion is undone
    The true depth has a small error too: points land between pixels.
    Source: Video Depth Anything, here with a z-buffer."""
    errors = []
    for d, e, k, m in zip(depth.double(), w2c.double(), K.double(), mask):
        frames = range(len(d) - 1)
        for a, b in [(t, t + 1) for t in frames] + [(t + 1, t) for t in frames]:
            motion = compose(e[b], inv_se3(e[a]))
            warped = warp_depth(torch.where(m[a], d[a], 0), motion, k[[a, b]], d.shape[1:])
            keep = m[b] & torch.isfinite(warped) & valid_depth(d[b])
            if keep.any():
                errors.append(((d[b] - warped).abs() / d[b])[keep].mean())
    return 100 * torch.stack(errors).mean().item() if errors else math.nan


@torch.no_grad()
def warp_error(rgb, depth, w2c, K, mask, tolerance=0.1):
    """How well depth and cameras carry the colours of a frame to the next one; needs no truth.

    rgb  (B, T >= 2, H, W, 3) uint8;  depth, mask  (B, T, H, W);  w2c  (B, T, 3, 4);  K (B, T, 3, 3)
    returns  depth         median of |D - z| / z in percent: the next frame's depth D where a pixel
                           lands, the depth z that it has there; hidden pixels weigh little
             colour        mean absolute difference of the colours in percent, where depths agree
                           within `tolerance`
             colour_still  the same pixels against the unmoved next frame: warping has to beat it
             seen_percent  share of the masked pixels that land inside and agree"""
    moved, still = 0.0, 0.0  # sums of differences of colours
    seen, wanted = 0, 0  # pixels
    depths = []
    for c, d, e, k, m in zip(rgb, depth.float(), w2c.float(), K.float(), mask):
        for t in range(len(d) - 1):
            now, later = slice(t, t + 1), slice(t + 1, t + 2)
            points = unproject(d[None, now], e[None, now], k[None, now])
            uv, z = project(points, e[None, later], k[None, later])
            grid, z = (2 * uv / uv.new_tensor([d.shape[2], d.shape[1]]) - 1)[0], z[0, 0]
            here, there = c[t].float(), c[t + 1].float()  # (H, W, 3)
            still_error = (there - here).abs().mean(-1)
            there = torch.cat([there.movedim(-1, 0), d[later]])[None]  # (1, 4, H, W)
            there = F.grid_sample(there, grid, align_corners=False, padding_mode="border")[0]
            inside = m[t] & (z > 0) & (grid[0].abs() < 1).all(-1)
            off = (there[3] - z).abs() / z
            if inside.any():
                depths.append(off[inside].median().item())
            keep = inside & (off < tolerance)
            wanted, seen = wanted + int(m[t].sum()), seen + int(keep.sum())
            moved += (there[:3].movedim(0, -1) - here).abs().mean(-1)[keep].sum().item()
            still += still_error[keep].sum().item()

    def percent(x, of):
        return 100 * x / of if of else math.nan

    found = dict(depth=percent(sum(depths), len(depths)), colour=percent(moved, 255 * seen))
    return found | dict(colour_still=percent(still, 255 * seen), seen_percent=percent(seen, wanted))


@torch.no_grad()
def head_agreement(points, depth, w2c, K, mask):
    """Mean |P - unproject(depth, cameras)| / |P| of the three heads; needs no truth."""
    points, lifted = points.double(), unproject(depth.double(), w2c.double(), K.double())
    rel = (points - lifted).norm(dim=-1) / points.norm(dim=-1).clamp(min=1e-6)
    return rel[mask].mean().item()


@torch.no_grad()
def ause(error, conf, mask, steps=20):
    """Area between two sparsification curves over the mean error: 0 if confidence sorts the pixels
    as their errors do, about 0.5 to 1 if it sorts at random.   Source: Ilg et al. 2018.

    error, conf, mask  (B, T, H, W)   error >= 0
    A curve is the mean error of the pixels that are left when a share k / steps of them is dropped:
    the least confident first, or the worst first."""
    values = []
    for e, c, m in zip(error.double(), conf.double(), mask):
        if m.any():
            e, c = e[m], c[m]
            left = (len(e) * (1 - torch.arange(steps) / steps)).round().long().clamp(min=1)
            counts = torch.arange(1, len(e) + 1, device=e.device)
            by_conf = e[c.argsort(descending=True)].cumsum(0) / counts
            best = e.sort().values.cumsum(0) / counts
            area = (by_conf - best)[left.to(e.device) - 1].mean()
            values.append(area / e.mean().clamp(min=1e-12))
    return torch.stack(values).mean().item() if values else math.nan
