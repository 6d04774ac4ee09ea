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
from lib import suspects, verify, views  # noqa: E402
from lib.camera_files import read_table  # noqa: E402
from lib.depth import METRES, relative_depth  # noqa: E402
from lib.files import read_arrays, read_video  # noqa: E402
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
    "rotation transposed",
    "focal length off",
    "camera axes permuted",
    "c2w in permuted axes",
    "left-handed axes",
    "quaternion order",
    "poses several frames late",
    "poses several frames early",
    "poses in reverse",
    "cameras in string order",
    "frames in string order",
    "affine depth",
    "relative inverse depth",
    "depth scaled frame by frame",
    "largest depth is no depth",
    "depth flipped",
)
SPARE = 3  # cameras before and after a clip
FIELD = LIVINGROOM.parent / "field"


@functools.lru_cache(maxsize=64)
def rendered(seed, num_frames=17, size=(64, 96), variety="simple", moving=False):
    """A rendered clip with spare cameras around it, as inspect reads it: raw, w2c (T + 6, 3, 4)."""
    clip = render_clip(seed, num_frames + 2 * SPARE, *size, variety, moving)
    k, w2c = clip["intrinsics"], clip["w2c"]
    fractions = k[0, 0] / size[1], k[1, 1] / size[0], 0.5, 0.5
    kept = slice(SPARE, -SPARE)
    raw, w2c = as_raw(f"{variety} {seed}", clip["rgb"][kept], clip["depth"][kept], w2c, fractions)
    return dict(raw, moving=clip["moving"][kept]) if moving else raw, w2c


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
    last = len(cache["rgb"]) - num_frames - SPARE
    start = np.random.default_rng(seed).integers(SPARE, last + 1)
    window = slice(start, start + num_frames)
    return as_raw(
        f"recording {start}",
        cache["rgb"][window],
        cache["depth"][window],
        cache["w2c"][start - SPARE : start + num_frames + SPARE],
        (525 / 640, 525 / 480, 0.5, 0.5),
    )


def as_raw(name, rgb, depth, w2c, fractions):
    raw = dict(id=name, rgb=rgb, depth=depth, size=rgb.shape[1:3])
    raw["table"] = table(relative_to_first(torch.from_numpy(w2c[SPARE:-SPARE])).numpy(), fractions)
    return raw, w2c


def table(w2c, fractions):
    return np.stack([np.array([t, *fractions, 0, 0, *e.ravel()]) for t, e in enumerate(w2c)])


