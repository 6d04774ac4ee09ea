"""Datasets: readers and writers of the documented layout, encoded caches, pictures, rendered datasets.

    python data.py synth DIR --num N --num_frames T --height H --width W --seed S [--variety simple --val M --moving]
    python data.py verify DIR [--fix-hints] [--exact] [--json]
    python data.py encode DIR --codec transform | --wan_dir WAN --height H --width W --num_frames T
                              [--start 0 --stride 1 --windows 1 --window_seed -1]    (or torchrun ... data.py encode)

Layout: DIR/metadata.json, DIR/ID/{video.mp4, depth/frame_%04d.npy, camera_params.txt}, DIR/cache/TxHxW-KEY/;
optional DIR/ID/{points/frame_%04d.npy, moving.npz}: a mask (T, H, W), True on what moves by itself.
Shapes: T = 4k + 1 frames of H x W pixels, f h w latent grid, L words.
Cameras: OpenCV (x right, y down, z forward), w2c 3x4, world = first camera of the clip; metres; z-depth,
0 = invalid.  Intrinsics: fractions of width / height in files, pixels in tensors, centres at +0.5."""

import argparse
import os
import re
import zlib
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from encoders import cache_prefix, make_encoders
from geometry import encode_pose, normalize_scene, plucker_rays, relative_to_first, unproject
from lib.caches import (
    EMPTY_TEXT,
    check_folder,
    fits,
    is_whole,
    read_again,
    read_values,
    save_clip,
    save_tensors,
)
from lib.camera_files import inverse, read_cameras
from lib.distributed import gathered
from lib.files import (
    FAR,
    check_inside,
    check_lines,
    check_sample,
    check_sums,
    count_arrays,
    count_frames,
    read_arrays,
    read_depth,
    read_entries,
    read_video,
    why_relative,
)
from lib.rooms import VARIETY, synth
from lib.verify import verify as check
from wan import start_condition

# --- Samples -----------------------------------------------------------------------------------------------
FIELDS = dict(
    video=("video_path", "video"),
    depth=("depth_dir", "depth"),
    points=("points_dir", "points"),
    camera=("camera_file", "camera_params"),
    moving=("moving_path", "moving"),
    prompt=("prompt", "caption", "note"),
)


