"""FantasyWorld: a frozen Wan2.1 video DiT plus a trainable geometry branch; one forward gives velocity, depth, points
and cameras.  Sources: Wan 2.1 (video branch), VGGT 2025 (geometry blocks, heads), FantasyWorld 2025 (arXiv 2509.21657).

    prompt, start image, rays -> dit.embed -> PCB: dit blocks 0 .. num_pcb-1   (stage 2: + camera adapter i)
                                                | bridge: D -> C, + camera and register tokens, + pose embedding
                                                v
    IRG step i:  frame block  ->  dit block attention | global block attention
                                  <-  bidirectional exchange (stage 2)  ->
                                  dit block FFN       | global block MLP        -> tap: concat(frame, global)
                                                |                                        |
                                             velocity                       depth, points, cameras (heads)

Shapes: B batch, T = 4(f-1)+1 pixel frames, (f, h, w) token grid, N = f*h*w video tokens, P = 5 + h*w geometry tokens
of one latent frame, D video width, C geometry width.  Latents (B, 16, f, 2h, 2w); video (B, 3, T, 16h, 16w).
Flow matching: sigma in [0, 1], 1 = noise; x_sigma = (1-sigma) x0 + sigma noise; velocity = noise - x0; t = 1000 sigma.
Stages: 0 trains the video branch alone (demo only), 1 trains bridge + geometry, 2 adds camera adapters + exchange."""

import argparse
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

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
)
from wan import WanDiT, attention, cast_matrices, rope_3d, rotate_pairs, timestep_embedding

try:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts
except ImportError:  # torch 2.4 has it under another name
    from torch.utils.checkpoint import (
        _pt2_selective_checkpoint_context_fn_gen as create_selective_checkpoint_contexts,
    )


@dataclass
class Config:
    # video branch: read off the tensors when real weights are loaded
    dim: int = 1536
    ffn_dim: int = 8960
    num_layers: int = 30
    in_dim: int = 32  # 16 noisy latents + y: 0 text-to-video, 16 start image, 20 mask + start image
    head_dim: int = 128
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    has_clip: bool = True
    has_control: bool = True  # Pluecker rays through Wan-Fun's control adapter
    # geometry branch
    num_pcb: int = 12  # dit blocks before the bridge; the other num_layers - num_pcb are IRG steps
    geo_dim: int = 1408
    geo_heads: int = 11
    bridge_layers: int = 2
    bridge_width: int = 320
    layer_scale: float = (
        0.1  # 0.01 for released / VGGT weights; at 1.0 the camera head did not learn
    )
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
    head_chunk: int = 16  # pixel frames that a DPT head fuses at once
    released: bool = (
        False  # the released weights: their quirks and their camera module (lib/released.py)
    )
    true_rays: bool = False  # released: true per-pixel rays in place of the ones it was trained on
    ray_sizes: tuple = (
        384,
        768,
        5120,
        2560,
        2048,
    )  # released: widths of the ray encoder, features last
    adapter_sizes: tuple = (25, 1024, 409)  # released: adapted blocks, hidden widths of an adapter
    # ablations: what is switched off is not built, so checkpoints, counts and gradients lack it too
    exchange: str = "both"  # of the IRG steps: both, to_geometry, to_video (one way) or none
    camera_adapters: bool = True

    @property
    def geo_layers(self):
        return self.num_layers - self.num_pcb


