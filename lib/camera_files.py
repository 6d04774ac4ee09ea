"""Camera files in and out, one convention inside (`python data.py cameras IN OUT` converts).

Formats: those of FORMATS; docs/data.md says what each holds.  What a file leaves open is refused
with the option that settles it.
Inside: w2c (T, 3, 4) float64, OpenCV axes (x right, y down, z forward), in the world and unit of
the file; intrinsics (T, 4) float64 = fx/W, fy/H, cx/W, cy/H, pixel centres at +0.5, or None where
the file holds none; size (H, W) of the images in pixels, or None."""

import json
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from geometry import inv_se3, mat_to_quat, quat_to_mat
from lib import native
from lib.colmap import colmap_binary, colmap_text
from lib.crop import focal_and_centre, fractions
from lib.files import FAR, MAX_BYTES, MAX_CAMERAS, check_file, damaged, listed, natural
from lib.lens import MODELS, make_lens, pinhole_of
from lib.native import Cameras, need_size, pose_files

RE10K = "19 numbers: index fx fy cx cy 0 0 and the row-major 3x4 world-to-camera matrix"


# --- RealEstate10K text ---------------------------------------------------------------------------
def read_table(path, pixels=False):
    """The raw 19 columns (T, 19) float64 of a RealEstate10K text; URL line, comments and blank
    lines skipped. pixels: do not refuse focal lengths that must be pixels."""
    rows, text = [], Path(path).read_text("utf-8-sig", "replace") if Path(path).is_file() else ""
    lines = enumerate(text.splitlines(), 1)
    lines = [(n, line.split()) for n, line in lines if re.match(r"\s*[^#\s]", line)]
    for n, words in lines[1:] if lines and "://" in lines[0][1][0] else lines:
        try:
            rows.append([float(word) for word in words])
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: {error}; wanted {RE10K}") from None
        finite = np.isfinite(rows[-1]).sum()
        if not len(words) == finite == 19:
            found = f"{len(words)} columns, {finite} finite"
            raise ValueError(f"{path}, line {n}: {found}; wanted {RE10K}")
        if not pixels and not 0 < min(rows[-1][1:3]) <= max(rows[-1][1:3]) < 20:
            found = f"focal lengths {words[1]} {words[2]}; wanted fractions of the image size"
            cure = "Divide fx, cx by the width and fy, cy by the height."
            raise ValueError(f"{path}, line {n}: {found}. {cure}")
    if not rows:
        raise ValueError(f"{path}: missing, or without cameras; wanted {RE10K}")
    table = np.array(rows)
    step = np.diff(table[:, 0])
    if step.any() and (step <= 0).any():  # all equal: no index was written
        t = int(np.argmax(step <= 0))
        found = f"frame {t + 1} has index {table[t + 1, 0]:g} after {table[t, 0]:g}"
        raise ValueError(f"{path}: {found}: out of order or twice. Sort by the first column")
    return table


def read_cameras(path):
    """RealEstate10K text: w2c (T, 3, 4), fx fy cx cy as fractions (T, 4); float64."""
    table = read_table(path)
    return table[:, 7:].reshape(-1, 3, 4), table[:, 1:5]


def write_cameras(path, w2c, intrinsics, size):
    """w2c (T, 3, 4) and pixel intrinsics (T, 3, 3) of size (H, W) as 19 columns per frame."""
    write_re10k(path, np.asarray(w2c, float), fractions(focal_and_centre(intrinsics), size), size)


# --- Shared pieces --------------------------------------------------------------------------------
NUMBERS = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")  # of lens distortion
PARAMS = ("k1", "k2", "k3", "k4", "p1", "p2")  # nerfstudio's distortion_params
NO_ROTATION = 0.02  # distance from orthonormal, and of the determinant from 1
FLIP = np.array([[1.0], [-1], [-1]])  # OpenGL <-> OpenCV camera axes


