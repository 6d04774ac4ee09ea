"""Frozen encoders: Wan2.1's own (video VAE, umT5, CLIP vision tower), and the demo's weight-free
stand-ins of the same shapes.  Sources: Wan 2.1 report 2025 (VAE, conditioning), Chung et al. 2023
(umT5), Raffel et al. 2020 (T5), OpenCLIP.

    TransformCodec   16 coefficients of a fixed orthonormal transform, in place of the Wan VAE
    HashedText       one fixed random vector per word, in place of umT5
    WanFolder        finds the parts of a downloaded Wan2.1 folder and loads each when it is asked
                     for

Attribute names of the real encoders are the names in the official files: they load strictly,
without a table; widths and layer counts are read off the tensors.  Loaded parameters are frozen;
every public call runs under no_grad.
Shapes: B batch, T = 4k + 1 pixel frames, f = k + 1 latent frames, h = H/8, w = W/8, t frames of a
step, c channels, L tokens of a prompt, D width.  Video and images are in [-1, 1]. Latent 0 is frame
0 alone, latent l >= 1 is frames 4l-3 .. 4l."""

import hashlib
import html
import itertools
import math
import unicodedata
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

VAE_FILE = "Wan 2.1 VAE (Wan2.1_VAE.pth)"

T5_FILE = "umT5 encoder (models_t5_umt5-xxl-enc-bf16.pth)"

CLIP_FILE = "CLIP vision tower (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth)"

TEXT_LEN, PAD_ID, END_ID = 512, 0, 1

# Per-channel statistics of the VAE's latents, published with Wan 2.1: the DiT sees (mu - mean) /
# std.
LATENT_MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)

LATENT_STD = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.9160,
)

CLIP_MEAN = (
    0.48145466,
    0.4578275,
    0.40821073,
)  # of the RGB images in [0, 1] that CLIP was trained on

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# --- Stand-in for the VAE -------------------------------------------------------------------------
# One row per latent channel: (time, vertical, horizontal, colour) frequency of a 4x8x8x3 transform.
# Chosen by variance over 160 rendered clips (data.render_clip, seeds 1e6 + 0..39, 9 frames, full
# and simple, 64x96 and 96x160): the 16 largest of 192 hold 98.5 % of a lone frame's variance, the
# 16 largest of 768 hold 95.9 % of four frames'.  The 7 spatial patterns that both keep have the
# same channel; the others measure detail in a lone frame, motion in four.
SHARED = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (0, 1, 0), (2, 0, 0), (1, 0, 1)]

DETAIL = [
    (0, 1, 1),
    (0, 2, 0),
    (1, 1, 0),
    (3, 0, 0),
    (1, 0, 2),
    (0, 1, 2),
    (0, 3, 0),
    (0, 2, 1),
    (2, 1, 0),
]

MOTION = [
    (1, 0, 0, 0),
    (1, 0, 0, 1),
    (2, 0, 0, 0),
    (1, 1, 0, 0),
    (1, 0, 1, 0),
    (1, 0, 0, 2),
    (3, 0, 0, 0),
    (2, 0, 1, 0),
    (2, 0, 0, 1),
]

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


# --- Loading. Models are built on the meta device and given the file's own tensors: there is no second copy.


