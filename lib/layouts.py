"""Where other people's recordings keep their pictures, depth and cameras.

LAYOUTS has for each how it is recognised, and open(key, wishes) -> Recording: nothing big is read.
Sources: each dataset's or tool's own loader or writer, read in November 2026."""

import zipfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from lib import camera_files, files, native, recordings
from lib.camera_files import FORMATS
from lib.crop import fractions
from lib.native import Cameras, numbers_of, pose_files, quaternions, read_rows
from lib.rasters import read_raster
from lib.recordings import Recording, assemble, believed, by_number, find_lens, some

# --- Folders of pictures, folders of depth, and poses ---------------------------------------------
MILLIMETRES = dict(depth_scale=0.001)
# Maps of how sure the depth is, and the least that is believed: phones write 0 for low (others may
# write shares of 1), CUT3R, VGGT and Depth-Anything-3 1 + e^x, MonST3R the logarithm of that; 1.1
# is MonST3R's own limit, 1.05 that of Depth-Anything-3.
PHONES, NETS, LOGS = ("confidence/*", 1e-6), ("conf/*", 1.1), ("conf_*.npy", np.log(1.1))


@dataclass(frozen=True)
class Folder:
    """A layout by glob patterns: words, of which the first that finds something is taken."""

    pictures: str  # files, or one video
    depth: str
    poses: str  # FILE or FOLDER:FORMAT of lib/camera_files; without :FORMAT it is guessed
    unit: dict = field(default_factory=lambda: MILLIMETRES)
    lens: str = ""  # files of intrinsics, here or in the folder above
    known: object = None  # (h, w) -> fx fy cx cy, where no such file is
    depth_lens: str = ""  # file of the depth camera's own
    fps: float = 30.0
    read_depth: object = None  # path -> (h, w), where files.read_array will not do
    mark: str = ""  # in the text of the poses, or ending of a folder's, where names are anybody's
    better: object = None  # a Folder that is read instead where all of its parts are there
    confidence: tuple = PHONES  # maps beside those of depth, the least that is believed

    def parts(self, src):
        """What is there: files of pictures and of depth, (path, format) of the poses or None."""
        if self.better and all((found := self.better.parts(src)).values()):
            return found
        kinds = (self.pictures, files.STILLS), (self.depth, files.MAPS)
        listed = lambda p, ends: files.listed(src, (*ends, p[-4:]), p)  # noqa: E731  (.mp4 too)
        found = ([listed(p, ends) for p in words.split()] for words, ends in kinds)
        pictures, depth = (next(filter(None, lists), []) for lists in found)
        places = [word.partition(":")[::2] for word in self.poses.split()]
        ends = lambda p: any(f.name.endswith(self.mark) for f in pose_files(p))  # noqa: E731
        holds = lambda p: p.is_file() and self.mark.encode() in p.read_bytes()  # noqa: E731
        there = lambda p, f: ends(p) if f == "folder" else holds(p)  # noqa: E731
        poses = next(((src / p, f) for p, f in places if there(src / p, f)), None)
        texts = " ".join(p + "/*" * (f == "folder") for p, f in places)
        words = f"pictures ({self.pictures})", f"depth ({self.depth})", f"poses ({texts})"
        return dict(zip(words, (pictures, depth, poses)))

    def open(self, src, wishes):
        pictures, depth, (path, form) = self.parts(src).values()
        first, video, depth = pictures[0], None, by_number(depth)
        count, size, fps, pixel = files.video_facts(first)
        if first.suffix.lower() in files.STILLS:
            pictures, fps = by_number(pictures), None
        else:
            video, pictures = first, {n: n for n in range(count)}
        form = wishes.cameras or form or camera_files.guess(path)
        cameras = naming(path, FORMATS[form].read, path, size, wishes.matrices or "c2w")
        if video and len(cameras.names or ()) == len(pictures):  # numbers need not begin at 0
            pictures = dict(zip(cameras.names, pictures))
        pose = dict.fromkeys(cameras.names or pictures)
        if len(cameras.matrices) != len(pose):
            found = f"{len(cameras.matrices)} poses for {len(pose)} pictures"
            raise ValueError(f"{path}: {found}: which belongs to which is unknown")
        told, notes, how = {}, [], dict(axes=FORMATS[form].axes, video=video)
        if wishes.intrinsics or self.known or cameras.intrinsics is None:
            cameras, told, notes = find_lens(cameras, src, size, wishes, self.known, self.lens)
        if abs(pixel - 1) > 0.01:
            notes.append(f"pixels {pixel:.3g} times as wide as high are taken as they lie")
        unit, counts = self.unit | told, recordings.in_counts(depth.values())
        how["unit"] = {k: v for k, v in unit.items() if counts or k == "depth_max"}
        if (src / self.depth_lens).is_file():
            shape = files.read_array(next(iter(depth.values())), read=False)[0]
            how["depth_lens"] = fractions(recordings.matrix_of(src / self.depth_lens), shape)
        pattern, how["least"] = self.confidence
        sure = by_number(files.listed(src, files.MAPS, pattern))
        notes += ["unsure depth is left out"] * bool(sure)
        kinds = dict(picture=pictures, depth=depth, pose=pose)
        kinds["confidence"] = {n: sure.get(n) for n in depth} if sure else None
        how["read"] = self.read_depth if counts else None
        return assemble(kinds, cameras, notes, fps=fps or cameras.fps or self.fps, **how)


