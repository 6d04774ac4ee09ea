"""Is a dataset what it says?  `python data.py verify DIR`: files, units and camera conventions.

A sample gets a line; a mistake that explains why views (lib/views.py) disagree is named.
Shapes: T frames of H x W depth pixels.  Cameras as in geometry.py."""

import json
import math
from collections import Counter
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from geometry import compose, inv_se3, unproject, valid_depth
from lib.camera_files import NO_ROTATION, check_plausible, off_rotation, read_table, rigid
from lib.crop import pixel_matrix, stretched
from lib.depth import depth_of_points, metres, unknown, why_relative
from lib.files import count_arrays, iterate_video, read_arrays, video_facts
from lib.listing import check_sample, check_sums
from lib.native import Cameras
from lib.report import Report, print_report
from lib.suspects import FLIPS, find_suspect
from lib.views import Views, agreement, disagreement, frame_pairs, per_pair, thinned, typical, warp

RELATIVE, AGREE = dict(data=0.03, exact=1e-4), dict(data=0.6, exact=0.8)
PHOTO = dict(data=0.8, exact=0.3)

LOOKED_AT = 2**29  # bytes of a clip's depth, points or masks
MAX_LOOK = 2**22  # pixels of a frame whose colours are compared: 2048 x 2048

# Metres: a median depth beyond this is in millimetres, if cameras do not tell otherwise.
LARGE = 200


# --- One sample -----------------------------------------------------------------------------------
def check_cameras(report, table, size):
    """Rotations and intrinsics -> w2c (T, 3, 4), K (T, 3, 3) at `size`, repaired to go on."""
    (h, w), table = size, torch.from_numpy(table)
    w2c, columns = table[:, 7:].reshape(-1, 3, 4), table[:, 7:].reshape(-1, 4, 3).mT
    off = off_rotation(w2c)
    if off > 1e-3 and off_rotation(columns) < 1e-3:
        said = f"rows as they stand are off by {off:.2g}"
        report.suspect("rotations", "3x4 matrix transposed", said)
        w2c = columns
    elif off > NO_ROTATION:
        report.add("rotations", "fail", f"not orthonormal with determinant +1 (off by {off:.2g})")
    else:
        taken = "; drift or few digits: those next to them are taken" if off > 1e-3 else ""
        report.add("rotations", "warn" if taken else "ok", f"orthonormal to {off:.1g}{taken}")
        w2c = torch.from_numpy(rigid(w2c))
    fractions = table[:, 1:5].clone()
    if fractions[:, :2].max() > 20:
        report.suspect("intrinsics", "pixel intrinsics", f"focal length {fractions[0, 0]:.4g}")
        fractions /= table.new_tensor([w, h, w, h])
    try:
        check_plausible("cameras", Cameras(w2c.numpy(), "w2c", fractions.numpy()))
    except ValueError as error:
        report.add("cameras", "fail", str(error).removeprefix("cameras: "))
    fx, fy, cx, cy = (fractions * fractions.new_tensor([w, h, w, h])).unbind(1)
    if not 0.8 < (fx / fy).median() < 1.25:
        said = f"pixels are not square: focal {fx[0]:.4g} x {fy[0]:.4g} px"
        report.add("intrinsics", "warn", said)
    fov = 2 * math.degrees(math.atan(w / 2 / fx[0].item()))
    report.add("intrinsics", "ok", f"field of view {fov:.0f} degrees")
    identity = (w2c[0] - torch.eye(3, 4).to(w2c)).abs().max() < 1e-6
    report.add("first pose", "ok", "identity" if identity else "made the identity on loading")
    report.numbers.update(fov_deg=fov)
    return w2c, torch.from_numpy(pixel_matrix(fractions.numpy(), size))


def check_jumps(report, w2c):
    """A single step of the camera twice as long as both neighbours looks like a dropped frame."""
    step = inv_se3(w2c)[:, :, 3].diff(dim=0).norm(dim=-1)
    around = torch.maximum(step[:-2], step[2:])
    jump = torch.nonzero(step[1:-1] > 1.8 * around + 0.02 * step.mean() + 1e-6).flatten() + 1
    if len(jump):
        i = int(jump[0])
        said = f"the camera jumps between frames {i} and {i + 1}: a dropped frame?"
        report.add("rotations", "warn", said)


