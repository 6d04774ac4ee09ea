"""Cameras against hand-computed numbers, round trips and invariances; every test in fp64 and in
fp32."""

import math

import pytest
import torch
from precision import REAL, loose, only_fp64
from torch import tensor

from geometry import (
    compose,
    decode_pose,
    encode_pose,
    inv_se3,
    mat_to_quat,
    normalize_scene,
    pack_frames,
    plucker_rays,
    project,
    quat_to_mat,
    relative_to_first,
    unproject,
)

torch.manual_seed(0)

pytestmark = pytest.mark.usefixtures("precision")


def ry90():
    return tensor([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], **REAL)


def close(got, want, rtol=0, atol=2e-8):
    """The hand-computed numbers carry eight digits: 2e-8 absolute is their rounding; fp32 rounds at
    1e-7 of a unit."""
    assert got.dtype == REAL["dtype"]
    atol = max(atol, 3e-6) if got.dtype == torch.float32 else atol
    torch.testing.assert_close(
        got, torch.as_tensor(want, dtype=got.dtype), rtol=max(rtol, loose()), atol=atol
    )


def about_y(degrees):
    a = math.radians(degrees)
    return tensor(
        [[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]], **REAL
    )


def pose(R, centre):
    """w2c of a camera with orientation R (camera-to-world) and centre."""
    return inv_se3(torch.cat([R, tensor(centre, **REAL)[:, None]], -1))


def intrinsics(f, size, *lead):
    H, W = size
    return tensor([[f, 0, W / 2], [0, f, H / 2], [0, 0, 1]], **REAL).expand(*lead, 3, 3)


def random_clip(B=2, T=5, size=(6, 8), turn=0.3, seed=0):
    """depth, w2c, K of a smooth random clip; fp64."""
    g = torch.Generator().manual_seed(seed)
    q = torch.cat(
        [turn * torch.randn(B, T, 3, generator=g, **REAL), torch.ones(B, T, 1, **REAL)], -1
    )
    w2c = torch.cat([quat_to_mat(q), torch.randn(B, T, 3, 1, generator=g, **REAL)], -1)
    return 1 + torch.rand(B, T, *size, generator=g, **REAL), w2c, intrinsics(7.0, size, B, T)


def test_quaternions_of_quarter_and_twelfth_turns():
    close(mat_to_quat(ry90()), [0, 0.70710678, 0, 0.70710678])
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    close(
        mat_to_quat(tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], **REAL)),
        [0, 0, 0.25881905, 0.96592583],
    )


def test_unnormalised_quaternion_gives_the_rotation_of_its_direction_and_so_does_its_negative():
    q = tensor([1, 2, 3, 4], **REAL)
    R = quat_to_mat(q)
    close(
        R,
        [
            [0.13333333, -0.66666667, 0.73333333],
            [0.93333333, 0.33333333, 0.13333333],
            [-0.33333333, 0.66666667, 0.66666667],
        ],
    )
    close(mat_to_quat(R), [0.18257419, 0.36514837, 0.54772256, 0.73029674])
    close(quat_to_mat(-q), R)


@pytest.mark.parametrize("axis", range(3))
def test_half_turns_have_unit_quaternions_and_finite_gradients(axis):
    R = -torch.eye(3, **REAL)
    R[axis, axis] = 1
    R.requires_grad_()
    q = mat_to_quat(R)
    close(q.detach().abs(), torch.eye(4)[axis])
    for k in range(4):
        assert torch.isfinite(torch.autograd.grad(q[k], R, retain_graph=True)[0]).all()


def test_quaternion_round_trip_over_all_hemispheres():
    q = torch.nn.functional.normalize(torch.randn(500, 4, **REAL), dim=-1)
    close(mat_to_quat(quat_to_mat(q)), torch.where(q[:, 3:] < 0, -q, q), atol=1e-12)


def test_inverse_of_a_camera_at_1_2_3_looking_along_x():
    close(pose(ry90(), [1, 2, 3]), [[0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1]])


def test_inverse_twice_is_the_identity_in_both_layouts():
    w2c = random_clip()[1]
    full = torch.cat([w2c, tensor([0, 0, 0, 1], **REAL).expand(2, 5, 1, 4)], -2)
    close(inv_se3(inv_se3(full)), full)
    close(inv_se3(full), torch.linalg.inv(full), atol=1e-12)
    close(inv_se3(w2c), inv_se3(full)[..., :3, :])


def test_relative_pose_of_one_step_forward_with_ten_degrees_of_yaw():
    rel = relative_to_first(
        torch.stack([pose(ry90(), [1, 2, 3]), pose(ry90() @ about_y(10), [2, 2, 3])])
    )
    close(rel[1, :, 3], [0.17364818, 0, -0.98480775])
    close(inv_se3(rel)[1], torch.cat([about_y(10), tensor([[0], [0], [1]])], -1))
    assert torch.equal(rel[0], torch.eye(3, 4, **REAL))


