"""Recordings as other people's programs leave them: in right, or refused by one sentence."""

import json
import shutil
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from recordings import (
    H,
    T,
    W,
    c2w_of,
    clip,
    colmap,
    counts,
    da3,
    k3,
    kitti,
    lens_of,
    nerfstudio,
    redwood,
    replica,
    scannet,
    seven,
    sevenscenes,
    tum,
)

from data import load_clip, load_samples
from geometry import relative_to_first
from lib import camera_files, files, importers
from lib.lens import Lens, Undistortion
from lib.pictures import write_png
from lib.recordings import lens_file

C = clip()
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def imported(src, ids=range(5), scale=1.0, **wishes):
    """Import the only recording of src: its frames `ids` must be those of C; -> its sample."""
    out = src.parent / "out"
    names, failed = importers.run(src, out, **wishes)
    assert failed == 0 and len(names) == 1
    *_, sample = load_samples(out)
    made, ids = load_clip(sample, H, W, 5), list(ids)
    w2c = torch.from_numpy(C["w2c"][ids])
    w2c[:, :, 3] *= scale
    torch.testing.assert_close(made["w2c"], relative_to_first(w2c), rtol=0, atol=1e-5)
    depth = torch.from_numpy(scale * C["mm"][ids] / 1000).float()
    torch.testing.assert_close(made["depth"], depth, rtol=1e-5, atol=1e-5)
    rgb = torch.from_numpy(C["rgb"][ids]).permute(3, 0, 1, 2) / 127.5 - 1
    assert (made["video"] - rgb).abs().mean() < 0.03
    return sample


def refused(src, capsys, said, **wishes):
    assert importers.run(src, src.parent / "out", **wishes) == ([], 1)
    assert said in capsys.readouterr().out


def edited(src, change):
    """transforms.json of a recording, changed."""
    nerfstudio(src, C)
    told = json.loads((src / "transforms.json").read_text())
    change(told)
    (src / "transforms.json").write_text(json.dumps(told))


# ---- intrinsics
@pytest.mark.parametrize("write, name", [(sevenscenes, "camera-intrinsics.color.txt"), (tum, "")])
def test_a_usual_lens_is_not_taken_where_a_file_says_another(src, capsys, write, name):
    """Seen: wkentaro/label-fusion, 611.7 px, came in with 585.  ETH3D writes calibration.txt."""
    write(src, C)
    if name:
        (src / "camera-intrinsics.txt").rename(src / "seq-01" / name)
    else:
        (src / "calibration.txt").write_text("52.5 52.5 32 24\n")
    where = f"{name or 'calibration.txt'} is of no known layout; give --intrinsics"
    refused(src, capsys, where)
    lens = tuple(C["k"])
    assert importers.run(src, src.parent / "out", intrinsics=lens)[1] == 0


def test_a_matrix_of_intrinsics_may_be_written_line_by_line(tmp_path):
    """Seen: camera_intrinsic.json with [[fx, 0, cx], ...], where Open3D writes columns."""
    k = np.array([[50.0, 0, 31.5], [0, 51, 23.5], [0, 0, 1]])
    path, size = tmp_path / "camera_intrinsic.json", dict(width=W, height=H)
    for matrix in (k.tolist(), k.T.ravel().tolist()):
        path.write_text(json.dumps(dict(size, intrinsic_matrix=matrix)))
        np.testing.assert_allclose(lens_file(path, None)[0], [50 / W, 51 / H, 0.5, 0.5])


def test_a_lens_that_is_taken_for_granted_is_named(src, capsys):
    tum(src, C)
    (src / "loadCalibration.py").touch()  # seen beside a recording of TartanAir
    assert importers.run(src, src.parent / "out")[1] == 0
    assert "a focal length of 52.5 px is taken for granted" in capsys.readouterr().out


