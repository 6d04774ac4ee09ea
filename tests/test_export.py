"""Files of a sample, read back by readers written from the formats' own descriptions."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from geometry import encode_pose, inv_se3, normalize_scene, unproject
from lib import camera_files, pictures
from lib import export as E
from lib.files import read_array, read_video
from lib.page import page_numbers
from lib.rooms import render_clip

T, H, W = 5, 32, 48


def sampled(seed=4, bend=0.0, scene_scale=None, slow=1.0, drop=20.0):
    """A rendered room as a perfect model would sample it; slow: length of the predicted path, bend:
    its turn."""
    clip = render_clip(seed, T, H, W, "simple")
    depth, w2c = torch.from_numpy(clip["depth"])[None], torch.from_numpy(clip["w2c"]).float()[None]
    K = torch.from_numpy(clip["intrinsics"]).float().expand(1, T, 3, 3)
    depth, w2c, scale = normalize_scene(depth, w2c, K, depth > 0)
    seen = w2c.clone()
    seen[..., 3] *= slow
    turn = torch.tensor(
        [[np.cos(bend), 0, np.sin(bend)], [0, 1, 0], [-np.sin(bend), 0, np.cos(bend)]]
    ).float()
    seen[:, 1:, :, :3] = turn @ seen[:, 1:, :, :3]
    conf = (1 + torch.linspace(0, 1, H * W)).view(1, 1, H, W).repeat(1, T, 1, 1)
    geometry = dict(
        depth=depth,
        depth_conf=conf,
        pose_enc=encode_pose(seen, K, (H, W))[None],
        points=unproject(depth, w2c, K),
    )
    scene = E.make_scene(
        torch.from_numpy(clip["rgb"]).permute(3, 0, 1, 2) / 127.5 - 1,
        geometry,
        w2c,
        K,
        scene_scale=float(scale) if scene_scale is None else scene_scale,
        drop=drop,
    )
    scene.report.update(prompt="a room", facts="rendered", warnings=[])
    return scene, clip


@pytest.fixture(scope="module")
def scene():
    return sampled()[0]


@pytest.fixture(scope="module")
def out(scene, tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    E.write_exports(scene, folder, E.export_names("all"))
    return folder


# ---- the user's unit
def test_depth_comes_back_in_the_users_unit_when_the_predicted_path_is_the_commanded_one():
    scene, clip = sampled()
    unit = scene.report["unit"]
    assert unit["fitted"] and unit["residual"] < 1e-5 * unit["scale"]
    np.testing.assert_allclose(scene.depth, clip["depth"], rtol=2e-4)
    assert (
        scene.report["control"]["rot_deg"] < 0.05
        and scene.report["control"]["trans"] < 1e-4 * unit["scale"]
    )


def test_a_path_of_half_the_commanded_length_means_that_scene_units_are_twice_as_long():
    """Hand computed: centres p = c / 2 are laid on c by the factor 2, whatever scale the model was
    told."""
    (full, _), (half, _) = sampled(), sampled(slow=0.5)
    assert abs(half.report["unit"]["scale"] / full.report["unit"]["scale"] - 2) < 1e-3
    np.testing.assert_allclose(half.depth, 2 * full.depth, rtol=1e-3)
    np.testing.assert_allclose(half.predicted, full.predicted, atol=1e-3)
    np.testing.assert_array_equal(half.w2c, full.w2c)  # the commanded path is the user's


def test_a_path_too_short_or_not_followed_keeps_the_scene_scale_and_says_so():
    still = np.tile(np.eye(4)[:3], (T, 1, 1))
    unit = E.fit_unit(still, still, 3.0)
    assert unit["scale"] == 3 and not unit["fitted"] and "move too little" in unit["warning"]
    walk, away = still.copy(), still.copy()
    walk[:, 0, 3], away[:, 1, 3] = np.linspace(0, 1, T), np.random.default_rng(0).normal(size=T)
    unit = E.fit_unit(walk, away, 3.0)
    assert (
        unit["scale"] == 3
        and "do not follow the commanded path" in unit["warning"]
        and unit["residual"] > 0
    )


def test_a_rotation_error_of_3_degrees_is_reported_as_3_degrees():
    frames = sampled(bend=np.radians(3))[0].report["control"]["frames"]
    assert frames[0]["rot_deg"] < 0.01 and all(abs(f["rot_deg"] - 3) < 0.01 for f in frames[1:])


def test_consistency_is_near_perfect_on_a_true_scene_and_worse_with_depth_off_by_a_tenth(scene):
    true = scene.report["consistency"]
    assert true["depth"] < 0.5 and true["colour"] < true["colour_still"] and true["heads"] < 0.1
    depth = scene.depth * (1 + 0.1 * np.arange(T)[:, None, None] / T).astype(np.float32)
    wrong = E.measure(replace(scene, depth=depth))["consistency"]
    assert wrong["depth"] > 3 * true["depth"] and wrong["colour"] > true["colour"]


def test_nan_geometry_is_refused_with_the_cure():
    bad = torch.full((1, T, H, W), float("nan"))
    with pytest.raises(ValueError, match="NaN.*--dtype fp32"):
        E.make_scene(
            torch.zeros(3, T, H, W),
            dict(depth=bad, depth_conf=bad, pose_enc=torch.zeros(1, 1, T, 9)),
            torch.eye(4)[:3].expand(1, T, 3, 4),
            torch.eye(3).expand(1, T, 3, 3),
        )


def test_numbers_that_no_pixel_tells_are_null_in_the_report(scene, tmp_path):
    """As after a pan so wide that neighbouring frames share nothing; NaN is no JSON."""
    nothing = replace(scene, mask=np.zeros_like(scene.mask))
    nothing.report = scene.report | E.measure(nothing)
    E.write_exports(nothing, tmp_path, ["cameras"])
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and json.loads(text)["consistency"]["colour"] is None
    told = [E.describe(report, "m") for report in (nothing.report, json.loads(text))]
    assert told[0] == told[1] and "depth differs by unknown, colour by unknown" in told[0][1]
    shown = json.dumps(page_numbers(nothing.report, "m"))
    assert "nan %" not in shown and shown.count("unknown") == 4


# ---- videos and depth
def test_video_and_depth_video_with_its_legend(scene, out):
    frames, told = read_video(out / "video.mp4")
    assert (
        frames.shape == (T, H, W, 3)
        and told[1] == 16
        and np.abs(frames.astype(int) - scene.rgb).mean() < 6
    )
    depth, _ = read_video(out / "depth.mp4")
    assert depth.shape == (T, H + 14, W, 3)
    strip = depth[0, H + 1 : H + 3].mean(0).astype(int)
    assert strip[0].sum() > 450 and strip[-1].sum() < 250  # near is bright, far is dark


def test_depth_arrays_and_16_bit_pictures_hold_the_depth(scene, out):
    with np.load(out / "depth.npz") as f:
        assert f["depth"].dtype == np.float32 and f["mask"].dtype == bool and f["conf"].min() >= 1
        np.testing.assert_array_equal(f["depth"], scene.depth)
        np.testing.assert_allclose(f["w2c"], scene.w2c, atol=1e-6)
    step = json.loads((out / "depth_png" / "scale.json").read_text())["depth_scale"]
    for t in range(T):
        assert (
            np.abs(
                read_array(out / "depth_png" / f"frame_{t:05d}.png") * step - scene.depth[t]
            ).max()
            <= step * 0.51
        )
    assert scene.depth.max() / step > 6500  # at least that many levels are used


# ---- point clouds
def read_ply(path):
    header, _, body = path.read_bytes().partition(b"end_header\n")
    lines = header.decode().split("\n")
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    kinds = dict(float="<f4", uchar="u1")
    names = [
        (line.split()[2], kinds[line.split()[1]]) for line in lines if line.startswith("property")
    ]
    table = np.frombuffer(body, names)
    assert len(table) == int(lines[2].split()[2])
    return table


def test_ply_holds_the_sure_points_off_edges(scene, out):
    table = read_ply(out / "points.ply")
    assert len(table) == scene.mask.sum() < 0.81 * T * H * W
    np.testing.assert_array_equal(np.stack([table[c] for c in "xyz"], 1), scene.points[scene.mask])
    np.testing.assert_array_equal(
        np.stack([table[c] for c in ("red", "green", "blue")], 1), scene.rgb[scene.mask]
    )


def test_depth_edges_and_the_picture_border_at_a_jump_are_left_out():
    depth = np.ones((1, 6, 8), np.float32)
    depth[..., 4:] = 2
    keep = pictures.off_edges(depth)
    assert not keep[0, :, [0, 3, 4, 7]].any() and keep[0, :, [1, 2, 5, 6]].all()


def test_glb_is_valid_gltf_with_y_up(scene, out):
    data = (out / "points.glb").read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and size % 4 == 0
    tree, (body_size, kind) = (
        json.loads(data[20 : 20 + size]),
        struct.unpack_from("<I4s", data, 20 + size),
    )
    body = data[28 + size :]
    assert (
        kind == b"BIN\0"
        and body_size == len(body) == tree["buffers"][0]["byteLength"]
        and body_size % 4 == 0
    )
    primitive = tree["meshes"][0]["primitives"][0]
    assert primitive["mode"] == 0 and tree["scenes"][0]["nodes"] == [0]
    arrays = {}
    for name, index in primitive["attributes"].items():
        a = tree["accessors"][index]
        view = tree["bufferViews"][a["bufferView"]]
        width = {"VEC3": 3, "VEC4": 4}[a["type"]]
        arrays[name] = np.frombuffer(
            body, {5126: "<f4"}[a["componentType"]], a["count"] * width, view["byteOffset"]
        ).reshape(-1, width)
    position = tree["accessors"][0]
    np.testing.assert_allclose(arrays["POSITION"].min(0), position["min"], rtol=1e-6)
    np.testing.assert_allclose(arrays["POSITION"].max(0), position["max"], rtol=1e-6)
    np.testing.assert_array_equal(arrays["POSITION"] * [1, -1, -1], scene.points[scene.mask])
    linear = (scene.rgb[scene.mask] / 255 + 0.055) / 1.055  # sRGB curve above 0.04
    bright = (scene.rgb[scene.mask] > 11).all(1)
    np.testing.assert_allclose(arrays["COLOR_0"][bright, :3], linear[bright] ** 2.4, atol=1e-5)
    assert (arrays["COLOR_0"][:, 3] == 1).all()


def test_gaussians_have_the_reference_columns_colours_and_pixel_sized_widths(scene, out):
    table = read_ply(out / "gaussians.ply")
    wanted = [
        "x",
        "y",
        "z",
        "nx",
        "ny",
        "nz",
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(45)),
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
    ]
    assert list(table.dtype.names) == wanted and len(table) == scene.mask.sum()
    rgb = np.stack([0.5 + 0.28209479 * table[f"f_dc_{c}"] for c in range(3)], 1) * 255
    np.testing.assert_allclose(rgb, scene.rgb[scene.mask], atol=0.01)
    fx = scene.intrinsics[0, 0] * W
    np.testing.assert_allclose(np.exp(table["scale_0"]), scene.depth[scene.mask] / fx, rtol=1e-4)
    assert (table["rot_0"] == 1).all() and np.allclose(1 / (1 + np.exp(-table["opacity"])), 0.8)


# ---- cameras and folders
def test_cameras_come_back_commanded_and_predicted(scene, out):
    found, intrinsics, _ = camera_files.read(out / "cameras.txt")
    np.testing.assert_allclose(found, scene.w2c, atol=1e-9)
    np.testing.assert_allclose(intrinsics, scene.intrinsics, atol=1e-6)
    np.testing.assert_allclose(
        camera_files.read(out / "cameras_predicted.txt")[0], scene.predicted, atol=1e-9
    )


def test_colmap_folder_in_bytes_and_in_text(scene, out):
    for place in ("sparse/0", "text"):
        w2c, intrinsics, size = camera_files.read(out / "colmap" / place)
        np.testing.assert_allclose(w2c, scene.w2c, atol=1e-9)
        np.testing.assert_allclose(intrinsics, scene.intrinsics, atol=1e-9)
        assert size == (H, W)
    data = (out / "colmap" / "sparse" / "0" / "points3D.bin").read_bytes()
    (count,), at, found = struct.unpack_from("<Q", data), 8, []
    for _ in range(count):  # id, xyz, rgb, error, track length, (image, point) pairs
        point = struct.unpack_from("<Q3d3BdQ", data, at)
        found.append(point[1:7])
        at += 43 + 8 + 8 * point[-1]
    assert at == len(data) and count == scene.mask.sum()
    np.testing.assert_allclose(np.array(found)[:, :3], scene.points[scene.mask], rtol=1e-6)
    text = [
        line.split() for line in (out / "colmap" / "text" / "points3D.txt").read_text().splitlines()
    ]
    np.testing.assert_allclose(np.array(text, float)[:, 1:7], np.array(found), rtol=1e-5, atol=1e-6)
    assert sorted(p.name for p in (out / "colmap" / "images").iterdir()) == [
        f"frame_{t:05d}.png" for t in range(T)
    ]


def test_nerfstudio_folder_projects_its_points_to_the_pixels_they_came_from(scene, out):
    """OpenGL camera: x right, y up, looks along -z; u = cx + fl_x x / -z, v = cy - fl_y y / -z."""
    tree = json.loads((out / "nerfstudio" / "transforms.json").read_text())
    ply = read_ply(out / "nerfstudio" / tree["ply_file_path"])
    xyz = np.stack([ply[c] for c in "xyz"] + [np.ones(len(ply))], 1)
    index = np.flatnonzero(scene.mask)
    for t, frame in enumerate(tree["frames"]):
        assert (out / "nerfstudio" / frame["file_path"]).is_file()
        depth = (
            read_array(out / "nerfstudio" / frame["depth_file_path"])
            * tree["depth_unit_scale_factor"]
        )
        np.testing.assert_allclose(depth, scene.depth[t], atol=tree["depth_unit_scale_factor"])
        own = index // (H * W) == t
        cam = xyz[own] @ np.linalg.inv(frame["transform_matrix"]).T
        u = frame["cx"] + frame["fl_x"] * cam[:, 0] / -cam[:, 2]
        v = frame["cy"] - frame["fl_y"] * cam[:, 1] / -cam[:, 2]
        np.testing.assert_allclose(u, index[own] % W + 0.5, atol=1e-3)
        np.testing.assert_allclose(v, index[own] // W % H + 0.5, atol=1e-3)


def test_points_lifted_with_the_predicted_cameras_lie_where_those_see_them(scene):
    bent, _ = sampled(bend=0.1)
    seen = replace(bent, lift="predicted")
    w2c, K = seen.cameras()
    cam = np.einsum("tij,thwj->thwi", w2c[:, :, :3], seen.points) + w2c[:, None, None, :, 3]
    np.testing.assert_allclose(cam[..., 2], seen.depth, rtol=1e-4)
    assert w2c is seen.predicted and not np.allclose(seen.points, bent.points, atol=1e-2)


# ---- choosing
def test_export_all_writes_every_name_and_unknown_names_are_refused(out):
    assert (
        all((out / name).exists() for name in E.files_of(E.EXPORTS))
        and (out / "report.json").is_file()
    )
    with pytest.raises(ValueError, match="--export obj: unknown; wanted all, or names of video,"):
        E.export_names("video,obj")


def test_a_strangers_words_do_not_reach_files_in_which_they_could_mean_something(out, tmp_path):
    hostile, _ = sampled()
    words = "m\nend_header\nelement vertex 9\n# Camera list\n</script>\x1b[2J"
    hostile = replace(hostile, unit=words)
    hostile.report.update(prompt=words, facts=words)
    E.write_exports(hostile, tmp_path, E.export_names("ply,glb,splat,colmap,cameras"))
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name[0] != "."]
    files = [path for path in files if path.suffix != ".json"]  # JSON quotes them
    assert {path.suffix for path in files} >= {".ply", ".glb", ".bin", ".txt"}
    for path in files:
        assert path.read_bytes() == (out / path.relative_to(tmp_path)).read_bytes(), path


def test_a_rerun_with_fewer_frames_leaves_no_stale_picture(scene, tmp_path):
    E.write_exports(scene, tmp_path, ["png"])
    short = replace(scene, depth=scene.depth[:3])
    E.write_exports(short, tmp_path, ["png"])
    assert len(list((tmp_path / "depth_png").glob("*.png"))) == 3


def test_points_are_thinned_evenly_to_the_number_asked_for(scene):
    xyz, rgb, index = scene.cloud(100)
    assert xyz.shape == (100, 3) and rgb.shape == (100, 3) and (np.diff(index) > 0).all()
    assert {int(i) // (H * W) for i in index} == set(range(T))
    centre = inv_se3(torch.from_numpy(scene.w2c))[index // (H * W), :, 3].numpy()
    assert (np.linalg.norm(xyz - centre, axis=1) >= scene.depth.reshape(-1)[index] - 1e-4).all()


def test_an_export_replaces_nothing_that_it_has_not_made(scene, tmp_path):
    (tmp_path / "colmap").mkdir()
    (tmp_path / "colmap" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="colmap/* is there and was not made by sample.py"):
        E.check_out(tmp_path, ["video", "colmap"])
    E.write_exports(scene, tmp_path, ["cameras", "png"])  # the others go
    with pytest.raises(ValueError, match="was not made by sample.py"):
        E.write_exports(scene, tmp_path, ["colmap"])
    assert (tmp_path / "colmap" / "mine.txt").read_text() == "precious"


def test_a_folder_holds_one_samples_files(scene, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    E.write_exports(scene, tmp_path, ["cameras", "png", "video"])
    E.write_exports(scene, tmp_path, ["video"])
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".sample", "notes.txt", "report.json", "video.mp4"]


def test_every_file_that_an_export_writes_is_named(scene, tmp_path):
    """Seen: cameras_predicted.txt was in no list, neither printed nor on the page of app.py."""
    E.write_exports(scene, tmp_path, E.export_names("cameras,npz"))
    there = {path.name for path in tmp_path.iterdir()} - {".sample", "report.json"}
    assert there == set(E.files_of(["cameras", "npz"])) == E.made_before(tmp_path)


def test_a_format_that_cannot_hold_the_sample_costs_no_other_file(scene, tmp_path):
    empty = replace(scene, mask=np.zeros_like(scene.mask))
    with pytest.raises(ValueError, match="points.glb: no point is sure enough to draw"):
        E.write_exports(empty, tmp_path, E.export_names("glb,npz,cameras"))
    assert (tmp_path / "depth.npz").exists() and (tmp_path / "report.json").exists()
