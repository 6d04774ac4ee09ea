"""Camera files as labelers and datasets leave them load as they are, or ask for one option."""

import pathlib

import numpy as np
import pytest

from lib import camera_files, camera_paths
from lib.pictures import write_video

FIELD = pathlib.Path(__file__).parents[2] / "shared" / "field"
W2C = camera_paths.camera_move("spiral", 12, 1.0)[0].double().numpy()
C2W = camera_files.homogeneous(camera_files.inverse(W2C))
K = np.array([[500.0, 0, 330], [0, 510, 230], [0, 0, 1]])
SIZE, PIXELS = (480, 640), np.array([500.0, 510, 330, 230])
WANT = PIXELS / [640, 480, 640, 480]
ALL = np.tile(K, (12, 1, 1))
FULL, VIDEO = camera_files.homogeneous(W2C), np.zeros((1, 12, 3, *SIZE), "u1")
QUAT = np.concatenate(
    [
        C2W[:, :3, 3],
        camera_files.mat_to_quat(camera_files.torch.from_numpy(C2W[:, :3, :3].copy())).numpy(),
    ],
    1,
)


def check(found, lens=True):
    w2c, k, size = found
    np.testing.assert_allclose(w2c, W2C, atol=1e-6)
    if lens:
        np.testing.assert_allclose(k, np.tile(WANT, (12, 1)), atol=1e-6)
        assert tuple(size) == SIZE


