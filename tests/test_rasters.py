"""Depth pictures: written by ffmpeg, which is not ours, and by hand; damaged ones are refused."""

import struct
import subprocess
import time
import zlib

import imageio_ffmpeg
import numpy as np
import pytest

from lib.files import open_array
from lib.rasters import read_raster

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 37, 50  # three blocks of 16 lines, the last one short
DEPTH = (RNG.random((HEIGHT, WIDTH)) * 9 + 0.5).astype(np.float32)


def by_ffmpeg(path, array, pix_fmt, *how):
    """A picture that ffmpeg wrote from a raw array."""
    size = f"{array.shape[1]}x{array.shape[0]}"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo"]
    raw = ["-pix_fmt", pix_fmt, "-s", size, "-i", "-", "-frames:v", "1"]
    run = subprocess.run([*ffmpeg, *raw, *how, str(path)], input=array.tobytes(), timeout=60)
    assert run.returncode == 0
    return path


def exr(lines, name, dtype, kind, block, pack=bytes, flags=0):
    """An EXR file of one channel, by the file layout document."""
    height, width = lines.shape
    kinds = {"<f2": 1, "<f4": 2, "<u4": 0}
    channel = name.encode() + b"\0" + struct.pack("<iB3x2i", kinds[dtype], 0, 1, 1) + b"\0"
    box = struct.pack("<4i", 0, 0, width - 1, height - 1)
    rows = [
        (b"channels", b"chlist", channel),
        (b"compression", b"compression", bytes([kind])),
        (b"dataWindow", b"box2i", box),
        (b"displayWindow", b"box2i", box),
    ]
    head = b"\x76\x2f\x31\x01" + struct.pack("<i", 2 | flags)
    for key, type_name, value in rows:
        head += key + b"\0" + type_name + b"\0" + struct.pack("<i", len(value)) + value
    head += b"\0"
    bodies = [pack(lines[y : y + block].astype(dtype).tobytes()) for y in range(0, height, block)]
    place, table, out = len(head) + 8 * len(bodies), b"", b""
    for n, body in enumerate(bodies):
        table += struct.pack("<Q", place + len(out))
        out += struct.pack("<2i", n * block, len(body)) + body
    return head + table + out


def deflated(body):
    """Interleaved halves, differences plus 128, deflate."""
    split = body[0::2] + body[1::2]
    values = np.frombuffer(split, np.uint8).astype(int)
    deltas = np.concatenate([values[:1], (np.diff(values) + 128) % 256]).astype(np.uint8)
    packed = zlib.compress(deltas.tobytes())
    return packed if len(packed) < len(body) else body  # as the format wants it


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
@pytest.mark.parametrize("kind, block", [(0, 1), (2, 1), (3, 16)])
def test_exr_by_hand(tmp_path, dtype, kind, block):
    plane = np.add.outer(np.arange(HEIGHT), np.zeros(WIDTH)).round()
    for lines in (DEPTH, plane):  # one that does not deflate, and one that does
        data = exr(lines, "Z", dtype, kind, block, deflated if kind else bytes)
        (tmp_path / "depth.exr").write_bytes(data)
        got = open_array(tmp_path / "depth.exr", read=True, mask=False)
        assert got.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(got, lines.astype(dtype))


@pytest.mark.parametrize("compression", ["none", "zip1", "zip16"])
@pytest.mark.parametrize("form", ["half", "float"])
def test_exr_of_ffmpeg(tmp_path, compression, form):
    how = ["-c:v", "exr", "-compression", compression, "-format", form]
    path = by_ffmpeg(tmp_path / "d.exr", DEPTH, "grayf32le", *how, "-pix_fmt", "grayf32le")
    got = read_raster(path.read_bytes()).astype(np.float32)
    np.testing.assert_allclose(got, DEPTH, rtol=1e-3 if form == "half" else 0)


def test_pfm_of_ffmpeg_and_both_byte_orders(tmp_path):
    for n, pix_fmt in enumerate(("grayf32le", "grayf32be")):
        path = by_ffmpeg(tmp_path / f"{n}.pfm", DEPTH, "grayf32le", "-pix_fmt", pix_fmt)
        np.testing.assert_array_equal(read_raster(path.read_bytes()), DEPTH)


def test_pgm_of_ffmpeg_8_and_16_bits(tmp_path):
    millimetres = (DEPTH * 1000).astype("<u2")
    path = by_ffmpeg(tmp_path / "a.pgm", millimetres, "gray16le", "-pix_fmt", "gray16be")
    np.testing.assert_array_equal(read_raster(path.read_bytes()), millimetres)
    grey = (DEPTH * 20).astype(np.uint8)
    path = by_ffmpeg(tmp_path / "b.pgm", grey, "gray", "-pix_fmt", "gray")
    np.testing.assert_array_equal(read_raster(path.read_bytes()), grey)


def test_what_is_not_read_is_said():
    for data, words in (
        (exr(DEPTH, "Z", "<f4", 4, 32), "PIZ"),
        (exr(DEPTH, "Z", "<f4", 0, 1, flags=0x200), "tiles"),
        (exr(DEPTH, "Z", "<f4", 0, 1)[:-1], "does not fit"),
        (exr(DEPTH, "Z", "<f4", 0, 1)[:60], "cut short"),
        (b"Pf\n50 37\n-1.0\n" + DEPTH.tobytes()[:-4], "holds"),
        (b"PF\n50 37\n-1.0\n" + DEPTH.tobytes(), "PGM"),
        (b"P5 50 37 255\n" + bytes(9), "cut short"),
        (b"P5 99999 99999 255\n", "pixels"),
    ):
        with pytest.raises(ValueError, match=words):
            read_raster(data)


def test_no_damage_costs_more_than_a_refusal():
    """Every cut, and 300 flipped bytes: read, or a ValueError; a header of blanks takes no time."""
    whole = exr(DEPTH[:4, :5], "Z", "<f2", 3, 16, deflated)
    damaged = [whole[:n] for n in range(4, len(whole))]
    for _ in range(300):
        data = bytearray(whole)
        data[RNG.integers(4, len(data))] ^= int(RNG.integers(1, 256))
        damaged.append(bytes(data))
    for data in damaged:
        try:
            read_raster(data)
        except ValueError:
            pass
    start = time.process_time()
    with pytest.raises(ValueError, match="nor a binary PGM"):
        read_raster(b"P5" + b" " * 4000 + b"x")
    assert time.process_time() - start < 1
