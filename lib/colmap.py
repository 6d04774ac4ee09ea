"""The files of a COLMAP model as they lie on disk: cameras and images, text or binary.

Source: COLMAP's output format page; images.bin and cameras.bin are little-endian."""

import re
import struct

from lib.crop import fractions
from lib.lens import MODELS, make_lens
from lib.rasters import end_of_name

# By COLMAP's numbers; some are known by name only.
NUMBERED = [*list(MODELS)[:7], "FOV", *list(MODELS)[7:], "THIN_PRISM_FISHEYE"]


def colmap_camera(path, model, w, h, params):
    """Fractions fx fy cx cy, (H, W), Lens or None of one camera."""
    if model not in MODELS:
        cure = "run colmap image_undistorter first"
        raise ValueError(f"{path}: camera model {model}; known are {', '.join(MODELS)}: {cure}")
    if len(params) != len(MODELS[model].split()):
        raise ValueError(f"{path}: {len(params)} numbers of a {model}; wanted {MODELS[model]}")
    said = dict(zip(MODELS[model].split(), params))
    f = said.pop("f", None)
    k = [said.pop(name, f) for name in ("fx", "fy", "cx", "cy")]
    return fractions(k, (h, w)), (h, w), make_lens(model, said)


def colmap_binary(path):
    """cameras: id -> colmap_camera; images: (name, pose, camera id); of the two .bin files."""
    cameras, images = {}, []
    try:
        data = (file := path / "cameras.bin").read_bytes()
        (count,), at = struct.unpack_from("<Q", data), 8
        for _ in range(count):
            i, model, w, h = struct.unpack_from("<iiQQ", data, at)
            name = NUMBERED[model] if 0 <= model < len(NUMBERED) else f"number {model}"
            numbers = len(MODELS.get(name, "").split())
            params = struct.unpack_from(f"<{numbers}d", data, at + 24)
            cameras[i] = colmap_camera(path, name, w, h, params)  # an unknown model is refused here
            at += 24 + 8 * numbers
        data = (file := path / "images.bin").read_bytes()
        (count,), at = struct.unpack_from("<Q", data), 8
        for _ in range(count):
            _, *pose, camera = struct.unpack_from("<i7di", data, at)
            end = end_of_name(data, at + 64)
            images.append((data[at + 64 : end].decode(), pose, camera))
            at = end + 9 + 24 * struct.unpack_from("<Q", data, end + 1)[0]
    except (struct.error, IndexError):
        raise ValueError(f"{file}: cut short, or damaged. Copy it again") from None
    return cameras, images


def is_points(words):
    """The second line of an image: triples of numbers, where a writer did not leave it out."""
    return len(words) % 3 == 0 and not any(re.search("[^-+.0-9eEnaif]", word) for word in words)


def colmap_text(path):
    """The same of the two .txt files."""
    cameras, images = {}, []
    for line in (path / "cameras.txt").read_text("utf-8-sig").splitlines():
        if line.strip() and not line.startswith("#"):
            i, model, w, h, *params = line.split()
            numbers = [float(p) for p in params]
            cameras[int(i)] = colmap_camera(path / "cameras.txt", model, int(w), int(h), numbers)
    for line in (path / "images.txt").read_text("utf-8-sig").splitlines():
        words = line.strip().split(maxsplit=9)
        if not words or line.startswith("#") or is_points(line.split()):
            continue
        if len(words) != 10:
            wanted = "wanted IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"
            raise ValueError(f"{path / 'images.txt'}: line {line[:60]!r}; {wanted}")
        _, *pose, camera, name = words
        images.append((name, [float(p) for p in pose], int(camera)))
    return cameras, images
