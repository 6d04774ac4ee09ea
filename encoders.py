"""Frozen encoders of a Wan folder: video VAE, umT5, CLIP vision tower; and finding them there.

Attribute names are the names in the official files: they load strictly, without a table; widths and
layer counts are read off the tensors.  Loaded parameters are frozen; every public call runs under
no_grad.  WanFolder finds the parts of a downloaded folder and loads each when it is asked for.
Shapes: B batch, T = 4k + 1 pixel frames, f = k + 1 latent frames, h = H/8, w = W/8, t frames of a
step, c channels, L tokens of a prompt, D width.  Video and images are in [-1, 1].
Latent 0 is frame 0 alone, latent l >= 1 is frames 4l-3 .. 4l.
Sources: Wan 2.1 report 2025 (VAE, conditioning), Chung 2023 (umT5), Raffel 2020 (T5), OpenCLIP."""

import hashlib
import html
import itertools
import json
import math
import os
import unicodedata
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import nn

from wan import LATENT, WanDiT, count_layers, load_strict, shapes_of

TEXT_LEN, PAD_ID, END_ID = 512, 0, 1

# fmt: off
# Per-channel statistics of the latents, published with Wan 2.1: the DiT sees (mu - mean) / std.
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on
# Of the RGB images in [0, 1] that CLIP was trained on.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# --- Loading.  Models are built on the meta device and given the file's own tensors: no copy.
def check_whole(path):
    """ValueError for what is no file, or takes its place until its download is finished."""
    if os.path.exists(path) and not os.path.isfile(path):  # opened, a pipe would wait for ever
        raise ValueError(f"{path}: a pipe or a folder; name a file in it, as latest.safetensors")
    with open(path, "rb") as file:
        pointer = file.read(15) in (b"version https:/", b"/annex/objects/")
    # aria2 gives a file its whole length at once, with zeros where bytes are missing.
    if pointer or os.path.exists(f"{path}.aria2"):
        cure = "git lfs pull, git annex get, or the same aria2 command again"
        raise ValueError(f"{path}: its download is not finished. Fix: {cure}")


def load_state_dict(path):
    """Named CPU tensors of a .safetensors or .pth file, paged in from disk only when used."""
    check_whole(path)
    try:
        if str(path).endswith(".safetensors"):
            tensors = safetensors.torch.load_file(path)
        else:
            paged = zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be mapped
            tensors = nested(torch.load(path, "cpu", weights_only=True, mmap=paged))
    except Exception as error:  # flipped bytes make the two readers raise almost any class of error
        found = f"{os.path.getsize(path):,} bytes that cannot be read as a dict of tensors"
        why = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        raise ValueError(f"{path}: {found}. Fix: download it again ({why})") from None
    if not tensors:
        raise ValueError(f"{path}: wanted a dict of named tensors, found none")
    scaled = [n for n in tensors if n.endswith((".scale_weight", ".weight_scale", "scaled_fp8"))]
    if scaled:
        raise ValueError(f"{path}: fp8 with scales ({scaled[0]}) is not read; take the bf16 file")
    return tensors


def _load(sd, family, build):
    """Model build(name -> shape) that holds the tensors of sd, whose names and shapes must fit."""
    try:
        with torch.device("meta"):
            model = build(shapes_of(sd))
    except (KeyError, IndexError, ValueError) as error:
        first = ", ".join(itertools.islice(sd, 4))
        found = f"its sizes cannot be read, {error!r}. Found {len(sd)} tensors: {first} ..."
        cure = "Those for transformers and diffusers have other names: take the official file"
        raise ValueError(f"not a {family}: {found} {cure}") from error
    return load_strict(model, sd, f"not a {family}").requires_grad_(False).eval()


