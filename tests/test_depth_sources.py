"""Depth of every kind, from the user's files to a trained step: what has a unit is metric, what has
none is not."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_train import SIZES, run

import data
from lib import camera_paths, files, pictures
from lib.depth import DepthUnit, read_depth
from lib.rooms import Recipe, synth

SHAPE = dict(num_frames=5, height=32, width=48)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    root = tmp_path_factory.mktemp("rooms")
    synth(root, Recipe(seed=3, variety="simple", val=1, num=2, **SHAPE))
    return root


def rewrite(rooms, root, store, **entry):
    """The dataset with its training clips' depth stored by store(folder, depth) -> path, and more
    in their entries."""
    shutil.copytree(rooms, root)
    meta = json.loads((root / "metadata.json").read_text())
    for sample in meta["samples"]:
        if sample["id"].startswith("train"):
            depth = read_depth(root / sample["depth_dir"])
            shutil.rmtree(root / sample["depth_dir"])
            path = store(root / sample["id"], depth)
            sample.update(entry, depth_dir=f"{sample['id']}/{path}")
    (root / "metadata.json").write_text(json.dumps(meta))


def png(folder, depth):
    (folder / "png").mkdir()
    for t, frame in enumerate(depth):
        pictures.write_png(folder / "png" / f"{t}.png", (1000 * frame).round().astype(np.uint16))
    return "png"


def per_frame(write):
    def store(folder, depth):
        (folder / "frames").mkdir()
        for t, frame in enumerate(depth):
            write(folder / "frames" / f"frame_{t:04d}", frame)
        return "frames"

    return store


def one(write):
    def store(folder, depth):
        write(folder / "d", depth)
        return next(f.name for f in folder.glob("d.*"))

    return store


@pytest.mark.parametrize(
    "store, entry, error",
    [
        (png, dict(depth_scale=0.001), 5.1e-4),
        (per_frame(np.save), {}, 1e-6),
        (per_frame(lambda f, d: np.savez_compressed(f, depth=d)), {}, 1e-6),
        (one(np.save), {}, 1e-6),
        (one(lambda f, d: np.savez(f, depth=d, other=0 * d)), {}, 1e-6),
        (one(lambda f, d: np.save(f, 1 / d)), dict(inverse_depth=True), 1e-5),
        (one(lambda f, d: np.savez(f, depth=2 / d)), dict(inverse_depth=True, depth_scale=2), 1e-5),
    ],
    ids=[
        "16-bit PNG",
        "npy per frame",
        "npz per frame",
        "npy",
        "npz",
        "inverse npy",
        "inverse npz with a scale",
    ],
)
def test_metric_depth_of_every_container_reaches_the_cache_and_verify(
    rooms, tmp_path, store, entry, error
):
    root = tmp_path / "copy"
    rewrite(rooms, root, store, **entry)
    assert data.encode(root, 32, 48, 5) == 0
    got = data.CachedClips(root, "train", (32, 48, 5))
    for i, name in enumerate(("train_000000", "train_000001")):
        true = read_depth(rooms / name / "depth")
        assert not got[i]["relative"] and np.abs(got[i]["depth"].numpy() - true).max() < error
    assert data.verify(root, "train") == 0


def test_training_on_depth_without_a_unit_warns_and_moves_the_depth_head_alone(
    rooms, tmp_path, capsys
):
    """One clip of 8 bits, one stretched to 0 .. 1: verify, encode and train.py all say so; then two
    steps."""

    def store(folder, depth):
        low, high = depth.min(), depth.max()
        eight = folder.name.endswith("0")
        np.save(
            folder / "d.npy",
            (40 * depth).astype(np.uint8) if eight else (depth - low) / (high - low),
        )
        return "d.npy"

    root = tmp_path / "copy"
    rewrite(rooms, root, store)
    assert data.verify(root, "train") == 0 and "2 x relative depth" in capsys.readouterr().out
    assert data.encode(root, 32, 48, 5) == 0
    text = capsys.readouterr().out
    for line in (
        "train_000000: 8-bit depth: not metric",
        "train_000001: stretched to 0 .. 1",
        "with the ssi loss",
    ):
        assert line in text
    text = run(
        "train.py",
        "config/tiny1.py",
        f"--data_dir={root}",
        "--height=32",
        "--width=48",
        "--num_frames=5",
        "--num_workers=0",
        "--batch_size=1",
        "--warmup_steps=0",
        "--log_every=1",
        "--device=cpu",
        "--wan_dir=",
        "--random_wan=True",
        f"--model_overrides={SIZES}",
        "--max_steps=2",
        f"--out_dir={tmp_path}/out",
    )
    assert "warning: 2 of 2 clips have depth without a unit" in text and "depth_mode ssi" in text
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    for line in lines:
        values = dict(
            part.rsplit(" ", 1) for part in line.split(" | ")[1:] if part.startswith("loss/")
        )
        values = {k: float(v) for k, v in values.items()}
        assert values["loss/point"] == values["loss/camera"] == 0 < values["loss/depth"]
        # four digits are printed
        assert values["loss/total"] == pytest.approx(values["loss/depth"], rel=1e-3)
    assert len(lines) == 2


@pytest.mark.parametrize("kind", ["npy", "png", "pfm"])
def test_a_single_map_is_one_frame(tmp_path, kind):
    """--scene_scale takes the depth of the start image, as a labeler writes it."""
    depth = np.full((24, 32), 2.0, np.float32)
    depth[:, 16:] = 4.0
    path = tmp_path / f"depth.{kind}"
    if kind == "npy":
        np.save(path, depth)
    elif kind == "png":
        pictures.write_png(path, (depth * 1000).astype(np.uint16))
    else:
        path.write_bytes(b"Pf\n32 24\n-1.0\n" + depth[::-1].tobytes())
    found = read_depth(path, DepthUnit(0.001 if kind == "png" else None), [0])
    assert found.shape == (1, 24, 32) and np.abs(found[0] - depth).max() < 1e-6
    K = torch.tensor([[[[40.0, 0, 16], [0, 40, 12], [0, 0, 1]]]])
    want = camera_paths.mean_distance(f"{path}*2", K, (24, 32))
    one = camera_paths.mean_distance(f"{path}*{0.001 if kind == 'png' else 1}", K, (24, 32))
    assert 2.5 < one < 3.5 and want == pytest.approx(one * (2000 if kind == "png" else 2))
    if kind == "png":
        with pytest.raises(ValueError, match=r"without a unit.*--scene_scale FILE\*0.001"):
            camera_paths.mean_distance(str(path), K, (24, 32))
    assert files.count_arrays(path) == 1


def test_a_map_for_the_scene_scale_is_cut_as_its_picture_is(tmp_path):
    """A square picture whose lowest third is near; a video of half its height shows a sixth of
    it."""
    depth = np.full((90, 90), 2.0, np.float32)
    depth[60:] = 1
    np.save(tmp_path / "depth.npy", depth)
    pictures.write_png(tmp_path / "square.png", np.zeros((60, 60, 3), np.uint8))
    K = torch.tensor([[[[1e6, 0, 32], [0, 1e6, 16], [0, 0, 1]]]])  # parallel rays
    how = (f"{tmp_path}/depth.npy", K, (32, 64))
    cut = camera_paths.mean_distance(*how, str(tmp_path / "square.png"))
    assert cut == pytest.approx(11 / 6, abs=0.02)  # rows 22.5 to 67.5 of 90
    assert camera_paths.mean_distance(*how) == pytest.approx(5 / 3, abs=0.02)  # squeezed


def test_a_map_without_lengths_sets_no_scene_scale(tmp_path):
    K = torch.tensor([[[[40.0, 0, 16], [0, 40, 12], [0, 0, 1]]]])
    for name, depth, words in (
        ("stretched", np.linspace(0, 1, 768), "stretched to 0 .. 1"),
        ("empty", np.zeros(768), "no known pixel"),
    ):
        path = tmp_path / f"{name}.npy"
        np.save(path, depth.astype(np.float32).reshape(24, 32))
        with pytest.raises(ValueError, match=f"--scene_scale .*{words}.*; wanted lengths"):
            camera_paths.mean_distance(str(path), K, (24, 32))
    one = camera_paths.mean_distance(f"{tmp_path}/stretched.npy*3", K, (24, 32))
    assert 1 < one < 2  # who says what a count is may have it so
