"""scene.html: one sample as one offline page for any browser; viewer.html is its template."""

import base64
import json
import tempfile
from pathlib import Path

import numpy as np

from lib.camera_files import inverse
from lib.pictures import COLOUR_MAP, depth_range, off_edges, write_video

PAGE_POINTS = 1_100_000  # depth samples in the page, 6 bytes each (8 in base64)
PAGE_VIDEO = 4_000_000  # bytes of its video, which is compressed harder until it fits

# Rows of the page: heading, label, value of the report (None: filled per frame), explanation.
# fmt: off
ROWS = [
    ("Obeys the cameras", "Rotation error", "{control[rot_deg]:.2f}\u00b0",
     "mean angle between predicted and commanded cameras"),
    ("Obeys the cameras", "Position error", "{control[trans]:.3g} {word}",
     "mean distance of predicted and commanded camera centres"),
    ("Obeys the cameras", "At this frame", None,
     "rotation and position error of the frame shown"),
    ("Obeys the cameras", "Scale residual", "{unit[residual]:.3g} {word}",
     "RMS distance of the paths after the best similarity"),
    ("Obeys the cameras", "Path size", "{unit[path]:.3g} {word}",
     "RMS distance of the commanded centres from their mean"),
    ("Obeys the cameras", "Scene unit", "{unit[scale]:.3g} {word}{fitted}",
     "length of one scene unit, fitted so that the predicted path has the commanded size"),
    ("Agrees with itself", "Colour after warping", "{consistency[colour]:.1f} %",
     "mean colour difference of neighbouring frames after one is moved onto the other with its "
     "depth and cameras; 100 % is black against white"),
    ("Agrees with itself", "Without warping", "{consistency[colour_still]:.1f} %",
     "the same pixels, frames laid on each other as they are: warping should be lower where the "
     "camera moves"),
    ("Agrees with itself", "Depth after warping", "{consistency[depth]:.1f} %",
     "median relative difference of the depths that neighbouring frames see at the same place"),
    ("Agrees with itself", "Pixels compared", "{consistency[seen_percent]:.0f} %",
     "sure pixels that land inside the next frame, at a depth within 10 % of what is there"),
    ("Agrees with itself", "Depth and point heads", "{consistency[heads]:.1f} %",
     "mean distance of the point map from the lifted depth map, relative to the distance of the "
     "point"),
    ("Confidence", "Median", "{confidence[p50]:.2f}",
     "1 is the least possible; the head's own guess, not a probability"),
    ("Confidence", "5 % to 95 %", "{confidence[p5]:.2f} to {confidence[p95]:.2f}",
     "spread over all pixels"),
    ("Confidence", "Pixels kept", "{confidence[kept_percent]:.0f} %",
     "sure enough and off depth edges: what point files hold"),
]
# fmt: on


def page_numbers(report, word):
    """Rows of the page: [heading, [[label, value or None, explanation], ...]]; word: the unit."""
    fitted = "" if report["unit"]["fitted"] else ", not fitted"
    sections, told = {}, dict(report, word=word, fitted=fitted)
    for heading, label, value, explanation in ROWS:
        alone = label == "Depth and point heads" and "heads" not in report["consistency"]
        if alone or report.get("truth") and heading != "Agrees with itself":
            continue  # nothing was predicted
        text = value and value.format(**told).replace("nan %", "unknown")  # no pixel could tell
        sections.setdefault(heading, []).append([label, text, explanation])
    return [[heading, rows] for heading, rows in sections.items()]


