"""Parts of a recording that belong together, one of which is missing, damaged or unsure."""

import shutil
import subprocess
import zipfile

import numpy as np
import pytest
from recordings import (
    H,
    T,
    W,
    clip,
    colmap,
    cut3r,
    da3,
    monst3r,
    nerfstudio,
    polycam,
    re10k,
    record3d,
    redwood,
    stray,
    tartanair,
    tum,
    vggt,
    vipe,
    wildrgbd,
)
from test_videos_in import run

from data import load_clip, load_samples
from lib import importers
from lib.pictures import write_png
from lib.verify import load_raw

C = clip()


def imported(src, capsys):
    """What the import of src says, and the clip that it has made, or None."""
    names, _ = importers.run(src, src.parent / "out")
    made = load_clip(load_samples(src.parent / "out")[0], H, W, 5) if names else None
    return capsys.readouterr().out, made


def test_each_frame_keeps_its_own_focal_length_where_others_have_no_depth(src, capsys):
    """Seen: "operands could not be broadcast together" for eight depth maps of nine pictures."""
    monst3r(src, C)
    (src / "frame_0002.npy").unlink()
    focal = 60 + np.arange(T)
    rows = [[f, 0, W / 2, 0, f, H / 2, 0, 0, 1] for f in focal]
    np.savetxt(src / "pred_intrinsics.txt", rows)
    said, made = imported(src, capsys)
    assert "1 frames without depth left out: 2" in said
    np.testing.assert_allclose(made["intrinsics"][:, 0, 0], focal[[0, 1, 3, 4, 5]])


def test_too_few_focal_lengths_are_named(src, capsys):
    monst3r(src, C)
    np.savetxt(src / "pred_intrinsics.txt", np.tile(np.eye(3).ravel(), (4, 1)))
    said = f"{src}/pred_intrinsics.txt: 4 lines for 9 poses; wanted one for each"
    assert said in imported(src, capsys)[0]


CONFIDENCE = {  # names; low, middle and high
    stray: ("confidence/{:06d}.png", 0, 1, 2),
    polycam: ("keyframes/confidence/3147820{:04d}.png", 0, 127, 255),
    cut3r: ("conf/{:06d}.npy", 1.05, 1.2, 9.0),  # 1 + e^x
    monst3r: ("conf_{}.npy", 0.05, 0.1, 3.0),  # its logarithm
    redwood: ("confidence/{:05d}.npy", 0, 0.2, 1.0),  # anybody's: shares of 1
}