def off_rotation(matrices):
    """Largest distance of (T, 3, 4) from rotations with determinant +1; of NaN 9."""
    R = np.asarray(matrices)[..., :3]
    square = np.abs(R @ R.swapaxes(1, 2) - np.eye(3)).max((1, 2))
    return np.nan_to_num(square + np.abs(np.linalg.det(R) - 1), nan=9).max().item()


def rigid(matrices):
    """(T, 3 or 4, 4) -> (T, 3, 4) with the rotations next to those, which a tracker's drift or few
    digits put a little off; refuses what is no rotation."""
    m = as_matrices(matrices)[:, :3]
    if (off := off_rotation(m)) > NO_ROTATION:
        found = f"rotations are not orthonormal with determinant +1 (off by {off:.2g})"
        raise ValueError(f"{found}; transposed, scaled or mirrored matrices?")
    if off < 1e-5:
        return m
    U, _, Vt = np.linalg.svd(m[..., :3])
    return np.concatenate([U @ Vt, m[..., 3:]], 2)


def inverse(matrices):
    """rigid, the other way round."""
    return inv_se3(torch.from_numpy(rigid(matrices))).numpy()


def oriented(matrices, kind, axes):
    """w2c (T, 3, 4) in OpenCV axes from matrices that are w2c or c2w in opencv or opengl axes."""
    w2c = inverse(matrices) if kind == "c2w" else rigid(matrices)
    return w2c * FLIP if axes == "opengl" else w2c


# --- JSON -----------------------------------------------------------------------------------------
def read_interp(path, size=None, matrices=None):
    """camera_data.json: 4x4 c2w in cameras_interp, focal_length in pixels (500), centred."""
    data = json.loads(Path(path).read_bytes())
    h, w = need_size(size, path, "focal_length")
    focal, matrices = float(data.get("focal_length", 500)), data["cameras_interp"]
    intrinsics = np.tile([focal / w, focal / h, 0.5, 0.5], (len(matrices), 1))
    return Cameras(matrices, "c2w", intrinsics, (h, w))


def write_interp(path, w2c, intrinsics, size):
    h, w = need_size(size, path, "focal_length")
    pixels = intrinsics * [w, h, w, h]
    if np.ptp(pixels[:, :2]) > 1e-3 or np.abs(intrinsics[:, 2:] - 0.5).max() > 1e-3:
        found = f"{pixels[:, :2].min():.6g} to {pixels[:, :2].max():.6g} px"
        why = f"holds one focal length and centred cameras; these have fx, fy from {found}"
        raise ValueError(f"{path}: this format {why}. Write re10k or nerfstudio.")
    c2w = homogeneous(inverse(w2c)).tolist()
    told = dict(focal_length=float(pixels[0, 0]), scale=1, cameras=[c2w[0], c2w[-1]])
    Path(path).write_text(json.dumps(dict(told, cameras_interp=c2w)))


def homogeneous(matrices):
    """(T, 3, 4) -> (T, 4, 4)."""
    return np.insert(matrices, 3, [0, 0, 0, 1], 1)


