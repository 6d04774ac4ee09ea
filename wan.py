"""The Wan 2.1 video DiT family as one class: frozen, its attribute names are the official
checkpoint keys."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class LatentGrid(NamedTuple):
    """How a video becomes latents and tokens: the outside numbers of the Wan family."""

    channels: int = 16
    time: int = 4  # pixel frames of a latent frame, but for the first, which is alone
    space: int = 8  # pixels of a latent, each way
    patch: int = 2  # latents of a token, each way


LATENT = LatentGrid()

# Relatives that are refused by name: the first letters of a tensor name that gives them away.
UNSUPPORTED = {
    "img_emb.emb_pos": "first-and-last-frame conditioning (FLF2V)",
    "vace_": "VACE",
    "ref_conv.": "the reference frame of Fun-V1.1-Control",
}


def timestep_embedding(t, dim):
    """Sinusoid of t in [0, 1000], cosines first, angles in fp64: (B,) -> (B, dim) fp32."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[:, None] * frequencies  # (B, dim/2); in fp32 t = 999.9 would be coarse
    return torch.cat([angles.cos(), angles.sin()], -1).float()


@lru_cache(maxsize=16)
def rope_3d(f, h, w, head_dim, num_special, device):
    """cos, sin (f*(num_special + h*w), head_dim/2) fp32 of the time | row | column rotation of
    interleaved pairs.

    Each axis owns head_dim - 4*(head_dim//6), 2*(head_dim//6), 2*(head_dim//6) channels and its own
    spectrum 10000^(-2j/d).  num_special leading tokens of every frame are not rotated at all
    (exchange, geometry side)."""
    sizes = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (f, h, w)), indexing="ij")
    parts = []
    for place, d in zip(grid, sizes):  # fp64: 81 frames turn the fastest pair by many rounds
        spectrum = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        parts.append(place[..., None] * spectrum)  # (f, h, w, d/2)
    angles = torch.cat(parts, -1).reshape(f, h * w, head_dim // 2)
    # Angle 0 for the special tokens, which so are not rotated.
    angles = F.pad(angles, (0, 0, num_special, 0)).flatten(0, 1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate_pairs(x, cos, sin):
    """Rotate the interleaved pairs (2j, 2j+1) of x (B, heads, N, d) in real numbers, fp32 out."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, N, d/2) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def attention(q, k, v, heads):
    """(B, N, D) x 3 -> (B, N, D); q, k already split into heads when 4-d."""

    def split(x):
        return x if x.dim() == 4 else rearrange(x, "b n (h d) -> b h n d", h=heads)

    # Rotated queries and keys are fp32; flash attention wants the type of the values.
    q, k, v = split(q).to(v.dtype), split(k).to(v.dtype), split(v)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


# Attribute names are the official checkpoint's keys, so loading is strict and needs no table.
class RMSNorm(nn.Module):
    """Over the full width, before the split into heads; computed in fp32."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return y.to(x.dtype)


class WanSelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x, rope):
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(x))
        q, k = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (q, k))
        q, k = rotate_pairs(q, *rope), rotate_pairs(k, *rope)  # (B, heads, N, d)
        return self.o(attention(q, k, self.v(x), self.heads))


class WanCrossAttention(nn.Module):
    """Text and, in some families, CLIP image tokens: two softmaxes, one query and output."""

    def __init__(self, dim, heads, has_clip):
        super().__init__()
        self.heads, self.has_clip = heads, has_clip
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        if has_clip:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim)

    def keys_values(self, text, image):
        """[(k, v) of the text, then of an image], (B, L, D) each: the same at every noise level."""
        pairs = [(self.norm_k(self.k(text)), self.v(text))]
        if self.has_clip:
            pairs.append((self.norm_k_img(self.k_img(image)), self.v_img(image)))
        return pairs

    def forward(self, x, keys, adapter=None):
        q, (text, *image) = self.norm_q(self.q(x)), keys
        out = attention(q, *text, self.heads)
        for pair in image:  # its own softmax: the image never competes with the text
            out = out + attention(q, *pair, self.heads)
        # The release's camera adapter shifts what was attended, before it is projected.
        return self.o(out if adapter is None else adapter(out))


