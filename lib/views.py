"""Do the views of a clip agree?  Pixels of frame t are lifted with their depth, moved to frame s
and compared with the depth found there.

The truth agrees to 1e-7 on exact renderings and to 1e-3 on recordings.  Pairs of frames that share
too few pixels say nothing.
Shapes: T frames, of which n are looked at; H x W depth pixels; P pairs of frames.  Cameras as in
geometry.py."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from geometry import compose, inv_se3, scaled, slopes, valid_depth

# Relative depth: what rounding leaves of an exact rendering, and of millimetres.
NOISE = 1e-5, 2e-4
SHARED = 0.05  # of a frame's pixels that another must see to say anything
GAPS = (1, 2, 4, 8, 16)


# --- Cross-view agreement -------------------------------------------------------------------------
def frame_pairs(num_frames, anchors=7):
    """Pairs of frames 1 to 16 apart, both directions, a few frames at the ends spared for shifts;
    and last the first and the last frame with their neighbours."""
    spare = 3 if num_frames > 16 else 1 if num_frames > 4 else 0
    low, high, pairs = spare, num_frames - 1 - spare, []
    for gap in (g for g in GAPS if g <= high - low):
        starts = {round(a) for a in np.linspace(low, high - gap, anchors)}
        pairs += [(a, a + gap) for a in sorted(starts)]
    last = num_frames - 1
    return [p if n % 2 else p[::-1] for n, p in enumerate(pairs)] + [(0, 1), (last, last - 1)]


@dataclass(frozen=True)
class Views:
    """What is looked at of a clip."""

    depth: torch.Tensor  # (n, H, W) of the frames ids
    K: torch.Tensor  # (n, 3, 3)
    w2c: torch.Tensor  # (T, 3, 4) of all frames
    pairs: list  # (t, s) frames
    ids: list  # sorted frames

    def places(self):
        return np.searchsorted(self.ids, np.transpose(self.pairs)).tolist()

    def of(self, pairs):
        """What is looked at of some of the pairs."""
        ids = sorted({t for pair in pairs for t in pair})
        rows = [self.ids.index(t) for t in ids]
        return Views(self.depth[rows], self.K[rows], self.w2c, pairs, ids)

    def coarse(self, pairs=12, pixels=20_000):
        """Fewer pairs and pixels, for searches."""
        inner = self.pairs[:-2] or self.pairs
        few = self.of(inner[:: max(1, len(inner) // pairs)])
        step = max(1, math.ceil(math.sqrt(self.depth[0].numel() / pixels)))
        return replace(few, depth=few.depth[:, ::step, ::step], K=thinned(few.K, step))

    def gather(self, count=900):
        """What hypotheses share: `count` pixels of first frames, inverse depth of second ones."""
        (t, s), depth, K = self.places(), self.depth, self.K
        size = depth.shape[1:]
        step = max(1, round(math.sqrt(depth[0].numel() / count)))
        rows = slice(step // 2, None, step)
        valid = valid_depth(depth)
        # Linear on planes, unlike z.
        inverse = torch.where(valid, 1 / torch.where(valid, depth, 1), 0)
        x, y = slopes(K, size)
        z = torch.where(valid, depth, 0)[t][:, rows, rows]
        first, second = np.transpose(self.pairs).tolist()
        return dict(
            t=first,
            s=second,
            points=torch.stack([x[t][..., rows] * z, y[t][:, rows] * z, z], 1),  # (P, 3, h, w)
            valid=valid[t][:, rows, rows],
            K=K[s],
            grid=(slice(None), rows, rows),
            maps=torch.stack([inverse[s], valid[s].to(inverse)], 1),
            size=size,
        )

    def timing_matters(self):
        """Whether a shift by a frame would show."""
        g = replace(self, pairs=self.pairs[:-2] or self.pairs).gather()
        before = per_pair(disagreement(g, self.w2c))
        late, early = (per_pair(disagreement(g, shifted(self.w2c, n))) for n in (1, -1))
        noise = max(before.nanmedian().item(), NOISE[0])
        return min(error_ratio(e, before, noise) for e in (late, early)) > 1.1

    def motion_in_pixels(self, g):
        """Largest of the pairs' median pixel motions: in all, and what only travel explains."""
        uv, _, ok = reproject(g, self.w2c)
        turned, _, _ = reproject(g, scaled(self.w2c, 0))
        still, _, _ = reproject(g, torch.eye(3, 4).to(self.w2c).expand_as(self.w2c))
        motions = (torch.where(ok, (uv - x).norm(dim=-1), math.nan) for x in (still, turned))
        return [m.flatten(1).nanmedian(1).values.nan_to_num().max().item() for m in motions]

    def frame_scales(self):
        """(n,) factors that make the frames' depth agree, from each pair's median ratio."""
        (t, s), logs = self.places(), torch.zeros(len(self.ids), dtype=torch.float64)
        for _ in range(3):  # the ratio is measured at the place that the scale before leads to
            g = replace(self, depth=self.depth * logs.exp()[:, None, None]).gather()
            uv, z, ok = reproject(g, self.w2c)
            seen, whole = sample_maps(g["maps"], uv, g["size"]).unbind(1)
            ratio = torch.where(ok & (whole > 0.999), (seen.clamp(min=1e-9) * z).log(), math.nan)
            ratio = ratio.flatten(1).nanmedian(1).values  # log of z here over z there
            use = ~ratio.isnan()
            A = torch.zeros(int(use.sum()) + 1, len(logs), dtype=torch.float64)
            rows = torch.arange(int(use.sum()))
            A[rows, torch.tensor(t)[use]], A[rows, torch.tensor(s)[use]] = -1.0, 1.0
            A[-1] = 1.0
            b = torch.cat([ratio[use], torch.zeros(1, dtype=torch.float64)])
            # The usual driver, gelsy, starts from memory that nobody cleared (pytorch issue
            # 187411): it took the matrix for one of rank 0 every second time.
            logs = logs + torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
        return logs.exp()