def read_nerfstudio(path, size=None, matrices=None):
    """transforms.json: camera-to-world, frames by file name; intrinsics shared or per frame."""
    data = json.loads(Path(path).read_bytes())
    frames = sorted(data["frames"], key=lambda f: natural(f.get("file_path", "")))
    bare = [f.get("file_path") for f in frames if "transform_matrix" not in f]
    if bare or not frames:
        found = f"frame {bare[0]} has no transform_matrix" if bare else "it has no frames"
        raise ValueError(f"{path}: {found}; wanted a camera for every picture")
    rows, lenses = [], []
    for f in ({"fl_x": f.get("fx"), "fl_y": f.get("fy"), **data, **f} for f in frames):
        usual = "FTHETA" if "ftheta_p0" in f else "PINHOLE"  # of instant-ngp, which names none
        model = "OPENCV_FISHEYE" if f.get("is_fisheye") else f.get("camera_model", usual)
        if model not in (*MODELS, "PERSPECTIVE"):
            cure = f"known are {', '.join(MODELS)}: undistort the images first"
            raise ValueError(f"{path}: camera model {model}; {cure}")
        numbers = {**f, **dict(zip(PARAMS, f.get("distortion_params") or ()))}
        lenses.append(make_lens(model, {k: float(numbers.get(k, 0)) for k in NUMBERS}))
        if "w" in f and "h" in f:
            size = size or (int(f["h"]), int(f["w"]))
        h, w = need_size(size, path, "intrinsics")
        w, h = f.get("w") or w, f.get("h") or h  # --size is of resized images
        angles = [f.get(f"camera_angle_{axis}", 0) for axis in "xy"]
        fx, fy = (a and side / 2 / np.tan(a / 2) for a, side in zip(angles, (w, h)))
        fx, fy = f["fl_x"] or fx, f["fl_y"] or fy
        if not (fx or fy):
            found = f"{f.get('file_path')} has no focal length: no fl_x and no camera_angle_x"
            raise ValueError(f"{path}: {found}. Fix: add fl_x, fl_y, cx, cy in pixels, and w, h")
        rows.append(fractions([fx or fy, fy or fx, f.get("cx", w / 2), f.get("cy", h / 2)], (h, w)))
    matrices, names = ([f.get(key) for f in frames] for key in ("transform_matrix", "file_path"))
    return Cameras(matrices, "c2w", np.array(rows), size, names, lenses)


def write_nerfstudio(path, w2c, intrinsics, size):
    h, w = need_size(size, path, "intrinsics")
    frames = []
    for t, (m, k) in enumerate(zip(homogeneous(inverse(w2c)), intrinsics * [w, h, w, h])):
        row = dict(zip(("fl_x", "fl_y", "cx", "cy"), k.tolist()))
        name = dict(file_path=f"images/frame_{t:05d}.png")
        frames.append({**name, **row, "transform_matrix": m.tolist()})
    told = dict(camera_model="PINHOLE", w=w, h=h, frames=frames)
    Path(path).write_text(json.dumps(told, indent=1))


# --- COLMAP: pixel centres at +0.5, w2c in OpenCV axes; images ordered by name --------------------
def read_colmap(path, size=None, matrices=None):
    path = Path(path)
    cameras, images = colmap_binary(path) if (path / "images.bin").is_file() else colmap_text(path)
    if not images:
        raise ValueError(f"{path}: no registered image. Give the folder of the largest model")
    if lost := [name for name, _, camera in images if camera not in cameras]:
        raise ValueError(f"{path}: no camera for {lost[0]}. Copy cameras and images of one model")
    images.sort(key=lambda image: natural(image[0]))
    pose = torch.tensor([p for _, p, _ in images], dtype=torch.float64)
    w2c = torch.cat([quat_to_mat(pose[:, [1, 2, 3, 0]]), pose[:, 4:, None]], -1).numpy()
    k, sizes, lenses = zip(*(cameras[camera] for _, _, camera in images))
    return Cameras(w2c, "w2c", np.stack(k), sizes[0], [name for name, _, _ in images], lenses)


def write_colmap(path, w2c, intrinsics, size, binary=False):
    """A folder with one PINHOLE camera per distinct intrinsics and no points."""
    h, w = need_size(size, path, "intrinsics")
    path, other = Path(path), Path(path, "images.txt" if binary else "images.bin")
    path.mkdir(parents=True, exist_ok=True)
    if other.exists():
        raise ValueError(f"{other}: is of another model; choose another folder, or delete it")
    kinds, which = np.unique((intrinsics * [w, h, w, h]).round(9), axis=0, return_inverse=True)
    q = mat_to_quat(torch.from_numpy(w2c[:, :, :3].copy())).numpy()[:, [3, 0, 1, 2]]
    poses = np.concatenate([q, w2c[:, :, 3]], 1)
    names = [f"frame_{t:05d}.png" for t in range(len(w2c))]
    images = list(zip(range(1, len(poses) + 1), poses, which.ravel() + 1, names))
    if binary:
        rows = [struct.pack("<iiQQ4d", i, 1, w, h, *k) for i, k in enumerate(kinds, 1)]
        (path / "cameras.bin").write_bytes(struct.pack("<Q", len(kinds)) + b"".join(rows))
        end = b"\0" + struct.pack("<Q", 0)
        rows = [struct.pack("<i7di", t, *p, c) + name.encode() + end for t, p, c, name in images]
        (path / "images.bin").write_bytes(struct.pack("<Q", len(poses)) + b"".join(rows))
        return
    numbers = lambda values: " ".join(f"{x:.12g}" for x in values)  # noqa: E731
    rows = [f"{i} PINHOLE {w} {h} {numbers(k)}\n" for i, k in enumerate(kinds, 1)]
    (path / "cameras.txt").write_text("".join(rows))
    rows = [f"{t} {numbers(p)} {c} {name}\n\n" for t, p, c, name in images]
    (path / "images.txt").write_text("".join(rows))


