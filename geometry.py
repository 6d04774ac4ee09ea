"""Geometry of FantasyWorld: cameras, the geometry branch's modules, its losses.

Sources: Hartley & Zisserman 2004, CameraCtrl 2024 (rays), VGGT 2025 (pose encoding, confidence,
camera loss), MiDaS 2020, Video Depth Anything 2025 (depth losses), FantasyWorld 2025 (their sum).
Shapes: B clips, T = 4k + 1 frames, H W pixels, n camera-head iterations.  `size` is always (H, W).
  camera    OpenCV: x right, y down, z forward.  w2c = [R | t] (3, 4): X_cam = R X_world + t;
            centre C = -R^T t.  World = first camera of the clip.
  pixel     (row i, column j) is centred at (u, v) = (j + 0.5, i + 0.5); the image: [0, W] x [0, H].
  K         (3, 3) in pixels of the current image, zero skew; centred means (cx, cy) = (W/2, H/2).
  depth     z in the camera frame, not along the ray; 0, negative, NaN and inf mean "no depth here".
  scale     s = mean distance of the first frame's valid points to the first camera, without the
            farthest 5 %; depth, points and translations are divided by s.
  time      latent frame 0 is frame 0 alone, latent frame l is frames 4l-3 .. 4l.
  pose_enc  (9,) = translation of w2c (3), its rotation as quaternion x y z w with w >= 0 (4),
            vertical then horizontal field of view in radians (2).
Precision: fp32 or fp64 in, the same out; no matmul on cameras, which autocast would run in bf16."""

import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint


# ---- cameras -------------------------------------------------------------------------------------
def rotate(R, x):
    """R (..., 3, 3) applied to vectors x (..., 3), leading axes broadcast."""
    return R[..., 0] * x[..., 0:1] + R[..., 1] * x[..., 1:2] + R[..., 2] * x[..., 2:3]


def compose(a, b):
    """The rigid transform x -> a(b(x)); the result has a's shape, b broadcasts against it."""
    R = (a[..., :3, :3, None] * b[..., None, :3, :3]).sum(-2)
    t = rotate(a[..., :3, :3], b[..., :3, 3]) + a[..., :3, 3]
    return torch.cat([torch.cat([R, t[..., None]], -1), a[..., 3:, :]], -2)


def inv_se3(E):
    """Inverse of rigid transforms (..., 3, 4) or (..., 4, 4), in closed form: [R^T | -R^T t]."""
    Rt = E[..., :3, :3].mT
    inverse = torch.cat([Rt, -rotate(Rt, E[..., :3, 3])[..., None]], -1)  # (..., 3, 4)
    return torch.cat([inverse, E[..., 3:, :]], -2)


def relative_to_first(w2c):
    """w2c (..., T, 3, 4) in the world of the first camera; frame 0 is exactly the identity."""
    first = w2c[..., :1, :, :]
    identity = torch.eye(w2c.shape[-2], 4, dtype=w2c.dtype, device=w2c.device).expand_as(first)
    return torch.cat([identity, compose(w2c[..., 1:, :, :], inv_se3(first))], -3)


def scaled(w2c, k):
    """w2c (..., 3, 4) in a world k times as large; leading axes of k broadcast."""
    t = k * w2c[..., 3:]
    return torch.cat([w2c[..., :3].expand(*t.shape[:-1], 3), t], -1)


def quat_to_mat(q):
    """Quaternions (..., 4) x y z w of any length to rotations (..., 3, 3)."""
    x, y, z, w = q.unbind(-1)
    s = 2 / q.square().sum(-1).clamp(min=1e-12)
    # fmt: off
    R = torch.stack([
        1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w),
        s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
        s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y),
    ], -1)
    # fmt: on
    return R.unflatten(-1, (3, 3))


def mat_to_quat(R):
    """Rotations (..., 3, 3) to unit quaternions (..., 4) x y z w, w >= 0; finite gradients."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in R.unbind(-2))
    # fmt: off
    outer = torch.stack([  # 4 q q^T: every row is a multiple of q
        1 + a - e - i, b + d, c + g, h - f,
        b + d, 1 - a + e - i, f + h, c - g,
        c + g, f + h, 1 - a - e + i, d - b,
        h - f, c - g, d - b, 1 + a + e + i,
    ], -1).unflatten(-1, (4, 4))
    # fmt: on
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)  # the diagonal sums to 4: never tiny
    row = outer.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    q = F.normalize(row, dim=-1)
    return torch.where(q[..., 3:] < 0, -q, q)


POSE_DIM = 9  # the pose encoding, split here and nowhere else
TRANSLATION = slice(0, 3)  # of w2c, scene units
ROTATION = slice(3, 7)  # of w2c, quaternion x y z w
FOV = slice(7, 9)  # radians, vertical first


def encode_pose(w2c, K, size):
    """w2c (..., 3, 4), K (..., 3, 3) in pixels -> pose_enc (..., 9).

    Only centred cameras come back exactly.   Source: VGGT's absT_quaR_FoV."""
    half = torch.stack([size[0] / (2 * K[..., 1, 1]), size[1] / (2 * K[..., 0, 0])], -1)
    return torch.cat([w2c[..., 3], mat_to_quat(w2c[..., :3]), 2 * torch.atan(half)], -1)


