"""The Wan 2.1 video DiT family as one class: noisy latents and conditions -> velocity.

Attribute names are the keys of the official checkpoints, so loading is strict and needs no table.
Shapes: B batch, T = 4(f-1)+1 pixel frames, (f, h, w) token grid, N = f*h*w tokens, D width,
L words; latents (B, 16, f, 2h, 2w), video (B, 3, T, 16h, 16w).
Sources: Wan 2.1 (architecture, weights), Wan-Fun (control adapter), Peebles & Xie 2022 (adaLN)."""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
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

    def grid_of(self, frames, height, width):
        """(f, h, w) of the latents of a video."""
        return (frames - 1) // self.time + 1, height // self.space, width // self.space

    def nearest(self, frames, height, width):
        """The video size next to this one that divides into tokens: 4k + 1, multiples of 16."""
        token = self.space * self.patch  # pixels
        sides = (max(token, round(side / token) * token) for side in (height, width))
        return max(1 + self.time, round((frames - 1) / self.time) * self.time + 1), *sides


LATENT = LatentGrid()

CLIP_SHAPE = (257, 1280)  # tokens of a start image, and their width

# Input channels of the families: noisy latents, start image and 4 mask channels.
INPUTS = {
    LATENT.channels: "text-to-video",
    2 * LATENT.channels: "Control-Camera",
    2 * LATENT.channels + 4: "image-to-video or InP",
}

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
@torch.inference_mode(False)  # kept: later calls may train
def rope_3d(f, h, w, head_dim, num_special, device):
    """cos, sin (f*(num_special + h*w), head_dim/2) fp32 of the time | row | column rotation of
    interleaved pairs.

    Each axis owns head_dim - 4*(head_dim//6), 2*(head_dim//6), 2*(head_dim//6) channels and its own
    spectrum 10000^(-2j/d).  The exchange's num_special leading tokens of a frame stay unrotated."""
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
    rotated = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)
    return torch.stack(rotated, -1).flatten(-2)


def split_heads(x, heads):
    """(B, N, D) -> (B, heads, N, d)."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def attention(q, k, v):
    """(B, heads, N, d) x 3 -> (B, N, D)."""
    # Rotated queries and keys are fp32; flash attention wants the type of the values.
    out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return rearrange(out, "b h n d -> b n (h d)")


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
        tokens = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)  # (B, N, D) each
        q, k, v = (split_heads(y, self.heads) for y in tokens)  # (B, heads, N, d)
        return self.o(attention(rotate_pairs(q, *rope), rotate_pairs(k, *rope), v))


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
        """[(k, v) of the text, then of an image], (B, heads, L, d): equal at all noise levels."""
        pairs = [(self.norm_k(self.k(text)), self.v(text))]
        if self.has_clip:
            pairs.append((self.norm_k_img(self.k_img(image)), self.v_img(image)))
        return [tuple(split_heads(y, self.heads) for y in pair) for pair in pairs]

    def forward(self, x, keys, adapter=None):
        q = split_heads(self.norm_q(self.q(x)), self.heads)
        out = attention(q, *keys[0])  # (B, N, D)
        for pair in keys[1:]:  # its own softmax: the image never competes with the text
            out = out + attention(q, *pair)
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
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def attend(self, x, modulation, keys, rope, adapter=None):
        """x (B, N, D) fp32 residual stream; modulation (B, 6, D) shift, scale, gate of attention,
        then of the FFN; keys of the cross-attention, whose output a release's adapter changes."""
        m = (self.modulation + modulation)[:, :3].unsqueeze(2)  # learned plus the timestep's
        shift, scale, gate = m.unbind(1)  # (B, 1, D) each
        y = torch.addcmul(shift, self.norm1(x), 1 + scale)  # one pass in place of two
        x = x + gate * self.self_attn(y, rope)
        return x + self.cross_attn(self.norm3(x), keys, adapter)  # neither gated nor modulated

    def feed_forward(self, x, modulation):
        m = (self.modulation + modulation)[:, 3:].unsqueeze(2)
        shift, scale, gate = m.unbind(1)  # (B, 1, D) each
        return x + gate * self.ffn(torch.addcmul(shift, self.norm2(x), 1 + scale))

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
    def __init__(self, dim):
        super().__init__()
        clip_dim = CLIP_SHAPE[1]
        self.proj = nn.Sequential(
            nn.LayerNorm(clip_dim),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, x):
        for layer in self.proj:  # the norms in fp32, as a GPU's autocast has them
            x = layer(x.float() if isinstance(layer, nn.LayerNorm) else x)
        return x


