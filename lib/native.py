"""Camera files as labelers and datasets leave them; and what a reader of cameras gets and gives.

npz of ViPE, MegaSaM, Depth-Anything-3, VGGT, Lyra; poses.npy of LingBot and SpatialVID; TartanAir;
one file a frame (7-Scenes, ScanNet, CUT3R, Polycam); Record3D; Stray Scanner; Open3D's
trajectory.log; 12 or 16 numbers a line (KITTI).
Shapes: T frames.  Source: the writers of each, read in November 2026."""

import itertools
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from geometry import quat_to_mat
from lib.crop import focal_and_centre, fractions
from lib.files import array_header, damaged, natural, read_json, read_video


@dataclass(frozen=True)
class Cameras:
    """What a reader found, as the file has it: `oriented` alone turns it into w2c, OpenCV."""

    matrices: np.ndarray  # (T, 3 or 4, 4)
    kind: str | None  # w2c or c2w; None: the file does not say
    intrinsics: np.ndarray | None = None  # (T, 4) fractions
    size: tuple | None = None  # (H, W)
    names: list | None = None  # of the pictures, or their numbers
    lenses: list | None = None  # Lens or None of each
    fps: float | None = None  # of the frames, where the file says it


def need_size(size, path, what):
    if size is None:
        raise ValueError(f"{path}: {what} in pixels, but no image size; give --size HxW")
    return size


def quaternions(rows):
    """(T, 7) t and quaternion xyzw -> (T, 3, 4)."""
    pose = torch.from_numpy(np.asarray(rows, float))
    pose = pose.where(pose[:, 3:].any(-1, keepdim=True), torch.nan)  # a lost frame, as others' NaN
    off = (pose[:, 3:].norm(dim=-1) - 1).abs().nan_to_num(posinf=0).max()
    if off > 0.02:
        raise ValueError(f"quaternions of length 1 +- {off:.2g}; wanted tx ty tz qx qy qz qw")
    return torch.cat([quat_to_mat(pose[:, 3:]), pose[:, :3, None]], -1).numpy()


# --- Arrays ---------------------------------------------------------------------------------------
POSES = dict(w2c="w2c", c2w="c2w", cam_c2w="c2w", extrinsics="w2c", extrinsic="w2c")
UNCLEAR = ("poses", "cameras", "pose")  # names that do not say which way
LENSES = ("intrinsics", "intrinsic", "K", "Ks", "ixts")
PICTURES = ("images", "image", "depths", "depth")


