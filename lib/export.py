"""One sample in memory (Scene), and every file that it can leave: videos, depth, clouds, cameras.

A new export is a function of (scene, path) and one line of EXPORTS.

Scene: lengths in the user's unit, world = the first camera, OpenCV axes (x right, y down, z
forward), pixel centres at +0.5.  T frames of H x W pixels, N points.  Files keep these axes, except
points.glb (y up, as glTF wants) and camera formats with axes of their own."""

import json
import os
import shutil
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from geometry import decode_pose, inv_se3, relative_to_first, scaled, unproject
from lib import camera_files, pictures
from lib.crop import focal_and_centre, fractions, pixel_matrix
from lib.metrics import align_sim3, head_agreement, pose_metrics, rotation_angle, warp_error
from lib.page import write_page

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
    lift: str = "commanded"  # or predicted: cameras of the points, of COLMAP and nerfstudio
    drop: float = 20.0  # percent of the pixels, the least confident, that mask leaves out
    report: dict = field(default_factory=dict)

    @property
    def size(self):
        return self.rgb.shape[1:3]

    def cameras(self):
        """w2c (T, 3, 4) and intrinsics (T, 4) that the points go with."""
        if self.lift == "commanded":
            return self.w2c, self.intrinsics
        return self.predicted, self.predicted_intrinsics

    @cached_property
    def points(self):
        """(T, H, W, 3) float32, world."""
        w2c, intrinsics = self.cameras()
        K = pixel_matrix(intrinsics, self.size)
        depth, w2c, K = (torch.from_numpy(x)[None] for x in (self.depth, w2c, K))
        return unproject(depth.double(), w2c, K)[0].float().numpy()

    def cloud(self, count):
        """At most `count` drawable points, evenly spaced in the pixels.

        returns  xyz (N, 3) float32, rgb (N, 3) uint8, flat index (t H + i) W + j of their pixels"""
        index = np.flatnonzero(self.mask)
        index = index[np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int)]
        return self.points.reshape(-1, 3)[index], self.rgb.reshape(-1, 3)[index], index


def fit_unit(commanded, predicted, scene_scale):
    """Length of a scene unit in the user's: the similarity from predicted to commanded centres.

    commanded    (T, 3, 4)   user's unit;   predicted  (T, 3, 4)  scene units
    scene_scale  the option: user units per scene unit, kept where the path cannot decide
    returns      dict: scale; path: RMS distance of the commanded centres from their mean, user's
                 unit; residual: RMS distance after the fit, user's unit; fitted: whether scale
                 comes from the fit; warning, or "" """
    target, source = (inv_se3(torch.from_numpy(E)[None])[..., 3] for E in (commanded, predicted))
    scale, R, t = align_sim3(source, target)
    gaps = (scale * source @ R.mT + t[:, None] - target, target - target.mean(1, keepdim=True))
    residual, path = (x.square().sum(-1).mean().sqrt().item() for x in gaps)
    unit = dict(residual=residual, scale=scale.item(), path=path)
    if path < 0.02 * scene_scale:
        why = f"the commanded cameras move too little (RMS {path:.3g} units) to fix the scale"
    elif residual > 0.5 * path or scale <= 0:
        share = f"residual {residual:.3g} of {path:.3g} units"
        why = f"the predicted cameras do not follow the commanded path ({share})"
    else:
        return dict(unit, fitted=True, warning="")
    warning = f"{why}; lengths are --scene_scale {scene_scale:g} times scene units, unchecked"
    return dict(unit, scale=float(scene_scale), fitted=False, warning=warning)


