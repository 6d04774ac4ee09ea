"""Which camera explains a picture: photometric alignment on SE(3), coarse to fine.

Given a first frame with its true depth, the pose of every later frame is found that carries the
first frame's pixels onto it with the smallest difference of colours.  No network is asked, so it
measures the cameras of a sampled video without trusting heads that were trained with it.
Method: Gauss-Newton with Levenberg's damping on Huber's loss, as in direct visual odometry.
Sources: Lucas and Kanade 1981; Engel et al. 2014 (LSD-SLAM)."""

import torch
import torch.nn.functional as F

from geometry import compose, pixel_rays, rotate
from lib.camera_paths import exp_se3

HUBER = 0.1  # of colours in [-1, 1]: larger differences weigh as outliers
LEVELS = (4, 2, 1)  # pixels that are averaged along a side
STEPS = 15  # of a level, at most
OUTSIDE = HUBER * (0.5 - HUBER / 2)  # loss of a pixel that leaves the picture: as if 0.5 off


def with_slopes(pictures):
    """Pictures (N, 3, H, W) -> (N, 9, H, W): themselves, their slopes along u and along v."""
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    along_u = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    along_v = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return torch.cat([pictures, along_u, along_v], 1)


def look(maps, points, K, pose):
    """What pixels of the first frame meet in other frames.

    maps (N, 9, H, W) of with_slopes;  points (P, 3) in the first camera's frame;  pose (N, 3, 4)
    returns  colours (N, P, 3), their slopes (N, P, 3, 6) along a twist, whether inside (N, P)"""
    x = rotate(pose[:, None, :, :3], points) + pose[:, None, :, 3]  # (N, P, 3)
    z = x[..., 2].clamp(min=1e-3)
    focal, centre = K.diagonal()[:2], K[:2, 2]
    uv = focal * x[..., :2] / z[..., None] + centre
    grid = (2 * uv / uv.new_tensor([maps.shape[-1], maps.shape[-2]]) - 1)[:, None]
    met = F.grid_sample(maps, grid, align_corners=False, padding_mode="border")[:, :, 0]
    colour, along_u, along_v = met.movedim(1, -1).split(3, -1)  # (N, P, 3) each
    # d(u, v) / dx, then dx / d(twist) = [-[x]x, 1]: rotation first, as exp_se3 takes it
    u_x, v_y = focal[0] / z, focal[1] / z
    zero = torch.zeros_like(z)
    du = torch.stack([u_x, zero, -u_x * x[..., 0] / z], -1)
    dv = torch.stack([zero, v_y, -v_y * x[..., 1] / z], -1)
    du, dv = (torch.cat([torch.linalg.cross(x, d, dim=-1), d], -1) for d in (du, dv))
    slopes = along_u[..., None] * du[..., None, :] + along_v[..., None] * dv[..., None, :]
    inside = (x[..., 2] > 1e-3) & (grid[:, 0].abs() < 1).all(-1)
    return colour, slopes, inside


def cost_of(colour, first, inside, counts):
    """Huber's loss (N,), mean over the pixels that count (N, P), weights (N, P, 3) and differences.

    A pixel that leaves the picture costs too: else the best pose would be one that sees little."""
    gap, seen = colour - first, inside & counts
    size = gap.abs()
    weight = (HUBER / size.clamp(min=HUBER)) * seen[..., None]
    loss = torch.where(size < HUBER, gap.square() / 2, HUBER * (size - HUBER / 2)).mean(-1)
    loss = torch.where(seen, loss, OUTSIDE) * counts
    return loss.sum(1) / counts.sum(1).clamp(min=1), weight, gap


def refine(pose, maps, first, points, K, counts):
    """The best poses (N, 3, 4) near given ones at one level, and their losses (N,)."""
    damping = pose.new_full((len(pose),), 1e-3)
    colour, slopes, inside = look(maps, points, K, pose)
    loss, weight, gap = cost_of(colour, first, inside, counts)
    for _ in range(STEPS):
        slopes = slopes.flatten(1, 2)  # (N, 3P, 6)
        weighted = slopes * weight.flatten(1)[..., None]
        square, down = weighted.mT @ slopes, weighted.mT @ gap.flatten(1)[..., None]
        own = torch.diag_embed(square.diagonal(dim1=1, dim2=2) + 1e-9)
        twist = -torch.linalg.solve(square + damping[:, None, None] * own, down)[..., 0]
        if twist.abs().max() < 1e-5:  # radians, and depth's unit: all are found
            break
        there = compose(exp_se3(twist), pose)
        found = look(maps, points, K, there)
        then, weight_then, gap_then = cost_of(found[0], first, found[2], counts)
        better = then < loss
        damping = torch.where(better, damping / 4, damping * 8).clamp(1e-6, 1e6)
        pick = better[:, None, None]
        pose, loss = torch.where(pick, there, pose), torch.where(better, then, loss)
        slopes = torch.where(pick[..., None], found[1], slopes.unflatten(1, (-1, 3)))
        weight, gap = torch.where(pick, weight_then, weight), torch.where(pick, gap_then, gap)
    return pose, loss


@torch.no_grad()
def align_frames(first, depth, frames, K, counts, guesses=()):
    """Poses of frames relative to the first one, from colours alone.

    Every frame is tried from where the frame before was found and from the guesses; the end with
    the smallest loss is kept, so that no guess decides what is found.

    first    (3, H, W) in [-1, 1];  depth (H, W) of it, 0 where unknown
    K        (N + 1, 3, 3) pixels, of the first frame and of the others
    frames   (N, 3, H, W), in order;  guesses  each (N, 3, 4)
    counts   (N, H, W) pixels of `first` that may be compared with each
    returns  w2c (N, 3, 4) fp64 in depth's unit"""
    first, depth, frames, K = (x.double() for x in (first, depth, frames, K))
    counts = counts & (depth > 0)
    levels = [n for n in LEVELS if n == 1 or min(depth.shape) >= 12 * n]
    told = [at_level(level, first, depth, K) for level in levels]
    found = [torch.eye(4).to(depth)[:3]]
    for t, frame in enumerate(frames):
        pose = torch.stack([found[-1], *(g[t].double() for g in guesses)])
        for level, (small, points, shrunk) in zip(levels, told):
            maps = with_slopes(F.avg_pool2d(frame[None], level)).expand(len(pose), -1, -1, -1)
            seen = in_the_middle(counts[t], level).flatten().expand(len(pose), -1)
            pose, loss = refine(pose, maps, small, points, shrunk[t + 1], seen)
        found.append(pose[loss.argmin()])
    return torch.stack(found[1:])


def in_the_middle(x, level):
    """The pixel in the middle of every square of level x level pixels of a map (H, W)."""
    h, w = (side // level for side in x.shape)
    return x[level // 2 :: level, level // 2 :: level][:h, :w]


def at_level(level, first, depth, K):
    """Colours (P, 3) and points (P, 3) of the first frame, and all K, at a level of the pyramid."""
    z = in_the_middle(depth, level)
    shrunk = torch.cat([K[:, :2] / level, K[:, 2:]], 1)
    points = (pixel_rays(shrunk[0], z.shape) * z[..., None]).flatten(0, 1)
    return F.avg_pool2d(first[None], level)[0].flatten(1).mT, points, shrunk
