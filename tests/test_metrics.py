"""Metrics against hand-computed numbers (eight decimals), degenerate clips, invariances; in fp64
and fp32."""

import math

import pytest
import torch
from precision import REAL, loose
from torch import tensor

from geometry import inv_se3, quat_to_mat, unproject
from lib.metrics import align_sim3, depth_metrics, point_metrics, pose_metrics

torch.manual_seed(0)

pytestmark = pytest.mark.usefixtures("precision")

ALL = torch.ones(1, 1, 1, 4, dtype=torch.bool)


def depth_example():
    return [tensor(x, **REAL).view(1, 1, 1, 4) for x in ([2, 2, 3, 8], [2, 2.5, 4, 4])]


def near(got, want):
    assert got == pytest.approx(want, rel=loose(), abs=6e-9 if loose() == 1e-6 else 1e-7)


def about_z(angle):
    c, s = math.cos(angle), math.sin(angle)
    return tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], **REAL)


def path(centres, R=None):
    """w2c (1, T, 3, 4) of cameras at these centres, orientations (T, 3, 3) or identity."""
    centres = torch.as_tensor(centres, **REAL)
    R = torch.eye(3, **REAL).expand(len(centres), 3, 3) if R is None else R
    return inv_se3(torch.cat([R, centres[..., None]], -1))[None]


def random_path(T=6):
    q = torch.cat([0.2 * torch.randn(T, 3, **REAL), torch.ones(T, 1, **REAL)], -1)
    return path(torch.randn(T, 3, **REAL), quat_to_mat(q))


def test_depth_example_by_hand_and_a_factor_of_exactly_1_25_does_not_count():
    m = depth_metrics(*depth_example(), ALL)
    near(m["abs_rel"], 0.3625)
    near(m["delta1"], 0.25)
    near(m["rmse"], math.sqrt((0.25 + 1 + 16) / 4))


def test_least_squares_scale_is_not_the_best_abs_rel_but_scale_1_is_here():
    p, g = depth_example()
    near((p * g).sum().item() / (p * p).sum().item(), 0.65432101)
    near(depth_metrics(0.65432101 * p, g, ALL)["abs_rel"], 0.41003087)
    assert (
        min(depth_metrics(s * p, g, ALL)["abs_rel"] for s in torch.linspace(0.3, 2, 171, **REAL))
        >= 0.3625 - 1e-7
    )


def test_median_alignment_takes_the_lower_median_ratio_of_the_clip():
    """Ratios 1, 1.25, 1.33, 0.5: lower median 1."""
    p, g = depth_example()
    near(depth_metrics(p, g, ALL, "median")["abs_rel"], 0.3625)
    near(depth_metrics(3 * p, g, ALL, "median")["abs_rel"], 0.3625)


def test_each_alignment_removes_what_it_names_and_no_more():
    g = 1 + torch.rand(2, 3, 4, 5, **REAL)
    mask, scale, shift = torch.rand_like(g) > 0.3, tensor([2, 0.3], **REAL).view(2, 1, 1, 1), 0.5
    assert depth_metrics(scale * g, g, mask, "median")["abs_rel"] < loose()
    assert depth_metrics(scale * g + shift, g, mask, "scale_shift")["rmse"] < loose()
    assert depth_metrics(scale * g + shift, g, mask, "median")["abs_rel"] > 0.01
    per_frame = torch.tensor([1, 2, 3.0]).view(1, 3, 1, 1)
    assert depth_metrics(per_frame * g, g, mask, "scale_shift")["abs_rel"] > 0.05  # not per frame
    assert depth_metrics(g, g, mask) == dict(abs_rel=0, rmse=0, delta1=1, delta2=1, delta3=1)
    with pytest.raises(ValueError, match="'mean'.*scale_shift"):
        depth_metrics(g, g, mask, "mean")


@pytest.mark.parametrize("align", ["none", "median", "scale_shift"])
def test_masked_depth_and_empty_clips_do_not_count(align):
    g = 1 + torch.rand(2, 3, 4, 5, **REAL)
    p, mask = g + 0.1 * torch.rand_like(g), torch.rand_like(g) > 0.3
    mask[1] = False
    want = depth_metrics(p[:1], g[:1], mask[:1], align)
    bad = torch.where(mask, p, math.nan), torch.where(mask, g, math.inf)
    assert depth_metrics(*bad, mask, align) == pytest.approx(want)
    assert math.isnan(depth_metrics(p[1:], g[1:], mask[1:], align)["abs_rel"])


def test_rotation_errors_of_0_10_20_degrees_sum_to_0_5236_radians():
    R = torch.stack([about_z(math.radians(a)) for a in (0, 10, 20)])
    m = pose_metrics(path(torch.zeros(3, 3), R), path(torch.zeros(3, 3)))
    near(m["rot_deg"] * 3 * math.pi / 180, 0.52359878)
    near(m["rpe_rot"], 10)


def test_translation_errors_by_hand():
    """The metric has no scale alignment; the second number divides each path by its own longest
    distance."""
    gt = tensor([[0, 0, 0], [1, 0, 0], [2, 0, 0]], **REAL)
    gen = gt + tensor([[0], [0], [1]]) * tensor([0, 1, 0])
    near(3 * pose_metrics(path(gen), path(gt))["trans"], 1.0)
    near(3 * pose_metrics(path(gen / 5**0.5), path(gt / 2))["trans"], 0.51229225)