# --- Video VAE.  `state` maps a layer to what it keeps between steps.  It lives in a call, not in
# --- the modules: nothing leaks into the next clip, not even after an exception.
class CausalConv3d(nn.Conv3d):
    """Conv3d over the present frame and the two before it, zero before the clip's first."""

    def __init__(self, dim_in, dim_out, kernel=(3, 3, 3)):
        super().__init__(dim_in, dim_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x, state):
        history = state[self] if self in state else x.new_zeros(*x.shape[:2], 2, *x.shape[3:])
        x = torch.cat([history, x], dim=2)  # (B, c, 2 + t, ...)
        # A view would keep the whole step alive until the next one.
        state[self] = x[:, :, -2:].clone()
        real = type(x) is torch.Tensor and x.device.type == "cpu" and x.dtype == torch.float32
        if real and len(x) == 1 and torch.backends.mkldnn.is_available():
            # As F.conv3d does for batches; what it does for one small clip is four times slower.
            how = (self.padding, self.stride, self.dilation, self.groups)
            return torch.mkldnn_convolution(x, self.weight, self.bias, *how)
        return super().forward(x)  # (B, dim_out, t, ...)


class ChannelNorm(nn.Module):
    """Each position's channels scaled to length sqrt(c), then by gamma (Zhang & Sennrich 2019)."""

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
        qkv = qkv.contiguous() if qkv.is_cuda else qkv  # dense: else its scores are stored
        y = F.scaled_dot_product_attention(*qkv)  # (B*t, 1, h*w, c)
        y = self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=x.shape[3]))
        return x + rearrange(y, "(b t) c h w -> b c t h w", b=len(x))


class Chain(nn.Sequential):
    """nn.Sequential that passes `state` to layers that keep some; indices are official names."""

    def flat(self):
        """Layers of nested chains too: a call of a chain would hold its input until it ends."""
        for layer in self:
            yield from layer.flat() if isinstance(layer, Chain) else [layer]

    def forward(self, x, state):
        for layer in self.flat():
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
    """Halve height and width; if temporal the frames too, but for the clip's first."""

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
    """Double height and width; if temporal the frames too, but for the clip's first."""

    def __init__(self, dim, temporal):
        super().__init__()
        double = nn.Upsample(scale_factor=2, mode="nearest-exact")
        self.resample = nn.Sequential(double, nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x, state):
        # time_conv never sees frame 0, not even as history of frame 1.
        alone = 0 if self in state else 1
        state[self] = True
        if self.time_conv is not None and x.shape[2] > alone:
            y = self.time_conv(x[:, :, alone:], state)
            y = rearrange(y, "b (j c) t h w -> b c (t j) h w", j=2)
            x = torch.cat([x[:, :, :alone], y], dim=2)  # (B, c, 2t - alone, h, w)
        y = self.resample(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(y, "(b t) c h w -> b c t h w", b=len(x))  # (B, c/2, ..., 2h, 2w)


def vae_middle(dim):
    return Chain(ResBlock(dim, dim), FrameAttention(dim), ResBlock(dim, dim))


def vae_encoder(dim, z_dim):
    """Chain (B, 3, t, H, W) -> (B, 2 z_dim, f, h, w)."""
    layers = []
    widths = itertools.pairwise([dim, dim, 2 * dim, 4 * dim, 4 * dim])
    for stage, (dim_in, dim_out) in enumerate(widths):
        layers += [ResBlock(dim_in, dim_out), ResBlock(dim_out, dim_out)]
        layers += [Downsample(dim_out, temporal=stage > 0)] if stage < 3 else []
    head = Chain(ChannelNorm(4 * dim), nn.SiLU(), CausalConv3d(4 * dim, 2 * z_dim))
    parts = dict(conv1=CausalConv3d(3, dim), downsamples=Chain(*layers))
    return Chain(OrderedDict(parts, middle=vae_middle(4 * dim), head=head))


def vae_decoder(dim, z_dim):
    """Chain (B, z_dim, f, h, w) -> (B, 3, t, H, W)."""
    layers, dim_in = [], 4 * dim
    for stage, dim_out in enumerate([4 * dim, 4 * dim, 2 * dim, dim]):
        layers += [ResBlock(dim_in, dim_out), *(ResBlock(dim_out, dim_out) for _ in range(2))]
        layers += [Upsample(dim_out, temporal=stage < 2)] if stage < 3 else []
        dim_in = dim_out // 2
    head = Chain(ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, 3))
    parts = dict(conv1=CausalConv3d(z_dim, 4 * dim), middle=vae_middle(4 * dim))
    return Chain(OrderedDict(parts, upsamples=Chain(*layers), head=head))


