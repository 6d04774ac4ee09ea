"""Metrics of sampled videos and the photometric alignment, on cases with known answers."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import train_here

from data import Encoding, collate, encode, prepare
from encoders import MINIATURE
from geometry import inv_se3, plucker_rays, relative_to_first, unproject
from lib import sampled
from lib.align import align_frames
from lib.camera_paths import exp_se3
from lib.metrics import cloud_metrics, depth_metrics, pose_metrics, psnr, ssim
from lib.rooms import Recipe, render_clip, synth

CKPT = pathlib.Path(__file__).parents[1] / "tiny/fantasyworld.safetensors"
SIZE, FRAMES = (96, 160), 5


def room(seed=3, variety="simple"):
    """A rendered room as evaluation's batch of one, and its video (3, T, H, W)."""
    clip = render_clip(seed, FRAMES, *SIZE, variety)
    video = torch.from_numpy(clip["rgb"]).permute(3, 0, 1, 2) / 127.5 - 1
    latents = torch.zeros(16, 2, 12, 20)
    item = dict(
        latents=latents,
        start_latents=latents[:, :1],
        text=torch.zeros(1, 8),
        depth=torch.from_numpy(clip["depth"]),
        w2c=torch.from_numpy(clip["w2c"]).float(),
        intrinsics=torch.from_numpy(clip["intrinsics"]).float().expand(FRAMES, 3, 3),
    )
    return prepare(collate([item]), 16, torch.device("cpu"), plucker_rays), video


@pytest.fixture(scope="module")
def example():
    return room()


# ------------------------------------------------------------------------------------- likeness
def test_psnr_by_hand():
    a = torch.zeros(1, 3, 4, 4)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 0.2) == pytest.approx(20)  # 0.1 of the range
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert math.isnan(psnr(a, a + 0.2, mask))
    mask[..., 0] = True
    assert psnr(a, a + 0.2 * mask, mask) == pytest.approx(20)
    assert psnr(a + 5, a + 1) == math.inf  # clamped as a screen clamps
    for metric in (psnr, ssim):  # clamped, all bytes were 1: infinite for any two pictures
        with pytest.raises(AssertionError, match="uint8"):
            metric(a.byte(), a.byte())


def test_ssim_by_hand():
    """Flat pictures have no variance: what is left is the term of the means."""
    a = torch.full((1, 3, 16, 16), -0.2)  # 0.4 of the range
    b = torch.full((1, 3, 16, 16), 0.2)  # 0.6
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, b) == pytest.approx((2 * 0.4 * 0.6 + 1e-4) / (0.16 + 0.36 + 1e-4), abs=1e-6)


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 40, 50, 3))
    b = 0.7 * a + 0.3 * b
    how = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)
    _, full = metrics.structural_similarity(a, b, channel_axis=2, full=True, **how)
    ours = [torch.from_numpy(x).permute(2, 0, 1)[None] * 2 - 1 for x in (a, b)]
    assert ssim(*ours) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-6)


# ------------------------------------------------------------------------------- depth and cameras
def test_the_scale_of_least_l1_ignores_what_least_squares_follows():
    gt = torch.rand(1, 2, 8, 8).double() + 1
    pred, mask = gt / 3, torch.ones_like(gt, dtype=torch.bool)
    pred[0, 0, 0, :5] *= 10  # outliers
    found = depth_metrics(pred, gt, mask, "scale")
    assert found["delta1"] == pytest.approx(1 - 5 / 128, abs=1e-9)
    assert depth_metrics(gt / 3, gt, mask, "scale")["abs_rel"] < 1e-9


def test_max_depth_leaves_out_what_is_truly_far():
    gt = torch.tensor([1.0, 2.0, 90.0, 100.0]).view(1, 1, 1, 4)
    mask = torch.ones_like(gt, dtype=torch.bool)
    pred = gt.clamp(max=2)
    assert depth_metrics(pred, gt, mask, max_depth=80)["abs_rel"] == 0
    assert depth_metrics(pred, gt, mask)["abs_rel"] > 0.4


def test_sums_over_frames_by_hand():
    """CameraCtrl's sums: frames 1 and 2 turn by 0.1 rad more than they should and stand 3-4-5
    aside."""
    turn = torch.zeros(3, 6, dtype=torch.float64)
    turn[1:, 2] = 0.1
    c2w = exp_se3(turn)
    c2w[1:, :, 3] = torch.tensor([0.3, 0.4, 0], dtype=torch.float64)
    truth = torch.eye(4, dtype=torch.float64)[:3].expand(3, 3, 4)
    found = pose_metrics(inv_se3(c2w)[None], truth[None])
    assert found["rot_err"] == pytest.approx(0.2)
    assert found["trans_err"] == pytest.approx(1.0)
    # |R - 1|^2 = 8 sin^2(angle / 2)
    assert found["cam_mc"] == pytest.approx(2 * math.sqrt(8 * math.sin(0.05) ** 2 + 0.25))