@pytest.mark.parametrize("write", CONFIDENCE)
def test_depth_of_low_confidence_is_unknown(src, capsys, write):
    write(src, C)
    name, low, middle, high = CONFIDENCE[write]
    sure = np.full((H // 2, W // 4), high)  # of another resolution, and aspect
    sure[:3], sure[3:6] = low, middle
    for t in range(T):
        path = src / name.format(t)
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, sure.astype(np.float32))
        else:
            path.unlink(missing_ok=True)
            write_png(path, (sure.astype(np.uint16) * 257))  # as 8 bits are read
    said, made = imported(src, capsys)
    assert "unsure depth is left out" in said
    assert (made["depth"][:, :6] == 0).all()
    np.testing.assert_allclose(made["depth"][:, 6:], C["mm"][:5, 6:] / 1000, rtol=1e-6)


@pytest.mark.parametrize("write, name, least", [(da3, "conf", 1.05), (vggt, "depth_conf", 1.1)])
def test_depth_of_low_confidence_in_an_archive_is_unknown(src, capsys, write, name, least):
    """1 + e^x; what Depth-Anything-3 rounds to two digits may be at its limit."""
    write(src, C)
    path = next(src.glob("*.npz"))
    with np.load(path, allow_pickle=True) as found:
        arrays = dict(found)
    sure = np.full((1, T, H, W), 7.0, np.float32)  # a batch
    sure[..., :3, :], sure[..., 3:6, :] = least - 0.01, least
    np.savez(path, **arrays | {name: sure})
    said, made = imported(src, capsys)
    assert f"unsure depth is left out: {3 / H:.1%} below {least}" in said
    assert (made["depth"][:, :3] == 0).all()
    np.testing.assert_allclose(made["depth"][:, 3:], C["mm"][:5, 3:] / 1000, rtol=1e-6)
    np.savez(path, **arrays | {name: sure[:, :5]})
    shutil.rmtree(src.parent / "out")
    assert "wanted one each. 5 of confidence, 9 poses" in imported(src, capsys)[0]
    for none in (np.ones_like(sure), sure / 10):  # of a network without an opinion; shares of 1
        np.savez(path, **arrays | {name: none})
        shutil.rmtree(src.parent / "out")
        said, made = imported(src, capsys)
        assert "unsure" not in said and (made["depth"] > 0).all()
        assert f"its confidence is not heeded: all of it is below {least}" in said
    np.savez(path, **arrays)
    shutil.rmtree(src.parent / "out")
    assert "confidence is" not in imported(src, capsys)[0] or write is da3  # which writes ones


@pytest.mark.parametrize("write", [da3, vggt, cut3r, monst3r])
def test_true_is_sure(src, capsys, write):
    """Seen: all depth lost, as True is 1 and less than 1.05."""
    write(src, C)
    sure = np.arange(H)[:, None] + np.zeros(W) >= 6
    if write in (da3, vggt):
        path = next(src.glob("*.npz"))
        with np.load(path, allow_pickle=True) as found:
            arrays = dict(found)
        name = dict(da3="conf", vggt="depth_conf")[write.__name__]
        np.savez(path, **arrays | {name: np.stack([sure] * T)})
    else:
        for t in range(T):
            path = src / CONFIDENCE[write][0].format(t)
            path.parent.mkdir(exist_ok=True)
            np.save(path, sure)
    _, made = imported(src, capsys)
    assert (made["depth"][:, :6] == 0).all() and (made["depth"][:, 6:] > 0).all()


def test_confidence_that_is_no_map_is_named(src, capsys):
    """Seen: "operands could not be broadcast together"."""
    redwood(src, C)
    (src / "confidence").mkdir()
    for t in range(T):
        np.save(src / f"confidence/{t:05d}.npy", np.ones((H, W, 3)))
    said = "confidence of shape (48, 64, 3); wanted one map (h, w) a frame"
    assert said in imported(src, capsys)[0]


def test_a_png_of_depth_with_something_behind_its_end_is_named(src, capsys):
    """Seen: copied as it was, into a dataset that training refused."""
    redwood(src, C)
    with open(src / "depth/00002.png", "ab") as file:
        file.write(b"\n")
    assert f"{src}/depth/00002.png: does not end as a PNG" in imported(src, capsys)[0]


def test_confidence_beside_depth_of_four_bytes_a_pixel(src, capsys):
    """TartanAir V2's PNGs.  Seen: "argument should be a str or an os.PathLike object"."""
    tartanair(src, C)
    (src / "confidence").mkdir()
    for t, path in enumerate(sorted((src / "depth_left").iterdir())):
        raw = np.load(path).astype("<f4").tobytes()
        path.unlink()
        how = ["-f", "rawvideo", "-pix_fmt", "bgra", "-s", f"{W}x{H}", "-i", src / "raw"]
        (src / "raw").write_bytes(raw)
        run(*how, "-pix_fmt", "rgba", path.with_suffix(".png"))
        sure = np.full((H, W), 2.0)
        sure[:6] = 0
        np.save(src / f"confidence/{t:06d}.npy", sure)
    _, made = imported(src, capsys)
    assert (made["depth"][:, :6] == 0).all()
    np.testing.assert_allclose(made["depth"][:, 6:], C["mm"][:5, 6:] / 1000, rtol=1e-6)


def test_a_recording_starts_ffmpeg_once_for_each_of_its_parts(src, capsys, monkeypatch):
    """Seen: three times for the video before its frames, and twice for every frame."""
    stray(src, C)
    begun, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: begun.append(a) or popen(*a, **k))
    importers.run(src, src.parent / "out")
    assert len(begun) == 4  # the video's facts, its frames, depth, confidence
    begun.clear()
    load_raw(load_samples(src.parent / "out")[0])
    assert len(begun) == 2  # the video's facts, its frames


def test_a_cut_archive_is_named(src, capsys):
    """Seen: "wanted a recording of a known layout"."""
    for folder, write in (("a", da3), ("b", vggt)):
        (src / folder).mkdir()
        write(src / folder, C)
    cut, other = src / "a/results.npz", src / "b/predictions.npz"
    cut.write_bytes(cut.read_bytes()[:-100])
    said = f"{cut}: cut short. Copy it again"
    assert importers.run(src, src.parent / "out") == (["b_predictions"], 0)
    assert f"left out: {said}" in capsys.readouterr().out
    other.unlink()
    with pytest.raises(ValueError, match=said):
        importers.find(src)


JSONS = [(nerfstudio, "transforms.json"), (redwood, "camera_intrinsic.json")]


@pytest.mark.parametrize("write, name", [*JSONS, (wildrgbd, "metadata"), (record3d, "metadata")])
def test_a_cut_json_is_named(src, capsys, write, name):
    """Seen: the recording's folder, and "Expecting ',' delimiter"."""
    write(src, C)
    path = next(src.rglob(f"{name}*"))
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}: not valid JSON: " in imported(src, capsys)[0]


