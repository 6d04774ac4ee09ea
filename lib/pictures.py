"""Pictures and videos with numpy alone: files, colours of maps, words, sheets, camera paths.

A picture is uint8 (H, W, 3), T frames of them a video.  Colours: depth and confidence as in
COLOUR_MAP; camera paths cyan where commanded or true, orange where predicted."""

import errno
import itertools
import os
import struct
import tempfile
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from subprocess import PIPE, Popen

import imageio_ffmpeg
import numpy as np

DARK, PALE = (16, 19, 24), (214, 220, 228)
COMMANDED, PREDICTED = (76, 201, 240), (255, 169, 77)  # colours of camera paths
# fmt: off
COLOUR_MAP = np.array([  # near: bright and warm; far: dark
    [252, 247, 180], [252, 196, 90], [244, 136, 73], [219, 83, 103],
    [168, 50, 125], [110, 34, 130], [58, 22, 104], [16, 12, 48],
], np.float32)
# fmt: on


def as_pixels(video):
    """A video tensor (3, T, H, W) in [-1, 1] -> uint8 (T, H, W, 3)."""
    return ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()


# ---- files ---------------------------------------------------------------------------------------
# Shades as swscale makes them of RGB; players guess another matrix from 576 or 720 lines on.
SHADES = "colormatrix=smpte170m:colorprim=bt709:transfer=bt709"


def write_video(path, frames, fps, crf=14):
    """Write uint8 frames (T, H, W, 3), or one after another, as H.264; crf 0 is best, 51 worst."""
    frames = iter(frames)
    first = next(frames)
    h, w = first.shape[:2]
    if h % 2 or w % 2:
        raise ValueError(f"{path}: the frames are {h}x{w}, H.264 wants even sizes")
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}", "-r", str(fps), "-i", "pipe:0"]
    how = ["-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p", "-x264-params", SHADES]
    # file: or else 12:30/video.mp4 is of the protocol 12, and -x/video.mp4 an option.
    tool = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *raw, *how, f"file:{path}"]
    with tempfile.TemporaryFile() as log, Popen(tool, stdin=PIPE, stderr=log) as process:
        with suppress(BrokenPipeError), process.stdin as pipe:  # it ends early where it cannot
            for frame in itertools.chain([first], frames):
                pipe.write(np.ascontiguousarray(frame))
        if process.wait():
            log.seek(0)  # its words, and their number: lib.files.is_of_disk asks for that
            error = OSError(f"{path}: not written: {log.read().decode(errors='replace')[:300]}")
            error.errno = next((n for n in errno.errorcode if os.strerror(n) in str(error)), None)
            raise error


