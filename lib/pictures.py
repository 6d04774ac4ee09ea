"""Pictures with numpy alone: words, legends, top views of camera paths, contact sheets.

Pictures are uint8 (H, W, 3).  Colours of depth: COLOUR_MAP; paths: cyan commanded or true,
orange predicted."""

import struct
import zlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np


def write_video(path, frames, fps, crf=14):
    """Write uint8 frames (T, H, W, 3) as H.264; crf 0 is best, 51 worst."""
    h, w = frames.shape[1:3]
    if h % 2 or w % 2:
        raise ValueError(f"{path}: frames of {h}x{w}; H.264 wants even sizes")
    how = dict(codec="libx264", macro_block_size=1, pix_fmt_out="yuv420p")
    quality = ["-crf", str(crf)]
    writer = imageio_ffmpeg.write_frames(str(path), (w, h), fps=fps, output_params=quality, **how)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def write_png(path, image):
    """Write (H, W, 3) uint8 colour or (H, W) uint16 grey."""
    bits, colour = {(3, "uint8"): (8, 2), (2, "uint16"): (16, 0)}[image.ndim, str(image.dtype)]
    (h, w), body = image.shape[:2], np.ascontiguousarray(image.astype(f">u{bits // 8}"))
    rows = zlib.compress(
        np.pad(body.view(np.uint8).reshape(h, -1), ((0, 0), (1, 0)))
    )  # 0 = unfiltered row
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0),
        b"IDAT" + rows,
        b"IEND",
    ]
    Path(path).write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
        )
    )


COLOUR_MAP = np.array(
    [
        [252, 247, 180],
        [252, 196, 90],
        [244, 136, 73],
        [219, 83, 103],
        [168, 50, 125],
        [110, 34, 130],
        [58, 22, 104],
        [16, 12, 48],
    ],
    np.float32,
)  # near: bright and warm; far: dark


def depth_to_rgb(depth, low, high):
    """(..., H, W) -> uint8 (..., H, W, 3), low bright, high dark, steps of 1/depth; invalid (<= 0)
    grey."""
    valid = np.isfinite(depth) & (depth > 0)
    x = (1 / low - 1 / np.where(valid, depth, low)) / max(
        1 / low - 1 / max(high, low * 1.001), 1e-9
    )
    x = np.clip(x, 0, 1) * (len(COLOUR_MAP) - 1)
    i = np.minimum(x.astype(int), len(COLOUR_MAP) - 2)
    rgb = COLOUR_MAP[i] + (COLOUR_MAP[i + 1] - COLOUR_MAP[i]) * (x - i)[..., None]
    return np.where(valid[..., None], rgb + 0.5, 128).astype(np.uint8)


def tile(rows, gap=2, zoom=1):
    """Rows of equal uint8 pictures (H, W, 3) -> one picture on white."""
    h, w = rows[0][0].shape[:2]
    sheet = np.full(
        (len(rows) * (h + gap) - gap, max(map(len, rows)) * (w + gap) - gap, 3), 255, np.uint8
    )
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet[r * (h + gap) : r * (h + gap) + h, c * (w + gap) : c * (w + gap) + w] = picture
    return sheet.repeat(zoom, 0).repeat(zoom, 1)


DARK, PALE = (16, 19, 24), (214, 220, 228)
COMMANDED, PREDICTED = (76, 201, 240), (255, 169, 77)  # colours of camera paths