class WanBlock(nn.Module):
    """adaLN transformer block in two halves, so that the exchange can sit between them."""

    def __init__(self, dim, ffn_dim, heads, has_clip):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attn = WanSelfAttention(dim, heads)
        self.cross_attn = WanCrossAttention(dim, heads, has_clip)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def attend(self, x, modulation, keys, rope, adapter=None):
        """x (B, N, D) fp32 residual stream; modulation (B, 6, D) shift, scale, gate of attention
        then of the FFN; keys: keys_values of this block's cross-attention; adapter changes its
        output (released camera module)."""
        m = (self.modulation + modulation).unbind(1)  # learned rows plus the timestep's
        m = [row[:, None] for row in m]  # (B, 1, D) each
        x = x + m[2] * self.self_attn(self.norm1(x) * (1 + m[1]) + m[0], rope)
        return x + self.cross_attn(self.norm3(x), keys, adapter)  # neither gated nor modulated

    def feed_forward(self, x, modulation):
        m = (self.modulation + modulation)[:, 3:].unsqueeze(2)
        shift, scale, gate = m.unbind(1)  # (B, 1, D) each
        return x + gate * self.ffn(self.norm2(x) * (1 + scale) + shift)

    def forward(self, x, modulation, keys, rope, adapter=None):
        return self.feed_forward(self.attend(x, modulation, keys, rope, adapter), modulation)


class WanHead(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x, e):
        shift, scale = (self.modulation + e[:, None]).chunk(2, 1)  # (B, 1, D): per sample
        with torch.autocast(x.device.type, enabled=False):  # the velocity itself is never rounded
            return self.head(self.norm(x.float()) * (1 + scale) + shift)


class ClipProjection(nn.Module):
    def __init__(self, dim, clip_dim=1280):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(clip_dim),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, x):
        return self.proj(x)