def load_state_dict(path):
    """Named CPU tensors of a .safetensors or .pth file, paged in from disk only when used.

    Raises FileNotFoundError, or ValueError when the file is damaged or holds anything but named
    tensors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            sd = safetensors.torch.load_file(path)
        else:
            sd = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # flipped bytes make the two readers raise almost any class of error
        raise ValueError(
            f"{path}: cannot be read, {path.stat().st_size:,} bytes. An incomplete download, or "
            f"no plain dict of tensors? Fetch it again. {error}"
        ) from error
    if isinstance(sd, dict) and isinstance(sd.get("model_state"), dict):
        sd = sd["model_state"]  # DiffSynth's wrapping of the VAE
    if not isinstance(sd, dict) or not sd or not all(map(torch.is_tensor, sd.values())):
        raise ValueError(f"{path}: wanted a dict of named tensors, found {type(sd).__name__}")
    return sd


def _strip_prefix(sd, prefix):
    """Drop `prefix` from the names if every name has it."""
    shared = all(key.startswith(prefix) for key in sd)
    return {key.removeprefix(prefix) if shared else key: value for key, value in sd.items()}


def _count_layers(names, prefix):
    return len({key.removeprefix(prefix).split(".")[0] for key in names if key.startswith(prefix)})


def _load(sd, family, build):
    """Model build(name -> shape) holding the tensors of sd; ValueError unless all names and shapes
    fit."""
    have = {key: tuple(value.shape) for key, value in sd.items()}
    try:
        with torch.device("meta"):
            model = build(have)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"not a {family}: its sizes cannot be read, {error!r}. Found {len(sd)} tensors: "
            f"{', '.join(itertools.islice(sd, 4))} ..."
        ) from error
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    faults = [f"missing {key} {want[key]}" for key in want if key not in have]
    faults += [f"unexpected {key} {have[key]}" for key in have if key not in want]
    faults += [
        f"{k} is {have[k]}, wanted {want[k]}" for k in want if k in have and have[k] != want[k]
    ]
    if faults:
        raise ValueError(f"not a {family}: {len(faults)} tensors differ: {'; '.join(faults[:4])}")
    model.load_state_dict(sd, strict=True, assign=True)
    return model.requires_grad_(False).eval()


# --- Video VAE. `state` maps a layer to what it keeps between steps. It lives in a call, not in the modules:
# --- nothing outlives a clip or leaks into the next one, not even after an exception.


class CausalConv3d(nn.Conv3d):
    """Conv3d over the present frame and the two before it, which are zero before the clip's first
    frame."""

    def __init__(self, dim_in, dim_out, kernel=(3, 3, 3)):
        super().__init__(dim_in, dim_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x, state):
        history = state[self] if self in state else x.new_zeros(*x.shape[:2], 2, *x.shape[3:])
        x = torch.cat([history, x], dim=2)  # (B, c, 2 + t, ...)
        state[self] = x[
            :, :, -2:
        ].clone()  # a view would keep the whole step alive until the next one
        return super().forward(x)  # (B, dim_out, t, ...)


class ChannelNorm(nn.Module):
    """Scale each position's channel vector to length sqrt(c), then by gamma (Zhang & Sennrich
    2019)."""

    def __init__(self, dim, spatial_dims=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))

    def forward(self, x):
        return F.normalize(x, dim=1).mul_(self.gamma * len(self.gamma) ** 0.5)


class FrameAttention(nn.Module):
    """One-head self-attention over the positions of each frame alone."""

    def __init__(self, dim):
        super().__init__()
        self.norm = ChannelNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        qkv = rearrange(self.to_qkv(self.norm(frames)), "n (k c) h w -> k n 1 (h w) c", k=3)
        y = F.scaled_dot_product_attention(*qkv)  # (B*t, 1, h*w, c)
        y = self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=x.shape[3]))
        return x + rearrange(y, "(b t) c h w -> b c t h w", b=len(x))


class Chain(nn.Sequential):
    """nn.Sequential that passes `state` to the layers that keep some; its indices are the official
    names."""

    def forward(self, x, state):
        for layer in self:
            stateless = isinstance(layer, (ChannelNorm, FrameAttention, nn.SiLU, nn.Identity))
            x = layer(x) if stateless else layer(x, state)
        return x


class ResBlock(nn.Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.residual = Chain(
            ChannelNorm(dim_in),
            nn.SiLU(inplace=True),
            CausalConv3d(dim_in, dim_out),
            ChannelNorm(dim_out),
            nn.SiLU(inplace=True),
            nn.Identity(),
            CausalConv3d(dim_out, dim_out),
        )
        self.shortcut = nn.Conv3d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x, state):
        return self.shortcut(x) + self.residual(x, state)


class Downsample(nn.Module):
    """Halve height and width; if temporal the frames too, except that the clip's first frame stays
    alone."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x, state):
        y = self.resample(rearrange(x, "b c t h w -> (b t) c h w"))
        x = rearrange(y, "(b t) c h w -> b c t h w", b=len(x))  # (B, c, t, h/2, w/2)
        if self.time_conv is None:
            return x
        first, last = (x[:, :, :0], state[self]) if self in state else (x[:, :, :1], x[:, :, :0])
        state[self] = x[:, :, -1:].clone()
        x = torch.cat([last, x], dim=2)  # (B, c, 2n + 1, h/2, w/2)
        return torch.cat([first, self.time_conv(x)], dim=2) if x.shape[2] > 1 else first