PRESETS = {
    "1.3b": Config(),
    "14b": Config(
        dim=5120,
        ffn_dim=13824,
        num_layers=40,
        in_dim=36,
        has_control=False,
        num_pcb=16,
        geo_dim=1024,
        geo_heads=16,
        bridge_layers=0,
        layer_scale=0.01,
        pose_hidden=128,
        taps=(23, 17, 11, 7),
        dpt_channels=(256, 512, 1024, 1024),
        dpt_features=256,
        camera_dim=2048,
        camera_heads=16,
    ),
    # The demo's widths: both stages learn in minutes on two CPU cores.  Same classes, small numbers.
    "demo": Config(
        dim=128,
        ffn_dim=384,
        num_layers=8,
        in_dim=32,
        head_dim=32,
        text_dim=64,
        text_len=16,
        freq_dim=64,
        has_clip=False,
        num_pcb=4,
        geo_dim=128,
        geo_heads=4,
        bridge_layers=2,
        bridge_width=64,
        pose_hidden=128,
        irg_dim=96,
        irg_heads=3,
        taps=(0, 1, 2, 3),
        dpt_channels=(16, 24, 32, 48),
        dpt_features=24,
        dpt_tail=8,
        camera_dim=96,
        camera_heads=3,
        camera_layers=2,
    ),
}


# ----------------------------------------------------------------------------------------- interaction (stage 2)
class CameraAdapter(nn.Module):
    """Shift of the video tokens before one PCB block from the camera of their latent frame; starts at zero."""

    def __init__(self, geo_dim, video_dim):
        super().__init__()
        self.linear = nn.Linear(geo_dim, video_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, pose_embedding, keep):
        """x (B, f*h*w, D), pose_embedding (B, f, C), keep (B, 1, 1)."""
        shift = self.linear(F.silu(pose_embedding)) * keep  # (B, f, D)
        return x + shift.repeat_interleave(x.shape[1] // shift.shape[1], 1)


class ExchangeProjections(nn.Module):
    def __init__(self, video_dim, geo_dim, dim, ways):
        super().__init__()
        sizes = dict(
            m1_proj=(video_dim, dim),
            values_m1_proj=(video_dim, dim),
            m2_proj=(geo_dim, dim),
            values_m2_proj=(geo_dim, dim),
            out_m1_proj=(dim, video_dim),
            out_m2_proj=(dim, geo_dim),
        )
        unused = dict(
            to_geometry=("values_m2_proj", "out_m1_proj"),
            to_video=("values_m1_proj", "out_m2_proj"),
        )
        for name, (inputs, outputs) in sizes.items():
            if name not in unused.get(ways, ()):
                setattr(self, name, nn.Linear(inputs, outputs))
        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class BiCrossAttention(nn.Module):
    """Bidirectional video <-> geometry attention between the halves of both blocks: one score matrix, normalised
    along either direction; both streams are updated from the same pair; the gates start at zero."""

    def __init__(self, video_dim, geo_dim, dim, heads, ways="both"):
        super().__init__()
        self.heads, self.ways = heads, ways
        self.cross_attn = ExchangeProjections(video_dim, geo_dim, dim, ways)
        if ways != "to_geometry":
            self.gamma_m1 = nn.Parameter(torch.zeros(video_dim))
        if ways != "to_video":
            self.gamma_m2 = nn.Parameter(torch.zeros(geo_dim))

    def forward(self, x, z, rope_x, rope_z):
        """x (B, N, D), z (B, f*P, C) -> both, updated."""
        p = self.cross_attn
        a, b = F.layer_norm(x, x.shape[-1:], eps=1e-6), F.layer_norm(z, z.shape[-1:], eps=1e-6)
        q, k = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (p.m1_proj(a), p.m2_proj(b))
        )
        q, k = rotate_pairs(q, *rope_x), rotate_pairs(k, *rope_z)
        if self.ways != "to_geometry":
            x = x + self.gamma_m1 * p.out_m1_proj(attention(q, k, p.values_m2_proj(b), self.heads))
        if self.ways != "to_video":
            z = z + self.gamma_m2 * p.out_m2_proj(attention(k, q, p.values_m1_proj(a), self.heads))
        return x, z


# ---------------------------------------------------------------------------------------------------- flow matching
def shift_sigma(s, shift=5.0):
    """Uniform s in [0, 1] -> sigma = shift s / (1 + (shift-1) s): more of the steps at high noise."""
    return shift * s / (1 + (shift - 1) * s)


