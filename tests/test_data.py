"""Readers, writers, crops and the cache: what is read is what was written, errors name their
cure."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
from geometry import unproject
from lib import caches, camera_files, files, pictures, rooms
from lib.caches import read_header
from lib.depth import DepthUnit, read_depth, why_relative


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("rooms")
    rooms.synth(root, rooms.Recipe(seed=5, val=1, num=2, num_frames=9, height=64, width=96))
    return root


def copy_of(rendered, tmp_path):
    return shutil.copytree(rendered, tmp_path / "copy")


def test_cameras_round_trip_and_url_and_blank_lines_are_ignored(tmp_path):
    clip = rooms.render_clip(0, 5, 32, 48)
    k = np.repeat(clip["intrinsics"][None], 5, 0)
    camera_files.write_cameras(tmp_path / "c.txt", clip["w2c"], k, (32, 48))
    text = (tmp_path / "c.txt").read_text()
    (tmp_path / "url.txt").write_text("https://example.org/v\n\n" + text.replace("\n", "\n\n"))
    for name in ("c.txt", "url.txt"):
        w2c, fractions = camera_files.read_cameras(tmp_path / name)
        np.testing.assert_allclose(w2c, clip["w2c"], atol=1e-9)  # 10 digits are written
        np.testing.assert_allclose(
            fractions[0], [k[0, 0, 0] / 48, k[0, 1, 1] / 32, 0.5, 0.5], rtol=1e-9
        )


@pytest.mark.parametrize(
    "line, message",
    [
        ("1 2 3", "line 2: 3 columns"),
        ("a " * 19, "line 2: could not convert"),
        ("0 nan" + " 1" * 17, "18 finite"),
        ("0 500 500 320 240" + " 0" * 14, "Divide fx"),
    ],
)
def test_a_bad_camera_line_is_named_with_what_was_wanted(tmp_path, line, message):
    good = "0 .5 .9 .5 .5 0 0 1 0 0 0 0 1 0 0 0 0 1 0"
    (tmp_path / "c.txt").write_text(good + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"c.txt, {message}|c.txt, line 2.*{message}"):
        camera_files.read_cameras(tmp_path / "c.txt")


def test_video_and_png_round_trip(tmp_path):
    rgb = rooms.render_clip(1, 5, 64, 96)["rgb"]
    pictures.write_video(tmp_path / "v.mp4", rgb, 15)
    frames, told = files.read_video(tmp_path / "v.mp4")
    assert frames.shape == rgb.shape and told[1] == 15
    assert np.abs(frames.astype(float) - rgb).mean() < 3  # lossy: crf 14, half chroma
    assert len(files.read_video(tmp_path / "v.mp4", 2)[0]) == 2
    pictures.write_png(tmp_path / "p.png", rgb[0])
    np.testing.assert_array_equal(files.read_video(tmp_path / "p.png")[0][0], rgb[0])
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    for name in ("bad.mp4", "absent.mp4"):
        with pytest.raises(ValueError, match=name):
            files.read_video(tmp_path / name)


@pytest.mark.parametrize(
    "kind", ["uint8", "0 .. 1 over the clip", "0 .. 1 per frame", "1 / z", "millimetres"]
)
def test_depth_without_a_unit_is_told_from_metric_depth_in_every_window(tmp_path, kind):
    z = rooms.render_clip(2, 9, 32, 48)["depth"]
    low, high = (f(z.reshape(9, -1), axis=1).reshape(9, 1, 1) for f in (np.min, np.max))
    stored = {
        "uint8": (255 * z / z.max()).astype(np.uint8),
        "0 .. 1 over the clip": (z - z.min()) / np.ptp(z),
        "0 .. 1 per frame": (z - low) / (high - low),
        "1 / z": 1 / z,
        "millimetres": 1000 * z,
    }[kind]
    np.save(tmp_path / "d.npy", stored)
    relative = kind in ("uint8", "0 .. 1 over the clip", "0 .. 1 per frame")
    assert bool(why_relative(tmp_path / "d.npy")) == relative
    if relative:  # order is kept, nothing divided
        np.testing.assert_array_equal(
            read_depth(tmp_path / "d.npy", frames=[3]), stored[[3]].astype(np.float32)
        )
        with pytest.raises(ValueError, match="relative inverse depth"):
            read_depth(tmp_path / "d.npy", DepthUnit(inverse=True))
    elif kind == "1 / z":
        np.testing.assert_allclose(
            read_depth(tmp_path / "d.npy", DepthUnit(inverse=True)), z, rtol=1e-6
        )
    else:
        np.testing.assert_allclose(read_depth(tmp_path / "d.npy", DepthUnit(0.001)), z, rtol=1e-6)


def test_clips_without_a_unit_are_marked_in_the_cache_and_the_user_is_told(
    rendered, tmp_path, capsys
):
    root = copy_of(rendered, tmp_path)
    for f in (root / "train_000000" / "depth").glob("*.npy"):
        np.save(f, (20 * np.load(f)).clip(0, 255).astype(np.uint8))
    assert data.encode(root, 64, 96, 9) == 0
    assert "train_000000: 8-bit depth: not metric" in capsys.readouterr().out
    clips = data.CachedClips(root, "train", (64, 96, 9))
    assert [bool(clips[i]["relative"]) for i in range(2)] == [
        True,
        False,
    ] and clips.count_relative() == 1
    assert data.collate([clips[0], clips[1]])["relative"].tolist() == [True, False]


def test_depth_reads_the_same_from_every_container(tmp_path):
    depth = (rooms.render_clip(2, 5, 32, 48)["depth"] * 1000).round().astype(np.uint16)
    metres = depth.astype(np.float32) * np.float32(0.001)
    (tmp_path / "npy").mkdir()
    (tmp_path / "png").mkdir()
    for t in range(5):
        np.save(tmp_path / "npy" / f"frame_{t:04d}.npy", metres[t])
        pictures.write_png(tmp_path / "png" / f"frame_{t:04d}.png", depth[t])
    np.save(tmp_path / "one.npy", metres)
    np.savez(tmp_path / "one.npz", depth=metres)
    for name, scale in (("npy", None), ("one.npy", None), ("one.npz", None), ("png", 0.001)):
        np.testing.assert_array_equal(read_depth(tmp_path / name, DepthUnit(scale)), metres)
        np.testing.assert_array_equal(
            read_depth(tmp_path / name, DepthUnit(scale), [3, 1]), metres[[3, 1]]
        )
    with pytest.raises(ValueError, match="depth_scale"):
        read_depth(tmp_path / "png")
    with pytest.raises(ValueError, match="5 frames found, 8 wanted"):
        read_depth(tmp_path / "npy", frames=[7])
    np.save(tmp_path / "holes.npy", np.array([[[np.nan, np.inf, -1, 2]]], np.float32))
    np.testing.assert_array_equal(read_depth(tmp_path / "holes.npy"), [[[0, 0, 0, 2]]])


def test_the_three_forms_of_metadata_list_the_same_samples(rendered, tmp_path):
    root = copy_of(rendered, tmp_path)
    full = data.load_samples(root)
    assert [s["split"] for s in full] == ["train", "train", "val"]
    flat = [
        dict(
            video=f"{s['id']}/video.mp4",
            prompt=s["prompt"],
            depth=f"{s['id']}/depth",
            camera_params=f"{s['id']}/camera_params.txt",
        )
        for s in full
    ]
    (root / "metadata.json").write_text(json.dumps(flat))
    # last tenth, at least one, is val
    assert data.load_samples(root) == [dict(s, fps=None) for s in full]
    (root / "metadata.json").unlink()
    assert data.load_samples(root) == [dict(s, fps=None, prompt="") for s in full]
    assert len(data.load_samples(root, "train")) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no samples; 0 found"):  # seen: in split None
        data.load_samples(tmp_path / "empty")
    with pytest.raises(ValueError, match="no samples in split 'test'"):
        data.load_samples(root, "test")


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(video="../x.mp4"), "sample 1.*leaves the dataset"),
        (dict(video="/x.mp4"), "sample 1.*leaves"),
        (dict(prompt="x"), "sample 1: no video_path; found prompt"),
        (dict(video="ok/video.mp4"), "there twice"),
        (dict(video="a.mp4", id="../a"), "file name"),
    ],
)
def test_bad_entries_are_named(tmp_path, bad, message):
    (tmp_path / "metadata.json").write_text(json.dumps([dict(video="ok/video.mp4"), bad]))
    with pytest.raises(ValueError, match=message):
        data.load_samples(tmp_path)


def test_crop_and_resize_move_intrinsics_by_hand_computed_numbers(rendered):
    sample = data.load_samples(rendered)[0]
    full = data.load_clip(sample, 64, 96, 9)
    k = full["intrinsics"][0]
    half = data.load_clip(sample, 32, 48, 9)["intrinsics"][0]  # resize by 1/2: everything halves
    torch.testing.assert_close(half[:2], k[:2] / 2)
    # 16 columns off each side, then 1/2
    square = data.load_clip(sample, 32, 32, 9)["intrinsics"][0]
    torch.testing.assert_close(square[0], torch.stack([k[0, 0] / 2, k[0, 1], (k[0, 2] - 16) / 2]))
    wide = data.load_clip(sample, 32, 96, 9)["intrinsics"][0]  # 16 rows off top and bottom
    torch.testing.assert_close(wide[1], torch.stack([k[1, 0], k[1, 1], k[1, 2] - 16]))
    torch.testing.assert_close(wide[0], k[0])


def test_cropped_depth_unprojects_to_the_full_size_points(rendered):
    sample = data.load_samples(rendered)[0]
    full, small = data.load_clip(sample, 64, 96, 9), data.load_clip(sample, 32, 96, 9)
    lift = [
        unproject(c["depth"].double()[None], c["w2c"][None], c["intrinsics"][None])[0]
        for c in (full, small)
    ]
    torch.testing.assert_close(lift[1], lift[0][:, 16:48])  # a pure crop: the same points
    third = data.load_clip(sample, 64 // 2, 96 // 2, 9)
    points = unproject(
        third["depth"].double()[None], third["w2c"][None], third["intrinsics"][None]
    )[0]
    # pixel i takes source pixel 2i + 1, whose ray is half a source pixel away: .5 z / f in each
    # direction
    error = (points - lift[0][:, 1::2, 1::2]).norm(dim=-1) / full["depth"][:, 1::2, 1::2]
    assert error.max() < 0.5 * 2**0.5 / full["intrinsics"][0, 0, 0] * 1.01
    assert (full["video"][:, :, 16:48] - small["video"]).abs().max() < 1e-6


def test_windows_are_relative_to_their_first_frame_and_depth_comes_from_points_too(
    rendered, tmp_path
):
    root = copy_of(rendered, tmp_path)
    sample = data.load_samples(root)[0]
    clip = data.load_clip(sample, 64, 96, 9)
    window = data.load_clip(sample, 64, 96, 5, start=2)
    torch.testing.assert_close(window["w2c"][0], torch.eye(3, 4).double())
    torch.testing.assert_close(window["depth"], clip["depth"][2:7])
    assert data.load_clip(sample, 64, 96, 5, stride=2)["fps"] == 7.5
    points = unproject(clip["depth"].double()[None], clip["w2c"][None], clip["intrinsics"][None])[
        0
    ].numpy()
    points[:, :2] = 0  # no reading there
    np.save(root / "points.npy", points)
    depth = data.load_clip(dict(sample, depth=None, points=root / "points.npy"), 64, 96, 9)["depth"]
    torch.testing.assert_close(depth[:, 2:], clip["depth"][:, 2:])
    assert (depth[:, :2] == 0).all()
    with pytest.raises(ValueError, match="9 video frames and 9 cameras found, 13 wanted"):
        data.load_clip(sample, 64, 96, 13)
    with pytest.raises(ValueError, match="wanted 4k \\+ 1, for instance 9"):
        data.load_clip(sample, 64, 96, 10)


def test_the_cache_is_kept_refreshed_when_stale_and_repaired_when_cut(
    rendered, tmp_path, capsys, monkeypatch
):
    root = copy_of(rendered, tmp_path)
    with pytest.raises(
        ValueError, match="python data.py encode .* --wan_dir FOLDER --height 64 --width"
    ):
        data.CachedClips(root, "train", (64, 96, 9))
    assert data.encode(root, 64, 96, 9) == 0
    folder = next((root / "cache").iterdir())
    files = sorted(f for f in folder.iterdir() if f.name != "text_empty.safetensors")
    before = [f.stat().st_mtime_ns for f in files]
    (root / "train_000000" / "video.mp4").touch()  # newer than its cache
    files[1].write_bytes(files[1].read_bytes()[:1000])  # cut short
    parts, there = folder / ".parts", []
    monkeypatch.setattr(data, "gathered", lambda x: there.append(parts.is_dir()) or [x])
    data.encode(root, 64, 96, 9)
    assert there == [True] and not parts.exists()  # other ranks may write in it until all are done
    assert [f.stat().st_mtime_ns > t for f, t in zip(files, before)] == [True, True, False]
    clips = data.CachedClips(root, "train", (64, 96, 9))
    batch = data.collate([clips[0], clips[1]])
    assert batch["latents"].shape == (2, 16, 3, 8, 12)
    assert batch["start_latents"].shape == (2, 16, 1, 8, 12)
    assert batch["depth"].shape == (2, 9, 64, 96) and batch["w2c"].shape == (2, 9, 3, 4)
    assert [t.shape[1] for t in batch["text"]] == [64, 64] and clips.empty_text.is_file()
    torch.testing.assert_close(batch["latents"][:, :, :1], batch["start_latents"][:, :, :1])
    (root / "val_000000" / "video.mp4").write_bytes(b"broken")
    capsys.readouterr()
    assert data.encode(root, 32, 48, 9) == 1
    out = capsys.readouterr()
    assert "val_000000/video.mp4: not a readable video" in out.out + out.err


def test_a_second_encode_beside_the_first_costs_no_clip_its_text(rendered, tmp_path, monkeypatch):
    root, save, second = copy_of(rendered, tmp_path), caches.save_clip, []

    def beside(*args):
        if not second:  # all of it between a clip's parts and its cache
            second.append(None)
            second.append(data.encode(root, 32, 48, 5))
        save(*args)

    monkeypatch.setattr(caches, "save_clip", beside)
    assert data.encode(root, 32, 48, 5) == 0 and second == [None, 0]
    clips = data.CachedClips(root, "train", (32, 48, 5))  # refuses caches without text
    assert len(clips) == 2 and all("text" in clips[i] for i in range(2))


def test_cache_only_rendering_is_the_same_for_any_number_of_workers(rendered, tmp_path):
    for workers in (0, 2):
        rooms.synth(
            tmp_path / str(workers),
            rooms.Recipe(seed=5, val=1, cache_only=True, num=2, num_frames=9, height=64, width=96),
            workers=workers,
        )
    one, two = (sorted((tmp_path / w / "cache").glob("*/*.safetensors")) for w in "02")
    assert [f.name for f in one] == [f.name for f in two] and len(one) == 4
    for a, b in zip(one, two):  # the header's key order is random
        a_tensors, b_tensors = load_file(a), load_file(b)
        assert read_header(a)[0] == read_header(b)[0]
        assert all(torch.equal(a_tensors[k], b_tensors[k]) for k in a_tensors | b_tensors)
    data.encode(rendered, 64, 96, 9)
    direct, written = (
        data.CachedClips(root, "val", (64, 96, 9))[0] for root in (tmp_path / "2", rendered)
    )
    assert direct["prompt"] == written["prompt"]
    torch.testing.assert_close(direct["w2c"], written["w2c"])
    torch.testing.assert_close(direct["depth"], written["depth"])
    assert (direct["latents"] - written["latents"]).abs().mean() < 0.1  # the written video is H.264


def test_a_look_at_a_rendering_without_videos_says_that_it_holds_none(tmp_path, capsys):
    (tmp_path / "metadata.json").write_text(json.dumps([dict(id="a", prompt="x", cached=True)]))
    with pytest.raises(ValueError, match="no sample could be shown"):
        data.look_at(tmp_path, [], None, None, 21)
    said = capsys.readouterr()
    assert "skipped a: clip a: a video, cameras and depth" in said.out + said.err


@pytest.mark.parametrize("wrong", [dict(num=0), dict(val=-1), dict(seed=-1)])
def test_rendering_no_clips_is_refused_with_the_numbers_that_are_wanted(tmp_path, wrong):
    recipe = rooms.Recipe(**dict(num=1, num_frames=5, height=32, width=48) | wrong)
    with pytest.raises(ValueError, match="--num of 1 or more; --val, --seed and --workers of 0"):
        rooms.synth(tmp_path / "new", recipe)
    assert not (tmp_path / "new").exists()


def test_a_rendering_without_videos_is_not_sent_to_encode(tmp_path):
    entries = [dict(id=name, prompt="x", cached=True) for name in "ab"]
    (tmp_path / "metadata.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="not encoded at 5x32x48.*\n  rm -r .*, and render it"):
        data.CachedClips(tmp_path, "train", (32, 48, 5))
