"""Recordings of other layouts into ours: `python data.py import [FORMAT] SRC DIR`.

One writer for all layouts of lib/layouts.py.  SRC is one recording, or a folder that holds several
at any depth; nothing in it is changed.  DIR/ID appears when it is whole, so a killed import goes on
with the recording that it was at."""

import argparse
import itertools
import json
import os
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from geometry import relative_to_first
from lib import camera_files, files
from lib.camera_files import FORMATS, check_plausible, oriented, write_re10k
from lib.crop import Crop, focal_and_centre, fractions
from lib.distributed import say
from lib.layouts import LAYOUTS
from lib.lens import pinhole_of, undistortion
from lib.listing import MARK, is_id, read_metadata, sums_of
from lib.pictures import write_video
from lib.recordings import pick, some


def folders(src, depth=5):
    """A folder and those in it, each after the ones around it."""
    yield src
    if depth:
        for child in sorted(src.iterdir(), key=lambda f: files.natural(f.name)):
            if child.is_dir() and child.name[0] != ".":
                yield from folders(child, depth - 1)


def find(src, form=None):
    """[(format, key)] of the recordings in a folder; ValueError where there is none."""
    if not src.is_dir():
        raise ValueError(f"{src}: no folder; wanted one of a labeler or scanner (docs/data.md)")
    found, within, cut = [], [], []
    for folder in folders(src):
        if any(folder.resolve().is_relative_to(f) for f in within):
            continue  # the parts of a recording, or a link to one
        names = [form] if form else list(LAYOUTS)
        kinds = {name: keys for name in names if (keys := LAYOUTS[name].keys(folder))}
        if len(kinds) > 1:
            cure = f"write import {next(iter(kinds))} or another of them"
            raise ValueError(f"{folder}: looks like {' and '.join(kinds)}; {cure}")
        for name, keys in kinds.items():
            found += [(name, key) for key in keys]
            within.append(folder.resolve())
        archives = [] if kinds else files.listed(folder, (".npz",))
        cut += [f"{f}: cut short. Copy it again" for f in archives if not zipfile.is_zipfile(f)]
    if not found:
        wanted = f"recordings of the layout {form}" if form else "a recording of a known layout"
        said = f"wanted {wanted}; known are {', '.join(LAYOUTS)} (docs/data.md)"
        raise ValueError((*cut, "")[0] or nearest(src, names) or f"{src}: {said}")
    for said in cut:
        say(f"left out: {said}")
    return found


def nearest(src, names):
    """What a folder lacks to be of the layout that it is most like; "" where most is missing."""
    known = [(name, LAYOUTS[name].parts) for name in names if LAYOUTS[name].parts]
    seen = [(folder, name, parts(folder)) for folder in folders(src) for name, parts in known]
    there = lambda one: sum(map(bool, one[2].values()))  # noqa: E731
    folder, name, parts = max(seen, key=there, default=(src, "", {}))
    absent = [part for part, found in parts.items() if not found]
    said = f"{folder}: most like {name}, but without {' and '.join(absent)} (docs/data.md)"
    return said if len(absent) < len(parts) / 2 else ""


def name_of(src, key):
    """An id of letters that every file system takes."""
    inside = key.relative_to(src) if key != src else Path(src.resolve().name)
    inside = inside.with_suffix("") if key.is_file() else inside
    name = re.sub(r"[^\w-]+", "_", "_".join(inside.parts)).strip("_")
    name = name.encode()[:100].decode(errors="ignore") or "clip"
    return name if is_id(name) else f"{name}_"


# --- One recording --------------------------------------------------------------------------------
def thinned(rec, wishes):
    """Without lost poses; from start every stride-th frame, at most max_frames of them."""
    finite = [np.isfinite(np.asarray(m, float)).all() for m in rec.cameras.matrices]
    if lost := [n for n, good in enumerate(finite) if not good]:
        rec.notes.append(f"{len(lost)} frames whose pose was lost left out: {some(lost)}")
    places = np.flatnonzero(finite)[wishes.start :: wishes.stride][: wishes.max_frames].tolist()
    if len(places) < 5:
        raise ValueError(f"{len(places)} frames with picture, depth and pose; wanted at least 5")
    frames, depth, sure = ([x[p] for p in places if x] for x in (rec.frames, rec.depth, rec.sure))
    return replace(rec, frames=frames, cameras=pick(rec.cameras, places), depth=depth, sure=sure)


def lies_over(frame, k):
    """Whether a picture would have to be turned for its camera, that its pixels be square."""
    (h, w), (fx, fy) = frame.shape[:2], k[:2]
    return abs(fx * w / (fy * h) - 1) > 0.2 and abs(fx * h / (fy * w) - 1) < 0.05


