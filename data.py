"""Datasets: samples, clips, encoded caches, and what a batch is made of.

    python data.py synth DIR --num N --num_frames T --height H --width W [--seed S] [--val M] ...
    python data.py import [FORMAT] SRC DIR [--stride N ...]                other people's recordings
    python data.py cameras IN OUT [--from F] [--to F] [--size HxW] ...     convert a camera file
    python data.py verify DIR [--fix-hints] [--exact] [--json]             check every clip
    python data.py view DIR [ID ...]                                       look at them
    python data.py encode DIR --wan_dir WAN --height H --width W --num_frames T
    torchrun --nproc_per_node=8 data.py encode ...                         clips are shared

Layout: DIR/metadata.json, DIR/ID/{video.mp4, depth/frame_%04d.npy, camera_params.txt},
DIR/cache/TxHxW-KEY/; optional DIR/ID/{points/frame_%04d.npy, moving.npz}: a mask (T, H, W), True on
what moves by itself.
Shapes: T = 4k + 1 frames of H x W pixels, f h w latent grid, L words.
Cameras: OpenCV (x right, y down, z forward), w2c 3x4, world = first camera of the clip; metres;
z-depth, 0 = invalid.  Intrinsics: fractions of width / height in files, pixels in tensors, centres
at +0.5.

The corridor: metadata -> sample (load_samples) -> clip (load_clip) -> cache (encode) -> batch
(CachedClips, collate) -> prepare -> the model."""

import argparse
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from encoders import MINIATURE, WanFolder, wan_family
from geometry import encode_pose, normalize_scene, plucker_rays, relative_to_first, unproject
from lib import caches, camera_files, files, importers, listing
from lib.camera_files import read_cameras, rigid
from lib.crop import Crop, check_video_size
from lib.depth import check_positive, depth_of_points, read_depth, unit_of, why_relative
from lib.distributed import check_device, gathered, say
from lib.guards import run_command
from lib.log import Passes
from lib.look import view
from lib.native import Cameras
from lib.pictures import as_pixels
from lib.rooms import VARIETY, Recipe, synth
from lib.verify import verify as check
from lib.windows import Encoding
from wan import start_condition

# --- Samples --------------------------------------------------------------------------------------
FIELDS = dict(
    video=("video_path", "video"),
    depth=("depth_dir", "depth"),
    points=("points_dir", "points"),
    camera=("camera_file", "camera_params"),
    moving=("moving_path", "moving"),
    prompt=("prompt", "caption", "note"),
)


class EmptySplit(ValueError):
    """A split without samples: no fault of a dataset that is trained on without validation."""