def decode_pose(enc, size):
    """Inverse of encode_pose: enc (..., 9), any quaternion -> w2c (..., 3, 4), K (..., 3, 3)."""
    H, W = size
    w2c = torch.cat([quat_to_mat(enc[..., ROTATION]), enc[..., TRANSLATION, None]], -1)
    tan = torch.tan(enc[..., FOV].clamp(0.01, math.pi - 0.01) / 2)  # a fresh camera head may say 0
    fy, fx = H / (2 * tan[..., 0]), W / (2 * tan[..., 1])
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    K = torch.stack([fx, zero, one * W / 2, zero, fy, one * H / 2, zero, zero, one], -1)
    return w2c, K.unflatten(-1, (3, 3))


def slopes(K, size):
    """x / z (..., 1, W) and y / z (..., H, 1) of the pixel centres in the camera frame."""
    v, u = (torch.arange(n, dtype=K.dtype, device=K.device) + 0.5 for n in size)
    K = K[..., None, None, :, :]
    return (u - K[..., 0, 2]) / K[..., 0, 0], (v[:, None] - K[..., 1, 2]) / K[..., 1, 1]


def pixel_rays(K, size):
    """Rays (..., H, W, 3) through pixel centres, camera frame, z = 1: depth * ray is the point."""
    x, y = slopes(K, size)
    return torch.stack(torch.broadcast_tensors(x, y, torch.ones_like(x)), -1)


def world_rays(c2w, K, size):
    """World directions of the pixel rays as three maps (..., H, W): rotated pixel_rays, but rows
    and columns stay apart, which is several times cheaper."""
    x, y = slopes(K, size)
    R = c2w[..., None, None, :3, :3]
    return [R[..., c, 0] * x + (R[..., c, 1] * y + R[..., c, 2]) for c in range(3)]


def plucker_rays(w2c, K, size):
    """Ray map of a clip seen from its first camera: moment o x d, then unit direction d.

    w2c      (B, T, 3, 4)      any world frame; translations in scene units, moments carry them
    K        (B, T, 3, 3)      pixels of an image of `size`
    returns  (B, 6, T, H, W)   frame 0 has moment 0.   Source: CameraCtrl."""
    c2w = inv_se3(relative_to_first(w2c))
    x, y, z = world_rays(c2w, K, size)  # (B, T, H, W) each
    unit = torch.rsqrt(x * x + y * y + z * z)
    x, y, z = x * unit, y * unit, z * unit
    a, b, c = c2w[..., 3, None, None].unbind(2)
    return torch.stack([b * z - c * y, c * x - a * z, a * y - b * x, x, y, z], 1)


def pack_frames(x):
    """Stack the frames of a latent frame as channels c * 4 + j.

    x        (B, c, T, H, W)               T = 4k + 1
    returns  (B, 4c, 1 + (T-1)/4, H, W)    latent frame 0 holds frame 0 four times
    Source: Wan-Fun's camera control."""
    if x.shape[2] % 4 != 1:
        raise ValueError(f"{x.shape[2]} frames, must be 4k + 1 (21, 81). Fix: set num_frames")
    first = x[:, :, :1].expand(-1, -1, 3, -1, -1)
    return rearrange(torch.cat([first, x], 2), "b c (l j) h w -> b (c j) l h w", j=4)


def valid_depth(depth):
    return (depth > 0) & (depth < math.inf)  # NaN is neither; half the time of isfinite


def unproject(depth, w2c, K):
    """Lift z-depth maps to world points.

    depth    (B, T, H, W)      <= 0 or non-finite is invalid and yields 0
    w2c      (B, T, 3, 4)      translations in the unit of depth
    K        (B, T, 3, 3)      pixels
    returns  (B, T, H, W, 3)   world frame.   Source: Hartley & Zisserman 6.1."""
    valid, c2w = valid_depth(depth), inv_se3(w2c)
    depth = torch.where(valid, depth, 0)
    rays = world_rays(c2w, K, depth.shape[-2:])  # x, y, z of every pixel, (B, T, H, W) each
    xyz = (ray * depth + c2w[..., c, 3, None, None] for c, ray in enumerate(rays))
    return torch.stack([torch.where(valid, x, 0) for x in xyz], -1)


def project(points, w2c, K):
    """World points (B, T, ..., 3) -> pixels uv (B, T, ..., 2), z (B, T, ...); uv void at z <= 0."""
    ones = (1,) * (points.dim() - w2c.dim() + 1)  # the axes between time and xyz
    w2c, K = (m.unflatten(1, (-1, *ones)) for m in (w2c, K))
    cam = rotate(w2c[..., :3], points) + w2c[..., 3]  # (B, T, ..., 3) in the camera frame
    focal = torch.stack([K[..., 0, 0], K[..., 1, 1]], -1)
    return focal * cam[..., :2] / cam[..., 2:].clamp(min=1e-6) + K[..., :2, 2], cam[..., 2]


