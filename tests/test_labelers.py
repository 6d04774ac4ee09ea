"""Files as networks and trackers of today write them, made here with known truth."""

import copy
import shutil

import corruptions
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
    cut3r,
    kitti,
    lens_of,
    nerfstudio,
    polycam,
    record3d,
    redwood,
    seven,
    stray,
    tum,
    vggt,
    vipe,
    wildrgbd,
)

from data import load_clip, load_samples
from geometry import relative_to_first
from lib import camera_files, files, importers, native
from lib.pictures import write_png

C = clip()


def imported(src, ids=range(5), **wishes):
    """The only recording of src as a clip, whose cameras must be those of C."""
    names, failed = importers.run(src, src.parent / "out", **wishes)
    assert (len(names), failed) == (1, 0)
    made = load_clip(load_samples(src.parent / "out")[0], H, W, 5)
    want = relative_to_first(torch.from_numpy(C["w2c"][list(ids)]))
    torch.testing.assert_close(made["w2c"], want, rtol=0, atol=1e-5)
    return made


@pytest.mark.parametrize("lens", [True, False])
def test_a_video_beside_depth_and_a_path_may_lack_poses_of_some_frames(src, lens):
    """Stray Scanner's: frames are numbered in its odometry, and older ones say no lens there."""
    stray(src, C)
    rows = [row.split(", ") for row in (src / "odometry.csv").read_text().splitlines()]
    del rows[3]  # of frame 2
    lines = (", ".join(row if lens else row[:9]) for row in rows)
    (src / "odometry.csv").write_text("\n".join(lines) + "\n")
    made = imported(src, [0, 1, 3, 4, 5])
    np.testing.assert_allclose(made["intrinsics"][0, [0, 1], [0, 1]], C["k"][:2], rtol=1e-6)
    assert round(made["fps"]) == 60


def test_a_phone_s_lens_is_that_of_each_frame(src):
    """Focusing moves it by a percent or two: Stray Scanner's odometry says it frame by frame, and
    camera_matrix.csv of one frame for all."""
    stray(src, C)
    heading, *rows = (src / "odometry.csv").read_text().splitlines()
    rows = [row.split(", ") for row in rows]
    for t, row in enumerate(rows):
        row[9] = f"{C['k'][0] * (1 + 0.01 * t):.9g}"
    text = "\n".join([heading, *map(", ".join, rows)])
    (src / "odometry.csv").write_text(text + "\n")
    focal = imported(src)["intrinsics"][:, 0, 0]
    np.testing.assert_allclose(focal, C["k"][0] * (1 + 0.01 * np.arange(5)), rtol=1e-6)
    assert camera_files.read(src / "odometry.csv")[1] is None  # poses alone want no --size


@pytest.mark.parametrize("name", ["{:06d}_10.png", "depth_{:04d}_16bit.png"])
def test_a_number_that_all_names_share_is_no_frame_s(src, name):
    """KITTI's; they had "the number of" each other."""
    kitti(src, C)
    for path in [*(src / "depth").iterdir(), *(src / "images").iterdir()]:
        path.rename(path.with_name(name.format(int(path.stem))))
    imported(src)
    poses = [src / (name.format(t)[:-4] + ".pose.txt") for t in range(3)]
    assert native.numbers_of(poses) == native.numbers_of([f"{t}.json" for t in range(3)])


def test_headings_and_a_lens_of_four_numbers_are_read(src):
    """Seen: "missing or of no known format" of poses below a line of words, and with commas."""
    kitti(src, C)
    rows = (",".join(map(repr, row)) for row in c2w_of(C)[:, :3].reshape(T, 12).tolist())
    (src / "poses.txt").write_text("r11,r12,...\n" + "\n".join(rows) + "\n")
    (src / "K.txt").write_text("fx fy cx cy\n" + " ".join(map(str, C["k"])) + "\n")
    made = imported(src)
    np.testing.assert_allclose(made["intrinsics"][0, [0, 1], [0, 1]], C["k"][:2], rtol=1e-6)
    (src / "K.txt").write_text("K: [a, b]\n")
    importers.run(src, src.parent / "again")
    assert not list((src.parent / "again").glob("*/video.mp4"))


def test_whole_numbers_are_millimetres_in_npy_too(src):
    kitti(src, C)
    for t, path in enumerate(files.listed(src / "depth", (".png",))):
        path.unlink()
        np.save(path.with_suffix(".npy"), C["mm"][t])
    np.testing.assert_allclose(imported(src)["depth"], C["mm"][:5] / 1000, rtol=1e-6)