def load_samples(root, split=None, bad=None, inside=None):
    """List a dataset: metadata.json with samples and splits, a flat list, or its sample folders.

    bad      receives (id or "sample N", problem) of each bad entry; without it the first is raised
    inside   the folder that no link may leave: root, or "/" to follow links anywhere
    returns  dicts: id, split, prompt, fps, unit; video, camera, depth, points, moving: path, None
    Without splits the last tenth (at least one of several) is "val", the rest "train"."""
    root = Path(root)
    path, said = root / "metadata.json", listing.read_metadata(root, inside or root)
    entries, splits = said["samples"], said.get("splits")
    samples, names, wrong = read_samples(root, entries, path)  # one bad entry costs itself alone
    cut = len(names) - (max(1, len(names) // 10) if len(names) > 1 else 0)
    splits = splits or dict(train=names[:cut], val=names[cut:])  # a bad entry moves no other
    listed = {name: set(map(str, ids)) for name, ids in splits.items()}  # ids may be numbers
    everywhere = set().union(*listed.values())
    refused = {name for name, _ in wrong}  # named once, not once more as unlisted
    here = listed.get(split, everywhere if split is None else ())
    wrong = [(i, what) for i, what in wrong if i in here or i not in everywhere]
    for name in splits:
        for i in map(str, splits[name]):
            if i in samples and samples[i]["split"] is None:
                samples[i]["split"] = name
            elif i in samples:
                both = f"in split {samples.pop(i)['split']} and in split {name}"
                wrong.append((i, f"{path}: {i!r} is listed twice, {both}. Remove one"))
                refused.add(i)
            elif split in (None, name) and i not in refused:
                missing = f"split {name} lists {i!r}, which is not among the samples"
                wrong.append((i, f"{path}: {missing}. Add or remove it"))
    if wrong and bad is None:
        raise ValueError(wrong[0][1])
    if bad is not None:
        bad += wrong
    chosen = [s for s in samples.values() if split in (None, s["split"])]  # in the file's order
    if not chosen:
        counts = {k: len(v) for k, v in splits.items()}
        which = "" if split is None else f" in split {split!r}"
        found = f"no samples{which}; {len(samples)} found, splits {counts}"
        more = "".join(f"\n  {name}: {problem}" for name, problem in wrong[:5])
        raise EmptySplit(f"{root}: {found}. The layout is at the top of data.py.{more}")
    return chosen


def read_samples(root, entries, path):
    """Metadata entries -> samples by id; the names of all; (id, problem) pairs."""
    samples, names, wrong = {}, [], []
    for n, entry in enumerate(entries):
        name, where = str(entry.get("id", f"sample {n}"))[:200], f"{path}, sample {n}"
        try:
            sample = read_entry(root, entry, where)
            name = sample["id"]
            if samples.setdefault(name, sample) is not sample:
                cure = "Give each its own or remove one"
                raise ValueError(f"{where}: id {name!r} is there twice. {cure}")
        except ValueError as error:
            wrong.append((name, str(error)))
        names.append(name)
    for name, _ in wrong:
        samples.pop(name, None)  # there twice: which one caches and splits mean is unknown
    return samples, names, wrong


def read_entry(root, entry, where):
    """One metadata entry under our names."""
    sample = {f: next(filter(None, map(entry.get, names)), None) for f, names in FIELDS.items()}
    if not sample["video"] and not entry.get("cached"):
        raise ValueError(f"{where}: no video_path; found {', '.join(entry)[:200] or 'nothing'}")
    for field, value in dict(sample, id=entry.get("id")).items():
        check_text(field, value, where)
    check_positive("fps", entry.get("fps"), where)
    for field in ("video", "depth", "points", "camera", "moving"):
        if sample[field]:
            inside = os.path.normpath(sample[field])  # "a/../../b" leaves the folder too
            if os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
                leaves = f"{field} path {sample[field]!r} leaves the dataset folder"
                raise ValueError(f"{where}: {leaves}. Move it there")
            sample[field] = root / inside
    parts = sample["video"].relative_to(root).with_suffix("").parts if sample["video"] else ()
    sample["id"] = str(entry.get("id") or "_".join(parts).removesuffix("_video"))
    if not listing.is_id(sample["id"]):  # ID.0004 would be a window of ID
        wrong = "cannot be a file name of at most 200 bytes, or ends like a window's"
        raise ValueError(f"{where}: id {sample['id'][:60]!r} {wrong}")
    sample.update(prompt=sample["prompt"] or "", split=None, fps=entry.get("fps"))
    return dict(sample, unit=unit_of(entry, where))


def check_text(field, value, where):
    """A text of metadata.json; an id may also be a whole number."""
    known = (str, int) if field == "id" else (str,)
    if value is None:
        return
    text = str(value)
    if type(value) not in known or len(text) > 10000 or "\0" in text:
        found = f"{text[:60]!r} is a {type(value).__name__} of {len(text)} characters"
        raise ValueError(f"{where}: {field} {found}; wanted a text of at most 10,000")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{where}: {field} {ascii(value)[:60]} is no text (half of a UTF-16 pair)")


def checked_cameras(path):
    """read_cameras: rotations and translations, whose principal points lie in the picture."""
    files.check_lines(path)
    w2c, fractions = read_cameras(path)  # (T, 3, 4), (T, 4)
    try:
        w2c = rigid(w2c)
    except ValueError as error:
        hint = "`python data.py verify` names the usual mistakes"
        raise ValueError(f"{path}: {error} {hint}") from None
    camera_files.check_plausible(path, Cameras(w2c, "w2c", fractions))
    return w2c, fractions


# --- Clips ---------------------------------------------------------------------------------------
def check_window(sample, depth, size, fps):
    """What training could not use: depth of another shape, none in frame 0, no frame rate."""
    (h, w), (hv, wv), path = depth.shape[1:], size, sample["depth"] or sample["points"]
    if abs(h * wv / (w * hv) - 1) > 0.02:
        shapes = f"depth of {h}x{w} for a video of {hv}x{wv}"
        raise ValueError(f"{path}: {shapes}; wanted the same shape of picture")
    if not ((depth[0] > 1e-3) & (depth[0] <= files.FAR)).mean() > 0.001 or depth.max() > files.FAR:
        known = f"{(depth[0] > 1e-3).mean():.2%} of the window's first frame, which sets the scale,"
        cure = "Choose another start or remove the clip"
        raise ValueError(f"{path}: {known} has depth, up to {depth.max():.3g} m. {cure}")
    if not 0.1 <= fps <= 1000:
        cure = "give fps in the sample's entry of metadata.json"
        raise ValueError(f"{sample['video']}: {fps:g} frames a second; {cure}")


def check_counts(sample, video, cameras, last):
    """Video, cameras and depth must have the same frames, and enough of them."""
    depth = files.count_arrays(sample["depth"] or sample["points"])
    if min(video, cameras, depth) <= last:
        found = f"{video} video frames and {cameras} cameras found, {last + 1} wanted"
        cure = "lower num_frames, start or stride, or remove the clip"
        raise ValueError(f"clip {sample['id']}: {found}; {cure}")
    if len({video, cameras, depth}) > 1:
        found = f"{video} video frames, {cameras} cameras and {depth} depth maps"
        cure = "which belongs to which is unknown. Cut them to the same frames, or remove the clip"
        raise ValueError(f"clip {sample['id']}: {found}: {cure}")


def read_window(path, ids, crop):
    """Frames of a video, cropped (T, 3, H, W); one of the uncropped is in memory at a time."""
    wanted, frames = set(ids), enumerate(files.iterate_video(path, ids[-1] + 1))
    return torch.cat([crop.video(frame[None]) for t, frame in frames if t in wanted])


def load_clip(sample, height, width, num_frames, start=0, stride=1):
    """Read a window of a sample; frames, depth and intrinsics are cropped and resized together.

    returns  video       (3, T, H, W)  float32 in [-1, 1], antialiased
             depth       (T, H, W)     float32, metres, 0 = invalid, nearest pixel
             w2c         (T, 3, 4)     float64, metres, world = first camera of the window
             intrinsics  (T, 3, 3)     float64, pixels at (H, W);   prompt, id: str;   fps: float
             relative    "" or why its depth has no unit (see relative_depth)
             moving      (T, H, W)     bool, True on what moves by itself; where there is a mask"""
    if num_frames % 4 != 1:
        near = num_frames // 4 * 4 + 1
        raise ValueError(f"num_frames = {num_frames}; wanted 4k + 1, for instance {near}")
    if not (sample["video"] and sample["camera"] and (sample["depth"] or sample["points"])):
        found = f"{[f for f in FIELDS if sample[f]]} (--cache_only renderings hold none)"
        wanted = "a video, cameras and depth or points are needed"
        raise ValueError(f"clip {sample['id']}: {wanted}; found {found}")
    ids = range(start, start + stride * (num_frames - 1) + 1, stride)  # frames of the window
    w2c, fractions = checked_cameras(sample["camera"])  # of the whole clip
    count, size, fps, _ = files.video_facts(sample["video"])  # decodes it: damage anywhere is seen
    check_counts(sample, count, len(w2c), ids[-1])
    w2c, crop = torch.from_numpy(w2c[ids]), Crop(size, (height, width))  # one cut for all
    video = read_window(sample["video"], ids, crop)  # (T, 3, H, W)
    if sample["depth"]:
        depth = read_depth(sample["depth"], sample["unit"], ids)  # (T, h, w), its own resolution
    else:
        points = files.read_arrays(sample["points"], ids)
        depth = depth_of_points(points, w2c.numpy(), sample["points"]).astype(np.float32)
    fps = float(sample["fps"] or fps)  # metadata.json knows better than the file
    check_window(sample, depth, size, fps)
    clip = {}
    if sample["moving"]:
        clip["moving"] = crop.maps(files.read_arrays(sample["moving"], ids, mask=True) > 0)
    unitless = sample["depth"] and not sample["unit"].scale and why_relative(sample["depth"])
    return dict(
        clip,
        video=video.permute(1, 0, 2, 3) / 127.5 - 1,
        w2c=relative_to_first(w2c),  # fp64: the world becomes the first camera
        depth=crop.maps(depth),
        intrinsics=crop.intrinsics(fractions[ids]),
        prompt=sample["prompt"],
        id=sample["id"],
        fps=fps / stride,
        relative=unitless or "",
    )


# --- Encoding -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """One window to encode."""

    sample: dict
    key: dict  # everything that changes the result
    path: Path  # of the cache file

    def part(self, what):
        """Where a pass keeps its result until the clip is whole: a killed run goes on there."""
        return self.path.parent / ".parts" / f"{self.key['id']}.{what}.safetensors"

    def load(self, num_frames, stride):
        key = self.key
        return load_clip(self.sample, key["height"], key["width"], num_frames, key["start"], stride)


def plan_clip(sample, folder, same, how, inside):
    """Jobs of one clip's windows; same: what the keys of all clips share."""
    listing.check_sample(inside, sample)
    stamp = [sample["fps"], *sample["unit"].stamp()]  # whatever changes the result
    for path in (p for p in sample.values() if isinstance(p, Path)):
        stats = files.stats_of(path)
        newest = max([s.st_mtime_ns for s in stats], default=0)
        stamp.append(f"{sum(s.st_size for s in stats)}:{newest}")
    shared = dict(same, sample=sample["id"], prompt=sample["prompt"])
    shared["stamp"] = " ".join(map(str, stamp))
    jobs = []
    for start, stride in how.places(sample, same["num_frames"]):
        # A clip with one window keeps its name.
        name = sample["id"] if how.whole() else f"{sample['id']}.{start:04d}"
        key = dict(shared, id=name, start=start, stride=stride)
        jobs.append(Job(sample, key, folder / f"{name}.safetensors"))
    return jobs


def encode_text(job, text):
    path = job.part("text")
    if not caches.fits(path, job.key):
        caches.save_tensors(path, dict(text=text([job.key["prompt"]])[0].bfloat16().cpu()), job.key)


def encode_image(job, tower):
    path = job.part("clip")
    if not caches.fits(path, job.key):
        tokens = tower(job.load(1, 1)["video"][None, :, 0])[0].bfloat16().cpu()  # (257, 1280)
        caches.save_tensors(path, dict(clip=tokens), job.key)


def encode_video(job, vae, pad):
    if caches.fits(job.path, job.key):  # of a second encode beside this one, which took the parts
        return
    parts, tensors = [job.part("text"), *filter(Path.exists, [job.part("clip")])], {}
    for path in parts:
        if not caches.is_whole(path):
            path.unlink(missing_ok=True)
            raise ValueError(f"{path}: is gone, or was damaged and is deleted; start encode again")
        tensors.update(caches.read_values(path)[0])
    clip = job.load(job.key["num_frames"], job.key["stride"])  # decoded once for all of it
    if clip["relative"]:
        what = "It trains the depth head alone, with the ssi loss, in stage 1"
        cure = "give depth_scale in metadata.json if it has a unit. Near has to be small there"
        say(f"{clip['id']}: {clip['relative']}: not metric. {what}; {cure}", of_all=True)
    kind = "relative" if clip["relative"] else "metric"  # what train.py asks the caches
    meta = dict(job.key, split=job.sample["split"], fps=clip["fps"], depth=kind)
    caches.save_clip(job.path, clip, vae, pad, tensors, meta)
    for path in parts:
        path.unlink(missing_ok=True)


def encode(root, height, width, num_frames, how=None):
    """Encode windows of every clip, one pass per encoder.

    returns  how many clips failed on any rank; 0 with skip_bad as long as one is left
    Under torchrun every rank takes its share of the clips.  Finished files that fit are kept."""
    size, how = (num_frames, height, width), how or Encoding()
    check_video_size(size)
    # by torchrun
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    encoders = WanFolder(how.wan_dir, check_device(how.device))
    folder = Path(root, "cache", f"{num_frames}x{height}x{width}-{encoders.fingerprint}")
    same = dict(num_frames=num_frames, height=height, width=width)
    same["fingerprint"] = encoders.fingerprint  # other encoder files, other latents
    if how.end_image:  # caches that hold more than is asked for stay
        same["end_image"] = True
    inside, bad, passes = "/" if how.follow_links else root, [], Passes(rank > 0)
    for path in (folder, folder / ".parts"):
        listing.check_inside(inside, path)  # nothing is written through a link that leads out
    samples = load_samples(root, how.split, bad, inside)[rank::world]  # every world-th clip
    for name, problem in bad if rank == 0 else ():
        passes.fail(name, problem)
    jobs = []  # one for each window
    passes.each(samples, "plan", lambda s: jobs.extend(plan_clip(s, folder, same, how, inside)))
    left = [job for job in jobs if not caches.fits(job.path, job.key)]  # the rest is done already
    kept, empty = len(jobs) - len(left), folder / f"{listing.EMPTY_TEXT}.safetensors"
    todo = {job.sample["id"]: job.sample for job in left}  # each clip's files are looked at once
    looked_at = partial(listing.check_sample, inside)
    passes.each(todo.values(), "check", lambda s: listing.check_sums(root, looked_at(s)))
    if left or not caches.is_whole(empty):
        text = encoders.load_text()
        if not caches.is_whole(empty):
            nothing = dict(text=text([""])[0].bfloat16().cpu())
            caches.save_tensors(empty, nothing, dict(fingerprint=encoders.fingerprint))
        left = passes.each(left, "text", lambda job: encode_text(job, text))
        del text  # freed before the next encoder is loaded
    if left and encoders.load_image:
        tower = encoders.load_image()
        left = passes.each(left, "image", lambda job: encode_image(job, tower))
        del tower
    if left:
        vae, pad = encoders.load_vae(), encoders.start_pad
        left = passes.each(left, "video", lambda job: encode_video(job, vae, pad))
    skipped = ", ".join(passes.failed) or "none"
    say(f"{folder}: {len(left)} encoded, {kept} kept, skipped: {skipped}", of_all=True)
    # torchrun stops the others when one fails: wait for all of them.
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    bad, good = map(sum, zip(*gathered((len(passes.failed), len(left) + kept))))
    with suppress(OSError):  # failed clips still have parts there; no other rank will make any
        (folder / ".parts").rmdir()
    return 0 if how.skip_bad and good else bad


# --- Training reads caches -----------------------------------------------------------------------
class CachedClips(torch.utils.data.Dataset):
    """The cached windows of a split: tensors of save_clip as stored (metres), and id, prompt, fps;
    relative: its depth has no unit.

    Every file is checked here, so that a run meets no bad one half-way: ValueError lists them, or
    skip_bad leaves them out, on every rank alike.  One that is damaged later stops the run, or with
    skip_bad gives its place to the next: batches depend on seed, step and files alone."""

    def __init__(self, root, split, size, wan_dir="", skip_bad=False, follow_links=False):
        """size: (height, width, num_frames)."""
        bad, inside = [], "/" if follow_links else root
        # Without a Wan folder, for a random video branch, any family's caches will do.
        family = wan_family(wan_dir) if wan_dir else ""
        self.skip_bad, self.wan_dir = skip_bad, wan_dir
        self.samples = {s["id"]: s for s in load_samples(root, split, bad, inside)}  # id -> sample
        shape = (size[2], *size[:2])  # T, H, W: as the folder is called
        name = "x".join(map(str, shape))
        folders = sorted(Path(root).glob(f"cache/{name}-{family or '*'}-*"))
        if len(folders) > 1:
            names, cure = ", ".join(f.name for f in folders), "delete all but one"
            who = f"{wan_dir or 'no Wan folder'}; they are of other encoder files"
            raise ValueError(f"{root}: {names} all fit {who}: {cure}")
        cure = f"python data.py encode {root} --wan_dir {wan_dir or 'FOLDER'} "
        cure += f"--height {size[0]} --width {size[1]} --num_frames {size[2]}"
        if not any(s["video"] for s in self.samples.values()):
            cure = f"rm -r {root}, and render it again"
        good, stamps = {}, {}
        if folders:
            listing.check_inside(inside, folders[0])
            good, stamps, wrong = caches.check_folder(folders[0], self.samples, shape, inside)
            bad += wrong
        if not good and (not folders or all("not encoded" in problem for _, problem in bad)):
            there = ", ".join(sorted(f.name for f in Path(root).glob("cache/*"))) or "none"
            lacks = f"split {split} is not encoded at {name} for {family or 'any model'}"
            raise ValueError(f"{root}: {lacks} (caches there: {there}). Run\n  {cure}")
        what = f"{root}: {len(bad)} of {len(good) + len(bad)} {split} clips"
        self.refuse(what, bad, len(good), cure)
        self.files = [folders[0] / f"{name}.safetensors" for name in good]
        self.metadata, self.stamps = good, stamps
        self.empty_text = folders[0] / f"{listing.EMPTY_TEXT}.safetensors"
        if not caches.is_whole(self.empty_text):
            raise ValueError(f"{self.empty_text}: missing or damaged. Run\n  {cure}")

    def refuse(self, what, bad, good, cure):
        """Bad clips end the run, or are left out with a line as long as they are fewer."""
        lines = [f"  {name}: {problem}" for name, problem in bad]
        if bad and (not self.skip_bad or good < len(bad)):
            more = [f"  and {len(bad) - 5} more"] if len(bad) > 5 else []
            way_out = "or leave them out with --skip_bad=True"
            if self.skip_bad:
                way_out = "skip_bad leaves out the lesser part only"
            cures = [f"Delete what is damaged, run\n  {cure}", way_out]
            raise ValueError("\n".join([f"{what} cannot be trained on", *lines[:5], *more, *cures]))
        if bad:
            say("\n".join([f"{what} are left out", *lines]))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        for tries in range(len(self.files)):
            path = self.files[(i + tries) % len(self.files)]
            try:
                tensors, meta = caches.read_again(path, self.stamps[path.stem])  # mapped
                relative = torch.tensor(meta.get("depth") == "relative")
                words = dict(id=meta["id"], prompt=meta["prompt"], fps=float(meta["fps"]))
                return dict(tensors, **words, relative=relative)
            except Exception as error:  # of whatever kind: a loader's worker must name the clip
                said = f"clip {path.stem}: damaged since the start of the run"
                if not self.skip_bad or tries + 1 == len(self.files):
                    raise ValueError(f"{said}: {error!r}") from error
                say(f"{said}, the next one in its place: {error!r}", of_all=True)

    def sample_of(self, i):
        return self.samples[self.metadata[self.files[i].stem]["sample"]]

    def frames(self, i):
        """Pictures of a clip, uint8 (T, H, W, 3): its video cropped and resized, or its latents
        decoded; None where the cache has outlived the video."""
        meta, sample = self.metadata[self.files[i].stem], self.sample_of(i)
        size = (int(meta[k]) for k in ("height", "width", "num_frames", "start", "stride"))
        try:
            if sample["video"]:
                video = load_clip(sample, *size)["video"]
            else:
                vae = WanFolder(self.wan_dir, "cpu").load_vae()
                video = vae.decode(self[i]["latents"][None].float())[0]
        except (ValueError, OSError) as error:  # training needs the caches alone
            say(f"warning: a picture without its frames: {error}", of_all=True)
            return None
        return as_pixels(video)

    def have_end_images(self):
        """Whether the end image of every clip is encoded."""
        return all("end_image" in meta for meta in self.metadata.values())

    def count_relative(self):
        """How many of the clips have depth without a unit."""
        return sum(meta.get("depth") == "relative" for meta in self.metadata.values())


def collate(items):
    """Stack what all clips of a batch have; text stays a list of (L, dim), as do the words."""
    # Masks of movers are in some clips only: then the batch goes without.
    columns = {k: [item[k] for item in items] for k in items[0] if all(k in item for item in items)}
    # In a worker straight into the shared memory that the batch travels in.
    stack = torch.utils.data.default_collate
    lists = ("text", "id", "prompt", "fps")
    return {k: column if k in lists else stack(column) for k, column in columns.items()}


def prepare(batch, in_dim, dev, rays=plucker_rays):
    """Loader batch -> float32 on the device, in scene units: the last step before the model.

    rays     the model's own kind of ray map (FantasyWorld.rays)
    returns  the batch with rays, pose encodings, points, mask and start condition made there; y_end
             is the condition of start and end image, None where no end image is encoded"""

    def send(x):  # bfloat16 is widened there: half of the bytes to move
        x = x.to(dev, non_blocking=True)  # from pinned memory: no wait
        return x if x.dtype == torch.bool else x.float()

    # Depth without a unit is rare, and costs a second pass of losses.
    batch = {k: v for k, v in batch.items() if k != "relative" or v.any()}
    b = {k: send(v) if torch.is_tensor(v) else v for k, v in batch.items()}
    b["text"] = [send(text) for text in batch["text"]]
    frames, ends = b["latents"].shape[2], "end_latents" in b
    K, size = b["intrinsics"], b["depth"].shape[-2:]
    mask = torch.isfinite(b["depth"]) & (b["depth"] > 1e-3)  # (B, T, H, W) known depth
    depth, w2c, scale = normalize_scene(b["depth"], b["w2c"], K, mask)  # scene units
    return dict(
        b,
        depth=depth,
        w2c=w2c,
        scale=scale,
        mask=mask,
        points=unproject(depth, w2c, K),
        pose_enc=encode_pose(w2c, K, size),
        plucker=rays(w2c, K, size),
        y=start_condition(b["start_latents"], in_dim, frames),
        y_end=start_condition(b["end_latents"], in_dim, frames, True) if ends else None,
    )


# --- Commands ------------------------------------------------------------------------------------
def verify(root, split=None, fix_hints=False, as_json=False, exact=False, follow_links=False):
    """Check every sample of a dataset and print a table (or JSON); returns how many failed."""
    bad, inside = [], "/" if follow_links else root
    samples = load_samples(root, split, bad, inside)
    return check(root, samples, bad, inside, fix_hints=fix_hints, as_json=as_json, exact=exact)


def look_at(root, ids, out, size, num_frames, follow_links=False):
    """`data.py view`: up to num_frames frames of each sample, evenly spread over it."""
    if any(side % 2 for side in size or ()):
        raise ValueError(f"--size {size[0]}x{size[1]}: wanted even sides, for the page's video")

    def load(sample):
        video = sample["video"]  # None: load_clip says what is missing
        frames, own, *_ = files.video_facts(video) if video else (5, (16, 16))
        count = max(5, (min(num_frames, frames) - 1) // 4 * 4 + 1)  # 4k + 1
        # About 100,000 pixels of the video's shape, in whole latents of the DiT.
        h, w = size or own
        shape = size or [max(16, round(x * (1e5 / h / w) ** 0.5 / 16) * 16) for x in (h, w)]
        return load_clip(sample, *shape, count, stride=max(1, (frames - 1) // (count - 1)))

    samples = load_samples(root, bad=[], inside="/" if follow_links else root)  # the good ones
    view(samples, load, out or Path(root, "view"), ids)


def import_recordings(form, src, root, **wishes):
    """Import, let the doctor look at what has depth -> how many failed."""
    names, failed = importers.run(src, root, form, **wishes)
    made = load_samples(root) if names else []  # what has no depth yet cannot be checked
    made = [s for s in made if s["id"] in names and s["depth"]]
    failed += check(root, made, [], root, fix_hints=True) if made else 0
    if made:
        print(f"look at them: python data.py view {root} {' '.join(s['id'] for s in made[:3])}")
    return failed


def flag(command, name, text):
    """--name, --name True, --name False; also with hyphens."""
    how = dict(type=["False", "True"].index, nargs="?", const=1, default=0, metavar="True|False")
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    command.add_argument(*names, help=f"{text} (default False)", **how)


def size_options(command):
    side = "pixels, a multiple of 16; needed"
    for name, text in dict(num_frames="4k + 1; needed", height=side, width=side).items():
        command.add_argument(f"--{name}", type=int, required=True, help=text)


def make_parser():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("synth", help="render a dataset")
    p.add_argument("root", metavar="DIR", help="folder of the dataset, a new one")
    p.add_argument("--variety", choices=VARIETY, default="full", help="of rooms (default full)")
    p.add_argument("--num", type=int, required=True, help="training clips; needed")
    p.add_argument("--val", type=int, default=0, help="validation clips, other rooms (default 0)")
    p.add_argument("--seed", type=int, default=0, help="of the first room (default 0)")
    p.add_argument("--workers", type=int, default=2, help="processes that render (default 2)")
    size_options(p)
    flag(p, "cache_only", "no videos")
    p.add_argument("--wan_dir", default=MINIATURE, help="encodes --cache_only (default tiny/wan)")
    flag(p, "moving", "one object moves by itself, with its mask")
    importers.add_arguments(commands.add_parser("import", help="recordings of other layouts"))
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("root", metavar="DIR", help="folder of the dataset")
    flag(shared, "follow_links", "links may lead out of the dataset")
    with_root = partial(commands.add_parser, parents=[shared])
    p = with_root("encode", help="encode every clip once: training loads no encoder")
    p.add_argument("--split", help="train, val or another one of metadata.json (default all)")
    p.add_argument("--wan_dir", required=True, help="folder of a Wan release, or tiny/wan; needed")
    p.add_argument("--device", default="auto", help="cpu, cuda ... (default GPU, if any)")
    size_options(p)
    p.add_argument("--start", type=int, default=0, help="first frame of a clip (default 0)")
    p.add_argument("--windows", type=int, default=1, help="of a clip, evenly spread (default 1)")
    p.add_argument("--window_seed", type=int, default=-1, help="0 or more: at random instead")
    p.add_argument("--stride", default="1", help="frames; of 1,2,4 each draws one (default 1)")
    flag(p, "end_image", "also the last frame as an end image, of families of 36 inputs")
    flag(p, "skip_bad", "exit with 0 although clips failed")
    p = with_root("verify", help="check every clip before any GPU hour is spent")
    p.add_argument("--split", help="train, val or another one of metadata.json (default all)")
    flag(p, "json", "print the report as JSON")
    flag(p, "fix_hints", "name cures")
    flag(p, "exact", "for exact renderings")
    p = with_root("view", help="pictures of the ground truth, as the model gets it")
    p.add_argument("ids", metavar="ID", nargs="*", help="samples that get a page of their own")
    p.add_argument("--out", help="folder of the pages (default DIR/view)")
    p.add_argument("--size", type=camera_files.size_of, metavar="HxW", help="else the video's")
    p.add_argument("--num_frames", type=int, default=21, help="at most, of a page (default 21)")
    camera_files.add_arguments(commands.add_parser("cameras", help="convert a camera file"))
    return parser


def command():
    given = vars(make_parser().parse_args())  # bash leaves the ~ of --wan_dir=~/wan to us
    args = {k: os.path.expanduser(v) if isinstance(v, str) else v for k, v in given.items()}
    if empty := [key for key, value in args.items() if value == "" and key != "prompt"]:
        told = dict(root="DIR", src="SRC", source="IN", target="OUT").get(empty[0], f"--{empty[0]}")
        raise ValueError(f"{told} is empty; wanted a path or a name")
    name = args.pop("command")
    failed = 0  # clips, of those commands that go on without them
    if name == "synth":
        synth(args.pop("root"), workers=args.pop("workers"), recipe=Recipe(**args))
    elif name == "encode":
        size = (args.pop("root"), args.pop("height"), args.pop("width"), args.pop("num_frames"))
        failed = encode(*size, Encoding(**args))
    elif name == "verify":
        failed = verify(args.pop("root"), as_json=args.pop("json"), **args)
    elif name in ("view", "import"):
        failed = dict(view=look_at, **{"import": import_recordings})[name](**args)
    else:
        camera_files.convert(SimpleNamespace(**args))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command("data.py", command)