def check_depth(report, raw, unit):
    """Unit, range and valid share of a file's depth (T, H, W) -> float64 metres, 0 = invalid; None
    where all is, or none has a unit."""
    check_largest(report, raw, unit)
    try:
        depth = metres(raw, unit, "its files")
    except ValueError as error:
        report.add("depth", "fail", str(error))
        return None
    valid = depth > 0
    share = valid.mean()
    report.numbers.update(valid=float(share))
    if share == 0 or not valid[0].any():
        where = " in frame 0, which sets the scene's scale" if share else ""
        report.add("depth", "fail", f"no valid pixel{where}")
        return None
    low, middle, high = (float(x) for x in np.quantile(depth[valid][::17], (0.02, 0.5, 0.98)))
    report.numbers.update(depth_low=low, depth_median=middle, depth_high=high)
    usual = 0.02 < middle < LARGE
    said = f"{low:.4g} to {high:.4g}, {share:.0%} valid" + ("" if usual else ": metres?")
    report.add("depth", "ok" if share > 0.5 and usual else "warn", said)
    return torch.from_numpy(depth.astype(np.float64))


def check_points(report, points, depth, w2c, K, level):
    """Points must be depth's, in the frame of the first camera: to a pixel, exact ones to 1e-4."""
    if points.shape[:3] != depth.shape or points.shape[-1] != 3:
        wanted = (*depth.shape[1:], 3)
        return report.add("points", "fail", f"shape {points.shape[1:]}; wanted {wanted}")
    points = torch.from_numpy(points.astype(np.float64))[None]
    relative = compose(w2c, inv_se3(w2c[:1]))[None]
    frames = dict(ok=relative, camera=torch.eye(3, 4).to(w2c).expand_as(relative), file=w2c[None])
    used = valid_depth(depth)[None] & torch.isfinite(points).all(-1)

    def off(cameras):
        want = unproject(depth[None], cameras, K[None])
        error = (points - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-9)
        return error[used].median().item()

    error = {name: off(cameras) for name, cameras in frames.items()}
    limit, best = dict(data=1 / K[0, 0, 0].item(), exact=1e-4)[level], min(error, key=error.get)
    report.numbers.update(points_error=error["ok"])
    why = ""
    if best != "ok" and error[best] <= limit:
        frame = dict(camera="each camera's own frame", file="the file's world frame")[best]
        why = f"; they fit in {frame}"
    said = f"off from unproject(depth, cameras) by {error['ok']:.1e} of their distance{why}"
    report.add("points", "ok" if error["ok"] < limit else "fail", said)


def leave_out(report, depth, moving):
    """Depth without what moves by itself, whose place cameras alone do not explain."""
    moving = stretched(moving, depth.shape[1:]) > 0
    share = moving.double().mean().item()
    report.numbers.update(moving=share)
    said = f"{share:.1%} of the pixels are left out of the views"
    said += ": is the mask inverted?  True marks what moves" if share >= 0.7 else ""
    report.add("moving", "ok" if share < 0.7 else "warn", said)
    return torch.where(moving, 0, depth)


