"""data.py verify: names every usual mistake, stays quiet on what is right, says what cannot be
checked."""

import copy
import json
import sys

import corruptions
import numpy as np
import pytest
import torch

import data
from geometry import unproject
from lib import rooms, suspects, verify, views
from lib.camera_files import read_table
from lib.rooms import render_clip


def static_clip(kind):
    """The first seed whose rendered camera stands still or only turns."""
    words = dict(static="does not move", rotation="the camera turns")[kind]
    seed = next(s for s in range(100) if words in render_clip(s, 5, 16, 16)["prompt"])
    return corruptions.rendered(seed, 9, variety="full")


@pytest.mark.parametrize("kind", corruptions.KINDS[1:])
def test_every_usual_mistake_on_rendered_rooms_is_named(kind):
    """One trial each; `python tests/corruptions.py` runs many, on recordings too."""
    found = corruptions.sweep(lambda s: corruptions.rendered(s, 17), 1, [kind], first=40)
    assert found[kind][kind] == 1, found


@pytest.mark.parametrize(
    "words, axes", [("top to bottom", 1), ("left to right", 2), ("by half a turn", (1, 2))]
)
def test_what_alone_lies_otherwise_is_named(words, axes):
    """Seen: a video upside down was ok, depth upside down "left-handed axes", mirrored depth
    "quaternion order" or "translation scale off"."""
    for seed in (1, 2):
        raw = corruptions.rendered(seed)[0]
        found = corruptions.inspect(dict(raw, rgb=np.flip(raw["rgb"], axes).copy()))
        assert f"the video fits flipped {words}" in found.checks["photo"][1], found.checks
        found = corruptions.inspect(dict(raw, depth=np.flip(raw["depth"], axes).copy()))
        assert found.suspects == ["depth flipped"] and words in found.checks["views"][1]


def test_views_that_cannot_tell_affine_depth_from_a_scale_say_so():
    """Seen: a room of which a wall alone shows, whose affine depth was called a scale."""
    for kind, told in (("affine depth", 1), ("translation scale off", 0)):
        raw, w2c = corruptions.rendered(1, variety="full")
        rng = np.random.default_rng([1, corruptions.KINDS.index(kind)])
        found = corruptions.inspect(corruptions.corrupt(raw, w2c, kind, rng)[0])
        assert found.suspects == ["translation scale off"]
        assert str(found.checks).count(suspects.AFFINE_AS_WELL) == told


def test_what_lay_in_memory_before_changes_no_verdict():
    """LAPACK's gelsy read it: every second look at this clip found nothing."""
    raw = corruptions.rendered(40)[0]
    factor = torch.linspace(0.8, 1.2, 17)[:, None, None]
    w2c, K = verify.check_cameras(verify.Report("x"), raw["table"].copy(), (64, 96))
    pairs = views.frame_pairs(17)[:-2]
    ids = sorted({t for pair in pairs for t in pair})
    depth = (torch.from_numpy(raw["depth"]) * factor)[ids].double()
    look = views.Views(depth, K[ids], w2c, pairs, ids)
    found = []
    for _ in range(20):
        dirt = [torch.full((n,), 7) for n in range(1, 40)]
        del dirt
        found.append(look.frame_scales())
    assert all(f.equal(found[0]) for f in found)
    level = found[0] * factor[ids, 0, 0]
    assert level.std() < 0.01 * level.mean()


@pytest.mark.skipif(not corruptions.FIELD.is_dir(), reason="needs shared/field")
@pytest.mark.parametrize("kind", ["clean", "poses one frame late", "focal length off"])
def test_a_fast_real_camera_is_no_alarm_and_its_mistakes_are_named(kind):
    found = corruptions.sweep(corruptions.hololens, 2, [kind])
    assert found[kind]["none" if kind == "clean" else kind] == 2, found


