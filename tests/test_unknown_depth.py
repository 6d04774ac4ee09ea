"""What counts as unknown depth: the type's largest value, what metadata.json says, sky."""

import json
import shutil

import numpy as np
import pytest

import data
from lib import pictures, rooms, verify
from lib.depth import DepthUnit, read_depth, why_relative

Z = rooms.render_clip(2, 9, 32, 48)["depth"]
HOLE = np.s_[:, :6, :9]


def png_folder(folder, values):
    folder.mkdir()
    for t, frame in enumerate(values):
        pictures.write_png(folder / f"frame_{t:04d}.png", frame)
    return folder


@pytest.mark.parametrize("kind", ["png of 7-Scenes", "half floats", "32-bit counts", "signed"])
def test_the_largest_value_of_a_type_is_no_depth(tmp_path, kind):
    """Sensors write it where nothing was measured: 65535, 65504, 4294967295, 32767."""
    dtype = {"png of 7-Scenes": "u2", "half floats": "f2", "32-bit counts": "u4", "signed": "i2"}
    stored = (Z * (1 if kind == "half floats" else 1000)).round(3).astype(dtype[kind])
    top = np.finfo("f2").max if kind == "half floats" else np.iinfo(stored.dtype).max
    stored[HOLE] = top
    path = tmp_path / "d.npy"
    np.save(path, stored)
    if kind == "png of 7-Scenes":
        path = png_folder(tmp_path / "png", stored)
    got = read_depth(path, DepthUnit(None if kind == "half floats" else 0.001))
    assert (got[HOLE] == 0).all()
    rest = np.ones(Z.shape, bool)
    rest[HOLE] = False
    np.testing.assert_allclose(got[rest], Z[rest], atol=3e-3)


def test_millimetres_with_such_holes_are_not_relative(tmp_path):
    stored = (Z * 1000).astype(np.uint16)
    stored[4, :5, :9] = 65535  # 45 pixels of one frame
    np.save(tmp_path / "d.npy", stored)
    assert not why_relative(tmp_path / "d.npy")
    with pytest.raises(ValueError, match="uint16 depth without a unit; add depth_scale"):
        read_depth(tmp_path / "d.npy")
    with pytest.raises(ValueError, match="depth_scale .* in metadata.json$"):  # of a sample's
        read_depth(tmp_path / "d.npy", DepthUnit())
    stretched = (65535 * (Z - Z.min()) / np.ptp(Z)).astype(np.uint16)
    np.save(tmp_path / "e.npy", stretched)
    assert why_relative(tmp_path / "e.npy"), "a range that is filled to its end is stretched"


@pytest.mark.parametrize(
    "entry, value",
    [
        (dict(depth_invalid=1000), 1000),  # a game's far plane
        (dict(depth_invalid=[-1, 1000, 2000]), 2000),
        (dict(depth_max=80), 655.35),  # Virtual KITTI is cut at 80 m
        (dict(depth_max=80.0), 1e9),  # beyond what counts as depth at all
    ],
)
def test_a_sample_says_what_is_unknown_and_the_cache_notices(rooms_on_disk, entry, value):
    root, name = rooms_on_disk
    for file in (root / name / "depth").glob("*.npy"):
        depth = np.load(file)
        depth[:6, :9] = value
        np.save(file, depth)
    meta = json.loads((root / "metadata.json").read_text())
    before = job_key(root)
    next(s for s in meta["samples"] if s["id"] == name).update(entry)
    (root / "metadata.json").write_text(json.dumps(meta))
    sample = next(s for s in data.load_samples(root) if s["id"] == name)
    clip = data.load_clip(sample, 64, 96, 9)
    assert (clip["depth"][:, :5, :8] == 0).all() and (clip["depth"] > 0).float().mean() > 0.9
    assert clip["depth"].max() < 80
    assert job_key(root) != before, "another meaning of the values is another cache"


def test_inverse_depth_is_another_cache(rooms_on_disk):
    """Verify's own cure must not be answered with `kept` (finding G)."""
    root, name = rooms_on_disk
    before = job_key(root)
    meta = json.loads((root / "metadata.json").read_text())
    next(s for s in meta["samples"] if s["id"] == name).update(inverse_depth=True)
    (root / "metadata.json").write_text(json.dumps(meta))
    assert job_key(root) != before


def test_the_doctor_names_a_far_value_that_many_pixels_share(rooms_on_disk):
    root, name = rooms_on_disk
    sample = next(s for s in data.load_samples(root) if s["id"] == name)
    raw = verify.load_raw(sample)
    assert "largest depth" not in verify.inspect(raw).checks
    depth = raw["depth"].copy()
    depth[:, :6, :9] = 1000
    status, words = verify.inspect(dict(raw, depth=depth)).checks["largest depth"]
    assert status == "warn" and "depth_invalid 1000" in words
    cured = verify.inspect(dict(raw, depth=depth, unit=DepthUnit(invalid=(1000,))))
    assert "largest depth" not in cured.checks and not cured.suspects


@pytest.mark.parametrize("field", ["depth_invalid", "depth_max"])
@pytest.mark.parametrize("value", ["80", True, {}, [["1"]]])
def test_other_values_are_refused_by_name(rooms_on_disk, field, value):
    root, name = rooms_on_disk
    meta = json.loads((root / "metadata.json").read_text())
    next(s for s in meta["samples"] if s["id"] == name)[field] = value
    (root / "metadata.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=field):
        data.load_samples(root)


def job_key(root):
    sample = data.load_samples(root)[0]
    jobs = data.plan_clip(sample, root, dict(num_frames=9), data.Encoding(64, 96, 9), root)
    return jobs[0].key["stamp"]


@pytest.fixture
def rooms_on_disk(tmp_path, shared_rooms):
    shutil.copytree(shared_rooms, tmp_path / "set")
    return tmp_path / "set", data.load_samples(tmp_path / "set")[0]["id"]


@pytest.fixture(scope="module")
def shared_rooms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms") / "set"
    rooms.synth(folder, rooms.Recipe(num=1, val=1, num_frames=9, height=64, width=96, seed=3))
    return folder