CUT = {  # part: what writes it, bytes that are left, what is said
    "depth/00002.png": (redwood, 60, "does not end as a PNG: cut short? Copy it again"),
    "pose_left.txt": (tartanair, -20, "cannot be read: quaternions of length"),
    "depth.txt": (tum, 0, "no file beside any time; wanted lines of TIME FILE"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_cut_part_is_named(src, capsys, name):
    """Seen: depth copied as it was; the recording's folder, and numpy's "index -2"."""
    write, left, said = CUT[name]
    write(src, C)
    (src / name).write_bytes((src / name).read_bytes()[:left] or b"# a\n")
    assert f"{src / name}: {said}" in imported(src, capsys)[0]


@pytest.mark.parametrize("part", ["images", "cameras"])
def test_corrected_pictures_go_with_corrected_cameras_alone(src, capsys, part):
    """Seen: pictures of one lens with cameras of another, where a session was too large to end."""
    polycam(src, C)
    keys = src / "keyframes"
    shutil.copytree(keys / part, keys / f"corrected_{part}")
    for path in (keys / "corrected_images").glob("*"):
        write_png(path, np.zeros((H, W, 3), np.uint8))
    for path in (keys / "corrected_cameras").glob("*"):
        path.write_text(path.read_text().replace('"fx": ', '"fx": 1'))
    _, made = imported(src, capsys)
    assert made["video"].mean() > -0.9
    np.testing.assert_allclose(made["intrinsics"][0, 0, 0], C["k"][0])


def test_a_damaged_archive_of_depth_is_named_itself(src, capsys):
    """Seen: pose/walk.npz: File is not a zip file."""
    vipe(src, C)
    with zipfile.ZipFile(src / "depth/walk.zip", "w") as archive:
        for t in range(T):
            archive.writestr(f"{t:05d}.exr", b"none")
    said = f"{src}/depth/walk.zip, 00000.exr: cannot be read: neither OpenEXR nor PFM"
    assert said in imported(src, capsys)[0]
    (src / "depth/walk.zip").write_bytes(b"none")
    said = f"{src}/depth/walk.zip: cannot be read: File is not a zip file"
    assert said in imported(src, capsys)[0]


def test_an_archive_of_depth_is_opened_once(src, capsys, monkeypatch):
    """Its list of 3,000 frames was read 3,000 times: 42 s."""
    vipe(src, C)
    opened, open_zip = [], zipfile.ZipFile
    monkeypatch.setattr(
        zipfile, "ZipFile", lambda *a, **k: opened.append(a[0]) or open_zip(*a, **k)
    )
    assert imported(src, capsys)[1] is not None
    assert opened.count(src / "depth/walk.zip") == 1


def test_what_a_model_lacks_is_named(src, capsys):
    """Seen: "it lacks 1"; "unpack_from requires a buffer of at least 64 bytes"."""
    colmap(src, C)
    shutil.rmtree(src / "sparse/1")
    images, cameras = src / "sparse/0/images.bin", src / "sparse/0/cameras.bin"
    whole = images.read_bytes()
    for length in (len(whole) - 100, len(whole) - 60):  # in a name; in the numbers of a pose
        images.write_bytes(whole[:length])
        assert f"{images}: cut short, or damaged" in imported(src, capsys)[0]
    images.write_bytes(whole)
    cameras.write_bytes(bytes(8))
    said = f"{src}/sparse/0: no camera for frame_00000.png"
    assert said in imported(src, capsys)[0]


def test_maps_that_no_other_view_has_confirmed_are_asked_for_better_ones(src, capsys):
    colmap(src, C)
    shutil.rmtree(src / "depth")
    (src / "stereo/depth_maps").mkdir(parents=True)
    (src / "stereo/depth_maps/frame_00000.png.photometric.bin").write_bytes(b"1&1&1&0000")
    names, _ = importers.run(src, src.parent / "out")
    assert names and "lacks geometric maps" in capsys.readouterr().out


def test_pixels_of_a_recording_that_are_not_square_are_named(src, capsys):
    stray(src, C)
    how = ["-c", "copy", "-bsf:v", "h264_metadata=sample_aspect_ratio=4/3"]
    run("-i", src / "rgb.mp4", *how, src / "b.mp4")
    shutil.move(src / "b.mp4", src / "rgb.mp4")
    said, made = imported(src, capsys)
    assert "pixels 1.33 times as wide as high are taken as they lie" in said
    np.testing.assert_allclose(made["intrinsics"][0, 0, 0], C["k"][0])


def test_a_text_of_cameras_may_end_in_blank_lines(src):
    re10k(src, C)
    (src / "abc.txt").write_text((src / "abc.txt").read_text() + "\n \n")
    assert importers.find(src) == [("re10k", src / "abc.txt")]


def test_a_size_that_a_file_tells_wrongly_is_not_laid_to_an_option(src, capsys):
    """Seen, of an h of 3: "--size HxW", which is of what an import writes."""
    nerfstudio(src, C)
    path = src / "transforms.json"
    path.write_text(path.read_text().replace(f'"h": {H}', '"h": 3'))
    said, _ = imported(src, capsys)
    assert "is its size 3x64 (height x width)?" in said and "--size" not in said