def test_the_maps_of_a_dense_workspace_are_the_depth_of_its_model(src, capsys):
    """Seen: COLMAP's own depth beside a model, and "no depth: label the video"."""
    colmap(src, C)
    (src / "stereo/depth_maps").mkdir(parents=True)
    for t, path in enumerate(files.listed(src / "depth", (".png",))):
        path.unlink()
        metres = (C["mm"][t] / 1000).astype("<f4")
        metres[:3] = 0
        name = src / "stereo/depth_maps" / f"{path.name}.geometric.bin"
        name.write_bytes(f"{W}&{H}&1&".encode() + metres.tobytes())
    (src / "depth").rmdir()
    made = imported(src)["depth"]
    assert (made[:, :3] == 0).all()
    np.testing.assert_allclose(made[:, 3:], C["mm"][:5, 3:] / 1000, rtol=1e-6)
    name.write_bytes(name.read_bytes()[:-8])
    importers.run(src, src.parent / "again")
    said = capsys.readouterr().out
    assert "frame_00008.png.geometric.bin: cannot be read: cannot reshape array" in said


def test_a_part_that_an_archive_lacks_is_named(src, capsys):
    """Seen: "'NoneType' object is not subscriptable", KeyError('pose')."""
    vipe(src, C)
    shutil.rmtree(src / "intrinsics")
    assert importers.run(src, src.parent / "out") == ([], 1)
    assert "src: no intrinsics; give --intrinsics" in capsys.readouterr().out
    imported(src, [0, 1, 2, 4, 5], intrinsics=tuple(C["k"]))
    (src.parent / "other/src").mkdir(parents=True)
    cut3r(src.parent / "other/src", C)
    for path in (src.parent / "other/src/camera").iterdir():
        np.savez(path, cam=np.eye(4), intrinsics=np.eye(3))
    assert importers.run(src.parent / "other/src", src.parent / "out", name="b") == ([], 1)
    path = f"{src.parent}/other/src/camera/000000.npz: not a readable camera"
    assert f"skipped b (cut3r): {path}: it lacks 'pose'" in capsys.readouterr().out


def test_a_video_stands_for_pictures(src):
    """Beside depth and a text of poses; a video among pictures is none of them."""
    stray(src, C)
    np.savetxt(src / "poses.txt", c2w_of(C)[:, :3].reshape(T, 12))
    (src / "odometry.csv").unlink()
    imported(src, form="kitti", intrinsics=tuple(C["k"]))
    (src / "color").mkdir()
    for t, frame in enumerate(C["rgb"]):
        write_png(src / "color" / f"{t}.png", frame)
    (src / "rgb.mp4").rename(src / "color/7.mp4")
    imported(src, form="kitti", intrinsics=tuple(C["k"]), name="pictures")


def test_cameras_of_apps_are_camera_files_too(src):
    for name, write in dict(a=record3d, b=polycam, c=cut3r, d=stray).items():
        (src / name).mkdir()
        write(src / name, C)
    places = "a/EXR_RGBD/metadata.json b/keyframes/cameras c/camera d/odometry.csv".split()
    for place in places:
        w2c, k, _ = camera_files.read(src / place, size=None if place[0] in "ab" else (H, W))
        np.testing.assert_allclose(w2c, C["w2c"], atol=1e-6)
        if place[0] != "d":
            np.testing.assert_allclose(k, lens_of(C), atol=1e-6)


@pytest.mark.parametrize("write, fps", [(record3d, 60), (polycam, 4), (stray, 60), (cut3r, 30)])
def test_the_frame_rate_is_what_a_recording_says(src, write, fps):
    """Seen: 30, whatever Record3D's metadata and Polycam's names, microseconds, say."""
    write(src, C)
    for path in src.glob("keyframes/*/*"):
        path.rename(path.with_stem(f"{3147820000 + 250_000 * int(path.stem[-4:])}"))
    imported(src)
    assert load_samples(src.parent / "out")[0]["fps"] == fps


def test_a_damaged_line_amid_numbers_is_no_heading(src):
    """Seen: left out in silence, and every camera after it a frame early."""
    rows = [" ".join(map(str, m.ravel())) for m in c2w_of(C)]
    (src / "poses.txt").write_text("\n".join(["r11 r12 r13", *rows[:4], f"x{rows[4]}", *rows[5:]]))
    with pytest.raises(ValueError, match="could not convert string 'x"):
        camera_files.read(src / "poses.txt", "matrices", matrices="c2w")


@pytest.mark.parametrize("write, found", [(polycam, "Expecting"), (cut3r, "File is not a zip")])
def test_the_damaged_one_of_many_cameras_is_named(src, capsys, write, found):
    write(src, C)
    path = sorted(src.glob("**/camera*/*"))[3]
    path.write_bytes(b'{"broken"')
    assert importers.run(src, src.parent / "out") == ([], 1)
    assert f"): {path}: not a readable camera: {found}" in capsys.readouterr().out