def test_changing_the_world_changes_neither_relative_poses_nor_rays_nor_camera_frame_points():
    depth, w2c, K = random_clip()
    other = compose(w2c, inv_se3(pose(about_y(50), [4, -2, 1])))
    close(relative_to_first(other), relative_to_first(w2c), atol=1e-5)
    close(plucker_rays(other, K, (6, 8)), plucker_rays(w2c, K, (6, 8)), atol=1e-5)
    points = [unproject(depth, relative_to_first(x), K) for x in (w2c, other)]
    close(points[0], points[1], atol=1e-5)


@pytest.mark.parametrize(
    "f, size, fov",
    [
        (500, (336, 592), (0.6482972627, 1.0690327622)),
        (2, (4, 4), (math.pi / 2, math.pi / 2)),
        (100, (64, 96), (0.6194058891, 0.8950399503)),
    ],
)
def test_field_of_view_is_vertical_first(f, size, fov):
    enc = encode_pose(torch.eye(3, 4, **REAL), intrinsics(f, size), size)
    close(enc, [0, 0, 0, 0, 0, 0, 1, *fov])


def test_realestate10k_intrinsics_are_square_pixels_after_the_crop_and_survive_the_encoding():
    """1280x720 cropped to 592x336: the aspect rule gives fx = .5369340147; the encoding keeps
    both."""
    fx, fy, (H, W) = 0.532139961 * (336 * 1280 / 720) / 592, 0.946026558, (336, 592)
    close(tensor([fx, fx * W, fy * H], **REAL), [0.5369340147, 317.864937, 317.864923])
    K = tensor([[fx * W, 0, W / 2], [0, fy * H, H / 2], [0, 0, 1]], **REAL)
    close(decode_pose(encode_pose(torch.eye(3, 4, **REAL), K, (H, W)), (H, W))[1], K)


def test_pose_encoding_round_trip_and_scaled_quaternion():
    _, w2c, K = random_clip()
    enc = encode_pose(w2c, K, (6, 8))
    for e in (enc, torch.cat([enc[..., :3], -3 * enc[..., 3:7], enc[..., 7:]], -1)):
        got = decode_pose(e, (6, 8))
        close(got[0], w2c), close(got[1], K)


def test_decoding_an_untrained_prediction_is_finite():
    assert all(torch.isfinite(x).all() for x in decode_pose(torch.zeros(2, 3, 9), (4, 4)))


def rays_4x4(R, centre):
    """Ray map (6, 4, 4) of a second camera whose first frame is the world."""
    w2c = torch.stack([torch.eye(3, 4, **REAL), pose(R, centre)])[None]
    return plucker_rays(w2c, intrinsics(2.0, (4, 4), 1, 2), (4, 4))[0, :, 1]


def test_rays_of_a_camera_one_step_to_the_right():
    rays = rays_4x4(torch.eye(3, **REAL), [1, 0, 0])
    close(rays[:, 0, 0], [0, -0.68599434, -0.51449576, -0.51449576, -0.51449576, 0.68599434])
    close(rays[:, 0, 3], [0, -0.68599434, -0.51449576, 0.51449576, -0.51449576, 0.68599434])


def test_rays_of_a_turned_camera():
    rays = rays_4x4(ry90(), [1, 2, 3])
    close(rays[:, 0, 0], [2.57247878, 1.54348727, -1.88648444, 0.68599434, -0.51449576, 0.51449576])


def test_moments_are_orthogonal_to_unit_directions_and_zero_in_frame_0_even_with_three_frames():
    """Three clips of three frames: a cross product over the wrong axis of length 3 would show."""
    _, w2c, K = random_clip(B=3, T=3)
    m, d = plucker_rays(w2c.float(), K.float(), (6, 8)).chunk(2, 1)
    assert (m * d).sum(1).abs().max() < 1e-6 and m[:, :, 0].abs().max() == 0
    torch.testing.assert_close(d.norm(dim=1), torch.ones(3, 3, 6, 8))


def test_mirrored_world_mirrors_directions_and_negates_mirrored_moments():
    d = torch.nn.functional.normalize(tensor([0.3, -0.2, 0.9], **REAL), dim=-1)
    mirror, o = tensor([-1, 1, 1], **REAL), tensor([1, 2, 3], **REAL)
    m = torch.linalg.cross(mirror * o, mirror * d)
    close(m, [2.47541099, 0, 0.825137], rtol=1e-6, atol=1e-7)
    close(m, -mirror * torch.linalg.cross(o, d))


def test_rays_span_the_image_once():
    """Pixel intrinsics multiplied by the image size a second time would make all columns the same
    ray."""
    d = plucker_rays(
        torch.eye(3, 4, **REAL)[None, None], intrinsics(500, (2, 592), 1, 1), (2, 592)
    )[0, 3:, 0]
    close((d[0] / d[2])[0, [0, -1]], [-0.591, 0.591])


