"""Every layout that is imported, written here with known truth, must come out as that truth."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import WRITERS, H, T, W, clip, colmap, re10k
from small import command_here

from data import import_recordings, load_clip, load_samples
from geometry import relative_to_first
from lib import camera_files, importers
from lib.layouts import LAYOUTS
from lib.lens import Lens, Undistortion, make_lens
from lib.pictures import write_png

ROOT = Path(__file__).parents[1]
FIELD = ROOT.parent / "shared" / "field"


def imported(tmp_path, write, form=None, c=None, **wishes):
    """The only sample of a recording written in a layout, and the clip that it is."""
    c, src = c or clip(), tmp_path / "src"
    src.mkdir()
    write(src, c)
    names, failed = importers.run(src, tmp_path / "out", form, **wishes)
    assert failed == 0 and len(names) == 1
    (sample,) = load_samples(tmp_path / "out")
    return sample, c


@pytest.mark.parametrize("form", WRITERS)
def test_a_layout_is_recognised_and_comes_out_as_it_was(tmp_path, form, capsys):
    known = dict(tum=(W * 0.8, W * 0.8, W / 2, H / 2), tartanair=(W / 2, W / 2, W / 2, H / 2))
    c = clip()
    if form in known:  # layouts whose intrinsics are the sensor's
        c["k"] = np.array(known[form])
        more = dict(intrinsics=known[form]) if form == "tum" else {}
    else:
        more = {}
    sample, c = imported(tmp_path, WRITERS[form], c=c, **more)
    # What each writer leaves without a partner: 8 frames are left, of which 5 make a clip.
    left = dict(scannet=[0, 1, 2, 3, 5], vipe=[0, 1, 2, 4, 5])
    ids = left.get(form, list(range(5)))
    out = load_clip(sample, H, W, 5)
    want = relative_to_first(torch.from_numpy(c["w2c"][ids]))
    torch.testing.assert_close(out["w2c"], want, rtol=0, atol=2e-5)
    depth = torch.from_numpy(c["mm"][ids] / 1000).float()
    marked = out["depth"] == 0
    assert marked.sum() == dict(sevenscenes=80, vkitti2=80, tartanair=45).get(form, 0)
    near = dict(vkitti2=0.006, vipe=2e-3, megasam=2e-3, omniworld=2e-3, record3d=2e-3)
    near = near.get(form, 1e-6)
    assert ((out["depth"] - depth).abs() <= near * (1 + depth))[~marked].all()
    k = out["intrinsics"][:, [0, 1, 0, 1], [0, 1, 2, 2]]
    assert (k - torch.from_numpy(c["k"])).abs().max() < 1e-3
    rgb = torch.from_numpy(c["rgb"][ids]).permute(3, 0, 1, 2) / 127.5 - 1
    assert (out["video"] - rgb).abs().mean() < 0.03
    said = capsys.readouterr().out
    assert f"({dict(replica='kitti', blender='nerfstudio').get(form, form)})" in said
    assert ("1 frames" in said) == (form in ("scannet", "vipe", "tum"))


def test_the_depth_camera_of_scannet_is_another(tmp_path):
    """Depth of half the size, of a wider lens: its pixels land where the picture has them."""
    c, src = clip(), tmp_path / "src"
    src.mkdir()
    WRITERS["scannet"](src, c)
    wide = np.array([[40.0, 0, 17], [0, 41, 12.5], [0, 0, 1]])
    full = np.eye(4)
    full[:3, :3] = wide
    np.savetxt(src / "intrinsic/intrinsic_depth.txt", full)
    columns = np.tile(np.arange(1, 33, dtype=np.uint16) * 1000, (24, 1))
    for t in range(T):
        write_png(src / "depth" / f"{t}.png", columns)
    importers.run(src, tmp_path / "out")
    (sample,) = load_samples(tmp_path / "out")
    found = load_clip(sample, H, W, 5)["depth"][0, 24, ::2].numpy()
    centres = np.arange(0, W, 2) + 1  # of the pairs of columns that a pixel of depth covers
    u = (centres - c["k"][2]) / c["k"][0] * 40 + 17
    want = np.where((u >= 0) & (u < 32), np.floor(u) + 1, 0)
    np.testing.assert_allclose(found, want, atol=1e-3)


def test_several_recordings_go_on_where_a_kill_left_them(tmp_path, capsys):
    src, out = tmp_path / "src", tmp_path / "out"
    for name in ("b", "a"):
        (src / name).mkdir(parents=True)
        WRITERS["kitti"](src / name, clip())
    (out / ".a.part").mkdir(parents=True)
    (out / ".a.part" / "video.mp4").write_bytes(b"cut")
    wishes = dict(stride=2, max_frames=5, prompt="a room")
    assert importers.run(src, out, **wishes) == (["a", "b"], 0)
    before = (out / "a/video.mp4").stat().st_mtime_ns
    importers.run(src, out, **wishes)
    assert capsys.readouterr().out.count("already imported") == 2
    assert (out / "a/video.mp4").stat().st_mtime_ns == before
    sample = load_samples(out)[0]
    assert sample["prompt"] == "a room" and sample["fps"] == 15
    want = relative_to_first(torch.from_numpy(clip()["w2c"][::2]))
    torch.testing.assert_close(load_clip(sample, H, W, 5)["w2c"], want, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="another sample 'a'"):
        importers.run(src, out)


def test_two_parts_of_one_recording(tmp_path):
    (tmp_path / "src").mkdir()
    WRITERS["kitti"](tmp_path / "src", clip())
    for name, start in (("first", 0), ("rest", 4)):
        importers.run(tmp_path / "src", tmp_path / "out", name=name, start=start, max_frames=5)
    one, two = load_samples(tmp_path / "out")
    assert (one["id"], one["split"], two["id"], two["split"]) == ("first", "train", "rest", "val")
    want = relative_to_first(torch.from_numpy(clip()["w2c"][4:]))
    torch.testing.assert_close(load_clip(two, H, W, 5)["w2c"], want, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="--max_frames of 5"):
        importers.run(tmp_path / "src", tmp_path / "out", max_frames=4)


def test_cut_to_another_size_frames_depth_and_intrinsics_go_together(tmp_path):
    sample, c = imported(tmp_path, WRITERS["kitti"], size=(40, 40))
    out = load_clip(sample, 40, 40, 5)
    k = out["intrinsics"][0]
    torch.testing.assert_close(k[0, 0], torch.tensor(c["k"][0] * 40 / 48).double())
    cols = ((np.arange(40) + 0.5) * 48 / 40 + 8).astype(int)
    rows = ((np.arange(40) + 0.5) * 48 / 40).astype(int)
    want = c["mm"][0][rows][:, cols] / 1000
    assert np.abs(out["depth"][0].numpy() - want).max() < 1e-6


LENSES = [
    ("SIMPLE_RADIAL", [60.0, 32, 24], [-0.12]),
    ("RADIAL", [60.0, 32, 24], [0.08, 0.02]),
    ("OPENCV", [61.0, 59, 33, 23], [-0.1, 0.03, 0.004, -0.003]),
    ("FULL_OPENCV", [61.0, 59, 33, 23], [0.1, 0.03, 0.004, -0.003, 0.01, 0.2, 0.02, 0.01]),
    ("OPENCV_FISHEYE", [50.0, 50, 32, 24], [0.02, -0.01, 0.004, 0.001]),
]


def distorted_by_hand(model, p, x, y):
    """COLMAP's camera models, written out."""
    r2 = x * x + y * y
    if model == "OPENCV_FISHEYE":
        theta = np.arctan(np.sqrt(r2))
        d = theta * (1 + p[0] * theta**2 + p[1] * theta**4 + p[2] * theta**6 + p[3] * theta**8)
        return x * d / np.sqrt(r2), y * d / np.sqrt(r2)
    p = [*p, *[0] * (8 - len(p))]
    k1, k2, p1, p2, k3, k4, k5, k6 = p
    radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
    side = 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    return x * radial + side, y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)


