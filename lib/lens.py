"""Lens distortion: where a pinhole's ray meets the picture of a real lens, and pictures without it.

Models of COLMAP and OpenCV: radial (k), rational (below), tangential (p), and fisheye, whose radius
is the ray's angle.  Pixel centres at +0.5.  Source: COLMAP's camera models, OpenCV's calib3d."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

# The order of each model's numbers in a COLMAP file; f: of both axes.
MODELS = dict(
    SIMPLE_PINHOLE="f cx cy",
    PINHOLE="fx fy cx cy",
    SIMPLE_RADIAL="f cx cy k1",
    RADIAL="f cx cy k1 k2",
    OPENCV="fx fy cx cy k1 k2 p1 p2",
    OPENCV_FISHEYE="fx fy cx cy k1 k2 k3 k4",
    FULL_OPENCV="fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6",
    SIMPLE_RADIAL_FISHEYE="f cx cy k1",
    RADIAL_FISHEYE="f cx cy k1 k2",
)


@dataclass(frozen=True)
class Lens:
    """A distortion; without one, there is no Lens."""

    k: tuple = ()  # of r^2, r^4, ...
    below: tuple = ()  # the same of the denominator
    p: tuple = (0.0, 0.0)
    fisheye: bool = False

    def distort(self, x, y):
        """Coordinates on the plane z = 1, float64 arrays, to those of the distorted picture."""
        r = np.hypot(x, y)
        s = np.arctan(r) if self.fisheye else r

        def series(factors):
            return 1 + sum(k * s ** (2 * n) for n, k in enumerate(factors, 1))

        radial = series(self.k) / series(self.below)
        if self.fisheye:
            radial = radial * np.divide(s, r, out=np.ones_like(r), where=r > 1e-12)
        p1, p2 = self.p
        side = 2 * p1 * x * y + p2 * (r**2 + 2 * x**2)
        down = p1 * (r**2 + 2 * y**2) + 2 * p2 * x * y
        return x * radial + side, y * radial + down


def make_lens(model, numbers):
    """Lens of a model's named numbers k1 .. k6, p1, p2; None for a pinhole."""
    if not any(abs(v) > 1e-9 for v in numbers.values()) and "FISHEYE" not in model:
        return None
    ks = [numbers.get(f"k{n}", 0.0) for n in range(1, 7)]
    rational = model == "FULL_OPENCV"
    p = (numbers.get("p1", 0.0), numbers.get("p2", 0.0))
    count = 3 if rational else 4
    return Lens(tuple(ks[:count]), tuple(ks[3:]) if rational else (), p, "FISHEYE" in model)


@dataclass(frozen=True)
class Undistortion:
    """Pictures and maps of one camera, as a pinhole of the same centre sees them: no blank edge."""

    k: tuple  # fx fy cx cy as fractions of width and height
    lens: Lens | None = None

    @functools.cached_property
    def pinhole(self):
        """(4,) fractions of the result: the focal length grows until no pixel is without source, or
        beyond the radius where the distortion turns back."""
        fx, fy, cx, cy = self.k
        edge = np.linspace(0, 1, 101)
        ends = np.concatenate([[(e, s), (s, e)] for s in (0.0, 1.0) for e in edge]).T

        def inside(zoom):
            pinhole, out = (fx * zoom, fy * zoom, cx, cy), ends - [[cx], [cy]]
            x, y = self.sources(ends, pinhole)
            step = [x, y] - self.sources(ends - 0.01 * out, pinhole)  # of a bit of the way out
            rises = (step * out).sum(0).min() > 0
            return rises and max(-x.min(), x.max() - 1, -y.min(), y.max() - 1) <= 1e-9

        low, high = 1.0, 1.0
        while not inside(high):
            high *= 1.2
            if high > 20:
                raise ValueError(f"a lens {self.lens} that no pinhole can replace")
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if inside(middle) else (middle, high)
        return fx * high, fy * high, cx, cy

    def sources(self, points, pinhole=None):
        """(2, n) fractions of the result -> of the distorted picture."""
        fx, fy, cx, cy = pinhole or self.pinhole
        x, y = (points[0] - cx) / fx, (points[1] - cy) / fy
        x, y = self.lens.distort(x, y)
        return np.stack([x * self.k[0] + self.k[2], y * self.k[1] + self.k[3]])

    @functools.lru_cache(maxsize=4)  # noqa: B019  (one or two sizes, of one camera)
    def grid(self, size):
        """(H, W, 2) fractions of the distorted picture under the result's pixel centres."""
        h, w = size
        rows, cols = np.mgrid[:h, :w]
        points = np.stack([(cols + 0.5) / w, (rows + 0.5) / h]).reshape(2, -1)
        return self.sources(points).T.reshape(h, w, 2)

    def picture(self, frame):
        """uint8 (H, W, 3), bilinear."""
        grid = torch.from_numpy(self.grid(frame.shape[:2]) * 2 - 1).float()[None]
        x = torch.tensor(frame).permute(2, 0, 1)[None].float()
        out = F.grid_sample(x, grid, align_corners=False, padding_mode="border")
        return out[0].permute(1, 2, 0).round().byte().numpy()

    def map(self, depth):
        """(h, w) of any type, nearest: depth of two surfaces is not mixed."""
        h, w = depth.shape
        at = self.grid((h, w)) * [w, h]
        cols, rows = (np.clip(at[..., i].astype(int), 0, n - 1) for i, n in enumerate((w, h)))
        return depth[rows, cols]


undistortion = functools.lru_cache(maxsize=8)(Undistortion)  # its pinhole is searched for once


def pinhole_of(k, lens):
    """(4,) fractions of a camera's pictures without its distortion, if it has one."""
    return undistortion(k, lens).pinhole if lens else k