def test_intrinsics_of_pictures_twice_as_large_are_refused(src, capsys):
    kitti(src, C)
    k = k3(C)
    k[:2] *= 2
    k[:2, 2] -= 0.5  # whose first pixel's centre is at 0: the middle is just inside
    np.savetxt(src / "K.txt", k)
    refused(src, capsys, "the centre is 0.49 of the picture off its middle; pixels of which size?")


def test_distortion_of_every_word_is_seen(src):
    """nerfstudio's distortion_params are k1 k2 k3 k4 p1 p2; instant-ngp's ftheta is no pinhole."""
    edited(src, lambda told: told.update(distortion_params=[0.1, 0.2, 0, 0, 0.01, 0.02]))
    found = camera_files.FORMATS["nerfstudio"].read(src / "transforms.json")
    assert found.lenses[0].k == (0.1, 0.2, 0, 0) and found.lenses[0].p == (0.01, 0.02)
    edited(src, lambda told: told.pop("camera_model") and told.update(ftheta_p0=0.0))
    with pytest.raises(ValueError, match="camera model FTHETA; known are"):
        camera_files.read(src / "transforms.json")


@pytest.mark.parametrize("k, f", [((-0.25,), 0.47), ((-0.1, -0.1), 0.5), ((0.12, -0.3), 0.5)])
def test_a_lens_that_turns_back_shows_nothing_twice(k, f):
    """As SIMPLE_RADIAL of a wide action camera: the corners came out mirrored."""
    lens = Undistortion((f, f * 4 / 3, 0.5, 0.5), Lens(k))
    corner = np.linspace(0.5, 1, 50)  # from the centre to the corner
    x, y = lens.sources(np.stack([corner, corner]))
    assert (np.diff(np.hypot(x - 0.5, y - 0.5)) > -1e-4).all()
    assert lens.pinhole[0] < 1.4 * f


# ---- poses
def test_matrices_column_by_column_are_refused(src, capsys):
    """Their translations would stand in the line that is not read: a camera that never moves."""
    kitti(src, C)
    columns = c2w_of(C).swapaxes(1, 2).reshape(T, 16)
    np.savetxt(src / "poses.txt", columns)
    refused(src, capsys, "wanted 0 0 0 1: column by column? Fix: transpose them")
    with pytest.raises(ValueError, match="poses.txt: .*column by column"):
        camera_files.read(src / "poses.txt", matrices="c2w")


def test_seven_numbers_in_another_order_are_refused(tmp_path):
    """COLMAP's order, quaternion first: what stands at the quaternion's place is none."""
    t, q = seven(c2w_of(C))[:, :3], seven(c2w_of(C))[:, 3:]
    np.savetxt(tmp_path / "p.txt", np.concatenate([np.arange(T)[:, None], q, t], 1))
    with pytest.raises(ValueError, match="p.txt: .*quaternions of length 1 .* wanted tx ty tz qx"):
        camera_files.read(tmp_path / "p.txt")


def test_a_pose_of_three_lines_a_file_will_do(src):
    scannet(src, C)
    for path in (src / "pose").iterdir():
        np.savetxt(path, np.loadtxt(path)[:3])
    imported(src, ids=(0, 1, 2, 3, 5))  # the tracker had lost frame 4


def test_a_log_is_in_the_order_of_its_numbers(src):
    redwood(src, C)
    lines = (src / "trajectory.log").read_text().splitlines()
    frames = [lines[5 * t : 5 * t + 5] for t in range(T)][::-1]
    (src / "trajectory.log").write_text("\n".join(sum(frames, [])) + "\n")
    imported(src)


# ---- which file
def test_two_files_of_one_number_are_refused(src, capsys):
    """Masks beside the pictures came in as the pictures; pictures of depth as the depth."""
    kitti(src, C)
    write_png(src / "images/z_mask_8.png", C["rgb"][0])
    refused(src, capsys, "8.png: has the number of z_mask_8.png; leave one file a frame there")
    (src / "images/z_mask_8.png").unlink()
    np.save(src / "depth/9.npy", C["mm"][1] / 1000)
    refused(src, capsys, "9.npy: has the number of 9.png")


