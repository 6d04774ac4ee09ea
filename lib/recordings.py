"""A recording that was found but not read, and the pieces that its layout (lib/layouts.py) is read
with: files in order, intrinsics of any kind, what belongs together."""

import itertools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lib import camera_files, files
from lib.crop import focal_and_centre, fractions, stretched
from lib.native import Cameras, numbers_of, read_rows


@dataclass
class Recording:
    """N frames of the same instants, found but not read."""

    frames: list  # N pictures' paths; or numbers of a video's frames
    cameras: Cameras  # of N frames; intrinsics are fractions of the pictures
    depth: list | None  # of N: arrays' paths, or what `read` takes
    sure: list = ()  # of N: maps of how sure the depth is, or None for one
    unit: dict = field(default_factory=dict)  # depth_scale, depth_invalid, depth_max
    depth_lens: object = None  # (4,) fractions, where the depth camera is not the pictures'
    fps: float = 30.0
    axes: str = "opencv"
    notes: list = field(default_factory=list)  # sentences: what was left out or taken for granted
    turned: bool = True  # pictures as their EXIF says; the cameras may be of the pixels as they lie
    video: object = None  # a file or folder of pictures, or an array (T, H, W, 3)
    read: object = None  # one of depth -> (h, w)
    least: float = 0.0  # of the values of `sure` that is believed

    def pictures(self):
        """uint8 (H, W, 3) of every frame."""
        if self.video is None:
            return files.read_stills(self.frames, self.turned)
        wanted, file = set(self.frames), isinstance(self.video, Path)
        shown = enumerate(files.iterate_video(self.video) if file else self.video)
        return (frame for n, frame in shown if n in wanted)

    def maps(self):
        """Depth of every frame as its file has it, (h, w) but for sides of 1; 0 where unsure."""
        raw = map(self.read, self.depth) if self.read else files.read_each(self.depth)
        sure = files.read_each([*filter(None, self.sure)], mask=True)  # of 8 bits, too
        for depth, path in itertools.zip_longest(raw, self.sure):
            yield believed(depth, next(sure), self.least) if path else depth


def believed(depth, sure, least):
    """Depth (h, w), 0 where the map of its confidence is False or below what is believed."""
    depth, sure = np.squeeze(depth), np.squeeze(sure)
    if sure.ndim != 2:
        raise ValueError(f"confidence of shape {sure.shape}; wanted one map (h, w) a frame")
    sure = sure if sure.dtype == bool else sure >= least
    return np.where(stretched(sure[None], depth.shape)[0], depth, depth.dtype.type(0))


# --- Pieces ---------------------------------------------------------------------------------------
def in_counts(maps):
    """Whether files of depth hold whole numbers, as the first does; floats are metres."""
    first = next(iter(maps), None)
    return first is not None and files.read_array(first, False, True)[1].kind in "iu"


def by_number(paths):
    """Number of a frame -> its file."""
    numbers = numbers_of(paths)
    found = dict(zip(numbers, paths))
    for number, path in zip(numbers, paths):
        if (other := found[number]) != path:
            cure = f"has the number of {other.name}; leave one file a frame there"
            raise ValueError(f"{path}: {cure}")
    return found


def matrix_of(path):
    """A text of 3x3, 3x4 or 4x4 numbers, 9 a frame, or fx fy cx cy -> fx fy cx cy in pixels."""
    m = read_rows(path)
    if m.shape == (1, 4):
        return m[0]
    if m.shape[1] == 9:
        return focal_and_centre(m.reshape(-1, 3, 3))
    if m.size not in (9, 12, 16):
        raise ValueError(f"{path}: {m.size} numbers; wanted a 3x3 or 4x4 matrix of intrinsics")
    return focal_and_centre(m.reshape(4 if m.size == 16 else 3, -1))


