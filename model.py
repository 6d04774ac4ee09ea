"""FantasyWorld: a frozen Wan video DiT plus a trainable geometry branch.

One forward gives velocity, depth, points and cameras (docs/architecture.svg is the same picture):

    prompt, start image, rays -> dit.embed
                                    |
                                   PCB        dit blocks 0 .. num_pcb-1; stage 2: + camera adapter i
                                    |------------------- bridge: D -> C, + camera and register
                                    |                       |    tokens, + pose embedding
    IRG step i:     dit block's attention half  |  frame block, global block's attention half
                             <- exchange, both ways (stage 2) ->
                    dit block's FFN half        |  global block's MLP half
                                    |                       |    layer output: frame + global block
                                velocity            depth, points, cameras (heads)

Shapes: B batch, T = 4(f-1)+1 pixel frames, (f, h, w) token grid, N = f*h*w video tokens,
P = 5 + h*w geometry tokens of one latent frame, D video width, C geometry width.
Latents (B, 16, f, 2h, 2w); video (B, 3, T, 16h, 16w).
Flow matching: sigma in [0, 1], 1 = noise; x_sigma = (1 - sigma) x0 + sigma noise;
velocity = noise - x0; t = 1000 sigma.
Stages: 0 trains the video branch alone (it made tiny/wan), 1 trains bridge and geometry branch,
2 adds camera adapters and exchange.  Sources: Wan 2.1 (video branch), VGGT 2025 (geometry blocks,
heads), FantasyWorld 2025 (arXiv 2509.21657)."""

import argparse
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

import released
from geometry import (
    NUM_SPECIAL,
    CameraHead,
    DPTHead,
    GeoBlock,
    LatentBridge,
    PoseEncoder,
    activate_depth,
    activate_points,
    plucker_rays,
    rope_2d,
    uv_embedding,
)
from wan import (
    VideoConditions,
    VideoSizes,
    WanDiT,
    attention,
    cast_matrices,
    rope_3d,
    rotate_pairs,
    shapes_of,
    split_heads,
    timestep_embedding,
)

try:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts
except ImportError:  # torch 2.4 has it under another name
    from torch.utils.checkpoint import (
        _pt2_selective_checkpoint_context_fn_gen as create_selective_checkpoint_contexts,
    )


EXCHANGES = ("both", "to_geometry", "to_video", "none")


@dataclass(frozen=True)
class Config(VideoSizes):
    """Sizes of both branches; those of the video branch are fields of VideoSizes."""

    num_pcb: int = 12  # dit blocks before the bridge; the other num_layers - num_pcb are IRG steps
    geo_dim: int = 1408
    geo_heads: int = 11
    bridge_layers: int = 2
    bridge_width: int = 320
    # 0.01 for released and VGGT weights; at 1.0 the camera head did not learn from scratch
    layer_scale: float = 0.1
    pose_hidden: int = 640
    irg_dim: int = 1152
    irg_heads: int = 12
    taps: tuple = (4, 8, 12, 17)  # geometry layers read by the DPT heads, finest level first
    dpt_channels: tuple = (64, 128, 256, 256)
    dpt_features: int = 128
    dpt_tail: int = 32
    camera_dim: int = 512
    camera_heads: int = 8
    camera_layers: int = 4
    camera_iterations: int = 4
    head_chunk: int = 16  # pixel frames, of all clips, that a DPT head fuses at once
    # the released weights: their quirks and their camera module (released.py)
    released: bool = False
    true_rays: bool = False  # released: true per-pixel rays in place of the ones it was trained on
    # released: widths of the ray encoder, features last; () for the Wan2.2 variant, without one
    ray_sizes: tuple = (384, 768, 5120, 2560, 2048)
    adapter_sizes: tuple = (25, 1024, 409)  # released: adapted blocks, hidden widths of an adapter
    # ablations: what is switched off is not built, so checkpoints, counts and gradients lack it too
    exchange: str = "both"  # of the IRG steps: both, to_geometry, to_video (one way) or none
    camera_adapters: bool = True
    pose_tokens: bool = True  # the camera token carries the embedding of the given pose
    constant_rays: bool = False  # the release's ray map, which tells the pose alone
    video_rays: bool = True  # False: the video branch sees no camera, as a base without control

    @property
    def geo_layers(self):
        return self.num_layers - self.num_pcb