def flow_matching_loss(velocity, latents, noise):
    """Mean squared error against noise - x0, per clip (B,), fp32."""
    return (velocity.float() - (noise - latents).float()).square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------- activation checkpointing
CHECKPOINTING = ("none", "selective", "attention", "full")

KEEP_ABOVE = 4096  # FLOPs per byte

ATTENTION_OPS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
    for name in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
    )
}


def keep_costly(linear, ctx, op, *args, **kwargs):
    """Policy of "selective": keep what costs more than KEEP_ABOVE FLOPs per byte to compute again, recompute the rest.

    Attention over n keys costs 4 n FLOPs per output value, a linear layer 2 in_features.  In bf16 at the 1.3B sizes that
    keeps attention among all tokens of a clip (9,000 to 33,000) and the second layer of every MLP (5,632 and 8,960), and
    recomputes the other layers (1,152 to 1,536), attention to text and inside a latent frame (1,024 to 1,564), and
    everything elementwise.  "attention" (linear False) keeps attention alone: at 14B widths every linear layer is above
    the limit.  "full" keeps the input of a block only, "none" everything.  The DPT heads, whose maps at half resolution
    are the largest tensors of all, run in chunks of frames and are recomputed unless it is "none"."""
    packet = op.overloadpacket
    if packet in ATTENTION_OPS:
        cost = 4 * args[1].shape[-2] / args[0].element_size()
    elif linear and packet in (torch.ops.aten.addmm, torch.ops.aten.mm):
        cost = 2 * args[-2].shape[-1] / args[-2].element_size()
    else:
        cost = 0
    return cost > KEEP_ABOVE


def recompute(how, function, *args):
    """function(*args), whose activations backward computes again: in part (selective, attention) or all of them (full)."""
    if how == "none" or not torch.is_grad_enabled():
        return function(*args)
    policy = partial(keep_costly, how == "selective")
    contexts = (
        noop_context_fn if how == "full" else partial(create_selective_checkpoint_contexts, policy)
    )
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


# ---------------------------------------------------------------------------------------------------------- one step
class Step(nn.Module):
    """One PCB block, or one IRG step: a video block, a geometry layer and the exchange between their halves.

    It is recomputed as one in backward, and gathered as one where weights are sharded (lib/sharding.py).  Its parts
    are FantasyWorld's, under their names in checkpoints; a model keeps its steps in a plain list, so they add none."""

    def __init__(self, block, adapter=None, frame_block=None, global_block=None, exchange=None):
        super().__init__()
        self.block, self.adapter, self.exchange = block, adapter, exchange
        self.frame_block, self.global_block = frame_block, global_block

    def forward(self, x, z, given, how="none"):
        """Video tokens x (B, N, D), or None for geometry alone; geometry tokens z (B, f*P, C), None in the PCB.

        given    what all steps share: rows, text, image (or keys), ropes of the video; rows_z, frames of the geometry;
                 camera: what the camera adapters read, keep: (B, 1, 1) 0/1; exchange: whether the branches meet
        returns  x, z and the tap (B, f*P, 2C): frame block and global block side by side, None in the PCB"""
        keys = given["keys"]
        if (
            keys is None and x is not None
        ):  # out here: inside, checkpointing would compute them twice
            with torch.no_grad():
                keys = self.block.cross_attn.keys_values(given["text"], given["image"])
        return recompute(how, self.run, x, z, given, keys)

    def run(self, x, z, given, keys):
        rows, rows_z, ropes, inside = given["rows"], given["rows_z"], given["ropes"], None
        if self.adapter is not None and given["camera"] is not None:
            if isinstance(self.adapter, CameraAdapter):
                x = self.adapter(x, given["camera"], given["keep"])
            else:  # the release's sits inside the cross-attention
                inside = partial(self.adapter, rays=given["camera"], keep=given["keep"])
        if self.frame_block is None:
            return self.block(x, rows, keys, ropes["video"], inside), None, None
        z_frame = self.frame_block(z, rows_z, given["frames"], ropes["frame"])
        z = self.global_block.attend(z_frame, rows_z, 1, ropes["global"])
        if x is not None:
            x = self.block.attend(x, rows, keys, ropes["video"], inside)
            if self.exchange is not None and given["exchange"]:
                x, z = self.exchange(x, z, ropes["exchange_x"], ropes["exchange_z"])
            x = self.block.feed_forward(x, rows)
        z = self.global_block.feed_forward(z, rows_z)
        return x, z, torch.cat([z_frame, z], -1)