@pytest.mark.parametrize(
    "name, arrays",
    [
        ("megasam", dict(images=np.zeros((12, *SIZE, 3), "u1"), cam_c2w=C2W, intrinsic=K)),
        ("da3", dict(depth=np.zeros((12, *SIZE), "f2"), extrinsics=W2C, intrinsics=ALL)),
        (
            "vggt",
            dict(
                images=np.zeros((1, 12, 3, *SIZE), "u1"), extrinsic=W2C[None], intrinsic=ALL[None]
            ),
        ),
        (
            "lyra",
            dict(
                w2c=camera_files.homogeneous(W2C), intrinsics=ALL, image_height=480, image_width=640
            ),
        ),
        ("four numbers", dict(c2w=C2W, intrinsics=np.tile(PIXELS, (12, 1)), size=SIZE)),
        ("one for all", dict(c2w=C2W, K=K, depths=np.zeros((12, *SIZE), "f2"))),
        ("fractions", dict(w2c=W2C, intrinsics=np.tile(WANT, (12, 1)), size=SIZE)),
    ],
)
def test_npz_of_the_fields_tools(tmp_path, name, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    check(camera_files.read(tmp_path / "a.npz"))


def vipe(folder, inds=range(12), model="PINHOLE"):
    for part in ("pose", "intrinsics", "rgb"):
        (folder / part).mkdir(parents=True)
    n = np.array(list(inds))
    np.savez(folder / "pose" / "clip.npz", data=C2W[n], inds=n)
    np.savez(folder / "intrinsics" / "clip.npz", data=np.tile(PIXELS, (len(n), 1)), inds=n)
    (folder / "intrinsics" / "clip_camera.txt").write_text("".join(f"{i}: {model}\n" for i in n))
    write_video(folder / "rgb" / "clip.mp4", np.zeros((2, *SIZE, 3), np.uint8), 15)
    return folder / "pose" / "clip.npz"


def test_vipe_with_its_intrinsics_and_the_size_of_its_video(tmp_path):
    check(camera_files.read(vipe(tmp_path)))


def test_vipe_names_frames_without_a_pose_and_other_lenses(tmp_path):
    with pytest.raises(ValueError, match=r"clip.npz: no pose for frames \[3, 7\]"):
        camera_files.read(vipe(tmp_path / "a", [0, 1, 2, 4, 5, 6, 8, 9]))
    with pytest.raises(ValueError, match="clip_camera.txt: wanted PINHOLE"):
        camera_files.read(vipe(tmp_path / "b", model="MEI"))


def test_lingbot_and_spatialvid_arrays(tmp_path):
    np.save(tmp_path / "poses.npy", C2W)
    with pytest.raises(ValueError, match="poses.npy: bare matrices: which way do they map"):
        camera_files.read(tmp_path / "poses.npy")
    np.save(tmp_path / "intrinsics.npy", np.tile(PIXELS, (12, 1)))
    check(camera_files.read(tmp_path / "poses.npy", size=SIZE))
    with pytest.raises(ValueError, match="give --size HxW"):
        camera_files.read(tmp_path / "poses.npy")
    q = camera_files.mat_to_quat(camera_files.torch.from_numpy(W2C[:, :, :3].copy())).numpy()
    np.save(tmp_path / "poses.npy", np.concatenate([W2C[:, :, 3], q], 1))
    np.save(tmp_path / "intrinsics.npy", np.tile(WANT, (12, 1)))
    check(camera_files.read(tmp_path / "poses.npy", size=SIZE))


def test_tartanair_by_hand(tmp_path):
    """Forward is x there and z here; down is z there and y here."""
    np.savetxt(tmp_path / "pose_left.txt", [[1, 2, 3, 0, 0, 0, 1], [2, 2, 3, 0, 0, 0, 1]])
    w2c, k, size = camera_files.read(tmp_path / "pose_left.txt")
    centre = -w2c[:, :, :3].transpose(0, 2, 1) @ w2c[:, :, 3:]
    np.testing.assert_allclose(centre[..., 0], [[2, 3, 1], [2, 3, 2]], atol=1e-12)
    np.testing.assert_allclose(k[0] * [640, 480, 640, 480], [320, 320, 320, 240])
    # a turn to the right about z (down) there is one about y (down) here
    s = np.sqrt(0.5)
    np.savetxt(tmp_path / "pose_left.txt", [[0, 0, 0, 0, 0, s, s]])
    w2c = camera_files.read(tmp_path / "pose_left.txt")[0][0]
    np.testing.assert_allclose(w2c[:, :3] @ [1, 0, 0], [0, 0, 1], atol=1e-12)  # right: now ahead


def test_quaternions_without_a_time_ask_whose_axes(tmp_path):
    np.savetxt(tmp_path / "pose.txt", QUAT)
    with pytest.raises(ValueError, match="pose.txt: .*--from tartanair .* or --from tum"):
        camera_files.read(tmp_path / "pose.txt")
    check(camera_files.read(tmp_path / "pose.txt", "tum"), lens=False)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("kind", ["w2c", "c2w"])
def test_bare_matrices_ask_which_way_and_take_intrinsics(tmp_path, index, rows, kind):
    m = (C2W if kind == "c2w" else camera_files.homogeneous(W2C))[:, :rows].reshape(12, -1)
    m = np.concatenate([np.arange(12)[:, None], m], 1) if index else m
    np.savetxt(tmp_path / "traj.txt", m)
    with pytest.raises(ValueError, match="traj.txt: bare matrices: .*--matrices w2c.c2w"):
        camera_files.read(tmp_path / "traj.txt")
    told = dict(size=SIZE, matrices=kind, intrinsics=tuple(PIXELS))
    check(camera_files.read(tmp_path / "traj.txt", **told))


def test_open3d_log(tmp_path):
    text = "".join(
        f"{t} {t} {t + 1}\n" + "\n".join(" ".join(map(str, r)) for r in m) + "\n"
        for t, m in enumerate(C2W)
    )
    (tmp_path / "trajectory.log").write_text(text)
    check(camera_files.read(tmp_path / "trajectory.log"), lens=False)
    (tmp_path / "trajectory.log").write_text(text[:-30])
    with pytest.raises(ValueError, match="trajectory.log"):
        camera_files.read(tmp_path / "trajectory.log")


@pytest.mark.parametrize("name", ["frame-{:06d}.pose.txt", "{}.txt"])
def test_one_file_a_frame(tmp_path, name):
    for t, m in enumerate(C2W):
        np.savetxt(tmp_path / name.format(t), m)
    check(camera_files.read(tmp_path), lens=False)
    np.savetxt(tmp_path / name.format(11), np.full((4, 4), -np.inf))
    with pytest.raises(ValueError, match=r"1 poses are not finite \(frames 11\)"):
        camera_files.read(tmp_path)


@pytest.mark.parametrize("name", ["intrins", "cam_matrix"])
def test_intrinsics_under_another_name_are_not_dropped(tmp_path, name):
    np.savez(tmp_path / "a.npz", w2c=W2C, **{name: ALL})
    with pytest.raises(ValueError, match=f"a.npz: is {name} the intrinsics"):
        camera_files.read(tmp_path / "a.npz")


def test_what_is_read_only_says_so(tmp_path):
    with pytest.raises(ValueError, match="format log is read only; --to is one of re10k"):
        camera_files.write(tmp_path / "a.log", "log", W2C)


@pytest.mark.skipif(not FIELD.is_dir(), reason="real recordings lie in ../shared")
def test_real_recordings():
    told = dict(matrices="c2w", size=(344, 520), intrinsics=(495.57, 495.48, 269.5, 169.19))
    w2c, k, _ = camera_files.read(FIELD / "hololens_raw" / "poses.txt", **told)
    assert len(w2c) > 10 and k.shape == (len(w2c), 4)
    with pytest.raises(ValueError, match="whose axes"):
        camera_files.read(FIELD / "slambook_raw" / "pose.txt")
    assert len(camera_files.read(FIELD / "slambook_raw" / "pose.txt", "tum")[0]) > 1
    w2c, k, size = camera_files.read(FIELD / "arkit_colmap")
    assert len(w2c) > 1 and k.shape == (len(w2c), 4) and size[0] > 0