def load_samples(root, split=None, bad=None, inside=None):
    """List a dataset: metadata.json with samples and splits, a flat list, or a scan of the sample folders.

    bad      receives (id or "sample N", problem) of each entry that is left out; without it the first is raised
    inside   the folder that no link may leave: root, or "/" to follow links anywhere
    returns  dicts: id, split, prompt, fps, depth_scale, inverse_depth; video, camera, depth, points, moving: path or None
    Without splits the last tenth (at least one of several) is "val", the rest "train"."""
    root, samples, wrong, places = Path(root), {}, [], {}
    path, (entries, splits) = root / "metadata.json", read_entries(root, inside or root)
    for n, entry in enumerate(entries):
        name, where = str(entry.get("id", f"sample {n}"))[:200], f"{path}, sample {n}"
        try:
            sample = read_entry(root, entry, where)
            name = sample["id"]
            if samples.setdefault(sample["id"], sample) is not sample:
                raise ValueError(
                    f"{where}: id {sample['id']!r} is there twice. Give each its own or remove one"
                )
        except ValueError as error:
            wrong.append((name, str(error)))
        places[name] = n
    for name, _ in wrong:
        samples.pop(name, None)  # there twice: which one caches and splits mean is unknown
    if not splits:  # by place in the list: one bad entry moves no other
        cut = len(entries) - (max(1, len(entries) // 10) if len(entries) > 1 else 0)
        splits = {
            name: [i for i in places if (places[i] < cut) == (name == "train")]
            for name in ("train", "val")
        }
    listed, refused = (
        {name: set(map(str, ids)) for name, ids in splits.items()},
        {name for name, _ in wrong},
    )
    wrong = [
        (i, problem)
        for i, problem in wrong
        if split is None
        or i in listed.get(split, ())
        or not any(i in ids for ids in listed.values())
    ]
    for name in splits:
        for i in map(str, splits[name]):
            if i in samples and samples[i]["split"] is None:
                samples[i]["split"] = name
            elif i in samples:
                wrong.append(
                    (
                        i,
                        f"{path}: {i!r} is listed twice, in split {samples.pop(i)['split']} and in split "
                        f"{name}. Remove one",
                    )
                )
                refused.add(i)
            elif split in (None, name) and i not in refused:
                wrong.append(
                    (
                        i,
                        f"{path}: split {name} lists {i!r}, which is not among the samples. Add or remove it",
                    )
                )
    if wrong and bad is None:
        raise ValueError(wrong[0][1])
    if bad is not None:
        bad += wrong
    chosen = [s for s in samples.values() if split in (None, s["split"])]
    if not chosen:
        raise ValueError(
            f"{root}: no samples in split {split!r}; {len(samples)} found, splits "
            f"{ {k: len(v) for k, v in splits.items()} }. The layout is at the top of data.py."
            + "".join(f"\n  {name}: {problem}" for name, problem in wrong[:5])
        )
    return chosen


def read_entry(root, entry, where):
    """Bring one metadata entry to our names; its paths must stay inside the dataset, its values have their types."""
    sample = {
        field: next((entry[n] for n in names if entry.get(n)), None)
        for field, names in FIELDS.items()
    }
    if not sample["video"] and not entry.get("cached"):
        raise ValueError(f"{where}: no video_path; found {', '.join(entry)[:200] or 'nothing'}")
    for field, value in dict(sample, id=entry.get("id")).items():
        known = (str, int) if field == "id" else (str,)
        if value is not None and (
            type(value) not in known or len(str(value)) > 10000 or "\0" in str(value)
        ):
            raise ValueError(
                f"{where}: {field} {str(value)[:60]!r} is a {type(value).__name__} of {len(str(value))} "
                "characters; wanted a text of at most 10,000"
            )
        if re.search("[\ud800-\udfff]", str(value)):
            raise ValueError(
                f"{where}: {field} {ascii(value)[:60]} is no text (half of a UTF-16 pair)"
            )
    for field, wanted in dict(
        fps=(int, float), depth_scale=(int, float), inverse_depth=(bool,)
    ).items():
        value = entry.get(field)
        if value is not None and (
            type(value) not in wanted or not isinstance(value, bool) and not 0 < value < FAR
        ):
            raise ValueError(
                f"{where}: {field} = {str(value)[:60]}; wanted "
                + ("true or false" if wanted == (bool,) else f"a number between 0 and {FAR:.0e}")
            )
    for field in ("video", "depth", "points", "camera", "moving"):
        if sample[field]:
            inside = os.path.normpath(sample[field])
            if os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
                raise ValueError(
                    f"{where}: {field} path {sample[field]!r} leaves the dataset folder. Move it there"
                )
            sample[field] = root / inside
    parts = sample["video"].relative_to(root).with_suffix("").parts if sample["video"] else ()
    sample["id"] = str(entry.get("id") or "_".join(parts).removesuffix("_video"))
    if (
        not re.fullmatch(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*", sample["id"])
        or sample["id"] == EMPTY_TEXT
        or len(sample["id"].encode()) > 200
        or re.search(r"\.\d{4,}$", sample["id"])
    ):  # ID.0004: a window
        raise ValueError(
            f"{where}: id {sample['id'][:60]!r} cannot be a file name of at most 200 bytes, or ends "
            "like a window's"
        )
    return dict(
        sample,
        prompt=sample["prompt"] or "",
        split=None,
        fps=entry.get("fps"),
        depth_scale=entry.get("depth_scale"),
        inverse_depth=bool(entry.get("inverse_depth")),
    )


def checked_cameras(path):
    """read_cameras, whose matrices must be rotations and translations, and whose centres lie in the picture."""
    check_lines(path)
    w2c, fractions = read_cameras(path)
    try:
        inverse(w2c)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error} `python data.py verify` names the usual mistakes"
        ) from None
    if np.abs(w2c[..., 3]).max() > FAR or np.abs(fractions[:, 2:] - 0.5).max() > 0.5:
        raise ValueError(
            f"{path}: translations up to {np.abs(w2c[..., 3]).max():.3g}, cx cy from "
            f"{fractions[:, 2:].min():.3g} to {fractions[:, 2:].max():.3g}; wanted metres below {FAR:.0e} "
            "and fractions of the image size"
        )
    return w2c, fractions


def check_window(sample, depth, size, fps):
    """What training could not use: depth (T, H, W) of another shape than the video, none in frame 0, no frame rate."""
    (h, w), (hv, wv), path = depth.shape[1:], size, sample["depth"] or sample["points"]
    if abs(h * wv / (w * hv) - 1) > 0.02:
        raise ValueError(
            f"{path}: depth of {h}x{w} for a video of {hv}x{wv}; wanted the same shape of picture"
        )
    if not ((depth[0] > 1e-3) & (depth[0] <= FAR)).mean() > 0.001 or depth.max() > FAR:
        raise ValueError(
            f"{path}: {(depth[0] > 1e-3).mean():.2%} of the window's first frame, which sets the scene's "
            f"scale, has depth, up to {depth.max():.3g} m. Choose another start or remove the clip"
        )
    if not 0.1 <= fps <= 1000:
        raise ValueError(
            f"{sample['video']}: {fps:g} frames a second; give fps in the sample's entry of metadata.json"
        )


def load_clip(sample, height, width, num_frames, start=0, stride=1):
    """Read a window of a sample; frames, depth and intrinsics are centre-cropped and resized together.

    returns  video       (3, T, H, W)  float32 in [-1, 1], antialiased
             depth       (T, H, W)     float32, metres, 0 = invalid, nearest pixel
             w2c         (T, 3, 4)     float64, metres, world = first camera of the window
             intrinsics  (T, 3, 3)     float64, pixels at (H, W);   prompt, id: str;   fps: float
             relative    "" or why its depth has no unit (see relative_depth)
             moving      (T, H, W)     bool, True on what moves by itself; only where the sample has such a mask"""
    if num_frames % 4 != 1:
        raise ValueError(
            f"num_frames = {num_frames}; wanted 4k + 1, for instance {num_frames // 4 * 4 + 1}"
        )
    if not (sample["video"] and sample["camera"] and (sample["depth"] or sample["points"])):
        raise ValueError(
            f"clip {sample['id']}: a video, cameras and depth or points are needed; found "
            f"{[f for f in FIELDS if sample[f]]} (--cache_only renderings hold none)"
        )
    ids = range(start, start + stride * (num_frames - 1) + 1, stride)
    w2c, fractions = checked_cameras(sample["camera"])
    counts = (
        count_frames(sample["video"]),
        len(w2c),
        count_arrays(sample["depth"] or sample["points"]),
    )
    if min(counts) <= ids[-1]:
        raise ValueError(
            f"clip {sample['id']}: {counts[0]} video frames and {counts[1]} cameras found, {ids[-1] + 1} "
            "wanted; lower num_frames, start or stride, or remove the clip"
        )
    if len(set(counts)) > 1:
        raise ValueError(
            f"clip {sample['id']}: {counts[0]} video frames, {counts[1]} cameras and {counts[2]} depth "
            "maps: which belongs to which is unknown. Cut them to the same frames, or remove the clip"
        )
    frames, fps = read_video(sample["video"], ids[-1] + 1)
    w2c, (h0, w0) = torch.from_numpy(w2c[ids]), frames.shape[1:3]
    hc, wc = min(h0, round(w0 * height / width)), min(w0, round(h0 * width / height))
    y, x = (h0 - hc) // 2, (w0 - wc) // 2
    cropped = torch.from_numpy(frames[ids, y : y + hc, x : x + wc]).permute(
        0, 3, 1, 2
    )  # (T, 3, hc, wc)
    video = torch.cat(
        [
            F.interpolate(frame[None].float(), (height, width), mode="bilinear", antialias=True)
            for frame in cropped
        ]
    )  # (T, 3, H, W), frame-wise: memory
    if sample["depth"]:
        depth = read_depth(sample["depth"], sample["depth_scale"], ids, sample["inverse_depth"])
    else:  # a point at the origin is invalid
        points = read_arrays(sample["points"], ids).astype(np.float64)
        if points.ndim != 4 or points.shape[-1] != 3:
            raise ValueError(
                f"{sample['points']}: array of shape {points.shape}; wanted points (T, H, W, 3)"
            )
        z = np.einsum("tc,thwc->thw", w2c[:, 2, :3], points) + w2c[:, 2, 3, None, None].numpy()
        depth = np.where((points != 0).any(-1) & np.isfinite(z) & (z > 0), z, 0).astype(np.float32)
    check_window(sample, depth, frames.shape[1:3], float(sample["fps"] or fps))

    def under(maps):
        """The values (T, h, w) under the target's pixel centres; they may have another resolution than the video."""
        rows = ((y + (np.arange(height) + 0.5) * hc / height) * maps.shape[1] / h0).astype(int)
        cols = ((x + (np.arange(width) + 0.5) * wc / width) * maps.shape[2] / w0).astype(int)
        return torch.from_numpy(maps[:, rows][:, :, cols])

    fx, fy, cx, cy = fractions[ids].T * [[w0], [h0], [w0], [h0]]  # pixels of the source
    k = np.zeros((num_frames, 3, 3)) + np.eye(3)
    k[:, 0, 0], k[:, 0, 2] = fx * width / wc, (cx - x) * width / wc
    k[:, 1, 1], k[:, 1, 2] = fy * height / hc, (cy - y) * height / hc
    moving = (
        {"moving": under(read_arrays(sample["moving"], ids, mask=True) > 0)}
        if sample["moving"]
        else {}
    )
    return dict(
        moving,
        video=video.permute(1, 0, 2, 3) / 127.5 - 1,
        w2c=relative_to_first(w2c),
        depth=under(depth),
        intrinsics=torch.from_numpy(k),
        prompt=sample["prompt"],
        id=sample["id"],
        fps=float(sample["fps"] or fps) / stride,
        relative=(not sample["depth_scale"] and sample["depth"] and why_relative(sample["depth"]))
        or "",
    )


def window_starts(sample, num_frames, stride, start, windows, window_seed):
    """First frames of a clip's windows: evenly spread, or drawn at random when window_seed >= 0."""
    if windows == 1 and window_seed < 0:
        return [start]
    count = len(read_cameras(sample["camera"])[0]) if sample["camera"] else 0
    last = max(start, count - stride * (num_frames - 1) - 1)
    if window_seed < 0:
        return sorted({round(s) for s in np.linspace(start, last, windows)})
    random = np.random.default_rng([window_seed, zlib.crc32(sample["id"].encode())])
    return sorted({int(s) for s in random.integers(start, last + 1, windows)})


def plan_clip(inside, sample, folder, same, start, windows, window_seed):
    """Jobs of one clip's windows: sample, key (everything that changes the result) and path of the cache file."""
    check_sample(inside, sample)
    stamp, jobs = [sample["fps"], sample["depth_scale"]], []
    for path in (p for p in sample.values() if isinstance(p, Path)):
        stats = [p.stat() for p in (path, *path.glob("*")) if p.exists()]  # a folder: its files too
        stamp.append(
            f"{sum(s.st_size for s in stats)}:{max([s.st_mtime_ns for s in stats], default=0)}"
        )
    whole = windows == 1 and window_seed < 0
    for s in window_starts(sample, same["num_frames"], same["stride"], start, windows, window_seed):
        name = sample["id"] if whole else f"{sample['id']}.{s:04d}"
        key = dict(
            same,
            id=name,
            sample=sample["id"],
            prompt=sample["prompt"],
            stamp=" ".join(map(str, stamp)),
            start=s,
        )
        jobs.append(dict(sample=sample, key=key, path=folder / f"{name}.safetensors"))
    return jobs


def part(job, what):
    """Where a pass keeps what it computed until the clip is whole: a killed run goes on from there."""
    return job["path"].parent / ".parts" / f"{job['key']['id']}.{what}.safetensors"


def encode_text(job, text):
    if not fits(part(job, "text"), job["key"]):
        save_tensors(
            part(job, "text"),
            dict(text=text([job["key"]["prompt"]])[0].bfloat16().cpu()),
            job["key"],
        )


def encode_image(job, tower):
    if not fits(part(job, "clip"), job["key"]):
        clip = load_clip(
            job["sample"], job["key"]["height"], job["key"]["width"], 1, job["key"]["start"]
        )
        tokens = tower(clip["video"][None, :, 0])[0].bfloat16().cpu()  # (257, 1280)
        save_tensors(part(job, "clip"), dict(clip=tokens), job["key"])


def encode_video(job, vae, pad):
    clip = load_clip(
        job["sample"],
        *(job["key"][k] for k in ("height", "width", "num_frames", "start", "stride")),
    )
    parts = [part(job, what) for what in ("text", "clip") if part(job, what).exists()]
    if clip["relative"]:
        tqdm.write(
            f"{clip['id']}: {clip['relative']}: not metric. It trains the depth head alone, with the ssi loss, in "
            "stage 1; give depth_scale in metadata.json if its depth does have a unit"
        )
    for path in parts:
        if not is_whole(path):
            path.unlink()
            raise ValueError(f"{path}: was damaged and is deleted; run the command again")
    save_clip(
        job["path"],
        clip,
        vae,
        pad,
        {k: v for path in parts for k, v in read_values(path)[0].items()},
        dict(
            job["key"],
            split=job["sample"]["split"],
            fps=clip["fps"],
            depth="relative" if clip["relative"] else "metric",
        ),
    )
    for path in parts:
        path.unlink()


def encode(
    root,
    height,
    width,
    num_frames,
    codec="transform",
    wan_dir="",
    device="",
    split=None,
    start=0,
    stride=1,
    windows=1,
    window_seed=-1,
    skip_bad=False,
    follow_links=False,
):
    """Encode windows of every clip, one pass per encoder; returns how many clips failed on any rank, 0 with skip_bad
    as long as one is left.

    Under torchrun every rank takes its share of the clips.  Finished files whose key still fits are kept."""
    if num_frames % 4 != 1 or height % 16 or width % 16:
        raise ValueError(
            f"{num_frames} frames of {height}x{width}; wanted 4k + 1 and multiples of 16"
        )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = device or (
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    )
    encoders, failed, bad = make_encoders(codec, wan_dir, device), [], []
    folder = Path(root, "cache", f"{num_frames}x{height}x{width}-{encoders.fingerprint}")
    same = dict(
        num_frames=num_frames,
        height=height,
        width=width,
        stride=stride,
        fingerprint=encoders.fingerprint,
    )

    def each(items, what, work):
        """(item, work(item)) of those that did not fail; a failed clip is reported once and left out from here on."""
        for item in tqdm(items, desc=f"encode: {what}", unit="clip", disable=rank > 0):
            name = item.get("sample", item)["id"]
            try:
                if name not in failed:
                    yield item, work(item)
            except ValueError as error:
                failed.append(name)
                tqdm.write(f"skipped {name}: {error}")

    inside = "/" if follow_links else root
    for path in (folder, folder / ".parts"):
        check_inside(inside, path)  # nothing is written through a link that leads out
    samples = load_samples(root, split, bad, inside)[rank::world]
    for name, problem in bad if rank == 0 else ():
        failed.append(name)
        tqdm.write(f"skipped {name}: {problem}")
    plans = each(
        samples, "plan", lambda s: plan_clip(inside, s, folder, same, start, windows, window_seed)
    )
    jobs = [job for _, clip_jobs in plans for job in clip_jobs]
    left = [job for job in jobs if not fits(job["path"], job["key"])]
    kept, empty = len(jobs) - len(left), folder / f"{EMPTY_TEXT}.safetensors"
    todo = {job["sample"]["id"]: job["sample"] for job in left}
    list(each(todo.values(), "check", lambda s: check_sums(root, check_sample(inside, s))))
    if left or not is_whole(empty):
        text = encoders.load_text()
        if not is_whole(empty):
            save_tensors(
                empty,
                dict(text=text([""])[0].bfloat16().cpu()),
                dict(fingerprint=encoders.fingerprint),
            )
        left = [job for job, _ in each(left, "text", lambda job: encode_text(job, text))]
        del text  # freed before the next encoder is loaded
    if left and encoders.load_image:
        tower = encoders.load_image()
        left = [job for job, _ in each(left, "image", lambda job: encode_image(job, tower))]
        del tower
    if left:
        vae = encoders.load_vae()
        left = [
            job
            for job, _ in each(
                left, "video", lambda job: encode_video(job, vae, encoders.start_pad)
            )
        ]
    with suppress(OSError):  # other ranks, or failed clips, still have parts there
        (folder / ".parts").rmdir()
    print(f"{folder}: {len(left)} encoded, {kept} kept, skipped: {', '.join(failed) or 'none'}")
    if (
        dist.is_torchelastic_launched()
    ):  # torchrun stops the others when one fails: wait for all of them
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    bad, good = map(sum, zip(*gathered((len(failed), len(left) + kept))))
    return 0 if skip_bad and good else bad


class CachedClips(torch.utils.data.Dataset):
    """The cached windows of a split: the tensors of save_clip as stored (metres), and id, prompt, fps;
    relative: its depth has no unit.

    Every file is checked here (see lib/caches.py), so that a run does not meet a bad one half-way: ValueError lists them,
    or with skip_bad they are left out, each with a line; every rank leaves out the same.  A file that is damaged later
    stops the run, or with skip_bad the next one takes its place: batches depend on seed, step and files alone."""

    def __init__(
        self, root, split, height, width, num_frames, wan_dir="", skip_bad=False, follow_links=False
    ):
        bad, inside = [], "/" if follow_links else root
        self.skip_bad, self.prefix = skip_bad, cache_prefix(wan_dir)
        self.samples = samples = {s["id"]: s for s in load_samples(root, split, bad, inside)}
        option = "--codec transform" if self.prefix == "transform" else f"--wan_dir {wan_dir}"
        cure = f"python data.py encode {root} {option} --height {height} --width {width} --num_frames {num_frames}"
        folders = sorted(Path(root).glob(f"cache/{num_frames}x{height}x{width}-{self.prefix}*"))
        if len(folders) > 1:
            raise ValueError(
                f"{root}: {', '.join(f.name for f in folders)} all fit {wan_dir or 'the demo'}; they are "
                f"of other encoder files: delete all but one"
            )
        good, stamps = {}, {}
        if folders:
            check_inside(inside, folders[0])
            good, stamps, wrong = check_folder(folders[0], samples, (num_frames, height, width))
            bad += wrong
        if not good and (not folders or all("not encoded" in problem for _, problem in bad)):
            there = ", ".join(sorted(f.name for f in Path(root).glob("cache/*"))) or "none"
            raise ValueError(
                f"{root}: split {split} is not encoded at {num_frames}x{height}x{width} for "
                f"{self.prefix} (caches there: {there}). Run\n  {cure}"
            )
        if not any(s["video"] for s in samples.values()):
            cure = f"rm -r {root}, and render it again"
        self.refuse(
            f"{root}: {len(bad)} of {len(good) + len(bad)} {split} clips", bad, len(good), cure
        )
        self.files = [folders[0] / f"{name}.safetensors" for name in good]
        self.metadata, self.stamps = good, stamps
        self.empty_text = folders[0] / f"{EMPTY_TEXT}.safetensors"
        if not is_whole(self.empty_text):
            raise ValueError(f"{self.empty_text}: missing or damaged. Run\n  {cure}")

    def refuse(self, what, bad, good, cure):
        """Bad clips end the run, or are named and left out as long as they are fewer than the good ones."""
        lines = [f"  {name}: {problem}" for name, problem in bad]
        if bad and (not self.skip_bad or good < len(bad)):
            more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
            way_out = (
                "skip_bad leaves out the lesser part only"
                if self.skip_bad
                else "or leave them out with --skip_bad=True"
            )
            raise ValueError(
                f"{what} cannot be trained on\n"
                + "\n".join(lines[:5])
                + more
                + f"\nDelete what is damaged, run\n  {cure}\n{way_out}"
            )
        if bad and os.environ.get("RANK", "0") == "0":
            print("\n".join([f"{what} are left out", *lines]), flush=True)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        for tries in range(len(self.files)):
            path = self.files[(i + tries) % len(self.files)]
            try:
                tensors, meta = read_again(path, self.stamps[path.stem])
                return dict(
                    tensors,
                    id=meta["id"],
                    prompt=meta["prompt"],
                    fps=float(meta["fps"]),
                    relative=torch.tensor(meta.get("depth") == "relative"),
                )
            except Exception as error:  # of whatever kind: a loader's worker must name the clip
                if not self.skip_bad or tries + 1 == len(self.files):
                    raise ValueError(
                        f"clip {path.stem}: damaged since the start of the run: {error!r}"
                    ) from error
                print(
                    f"clip {path.stem}: damaged since the start of the run, the next one in its place: {error!r}",
                    flush=True,
                )

    def frames(self, i):
        """Pictures of a clip, uint8 (T, H, W, 3): its video cropped and resized, or what the demo's codec holds; None
        where a Wan cache has outlived the video."""
        meta = self.metadata[self.files[i].stem]
        sample = self.samples[meta["sample"]]
        if sample["video"] and sample["video"].is_file():
            size = (int(meta[k]) for k in ("height", "width", "num_frames", "start", "stride"))
            try:
                video = load_clip(sample, *size)["video"]
            except (ValueError, OSError) as error:  # training needs the caches alone
                print(f"warning: a picture without its frames: {error}", flush=True)
                return None
        elif self.prefix == "transform":
            video = make_encoders().load_vae().decode(self[i]["latents"][None].float())[0]
        else:
            return None
        return (
            ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        )

    def count_relative(self):
        """How many of the clips have depth without a unit."""
        return sum(meta.get("depth") == "relative" for meta in self.metadata.values())


def collate(items):
    """Stack what all clips of a batch have; text stays a list of (L, dim), id, prompt and fps lists."""
    columns = {k: [item[k] for item in items] for k in items[0] if all(k in item for item in items)}
    stack = (
        torch.utils.data.default_collate
    )  # in a worker straight into the shared memory the batch travels in
    return {k: c if k in ("text", "id", "prompt", "fps") else stack(c) for k, c in columns.items()}


def prepare(batch, in_dim, dev, rays=plucker_rays):
    """Loader batch -> float32 on the device, in scene units, with rays, pose encodings and points made there.
    rays: the model's own kind of ray map (FantasyWorld.rays)."""

    def send(x):  # bfloat16 is widened there: half of the bytes to move
        x = x.to(dev, non_blocking=True)
        return x if x.dtype == torch.bool else x.float()

    batch = {
        k: v for k, v in batch.items() if k != "relative" or v.any()
    }  # rare: a second pass of losses
    b = {k: send(v) if torch.is_tensor(v) else v for k, v in batch.items()}
    b["text"] = [send(text) for text in batch["text"]]
    mask = torch.isfinite(b["depth"]) & (b["depth"] > 1e-3)
    size = b["depth"].shape[-2:]
    depth, w2c, scale = normalize_scene(b["depth"], b["w2c"], b["intrinsics"], mask)
    return dict(
        b,
        depth=depth,
        w2c=w2c,
        scale=scale,
        mask=mask,
        points=unproject(depth, w2c, b["intrinsics"]),
        pose_enc=encode_pose(w2c, b["intrinsics"], size),
        plucker=rays(w2c, b["intrinsics"], size),
        y=start_condition(b["start_latents"], in_dim, b["latents"].shape[2]),
    )


def verify(root, split=None, fix_hints=False, json=False, exact=False, follow_links=False):
    """Check every sample of a dataset and print a table (or JSON); returns how many failed."""
    bad, inside = [], "/" if follow_links else root
    samples = load_samples(root, split, bad, inside)
    return check(root, samples, bad, inside, bool(fix_hints), bool(json), bool(exact))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("synth", help="render a dataset")
    q = commands.add_parser(
        "encode", help="encode every clip once, so that training loads no encoder"
    )
    p.add_argument("out")
    p.add_argument("--variety", choices=VARIETY, default="full")
    r = commands.add_parser("verify", help="check every clip before any GPU hour is spent")
    for command in (q, r):
        command.add_argument("root")
        command.add_argument("--split")
    q.add_argument("--codec", default="transform")
    q.add_argument("--wan_dir", default="", help="folder of a Wan2.1 release, in place of --codec")
    q.add_argument("--device", default="", help="default: a GPU where there is one")
    links = "files and folders may be links that lead out of the dataset"
    for command, option, text in (
        (p, "cache_only", "no videos"),
        (p, "moving", "one object moves by itself, with its mask"),
        (q, "skip_bad", "exit with 0 although clips failed"),
        (q, "follow_links", links),
        (r, "json", ""),
        (r, "fix_hints", "name cures"),
        (r, "exact", "for exact renderings"),
        (r, "follow_links", links),
    ):
        command.add_argument(
            f"--{option}",
            f"--{option.replace('_', '-')}",
            help=text,
            metavar="True|False",
            type=["False", "True"].index,
            nargs="?",
            const=1,
            default=0,
        )
    size = dict(num_frames=None, height=None, width=None)
    for command, options in (
        (p, dict(size, num=None, seed=0, workers=2, val=0)),
        (q, dict(size, start=0, stride=1, windows=1, window_seed=-1)),
    ):
        for name, default in options.items():
            command.add_argument(f"--{name}", type=int, default=default, required=default is None)
    args = vars(parser.parse_args())
    try:
        raise SystemExit(
            1
            if {"synth": synth, "encode": encode, "verify": verify}[args.pop("command")](**args)
            else 0
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