# --------------------------------------------------------------------------------------------------- FantasyWorld
class FantasyWorld(nn.Module):
    """Frozen WanDiT (`dit`) + trainable geometry branch.  `set_stage(n)` decides what trains and what runs."""

    def __init__(self, cfg, dit=None):
        super().__init__()
        self.cfg, self.stage, self.checkpoint_activations = (
            cfg,
            2,
            "none",
        )  # or another of CHECKPOINTING
        n, C, D = cfg.geo_layers, cfg.geo_dim, cfg.dim
        if max(cfg.taps) >= n:
            raise ValueError(f"taps {cfg.taps}: this model has geometry layers 0 .. {n - 1}")
        if cfg.exchange not in ("both", "to_geometry", "to_video", "none"):
            raise ValueError(
                f"exchange = {cfg.exchange!r}; wanted both, to_geometry, to_video or none"
            )
        self.dit = dit or WanDiT(
            D,
            cfg.ffn_dim,
            cfg.num_layers,
            cfg.in_dim,
            cfg.head_dim,
            cfg.text_dim,
            cfg.text_len,
            cfg.freq_dim,
            cfg.has_clip,
            cfg.has_control,
        )
        self.bridge = LatentBridge(D, C, cfg.bridge_layers, cfg.bridge_width, cfg.layer_scale)
        # timestep -> rows of every geometry block; zero at the start, so that a block starts as the plain one
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, C), nn.SiLU(), nn.Linear(C, C))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        nn.init.zeros_(self.time_projection[1].weight)
        nn.init.zeros_(self.time_projection[1].bias)
        self.camera_token = nn.Parameter(
            1e-6 * torch.randn(1, 2, 1, C)
        )  # [first frame, all others]
        self.register_token = nn.Parameter(1e-6 * torch.randn(1, 2, NUM_SPECIAL - 1, C))
        self.pose_encoder = PoseEncoder(cfg.pose_hidden, C)
        self.frame_blocks = nn.ModuleList(
            GeoBlock(C, cfg.geo_heads, cfg.layer_scale) for _ in range(n)
        )
        self.global_blocks = nn.ModuleList(
            GeoBlock(C, cfg.geo_heads, cfg.layer_scale) for _ in range(n)
        )
        self.depth_head, self.point_head = (
            DPTHead(
                2 * C,
                out,
                cfg.dpt_channels,
                cfg.dpt_features,
                cfg.dpt_tail,
                cfg.released,
                cfg.head_chunk,
            )
            for out in (2, 4)
        )
        self.camera_head = CameraHead(
            2 * C,
            cfg.camera_dim,
            cfg.camera_heads,
            cfg.layer_scale,
            cfg.camera_layers,
            cfg.camera_iterations,
            cfg.released,
        )
        if cfg.released:
            self.ray_encoder = released.RayEncoder(cfg.ray_sizes)
            self.camera_adapters = nn.ModuleList(
                released.AttentionAdapter(D, cfg.ray_sizes[-1], *cfg.adapter_sizes[1:])
                for _ in range(cfg.adapter_sizes[0])
            )
        else:
            self.camera_adapters = nn.ModuleList(
                CameraAdapter(C, D) for _ in range(cfg.num_pcb if cfg.camera_adapters else 0)
            )
        self.exchange = nn.ModuleList(
            BiCrossAttention(D, C, cfg.irg_dim, cfg.irg_heads, cfg.exchange)
            for _ in range(n if cfg.exchange != "none" else 0)
        )
        parts, pcb = (self.frame_blocks, self.global_blocks, self.exchange), cfg.num_pcb
        self.steps = [
            Step(
                block,
                *(
                    p[j] if 0 <= j < len(p) else None
                    for p, j in zip((self.camera_adapters, *parts), (i, i - pcb, i - pcb, i - pcb))
                ),
            )
            for i, block in enumerate(self.dit.blocks)
        ]

    @classmethod
    def from_released(
        cls, sd, wan_state_dict=None, dit_heads=None, irg_heads=None, camera_heads=None, taps=None
    ):
        """Build from the release's tensors, used as they are; every size is read off their shapes.

        sd              the release's model.pth, name -> tensor
        wan_state_dict  Wan2.1-I2V-14B-480P in its official names, for the video tensors that sd lacks
        dit_heads, irg_heads, camera_heads, taps   as in released.sizes; 40, 12, 16, (23, 17, 11, 7) in the release
        Errors: ValueError for missing, unexpected or misshapen tensors."""
        shapes, base = (
            {k: tuple(v.shape) for k, v in d.items()} for d in (sd, wan_state_dict or {})
        )
        with torch.device("meta"):
            model = cls(
                Config(**released.sizes(shapes, base, dit_heads, irg_heads, camera_heads, taps))
            )
        own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        plan = released.match(own, shapes, base, model.cfg.num_pcb)
        model.load_state_dict(
            {
                k: (sd if of_release else wan_state_dict)[name].reshape(own[k])
                for k, (of_release, name) in plan.items()
            },
            assign=True,
        )
        return model

    # ---- stages
    def groups(self):
        """Module groups of the guide's parameter table."""
        return dict(
            wan=[self.dit],
            bridge=[self.bridge],
            geodit=[
                self.frame_blocks,
                self.global_blocks,
                self.time_embedding,
                self.time_projection,
            ],
            heads=[self.depth_head, self.point_head, self.camera_head],
            pose_encoder=[self.pose_encoder],
            tokens=[self.camera_token, self.register_token],
            camera_adapters=[self.camera_adapters]
            + ([self.ray_encoder] if self.cfg.released else []),
            irg=[self.exchange],
        )

    TRAINED = {0: ("wan",), 1: ("bridge", "geodit", "heads", "pose_encoder", "tokens")}
    TRAINED[2] = TRAINED[1] + ("camera_adapters", "irg")

    def set_stage(self, stage):
        """Toggle requires_grad: 0 video branch alone, 1 geometry branch, 2 geometry branch + interaction."""
        if stage not in self.TRAINED:
            raise ValueError(
                f"stage = {stage}: wanted 0 (video branch), 1 (geometry) or 2 (geometry + interaction)"
            )
        self.stage = stage
        for name, members in self.groups().items():
            for member in members:
                member.requires_grad_(name in self.TRAINED[stage])
        for name, p in self.named_parameters() if self.cfg.released else ():
            if released.dead(name):
                p.requires_grad_(False)
        return self

    def count_parameters(self):
        """Parameters per group, dict with the keys of groups()."""

        def size(member):
            return (
                member.numel()
                if torch.is_tensor(member)
                else sum(p.numel() for p in member.parameters())
            )

        return {name: sum(map(size, members)) for name, members in self.groups().items()}

    def trainable_state_dict(self):
        """name -> tensor of what the current stage trains (and the release's dead ones): the content of a checkpoint."""
        return {
            name: p.detach()
            for name, p in self.named_parameters()
            if p.requires_grad or self.cfg.released and released.dead(name)
        }

    # ---- forward
    def geometry_tokens(self, x, grid, pose_embedding, keep):
        """PCB output (B, N, D) -> [camera, registers, patches] of every latent frame (B, f*P, C)."""
        f, h, w = grid
        patches = rearrange(self.bridge(x, f), "b (f n) c -> b f n c", f=f)
        first_then_rest = (
            torch.arange(f, device=x.device) > 0
        ).long()  # made on the device: no wait
        camera = self.camera_token[:, first_then_rest].expand(len(x), -1, -1, -1)  # (B, f, 1, C)
        if pose_embedding is not None:
            camera = camera + (pose_embedding * keep)[:, :, None]
        registers = self.register_token[:, first_then_rest].expand(len(x), -1, -1, -1)
        return (
            torch.cat([camera, registers.to(camera.dtype), patches.to(camera.dtype)], 2)
            .flatten(1, 2)
            .float()
        )

    def rays(self, w2c, K, size):
        """The ray map (B, 6, T, H, W) that this model is conditioned on; arguments as geometry.plucker_rays."""
        quirk = self.cfg.released and not self.cfg.true_rays
        return released.constant_rays(w2c, K, size) if quirk else plucker_rays(w2c, K, size)

    def ray_features(self, plucker):
        """Rays (B, 6, T, H, W) or None -> (B, N, R) for the release's camera module; None without one, or without rays."""
        return (
            self.ray_encoder(plucker)
            if self.cfg.released and self.stage == 2 and plucker is not None
            else None
        )

    def ropes(self, grid, device):
        f, h, w = grid
        cfg = self.cfg
        geo_dim, irg_dim = cfg.geo_dim // cfg.geo_heads, cfg.irg_dim // cfg.irg_heads
        return dict(
            video=self.dit.rope(grid, device),
            frame=rope_2d(1, h, w, geo_dim, device),
            **{"global": rope_2d(f, h, w, geo_dim, device)},
            exchange_x=rope_3d(f, h, w, irg_dim, 0, device),
            exchange_z=rope_3d(f, h, w, irg_dim, NUM_SPECIAL, device),
        )

    @torch.no_grad()
    def constants(self, context, clip=None, plucker=None, poses=None):
        """What does not change with x and t, for forward(constants=...): a sampler computes it once per video."""
        return dict(
            self.dit.constants(context, clip, plucker),
            pose_embedding=None if poses is None or self.cfg.released else self.pose_encoder(poses),
            rays=self.ray_features(plucker),
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
        pose_keep=None,
        constants=None,
    ):
        """x, t, context, y, clip, plucker: as WanDiT.forward.

        poses      (B, T, 9)   pose encodings relative to frame 0, scene units; None = not given
        heads      False skips depth, points and cameras;  video False skips the video tail and the exchange
                   (stage 1 training: no loss there has a gradient) and returns velocity None
        pose_keep  (B,) 0/1    0 hides the clip's camera everywhere, exactly as plucker=None, poses=None would
        constants              of the method of that name: then context, clip, plucker and poses are not read
        returns    dict: velocity (B, 16, f, h, w); depth, depth_conf, points_conf (B, T, H, W); points (B, T, H, W, 3)
                   in the first camera's frame, scene units; pose_enc (iterations, B, T, 9), last refinement last"""
        if self.stage == 0:
            return dict(velocity=self.dit(x, t, context, y, clip, plucker, pose_keep, constants))
        if not video and self.stage == 2 and torch.is_grad_enabled():
            raise ValueError("video=False leaves the exchange of stage 2 without a gradient")
        dit, cfg = self.dit, self.cfg
        keep = None if pose_keep is None else pose_keep.float().view(-1, 1, 1)
        if constants:
            pose_embedding, rays = constants["pose_embedding"], constants["rays"]
        else:
            pose_embedding = (
                None if poses is None or cfg.released else self.pose_encoder(poses)
            )  # (B, f, C)
            rays = self.ray_features(plucker)
        pose_weight = 1.0 if keep is None else keep
        with torch.no_grad():  # nothing trainable lies upstream
            e, rows = dit.modulation(t)
            text, image = (None, None) if constants else dit.embed_context(context, clip)
            x, grid = dit.embed(
                x, y, constants["control"] if constants else dit.control(plucker), pose_keep
            )

        with torch.autocast(x.device.type, enabled=False):
            rows_z = self.time_projection(
                self.time_embedding(timestep_embedding(t.to(x.device), cfg.freq_dim))
            )
        camera = None if self.stage != 2 else rays if cfg.released else pose_embedding
        given = dict(
            rows=rows,
            text=text,
            image=image,
            ropes=self.ropes(grid, x.device),
            rows_z=rows_z.unflatten(1, (6, -1)),
            frames=grid[0],
            camera=camera,
            keep=pose_weight,
            exchange=self.stage == 2,
        )

        def take(step, i, *tokens):
            given["keys"] = constants["keys"][i] if constants else None
            return step(*tokens, given, self.checkpoint_activations)

        n, taps = cfg.num_pcb, {}
        with nullcontext() if self.stage == 2 else torch.no_grad():
            for i, step in enumerate(self.steps[:n]):
                x, _, _ = take(step, i, x, None)
        z = self.geometry_tokens(x, grid, pose_embedding, pose_weight)
        x = x if video else None
        for i, step in enumerate(self.steps[n:]):
            x, z, tap = take(step, n + i, x, z)
            if heads and (i in cfg.taps or i == cfg.geo_layers - 1):
                taps[i] = tap
        out = dict(velocity=dit.unpatchify(dit.head(x, e), grid) if video else None)
        if heads:
            out.update(self.read_out(taps, grid))
        return out

    def read_out(self, taps, grid):
        """Geometry heads on the tapped layers."""
        f = grid[0]
        taps = {i: rearrange(tap, "b (f p) c -> b f p c", f=f) for i, tap in taps.items()}
        maps = [taps[i][:, :, NUM_SPECIAL:] for i in self.cfg.taps]
        recompute = self.checkpoint_activations != "none"
        depth, depth_conf = activate_depth(self.depth_head(maps, grid, recompute))
        points, points_conf = activate_points(self.point_head(maps, grid, recompute))
        cameras = self.camera_head(taps[self.cfg.geo_layers - 1][:, :, 0])
        return dict(
            depth=depth,
            depth_conf=depth_conf,
            points=points,
            points_conf=points_conf,
            pose_enc=cameras,
        )


