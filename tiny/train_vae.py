"""Train the miniature Wan VAE on rendered rooms: `python tiny/train_vae.py --steps 4800`.

Random crops of rooms of both varieties and several sizes. L1 on colours and on their differences
between neighbouring pixels (edges), a weak KL term, Muon with a linearly falling rate, and the
average of the weights. At the end the latents' mean and deviation are folded into the outermost
1x1 convolutions, so that the published Wan statistics fit. Resumable; the rate is a function of
step / --steps: a resumed run with another --steps goes on at that schedule's rate."""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from encoders import LATENT_MEAN, LATENT_STD, WanVAE  # noqa: E402
from lib.files import write_aside  # noqa: E402
from lib.guards import run_command  # noqa: E402
from lib.metrics import psnr  # noqa: E402
from lib.optimizer import Muon  # noqa: E402
from lib.rooms import render_clip  # noqa: E402

OUT = ROOT / "tiny/wan/Wan2.1_VAE.safetensors"
DIM, DECODER_DIM = 8, 12
FRAMES, BATCH, CROP = 9, 8, (32, 48)
EDGE, KL = 0.5, 1e-5  # weights beside the L1 of colours
# (seed of the first room, rooms, height, width, variety), and the share of a batch
ROOMS = {
    (40_000_000, 2500, 64, 96, "simple"): 0.35,
    (41_000_000, 2500, 64, 96, "full"): 0.35,
    (42_000_000, 800, 96, 160, "simple"): 0.15,
    (43_000_000, 800, 96, 160, "full"): 0.15,
}
CHOICE = dict(
    simple=(48_000_000, 24, 64, 96, "simple"),
    full=(48_500_000, 24, 64, 96, "full"),
    large=(49_000_000, 8, 96, 160, "full"),
)


def rooms(folder, first, count, height, width, variety):
    """Rendered colours (count, T, H, W, 3) uint8, kept as one .npy file and mapped."""
    path = folder / f"{variety}-{height}x{width}-{first}-{count}.npy"

    def render(part):
        shape = (count, FRAMES, height, width, 3)
        made = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        for n in range(count):
            made[n] = render_clip(first + n, FRAMES, height, width, variety)["rgb"]

    if not path.is_file():
        write_aside(path, render)
    return np.load(path, mmap_mode="r")


def as_video(clips):
    """uint8 (B, T, H, W, 3) -> (B, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def crops(sets, rng):
    """(B, 3, T, *CROP): random rooms, places and left-right flips."""
    clips, (height, width) = [], CROP
    for choice in rng.choice(len(sets), BATCH, p=list(ROOMS.values())):
        clip = sets[choice][rng.integers(len(sets[choice]))]
        top = rng.integers(clip.shape[1] - height + 1)
        left = rng.integers(clip.shape[2] - width + 1)
        clip = clip[:, top : top + height, left : left + width]
        clips.append(clip[:, :, ::-1] if rng.random() < 0.5 else clip)
    return as_video(clips)


def edges(x):
    """Differences of neighbouring pixels across and down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(vae, video):
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_var = vae.conv1(vae.encoder(video, {})).float().chunk(2, 1)
        log_var = log_var.clamp(-20, 10)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        out = vae.decoder(vae.conv2(z), {}).float()
    loss = (out - video).abs().mean()
    for ours, true in zip(edges(out), edges(video)):
        loss = loss + EDGE * (ours - true).abs().mean()
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    return loss + KL * kl, (out.detach() - video).square().mean()


@torch.no_grad()
def fidelity(vae, clips):
    """Mean over clips of the PSNR of a clip that was encoded (mean, fp32) and decoded."""
    videos = (as_video([clip]) for clip in clips)
    return statistics.mean(psnr(vae.decode(vae.encode(video)), video) for video in videos)