def normalize_scene(depth, w2c, K, mask, frames="first"):
    """Bring clips to their own unit: mean distance to the first camera = 1.

    Shapes as in unproject, mask bool.
    frames   first: of frame 0's points, the farthest 5 % dropped (FantasyWorld: all that is known
             when sampling starts); all: of every frame's points, none dropped (VGGT)
    returns  depth (0 where invalid), w2c relative to frame 0, scale (B,): user unit = scale * scene
             unit, 1 where those frames have no valid pixel"""
    valid, rel = mask & valid_depth(depth), relative_to_first(w2c)
    if frames == "first":
        distance = depth[:, 0] * pixel_rays(K[:, 0], depth.shape[-2:]).norm(dim=-1)  # (B, H, W)
        distance = distance.masked_fill(~valid[:, 0], math.nan).flatten(1)
        limit = torch.nanquantile(distance, 0.95, dim=1, keepdim=True)
        keep = distance <= limit  # NaN compares false
    elif frames == "all":
        distance, keep = unproject(depth, rel, K).norm(dim=-1).flatten(1), valid.flatten(1)
    else:
        raise ValueError(f"frames {frames!r}; known: first, all.")
    mean = torch.where(keep, distance, 0).sum(1) / keep.sum(1).clamp(min=1)  # (B,)
    scale = torch.where(keep.any(1), mean, 1)
    unit = scale[:, None, None, None]  # (B, 1, 1, 1)
    w2c = torch.cat([rel[..., :3], rel[..., 3:] / unit], -1)
    return torch.where(valid, depth, 0) / unit, w2c, scale


# ---- modules -------------------------------------------------------------------------------------
# Attribute names are the release's (and VGGT's), so their tensors load by name.  C geometry width,
# P = 5 + h*w tokens of one latent frame [camera, 4 registers, patches], f latent frames, T = 4f - 3
# pixel frames.
NUM_SPECIAL = 5


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept: later calls may train
def rope_2d(frames, h, w, head_dim, device):
    """Rotation tables of the geometry tokens of `frames` latent frames.

    returns  cos, sin (frames*P, head_dim) fp32
    First half of a head is rotated by row, second by column; frequencies 100^(-2j/(head_dim/2));
    special tokens sit at (0, 0), patch (y, x) at (1+y, 1+x).  Time enters by the video features."""
    patches = torch.cartesian_prod(torch.arange(h), torch.arange(w)) + 1  # (h*w, 2)
    positions = torch.cat([torch.zeros(NUM_SPECIAL, 2), patches]).double()
    quarter = head_dim // 4
    frequencies = 100.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = positions[:, :, None] * frequencies  # (P, 2, d/4)
    angles = torch.cat([angles, angles], -1).flatten(1).repeat(frames, 1)  # (frames*P, d)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate_half(x, cos, sin):
    """Rotate the pairs (j, j + d/4) of both halves of the last axis; x (..., N, d)."""
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (..., N, 2, d/4) each
    return x * cos + torch.stack([-second, first], -2).flatten(-3) * sin


# What the autocasts of a CPU and of a GPU would compute in different types (norms, interpolation)
# runs in the type of its input, on both: in bf16 a GPU else keeps twice the bytes for backward.
def own_type(x):
    return torch.autocast(x.device.type, enabled=False)


def layer_norm(x, weight=None, bias=None, eps=1e-6):
    """F.layer_norm over the last axis, in the type of x."""
    weight, bias = (p if p is None else p.to(x.dtype) for p in (weight, bias))
    with own_type(x):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)


def resize(x, size):
    """Bilinear interpolation of (B, C, h, w) to a size, corner on corner."""
    with own_type(x):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class LayerScale(nn.Module):
    def __init__(self, dim, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim, hidden, out):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class GeoAttention(nn.Module):
    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x, frames=1, rope=None):
        """Attention of x (B, frames*P, C) inside each of `frames` equal groups."""
        axes = dict(f=frames, s=3, h=self.heads)
        q, k, v = rearrange(self.qkv(x), "b (f p) (s h d) -> s (b f) h p d", **axes)
        q, k = self.q_norm(q), self.k_norm(k)  # per head: scores stay bounded in bf16
        if rope is not None:
            q, k = rotate_half(q, *rope), rotate_half(k, *rope)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)  # (B*f, heads, P, d)
        return self.proj(rearrange(x, "(b f) h p d -> b (f p) (h d)", f=frames))


class GeoBlock(nn.Module):
    """Pre-norm transformer block in two halves, so that the exchange can sit between them.

    Timestep modulation (B, 6, C): rows 0, 1 shift and scale the attention's input; 3, 4, 5 shift,
    scale and gate the MLP's *output*; row 2 is never used (the release's layout, kept so that its
    tensors fit).  It starts as the plain block: VGGT's weights drop in unchanged.
    Sources: VGGT 2025, FantasyWorld 2025."""

    def __init__(self, dim, heads, layer_scale, qk_norm=True, modulated=True):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.attn, self.mlp = GeoAttention(dim, heads, qk_norm), Mlp(dim, 4 * dim, dim)
        self.ls1, self.ls2 = LayerScale(dim, layer_scale), LayerScale(dim, layer_scale)
        if modulated:
            self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
            with torch.no_grad():
                self.modulation[:, 5] = 1

    def attend(self, z, modulation=None, frames=1, rope=None):
        """First half; z (B, N, C), modulation (B, 6, C) of the timestep or None."""
        x = self.norm1(z)
        if modulation is not None:
            m = self.modulation + modulation
            x = x * (1 + m[:, 1:2]) + m[:, 0:1]
        return z + self.ls1(self.attn(x, frames, rope))

    def feed_forward(self, z, modulation=None):
        x = self.mlp(self.norm2(z))
        if modulation is not None:
            m = self.modulation + modulation
            x = (x * (1 + m[:, 4:5]) + m[:, 3:4]) * m[:, 5:6]
        return z + self.ls2(x)

    def forward(self, z, modulation=None, frames=1, rope=None):
        return self.feed_forward(self.attend(z, modulation, frames, rope), modulation)


