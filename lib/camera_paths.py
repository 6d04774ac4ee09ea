"""Camera paths: named moves, key frames, and files brought to the frames and size of a video."""

import difflib
import math
import pathlib
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from geometry import compose, inv_se3, mat_to_quat, normalize_scene, quat_to_mat, relative_to_first
from lib import camera_files
from lib.crop import Crop, crop_intrinsics, pixel_matrix
from lib.depth import METRES, DepthUnit, read_depth, why_relative
from lib.distributed import say
from lib.files import FAR, read_video


@dataclass(frozen=True)
class View:
    """What a camera path needs to be told beside its name."""

    fov: float = 65.0  # horizontal, degrees, where the camera has no intrinsics
    amount: float = 1.0  # strength of a named move
    scene_scale: float = 1.0  # units of a file or of key frames per scene unit
    form: str | None = None  # format of a camera file that does not show it
    pictures: tuple | None = None  # (H, W) of a camera file's pictures, where it does not say
    stride: int = 1  # of a camera file, every so many cameras are used


def kind_of(text):
    """What a --camera is: a file, a move or key frames."""
    if "->" in text:  # many are longer than a file's name may be
        return "key frames"
    file = text not in ("", *MOVES) and (pathlib.Path(text).suffix or pathlib.Path(text).exists())
    return "a file" if file else "a move"


def load_camera(text, num_frames, size, view=View()):
    """A named move, key frames or a camera file, for a video of num_frames pictures of size (H, W).

    returns  w2c (1, T, 3, 4) relative to frame 0, scene units; intrinsics (1, T, 3, 3) pixels"""
    zoom, intrinsics, scale = torch.ones(num_frames), None, view.scene_scale
    if (kind := kind_of(text)) == "key frames":
        w2c = key_frames(text, num_frames)
    elif kind == "a file":
        w2c, intrinsics = from_file(text, num_frames, size, view)
    else:
        w2c, zoom = camera_move(text, num_frames, view.amount)
        scale = 1.0  # a move is in scene units already
    w2c = relative_to_first(torch.as_tensor(w2c[:num_frames])[None].double())
    w2c = torch.cat([w2c[..., :3], w2c[..., 3:] / scale], -1).float()
    if not w2c[..., 3].norm(dim=-1).max() < FAR:  # NaN is not
        raise ValueError(f"--camera {text[:99]}: its camera goes too far or nowhere; see --amount")
    if intrinsics is not None and view.fov != View.fov:
        say(f"{text}: its own intrinsics are taken, not --fov {view.fov:g}")
    if intrinsics is None:
        fx = zoom.double().numpy() / 2 / np.tan(np.radians(view.fov) / 2)
        intrinsics = np.stack([fx, fx * size[1] / size[0], fx * 0 + 0.5, fx * 0 + 0.5], -1)
    return w2c, torch.from_numpy(pixel_matrix(intrinsics, size)).float()[None]


def from_file(path, num_frames, size, view):
    """A camera file's w2c, and intrinsics as fractions, cropped to the aspect of size as pictures
    are; its own pictures may be of any size."""
    try:
        w2c, intrinsics, source = camera_files.read(path, view.form, view.pictures, pinhole=True)
    except ValueError as error:
        words = str(error).replace("--from", "--camera_format")
        for name in ("--matrices", "--axes", "--intrinsics"):
            words = words.replace(name, f"python data.py cameras IN OUT.npz --to npz {name}")
        raise ValueError(words.replace("--size HxW", "--camera_size HxW")) from None
    last = view.stride * (num_frames - 1)
    if len(w2c) <= last:
        by = f" and --camera_stride {view.stride}" if view.stride > 1 else ""
        wanted = f"--frames {num_frames}{by} wants {last + 1} or more"
        raise ValueError(f"{path}: {len(w2c)} cameras; {wanted}")
    if len(w2c) > last + view.stride:
        most = (len(w2c) - 1) // max(1, num_frames - 1)
        whole = f"--camera_stride {most} spans the path" if most > view.stride else "the rest waits"
        say(f"{path}: {len(w2c)} cameras, 0 .. {last} are used; {whole}")
    if intrinsics is not None:  # files without a size: of square pixels
        aspect = source[1] / source[0] if source else intrinsics[0, 1] / intrinsics[0, 0]
        intrinsics = crop_intrinsics(intrinsics[:: view.stride][:num_frames], aspect, size)
    return w2c[:: view.stride], intrinsics


