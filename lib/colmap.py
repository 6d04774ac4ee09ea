"""The files of a COLMAP model as they lie on disk: cameras and images, text or binary.

Source: COLMAP's output format page; images.bin and cameras.bin are little-endian."""

import re
import struct

from lib.crop import fractions

MODELS = ["SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"]

PARAMS = dict(zip(MODELS, (3, 4, 4, 5, 8)))


def colmap_camera(path, model, w, h, params):
    """Fractions fx fy cx cy of one camera; distorted ones are refused."""
    shared = model in ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
    if model not in PARAMS or any(abs(p) > 1e-9 for p in params[3 if shared else 4 :]):
        raise ValueError(
            f"{path}: camera model {model} {params}: lens distortion or unknown; run colmap "
            "image_undistorter first"
        )
    fx, fy, cx, cy = (params[0], *params[:3]) if shared else params[:4]
    return fractions([fx, fy, cx, cy], (h, w)), (h, w)


def colmap_binary(path):
    """cameras: id -> (fractions, size); images: (name, pose, camera id); of the two .bin files."""
    cameras, images = {}, []
    data = (path / "cameras.bin").read_bytes()
    (count,), at = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        i, model, w, h = struct.unpack_from("<iiQQ", data, at)
        name = MODELS[model] if model < len(MODELS) else f"number {model}"
        params = struct.unpack_from(f"<{PARAMS.get(name, 0)}d", data, at + 24)
        cameras[i] = colmap_camera(path, name, w, h, params)  # an unknown model is refused here
        at += 24 + 8 * len(params)
    data = (path / "images.bin").read_bytes()
    (count,), at = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        _, *pose, camera = struct.unpack_from("<i7di", data, at)
        end = data.index(b"\0", at + 64)
        images.append((data[at + 64 : end].decode(), pose, camera))
        at = end + 9 + 24 * struct.unpack_from("<Q", data, end + 1)[0]
    return cameras, images


def is_points(words):
    """The second line of an image: triples of numbers, where a writer did not leave it out."""
    return len(words) % 3 == 0 and not any(re.search("[^-+.0-9eEnaif]", word) for word in words)


def colmap_text(path):
    """The same of the two .txt files."""
    cameras, images = {}, []
    for line in (path / "cameras.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            i, model, w, h, *params = line.split()
            numbers = [float(p) for p in params]
            cameras[int(i)] = colmap_camera(path, model, int(w), int(h), numbers)
    for line in (path / "images.txt").read_text().splitlines():
        words = line.split(maxsplit=9)
        if not words or line.startswith("#") or is_points(line.split()):
            continue
        if len(words) != 10:
            wanted = "wanted IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"
            raise ValueError(f"{path / 'images.txt'}: line {line[:60]!r}; {wanted}")
        _, *pose, camera, name = words
        images.append((name, [float(p) for p in pose], int(camera)))
    return cameras, images
