"""The renderer: exact, deterministic, cheap."""

import math

import numpy as np
import pytest
import torch

from geometry import project, unproject
from lib import rooms


def as_video(rgb):
    return torch.from_numpy(rgb).permute(3, 0, 1, 2)[None].float() / 127.5 - 1  # (1, 3, T, H, W)


@pytest.mark.parametrize("variety", ["full", "simple"])
def test_points_of_any_frame_reproject_onto_the_depth_of_frame_0(variety):
    errors = []
    for seed in range(4):
        clip = rooms.render_clip(seed, 5, 64, 96, variety)
        depth, w2c = (
            torch.from_numpy(clip["depth"]).double()[None],
            torch.from_numpy(clip["w2c"])[None],
        )
        k = torch.from_numpy(clip["intrinsics"]).expand(1, 5, 3, 3)
        points = unproject(depth, w2c, k)[:, 4:].flatten(2, 3)  # (1, 1, P, 3) of the last frame
        uv, z = project(points, w2c[:, :1], k[:, :1])
        grid = (uv / torch.tensor([96.0, 64.0]) * 2 - 1)[:, 0, None]
        seen = torch.nn.functional.grid_sample(depth[:, :1], grid.double(), align_corners=False)[
            0, 0, 0
        ]
        inside = (grid.abs() < 0.98).all(-1)[0, 0] & (z[0, 0] > 0)
        errors.append(((seen - z[0, 0]).abs() / z[0, 0])[inside])
    # bilinear depth of a plane is off by second order only: geometry.md 2.6 measures 2e-5 at this
    # size
    assert torch.cat(errors).median() < 1e-4


def test_depth_is_the_analytic_distance_to_a_wall_seen_head_on():
    variety = dict(rooms.VARIETY["full"], boxes=(0, 0), spheres=(0, 0))
    scene = rooms.make_scene(np.random.default_rng(0), variety, 50.0)
    pose = np.concatenate([np.eye(3), [[0.3], [0.1], [0.2]]], 1)
    k = np.array([[100.0, 0, 8], [0, 100, 8], [0, 0, 1]])  # narrow: the far wall only
    depth, material, points, normals = rooms.trace(scene, pose, k, 16, 16)
    np.testing.assert_allclose(depth, scene["half"][0, 2] - 0.2, rtol=1e-14)
    assert (material == 5).all() and np.allclose(normals, [[0], [0], [-1]])
    assert np.allclose(points[2], scene["half"][0, 2])


def test_sphere_and_box_hits_match_hand_computed_depths():
    variety = dict(rooms.VARIETY["full"], boxes=(1, 1), spheres=(1, 1))
    scene = rooms.make_scene(np.random.default_rng(0), variety, 50.0)
    scene.update(
        centre=np.array([[0, 0, 0], [-0.5, 0, 1.5]]),
        half=np.array([[2.0, 1.5, 3], [0.25, 0.25, 0.25]]),
        rot=np.stack([np.eye(3)] * 2),
        sphere=np.array([[0.5, 0, 1.5]]),
        radius=np.array([0.25]),
    )
    pose, k = np.eye(4)[:3], np.array([[3.0, 0, 1.5], [0, 3, 0.5], [0, 0, 1]])  # x/z = -1/3, 0, 1/3
    depth, material, points, normals = rooms.trace(scene, pose, k, 1, 3)
    # sphere: (t/3 - .5)^2 + (t - 1.5)^2 = 1/16: the ray meets the centre, t = 1.5 - .25 / |(1/3, 0,
    # 1)|
    np.testing.assert_allclose(depth, [1.25, 3, 1.5 - 0.25 / math.sqrt(10 / 9)], rtol=1e-12)
    assert material.tolist() == [6, 5, 7]
    np.testing.assert_allclose(
        normals[:, 2], np.array([-1 / 3, 0, -1]) / math.sqrt(10 / 9), atol=1e-12
    )


def test_colour_is_a_function_of_the_surface_point_so_views_agree():
    clip = rooms.render_clip(11, 5, 96, 160, "simple")
    depth, w2c = torch.from_numpy(clip["depth"]).double()[None], torch.from_numpy(clip["w2c"])[None]
    k = torch.from_numpy(clip["intrinsics"]).expand(1, 5, 3, 3)
    rgb = torch.from_numpy(clip["rgb"]).double() / 255
    uv, z = project(unproject(depth, w2c, k)[:, 4:].flatten(2, 3), w2c[:, :1], k[:, :1])
    grid = (uv / torch.tensor([160.0, 96.0]) * 2 - 1)[:, 0, None].double()
    first = torch.cat([rgb[0].permute(2, 0, 1), depth[0, :1]])[None]  # colour and depth of frame 0
    warped = torch.nn.functional.grid_sample(first, grid, align_corners=False)[0, :, 0]
    same = (grid.abs() < 0.98).all(-1)[0, 0] & ((warped[3] - z[0, 0]).abs() < 0.01 * z[0, 0])
    target = rgb[4].reshape(-1, 3).T
    still = (rgb[0].reshape(-1, 3).T - target)[:, same].abs().mean()
    assert same.float().mean() > 0.3 and (warped[:3] - target)[:, same].abs().mean() < 0.15 * still


def test_clips_depend_on_the_seed_alone():
    a, b, c = (rooms.render_clip(seed, 5, 32, 48) for seed in (3, 3, 4))
    assert all(np.array_equal(a[k], b[k]) for k in ("rgb", "depth", "w2c", "intrinsics", "prompt"))
    assert not np.array_equal(a["depth"], c["depth"])
    np.testing.assert_array_equal(a["w2c"][0], np.eye(3, 4))


def test_cameras_move_and_keep_their_distance_to_every_surface():
    v = rooms.VARIETY["simple"]
    moves = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scene = rooms.make_scene(rng, v, 70.0)
        c2w, kind = rooms.camera_path(rng, v, scene, 9)
        assert rooms.clearance(scene, c2w[:, :, 3]).min() > v["clearance"]
        rot = c2w[:, :, :3]
        assert np.abs(rot @ rot.transpose(0, 2, 1) - np.eye(3)).max() < 1e-12
        moves.append(np.linalg.norm(c2w[-1, :, 3] - c2w[0, :, 3]))
    assert np.median(moves) > 0.8  # metres


def test_captions_name_the_direction_of_the_move():
    scene = dict(half=np.ones((3, 3)), names=np.array(["red", "blue", "green"]))
    c2w = np.stack([np.eye(3, 4)] * 2)
    c2w[1, 2, 3] = 1
    seen = np.array([True, True, True])
    wanted = "a room with two boxes and a green sphere, the camera moves forward"
    assert rooms.caption(scene, seen, c2w, "free") == wanted
    assert rooms.caption(scene, ~seen, c2w, "static") == "an empty room, the camera does not move"


def test_a_damaged_list_of_a_finished_dataset_is_named(tmp_path):
    (tmp_path / "metadata.json").write_text('{"samples"')
    with pytest.raises(ValueError, match="metadata.json: not valid JSON"):
        rooms.synth(tmp_path, rooms.Recipe(1, 5, 32, 48))


def test_a_disk_that_fills_up_at_the_end_leaves_no_half_a_list(tmp_path, monkeypatch):
    def full(path, text):
        with open(path, "w") as file:
            file.write(text[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("pathlib.Path.write_text", full)
        with pytest.raises(OSError, match="No space"):
            rooms.synth(tmp_path, rooms.Recipe(1, 5, 32, 48, variety="simple"))
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000"]
