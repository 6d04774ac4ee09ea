"""Evaluation measures against hand-computed numbers."""

import math

import pytest
import torch
from safetensors.torch import save_file
from small import tiny_inputs, tiny_model
from torch import tensor

import lib.evaluate
from geometry import inv_se3, unproject
from lib.evaluate import How, evaluate, name_checkpoints
from lib.metrics import (
    ause,
    cloud_metrics,
    depth_metrics,
    head_agreement,
    nearest,
    temporal_error,
    thin,
    warp_depth,
)
from lib.rooms import render_clip

F64 = dict(dtype=torch.float64)

K = tensor([[8.0, 0, 4], [0, 8, 3], [0, 0, 1]], **F64)


def forward(*z):
    """w2c (1, T, 3, 4) of cameras at these places of the z axis."""
    c2w = torch.eye(4, **F64)[:3].repeat(len(z), 1, 1)
    c2w[:, 2, 3] = tensor(z, **F64)
    return inv_se3(c2w)[None]


def flat(*z):
    """Depth (1, T, 6, 8) of a wall seen head on."""
    return tensor(z, **F64).view(1, -1, 1, 1).expand(1, len(z), 6, 8)


def test_delta_2_and_3_count_factors_of_1_5625_and_1_953125():
    g = tensor([1.0, 1, 1, 1], **F64).view(1, 1, 1, 4)
    m = depth_metrics(g * tensor([1.2, 1.5, 1.6, 0.5], **F64), g, g > 0)
    assert (m["delta1"], m["delta2"], m["delta3"]) == (
        0.25,
        0.5,
        0.75,
    )  # 1 / .5 = 2 is beyond all three


def test_clouds_by_hand():
    """Nearest: pred 0 -> 0 (0), pred 3 -> 1 (2); gt 0 -> 0 (0), 1 -> 0 (1), -1 -> 0 (1)."""
    line = torch.zeros(3, 3, **F64)
    pred, gt, mask = line.clone(), line.clone(), torch.ones(1, 1, 1, 3, dtype=torch.bool)
    pred[:, 0], gt[:, 0] = tensor([0.0, 3, 0], **F64), tensor([0.0, 1, -1], **F64)
    m = cloud_metrics(pred.view(1, 1, 1, 3, 3), gt.view(1, 1, 1, 3, 3), mask, threshold=0.5)
    assert m["accuracy"] == pytest.approx(2 / 3) and m["completeness"] == pytest.approx(2 / 3)
    assert m["chamfer"] == pytest.approx(2 / 3)
    assert m["f_score"] == pytest.approx(2 * (2 / 3) * (1 / 3) / (2 / 3 + 1 / 3))


def test_nearest_in_chunks_equals_all_at_once_and_order_does_not_matter():
    torch.manual_seed(0)
    a, b = torch.randn(50, 3, **F64), torch.randn(40, 3, **F64)
    want = (a[:, None] - b).norm(dim=-1).amin(1)
    torch.testing.assert_close(nearest(a, b, chunk=7), want)
    cloud, mask = a.view(1, 1, 5, 10, 3), torch.ones(1, 1, 5, 10, dtype=torch.bool)
    m = cloud_metrics(cloud[:, :, torch.randperm(5)], cloud, mask)
    assert m["chamfer"] < 1e-6 and m["f_score"] == 1
    assert math.isnan(cloud_metrics(cloud, cloud, ~mask)["chamfer"])


def test_thinning_keeps_both_ends_of_any_number_of_points():
    """81 frames of 480 x 832 have more than 2^24 points: fp32 rounded the last index up to len."""
    for n in (1, 5, 2048, 3000, 81 * 480 * 832):
        kept = thin(torch.arange(n, dtype=torch.int32), 2048)
        assert len(kept) == min(n, 2048) and kept[0] == 0 and kept[-1] == n - 1
        assert (kept.diff() > 0).all()


