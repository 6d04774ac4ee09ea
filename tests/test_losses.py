"""Geometry losses against hand-computed numbers, masks and invariances; every test in fp64 and in
fp32."""

import math

import pytest
import torch
from loss_case import all_true, case, near
from precision import REAL, loose, only_fp64
from torch import tensor

from geometry import (
    camera_loss,
    conf_loss,
    fit_scale_shift,
    frame_loss,
    gradient_levels,
    points_loss,
    standardize,
    still_pairs,
    tgm_loss,
)

torch.manual_seed(0)

pytestmark = pytest.mark.usefixtures("precision")


def ssi_example():
    return [tensor(x, **REAL)[None, None] for x in ([[1, 2], [4, 5]], [[1, 2], [3, 6]])]


def tgm_example():
    pred, gt = [[1, 5], [1.3, 5.0], [1.2, 5.6]], [[1, 5], [1.1, 5.5], [1.2, 5.4]]
    return [tensor(x, **REAL)[None, :, None] for x in (pred, gt)]  # (1, 3, 1, 2)


def residual_example():
    return tensor([[0, 0, 0.3], [0, 0.1, 0.3]], **REAL)[None, None]


def test_ssi_example_by_hand():
    """Medians 2 and 2, deviations 1.5 and 1.5: data 1/3, gradient 2/3 at half weight."""
    (pred, gt), mask = ssi_example(), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    p, g = standardize(pred, mask), standardize(gt, mask)
    for got, want in zip(
        (*p.flatten(), *g.flatten()), (-2 / 3, 0, 4 / 3, 2, -2 / 3, 0, 2 / 3, 8 / 3)
    ):
        near(got, want)
    near((p - g).abs().mean(), 1 / 3)
    near(gradient_levels([p - g], mask, mask).sum(), 2 / 3)
    near(frame_loss(pred, gt, mask, "ssi"), 2 / 3)


def test_median_ignores_masked_pixels():
    """With only the 6 valid the median is 6: a masked median that counts zeros would say 0."""
    pred, gt = ssi_example()
    mask = gt == 6
    assert not standardize(gt, mask).any()
    near(frame_loss(pred, gt, mask, "ssi"), 0)


def test_ssi_is_blind_to_one_scale_and_shift_per_frame():
    pred, batch = case()
    scale, shift = 1 + torch.rand(2, 5, 1, 1, **REAL), torch.randn(2, 5, 1, 1, **REAL)
    args = batch["depth"], batch["mask"], "ssi"
    near(frame_loss(scale * pred["depth"] + shift, *args), frame_loss(pred["depth"], *args).item())
    assert frame_loss(scale * batch["depth"] + shift, *args) < loose()


@pytest.mark.parametrize(
    "options, want",
    [
        (dict(), 0.36666667),
        (dict(rel_th=1e9), 0.4),
        (dict(align=True), 0.37749049),
    ],
)
def test_temporal_example_by_hand(options, want):
    """Thresholds .2, .22, .21 drop one of four pairs; the least-squares fit is 1.03247148 p -
    .08670087."""
    (pred, gt), mask = tgm_example(), torch.ones(1, 3, 1, 2, dtype=torch.bool)
    near(tgm_loss(pred, gt, mask, **options), want)
    assert still_pairs(gt, mask, 0.05).tolist() == [[[[True, False]], [[True, True]]]]
    for got, fit in zip(fit_scale_shift(pred, gt, mask), (1.03247148, -0.08670087)):
        near(got, fit)


def test_aligned_temporal_loss_is_blind_to_one_scale_and_shift_per_clip_but_not_per_frame():
    pred, batch = case()
    args, scale = (batch["depth"], batch["mask"]), 1 + torch.rand(2, 5, 1, 1, **REAL)
    want = tgm_loss(pred["depth"], *args, align=True).item()
    near(tgm_loss(2.5 * pred["depth"] - 0.7, *args, align=True), want)
    assert abs(tgm_loss(scale * pred["depth"], *args, align=True).item() - want) > 0.01 * want


def test_aligned_temporal_loss_of_a_constant_prediction_has_finite_gradients():
    depth = torch.full((1, 3, 8, 8), 1.7, requires_grad=True)
    tgm_loss(depth, 1 + torch.rand(1, 3, 8, 8), all_true(depth), align=True).backward()
    assert torch.isfinite(depth.grad).all()


def test_gradient_matching_example_by_hand():
    """Level 0: .7 / 6, level 1: .15, then nothing.  Depth sums levels at half weight, points
    average."""
    r = residual_example()
    mask, zero, data = all_true(r), torch.zeros_like(r), 0.7 / 6
    for level, want in zip(gradient_levels([r], mask, mask)[0], (0.11666667, 0.15, 0, 0)):
        near(level, want)
    near(frame_loss(r, zero, mask), data + 0.5 * 0.26666667)
    points = torch.stack([zero, r, zero], -1)
    near(points_loss(points, zero + 1, 0 * points, mask), data + 0.06666667)