# --- Text, npz ------------------------------------------------------------------------------------
def read_re10k(path, size=None, matrices=None):
    w2c, intrinsics = read_cameras(path)
    return Cameras(w2c, "w2c", intrinsics)


def write_re10k(path, w2c, intrinsics, size=None):
    rows = [[t, *k, 0, 0, *e.ravel()] for t, (e, k) in enumerate(zip(w2c, intrinsics))]
    np.savetxt(path, rows, "%.12g")


def write_tum(path, w2c, intrinsics, size):
    c2w = inv_se3(torch.from_numpy(w2c))
    rows = np.concatenate([np.arange(len(w2c))[:, None], c2w[..., 3], mat_to_quat(c2w[..., :3])], 1)
    np.savetxt(path, rows, "%.12g")


def write_npz(path, w2c, intrinsics, size):
    extra = {k: v for k, v in dict(intrinsics=intrinsics, size=size).items() if v is not None}
    np.savez(path, w2c=w2c, **extra)


# --- One door -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Format:
    """A format: read(path, size, matrices) -> Cameras, with what a caller says of a file that does
    not say it: (H, W) of the pictures that pixel intrinsics are of; w2c or c2w; its own axes;
    write(path, w2c, intrinsics, size)."""

    read: object
    write: object = None
    axes: str = "opencv"


FORMATS = dict(
    re10k=Format(read_re10k, write_re10k),
    fantasyworld=Format(read_interp, write_interp),
    worldscore=Format(read_interp, write_interp, "opengl"),
    nerfstudio=Format(read_nerfstudio, write_nerfstudio, "opengl"),
    colmap=Format(read_colmap, write_colmap),
    tum=Format(native.read_tum, write_tum),
    npz=Format(native.read_npz, write_npz),
    npy=Format(native.read_npy),
    tartanair=Format(native.read_tartanair),
    matrices=Format(native.read_matrices),
    log=Format(native.read_log),
    record3d=Format(native.read_record3d, axes="opengl"),
    folder=Format(native.read_folder),
)
WRITTEN = [name for name, kind in FORMATS.items() if kind.write]


def guess(path):
    """The format of a file by its contents; refused where two formats look alike."""
    path = Path(path)
    if path.is_dir() and any((path / f"images.{e}").is_file() for e in ("txt", "bin")):
        return "colmap"
    if path.is_dir() and pose_files(path):
        return "folder"
    if path.suffix in (".npz", ".npy") or path.name == "odometry.csv":
        return path.suffix[1:].replace("csv", "tum")
    if path.suffix == ".json":
        data = json.loads(path.read_bytes())
        if "frames" in data or "poses" in data:
            return "nerfstudio" if "frames" in data else "record3d"
        if "cameras_interp" in data:
            who = "FantasyWorld (OpenCV axes) and WorldScore (OpenGL axes) share this layout"
            raise ValueError(f"{path}: {who}; give --from fantasyworld or --from worldscore")
    elif path.is_file():
        columns = {len(line.split()) for line in native.lines_of(path)}
        if columns == {3, 4}:
            return "log"
        if columns == {7} and not path.name.startswith("pose_"):
            axes = "tartanair (x forward, z down) or --from tum (OpenCV)"
            raise ValueError(f"{path}: poses without a time; whose axes? give --from {axes}")
        known = {7: "tartanair", 8: "tum", 19: "re10k"}
        known |= dict.fromkeys((12, 13, 16, 17), "matrices")
        if len(columns) == 1 and columns <= set(known):
            return known[columns.pop()]
    wanted = f"give --from, one of {', '.join(FORMATS)}"
    raise ValueError(f"{path}: missing or of no known format; {wanted}")