def png_chunk(name, body=b""):
    """Length, name, body and checksum of a part of a PNG file."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def write_png(path, image):
    """Write (H, W, 3) uint8 colour or (H, W) uint16 grey."""
    bits, colour = {(3, "uint8"): (8, 2), (2, "uint16"): (16, 0)}[image.ndim, str(image.dtype)]
    h, w = image.shape[:2]
    rows = np.ascontiguousarray(image.astype(f">u{bits // 8}")).view(np.uint8).reshape(h, -1)
    rows = np.pad(rows, ((0, 0), (1, 0)))  # a 0 before each row: it is not filtered
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows))
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + png_chunk(b"IEND"))


# ---- colours -------------------------------------------------------------------------------------
def depth_to_rgb(depth, low, high):
    """(..., H, W) -> uint8 (..., H, W, 3): low bright, high dark by 1 / depth; unknown is grey."""
    valid = np.isfinite(depth) & (depth > 0)
    span = max(1 / low - 1 / max(high, low * 1.001), 1e-9)
    x = (1 / low - 1 / np.where(valid, depth, low)) / span
    x = np.clip(np.nan_to_num(x), 0, 1) * (len(COLOUR_MAP) - 1)
    i = np.minimum(x.astype(int), len(COLOUR_MAP) - 2)
    rgb = COLOUR_MAP[i] + (COLOUR_MAP[i + 1] - COLOUR_MAP[i]) * (x - i)[..., None]
    return np.where(valid[..., None], rgb + 0.5, 128).astype(np.uint8)


def off_edges(depth, jump=0.05):
    """Pixels (T, H, W) with no depth step over `jump` beside them; the border counts as one."""
    keep = np.isfinite(depth) & (depth > 0)
    for axis in (1, 2):
        beside = np.roll(depth, -1, axis)
        edge = np.abs(beside - depth) > jump * np.minimum(depth, beside)
        keep &= ~edge & ~np.roll(edge, 1, axis)  # the last row or column meets the first
    return keep


def depth_range(depth, shares=(0.01, 0.99)):
    """Quantiles of known depth, the 1st and 99th percentile, for its colours; 1 and 2 for none."""
    known = depth[depth > 0]
    low, high = np.quantile(known, shares).tolist() if len(known) else (1.0, 2.0)
    return low, max(high, low * 1.001)


def confidence_to_rgb(conf, low, high):
    """Confidence in the colours of depth, bright is sure."""
    return depth_to_rgb(high / np.maximum(conf, 1e-9), 1, max(high / low, 1.001))


def depth_legend(low, high, width, unit=""):
    """(14 or 26, width, 3): the colours of depth from low (left) to high, numbers below them."""
    scale, tall = (1, 4) if width < 200 else (2, 10)
    strip = np.full((tall + 2 + 7 * scale + scale % 2, width, 3), DARK, np.uint8)
    depth = 1 / np.linspace(1 / low, 1 / max(high, low * 1.001), width)
    strip[:tall] = depth_to_rgb(depth[None], low, high)
    numbers = (number(low), number(depth[width // 2]), f"{number(high)} {unit}".strip())
    for share, text in zip((0, 0.5, 1), numbers):
        label = words(text, scale)
        paste(strip, label, tall + 2, int(share * max(0, width - label.shape[1])))
    return strip


# ---- words ---------------------------------------------------------------------------------------
@lru_cache
def letters():
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
    return {c: np.array([[dot == "#" for dot in row] for row in g]) for c, g in glyphs.items()}


def words(text, scale=2):
    """One line of text as a picture, 7 * scale high, in capitals; unknown characters are spaces."""
    space = np.zeros((5, 2), bool)
    columns = [space[:, :1]]
    for c in text.upper():
        columns += [letters().get(c, space), space[:, :1]]
    dots = np.pad(np.concatenate(columns, 1), ((1, 1), (0, 0))).repeat(scale, 0).repeat(scale, 1)
    return np.where(dots[..., None], np.uint8(PALE), np.uint8(DARK))


def number(x):
    """Three digits, without an exponent."""
    return np.format_float_positional(x, 3, unique=False, fractional=False, trim="-")


# ---- pictures in pictures ------------------------------------------------------------------------
def enlarge(picture, width):
    """Whole-number enlargement to at least `width`, so that small pictures can carry words."""
    k = max(1, -(-width // picture.shape[1]))
    return picture.repeat(k, 0).repeat(k, 1)


def paste(canvas, picture, top, left):
    """Draw a picture into the canvas; what hangs over the edge is cut."""
    room = canvas[top : top + picture.shape[0], left : left + picture.shape[1]]
    room[:] = picture[: room.shape[0], : room.shape[1]]


def sheet(rows, titles, aside=(), gap=4):
    """Titled rows of pictures on dark, as many in each, and further pictures in a last row.

    rows     [[picture, ...], ...]   each has the place of the largest;   titles   one for every row
    aside    [(title, picture), ...]   drawn below, side by side;   returns   one picture"""
    h, w = np.max([picture.shape[:2] for row in rows for picture in row], 0)
    step = h + 16 + gap  # a row with its title
    wide = max(len(rows[0]) * (w + gap) + gap, sum(p.shape[1] + gap for _, p in aside) + gap)
    below = max((p.shape[0] + 16 + gap for _, p in aside), default=0)
    canvas = np.full((len(rows) * step + below + gap, wide, 3), DARK, np.uint8)
    for r, (row, title) in enumerate(zip(rows, titles)):
        paste(canvas, words(title), gap + r * step, gap)
        for c, picture in enumerate(row):
            paste(canvas, picture, gap + r * step + 16, gap + c * (w + gap))
    left, top = gap, gap + len(rows) * step
    for title, picture in aside:
        paste(canvas, words(title), top, left)
        paste(canvas, picture, top + 16, left)
        left += picture.shape[1] + gap
    return canvas


# ---- camera paths --------------------------------------------------------------------------------
def stroke(canvas, a, b, colour, width=1):
    """Draw a line from pixel a = (x, y) to b into the canvas."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    at = a + np.linspace(0, 1, int(np.abs(b - a).max() * 2) + 2)[:, None] * (b - a)
    for shift in itertools.product(range(width), repeat=2):
        dot(canvas, at + shift - width // 2, colour)


def dot(canvas, at, colour):
    """Colour the pixels at (N, 2) x, y; those outside the canvas are left out."""
    x, y = at.round().astype(int).T
    inside = (x >= 0) & (x < canvas.shape[1]) & (y >= 0) & (y < canvas.shape[0])
    colour = np.broadcast_to(np.uint8(colour), (len(x), 3))
    canvas[y[inside], x[inside]] = colour[inside]


def ground_map(tracks, cloud, size):
    """pixel(points (..., 3)) -> (..., 2) x, y of a picture of `size` that shows all from above, and
    its pixels per unit; a track is (centres, viewing directions, colour)."""
    height, width = size
    ground = []
    for centres, forward, _ in tracks:
        reach = 0.15 * np.ptp(centres, axis=0).max()  # room for the ticks
        ground.append(np.concatenate([centres, centres + reach * forward])[:, [0, 2]])
    if len(cloud):
        ground.append(np.quantile(cloud[:, [0, 2]], [0.02, 0.98], axis=0))
    low, high = np.concatenate(ground).min(0), np.concatenate(ground).max(0)
    extent = np.maximum(high - low, 1e-6)
    scale = 0.86 * min(width / extent[0], height / extent[1], 1e6)
    middle = (low + high) / 2

    def pixel(points):
        x = width / 2 + scale * (points[..., 0] - middle[0])
        return np.stack([x, height / 2 - scale * (points[..., 2] - middle[1])], -1)

    return pixel, scale


def top_view(paths, size, cloud=None, rgb=None):
    """Camera paths from above: x to the right, z (forward) up.

    paths    [(w2c (T, 3, 4), colour), ...]   a square marks the first frame, ticks the views
    size     (height, width) of the picture
    cloud    (N, 3), rgb uint8 (N, 3)         points drawn beneath, optional
    returns  the picture, with a scale bar in the unit of the paths"""
    height, width = size
    canvas = np.full((height, width, 3), DARK, np.uint8)
    tracks = [(-np.einsum("tji,tj->ti", E[..., :3], E[..., 3]), E[:, 2, :3], c) for E, c in paths]
    cloud = np.zeros((0, 3)) if cloud is None else cloud
    pixel, scale = ground_map(tracks, cloud, size)
    if len(cloud):
        dot(canvas, pixel(cloud), np.uint8(DARK) // 4 + (rgb * 0.75).astype(np.uint8))
    for centres, forward, colour in tracks:
        at = pixel(centres)  # (T, 2)
        for start, end in zip(at, at[1:]):
            stroke(canvas, start, end, colour, 2)
        tick = pixel(centres + forward) - at
        tick = tick / np.maximum(np.linalg.norm(tick, axis=1, keepdims=True), 1e-9)
        tick = tick * 0.05 * min(size)  # all of one length
        for t in (*range(0, len(at), max(1, len(at) // 6)), -1):
            stroke(canvas, at[t], at[t] + tick[t], colour)
        x, y = at[0].round().astype(int)
        canvas[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = colour
    bar = 10.0 ** np.floor(np.log10(0.5 * width / scale))
    bar *= max(k for k in (1, 2, 5) if k == 1 or bar * k * scale < 0.5 * width)
    stroke(canvas, (6, height - 6), (6 + bar * scale, height - 6), PALE, 2)
    small = width < 200
    paste(canvas, words(number(bar), 1 if small else 2), height - (16 if small else 24), 6)
    return canvas