def floats_in_rgba(path):
    """Depth of TartanAir V2: the bytes of a single float in blue, green, red and alpha."""
    with files.ffmpeg(path, "-frames:v", "1", "-pix_fmt", "bgra", "-f", "rawvideo") as (stream, _):
        data = stream.read()
    return np.frombuffer(data, "<f4").reshape(files.png_header(path, True))


def centred(f, of=640):
    """Intrinsics of a focal length in pixels of a width, in pictures of any size."""
    return lambda h, w: (f * w / of, f * w / of, w / 2, h / 2)


PLAIN = "color/* rgb/* images/* image/* results/frame* rgb.mp4 video.mp4"
FOLDERS = dict(
    sevenscenes=Folder(  # also tsdf-fusion's
        "frame-*.color.*",
        "frame-*.depth.proj.* frame-*.depth.*",  # under the colours' pixels, or not
        ".:folder",
        unit=dict(MILLIMETRES, depth_invalid=65535),
        lens="camera-intrinsics.txt",
        known=centred(585),
    ),
    scannet=Folder(
        "color/*",
        "depth/*.png",
        "pose:folder",
        lens="intrinsic/intrinsic_color.txt",
        depth_lens="intrinsic/intrinsic_depth.txt",
    ),
    tartanair=Folder(
        "image_left/* image_lcam_front/*",
        "depth_left/* depth_lcam_front/*",
        "pose_left.txt:tartanair pose_lcam_front.txt:tartanair",
        unit=dict(depth_max=999),  # sky is at 1000 and beyond
        known=centred(320),
        fps=10.0,
        read_depth=floats_in_rgba,
    ),
    wildrgbd=Folder("rgb/*", "depth/*", "cam_poses.txt:matrices", lens="metadata metadata.json"),
    redwood=Folder(  # Open3D's reconstruction system
        PLAIN,
        "depth/*",
        "trajectory.log:log traj.log:log",
        lens="camera_intrinsic.json camera_primesense.json intrinsic.json",
        known=centred(525),
    ),
    kitti=Folder(  # Replica's too: whatever has poses in one text, a line a picture
        PLAIN,
        "depth/* depths/* results/depth*",
        "poses.txt pose.txt traj.txt",
        lens="K.txt camera-intrinsics.txt intrinsics.txt cam_params.json",
    ),
    cut3r=Folder("color/*", "depth/*", "camera:folder", mark=".npz", confidence=NETS),
    monst3r=Folder(
        "frame_*", "frame_*.npy", "pred_traj.txt:tum", lens="pred_intrinsics.txt", confidence=LOGS
    ),
    stray=Folder("rgb.mp4", "depth/*", "odometry.csv:tum", lens="camera_matrix.csv"),
    record3d=Folder("rgb/*", "depth/*", "metadata.json:record3d", mark='"poses"'),
    polycam=Folder(
        "images/*",
        "depth/*",
        "cameras:folder",
        mark=".json",
        better=Folder("corrected_images/*", "depth/*", "corrected_cameras:folder", mark=".json"),
    ),
)