def test_ate_example_by_hand():
    gt, est = (
        [[0, 0, 0], [1, 0, 0], [2, 0, 0], [2, 1, 0]],
        [[0, 0, 0], [2, 0, 0], [4, 0, 0], [4, 2, 0.4]],
    )
    near(pose_metrics(path(est), path(gt))["ate"], 0.00645474)
    est, gt = tensor(est, **REAL), tensor(gt, **REAL)
    scale, R, _ = align_sim3(est[None], gt[None])
    near(scale.item(), 0.49785897)
    rigid = (est - est.mean(0)) @ R[0].mT - (gt - gt.mean(0))  # the best one without a scale
    near(rigid.square().sum(1).mean().sqrt().item(), 0.94345943)


def test_umeyama_recovers_a_similarity_and_never_a_reflection():
    x, t = torch.randn(1, 7, 3, **REAL), tensor([1, 2, 3], **REAL)
    scale, R, shift = align_sim3(x, 2.5 * x @ about_z(0.7).mT + t)
    near(scale.item(), 2.5)
    torch.testing.assert_close(R[0], about_z(0.7))
    torch.testing.assert_close(shift[0], t)
    near(torch.det(align_sim3(x, x * tensor([-1, 1, 1]))[1]).item(), 1)


def test_perfect_poses_score_perfectly_in_any_world():
    gt = random_path()
    moved = torch.cat([gt[..., :3] @ about_z(1.1), gt[..., 3:]], -1)  # a rotated world frame
    m = pose_metrics(moved, gt)
    assert m.pop("auc30") == m.pop("auc3") == 1 and max(m.values()) < loose()


def test_scale_shows_in_trans_alone():
    gt = random_path()
    m = pose_metrics(torch.cat([gt[..., :3], 3 * gt[..., 3:]], -1), gt)
    assert m["trans"] > 0.5 and m["ate"] < loose() and m["rpe_trans"] < loose() and m["auc30"] == 1


def test_relative_pose_error_by_hand():
    """The estimate turns 10 degrees at frame 1 of a straight walk and keeps walking along its own
    axis."""
    R = torch.stack([torch.eye(3, **REAL), *[about_z(math.radians(10))] * 2])
    m = pose_metrics(
        path([[0, 0, 0], [0, 0, 1], [0, 0, 2]], R), path([[0, 0, 0], [0, 0, 1], [0, 0, 2]])
    )
    near(m["rpe_trans"], 0)
    near(m["rpe_rot"], 5)
    near(m["rot_deg"], 20 / 3)


def test_auc_by_hand():
    """Pairs (0,1), (0,2) are 10.5 degrees off, (1,2) is exact: accuracy 1/3 up to 10 degrees, then
    1."""
    R = torch.stack([torch.eye(3, **REAL), *[about_z(math.radians(10.5))] * 2])
    centres = [[0, 0, 0], [0, 0, 1], [0, 0, 2]]  # along the axis: directions agree
    near(pose_metrics(path(centres, R), path(centres))["auc30"], (10 / 3 + 20) / 30)


def test_auc_takes_directions_of_travel_up_to_sign():
    centres = torch.cat([torch.zeros(1, 3, **REAL), torch.randn(4, 3, **REAL)])
    m = pose_metrics(path(-centres), path(centres))
    assert m["auc30"] == 1 and m["trans"] > 0.5


def test_standing_cameras_give_finite_metrics():
    still, moving = path(torch.zeros(4, 3)), path([[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]])
    perfect = pose_metrics(still, still)
    sums = dict(rot_err=0, trans_err=0, cam_mc=0)
    one = dict(auc30=1, auc3=1)
    assert perfect == dict(ate=0, rpe_trans=0, rot_deg=0, trans=0, rpe_rot=0, **one, **sums)
    lazy, restless = pose_metrics(still, moving), pose_metrics(moving, still)
    assert all(math.isfinite(v) for m in (lazy, restless) for v in m.values())
    near(lazy["ate"], math.sqrt(1.25))  # spread of 0, 1, 2, 3 about 1.5
    near(restless["trans"], 1.5)
    assert lazy["auc30"] == 0


def test_batches_average_clips():
    a, b = random_path(), random_path()
    noisy = [
        torch.cat([x[..., :3], x[..., 3:] + 0.1 * torch.randn(1, 6, 3, 1, **REAL)], -1)
        for x in (a, b)
    ]
    both = pose_metrics(torch.cat(noisy), torch.cat([a, b]))
    single = [pose_metrics(n, x) for n, x in zip(noisy, (a, b))]
    for name, value in both.items():
        near(value, (single[0][name] + single[1][name]) / 2)


def test_point_errors_by_hand_ignoring_masked_points():
    gt = tensor([[3, 0, 4], [0, 0, 2], [math.nan, 0, 0]], **REAL).view(1, 1, 1, 3, 3)
    pred = gt + tensor([[0, 1, 0], [0, 0, -0.5], [0, 0, 0]], **REAL)
    m = point_metrics(pred, gt, tensor([True, True, False]).view(1, 1, 1, 3))
    near(m["rel"], (1 / 5 + 0.5 / 2) / 2)
    near(m["dist"], 0.75)


def test_a_wrong_translation_leaves_depth_perfect_and_shows_in_the_points():
    depth, mask = 1 + torch.rand(1, 4, 3, 5, **REAL), torch.ones(1, 4, 3, 5, dtype=torch.bool)
    K = tensor([[4, 0, 2.5], [0, 4, 1.5], [0, 0, 1]], **REAL).expand(1, 4, 3, 3)
    w2c = random_path(4)
    longer = torch.cat([w2c[..., :3], 1.1 * w2c[..., 3:]], -1)
    assert depth_metrics(depth, depth, mask)["abs_rel"] == 0
    assert point_metrics(unproject(depth, longer, K), unproject(depth, w2c, K), mask)["rel"] > 0.01
