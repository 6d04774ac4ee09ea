"""The released FantasyWorld weights, both variants: camera module, tensor names, and VGGT's.

The modules of the releases are ours under other names, but for the camera module of the Wan2.1
variant: a Pluecker encoder, and one adapter inside the cross-attention of each of video blocks
0 .. 24.  The Wan2.2 variant has neither (ray_sizes is empty): Wan-Fun's control adapter, at the
patch embedding, tells its camera.  It is two such models, experts of high and of low noise
(lib/experts.py).  The quirks are kept, behind Config.released, as the weights expect them:

    ray map          intrinsics scaled twice: one ray a frame, the top-left pixel's.
                     constant_rays, below
    camera adapter   called adaLN, but a pure shift; added before the output projection.
                     AttentionAdapter, below
    camera head      latent frames become pixel frames group by group, not in time order; only the
                     first one passes the token norm; refinement starts from zero.
                     geometry.CameraHead
    DPT heads        the skip of a residual unit is clipped by an in-place ReLU; ReLU tail.
                     geometry.ResidualConvUnit
    dead tensors     CamTokenProjector, modulation of the camera trunk: kept, never used.
                     dead, below
    start image      Wan2.2: encoded in overlapping tiles.  Tiles, below

Sources: FantasyWorld 2025 (arXiv 2509.21657) and its releases of 2026; AC3D 2024 (ray encoder);
VGGT 2025.
Shapes: B clips, T = 4f - 3 frames, (f, h, w) token grid, N = f*h*w; widths D video, R rays."""

import re
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from geometry import LayerNorm, own_type, plucker_rays
from wan import LATENT, check_names, count_layers


# -------------------------------------------------------------------------------- the camera module
def constant_rays(w2c, K, size):
    """The release's ray map: plucker_rays of intrinsics that were multiplied by (W, H) a second
    time.

    Column u then looks through pixel coordinate u/W, row v through v/H: the footprint of the
    top-left pixel is spread over the whole frame, so that only the pose is told.  Arguments and
    result as geometry.plucker_rays; the principal point is put in the middle, as by the pose
    encoding that the release goes through."""
    height, width = size
    K = K.clone()
    K[..., 0, 2], K[..., 1, 2] = width / 2, height / 2
    rows = K[..., 0, :] * width, K[..., 1, :] * height, K[..., 2, :]  # numbers: no copy to wait for
    return plucker_rays(w2c, torch.stack(rows, -2), size)


def halve_time(x):
    """Average frames in pairs, (B, T, ...) -> (B, ceil(T/2), ...); an odd first frame stays."""
    first, rest = x[:, : x.shape[1] % 2], x[:, x.shape[1] % 2 :]
    return torch.cat([first, rest.unflatten(1, (-1, 2)).mean(2)], 1)


class GroupNorm(nn.GroupNorm):
    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with own_type(x):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class RayEncoder(nn.Module):
    """Ray map (B, 6, T, H, W) at pixel rate -> a feature per video token (B, N, R).  Source: AC3D.

    sizes  (first, second, width, hidden, R): 384, 768, 5120, 2560, 2048 in the release"""

    def __init__(self, sizes):
        super().__init__()
        first, second, width, hidden, out = sizes
        self.controlnet_encode_first = nn.Sequential(
            nn.Conv2d(6 * LATENT.space**2, first, 1),
            GroupNorm(2, first),
            nn.Conv2d(first, first, 1),
            GroupNorm(2, first),
            nn.ReLU(),
        )
        self.controlnet_encode_second = nn.Sequential(
            nn.Conv2d(first, second, 1), GroupNorm(2, second), nn.ReLU()
        )
        patch = (1, LATENT.patch, LATENT.patch)
        self.patch_embedding = nn.Conv3d(second, width, patch, patch)
        self.fc = nn.Sequential(
            nn.Linear(width, hidden),
            LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, out),
            LayerNorm(out),
        )

    def forward(self, rays):
        x = F.pixel_unshuffle(rays.transpose(1, 2), LATENT.space)  # (B, T, 384, 2h, 2w)
        for encode in (self.controlnet_encode_first, self.controlnet_encode_second):
            maps = encode(x.flatten(0, 1))  # (B*T, ., 2h, 2w): the norms are per frame
            x = halve_time(maps.unflatten(0, x.shape[:2]))  # T -> (T+1)/2 -> f
        x = self.patch_embedding(x.transpose(1, 2))  # (B, width, f, h, w)
        return self.fc(rearrange(x, "b d f h w -> b (f h w) d"))  # (B, N, R)