def frames_of(rec, size, folder, K):
    """uint8 (H, W, 3) of every frame, as the video gets them; writes their depth into the folder,
    and adds their intrinsics to K: (1, 4) fractions."""
    own, lenses = rec.depth_lens, rec.cameras.lenses or [None] * len(rec.frames)
    changed = size or any(lenses) or rec.read or rec.sure or own is not None
    maps = rec.maps() if changed else iter(rec.depth or ())
    for n, frame in enumerate(rec.pictures()):
        k, lens = tuple(map(float, rec.cameras.intrinsics[n])), lenses[n]
        if lies_over(frame, k) and not rec.turned:  # others than COLMAP heed EXIF
            (frame,) = files.read_stills(rec.frames[n : n + 1])
        if lies_over(frame, k):
            found = "picture {0} is {2}x{1}, its camera {1}x{2}".format(n, *frame.shape)
            raise ValueError(f"{found}. Fix: save the pictures upright and label them again")
        frame = undistortion(k, lens).picture(frame) if lens else frame
        h, w = frame.shape[:2]
        size = size or (h - h % 2, w - w % 2)  # as H.264 wants
        cut = Crop((h, w), size)
        pixels = cut.intrinsics(np.array(pinhole_of(k, lens))[None])
        K.append(fractions(focal_and_centre(pixels), size))
        cut = cut if cut.source != cut.target else None
        if rec.depth:
            path = folder / f"frame_{n:04d}.npy"
            write_depth(path, next(maps), k, own=own, lens=lens, cut=cut)
        if cut:
            frame = cut.video(frame[None])[0].permute(1, 2, 0).round().byte().numpy()
        yield frame


def write_depth(path, raw, k, *, own, lens, cut):
    """Depth of a frame, an array or its file: the file itself where nothing changes."""
    if isinstance(raw, Path):
        if not lens and not cut and len(files.read_array(raw, read=False)[0]) == 2:
            data = raw.read_bytes()
            if raw.suffix.lower() == ".png" and not data.endswith(files.PNG_END):
                raise ValueError(f"{raw}: does not end as a PNG: cut short? Copy it again")
            return path.with_suffix(raw.suffix.lower()).write_bytes(data)
        raw = files.read_array(raw)
    raw = np.squeeze(raw)  # networks leave a side of 1 of their channel
    raw = raw if own is None else under(raw, own, k)  # of another camera at the same place
    raw = undistortion(k, lens).map(raw) if lens else raw
    np.save(path, cut.maps(raw[None])[0].numpy() if cut else raw)


def under(raw, own, k):
    """Depth (h, w) of a camera `own` as one of the same place with intrinsics k sees it, nearest;
    both (4,) fractions.  0 where it sees nothing."""
    h, w = raw.shape
    x = ((np.arange(w) + 0.5) / w - k[2]) / k[0] * own[0] + own[2]
    y = ((np.arange(h) + 0.5) / h - k[3]) / k[1] * own[1] + own[3]
    out = raw[np.clip((y * h).astype(int), 0, h - 1)][:, np.clip((x * w).astype(int), 0, w - 1)]
    seen = ((y >= 0) & (y < 1))[:, None] & ((x >= 0) & (x < 1))
    return np.where(seen, out, out.dtype.type(0))


def write_sample(rec, folder, name, wishes):
    """Files of one recording in `folder` -> its entry of metadata.json."""
    rec = thinned(rec, wishes)
    check_plausible(name, rec.cameras)
    w2c = oriented(rec.cameras.matrices, rec.cameras.kind, wishes.axes or rec.axes)
    fps = (wishes.fps or rec.fps) / wishes.stride
    entry = dict(id=name, video_path=f"{name}/video.mp4", fps=round(fps, 4))
    if rec.depth:
        (folder / "depth").mkdir()
        entry.update(depth_dir=f"{name}/depth", **rec.unit)
        entry.update({} if wishes.depth_scale is None else dict(depth_scale=wishes.depth_scale))
    frames = frames_of(rec, wishes.size, folder / "depth", K := [])
    show = tqdm(frames, desc=name[:30], total=len(w2c), unit="frame")
    write_video(folder / "video.mp4", show, fps, crf=10)
    w2c = relative_to_first(torch.from_numpy(w2c)).numpy()
    write_re10k(folder / "camera_params.txt", w2c, np.concatenate(K))
    return dict(entry, camera_file=f"{name}/camera_params.txt")


# --- Many -----------------------------------------------------------------------------------------
def check_wishes(wishes, found, src, out):
    """ValueError for what no import could do."""
    if wishes.name and len(found) > 1:
        raise ValueError(f"--name {wishes.name}: {src} holds {len(found)} recordings; leave it out")
    if wishes.name and not is_id(wishes.name):
        wanted = "wanted a folder's name: no separator, no dot in front, no number at its end"
        raise ValueError(f"--name {wishes.name}: {wanted} as .2024")
    if wishes.fps is not None and not 0.1 <= wishes.fps <= 1000:
        raise ValueError(f"--fps {wishes.fps:g}: wanted 0.1 to 1000")
    if any(side % 2 for side in wishes.size or ()):
        raise ValueError("--size {}x{}: wanted even sides, for the video".format(*wishes.size))
    if wishes.start < 0 or wishes.stride < 1 or (wishes.max_frames or 5) < 5:
        raise ValueError("wanted --start of 0, --stride of 1, --max_frames of 5, or more")
    if "metadata.json" in (sums_of(out) or ()):
        cure = "delete SHA256SUMS, import, and write it again"
        raise ValueError(f"{out}: its SHA256SUMS lists metadata.json; {cure}")
    if out.resolve().is_relative_to(src.resolve()):
        raise ValueError(f"{out}: lies in {src}, which is not changed; choose another folder")