def test_a_link_to_a_recording_is_not_a_second_one(src):
    (src / "run3").mkdir()
    kitti(src / "run3", C)
    (src / "run3_again").symlink_to("run3")
    (src / "loop").symlink_to(".")
    imported(src)


def test_names_may_begin_with_the_folder_that_is_given(src, capsys):
    """As DL3DV's transforms.json, which says images/ where the pictures lie in images_4/."""
    edited(src, lambda told: None)
    (src / "images").rename(src / "images_4")
    imported(src, pictures=str(src / "images_4"))
    told = json.loads((src / "transforms.json").read_text())
    told["frames"][0]["file_path"] = "other/f1.png"
    (src / "transforms.json").write_text(json.dumps(told))
    both = "one picture for several of images/f1.png, other/f1.png; give each its own"
    refused(src, capsys, both, pictures=str(src / "images_4"), name="b")


def test_what_a_colmap_project_leaves_aside_is_named(src, capsys):
    colmap(src, C)
    for path in (src / "depth").iterdir():
        path.rename(path.with_name(f"{path.stem}_depth.png"))
    assert importers.run(src, src.parent / "out")[1] == 0
    text = capsys.readouterr().out
    assert "1 pictures that are not in the model left out: frame_00099.png" in text
    assert "no file in depth/ is called as a picture is" in text


def test_what_nothing_has_in_common_is_shown(src, capsys):
    """Seen: a model of photos named by time, beside a folder of 0.png, 1.png."""
    colmap(src, C)
    for t, path in enumerate(files.listed(src / "images", (".png",))):
        path.rename(src / "images" / f"{t}.png")
    refused(
        src, capsys, "no frame has all of pose frame_00000.png, frame_00001.png ...; picture none;"
    )


def test_pictures_without_depth_are_named_and_left_out(src, capsys):
    kitti(src, C)
    (src / "depth/10.png").unlink()
    imported(src, ids=(0, 1, 3, 4, 5))
    assert "1 frames without depth left out: 10" in capsys.readouterr().out


def test_the_words_of_other_systems_and_orders_are_understood(src, capsys):
    """Seen: file_path images\\frame_00944.jpg.  A list of TUM's need not be in the order of time;
    what another archive holds beside is not read."""

    def change(told):
        for frame in told["frames"]:
            for word in ("file_path", "depth_file_path"):
                frame[word] = frame[word].replace("/", "\\")

    edited(src, change)
    imported(src)
    for name, write in (("tum", tum), ("da3", da3)):
        (src.parent / name / "src").mkdir(parents=True)
        write(src.parent / name / "src", C)
    lines = (src.parent / "tum/src/rgb.txt").read_text().splitlines()
    heading = "timestamp filename\n"  # seen without the # before it
    (src.parent / "tum/src/rgb.txt").write_text(heading + "\n".join(lines[::-1]) + "\n")
    text = (src.parent / "tum/src/groundtruth.txt").read_text()
    (src.parent / "tum/src/groundtruth.txt").write_text(text.removeprefix("# "))
    (src.parent / "tum/src/rgb/000007.png").unlink()  # not all was copied
    imported(src.parent / "tum/src", intrinsics=tuple(C["k"]))
    assert "2 frames without file, depth or pose within 0.02 s left out" in capsys.readouterr().out
    arrays = dict(np.load(src.parent / "da3/src/results.npz"), names=np.array([None, "a"]))
    np.savez(src.parent / "da3/src/results.npz", **arrays)
    imported(src.parent / "da3/src")