@torch.no_grad()
def folded(vae, sets):
    """State dict whose latents have the published mean and deviation; the same autoencoder."""
    sums, squares, count = torch.zeros(16), torch.zeros(16), 0
    for clips in sets:
        for clip in clips[:64]:
            mean = vae.conv1(vae.encoder(as_video([clip]), {})).chunk(2, 1)[0]
            sums += mean.sum((0, 2, 3, 4))
            squares += mean.square().sum((0, 2, 3, 4))
            count += mean[0, 0].numel()
    mean, std = sums / count, (squares / count - (sums / count).square()).sqrt()
    scale = torch.tensor(LATENT_STD) / std
    shift = torch.tensor(LATENT_MEAN) - mean * scale
    sd = {k: v.clone() for k, v in vae.state_dict().items()}
    sd["conv1.weight"][:16] *= scale.view(-1, 1, 1, 1, 1)
    sd["conv1.bias"][:16] = sd["conv1.bias"][:16] * scale + shift
    sd["conv2.bias"] -= sd["conv2.weight"][:, :, 0, 0, 0] @ (shift / scale)
    sd["conv2.weight"] /= scale.view(1, -1, 1, 1, 1)
    return sd


def make_optimizer(vae):
    matrices = [p for n, p in vae.named_parameters() if p.dim() > 2 and "gamma" not in n]
    ids = {id(p) for p in matrices}
    rest = [p for p in vae.parameters() if id(p) not in ids]
    groups = [dict(params=matrices, orthogonal=True), dict(params=rest, orthogonal=False)]
    return Muon(groups, betas=(0.9, 0.99), weight_decay=0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("data/tiny_vae"), help="rooms and state")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=2e-2, help="of Muon; AdamW runs at a tenth")
    how = parser.parse_args()
    how.work.mkdir(parents=True, exist_ok=True)
    sets = [rooms(how.work, *room) for room in ROOMS]
    choice = {name: rooms(how.work, *room) for name, room in CHOICE.items()}
    torch.manual_seed(0)
    vae = WanVAE(DIM, decoder_dim=DECODER_DIM)
    average = WanVAE(DIM, decoder_dim=DECODER_DIM).requires_grad_(False)
    optimizer = make_optimizer(vae)
    parts = dict(vae=vae, average=average, optimizer=optimizer)
    state_file, first, hours = how.work / "state.pt", 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, hours = state["step"], state["hours"]
    else:
        if OUT.is_file():  # a warm start from earlier weights, without the optimizer's moments
            vae.load_state_dict({k: v.float() for k, v in load_file(OUT).items()})
        average.load_state_dict(vae.state_dict())
    started, errors = time.time(), []
    for step in range(first, how.steps):
        rate = min(1, (step + 1) / 100) * max(0.02, 1 - 0.98 * step / how.steps)
        for group in optimizer.param_groups:
            group["lr"] = how.lr * rate * (1 if group["orthogonal"] else 0.1)
        torch.manual_seed(step)
        loss, error = loss_of(vae, crops(sets, np.random.default_rng([0, step])))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(0.998, (1 + step) / (10 + step))
        weights = [p.detach() for p in vae.parameters()]
        torch._foreach_lerp_(list(average.parameters()), weights, 1 - keep)
        errors.append(error.item())
        if (step + 1) % 250 and step + 1 != how.steps:
            continue
        now = hours + (time.time() - started) / 3600
        train = -10 * math.log10(np.mean(errors) / 4)
        row = dict(step=step + 1, hours=round(now, 3), train=round(train, 2))
        row |= {name: round(fidelity(average, clips), 2) for name, clips in choice.items()}
        errors.clear()
        print(row, flush=True)
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= dict(step=step + 1, hours=now)
        write_aside(state_file, lambda path: torch.save(state, path))
        half = {k: v.half().contiguous() for k, v in folded(average, choice.values()).items()}
        facts = dict(command=" ".join(sys.argv), seed="0", scores=json.dumps(row))
        write_aside(OUT, lambda path: save_file(half, path, facts))


if __name__ == "__main__":
    run_command("tiny/train_vae.py", main)
