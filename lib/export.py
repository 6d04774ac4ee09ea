"""One sample in memory (Scene) and every file that it can leave: videos, depth, point clouds,
cameras, folders for COLMAP and nerfstudio, a start for Gaussian splatting, a contact sheet and a
page that opens offline in any browser.

Scene: lengths in the user's unit, world = the first camera, OpenCV axes (x right, y down, z
forward), pixel centres at +0.5.  T frames of H x W pixels, N points.  Files keep these axes, except
points.glb (y up, as glTF wants) and camera formats with axes of their own (cameras.py)."""

import json
import shutil
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from geometry import decode_pose, inv_se3, relative_to_first, unproject
from lib import camera_files
from lib.camera_files import pixel_matrix
from lib.metrics import align_sim3, head_agreement, pose_metrics, rotation_angle, warp_error
from lib.page import write_page
from lib.pictures import (
    SEEN,
    TOLD,
    depth_legend,
    depth_to_rgb,
    enlarge,
    sheet,
    sure_to_rgb,
    top_view,
    write_png,
    write_video,
)

MAX_POINTS = dict(ply=2_000_000, glb=1_000_000, splat=300_000, colmap=200_000, nerfstudio=200_000)


@dataclass
class Scene:
    rgb: np.ndarray  # (T, H, W, 3) uint8
    depth: np.ndarray  # (T, H, W) float32 z-depth
    conf: np.ndarray  # (T, H, W) float32, above 1, larger is surer; no unit, no probability
    mask: np.ndarray  # (T, H, W) pixels worth drawing: sure enough, and off depth edges
    w2c: np.ndarray  # (T, 3, 4) float64, commanded
    intrinsics: np.ndarray  # (T, 4) fx/W, fy/H, cx/W, cy/H, commanded
    predicted: np.ndarray  # (T, 3, 4), read off the sample by the camera head
    predicted_intrinsics: np.ndarray
    fps: float = 16.0
    unit: str = "units"  # word behind lengths
    # or predicted: the cameras that lift depth to points and that COLMAP, nerfstudio get
    lift: str = "commanded"
    drop: float = 20.0  # percent of the pixels, the least confident, that mask leaves out
    report: dict = field(default_factory=dict)

    @property
    def size(self):
        return self.rgb.shape[1:3]

    def solid(self):
        """Pixels (T, H, W) off depth edges."""
        return off_edges(self.depth)

    def cameras(self):
        """w2c (T, 3, 4) and intrinsics (T, 4) that the points go with."""
        return (
            (self.w2c, self.intrinsics)
            if self.lift == "commanded"
            else (self.predicted, self.predicted_intrinsics)
        )

    @cached_property
    def points(self):
        """(T, H, W, 3) float32, world."""
        w2c, intrinsics = self.cameras()
        return (
            unproject(
                torch.from_numpy(self.depth)[None].double(),
                torch.from_numpy(w2c)[None],
                torch.from_numpy(pixel_matrix(intrinsics, self.size))[None],
            )[0]
            .float()
            .numpy()
        )

    def cloud(self, count, frame=None):
        """At most `count` drawable points, evenly spaced in the pixels: xyz (N, 3) float32, rgb (N,
        3) uint8, and the
        flat index (t H + i) W + j of their pixels (N,).   frame: of that one alone."""
        index = np.flatnonzero(self.mask if frame is None else self.mask[frame])
        index = index + (frame or 0) * self.mask[0].size
        index = index[np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int)]
        return self.points.reshape(-1, 3)[index], self.rgb.reshape(-1, 3)[index], index


def off_edges(depth, jump=0.05):
    """Pixels (T, H, W) with no depth step of more than `jump` beside them; the picture's border
    counts as one."""
    keep = np.isfinite(depth) & (depth > 0)
    for axis in (1, 2):
        beside = np.roll(depth, -1, axis)
        edge = np.abs(beside - depth) > jump * np.minimum(depth, beside)
        keep &= ~edge & ~np.roll(edge, 1, axis)  # the last row or column meets the first
    return keep