class WanVAE(nn.Module):
    """Causal video autoencoder in steps, whose size sets speed and memory, not the result.  Memory
    does not grow with the clip; input may stay on the CPU: a step moves its own frames."""

    def __init__(self, dim=96, z_dim=LATENT.channels, decoder_dim=None):
        super().__init__()
        self.encoder = vae_encoder(dim, z_dim)
        self.decoder = vae_decoder(decoder_dim or dim, z_dim)
        self.conv1, self.conv2 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1), nn.Conv3d(z_dim, z_dim, 1)

    @classmethod
    def from_state_dict(cls, sd):
        """Tensors of the VAE file, shared -> VAE; ValueError on missing or unexpected ones."""

        def build(shapes):
            wide = shapes["decoder.head.0.gamma"][0]  # a decoder may be wider than its encoder
            return cls(shapes["encoder.conv1.weight"][0], decoder_dim=wide)

        return _load(unwrapped(sd), f"Wan 2.1 VAE ({PARTS['vae']})", build)

    @torch.no_grad()
    def encode(self, video, chunk=4):
        """Normalised posterior mean; nothing is sampled, so latents can be cached.

        video     (B, 3, T, H, W)     [-1, 1]; T = 4k + 1, H and W multiples of 8
        chunk     multiple of 4       pixel frames per step after the first frame; None: all
        returns   (B, 16, f, h, w)    fp32, (mu - mean) / std, on the VAE's device"""
        B, c, T, H, W = video.shape
        fits = video.is_floating_point() and (chunk is None or chunk >= 4 and chunk % 4 == 0)
        if c != 3 or T % 4 != 1 or H % 8 or W % 8 or not fits:
            how = "floats (B, 3, 4k + 1, 8h, 8w), chunk 4, 8 ... or None. Trim or resize the clip."
            raise ValueError(f"video {tuple(video.shape)} {video.dtype}, {chunk=}; wanted {how}")
        state, mu = {}, []
        for start, end in itertools.pairwise([0, *range(1, T, chunk), T] if chunk else [0, T]):
            moments = self.conv1(self.encoder(video[:, :, start:end].to(self.conv1.weight), state))
            mu.append(moments.chunk(2, dim=1)[0].float())  # (B, 16, f of this step, h, w)
        statistics = torch.tensor([LATENT_MEAN, LATENT_STD], device=moments.device)
        mean, std = statistics.view(2, 1, -1, 1, 1, 1)
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
            found = f"latents {tuple(latents.shape)} by {chunk=}"
            raise ValueError(f"{found}; wanted (B, 16, f, h, w) by >= 1")
        state, device = {}, self.conv2.weight.device
        mean, std = torch.tensor([LATENT_MEAN, LATENT_STD], device=device).view(2, 1, -1, 1, 1, 1)
        video = torch.empty(B, 3, 4 * f - 3, 8 * h, 8 * w, device=device)
        for start, end in progress(list(itertools.pairwise([*range(0, f, chunk or f), f]))):
            z = (latents[:, :, start:end].to(mean) * std + mean).to(self.conv2.weight)
            video[:, :, max(0, 4 * start - 3) : 4 * end - 3] = self.decoder(self.conv2(z), state)
        return video.clamp_(-1, 1)