def test_intrinsics_are_of_the_whole_pixels_that_are_cut(tmp_path):
    """They were of a cut of 46.5 rows; 47 are taken, from the first one on."""
    sample, c = imported(tmp_path, WRITERS["kitti"], size=(32, 44))
    fx, fy, cx, cy = camera_files.read_cameras(sample["camera"])[1][0]
    np.testing.assert_allclose([fy, cy], [c["k"][1] / 47, 24 / 47], rtol=1e-9)
    np.testing.assert_allclose([fx, cx], [c["k"][0] / W, 0.5], rtol=1e-9)


@pytest.mark.parametrize("model, focal, numbers", LENSES, ids=[m for m, *_ in LENSES])
def test_a_distorted_model_loses_its_distortion(tmp_path, model, focal, numbers):
    """Depth holds the source's column: what is found at a pixel must be where the lens sees it."""
    c, src = clip(), tmp_path / "src"
    src.mkdir()
    columns = np.tile(np.arange(1, W + 1, dtype=np.uint16) * 500, (H, 1))
    c["mm"] = np.repeat(columns[None], T, 0)
    wave = 128 + 100 * np.sin((np.arange(W) + 0.5) / 5)
    c["rgb"] = np.tile(wave.round().astype(np.uint8)[:, None], (T, H, 1, 3))
    colmap(src, c)
    for old in (src / "sparse/0").glob("*"):
        old.unlink()
    fractions = np.tile(c["k"] / [W, H, W, H], (T, 1))
    camera_files.write(src / "sparse/0", "colmap", c["w2c"], fractions, (H, W))
    told = " ".join(map(str, [*focal, *numbers]))
    (src / "sparse/0/cameras.txt").write_text(f"1 {model} {W} {H} {told}\n")
    with pytest.raises(ValueError, match="data.py import"):
        camera_files.read(src / "sparse/0")
    importers.run(src, tmp_path / "out")
    (sample,) = load_samples(tmp_path / "out")
    out = load_clip(sample, H, W, 5)
    k = out["intrinsics"][0].numpy()
    x = (np.arange(W) + 0.5 - k[0, 2]) / k[0, 0]
    y = (np.arange(H) + 0.5 - k[1, 2]) / k[1, 1]
    x, y = np.meshgrid(x, y)
    fx, cx = focal[0], focal[-2]
    u = distorted_by_hand(model, numbers, x, y)[0] * fx + cx
    assert 0 <= u.min() and u.max() <= W + 1e-6  # no pixel is made up
    found = out["depth"][0].numpy() * 2  # the column whose pixel was taken, from 1
    assert np.abs(found - 0.5 - u).max() < 0.51 and abs((found - 0.5 - u).mean()) < 0.05
    grey = (out["video"][:, 0].mean(0).numpy() + 1) * 127.5
    want = np.interp(u, np.arange(W) + 0.5, wave)
    slope = np.gradient(want, axis=1)
    offset = ((grey - want) * slope).sum() / (slope**2).sum()
    offset /= np.abs(np.gradient(u, axis=1)).mean()
    assert abs(offset) < 0.1  # pixels