def test_frames_of_a_video_may_be_numbered_from_anywhere(src):
    """Seen: every pose and depth two frames off, in silence.  Stray Scanner's count may go on."""
    stray(src, C)
    rows = [row.split(", ") for row in (src / "odometry.csv").read_text().splitlines()]
    lines = [", ".join([r[0], str(int(r[1]) + 2), *r[2:]]) for r in rows[1:]]
    (src / "odometry.csv").write_text("\n".join([", ".join(rows[0]), *lines]))
    for path in sorted((src / "depth").iterdir(), reverse=True):
        path.rename(path.with_stem(f"{int(path.stem) + 2:06d}"))
    video = imported(src)["video"]
    (src.parent / "plain").mkdir()
    stray(src.parent / "plain", C)
    importers.run(src.parent / "plain", src.parent / "truth")
    truth = load_clip(load_samples(src.parent / "truth")[0], H, W, 5)["video"]
    assert torch.equal(torch.as_tensor(video), torch.as_tensor(truth))


@pytest.mark.parametrize("write, name", [(wildrgbd, ""), (colmap, "cameras"), (redwood, "camera")])
def test_what_others_call_as_an_app_does_is_not_taken_for_its_own(src, write, name):
    """Seen: "looks like wildrgbd and record3d", of recordings that were imported before."""
    write(src, C)
    if (src / "metadata").is_file():
        (src / "metadata").rename(src / "metadata.json")
    (src / name).mkdir(exist_ok=True)
    (src / name / "0.txt").write_text("1 0 0 0")
    imported(src)


@pytest.mark.parametrize("write, folder", [(kitti, "depth"), (colmap, "depth"), (cut3r, "depth")])
def test_depth_in_tiff_is_refused_by_name(src, capsys, write, folder):
    """Seen: "most like kitti, but without depth", and a COLMAP project without its depth."""
    write(src, C)
    for path in (src / folder).iterdir():
        path.rename(path.with_suffix(".tif"))
    assert importers.run(src, src.parent / "out") == ([], 1)
    assert "an ending .tif; wanted .npy, .npz, .png" in capsys.readouterr().out


def test_a_dataset_s_depth_may_end_in_capitals_and_a_number_in_quotes_shows_them(src):
    """Seen: "0 frames found, 1 wanted"; "fps = 30; wanted a number"."""
    kitti(src, C)
    imported(src)
    for path in (src.parent / "out/src/depth").iterdir():
        path.rename(path.with_suffix(".PNG"))
    (sample,) = load_samples(src.parent / "out")
    np.testing.assert_allclose(load_clip(sample, H, W, 5)["depth"], C["mm"][:5] / 1000, rtol=1e-6)
    path = src.parent / "out/metadata.json"
    path.write_text(path.read_text().replace('"fps": 30.0', '"fps": "30"'))
    with pytest.raises(ValueError, match="sample 0: fps = '30'; wanted a number between"):
        load_samples(src.parent / "out")


def test_vggt_s_archive_is_a_camera_file_though_it_holds_an_object(src):
    """Seen: "values of type object; wanted numbers" of every predictions.npz of its demo."""
    vggt(src, C)
    w2c, k, size = camera_files.read(src / "predictions.npz")
    np.testing.assert_allclose(w2c, C["w2c"], atol=1e-6)
    np.testing.assert_allclose(k, lens_of(C), atol=1e-6)
    assert size == (H, W)


def test_pictures_of_another_range_are_no_network_s_input(src, capsys):
    vggt(src, dict(C, rgb=C["rgb"] * 2.0 - 255))
    assert importers.run(src, src.parent / "out") == ([], 1)
    assert f"images of float32 {(T, 3, H, W)}; wanted uint8" in capsys.readouterr().out


def test_the_trajectory_of_monst3r_has_qw_first(tmp_path):
    """Seen: its pred_traj.txt, which looks like TUM's, gave rotations that were another's."""
    rows = np.concatenate([np.arange(T)[:, None], seven(c2w_of(C))], 1)
    np.savetxt(tmp_path / "traj.txt", rows)
    np.savetxt(tmp_path / "pred_traj.txt", rows[:, [0, 1, 2, 3, 7, 4, 5, 6]])
    for name in ("traj.txt", "pred_traj.txt"):
        np.testing.assert_allclose(camera_files.read(tmp_path / name)[0], C["w2c"], atol=1e-9)