class Upsample(nn.Module):
    """Double height and width; if temporal the frames too, except that the clip's first frame stays
    alone."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"),
            nn.Conv2d(dim, dim // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x, state):
        alone = (
            0 if self in state else 1
        )  # time_conv never sees frame 0, not even as history of frame 1
        state[self] = True
        if self.time_conv is not None and x.shape[2] > alone:
            y = rearrange(
                self.time_conv(x[:, :, alone:], state), "b (j c) t h w -> b c (t j) h w", j=2
            )
            x = torch.cat([x[:, :, :alone], y], dim=2)  # (B, c, 2t - alone, h, w)
        y = self.resample(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(y, "(b t) c h w -> b c t h w", b=len(x))  # (B, c/2, ..., 2h, 2w)


def vae_middle(dim):
    return Chain(ResBlock(dim, dim), FrameAttention(dim), ResBlock(dim, dim))


def vae_encoder(dim, z_dim):
    """Chain (B, 3, t, H, W) -> (B, 2 z_dim, f, h, w)."""
    layers = []
    for stage, (dim_in, dim_out) in enumerate(
        itertools.pairwise([dim, dim, 2 * dim, 4 * dim, 4 * dim])
    ):
        layers += [ResBlock(dim_in, dim_out), ResBlock(dim_out, dim_out)]
        layers += [Downsample(dim_out, temporal=stage > 0)] if stage < 3 else []
    head = Chain(ChannelNorm(4 * dim), nn.SiLU(), CausalConv3d(4 * dim, 2 * z_dim))
    return Chain(
        OrderedDict(
            conv1=CausalConv3d(3, dim),
            downsamples=Chain(*layers),
            middle=vae_middle(4 * dim),
            head=head,
        )
    )


def vae_decoder(dim, z_dim):
    """Chain (B, z_dim, f, h, w) -> (B, 3, t, H, W)."""
    layers, dim_in = [], 4 * dim
    for stage, dim_out in enumerate([4 * dim, 4 * dim, 2 * dim, dim]):
        layers += [
            ResBlock(dim_in, dim_out),
            ResBlock(dim_out, dim_out),
            ResBlock(dim_out, dim_out),
        ]
        layers += [Upsample(dim_out, temporal=stage < 2)] if stage < 3 else []
        dim_in = dim_out // 2
    head = Chain(ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, 3))
    return Chain(
        OrderedDict(
            conv1=CausalConv3d(z_dim, 4 * dim),
            middle=vae_middle(4 * dim),
            upsamples=Chain(*layers),
            head=head,
        )
    )


class WanVAE(nn.Module):
    """Causal video autoencoder that takes a clip in steps; their size sets speed and memory, not
    the result. Working memory does not grow with the clip, and input may stay on the CPU: a step
    moves its own frames."""

    def __init__(self, dim=96, z_dim=len(LATENT_MEAN)):
        super().__init__()
        self.encoder, self.decoder = vae_encoder(dim, z_dim), vae_decoder(dim, z_dim)
        self.conv1, self.conv2 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1), nn.Conv3d(z_dim, z_dim, 1)

    @classmethod
    def from_state_dict(cls, sd):
        """Tensors of the VAE file (shared, not copied) -> VAE. ValueError on missing or unexpected
        ones."""
        return _load(
            _strip_prefix(sd, "model."), VAE_FILE, lambda size: cls(size["encoder.conv1.weight"][0])
        )

    @torch.no_grad()
    def encode(self, video, chunk=4):
        """Normalised posterior mean; nothing is sampled, so latents can be cached.

        video     (B, 3, T, H, W)     [-1, 1]; T = 4k + 1, H and W multiples of 8
        chunk     multiple of 4       pixel frames per step after the first frame; None: the clip in
                                      one step
        returns   (B, 16, f, h, w)    fp32, (mu - mean) / std, on the VAE's device"""
        B, c, T, H, W = video.shape
        if (
            c != 3
            or T % 4 != 1
            or H % 8
            or W % 8
            or (chunk is not None and (chunk < 4 or chunk % 4))
        ):
            raise ValueError(
                f"video {tuple(video.shape)}, chunk={chunk}; wanted (B, 3, 4k + 1, 8h, 8w), "
                f"chunk 4, 8, 12 ... or None. Trim or resize the clip."
            )
        state, mu = {}, []
        for start, end in itertools.pairwise([0, *range(1, T, chunk), T] if chunk else [0, T]):
            moments = self.conv1(self.encoder(video[:, :, start:end].to(self.conv1.weight), state))
            mu.append(moments.chunk(2, dim=1)[0].float())  # (B, 16, f of this step, h, w)
        mean, std = torch.tensor([LATENT_MEAN, LATENT_STD], device=moments.device).view(
            2, 1, -1, 1, 1, 1
        )
        return (torch.cat(mu, dim=2) - mean) / std

    @torch.no_grad()
    def decode(self, latents, chunk=1, progress=iter):
        """Video of latents as encode returns them.

        latents   (B, 16, f, h, w)    normalised
        chunk     int >= 1            latent frames per step; None: the clip in one step
        progress  f(list of steps)    passes the steps on, and may show them
        returns   (B, 3, T, H, W)     fp32, clamped to [-1, 1], on the VAE's device"""
        B, c, f, h, w = latents.shape
        if c != len(LATENT_MEAN) or f < 1 or (chunk is not None and chunk < 1):
            raise ValueError(
                f"latents {tuple(latents.shape)} by {chunk=}; wanted (B, 16, f, h, w) by >= 1"
            )
        state, device = {}, self.conv2.weight.device
        mean, std = torch.tensor([LATENT_MEAN, LATENT_STD], device=device).view(2, 1, -1, 1, 1, 1)
        video = torch.empty(B, 3, 4 * f - 3, 8 * h, 8 * w, device=device)
        for start, end in progress(list(itertools.pairwise([*range(0, f, chunk or f), f]))):
            z = (latents[:, :, start:end].to(mean) * std + mean).to(self.conv2.weight)
            video[:, :, max(0, 4 * start - 3) : 4 * end - 3] = self.decoder(self.conv2(z), state)
        return video.clamp_(-1, 1)