def read(path, form=None, size=None, *, axes=None, matrices=None, intrinsics=None, pinhole=False):
    """Any camera file -> w2c (T, 3, 4), intrinsics (T, 4) or None, size (H, W) or None.

    size      (H, W) in pixels, for files with pixel intrinsics and no size
    axes      opencv or opengl, where the file's cameras differ from its format's
    matrices    w2c or c2w, for files that do not say
    intrinsics  fx fy cx cy in pixels, for files without
    pinhole     instead of refusing lens distortion: the pinhole that an import makes of it"""
    check_door(path)
    try:
        form = form or guess(path)
        found = FORMATS[form].read(path, size, matrices)
        if found.kind is None:
            said = "bare matrices: which way do they map? give --matrices w2c|c2w"
            raise ValueError(f"{path}: {said}")
        found = replace(found, matrices=as_matrices(found.matrices), size=found.size or size)
        if any(found.lenses or ()) and pinhole:
            k = np.array(list(map(pinhole_of, map(tuple, found.intrinsics), found.lenses)))
            found = replace(found, intrinsics=k, lenses=None)
        if found.intrinsics is None and intrinsics:
            k = fractions(intrinsics, need_size(found.size, path, "--intrinsics"))
            found = replace(found, intrinsics=np.tile(k, (len(found.matrices), 1)))
        if any(found.lenses or ()):
            cure = "python data.py import SRC DIR undistorts pictures and depth with them"
            raise ValueError(f"{path}: lens distortion; {cure}")
        check_plausible(path, found)
        w2c = oriented(found.matrices, found.kind, axes or FORMATS[form].axes)
    except Exception as error:  # flipped bytes make the readers raise almost any class of error
        raise damaged(path, error, f"not a readable {form or 'camera'} file: {{}}") from None
    return w2c, found.intrinsics, found.size


def check_door(path):
    """A stranger's camera file, or folder of them, must be of regular files of a possible size."""
    path = Path(path)
    for file in listed(path, (".txt", ".bin")) if path.is_dir() else [path]:
        large = file != path or file.suffix in (".npz", ".npy", ".bin")  # points, in a folder
        check_file(file, MAX_BYTES if large else MAX_CAMERAS)


def as_matrices(matrices):
    """(T, 3 or 4, 4) float64 of at least one camera."""
    m = np.asarray(matrices, float)
    if m.ndim != 3 or m.shape[1:] not in ((3, 4), (4, 4)) or not len(m):
        raise ValueError(f"matrices of shape {m.shape}; wanted (T, 3, 4) or (T, 4, 4)")
    m = np.where(m[:, :3, :3].any((1, 2), keepdims=True), m, np.nan)  # all 0: a lost frame
    off = (abs(m[:, 3:] - [0, 0, 0, 1]) > 1e-3) & np.isfinite(m[:, 3:])  # lost ones are -inf
    if off.any():
        found = f"matrices with a last line {m[off.any((1, 2)), 3][0].tolist()}; wanted 0 0 0 1"
        raise ValueError(f"{found}: column by column? Fix: transpose them")
    return m