# fmt: off
PRESETS = {
    "1.3b": Config(),
    "14b": Config(
        dim=5120, ffn_dim=13824, num_layers=40, in_dim=36, has_control=False, num_pcb=16,
        geo_dim=1024, geo_heads=16, bridge_layers=0, layer_scale=0.01, pose_hidden=128,
        taps=(23, 17, 11, 7), dpt_channels=(256, 512, 1024, 1024), dpt_features=256,
        camera_dim=2048, camera_heads=16,
    ),
    # The miniature in tiny/: both stages learn in minutes on two CPU cores.
    "tiny": Config(
        dim=144, ffn_dim=432, num_layers=8, in_dim=32, head_dim=24, text_dim=64, text_len=64,
        freq_dim=64, has_clip=False, num_pcb=4, geo_dim=96, geo_heads=4, bridge_layers=2,
        bridge_width=64, pose_hidden=128, irg_dim=96, irg_heads=3, taps=(0, 1, 2, 3),
        dpt_channels=(16, 24, 32, 32), dpt_features=24, dpt_tail=8, camera_dim=72, camera_heads=3,
        camera_layers=2,
    ),
}
# fmt: on


# ------------------------------------------------------------------------- interaction (stage 2)
class CameraAdapter(nn.Module):
    """Shift of video tokens before a PCB block by the camera of their frame; starts at zero."""

    def __init__(self, geo_dim, video_dim):
        super().__init__()
        self.linear = nn.Linear(geo_dim, video_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, pose_embedding, keep):
        """x (B, f*h*w, D), pose_embedding (B, f, C), keep (B, 1, 1) -> x, and nothing to add later.

        The release's adapter has the same interface, and acts inside the attention instead."""
        shift = self.linear(F.silu(pose_embedding)) * keep  # (B, f, D)
        return x + shift.repeat_interleave(x.shape[1] // shift.shape[1], 1), None


class BiCrossAttention(nn.Module):
    """Bidirectional video <-> geometry attention between the halves of both blocks.

    One score matrix is normalised along either direction.  Both streams are updated from the same
    pair, and the gates start at zero: stage 2 begins as stage 1 ended."""

    def __init__(self, video_dim, geo_dim, dim, heads, ways="both"):
        super().__init__()
        self.heads, self.ways = heads, ways
        # Under the release's names: m1 is the video, m2 the geometry.
        video, geometry = (video_dim, dim), (geo_dim, dim)
        sizes = dict(m1_proj=video, values_m1_proj=video, m2_proj=geometry, values_m2_proj=geometry)
        sizes |= dict(out_m1_proj=video[::-1], out_m2_proj=geometry[::-1])
        unused = {
            "to_geometry": ("values_m2_proj", "out_m1_proj"),
            "to_video": ("values_m1_proj", "out_m2_proj"),
        }.get(ways, ())
        layers = {name: nn.Linear(*size) for name, size in sizes.items() if name not in unused}
        self.cross_attn = nn.ModuleDict(layers)
        for layer in layers.values():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if ways != "to_geometry":
            self.gamma_m1 = nn.Parameter(torch.zeros(video_dim))
        if ways != "to_video":
            self.gamma_m2 = nn.Parameter(torch.zeros(geo_dim))

    def forward(self, x, z, rope_x, rope_z):
        """x (B, N, D), z (B, f*P, C) -> both, updated."""
        layers = self.cross_attn
        a = F.layer_norm(x, x.shape[-1:], eps=1e-6)  # (B, N, D)
        b = F.layer_norm(z, z.shape[-1:], eps=1e-6)  # (B, f*P, C)
        q = rotate_pairs(split_heads(layers.m1_proj(a), self.heads), *rope_x)
        k = rotate_pairs(split_heads(layers.m2_proj(b), self.heads), *rope_z)
        if self.ways != "to_geometry":
            v = split_heads(layers.values_m2_proj(b), self.heads)
            x = x + self.gamma_m1 * layers.out_m1_proj(attention(q, k, v))  # (B, N, D)
        if self.ways != "to_video":  # the same scores, normalised the other way
            v = split_heads(layers.values_m1_proj(a), self.heads)
            z = z + self.gamma_m2 * layers.out_m2_proj(attention(k, q, v))  # (B, f*P, C)
        return x, z


# ---------------------------------------------------------------------------------- flow matching
def shift_sigma(s, shift=5.0):
    """Uniform s in [0, 1] -> sigma = shift s / (1 + (shift-1) s): more steps at high noise."""
    return shift * s / (1 + (shift - 1) * s)


def flow_matching_loss(velocity, latents, noise):
    """Mean squared error against noise - x0, per clip (B,), fp32."""
    return (velocity.float() - (noise - latents).float()).square().flatten(1).mean(1)


# ----------------------------------------------------------------------- activation checkpointing
CHECKPOINTING = ("none", "selective", "attention", "full")

KEEP_ABOVE = 4096  # FLOPs per byte

KERNELS = "flash_attention flash_attention_for_cpu efficient_attention cudnn_attention".split()
ATTENTION_OPS = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}") for name in KERNELS}