class AttentionAdapter(nn.Module):
    """Shift of a block's cross-attention, before its output projection; starts at zero."""

    def __init__(self, dim, ray_dim, hidden, shift_hidden):
        super().__init__()

        def mlp(a, b, c):
            return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c))

        self.k_proj = nn.ModuleDict({"group1": nn.Linear(ray_dim, ray_dim)})
        self.k_proj["group2"] = mlp(dim, hidden, ray_dim)
        self.v_proj = nn.ModuleDict({"group2": mlp(ray_dim, shift_hidden, dim)})
        nn.init.zeros_(self.v_proj["group2"][2].weight)
        nn.init.zeros_(self.v_proj["group2"][2].bias)

    def forward(self, x, rays, keep):
        """x as it came, and what to do inside the attention; one interface with CameraAdapter.

        x (B, N, D), rays (B, N, R), keep (B, 1, 1) 0/1: 0 hides the camera."""
        return x, partial(self.shift, rays, keep)

    def shift(self, rays, keep, attended):
        """attended (B, N, D), by text and image -> the same, shifted."""
        hidden = self.k_proj["group1"](rays) + self.k_proj["group2"](attended)  # (B, N, R)
        return attended + keep * self.v_proj["group2"](hidden)


# --------------------------------------------------------------------------------- the start image
def spans(length, tile, stride):
    """(begin, end) of the tiles along one side; the last one ends with it."""
    begins = range(0, max(length - tile, 0) + stride, stride)
    return [(begin, min(begin + tile, length)) for begin in begins]


def tile_weight(span, length, overlap):
    """(end - begin,): 1 in the middle, falling linearly over the overlap with a neighbour."""
    begin, end = span
    place = torch.arange(end - begin)
    near = [place + 1] if begin else []
    near += [place.flip(0) + 1] if end < length else []
    return torch.stack([torch.full_like(place, overlap), *near]).amin(0) / overlap