def check_plausible(path, found):
    """Every way in passes here: finite poses, a focal length and a centre that a lens can have."""
    far = np.abs(np.nan_to_num(np.asarray(found.matrices, float)[:, :3, 3], posinf=0, neginf=0))
    if not far.max() <= FAR:
        raise ValueError(f"{path}: translations up to {far.max():.3g}; wanted at most {FAR:.0e}")
    lost = np.flatnonzero(~np.isfinite(np.asarray(found.matrices, float)).all((1, 2)))
    if len(lost):
        which = ", ".join(map(str, lost[:8])) + (" ..." if len(lost) > 8 else "")
        cure = "tracking was lost there: leave these frames out of video, depth and cameras"
        raise ValueError(f"{path}: {len(lost)} poses are not finite (frames {which}); {cure}")
    if found.intrinsics is None:
        return
    focal, centre = found.intrinsics[:, :2], found.intrinsics[:, 2:]
    if not (np.isfinite(focal).all() and 0.1 < focal.min() <= focal.max() < 20):
        wide = f"{focal.min():.3g} to {focal.max():.3g} of the picture"
        raise ValueError(f"{path}: focal length {wide}; wanted 0.1 to 20: pixels of which size?")
    h, w = found.size or (1, 1)
    off, swapped = abs(centre - 0.5).max(), abs(centre * [w / h, h / w] - 0.5).max()
    if not off < 0.4 or off > 0.1 and swapped < off / 2:
        said = f"the centre is {off:.2f} of the picture off its middle"
        size = f"is its size {h}x{w} (height x width)?"
        raise ValueError(f"{path}: {said}; {size if found.size else 'pixels of which size?'}")


def write(path, form, w2c, intrinsics=None, size=None, binary=False):
    """Write cameras as read() returns them; binary: COLMAP only."""
    kind = FORMATS[form]
    if binary and form != "colmap":
        raise ValueError(f"--binary is for --to colmap, not for {form}")
    if form == "npz" and Path(path).suffix != ".npz":  # numpy would add it, and readers look for it
        raise ValueError(f"{path}: wanted a name that ends with .npz, such as {path}.npz")
    if kind.write is None:
        raise ValueError(f"format {form} is read only; --to is one of {', '.join(WRITTEN)}")
    if intrinsics is None and form not in ("tum", "npz"):
        without = "tum and npz do without"
        raise ValueError(f"{path}: {form} holds intrinsics, but the source has none; {without}")
    own = w2c * FLIP if kind.axes == "opengl" else w2c
    kind.write(path, own, intrinsics, size, **(dict(binary=True) if binary else {}))


def add_arguments(parser):
    """The arguments of `data.py cameras`."""
    parser.add_argument("source", metavar="IN", help="camera file, or a folder of them")
    parser.add_argument("target", metavar="OUT", help="file that is written")
    parser.add_argument("--from", dest="form", choices=FORMATS, help="else it is recognised")
    parser.add_argument("--to", choices=WRITTEN, default="re10k", help="default re10k")
    parser.add_argument("--size", type=size_of, metavar="HxW", help="of the file's pictures")
    parser.add_argument("--intrinsics", type=lens, metavar="fx,fy,cx,cy", help="pixels of --size")
    parser.add_argument("--axes", choices=("opencv", "opengl"), help="where it does not say")
    parser.add_argument("--matrices", choices=("w2c", "c2w"), help="the same")
    parser.add_argument("--binary", action="store_true", help="COLMAP: .bin instead of .txt")


def size_of(text):
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise ValueError(f"size {text!r}: wanted HxW in pixels, as 480x640")
    return int(match[1]), int(match[2])


def lens(text):
    fx, fy, cx, cy = map(float, text.split(","))
    return fx, fy, cx, cy


size_of.__name__, lens.__name__ = "HxW", "fx,fy,cx,cy"  # argparse: "invalid HxW value"


def convert(args):
    """`data.py cameras`: write a camera file in another format."""
    if Path(args.target).resolve() == Path(args.source).resolve():
        raise ValueError(f"{args.target}: the file to convert; name another one to write")
    told = dict(axes=args.axes, matrices=args.matrices, intrinsics=args.intrinsics)
    w2c, intrinsics, found = read(args.source, args.form, args.size, **told)
    write(args.target, args.to, w2c, intrinsics, found or args.size, args.binary)
    print(f"{args.target}: {len(w2c)} cameras")
