"""Geometry losses against hand-computed numbers (rtol 1e-6 in fp64), masks and invariances."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from geometry import camera_loss, conf_loss, frame_loss, geometry_losses, points_loss, standardize, tgm_loss

torch.manual_seed(0)
F64 = dict(dtype=torch.float64)
CFG = dict(depth_mode="metric", alpha_tgm=10.0, beta_frame=1.0, gamma_conf=0.2, camera_delta=0.1,
           camera_weight=3.0)
SSI_P, SSI_G = tensor([[1, 2], [4, 5]], **F64)[None, None], tensor([[1, 2], [3, 6]], **F64)[None, None]
TGM_G = tensor([[1, 5], [1.1, 5.5], [1.2, 5.4]], **F64)[None, :, None]
TGM_P = tensor([[1, 5], [1.3, 5.0], [1.2, 5.6]], **F64)[None, :, None]
RESIDUAL = tensor([[0, 0, .3], [0, .1, .3]], **F64)[None, None]


def near(got, want, rtol=1e-6):
    """The reference numbers carry eight decimals: 6e-9 absolute is their rounding."""
    assert got.item() == pytest.approx(want, rel=rtol, abs=6e-9)


def all_true(x):
    return torch.ones_like(x, dtype=torch.bool)


def case(B=2, T=5, H=9, W=10, seed=0, dtype=torch.float64):
    """Predictions, labels and a mask with holes; depths drift slowly so that temporal pairs exist."""
    g = torch.Generator().manual_seed(seed)
    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=dtype)
    depth = 1 + 2 * rand(B, 1, H, W) + 0.02 * rand(B, T, H, W)
    pred = dict(depth=depth + 0.1 * rand(B, T, H, W), depth_conf=1 + rand(B, T, H, W),
                points=rand(B, T, H, W, 3), points_conf=1 + rand(B, T, H, W), pose_enc=rand(3, B, T, 9))
    batch = dict(depth=depth, points=rand(B, T, H, W, 3), mask=rand(B, T, H, W) > 0.25,
                 pose_enc=rand(B, T, 9))
    return pred, batch


def losses_of(pred, batch):
    """Every public loss on one case: name -> scalar."""
    d, g, m = pred["depth"], batch["depth"], batch["mask"]
    total = {f"total_{mode}": geometry_losses(pred, batch, SimpleNamespace(**{**CFG, "depth_mode": mode}))[0]
             for mode in ("metric", "ssi")}
    return dict(frame=frame_loss(d, g, m), ssi=frame_loss(d, g, m, "ssi"), tgm=tgm_loss(d, g, m),
                tgm_aligned=tgm_loss(d, g, m, align=True), conf=conf_loss(d, pred["depth_conf"], g, m),
                points=points_loss(pred["points"], pred["points_conf"], batch["points"], m), **total)


def test_ssi_example_by_hand():
    """Medians 2 and 2, deviations 1.5 and 1.5: data 1/3, gradient 2/3 at half weight."""
    near(frame_loss(SSI_P, SSI_G, all_true(SSI_P), "ssi"), 2 / 3)
    near(frame_loss(SSI_P.float(), SSI_G.float(), all_true(SSI_P), "ssi"), 2 / 3, rtol=1e-5)
    near(standardize(SSI_G, all_true(SSI_G)).max(), 8 / 3)


def test_median_ignores_masked_pixels():
    """With only the 6 valid the median is 6: a masked median that counts zeros would say 0."""
    mask = SSI_G == 6
    assert not standardize(SSI_G, mask).any()
    near(frame_loss(SSI_P, SSI_G, mask, "ssi"), 0)


def test_ssi_is_blind_to_one_scale_and_shift_per_frame():
    pred, batch = case()
    scale, shift = 1 + torch.rand(2, 5, 1, 1, **F64), torch.randn(2, 5, 1, 1, **F64)
    args = batch["depth"], batch["mask"], "ssi"
    near(frame_loss(scale * pred["depth"] + shift, *args), frame_loss(pred["depth"], *args).item())
    near(frame_loss(scale * batch["depth"] + shift, *args), 0)


@pytest.mark.parametrize("rel_th, align, want", [(0.05, False, .36666667), (1e9, False, .4),
                                                 (0.05, True, .37749049)])
def test_temporal_example_by_hand(rel_th, align, want):
    """Thresholds .2, .22, .21 drop one of four pairs; the least-squares fit is 1.03247148 p - .08670087."""
    near(tgm_loss(TGM_P, TGM_G, all_true(TGM_P), rel_th, align), want)
    near(tgm_loss(TGM_P.float(), TGM_G.float(), all_true(TGM_P), rel_th, align), want, rtol=1e-5)


def test_aligned_temporal_loss_is_blind_to_one_scale_and_shift_per_clip_but_not_per_frame():
    pred, batch = case()
    args, scale = (batch["depth"], batch["mask"]), 1 + torch.rand(2, 5, 1, 1, **F64)
    want = tgm_loss(pred["depth"], *args, align=True).item()
    near(tgm_loss(2.5 * pred["depth"] - 0.7, *args, align=True), want)
    assert abs(tgm_loss(scale * pred["depth"], *args, align=True).item() - want) > 0.01 * want


def test_aligned_temporal_loss_of_a_constant_prediction_has_finite_gradients():
    depth = torch.full((1, 3, 8, 8), 1.7, requires_grad=True)
    tgm_loss(depth, 1 + torch.rand(1, 3, 8, 8), all_true(depth), align=True).backward()
    assert torch.isfinite(depth.grad).all()


def test_gradient_matching_example_by_hand():
    """Level 0: .7 / 6, level 1: .15, then nothing.  Depth sums levels at half weight, points average."""
    mask, zero, data = all_true(RESIDUAL), torch.zeros_like(RESIDUAL), 0.7 / 6
    near(frame_loss(RESIDUAL, zero, mask), data + 0.5 * .26666667)
    points = torch.stack([zero, RESIDUAL, zero], -1)
    near(points_loss(points, zero + 1, 0 * points, mask), data + .06666667)


@pytest.mark.parametrize("error, best, value", [(.05, 4, -.07725887), (.1, 2, .06137056), (.2, 1, .2)])
def test_confidence_settles_at_gamma_over_error(error, best, value):
    logit = torch.full((1, 1, 1, 1), math.log(best - 1) if best > 1 else -40.0, **F64).requires_grad_()
    pred, zero = torch.full_like(logit, error).detach(), torch.zeros(1, 1, 1, 1, **F64)
    loss = conf_loss(pred, 1 + logit.exp(), zero, all_true(pred))
    near(loss, value)
    loss.backward()
    near(logit.grad, 0)
    flat = pred[..., None] * tensor([1, 0, 0])  # one pixel has no spatial gradient
    near(points_loss(flat, 1 + logit.exp(), 0 * flat, all_true(pred)), value)


def test_gradients_towards_masked_pixels_do_not_count():
    """Without the right column: data .1 / 4, two edges of .1 over 4 pixels at half weight."""
    mask = torch.tensor([[True, True, False]] * 2)[None, None]
    near(frame_loss(RESIDUAL, torch.zeros_like(RESIDUAL), mask), 0.1 / 4 + 0.5 * 0.2 / 4)


def test_the_later_frame_sets_the_temporal_threshold():
    """A change of .1 is beyond 5 % of the first frame's range 1 but within 5 % of the second's 7.9."""
    gt, pred = (tensor([[1, 2], [x, 9]], **F64)[None, :, None] for x in (1.1, 1.3))
    near(tgm_loss(pred, gt, all_true(gt)), 0.2)


def test_confidence_bounded_by_one_leaves_a_large_error_unweighted():
    one = torch.ones(1, 1, 1, 1, **F64)
    near(conf_loss(0.4 * one, one, 0 * one, all_true(one)), 0.4)


def test_points_pay_for_confidence_once_per_pixel_and_weigh_gradients_by_it():
    mask, zero = all_true(RESIDUAL), torch.zeros_like(RESIDUAL)
    points = torch.stack([RESIDUAL, zero, zero], -1)
    want = 3 * (0.7 / 6 + .2 / 3) - 0.2 * math.log(3)
    near(points_loss(points, zero + 3, 0 * points, mask), want)


def test_camera_example_by_hand():
    """Constant errors in four iterations: stage weights sum to .544; Huber with delta .1."""
    half = math.radians(5)
    gt = tensor([0, 0, 0, 0, 0, 0, 1, 1, 1], **F64).expand(1, 2, 9)
    pred = tensor([.1, 0, 0, 0, math.sin(half), 0, math.cos(half), 1.02, 1.04], **F64).expand(4, 1, 2, 9)
    l1 = 0.544 * (.03333333 + .02274026 + 0.5 * .03)
    near(camera_loss(pred, gt, delta=1e-9), l1, rtol=1e-6)  # delta -> 0 is the L1 of the reference
    near(tensor(l1), .03866404, rtol=1e-6)


@pytest.mark.parametrize("r, want", [(.05, .0125), (.1, .05), (.5, .45), (2, 1.95)])
def test_huber_over_delta_by_hand(r, want):
    gt = tensor([0, 0, 0, 0, 0, 0, 1, 1, 1], **F64).expand(1, 1, 9)
    near(camera_loss(gt[None] + tensor([r, r, r] + 6 * [0], **F64), gt), want)  # one iteration has weight 1
    near(camera_loss(gt[None] + tensor(7 * [0] + [r, r], **F64), gt), want / 2)


def test_later_iterations_weigh_more():
    gt = torch.zeros(1, 1, 9, **F64)
    for k, weight in enumerate((.216, .36, .6, 1)):
        pred = torch.zeros(4, 1, 1, 9, **F64)
        pred[k, ..., :3] = 2
        near(camera_loss(pred, gt), 1.95 * weight / 4)


def test_a_quaternion_and_its_negative_cost_the_same():
    pred, batch = case()
    enc, gt = pred["pose_enc"], batch["pose_enc"]
    flipped = torch.cat([enc[..., :3], -enc[..., 3:7], enc[..., 7:]], -1)
    near(camera_loss(flipped, gt), camera_loss(enc, gt).item())


def test_the_truth_costs_nothing():
    _, b = case()
    one, m = torch.ones_like(b["depth"]), b["mask"]
    costs = [frame_loss(b["depth"], b["depth"], m), frame_loss(b["depth"], b["depth"], m, "ssi"),
             tgm_loss(b["depth"], b["depth"], m), points_loss(b["points"], one, b["points"], m),
             conf_loss(b["depth"], one, b["depth"], m), camera_loss(b["pose_enc"][None], b["pose_enc"])]
    pred = dict(b, depth_conf=one, points_conf=one, pose_enc=b["pose_enc"][None])
    assert max(abs(c.item()) for c in [*costs, geometry_losses(pred, b, SimpleNamespace(**CFG))[0]]) < 1e-9


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e6])
def test_masked_pixels_change_neither_value_nor_gradient(garbage):
    def run(fill):
        pred, batch = case()
        hole = ~batch["mask"]
        for d in (pred, batch):
            for k in set(d) & {"depth", "depth_conf", "points", "points_conf"}:
                d[k][hole] = fill
        leaves = {k: v.requires_grad_() for k, v in pred.items()}
        values = losses_of(pred, batch)
        grads = torch.autograd.grad(sum(values.values()), list(leaves.values()))
        return values, grads
    (values, grads), (dirty, dirty_grads) = run(1.0), run(garbage)
    for name in values:
        assert torch.equal(values[name], dirty[name]), name
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(grads, dirty_grads))


def test_empty_mask_costs_zero_with_zero_gradients():
    pred, batch = case()
    leaves = {k: v.requires_grad_() for k, v in pred.items()}
    batch["mask"] = torch.zeros_like(batch["mask"])
    values = losses_of(pred, batch)
    assert all(v.item() == 0 for v in values.values())
    for name, value in values.items():
        for g in torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True):
            assert g is None or not g.any(), name
    for g in torch.autograd.grad(values["total_metric"], list(leaves.values())):  # all stay in the graph
        assert torch.isfinite(g).all()


def test_one_frame_has_no_temporal_loss_and_finite_total():
    pred, batch = case(T=1)
    values = losses_of(pred, batch)
    assert values["tgm"] == 0 and all(torch.isfinite(v) for v in values.values())


def test_batch_loss_is_the_mean_over_clips_in_any_order():
    """So ranks and micro-steps average to the full batch, whatever their masks."""
    pred, batch = case(B=3)
    def pick(index):
        p = {k: v[:, index] if k == "pose_enc" else v[index] for k, v in pred.items()}
        return losses_of(p, {k: v[index] for k, v in batch.items()})
    whole, shuffled, single = losses_of(pred, batch), pick([2, 0, 1]), [pick([i]) for i in range(3)]
    for name in whole:
        near(shuffled[name], whole[name].item())
        near(sum(s[name] for s in single) / 3, whole[name].item())


def test_geo_weight_scales_each_clip():
    pred, batch = case(B=2)
    one = {k: v[:, :1] if k == "pose_enc" else v[:1] for k, v in pred.items()}
    alone = geometry_losses(one, {k: v[:1] for k, v in batch.items()}, SimpleNamespace(**CFG))[0]
    weighted = geometry_losses(pred, dict(batch, geo_weight=tensor([0.5, 0])), SimpleNamespace(**CFG))[0]
    near(weighted, 0.25 * alone.item())


@pytest.mark.parametrize("mode", ["metric", "ssi"])
def test_total_is_the_documented_sum_of_its_parts(mode):
    pred, batch = case()
    cfg = SimpleNamespace(**{**CFG, "depth_mode": mode})
    loss, parts = geometry_losses(pred, batch, cfg)
    near(loss, (parts["depth"] + parts["point"] + 3 * parts["camera"]).item())
    d, g, m = pred["depth"], batch["depth"], batch["mask"]
    x, y = (d, g) if mode == "metric" else (standardize(d, m), standardize(g, m))
    want = 10 * tgm_loss(d, g, m, align=mode == "ssi") + frame_loss(d, g, m, mode)
    want = want + conf_loss(x, pred["depth_conf"], y, m)
    near(parts["depth"], want.item())
    near(parts["point"], points_loss(pred["points"], pred["points_conf"], batch["points"], m).item())
    near(parts["depth_conf_mean"], pred["depth_conf"][m].mean().item())
    near(parts["valid_fraction"], m.double().mean().item(), rtol=1e-6)
    assert not any(p.requires_grad for p in parts.values())


def test_unknown_depth_mode_is_named():
    with pytest.raises(ValueError, match="'affine'.*metric.*ssi"):
        frame_loss(SSI_P, SSI_G, all_true(SSI_P), "affine")


def test_half_precision_predictions_are_upcast():
    pred, batch = case(dtype=torch.float32)
    half = {k: v.bfloat16() for k, v in pred.items()}
    for name, value in losses_of(half, batch).items():
        assert value.dtype == torch.float32, name
    same = losses_of({k: v.float() for k, v in half.items()}, batch)
    assert all(torch.equal(v, same[k]) for k, v in losses_of(half, batch).items())


def test_loss_gradients_match_finite_differences():
    pred, batch = case(B=1, T=2, H=3, W=3)
    names = list(pred)
    inputs = [pred[k].requires_grad_() for k in names]
    for mode in ("metric", "ssi"):
        cfg = SimpleNamespace(**{**CFG, "depth_mode": mode})
        total = lambda *x: geometry_losses(dict(zip(names, x)), batch, cfg)[0]
        assert torch.autograd.gradcheck(total, inputs)


def test_clips_whose_depth_has_no_unit_train_the_depth_head_alone_and_blind_to_scale_and_shift():
    (pred, batch), cfg, relative = case(B=2), SimpleNamespace(**CFG), tensor([True, False])
    factor, shift = tensor([7., 1]).view(2, 1, 1, 1), tensor([3., 0]).view(2, 1, 1, 1)
    stretched = dict(pred, depth=factor * pred["depth"] + shift)
    total = geometry_losses(pred, dict(batch, relative=relative), cfg)[0]
    near(geometry_losses(stretched, dict(batch, relative=relative), cfg)[0], total.item())

    def clip(i, mode):
        p = {k: v[:, i:i + 1] if k == "pose_enc" else v[i:i + 1] for k, v in pred.items()}
        one = {k: v[i:i + 1] for k, v in batch.items()}
        return geometry_losses(p, one, SimpleNamespace(**{**CFG, "depth_mode": mode}))
    near(total, (clip(0, "ssi")[1]["depth"] + clip(1, "metric")[0]).item() / 2)
    for name in ("points", "pose_enc", "depth"):
        pred[name].requires_grad_()
    geometry_losses(pred, dict(batch, relative=relative), cfg)[0].backward()
    assert pred["points"].grad[0].abs().max() == 0 and pred["pose_enc"].grad[:, 0].abs().max() == 0
    assert pred["depth"].grad[0].abs().max() > 0 and pred["points"].grad[1].abs().max() > 0