def keep_costly(linear, ctx, op, *args, **kwargs):
    """Policy of "selective": keep what costs over KEEP_ABOVE FLOPs per byte to compute again.

    Attention over n keys costs 4 n FLOPs per output value, a linear layer 2 in_features.  In bf16
    at the 1.3B sizes that keeps attention among all tokens of a clip (9,000 to 33,000) and the
    second layer of every MLP (5,632 and 8,960).  It recomputes the other layers (1,152 to 1,536),
    attention to text and inside a latent frame (1,024 to 1,564), and everything elementwise.
    "attention" (linear False) keeps attention alone: at 14B widths every linear layer is above the
    limit.  "full" keeps the input of a block only, "none" everything.  The DPT heads, with the
    largest maps of all, run in chunks of frames and are recomputed unless it is "none"."""
    packet = op.overloadpacket
    if packet in ATTENTION_OPS:
        cost = 4 * args[1].shape[-2] / args[0].element_size()
    elif linear and packet in (torch.ops.aten.addmm, torch.ops.aten.mm):
        cost = 2 * args[-2].shape[-1] / args[-2].element_size()
    else:
        cost = 0
    return cost > KEEP_ABOVE


def recompute(how, function, *args):
    """function(*args); backward computes its activations again, in part or (full) all of them."""
    if how == "none" or not torch.is_grad_enabled():
        return function(*args)
    options = dict(use_reentrant=False, preserve_rng_state=False)  # there is no dropout
    if how != "full":
        policy = partial(keep_costly, how == "selective")
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *args, **options)


# --------------------------------------------------------------------------------------- the steps
@dataclass(frozen=True)
class Conditions(VideoConditions):
    """What does not change with x and t, the camera's part for the geometry branch included."""

    pose_embedding: torch.Tensor | None = None  # (B, f, C) of the given poses
    rays: torch.Tensor | None = None  # (B, N, R) ray features, which the release's adapters read


@dataclass(frozen=True)
class Ropes:
    """cos and sin of every attention that is rotated, each (tokens, half of a head's channels)."""

    video: tuple  # (N, .) of the dit blocks
    frame: tuple  # (h*w, .) inside a latent frame
    clip: tuple  # (f*h*w, .) over the whole clip
    exchange_x: tuple  # (N, .) video side of the exchange
    exchange_z: tuple  # (f*P, .) geometry side: its special tokens are not rotated