def mean_distance(text, K, size, picture=""):
    """Mean distance of a depth map seen with the cameras' K; FILE, or FILE*0.001: units a count.

    picture   file of the same view: both are cut to the aspect of size; "": the map is squeezed"""
    found = re.fullmatch(r"(.+)\*(\d*\.?\d+(?:e-?\d+)?)", text)
    path, unit = (found[1], DepthUnit(float(found[2]))) if found else (text, METRES)
    depth = read_depth(path, unit, frames=[0])  # (1, h, w)
    why = not found and why_relative(pathlib.Path(path)) or not depth.any() and "no known pixel"
    if why:
        raise ValueError(f"--scene_scale {text}: {why}; wanted lengths, or FILE*UNITS_PER_COUNT")
    source, _, pixel = read_video(picture, 1)[1] if picture else (size, 0, 1.0)
    depth = Crop(source, size, pixel).maps(depth)[None]
    return normalize_scene(depth, torch.eye(4)[None, None, :3], K[:, :1], depth > 0)[2].item()


# --- Named moves ----------------------------------------------------------------------------------
# Direction of the camera's centre, axis that it turns around, sign of the focal length's change.
# fmt: off
TRAVEL = {
    "static": (0, 0, 0), "forward": (0, 0, 1), "backward": (0, 0, -1),
    "right": (1, 0, 0), "left": (-1, 0, 0), "up": (0, -1, 0), "down": (0, 1, 0),
}
TURN_AXIS = {
    "pan_right": (0, 1, 0), "pan_left": (0, -1, 0),
    "tilt_up": (1, 0, 0), "tilt_down": (-1, 0, 0), "tilt": (1, 0, 0), "orbit": (0, -1, 0),
}
ZOOM = {"zoom_in": 1, "zoom_out": -1, "zoom": 1}
# fmt: on
MOVES = [*TRAVEL, *TURN_AXIS, *ZOOM, "spiral"]


def camera_move(name, num_frames, amount=1.0):
    """A named camera move, starting at the identity, at rest at both ends.

    name     one of MOVES; orbit circles the point one scene unit ahead, spiral looks at it
    amount   1 travels 0.3 scene units, turns by 30 degrees, zooms by 1.5; negative: back
    returns  w2c (T, 3, 4) in scene units, focal (T,): the factor on fx and fy"""
    if name not in MOVES:
        near = ", ".join(difflib.get_close_matches(name, MOVES, cutoff=0.4)) or "none"
        words = f"nearest: {near}; known: {', '.join(MOVES)}."
        raise ValueError(f"unknown camera move {name!r}; {words}")
    s = torch.linspace(0, 1, num_frames)
    gone = s * s * (3 - 2 * s)  # (T,) the share of the move that is done at each frame
    way = amount * gone
    half = way[:, None] * math.radians(15)  # (T, 1) half of the angle turned
    axis = torch.tensor(TURN_AXIS.get(name, (0, 0, 0)))
    R = quat_to_mat(torch.cat([half.sin() * axis, half.cos()], -1))
    centre = 0.3 * way[:, None] * torch.tensor(TRAVEL.get(name, (0, 0, 0)))  # (T, 3)
    if name == "orbit":  # a circle to the right, around the point ahead
        centre = torch.cat([(2 * half).sin(), 0 * half, 1 - (2 * half).cos()], -1)
    if name == "spiral":  # two windings up to 0.1 off the view axis
        off, angle = 0.1 * way, 4 * math.pi * gone
        centre = [off * angle.sin(), off * (1 - angle.cos()), torch.zeros_like(off)]
        centre = torch.stack(centre, -1)
        w2c = np.stack([look_at(c, (0, 0, 1)) for c in centre.numpy()])
        R = torch.from_numpy(w2c[:, :, :3]).mT.float()
    return inv_se3(torch.cat([R, centre[..., None]], -1)), 1.5 ** (ZOOM.get(name, 0) * way)