class LatentBridge(nn.Module):
    """Video tokens (B, N, D) -> geometry width (B, N, C): a linear map (all that the release has),
    plus a low-rank transformer residual whose last layer starts at zero.  Attention stays inside a
    latent frame."""

    def __init__(self, video_dim, dim, layers, width, layer_scale):
        super().__init__()
        self.proj = nn.Linear(video_dim, dim)
        block = partial(GeoBlock, width, max(width // 64, 1), layer_scale, modulated=False)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        if layers:
            self.down, self.norm = nn.Linear(dim, width), LayerNorm(width)
            self.up = nn.Linear(width, dim)
            nn.init.zeros_(self.up.weight)  # so that a bridge begins as the linear map
            nn.init.zeros_(self.up.bias)

    def forward(self, x, frames):
        z = self.proj(x)  # (B, N, C)
        if not self.blocks:
            return z
        r = self.down(z)  # (B, N, width)
        for block in self.blocks:
            r = block(r, frames=frames)
        return z + self.up(self.norm(r))  # zero at the start: the linear map alone


class PoseEncoder(nn.Module):
    """Pose encodings (B, T, 9) -> one embedding per latent frame (B, f, C); frame 0 is alone."""

    def __init__(self, hidden, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4 * POSE_DIM, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, poses):
        grouped = pack_frames(rearrange(poses, "b t c -> b c t 1 1"))  # (B, 36, f, 1, 1)
        return self.mlp(rearrange(grouped, "b c f 1 1 -> b f c"))


class CameraHead(nn.Module):
    """Camera tokens (B, f, 2C) -> pose encodings of every refinement (iterations, B, T, 9).

    Time is up-sampled by a 1x1 convolution as in FantasyWorld: latent n >= 1, channel group j
    becomes frame 1 + 4(n-1) + j.  (The release orders group-major and skips the token norm there.)
    The quaternion is not normalised, fields of view are >= 0.   Source: VGGT's camera head."""

    def __init__(self, in_dim, dim, heads, layer_scale, layers=4, iterations=4, released=False):
        super().__init__()
        self.iterations, self.released = iterations, released
        self.proj_in = nn.Linear(in_dim, dim) if in_dim != dim else nn.Identity()
        self.camera_time_upsample = nn.ModuleDict(dict(expand_channels=nn.Conv1d(dim, 4 * dim, 1)))
        self.token_norm, self.trunk_norm = LayerNorm(dim), LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_DIM))
        self.embed_pose = nn.Linear(POSE_DIM, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        how = dict(qk_norm=False, modulated=released)  # the release's modulation is never used
        self.trunk = nn.ModuleList(GeoBlock(dim, heads, layer_scale, **how) for _ in range(layers))
        self.pose_branch = Mlp(dim, dim // 2, POSE_DIM)

    def frame_tokens(self, tokens):
        expand = self.camera_time_upsample["expand_channels"]
        expanded = expand(tokens[:, 1:].transpose(1, 2))  # (B, 4C, f-1)
        if self.released:
            rest = rearrange(expanded, "b (c j) n -> b (j n) c", j=4)
            return torch.cat([self.token_norm(tokens[:, :1]), rest], 1)  # (B, T, C)
        rest = rearrange(expanded, "b (c j) n -> b (n j) c", j=4)
        return self.token_norm(torch.cat([tokens[:, :1], rest], 1))

    def forward(self, tokens):
        tokens = self.frame_tokens(self.proj_in(tokens))
        plain = layer_norm(tokens)
        # The first guess: no rotation (w = 1) and a view of 1 rad; the release's is all zeros.
        start = torch.zeros(POSE_DIM, device=tokens.device)
        start[ROTATION.stop - 1 :] = 0.0 if self.released else 1.0
        pose = start.expand(*tokens.shape[:2], POSE_DIM)
        previous, out = self.empty_pose_tokens.expand_as(pose), []
        for _ in range(self.iterations):
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(previous)).chunk(3, -1)
            x = tokens + gate * (plain * (1 + scale) + shift)  # (B, T, C)
            for block in self.trunk:
                x = block(x)
            pose = pose + self.pose_branch(self.trunk_norm(x)).float()  # a better guess
            out.append(torch.cat([pose[..., : FOV.start], F.relu(pose[..., FOV])], -1))
            previous = pose = pose.detach()  # each refinement answers for its own step
        return torch.stack(out)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def uv_embedding(channels, h, w, aspect, device):
    """0.1 sin/cos embedding of aspect-aware coordinates, (channels, h, w).  Source: VGGT, MoGe."""
    norm = math.hypot(aspect, 1)
    u = torch.linspace(-1, 1, w, dtype=torch.float64) * (aspect / norm * (w - 1) / w)
    v = torch.linspace(-1, 1, h, dtype=torch.float64) * (1 / norm * (h - 1) / h)
    omega = 100.0 ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    omega = omega[:, None, None]  # (channels/4, 1, 1)
    a, b = torch.meshgrid(v, u, indexing="ij")
    parts = [f(grid * omega) for grid in (b, a) for f in (torch.sin, torch.cos)]
    return (0.1 * torch.cat(parts)).float().to(device)


class CausalUpsample(nn.Module):
    """T -> 2T - 1 in time, x (B, C, T, h, w): frame 0 passes; the others go through a causal
    convolution that does not see it and whose two channel halves become consecutive frames."""

    def __init__(self, channels, released=False):
        super().__init__()
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1))
        if not released:  # equal sub-frames at the start: with random ones a depth head collapsed
            nn.init.zeros_(self.time_conv.bias)
            with torch.no_grad():
                self.time_conv.weight[channels:] = self.time_conv.weight[:channels]

    def forward(self, x):
        rest = self.time_conv(F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0)))
        return torch.cat([x[:, :, :1], rearrange(rest, "b (s c) t h w -> b c (t s) h w", s=2)], 2)


