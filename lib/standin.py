"""The demo's weight-free stand-ins for Wan's encoders, of the same shapes.

    TransformCodec   16 coefficients of a fixed orthonormal transform, in place of the Wan VAE
    HashedText       one fixed random vector per word, in place of umT5

They leave with a miniature Wan; make_encoders is where the two meet."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import torch
from einops import rearrange
from torch import nn

from encoders import WanFolder, wan_family

# --- Stand-in for the VAE -------------------------------------------------------------------------
# One row per latent channel: (time, vertical, horizontal, colour) frequency of a 4x8x8x3 transform.
# Chosen by variance over 160 rendered clips (data.render_clip, seeds 1e6 + 0..39, 9 frames, full
# and simple, 64x96 and 96x160): the 16 largest of 192 hold 98.5 % of a lone frame's variance, the
# 16 largest of 768 hold 95.9 % of four frames'.  The 7 spatial patterns that both keep have the
# same channel; the others measure detail in a lone frame, motion in four.
SHARED = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (0, 1, 0), (2, 0, 0), (1, 0, 1)]

# fmt: off
DETAIL = [(0, 1, 1), (0, 2, 0), (1, 1, 0), (3, 0, 0), (1, 0, 2), (0, 1, 2), (0, 3, 0), (0, 2, 1),
          (2, 1, 0)]
MOTION = [(1, 0, 0, 0), (1, 0, 0, 1), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 2),
          (3, 0, 0, 0), (2, 0, 1, 0), (2, 0, 0, 1)]
# fmt: on
# Standard deviations over the same clips, video in [-1, 1]; only flat patterns have a mean that
# matters.
SHARED_STD = [3.72, 1.58, 1.15, 0.729, 0.574, 0.325, 0.282]

DETAIL_STD = [0.302, 0.258, 0.216, 0.185, 0.167, 0.166, 0.152, 0.146, 0.136]

MOTION_STD = [1.65, 0.839, 0.767, 0.589, 0.555, 0.471, 0.468, 0.411, 0.406]

SHARED_MEAN = [-1.63, 0.44, 0, 0, 0, 0, 0]


def dct_matrix(n):
    """Orthonormal DCT-II, (n frequencies, n samples)."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.cos(math.pi * k * (2 * i + 1) / (2 * n)) * torch.sqrt((2 - (k == 0).double()) / n)


def transform_rows(indices, frames):
    """Orthonormal rows (16, 3 * frames * 64); column order colour, time, vertical, horizontal."""
    colour = torch.tensor(
        [[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64
    )  # luma and two opponents
    colour = colour / colour.norm(dim=1, keepdim=True)
    space, time = dct_matrix(8), dct_matrix(frames)
    return torch.stack(
        [
            torch.einsum("c,t,p,q->ctpq", colour[c], time[t], space[p], space[q]).flatten()
            for t, p, q, c in indices
        ]
    )


class TransformCodec(nn.Module):
    """Fixed transform with the Wan VAE's latent grid; static video: equal shared channels in all
    latents."""

    fingerprint = "transform-v2"  # v2: the start image held still

    def __init__(self):
        super().__init__()
        lone, four = [(0, *i) for i in SHARED + DETAIL], [(0, *i) for i in SHARED] + MOTION
        self.register_buffer("first", transform_rows(lone, 1).float(), persistent=False)
        self.register_buffer("group", transform_rows(four, 4).float(), persistent=False)
        mean = torch.tensor(SHARED_MEAN + [0] * 9)
        self.register_buffer("first_mean", mean, persistent=False)
        self.register_buffer("first_std", torch.tensor(SHARED_STD + DETAIL_STD), persistent=False)
        # the constant-in-time coefficient of 4 equal frames is sqrt(4) times that of one frame
        self.register_buffer("group_mean", 2 * mean, persistent=False)
        group_std = torch.tensor([2 * x for x in SHARED_STD] + MOTION_STD)
        self.register_buffer("group_std", group_std, persistent=False)

    def encode(self, video):
        """Video (B, 3, T, H, W) in [-1, 1] to latents (B, 16, f, h, w) of about unit variance."""
        t, h, w = video.shape[2:]
        if t % 4 != 1 or h % 8 or w % 8:
            raise ValueError(f"video of {t} frames of {h}x{w}: wanted 4k + 1 and multiples of 8")
        patches = rearrange(video[:, :, :1], "b c t (h p) (w q) -> b h w (c t p q)", p=8, q=8)
        first = (patches @ self.first.T - self.first_mean) / self.first_std  # (B, h, w, 16)
        patches = rearrange(
            video[:, :, 1:], "b c (f t) (h p) (w q) -> b f h w (c t p q)", t=4, p=8, q=8
        )
        group = (patches @ self.group.T - self.group_mean) / self.group_std  # (B, f-1, h, w, 16)
        return rearrange(torch.cat([first[:, None], group], 1), "b f h w c -> b c f h w")

    def decode(self, latents, progress=iter):
        """Latents (B, 16, f, h, w) to video (B, 3, 4f - 3, 8h, 8w), clamped to [-1, 1]; in one
        step."""
        list(progress(range(1)))
        x = rearrange(latents, "b c f h w -> b f h w c")
        first = (x[:, :1] * self.first_std + self.first_mean) @ self.first
        group = (x[:, 1:] * self.group_std + self.group_mean) @ self.group
        first = rearrange(first, "b f h w (c t p q) -> b c (f t) (h p) (w q)", c=3, t=1, p=8)
        group = rearrange(group, "b f h w (c t p q) -> b c (f t) (h p) (w q)", c=3, t=4, p=8)
        return torch.cat([first, group], 2).clamp(-1, 1)


# --- Stand-in for umT5 ----------------------------------------------------------------------------
class HashedText(nn.Module):
    """Each word is a fixed random vector of mean 0 and variance 1; a begin token comes first, so L
    >= 1."""

    def __init__(self, dim=64, max_len=16):
        super().__init__()
        self.dim, self.max_len, self.fingerprint = dim, max_len, f"hash-v1-{dim}"

    def word(self, word):
        digest = hashlib.shake_256(word.encode()).digest(4 * self.dim)  # the same on every machine
        x = np.frombuffer(digest, "<u4").astype(np.float64)
        return torch.from_numpy((x - x.mean()) / x.std()).float()

    def forward(self, prompts):
        """List of strings to a list of (L, dim) tensors, L <= max_len."""
        words = [[w.strip(".,;:!?\"'()[]") for w in prompt.lower().split()] for prompt in prompts]
        tokens = [["<begin>", *filter(None, line)][: self.max_len] for line in words]
        return [torch.stack([self.word(token) for token in line]) for line in tokens]


def make_encoders(codec="transform", wan_dir="", device="cpu"):
    """Encoders of a Wan2.1 folder, or the demo's: fingerprint, start_pad, and to be called when
    wanted, one after another: load_text() -> f(prompts), load_image() -> f(images) or None,
    load_vae() -> encode, decode."""
    if wan_dir:
        return WanFolder(wan_dir, device)
    if codec != "transform":
        raise ValueError(f"codec {codec!r}; wanted transform, or --wan_dir for the real encoders")
    return SimpleNamespace(
        fingerprint=f"{TransformCodec.fingerprint}-{HashedText().fingerprint}",
        start_pad="replicate",
        load_text=HashedText,
        load_image=None,
        load_vae=TransformCodec,
    )


def cache_prefix(wan_dir):
    """How the caches begin that fit a video branch: its Wan family, or "transform" for the
    demo's."""
    family = wan_family(wan_dir) if wan_dir else ""
    return f"{family}-" if family else "transform"
