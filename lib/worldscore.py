"""The folders of public benchmarks: WorldScore's instances and cameras; WBench's poses.

WorldScore (Duan et al. 2025, github.com/haoyi-duan/WorldScore at 344983c) lists start image,
prompts and named camera moves, one move for each scene of a chain: a scene starts with the last
frame of the one before.  A move starts where the camera stands; frames between are interpolated,
rotation by slerp and translation of w2c linearly.  Its axes: PyTorch3D (x left, y up, z forward)
for the moves, Blender (x right, y up, z back) for the c2w in camera_data.json.

WBench commands one camera for every latent; its pictures are 1920 x 1080 and run at 24 a second.
docs/evaluation.md has the tree that is written, and why its frames are square."""

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from geometry import normalize_scene, relative_to_first, scaled
from lib.camera_files import homogeneous
from lib.camera_paths import interpolate
from lib.crop import crop_intrinsics, focal_and_centre, fractions, pixel_matrix
from lib.files import read_json, write_aside
from lib.jobs import check_writable
from lib.pictures import write_png, write_video

SIDE, FOCAL = 512, 500  # pixels of its frames
SPEED = 0.3  # scene units that its camera_speed of 1 stands for: as far as our own moves go
TURN = 30.0  # degrees of pan and orbit
# fmt: off
SHIFT = {  # of w2c, in units of the speed
    "push_in": (0, 0, -1), "pull_out": (0, 0, 1),
    "move_left": (-0.5, 0, 0), "move_right": (0.5, 0, 0),
    "pull_left": (-0.3, 0, 0.3), "pull_right": (0.3, 0, 0.3),
}
ANGLE = {
    "orbit_left": -TURN, "orbit_right": TURN, "pan_left": TURN, "pan_right": -TURN,
    "pull_left": TURN, "pull_right": -TURN,
}
# fmt: on
MOVES = (*dict.fromkeys((*SHIFT, *ANGLE)), "fixed")


@dataclass(frozen=True)
class Instance:
    """One world to make."""

    folder: Path
    image: Path
    prompts: list  # of each scene
    moves: list  # of each scene
    entry: dict  # as it stands in the list
    settings: dict | None = None  # what it is made with; None: whatever it was

    def finished(self, frames):
        """Whether it is there, whole and made with these settings, as far as older ones tell."""
        count = len(list(self.folder.glob("frames/*.png")))
        try:
            data = read_json(self.folder / "image_data.json")  # the last that is written
            before = data.get("settings")
            same = None in (before, self.settings) or self.settings | before == self.settings
        except (ValueError, AttributeError, TypeError):  # not there, or damaged: it alone is lost
            return False
        return same and count == len(self.moves) * (frames - 1) + 1


def read_list(path, runs, settings=None):
    """Instances of static.json or dynamic.json, which lies in DATASET/static/ or DATASET/dynamic/;
    images are named relative to DATASET."""
    entries, root = read_json(path), Path(path).resolve().parents[1]
    check_writable(Path(runs))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: wanted WorldScore's list of instances (static.json)")
    found = []
    for n, entry in enumerate(entries):
        try:
            found.append(read_entry(entry, root, Path(runs), settings))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            said = error if isinstance(error, ValueError) else f"no {error}, or of another kind"
            wanted = "wanted visual_movement, visual_style, scene_type, image, camera_path, "
            wanted += "prompt_list and style"
            raise ValueError(f"{path}: entry {n}: {said}; {wanted}") from None
    return found


def read_entry(entry, root, runs, settings):
    kind, image = entry["visual_movement"], Path(entry["image"])
    moves = list(entry["camera_path"])
    if unknown := [move for move in moves if move not in MOVES]:
        raise ValueError(f"camera_path {unknown[0]!r:.40}; known: {', '.join(MOVES)}")
    if kind == "static":
        parts = [entry["visual_style"], entry["scene_type"], image.parts[-2], image.stem]
        words = entry["prompt_list"][1 : len(moves) + 1]
    elif kind == "dynamic":
        parts = [entry["visual_style"], entry["motion_type"], image.stem]
        words = [entry["prompt"]]
    else:
        raise ValueError(f"visual_movement {kind!r:.40}; wanted static or dynamic")
    if len(words) != len(moves) or not moves:
        found = f"{len(words)} prompts for {len(moves)} scenes"
        raise ValueError(f"{found}; wanted one more than moves in prompt_list")
    if not all(re.fullmatch(r"\w[\w .-]*", part) for part in parts):
        raise ValueError(f"{'/'.join(parts)!r:.99} cannot name a folder")
    if image.is_absolute() or ".." in image.parts:
        raise ValueError(f"image {str(image)!r:.99} leads out of the dataset")
    # As the official loader joins them.
    prompts = [f"{w}{'' if w.endswith('.') else '.'} {entry['style']}" for w in words]
    folder = runs.joinpath("worldscore_output", kind, *parts)
    return Instance(folder, root / image, prompts, moves, entry, settings)