def make_scene(video, geometry, w2c, K, *, scene_scale=1.0, drop=20.0, lift="commanded"):
    """Output of a sample -> Scene, its report filled.

    video        (3, T, H, W)     [-1, 1]
    geometry     the model's dict for one clip, on the CPU, scene units
    w2c, K       (1, T, 3, 4), (1, T, 3, 3)   commanded, scene units, pixels
    scene_scale  user units per scene unit;   drop, lift  as in Scene"""
    rgb = pictures.as_pixels(video)
    size = rgb.shape[1:3]
    if not all(torch.isfinite(geometry[k]).all() for k in ("depth", "depth_conf", "pose_enc")):
        cure = "try --dtype fp32, or another checkpoint"
        raise ValueError(f"the sample's geometry holds NaN or infinite values; {cure}")
    predicted, predicted_K = decode_pose(geometry["pose_enc"][-1].double(), size)
    predicted = relative_to_first(predicted)[0]
    commanded = scaled(w2c.double()[0], scene_scale).numpy()
    unit = fit_unit(commanded, predicted.numpy(), scene_scale)
    depth, conf = (geometry[k][0].float().numpy() for k in ("depth", "depth_conf"))
    scene = Scene(
        rgb=rgb,
        depth=depth * np.float32(unit["scale"]),
        conf=conf,
        mask=pictures.off_edges(depth) & (conf >= np.percentile(conf, drop)),
        w2c=commanded,
        intrinsics=fractions(focal_and_centre(K[0]), size),
        predicted=scaled(predicted, unit["scale"]).numpy(),
        predicted_intrinsics=fractions(focal_and_centre(predicted_K[0]), size),
        lift=lift,
        drop=drop,
    )
    scene.report = dict(unit=unit, **measure(scene, geometry.get("points"), unit["scale"]))
    return scene