# --- Text.


def relative_buckets(length, buckets, max_distance=128):
    """(L, L) bucket of key - query: half for keys to the right; one per near distance, logarithmic
    beyond."""
    position = torch.arange(length)  # on the CPU: the last bit of a GPU's log could move a border
    offset = position[None, :] - position[:, None]
    half, near, distance = buckets // 2, buckets // 4, offset.abs()
    far = torch.log(distance.clamp(min=1) / near) / math.log(max_distance / near) * (half - near)
    far = (near + far.long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


class UMT5Block(nn.Module):
    def __init__(self, dim, attn_dim, ffn_dim, heads, buckets):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({name: nn.Linear(dim, attn_dim, bias=False) for name in "qkv"})
        self.attn["o"] = nn.Linear(attn_dim, dim, bias=False)
        self.ffn = nn.ModuleDict(
            {
                "gate": nn.Sequential(nn.Linear(dim, ffn_dim, bias=False), nn.GELU("tanh")),
                "fc1": nn.Linear(dim, ffn_dim, bias=False),
                "fc2": nn.Linear(ffn_dim, dim, bias=False),
            }
        )
        self.pos_embedding = nn.ModuleDict({"embedding": nn.Embedding(buckets, heads)})

    def forward(self, x, bucket, padding):
        bias = rearrange(self.pos_embedding["embedding"](bucket), "l m n -> 1 n l m")
        bias = bias.masked_fill(
            padding[:, None, None, :], torch.finfo(x.dtype).min
        )  # (B, heads, L, L)
        y = self.norm1(x)
        q, k, v = (
            rearrange(self.attn[name](y), "b l (n d) -> b n l d", n=bias.shape[1]) for name in "qkv"
        )
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=1.0
        )  # T5 omits 1 / sqrt(d)
        x = x + self.attn["o"](rearrange(y, "b n l d -> b l (n d)"))
        y = self.norm2(x)
        return x + self.ffn["fc2"](self.ffn["fc1"](y) * self.ffn["gate"](y))