def test_packing_repeats_frame_0_and_puts_sub_frames_last():
    c, t = torch.arange(6.0), torch.arange(9.0)
    x = (10 * c[:, None] + t)[None, :, :, None, None]
    packed = pack_frames(x)[0, :, :, 0, 0].unflatten(0, (6, 4))  # (c, j, latent)
    j = torch.arange(4.0)
    for latent, first in enumerate((0 * j, 1 + j, 5 + j)):
        assert torch.equal(packed[..., latent], 10 * c[:, None] + first)
    with pytest.raises(ValueError, match="8 frames.*4k . 1"):
        pack_frames(x[:, :, :8])


def test_unprojection_of_one_pixel_by_hand():
    depth = torch.zeros(1, 1, 4, 4, **REAL)
    depth[..., 0, 3] = 2
    K, eye = intrinsics(2, (4, 4), 1, 1), torch.eye(3, 4, **REAL)[None, None]
    close(unproject(depth, eye, K)[0, 0, 0, 3], [1.5, -1.5, 2])
    points = unproject(depth, pose(ry90(), [1, 2, 3])[None, None], K)
    close(points[0, 0, 0, 3], [3, 0.5, 1.5])
    assert points.abs().sum() == points[0, 0, 0, 3].abs().sum()  # depth 0 stays 0


def test_moving_right_moves_the_image_left_by_focal_times_baseline_over_depth():
    w2c = torch.stack([pose(torch.eye(3, **REAL), [x, 0, 0]) for x in (0, 0.1)])[None]
    uv, z = project(
        tensor([[[0, 0, 2]], [[0, 0, 2]]], **REAL)[None], w2c, intrinsics(100, (64, 96), 1, 2)
    )
    close(uv[0, :, 0], [[48, 32], [43, 32]]), close(z, torch.full((1, 2, 1), 2))


def test_projecting_unprojected_pixels_returns_their_centres_and_depths():
    depth, w2c, K = random_clip()
    uv, z = project(unproject(depth, w2c, K), w2c, K)
    close(z, depth, atol=1e-9)
    v, u = torch.meshgrid(
        torch.arange(6, **REAL) + 0.5, torch.arange(8, **REAL) + 0.5, indexing="ij"
    )
    close(uv, torch.stack([u, v], -1).expand(2, 5, 6, 8, 2), atol=1e-4)


def test_frame_0_points_have_z_equal_to_depth():
    depth, w2c, K = random_clip()
    close(unproject(depth, relative_to_first(w2c), K)[:, 0, ..., 2], depth[:, 0], atol=0, rtol=0)


def test_permuting_clips_permutes_results():
    depth, w2c, K = random_clip(B=3, T=3)
    order = tensor([2, 0, 1])
    for f in (
        lambda d, w: normalize_scene(d, w, K, d > 1.2)[0],
        lambda d, w: plucker_rays(w, K, (6, 8)),
        lambda d, w: unproject(d, w, K),
        lambda d, w: project(unproject(d, w, K), w, K)[0],
    ):
        close(f(depth[order], w2c[order]), f(depth, w2c)[order])


@only_fp64
def test_camera_gradients_match_finite_differences():
    depth, w2c, K = random_clip(B=1, T=2, size=(2, 3))
    args = [x.clone().requires_grad_() for x in (depth, w2c, K)]
    check = torch.autograd.gradcheck
    assert check(lambda q: quat_to_mat(q), (torch.randn(3, 4, **REAL, requires_grad=True),))
    assert check(lambda w: mat_to_quat(w[..., :3]), (args[1],))
    assert check(unproject, args)
    assert check(lambda w, k: plucker_rays(w, k, (2, 3)), args[1:])
    assert check(lambda w, k: encode_pose(w, k, (2, 3)), args[1:])


def test_autocast_does_not_lower_the_precision_of_cameras():
    depth, w2c, K = (x.float() for x in random_clip())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = plucker_rays(w2c, K, (6, 8)), unproject(depth, w2c, K)
    assert torch.equal(inside[0], plucker_rays(w2c, K, (6, 8)))
    assert torch.equal(inside[1], unproject(depth, w2c, K))


@only_fp64
def test_single_precision_agrees_with_double_to_1e_5():
    depth, w2c, K = random_clip()
    for f in (
        lambda d, w, k: unproject(d, w, k),
        lambda d, w, k: plucker_rays(w, k, (6, 8)),
        lambda d, w, k: encode_pose(w, k, (6, 8)),
        lambda d, w, k: decode_pose(encode_pose(w, k, (6, 8)), (6, 8))[0],
        lambda d, w, k: normalize_scene(d, w, k, d > 0)[1],
    ):
        single = f(depth.float(), w2c.float(), K.float())
        assert single.dtype == torch.float32
        close(single.double(), f(depth, w2c, K), rtol=1e-5, atol=1e-5)
