"""Train the miniature Wan VAE on rendered rooms: `python tiny/train_vae.py --steps 4800`.

Random crops of rooms of both varieties and several sizes. L1 on colours and on their differences
between neighbouring pixels (edges), a weak KL term, Muon with a linearly falling rate, and the
average of the weights. At the end the latents' mean and deviation are folded into the outermost
1x1 convolutions, so that the published Wan statistics fit. Resumable; the rate is a function of
step / --steps: a resumed run with another --steps goes on at that schedule's rate."""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encoders import LATENT_MEAN, LATENT_STD, WanVAE  # noqa: E402
from lib.optimizer import Muon  # noqa: E402
from lib.rooms import render_clip  # noqa: E402

DIM, DECODER_DIM = 8, 12
FRAMES = 9
# (seed of the first room, rooms, height, width, variety)
ROOMS = [
    (40_000_000, 2500, 64, 96, "simple"),
    (41_000_000, 2500, 64, 96, "full"),
    (42_000_000, 800, 96, 160, "simple"),
    (43_000_000, 800, 96, 160, "full"),
]
CHOICE = [
    (48_000_000, 24, 64, 96, "simple"),
    (48_500_000, 24, 64, 96, "full"),
    (49_000_000, 8, 96, 160, "full"),
]


def rooms(folder, first, count, height, width, variety):
    """Rendered colours (count, T, H, W, 3) uint8, kept as one .npy file and mapped."""
    path = folder / f"{variety}-{height}x{width}-{first}-{count}.npy"
    if not path.is_file():
        temporary = path.with_suffix(".part")
        shape = (count, FRAMES, height, width, 3)
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, dict(descr="|u1", fortran_order=False, shape=shape)
            )
            for n in range(count):
                file.write(render_clip(first + n, FRAMES, height, width, variety)["rgb"].tobytes())
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def crops(sets, weights, rng, batch, height, width):
    """(B, 3, T, height, width) in [-1, 1]: random rooms, places and left-right flips."""
    clips = []
    for choice in rng.choice(len(sets), batch, p=weights):
        clip = sets[choice][rng.integers(len(sets[choice]))]
        top = rng.integers(clip.shape[1] - height + 1)
        left = rng.integers(clip.shape[2] - width + 1)
        clip = clip[:, top : top + height, left : left + width]
        clips.append(clip[:, :, ::-1] if rng.random() < 0.5 else clip)
    video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return video.float() / 127.5 - 1


def edges(x):
    """Differences of neighbouring pixels across and down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(vae, video, edge_weight, kl_weight):
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_var = vae.conv1(vae.encoder(video, {})).float().chunk(2, 1)
        log_var = log_var.clamp(-20, 10)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        out = vae.decoder(vae.conv2(z), {}).float()
    loss = (out - video).abs().mean()
    for ours, true in zip(edges(out), edges(video)):
        loss = loss + edge_weight * (ours - true).abs().mean()
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    return loss + kl_weight * kl, (out.detach() - video).square().mean()


@torch.no_grad()
def psnr(vae, clips):
    """Mean over clips of the PSNR of a clip that was encoded (mean, fp32) and decoded."""
    values = []
    for clip in clips:
        video = torch.from_numpy(np.array(clip)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        mean = vae.conv1(vae.encoder(video, {})).chunk(2, 1)[0]
        out = vae.decoder(vae.conv2(mean), {}).clamp(-1, 1)
        values.append(-10 * math.log10((out - video).square().mean().item() / 4))
    return sum(values) / len(values)


@torch.no_grad()
def folded(vae, sets):
    """State dict whose latents have the published mean and deviation; the same autoencoder."""
    sums, squares, count = torch.zeros(16), torch.zeros(16), 0
    for clips in sets:
        for clip in clips[:64]:
            video = torch.from_numpy(np.array(clip)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            mean = vae.conv1(vae.encoder(video, {})).chunk(2, 1)[0]
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
    groups = [dict(params=matrices, orthogonal=True), dict(params=rest)]
    return Muon(groups, betas=(0.9, 0.99), weight_decay=0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("data/tiny_vae"),
        help="rendered rooms and the run's state",
    )
    parser.add_argument("--out", type=Path, default=Path("tiny/wan/Wan2.1_VAE.safetensors"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-2, help="of Muon; AdamW runs at a tenth")
    parser.add_argument("--edge", type=float, default=0.5)
    parser.add_argument("--kl", type=float, default=1e-5)
    parser.add_argument("--average", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--limit", type=int, default=0, help="stop after this step of the schedule (trials)"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sets = [rooms(args.work, *room) for room in ROOMS]
    choice = [rooms(args.work, *room) for room in CHOICE]
    torch.manual_seed(args.seed)
    vae = WanVAE(DIM, decoder_dim=DECODER_DIM)
    average = WanVAE(DIM, decoder_dim=DECODER_DIM).requires_grad_(False)
    average.load_state_dict(vae.state_dict())
    optimizer = make_optimizer(vae)
    state_file, first, hours = args.work / "state.pt", 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, hours = state["step"], state["hours"]
    elif (
        args.out.is_file()
    ):  # a warm start from the committed weights, without the optimizer's moments
        vae.load_state_dict({k: v.float() for k, v in load_file(args.out).items()})
        average.load_state_dict(vae.state_dict())
    started, log, errors = time.time(), open(args.work / "log.jsonl", "a"), []
    for step in range(first, args.limit or args.steps):
        rate = min(1, (step + 1) / 100) * max(0.02, 1 - 0.98 * step / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate * (1 if group["orthogonal"] else 0.1)
        rng = np.random.default_rng([args.seed, step])
        torch.manual_seed(args.seed * 1_000_003 + step)
        video = crops(sets, [0.35, 0.35, 0.15, 0.15], rng, args.batch, 32, 48)
        loss, error = loss_of(vae, video, args.edge, args.kl)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(args.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(average.parameters()), [p.detach() for p in vae.parameters()], 1 - keep
        )
        errors.append(error.item())
        if (
            (step + 1) % (250 if args.limit == 0 else 40) == 0
            or step + 1 == args.steps
            or step + 1 == args.limit
        ):
            now = hours + (time.time() - started) / 3600
            scores = [round(psnr(average, clips), 2) for clips in choice]
            row = dict(
                step=step + 1,
                hours=round(now, 3),
                train=round(-10 * math.log10(np.mean(errors) / 4), 2),
                simple=scores[0],
                full=scores[1],
                large=scores[2],
            )
            errors.clear()
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
            state = dict(
                vae=vae.state_dict(),
                average=average.state_dict(),
                step=step + 1,
                hours=now,
                optimizer=optimizer.state_dict(),
            )
            torch.save(state, state_file.with_suffix(".part"))
            os.replace(state_file.with_suffix(".part"), state_file)
            half = {k: v.half().contiguous() for k, v in folded(average, choice).items()}
            facts = dict(command=" ".join(sys.argv), seed=str(args.seed), scores=json.dumps(row))
            save_file(half, args.out.with_suffix(".part"), facts)
            os.replace(args.out.with_suffix(".part"), args.out)


if __name__ == "__main__":
    main()