class UMT5Encoder(nn.Module):
    """T5 1.1 encoder with a relative bias table in every layer; sized by default as umT5-xxl (5.7
    B)."""

    def __init__(
        self, vocab=256384, dim=4096, attn_dim=4096, ffn_dim=10240, heads=64, buckets=32, layers=24
    ):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(
            UMT5Block(dim, attn_dim, ffn_dim, heads, buckets) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    @classmethod
    def from_state_dict(cls, sd):
        """Tensors of the umT5 file (shared, not copied) -> encoder. ValueError on missing or extra
        ones."""

        def build(shapes):
            vocab, dim = shapes["token_embedding.weight"]
            buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
            attn_dim, ffn_dim = (
                shapes["blocks.0.attn.q.weight"][0],
                shapes["blocks.0.ffn.fc1.weight"][0],
            )
            return cls(
                vocab, dim, attn_dim, ffn_dim, heads, buckets, _count_layers(shapes, "blocks.")
            )

        return _load(_strip_prefix(sd, "model."), T5_FILE, build)

    @torch.no_grad()
    def forward(self, ids, mask):
        """Text embedding, zero at padding (the DiT attends to all 512 positions and expects zeros
        there).

        ids       (B, L)       int64, L = 512 in Wan
        mask      (B, L)       1 at tokens, 0 at padding
        returns   (B, L, D)    the weights' dtype"""
        x = self.token_embedding(ids)  # (B, L, D)
        table, padding = self.blocks[0].pos_embedding["embedding"], mask == 0
        bucket = relative_buckets(ids.shape[1], table.num_embeddings).to(ids.device)
        for block in self.blocks:
            x = block(x, bucket, padding)
        return self.norm(x).masked_fill(padding[..., None], 0)


def clean_prompt(text):
    """What Wan does to a prompt before tokenizing: repair text, decode HTML entities twice, single
    spaces.

    Without ftfy only its everyday effects are imitated: full-width forms (as Chinese commas),
    quotes."""
    try:
        import ftfy

        text = ftfy.fix_text(text)
    except ImportError:
        text = unicodedata.normalize("NFKC", text).translate(str.maketrans("‘’“”", "''\"\""))
    return " ".join(html.unescape(html.unescape(text)).split())


class PromptTokenizer:
    """The tokenizer of the folder google/umt5-xxl, read from its tokenizer.json."""

    def __init__(self, folder):
        from tokenizers import Tokenizer  # imported here: training from caches does without it

        path = Path(folder) / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(
                f"{path}: cannot be read; it is part of a Wan2.1 download. {error}"
            ) from error
        found = self.tokenizer.token_to_id("<pad>"), self.tokenizer.token_to_id("</s>")
        if found != (PAD_ID, END_ID):
            raise ValueError(
                f"{path}: not umT5's tokenizer, <pad> and </s> are {found}, wanted (0, 1)"
            )
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()  # the file's own might drop </s>

    def __call__(self, prompts):
        """List of n prompts -> ids, mask, both (n, 512) int64: cleaned, cut to 511 tokens, </s>,
        padding."""
        ids = torch.full((len(prompts), TEXT_LEN), PAD_ID)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self.tokenizer.encode(clean_prompt(prompt)).ids
            tokens = (
                tokens[:-1] if tokens[-1:] == [END_ID] else tokens
            )  # not every file appends </s>
            tokens = [*tokens[: TEXT_LEN - 1], END_ID]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        return ids, mask


# --- CLIP vision.


class CLIPBlock(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"to_qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        qkv = rearrange(
            self.attn["to_qkv"](self.norm1(x)), "b l (k n d) -> k b n l d", k=3, n=self.num_heads
        )
        y = F.scaled_dot_product_attention(*qkv)  # (B, heads, L, d)
        x = x + self.attn["proj"](rearrange(y, "b n l d -> b l (n d)"))
        return x + self.mlp(self.norm2(x))


class CLIPVision(nn.Module):
    """Vision tower of CLIP ViT-H/14 read out before its last block: the image tokens of Wan."""

    def __init__(self, dim=1280, layers=32, num_heads=16):
        super().__init__()
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 257, dim))
        self.patch_embedding = nn.Conv2d(3, dim, 14, stride=14, bias=False)
        self.pre_norm = nn.LayerNorm(dim)
        self.transformer = nn.ModuleList(CLIPBlock(dim, num_heads) for _ in range(layers))

    @classmethod
    def from_state_dict(cls, sd, num_heads=16):
        """Tensors of the CLIP file (shared, not copied), with or without `visual.` -> tower. Text
        tower and output head are skipped by name; ValueError on other missing or unexpected
        tensors."""
        sd = {
            key: value
            for key, value in _strip_prefix(sd, "model.").items()
            if not key.startswith("textual.") and key != "log_scale"
        }
        sd = {
            key: value
            for key, value in _strip_prefix(sd, "visual.").items()
            if key not in ("post_norm.weight", "post_norm.bias", "head")
        }
        layers = _count_layers(sd, "transformer.")
        return _load(sd, CLIP_FILE, lambda size: cls(size["cls_embedding"][2], layers, num_heads))

    @torch.no_grad()
    def forward(self, images):
        """Image tokens, class token first.

        images    (B, 3, H, W)     [-1, 1]; squeezed to 224 x 224, no crop and no anti-aliasing, as
                                   Wan does
        returns   (B, 257, D)      the weights' dtype"""
        x = F.interpolate(images.float(), size=(224, 224), mode="bicubic", align_corners=False)
        mean, std = torch.tensor([CLIP_MEAN, CLIP_STD], device=x.device).view(2, 1, 3, 1, 1)
        x = ((x * 0.5 + 0.5 - mean) / std).to(self.cls_embedding)
        x = rearrange(self.patch_embedding(x), "b c h w -> b (h w) c")  # (B, 256, D)
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], dim=1)  # (B, 257, D)
        x = self.pre_norm(x + self.pos_embedding)
        for block in self.transformer[:-1]:  # the last, 3% of the tower, is there to load strictly
            x = block(x)
        return x


