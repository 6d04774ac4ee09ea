"""The geometry losses, minimised, find the geometry."""
import math
from types import SimpleNamespace

import torch

from geometry import geometry_losses

CFG = SimpleNamespace(depth_mode="metric", alpha_tgm=10.0, beta_frame=1.0, gamma_conf=0.2, camera_delta=0.1,
                      camera_weight=3.0)

def test_free_parameters_find_the_truth_in_300_steps():
    """Depth, points and confidence as raw parameters: both errors fall at least tenfold."""
    y, x, t = torch.meshgrid(torch.arange(12) / 12, torch.arange(16) / 16, torch.arange(5) / 5, indexing="ij")
    depth = (1.2 + 0.5 * torch.sin(4 * x) + 0.4 * y + 0.05 * t).permute(2, 0, 1)[None]
    points = torch.stack([x.permute(2, 0, 1) * depth, y.permute(2, 0, 1) * depth, depth], -1)
    g = torch.Generator().manual_seed(1)
    b = dict(depth=depth, points=points, mask=torch.rand(depth.shape, generator=g) > 0.25,
             pose_enc=torch.rand(1, 5, 9, generator=g))
    shapes = dict(depth=depth.shape, depth_conf=depth.shape, points=points.shape, points_conf=depth.shape,
                  pose_enc=(2, 1, 5, 9))
    raw = {k: (0.01 * torch.randn(s, generator=g)).requires_grad_() for k, s in shapes.items()}
    optimizer = torch.optim.Adam(raw.values(), lr=0.03)
    def decode():
        conf = {k: 1 + raw[k].clamp(max=10).exp() for k in ("depth_conf", "points_conf")}
        return dict(depth=raw["depth"].exp(), points=raw["points"], pose_enc=raw["pose_enc"], **conf)
    def errors():
        return [(decode()[k] - b[k])[b["mask"]].abs().mean().item() for k in ("depth", "points")]
    start = errors()
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.03 * (0.5 + 0.5 * math.cos(math.pi * step / 300))
        optimizer.zero_grad()
        geometry_losses(decode(), b, CFG)[0].backward()
        optimizer.step()
    assert all(e < s / 10 for e, s in zip(errors(), start)), (start, errors())
