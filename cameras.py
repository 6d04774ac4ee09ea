"""Camera files in and out, one convention inside.   `python cameras.py IN OUT [--from F --to F ...]` converts.

Inside: w2c (T, 3, 4) float64, OpenCV axes (x right, y down, z forward), in the world and unit of the file;
intrinsics (T, 4) float64 = fx/W, fy/H, cx/W, cy/H, pixel centres at +0.5; None where the file holds none."""
from pathlib import Path

import numpy as np

RE10K = "19 numbers: index fx fy cx cy 0 0 and the row-major 3x4 world-to-camera matrix"


# --- RealEstate10K text ------------------------------------------------------------------------------------
def read_table(path, pixels=False):
    """The raw 19 columns (T, 19) float64 of a RealEstate10K text; URL line, comments and blank lines skipped.
    pixels: do not refuse focal lengths that must be pixels."""
    rows, text = [], Path(path).read_text() if Path(path).is_file() else ""
    lines = [(n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    lines = lines[1:] if lines and "://" in lines[0][1][0] else lines
    for n, words in lines:
        if words[0].startswith("#"):
            continue
        try:
            rows.append([float(word) for word in words])
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: {error}; wanted {RE10K}") from None
        finite = np.isfinite(rows[-1]).sum()
        if not len(words) == finite == 19:
            raise ValueError(f"{path}, line {n}: {len(words)} columns, {finite} finite; wanted {RE10K}")
        if not pixels and not 0 < min(rows[-1][1:3]) <= max(rows[-1][1:3]) < 20:
            raise ValueError(f"{path}, line {n}: focal lengths {words[1]} {words[2]}; wanted fractions of "
                             "the image size. Divide fx, cx by the width and fy, cy by the height.")
    if not rows:
        raise ValueError(f"{path}: missing, or without cameras; wanted {RE10K}")
    return np.array(rows)


def read_cameras(path):
    """RealEstate10K text, URL line or not: w2c (T, 3, 4), fx fy cx cy as fractions (T, 4); float64."""
    table = read_table(path)
    return table[:, 7:].reshape(-1, 3, 4), table[:, 1:5]


def write_cameras(path, w2c, intrinsics, size):
    """Write w2c (T, 3, 4) and pixel intrinsics (T, 3, 3) of images of size (H, W) as 19 columns per frame."""
    (h, w), rows = size, []
    for t, (e, k) in enumerate(zip(np.asarray(w2c, float), np.asarray(intrinsics, float))):
        rows.append([t, k[0, 0] / w, k[1, 1] / h, k[0, 2] / w, k[1, 2] / h, 0, 0, *e.ravel()])
    np.savetxt(path, rows, "%.10g")
