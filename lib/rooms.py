"""Exact renderer of synthetic rooms: a seed -> a short clip with true depth and cameras.

Textures, light and shade are functions of the surface point alone: all views of a scene agree.
Shapes: T frames, P = H*W pixels, n boxes (box 0 is the room, seen from inside), m spheres.  numpy,
float64 rays of z = 1: the ray parameter is the z-depth.  y points down; metres."""

import functools
import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from encoders import MINIATURE, WanFolder
from geometry import inv_se3, relative_to_first
from lib.caches import save_clip, save_tensors
from lib.camera_files import write_cameras
from lib.crop import check_video_size
from lib.files import read_json, write_aside
from lib.listing import EMPTY_TEXT
from lib.pictures import write_video

# Of a full and of a simple room.  Metres and radians (fov: degrees): low, high; turn: mean, sd;
# aim, pitch, roll: sd.
RANGES = dict(
    room=((2, 4), (2.6, 3.2)),
    height=((1.2, 1.6), (1.35, 1.45)),
    boxes=((3, 6), (0, 2)),
    spheres=((1, 3), (0, 1)),
    contrast=((0.5, 0.9), (0.3, 0.6)),
    frequency=((2, 5), (2, 4)),
    fov=((50, 85), (62, 70)),
    path=((0.3, 1.5), (0.7, 1.8)),
    aim=(0.5, 0.25),
    turn=((0, 0.35), (0.15, 0.1)),
    pitch=(0.1, 0.05),
    roll=(0.03, 0.01),
    special=(0.4, 0),
    clearance=(0.35, 0.6),
)
KINDS = ("full", "simple")
VARIETY = {kind: {name: pair[n] for name, pair in RANGES.items()} for n, kind in enumerate(KINDS)}

COLOURS = dict(
    red=(0.80, 0.16, 0.13),
    green=(0.20, 0.58, 0.24),
    blue=(0.15, 0.33, 0.76),
    yellow=(0.90, 0.74, 0.16),
    orange=(0.90, 0.46, 0.12),
    purple=(0.50, 0.24, 0.62),
    white=(0.88, 0.88, 0.85),
    teal=(0.10, 0.55, 0.56),
)