def fit_unit(told, predicted, told_scale):
    """Length of a scene unit in the user's: the similarity that lays the predicted camera centres
    on the commanded.

    told        (T, 3, 4)   commanded, user's unit;   predicted  (T, 3, 4)  scene units
    told_scale  the user units per scene unit that the model was told, kept where the path cannot
                decide
    returns     dict: scale; path: RMS distance of the commanded centres from their mean, user's
                unit; residual: RMS distance after the fit, user's unit; fitted: whether scale comes
                from the fit; warning, or "" """
    target, source = (inv_se3(torch.from_numpy(E)[None])[..., 3] for E in (told, predicted))
    scale, R, t = align_sim3(source, target)
    rms = lambda x: x.square().sum(-1).mean().sqrt().item()
    residual = rms(scale * source @ R.mT + t[:, None] - target)
    path, unit = (
        rms(target - target.mean(1, keepdim=True)),
        dict(residual=residual, scale=scale.item()),
    )
    if path < 0.02 * told_scale:
        why = f"the commanded cameras move too little (RMS {path:.3g} units) to fix the scale"
    elif residual > 0.5 * path or scale <= 0:
        why = f"the predicted cameras do not follow the commanded path (residual {residual:.3g} of {path:.3g} units)"
    else:
        return dict(unit, path=path, fitted=True, warning="")
    return dict(
        unit,
        path=path,
        scale=float(told_scale),
        fitted=False,
        warning=f"{why}; lengths are --scene_scale {told_scale:g} times scene units, unchecked",
    )


def make_scene(video, geometry, w2c, K, fps=16.0, told_scale=1.0, drop=20.0, lift="commanded"):
    """Output of a sample -> Scene, its report filled.

    video       (3, T, H, W)     [-1, 1]
    geometry    the model's dict for one clip, on the CPU, scene units
    w2c, K      (1, T, 3, 4), (1, T, 3, 3)   commanded, scene units, pixels;   told_scale   user units per scene unit
    drop, lift  as in Scene"""
    rgb = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    size = rgb.shape[1:3]
    enc = geometry["pose_enc"][-1].double()
    if not all(torch.isfinite(geometry[k]).all() for k in ("depth", "depth_conf", "pose_enc")):
        raise ValueError(
            "the sample's geometry holds NaN or infinite values; try --dtype fp32, or another "
            "checkpoint"
        )
    seen, seen_K = decode_pose(enc, size)
    seen, w2c = relative_to_first(seen)[0].numpy(), w2c.double()[0].numpy()
    told = scaled(w2c, told_scale)
    unit = fit_unit(told, seen, told_scale)
    depth, conf = (geometry[k][0].float().numpy() for k in ("depth", "depth_conf"))
    mask = off_edges(depth) & (conf >= np.percentile(conf, drop))
    scene = Scene(
        rgb,
        depth * np.float32(unit["scale"]),
        conf,
        mask,
        told,
        fractions(K[0], size),
        scaled(seen, unit["scale"]),
        fractions(seen_K[0], size),
        fps,
        lift=lift,
        drop=drop,
    )
    points = geometry["points"].float() if "points" in geometry else None
    scene.report = dict(unit=unit, **measure(scene, points, unit["scale"]))
    return scene


def scaled(w2c, scale):
    return np.concatenate([w2c[..., :3], w2c[..., 3:] * scale], -1)


def fractions(K, size):
    """(T, 3, 3) pixels -> (T, 4) fx/W, fy/H, cx/W, cy/H."""
    K = np.asarray(K, float)
    return np.stack([K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2]], -1) / [
        size[1],
        size[0],
        size[1],
        size[0],
    ]


