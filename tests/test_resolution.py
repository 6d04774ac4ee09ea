"""Half-resolution and cropped inputs agree with the full ones."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from geometry import encode_pose, normalize_scene, pixel_rays, plucker_rays, unproject
from scenes import render_clip


@pytest.fixture(scope="module")
def clip():
    c = render_clip(3, 5, 64, 96)
    return dict(depth=torch.from_numpy(c["depth"]).double()[None], w2c=torch.from_numpy(c["w2c"])[None],
                K=torch.from_numpy(c["intrinsics"]).expand(1, 5, 3, 3), raw=c)


def shrunk(K):
    return K * torch.tensor([.5, .5, 1.]).double()[:, None]


def test_a_crop_is_the_same_rays_points_and_plucker_map_with_a_moved_principal_point(clip):
    y, x, h, w = 7, 13, 40, 60
    K = clip["K"].clone()
    K[..., 0, 2] -= x
    K[..., 1, 2] -= y
    window = (..., slice(y, y + h), slice(x, x + w))
    torch.testing.assert_close(unproject(clip["depth"][window], clip["w2c"], K),
                               unproject(clip["depth"], clip["w2c"], clip["K"])[:, :, y:y + h, x:x + w])
    torch.testing.assert_close(plucker_rays(clip["w2c"], K, (h, w)),
                               plucker_rays(clip["w2c"], clip["K"], (64, 96))[window])


def test_a_ray_at_half_resolution_is_the_mean_of_its_four_full_ones(clip):
    full = pixel_rays(clip["K"][0], (64, 96)).permute(0, 3, 1, 2)
    half = pixel_rays(shrunk(clip["K"])[0], (32, 48)).permute(0, 3, 1, 2)
    torch.testing.assert_close(half, F.avg_pool2d(full, 2))


def test_pose_encoding_does_not_see_the_resolution(clip):
    torch.testing.assert_close(encode_pose(clip["w2c"], shrunk(clip["K"]), (32, 48)),
                               encode_pose(clip["w2c"], clip["K"], (64, 96)))


def test_scene_scale_at_half_resolution_is_that_at_full(clip):
    depth, K, half = clip["depth"], clip["K"], clip["depth"][..., 1::2, 1::2]
    full = normalize_scene(depth, clip["w2c"], K, depth > 0)[2]
    small = normalize_scene(half, clip["w2c"], shrunk(K), half > 0)[2]
    torch.testing.assert_close(small, full, rtol=.01, atol=0)                     # nearest samples, half a pixel off


@pytest.mark.parametrize("height, width", [(32, 48), (32, 32), (48, 96)])
def test_loaded_half_size_and_cropped_clips_lie_on_the_surface_of_the_full_one(clip, tmp_path, height, width):
    raw, k = clip["raw"], np.repeat(clip["raw"]["intrinsics"][None], 5, 0)
    data.write_video(tmp_path / "video.mp4", raw["rgb"], 15)
    np.save(tmp_path / "depth.npy", raw["depth"])
    data.write_cameras(tmp_path / "camera_params.txt", raw["w2c"], k, (64, 96))
    entry = dict(video="video.mp4", depth="depth.npy", camera_params="camera_params.txt")
    sample = data.read_entry(tmp_path, entry, "here")
    got = data.load_clip(sample, height, width, 5)
    points = unproject(got["depth"].double()[None], got["w2c"][None], got["intrinsics"][None])
    full = unproject(clip["depth"], clip["w2c"], clip["K"])
    gap = torch.cdist(points[0, 4].reshape(-1, 3), full[0, 4].reshape(-1, 3)).amin(1)
    limit = clip["depth"].max() / clip["K"][0, 0, 0, 0] * .75                     # half a source pixel, diagonally
    assert gap.max() < limit
