"""Half-resolution and cropped inputs agree with the full ones; every test in fp64 and in fp32."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from geometry import encode_pose, normalize_scene, pixel_rays, plucker_rays, unproject
from lib import camera_files, pictures
from lib.rooms import render_clip


@pytest.fixture(scope="module")
def raw():
    return render_clip(3, 5, 64, 96)


@pytest.fixture
def clip(raw, precision):
    tensors = {k: torch.from_numpy(raw[k]).to(precision) for k in ("depth", "w2c", "intrinsics")}
    return dict(
        depth=tensors["depth"][None],
        w2c=tensors["w2c"][None],
        K=tensors["intrinsics"].expand(1, 5, 3, 3),
    )


def shrunk(K):
    return K * torch.tensor([0.5, 0.5, 1.0]).to(K)[:, None]


def test_a_crop_is_the_same_rays_points_and_plucker_map_with_a_moved_principal_point(clip):
    y, x, h, w = 7, 13, 40, 60
    K = clip["K"].clone()
    K[..., 0, 2] -= x
    K[..., 1, 2] -= y
    window = (..., slice(y, y + h), slice(x, x + w))
    torch.testing.assert_close(
        unproject(clip["depth"][window], clip["w2c"], K),
        unproject(clip["depth"], clip["w2c"], clip["K"])[:, :, y : y + h, x : x + w],
    )
    torch.testing.assert_close(
        plucker_rays(clip["w2c"], K, (h, w)), plucker_rays(clip["w2c"], clip["K"], (64, 96))[window]
    )


def test_a_ray_at_half_resolution_is_the_mean_of_its_four_full_ones(clip):
    full = pixel_rays(clip["K"][0], (64, 96)).permute(0, 3, 1, 2)
    half = pixel_rays(shrunk(clip["K"])[0], (32, 48)).permute(0, 3, 1, 2)
    torch.testing.assert_close(half, F.avg_pool2d(full, 2))


def test_pose_encoding_does_not_see_the_resolution(clip):
    torch.testing.assert_close(
        encode_pose(clip["w2c"], shrunk(clip["K"]), (32, 48)),
        encode_pose(clip["w2c"], clip["K"], (64, 96)),
    )


def test_scene_scale_at_half_resolution_is_that_at_full(clip):
    depth, K, half = clip["depth"], clip["K"], clip["depth"][..., 1::2, 1::2]
    full = normalize_scene(depth, clip["w2c"], K, depth > 0)[2]
    small = normalize_scene(half, clip["w2c"], shrunk(K), half > 0)[2]
    torch.testing.assert_close(small, full, rtol=0.01, atol=0)  # nearest samples, half a pixel off


@pytest.mark.parametrize("height, width", [(32, 48), (32, 32), (48, 96)])
def test_loaded_half_size_and_cropped_clips_lie_on_the_surface_of_the_full_one(
    raw, tmp_path, height, width
):
    k = np.repeat(raw["intrinsics"][None], 5, 0)
    pictures.write_video(tmp_path / "video.mp4", raw["rgb"], 15)
    np.save(tmp_path / "depth.npy", raw["depth"])
    camera_files.write_cameras(tmp_path / "camera_params.txt", raw["w2c"], k, (64, 96))
    entry = dict(video="video.mp4", depth="depth.npy", camera_params="camera_params.txt")
    got = data.load_clip(data.read_entry(tmp_path, entry, "here"), height, width, 5)
    full = [torch.from_numpy(x)[None] for x in (raw["depth"], raw["w2c"], k)]
    small = [x[None] for x in (got["depth"], got["w2c"], got["intrinsics"])]
    (points,), (true,) = (unproject(depth.double(), w2c, K) for depth, w2c, K in (small, full))
    gap = torch.cdist(points[4].reshape(-1, 3), true[4].reshape(-1, 3)).amin(1)
    assert gap.max() < raw["depth"].max() / k[0, 0, 0] * 0.75  # half a source pixel, diagonally


@pytest.mark.parametrize(
    "height, width, focal",
    [(480, 832, (454.092767, 454.092748)), (256, 256, (242.182809, 242.182799))],
)
def test_realestate10k_intrinsics_of_720p_are_square_pixels_after_the_crop(
    tmp_path, height, width, focal
):
    """fx = .532139961 of 1280, fy = .946026558 of 720: 454.0927 px in 832 x 480, 242.1828 px in 256
    x 256."""
    pictures.write_video(tmp_path / "video.mp4", np.zeros((1, 720, 1280, 3), np.uint8), 15)
    np.save(tmp_path / "depth.npy", np.ones((1, 9, 16), np.float32))
    (tmp_path / "camera_params.txt").write_text(
        "0 .532139961 .946026558 .5 .5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n"
    )
    entry = dict(video="video.mp4", depth="depth.npy", camera_params="camera_params.txt")
    K = data.load_clip(data.read_entry(tmp_path, entry, "here"), height, width, 1)["intrinsics"][0]
    np.testing.assert_allclose(
        K, [[focal[0], 0, width / 2], [0, focal[1], height / 2], [0, 0, 1]], rtol=0, atol=2e-6
    )