def measure(scene, points=None, scale=1.0):
    """What can be said about a sample without truth: does it obey the cameras, and does it agree
    with itself?

    points  (1, T, H, W, 3) of the point head in scene units of `scale` user units, or None
    returns dict: control (predicted against commanded cameras), consistency, confidence"""
    told, seen = (torch.from_numpy(E)[None] for E in (scene.w2c, scene.predicted))
    w2c, K = scene.cameras()
    depth, w2c, K = (
        torch.from_numpy(x)[None].double() for x in (scene.depth, w2c, pixel_matrix(K, scene.size))
    )
    mask = torch.from_numpy(scene.mask)[None]
    a, b = inv_se3(seen)[0], inv_se3(told)[0]
    control = pose_metrics(seen, told)
    control["frames"] = [
        dict(rot_deg=r, trans=t)
        for r, t in zip(
            rotation_angle(a[:, :, :3], b[:, :, :3]).tolist(), (a - b)[..., 3].norm(dim=-1).tolist()
        )
    ]
    agree = warp_error(torch.from_numpy(scene.rgb)[None], depth, w2c, K, mask)
    some = slice(None, None, -(-len(scene.rgb) // 16))  # at most 16 frames: double precision
    if points is not None:
        agree["heads"] = 100 * head_agreement(
            points[:, some] * scale, depth[:, some], w2c[:, some], K[:, some], mask[:, some]
        )
    conf = scene.conf
    return dict(
        control=control,
        consistency=agree,
        confidence=dict(
            mean=float(conf.mean()),
            **{f"p{p}": float(np.percentile(conf, p)) for p in (5, 50, 95)},
            kept_percent=100 * float(scene.mask.mean()),
        ),
    )


def describe(report, unit):
    """The numbers of a sample as three lines."""
    c, a, u = (report[k] for k in ("control", "consistency", "unit"))
    fitted = f", fitted, residual {u['residual']:.2g}" if u["fitted"] else ""
    heads = f", depth head against point head {a['heads']:.1f} %" if "heads" in a else ""
    return [
        f"predicted against commanded cameras: rotation {c['rot_deg']:.2f} deg, position "
        f"{c['trans']:.3g} {unit}; "
        f"1 scene unit = {u['scale']:.3g} {unit}{fitted}",
        f"neighbouring frames: depth differs by {a['depth']:.1f} %, colour by {a['colour']:.1f} % "
        "after warping "
        f"({a['colour_still']:.1f} % without){heads}; confidence "
        f"{report['confidence']['p50']:.2f} (median)",
        *(f"warning: {text}" for text in report["warnings"]),
    ]


# ---- videos, depth, pictures ---------------------------------------------------------------------
def depth_range(scene):
    """The 1st and 99th percentile of the depth: what colours span."""
    return tuple(float(x) for x in np.quantile(scene.depth[scene.depth > 0], (0.01, 0.99)))


def write_depth_video(scene, path):
    """Depth in colours, bright is near, with a legend under every frame."""
    low, high = depth_range(scene)
    legend = depth_legend(low, high, scene.size[1], scene.unit)
    frames = depth_to_rgb(scene.depth, low, high)
    write_video(
        path,
        np.concatenate([frames, np.broadcast_to(legend, (len(frames), *legend.shape))], 1),
        scene.fps,
    )


def write_depth_arrays(scene, path):
    h, w = scene.size
    np.savez_compressed(
        path,
        depth=scene.depth,
        conf=scene.conf,
        mask=scene.mask,
        w2c=scene.w2c.astype(np.float32),
        intrinsics=pixel_matrix(scene.intrinsics, (h, w)).astype(np.float32),
    )


def depth_step(scene):
    """Length of one count of the 16-bit depth pictures: the smallest power of ten that fits the
    farthest pixel."""
    return float(10.0 ** np.ceil(np.log10(max(float(scene.depth.max()), 1e-9) / 65535)))


def write_depth_pictures(scene, folder):
    """frame_00000.png ..., 16-bit; depth = count * depth_scale of scale.json, 0 = unknown."""
    folder.mkdir(parents=True, exist_ok=True)
    step = depth_step(scene)
    for t, depth in enumerate(scene.depth):
        write_png(
            folder / f"frame_{t:05d}.png", (depth / step).round().clip(0, 65535).astype(np.uint16)
        )
    (folder / "scale.json").write_text(json.dumps(dict(depth_scale=step, unit=scene.unit)))


def write_frames(scene, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(scene.rgb):
        write_png(folder / f"frame_{t:05d}.png", frame)


def write_sheet(scene, path):
    """Frames, depth and confidence of up to 5 frames; below, the paths and points from above and
    the depth legend."""
    low, high = depth_range(scene)
    pick = np.linspace(0, len(scene.rgb) - 1, min(5, len(scene.rgb))).round().astype(int)
    thin = -(-scene.size[1] // 320)
    sure = sure_to_rgb(scene.conf, *np.quantile(scene.conf, (0.01, 0.99)))
    rows = [
        [enlarge(x[t, ::thin, ::thin], 200) for t in pick]
        for x in (scene.rgb, depth_to_rgb(scene.depth, low, high), sure)
    ]
    xyz, rgb, _ = scene.cloud(60_000)
    h, w = rows[0][0].shape[:2]
    size, paths = (max(int(1.3 * h), 240), 2 * w), [(scene.w2c, TOLD), (scene.predicted, SEEN)]
    write_png(
        path,
        sheet(
            rows,
            (
                f"frames {', '.join(str(t) for t in pick)}",
                "depth, bright is near",
                "confidence, bright is sure",
            ),
            (
                ("from above: cyan commanded, orange predicted", top_view(paths, size, xyz, rgb)),
                ("the paths alone", top_view(paths, size)),
                ("depth", depth_legend(low, high, w, scene.unit)),
            ),
        ),
    )


# ---- point clouds --------------------------------------------------------------------------------
def ply(path, **columns):
    """Binary little-endian .ply of one element, vertex; columns name -> (N,) of float32 or
    uint8."""
    kinds = {"float32": ("<f4", "float"), "uint8": ("u1", "uchar")}
    table = np.empty(
        len(next(iter(columns.values()))), [(n, kinds[str(x.dtype)][0]) for n, x in columns.items()]
    )
    for name, x in columns.items():
        table[name] = x
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(table)}",
        *(f"property {kinds[str(x.dtype)][1]} {n}" for n, x in columns.items()),
        "end_header",
        "",
    ]
    Path(path).write_bytes("\n".join(header).encode() + table.tobytes())


def write_ply(path, points, rgb):
    """Points (N, 3) float32 and colours (N, 3) uint8."""
    ply(path, **dict(zip("xyz", points.T)), **dict(zip(("red", "green", "blue"), rgb.T)))


def write_splats(scene, path):
    """A start for Gaussian splatting: one round Gaussian per point, as wide as its pixel at its
    depth, opacity 0.8.

    The 62 float columns of the reference implementation, degree 3 with zero rests.  Source: Kerbl
    et al. 2023."""
    xyz, rgb, index = scene.cloud(MAX_POINTS["splat"])
    n, (h, w) = len(xyz), scene.size
    spacing = np.sqrt(scene.mask.sum() / max(n, 1))  # thinned points stand further apart
    width = scene.depth.reshape(-1)[index] / (scene.cameras()[1][index // (h * w), 0] * w) * spacing
    zero, f = np.zeros(n, np.float32), lambda x: np.asarray(x, np.float32)
    columns = dict(zip("xyz", xyz.T)) | {k: zero for k in ("nx", "ny", "nz")}
    columns |= {
        f"f_dc_{c}": f((rgb[:, c] / 255 - 0.5) / 0.28209479177387814) for c in range(3)
    }  # Y_00 = 0.282...
    columns |= {f"f_rest_{i}": zero for i in range(45)} | dict(
        opacity=zero + np.float32(np.log(0.8 / 0.2))
    )
    columns |= {f"scale_{i}": f(np.log(width)) for i in range(3)} | dict(rot_0=zero + 1)
    ply(path, **columns, **{f"rot_{i}": zero for i in (1, 2, 3)})


def write_glb(scene, path):
    """glTF 2.0 binary with one mesh of points, positions in y up, z towards the viewer, colours in
    linear light."""
    xyz, rgb, _ = scene.cloud(MAX_POINTS["glb"])
    if not len(xyz):
        raise ValueError(f"{path}: no point is sure enough to draw; lower --drop")
    xyz = np.ascontiguousarray(xyz * np.float32([1, -1, -1]))
    s = rgb / 255
    linear = np.where(
        s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4
    )  # COLOR_0 is linear, pictures are sRGB
    colour = np.concatenate([linear, np.ones((len(rgb), 1))], 1).astype("<f4")
    body = xyz.astype("<f4").tobytes() + colour.tobytes()
    n = len(xyz)
    tree = dict(
        asset=dict(version="2.0", generator="fantasyworld"),
        scene=0,
        scenes=[dict(nodes=[0])],
        nodes=[dict(mesh=0, name="points")],
        meshes=[
            dict(primitives=[dict(attributes=dict(POSITION=0, COLOR_0=1), mode=0, material=0)])
        ],
        materials=[
            dict(
                extensions=dict(KHR_materials_unlit={}), pbrMetallicRoughness=dict(metallicFactor=0)
            )
        ],
        extensionsUsed=["KHR_materials_unlit"],
        buffers=[dict(byteLength=len(body))],
        bufferViews=[
            dict(buffer=0, byteOffset=0, byteLength=12 * n, target=34962),
            dict(buffer=0, byteOffset=12 * n, byteLength=16 * n, target=34962),
        ],
        accessors=[
            dict(
                bufferView=0,
                componentType=5126,
                count=n,
                type="VEC3",
                min=xyz.min(0).tolist(),
                max=xyz.max(0).tolist(),
            ),
            dict(bufferView=1, componentType=5126, count=n, type="VEC4"),
        ],
    )
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    Path(path).write_bytes(
        struct.pack("<4sII", b"glTF", 2, 28 + len(text) + len(body))
        + struct.pack("<I4s", len(text), b"JSON")
        + text
        + struct.pack("<I4s", len(body), b"BIN\0")
        + body
    )


# ---- cameras and folders for other tools ---------------------------------------------------------
def write_camera_files(scene, folder):
    """Commanded and predicted cameras in every format of cameras.py that can hold them -> formats
    left out."""
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(
        re10k="re10k.txt",
        fantasyworld="fantasyworld.json",
        worldscore="worldscore.json",
        tum="tum.txt",
        nerfstudio="transforms.json",
        colmap="colmap",
        npz="cameras.npz",
    )
    left_out = []
    for who, w2c, K in (
        ("commanded", scene.w2c, scene.intrinsics),
        ("predicted", scene.predicted, scene.predicted_intrinsics),
    ):
        (folder / who).mkdir(exist_ok=True)
        for form, name in names.items():
            try:
                camera_files.write(folder / who / name, form, w2c, K, scene.size)
            except (
                ValueError
            ):  # the two JSON layouts hold one focal length and centred cameras only
                left_out.append(f"{who}/{name}")
    return left_out


def write_colmap_folder(scene, folder):
    """images/, sparse/0/*.bin and text/*.txt: cameras, images and points3D, as `colmap gui
    --import_path` opens."""
    xyz, rgb, _ = scene.cloud(MAX_POINTS["colmap"])
    write_frames(scene, folder / "images")
    for place, binary in ((folder / "sparse" / "0", True), (folder / "text", False)):
        camera_files.write(place, "colmap", *scene.cameras(), scene.size, binary)
    record = np.empty(
        len(xyz),
        [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("track", "<u8")],
    )
    record["id"], record["xyz"], record["rgb"] = np.arange(1, len(xyz) + 1), xyz, rgb
    record["error"] = record["track"] = 0  # not matched in pictures: no tracks
    (folder / "sparse" / "0" / "points3D.bin").write_bytes(
        struct.pack("<Q", len(xyz)) + record.tobytes()
    )
    (folder / "text" / "points3D.txt").write_text(
        "".join(
            f"{i} {x:.7g} {y:.7g} {z:.7g} {r} {g} {b} 0\n"
            for i, ((x, y, z), (r, g, b)) in enumerate(zip(xyz, rgb), 1)
        )
    )


def write_nerfstudio_folder(scene, folder):
    """transforms.json, images/, depth/ and sparse_pc.ply, as nerfstudio's nerfstudio-data parser
    wants them."""
    write_frames(scene, folder / "images")
    write_depth_pictures(scene, folder / "depth")
    xyz, rgb, _ = scene.cloud(MAX_POINTS["nerfstudio"])
    write_ply(folder / "sparse_pc.ply", xyz, rgb)
    path = folder / "transforms.json"
    camera_files.write(path, "nerfstudio", *scene.cameras(), scene.size)
    tree = json.loads(path.read_text())
    for t, frame in enumerate(tree["frames"]):
        frame["depth_file_path"] = f"depth/frame_{t:05d}.png"
    tree.update(ply_file_path="sparse_pc.ply", depth_unit_scale_factor=depth_step(scene))
    path.write_text(json.dumps(tree, indent=1))


# ---- one door ------------------------------------------------------------------------------------
def write_top_cameras(scene, out):
    for name, w2c, K in (
        ("cameras.txt", scene.w2c, scene.intrinsics),
        ("cameras_predicted.txt", scene.predicted, scene.predicted_intrinsics),
    ):
        camera_files.write(out / name, "re10k", w2c, K)


def write_points(scene, out, per_frame=False):
    xyz, rgb, _ = scene.cloud(MAX_POINTS["ply"])
    write_ply(out / "points.ply", xyz, rgb)
    if per_frame:
        (out / "points").mkdir(exist_ok=True)
        for t in range(len(scene.rgb)):
            write_ply(out / "points" / f"frame_{t:05d}.ply", *scene.cloud(MAX_POINTS["ply"], t)[:2])


EXPORTS = dict(
    video=("video.mp4", lambda s, out: write_video(out / "video.mp4", s.rgb, s.fps)),
    depth=("depth.mp4", lambda s, out: write_depth_video(s, out / "depth.mp4")),
    npz=("depth.npz", lambda s, out: write_depth_arrays(s, out / "depth.npz")),
    png=("depth_png/", lambda s, out: write_depth_pictures(s, out / "depth_png")),
    ply=("points.ply", write_points),
    plys=("points/", lambda s, out: write_points(s, out, per_frame=True)),
    glb=("points.glb", lambda s, out: write_glb(s, out / "points.glb")),
    splat=("gaussians.ply", lambda s, out: write_splats(s, out / "gaussians.ply")),
    cameras=("cameras.txt", write_top_cameras),
    formats=("cameras/", lambda s, out: write_camera_files(s, out / "cameras")),
    colmap=("colmap/", lambda s, out: write_colmap_folder(s, out / "colmap")),
    nerfstudio=("nerfstudio/", lambda s, out: write_nerfstudio_folder(s, out / "nerfstudio")),
    sheet=("sheet.png", lambda s, out: write_sheet(s, out / "sheet.png")),
    html=("scene.html", lambda s, out: write_page(s, out / "scene.html")),
)

USUAL = "video,depth,npz,ply,cameras,sheet,html"


def export_names(text):
    """ "all" or names with commas -> list of keys of EXPORTS."""
    names = list(EXPORTS) if text == "all" else [n for n in text.split(",") if n]
    if unknown := [n for n in names if n not in EXPORTS]:
        raise ValueError(
            f"--export {unknown[0]}: unknown; wanted all, or names of {','.join(EXPORTS)}"
        )
    return names


def check_out(out, names):
    """An export replaces folders that it has made before, and no others."""
    if not (out / ".sample").exists():
        for folder in (out / EXPORTS[name][0] for name in names):
            if folder.is_dir():
                raise ValueError(
                    f"--out {out}: {folder} is there and is not of an earlier sample, which would "
                    "be "
                    f"replaced. Choose another --out"
                )


def write_exports(scene, out, names, progress=iter):
    """Write the named files and, last, report.json: where it lies, the sample is complete."""
    check_out(out, names)
    out.mkdir(parents=True, exist_ok=True)
    (out / ".sample").touch()
    (out / "report.json").unlink(missing_ok=True)
    for name in progress(names):
        target = out / EXPORTS[name][0]
        if target.is_dir():  # of an earlier run: no stale frames
            shutil.rmtree(target)
        EXPORTS[name][1](scene, out)
    (out / "report.json").write_text(json.dumps(scene.report, indent=1))
