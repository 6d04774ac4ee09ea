"""What holds of every geometry loss and of their sum: masks, batches, gradients; every test in fp64
and in fp32."""

import math
from types import SimpleNamespace

import pytest
import torch
from loss_case import CFG, case, losses_of, near
from precision import loose, only_fp64
from torch import tensor

from geometry import (
    camera_loss,
    conf_loss,
    frame_loss,
    geometry_losses,
    points_loss,
    standardize,
    still_pairs,
    tgm_loss,
)

torch.manual_seed(0)

pytestmark = pytest.mark.usefixtures("precision")


def test_the_truth_costs_nothing():
    _, b = case()
    one, m = torch.ones_like(b["depth"]), b["mask"]
    costs = [
        frame_loss(b["depth"], b["depth"], m),
        frame_loss(b["depth"], b["depth"], m, "ssi"),
        tgm_loss(b["depth"], b["depth"], m),
        points_loss(b["points"], one, b["points"], m),
        conf_loss(b["depth"], one, b["depth"], m),
        camera_loss(b["pose_enc"][None], b["pose_enc"]),
    ]
    pred = dict(b, depth_conf=one, points_conf=one, pose_enc=b["pose_enc"][None])
    assert (
        max(abs(c.item()) for c in [*costs, geometry_losses(pred, b, SimpleNamespace(**CFG))[0]])
        < loose()
    )


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
        for g in torch.autograd.grad(
            value, list(leaves.values()), allow_unused=True, retain_graph=True
        ):
            assert g is None or not g.any(), name
    # all stay in the graph
    for g in torch.autograd.grad(values["total_metric"], list(leaves.values())):
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
    weighted = geometry_losses(
        pred, dict(batch, geo_weight=tensor([0.5, 0])), SimpleNamespace(**CFG)
    )[0]
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
    near(
        parts["point"], points_loss(pred["points"], pred["points_conf"], batch["points"], m).item()
    )
    near(parts["depth_conf_mean"], pred["depth_conf"][m].mean().item())
    assert parts["valid_fraction"].item() == pytest.approx(m.double().mean().item())
    assert parts["tgm_fraction"].item() == pytest.approx(
        still_pairs(g, m, 0.05).double().mean().item()
    )
    assert not any(p.requires_grad for p in parts.values())


def test_half_precision_predictions_are_upcast():
    pred, batch = case()
    batch = {k: v.float() if k != "mask" else v for k, v in batch.items()}
    half = {k: v.bfloat16() for k, v in pred.items()}
    for name, value in losses_of(half, batch).items():
        assert value.dtype == torch.float32, name
    same = losses_of({k: v.float() for k, v in half.items()}, batch)
    assert all(torch.equal(v, same[k]) for k, v in losses_of(half, batch).items())


@only_fp64
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
    factor, shift = tensor([7.0, 1]).view(2, 1, 1, 1), tensor([3.0, 0]).view(2, 1, 1, 1)
    stretched = dict(pred, depth=factor * pred["depth"] + shift)
    total = geometry_losses(pred, dict(batch, relative=relative), cfg)[0]
    near(geometry_losses(stretched, dict(batch, relative=relative), cfg)[0], total.item())

    def clip(i, mode):
        p = {k: v[:, i : i + 1] if k == "pose_enc" else v[i : i + 1] for k, v in pred.items()}
        one = {k: v[i : i + 1] for k, v in batch.items()}
        return geometry_losses(p, one, SimpleNamespace(**{**CFG, "depth_mode": mode}))

    near(total, (clip(0, "ssi")[1]["depth"] + clip(1, "metric")[0]).item() / 2)
    for name in ("points", "pose_enc", "depth"):
        pred[name].requires_grad_()
    geometry_losses(pred, dict(batch, relative=relative), cfg)[0].backward()
    assert pred["points"].grad[0].abs().max() == 0 and pred["pose_enc"].grad[:, 0].abs().max() == 0
    assert pred["depth"].grad[0].abs().max() > 0 and pred["points"].grad[1].abs().max() > 0