def test_the_identity_and_a_hand_made_lens():
    assert make_lens("OPENCV", dict(k1=0.0, k2=0.0, p1=0.0, p2=0.0)) is None
    one = Undistortion((1.0, 1.5, 0.5, 0.5), Lens((-0.1,)))
    assert one.pinhole == one.k  # a barrel leaves no blank edge
    grid = one.grid((2, 2))  # x = -0.25, y = -1/6: r^2 = 0.0902778, factor 0.99097222
    np.testing.assert_allclose(grid[0, 0], [0.5 - 0.25 * 0.99097222, 0.5 - 0.25 * 0.99097222])


def test_without_depth_the_sample_says_so(tmp_path, capsys):
    sample, c = imported(tmp_path, re10k)
    assert sample["depth"] is None and "no depth: label the video" in capsys.readouterr().out
    assert round(sample["fps"], 1) == 30.0
    assert import_recordings("re10k", tmp_path / "src", tmp_path / "again") == 0
    assert "data.py view" not in capsys.readouterr().out  # which shows depth


def test_a_recording_that_lacks_a_part_is_told_which(tmp_path):
    """Seen: a RealSense and a Kinect recording without a trajectory, "wanted a known layout"."""
    for name in ("rgb.txt", "depth.txt"):
        (tmp_path / "slam" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "slam" / name).write_text("# timestamp filename\n")
    for part, word in (("color", "jpg"), ("depth", "png")):
        for n in range(3):
            path = tmp_path / "deep" / "kinect" / f"frame-{n:06d}.{part}.{word}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    with pytest.raises(ValueError, match="slam: most like tum, but without groundtruth.txt"):
        importers.find(tmp_path / "slam")
    for form in ("sevenscenes", None):
        with pytest.raises(ValueError, match="kinect: most like sevenscenes, but without poses"):
            importers.find(tmp_path / "deep", form)
    for name in ("cameras", "points3D"):  # seen: the largest file of a COLMAP model left out
        path = tmp_path / "splat" / "sparse/0" / f"{name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(ValueError, match="splat: most like colmap, but without images.bin"):
        importers.find(tmp_path / "splat")
    for form in ("colmap", "scannet"):  # nothing of it is there
        with pytest.raises(ValueError, match=f"wanted recordings of the layout {form}"):
            importers.find(tmp_path / "slam", form)