def lens_file(path, size):
    """(4,) fractions of pictures of a size (H, W), and what the file says of depth."""
    if path.suffix in (".txt", ".csv"):
        return fractions(matrix_of(path), size), {}
    said = files.read_json(path)
    if "camera" in said:  # NICE-SLAM's Replica; the first pixel's centre is at 0
        c = said["camera"]
        pixels = c["fx"], c["fy"], c["cx"] + 0.5, c["cy"] + 0.5
        return fractions(pixels, (c["h"], c["w"])), dict(depth_scale=1 / c["scale"])
    if matrix := said.get("intrinsic_matrix", said.get("K")):  # Open3D; WildRGB-D
        k = np.reshape(matrix, (3, 3))
        k = k.T if k[2, :2].any() else k  # column by column
        half = 0.5 if "intrinsic_matrix" in said else 0  # Open3D: the first pixel's centre is at 0
        h, w = (said.get(long, said.get(long[0])) for long in ("height", "width"))
        size = (h, w) if h and w else size
        return fractions(focal_and_centre(k) + [0, 0, half, half], size), {}
    raise ValueError(f"{path}: no intrinsics among {', '.join(said)[:100]}")


def pick(cameras, rows):
    """Cameras of some rows."""
    take = lambda items: None if items is None else [items[r] for r in rows]  # noqa: E731
    k, matrices = take(cameras.intrinsics), camera_files.as_matrices(take(cameras.matrices))
    parts = dict(names=take(cameras.names), lenses=take(cameras.lenses))
    return replace(cameras, matrices=matrices[:, :3], intrinsics=k and np.array(k), **parts)


def some(items, count=6):
    return ", ".join(map(str, items[:count])) + (" ..." if len(items) > count else "")


def assemble(kinds, cameras, notes=(), pixels=False, **how):
    """Recording of the frames that all kinds have, in the order of the first: picture, pose (frames
    of the cameras); depth, confidence, intrinsics or None.  pixels: those are of the pictures."""
    kinds = {kind: items for kind, items in kinds.items() if items is not None}
    kinds["pose"] = {frame: row for row, frame in enumerate(kinds["pose"])}
    notes, first = [*notes], next(iter(kinds.values()))
    for name, items in kinds.items():
        if lone := [i for i in first if i not in items]:
            notes.append(f"{len(lone)} frames without {name} left out: {some(lone)}")
    ids = [i for i in first if all(i in items for items in kinds.values())]
    if not ids:
        seen = [f"{name} {some(list(items), 2) or 'none'}" for name, items in kinds.items()]
        cure = "" if kinds.get("picture", True) else "; give --pictures FOLDER"
        raise ValueError(f"no frame has all of {'; '.join(seen)}{cure}")
    found = {kind: [items[i] for i in ids] for kind, items in kinds.items()}
    cameras = pick(cameras, found["pose"])
    k = found.get("intrinsics", cameras.intrinsics)
    k = fractions(k, files.read_video(found["picture"][0], 1)[1][0]) if pixels else k
    cameras = replace(cameras, intrinsics=k)
    maps = found.get("depth"), found.get("confidence", ())
    return Recording(found["picture"], cameras, *maps, notes=notes, **how)


def find_lens(cameras, src, size, wishes, known=None, looked=""):
    """Cameras of pictures of a size (H, W) with intrinsics: as asked for, of a file, or by the size
    where no file may know better; what the file says of depth; notes."""
    telling = re.compile(r"(intrin|calib).*\.(txt|json|ya?ml|xml)$", re.I)
    unread = [f.name for f in src.iterdir() if telling.search(f.name)]
    paths = (folder / name for name in looked.split() for folder in (src, src.parent))
    path = None if wishes.intrinsics else next(filter(Path.is_file, paths), None)
    unit, notes, count = {}, [], len(cameras.matrices)
    if path:
        k, unit = lens_file(path, size)
        if k.shape not in ((4,), (1, 4), (count, 4)):
            raise ValueError(f"{path}: {len(k)} lines for {count} poses; wanted one for each")
    elif not wishes.intrinsics and (unread or not known):
        why = f"{unread[0]} is of no known layout" if unread else "no intrinsics"
        also = f" ({', '.join(looked.split())} looked for)" if looked else ""
        cure = "give --intrinsics fx,fy,cx,cy in pixels of the pictures"
        raise ValueError(f"{src}: {why}; {cure}{also}")
    else:
        k = fractions(wishes.intrinsics or known(*size), size)
        if not wishes.intrinsics:
            notes = [f"a focal length of {k[0] * size[1]:.4g} px is taken for granted"]
    return replace(cameras, intrinsics=np.broadcast_to(k, (count, 4))), unit, notes
