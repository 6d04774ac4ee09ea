"""Geometry modules: starting points, token order, causality, chunking; the released quirks behind
their flag."""

import torch
import torch.nn.functional as F
from small import TINY, tiny_model

from geometry import (
    CameraHead,
    CausalUpsample,
    DPTHead,
    GeoBlock,
    LatentBridge,
    PoseEncoder,
    ResidualConvUnit,
    TemporalUpsampler,
    activate_depth,
    activate_points,
    rope_2d,
    rotate_half,
)
from wan import rope_3d, rotate_pairs


def test_a_modulated_block_starts_as_the_plain_pre_norm_block():
    torch.manual_seed(0)
    block = GeoBlock(32, 2, layer_scale=0.5)
    z = torch.randn(2, 6, 32)
    assert torch.equal(block(z, torch.zeros(2, 6, 32)), block(z))


def test_geometry_block_equals_its_formula_in_fp64():
    torch.manual_seed(0)
    block = GeoBlock(32, 2, layer_scale=0.5).double()
    with torch.no_grad():
        block.modulation.add_(torch.randn_like(block.modulation))
    z, modulation = torch.randn(2, 7, 32).double(), torch.randn(2, 6, 32).double()
    e = [row[:, None] for row in (block.modulation + modulation).unbind(1)]
    x = F.layer_norm(z, (32,), block.norm1.weight, block.norm1.bias) * (1 + e[1]) + e[0]
    q, k, v = (
        (x @ block.attn.qkv.weight.T + block.attn.qkv.bias)
        .view(2, 7, 3, 2, 16)
        .permute(2, 0, 3, 1, 4)
    )
    q, k = F.layer_norm(q, (16,)), F.layer_norm(k, (16,))
    weights = torch.softmax(q @ k.transpose(-1, -2) / 4, -1)
    out = (weights @ v).transpose(1, 2).reshape(2, 7, 32)
    z1 = z + 0.5 * (out @ block.attn.proj.weight.T + block.attn.proj.bias)
    m = block.mlp.fc2(F.gelu(block.mlp.fc1(F.layer_norm(z1, (32,)))))
    torch.testing.assert_close(block(z, modulation), z1 + 0.5 * (m * (1 + e[4]) + e[3]) * e[5])


def test_frame_attention_sees_only_its_own_frame():
    torch.manual_seed(0)
    block, z = GeoBlock(32, 2, 1.0), torch.randn(1, 12, 32)
    changed = z.clone()
    changed[:, 6:] += 1  # second of two frames
    rope = rope_2d(1, 1, 1, 16, torch.device("cpu"))
    assert rope[0].shape == (6, 16)
    assert torch.equal(
        block(z, frames=2, rope=rope)[:, :6], block(changed, frames=2, rope=rope)[:, :6]
    )
    assert not torch.equal(block(z)[:, :6], block(changed)[:, :6])