class ChannelNorm(nn.Module):
    """x / ||x||_2 over channels * sqrt(C) * gamma."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x):
        with own_type(x):
            unit = F.normalize(x, dim=1)
        return unit * (x.shape[1] ** 0.5) * self.gamma


class CausalResidual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        layers = {"0": ChannelNorm(channels), "2": nn.Conv3d(channels, channels, 3)}
        self.residual = nn.ModuleDict(layers)

    def forward(self, x):
        return x + self.residual["2"](F.pad(F.silu(self.residual["0"](x)), (1, 1, 1, 1, 2, 0)))


class TemporalUpsampler(nn.Module):
    """Causal 4x time up-sampling, f -> 4f - 3 frames, whole sequence at once."""

    def __init__(self, channels, released=False):
        super().__init__()
        self.conv2 = nn.Conv3d(channels, channels, 1)
        layers = []
        for _ in range(2):  # each doubles the frames after the first
            layers += [CausalUpsample(channels, released), CausalResidual(channels)]
        self.decoder = nn.ModuleDict(dict(upsamples=nn.Sequential(*layers)))

    def forward(self, x):
        return self.decoder["upsamples"](self.conv2(x))


class ResidualConvUnit(nn.Module):
    def __init__(self, channels, released=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.released = released

    def forward(self, x):
        branch = self.conv2(F.relu(self.conv1(F.relu(x))))
        # The release's in-place ReLU also clips the skip.
        return branch + (F.relu(x) if self.released else x)


class RefineNet(nn.Module):
    def __init__(self, channels, lateral=True, released=False):
        super().__init__()
        self.resConfUnit1 = ResidualConvUnit(channels, released) if lateral else None
        self.resConfUnit2 = ResidualConvUnit(channels, released)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x, lateral, size):
        if lateral is not None:
            x = x + self.resConfUnit1(lateral)
        x = self.resConfUnit2(x)
        # A 1x1 convolution and an interpolation commute: first the one with fewer pixels.
        return resize(self.out_conv(x), size)


class DPTHead(nn.Module):
    """Four token maps -> a dense map for every pixel of every frame.  Source: DPT 2021 / VGGT,
    causal 4x time up-sampling as in FantasyWorld (geometry.md 3.3).

    in_dim       2C, width of concat(frame output, global output)
    channels     4 widths, finest level first (token grid x4, x2, x1, x1/2)
    forward      maps: 4 x (B, f, h*w, 2C) finest first, grid (f, h, w) -> (B, T, 16h, 16w, out_dim)
                 fp32, not activated
    chunk        pixel frames, of all clips together, that are fused at once
    recompute    where there are several chunks, backward computes each of them, and the stage
                 along time before them, once more (memory, not values)"""

    def __init__(self, in_dim, out_dim, channels, features, tail=32, released=False, chunk=16):
        super().__init__()
        self.chunk, self.released = chunk, released
        self.norm = LayerNorm(in_dim)
        self.projects = nn.ModuleList(nn.Conv2d(in_dim, c, 1) for c in channels)
        first, second, _, last = channels
        up4, up2 = nn.ConvTranspose2d(first, first, 4, 4), nn.ConvTranspose2d(second, second, 2, 2)
        resize = [up4, up2, nn.Identity(), nn.Conv2d(last, last, 3, 2, 1)]
        self.resize_layers = nn.ModuleList(resize)
        self.temporal_upsamplers = nn.ModuleList(TemporalUpsampler(c, released) for c in channels)
        self.scratch = nn.Module()
        for i, c in enumerate(channels, 1):
            setattr(self.scratch, f"layer{i}_rn", nn.Conv2d(c, features, 3, padding=1, bias=False))
            setattr(self.scratch, f"refinenet{i}", RefineNet(features, i < 4, released))
        self.scratch.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        # With ReLU a depth head went constant in trials.
        activation = nn.ReLU() if released else nn.GELU()
        narrow = nn.Conv2d(features // 2, tail, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(narrow, activation, nn.Conv2d(tail, out_dim, 1))
        self.scratch.to(memory_format=torch.channels_last)

    def level(self, i, tokens, grid, aspect):
        """Level i at pixel-frame rate: (B, c_i, T, h_i, w_i)."""
        f, h, w = grid
        x = rearrange(self.norm(tokens), "b f (h w) c -> (b f) c h w", h=h)
        x = self.projects[i](x)  # (B*f, c_i, h, w)
        x = self.resize_layers[i](x + uv_embedding(x.shape[1], h, w, aspect, x.device))
        return self.temporal_upsamplers[i](rearrange(x, "(b f) c h w -> b c f h w", f=f))

    def fuse(self, size, aspect, *levels):
        """One chunk of frames: 4 x (B*t, c_i, h_i, w_i) -> (B*t, H, W, out_dim)."""
        s = self.scratch
        l1, l2, l3, l4 = [getattr(s, f"layer{i}_rn")(x) for i, x in enumerate(levels, 1)]
        x = s.refinenet4(l4, None, l3.shape[-2:])  # coarsest level first
        x = s.refinenet3(x, l3, l2.shape[-2:])
        x = s.refinenet2(x, l2, l1.shape[-2:])
        x = s.refinenet1(x, l1, (2 * l1.shape[-2], 2 * l1.shape[-1]))  # (B*t, features, 8h, 8w)
        x = resize(s.output_conv1(x), size)
        x = x + uv_embedding(x.shape[1], *size, aspect, x.device).to(x.dtype)
        x = s.output_conv2[1](s.output_conv2[0](x))  # (B*t, tail, H, W)
        # Not in bf16: the exp of such a logit moves in 0.8 % steps.
        with torch.autocast(x.device.type, enabled=False):
            return s.output_conv2[2](x.float()).permute(0, 2, 3, 1)

    def forward(self, maps, grid, recompute=False):
        f, h, w = grid
        aspect, size = w / h, (16 * h, 16 * w)  # 16 pixels a token
        chunk = max(1, self.chunk // len(maps[0]))  # frames of each clip
        again = recompute and torch.is_grad_enabled() and 4 * f - 3 > chunk
        how = dict(use_reentrant=False, preserve_rng_state=False)  # there is no dropout
        run = partial(checkpoint, **how) if again else lambda function, *args: function(*args)
        levels = [run(self.level, i, tokens, grid, aspect) for i, tokens in enumerate(maps)]
        out = []
        for start in range(0, 4 * f - 3, chunk):
            parts = [channels_last(x[:, :, start : start + chunk]) for x in levels]
            fused = run(self.fuse, size, aspect, *parts)
            out.append(rearrange(fused, "(b t) h w k -> b t h w k", b=len(maps[0])))
        return torch.cat(out, 1)


def channels_last(x):
    """(B, c, t, h, w) -> (B*t, c, h, w), channels last in memory: twice as fast on a CPU."""
    return rearrange(x, "b c t h w -> (b t) h w c").permute(0, 3, 1, 2)


def activate_depth(raw):
    """(..., 2) -> depth > 0 and confidence > 1, both (...); clamped logits cannot overflow."""
    return raw[..., 0].clamp(-10, 10).exp(), 1 + raw[..., 1].clamp(max=10).exp()


def activate_points(raw):
    """(..., 4) -> world points (..., 3) = sign(o) expm1(|o|), slope 1 at 0; confidence > 1."""
    magnitude = raw[..., :3].abs().clamp(1e-6, 10)
    return raw[..., :3] * torch.expm1(magnitude) / magnitude, 1 + raw[..., 3].clamp(max=10).exp()


# ---- losses --------------------------------------------------------------------------------------
# Each loss reduces within a clip (masked sums over T, H, W by its valid count), then averages
# clips: the mean over ranks or micro-steps is the same number.  Masked pixels may hold anything,
# NaN included; a clip without valid pixels costs 0, gradient 0.  clip_weight (B,) multiplies clips,
# not renormalised: acts at B = 1 too.
def fp32(x):
    return x if x.dtype == torch.float64 else x.float()


def residual(pred, gt, mask):
    """pred - gt, 0 where masked: `where` comes first, so NaN reaches no value or gradient."""
    return torch.where(mask, fp32(pred) - fp32(gt), 0)


def length(channels):
    """Length over channel maps: faster than a last axis of 3; the floor makes its slope 0 at 0."""
    if len(channels) == 1:
        return channels[0].abs()
    return (sum(x * x for x in channels) + 1e-24).sqrt()


def clip_mean(x, mask):
    """Per clip (B,): sum of x, which is 0 where masked, over the count of valid pixels."""
    return x.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def over_clips(loss, clip_weight):
    return (loss if clip_weight is None else loss * clip_weight).mean()


def gradient_levels(channels, mask, weight):
    """Mean |grad| of channel maps (0 where masked) per clip at strides 1, 2, 4, 8: (B, 4).

    Valid pairs of neighbours count, with the weight of the left or upper pixel.  Source: MiDaS."""
    levels = []
    for k in (1, 2, 4, 8):
        r, m = [x[..., ::k, ::k] for x in channels], mask[..., ::k, ::k]
        w = weight[..., ::k, ::k] * m
        dx = length([x[..., 1:] - x[..., :-1] for x in r]) * (w[..., :-1] * m[..., 1:])
        dy = length([x[..., 1:, :] - x[..., :-1, :] for x in r]) * (w[..., :-1, :] * m[..., 1:, :])
        levels.append(clip_mean(dx, m) + clip_mean(dy, m))  # (B,)
    return torch.stack(levels, 1)


def standardize(x, mask):
    """Per frame: minus the valid pixels' median, over their mean absolute deviation; else 0."""
    count = mask.sum((2, 3), keepdim=True)  # (B, T, 1, 1)
    x = torch.where(mask, fp32(x), 0)
    median = x.masked_fill(~mask, math.nan).flatten(2).nanmedian(-1).values[..., None, None]
    x = torch.where(mask, x - torch.where(count > 0, median, 0), 0)
    return x / (x.abs().sum((2, 3), keepdim=True) / count.clamp(min=1)).clamp(min=1e-6)