@dataclass(frozen=True)
class Shared:
    """What all steps of one forward have in common."""

    conditions: Conditions  # the prompt's keys, above all
    e: torch.Tensor  # (B, D) the timestep as the velocity head reads it
    modulation: torch.Tensor  # (B, 6, D) shift, scale, gate of attention, then of the FFN
    modulation_z: torch.Tensor  # (B, 6, C) the same for the geometry blocks
    grid: tuple  # (f, h, w)
    ropes: Ropes
    camera: torch.Tensor | None  # what the camera adapters read; None before stage 2
    keep: torch.Tensor | float  # (B, 1, 1) 0/1: 0 hides the clip's camera
    exchange: bool  # whether the branches meet: stage 2
    recompute: str  # of CHECKPOINTING


class PCBStep(nn.Module):
    """Block i of the video branch, before the bridge, with its camera adapter.

    A step is what backward recomputes as one, and what is gathered as one where weights are sharded
    (lib/distributed.py).  Its parts are FantasyWorld's, under their names in checkpoints; a model
    keeps its steps in plain lists, so they add no names."""

    def __init__(self, i, block, adapter):
        super().__init__()
        self.i, self.block, self.adapter = i, block, adapter

    def forward(self, x, shared):
        """Video tokens x (B, N, D) -> the same shape."""
        with torch.no_grad():  # out here: recomputation would compute them twice
            keys = shared.conditions.keys_of(self.i, self.block)
        return self.step(x, keys, shared)

    def step(self, x, keys, shared):  # what train.py compiles: the checkpoint lies inside
        return recompute(shared.recompute, self.run, x, keys, shared)

    def run(self, x, keys, shared):
        x, inside = adapted(self.adapter, x, shared)
        return self.block(x, shared.modulation, keys, shared.ropes.video, inside)


class IRGStep(nn.Module):
    """Block i of the video branch beside a GeoDiT layer, the exchange between their halves."""

    def __init__(self, i, block, adapter, frame_block, global_block, exchange):
        super().__init__()
        self.i, self.block, self.adapter, self.exchange = i, block, adapter, exchange
        self.frame_block, self.global_block = frame_block, global_block

    def forward(self, x, z, shared):
        """One step of both branches.

        x        (B, N, D)     video tokens, or None: geometry alone
        z        (B, f*P, C)   geometry tokens
        returns  x, z, and the layer's output for the heads (B, f*P, 2C): frame and global block"""
        with torch.no_grad():
            keys = None if x is None else shared.conditions.keys_of(self.i, self.block)
        return self.step(x, z, keys, shared)

    def step(self, x, z, keys, shared):
        return recompute(shared.recompute, self.run, x, z, keys, shared)

    def run(self, x, z, keys, shared):
        f, ropes, modulation_z = shared.grid[0], shared.ropes, shared.modulation_z
        z_frame = self.frame_block(z, modulation_z, f, ropes.frame)  # (B, f*P, C)
        z = self.global_block.attend(z_frame, modulation_z, 1, ropes.clip)
        if x is not None:
            x, inside = adapted(self.adapter, x, shared)
            x = self.block.attend(x, shared.modulation, keys, ropes.video, inside)  # (B, N, D)
            if self.exchange is not None and shared.exchange:
                x, z = self.exchange(x, z, ropes.exchange_x, ropes.exchange_z)
            x = self.block.feed_forward(x, shared.modulation)
        z = self.global_block.feed_forward(z, modulation_z)
        return x, z, torch.cat([z_frame, z], -1)


def adapted(adapter, x, shared):
    """x with the camera's shift, and what is left to do inside the attention, or None."""
    if adapter is None or shared.camera is None:
        return x, None
    return adapter(x, shared.camera, shared.keep)


# ------------------------------------------------------------------------------------ FantasyWorld
def clear_tables():
    """Forget the tables of positions: real ones must not meet fake ones."""
    for table in (rope_2d, rope_3d, uv_embedding):
        table.cache_clear()