class Tiles:
    """A VAE whose encode works in overlapping tiles, as the Wan2.2 release encodes its images.

    vae           with encode, as encoders.WanVAE
    tile, stride  (rows, columns) in latents
    Where tiles overlap the result is their mean; a weight is the smaller of both directions."""

    def __init__(self, vae, tile=(30, 52), stride=(15, 26)):
        self.vae, self.tile, self.stride = vae, tile, stride

    def encode(self, video):
        """(B, 3, T, H, W) in [-1, 1] -> latents (B, 16, f, h, w)."""
        size = [side // LATENT.space for side in video.shape[-2:]]
        total = weights = 0.0
        for rows, columns in product(*map(spans, size, self.tile, self.stride)):
            place = [slice(LATENT.space * a, LATENT.space * b) for a, b in (rows, columns)]
            latents = self.vae.encode(video[..., place[0], place[1]])
            overlaps = [a - b for a, b in zip(self.tile, self.stride)]
            y, x = map(tile_weight, (rows, columns), size, overlaps)
            weight = torch.minimum(y[:, None], x).to(latents)  # (rows, columns) of the tile
            around = (columns[0], size[1] - columns[1], rows[0], size[0] - rows[1])
            total = total + F.pad(latents * weight, around)
            weights = weights + F.pad(weight, around)
        return total / weights


# -------------------------------------------------------------------------------------------- names
def dead(name):
    """Whether one of our parameters belongs to the release but reaches no output."""
    return bool(re.match(r"pose_encoder\.|camera_head\.trunk\.\d+\.modulation$", name))


CAMERA_MODULE = "camera_condition.pose_encoder."  # only the Wan2.1 variant has it

HOME = {
    "dit.": "pipe.dit.",
    "ray_encoder.": CAMERA_MODULE,
    "bridge.proj.": "vggt.projection_head.",
    "pose_encoder.": "vggt.aggregator.CamTokenProjector.",
    "frame_blocks.": "vggt.aggregator.frame_blocks.",
    "camera_token": "vggt.aggregator.camera_token",
    "register_token": "vggt.aggregator.register_token",
}


def release_name(name, num_pcb):
    """The release's name of one of our tensors: its IRGBlock holds both branches of a step."""
    block = re.match(r"(dit\.blocks|camera_adapters|exchange|global_blocks)\.(\d+)\.(.+)", name)
    if not block:
        prefix = next((p for p in HOME if name.startswith(p)), "")
        return HOME.get(prefix, "vggt.") + name[len(prefix) :]
    kind, i, inner = block[1], int(block[2]), block[3]
    beside_video = dict(exchange="bicross_attention", global_blocks="x_agg")
    if kind in beside_video:
        return f"IRGBlock.{i}.{beside_video[kind]}.{inner}"
    inner = f"cross_attn.processor.{inner}" if kind == "camera_adapters" else inner
    if i < num_pcb:
        return f"pipe.dit.blocks.{i}.{inner}"
    return f"IRGBlock.{i - num_pcb}.x_dit.{inner}"


# Frozen encoders may travel in the file; ours come from the Wan folder.
ENCODERS = ("pipe.text_encoder.", "pipe.image_encoder.", "pipe.vae.")


def is_release(names):
    return any(name.startswith("IRGBlock.") for name in names)


def is_expert(names):
    """Whether a release is one of the Wan2.2 variant's pair."""
    return is_release(names) and not any(name.startswith(CAMERA_MODULE) for name in names)


# The video branches that the releases were trained on: of the one model, of an expert.
BASES = {False: "Wan2.1-I2V-14B-480P", True: "Wan2.2-Fun-A14B-Control-Camera"}


def base_of(release):
    """The name of the video branch that a release was trained on."""
    return BASES[is_expert(release)]


def shape_reader(release, base, num_pcb):
    """name -> shape in the release, or else in the base; ValueError where both lack it."""

    def shape(name):
        video = name.replace("IRGBlock.0.x_dit", f"blocks.{num_pcb}").replace("pipe.dit.", "")
        found = release.get(name) or base.get(video)
        if found:
            return found
        hint = f"; without --wan_dir (the folder of {base_of(release)}) the file must hold the "
        hint = "" if base or name.startswith("vggt") else f"{hint}video branch too"
        first = f"(its first names are {list(release)[:3]})"
        raise ValueError(f"not a whole FantasyWorld release: {name} is missing{hint} {first}")

    return shape


def heads_of(name, heads, width, usual):
    """The number of attention heads (None: of the usual width); ValueError unless they fit."""
    if heads is None and width % usual:
        raise ValueError(f"width {width} has no heads of {usual} channels; give {name}=")
    if heads is not None and width % heads:
        raise ValueError(f"{name} = {heads} does not divide the width {width}")
    return heads or width // usual


def usual_taps(steps):
    """Last, 3/4, 1/2 and 1/3 of the depth, finest level first."""
    return steps - 1, *(max(n - 1, 0) for n in (3 * steps // 4, steps // 2, steps // 3))


def sizes(release, base=None, dit_heads=None, irg_heads=None, camera_heads=None, taps=None):
    """Fields of model.Config that these tensors have.

    release  name -> shape  the release's model.pth, whole or without the frozen video tensors
    base     name -> shape  the Wan DiT it was trained on, for what release lacks
    heads                   numbers of attention heads; None: the release's head widths 128, 96 and
                            128 (40, 12 and 16 heads there)
    taps                    geometry layers that the DPT heads read; None: usual_taps
    Raises ValueError when it is another model's file."""
    base, steps = base or {}, count_layers(release, "IRGBlock.")
    of_base = count_layers(base, "blocks.")
    num_pcb = of_base - steps if base else count_layers(release, "pipe.dit.blocks.")
    shape = shape_reader(release, base, num_pcb)
    dim, in_dim = shape("pipe.dit.patch_embedding.weight")[:2]
    geo_dim = shape("vggt.projection_head.weight")[0]
    camera_dim = shape("vggt.camera_head.token_norm.weight")[0]
    irg_dim = shape("IRGBlock.0.bicross_attention.cross_attn.m1_proj.bias")[0]
    clip = ("IRGBlock.0.x_dit.cross_attn.k_img.weight", "img_emb.proj.1.weight")
    return dict(
        dim=dim,
        in_dim=in_dim,
        ffn_dim=shape("IRGBlock.0.x_dit.ffn.0.weight")[0],
        num_layers=num_pcb + steps,
        num_pcb=num_pcb,
        head_dim=dim // heads_of("dit_heads", dit_heads, dim, 128),
        text_dim=shape("pipe.dit.text_embedding.0.weight")[1],
        freq_dim=shape("pipe.dit.time_embedding.0.weight")[1],
        has_clip=clip[0] in release or clip[1] in base,
        has_control=is_expert(release),
        released=True,
        geo_dim=geo_dim,
        bridge_layers=0,
        layer_scale=0.01,
        geo_heads=geo_dim // shape("vggt.aggregator.frame_blocks.0.attn.q_norm.weight")[0],
        irg_dim=irg_dim,
        irg_heads=heads_of("irg_heads", irg_heads, irg_dim, 96),
        camera_dim=camera_dim,
        camera_heads=heads_of("camera_heads", camera_heads, camera_dim, 128),
        camera_layers=count_layers(release, "vggt.camera_head.trunk."),
        pose_hidden=shape("vggt.aggregator.CamTokenProjector.mlp.0.weight")[0],
        taps=tuple(taps or usual_taps(steps)),
        dpt_channels=tuple(shape(f"vggt.depth_head.projects.{i}.bias")[0] for i in range(4)),
        dpt_features=shape("vggt.depth_head.scratch.output_conv1.weight")[1],
        dpt_tail=shape("vggt.depth_head.scratch.output_conv2.0.weight")[0],
        **camera_sizes(release, shape),
    )


def camera_sizes(release, shape):
    """Fields of the camera module, which the Wan2.2 variant has none of."""
    if is_expert(release):
        shape("pipe.dit.control_adapter.conv.weight")  # there, or the base is another one
        return dict(ray_sizes=(), adapter_sizes=(0, 0, 0))
    adapter = "pipe.dit.blocks.0.cross_attn.processor."
    first, second = "controlnet_encode_first.0", "controlnet_encode_second.0"
    layers = (first, second, "patch_embedding", "fc.0", "fc.3")
    adapted = sum(name.endswith(".processor.k_proj.group1.bias") for name in release)
    hidden = [shape(f"{adapter}{kind}_proj.group2.0.bias")[0] for kind in "kv"]
    return dict(
        ray_sizes=tuple(shape(f"{CAMERA_MODULE}{layer}.bias")[0] for layer in layers),
        adapter_sizes=(adapted, *hidden),
    )


def match(own, release, base, num_pcb, where="this release"):
    """Where each of our tensors comes from.

    own, release, base  name -> shape
    returns             our name -> (True, release's name) or (False, name in the base)
    Raises ValueError unless every tensor of ours is found in one shape and every other name is
    used.  The base may hold what the release replaces; the release may hold the encoders."""
    names = {k: release_name(k, num_pcb) for k in own}
    plan = {f"dit.{name}": (False, name) for name in base if f"dit.{name}" in own}
    plan |= {k: (True, name) for k, name in names.items() if name in release}
    # Everything found, under the release's names: what is used, and what must not be left over.
    found = {names[k]: (release if r else base)[name] for k, (r, name) in plan.items()}
    bridge = names["bridge.proj.weight"]  # a 1x1x1 convolution there
    if bridge in found and found[bridge][2:] == (1, 1, 1):
        found[bridge] = found[bridge][:2]
    found |= {k: v for k, v in release.items() if k not in found and not k.startswith(ENCODERS)}
    found |= {f"{k} (of the Wan folder)": base[k] for k in base if f"dit.{k}" not in own}
    cure = f"A truncated file, another model, or another base than {base_of(release)}?"
    check_names({names[k]: shape for k, shape in own.items()}, found, where, cure=cure)
    return plan


# --------------------------------------------------------------------------------------------- VGGT
VGGT_NAMES = r"aggregator\.(?:(?:frame|global)_blocks\.(\d+)\..+|(?:camera|register)_token)"


def from_vggt(vggt, own, layers):
    """Which tensors of VGGT-1B start a stage 1 model of `layers` geometry layers.

    vggt, own  name -> shape
    returns    our name -> VGGT's, and the names that stay behind
    The first frame and global blocks and the tokens must fit, or the model would train from scratch
    without a word; the camera head is taken when its width fits.  The image encoder, the other
    heads and deeper blocks stay.  Source: VGGT 2025."""
    k = min(layers, count_layers(vggt, "aggregator.frame_blocks."))

    def first(shapes):
        found = {name: re.fullmatch(VGGT_NAMES, name) for name in shapes}
        return {name: shapes[name] for name, m in found.items() if m and int(m[1] or 0) < k}

    theirs, ours = first(vggt), first({f"aggregator.{name}": own[name] for name in own})
    width = theirs.get("aggregator.camera_token", (1024,))[-1]
    cure = f'--model_overrides=\'{{"geo_dim": {width}, "geo_heads": {max(1, width // 64)}}}\''
    cure = f"Its blocks and tokens fit geo_dim = {width} with heads of 64 channels: {cure}"
    rows = [name for name in ours if name.endswith(".modulation")]
    check_names(ours, theirs, f"VGGT's first {k} layers", cure=cure, optional=rows)
    plan = {name.removeprefix("aggregator."): name for name in theirs}
    camera = {name: shape for name, shape in vggt.items() if name.startswith("camera_head.")}
    if camera.items() <= own.items():
        plan.update(zip(camera, camera))
    used = set(plan.values())
    return plan, [name for name in vggt if name not in used]