def _font():
    """Capital letters, digits and signs: character -> bool (5, width)."""
    art = """
A .#. #.# ### #.# #.#|B ##. #.# ##. #.# ##.|C .## #.. #.. #.. .##|D ##. #.# #.# #.# ##.
E ### #.. ##. #.. ###|F ### #.. ##. #.. #..|G .## #.. #.# #.# .##|H #.# #.# ### #.# #.#
I # # # # #|J ..# ..# ..# #.# .#.|K #.# #.# ##. #.# #.#|L #.. #.. #.. #.. ###
M #...# ##.## #.#.# #...# #...#|N #..# ##.# #.## #..# #..#|O .#. #.# #.# #.# .#.
P ##. #.# ##. #.. #..|Q .##. #..# #..# #.#. .#.#|R ##. #.# ##. #.# #.#|S .## #.. .#. ..# ##.
T ### .#. .#. .#. .#.|U #.# #.# #.# #.# ###|V #.# #.# #.# #.# .#.|W #...# #...# #.#.# ##.## #...#
X #.# #.# .#. #.# #.#|Y #.# #.# .#. .#. .#.|Z ### ..# .#. #.. ###|0 ### #.# #.# #.# ###
1 .# ## .# .# .#|2 ##. ..# .#. #.. ###|3 ### ..# .## ..# ###|4 #.# #.# ### ..# ..#
5 ### #.. ##. ..# ##.|6 .## #.. ### #.# ###|7 ### ..# .#. .#. .#.|8 ### #.# ### #.# ###
9 ### #.# ### ..# ##.|. . . . . #|, .. .. .. .# #.|: . # . # .|- ... ... ### ... ...
+ ... .#. ### .#. ...|/ ..# ..# .#. #.. #..|% #.# ..# .#. #.. #.#|( .# #. #. #. .#
) #. .# .# .# #.|= ... ### ... ### ...|_ ... ... ... ... ###"""
    glyphs = {g[0]: g[2:].split() for line in art.strip().splitlines() for g in line.split("|")}
    return {
        c: np.array([[dot == "#" for dot in row] for row in rows]) for c, rows in glyphs.items()
    }


FONT = _font()


def words(text, scale=2, colour=PALE, back=DARK):
    """One line of text as a picture, 7 * scale high; letters are drawn as capitals, unknown
    characters as spaces."""
    columns = [np.zeros((5, 1), bool)]
    for c in text.upper():
        columns += [FONT.get(c, np.zeros((5, 2), bool)), np.zeros((5, 1), bool)]
    dots = np.pad(np.concatenate(columns, 1), ((1, 1), (0, 0))).repeat(scale, 0).repeat(scale, 1)
    return np.where(dots[..., None], np.uint8(colour), np.uint8(back))


def paste(canvas, picture, top, left):
    """Draw a picture into the canvas; what hangs over the edge is cut."""
    h, w = (
        min(picture.shape[0], canvas.shape[0] - top),
        min(picture.shape[1], canvas.shape[1] - left),
    )
    canvas[top : top + h, left : left + w] = picture[:h, :w]