def test_rotations_keep_lengths_and_depend_on_relative_position_only():
    cos, sin = rope_2d(2, 3, 4, 16, torch.device("cpu"))
    assert cos.shape == (2 * (5 + 12), 16)
    # special tokens, no time
    assert torch.equal(cos[:5], torch.ones(5, 16)) and torch.equal(cos[:17], cos[17:])
    q, k = torch.randn(16), torch.randn(16)
    rotated = [rotate_half(x.expand(len(cos), 16), cos, sin) for x in (q, k)]
    torch.testing.assert_close(rotated[0].norm(dim=-1), q.norm().expand(len(cos)))
    patch = lambda y, x: 5 + 4 * y + x
    dots = [rotated[0][patch(y, x)] @ rotated[1][patch(y + 1, x + 2)] for y, x in ((0, 0), (1, 1))]
    torch.testing.assert_close(dots[0], dots[1])
    cos, sin = rope_3d(3, 2, 2, 16, 5, torch.device("cpu"))
    assert cos.shape == (3 * 9, 8)
    assert torch.equal(cos[9:14], torch.ones(5, 8)), (
        "exchange: special tokens are not rotated, not even in time"
    )
    x = torch.randn(1, 1, 27, 16)
    torch.testing.assert_close(rotate_pairs(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def test_bridge_starts_as_its_linear_map():
    bridge, x = LatentBridge(24, 32, layers=2, width=64, layer_scale=0.1), torch.randn(2, 12, 24)
    assert torch.equal(bridge(x, 2), bridge.proj(x))


def test_pose_encoder_groups_frames_like_the_latents():
    encoder = PoseEncoder(8, 16)
    encoder.mlp = torch.nn.Identity()
    poses = torch.arange(9.0)[None, :, None].expand(1, 9, 9)  # frame t holds t
    grouped = encoder(poses).view(1, 3, 9, 4)[0, :, 0]
    assert grouped.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]


def test_time_upsampling_is_causal_and_starts_with_identical_sub_frames():
    torch.manual_seed(0)
    up, x = TemporalUpsampler(8), torch.randn(1, 8, 3, 4, 4)
    changed = x.clone()
    changed[:, :, 2] += 1
    a, b = up(x), up(changed)
    assert a.shape[2] == 9
    assert torch.equal(a[:, :, :5], b[:, :, :5]) and not torch.equal(a[:, :, 5], b[:, :, 5])
    y = CausalUpsample(8)(x)
    assert torch.equal(y[:, :, 0], x[:, :, 0]) and torch.equal(y[:, :, 1], y[:, :, 2])
    y = CausalUpsample(8, released=True)(x)
    assert not torch.allclose(y[:, :, 1], y[:, :, 2])


def test_camera_tokens_are_interleaved_in_time_and_group_major_only_when_released():
    for released in (False, True):
        head = CameraHead(8, 8, 2, 0.1, layers=1, iterations=1, released=released)
        head.token_norm = torch.nn.Identity()
        conv = head.camera_time_upsample["expand_channels"]
        with torch.no_grad():  # channel group j of latent n carries 20 n + j
            conv.weight.copy_(torch.eye(8).repeat_interleave(4, 0)[..., None])
            conv.bias.copy_(torch.arange(4.0).repeat(8))
        tokens = 20 * torch.arange(-1.0, 3.0)[None, :, None].expand(1, 4, 8)
        order = head.frame_tokens(tokens)[0, 1:, 0].tolist()
        assert order[:5] == ([0, 20, 40, 1, 21] if released else [0, 1, 2, 3, 20])


def test_camera_head_returns_every_refinement_with_live_fields_of_view():
    head = CameraHead(24, 16, 2, 0.1, layers=1, iterations=3)
    out = head(torch.randn(2, 3, 24))
    assert out.shape == (3, 2, 9, 9) and (out[..., 7:] > 0).all()


def test_dense_head_has_pixel_rate_and_chunks_change_nothing():
    torch.manual_seed(0)
    head = DPTHead(24, 2, (8, 8, 8, 8), 8, tail=4)
    maps = [torch.randn(2, 2, 6, 24) for _ in range(4)]
    whole = head(maps, (2, 2, 3))
    assert whole.shape == (2, 5, 32, 48, 2)
    head.chunk = 2
    torch.testing.assert_close(head(maps, (2, 2, 3)), whole, rtol=1e-5, atol=1e-6)


def test_released_residual_unit_clips_its_skip():
    unit, x = ResidualConvUnit(4, released=True), -torch.ones(1, 4, 3, 3)
    for p in unit.parameters():
        torch.nn.init.zeros_(p)
    assert torch.equal(unit(x), torch.zeros_like(x))
    unit.released = False
    assert torch.equal(unit(x), x)


def test_activations_have_the_specified_values_and_gradients():
    raw = torch.tensor([[0.0, 0.0], [1.0, 1.0], [99.0, 99.0]], requires_grad=True)
    depth, conf = activate_depth(raw)
    assert (
        torch.allclose(depth[:2], torch.tensor([1.0, 2.7182818]))
        and torch.isfinite(conf).all()
        and (conf > 1).all()
    )
    for dtype in (torch.float64, torch.float32):
        raw = torch.tensor([[0.0, 1.0, -1.0, 0.0]], dtype=dtype, requires_grad=True)
        points, conf = activate_points(raw)
        want = torch.tensor([[0.0, 1.71828183, -1.71828183]], dtype=dtype)
        torch.testing.assert_close(points, want, rtol=1e-6, atol=1e-7)
        points[0, 0].backward()
        assert abs(raw.grad[0, 0].item() - 1) < 1e-5 and conf.item() == 2


def test_a_head_takes_as_many_frames_at_once_for_one_clip_as_for_many():
    head = tiny_model(2).depth_head
    sizes, fuse = [], head.fuse
    head.fuse = lambda *args: sizes.append(len(args[-1])) or fuse(*args)
    for clips in (1, 2, 5):
        maps = [torch.randn(clips, 6, 6, 2 * TINY.geo_dim) for _ in range(4)]
        assert head(maps, (6, 2, 3)).shape[:2] == (clips, 21)
    assert max(sizes) == 16 and sizes[:2] == [16, 5] and sizes[-1] <= 15
