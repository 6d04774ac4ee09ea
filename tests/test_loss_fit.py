"""Every geometry loss, minimised over free pixels, finds what it measures."""

import math
from types import SimpleNamespace

import pytest
import torch

from geometry import (
    camera_loss,
    conf_loss,
    decode_pose,
    frame_loss,
    geometry_losses,
    points_loss,
    standardize,
    still_pairs,
    tgm_loss,
)

CFG = SimpleNamespace(
    depth_mode="metric",
    alpha_tgm=10.0,
    beta_frame=1.0,
    gamma_conf=0.2,
    camera_delta=0.1,
    camera_weight=3.0,
)


def cameras(p, b):
    """w2c (T, 3, 4) and fields of view of the last iteration against the truth: q and -q are one
    rotation."""
    (w2c, K), (true, true_K) = (decode_pose(x, (2, 2)) for x in (p["pose_enc"][-1], b["pose_enc"]))
    return torch.cat([(w2c - true).flatten(2), (K - true_K).flatten(2)], -1)


# what is minimised (prediction p, truth b), and the errors that must fall tenfold
LOSSES = {
    "frame": lambda p, b: frame_loss(p["depth"], b["depth"], b["mask"]),
    "ssi": lambda p, b: frame_loss(p["depth"], b["depth"], b["mask"], "ssi"),
    "tgm": lambda p, b: tgm_loss(p["depth"], b["depth"], b["mask"]),
    "conf": lambda p, b: conf_loss(p["depth"], p["depth_conf"], b["depth"], b["mask"]),
    "points": lambda p, b: points_loss(p["points"], p["points_conf"], b["points"], b["mask"]),
    "camera": lambda p, b: camera_loss(p["pose_enc"], b["pose_enc"]),
    "total": lambda p, b: geometry_losses(p, b, CFG)[0],
}

ERRORS = {
    "depth": lambda p, b: (p["depth"] - b["depth"])[b["mask"]],
    "shape of depth": lambda p, b: (
        standardize(p["depth"], b["mask"]) - standardize(b["depth"], b["mask"])
    ),
    "change of depth": lambda p, b: (p["depth"] - b["depth"]).diff(dim=1)[
        still_pairs(b["depth"], b["mask"], 0.05)
    ],
    "points": lambda p, b: (p["points"] - b["points"])[b["mask"]],
    "cameras": cameras,
}

FINDS = dict(
    frame=["depth"],
    ssi=["shape of depth"],
    tgm=["change of depth"],
    conf=["depth"],
    points=["points"],
    camera=["cameras"],
    total=["depth", "points", "cameras"],
)


def fit(loss, steps):
    """Depth, points, confidence and cameras as raw parameters -> errors before and after Adam."""
    t, y, x = torch.stack(
        torch.meshgrid(*(torch.arange(n) / n for n in (5, 12, 16)), indexing="ij")
    )[:, None]
    depth = 1.2 + 0.5 * torch.sin(4 * x) + 0.4 * y + 0.05 * t  # (1, 5, 12, 16)
    points = torch.stack([x * depth, y * depth, depth], -1)
    g = torch.Generator().manual_seed(1)
    b = dict(
        depth=depth,
        points=points,
        mask=torch.rand(depth.shape, generator=g) > 0.25,
        pose_enc=torch.rand(1, 5, 9, generator=g),
    )
    b["pose_enc"][..., 3:7] /= b["pose_enc"][..., 3:7].norm(dim=-1, keepdim=True)
    shapes = dict(
        depth=depth.shape,
        depth_conf=depth.shape,
        points=points.shape,
        points_conf=depth.shape,
        pose_enc=(2, 1, 5, 9),
    )
    raw = {k: 0.1 * torch.randn(s, generator=g) for k, s in shapes.items()}
    raw["points"] += torch.stack([x, y, torch.ones_like(x)], -1)
    raw = {k: v.requires_grad_() for k, v in raw.items()}
    optimizer = torch.optim.Adam(raw.values(), lr=0.03)

    def decode():
        conf = {k: 1 + raw[k].clamp(max=10).exp() for k in ("depth_conf", "points_conf")}
        return dict(
            depth=raw["depth"].exp(), points=raw["points"], pose_enc=raw["pose_enc"], **conf
        )

    def errors():
        return {name: error(decode(), b).abs().mean().item() for name, error in ERRORS.items()}

    start = errors()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss(decode(), b).backward()
        optimizer.step()
    return start, errors()


@pytest.mark.parametrize("loss", LOSSES)
def test_free_parameters_find_the_truth(loss):
    # L1 on standardised depth is slow
    start, end = fit(LOSSES[loss], steps=600 if loss == "ssi" else 300)
    for name in FINDS[loss]:
        assert end[name] < start[name] / 10, (name, start, end)