# --- A downloaded folder: the parts are loaded one after another, so peak memory is that of the largest.
PARTS = dict(
    text="models_t5_umt5-xxl-enc-bf16",
    vae="Wan2.1_VAE",
    image="models_clip_open-clip-xlm-roberta-large-vit-huge-14",
)


def wan_family(folder):
    """What the DiT of a Wan2.1 folder takes, as "wan32clip" (inputs, CLIP tokens); "" when it is no
    such folder."""
    files = [
        p
        for p in Path(folder).glob("diffusion_pytorch_model*")
        if p.suffix in (".safetensors", ".pth")
    ]
    names = {name: value for path in files for name, value in load_state_dict(path).items()}
    inputs = [
        value.shape[1] for name, value in names.items() if name.endswith("patch_embedding.weight")
    ]
    return (
        f"wan{inputs[0]}{'clip' * any(name.endswith('img_emb.proj.1.weight') for name in names)}"
        if inputs
        else ""
    )


class WanFolder:
    """Encoders of a Wan2.1 folder on a device.  load_* read a part from disk; dropping the result
    frees it.

    fingerprint   family and a hash of the encoder files' names and sizes: caches are named by it
    start_pad     how this family's start image is followed when it is encoded: by grey frames
                  ("constant", 36 inputs), or by none (None)
    load_image    None when the family has no CLIP tokens
    Raises ValueError that names the absent file."""

    def __init__(self, folder, device):
        folder, self.device = Path(folder), torch.device(device)
        family = wan_family(folder)
        if not family:
            raise ValueError(
                f"{folder}: no diffusion_pytorch_model*.safetensors in it; wanted a Wan2.1 folder"
            )
        self.start_pad = "constant" if family.startswith("wan36") else None
        self.load_image = self.load_clip if family.endswith("clip") else None
        self.files = dict(tokenizer=folder / "google" / "umt5-xxl" / "tokenizer.json")
        for part, name in PARTS.items():
            if part != "image" or self.load_image:
                found = [folder / f"{name}{suffix}" for suffix in (".safetensors", ".pth")]
                self.files[part] = next((path for path in found if path.is_file()), found[1])
        for part, path in self.files.items():
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such file, wanted for the {part} encoder; it is part of the "
                    "download "
                    f"of a Wan2.1 release (a link to another release's copy will do)"
                )
        stamp = "".join(f"{path.name} {path.stat().st_size} " for path in self.files.values())
        self.fingerprint = f"{family}-{hashlib.md5(stamp.encode()).hexdigest()[:8]}"
        self.half = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def load_text(self):
        """umT5 in the file's bf16: f(list of prompts) -> list of (L, 4096), L the prompt's own
        length."""
        tokenizer = PromptTokenizer(self.files["tokenizer"].parent)
        encoder = UMT5Encoder.from_state_dict(load_state_dict(self.files["text"])).to(self.device)

        def encode(prompts):
            ids, mask = tokenizer(prompts)
            rows = [
                encoder(i[None].to(self.device), m[None].to(self.device))[0]
                for i, m in zip(ids, mask)
            ]
            return [row[:n] for row, n in zip(rows, mask.sum(1).tolist())]

        return encode

    def load_clip(self):
        """CLIP vision tower: f(images (B, 3, H, W)) -> (B, 257, 1280); bf16 on a GPU."""
        tower = CLIPVision.from_state_dict(load_state_dict(self.files["image"])).to(
            self.device, self.half
        )
        return lambda images: tower(images.to(self.device))

    def load_vae(self):
        """Video VAE in fp32, as the official code runs it."""
        return WanVAE.from_state_dict(load_state_dict(self.files["vae"])).to(
            self.device, torch.float32
        )


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


def encode_start(vae, image, frames, pad):
    """Start image (1, 3, 1, H, W) -> latents (1, 16, 1, h, w); or (1, 16, f, h, w) of it and what
    follows: grey frames (pad "constant") or the image held still ("replicate": the demo, whose DiT
    need not learn first to look back)."""
    return vae.encode(F.pad(image, (0, 0, 0, 0, 0, frames - 1), mode=pad) if pad else image)
