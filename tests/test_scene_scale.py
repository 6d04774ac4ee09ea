"""The unit of a scene: hand-computed scales, similarity, invalid pixels; every test in fp64 and in
fp32."""

import math

import pytest
import torch
from precision import REAL
from test_cameras import close, random_clip
from torch import tensor

from geometry import normalize_scene, relative_to_first, unproject

torch.manual_seed(0)

pytestmark = pytest.mark.usefixtures("precision")


def test_scene_scale_drops_the_farthest_five_percent():
    """Distances 5, 1, 2: the 95 % quantile 4.7 drops the 5, leaving (1 + 2) / 2."""
    K = tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]], **REAL)[None, None]
    rays = torch.tensor([1.0, 2**0.5, 5**0.5], **REAL)  # lengths of the rays of a 1x3 image
    depth = (tensor([5, 1, 2], **REAL) / rays)[None, None, None]
    scale = normalize_scene(depth, torch.eye(3, 4, **REAL)[None, None], K, depth > 0)[2]
    close(scale, [1.5])


def test_scene_scale_of_all_frames_is_the_plain_mean_of_all_points():
    """One pixel a frame, cameras that look ahead: points (0, 0, 1), (3, 0, 4), (0, 0, 2), (1 + 5 +
    2) / 3."""
    K = tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]], **REAL).expand(1, 3, 3, 3)
    w2c = torch.eye(3, 4, **REAL).repeat(1, 3, 1, 1)
    w2c[0, :, :, 3] = -tensor([[0, 0, 0], [3, 0, 0.25], [0, 0, -1]], **REAL)
    depth = tensor([1, 3.75, 3], **REAL).view(1, 3, 1, 1)
    close(normalize_scene(depth, w2c, K, depth > 0, frames="all")[2], [8 / 3])
    close(normalize_scene(depth, w2c, K, depth > 0)[2], [1])  # of frame 0 alone
    with pytest.raises(ValueError, match="frames 'last'; known: first, all"):
        normalize_scene(depth, w2c, K, depth > 0, frames="last")


def test_scene_scale_keeps_nineteen_of_twenty_equal_steps():
    """Distances 1 .. 20: the 95 % quantile 19.05 keeps 1 .. 19, mean 10."""
    K = tensor([[1e9, 0, 10], [0, 1e9, 0.5], [0, 0, 1]], **REAL)[None, None]  # rays almost parallel
    depth = torch.arange(1, 21, **REAL)[None, None, None]
    close(normalize_scene(depth, torch.eye(3, 4, **REAL)[None, None], K, depth > 0)[2], [10])


def test_similar_scenes_normalise_to_the_same_clip():
    depth, w2c, K = random_clip()
    mask = torch.rand(2, 5, 6, 8) > 0.3
    bigger = torch.cat([w2c[..., :3], 4 * w2c[..., 3:]], -1)
    for frames in ("first", "all"):
        a, b = (normalize_scene(*x, K, mask, frames) for x in ((depth, w2c), (4 * depth, bigger)))
        close(a[0], b[0]), close(a[1], b[1]), close(4 * a[2], b[2])
        close(unproject(a[0], a[1], K), unproject(b[0], b[1], K))
        assert torch.equal(a[1][..., :3], relative_to_first(w2c)[..., :3])


def test_normalising_zeroes_invalid_depth_keeps_inputs_and_gives_scale_1_without_pixels():
    depth, w2c, K = random_clip()
    depth[0, :, 0, :3] = tensor([math.nan, math.inf, -1], **REAL)
    mask = torch.ones_like(depth, dtype=torch.bool)
    mask[1] = False
    before = depth.clone(), w2c.clone()
    for frames in ("first", "all"):
        out, _, scale = normalize_scene(depth, w2c, K, mask, frames)
        assert (
            torch.equal(out[0, :, 0, :3], torch.zeros(5, 3, **REAL))
            and not out[1].any()
            and scale[1] == 1
        )
        assert torch.isfinite(out).all() and scale[0] > 0
    assert torch.equal(depth.nan_to_num(), before[0].nan_to_num()) and torch.equal(w2c, before[1])