def small_arrays(path, most=2**26):
    """name -> array of an .npz; of what is larger, as pictures and depth, the shape alone."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as file:
                if b"'|O'" in file.peek(100)[:100] and info.filename[:-4] not in POSES:
                    continue  # objects beside, as VGGT's pose_enc_list, stay unread
                shape, dtype, fortran = array_header(file, info.file_size, mask=True)
                array = np.broadcast_to(np.zeros((), dtype), shape)  # of no size
                if info.file_size <= most:
                    array = np.frombuffer(bytearray(file.read()), dtype)
                    array = array.reshape(shape, order="F" if fortran else "C")
            arrays[info.filename.removesuffix(".npy")] = array
    return arrays


def size_in(data):
    """(H, W) that the arrays of a file are of, or None."""
    if "size" in data:
        return tuple(int(x) for x in data["size"])
    if "image_height" in data and "image_width" in data:
        return int(data["image_height"]), int(data["image_width"])
    for name in PICTURES:
        if (x := data.get(name)) is not None and x.ndim >= 3:
            shape = x.shape[:-1] if x.shape[-1] in (1, 3, 4) else x.shape  # channels come last
            return tuple(shape[-2:])
    return None


def lens_of(k, frames, size, path):
    """Intrinsics (4,), (3, 3), (T, 4) or (T, 3, 3), pixels or fractions -> (T, 4) fractions."""
    if k is None:
        return None
    k = k[0] if k.ndim == 4 else k  # a batch of one clip
    k = focal_and_centre(k) if k.shape[-2:] == (3, 3) else k
    if k.shape not in ((4,), (1, 4), (frames, 4)):
        raise ValueError(f"{path}: intrinsics of shape {k.shape} for {frames} cameras")
    k = np.broadcast_to(k, (frames, 4)).astype(float)
    return fractions(k, need_size(size, path, "intrinsics")) if k[:, :2].max() > 20 else k


def read_npz(path, size=None, matrices=None):
    """Matrices (T, 3 or 4, 4) under a known name, intrinsics and a size where there are any."""
    data = small_arrays(path)
    if set(data) == {"data", "inds"}:
        if gaps := set(range(data["inds"].max() + 1)) - set(data["inds"].tolist()):
            cure = "cut the video to the frames that have one"
            raise ValueError(f"{path}: no pose for frames {sorted(gaps)[:8]}; {cure}")
        return read_vipe(Path(path), size)
    named = [name for name in POSES if name in data]
    others = [name for name in UNCLEAR if name in data]
    if len(named) != 1 and not (others and matrices):
        cure = f"Name one w2c or c2w, or give --matrices w2c|c2w for {' or '.join(UNCLEAR)}"
        raise ValueError(f"{path}: holds {', '.join(data)}; which way do the matrices map? {cure}")
    name = named[0] if len(named) == 1 else others[0]
    m = data[name][0] if data[name].ndim == 4 and len(data[name]) == 1 else data[name]  # a batch
    lens = [k for k in LENSES if k in data]
    lost = [k for k, x in data.items() if x.shape[-2:] == (3, 3) and k not in (*lens, name)]
    if not lens and lost:
        raise ValueError(f"{path}: is {lost[0]} the intrinsics? Name them intrinsics")
    size = size_in(data) or size
    k = lens_of(data[lens[0]] if lens else None, len(m), size, path)
    return Cameras(m, POSES.get(name, matrices), k, size)


def read_vipe(path, size=None):
    """ViPE's pose/NAME.npz, with intrinsics/NAME.npz and rgb/NAME.mp4 beside that folder."""
    folder, data, k, fps = path.parent.parent, small_arrays(path), None, None
    lens, video = folder / "intrinsics" / path.name, folder / "rgb" / f"{path.stem}.mp4"
    model = lens.with_name(f"{path.stem}_camera.txt")  # one a frame
    if model.is_file() and set(model.read_text("utf-8-sig").split()[1::2]) - {"PINHOLE"}:
        raise ValueError(f"{model}: wanted PINHOLE; undistort the video first")
    if size is None and video.is_file():
        size, fps, _ = read_video(video, 1)[1]
    if lens.is_file():
        told = small_arrays(lens)
        k = dict(zip(told["inds"].tolist(), told["data"][:, :4]))
        k = lens_of(np.array([k[n] for n in data["inds"].tolist()]), len(data["inds"]), size, lens)
    return Cameras(data["data"], "c2w", k, size, data["inds"].tolist(), fps=fps)


def read_npy(path, size=None, matrices=None):
    """LingBot: c2w (T, 4, 4); SpatialVID: w2c (T, 7); intrinsics.npy beside either."""
    m, beside = np.load(path, allow_pickle=False), Path(path).with_name("intrinsics.npy")
    k = np.load(beside, allow_pickle=False) if beside.is_file() else None
    if m.ndim == 2 and m.shape[1] == 7:
        m, kind = quaternions(m), matrices or "w2c"
    else:
        kind = matrices or (None if k is None else "c2w")
    return Cameras(m, kind, lens_of(k, len(m), size, path))


# --- Text -----------------------------------------------------------------------------------------
def lines_of(path):
    """Lines of a text of numbers: comments, blank ones and headings or a URL before them aside."""
    lines = Path(path).read_text("utf-8-sig", "replace").replace(",", " ").splitlines()
    lines = [x.strip() for x in lines if not re.match(r"\s*($|#)", x)]
    return [*itertools.dropwhile(re.compile("(?!nan|inf)[a-z]", re.I).match, lines)]


def read_rows(path):
    """Numbers of a text (lines, columns); comments, headings, commas and byte order mark aside."""
    try:
        if not (lines := lines_of(path)):
            raise ValueError("no numbers in it")
        return np.loadtxt(lines, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).rstrip('.')}; wanted lines of numbers") from None


def read_tum(path, size=None, matrices=None, rows=None):
    """Lines: time tx ty tz qx qy qz qw of camera-to-world; or without the time.  rows: if read."""
    rows, names = read_rows(path) if rows is None else rows, None
    k = rows[:, 9:13] if size and rows.shape[1] > 12 else None  # poses alone want no size
    if Path(path).name == "odometry.csv":  # Stray Scanner's: time, frame, pose and, of late, lens
        rows, names = rows[:, 1:9], rows[:, 1].astype(int).tolist()
    if rows.shape[1] not in (7, 8):
        raise ValueError(f"{path}: {rows.shape[1]} columns; wanted time tx ty tz qx qy qz qw")
    if Path(path).name == "pred_traj.txt":  # of MonST3R and what came of it: qw is first
        rows[:, -4:] = np.roll(rows[:, -4:], -1, 1)
    return Cameras(quaternions(rows[:, -7:]), "c2w", lens_of(k, len(rows), size, path), names=names)