def page_stride(frames, size):
    """Step of the page's depth grid: every pixel while PAGE_POINTS allows, else every second ..."""
    step = 1
    while frames * -(-size[0] // step) * -(-size[1] // step) > PAGE_POINTS:
        step += 1
    return step


def default_view(scene, yaw=0.32, pitch=0.22):
    """The page's first view: turned a little, so far back that cameras and points fit."""
    xyz, _, _ = scene.cloud(20_000)
    centres = np.concatenate([inverse(E)[..., 3] for E in (scene.w2c, scene.predicted)])
    (cy, sy), (cp, sp) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch))
    # The viewer's axes, as turn() of viewer.html has them.
    R = np.array([[cy, -sy * sp, sy * cp], [0, cp, sp], [-sy, -cy * sp, cy * cp]])
    cloud = np.quantile(xyz @ R, [0.03, 0.97], axis=0) if len(xyz) else np.zeros((0, 3))
    corners = np.concatenate([cloud, centres @ R])
    half = (corners.max(0) - corners.min(0)) / 2
    distance = max(2.2 * half[1], 1.8 * half[0]) + 0.8 * half[2]
    target = (R @ (corners.max(0) - half)).tolist()
    return dict(target=target, yaw=yaw, pitch=pitch, distance=float(distance) or 1.0)


def pack_maps(scene, stride):
    """Every stride-th pixel of the sample in the bytes that the page reads.

    returns  depth (T, h, w) uint16 in steps of 1 / depth, 1 far and 65535 near, 0 at depth edges;
             colour (T, h, w, 4) uint8, the fourth is the confidence as its rank; near, far"""
    pick = (slice(None), slice(stride // 2, None, stride), slice(stride // 2, None, stride))
    depth, rgb, conf = scene.depth[pick], scene.rgb[pick], scene.conf[pick]
    near, far = depth_range(scene.depth, (0.001, 0.999))
    code = 65535 * (1 / np.clip(depth, near, far) - 1 / far) / (1 / near - 1 / far)
    code = np.where(off_edges(scene.depth)[pick], code.round().clip(1, 65535), 0).astype("<u2")
    rank = np.searchsorted(np.sort(conf, None), conf.ravel(), "right") / conf.size * 255
    colour = np.concatenate([rgb, rank.reshape(*conf.shape, 1).astype(np.uint8)], -1)
    return code, colour, near, far


def cut(text, most=500):
    """Text of a page, at most so long."""
    return text if len(text) <= most else f"{text[:most]} ..."


def page_video(scene):
    """The video's bytes, compressed harder until PAGE_VIDEO holds them or it gets no harder."""
    with tempfile.TemporaryDirectory() as home:
        for crf in (20, 26, 32, 38, 44, 51):
            write_video(Path(home, "video.mp4"), scene.rgb, scene.fps, crf)
            video = Path(home, "video.mp4").read_bytes()
            if len(video) <= PAGE_VIDEO:
                break
    return video


def write_page(scene, path):
    """scene.html: viewer.html with the scene inside, no other file and no network."""
    report, stride = scene.report, page_stride(len(scene.rgb), scene.size)
    depth, colour, near, far = pack_maps(scene, stride)
    view = default_view(scene)
    digits = 7 - min(0, int(np.floor(np.log10(view["distance"]))))  # of poses, behind the point
    blobs = dict(depth=depth.tobytes(), colour=colour.tobytes(), video=page_video(scene))
    data = dict(
        title=cut(report.get("prompt") or "A sampled scene"),
        facts=cut(report.get("facts", "")),
        unit=scene.unit,
        fps=scene.fps,
        size=list(scene.size),
        grid=list(depth.shape[1:]),
        stride=stride,
        near=near,
        far=far,
        lift=scene.lift,
        drop=scene.drop,
        c2w=inverse(scene.w2c).reshape(-1, 12).round(digits).tolist(),
        predicted=inverse(scene.predicted).reshape(-1, 12).round(digits).tolist(),
        K=scene.intrinsics.round(7).tolist(),
        predictedK=scene.predicted_intrinsics.round(7).tolist(),
        **view,
        errors=[[frame["rot_deg"], frame["trans"]] for frame in report["control"]["frames"]],
        map=COLOUR_MAP.astype(int).tolist(),
        numbers=page_numbers(report, scene.unit),
        warnings=[cut(text) for text in report.get("warnings", [])],
    )
    data |= {name: base64.b64encode(blob).decode() for name, blob in blobs.items()}
    template = Path(__file__).with_name("viewer.html").read_text()
    body = json.dumps(data).replace("<", "\\u003c")  # no prompt can close the script
    path.write_text(template.replace("/*SCENE*/null", body, 1))