def check_views(report, views, rgb, level):
    """Cross-view reprojection; where views disagree, the usual suspects.  rgb: of check_photo."""
    fits = lambda other: check_photo(Report(""), other, rgb, level).status == "ok"  # noqa: E731
    g = views.gather()
    error = disagreement(g, views.w2c)
    flow, parallax = views.motion_in_pixels(g)
    B, known = per_pair(error), ~error.isnan()
    was, shared = typical(views.pairs[:-2], B[:-2]), known.double().mean().item()
    agree = agreement(error, B)
    report.numbers.update(relative=was, shared=shared, agree=agree)
    report.numbers.update(motion_px=flow, parallax_px=parallax)
    report.worst = views.pairs[int(B[:-2].nan_to_num(-1).argmax())]
    name, better, detail = find_suspect(views, fits)
    middle = report.numbers["depth_median"]
    if not name and middle > LARGE and parallax < 0.5:
        report.suspect("views", "depth in millimetres", f"median {middle:.0f}")
    if name:
        cut = f"undoing it cuts the disagreement of {was:.1e} to {better:.0%}"
        report.suspect("views", name, f"{cut}, {detail}" if detail else cut)
        return
    bad = was > RELATIVE[level] or agree < AGREE[level]
    text = f"depth disagrees by {was:.1e}, {agree:.0%} of pixels within 2 %, {shared:.0%} shared"
    if bad:
        text += "; no usual suspect explains it: look at poses, depth and focal length"
        report.add("views", "fail", text)
    elif flow < 0.5:
        said = f"cameras stand still ({flow:.1f} px): poses and depth kind not checkable"
        report.add("views", "skip", said)
    elif parallax < 0.5:
        still = f"cameras do not travel ({parallax:.1f} px): scale not checkable"
        report.add("views", "skip", f"{text}; {still}")
    else:
        report.add("views", "ok", text)
        if not views.timing_matters():
            report.add("views", "skip", "the motion is too even to check timing by a frame")
    for t in views.ids if not bad else ():
        mine = [b for pair, b in zip(views.pairs, B.tolist()) if t in pair and not math.isnan(b)]
        if len(mine) > 1 and min(mine) > 10 * was + 0.01:
            report.worst = next(pair for pair in views.pairs if t in pair)
            said = f"frame {t} disagrees with all others by {min(mine):.1e} or more"
            report.add("views", "fail", f"{said}: is its pose or depth of another frame?")
    most = B[:-2].nan_to_num(0).max()
    for (t, _), b in zip(views.pairs[-2:], B[-2:].tolist()):
        if b > 10 * most + 1e-3 and not bad:
            said = f"frame {t} disagrees with its neighbour by {b:.1e}, the others by {most:.1e}"
            report.add("views", "fail", f"{said}: is its pose a repetition, shifted by one frame?")


def check_photo(report, views, rgb, level):
    """Colours must agree where depth does; rgb: frame -> uint8 (H, W, 3), of neighbours too."""
    g = views.of(photo_pairs(views.pairs)).gather()
    error, size, how = disagreement(g, views.w2c), tuple(g["size"]), dict(mode="bilinear")
    small = {}
    for t, frame in rgb.items():
        frame = torch.tensor(frame).permute(2, 0, 1)[None].float() / 255
        small[t] = F.interpolate(frame, size, antialias=True, **how)[0]
    last, move = max(small), warp(g, views.w2c)

    def differences(shift, sides=()):
        t, s = (torch.stack([small[min(max(i + shift, 0), last)] for i in g[k]]) for k in "ts")
        t, s = t.flip(sides), s.flip(sides)
        here = t.permute(0, 2, 3, 1)[g["grid"]]
        moved = move(s).permute(0, 2, 3, 1)
        there, keep = s.permute(0, 2, 3, 1)[g["grid"]], error < 0.02
        return [(x - here).abs().mean(-1)[keep].mean().item() for x in (moved, there)]

    warped, still = differences(0)
    if still < 0.01 or (error < 0.02).double().mean() < 0.02:
        said = f"the picture hardly changes ({still:.3f}): not checkable"
        return report.add("photo", "skip", said)
    report.numbers.update(photo=warped / still)
    text = f"colour difference {warped:.3f}, {still:.3f} without moving pixels"
    tries = {"late by a frame": (1,), "early by a frame": (-1,)}
    tries |= {f"flipped {words}": (0, sides) for words, sides in FLIPS.items()}
    # Sky fits anywhere: what hardly changes without moving pixels is weighed by how much it does.
    weighed = lambda moved, own: max(moved, still * (moved + 1e-4) / (own + 1e-4))  # noqa: E731
    found = {words: weighed(*differences(*how)) for words, how in tries.items()}
    best = min(found, key=found.get)
    fits = f"; the video fits {best}: {found[best]:.3f}" if found[best] < 0.6 * warped else ""
    failed = warped > PHOTO[level] * still or fits
    return report.add("photo", "fail" if failed else "ok", text + fits)


