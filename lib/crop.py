"""The one cut of a video to another aspect: pictures, maps and intrinsics go through together."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lib.files import read_video
from wan import LATENT


def check_video_size(size, words="num_frames = {}, height x width = {} x {}"):
    """ValueError unless frames, height and width divide into latents and patches."""
    near = LATENT.nearest(*size)
    if size != near:
        wanted = "wanted 4k + 1 frames and multiples of 16"
        raise ValueError(f"{words.format(*size)}: {wanted}, such as {words.format(*near)}")


@dataclass(frozen=True)
class Crop:
    """A centred cut of the target's aspect, resized to it: one for all that a clip holds."""

    source: tuple  # (H, W) of the video
    target: tuple  # (H, W) of the clip
    pixel: float = 1.0  # width of the video's pixels over their height

    def cut(self):
        """top, left, height, width in pixels of the source."""
        (h, w), (height, width) = self.source, self.target
        hc = min(h, round(w * self.pixel * height / width) or 1)
        wc = min(w, round(h / self.pixel * width / height) or 1)
        return (h - hc) // 2, (w - wc) // 2, hc, wc

    def video(self, frames):
        """uint8 (T, H, W, 3) -> (T, 3, height, width) in [0, 255], antialiased."""
        y, x, hc, wc = self.cut()
        cropped = torch.tensor(frames[:, y : y + hc, x : x + wc]).permute(0, 3, 1, 2)
        how = dict(mode="bilinear", antialias=True)
        # Frame by frame: the whole clip in floats would take four times the memory.
        return torch.cat([F.interpolate(f[None].float(), self.target, **how) for f in cropped])

    def maps(self, maps):
        """Values (T, h, w) under the target's pixel centres; h, w may differ from the video's."""
        (height, width), (y, x, hc, wc) = self.target, self.cut()
        rows = (y + (np.arange(height) + 0.5) * hc / height) * maps.shape[1] / self.source[0]
        cols = (x + (np.arange(width) + 0.5) * wc / width) * maps.shape[2] / self.source[1]
        return torch.from_numpy(maps[:, rows.astype(int)][:, :, cols.astype(int)])

    def intrinsics(self, fractions):
        """(T, 4) fractions of the source -> (T, 3, 3) pixels of the target, fp64."""
        (h, w), (y, x, hc, wc) = self.source, self.cut()
        cut = (fractions * [w, h, w, h] - [0, 0, x, y]) / [wc, hc, wc, hc]
        return torch.from_numpy(pixel_matrix(cut, self.target))


def stretched(maps, size):
    """All of maps (T, h, w), of whatever aspect, under the pixel centres of a size (H, W)."""
    return Crop(size, size).maps(maps)


def crop_intrinsics(fractions, aspect, size):
    """Fractions (T, 4) of a picture of aspect W0 / H0 -> of its centre crop that fills (H, W)."""
    wide = aspect / (size[1] / size[0])  # above 1: the sides are cut, below: top and bottom
    factor = np.array([max(wide, 1), max(1 / wide, 1)] * 2)
    middle = np.array([0, 0, 0.5, 0.5])
    return (fractions - middle) * factor + middle


def pixel_matrix(fractions, size):
    """fx/W, fy/H, cx/W, cy/H (T, 4) -> (T, 3, 3) float64 in pixels."""
    fx, fy, cx, cy = (np.asarray(fractions, float) * [size[1], size[0], size[1], size[0]]).T
    zero, one = np.zeros_like(fx), np.ones_like(fx)
    return np.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], -1).reshape(-1, 3, 3)


def focal_and_centre(K):
    """(..., 3, 3) -> fx fy cx cy (..., 4), float64."""
    return np.asarray(K, float)[..., [0, 1, 0, 1], [0, 1, 2, 2]]


def fractions(pixels, size):
    """fx fy cx cy in pixels (T, 4) <-> fractions: divide; multiply with 1 / size."""
    return np.asarray(pixels, float) / np.array([size[1], size[0]] * 2, float)


def load_image(path, height, width, *, squeeze=False):
    """First frame of a file -> (1, 3, 1, H, W) in [-1, 1], cut as training cuts, or squeezed."""
    frame, (size, _, pixel) = read_video(path, max_frames=1)  # (1, h, w, 3)
    if not squeeze:
        return (Crop(size, (height, width), pixel).video(frame) / 127.5 - 1)[:, :, None]
    # Of bytes, as Pillow's: rounded and cut to 0 .. 255 after each direction.
    frame = torch.from_numpy(frame).permute(0, 3, 1, 2)
    frame = F.interpolate(frame, (height, width), mode="bicubic", antialias=True)
    return (frame / 127.5 - 1)[:, :, None]