def run(src, out, form=None, **wishes):
    """Import every recording of SRC that DIR does not hold yet -> ids, and how many failed."""
    src, out, options = Path(src), Path(out), argparse.ArgumentParser()
    add_wishes(options)
    wishes = options.parse_args([], argparse.Namespace(**wishes))  # defaults where none is told
    found, names = find(src, form), []
    check_wishes(wishes, found, src, out)
    out.mkdir(parents=True, exist_ok=True)
    taken = set()  # by recordings of SRC: 2024-05 and 2024 05 would be one
    for kind, key in found:
        own, said = wishes.name or name_of(src, key), read_metadata(out, out)
        others = (f"{own}_{i}" for i in itertools.count(2))
        name = next(n for n in itertools.chain([own], others) if n.casefold() not in taken)
        taken.add(name.casefold())  # not all file systems tell upper from lower case
        # What changes the result; another import under the same name is refused.
        made = {k: v for k, v in vars(wishes).items() if v not in (None, "", 0)}
        made = json.loads(json.dumps([kind, str(key.resolve()), made]))
        before = next((e for e in said["samples"] if str(e.get("id")) == name), None)
        if before and before.get("imported") != made:
            raise ValueError(f"{out}: holds another sample {name!r}; use another DIR or delete it")
        if before:
            say(f"{name}: already imported")
            names.append(name)
            continue
        if os.path.lexists(out / name) and not (out / name / MARK).exists():  # somebody's
            cure = "choose another --name or DIR, or delete it"
            raise ValueError(f"{out / name}: is there and no import has made it; {cure}")
        part = out / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            rec = LAYOUTS[kind].open(key, wishes)
            entry = write_sample(rec, part, name, wishes)
        except Exception as error:  # a stranger's files make readers raise almost any class
            if files.is_of_disk(error):
                raise
            problem = error if str(src) in str(error) else files.damaged(key, error, "{}")
            say(f"skipped {name} ({kind}): {problem}")
            shutil.rmtree(part)
            continue
        names.append(name)
        (part / MARK).touch()
        shutil.rmtree(out / name, ignore_errors=True)  # of an import killed before its entry
        os.replace(part, out / name)
        said["samples"].append(dict(entry, prompt=wishes.prompt, imported=made))
        if isinstance(said.get("splits"), dict):
            said["splits"].setdefault("train", []).append(name)
        text = json.dumps(said, indent=1)
        files.write_aside(out / "metadata.json", lambda path: path.write_text(text, "utf-8"))
        (out / name / MARK).unlink()
        without = [] if rec.depth else ["no depth: label the video before it can be trained on"]
        say("; ".join([f"{name} ({kind})", *rec.notes, *without]))
    return names, len(found) - len(names)


def add_arguments(parser):
    """The arguments of `data.py import`."""
    known = f"{', '.join(LAYOUTS)}; else it is guessed"
    parser.add_argument("form", metavar="FORMAT", nargs="?", choices=[*LAYOUTS, None], help=known)
    parser.add_argument("src", metavar="SRC", help="a recording, or a folder that holds several")
    parser.add_argument("root", metavar="DIR", help="folder of the dataset")
    add_wishes(parser)


def add_wishes(parser):
    whole = dict(type=int, metavar="N")
    parser.add_argument("--name", metavar="ID", help="of the sample, where SRC is one recording")
    parser.add_argument("--start", **whole, default=0, help="first frame (default 0)")
    parser.add_argument("--stride", **whole, default=1, help="every N-th frame (default 1)")
    parser.add_argument("--max_frames", **whole, help="at most N of them (default all)")
    parser.add_argument("--size", type=camera_files.size_of, metavar="HxW", help="cut and resize")
    parser.add_argument("--prompt", default="", help="of every recording")
    parser.add_argument("--fps", type=float, help="of the pictures, where the layout does not say")
    pixels = dict(type=camera_files.lens, metavar="fx,fy,cx,cy", help="pixels of the pictures")
    parser.add_argument("--intrinsics", **pixels)
    parser.add_argument("--depth_scale", type=float, help="metres per count of the depth files")
    parser.add_argument("--matrices", choices=("w2c", "c2w"), help="of a file that leaves it open")
    parser.add_argument("--axes", choices=("opencv", "opengl"), help="the same")
    parser.add_argument("--from", dest="cameras", choices=FORMATS, help="format of the camera file")
    parser.add_argument("--pictures", metavar="PATH", help="where the layout holds none")