def thinned(K, step):
    """K (n, 3, 3) of every step-th pixel: pixel j of that picture is j * step."""
    K = K.clone()
    K[:, :2] /= step
    K[:, :2, 2] += 0.5 - 0.5 / step
    return K


def reproject(g, w2c, focal=None):
    """Pixels of first frames seen from second ones: uv (..., P, h, w, 2), z and usable without 2.

    w2c    (..., T, 3, 4)   any number of hypotheses at once
    focal  (S,)             factors on fx and fy, in place of hypotheses about w2c"""
    motion = compose(w2c[..., g["s"], :, :], inv_se3(w2c[..., g["t"], :, :]))
    if focal is not None:  # the points' rays change as K does
        one = torch.ones_like(focal)
        k = torch.stack([focal, focal, one], -1)[:, None]  # (S, 1, 3)
        motion = k[..., None] * motion / torch.cat([k, one[:, None, None]], -1)[..., None, :]
    M, points = g["K"] @ motion, g["points"]
    x = (M[..., :3] @ points.flatten(2) + M[..., 3:]).unflatten(-1, points.shape[2:])  # uz, vz, z
    z = x[..., 2, :, :]
    uv = x[..., :2, :, :] / z.clamp(min=1e-6)[..., None, :, :]
    return uv.movedim(-3, -1), z, g["valid"] & (z > 1e-6)


def sample_maps(maps, uv, size):
    """Bilinear values (..., P, c, h, w) of maps (P, c, H, W) at pixels uv; 0 outside."""
    grid = (uv / uv.new_tensor([size[1], size[0]]) * 2 - 1).clamp(-3, 3)
    if uv.dim() == 4:
        return F.grid_sample(maps, grid, align_corners=False)
    # Hypotheses lie below one another: they look at the same maps.
    tall = F.grid_sample(maps, grid.transpose(0, 1).flatten(1, 2), align_corners=False)
    return tall.unflatten(2, (len(uv), -1)).movedim(2, 0)


def warp(g, w2c):
    """A function: maps (P, c, H, W) fp32 of second frames, as first ones meet them (P, c, h, w)."""
    uv = reproject(g, w2c)[0].float()
    return lambda maps: sample_maps(maps, uv, g["size"])


def disagreement(g, w2c, focal=None):
    """Relative depth error of the pixels that both frames see (..., P, h, w), NaN elsewhere."""
    uv, z, ok = reproject(g, w2c, focal)
    seen, whole = sample_maps(g["maps"], uv, g["size"]).unbind(-3)
    return torch.where(ok & (whole > 0.999), (1 / seen.clamp(min=1e-9) / z - 1).abs(), math.nan)


def per_pair(error):
    """Median error (..., P), at most 1; NaN for pairs that share too few pixels to say anything."""
    error = error.flatten(-2)
    shared = 1 - error.isnan().double().mean(-1)
    return torch.where(shared > SHARED, error.nanmedian(-1).values.clamp(max=1), math.nan)


def typical(pairs, errors):
    """Median over the pairs that say something; 1 where even neighbours share nothing."""
    gaps = torch.tensor([abs(t - s) for t, s in pairs])
    near = ~errors[gaps == gaps.min()].isnan()
    return errors.nanmedian().item() if near.double().mean() > 0.4 else 1.0


def agreement(error, errors):
    """Share of the seen pixels that agree within 2 %, of the pairs that say something."""
    error = error[~errors.isnan()]
    return (error < 0.02).double().sum().item() / max(1, (~error.isnan()).double().sum().item())


def error_ratio(errors, before, noise):
    """Typical factor by which the pairs' errors change; robust to pairs that nothing repairs.  A
    pair that says something in one case alone counts as 1 in the other."""
    either = ~(errors.isnan() & before.isnan())
    if not either.any():
        return 1.0
    after, before = (e[either].nan_to_num(1.0) for e in (errors, before))
    return ((after + noise) / (before + noise)).log().mean().exp().item()


def shifted(w2c, n):
    """Frame t gets the camera of frame t + n; at the end, the last one."""
    return w2c[(torch.arange(len(w2c)) + n).clamp(0, len(w2c) - 1)]