# --- Others ---------------------------------------------------------------------------------------
def numbered(folder):
    """Number -> picture, or depth that is a picture."""
    return by_number(files.listed(folder, files.STILLS))


def stamps(path):
    """Lines "time name" of TUM's rgb.txt and depth.txt, headings aside -> times (N,), names."""
    rows = [x.split(maxsplit=1) for x in native.lines_of(path)]
    if alone := [row[0] for row in rows or [["any time"]] if len(row) < 2]:
        raise ValueError(f"{path}: no file beside {some(alone)}; wanted lines of TIME FILE")
    rows.sort(key=lambda row: float(row[0]))
    return np.array([float(row[0]) for row in rows]), [row[1] for row in rows]


def nearest(times, of, within=0.02):
    """Place in `times` next to each of `of`, -1 where none is within so many seconds."""
    order = np.argsort(times)
    right = np.clip(np.searchsorted(times[order], of), 1, len(times) - 1)
    left = right - (of - times[order][right - 1] < times[order][right] - of)
    return np.where(abs(times[order][left] - of) <= within, order[left], -1)


def open_tum(src, wishes):
    times, names = stamps(src / "rgb.txt")
    depth_times, depth_names = stamps(src / "depth.txt")
    rows = read_rows(src / "groundtruth.txt")
    poses = native.read_tum(src / "groundtruth.txt", rows=rows)
    step = np.median(np.diff(times)) if len(times) > 1 else 1 / 30
    if step > 10 and not wishes.fps:  # milliseconds, 33 apart, too
        raise ValueError(f"{src}/rgb.txt: times {step:.3g} apart; wanted seconds, or give --fps")
    parts = zip(names, nearest(depth_times, times), nearest(rows[:, 0], times))
    near = [(n, d, p) for n, d, p in parts if min(d, p) >= 0]
    whole = [x for x in near if (src / x[0]).is_file() and (src / depth_names[x[1]]).is_file()]
    if not whole:
        raise ValueError(f"{src}: no picture that is there has depth and a pose within 0.02 s")
    left = f"{len(names) - len(whole)} frames without file, depth or pose within 0.02 s left out"
    notes = [left] * (len(whole) < len(names))
    names, d, p = zip(*whole)
    size = files.read_video(src / names[0], 1)[1][0]
    # The depth is registered to the pictures with these numbers; undistorting would undo that.
    cameras, _, more = find_lens(recordings.pick(poses, p), src, size, wishes, centred(525))
    pictures, depth = [src / n for n in names], [src / depth_names[i] for i in d]
    how = dict(unit=dict(depth_scale=1 / 5000), fps=1 / step, notes=notes + more)
    return Recording(pictures, cameras, depth, **how)


def open_vkitti2(src, wishes):
    """extrinsic.txt: frame, camera, 16 numbers w2c; intrinsic.txt: frame, camera, fx fy cx cy."""
    tables = [read_rows(src / name) for name in ("extrinsic.txt", "intrinsic.txt")]
    poses, lens = ({int(r[0]): r[2:] for r in table if r[1] == 0} for table in tables)
    pictures, depth = (numbered(src / "frames" / n / "Camera_0") for n in ("rgb", "depth"))
    matrices = np.reshape(list(poses.values()), (-1, 4, 4))
    kinds = dict(picture=pictures, depth=depth, pose=poses, intrinsics=lens)
    unit = dict(depth_scale=0.01, depth_invalid=65535)  # sky
    return assemble(kinds, Cameras(matrices, "w2c"), pixels=True, unit=unit, fps=10.0)


def omniworld_depth(path):
    d = files.read_array(path).astype(np.float32) / 65535
    z = d / (1000 - 999 * d) / 0.004
    return np.where((d >= 0.0015) & (d <= 65500 / 65535), z, 0).astype(np.float32)


