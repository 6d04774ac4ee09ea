"""The mistakes `data.py verify` must name, made on purpose.   `python tests/corruptions.py
[--trials 20]`"""

import argparse
import functools
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from geometry import (
    inv_se3,  # noqa: E402
    pixel_rays,  # noqa: E402
    relative_to_first,  # noqa: E402
)
from lib import verify, views  # noqa: E402
from lib.rooms import render_clip  # noqa: E402

LIVINGROOM = Path(__file__).resolve().parents[2] / "shared" / "livingroom"

KINDS = (
    "clean",
    "c2w stored as w2c",
    "OpenGL camera axes",
    "c2w in OpenGL axes",
    "pixel intrinsics",
    "3x4 matrix transposed",
    "depth in millimetres",
    "ray length instead of z-depth",
    "inverse depth",
    "poses one frame late",
    "poses one frame early",
    "translation scale off",
    "relative depth",
)


@functools.lru_cache(maxsize=64)
def rendered(seed, num_frames=17, size=(64, 96), variety="simple", moving=False):
    """A rendered clip with two spare cameras around it, as inspect reads it: raw, w2c (T + 2, 3,
    4)."""
    clip = render_clip(seed, num_frames + 2, *size, variety, moving)
    k, w2c = clip["intrinsics"], clip["w2c"]
    fractions = k[0, 0] / size[1], k[1, 1] / size[0], 0.5, 0.5
    raw, w2c = as_raw(f"{variety} {seed}", clip["rgb"][1:-1], clip["depth"][1:-1], w2c, fractions)
    return dict(raw, moving=clip["moving"][1:-1]) if moving else raw, w2c


@functools.lru_cache(maxsize=1)
def recording(size, folder):
    """The whole recording at a size: rgb, depth in metres, w2c."""
    sys.path.insert(0, str(folder))
    from make_dataset import area, nearest, read_video

    depth = np.load(folder / "depth_mm.npz")["depth_mm"]
    depth = depth[:, nearest(size[0], 480)][:, :, nearest(size[1], 640)].astype(np.float32) / 1000
    c2w = np.loadtxt(folder / "c2w.txt").reshape(-1, 3, 4)
    rgb = area(read_video(folder / "color.mp4"), *size)
    return dict(rgb=rgb, depth=depth, w2c=inv_se3(torch.from_numpy(c2w)).numpy())


def livingroom(seed, num_frames=41, size=(240, 320), folder=LIVINGROOM):
    """A window of the recording at a random place, with two spare cameras."""
    cache = recording(size, folder)
    start = np.random.default_rng(seed).integers(1, len(cache["rgb"]) - num_frames)
    window = slice(start, start + num_frames)
    return as_raw(
        f"recording {start}",
        cache["rgb"][window],
        cache["depth"][window],
        cache["w2c"][start - 1 : start + num_frames + 1],
        (525 / 640, 525 / 480, 0.5, 0.5),
    )


def as_raw(name, rgb, depth, w2c, fractions):
    raw = dict(id=name, rgb=rgb, depth=depth, size=rgb.shape[1:3])
    raw["table"] = table(relative_to_first(torch.from_numpy(w2c[1:-1])).numpy(), fractions)
    return raw, w2c


def table(w2c, fractions):
    return np.stack([np.array([t, *fractions, 0, 0, *e.ravel()]) for t, e in enumerate(w2c)])