def stroke(canvas, a, b, colour, width=1):
    """Draw a line from pixel a = (x, y) to b into the canvas."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    at = a + np.linspace(0, 1, int(np.abs(b - a).max() * 2) + 2)[:, None] * (b - a)
    for dx in range(width):
        for dy in range(width):
            x, y = (at + (dx - width // 2, dy - width // 2)).round().astype(int).T
            inside = (x >= 0) & (x < canvas.shape[1]) & (y >= 0) & (y < canvas.shape[0])
            canvas[y[inside], x[inside]] = colour


def number(x):
    """Three digits, without an exponent."""
    return np.format_float_positional(x, 3, unique=False, fractional=False, trim="-")


def depth_legend(low, high, width, unit=""):
    """A strip with the colours of depths from low (left) to high, equal steps of 1 / depth, and
    three numbers.

    unit   word behind the numbers;   returns  (14 or 26, width, 3)"""
    scale = 1 if width < 200 else 2
    tall = 4 if scale == 1 else 10
    strip = np.full((tall + 2 + 7 * scale + scale % 2, width, 3), DARK, np.uint8)
    depth = 1 / np.linspace(1 / low, 1 / max(high, low * 1.001), width)
    strip[:tall] = depth_to_rgb(depth[None], low, high)
    for share, text in (
        (0, number(low)),
        (0.5, number(depth[width // 2])),
        (1, f"{number(high)} {unit}".strip()),
    ):
        label = words(text, scale)
        paste(
            strip,
            label,
            tall + 2,
            int(share * (width - label.shape[1])) if label.shape[1] < width else 0,
        )
    return strip


def top_view(paths, size, cloud=None, rgb=None):
    """Camera paths from above: x to the right, z (forward) up.

    paths    [(w2c (T, 3, 4), colour), ...]   the first frame is marked by a square, viewing
                                              directions by ticks
    size     (height, width) of the picture
    cloud    (N, 3), rgb uint8 (N, 3)         points drawn beneath, optional
    returns  the picture, with a scale bar in the unit of the paths"""
    height, width = size
    canvas = np.full((height, width, 3), DARK, np.uint8)
    tracks = [
        (-np.einsum("tji,tj->ti", E[:, :, :3], E[:, :, 3]), E[:, 2, :3], colour)
        for E, colour in paths
    ]
    ground = [
        np.concatenate([c, c + 0.15 * np.ptp(c, axis=0).max() * f])[:, [0, 2]] for c, f, _ in tracks
    ]
    if cloud is not None and len(cloud):
        ground.append(np.quantile(cloud[:, [0, 2]], [0.02, 0.98], axis=0))
    low, high = np.concatenate(ground).min(0), np.concatenate(ground).max(0)
    scale = 0.86 * min(
        width / max(high[0] - low[0], 1e-6), height / max(high[1] - low[1], 1e-6), 1e6
    )
    middle = (low + high) / 2

    def pixel(p):
        return np.stack(
            [
                width / 2 + scale * (p[..., 0] - middle[0]),
                height / 2 - scale * (p[..., 2] - middle[1]),
            ],
            -1,
        )

    if cloud is not None and len(cloud):
        x, y = pixel(cloud).round().astype(int).T
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        canvas[y[inside], x[inside]] = np.uint8(DARK) // 4 + (rgb[inside] * 0.75).astype(np.uint8)
    for centres, forward, colour in tracks:
        at, tip = pixel(centres), pixel(centres + forward)
        tick = (
            (tip - at)
            / np.maximum(np.linalg.norm(tip - at, axis=1, keepdims=True), 1e-9)
            * 0.05
            * min(size)
        )
        for t in range(len(at)):
            if t:
                stroke(canvas, at[t - 1], at[t], colour, 2)
            if t % max(1, len(at) // 6) == 0 or t == len(at) - 1:
                stroke(canvas, at[t], at[t] + tick[t], colour)
        x, y = at[0].round().astype(int)
        canvas[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = colour
    bar = 10.0 ** np.floor(np.log10(0.5 * width / scale))
    bar *= max(k for k in (1, 2, 5) if k == 1 or bar * k * scale < 0.5 * width)
    stroke(canvas, (6, height - 6), (6 + bar * scale, height - 6), PALE, 2)
    paste(
        canvas, words(number(bar), 1 if width < 200 else 2), height - (16 if width < 200 else 24), 6
    )
    return canvas


def enlarge(picture, width):
    """Whole-number enlargement to at least `width`, so that small pictures can carry words."""
    k = max(1, -(-width // picture.shape[1]))
    return picture.repeat(k, 0).repeat(k, 1)


def sheet(rows, titles, aside=(), gap=4):
    """Titled rows of equal pictures on dark, and further pictures in a last row.

    rows     [[picture, ...], ...]   equal sizes;   titles   a word for every row
    aside    [(title, picture), ...]   drawn below, side by side;   returns   one picture"""
    h, w = rows[0][0].shape[:2]
    wide = max(len(rows[0]) * (w + gap) + gap, sum(p.shape[1] + gap for _, p in aside) + gap)
    below = max((p.shape[0] for _, p in aside), default=-16 - gap) + 16 + gap
    canvas = np.full((len(rows) * (h + 16 + gap) + below + gap, wide, 3), DARK, np.uint8)
    for r, (row, title) in enumerate(zip(rows, titles)):
        top = gap + r * (h + 16 + gap)
        paste(canvas, words(title), top, gap)
        for c, picture in enumerate(row):
            paste(canvas, picture, top + 16, gap + c * (w + gap))
    left, top = gap, gap + len(rows) * (h + 16 + gap)
    for title, picture in aside:
        paste(canvas, words(title), top, left)
        paste(canvas, picture, top + 16, left)
        left += picture.shape[1] + gap
    return canvas


def confidence_to_rgb(conf, low, high):
    """Confidence in the colours of depth, bright is sure."""
    return depth_to_rgb(high / np.maximum(conf, 1e-9), 1, max(high / low, 1.001))