class ControlResidual(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


def stacked_frames(x):
    """(B, c, T, H, W) -> (B*f, 4c, H, W), channel c*4 + j: a latent frame's; frame 0 four times."""
    x = torch.cat([x[:, :, :1].expand(-1, -1, LATENT.time - 1, -1, -1), x], 2)
    return rearrange(x, "b c (f j) h w -> (b f) (c j) h w", j=LATENT.time)


class ControlAdapter(nn.Module):
    """Wan-Fun's camera control: rays (B, 6, T, H, W) -> (B, D, f, h, w), added to the tokens."""

    def __init__(self, dim):
        super().__init__()
        rays = 6 * LATENT.time * LATENT.space**2  # numbers of a latent: 4 frames of 8 x 8 pixels
        self.conv = nn.Conv2d(rays, dim, LATENT.patch, LATENT.patch)  # to tokens
        self.residual_blocks = nn.Sequential(ControlResidual(dim))

    def forward(self, plucker):
        x = stacked_frames(plucker)  # (B*f, 24, H, W)
        x = F.pixel_unshuffle(x, LATENT.space)  # (B*f, 24 * 64, 2h, 2w)
        x = self.residual_blocks(self.conv(x))  # (B*f, D, h, w)
        return rearrange(x, "(b f) d h w -> b d f h w", b=plucker.shape[0])


@dataclass(frozen=True)
class VideoSizes:
    """Of a video branch; all but head_dim and text_len are read off the tensors of real weights."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_layers: int = 30
    in_dim: int = 2 * LATENT.channels  # one of INPUTS
    head_dim: int = 128
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    has_clip: bool = True
    has_control: bool = True  # Pluecker rays through Wan-Fun's control adapter


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

    def __init__(self, sizes):
        super().__init__()
        dim = sizes.dim
        if dim % sizes.head_dim:
            raise ValueError(f"WanDiT: width {dim} is not a multiple of head_dim {sizes.head_dim}")
        self.sizes = sizes
        patch = (1, LATENT.patch, LATENT.patch)  # none in time
        self.patch_embedding = nn.Conv3d(sizes.in_dim, dim, patch, patch)
        linear = partial(nn.Linear, out_features=dim)
        self.text_embedding = nn.Sequential(linear(sizes.text_dim), nn.GELU("tanh"), linear(dim))
        self.time_embedding = nn.Sequential(linear(sizes.freq_dim), nn.SiLU(), linear(dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        block = partial(WanBlock, dim, sizes.ffn_dim, dim // sizes.head_dim, sizes.has_clip)
        self.blocks = nn.ModuleList(block() for _ in range(sizes.num_layers))
        self.head = WanHead(dim, LATENT.channels * LATENT.patch**2)
        self.img_emb = ClipProjection(dim) if sizes.has_clip else None
        self.control_adapter = ControlAdapter(dim) if sizes.has_control else None
        # From scratch (stage 0) the output starts as the input: nearly the velocity at high noise.
        nn.init.orthogonal_(self.patch_embedding.weight)
        latents = self.patch_embedding.weight[:, : LATENT.channels]
        with torch.no_grad():
            self.head.head.weight.copy_(rearrange(latents, "d c 1 p q -> (p q c) d"))

    @classmethod
    def from_shapes(cls, shapes, head_dim=128, text_len=512, where="these tensors"):
        """Empty model on the meta device, of sizes read off name -> shape, which it must fit."""
        try:
            sizes = VideoSizes(
                dim=shapes["patch_embedding.weight"][0],
                in_dim=shapes["patch_embedding.weight"][1],
                text_dim=shapes["text_embedding.0.weight"][1],
                ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
                freq_dim=shapes["time_embedding.0.weight"][1],
                num_layers=count_layers(shapes, "blocks."),
                head_dim=head_dim,
                text_len=text_len,
                has_clip="img_emb.proj.1.weight" in shapes,
                has_control="control_adapter.conv.weight" in shapes,
            )
        except (KeyError, IndexError) as error:
            found = f"tensor {error} is missing (the first names are {list(shapes)[:3]})"
            why = "A shard is missing, or it is a *-Diffusers copy in place of the official files"
            said = f"not a Wan2.1 DiT in the official layout: {found}. {why}"
            raise ValueError(f"{where}: {said}") from None
        odd = [UNSUPPORTED[k] for k in UNSUPPORTED if any(name.startswith(k) for name in shapes)]
        odd += [] if sizes.in_dim in INPUTS else [f"a family of {sizes.in_dim} input channels"]
        if odd:
            known = ", ".join(f"{name} ({inputs} inputs)" for inputs, name in INPUTS.items())
            raise ValueError(f"{where}: {odd[0]} is not supported; wanted one of {known}")
        with torch.device("meta"):
            empty = cls(sizes)
        check_names(shapes_of(empty.state_dict()), shapes, f"{where}: Wan2.1 DiT")
        return empty

    @classmethod
    def from_state_dict(cls, sd, head_dim=128, text_len=512):
        """From official tensors, used as they are; missing or extra names are a ValueError."""
        return load_strict(cls.from_shapes(shapes_of(sd), head_dim, text_len), sd, "Wan2.1 DiT")

    def modulation(self, t):
        """t (B,) -> e (B, D) for the head, modulation (B, 6, D) of every block."""
        device = self.patch_embedding.weight.device
        with torch.autocast(device.type, enabled=False):  # fp32: cheap, and halves the bf16 error
            e = self.time_embedding(timestep_embedding(t.to(device), self.sizes.freq_dim))
            return e, self.time_projection(e).unflatten(1, (6, -1))

    def conditions(self, context, clip=None, plucker=None):
        """Prompt, CLIP tokens and rays as the blocks read them; arguments as forward's."""
        device, layer = self.patch_embedding.weight.device, self.text_embedding[0]
        if not torch.is_tensor(context):
            # Padding is not masked: Wan attends to it, and so must we.
            padded = [F.pad(c, (0, 0, 0, self.sizes.text_len - c.shape[0])) for c in context]
            context = torch.stack(padded)  # (B, L, text_dim)
        text = self.text_embedding(context.to(device=device, dtype=layer.weight.dtype))
        image = control = None
        if self.img_emb is not None:
            if clip is None:
                clip = torch.zeros(len(context), *CLIP_SHAPE, device=device)
            image = self.img_emb(clip.to(device=device, dtype=self.img_emb.proj[1].weight.dtype))
        if self.control_adapter is not None and plucker is not None:
            control = self.control_adapter(plucker.to(self.patch_embedding.weight.dtype)).float()
        return VideoConditions(text, image, control)

    def embed(self, x, y=None, control=None, keep=None):
        """Latents (B, 16, f, 2h, 2w) [+ y, control] -> tokens (B, N, D) fp32, grid (f, h, w)."""
        in_dim = self.sizes.in_dim
        extra = in_dim - x.shape[1]
        if extra:
            y = x.new_zeros(x.shape[0], extra, *x.shape[2:]) if y is None else y
            if y.shape[1] != extra:
                family = f"{INPUTS.get(in_dim, 'this family')} ({in_dim} inputs)"
                raise ValueError(f"y has {y.shape[1]} channels; {family} wants {extra}")
            x = torch.cat([x, y.to(x.dtype)], 1)  # (B, in_dim, f, 2h, 2w)
        weight = self.patch_embedding.weight
        tokens = self.patch_embedding(x.to(weight.dtype)).float()  # (B, D, f, h, w)
        if control is not None:
            tokens = tokens + (control if keep is None else control * keep.view(-1, 1, 1, 1, 1))
        grid = tuple(tokens.shape[2:])
        # Dense here, or every tensor of the residual stream to the end would be transposed.
        return rearrange(tokens, "b d f h w -> b (f h w) d").contiguous(), grid

    def unpatchify(self, x, grid):
        """(B, N, 64), channel fastest -> (B, 16, f, 2h, 2w)."""
        (f, h, w), p = grid, LATENT.patch
        return rearrange(x, "b (f h w) (p q c) -> b c f (h p) (w q)", f=f, h=h, w=w, p=p, q=p)

    def forward(self, x, t, context, y=None, clip=None, plucker=None, keep=None, constants=None):
        """Velocity (B, 16, f, h, w) of noisy latents.

        x        (B, 16, f, h, w)         x_sigma
        t        (B,)                     1000 sigma, fp32, one per sample
        context  list of (L, text_dim)    zero-padded to text_len here; or a tensor, used as it is
        y        (B, in_dim-16, f, h, w)  start-image latents (and mask), None = zeros
        clip     (B, 257, 1280)           CLIP tokens of the start image, None = zeros
        plucker  (B, 6, T, 8h, 8w)        rays at pixel rate, None = no camera
        keep     (B,) 0/1                 0 drops the clip's camera, as plucker=None would
        constants                         conditions with all keys: then context, clip, plucker
                                          are not read"""
        e, modulation = self.modulation(t)
        constants = constants or self.conditions(context, clip, plucker)
        x, grid = self.embed(x, y, constants.control, keep)
        rope = rope_3d(*grid, self.sizes.head_dim, 0, x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, modulation, constants.keys_of(i, block), rope)  # (B, N, D)
        return self.unpatchify(self.head(x, e), grid)


def start_condition(start_latents, in_dim, frames, end=False):
    """Start latents (B, 16, 1 or f, h, w) -> y (B, in_dim-16, f, h, w) of the family, or None.

    32 inputs (Control-Camera): the image's latent in frame 0, zeros after.  36 (InP, I2V): 4 mask
    channels, 1 = known, before the latents of the image followed by grey frames (all f latent
    frames are then wanted).  end: the last pixel frame is known too, one of its latent's four."""
    extra = in_dim - start_latents.shape[1]
    if not extra:
        return None
    y = F.pad(start_latents, (0, 0, 0, 0, 0, frames - start_latents.shape[2]))
    if extra > LATENT.channels:
        mask = torch.zeros_like(y[:, : extra - LATENT.channels])
        mask[:, :, 0] = 1  # frame 0 is known
        if end:
            mask[:, -1, -1] = 1
        y = torch.cat([mask, y], 1)
    return y


def count_layers(names, prefix):
    """1 + the largest number after a prefix, of three digits at most: a stranger's name may say a
    million, and as many layers would be built before the first is missed."""
    numbers = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    return max((1 + int(n) for n in numbers if n.isdecimal() and len(n) < 4), default=0)


def shapes_of(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def check_names(wanted, found, what, *, cure="Is it another model, or cut short?", optional=()):
    """The one comparer of tensor names: ValueError that names the first of each difference.

    wanted, found  name -> shape   of the model, of the file
    what, cure     the error's beginning and its end
    optional       names that may be absent"""
    kinds = {
        "missing": [k for k in wanted if k not in found and k not in optional],
        "unexpected": [k for k in found if k not in wanted],
        "of another shape": [
            f"{k} is {found[k]}, wanted {v}" for k, v in wanted.items() if found.get(k, v) != v
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