class FantasyWorld(nn.Module):
    """Frozen WanDiT (`dit`) + trainable geometry branch.

    set_stage(n) decides what trains and runs; checkpoint_activations is one of CHECKPOINTING."""

    def __init__(self, cfg, dit=None):
        super().__init__()
        self.cfg, self.checkpoint_activations = cfg, "none"
        n, C, D = cfg.geo_layers, cfg.geo_dim, cfg.dim
        if max(cfg.taps) >= n:
            raise ValueError(f"taps {cfg.taps}: this model has geometry layers 0 .. {n - 1}")
        if cfg.exchange not in EXCHANGES:
            wanted = "wanted both, to_geometry, to_video or none"
            raise ValueError(f"exchange = {cfg.exchange!r}; {wanted}")
        self.dit = dit or WanDiT(cfg)
        self.bridge = LatentBridge(D, C, cfg.bridge_layers, cfg.bridge_width, cfg.layer_scale)
        # The timestep modulates every geometry block, by zero at first: it begins as the plain one.
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, C), nn.SiLU(), nn.Linear(C, C))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        nn.init.zeros_(self.time_projection[1].weight)
        nn.init.zeros_(self.time_projection[1].bias)
        # Two sets of special tokens: of the first frame, and of all others.
        self.camera_token = nn.Parameter(1e-6 * torch.randn(1, 2, 1, C))
        self.register_token = nn.Parameter(1e-6 * torch.randn(1, 2, NUM_SPECIAL - 1, C))
        self.pose_encoder = PoseEncoder(cfg.pose_hidden, C)  # also feeds the camera adapters
        block = partial(GeoBlock, C, cfg.geo_heads, cfg.layer_scale)
        self.frame_blocks = nn.ModuleList(block() for _ in range(n))
        self.global_blocks = nn.ModuleList(block() for _ in range(n))
        tail = (cfg.dpt_channels, cfg.dpt_features, cfg.dpt_tail, cfg.released, cfg.head_chunk)
        self.depth_head = DPTHead(2 * C, 2, *tail)
        self.point_head = DPTHead(2 * C, 4, *tail)
        sizes = (cfg.camera_dim, cfg.camera_heads, cfg.layer_scale, cfg.camera_layers)
        self.camera_head = CameraHead(2 * C, *sizes, cfg.camera_iterations, cfg.released)
        with_rays = cfg.released and cfg.ray_sizes  # the blocks of the Wan2.2 variant read none
        self.ray_encoder = released.RayEncoder(cfg.ray_sizes) if with_rays else None
        self.camera_adapters = self.make_adapters()  # stage 2
        meet = partial(BiCrossAttention, D, C, cfg.irg_dim, cfg.irg_heads, cfg.exchange)
        self.exchange = nn.ModuleList(meet() for _ in range(n if cfg.exchange != "none" else 0))
        self.pcb, self.irg = self.make_steps()  # plain lists: no names in checkpoints
        self.set_stage(2)

    def make_adapters(self):
        cfg = self.cfg
        if cfg.released:
            count, *hidden = cfg.adapter_sizes
            sizes = (cfg.dim, *cfg.ray_sizes[-1:], *hidden)
            return nn.ModuleList(released.AttentionAdapter(*sizes) for _ in range(count))
        count = cfg.num_pcb if cfg.camera_adapters else 0
        return nn.ModuleList(CameraAdapter(cfg.geo_dim, cfg.dim) for _ in range(count))

    def make_steps(self):
        """The PCB's steps and the IRG's, in order.  What a config switches off is None there."""
        n, blocks = self.cfg.num_pcb, self.dit.blocks
        adapters = [*self.camera_adapters, *[None] * len(blocks)]
        exchange = self.exchange if len(self.exchange) else [None] * self.cfg.geo_layers
        pcb = [PCBStep(i, blocks[i], adapters[i]) for i in range(n)]
        layers = zip(range(n, len(blocks)), self.frame_blocks, self.global_blocks, exchange)
        return pcb, [IRGStep(i, blocks[i], adapters[i], *layer) for i, *layer in layers]

    @classmethod
    def from_released(
        cls, sd, wan_state_dict=None, dit_heads=None, irg_heads=None, camera_heads=None, taps=None
    ):
        """Build from the release's tensors, used as they are; every size is read off their shapes.

        sd              the release's model.pth, name -> tensor
        wan_state_dict  the base (released.base_of), for the video tensors that sd lacks
        dit_heads, irg_heads, camera_heads, taps   as in released.sizes
        Raises ValueError for missing, unexpected or misshapen tensors."""
        shapes, base = shapes_of(sd), shapes_of(wan_state_dict or {})
        sizes = released.sizes(shapes, base, dit_heads, irg_heads, camera_heads, taps)
        with torch.device("meta"):
            model = cls(Config(**sizes))
        own = shapes_of(model.state_dict())
        plan = released.match(own, shapes, base, model.cfg.num_pcb)
        sources = [wan_state_dict, sd]
        tensors = {k: sources[of_release][name] for k, (of_release, name) in plan.items()}
        model.load_state_dict({k: v.reshape(own[k]) for k, v in tensors.items()}, assign=True)
        return model

    # ---- stages
    def groups(self):
        """Module groups of the guide's parameter table."""
        timestep = [self.time_embedding, self.time_projection]
        rays = [self.ray_encoder] if self.ray_encoder else []
        return dict(
            wan=[self.dit],
            bridge=[self.bridge],
            geodit=[self.frame_blocks, self.global_blocks, *timestep],
            heads=[self.depth_head, self.point_head, self.camera_head],
            pose_encoder=[self.pose_encoder],
            tokens=[nn.ParameterList([self.camera_token, self.register_token])],
            camera_adapters=[self.camera_adapters, *rays],
            irg=[self.exchange],
        )

    TRAINED = {0: ("wan",), 1: ("bridge", "geodit", "heads", "pose_encoder", "tokens")}
    TRAINED[2] = TRAINED[1] + ("camera_adapters", "irg")

    def set_stage(self, stage):
        """Toggle requires_grad: 0 video branch, 1 geometry branch, 2 geometry and interaction."""
        if stage not in self.TRAINED:
            wanted = "must be 0 (video branch), 1 (geometry) or 2 (geometry + interaction)"
            raise ValueError(f"stage is {stage}, {wanted}")
        self.stage = stage
        for name, members in self.groups().items():
            for member in members:
                member.requires_grad_(name in self.TRAINED[stage])
        if not self.cfg.pose_tokens and (stage == 1 or not self.camera_adapters):
            self.pose_encoder.requires_grad_(False)  # nothing reads it
        for name, p in self.named_parameters() if self.cfg.released else ():
            if released.dead(name):
                p.requires_grad_(False)
        return self

    def count_parameters(self):
        """Parameters per group, dict with the keys of groups()."""
        groups = self.groups().items()
        return {k: sum(p.numel() for m in members for p in m.parameters()) for k, members in groups}

    def trainable_state_dict(self):
        """What a checkpoint holds: tensors that this stage trains, and the release's dead ones."""
        return {
            name: p.detach()
            for name, p in self.named_parameters()
            if p.requires_grad or self.cfg.released and released.dead(name)
        }

    # ---- forward
    def geometry_tokens(self, x, shared):
        """PCB output (B, N, D) -> [camera, registers, patches] of each frame, (B, f*P, C)."""
        f, pose_embedding = shared.grid[0], shared.conditions.pose_embedding
        patches = rearrange(self.bridge(x, f), "b (f n) c -> b f n c", f=f)
        later = (torch.arange(f, device=x.device) > 0).long()  # made on the device: no wait
        camera = self.camera_token[:, later].expand(len(x), -1, -1, -1)  # (B, f, 1, C)
        if pose_embedding is not None and self.cfg.pose_tokens:
            camera = camera + (pose_embedding * shared.keep)[:, :, None]
        registers = self.register_token[:, later].expand(len(x), -1, -1, -1)
        tokens = [camera, registers.to(camera.dtype), patches.to(camera.dtype)]
        return torch.cat(tokens, 2).flatten(1, 2).float()

    def at(self, t):
        """The model of a noise level, as lib.experts.Experts has it: itself."""
        return self

    def rays(self, w2c, K, size):
        """This model's kind of ray map (B, 6, T, H, W) or None; arguments as plucker_rays."""
        if not self.cfg.video_rays:
            return None
        quirk = self.cfg.constant_rays or self.cfg.released and not self.cfg.true_rays
        return released.constant_rays(w2c, K, size) if quirk else plucker_rays(w2c, K, size)

    def ropes(self, grid, device):
        f, h, w = grid
        cfg = self.cfg
        geo_dim, irg_dim = cfg.geo_dim // cfg.geo_heads, cfg.irg_dim // cfg.irg_heads
        return Ropes(
            video=rope_3d(f, h, w, cfg.head_dim, 0, device),
            frame=rope_2d(1, h, w, geo_dim, device),
            clip=rope_2d(f, h, w, geo_dim, device),
            exchange_x=rope_3d(f, h, w, irg_dim, 0, device),
            exchange_z=rope_3d(f, h, w, irg_dim, NUM_SPECIAL, device),
        )

    def conditions(self, context, clip=None, plucker=None, poses=None):
        """Prompt, CLIP tokens, rays and poses as steps read them; each makes its own keys, or all
        are made once per sampled video: with_keys(dit.blocks)."""
        with torch.no_grad():  # nothing trainable lies upstream
            video = vars(self.dit.conditions(context, clip, plucker))
        pose_embedding = rays = None
        if self.ray_encoder and self.stage == 2 and plucker is not None:
            rays = self.ray_encoder(plucker)
        if not self.cfg.released and poses is not None:
            pose_embedding = self.pose_encoder(poses)
        return Conditions(**video, pose_embedding=pose_embedding, rays=rays)

    def shared(self, t, grid, conditions, keep):
        """What the steps have in common, for timesteps t (B,) and a token grid."""
        device = self.camera_token.device
        with torch.no_grad():
            e, modulation = self.dit.modulation(t)
        with torch.autocast(device.type, enabled=False):
            embedding = timestep_embedding(t.to(device), self.cfg.freq_dim)  # (B, freq_dim)
            modulation_z = self.time_projection(self.time_embedding(embedding))  # (B, 6*C)
        camera = conditions.rays if self.cfg.released else conditions.pose_embedding
        return Shared(
            conditions=conditions,
            e=e,
            modulation=modulation,
            modulation_z=modulation_z.unflatten(1, (6, -1)),
            grid=grid,
            ropes=self.ropes(grid, device),
            camera=camera if self.stage == 2 else None,
            keep=1.0 if keep is None else keep.float().view(-1, 1, 1),
            exchange=self.stage == 2,
            recompute=self.checkpoint_activations,
        )

    def forward(
        self,
        x,
        t,
        context,
        y=None,
        clip=None,
        plucker=None,
        poses=None,
        heads=True,
        video=True,
        keep=None,
        constants=None,
    ):
        """Velocity and geometry of noisy latents; x, t, context, y, clip, plucker as
        WanDiT.forward.

        poses      (B, T, 9)   pose encodings relative to frame 0, scene units; None = not given
        heads                  False skips depth, points and cameras
        video                  False skips the video tail and the exchange (stage 1 training: no
                               loss there has a gradient) and returns velocity None
        keep       (B,) 0/1    0 hides the clip's camera, exactly as plucker=None, poses=None would
        constants              conditions with all keys: then context, clip, plucker and poses are
                               not read
        returns    dict        velocity (B, 16, f, h, w); depth, depth_conf, points_conf (B, T, H,
                               W); points (B, T, H, W, 3) in the first camera's frame, scene units;
                               pose_enc (iterations, B, T, 9), last refinement last
        Raises ValueError for video=False where the exchange trains."""
        if self.stage == 0:
            return dict(velocity=self.dit(x, t, context, y, clip, plucker, keep, constants))
        if not video and self.stage == 2 and torch.is_grad_enabled():
            raise ValueError("video=False leaves the exchange of stage 2 without a gradient")
        conditions = constants or self.conditions(context, clip, plucker, poses)
        with torch.no_grad():
            x, grid = self.dit.embed(x, y, conditions.control, keep)  # (B, N, D), (f, h, w)
        shared = self.shared(t, grid, conditions, keep)

        # PCB.  In stage 1 nothing upstream of the bridge trains, so it keeps nothing for backward.
        with nullcontext() if self.stage == 2 else torch.no_grad():
            for step in self.pcb:
                x = step(x, shared)  # (B, N, D)

        # Bridge, and the special tokens of every latent frame.
        z = self.geometry_tokens(x, shared)  # (B, f*P, C)

        # IRG: video blocks and GeoDiT layers side by side, the exchange between their halves.
        x, outputs = x if video else None, {}
        read = {*self.cfg.taps, self.cfg.geo_layers - 1} if heads else set()
        for layer, step in enumerate(self.irg):
            x, z, layer_output = step(x, z, shared)
            if layer in read:  # the others are freed at once
                outputs[layer] = layer_output  # (B, f*P, 2C)

        # Heads.
        velocity = self.dit.unpatchify(self.dit.head(x, shared.e), grid) if video else None
        geometry = self.read_out(outputs, grid) if heads else {}
        if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
            clear_tables()  # torch.export's are of one trace
        return dict(velocity=velocity, **geometry)

    def read_out(self, outputs, grid):
        """Geometry heads on layer -> output (B, f*P, 2C)."""
        f = grid[0]
        frames = {i: rearrange(z, "b (f p) c -> b f p c", f=f) for i, z in outputs.items()}
        maps = [frames[i][:, :, NUM_SPECIAL:] for i in self.cfg.taps]  # (B, f, h*w, 2C) each
        camera = frames[self.cfg.geo_layers - 1][:, :, 0]  # (B, f, 2C): the first token
        again = self.checkpoint_activations != "none"
        depth, depth_conf = activate_depth(self.depth_head(maps, grid, again))
        points, points_conf = activate_points(self.point_head(maps, grid, again))
        found = dict(depth=depth, depth_conf=depth_conf, points=points, points_conf=points_conf)
        return dict(found, pose_enc=self.camera_head(camera))


