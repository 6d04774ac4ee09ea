"""Camera files: every format has a hand-made example and comes back as it was written; what is open
is refused."""

import json
import math
import struct

import numpy as np
import pytest
import torch

import data
import geometry
from geometry import inv_se3, quat_to_mat
from lib import camera_files, camera_paths

SIZE = (120, 160)

# The hand-made camera of every example stands at (1, 2, 3) and is turned by 90 degrees about y: its
# z axis is the world's x, its x axis the world's -z.  w2c by hand: geometry.md 6.1c.
C2W = np.array([[0.0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3]])

W2C = np.array([[0.0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1]])

C2W_GL = C2W * [1, -1, -1, 1]  # y up, z backward: columns 2, 3

HALF = math.sqrt(0.5)


def bottom(m):
    return [*np.asarray(m).tolist(), [0, 0, 0, 1]]


def path_of(frames=7, focal=(0.8, 1.0666666667), centre=(0.5, 0.5)):
    torch.manual_seed(0)
    q = torch.cat([0.4 * torch.randn(frames, 3), torch.ones(frames, 1)], -1).double()
    w2c = torch.cat([quat_to_mat(q), torch.randn(frames, 3, 1).double()], -1).numpy()
    return w2c, np.tile([*focal, *centre], (frames, 1))


@pytest.mark.parametrize(
    "form, name",
    [
        ("re10k", "c.txt"),
        ("fantasyworld", "c.json"),
        ("worldscore", "c.json"),
        ("nerfstudio", "transforms.json"),
        ("colmap", "sparse"),
        ("npz", "c.npz"),
        ("colmap binary", "sparse"),
    ],
)
def test_what_is_written_is_read_back(tmp_path, form, name):
    centre = (0.47, 0.52) if form not in ("fantasyworld", "worldscore") else (0.5, 0.5)
    w2c, k = path_of(centre=centre)
    camera_files.write(tmp_path / name, form.split()[0], w2c, k, SIZE, binary="binary" in form)
    again, fractions, _ = camera_files.read(tmp_path / name, form.split()[0], SIZE)
    np.testing.assert_allclose(again, w2c, atol=1e-9)  # 12 digits are written
    np.testing.assert_allclose(fractions, k, atol=1e-9)
    if form.split()[0] not in ("fantasyworld", "worldscore"):
        # recognised
        np.testing.assert_allclose(camera_files.read(tmp_path / name, size=SIZE)[0], w2c, atol=1e-9)


def test_tum_round_trip_keeps_poses_and_has_no_intrinsics(tmp_path):
    w2c, k = path_of()
    camera_files.write(tmp_path / "c.txt", "tum", w2c, k)
    again, fractions, size = camera_files.read(tmp_path / "c.txt")
    np.testing.assert_allclose(again, w2c, atol=1e-9)
    assert fractions is None and size is None
    with pytest.raises(ValueError, match="has none; tum and npz"):
        camera_files.write(tmp_path / "d.txt", "re10k", again)


# ---- hand-made examples
def check(got, focal_px=(80, 80), centre=(80, 60)):
    w2c, k, _ = got
    np.testing.assert_allclose(w2c[0], W2C, atol=1e-12)
    np.testing.assert_allclose(k[0] * [160, 120, 160, 120], [*focal_px, *centre], atol=1e-9)


def test_realestate10k_by_hand(tmp_path):
    row = "0 .5 .66666666666667 .5 .5 0 0 0 0 -1 3 0 1 0 -2 1 0 0 -1\n"
    for head in (
        "",
        "https://www.youtube.com/watch?v=x\n",
        "\n\n",
        "# frame fx fy cx cy 0 0 w2c\n",
    ):
        (tmp_path / "c.txt").write_text(head + row + "\n" + row)
        check(camera_files.read(tmp_path / "c.txt"))


def test_fantasyworld_and_worldscore_json_by_hand_differ_in_axes_alone(tmp_path):
    for form, matrix in (("fantasyworld", C2W), ("worldscore", C2W_GL)):
        (tmp_path / "c.json").write_text(
            json.dumps(
                dict(focal_length=80, scale=1, cameras=[], cameras_interp=[bottom(matrix)] * 2)
            )
        )
        check(camera_files.read(tmp_path / "c.json", form, SIZE))
        with pytest.raises(ValueError, match="--from fantasyworld or --from worldscore"):
            camera_files.read(tmp_path / "c.json", size=SIZE)
        with pytest.raises(ValueError, match="--size HxW"):
            camera_files.read(tmp_path / "c.json", form)