def corrupt(raw, w2c, kind, rng):
    """One mistake -> raw, the cameras and depth that a reader would now believe (None where the
    file shows it)."""
    raw, believed = dict(raw), torch.from_numpy(w2c[SPARE:-SPARE])
    h, w = raw["depth"].shape[1:]
    fractions, depth = raw["table"][0, 1:5], raw["depth"]
    absolute = rng.random() < 0.5  # some files are relative to their first camera
    base = believed if absolute else relative_to_first(believed)
    flip = suspects.FLIP
    if kind == "c2w stored as w2c":
        believed = inv_se3(base)
    elif kind == "OpenGL camera axes":
        believed = flip * base if absolute else relative_to_first(flip * base)
    elif kind == "c2w in OpenGL axes":
        believed = inv_se3(base) * torch.tensor([1.0, -1, -1, 1]).double()
    elif kind in ("poses one frame late", "poses one frame early"):
        believed = moved_by(w2c, -1 if "late" in kind else 1, absolute)
    elif kind in ("poses several frames late", "poses several frames early"):
        believed = moved_by(w2c, int(rng.integers(2, 4)) * (-1 if "late" in kind else 1), absolute)
    elif kind == "rotation transposed":
        believed = torch.cat([base[..., :3].mT, base[..., 3:]], -1)
    elif kind == "camera axes permuted":  # north east down
        believed = torch.tensor([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]]).double() @ base
    elif kind == "c2w in permuted axes":
        believed = inv_se3(torch.tensor([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]]).double() @ base)
    elif kind == "left-handed axes":
        m = suspects.MIRROR
        believed = torch.cat([m[:, None] * base[..., :3] * m, m[:, None] * base[..., 3:]], -1)
    elif kind == "quaternion order":
        believed = suspects.rolled(base, 1 if rng.random() < 0.5 else -1)
    elif kind == "poses in reverse":
        believed = base.flip(0)
    elif kind == "cameras in string order":
        believed = base[sorted(range(len(base)), key=str)]
    elif kind == "frames in string order":
        believed = base
        order = sorted(range(len(base)), key=str)
        raw.update(rgb=raw["rgb"][order], depth=raw["depth"][order])
    elif kind == "translation scale off":
        factor = np.exp(rng.uniform(np.log(1.5), np.log(20)) * rng.choice([-1, 1]))
        base = relative_to_first(believed)
        believed = views.scaled(base, factor)
    else:
        believed = base
    raw["table"] = table(believed.numpy(), fractions)
    fx, fy, cx, cy = fractions * [w, h, w, h]
    k = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
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
    elif kind == "focal length off":
        raw["table"][:, 1:3] *= rng.choice([0.5, 0.7, 1.5, 2.0])
    elif kind == "affine depth":
        shift = rng.uniform(0.3, 1.5) * np.median(depth[depth > 0])
        raw["depth"] = np.where(depth > 0, rng.uniform(0.3, 3) * (depth + shift), 0)
    elif kind == "relative inverse depth":
        shift = rng.uniform(0.1, 0.8) / np.median(depth[depth > 0])
        inverse = 1 / np.maximum(depth, 1e-9) + shift
        raw["depth"] = np.where(depth > 0, rng.uniform(0.3, 3) * inverse, 0)
    elif kind == "depth scaled frame by frame":
        factor = np.exp(0.2 * rng.normal(size=len(depth)))
        raw["depth"] = (depth * factor[:, None, None]).astype(np.float32)
    elif kind == "largest depth is no depth":
        raw["depth"] = depth.copy()
        raw["depth"][:, : h // 8] = 10 * depth.max()
    elif kind == "depth flipped":
        raw["depth"] = np.flip(depth, [(1,), (2,), (1, 2)][rng.integers(3)]).copy()
    elif kind == "relative depth":
        low, high = depth[depth > 0].min(), depth.max()
        stretched = np.where(depth > 0, (depth - low) / (high - low), 0)
        raw["depth"] = (
            stretched.astype(np.float32)
            if rng.random() < 0.5
            else (255 * stretched).round().astype(np.uint8)
        )
    return raw, believed, torch.from_numpy(k)


def moved_by(w2c, frames, absolute):
    """Cameras of the frames so many later."""
    t = torch.from_numpy(w2c[SPARE + frames : len(w2c) - SPARE + frames])
    return t if absolute else relative_to_first(t)


@functools.lru_cache(maxsize=1)
def fast_clip():
    folder = FIELD / "hololens_fast" / "clip"
    depth, rows = read_arrays(folder / "depth.npz"), read_table(folder / "camera_params.txt")
    depth = depth * (0.001 if depth.dtype.kind == "u" else 1)
    return read_video(folder / "video.mp4")[0], depth, rows


def hololens(seed, num_frames=25):
    """A window of the real, fast clip."""
    rgb, depth, rows = fast_clip()
    w2c, last = rows[:, 7:].reshape(-1, 3, 4), len(rgb) - num_frames - SPARE
    start = np.random.default_rng(seed).integers(SPARE, last + 1)
    window = slice(start, start + num_frames)
    around = w2c[start - SPARE : start + num_frames + SPARE]
    depth = depth[window].astype(np.float32)
    return as_raw(f"hololens {start}", rgb[window], depth, around, tuple(rows[0, 1:5]))


SHOWN = (
    "pixel intrinsics",
    "3x4 matrix transposed",
    "depth in millimetres",
    "relative depth",
    "largest depth is no depth",
)  # by the file alone


def effect(clean, w2c, raw, believed, k):
    """By how many pixels (or percent of depth) the mistake spoils the views: what there is to be
    found."""
    true = torch.from_numpy(w2c[SPARE:-SPARE])
    n, depth = len(true), torch.from_numpy(raw["depth"].astype(np.float64))
    pairs, ids = views.frame_pairs(n)[:-2], list(range(n))
    K = k.expand(n, 3, 3)
    whole = torch.from_numpy(clean["depth"].astype(np.float64))
    g = views.Views(whole, K, true, pairs, ids).gather()
    h = views.Views(depth, K, true, pairs, ids).gather()
    a, za, ok = views.reproject(g, true)
    b, zb, _ = views.reproject(g, believed)
    pixels = torch.where(ok, (a - b).norm(dim=-1), torch.nan).flatten(1).nanmedian(1).values
    wrong = views.disagreement(h, true).flatten(1).nanmedian(1).values
    return pixels.nan_to_num(0).mean().item(), wrong.nan_to_num(0).mean().item()


def inspect(raw, level="data"):
    """The doctor on whole arrays, of which it gets what load_raw reads of files."""
    kinds = ("rgb", "table", "depth", "points", "moving")
    raw = dict(dict(unit=METRES), **{k: v for k, v in raw.items() if v is not None})
    counts = {k: len(raw[k]) for k in kinds if k in raw}
    if min(counts.values()) >= 5:
        _, ids, photo = verify.looked_at(min(counts.values()))
        chosen = {k: raw[k][ids] for k in kinds[2:] if k in raw}
        chosen["rgb"] = {t: raw["rgb"][t] for t in photo}
        raw = dict(raw, **chosen, relative=relative_depth(raw["depth"]))
    return verify.inspect(dict(raw, counts=counts, pixel=1.0), level)


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
                found = inspect(raw)
                results[kind][
                    "none"
                    if found.status in ("ok", "skip")
                    else f"ALARM {found.status} {found.checks}"
                ] += 1
            else:
                bad, believed, k = corrupt(raw, w2c, kind, rng)
                found = inspect(bad)
                pixels, wrong = (9, 9) if kind in SHOWN else effect(raw, w2c, bad, believed, k)
                seen = pixels > least or wrong > 0.004
                name = found.suspects[0] if found.suspects else f"none ({found.status})"
                if not seen and not found.suspects:
                    name = "nothing to find"
                if suspects.AFFINE_AS_WELL in str(found.checks):
                    name += " or affine depth, it says"
                results[kind][name] += 1
            seed += 1
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--livingroom", type=Path, default=LIVINGROOM)
    parser.add_argument("--only", default="", help="simple, full, moving, recording or hololens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sources = dict(
        simple=rendered,
        full=lambda s: rendered(s, variety="full"),
        moving=lambda s: rendered(s, moving=True),
    )
    if args.livingroom.is_dir():
        sources["recording"] = lambda s: livingroom(s, folder=args.livingroom)
    if FIELD.is_dir():
        sources["hololens"] = hololens
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