@pytest.mark.parametrize(
    "error, best, value", [(0.05, 4, -0.07725887), (0.1, 2, 0.06137056), (0.2, 1, 0.2)]
)
def test_confidence_settles_at_gamma_over_error(error, best, value):
    logit = torch.full(
        (1, 1, 1, 1), math.log(best - 1) if best > 1 else -40.0, **REAL
    ).requires_grad_()
    pred, zero = torch.full_like(logit, error).detach(), torch.zeros(1, 1, 1, 1, **REAL)
    loss = conf_loss(pred, 1 + logit.exp(), zero, all_true(pred))
    near(loss, value)
    loss.backward()
    near(logit.grad, 0)
    flat = pred[..., None] * tensor([1, 0, 0])  # one pixel has no spatial gradient
    near(points_loss(flat, 1 + logit.exp(), 0 * flat, all_true(pred)), value)


def test_gradients_towards_masked_pixels_do_not_count():
    """Without the right column: data .1 / 4, two edges of .1 over 4 pixels at half weight."""
    mask = torch.tensor([[True, True, False]] * 2)[None, None]
    near(
        frame_loss(residual_example(), torch.zeros(1, 1, 2, 3, **REAL), mask),
        0.1 / 4 + 0.5 * 0.2 / 4,
    )


def test_the_later_frame_sets_the_temporal_threshold():
    """A change of .1 is beyond 5 % of the first frame's range 1 but within 5 % of the second's
    7.9."""
    gt, pred = (tensor([[1, 2], [x, 9]], **REAL)[None, :, None] for x in (1.1, 1.3))
    near(tgm_loss(pred, gt, all_true(gt)), 0.2)


def test_confidence_bounded_by_one_leaves_a_large_error_unweighted():
    one = torch.ones(1, 1, 1, 1, **REAL)
    near(conf_loss(0.4 * one, one, 0 * one, all_true(one)), 0.4)


def test_points_pay_for_confidence_once_per_pixel_and_weigh_gradients_by_it():
    r = residual_example()
    mask, zero = all_true(r), torch.zeros_like(r)
    points = torch.stack([r, zero, zero], -1)
    want = 3 * (0.7 / 6 + 0.2 / 3) - 0.2 * math.log(3)
    near(points_loss(points, zero + 3, 0 * points, mask), want)


def test_camera_example_by_hand():
    """Constant errors in four iterations: stage weights sum to .544; Huber with delta .1."""
    half = math.radians(5)
    gt = tensor([0, 0, 0, 0, 0, 0, 1, 1, 1], **REAL).expand(1, 2, 9)
    pred = tensor([0.1, 0, 0, 0, math.sin(half), 0, math.cos(half), 1.02, 1.04], **REAL).expand(
        4, 1, 2, 9
    )
    l1 = 0.544 * (0.03333333 + 0.02274026 + 0.5 * 0.03)
    near(camera_loss(pred, gt, delta=1e-9), l1, rtol=1e-6)  # delta -> 0 is the L1 of the reference
    near(tensor(l1, **REAL), 0.03866404, rtol=1e-6)


@pytest.mark.parametrize(
    "r, want, at_1",
    [(0.05, 0.0125, 0.00125), (0.1, 0.05, 0.005), (0.5, 0.45, 0.125), (2, 1.95, 1.5)],
)
def test_huber_over_delta_by_hand(r, want, at_1):
    gt = tensor([0, 0, 0, 0, 0, 0, 1, 1, 1], **REAL).expand(1, 1, 9)
    moved = gt[None] + tensor([r, r, r] + 6 * [0], **REAL)
    near(camera_loss(moved, gt), want)  # one iteration has weight 1
    near(camera_loss(moved, gt, delta=1.0), at_1)
    near(camera_loss(gt[None] + tensor(7 * [0] + [r, r], **REAL), gt), want / 2)


def test_later_iterations_weigh_more():
    gt = torch.zeros(1, 1, 9, **REAL)
    for k, weight in enumerate((0.216, 0.36, 0.6, 1)):
        pred = torch.zeros(4, 1, 1, 9, **REAL)
        pred[k, ..., :3] = 2
        near(camera_loss(pred, gt), 1.95 * weight / 4)


def test_a_quaternion_and_its_negative_cost_the_same():
    pred, batch = case()
    enc, gt = pred["pose_enc"], batch["pose_enc"]
    flipped = torch.cat([enc[..., :3], -enc[..., 3:7], enc[..., 7:]], -1)
    near(camera_loss(flipped, gt), camera_loss(enc, gt).item())


def test_unknown_depth_mode_is_named():
    with pytest.raises(ValueError, match="'affine'.*metric.*ssi"):
        frame_loss(*ssi_example(), torch.ones(1, 1, 2, 2, dtype=torch.bool), "affine")


@only_fp64
def test_gradients_of_the_temporal_loss_match_finite_differences():
    pred, batch = case(B=1, T=2, H=5, W=5)
    depth, mask = pred["depth"].requires_grad_(), batch["mask"]
    assert torch.autograd.gradcheck(lambda d: tgm_loss(d, batch["depth"], mask), (depth,))