def frame_loss(pred, gt, mask, mode="metric", clip_weight=None):
    """Depth error within frames: mean |r| + 0.5 * |grad r| summed over four scales.

    pred, gt, mask  (B, T, H, W)   mask bool
    mode            metric: r = pred - gt; ssi: both standardised per frame (MiDaS, VDA)"""
    if mode == "ssi":
        pred, gt = standardize(pred, mask), standardize(gt, mask)
    elif mode != "metric":
        raise ValueError(f"depth mode {mode!r}; known: metric (scene units), ssi (no unit).")
    r = residual(pred, gt, mask)  # (B, T, H, W)
    loss = clip_mean(r.abs(), mask) + 0.5 * gradient_levels([r], mask, mask).sum(1)
    return over_clips(loss, clip_weight)


def fit_scale_shift(pred, gt, mask):
    """Least-squares s, b (B, 1, 1, 1) of s * pred + b = gt over a clip's valid pixels."""
    total = partial(torch.sum, dim=(1, 2, 3), keepdim=True)
    p_mean, g_mean = (total(torch.where(mask, x, 0)) / total(mask).clamp(min=1) for x in (pred, gt))
    p = torch.where(mask, pred - p_mean, 0)  # centred: raw sums would cancel in fp32
    g = torch.where(mask, gt - g_mean, 0)
    s = total(p * g) / total(p * p).clamp(min=1e-12)  # (B, 1, 1, 1)
    return s, g_mean - s * p_mean