# ---------------------------------------------------------------------------------------- cameras
def move_matrix(name, speed=1.0):
    """w2c (4, 4) after a move from the origin, PyTorch3D's axes."""
    angle = math.radians(ANGLE.get(name, 0.0))
    c, s = math.cos(angle), math.sin(angle)
    turn = np.array([[c, 0, -s, 0], [0, 1, 0, 0], [s, 0, c, 0], [0, 0, 0, 1]], float)
    if name.startswith("orbit"):  # about a point in front, at a distance of `speed`
        there, back = np.eye(4), np.eye(4)
        there[2, 3], back[2, 3] = speed, -speed
        return there @ turn @ back
    turn[:3, 3] = speed * np.array(SHIFT.get(name, (0, 0, 0)), float)
    return turn


def key_cameras(moves, speed=1.0):
    """w2c (scenes + 1, 4, 4) where scenes begin and end, the first is the identity."""
    found = [np.eye(4)]
    for name in moves:
        found.append(move_matrix(name, speed) @ found[-1])
    return np.stack(found)


def all_cameras(keys, frames):
    """w2c of every frame (scenes * (frames - 1) + 1, 4, 4) between key cameras."""
    times = np.arange(len(keys))
    at = np.arange((len(keys) - 1) * (frames - 1) + 1) / (frames - 1)
    turns = keys[:, :3] * [1, 1, 1, 0]  # of a pure rotation, a constant screw is slerp
    poses = homogeneous(interpolate(times, turns, at))
    poses[:, :3, 3] = np.stack([np.interp(at, times, x) for x in keys[:, :3, 3].T], -1)
    return poses


def as_opencv(w2c):
    """PyTorch3D's w2c (N, 4, 4) -> ours (N, 3, 4): x and y of camera and world turn around."""
    flip = np.diag([-1.0, -1, 1, 1])
    return (flip @ w2c @ flip)[:, :3]


def as_blender(w2c):
    """PyTorch3D's w2c (N, 4, 4) -> camera_data.json's c2w, the world stays PyTorch3D's."""
    return np.linalg.inv(np.diag([-1.0, 1, -1, 1]) @ w2c)


# ---------------------------------------------------------------------------------- making, writing
def square_side(options, trained):
    """Side of the frames; ValueError for a size that is not square."""
    area = trained["height"] * trained["width"]
    near = max(16, round(math.sqrt(area) / 16) * 16)  # as many pixels as in training
    h, w = options.height or options.width or near, options.width or options.height or near
    if h != w:
        why = "its camera metrics take the centre of every picture as that of a square one"
        raise ValueError(f"--worldscore with {h} x {w} pixels: {why}; leave out --height, --width")
    return h


def make(instance, image, scene, *, frames, fps):
    """Make the scenes of an instance one after another and write its folder.

    image    uint8 (H, H, 3) start image
    scene    (image, prompt, w2c (1, T, 3, 4), K (1, T, 3, 3)) -> uint8 frames (T, H, H, 3) and
             depth (T, H, H) in the unit of the scene's own first frame"""
    began, cameras = time.time(), as_opencv(all_cameras(key_cameras(instance.moves, SPEED), frames))
    lens = pixel_matrix([[FOCAL / SIDE, FOCAL / SIDE, 0.5, 0.5]], image.shape[:2])
    K = torch.from_numpy(lens).float()[None].expand(1, frames, 3, 3)
    shown, unit = [image[None]], 1.0  # of this scene, in units of the first one
    for n, prompt in enumerate(instance.prompts):
        part = torch.from_numpy(cameras[n * (frames - 1) :][:frames])[None]
        w2c = scaled(relative_to_first(part).float(), 1 / unit)
        rgb, depth = scene(shown[-1][-1], prompt, w2c, K)
        shown.append(rgb[1:] if n else rgb)
        last = torch.from_numpy(depth[None, -1:]).float()
        unit *= normalize_scene(last, torch.eye(4)[None, None, :3], K[:, :1], last > 0)[2].item()
    write_instance(instance, np.concatenate(shown[1:]), image, fps=fps, seconds=time.time() - began)