class ControlResidual(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


def stacked_frames(x):
    """(B, c, T, H, W) -> (B*f, 4c, H, W), channel c*4 + j: the pixel frames of a latent frame.

    Frame 0 is a latent frame alone and fills its four places."""
    x = torch.cat([x[:, :, :1].expand(-1, -1, LATENT.time - 1, -1, -1), x], 2)
    return rearrange(x, "b c (f j) h w -> (b f) (c j) h w", j=LATENT.time)


class ControlAdapter(nn.Module):
    """Wan-Fun's camera control: rays (B, 6, T, H, W) -> (B, D, f, h, w), added to the tokens."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(24 * 64, dim, 2, 2)  # 6 x 4 numbers of 8 x 8 pixels, to tokens
        self.residual_blocks = nn.Sequential(ControlResidual(dim))

    def forward(self, plucker):
        x = stacked_frames(plucker)  # (B*f, 24, H, W)
        x = F.pixel_unshuffle(x, LATENT.space)  # (B*f, 24 * 64, 2h, 2w)
        x = self.residual_blocks(self.conv(x))  # (B*f, D, h, w)
        return rearrange(x, "(b f) d h w -> b d f h w", b=plucker.shape[0])


@dataclass(frozen=True)
class VideoConditions:
    """What does not change with x and t."""

    text: torch.Tensor  # (B, L, D) embedded prompt
    image: torch.Tensor | None  # (B, 257, D) embedded CLIP tokens
    control: torch.Tensor | None  # (B, D, f, h, w) of the rays, added to the tokens
    keys: tuple | None = None  # of every block: keys_values of its cross-attention

    def keys_of(self, i, block):
        """Keys and values of block i: kept ones, or made now."""
        return self.keys[i] if self.keys else block.cross_attn.keys_values(self.text, self.image)

    def with_keys(self, blocks):
        """The same with the keys of all blocks."""
        return replace(self, keys=tuple(self.keys_of(i, b) for i, b in enumerate(blocks)))


class WanDiT(nn.Module):
    """Wan2.1 video DiT: noisy latents and conditions -> velocity.  Sources: Wan 2.1, Wan-Fun."""

    def __init__(
        self,
        dim,
        ffn_dim,
        num_layers,
        in_dim=LATENT.channels,
        head_dim=128,
        text_dim=4096,
        text_len=512,
        freq_dim=256,
        has_clip=False,
        has_control=False,
        out_dim=LATENT.channels,
    ):
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"WanDiT: width {dim} is not a multiple of head_dim {head_dim}")
        self.heads, self.in_dim, self.out_dim = dim // head_dim, in_dim, out_dim
        self.freq_dim, self.text_len, self.head_dim = freq_dim, text_len, head_dim
        self.patch_embedding = nn.Conv3d(in_dim, dim, (1, 2, 2), (1, 2, 2))  # no patch in time
        self.text_embedding = nn.Sequential(
            nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            WanBlock(dim, ffn_dim, self.heads, has_clip) for _ in range(num_layers)
        )
        self.head = WanHead(dim, 4 * out_dim)
        self.img_emb = ClipProjection(dim) if has_clip else None
        self.control_adapter = ControlAdapter(dim) if has_control else None
        # From scratch (stage 0) the output starts as the input: at high noise the velocity nearly
        # is the noisy latent.
        nn.init.orthogonal_(self.patch_embedding.weight)
        with torch.no_grad():
            self.head.head.weight.copy_(
                rearrange(self.patch_embedding.weight[:, :out_dim], "d c 1 p q -> (p q c) d")
            )

    # What a config must say to build one; all but head_dim and text_len can be read off tensors.
    SIZES = (
        "dim ffn_dim num_layers in_dim head_dim text_dim text_len freq_dim has_clip has_control"
    ).split()

    @classmethod
    def from_shapes(cls, shapes, head_dim=128, text_len=512, where="these tensors"):
        """Empty model on the meta device, every size read off name -> shape.

        Raises ValueError unless it is a known family."""
        try:
            dim, in_dim = shapes["patch_embedding.weight"][:2]
            sizes = dict(
                text_dim=shapes["text_embedding.0.weight"][1],
                ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
                out_dim=shapes["head.head.weight"][0] // LATENT.patch**2,
                freq_dim=shapes["time_embedding.0.weight"][1],
                num_layers=1 + max(int(k.split(".")[1]) for k in shapes if k.startswith("blocks.")),
            )
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{where}: not a Wan2.1 DiT in the official layout: tensor {error} is missing (the "
                f"first names are {list(shapes)[:3]}). A shard is missing, or it is a *-Diffusers "
                f"copy in place of the official files"
            ) from None
        odd = [
            what for name, what in UNSUPPORTED.items() if any(k.startswith(name) for k in shapes)
        ]
        if odd or in_dim not in (16, 32, 36):
            raise ValueError(
                f"{where}: {odd[0] if odd else f'{in_dim} input channels'} is not supported; "
                "wanted "
                f"a text-to-video (16 inputs), Control-Camera (32) or image-to-video / InP (36) "
                f"family"
            )
        with torch.device("meta"):
            return cls(
                dim=dim,
                in_dim=in_dim,
                head_dim=head_dim,
                text_len=text_len,
                has_clip="img_emb.proj.1.weight" in shapes,
                has_control="control_adapter.conv.weight" in shapes,
                **sizes,
            )

    @classmethod
    def from_state_dict(cls, sd, head_dim=128, text_len=512):
        """From official tensors, used as they are; missing or extra names are a ValueError."""
        dit = cls.from_shapes(shapes_of(sd), head_dim, text_len)
        return load_strict(dit, sd, "Wan2.1 DiT")

    def modulation(self, t):
        """t (B,) -> e (B, D) for the head, modulation (B, 6, D) of every block."""
        device = self.patch_embedding.weight.device
        with torch.autocast(device.type, enabled=False):  # fp32: cheap, and halves the bf16 error
            e = self.time_embedding(timestep_embedding(t.to(device), self.freq_dim))
            return e, self.time_projection(e).unflatten(1, (6, -1))

    def conditions(self, context, clip=None, plucker=None):
        """Prompt, CLIP tokens and rays as the blocks read them; arguments as forward's."""
        device, layer = self.patch_embedding.weight.device, self.text_embedding[0]
        if not torch.is_tensor(context):
            # Padded rows are not masked: Wan attends to them, and so must we.
            rows = [F.pad(c, (0, 0, 0, self.text_len - c.shape[0])) for c in context]
            context = torch.stack(rows)  # (B, L, text_dim)
        text = self.text_embedding(context.to(device=device, dtype=layer.weight.dtype))
        image = None
        if self.img_emb is not None:
            if clip is None:
                clip = torch.zeros(len(context), 257, 1280, device=device)
            image = self.img_emb(clip.to(device=device, dtype=self.img_emb.proj[1].weight.dtype))
        return VideoConditions(text, image, self.control(plucker))

    def control(self, plucker):
        """Rays (B, 6, T, H, W) or None -> what they add to the tokens (B, D, f, h, w), or None."""
        if self.control_adapter is None or plucker is None:
            return None
        return self.control_adapter(plucker.to(self.patch_embedding.weight.dtype)).float()

    def constants(self, context, clip=None, plucker=None):
        """conditions with all keys, for forward(constants=...): made once per sampled video."""
        return self.conditions(context, clip, plucker).with_keys(self.blocks)

    def embed(self, x, y=None, control=None, keep=None):
        """Latents (B, 16, f, 2h, 2w) [+ y, control] -> tokens (B, N, D) fp32, grid (f, h, w)."""
        extra = self.in_dim - x.shape[1]
        if extra:
            y = x.new_zeros(x.shape[0], extra, *x.shape[2:]) if y is None else y
            if y.shape[1] != extra:
                raise ValueError(
                    f"y has {y.shape[1]} channels; this Wan family ({self.in_dim} inputs) wants "
                    f"{extra}"
                )
            x = torch.cat([x, y.to(x.dtype)], 1)  # (B, in_dim, f, 2h, 2w)
        weight = self.patch_embedding.weight
        tokens = self.patch_embedding(x.to(weight.dtype)).float()  # (B, D, f, h, w)
        if control is not None:
            tokens = tokens + (control if keep is None else control * keep.view(-1, 1, 1, 1, 1))
        grid = tuple(tokens.shape[2:])
        return rearrange(tokens, "b d f h w -> b (f h w) d"), grid

    def rope(self, grid, device):
        return rope_3d(*grid, self.head_dim, 0, device)

    def unpatchify(self, x, grid):
        """(B, N, 64), channel fastest -> (B, 16, f, 2h, 2w)."""
        f, h, w = grid
        return rearrange(x, "b (f h w) (p q c) -> b c f (h p) (w q)", f=f, h=h, w=w, p=2, q=2)

    def forward(self, x, t, context, y=None, clip=None, plucker=None, keep=None, constants=None):
        """Velocity (B, 16, f, h, w) of noisy latents.

        x        (B, 16, f, h, w)         x_sigma
        t        (B,)                     1000 sigma, fp32, one per sample
        context  list of (L, text_dim)    zero-padded to text_len here; or a (B, L, text_dim)
                                          tensor, used as it is
        y        (B, in_dim-16, f, h, w)  start-image latents (and mask), None = zeros
        clip     (B, 257, 1280)           CLIP tokens of the start image, None = zeros
        plucker  (B, 6, T, 8h, 8w)        rays at pixel rate, None = no camera
        keep     (B,) 0/1                 0 drops the clip's camera, as plucker=None would
        constants                         of the method of that name: then context, clip, plucker
                                          are not read"""
        e, modulation = self.modulation(t)
        constants = constants or self.constants(context, clip, plucker)
        x, grid = self.embed(x, y, constants.control, keep)
        rope = self.rope(grid, x.device)
        for block, keys in zip(self.blocks, constants.keys):
            x = block(x, modulation, keys, rope)  # (B, N, D)
        return self.unpatchify(self.head(x, e), grid)


def start_condition(start_latents, in_dim, frames):
    """Latents of the start image (B, 16, 1 or f, h, w) -> y (B, in_dim-16, f, h, w) of the family,
    or None.

    32 inputs (Control-Camera): the image's latent in frame 0, zeros after.  36 (InP, I2V): 4 mask
    channels, 1 = known, before the latents of the image followed by grey frames (all f latent
    frames are then wanted)."""
    extra = in_dim - start_latents.shape[1]
    if not extra:
        return None
    y = F.pad(start_latents, (0, 0, 0, 0, 0, frames - start_latents.shape[2]))
    if extra == 20:
        mask = torch.zeros_like(y[:, :4])
        mask[:, :, 0] = 1  # frame 0 is known
        y = torch.cat([mask, y], 1)
    return y


def shapes_of(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


TRUNCATED = "Is this another model or a truncated file?"


def check_names(wanted, found, what, *, cure=TRUNCATED, optional=()):
    """The one comparer of tensor names: ValueError that names the first of each difference.

    wanted, found  name -> shape   of the model, of the file
    what, cure     the error's beginning and its end
    optional       names that may be absent"""
    kinds = {
        "missing": [k for k in wanted if k not in found and k not in optional],
        "unexpected": [k for k in found if k not in wanted],
        "of another shape": [
            f"{k} is {found[k]}, wanted {shape}"
            for k, shape in wanted.items()
            if found.get(k, shape) != shape
        ],
    }
    faults = [f"{len(names)} {kind} {names[:3]}" for kind, names in kinds.items() if names]
    if faults:
        raise ValueError(f"{what}: tensors differ: {', '.join(faults)}. {cure}")


def load_strict(module, sd, what):
    """load_state_dict(assign=True) after check_names; returns the module."""
    check_names(shapes_of(module.state_dict()), shapes_of(sd), what)
    module.load_state_dict(sd, assign=True)  # the file's own tensors: there is no second copy
    return module


def half_precision(dit, dtype):
    """Big matrices of the frozen branch in dtype; norms, modulation, time MLP, head stay fp32."""
    return cast_matrices(dit, dtype, [dit.time_embedding, dit.time_projection, dit.head])


def cast_matrices(model, dtype, but):
    """Linear and convolution layers to dtype, except inside the modules `but`."""
    kept = {layer for module in but for layer in module.modules()}
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) and layer not in kept:
            layer.to(dtype)
    return model
