"""Camera files of other programs: order, lens, lost frames, sizes the wrong way round."""

import json

import numpy as np
import pytest

from lib import camera_files, camera_paths

W2C = camera_paths.camera_move("orbit", 12, 1.0)[0].double().numpy()
C2W = camera_files.homogeneous(camera_files.inverse(W2C)) * [1, -1, -1, 1]  # OpenGL axes
NAMES = [f"images/frame {n}.png" for n in range(1, 13)]  # 1, 2 ... 12: not padded
PINHOLE = dict(w=640, h=480, fl_x=500, fl_y=500, cx=320, cy=240)


def nerfstudio(path, order, frame=(), **top):
    frames = [dict(frame, file_path=NAMES[i], transform_matrix=C2W[i].tolist()) for i in order]
    path.write_text(json.dumps(dict(top or PINHOLE, frames=frames)))
    return path


def colmap(folder, order, between="\n", names=NAMES):
    camera_files.write(folder, "colmap", W2C, np.tile([0.8, 1.05, 0.5, 0.5], (12, 1)), (480, 640))
    rows = [r for r in (folder / "images.txt").read_text().splitlines() if r]
    rows = [f"{r.rsplit(maxsplit=1)[0]} {n}" for r, n in zip(rows, names)]
    (folder / "images.txt").write_text(between.join(f"{rows[i]}\n" for i in order) + between)
    return folder


ORDERS = [list(range(12)), [0, 9, 10, 11, *range(1, 9)], list(range(11, -1, -1))]


@pytest.mark.parametrize("order", ORDERS)
def test_frames_come_in_natural_order(tmp_path, order):
    for path in (nerfstudio(tmp_path / "t.json", order), colmap(tmp_path / "model", order)):
        got, _, _ = camera_files.read(path)
        np.testing.assert_allclose(got, W2C, atol=1e-6)


@pytest.mark.parametrize(
    "between", ["\n", "", "1.5 2.5 -1 3e2 4.25 17\n", "1 2 3 4 5 6 7 8 9 1 2 3\n"]
)
def test_lines_of_colmap_are_told_by_what_they_hold(tmp_path, between):
    """A blank second line, none, or points; a first line that is blank."""
    folder = colmap(tmp_path / "model", range(12), between)
    text = (folder / "images.txt").read_text()
    (folder / "images.txt").write_text("# comment\n\n" + text)
    np.testing.assert_allclose(camera_files.read(folder)[0], W2C, atol=1e-6)


def test_names_with_blanks_and_without_endings_are_kept_apart(tmp_path):
    names = [f"my clip/{n:04d}" for n in range(12)]
    folder = colmap(tmp_path / "model", ORDERS[1], names=names)
    np.testing.assert_allclose(camera_files.read(folder)[0], W2C, atol=1e-6)


def test_a_model_without_images_and_a_broken_line_are_named(tmp_path):
    folder = colmap(tmp_path / "model", range(12))
    (folder / "images.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="model: no registered image"):
        camera_files.read(folder)
    (folder / "images.txt").write_text("1 0 0 0 1 a.png\n")
    with pytest.raises(ValueError, match="images.txt: line '1 0 0 0 1 a.png'; wanted IMAGE_ID"):
        camera_files.read(folder)


@pytest.mark.parametrize(
    "frame, top",
    [
        ((), dict(PINHOLE, is_fisheye=True)),
        ((), dict(PINHOLE, camera_model="OPENCV_FISHEYE")),
        (dict(camera_model="OPENCV_FISHEYE"), PINHOLE),
        (dict(camera_model="EQUIRECTANGULAR"), PINHOLE),
    ],
)
def test_another_lens_is_refused_wherever_it_is_said(tmp_path, frame, top):
    path = nerfstudio(tmp_path / "t.json", range(12), frame, **top)
    with pytest.raises(ValueError, match="t.json: .*undistort"):
        camera_files.read(path)


def test_a_file_without_a_focal_length_and_a_camera_of_too_few_numbers_say_so(tmp_path):
    """Seen: KeyError('camera_angle_x'); "zip() argument 2 is shorter than argument 1"."""
    frame = dict(file_path="a.png", transform_matrix=np.eye(4).tolist())
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps(dict(w=64, h=48, frames=[frame])))
    with pytest.raises(ValueError, match="transforms.json: a.png has no focal length: no fl_x and"):
        camera_files.read(path)
    path.write_text(json.dumps(dict(w=64, h=48, camera_angle_y=1.0, frames=[frame])))
    np.testing.assert_allclose(camera_files.read(path)[1][0, :2] * [64, 48], 24 / np.tan(0.5))
    (tmp_path / "cameras.txt").write_text("1 OPENCV 64 48 60 60 32 24 0.1\n")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 0 1 a.png\n\n")
    said = "cameras.txt: 5 numbers of a OPENCV; wanted fx fy cx cy k1 k2 p1 p2"
    with pytest.raises(ValueError, match=said):
        camera_files.read(tmp_path)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("form", ["npz", "tum", "nerfstudio"])
def test_lost_frames_are_named_on_every_way_in(tmp_path, form, value):
    w2c = W2C.copy()
    w2c[[3, 7], :, 3] = value
    path = tmp_path / {"npz": "a.npz", "tum": "a.txt", "nerfstudio": "t.json"}[form]
    if form == "npz":
        np.savez(path, w2c=w2c)
    elif form == "tum":
        camera_files.write(path, "tum", W2C)
        rows = np.loadtxt(path)
        rows[[3, 7], 1:4] = value
        np.savetxt(path, rows)
    else:
        nerfstudio(path, range(12))
        data = json.loads(path.read_text())
        for n in (3, 7):
            data["frames"][n]["transform_matrix"][0][3] = value
        path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"{path.name}: 2 poses are not finite \(frames 3, 7\)"):
        camera_files.read(path)
    with pytest.raises(ValueError, match="frames 3, 7"):
        camera_paths.load_camera(str(path), 12, (48, 64))


def test_a_size_the_wrong_way_round_is_seen(tmp_path):
    K = np.tile([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]], (12, 1, 1))
    np.savez(tmp_path / "a.npz", w2c=W2C, intrinsics=K)
    _, fractions, _ = camera_files.read(tmp_path / "a.npz", size=(480, 640))
    np.testing.assert_allclose(fractions[0], [500 / 640, 500 / 480, 0.5, 0.5])
    with pytest.raises(ValueError, match="its size 640x480 .height x width."):
        camera_files.read(tmp_path / "a.npz", size=(640, 480))


def test_a_principal_point_off_the_middle_is_allowed(tmp_path):
    """A crop has one; only a size that fits better the other way round is doubted."""
    K = np.tile([[500.0, 0, 420], [0, 500, 200], [0, 0, 1]], (12, 1, 1))
    np.savez(tmp_path / "a.npz", w2c=W2C, intrinsics=K)
    camera_files.read(tmp_path / "a.npz", size=(480, 640))


def test_depth_files_are_in_the_order_of_their_numbers(tmp_path):
    from lib.files import read_arrays

    for n in (1, 2, 9, 10, 11, 100):
        np.save(tmp_path / f"d{n}.npy", np.full((2, 2), n, np.float32))
    (tmp_path / "._d1.npy").write_bytes(b"what macOS leaves on other disks")
    assert read_arrays(tmp_path)[:, 0, 0].tolist() == [1, 2, 9, 10, 11, 100]