def squared(frames):
    """uint8 (T, H, H, 3) -> (T, SIDE, SIDE, 3)."""
    frames = torch.from_numpy(frames).movedim(-1, 1).float()
    frames = F.interpolate(frames, (SIDE, SIDE), mode="bicubic", antialias=True)
    return frames.clamp(0, 255).round().byte().movedim(1, -1).numpy()


def write_instance(instance, frames, first, *, fps, seconds):
    """Everything that the official tools read of one instance; image_data.json comes last.

    frames  uint8 (T, H, H, 3) of all scenes;  first (H, H, 3) the start image as it was given"""
    folder, scenes, count = instance.folder, len(instance.moves), len(frames)
    each = (count - 1) // scenes + 1
    for old in (folder / "image_data.json", *folder.glob("frames/*.png")):  # of other settings
        old.unlink(missing_ok=True)
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    (folder / "videos").mkdir(exist_ok=True)
    frames = frames if frames.shape[1] == SIDE else squared(frames)
    for n, picture in enumerate(frames):
        write_png(folder / "frames" / f"{n:03d}.png", picture)
    write_png(folder / "input_image.png", squared(first[None])[0])
    write_video(folder / "videos" / "output.mp4", frames, fps)
    (folder / "time.txt").write_text(f"generate_time: {seconds}\n")
    data = dict(instance.entry, num_scenes=scenes, total_frames=count, settings=instance.settings)
    if instance.entry["visual_movement"] == "static":
        keys = key_cameras(instance.moves, SPEED)
        cameras = dict(focal_length=FOCAL, scale=SPEED, cameras=as_blender(keys).tolist())
        cameras["cameras_interp"] = as_blender(all_cameras(keys, each)).tolist()
        (folder / "camera_data.json").write_text(json.dumps(cameras, indent=4))
        data["anchor_frame_idx"] = [n * (each - 1) for n in range(scenes + 1)]
    text = json.dumps(data, indent=4)
    write_aside(folder / "image_data.json", lambda aside: aside.write_text(text), durable=False)


# ------------------------------------------------------------------------------------------ WBench
def from_wbench(poses, frames, size):
    """Cameras of WBench's generate_with_poses(image, poses, video_length), for `frames` pictures.

    poses    {latent index: {"extrinsic": c2w (4, 4) OpenCV, "K": (3, 3) of 1920 x 1080 pixels}},
             one for every latent: latent l ends with frame 4 l; frames between are interpolated
    size     (H, W) of the pictures; the intrinsics are cropped to its aspect as pictures are
    returns  w2c (1, T, 3, 4) relative to frame 0, in its unit; K (1, T, 3, 3) pixels"""
    order = sorted(poses, key=int)
    if [int(k) for k in order] != list(range((frames - 1) // 4 + 1)) or frames % 4 != 1:
        found = f"poses of {len(order)} latents for {frames} frames"
        raise ValueError(f"{found}; wanted one for each of (frames - 1) / 4 + 1, from 0 on")
    c2w = np.stack([np.asarray(poses[k]["extrinsic"], float) for k in order])
    w2c = np.linalg.inv(c2w)[:, :3]
    times = 4 * np.arange(len(order))
    w2c = interpolate(times, w2c, np.arange(frames)) if len(order) > 1 else w2c
    K = np.stack([np.asarray(poses[k]["K"], float) for k in order])
    lens = fractions(focal_and_centre(K), (1080, 1920))
    lens = np.stack([np.interp(np.arange(frames), times, column) for column in lens.T], -1)
    K = pixel_matrix(crop_intrinsics(lens, 1920 / 1080, size), size)
    return relative_to_first(torch.from_numpy(w2c)[None]).float(), torch.from_numpy(K).float()[None]


class WBenchModel:
    """WBench's CameraConditionedModel: one pose for every latent in, frames at 24 a second out."""

    fps = 24

    def __init__(self, scene, size, prompt=""):
        """scene, of sample.scene_sampler, as in `make`; size (H, W) of its pictures."""
        self.scene, self.size, self.prompt = scene, size, prompt

    def generate_with_poses(self, image, poses, video_length):
        """image uint8 (H, W, 3) of `size`, poses as in from_wbench -> uint8 frames (N, H, W, 3).

        The model makes 4 (latents - 1) + 1 frames, of which the first video_length are given."""
        frames = 4 * (len(poses) - 1) + 1
        if video_length > frames:
            found = f"{video_length} frames of {len(poses)} poses"
            raise ValueError(f"{found}; a pose for every latent gives {frames} at most")
        camera = from_wbench(poses, frames, self.size)
        return self.scene(image, self.prompt, *camera)[0][:video_length]
