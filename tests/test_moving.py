"""A sphere that moves by itself: exact motion and mask, in the files, and nowhere an alarm or a
false error."""

import json
import sys
import time

import corruptions
import numpy as np
import pytest
import torch

import data
from encoders import MINIATURE
from geometry import normalize_scene, unproject
from lib import pictures, rooms, verify
from lib.evaluate import geometry_row
from lib.metrics import temporal_error
from lib.report import Report


@pytest.mark.parametrize("variety", ["full", "simple"])
def test_its_pixels_lie_on_its_sphere_and_the_rest_is_the_clip_without_it(variety):
    for seed in range(4):
        clip, plain = (rooms.render_clip(seed, 5, 64, 96, variety, moving=m) for m in (True, False))
        mask, k = clip["moving"], torch.from_numpy(clip["intrinsics"]).expand(1, 5, 3, 3)
        depth, w2c = (torch.from_numpy(clip[name]).double()[None] for name in ("depth", "w2c"))
        away = np.linalg.norm(
            unproject(depth, w2c, k)[0].numpy() - clip["track"][:, None, None], axis=-1
        )
        np.testing.assert_allclose(away[mask], clip["radius"], atol=1e-6)  # depth is stored in fp32
        assert away[~mask].min() > clip["radius"] and 0.005 < mask.mean() < 0.4
        np.testing.assert_array_equal(clip["depth"][~mask], plain["depth"][~mask])
        np.testing.assert_array_equal(clip["w2c"], plain["w2c"])
        np.testing.assert_array_equal(clip["rgb"][~mask], plain["rgb"][~mask])
        assert (clip["depth"][mask] < plain["depth"][mask]).all()
        steps = np.diff(clip["track"], axis=0)
        np.testing.assert_allclose(steps, steps[:1].repeat(4, 0), atol=1e-12)  # constant velocity
        assert 0.4 < np.linalg.norm(steps.sum(0)) < 2
        assert "a moving " in clip["prompt"] and "moving" not in plain["prompt"]


def test_its_texture_goes_along():
    scene = dict(
        sphere=np.zeros((2, 3)), offset=np.ones((9, 3)), track=np.arange(6.0).reshape(2, 3)
    )
    first, last = (rooms.at_frame(scene, t) for t in (0, 1))
    np.testing.assert_array_equal(
        first["sphere"] + first["offset"][-2:], last["sphere"] + last["offset"][-2:]
    )
    assert (
        (first["sphere"][0] == 0).all()
        and (last["sphere"][1] == [3, 4, 5]).all()
        and (scene["sphere"] == 0).all()
    )


def test_command_writes_the_mask_verify_is_content_and_every_reader_sees_it(
    tmp_path, monkeypatch, capsys
):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
        data.command()
        return capsys.readouterr().out

    size = ["--num_frames", 5, "--height", 64, "--width", 96]
    run("synth", tmp_path, "--num", 1, "--val", 1, "--seed", 3, "--workers", 0, "--moving", *size)
    found = json.loads(run("verify", tmp_path, "--exact", "--json"))
    assert found["failed"] == 0 and all(0 < s["moving"] < 0.4 for s in found["samples"])
    sample = data.load_samples(tmp_path, "train")[0]
    stored = np.load(sample["moving"])
    assert stored["track"].shape == (5, 3) and stored["radius"] > 0.1
    full, crop = data.load_clip(sample, 64, 96, 5), data.load_clip(sample, 32, 32, 5)
    np.testing.assert_array_equal(full["moving"], stored["mask"])
    # as the depth is picked
    np.testing.assert_array_equal(crop["moving"], stored["mask"][:, 1::2, 17:80:2])
    (tmp_path / "masks").mkdir()
    for t, mask in enumerate(stored["mask"]):  # black and white, as mask tools write
        pictures.write_png(
            tmp_path / "masks" / f"{t}.png",
            np.repeat(255 * mask[..., None].astype(np.uint8), 3, -1),
        )
    again = data.load_clip(dict(sample, moving=tmp_path / "masks"), 64, 96, 5)
    np.testing.assert_array_equal(again["moving"], stored["mask"])
    run("encode", tmp_path, "--wan_dir", MINIATURE, *size)
    item = data.CachedClips(tmp_path, "val", (64, 96, 5))[0]
    assert item["moving"].dtype == torch.bool and item["moving"].any()
    rooms.synth(
        tmp_path / "cached",
        rooms.Recipe(
            seed=3, cache_only=True, moving=True, num=1, num_frames=5, height=64, width=96
        ),
    )
    cached = data.CachedClips(tmp_path / "cached", "train", (64, 96, 5))[0]
    np.testing.assert_array_equal(cached["moving"], stored["mask"])
    without = {k: v for k, v in item.items() if k != "moving"}
    assert "moving" in data.collate([item, item]) and "moving" not in data.collate([item, without])


def test_what_moves_is_no_alarm_with_its_mask_on_exact_data_and_without_it_on_others():
    for variety in ("simple", "full"):
        for seed in range(2):
            raw = corruptions.rendered(seed, 9, variety=variety, moving=True)[0]
            for report in (
                corruptions.inspect(raw, "exact"),
                corruptions.inspect(dict(raw, moving=None)),
            ):
                assert report.status in ("ok", "skip") and not report.suspects, (
                    seed,
                    report.checks,
                )
    assert "inverted" in corruptions.inspect(dict(raw, moving=~raw["moving"])).checks["moving"][1]
    table = raw["table"].copy()
    table[:, [10, 14, 18]] *= 3  # and mistakes are still found
    assert corruptions.inspect(dict(raw, table=table)).suspects == ["translation scale off"]


def test_a_mask_of_another_aspect_covers_the_whole_picture():
    """As in training; verify took its middle for the whole."""
    moving = np.zeros((1, 64, 64), bool)
    moving[:, :16] = True
    left = verify.leave_out(Report("a"), torch.ones(1, 64, 96), moving)
    assert (left[:, :16] == 0).all() and (left[:, 16:] == 1).all()


def test_temporal_error_of_the_true_depth_leaves_out_what_moves():
    clip = rooms.render_clip(1, 5, 64, 96, "simple", moving=True)
    depth, w2c, moving = (torch.from_numpy(clip[k])[None] for k in ("depth", "w2c", "moving"))
    K, mask = torch.from_numpy(clip["intrinsics"]).expand(1, 5, 3, 3), torch.ones_like(moving)
    depth, w2c, _ = normalize_scene(depth.double(), w2c, K, mask)
    points = unproject(depth, w2c, K)
    b = dict(depth=depth, mask=mask, w2c=w2c, intrinsics=K, points=points)
    blind, told = (geometry_row(depth, points, w2c, x)["tae"] for x in (b, dict(b, moving=moving)))
    assert told == temporal_error(depth, w2c, K, ~moving) < 1 < blind / 2


def test_clips_of_128_by_224_are_rendered_at_20_frames_a_second_or_more_on_one_core():
    """95 on an idle core; CPU time, so that a busy machine does not count."""
    start = time.process_time()
    for seed in range(2):
        rooms.render_clip(seed, 9, 128, 224, moving=seed > 0)
    assert 18 / (time.process_time() - start) > 20