def test_a_model_may_hold_many_points_as_text(tmp_path):
    """COLMAP's images.txt and points3D.txt soon have more than a camera file's 16 million bytes."""
    camera_files.write(tmp_path / "model", "colmap", C["w2c"], lens_of(C), (H, W))
    with open(tmp_path / "model/points3D.txt", "wb") as file:
        file.truncate(2**24 + 1)
    assert len(camera_files.read(tmp_path / "model")[0]) == T


def test_a_model_is_not_written_beside_another_that_would_be_read(tmp_path):
    model = (C["w2c"], lens_of(C), (H, W))
    camera_files.write(tmp_path, "colmap", *model, binary=True)
    with pytest.raises(ValueError, match="images.bin: is of another model; choose another folder"):
        camera_files.write(tmp_path, "colmap", *model)


# ---- depth
def test_the_unit_of_counts_is_not_that_of_floats(src):
    """A Replica's cam_params.json says 1 / 6553.5 of its PNG files."""
    replica(src, C)
    for t, path in enumerate(files.listed(src / "office0/results", (".png",), "depth*")):
        np.save(path.with_suffix(".npy"), C["mm"][t].astype(np.float32) / 1000)
        path.unlink()
    assert imported(src)["unit"].scale is None


@pytest.mark.parametrize("kind", ["instant-ngp", "float", "smaller", "dense priors"])
def test_depth_of_a_transforms_file_has_the_unit_that_it_says(src, kind):
    """instant-ngp (NeRFCapture, NeRF-SLAM): depth_path and integer_depth_scale; nerfstudio: its
    factor is for .npy too, and applied_scale makes cameras smaller, not depth.  Seen: dense depth
    priors' transforms, with fx and fy, counts per metre, and no size."""

    def change(told):
        for t, frame in enumerate(told["frames"]):
            if kind == "instant-ngp":
                frame["depth_path"] = frame.pop("depth_file_path")
            if kind == "float":
                frame["depth_file_path"] = f"depths/f{t}.npy"
            if kind == "smaller":
                for row in frame["transform_matrix"][:3]:
                    row[3] *= 0.5
            if kind == "dense priors":
                frame.update(fx=frame.pop("fl_x"), fy=frame.pop("fl_y"))
        words = dict(integer_depth_scale=0.00025, depth_unit_scale_factor=0.001)
        words |= dict(applied_scale=0.5, depth_scaling_factor=4000.0)
        word = dict(zip(("instant-ngp", "float", "smaller", "dense priors"), words))[kind]
        told[word] = words[word]
        if kind == "dense priors":
            del told["w"], told["h"], told["camera_model"]

    edited(src, change)
    if kind in ("instant-ngp", "dense priors"):
        counts(src / "depths", C, "f{}.png", factor=4)
    for t, mm in enumerate(C["mm"] if kind == "float" else ()):
        np.save(src / "depths" / f"f{t}.npy", mm.astype(np.float32))
    imported(src, scale=0.5 if kind == "smaller" else 1.0)


def test_an_archive_of_several_arrays_does_not_give_its_first_as_depth(tmp_path):
    np.savez(tmp_path / "d.npz", conf=np.ones((2, 3)), prediction=np.ones((2, 3)))
    with pytest.raises(
        ValueError, match="d.npz: .*conf.npy, prediction.npy; which one. Name it depth"
    ):
        files.read_array(tmp_path / "d.npz")
    np.savez(tmp_path / "p.npz", conf=np.ones((2, 3)), points=np.full((2, 3), 5.0))
    assert (files.read_array(tmp_path / "p.npz") == 5).all()  # as point maps were written
    (tmp_path / "d.tiff").write_bytes(b"II*\0")
    with pytest.raises(ValueError, match="d.tiff: .*an ending .tiff; wanted .npy, .npz, .png"):
        files.read_array(tmp_path / "d.tiff")