def read_tartanair(path, size=None, matrices=None):
    """tx ty tz qx qy qz qw of camera-to-world, x forward, y right, z down; 640 x 480, f 320."""
    turn = np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])  # north east down -> OpenCV
    m = quaternions(read_rows(path))
    m = np.concatenate([turn @ m[:, :, :3] @ turn.T, turn @ m[:, :, 3:]], -1)
    k = np.array([0.5, 320 / 480, 0.5, 0.5])
    return Cameras(m, "c2w", np.tile(k, (len(m), 1)), size or (480, 640))


def read_matrices(path, size=None, matrices=None):
    """12 or 16 numbers a line, row by row; 13 or 17 with an index before them."""
    rows = read_rows(path)
    if rows.shape[1] not in (12, 13, 16, 17):
        raise ValueError(f"{path}: {rows.shape[1]} columns; wanted 12 or 16 numbers a line")
    names = rows[:, 0].astype(int).tolist() if rows.shape[1] % 4 else None
    return Cameras(rows[:, rows.shape[1] % 4 :].reshape(len(rows), -1, 4), matrices, names=names)


def read_log(path, size=None, matrices=None):
    """Open3D's trajectory.log: three numbers, then a 4x4 camera-to-world, for every frame."""
    words = np.array(Path(path).read_text("utf-8-sig").split(), float)
    if len(words) % 19:
        raise ValueError(f"{path}: {len(words)} numbers; wanted 3 + 16 a frame: cut short?")
    rows = words.reshape(-1, 19)[words[::19].argsort(kind="stable")]  # by the frames' numbers
    return Cameras(rows[:, 3:].reshape(-1, 4, 4), "c2w")


def read_record3d(path, size=None, matrices=None):
    """Record3D's metadata.json: quaternion xyzw and t; fx fy cx cy a frame, or K by columns."""
    said = read_json(path)
    rows, size = np.roll(said["poses"], 3, 1), (said["h"], said["w"])
    k = said.get("perFrameIntrinsicCoeffs") or np.reshape(said["K"], (3, 3)).T
    k = lens_of(np.array(k), len(rows), size, path)
    return Cameras(quaternions(rows), "c2w", k, size, [*range(len(rows))], fps=said.get("fps"))


def numbers_of(paths):
    """Frames of files: the last number of the names that is not one for all, or else the name."""
    parts = [re.findall(r"\d+", Path(path).stem) or [Path(path).stem] for path in paths]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]  # 000001_10.png, depth_0001_16bit.png
    return [int(part[-1]) if part[-1].isdigit() else part[-1] for part in parts]


def pose_files(folder):
    """frame-000000.pose.txt of 7-Scenes, 0.txt of ScanNet, .npz of CUT3R, .json of Polycam."""
    files = [f for f in Path(folder).glob("[!.]*") if f.suffix in (".txt", ".npz", ".json")]
    named = [f for f in files if f.name.endswith(".pose.txt")]
    return sorted(named or [f for f in files if f.stem.isdigit()], key=lambda f: natural(f.name))


def pose_of(path):
    """Camera-to-world of a frame and its fx fy cx cy in pixels, fractions or None."""
    if path.suffix == ".npz":
        data = small_arrays(path)
        return data["pose"], focal_and_centre(data["intrinsics"])
    if path.suffix == ".json":
        said = json.loads(path.read_bytes())
        m = [[said[f"t_{row}{column}"] for column in range(4)] for row in range(3)]
        k = fractions([said[x] for x in ("fx", "fy", "cx", "cy")], (said["height"], said["width"]))
        return m * np.array([1, -1, -1, 1]), k  # OpenGL's axes
    return read_rows(path).reshape(-1, 4), None


def read_folder(path, size=None, matrices=None):
    """One camera-to-world a frame; frames whose tracking was lost hold -inf."""
    files = pose_files(path)
    try:
        m, k = zip(*(pose_of(path := f) for f in files))
    except Exception as error:  # flipped bytes make the readers raise almost any class of error
        raise damaged(path, error, "not a readable camera: {}") from None
    k = None if k[0] is None else lens_of(np.array(k), len(m), size, path)
    names = numbers_of(files)
    step = np.median(np.diff(names)) if k is not None and len(m) > 1 else 0
    fps = 1e6 / step if step > 1000 else None  # Polycam's count microseconds
    return Cameras(np.stack(m), "c2w", k, size, names, fps=fps)