@pytest.mark.parametrize("shape", [(H, W, 1), (1, H, W)])
def test_a_channel_that_a_network_left_is_no_side_of_its_depth(src, shape):
    """Imported as it is, and cut."""
    kitti(src, C)
    metres = (C["mm"] / 1000).astype(np.float32)
    for t, path in enumerate(files.listed(src / "depth", (".png",))):
        path.unlink()
        np.save(path.with_suffix(".npy"), metres[t].reshape(shape))
    assert np.array_equal(imported(src)["depth"], metres[:5])
    importers.run(src, src.parent / "cut", size=(H, W // 2))
    cut = load_clip(load_samples(src.parent / "cut")[0], H, W // 2, 5)["depth"]
    assert np.array_equal(cut, metres[:5, :, W // 4 : -W // 4])


def test_times_that_are_no_seconds_are_named(src, capsys):
    """Seen: nanoseconds, as EuRoC's, made a video of 3e-8 frames a second: ffmpeg's words."""
    tum(src, C)
    for name in ("rgb.txt", "depth.txt", "groundtruth.txt"):
        rows = [x.split(" ", 1) for x in (src / name).read_text().splitlines() if x[0] != "#"]
        text = "".join(f"{round(30 * float(t)) * 33333333} {rest}\n" for t, rest in rows)
        (src / name).write_text(text)
    assert importers.run(src, src.parent / "out", intrinsics=tuple(C["k"])) == ([], 1)
    assert "rgb.txt: times 3.33e+07 apart; wanted seconds" in capsys.readouterr().out
    imported(src, intrinsics=tuple(C["k"]), fps=30)  # times that are the same in all texts


@pytest.mark.parametrize("factor, apart", [(1000, "33.3"), (1e6, "3.33e+04")])
def test_milliseconds_are_no_seconds(src, capsys, factor, apart):
    """Seen: no picture "has depth and a pose within 0.02 s", of times 33 apart."""
    tum(src, C)
    for name in ("rgb.txt", "depth.txt", "groundtruth.txt"):
        rows = [x.split(" ", 1) for x in (src / name).read_text().splitlines() if x[0] != "#"]
        (src / name).write_text("".join(f"{factor * float(t):.3f},{rest}\n" for t, rest in rows))
    assert importers.run(src, src.parent / "out", intrinsics=tuple(C["k"])) == ([], 1)
    assert f"rgb.txt: times {apart} apart; wanted seconds" in capsys.readouterr().out
    (src / "rgb.txt").write_text("1305031102.10\n1305031102.13\n")
    importers.run(src, src.parent / "out", intrinsics=tuple(C["k"]))
    assert "rgb.txt: no file beside 1305031102.10, 1305031102.13; wanted" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [3, 4])
def test_a_pose_of_zeros_is_a_lost_frame(src, rows):
    kitti(src, C)
    poses = c2w_of(C)[:, :rows].reshape(T, -1)
    poses[2] = 0
    np.savetxt(src / "poses.txt", poses)
    imported(src, [0, 1, 3, 4, 5])
    with pytest.raises(ValueError, match=r"1 poses are not finite \(frames 2\)"):
        camera_files.read(src / "poses.txt", matrices="c2w")


def test_pictures_that_lie_elsewhere_are_asked_for(src, capsys):
    """As ScanNet++'s and DL3DV's do."""
    nerfstudio(src, C)
    (src / "images").rename(src.parent / "elsewhere")
    assert importers.run(src, src.parent / "out") == ([], 1)
    said = capsys.readouterr().out
    assert "picture none" in said and "give --pictures FOLDER" in said
    imported(src, pictures=str(src.parent / "elsewhere"))


@pytest.mark.parametrize("unit", [1, 800])
def test_disparity_is_named_whatever_its_unit(unit):
    """MiDaS, Depth-Anything and DepthCrafter write a / z + b, near being large: stretched to 0 .. 1
    it passed for relative depth, and in hundreds for cameras that are stored the wrong way."""
    raw = copy.deepcopy(corruptions.rendered(40, 9, (32, 48))[0])
    near = 1 / raw["depth"]
    low, high = near.min(), near.max()
    raw["depth"] = ((near - low) / (high - low) * unit).astype(np.float32)
    raw["depth"][raw["depth"] == 0] = 1e-6 * unit
    assert "relative inverse depth" in corruptions.inspect(raw).suspects


def test_relative_depth_whose_far_is_large_is_no_disparity():
    raw = copy.deepcopy(corruptions.rendered(40, 9, (32, 48))[0])
    low, high = raw["depth"].min(), raw["depth"].max()
    raw["depth"] = ((raw["depth"] - low) / (high - low)).astype(np.float32)
    assert corruptions.inspect(raw).suspects == ["relative depth"]


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_depth_of_the_first_frame_alone_ends_in_no_traceback(dtype):
    """Seen: a fit of nothing, "quantile() input tensor must be non-empty"."""
    raw = copy.deepcopy(corruptions.rendered(40, 9, (32, 48))[0])
    raw["depth"][1:] = 0
    raw["depth"] = (raw["depth"] * 40).astype(dtype)
    assert corruptions.inspect(raw).checks["views"][0] in ("skip", "fail")