def rotation(axis, angle):
    """Rotations (..., 3, 3) about axis 0, 1 or 2."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    r = np.zeros((*np.shape(angle), 3, 3)) + np.eye(3)
    r[..., i, i] = r[..., j, j] = np.cos(angle)
    r[..., j, i], r[..., i, j] = np.sin(angle), -np.sin(angle)
    return r


def make_scene(rng, v, focal):
    """Draw a room, boxes and spheres.  Materials: 6 faces of the room, then one per object."""
    room = np.array([rng.uniform(*v["room"]), rng.uniform(*v["height"]), rng.uniform(*v["room"])])
    n, m = rng.integers(*v["boxes"], endpoint=True), rng.integers(*v["spheres"], endpoint=True)
    names = rng.choice(list(COLOURS), n + m, replace=n + m > len(COLOURS))
    half = rng.uniform([0.15, 0.2, 0.15], [0.6, 0.9, 0.6], (n, 3))
    radius = rng.uniform(0.2, 0.45, m)
    centre = rng.uniform(-0.85, 0.85, (n + m, 3)) * (room - 0.3)
    centre[:, 1] = room[1] - np.concatenate([half[:, 1], radius])  # standing on the floor
    wall, floor = rng.uniform(0.6, 0.95, 3), rng.uniform([0.5, 0.4, 0.3], [0.8, 0.68, 0.6])
    faces = [wall * 0.92, wall * 1.05, np.full(3, 0.93), floor, wall * 0.8, wall]
    base = np.stack(faces + [COLOURS[name] for name in names])
    dark = base * rng.uniform(0.25, 0.6, (len(base), 1)) + rng.uniform(0, 0.12, base.shape)
    # No aliasing: waves of 3 pixels or more at the far end, where the warp triples the frequency.
    frequency = rng.uniform(*v["frequency"], len(base)) * ([1] * 6 + [2] * (n + m))
    strength = [0.6, 0.6, 0.25, 1.2, 0.6, 0.6] + [1] * (n + m)
    contrast = rng.uniform(*v["contrast"], len(base)) * strength
    warp = rng.normal(size=(2, 3, 3))
    return dict(
        half=np.stack([room, *half]),
        centre=np.stack([np.zeros(3), *centre[:n]]),
        sphere=centre[n:],
        rot=rotation(1, np.concatenate([[0], rng.uniform(0, np.pi, n)])),
        radius=radius,
        names=names,
        base=base,
        dark=dark,
        frequency=np.minimum(frequency, 2 * np.pi * focal / (18 * room.max())),
        warp=warp / np.linalg.norm(warp, axis=-1, keepdims=True),
        contrast=contrast,
        offset=rng.uniform(-9, 9, (len(base), 3)),
        phase=rng.uniform(0, 2 * np.pi, 3),
        ambient=rng.uniform(0.4, 0.55),
        light=rng.uniform(-0.5, 0.5, 3) * room - [0, 0.45 * room[1], 0],
    )


def clearance(scene, p):
    """Distance of points p (T, 3) to the nearest surface."""
    local = np.einsum("tnc,nck->tnk", p[:, None] - scene["centre"], scene["rot"])
    q = np.abs(local) - scene["half"]
    d = np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0)  # (T, n)
    d[:, 0] *= -1  # seen from inside
    spheres = np.linalg.norm(p[:, None] - scene["sphere"], axis=-1) - scene["radius"]
    return np.concatenate([d, spheres], 1).min(1)


def camera_path(rng, v, scene, num_frames):
    """Draw a smooth free path, c2w (T, 3, 4) in the room's frame, and its kind; None: none fits."""
    kinds = ["free", "rotation", "translation", "static", "orbit"]
    kind = rng.choice(kinds, p=[1 - v["special"]] + [v["special"] / 4] * 4)
    s = np.linspace(0, 1, num_frames)
    s = s * s * (3 - 2 * s) if rng.random() < 0.3 else s  # ease in and out
    turns, moves = kind in ("free", "rotation"), kind in ("free", "translation")
    for attempt in range(300):
        start = rng.uniform(-0.6, 0.6, 3) * scene["half"][0] * [1, 0.5, 1]
        length = rng.uniform(*v["path"]) * 0.998**attempt  # shorter where crowded
        yaw = np.arctan2(-start[0], -start[2]) + rng.normal(0, v["aim"])  # to the room's middle
        yaw = yaw + s * rng.normal(*v["turn"]) * rng.choice([-1, 1]) * turns
        pitch = rng.normal(-0.15, v["pitch"]) + s * rng.normal(0, v["pitch"]) * turns
        roll = s * rng.normal(0, v["roll"]) * turns
        heading = rng.uniform(-np.pi, np.pi)
        step = np.array([np.sin(heading), rng.normal(0, 0.17), np.cos(heading)]) * length
        bezier = np.stack([s * (1 - s) ** 2, s * s * (1 - s)], 1)  # cubic
        centre = start + moves * (s[:, None] * step + bezier @ rng.normal(0, 0.3, (2, 3)))
        if kind == "orbit":  # about a point in front
            reach = rng.uniform(1.2, 2.2)
            yaw = yaw + s * length / reach * rng.choice([-1, 1])
            forward = np.stack([np.sin(yaw), 0 * yaw, np.cos(yaw)], -1)
            centre = start + reach * (forward[:1] - forward)
        if clearance(scene, centre).min() > v["clearance"]:
            rot = rotation(1, yaw) @ rotation(0, pitch) @ rotation(2, roll)
            return np.concatenate([rot, centre[..., None]], -1), str(kind)
    return None