def test_nerfstudio_by_hand_with_shared_frame_and_angle_intrinsics(tmp_path):
    frames = [
        dict(file_path="b.png", transform_matrix=bottom(np.eye(3, 4))),
        dict(file_path="a.png", transform_matrix=bottom(C2W_GL)),
    ]
    for shared in (
        dict(w=160, h=120, fl_x=80, fl_y=80, cx=80, cy=60),
        dict(w=160, h=120, camera_angle_x=math.pi / 2),
    ):
        (tmp_path / "transforms.json").write_text(json.dumps(dict(shared, frames=frames)))
        got = camera_files.read(tmp_path / "transforms.json")
        check(got)
        np.testing.assert_allclose(got[0][1], np.diag([1, -1, -1, 0])[:3], atol=1e-12)
    for lens in (dict(k1=0.1), dict(camera_model="OPENCV_FISHEYE")):
        (tmp_path / "transforms.json").write_text(json.dumps(dict(shared, frames=frames, **lens)))
        with pytest.raises(ValueError, match="undistort"):
            camera_files.read(tmp_path / "transforms.json")


def test_colmap_text_and_binary_by_hand(tmp_path):
    """Inverse of a quarter turn about y: w, x, y, z = .7071, 0, -.7071, 0; the image list is not in
    name order."""
    text, binary = tmp_path / "text", tmp_path / "binary"
    text.mkdir(), binary.mkdir()
    (text / "cameras.txt").write_text("# Camera list\n3 SIMPLE_PINHOLE 160 120 80 80 60\n")
    (text / "images.txt").write_text(
        f"# Image list\n9 1 0 0 0 0 0 0 3 b.png\n1 2 -1 3 4 7\n"
        f"2 {HALF} 0 {-HALF} 0 3 -2 -1 3 a b.png\n\n"
    )
    (binary / "cameras.bin").write_bytes(struct.pack("<QiiQQ4d", 1, 3, 1, 160, 120, 80, 80, 80, 60))
    (binary / "images.bin").write_bytes(
        struct.pack("<Qi7di", 2, 9, 1, 0, 0, 0, 0, 0, 0, 3)
        + b"b.png\0"
        + struct.pack("<Qddqddq", 2, 1, 2, -1, 3, 4, 7)
        + struct.pack("<i7di", 2, HALF, 0, -HALF, 0, 3, -2, -1, 3)
        + b"a.png\0"
        + struct.pack("<Q", 0)
    )
    for folder in (text, binary):
        got = camera_files.read(folder)
        check(got)
        assert got[2] == SIZE
        np.testing.assert_allclose(got[0][1], np.eye(3, 4), atol=1e-12)
    (text / "cameras.txt").write_text("3 OPENCV 160 120 80 80 80 60 .1 0 0 0\n")
    with pytest.raises(ValueError, match="import SRC DIR undistorts"):
        camera_files.read(text)
    # A video that is sampled has no lens: it gets the pinhole that an import would make, whose
    # corner meets that of the picture: zoom = 1 + 0.1 (1 + 0.75^2) / zoom^2.
    _, K = camera_paths.load_camera(str(text), 2, SIZE)
    assert K[0, :, 0, 0].tolist() == pytest.approx([80 * 1.12367] * 2, rel=1e-4)
    (text / "cameras.txt").write_text("3 OPENCV 160 120 80 80 80 60 1e5 0 0 0\n")
    with pytest.raises(ValueError, match="text: .* that no pinhole can replace"):
        camera_paths.load_camera(str(text), 2, SIZE)


def test_tum_and_npz_by_hand(tmp_path):
    (tmp_path / "t.txt").write_text(
        f"# time tx ty tz qx qy qz qw\n0.0 1 2 3 0 {HALF} 0 {HALF}\n1.0 1 2 3 0 0 0 1\n"
    )
    np.testing.assert_allclose(camera_files.read(tmp_path / "t.txt")[0][0], W2C, atol=1e-12)
    K = np.array([[[80.0, 0, 80], [0, 80, 60], [0, 0, 1]]])
    for key, matrix, axes in (("w2c", W2C, None), ("c2w", C2W, None), ("c2w", C2W_GL, "opengl")):
        np.savez(tmp_path / "c.npz", intrinsics=K, size=SIZE, **{key: matrix[None]})
        check(camera_files.read(tmp_path / "c.npz", axes=axes))
    np.savez(tmp_path / "c.npz", poses=C2W[None], intrinsics=K)
    with pytest.raises(ValueError, match="--matrices w2c.c2w"):
        camera_files.read(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="--size HxW"):
        camera_files.read(tmp_path / "c.npz", matrices="c2w")
    check(camera_files.read(tmp_path / "c.npz", matrices="c2w", size=SIZE))