# --- Text.
def relative_buckets(position, buckets, max_distance=128):
    """(L,) -> (L, L) bucket of key - query: half for keys to the right; logarithmic when far."""
    position = position.cpu()  # the last bit of a GPU's log could move a border
    offset = position[None, :] - position[:, None]
    half, near, distance = buckets // 2, buckets // 4, offset.abs()
    far = torch.log(distance.clamp(min=1) / near) / math.log(max_distance / near) * (half - near)
    far = (near + far.long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


class UMT5Block(nn.Module):
    def __init__(self, dim, attn_dim, ffn_dim, heads, buckets):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        linear = partial(nn.Linear, bias=False)
        self.attn = nn.ModuleDict({name: linear(dim, attn_dim) for name in "qkv"})
        self.attn["o"] = linear(attn_dim, dim)
        gate = nn.Sequential(linear(dim, ffn_dim), nn.GELU("tanh"))
        ffn = dict(gate=gate, fc1=linear(dim, ffn_dim), fc2=linear(ffn_dim, dim))
        self.ffn = nn.ModuleDict(ffn)
        self.pos_embedding = nn.ModuleDict({"embedding": nn.Embedding(buckets, heads)})

    def attend(self, y, bucket):
        bias, split = self.pos_embedding["embedding"](bucket), "b l (n d) -> b n l d"  # (L, L, n)
        q, k, v = (rearrange(self.attn[name](y), split, n=bias.shape[2]) for name in "qkv")
        bias = rearrange(bias, "l m n -> 1 n l m")
        # T5 omits the 1 / sqrt(d).
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.attn["o"](rearrange(y, "b n l d -> b l (n d)"))

    def forward(self, x, bucket):
        x = x + self.attend(self.norm1(x), bucket)  # whose tensors, the bias above all, are gone
        y = self.norm2(x)
        return x + self.ffn["fc2"](self.ffn["fc1"](y) * self.ffn["gate"](y))


class UMT5Encoder(nn.Module):
    """T5 1.1 encoder with a relative bias table in every layer; by default umT5-xxl (5.7 B)."""

    def __init__(
        self, vocab=256384, dim=4096, attn_dim=4096, ffn_dim=10240, heads=64, buckets=32, layers=24
    ):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        block = partial(UMT5Block, dim, attn_dim, ffn_dim, heads, buckets)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    @classmethod
    def from_state_dict(cls, sd):
        """Tensors of the umT5 file, shared -> encoder; ValueError on missing or extra ones."""

        def build(shapes):
            vocab, dim = shapes["token_embedding.weight"]
            buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
            attn_dim = shapes["blocks.0.attn.q.weight"][0]
            ffn_dim = shapes["blocks.0.ffn.fc1.weight"][0]
            layers = count_layers(shapes, "blocks.")
            return cls(vocab, dim, attn_dim, ffn_dim, heads, buckets, layers)

        return _load(unwrapped(sd), f"umT5 encoder ({PARTS['text']})", build)

    @torch.no_grad()
    def forward(self, ids, mask=None):
        """Text embedding, zero at padding (the DiT attends to all 512 positions and expects zeros
        there).  Nobody attends to padding: only tokens are computed, at their own positions.

        ids       (B, L)       int64, L = 512 in Wan
        mask      (B, L)       1 at tokens, 0 at padding; None: all are tokens
        returns   (B, L, D)    the weights' dtype"""
        if mask is None:
            return self.encode(ids, torch.arange(ids.shape[1]))
        out = self.norm.weight.new_zeros(*ids.shape, len(self.norm.weight))
        for kept in (mask := mask.bool()).unique(dim=0):  # prompts of one length run together
            rows, position = (mask == kept).all(1).nonzero(), kept.nonzero()[:, 0]
            out[rows, position] = self.encode(ids[rows, position], position)
        return out

    def encode(self, ids, position):
        """Tokens (B, L) at positions (L,) -> (B, L, D)."""
        table, x = self.blocks[0].pos_embedding["embedding"], self.token_embedding(ids)
        bucket = relative_buckets(position, table.num_embeddings).to(ids.device)
        for block in self.blocks:
            x = block(x, bucket)
        return self.norm(x)


def clean_prompt(text):
    """What Wan does to a prompt: repair text, decode HTML entities twice, single spaces.

    Without ftfy its everyday effects alone: full-width forms (as Chinese commas), quotes."""
    try:
        import ftfy

        text = ftfy.fix_text(text)
    except ImportError:
        quotes = str.maketrans("‘’“”", "''\"\"")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half letters
        text = unicodedata.normalize("NFKC", text).translate(quotes)
    return " ".join(html.unescape(html.unescape(text)).split())


class PromptTokenizer:
    """The tokenizer of the folder google/umt5-xxl, read from its tokenizer.json."""

    def __init__(self, folder):
        from tokenizers import Tokenizer  # imported here: training from caches does without it

        path = Path(folder) / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            said = f"cannot be read; it is part of a Wan2.1 download. {error}"
            raise ValueError(f"{path}: {said}") from error
        found = self.tokenizer.token_to_id("<pad>"), self.tokenizer.token_to_id("</s>")
        if found != (PAD_ID, END_ID):
            raise ValueError(f"{path}: not umT5's: <pad> and </s> are {found}, wanted (0, 1)")
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()  # the file's own might drop </s>

    def __call__(self, prompts):
        """Prompts -> ids, mask (n, 512) int64: cleaned, cut to 511 tokens, </s>, padding."""
        ids = torch.full((len(prompts), TEXT_LEN), PAD_ID)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self.tokenizer.encode(clean_prompt(prompt)).ids
            # Not every file appends </s>.
            tokens = tokens[:-1] if tokens[-1:] == [END_ID] else tokens
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
        qkv = self.attn["to_qkv"](self.norm1(x))
        qkv = rearrange(qkv, "b l (k n d) -> k b n l d", k=3, n=self.num_heads)
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
        """Tensors of the CLIP file, shared, with or without `visual.` -> tower.  Text tower and
        output head are skipped by name; ValueError on other missing or unexpected tensors."""
        named = unwrapped(sd).items()
        sd = {k: v for k, v in named if not k.startswith("textual.") and k != "log_scale"}
        unused = ("post_norm.weight", "post_norm.bias", "head")
        sd = {k: v for k, v in unwrapped(sd, ["visual."]).items() if k not in unused}
        layers = count_layers(sd, "transformer.")
        family = f"CLIP vision tower ({PARTS['image']})"
        return _load(sd, family, lambda size: cls(size["cls_embedding"][2], layers, num_heads))

    @torch.no_grad()
    def forward(self, images):
        """Image tokens, class token first.

        images    (B, 3, H, W)     [-1, 1]; squeezed to 224 x 224 as by Wan, without anti-aliasing
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


# --- A downloaded folder.  Parts are loaded one after another: peak memory is the largest one's.
PARTS = dict(
    tokenizer="google/umt5-xxl/tokenizer.json",
    text="models_t5_umt5-xxl-enc-bf16.pth",
    vae="Wan2.1_VAE.pth",
    image="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
)
EXPERTS = ("high", "low")  # of a Wan2.2 pair: of high and of low noise


def expert_folders(folder):
    """Folders of both experts of a Wan2.2 pair, high noise first, here or where the release of
    FantasyWorld keeps them; [] for a folder of one DiT."""
    for home in (Path(folder), Path(folder, "PAI", "Wan2.2-Fun-A14B-Control-Camera")):
        found = [home / f"{expert}_noise_model" for expert in EXPERTS]
        if all(path.is_dir() for path in found):
            return found
    return []


def wan_files(folder):
    """Weight files of a Wan folder's DiT, complete as its index says, or of a stage 0 run."""
    if not folder:
        return []
    found = sorted(Path(folder).glob("diffusion_pytorch_model*"))
    files = [str(path) for path in found if path.suffix in (".safetensors", ".pth")]
    for index in (path for path in found if path.name.endswith(".index.json")):
        check_whole(index)
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            wanted = {str(Path(folder, name)) for name in names}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index}: no index of shards ({error!r}); fetch it again") from None
        if absent := sorted(wanted - set(files)):
            first = f"first {absent[0]}; download them too"
            raise ValueError(f"{index}: {len(absent)} of {len(wanted)} shards are missing, {first}")
    return files or [str(path) for path in Path(folder).glob("latest.safetensors")]