def open_omniworld(path, wishes):
    """camera/split_K.json: quats (w first) and trans of w2c, focals in pixels, cx, cy."""
    src, said = path.parent.parent, files.read_json(path)
    splits = files.read_json(src / "split_info.json")["split"]
    pictures, depth = (numbered(src / n) for n in ("color", "depth"))
    wxyz = np.array(said["quats"], float)
    wxyz /= np.linalg.norm(wxyz, axis=1, keepdims=True)
    w2c = quaternions(np.concatenate([said["trans"], wxyz[:, [1, 2, 3, 0]]], 1))
    k = [np.broadcast_to(said[name], (len(w2c),)) for name in ("focals", "focals", "cx", "cy")]
    kinds = dict(pose=splits[numbers_of([path])[0]][: len(w2c)], picture=pictures, depth=depth)
    how = dict(pixels=True, fps=24.0, read=omniworld_depth)
    return assemble(kinds, Cameras(w2c, "w2c", np.stack(k, -1)), **how)


def find_omniworld(src):
    return files.listed(src, (".json",), "camera/split_*") * (src / "split_info.json").is_file()


def beside(folder, names):
    """Array files of a folder (or None) by a picture's name: at the same place in it, or, where
    only one picture is called so, by its stem."""
    there = [f for f in folder.rglob("*") if f.suffix.lower() in files.MAPS] if folder else []
    whole = {f.relative_to(folder).with_suffix(""): f for f in there}
    often = Counter(Path(n).stem for n in names)

    def place(name):
        own = Path(name).with_suffix("")
        return own if own in whole or often[own.name] > 1 else Path(own.name)

    return {n: whole[place(n)] for n in names if place(n) in whole}


def folder_in(src, *names):
    return next((src / n for n in names if (src / n).is_dir()), None)


def picture_of(folder, name):
    """The file of a name that may lack its ending (Blender) or begin with the folder's; or None."""
    path = Path(name.replace("\\", "/"))
    ends = (folder / f"{path}{end}" for end in files.STILLS)
    places = [folder / path, folder / Path(*path.parts[1:]), *ends]
    return next((f for f in places if f.is_file()), None)


def open_named(pictures, cameras, *, axes, depth, unit):
    """Cameras that name their pictures; depth: name -> file, {} for none."""
    there = {n: path for n in cameras.names if (path := picture_of(pictures, n))}
    often = Counter(there.values())
    if twice := [n for n, path in there.items() if often[path] > 1]:
        raise ValueError(f"{pictures}: one picture for several of {some(twice)}; give each its own")
    kinds = dict(pose=cameras.names, picture=there, depth=depth or None)
    return assemble(kinds, cameras, unit=unit, axes=axes, turned=False)  # these tools ignore EXIF


def find_nerfstudio(src):
    """transforms.json, or the splits of a Blender scene."""
    alone = (src / "transforms.json").is_file()
    return [src] if alone else files.listed(src, (".json",), "transforms_*")


def open_nerfstudio(key, wishes):
    path = key / "transforms.json" if key.is_dir() else key
    src, said = path.parent, files.read_json(path)
    words = ("depth_file_path", "depth_path")  # of nerfstudio, of instant-ngp
    told = {f["file_path"]: next(filter(None, map(f.get, words)), None) for f in said["frames"]}
    # A Blender scene says the field of view alone.
    pictures = Path(wishes.pictures or src)
    shown = filter(None, (picture_of(pictures, n) for n in told if "w" not in said))
    size = next((files.read_video(f, 1, False)[1][0] for f in shown), None)
    cameras = FORMATS["nerfstudio"].read(path, size)
    depth = {n: f for n, d in told.items() if d and (f := src / d.replace("\\", "/")).is_file()}
    counts = recordings.in_counts(depth.values())
    usual = said.get("integer_depth_scale", 1 / said.get("depth_scaling_factor", 1000))
    scale = float(said.get("depth_unit_scale_factor", usual if counts else 1))
    scale *= float(said.get("applied_scale") or 1)  # it has made cameras smaller, not depth
    how = dict(depth=depth, unit=dict(depth_scale=scale) if counts or scale != 1 else {})
    made = open_named(pictures, cameras, axes="opengl", **how)
    if any(told.values()) and not depth:
        made.notes.append("the depth that it names is not there")
    return made