@pytest.mark.parametrize(
    "depth, z, want",
    [
        ((2, 1.5), (0, 0.5), 0),  # a wall that comes as near as the camera goes
        (
            (1, 1.1),
            (0, 0),
            50 * (0.1 / 1.1 + 0.1 / 1),
        ),  # flicker: 1 against 1.1 one way, 1.1 against 1 the other
        ((2, 2), (0, 0.5), 50 * (0.5 / 2 + 0.5 / 2)),
    ],
)  # constant depth of a moving camera
def test_temporal_error_by_hand(depth, z, want):
    got = temporal_error(
        flat(*depth), forward(*z), K.expand(1, 2, 3, 3), torch.ones(1, 2, 6, 8, dtype=torch.bool)
    )
    assert got == pytest.approx(want, abs=1e-9)


def test_the_nearest_surface_wins_where_two_land_on_one_pixel():
    """98 back, the points at depth 2 and 4 are seen at depth 100 and 102, u = .206 and .251."""
    motion = torch.eye(4, **F64)[:3].clone()
    motion[2, 3] = 98
    seen = warp_depth(
        tensor([[2.0, 4.0]], **F64),
        motion,
        tensor([[0.5, 0, 0.2], [0, 0.5, 0.5], [0, 0, 1]], **F64).expand(2, 3, 3),
        (1, 2),
    )
    assert seen.tolist() == [[100, math.inf]]


def test_true_depth_of_a_rendered_room_is_consistent_in_time_and_flicker_is_not():
    clip = render_clip(0, 5, 64, 96, "simple")
    depth, w2c = torch.from_numpy(clip["depth"])[None], torch.from_numpy(clip["w2c"])[None]
    k, mask = (
        torch.from_numpy(clip["intrinsics"]).expand(1, 5, 3, 3),
        torch.ones(1, 5, 64, 96, dtype=torch.bool),
    )
    flicker = depth * tensor([1, 1.1, 1, 1.1, 1]).view(1, 5, 1, 1)
    assert temporal_error(depth, w2c, k, mask) < 2 < 8 < temporal_error(flicker, w2c, k, mask)


def test_a_camera_that_zooms_at_a_slanted_wall_makes_no_flicker():
    """z = 2 + x / 2, so 2 / (1 - slope / 2).  With one of the two cameras for both: 2.6."""
    k = torch.eye(3, **F64).repeat(1, 5, 1, 1)
    k[..., 0, 0] = k[..., 1, 1] = torch.linspace(40, 80, 5, **F64)
    k[..., 0, 2], k[..., 1, 2] = 32, 24
    slope = (torch.arange(64) + 0.5 - 32) / k[0, :, :1, 0]  # (5, 64)
    depth = (2 / (1 - slope / 2))[None, :, None].expand(1, 5, 48, 64)
    still = torch.eye(4, **F64)[:3].expand(1, 5, 3, 4)
    assert temporal_error(depth, still, k, torch.ones(1, 5, 48, 64, dtype=torch.bool)) < 0.5


def test_heads_agree_when_points_are_the_unprojected_depth():
    depth, w2c, k = flat(2, 1.5), forward(0, 0.5), K.expand(1, 2, 3, 3)
    mask, points = torch.ones(1, 2, 6, 8, dtype=torch.bool), unproject(depth, w2c, k)
    assert head_agreement(points, depth, w2c, k, mask) < 1e-15
    assert head_agreement(points / 1.1, depth, w2c, k, mask) == pytest.approx(0.1)


def test_sparsification_by_hand():
    """Errors 1 2 3 4, confidence the wrong way round: curve 2.5 3 3.5 4 against 2.5 2 1.5 1; area
    1.5 over mean 2.5."""
    e, mask = tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4), torch.ones(1, 1, 1, 4, dtype=torch.bool)
    assert ause(e, e, mask, steps=4) == pytest.approx(0.6)
    assert ause(e, -e, mask, steps=4) == 0
    mask[..., 3] = False
    assert ause(torch.where(mask, e, math.nan), 1 / e, mask) == 0