def photo_pairs(pairs, most=14):
    """Pairs whose colours are compared: near ones change little but by motion."""
    near = [p for p in pairs[:-2] if abs(p[0] - p[1]) in (2, 4)] or pairs
    return near[:: max(1, len(near) // most)]


def looked_at(n):
    """Of n frames: pairs, frames whose depth is read, frames whose colours are."""
    pairs = frame_pairs(n)
    photo = {min(max(t + k, 0), n - 1) for p in photo_pairs(pairs) for t in p for k in (-1, 0, 1)}
    return pairs, sorted({t for pair in pairs for t in pair}), sorted(photo | {n - 1})


def inspect(raw, level="data"):
    """Every check of a sample of load_raw; level: data, or exact as renderings are."""
    report, counts = Report(raw["id"]), raw["counts"]
    n = min(counts.values())
    text = " ".join(f"{dict(table='cameras').get(k, k)} {c}" for k, c in counts.items())
    report.add("frames", "ok" if len(set(counts.values())) == 1 else "fail", text)
    if n < 5:
        report.add("frames", "fail", "wanted at least 5 = 4k + 1")
        return report
    usable = "" if n % 4 == 1 else f"the first {(n - 1) // 4 * 4 + 1} = 4k + 1 are usable"
    report.add("frames", "ok", usable)
    pairs, ids, _ = looked_at(n)
    (h, w), (hv, wv) = raw["depth"].shape[1:], raw["size"]
    report.numbers.update(frames=n, height=hv, width=wv)
    said = f"video {hv}x{wv}" + (f", depth {h}x{w}" if (h, w) != (hv, wv) else "")
    report.add("sizes", "ok" if abs(h * wv / (w * hv) - 1) < 0.02 else "fail", said)
    if abs(raw["pixel"] - 1) > 0.01:
        told = f"{raw['pixel']:.3g} times as wide as high, taken as they lie: are cameras of such?"
        report.add("pixels", "warn", f"{told} Else ffmpeg -i IN -vf scale=iw*sar:ih,setsar=1 OUT")
    # Pixel intrinsics are pixels of the video; fractions are free of size.
    table = raw["table"][:n].copy()
    if table[:, 1:3].max() > 20:
        table[:, 1:5] *= np.array([w / wv, h / hv] * 2)
    w2c, K = check_cameras(report, table, (h, w))
    check_jumps(report, w2c)
    step = math.ceil(math.sqrt(h * w / 80_000))
    raw, K = dict(raw, depth=raw["depth"][:, ::step, ::step]), thinned(K, step)
    if raw["relative"] and raw["unit"].scale is None:
        report.suspect("depth", "relative depth", raw["relative"], "warn")
        depth = np.where(unknown(raw["depth"]), 0, raw["depth"]).astype(np.float64)
        views = Views(torch.from_numpy(depth), K[ids], w2c, pairs, ids)
        name, _, detail = ("", 1.0, "") if sparse(report, views.depth) else find_suspect(views)
        if name in ("inverse depth", "relative inverse depth"):  # what most networks write
            report.suspect("views", name, f"near is large; {detail}")
        else:
            report.add("views", "skip", "relative depth: not checkable")
        return report
    depth = check_depth(report, raw["depth"], raw["unit"])
    if depth is None:
        return report
    if "points" in raw:
        check_points(report, raw["points"][:, ::step, ::step], depth, w2c[ids], K[ids], level)
    depth = leave_out(report, depth, raw["moving"]) if "moving" in raw else depth
    views = Views(depth, K[ids], w2c, pairs, ids)
    if not sparse(report, depth):
        check_views(report, views, raw["rgb"], level)
        if report.checks["views"][0] != "fail":
            check_photo(report, views, raw["rgb"], level)
    return report


def sparse(report, depth):
    """Depth of scattered points has no neighbours to compare with."""
    valid = depth > 0
    block = valid[:, :-1, :-1] & valid[:, 1:, :-1] & valid[:, :-1, 1:] & valid[:, 1:, 1:]
    share = block.double().mean() / valid.double().mean().clamp(min=1e-9)
    if share < 0.3:
        said = f"{valid.double().mean():.1%} of the pixels hold depth, scattered: not checkable"
        report.add("views", "skip", said)
    return share < 0.3


def check_largest(report, depth, unit):
    """One largest value that many pixels share, far from all others: sky, or not measured."""
    known = depth[~unknown(depth, unit) & (depth > 0)]
    if not known.size:
        return
    high = known.max()
    share, rest = (known == high).mean(), known[known < high]
    far = not unit.most or high * (unit.scale or 1) <= unit.most
    if share > 0.002 and far and rest.size and high > 1.5 * rest.max() and not unit.inverse:
        what = f"{share:.1%} of the pixels hold {high:.6g}, the rest up to {rest.max():.6g}"
        cure = f"if that is sky or unknown, give the sample depth_invalid {high:.6g}"
        report.suspect("largest depth", "largest depth is no depth", f"{what}: {cure}", "warn")


# --- The command ----------------------------------------------------------------------------------
def load_raw(sample):
    """What is in the files of a sample, unconverted: the input of inspect.

    Only the frames that are looked at stay in memory.
    returns  id, unit, size (H, W) of the video, counts: frames of each kind; table (T, 19);
             rgb: frame -> (H, W, 3); of the n frames of looked_at depth (n, H, W) and, where the
             sample has them, points (n, H, W, 3), moving (n, H, W);
             relative: why depth has no unit, or None"""
    if not sample["camera"]:
        raise ValueError("no camera")
    if not (sample["depth"] or sample["points"]):
        raise ValueError("neither depth nor points")
    table, arrays = read_table(sample["camera"], pixels=True), ("depth", "points", "moving")
    count, size, _, pixel = video_facts(sample["video"])  # damage anywhere is named
    counts = dict(rgb=count, table=len(table))
    counts |= {k: count_arrays(sample[k], k == "moving") for k in arrays if sample[k]}
    n = min(counts.values())
    _, ids, photo = looked_at(n) if n >= 5 else ([], list(range(n)), list(range(n)))
    shown, wanted = enumerate(iterate_video(sample["video"], n)), set(photo)
    rgb = {t: smaller(frame) for t, frame in shown if t in wanted}
    read = partial(read_arrays, limit=LOOKED_AT)
    found = {k: read(sample[k], ids, mask=k == "moving") for k in arrays if sample[k]}
    if not sample["depth"]:
        w2c = table[ids, 7:].reshape(-1, 3, 4)
        found["depth"] = depth_of_points(found["points"], w2c, sample["points"])
        counts["depth"] = counts["points"]
    if found["depth"].ndim != 3:
        what = f"array of shape {found['depth'].shape}"
        raise ValueError(f"{sample['depth']}: {what}; wanted z-depth (T, H, W)")
    told = dict(id=sample["id"], unit=sample["unit"], counts=counts, table=table, rgb=rgb)
    told["relative"] = why_relative(sample["depth"]) if sample["depth"] else None
    return dict(told, **found, size=size, pixel=pixel)


def smaller(frame):
    """A frame (H, W, 3) of at most MAX_LOOK pixels: every so many of its pixels averaged."""
    step = math.ceil(math.sqrt(frame.shape[0] * frame.shape[1] / MAX_LOOK))
    blocks = F.avg_pool2d(torch.tensor(frame).permute(2, 0, 1).float(), step)
    return blocks.round().byte().permute(1, 2, 0).numpy()


def verify(root, samples, bad, inside, *, fix_hints=False, as_json=False, exact=False):
    """Check every sample, print a table (or JSON); returns how many failed.

    samples, bad, inside   as in data.load_samples"""
    reports, level = [], "exact" if exact else "data"
    entries = [(s, None) for s in samples] + [(dict(id=name), what) for name, what in bad]
    for sample, problem in entries:
        try:
            if problem:
                raise ValueError(problem)
            check_sums(root, check_sample(inside, sample))
            if sample["video"]:
                reports.append(inspect(load_raw(sample), level))
            else:  # of synth --cache_only
                what = "caches alone, which train.py checks when it starts"
                reports.append(Report(sample["id"]).add("files", "skip", what))
        except (ValueError, OSError) as error:
            reports.append(Report(sample["id"]).add("files", "fail", str(error)))
        if not as_json:
            print_report(reports[-1], fix_hints, header=len(reports) == 1)
    failed = sum(r.status == "fail" for r in reports)
    if as_json:
        found = dict(root=str(root), failed=failed, samples=[r.as_dict() for r in reports])
        print(json.dumps(found, indent=1))
        return failed
    counts = Counter(s for r in reports for s in r.suspects)
    named = ", ".join(f"{n} x {s}" for s, n in counts.items())
    more = f"; suspects: {named}" if named else ""
    print(f"{root}: {len(reports)} samples, {failed} failed{more}")
    if bad := [r.id for r in reports if r.status == "fail" and r.worst]:
        print(f"look at the frames that disagree: python data.py view {root} {bad[0]}")
    return failed