def tables(src):
    """Folders of a COLMAP project that may hold a model -> names of the tables in each."""
    places = [src, *sorted(src.glob("sparse/[0-9]*")), src / "sparse", src / "colmap/sparse/0"]
    return {f: {table.stem for table in files.listed(f, (".bin", ".txt"))} for f in places}


def models(src):
    return [f for f, names in tables(src).items() if "images" in names]


def open_colmap(src, wishes):
    found = {f: FORMATS["colmap"].read(f) for f in models(src)}
    model = max(found, key=lambda f: len(found[f].matrices))
    given = wishes.pictures and Path(wishes.pictures)
    pictures = given or folder_in(src, "images", "rgb", "input")
    if pictures is None:
        raise ValueError(f"{src}: no folder images with the pictures; give --pictures FOLDER")
    maps, names = folder_in(src, "depth", "depths"), found[model].names
    depth, own = beside(maps, names), src / "stereo/depth_maps"  # of a dense workspace
    if not maps:
        depth = {n: f for n in names if (f := own / f"{n}.geometric.bin").is_file()}
    how = dict(depth=depth, unit=MILLIMETRES if recordings.in_counts(depth.values()) else {})
    made = open_named(pictures, found[model], axes="opencv", **how)
    mine = {picture_of(pictures, n) for n in names}
    if lone := [f.name for f in files.listed(pictures, files.STILLS, "**/*") if f not in mine]:
        made.notes.append(f"{len(lone)} pictures that are not in the model left out: {some(lone)}")
    if maps and not depth:
        made.notes.append(f"no file in {maps.name}/ is called as a picture is")
    if own.is_dir() and not maps and not depth:  # photometric maps alone do not agree
        made.notes.append(f"{own} lacks geometric maps (PatchMatchStereo.geom_consistency)")
    if len(found) > 1:
        made.notes.append(f"{model.name} is the largest of {len(found)} models")
    return made


def colmap_parts(src):
    there = set().union(*tables(src).values())
    return {f"{name}.bin": name in there for name in ("cameras", "images", "points3D")}


def open_re10k(path, wishes):
    times = camera_files.read_table(path)[:, 0]
    pictures = numbered(Path(wishes.pictures) if wishes.pictures else path.with_suffix(""))
    fps = 1e6 / np.median(np.diff(times)) if len(times) > 1 and times[1] > 1000 else 30.0
    kinds = dict(pose=map(int, times), picture=pictures)
    return assemble(kinds, FORMATS["re10k"].read(path), fps=fps)


def find_re10k(src):
    """Texts of 19 columns with a folder of pictures of the same name beside them."""
    texts = [f for f in sorted(src.glob("*.txt")) if f.with_suffix("").is_dir()]
    return [f for f in texts if len((native.lines_of(f) or [""])[-1].split()) == 19]


def open_vipe(path, wishes):
    """pose/N.npz, whose inds say which frames have a pose; rgb/N.mp4, intrinsics/, depth/N.zip."""
    src = path.parent.parent
    video, cameras = src / "rgb" / f"{path.stem}.mp4", native.read_vipe(path)
    archive = src / "depth" / f"{path.stem}.zip"
    file = archive.is_file() and naming(archive, zipfile.ZipFile, archive)  # once: it lists all
    names = [n for n in file.namelist() if n.endswith(".exr")] if file else []
    read = lambda n: naming(f"{archive}, {n}", lambda: read_raster(file.read(n)))  # noqa: E731
    frames = {n: n for n in range(files.video_facts(video)[0])}
    maps = dict(zip(numbers_of(names), names)) or None
    kinds = dict(picture=frames, pose=cameras.names, depth=maps)
    if wishes.intrinsics or cameras.intrinsics is None:
        cameras = find_lens(cameras, src, cameras.size, wishes)[0]
    return assemble(kinds, cameras, fps=cameras.fps or 30.0, video=video, read=read)


def naming(where, read, *what):
    """read(*what), whose errors are laid to `where`."""
    try:
        return read(*what)
    except Exception as error:  # flipped bytes make zipfile raise almost any class
        raise files.damaged(where, error) from None


def find_vipe(src):
    poses = files.listed(src, (".npz",), "pose/*")
    return [f for f in poses if (src / "rgb" / f"{f.stem}.mp4").is_file()]