def evaluation_clip():
    """A prepared batch of one with its noise, of random numbers."""
    K = tensor([[40.0, 0, 24], [0, 40, 16], [0, 0, 1]]).expand(1, 5, 3, 3)
    b = dict(tiny_inputs(batch=1), depth=torch.ones(1, 5, 32, 48), intrinsics=K)
    b.update(latents=b["x"], noise=b["x"], text=b["context"], mask=b["depth"] > 0)
    b.update(pose_enc=b["poses"], w2c=torch.eye(4)[:3].expand(1, 5, 3, 4))
    return dict(b, points=unproject(b["depth"], b["w2c"], K))


def test_the_ranks_meet_after_every_clip_and_wait_there_for_the_picture(monkeypatch):
    """In a step of spread weights they would wait for step_timeout only."""

    class Clips(list):
        frames = staticmethod(lambda i: None)

    seen, how = [], How(torch.no_grad(), 2, 0.1)
    monkeypatch.setattr(lib.evaluate, "gathered", lambda x: seen.append("meet") or [x])
    picture = lambda image: seen.append("picture")
    clips = Clips([evaluation_clip()] * 3)
    rows = evaluate(tiny_model(1), clips, how, picture)
    assert seen == ["picture", "meet", "meet"] and math.isfinite(rows["poses given"]["ate"])


def test_an_evaluation_of_a_model_that_gives_nan_goes_on_and_draws_nothing():
    """Such a run is watched because it goes wrong: its evaluation must not end it."""
    b = evaluation_clip()
    model, drawn = tiny_model(2), []
    model.camera_head.trunk_norm.weight.data.fill_(math.nan)
    how = How(torch.no_grad(), 1, 0.9, window=(0.9, 1.0))
    rows = evaluate(model, [b], how, drawn.append, more_sigmas=(0.5, 0.9))
    assert rows["poses given"]["abs_rel"] == rows["no poses"]["rot_deg"] == math.inf
    assert math.isfinite(rows["poses given"]["diffusion"]) and not drawn
    assert len(rows) == 2  # an expert of high noise is not asked at 0.5
    model.dit.head.head.weight.data.fill_(math.nan)
    assert evaluate(model, [b], how)["no poses"]["diffusion"] == math.inf


def test_no_two_checkpoints_share_a_row_or_a_picture(tmp_path):
    """The folder tells two of one stage and step apart; the path does it inside one folder."""
    files = {}
    for file, stage in (
        ("a/x", 1),
        ("b/x", 1),
        ("c/x", 1),
        ("c/y", 1),
        ("d/x", 2),
        ("e/x", "vggt"),
    ):
        files[file] = tmp_path / f"{file}.safetensors"
        files[file].parent.mkdir(exist_ok=True)
        save_file({"a": torch.zeros(1)}, files[file], metadata=dict(stage=str(stage), step="7"))
    sources = [str(files[file]) for file in ("a/x", "b/x", "c/x", "c/y", "d/x", "a/x")]
    a, b, c, c2, d = sources[:5]
    short = ("stage 1", "step 7")
    assert name_checkpoints(sources) == {
        a: (*short, "a"),
        b: (*short, "b"),
        c: (*short, c),
        c2: (*short, c2),
        d: ("stage 2", "step 7"),
    }
    assert name_checkpoints([a, d])[a] == short  # the plain name where nothing is equal
    with pytest.raises(ValueError, match="e/x.safetensors: it is no checkpoint of stage 0, 1 or 2"):
        name_checkpoints([a, str(files["e/x"])])
    save_file({"a": torch.zeros(1)}, files["e/x"], metadata=dict(stage="1"))
    with pytest.raises(ValueError, match="e/x.safetensors: it is no checkpoint of stage 0, 1 or 2"):
        name_checkpoints([a, str(files["e/x"])])