def lazy_tensors(path):
    """name -> (shape, read) of a file of load_state_dict; read() alone touches the bytes.

    The pages of a mapping that were touched count against this process until it is closed: so a
    .safetensors file is opened for each tensor, and a .pth file mapped anew after every 64th part
    of it (2 MB at least: each time unpickles the names)."""
    mapped, part = {}, max(os.path.getsize(path) / 64, 2e6)

    def read(name):
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        if not mapped or mapped["read"] > part:
            mapped.clear()
            mapped.update(tensors=load_state_dict(path), read=0)
        mapped["read"] += mapped["tensors"][name].nbytes
        return mapped["tensors"][name]

    return {k: (tuple(v.shape), partial(read, k)) for k, v in load_state_dict(path).items()}


# What trainers, compilers and other programs put before the names of tensors.
WRAPPINGS = ("pipe.", "model.", "dit.", "diffusion_model.", "module.", "_orig_mod.", "ema.")


def unwrapped(tensors, wrappings=WRAPPINGS):
    """Tensors under their own names."""
    stripped = True
    while stripped and tensors:
        stripped = next((p for p in wrappings if all(n.startswith(p) for n in tensors)), "")
        tensors = {name.removeprefix(stripped): value for name, value in tensors.items()}
    return tensors


def nested(loaded):
    """The tensors of a .pth file, which a trainer may have put into a dict of its own."""
    while isinstance(loaded, dict) and not any(map(torch.is_tensor, loaded.values())):
        inner = [k for k in ("state_dict", "model", "module", "model_state", "ema") if k in loaded]
        if not inner:
            break
        loaded = loaded[inner[0]]
    return {k: v for k, v in loaded.items() if torch.is_tensor(v)}