def test_what_cannot_be_imported_is_named(tmp_path, capsys):
    src = tmp_path / "src"
    src.mkdir()
    with pytest.raises(ValueError, match="wanted a recording of a known layout; known are tum"):
        importers.run(src, tmp_path / "out")
    (tmp_path / "phone.mp4").write_bytes(b"0")  # seen: no such folder
    for name in ("none", "phone.mp4"):
        with pytest.raises(ValueError, match=f"{name}: no folder; wanted one of a labeler"):
            importers.run(tmp_path / name, tmp_path / "out")
    WRITERS["kitti"](src, clip())
    with pytest.raises(ValueError, match="choose another folder"):
        importers.run(src, src / "out")
    (src / "K.txt").unlink()
    assert importers.run(src, tmp_path / "out") == ([], 1)
    text = capsys.readouterr().out
    assert "no intrinsics; give --intrinsics fx,fy,cx,cy" in text and "K.txt" in text
    (src / "images/9.png").unlink()
    assert importers.run(src, tmp_path / "out", intrinsics=(60, 60, 32, 24)) == ([], 1)
    assert "9 poses for 8 pictures" in capsys.readouterr().out


@pytest.mark.skipif(not FIELD.is_dir(), reason="needs shared/field")
def test_real_recordings(tmp_path):
    run = [sys.executable, "data.py", "import"]
    kinect = ["--from", "tum", "--intrinsics", "518,519,325.5,253.5"]
    for name, more in (("hololens_raw", []), ("slambook_raw", kinect)):
        line = [*run, str(FIELD / name), str(tmp_path / name), *more]
        made = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0 and "1 samples, 0 failed" in made.stdout, made.stdout


def test_the_recording_of_this_repository(tmp_path):
    line = ["import", "examples/livingroom", tmp_path / "out", "--max_frames", "21"]
    code, text = command_here("data.py", *line)
    assert code == 0 and "1 samples, 0 failed" in text, text
    assert set(WRITERS) - {"replica", "blender"} < set(LAYOUTS)