def add_mover(rng, scene, c2w, k):
    """The scene with one more sphere that glides along a line across the cameras' view, clear of
    everything; None where none fits.  Its texture goes along; scene["track"] (T, 3): its centres in
    the room's frame."""
    radius, name = rng.uniform(0.15, 0.35), rng.choice(list(COLOURS))
    eyes, middle = c2w[:, :, 3], c2w[len(c2w) // 2]
    s, between = np.linspace(0, 1, len(c2w))[:, None], np.linspace(0.1, 0.9, 9)[:, None, None]
    for _ in range(300):
        rays = np.append(rng.uniform(-0.7, 0.7, (2, 2)) * k[:2, 2] / k[0, 0], np.ones((2, 1)), 1)
        a, b = rays * rng.uniform(1, 3, (2, 1)) @ middle[:, :3].T + middle[:, 3]  # ends of its way
        track = a + s * (b - a)
        x, y, z = np.einsum("tji,tj->it", c2w[:, :, :3], track - eyes)  # camera frames
        inside = (np.abs([x * k[0, 0], y * k[1, 1]]) < k[:2, 2, None] * z).all(0) & (z > 0.1)
        sight = (eyes + between * (track - eyes)).reshape(-1, 3)
        free = clearance(scene, sight).reshape(9, -1).min(0) > 0
        if (
            0.4 < np.linalg.norm(b - a) < 2
            and clearance(scene, track).min() > radius + 0.03
            and (inside & free).mean() > 0.6
            and np.linalg.norm(track - eyes, axis=1).min() > radius + 0.5
        ):
            colour = np.array(COLOURS[name])
            more = dict(
                sphere=track[0],
                radius=radius,
                names=name,
                base=colour,
                dark=0.3 * colour,
                frequency=min(6, scene["frequency"][:6].max()),
                contrast=0.8,
                offset=rng.uniform(-9, 9, 3),
            )
            more = {key: np.append(scene[key], [value], 0) for key, value in more.items()}
            return scene | more | dict(track=track)
    return None


def at_frame(scene, t):
    """The scene with its moving sphere, if it has one, where it is at frame t."""
    if "track" not in scene:
        return scene
    sphere, offset = scene["sphere"].copy(), scene["offset"].copy()
    sphere[-1] = scene["track"][t]
    offset[-1] -= scene["track"][t]
    return dict(scene, sphere=sphere, offset=offset)


def trace(scene, c2w, k, height, width):
    """First hit of every pixel-centre ray, of z = 1: its parameter is exactly the z-depth.

    returns  depth (P,), material (P,), points (3, P), normals (3, P) in the room's frame"""
    v, u = np.mgrid[:height, :width].reshape(2, -1) + 0.5
    x, y = (u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1]
    rays = c2w[:, :3] @ np.stack([x, y, np.ones_like(u)])
    origin, half, rot, n = c2w[:, 3], scene["half"], scene["rot"], len(scene["half"])
    d = rot.transpose(0, 2, 1) @ rays  # (n, 3, P) box frames
    d[np.abs(d) < 1e-12] = 1e-12
    middle = np.einsum("nck,nc->nk", rot, scene["centre"] - origin)[..., None] / d
    slab = half[..., None] / np.abs(d)
    near, far = middle - slab, middle + slab  # (n, 3, P) entry and exit
    near[0] = -far[0]  # the room is seen from inside
    t, face = near.max(1), near.argmax(1)  # (n, P) face = axis of the hit
    t[0] *= -1
    t[1:][(t[1:] >= far[1:].min(1)) | (t[1:] < 1e-4)] = np.inf
    a, offset = (rays * rays).sum(0), origin - scene["sphere"]  # (P,), (m, 3)
    b, c = offset @ rays, (offset**2).sum(-1)[:, None] - scene["radius"][:, None] ** 2
    disc = b * b - a * c  # (m, P)
    t_sphere = (-b - np.sqrt(np.maximum(disc, 0))) / a
    t = np.concatenate([t, np.where((disc > 0) & (t_sphere > 1e-4), t_sphere, np.inf)])
    hit, depth = t.argmin(0), t.min(0)
    points, pixel = origin[:, None] + rays * depth, np.arange(len(hit))
    box = np.minimum(hit, n - 1)
    axis = face[box, pixel]
    sign = np.sign(d[box, axis, pixel])
    normals = -sign * rot[box, :, axis].T  # against the ray
    for j in range(len(offset)):
        on = hit == n + j
        normals[:, on] = (points[:, on] - scene["sphere"][j, :, None]) / scene["radius"][j]
    return depth, np.where(hit == 0, 2 * axis + (sign > 0), hit + 5), points, normals


def shade(scene, material, points, normals):
    """Colours (P, 3) in [0, 1] of surface points (3, P)."""
    numbers = scene.keys() - {"names", "track"}
    s = {k: np.asarray(scene[k], np.float32) for k in numbers}  # twice as fast
    points, normals = points.astype(np.float32), normals.astype(np.float32)
    q = (points + s["offset"][material].T) * s["frequency"][material]
    bend = np.sin(s["warp"][0] @ q + s["phase"][:, None])
    mix = 0.5 + 0.5 * np.sin(2 * (s["warp"][1, 0] @ q) + 2.4 * (s["warp"][1, 1] @ bend))
    floor = material == 3
    tiles = np.tanh(3 * np.sin(q[0, floor]) * np.sin(q[2, floor]))
    mix[floor] = 0.2 * mix[floor] + 0.4 + 0.4 * tiles
    base = s["base"][material].T
    colour = base + (s["dark"][material].T - base) * mix * s["contrast"][material]
    to_light = s["light"][:, None] - points
    r2, facing = (to_light * to_light).sum(0), (normals * to_light).sum(0)
    far = np.sqrt(r2) * (1 + 0.08 * r2)
    light = s["ambient"] + (1 - s["ambient"]) * 1.4 * np.maximum(facing, 0) / far
    gap = np.sort(s["half"][0][:, None] - np.abs(points), 0)[1]  # to the room's nearest edge
    return np.clip(colour * light * (1 - 0.35 * np.exp(-4 * gap)), 0, 1).T


def caption(scene, seen, c2w, kind):
    """Prompt: the objects seen (boolean each) and the move as the first camera sees it."""
    things, boxes, still = [], len(scene["half"]) - 1, len(scene["names"]) - ("track" in scene)
    kinds = ((slice(0, boxes), "box", "boxes"), (slice(boxes, still), "sphere", "spheres"))
    for part, one, many in kinds:
        names = scene["names"][part][seen[part]]
        number = ["", "", "two", "three", "four", "five", "six"][len(names)]
        if len(names):
            things.append(f"a {names[0]} {one}" if len(names) == 1 else f"{number} {many}")
    if seen[still:].any():
        things.append(f"a moving {scene['names'][-1]} sphere")
    side = "right" if c2w[0, :, 0] @ c2w[-1, :, 2] > 0 else "left"  # where the view turns to
    move = c2w[0, :, :3].T @ (c2w[-1, :, 3] - c2w[0, :, 3])
    axis = np.abs(move).argmax()
    word = [("left", "right"), ("up", "down"), ("backward", "forward")][axis][int(move[axis] > 0)]
    words = dict(static="does not move", rotation=f"turns {side}", orbit=f"orbits, turning {side}")
    room = f"a room with {' and '.join(things)}" if things else "an empty room"
    return f"{room}, the camera {words.get(kind, f'moves {word}')}"


def render_clip(seed, num_frames, height, width, variety="full", moving=False):
    """Render the clip of a seed: rgb (T, H, W, 3) uint8, depth (T, H, W) float32 metres, exact at
    the pixel centres, objects (T, H, W) bool (boxes and spheres), w2c (T, 3, 4) float64 relative to
    frame 0, intrinsics (3, 3) pixels, prompt.

    moving   adds one sphere that moves by itself to the same room and path, and to the result:
             moving (T, H, W) bool, True on its pixels; track (T, 3) float64, its centres in the
             first camera's frame, metres; radius"""
    v, rng, path = VARIETY[variety], np.random.default_rng(seed), None
    focal = width / 2 / np.tan(np.radians(rng.uniform(*v["fov"])) / 2)
    k = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    while path is None:  # too crowded: draw again
        scene = make_scene(rng, v, focal)
        path = camera_path(rng, v, scene, num_frames)
        if moving and path:
            scene = add_mover(np.random.default_rng([seed, 1]), scene, path[0], k)
            path = scene and path
    c2w, kind = path
    rgb = np.empty((num_frames, height, width, 3), np.uint8)
    depths, materials = np.empty(rgb.shape[:3], np.float32), np.empty(rgb.shape[:3], np.uint8)
    for t, pose in enumerate(c2w):
        now = at_frame(scene, t)
        depth, material, points, normals = trace(now, pose, k, height, width)
        rgb[t].flat = shade(now, material, points, normals) * 255 + 0.5
        depths[t].flat, materials[t].flat = depth, material
    pixels = np.bincount(materials.ravel(), minlength=len(scene["base"]))  # of each material
    seen = pixels[6:] > 0.004 * pixels.sum()
    w2c = relative_to_first(inv_se3(torch.from_numpy(c2w))).numpy()
    clip = dict(
        rgb=rgb,
        depth=depths,
        objects=materials > 5,  # no wall, floor or ceiling
        w2c=w2c,
        intrinsics=k,
        prompt=caption(scene, seen, c2w, kind),
    )
    if moving:
        clip["moving"] = materials == len(pixels) - 1  # the last object
        clip["track"] = (scene["track"] - c2w[0, :, 3]) @ c2w[0, :, :3]
        clip["radius"] = scene["radius"][-1]
    return clip


# --- Datasets ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    """What a rendered dataset is made of; a finished one is not rendered again."""

    num: int  # training clips
    num_frames: int
    height: int
    width: int
    seed: int = 0  # of the first training clip; validation clips begin 10,000,000 later
    variety: str = "full"
    cache_only: bool = False  # encoded by wan_dir's encoders, without videos
    val: int = 0  # validation clips
    moving: bool = False  # one sphere moves by itself; moving.npz has its mask, track and radius
    wan_dir: str = MINIATURE

    def listed(self):
        size = [self.num, self.num_frames, self.height, self.width]
        values = [*size, self.seed, self.variety, self.cache_only, self.val]
        other = self.cache_only and self.wan_dir != MINIATURE
        return values + ["moving"] * self.moving + [self.wan_dir] * other

    def clips(self):
        """(id, seed, split) of every clip."""
        train = [(f"train_{n:06d}", self.seed + n, "train") for n in range(self.num)]
        val = [(f"val_{n:06d}", self.seed + 10_000_000 + n, "val") for n in range(self.val)]
        return train + val


def synth_one(job):
    """Render one clip and write it; returns its metadata entry."""
    out, recipe, (name, seed, split) = job
    size = (recipe.num_frames, recipe.height, recipe.width)
    clip = render_clip(seed, *size, recipe.variety, recipe.moving)
    clip["intrinsics"] = np.repeat(clip["intrinsics"][None], recipe.num_frames, 0)
    entry = dict(zip(("num_frames", "height", "width"), size))
    entry = dict(id=name, prompt=clip["prompt"], **entry, fps=15)
    if recipe.cache_only:
        write_cache(out, clip, entry, split, wan_dir=recipe.wan_dir)
        return dict(entry, cached=True)
    (out / name / "depth").mkdir(parents=True, exist_ok=True)
    write_video(out / name / "video.mp4", clip["rgb"], 15)
    for t, depth in enumerate(clip["depth"]):
        np.save(out / name / "depth" / f"frame_{t:04d}.npy", depth)
    write_cameras(out / name / "camera_params.txt", clip["w2c"], clip["intrinsics"], size[1:])
    if recipe.moving:
        # The mask comes first: the array that is read.
        more = dict(mask=clip["moving"], track=clip["track"], radius=clip["radius"])
        np.savez_compressed(out / name / "moving.npz", **more)
        entry["moving_path"] = f"{name}/moving.npz"
    paths = dict(video_path="video.mp4", depth_dir="depth", camera_file="camera_params.txt")
    return {**entry, **{key: f"{name}/{path}" for key, path in paths.items()}}


@functools.lru_cache(maxsize=1)
def encoders_of(wan_dir):
    encoders = WanFolder(wan_dir, "cpu")
    return encoders, encoders.load_text(), encoders.load_vae()


def write_cache(out, clip, entry, split, *, wan_dir):
    """One clip as a cache file, and the empty prompt beside it."""
    encoders, text, vae = encoders_of(wan_dir)
    clip["video"] = torch.from_numpy(clip.pop("rgb")).permute(3, 0, 1, 2) / 127.5 - 1
    for key in ("depth", "w2c", "intrinsics", "moving"):
        if key in clip:
            clip[key] = torch.from_numpy(clip[key])
    size = "x".join(str(entry[key]) for key in ("num_frames", "height", "width"))
    folder = out / "cache" / f"{size}-{encoders.fingerprint}"
    meta = dict(entry, sample=entry["id"], split=split, fingerprint=encoders.fingerprint)
    words = dict(text=text([clip["prompt"]])[0])
    save_clip(folder / f"{entry['id']}.safetensors", clip, vae, encoders.start_pad, words, meta)
    empty = folder / f"{EMPTY_TEXT}.safetensors"
    if not empty.exists():
        nothing = dict(text=text([""])[0].bfloat16())
        save_tensors(empty, nothing, dict(fingerprint=encoders.fingerprint))


def synth(out, recipe, workers=0):
    """Render the clips of a Recipe: sample folders, or the cache alone."""
    out, (height, width) = Path(out), (recipe.height, recipe.width)
    check_video_size((recipe.num_frames, height, width))
    if recipe.num < 1 or min(recipe.val, recipe.seed, workers) < 0:
        raise ValueError("wanted --num of 1 or more; --val, --seed and --workers of 0 or more")
    finished = out / "metadata.json"
    if finished.is_file():
        meta = read_json(finished)
        if not isinstance(meta, dict) or meta.get("synth") != recipe.listed():
            raise ValueError(f"{out}: holds another dataset; choose a new folder or delete it")
        print(f"{out}: already rendered")
        return
    (out / ("cache" if recipe.cache_only else "train_000000")).mkdir(parents=True, exist_ok=True)
    jobs = [(out, recipe, clip) for clip in recipe.clips()]
    os.environ |= dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # read by workers' numpy
    show = functools.partial(tqdm, total=len(jobs), desc="render", unit="clip")
    if workers:
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(workers, torch.set_num_threads, (1,)) as pool:
            entries = list(show(pool.imap(synth_one, jobs, chunksize=4)))
    else:
        entries = list(show(map(synth_one, jobs)))
    ids = [entry["id"] for entry in entries]
    told = dict(version="1.0", description="rendered by data.py synth", synth=recipe.listed())
    splits = dict(train=ids[: recipe.num], val=ids[recipe.num :], test=[])
    text = json.dumps(dict(told, samples=entries, splits=splits), indent=1)
    write_aside(finished, lambda path: path.write_text(text))  # last: it marks a finished dataset
    print(f"{out}: {recipe.num} training and {recipe.val} validation clips")