def tensor_shapes(tensors):
    return {name: shape for name, (shape, _) in tensors.items()}


def wan_sources(folder):
    """Files of the one DiT in a Wan folder or a stage 0 run."""
    if expert_folders(folder):
        cure = "name one of them, high_noise_model or low_noise_model; train.py: --expert"
        raise ValueError(f"wan_dir = {folder}: a pair of experts; {cure}")
    if files := wan_files(folder):
        return files
    lacks = "no diffusion_pytorch_model*.safetensors (Wan2.1), no latest.safetensors (stage 0)"
    there = ", ".join(sorted(os.listdir(folder))[:9] if os.path.isdir(folder) else []) or "nothing"
    raise ValueError(f"wan_dir = {folder}: {lacks}, but {there}. Fix: see the end of docs/wan.md")


def wan_tensors(folder):
    """name -> (shape, read) of the DiT in a Wan folder or stage 0 run."""
    tensors = {}
    for file in wan_sources(folder):
        found = lazy_tensors(file)
        if twice := found.keys() & tensors:
            raise ValueError(f"{file}: {min(twice)} is also in another file; remove one of them")
        tensors.update(found)
    return unwrapped(tensors)


def wan_family(folder):
    """What the DiT of a Wan folder takes, as "wan32clip" (inputs, CLIP tokens)."""
    folder = (expert_folders(folder) or [folder])[-1]
    shapes = tensor_shapes(wan_tensors(folder))
    # No name or shape depends on the heads: 1 divides every width.
    found = WanDiT.from_shapes(shapes, head_dim=1, where=folder).sizes
    return f"wan{found.in_dim}{'clip' if found.has_clip else ''}"


MINIATURE = str(Path(__file__).resolve().parent / "tiny" / "wan")  # the one in this repository