def half_geometry(model, dtype):
    """The same for the geometry branch, when nothing trains: what autocast would cast at every call is cast once."""
    ends = [head.scratch.output_conv2[2] for head in (model.depth_head, model.point_head)]
    return cast_matrices(
        model, dtype, [model.dit, model.time_embedding, model.time_projection, *ends]
    )


# --------------------------------------------------------------------------------------------------- command line
GUIDE = dict(
    wan=1616.3,
    bridge=5,
    geodit=900,
    heads=50,
    pose_encoder=1,
    tokens=0.01,
    camera_adapters=30,
    irg=200,
)


def parameter_table(preset):
    """Rows of the guide's table (millions of parameters) beside ours; counted on the meta device."""
    with torch.device("meta"):
        model = FantasyWorld(PRESETS[preset])
    ours = {k: v / 1e6 for k, v in model.count_parameters().items()}
    lines = [
        f"{'millions of parameters':24s}{'ours':>10s}{'guide':>10s}{'ours/guide':>12s}   stage 1   stage 2"
    ]
    for name, count in ours.items():
        state = ["train" if name in FantasyWorld.TRAINED[stage] else "frozen" for stage in (1, 2)]
        lines.append(
            f"{name:24s}{count:10.2f}{GUIDE[name]:10.2f}{count / GUIDE[name]:12.2f}   {state[0]:8s}  {state[1]}"
        )
    for stage, guide in ((1, 956.0), (2, 1186.0)):
        total = sum(ours[name] for name in FantasyWorld.TRAINED[stage])
        lines.append(
            f"{f'trainable, stage {stage}':24s}{total:10.2f}{guide:10.2f}{total / guide:12.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Print the parameter table of a preset (meta device, no weights)."
    )
    parser.add_argument("--preset", default="1.3b", choices=PRESETS)
    print(parameter_table(parser.parse_args().preset))