def test_endings_in_capitals_are_read(src):
    kitti(src, C)
    for path in [*(src / "depth").iterdir(), *(src / "images").iterdir()]:
        path.rename(path.with_suffix(".PNG"))
    assert imported(src)["unit"].scale == 0.001
    for t, path in enumerate(files.listed(src / "depth", (".png",))):
        with open(path.with_suffix(".NPY"), "wb") as file:
            np.save(file, C["mm"][t].astype(np.float32) / 1000)
        path.unlink()
    assert imported(src, name="floats")["unit"].scale is None


def test_pictures_of_an_archive_must_be_pictures(src, capsys):
    for rgb in (C["rgb"] / np.float32(255), C["rgb"].transpose(0, 3, 1, 2)):
        da3(src, dict(C, rgb=rgb))
        refused(src, capsys, f"image of {rgb.dtype} {rgb.shape}; wanted uint8 (T, H, W, 3)")


# ---- texts and pictures
def marked(path):
    """As editors of other systems save it: a byte order mark, blanks and CR LF at every end."""
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b" \r\n"))


@pytest.mark.parametrize("write", [nerfstudio, colmap, tum, kitti], ids=lambda f: f.__name__)
def test_byte_order_marks_commas_and_blanks_change_nothing(src, write):
    write(src, C)
    wishes = {}
    if write is colmap:
        shutil.rmtree(src / "sparse")
        camera_files.write(src / "sparse/0", "colmap", C["w2c"], lens_of(C), (H, W))
        for name in ("cameras", "images"):
            text = (src / f"sparse/0/{name}.txt").read_text()
            (src / f"sparse/0/{name}.txt").write_text("# a comment\n" + text)
    if write is kitti:
        (src / "K.txt").write_text("\n".join(", ".join(map(str, row)) for row in k3(C).tolist()))
    if write is tum:
        wishes = dict(intrinsics=tuple(C["k"]))
    for path in [*src.rglob("*.txt"), *src.rglob("*.json")]:
        marked(path)
    imported(src, **wishes)
    marked(src.parent / "out/metadata.json")
    marked(src.parent / "out/src/camera_params.txt")
    assert load_clip(load_samples(src.parent / "out")[0], H, W, 5)["w2c"].shape == (5, 3, 4)


def test_a_text_that_cannot_be_read_is_named(src, capsys):
    kitti(src, C)
    (src / "K.txt").write_text("[[52, 0, 32], [0, 52, 24], [0, 0, 1]]")
    said = "K.txt: could not convert string '[[52' to float64 at row 0, column 1; wanted lines of"
    refused(src, capsys, said)


@pytest.mark.parametrize("told, lying", [(3, 0), (6, 1)])
def test_photos_of_a_model_are_taken_as_its_cameras_say(src, told, lying):
    """COLMAP and nerfstudio ignore EXIF: a photo that it turns by 180 degrees came in upside down.
    Other programs write the same files of photos held upright: told by the size of the camera."""
    colmap(src, dict(C, rgb=np.ascontiguousarray(np.rot90(C["rgb"], lying, (1, 2)))))
    turn = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0%c\0\0\0\0\0\0" % told
    names = ["frame_%05d.png", "-frames:v", str(T), "-q:v", "2", "-pix_fmt", "yuvj444p", "%05d.jpg"]
    subprocess.run([FFMPEG, "-v", "error", "-i", *names], cwd=src / "images", check=True)
    for t in range(T):  # JPEG, whatever its name is
        photo = (src / f"images/{t + 1:05d}.jpg").read_bytes()
        size = (len(turn) + 2).to_bytes(2, "big")
        path = src / f"images/frame_{t:05d}.png"
        path.write_bytes(photo[:2] + b"\xff\xe1" + size + turn + photo[2:])
    shown = files.read_video(src / "images/frame_00001.png", 1)[0][0].astype(int)
    want = np.rot90(C["rgb"][1], 0 if lying else 2)  # where a picture is looked at
    assert np.abs(shown - want).mean() < 4
    if lying:  # one was not held upright
        write_png(src / "images/frame_00000.png", C["rgb"][0])
    imported(src)