def encoder_folders(folder):
    """Where the encoders of a video branch may lie: those of a stage 0 run where it started from,
    those of an expert beside it or where the release of FantasyWorld has them."""
    folder = Path((expert_folders(folder) or [folder])[-1])
    run = folder / "latest.safetensors"
    if wan_files(folder) == [str(run)]:
        with safe_open(run, "pt") as file:
            options = json.loads((file.metadata() or {}).get("train_config", "{}"))
        source = options.get("wan_dir") if isinstance(options, dict) else ""
        if not source or Path(source).resolve() == folder.resolve():
            raise ValueError(f"{run}: it started without a Wan folder, so it has no encoders")
        return encoder_folders(options["wan_dir"])
    alone = folder.name not in [f"{expert}_noise_model" for expert in EXPERTS]
    return [folder] if alone else [folder.parent, folder.parent / "../../Wan-AI/Wan2.1-T2V-1.3B"]


class WanFolder:
    """Encoders of a Wan2.1 folder on a device.  load_* read a part from disk; dropping the result
    frees it.  Those of a stage 0 run are the encoders of the folder that it started from.

    fingerprint   family and a hash of the encoder files' names and sizes: caches are named by it
    start_pad     "constant" where grey frames follow an encoded start image (36 inputs), or None
    load_image    None when the family has no CLIP tokens"""

    def __init__(self, folder, device):
        family, self.device = wan_family(folder), torch.device(device)
        places = encoder_folders(folder)
        self.start_pad = "constant" if family.startswith("wan36") else None
        self.load_image = self.load_clip if family.endswith("clip") else None
        self.files = {}
        for part, name in PARTS.items() if self.load_image else list(PARTS.items())[:-1]:
            usual = [place / name for place in places]
            found = [each for path in usual for each in (path.with_suffix(".safetensors"), path)]
            self.files[part] = next((path for path in found if path.is_file()), usual[0])
            if not self.files[part].is_file():
                cure = f"wanted the {part} encoder of a Wan download (a link to another's will do)"
                raise ValueError(f"{usual[0]}: no such file; {cure}")
            check_whole(self.files[part])  # now: the last one is read when hours of work are done
        stamp = "".join(f"{path.name} {path.stat().st_size} " for path in self.files.values())
        self.fingerprint = f"{family}-{hashlib.md5(stamp.encode()).hexdigest()[:8]}"
        self.half = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def build(self, part, kind):
        """The encoder of a part; what does not fit is named with its file."""
        tensors = load_state_dict(self.files[part])
        try:
            return kind.from_state_dict(tensors)
        except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{self.files[part]}: {error}") from None

    def load_text(self):
        """umT5 in the file's bf16: f(prompts) -> list of (L, 4096), L a prompt's own length."""
        tokenizer = PromptTokenizer(self.files["tokenizer"].parent)
        encoder = self.build("text", UMT5Encoder).to(self.device)
        if encoder.token_embedding.weight.element_size() == 1:  # fp8 holds, but does not compute
            encoder = encoder.to(torch.bfloat16)

        def encode(prompts):
            assert not isinstance(prompts, str), "wanted a list; a text is one of its letters"
            ids, mask = (x.to(self.device) for x in tokenizer(prompts))
            return [row[kept] for row, kept in zip(encoder(ids, mask), mask.bool())]

        return encode

    def load_clip(self):
        """CLIP vision tower: f(images (B, 3, H, W)) -> (B, 257, 1280); bf16 on a GPU."""
        tower = self.build("image", CLIPVision).to(self.device, self.half)
        return lambda images: tower(images.to(self.device))

    def load_vae(self):
        """Video VAE in fp32, as the official code runs it."""
        return self.build("vae", WanVAE).to(self.device, torch.float32)


def encode_start(vae, image, frames, pad):
    """Start image (1, 3, 1, H, W) -> latents (1, 16, 1, h, w); or (1, 16, f, h, w) of it and the
    grey frames that follow (pad "constant"); of start and end image (1, 3, 2, H, W) likewise."""
    if not pad and image.shape[2] > 1:
        raise ValueError("an end image is for video branches of 36 inputs; this one has fewer")
    grey = frames - image.shape[2] if pad else 0
    clip = F.pad(image[:, :, :1], (0, 0, 0, 0, 0, grey))
    return vae.encode(torch.cat([clip, image[:, :, 1:]], 2))