def measure(scene, points=None, scale=1.0):
    """What can be said without truth: does a sample obey its cameras and agree with itself?

    points  (1, T, H, W, 3) of the point head in scene units of `scale` user units, or None
    returns dict: control (predicted against commanded cameras), consistency, confidence"""
    commanded, predicted = (torch.from_numpy(E)[None] for E in (scene.w2c, scene.predicted))
    w2c, K = scene.cameras()
    maps = (scene.depth, w2c, pixel_matrix(K, scene.size))
    depth, w2c, K = (torch.from_numpy(x)[None].double() for x in maps)
    mask = torch.from_numpy(scene.mask)[None]
    control = pose_metrics(predicted, commanded)
    a, b = inv_se3(predicted)[0], inv_se3(commanded)[0]
    turns = rotation_angle(a[:, :, :3], b[:, :, :3]).tolist()
    moves = (a - b)[..., 3].norm(dim=-1).tolist()
    control["frames"] = [dict(rot_deg=r, trans=t) for r, t in zip(turns, moves)]
    agree = warp_error(torch.from_numpy(scene.rgb)[None], depth, w2c, K, mask)
    some = slice(None, None, -(-len(scene.rgb) // 16))  # at most 16 frames: double precision
    if points is not None:
        cut = (x[:, some] for x in (points.float() * scale, depth, w2c, K, mask))
        agree["heads"] = 100 * head_agreement(*cut)
    conf = scene.conf
    sure = {f"p{p}": float(np.percentile(conf, p)) for p in (5, 50, 95)}
    sure |= dict(mean=float(conf.mean()), kept_percent=100 * float(scene.mask.mean()))
    return dict(control=control, consistency=agree, confidence=sure)


def describe(report, unit):
    """The numbers of a sample as lines; what no pixel could tell, NaN or None, is unknown."""
    c, a, u = (report[k] for k in ("control", "consistency", "unit"))
    a = {k: "unknown" if v is None or v != v else f"{v:.1f} %" for k, v in a.items()}
    fitted = f", fitted, residual {u['residual']:.2g}" if u["fitted"] else ""
    heads = f", depth head against point head {a['heads']}" if "heads" in a else ""
    lines = [
        f"predicted against commanded cameras: rotation {c['rot_deg']:.2f} deg, position "
        f"{c['trans']:.3g} {unit}; 1 scene unit = {u['scale']:.3g} {unit}{fitted}",
        f"neighbouring frames: depth differs by {a['depth']}, colour by {a['colour']} "
        f"after warping ({a['colour_still']} without){heads}; confidence "
        f"{report['confidence']['p50']:.2f} (median)",
    ]
    return lines + [f"warning: {text}" for text in report["warnings"]]


# ---- videos, depth, pictures ---------------------------------------------------------------------
def write_depth_video(scene, path):
    """Depth in colours, bright is near, with a legend under every frame."""
    low, high = pictures.depth_range(scene.depth)
    legend = pictures.depth_legend(low, high, scene.size[1], scene.unit)
    frames = pictures.depth_to_rgb(scene.depth, low, high)
    legends = np.broadcast_to(legend, (len(frames), *legend.shape))
    pictures.write_video(path, np.concatenate([frames, legends], 1), scene.fps)


def write_depth_arrays(scene, path):
    K = pixel_matrix(scene.intrinsics, scene.size).astype(np.float32)
    maps = dict(depth=scene.depth, conf=scene.conf, mask=scene.mask)
    np.savez_compressed(path, **maps, w2c=scene.w2c.astype(np.float32), intrinsics=K)


def depth_step(scene):
    """Length of a count of the 16-bit pictures: the smallest power of ten that holds the depth."""
    return float(10.0 ** np.ceil(np.log10(max(float(scene.depth.max()), 1e-9) / 65535)))


def write_depth_pictures(scene, folder):
    """frame_00000.png ..., 16-bit; depth = count * depth_scale of scale.json, 0 = unknown."""
    step = depth_step(scene)
    write_frames(folder, (scene.depth / step).round().clip(0, 65535).astype(np.uint16))
    (folder / "scale.json").write_text(json.dumps(dict(depth_scale=step, unit=scene.unit)))


def write_frames(folder, frames):
    """Pictures (T, H, W, 3) uint8 or (T, H, W) uint16, numbered."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(frames):
        pictures.write_png(folder / f"frame_{t:05d}.png", frame)


def write_sheet(scene, path):
    """Up to 5 frames, their depth and confidence; below, all from above and the depth legend."""
    low, high = pictures.depth_range(scene.depth)
    pick = np.linspace(0, len(scene.rgb) - 1, min(5, len(scene.rgb))).round().astype(int)
    thin = -(-scene.size[1] // 320)
    sure = pictures.confidence_to_rgb(scene.conf, *np.quantile(scene.conf, (0.01, 0.99)))
    maps = (scene.rgb, pictures.depth_to_rgb(scene.depth, low, high), sure)
    rows = [[pictures.enlarge(x[t, ::thin, ::thin], 200) for t in pick] for x in maps]
    frames = f"frames {', '.join(str(t) for t in pick)}"
    titles = (frames, "depth, bright is near", "confidence, bright is sure")
    xyz, rgb, _ = scene.cloud(60_000)
    h, w = rows[0][0].shape[:2]
    size = (max(int(1.3 * h), 240), 2 * w)
    paths = [(scene.w2c, pictures.COMMANDED), (scene.predicted, pictures.PREDICTED)]
    below = (
        ("from above: cyan commanded, orange predicted", pictures.top_view(paths, size, xyz, rgb)),
        ("the paths alone", pictures.top_view(paths, size)),
        ("depth", pictures.depth_legend(low, high, w, scene.unit)),
    )
    pictures.write_png(path, pictures.sheet(rows, titles, below))


# ---- point clouds --------------------------------------------------------------------------------
def ply(path, columns):
    """Binary little-endian .ply of one element, vertex; name -> (N,) of float32 or uint8."""
    kinds = {"float32": ("<f4", "float"), "uint8": ("u1", "uchar")}
    types = {name: kinds[str(x.dtype)] for name, x in columns.items()}
    row = [(name, stored) for name, (stored, _) in types.items()]
    table = np.rec.fromarrays(list(columns.values()), row)
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property {word} {name}" for name, (_, word) in types.items()]
    Path(path).write_bytes("\n".join([*header, "end_header", ""]).encode() + table.tobytes())


def write_points(scene, path, most="ply"):
    """Points (float32) and colours (uint8), as many as one of MAX_POINTS allows."""
    xyz, rgb, _ = scene.cloud(MAX_POINTS[most])
    ply(path, dict(zip("xyz", xyz.T)) | dict(zip(("red", "green", "blue"), rgb.T)))


def write_splats(scene, path):
    """A start for splatting: a round Gaussian per point, as wide as its pixel, opacity 0.8.

    The reference's 62 float columns, degree 3 with zero rests.  Source: Kerbl et al. 2023."""
    xyz, rgb, index = scene.cloud(MAX_POINTS["splat"])
    n, (h, w) = len(xyz), scene.size
    spacing = np.sqrt(scene.mask.sum() / max(n, 1))  # thinned points stand further apart
    focal = scene.cameras()[1][index // (h * w), 0] * w
    width = np.asarray(np.log(scene.depth.reshape(-1)[index] / focal * spacing), np.float32)
    base = np.asarray((rgb / 255 - 0.5) / 0.28209479177387814, np.float32)  # over Y_00
    zero = np.zeros(n, np.float32)
    columns = dict(zip("xyz", xyz.T)) | {k: zero for k in ("nx", "ny", "nz")}
    columns |= {f"f_dc_{c}": base[:, c] for c in range(3)}
    columns |= {f"f_rest_{i}": zero for i in range(45)}
    columns |= dict(opacity=zero + np.float32(np.log(0.8 / 0.2)))
    columns |= {f"scale_{i}": width for i in range(3)}
    ply(path, columns | dict(rot_0=zero + 1) | {f"rot_{i}": zero for i in (1, 2, 3)})


def write_glb(scene, path):
    """glTF 2.0 binary with one mesh of points: y up, z towards the viewer, linear colours."""
    xyz, rgb, _ = scene.cloud(MAX_POINTS["glb"])
    if not len(xyz):
        raise ValueError(f"{path}: no point is sure enough to draw; lower --drop")
    xyz = np.ascontiguousarray(xyz * np.float32([1, -1, -1]))
    s, n = rgb / 255, len(xyz)
    # COLOR_0 is linear, pictures are sRGB.
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    colour = np.concatenate([linear, np.ones((n, 1))], 1).astype("<f4")
    body = xyz.astype("<f4").tobytes() + colour.tobytes()
    unlit = "KHR_materials_unlit"
    points = dict(attributes=dict(POSITION=0, COLOR_0=1), mode=0, material=0)
    flat = dict(extensions={unlit: {}}, pbrMetallicRoughness=dict(metallicFactor=0))
    bounds = dict(min=xyz.min(0).tolist(), max=xyz.max(0).tolist())
    tree = dict(
        asset=dict(version="2.0", generator="fantasyworld"),
        scene=0,
        scenes=[dict(nodes=[0])],
        nodes=[dict(mesh=0, name="points")],
        meshes=[dict(primitives=[points])],
        materials=[flat],
        extensionsUsed=[unlit],
        buffers=[dict(byteLength=len(body))],
        bufferViews=[
            dict(buffer=0, byteOffset=0, byteLength=12 * n, target=34962),
            dict(buffer=0, byteOffset=12 * n, byteLength=16 * n, target=34962),
        ],
        accessors=[
            dict(bufferView=0, componentType=5126, count=n, type="VEC3", **bounds),
            dict(bufferView=1, componentType=5126, count=n, type="VEC4"),
        ],
    )
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    file = struct.pack("<4sII", b"glTF", 2, 28 + len(text) + len(body))
    for kind, chunk in ((b"JSON", text), (b"BIN\0", body)):
        file += struct.pack("<I4s", len(chunk), kind) + chunk
    Path(path).write_bytes(file)


# ---- cameras and folders for other tools ---------------------------------------------------------
def write_colmap_folder(scene, folder):
    """images/, sparse/0/*.bin and text/*.txt, as `colmap gui --import_path` opens them."""
    xyz, rgb, _ = scene.cloud(MAX_POINTS["colmap"])
    write_frames(folder / "images", scene.rgb)
    for place, binary in ((folder / "sparse" / "0", True), (folder / "text", False)):
        camera_files.write(place, "colmap", *scene.cameras(), scene.size, binary)
    kinds = [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("track", "<u8")]
    record = np.zeros(len(xyz), kinds)  # not matched in pictures: no error, no tracks
    record["id"], record["xyz"], record["rgb"] = np.arange(1, len(xyz) + 1), xyz, rgb
    binary = struct.pack("<Q", len(xyz)) + record.tobytes()
    (folder / "sparse" / "0" / "points3D.bin").write_bytes(binary)
    rows = np.column_stack([record["id"], xyz, rgb])
    np.savetxt(folder / "text" / "points3D.txt", rows, "%d %.7g %.7g %.7g %d %d %d 0")


def write_nerfstudio_folder(scene, folder):
    """transforms.json, images/, depth/ and sparse_pc.ply, as nerfstudio-data wants them."""
    write_frames(folder / "images", scene.rgb)
    write_depth_pictures(scene, folder / "depth")
    write_points(scene, folder / "sparse_pc.ply", "nerfstudio")
    path = folder / "transforms.json"
    camera_files.write(path, "nerfstudio", *scene.cameras(), scene.size)
    tree = json.loads(path.read_text())
    for t, frame in enumerate(tree["frames"]):
        frame["depth_file_path"] = f"depth/frame_{t:05d}.png"
    tree.update(ply_file_path="sparse_pc.ply", depth_unit_scale_factor=depth_step(scene))
    path.write_text(json.dumps(tree, indent=1))


# ---- one door ------------------------------------------------------------------------------------
def write_cameras(scene, path):
    """The commanded cameras, and beside them the predicted ones."""
    camera_files.write(path, "re10k", scene.w2c, scene.intrinsics)
    path = path.with_name("cameras_predicted.txt")
    camera_files.write(path, "re10k", scene.predicted, scene.predicted_intrinsics)


# name: what is written into the sample's folder, by which function of (scene, path of the first)
EXPORTS = dict(
    video=("video.mp4", lambda scene, path: pictures.write_video(path, scene.rgb, scene.fps)),
    depth=("depth.mp4", write_depth_video),
    npz=("depth.npz", write_depth_arrays),
    png=("depth_png/", write_depth_pictures),
    ply=("points.ply", write_points),
    glb=("points.glb", write_glb),
    splat=("gaussians.ply", write_splats),
    cameras=("cameras.txt cameras_predicted.txt", write_cameras),
    colmap=("colmap/", write_colmap_folder),
    nerfstudio=("nerfstudio/", write_nerfstudio_folder),
    sheet=("sheet.png", write_sheet),
    html=("scene.html", write_page),
)

USUAL = "video,depth,npz,ply,cameras,sheet,html"


def export_names(text):
    """ "all" or names with commas -> list of keys of EXPORTS."""
    names = list(EXPORTS) if text == "all" else [n for n in text.replace(" ", "").split(",") if n]
    if unknown := set(names) - set(EXPORTS):
        wanted = f"wanted all, or names of {','.join(EXPORTS)}"
        raise ValueError(f"--export {min(unknown)}: unknown; {wanted}")
    return names


def files_of(names):
    """What exports of these names write into a sample's folder."""
    return " ".join(EXPORTS[name][0] for name in names).split()


def made_before(out):
    """Names in a folder that an earlier export wrote there, of those that one can write."""
    said = out / ".sample"
    text = said.read_bytes() if said.is_file() else b""
    return {file for file in files_of(EXPORTS) if json.dumps(file).encode() in text}


def check_out(out, names):
    """An export replaces what an earlier one has made, and nothing else."""
    report = [] if (out / ".sample").exists() else ["report.json"]
    targets = {*files_of(names), *report} - made_before(out) if out.is_dir() else {""}  # itself
    for place in map(out.joinpath, targets):
        if os.path.lexists(place):
            theirs = f"{place} is there and was not made by sample.py"
            raise ValueError(f"--out {out}: {theirs}. Choose another --out")
    return out


def write_exports(scene, out, names, progress=iter):
    """Write the named files in place of an earlier sample's; report.json, last, says: complete."""
    check_out(out, names)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").unlink(missing_ok=True)
    for target in (out / name for name in made_before(out)):
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    # Before they are there: a killed export's files are known too.
    (out / ".sample").write_text(json.dumps(files_of(names)))
    failed = []
    for name in progress(names):
        try:
            EXPORTS[name][1](scene, out / files_of([name])[0])
        except ValueError as error:  # what this sample cannot say in that format costs no other
            failed.append(str(error))
    # JSON has no NaN: a number that no pixel could tell is null.
    report = json.loads(json.dumps(scene.report), parse_constant=lambda _: None)
    (out / "report.json").write_text(json.dumps(report, indent=1))
    if failed:
        raise ValueError("; ".join(failed))
