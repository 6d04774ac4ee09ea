"""One random case for all geometry losses."""

from types import SimpleNamespace

import pytest
import torch
from precision import REAL, loose

from geometry import conf_loss, frame_loss, geometry_losses, points_loss, tgm_loss

CFG = dict(
    depth_mode="metric",
    alpha_tgm=10.0,
    beta_frame=1.0,
    gamma_conf=0.2,
    camera_delta=0.1,
    camera_weight=3.0,
)


def near(got, want, rtol=0):
    """The reference numbers carry eight decimals: 6e-9 absolute is their rounding; fp32 rounds at
    1e-7 of a unit."""
    assert got.dtype == REAL["dtype"]
    assert got.item() == pytest.approx(
        want, rel=max(rtol, loose()), abs=6e-9 if loose() == 1e-6 else 3e-7
    )


def all_true(x):
    return torch.ones_like(x, dtype=torch.bool)


def case(B=2, T=5, H=9, W=10, seed=0):
    """Predictions, labels and a mask with holes; depths drift slowly so that temporal pairs
    exist."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=g, **REAL)

    depth = 1 + 2 * rand(B, 1, H, W) + 0.02 * rand(B, T, H, W)
    pred = dict(
        depth=depth + 0.1 * rand(B, T, H, W),
        depth_conf=1 + rand(B, T, H, W),
        points=rand(B, T, H, W, 3),
        points_conf=1 + rand(B, T, H, W),
        pose_enc=rand(3, B, T, 9),
    )
    batch = dict(
        depth=depth,
        points=rand(B, T, H, W, 3),
        mask=rand(B, T, H, W) > 0.25,
        pose_enc=rand(B, T, 9),
    )
    return pred, batch


def losses_of(pred, batch):
    """Every public loss on one case: name -> scalar."""
    d, g, m = pred["depth"], batch["depth"], batch["mask"]
    total = {
        f"total_{mode}": geometry_losses(
            pred, batch, SimpleNamespace(**{**CFG, "depth_mode": mode})
        )[0]
        for mode in ("metric", "ssi")
    }
    return dict(
        frame=frame_loss(d, g, m),
        ssi=frame_loss(d, g, m, "ssi"),
        tgm=tgm_loss(d, g, m),
        tgm_aligned=tgm_loss(d, g, m, align=True),
        conf=conf_loss(d, pred["depth_conf"], g, m),
        points=points_loss(pred["points"], pred["points_conf"], batch["points"], m),
        **total,
    )