def corrupt(raw, w2c, kind, rng):
    """One mistake -> raw, the cameras and depth that a reader would now believe (None where the
    file shows it)."""
    raw, believed = dict(raw), torch.from_numpy(w2c[1:-1])
    h, w = raw["depth"].shape[1:]
    fractions, depth = raw["table"][0, 1:5], raw["depth"]
    absolute = rng.random() < 0.5  # some files are relative to their first camera
    base = believed if absolute else relative_to_first(believed)
    flip = views.FLIP
    if kind == "c2w stored as w2c":
        believed = inv_se3(base)
    elif kind == "OpenGL camera axes":
        believed = flip * base if absolute else relative_to_first(flip * base)
    elif kind == "c2w in OpenGL axes":
        believed = inv_se3(base) * torch.tensor([1.0, -1, -1, 1]).double()
    elif kind in ("poses one frame late", "poses one frame early"):
        shifted = torch.from_numpy(w2c[:-2] if "late" in kind else w2c[2:])
        believed = shifted if absolute else relative_to_first(shifted)
    elif kind == "translation scale off":
        factor = np.exp(rng.uniform(np.log(1.5), np.log(20)) * rng.choice([-1, 1]))
        base = relative_to_first(believed)
        believed = views.scaled(base, factor)
    else:
        believed = base
    raw["table"] = table(believed.numpy(), fractions)
    k = np.array([[fractions[0] * w, 0, w / 2], [0, fractions[1] * h, h / 2], [0, 0, 1]])
    if kind == "pixel intrinsics":
        raw["table"][:, 1:5] *= [w, h, w, h]
    elif kind == "3x4 matrix transposed":
        raw["table"][:, 7:] = believed.mT.reshape(-1, 12).numpy()
    elif kind == "depth in millimetres":
        raw["depth"] = depth * 1000
    elif kind == "ray length instead of z-depth":
        raw["depth"] = depth * pixel_rays(torch.from_numpy(k), (h, w)).norm(dim=-1).float().numpy()
    elif kind == "inverse depth":
        raw["depth"] = np.where(depth > 0, 1 / np.maximum(depth, 1e-9), 0).astype(np.float32)
    elif kind == "relative depth":
        low, high = depth[depth > 0].min(), depth.max()
        stretched = np.where(depth > 0, (depth - low) / (high - low), 0)
        raw["depth"] = (
            stretched.astype(np.float32)
            if rng.random() < 0.5
            else (255 * stretched).round().astype(np.uint8)
        )
    return raw, believed, torch.from_numpy(k)


SHOWN = (
    "pixel intrinsics",
    "3x4 matrix transposed",
    "depth in millimetres",
    "relative depth",
)  # by the file alone


def effect(clean, w2c, raw, believed, k):
    """By how many pixels (or percent of depth) the mistake spoils the views: what there is to be
    found."""
    true = torch.from_numpy(w2c[1:-1])
    n, depth = len(true), torch.from_numpy(raw["depth"].astype(np.float64))
    pairs = views.frame_pairs(n)[:-2]
    K = k.expand(n, 3, 3)
    g = views.gather(torch.from_numpy(clean["depth"].astype(np.float64)), K, pairs)
    h = views.gather(depth, K, pairs)
    a, za, ok = views.reproject(g, true)
    b, zb, _ = views.reproject(g, believed)
    pixels = torch.where(ok, (a - b).norm(dim=-1), torch.nan).flatten(1).nanmedian(1).values
    wrong = views.disagreement(h, true).flatten(1).nanmedian(1).values
    return pixels.nan_to_num(0).mean().item(), wrong.nan_to_num(0).mean().item()


def sweep(source, trials, kinds=KINDS, least=0.25, first=0):
    """{kind: Counter of names found} over `trials` seeds where the mistake spoils anything."""
    results = {kind: Counter() for kind in kinds}
    for kind in kinds:
        seed = first
        while (
            sum(v for n, v in results[kind].items() if n != "nothing to find") < trials
            and seed < first + 6 * trials
        ):
            raw, w2c = source(seed)
            rng = np.random.default_rng([seed, KINDS.index(kind)])
            if kind == "clean":
                found = verify.inspect(raw)
                results[kind][
                    "none"
                    if found.status in ("ok", "skip")
                    else f"ALARM {found.status} {found.checks}"
                ] += 1
            else:
                bad, believed, k = corrupt(raw, w2c, kind, rng)
                found = verify.inspect(bad)
                pixels, wrong = (9, 9) if kind in SHOWN else effect(raw, w2c, bad, believed, k)
                seen = pixels > least or wrong > 0.004
                name = found.suspects[0] if found.suspects else f"none ({found.status})"
                if not seen and not found.suspects:
                    name = "nothing to find"
                results[kind][name] += 1
            seed += 1
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--livingroom", type=Path, default=LIVINGROOM)
    parser.add_argument("--only", default="", help="simple, full, moving or recording")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sources = dict(
        simple=rendered,
        full=lambda s: rendered(s, variety="full"),
        moving=lambda s: rendered(s, moving=True),
    )
    if args.livingroom.is_dir():
        sources["recording"] = lambda s: livingroom(s, folder=args.livingroom)
    sources = {name: source for name, source in sources.items() if args.only in ("", name)}
    for name, source in sources.items():
        start = time.time()
        for kind, found in sweep(source, args.trials).items():
            right = found["none" if kind == "clean" else kind]
            print(
                f"{name:10s} {kind:32s} {right:2d} of {args.trials}  "
                + ", ".join(f"{n}: {c}" for n, c in found.items() if n not in (kind, "none")),
                flush=True,
            )
        print(f"{name}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