def open_npz(names, path, wishes, sure="", least=0.0):
    """One archive for all; names: of pictures, depth, poses, intrinsics; sure: of confidence."""
    cameras = FORMATS["npz"].read(path)
    with np.load(path, allow_pickle=False) as f:
        data = {name: f[name] for name in (*names[:2], sure) if name in f.files}
    data = {name: x[0] if len(x) == 1 else x for name, x in data.items()}  # a batch
    maps, sure = data[names[1]], data.get(sure, np.full(len(data[names[1]]), np.inf))
    frames = Path(wishes.pictures) if wishes.pictures else data.get(names[0], np.zeros(0))
    floats = getattr(frames, "shape", ())[1:2] == (3,) and frames.dtype.kind == "f"
    if floats and abs(frames - 0.5).max() < 0.7:  # from 0 to 1, or, resized, a little beyond
        frames = (frames.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    if not isinstance(frames, Path) and (frames.dtype, frames.shape[3:]) != (np.uint8, (3,)):
        found = f"{names[0]} of {frames.dtype} {frames.shape}" if frames.size else f"no {names[0]}"
        raise ValueError(f"{path}: {found}; wanted uint8 (T, H, W, 3); give --pictures PATH")
    maps, count = maps[..., 0] if maps.ndim == 4 else maps, len(maps)
    shown = files.video_facts(frames)[0] if isinstance(frames, Path) else len(frames)
    if not shown == count == len(cameras.matrices) == len(sure):
        found = f"{shown} pictures, {count} depth maps; wanted one each. {len(sure)} of confidence"
        raise ValueError(f"{path}: {found}, {len(cameras.matrices)} poses")
    numbers, read, notes = list(range(count)), maps.__getitem__, []
    sure = sure if sure.dtype == bool else sure >= least
    if not sure.any():  # some networks write 1 everywhere, others shares
        notes = [f"its confidence is not heeded: all of it is below {least}"]
    elif not sure.all():
        read = lambda n: believed(maps[n], sure[n], least)  # noqa: E731
        notes = [f"unsure depth is left out: {(~sure).mean():.1%} below {least} or False"]
    return Recording(numbers, cameras, numbers, read=read, video=frames, notes=notes)


def holding(names, src):
    """Archives of a folder that hold arrays of these names."""
    found = filter(zipfile.is_zipfile, files.listed(src, (".npz",)))
    return [f for f in found if {f"{n}.npy" for n in names} <= set(zipfile.ZipFile(f).namelist())]


def marked(*names):
    return lambda src: {name: (src / name).is_file() for name in names}


@dataclass(frozen=True)
class Layout:
    open: object  # key, wishes -> Recording
    find: object = None  # folder -> keys of the recordings in it; None: by its parts
    parts: object = None  # folder -> {part of a recording: whether it is there}

    def keys(self, src):
        return self.find(src) if self.find else [src] * all(self.parts(src).values())


def archive(*names, **sure):
    return Layout(partial(open_npz, names, **sure), partial(holding, names[1:]))


LAYOUTS = dict(
    tum=Layout(open_tum, parts=marked("rgb.txt", "depth.txt", "groundtruth.txt")),
    vkitti2=Layout(open_vkitti2, parts=marked("extrinsic.txt", "intrinsic.txt")),
    omniworld=Layout(open_omniworld, find_omniworld),
    nerfstudio=Layout(open_nerfstudio, find_nerfstudio),
    colmap=Layout(open_colmap, lambda src: [src] * bool(models(src)), colmap_parts),
    vipe=Layout(open_vipe, find_vipe),
    da3=archive("image", "depth", "extrinsics", "intrinsics", sure="conf", least=1.05),
    megasam=archive("images", "depths", "cam_c2w", "intrinsic"),
    vggt=archive("images", "depth", "extrinsic", "intrinsic", sure="depth_conf", least=1.1),
    spatialtracker=archive("video", "depths", "extrinsics", "intrinsics"),  # V2
    re10k=Layout(open_re10k, find_re10k),
    **{name: Layout(kind.open, parts=kind.parts) for name, kind in FOLDERS.items()},
)