def half_geometry(model, dtype):
    """half_precision of the geometry branch, when nothing trains: cast once, not at every call."""
    ends = [head.scratch.output_conv2[2] for head in (model.depth_head, model.point_head)]
    kept = [model.dit, model.time_embedding, model.time_projection, *ends]
    return cast_matrices(model, dtype, kept)


# ----------------------------------------------------------------------------------- command line
# Millions of parameters in the training guide's table.
GUIDE = dict(wan=1616.3, bridge=5, geodit=900, heads=50, pose_encoder=1, tokens=0.01)
GUIDE |= dict(camera_adapters=30, irg=200)  # stage 2


def parameter_table(preset):
    """Rows of the guide's table beside ours, in millions; counted on the meta device."""
    with torch.device("meta"):
        model = FantasyWorld(PRESETS[preset])
    ours = {k: v / 1e6 for k, v in model.count_parameters().items()}

    def line(name, ours, guide):
        return f"{name:24s}{ours:10.2f}{guide:13.2f}{ours / guide:12.2f}"

    lines = [f"{'millions of parameters':30s}ours  guide, 1.3b  ours/guide   stage 1   stage 2"]
    for name, count in ours.items():
        state = ["train" if name in model.TRAINED[stage] else "frozen" for stage in (1, 2)]
        lines.append(f"{line(name, count, GUIDE[name])}   {state[0]:8s}  {state[1]}")
    for stage, guide in ((1, 956.0), (2, 1186.0)):
        total = sum(ours[name] for name in model.TRAINED[stage])
        lines.append(line(f"trainable, stage {stage}", total, guide))
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a head that has read enough ends it silently
    parser = argparse.ArgumentParser(description="Print the parameter table of a preset.")
    parser.add_argument("--preset", default="1.3b", choices=PRESETS, help="default 1.3b")
    print(parameter_table(parser.parse_args().preset))