@pytest.mark.skipif(
    not corruptions.LIVINGROOM.is_dir(), reason="the recording is not beside this checkout"
)
@pytest.mark.parametrize(
    "kind", ["c2w stored as w2c", "poses one frame late", "translation scale off"]
)
def test_mistakes_on_the_recording_are_named(kind):
    found = corruptions.sweep(lambda s: corruptions.livingroom(s, 25), 1, ["clean", kind])
    assert found[kind][kind] == 1 and found["clean"]["none"] == 1, found


def test_clean_renderings_raise_no_alarm_at_the_thresholds_of_exact_data():
    for variety, seeds in (("simple", range(4)), ("full", range(8))):
        for seed in seeds:
            report = corruptions.inspect(corruptions.rendered(seed, 9, variety=variety)[0], "exact")
            assert report.status in ("ok", "skip") and not report.suspects, (seed, report.checks)


@pytest.mark.parametrize(
    "kind, words", [("static", "stand still"), ("rotation", "scale not checkable")]
)
def test_a_camera_that_does_not_move_is_called_not_checkable(kind, words):
    report = corruptions.inspect(static_clip(kind)[0])
    assert (
        report.status == "skip"
        and report.checks["views"][0] == "skip"
        and words in report.checks["views"][1]
    )


def test_noise_of_an_estimator_is_no_alarm():
    """Depth off by 1 % per pixel and 1 % per frame, poses by 2 mm and 0.06 degrees."""
    rng = np.random.default_rng(0)
    for seed in range(2):
        raw = copy.deepcopy(corruptions.rendered(seed)[0])
        raw["depth"] = raw["depth"] * (
            1
            + 0.01 * rng.normal(size=raw["depth"].shape)
            + 0.01 * rng.normal(size=(len(raw["depth"]), 1, 1))
        ).astype(np.float32)
        raw["table"][:, [10, 14, 18]] += 0.002 * rng.normal(size=(len(raw["table"]), 3))
        angle = 0.001 * rng.normal(size=len(raw["table"]))
        turn = np.stack(
            [
                [[np.cos(a), 0, np.sin(a), 0], [0, 1, 0, 0], [-np.sin(a), 0, np.cos(a), 0]]
                for a in angle
            ]
        )
        w2c = raw["table"][:, 7:].reshape(-1, 3, 4)
        raw["table"][:, 7:] = np.einsum("tij,tjk->tik", turn[:, :, :3], w2c).reshape(-1, 12)
        report = corruptions.inspect(raw)
        assert report.status in ("ok", "skip") and not report.suspects, report.checks


@pytest.mark.filterwarnings("error")
def test_half_floats_bring_no_warning():
    """Seen: numpy's "overflow encountered in cast" beside the verdict, of a Record3D export."""
    raw = copy.deepcopy(corruptions.rendered(3)[0])
    raw["depth"] = raw["depth"].astype(np.float16)
    assert corruptions.inspect(raw).status in ("ok", "skip")


def test_factor_of_wrong_translations_is_measured():
    raw = copy.deepcopy(corruptions.rendered(3)[0])
    raw["table"][:, [10, 14, 18]] *= 4
    report = corruptions.inspect(raw)
    assert report.suspects == ["translation scale off"]
    assert float(report.checks["views"][1].split("factor ")[1]) == pytest.approx(1 / 4, rel=0.02)


def test_a_video_that_runs_ahead_of_depth_and_cameras_is_found():
    raw = dict(corruptions.rendered(1)[0])
    raw["rgb"] = np.concatenate([raw["rgb"][1:], raw["rgb"][-1:]])
    status, text = corruptions.inspect(raw).checks["photo"]
    assert status == "fail" and "by a frame" in text