def test_the_extent_of_a_cloud_and_its_similarity():
    """A cloud that is moved, turned and shrunk is the same one; noise shows in percent of 2."""
    torch.manual_seed(0)
    gt = torch.rand(1, 1, 20, 20, 3).double() * torch.tensor([2.0, 0, 0])
    turned = 0.5 * gt @ exp_se3(torch.randn(1, 6).double())[0, :, :3].mT + 3
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    assert cloud_metrics(turned, gt, mask)["chamfer_percent"] < 1e-6
    lifted = gt.clone()
    lifted[..., ::2, 1] += 0.04
    lifted[..., 1::2, 1] -= 0.04
    extent = (gt.amax() - gt.amin()).item()
    found = cloud_metrics(lifted, gt, mask)["accuracy_percent"]
    assert found == pytest.approx(100 * 0.04 / extent, rel=0.02)


# ------------------------------------------------------------------------------------- alignment
def poses_apart(found, truth):
    pose = torch.cat([torch.eye(4)[None, :3].to(found), found])[None]
    return pose_metrics(pose, truth.double())


@pytest.mark.parametrize("seed", [3, 11, 12])
def test_the_alignment_finds_the_cameras_of_a_rendered_video(seed):
    """Without any guess, and guessing the truth: the same cameras."""
    b, video = room(seed)
    frames, truth = video[:, 1:].movedim(0, 1), b["w2c"]
    later = (b[name][0, 1:] for name in ("w2c", "intrinsics", "depth"))
    _, seen = sampled.meet(b["points"][0, :1].expand(FRAMES - 1, -1, -1, -1), *later)
    given = (video[:, 0], b["depth"][0, 0], frames, b["intrinsics"][0], seen)
    for guesses in ([], [truth[0, 1:]]):
        apart = poses_apart(align_frames(*given, guesses), truth)
        assert apart["rot_deg"] < 0.25 and apart["trans"] < 0.01, apart


def test_the_alignment_names_a_video_that_stands_still(example):
    b, video = example
    still = video[:, :1].expand_as(video)
    found = sampled.alignment(b, video[:, 0], still)
    identity = torch.eye(4)[:3].to(found)
    assert (found - identity).abs().max() < 1e-3


def test_the_alignment_tells_how_far_a_video_strays(example):
    """Frames of a path that goes half as far: half of the way is found to be missing."""
    b, video = example
    half = video[:, [0, 0, 1, 1, 2]]
    row = sampled.video_row(b, video, half)
    true = relative_to_first(b["w2c"].double())
    half_way = pose_metrics(true[:, [0, 0, 1, 1, 2]], true)
    assert row["align_rot"] == pytest.approx(half_way["rot_deg"], abs=0.3)
    assert row["align_trans"] == pytest.approx(half_way["trans"], abs=0.02)


def test_the_alignment_follows_a_camera_that_zooms(example):
    """The middle of the true frames, enlarged, is what a longer lens sees."""
    b, video = example
    zoom = torch.linspace(1, 1.3, FRAMES)
    to_middle = [F.affine_grid(torch.eye(2, 3)[None] / z, (1, 1, *SIZE), False) for z in zoom]

    def nearer(maps, mode):  # (T, c, H, W)
        pairs = zip(maps[:, None], to_middle)
        return torch.cat([F.grid_sample(x, g, mode, align_corners=False) for x, g in pairs])

    K, depth = b["intrinsics"].clone(), nearer(b["depth"][0][:, None], "nearest")[:, 0][None]
    K[0, :, 0, 0], K[0, :, 1, 1] = K[0, :, 0, 0] * zoom, K[0, :, 1, 1] * zoom
    b = dict(b, intrinsics=K, depth=depth, points=unproject(depth, b["w2c"], K))
    seen = nearer(video.movedim(1, 0), "bilinear").movedim(0, 1)
    found = sampled.alignment(b, seen[:, 0], seen)
    apart = poses_apart(found, b["w2c"])
    assert apart["rot_deg"] < 0.25 and apart["trans"] < 0.01, apart  # 1.8 by the first lens


# ------------------------------------------------------------------------------------- the rows
def test_the_true_video_scores_perfectly_and_a_still_one_does_not_move(example):
    b, video = example
    true = sampled.video_row(b, video, video)
    still = sampled.video_row(b, video, video[:, :1].expand_as(video))
    assert true["psnr"] == math.inf and true["ssim"] == pytest.approx(1)
    assert true["warp_psnr"] > 30 > still["warp_psnr"] + 5
    assert true["align_rot"] < 0.25 and still["align_rot"] > 3 * true["align_rot"]
    assert still["motion"] == 0 < true["motion"]
    assert 20 < true["seen"] <= 100