def still_pairs(gt, mask, rel_th):
    """Pixel pairs in time (B, T-1, H, W) that change by less than rel_th of the later range."""
    gt = fp32(gt)
    high = gt.masked_fill(~mask, -math.inf).amax((2, 3), keepdim=True)  # (B, T, 1, 1)
    low = gt.masked_fill(~mask, math.inf).amin((2, 3), keepdim=True)
    small = (gt[:, 1:] - gt[:, :-1]).abs() < rel_th * (high - low)[:, 1:]
    return mask[:, 1:] & mask[:, :-1] & small


def tgm_loss(pred, gt, mask, rel_th=0.05, align=False, clip_weight=None):
    """Temporal gradient matching: depth must change between frames as the true depth does.

    pred, gt, mask  (B, T, H, W)
    rel_th          larger true changes, as a share of the later frame's depth range, are passing
                    edges and do not count
    align           fit one scale and shift per clip first, for relative depth
    returns         scalar, 0 for T = 1"""
    pairs = still_pairs(gt, mask, rel_th)  # (B, T-1, H, W) bool
    p, g = (torch.where(mask, fp32(x), 0) for x in (pred, gt))
    if align:
        s, b = fit_scale_shift(p, g, mask)
        p = s * p + b
    p, g = p.diff(dim=1), g.diff(dim=1)  # (B, T-1, H, W)
    error = (p - g).abs()  # as Video Depth Anything's code; its paper drops the signs
    return over_clips(clip_mean(error * pairs, pairs), clip_weight)


def confident(error, conf, mask, gamma):
    """c * error - gamma log c per clip; error is finite everywhere, conf is 1 where masked."""
    return clip_mean(conf * error * mask - gamma * conf.log(), mask)


def conf_loss(pred, conf, gt, mask, gamma=0.2, clip_weight=None):
    """mean(c |r| - gamma log c) of depth; best c = gamma / |r|.

    pred, conf, gt, mask  (B, T, H, W), conf > 0.   Source: VGGT."""
    error = residual(pred, gt, mask).abs()  # (B, T, H, W)
    return over_clips(confident(error, torch.where(mask, fp32(conf), 1), mask, gamma), clip_weight)


def points_loss(pred, conf, gt, mask, gamma=0.2, clip_weight=None):
    """Point map error: mean(c |r| - gamma log c) + c |grad r| averaged over four scales.

    pred, gt    (B, T, H, W, 3)   world frame, scene units
    conf, mask  (B, T, H, W)      conf > 0
    The value goes negative once confidence is earned.   Source: FantasyWorld's L_pmap, VGGT."""
    r = [residual(p, g, mask) for p, g in zip(pred.unbind(-1), gt.unbind(-1))]
    error, conf = length(r), torch.where(mask, fp32(conf), 1)  # conf 1 has logarithm 0
    loss = confident(error, conf, mask, gamma)
    return over_clips(loss + gradient_levels(r, mask, conf).mean(1), clip_weight)