def test_frame_counts_sizes_rotations_points_and_jumps_are_checked():
    raw = corruptions.rendered(0, 9)[0]

    def status(check, **changes):
        return corruptions.inspect(dict(raw, **changes)).checks[check][0]

    table = raw["table"].copy()
    table[3, 7] *= 1.01
    depth = raw["depth"][:, :, :48]
    assert (
        status("frames", rgb=raw["rgb"][:8]) == "fail"
        and status("frames", table=table[:4]) == "fail"
    )
    assert status("sizes", depth=depth) == "fail" and status("rotations", table=table) == "fail"
    table = raw["table"].copy()
    table[:, 7] += 1e-3  # a tracker's drift: the loader takes the rotations next to them
    assert status("rotations", table=table) == "warn"
    far = raw["table"].copy()
    far[:, 10] = 1e7
    checks = corruptions.inspect(dict(raw, table=far)).checks  # not "intrinsics: cameras: ..."
    assert checks["intrinsics"][0] == "ok" and checks["cameras"][1].startswith("translations up")
    w2c, K = verify.check_cameras(verify.Report("x"), raw["table"], (64, 96))
    right = unproject(torch.from_numpy(raw["depth"]).double()[None], w2c[None], K[None])[0].numpy()
    assert status("points", points=right) == "ok" and status("points", points=1.1 * right) == "fail"
    longer = raw["table"].copy()
    longer[:, [10, 14, 18]] *= 1.1  # depth cannot tell, points can
    for table, level, want in (
        (raw["table"], "exact", "ok"),
        (longer, "data", "ok"),
        (longer, "exact", "fail"),
    ):
        report = corruptions.inspect(dict(raw, points=right, table=table), level)
        assert report.checks["points"][0] == want and (report.numbers["points_error"] > 1e-3) == (
            table is longer
        )
    assert status("points", points=right[:, ::2]) == "fail"
    jumpy = np.delete(raw["table"], 4, 0)
    jumpy[:, [10, 14, 18]] = np.arange(9)[np.arange(9) != 4, None] * [0.1, 0, 0]
    assert (
        "jumps between frames 3 and 4"
        in corruptions.inspect(dict(raw, table=jumpy)).checks["rotations"][1]
    )


def test_command_prints_a_table_names_the_cure_and_fails(tmp_path, capsys, monkeypatch):
    rooms.synth(
        tmp_path, rooms.Recipe(seed=5, variety="simple", num=2, num_frames=9, height=64, width=96)
    )
    assert (
        data.verify(tmp_path, exact=True) == 0 and "2 samples, 0 failed" in capsys.readouterr().out
    )
    path = tmp_path / "train_000001" / "camera_params.txt"
    table = read_table(path)
    table[:, [10, 14, 18]] *= 3
    np.savetxt(path, table)
    (tmp_path / "train_000000" / "depth" / "frame_0003.npy").unlink()
    assert data.verify(tmp_path, fix_hints=True) == 2
    text = capsys.readouterr().out
    assert "translation scale off" in text and "cure of" in text and "depth 8" in text
    assert data.verify(tmp_path, as_json=True) == 2
    found = json.loads(capsys.readouterr().out)["samples"]
    assert found[1]["suspects"] == ["translation scale off"] and found[1]["hints"]
    for option, words in (
        ("--fix-hints", "    cure of translation scale off: "),
        ("--json", '"failed": 2'),
    ):
        monkeypatch.setattr(sys, "argv", ["data.py", "verify", str(tmp_path), option])
        with pytest.raises(SystemExit, match="1"):
            data.command()
        assert words in capsys.readouterr().out


def test_a_rendering_of_caches_alone_is_no_failure(tmp_path, capsys):
    """verify named every clip of synth --cache_only as failed, and ended with 1."""
    rooms.synth(tmp_path, rooms.Recipe(1, 5, 32, 48, variety="simple", cache_only=True))
    assert data.verify(tmp_path) == 0
    assert "skip files: caches alone, which train.py checks" in capsys.readouterr().out


@pytest.mark.parametrize("shade", [0, 230])
def test_a_flat_sky_without_depth_is_no_flipped_video(shade):
    """Seen: "the video fits flipped top to bottom: 0.000", where the ground's depth met the sky."""
    raw = corruptions.rendered(1)[0]
    raw = dict(raw, rgb=raw["rgb"].copy(), depth=raw["depth"].copy())
    raw["rgb"][:, :32], raw["depth"][:, :32] = shade, 0
    assert corruptions.inspect(raw).checks["photo"][0] == "ok"