def test_carried_colours_are_those_of_the_true_frames_where_both_see(example):
    b, video = example
    carried, seen = sampled.carry_first(b, video[:, 0])
    gap = (carried - video[:, 1:].movedim(0, 1)).abs().mean(1)
    assert gap[seen].median() < 0.03 and gap[~seen].mean() > 2 * gap[seen].mean()


def test_what_moves_in_the_first_frame_is_left_out_where_it_is_carried_to(example):
    b, video = example
    moving = torch.zeros_like(b["mask"])
    moving[0, 0, :, 68:84] = True
    _, seen = sampled.carry_first(dict(b, moving=moving), video[:, 0])
    mark, before = sampled.carry_first(b, moving[0, 0].float().expand(3, -1, -1))
    edge = (mark[:, 0] > 0.05) & (mark[:, 0] < 0.95)
    assert torch.equal(seen | edge, before & (mark[:, 0] < 0.5) | edge)
    assert (before & ~seen)[3].sum() > 500 and mark[3, 0, :, 68:84].mean() < 0.9  # it is elsewhere


def test_out_and_back_ends_where_it_began(example):
    b, _ = example
    path = sampled.out_and_back(b)["w2c"]
    assert torch.equal(path[:, 0], path[:, -1])
    assert torch.equal(path[:, 2], b["w2c"][:, 4]) and torch.equal(path[:, 1], path[:, 3])


def test_a_video_of_no_numbers_is_the_worst_and_in_no_mean_left_out(example):
    b, video = example
    row, _, _ = sampled.sampled_row(None, b, video, lambda *_: (video * math.nan, {}))
    assert row["psnr"] == row["ssim"] == row["revisit"] == -math.inf
    assert row["align_rot"] == row["align_trans"] == math.inf
    assert not any(map(math.isnan, row.values()))


def test_a_video_that_tells_no_camera_has_no_error_of_one(example):
    """Seen: the true video of one colour, and clips without depth, 15 degrees off, or 0."""
    b, video = example
    flat = torch.full_like(video, 0.3)
    for truth, shown in ((flat, flat), (video, flat)):
        row = sampled.video_row(b, truth, shown)
        assert math.isnan(row["align_rot"]) and math.isnan(row["align_trans"])
    unknown = dict(b, depth=0 * b["depth"], mask=b["mask"] & False, points=0 * b["points"])
    assert math.isnan(sampled.video_row(unknown, video, video)["align_rot"])
    half = video.clone()
    half[:, 1] = 0.3  # that frame alone
    assert sampled.video_row(b, video, half)["align_rot"] < 1


# ------------------------------------------------------------------------------------- the command
def test_evaluation_samples_clips_and_compares_them_with_the_truth(tmp_path):
    """On the miniature: its sample beats the still frame, the codec beats the sample."""
    folder = tmp_path / "rooms"
    synth(folder, Recipe(num=1, val=1, num_frames=5, height=96, width=160, variety="simple"))
    encode(folder, 96, 160, 5, Encoding(wan_dir=MINIATURE))
    size = ("--height=96", "--width=160", "--num_frames=5", f"--wan_dir={MINIATURE}")
    where = (f"--data_dir={folder}", f"--out_dir={tmp_path / 'out'}", "--device=cpu")
    asked = ("--eval_only=True", "--eval_samples=1", "--eval_more_sigmas=()")
    asked += ("--sampling={'steps': 4, 'guidance': 1.0, 'shift': 3.0}",)
    line = ("config/tiny2.py", *size, *where, *asked, f"--init_from={CKPT}")
    code, text = train_here(*line)
    assert code == 0, text
    rows = json.loads((tmp_path / "out/eval.json").read_text())
    (name,) = [name for name in rows if name.endswith("sampled")]
    made, still, codec = (rows[n] for n in (name, sampled.STILL, sampled.CODEC))
    assert still["psnr"] < made["psnr"] < codec["psnr"]
    assert {*sampled.COLUMNS, "auc3", "rot_err", "chamfer_percent"} <= set(made)
    assert made["motion"] > 0.5 * codec["motion"]
    assert "PSNR" in text and name in text[text.index("PSNR") :]
    for video in folder.glob("val*/video.mp4"):
        video.unlink()
    code, text = train_here(*line)
    assert "eval_samples compares with the true frames; " in str(code)  # at the start
    assert "video.mp4: no such file" in str(code)


def test_sampling_settings_are_checked_before_anything_slow():
    for text, said in (("{'stps': 8}", "stps"), ("{'steps': 0}", "steps = 0")):
        code, _ = train_here("config/tiny2.py", f"--sampling={text}")
        assert said in str(code), code