def camera_loss(pred_iterations, gt, delta=0.1, clip_weight=None):
    """Huber / delta on the pose encoding: translation + rotation + 0.5 * field of view.

    pred_iterations, gt  (n, B, T, 9), (B, T, 9)   scene units; iteration k weighs 0.6^(n-1-k) / n
    delta                0.1 keeps L1's slope on everything but small errors.   Source: VGGT."""
    pred, gt = fp32(pred_iterations), fp32(gt).expand(pred_iterations.shape)
    same = (pred[..., ROTATION] * gt[..., ROTATION]).sum(-1, keepdim=True)
    flip = torch.where(same < 0, -1, 1)  # q and -q are one rotation
    gt = torch.cat([gt[..., TRANSLATION], gt[..., ROTATION] * flip, gt[..., FOV]], -1)
    error = F.smooth_l1_loss(pred, gt, beta=delta, reduction="none").mean(2)  # (n, B, 9)
    move, turn, fov = (error[..., part].mean(-1) for part in (TRANSLATION, ROTATION, FOV))
    error = move + turn + 0.5 * fov
    later = torch.arange(len(pred) - 1, -1, -1, device=pred.device, dtype=pred.dtype)
    weight = 0.6**later / len(pred)  # the last refinement counts most
    return over_clips((weight[:, None] * error).sum(0), clip_weight)


def depth_loss(pred, gt, mask, *, mode, weight, cfg):
    """The three parts of L_depth, stacked: TGM, frame by frame, confidence.

    pred    depth, depth_conf (B, T, H, W);  gt, mask (B, T, H, W)
    mode    metric, or ssi for labels without a unit
    weight  (B,) of the clips: 0 where the other mode applies"""
    depth, ssi = pred["depth"], mode == "ssi"
    tgm = tgm_loss(depth, gt, mask, align=ssi, clip_weight=weight)
    frame = frame_loss(depth, gt, mask, mode, weight)
    if ssi:
        depth, gt = standardize(depth, mask), standardize(gt, mask)
    how = dict(gamma=cfg.gamma_conf, clip_weight=weight)
    conf = conf_loss(depth, pred["depth_conf"], gt, mask, **how)
    return torch.stack([tgm, frame, conf])


def mean_where(x, mask):
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def geometry_losses(pred, batch, cfg):
    """L_geo = L_depth + L_pmap + camera_weight * L_camera.

    pred     depth, depth_conf, points_conf (B, T, H, W), points (B, T, H, W, 3),
             pose_enc (n, B, T, 9)
    batch    depth, mask (B, T, H, W), points (B, T, H, W, 3), pose_enc (B, T, 9), scene units;
             optional geo_weight (B,), the clip_weight of every part; optional relative (B,) bool:
             clips whose depth has no unit train the depth head alone, in ssi mode
    cfg      depth_mode, alpha_tgm, beta_frame, gamma_conf, camera_delta, camera_weight:
             train.py's options
    returns  loss; detached scalars depth, point, camera, tgm, frame, valid_fraction, tgm_fraction
             of pixel pairs, depth_conf_mean, point_conf_mean
    L_depth = alpha TGM + beta (frame + conf), L_pmap = points.   Source: FantasyWorld 2025."""
    mask, gt = batch["mask"], batch["depth"]
    relative = batch.get("relative")
    weight = batch.get("geo_weight", torch.ones(len(mask), device=mask.device))
    metric = weight if relative is None else weight * ~relative  # (B,) 0 for clips without a unit
    depths = depth_loss(pred, gt, mask, mode=cfg.depth_mode, weight=metric, cfg=cfg)
    if relative is not None:
        unitless = weight * relative
        depths = depths + depth_loss(pred, gt, mask, mode="ssi", weight=unitless, cfg=cfg)
    tgm, frame, conf = depths
    how = dict(gamma=cfg.gamma_conf, clip_weight=metric)
    point = points_loss(pred["points"], pred["points_conf"], batch["points"], mask, **how)
    has_unit = metric * mask[:, 0].flatten(1).any(1)  # translations have none without frame 0
    camera = camera_loss(pred["pose_enc"], batch["pose_enc"], cfg.camera_delta, has_unit)
    # (name, weight, loss) of all that is summed.  A new loss is a function and one line here.
    terms = [
        ("depth", 1, cfg.alpha_tgm * tgm + cfg.beta_frame * (frame + conf)),
        ("point", 1, point),
        ("camera", cfg.camera_weight, camera),
    ]
    loss = sum(weight * value for _, weight, value in terms)
    parts = {name: value for name, _, value in terms}
    pairs = still_pairs(gt, mask, 0.05)
    parts |= dict(tgm=tgm, frame=frame, valid_fraction=mask.float().mean())
    parts["tgm_fraction"] = pairs.sum() / max(1, pairs.numel())
    parts["depth_conf_mean"] = mean_where(pred["depth_conf"], mask)
    parts["point_conf_mean"] = mean_where(pred["points_conf"], mask)
    return loss, {name: value.detach() for name, value in parts.items()}