@pytest.mark.parametrize("accident", ["drift", "three digits"])
def test_rotations_a_little_off_become_those_next_to_them(tmp_path, accident):
    """Seen: 7-Scenes' KinectFusion poses, off by 0.0006 and more along the recording."""
    w2c, k = path_of()
    c2w = camera_files.inverse(w2c)
    if accident == "drift":
        c2w[:, :, :3] *= 1.0005
        c2w[:, 0, 1] += 4e-4
    else:
        c2w[:, :, :3] = c2w[:, :, :3].round(3)
    assert 5e-4 < camera_files.off_rotation(c2w) < 5e-3
    K = np.array([[[80.0, 0, 80], [0, 80, 60], [0, 0, 1]]]).repeat(len(c2w), 0)
    np.savez(tmp_path / "c.npz", intrinsics=K, size=SIZE, c2w=c2w)
    found = camera_files.read(tmp_path / "c.npz")[0]
    assert camera_files.off_rotation(found) < 1e-12
    np.testing.assert_allclose(found, w2c, atol=2e-3)
    camera_files.write_cameras(tmp_path / "c.txt", c2w, K, SIZE)
    found, _ = data.checked_cameras(tmp_path / "c.txt")
    assert camera_files.off_rotation(found) < 1e-12
    np.testing.assert_allclose(found, c2w, atol=2e-3)


def test_what_is_no_camera_is_refused_by_name(tmp_path):
    (tmp_path / "m.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n")
    with pytest.raises(ValueError, match="bare matrices"):
        camera_files.read(tmp_path / "m.txt")
    np.savez(tmp_path / "c.npz", w2c=2 * W2C[None])
    with pytest.raises(ValueError, match="not orthonormal"):
        camera_files.read(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="absent.json: no such file"):
        camera_files.read(tmp_path / "absent.json", "worldscore", SIZE)
    w2c, k = path_of(focal=(0.8, 1.2))
    with pytest.raises(ValueError, match="one focal length"):
        camera_files.write(tmp_path / "c.json", "fantasyworld", w2c, k, SIZE)


@pytest.mark.parametrize(
    "frames, said", [([], "it has no frames"), ([{"file_path": "a.png"}], "a.png has no transform")]
)
def test_a_transforms_file_without_cameras_says_so_and_no_file_is_its_own_target(
    tmp_path, monkeypatch, frames, said
):
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps(dict(frames=frames, fl_x=100, w=64, h=48)))
    with pytest.raises(ValueError, match=f"transforms.json: .*{said}"):
        camera_files.read(path)
    monkeypatch.setattr("sys.argv", ["data.py", "cameras", str(path), f"{tmp_path}/./{path.name}"])
    with pytest.raises(ValueError, match="the file to convert; name another one to write"):
        data.command()


def test_command_converts_and_names_what_it_needs(tmp_path, monkeypatch, capsys):
    w2c, k = path_of()
    camera_files.write(tmp_path / "c.json", "worldscore", w2c, k, SIZE)
    common = ["data.py", "cameras", str(tmp_path / "c.json"), str(tmp_path / "c.txt")]
    monkeypatch.setattr("sys.argv", [*common, "--from", "worldscore", "--size", "120x160"])
    data.command()
    np.testing.assert_allclose(camera_files.read(tmp_path / "c.txt")[0], w2c, atol=1e-9)
    monkeypatch.setattr("sys.argv", common)
    with pytest.raises(ValueError, match="--from worldscore"):
        data.command()


# ---- key frames
def test_look_at_by_hand():
    np.testing.assert_allclose(camera_paths.look_at((0, 0, 0), (0, 0, 5)), np.eye(3, 4), atol=1e-12)
    np.testing.assert_allclose(camera_paths.look_at((1, 2, 3), (9, 2, 3)), W2C, atol=1e-12)
    with pytest.raises(ValueError, match="looks straight up, down or nowhere"):
        camera_paths.look_at((0, 0, 0), (0, 3, 0))


def test_interpolation_meets_the_key_frames_and_moves_along_a_constant_screw():
    w2c, _ = path_of(3)
    path = torch.from_numpy(camera_paths.interpolate([0, 4, 10], w2c, np.arange(11)))
    np.testing.assert_allclose(path[[0, 4, 10]], w2c, atol=1e-12)
    steps = [geometry.compose(path[i + 1], inv_se3(path[i])) for i in range(4)]
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], atol=1e-12, rtol=0)
    twist = torch.randn(20, 6).double()
    torch.testing.assert_close(camera_paths.log_se3(camera_paths.exp_se3(twist)), twist)
    torch.testing.assert_close(
        camera_paths.log_se3(camera_paths.exp_se3(1e-9 * twist)), 1e-9 * twist, atol=1e-15, rtol=0
    )


def test_half_way_of_a_quarter_turn_about_a_pivot_stays_on_the_circle():
    keys = np.stack(
        [camera_paths.look_at((0, 0, -2), (0, 0, 0)), camera_paths.look_at((-2, 0, 0), (0, 0, 0))]
    )
    middle = camera_paths.interpolate([0, 1], keys, [0.5])
    np.testing.assert_allclose(
        middle[0], camera_paths.look_at((-math.sqrt(2), 0, -math.sqrt(2)), (0, 0, 0)), atol=1e-12
    )