# --- Key frames -----------------------------------------------------------------------------------
def key_frames(text, num_frames):
    """ "x,y,z -> x,y,z | ..." or "0: x,y,z -> x,y,z | 0.4: ...": from where to what the camera
    looks, y down, in the user's unit.

    Times are shares of the clip, evenly spread when left out.  returns  w2c (T, 3, 4) float64."""
    times, poses, parts = [], [], text.split("|")
    if len(parts) < 2:
        raise ValueError(f"--camera {text[:99]}: one key frame; wanted two or more, with | between")
    for i, part in enumerate(parts):
        found = re.fullmatch(r"\s*(?:([\d.]+)\s*:)?(.*)->(.*)", part)
        try:
            centre, target = ([float(x) for x in found[k].split(",")] for k in (2, 3))
            if not len(centre) == len(target) == 3 or not all(map(math.isfinite, centre + target)):
                raise TypeError
            times.append(float(found[1] or i / max(1, len(parts) - 1)))
        except (TypeError, ValueError):
            such = "'0,0,0 -> 0,0,2 | 0.3,0,0.5 -> 0,0,2'"
            said = f"--camera, key frame {part.strip()!r}: wanted x,y,z -> x,y,z, as in {such}"
            raise ValueError(said) from None
        poses.append(look_at(centre, target))
    if times != sorted({*times}) or max(times) > 1:
        raise ValueError(f"--camera {text[:99]}: times {times}; wanted rising shares, 0 to 1")
    return interpolate(times, poses, np.linspace(0, 1, num_frames))


def look_at(centre, target):
    """w2c (3, 4) float64 of a camera at `centre` that looks at `target`, with y below."""
    centre, target = (np.asarray(x, float) for x in (centre, target))
    z = target - centre
    x = np.cross((0, 1, 0), z)
    if np.linalg.norm(z) < 1e-12 or np.linalg.norm(x) < 1e-9 * np.linalg.norm(z):
        seen = f"{centre.tolist()} -> {target.tolist()} looks straight up, down or nowhere"
        raise ValueError(f"--camera, key frame {seen}. Move its target a little aside")
    x, z = x / np.linalg.norm(x), z / np.linalg.norm(z)
    R = np.stack([x, np.cross(z, x), z])  # rows: the camera's axes in the world
    return np.concatenate([R, -R @ centre[:, None]], 1)


def interpolate(times, w2c, at):
    """Two or more key frames w2c (K, 3, 4) at rising times (K,) -> w2c (T, 3, 4) at `at` (T,).

    Between two of them the camera moves by a constant screw motion; beyond the ends it rests."""
    times, at, w2c = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (times, at, w2c))
    if len(times) < 2 or (times.diff() <= 0).any():
        raise ValueError(f"interpolate: times {times.tolist()}; wanted two or more, increasing")
    i = (torch.searchsorted(times, at, right=True) - 1).clamp(0, len(times) - 2)
    share = ((at - times[i]) / (times[i + 1] - times[i])).clamp(0, 1)
    twist = log_se3(compose(w2c[i + 1], inv_se3(w2c[i])))
    return compose(exp_se3(share[:, None] * twist), w2c[i]).numpy()


def log_se3(E):
    """Rigid transforms (..., 3, 4), up to 180 degrees -> twist (..., 6): rotation, velocity."""
    q = mat_to_quat(E[..., :3])
    sine = q[..., :3].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, q[..., 3:])
    w = q[..., :3] * torch.where(sine > 1e-9, angle / sine.clamp(min=1e-12), 2)
    half = angle.clamp(min=1e-4) / 2
    c = torch.where(angle > 1e-4, (1 - half / half.tan()) / (2 * half) ** 2, 1 / 12)
    t = E[..., 3]
    wt = torch.linalg.cross(w, t, dim=-1)
    return torch.cat([w, t - wt / 2 + c * torch.linalg.cross(w, wt, dim=-1)], -1)


def exp_se3(twist):
    """Inverse of log_se3."""
    (a, b, c), v = twist[..., :3].unbind(-1), twist[..., 3:]
    zero = torch.zeros_like(a)
    W = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], -1).unflatten(-1, (3, 3))
    return torch.matrix_exp(F.pad(torch.cat([W, v[..., None]], -1), (0, 0, 0, 1)))[..., :3, :]
