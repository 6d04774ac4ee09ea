"""It learns: each branch overfits one rendered clip, through the losses and the noise that training
uses."""

import dataclasses
import types

import pytest
import torch
from small import TINY

import data
import geometry
import train
from data import collate
from encoders import MINIATURE, WanFolder
from lib.metrics import depth_metrics, point_metrics
from lib.rooms import render_clip
from model import FantasyWorld, flow_matching_loss


@pytest.fixture(scope="module")
def batch():
    clip = render_clip(3, 5, 32, 48, "simple")
    video = torch.from_numpy(clip["rgb"]).permute(3, 0, 1, 2).float()[None] / 127.5 - 1
    encoders = WanFolder(MINIATURE, "cpu")
    codec = encoders.load_vae()
    item = dict(
        latents=2 * codec.encode(video)[0],  # of unit variance: one clip's is a quarter
        start_latents=2 * codec.encode(video[:, :, :1])[0],
        text=encoders.load_text()([clip["prompt"]])[0],
        depth=torch.from_numpy(clip["depth"]),
        w2c=torch.from_numpy(clip["w2c"]).float(),
        intrinsics=torch.from_numpy(clip["intrinsics"]).float().expand(5, 3, 3),
    )
    return data.prepare(collate([item]), 32, torch.device("cpu"))


OPTIONS = types.SimpleNamespace(
    depth_mode="metric",
    alpha_tgm=10.0,
    beta_frame=1.0,
    gamma_conf=0.2,
    camera_delta=0.1,
    camera_weight=3.0,
)


def test_geometry_branch_overfits_one_clip(batch):
    torch.manual_seed(0)
    model = FantasyWorld(TINY).set_stage(1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, 1e-2, fused=True)
    noise, sigma, keep = torch.randn_like(batch["latents"]), torch.tensor([0.1]), torch.ones(1)
    errors = []
    for step in range(161):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 172)
        x = (1 - sigma) * batch["latents"] + sigma * noise
        out = model(
            x,
            1000 * sigma,
            batch["text"],
            y=batch["y"],
            plucker=batch["plucker"],
            poses=batch["pose_enc"],
            keep=keep,
            video=False,
        )
        if step in (0, 160):
            errors.append(
                (
                    point_metrics(out["points"].detach(), batch["points"], batch["mask"])["dist"],
                    depth_metrics(out["depth"].detach(), batch["depth"], batch["mask"])["abs_rel"],
                )
            )
        loss, _ = geometry.geometry_losses(out, batch, OPTIONS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    assert errors[1][0] < errors[0][0] / 10 and errors[1][1] < errors[0][1] / 10, errors


def test_video_branch_overfits_one_clip(batch):
    torch.manual_seed(0)
    # 128 > 64 numbers of a patch: a narrower stream cannot carry the noise that the velocity
    # contains
    model = FantasyWorld(dataclasses.replace(TINY, dim=128, ffn_dim=256, head_dim=32)).set_stage(0)
    optimizer = torch.optim.AdamW(model.dit.parameters(), 3e-3, fused=True)
    losses = []
    for step in range(400):
        g = train.generator(0, step)
        noise = torch.randn(batch["latents"].shape, generator=g)
        sigma = torch.rand(1, generator=g)
        x = (1 - sigma) * batch["latents"] + sigma * noise
        velocity = model(x, 1000 * sigma, batch["text"], y=batch["y"])["velocity"]
        loss = flow_matching_loss(velocity, batch["latents"], noise).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-50:]) / 50 < 0.25 * losses[0], (losses[0], losses[-5:])
