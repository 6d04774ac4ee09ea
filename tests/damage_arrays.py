"""Damage to depth and points, for tests/bad_data.py: see damage.py."""

import io
import pickle
import struct
import zipfile

import numpy as np
import torch
from damage import Bomb, frame, png_bytes

from geometry import unproject
from lib.files import read_array, read_arrays
from lib.pictures import write_png

ARRAYS = {}


def depth(change, form="npy"):
    """Change the array(s) of the clip: all frames at once."""

    def damage(place, rng):
        files = sorted(place.depth.glob("*")) if place.depth.is_dir() else [place.depth]
        arrays = change(np.stack([read_array(f) for f in files]), rng)
        for path, array in zip(files, arrays):
            (np.save if path.suffix == ".npy" else np.savez)(path, array)

    return form, damage


def one_frame(change):
    def damage(place, rng):
        path = frame(place, rng)
        np.save(path, change(read_array(path)))

    return "npy", damage


def put(value, count, where=slice(None)):
    def change(d, rng):
        flat = d[where].reshape(-1)
        flat[
            rng.choice(
                flat.size, count if count > 1 else max(1, int(count * flat.size)), replace=False
            )
        ] = value
        d[where] = flat.reshape(d[where].shape)
        return d

    return change


def header(descr="'<f4'", shape="(32, 48)", rest=b"\0" * 32 * 48 * 4, order="False"):
    text = (
        f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}" if descr else shape
    ).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + rest


def raw_npy(*args, **kwargs):
    return "npy", lambda p, r: frame(p, r).write_bytes(header(*args, **kwargs))


def pickled(place, rng):
    np.save(
        frame(place, rng), np.array([Bomb(place.outside / "EXECUTED")], object), allow_pickle=True
    )


def archive(members, **kwargs):
    def damage(place, rng):
        with zipfile.ZipFile(place.depth, "w", zipfile.ZIP_DEFLATED) as file:
            for name, body in members(place):
                file.writestr(name, body)

    return "npz", damage


def pickle_npy(place):
    text = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}".ljust(59) + b"\n"
    return (
        b"\x93NUMPY\x01\0"
        + struct.pack("<H", 60)
        + text
        + pickle.dumps([Bomb(place.outside / "EXECUTED")])
    )


def npy_bytes(array):
    np.save(body := io.BytesIO(), array)
    return body.getvalue()


def zip_field(offset, value):
    """Overwrite a field of the archive's central directory."""

    def damage(place, rng):
        data = bytearray(place.depth.read_bytes())
        at = data.rindex(b"PK\1\2") + offset
        data[at : at + len(value)] = value
        place.depth.write_bytes(data)

    return "npz", damage


def all_points(value):
    def damage(place, rng):
        for path in place.points.glob("*"):
            np.save(path, value)

    return "points", damage


FIRST = slice(0, 1)

for form in ("npy", "npz", "one"):
    ARRAYS |= {
        f"{form}: NaN in the whole first frame": depth(put(np.nan, 0.9999, FIRST), form),
        f"{form}: some NaN": depth(put(np.nan, 0.05), form),
        f"{form}: some infinity": depth(put(np.inf, 0.05), form),
        f"{form}: all NaN": depth(put(np.nan, 0.99999), form),
        f"{form}: all zero": depth(lambda d, r: 0 * d, form),
        f"{form}: negative": depth(lambda d, r: -d, form),
        f"{form}: one value of 1e30": depth(put(1e30, 0.0001), form),
        f"{form}: beyond float32": depth(lambda d, r: d.astype(np.float64) * 1e300, form),
        f"{form}: booleans": depth(lambda d, r: d > 3, form),
        f"{form}: complex": depth(lambda d, r: d + 1j, form),
        f"{form}: words": depth(lambda d, r: d.astype("<U8"), form),
        f"{form}: dates": depth(lambda d, r: d.astype("<i8").astype("<M8[ns]"), form),
        f"{form}: integers": depth(lambda d, r: (1000 * d).astype(np.int64), form),
        f"{form}: double precision": depth(lambda d, r: d.astype(np.float64), form),
        f"{form}: big-endian": depth(lambda d, r: d.astype(">f4"), form),
        f"{form}: rank too high": depth(lambda d, r: d[..., None], form),
        f"{form}: rank too low": depth(lambda d, r: d[..., 0], form),
        f"{form}: portrait": depth(lambda d, r: d.swapaxes(-1, -2), form),
    }

for form in ("npz", "one"):
    ARRAYS |= {
        f"{form}: a frame too few": depth(lambda d, r: d[:, 1:], form),
        f"{form}: a frame too many": depth(lambda d, r: d[:, [0, *range(9)]], form),
    }

ARRAYS |= {
    "npy: an extra frame": (
        "npy",
        lambda p, r: np.save(p.depth / "frame_0004b.npy", read_array(frame(p, r))),
    ),
    "npy: one frame of another size": one_frame(lambda d: d[:16, :24]),
    "npy: one frame of another type": one_frame(lambda d: (1000 * d).astype(np.uint16)),
    "npy: records": one_frame(lambda d: np.zeros((32, 48), [("z", "<f4")])),
    "npy: code to execute": ("npy", pickled),
    "npy: 10^12 values": raw_npy(shape="(1000000, 1000000)"),
    "npy: 10^36 values": raw_npy(shape="(1000000000000,) * 3"),
    "npy: negative size": raw_npy(shape="(-32, -48)"),
    "npy: nested header": raw_npy(descr="", shape="[" * 9000),
    "npy: deep header": raw_npy(descr="", shape="-" * 9000 + "1"),
    "npy: calling header": raw_npy(shape="(__import__('os').system('touch EXECUTED'),)"),
    "npy: smaller than the file": raw_npy(shape="(16, 48)"),
    "npy: empty": raw_npy(shape="(0, 48)", rest=b""),
    "npz: code to execute": archive(lambda p: [("depth.npy", pickle_npy(p))]),
    "npz: nothing in it": archive(lambda p: []),
    "npz: no array": archive(lambda p: [("depth.npy", b"none")]),
    "npz: twice the array": archive(
        lambda p: [("depth.npy", npy_bytes(np.ones((9, 32, 48), "f4")))] * 2
    ),
    "npz: 10^12 values": archive(lambda p: [("depth.npy", header(shape="(1000000, 1000, 1000)"))]),
    "npz: bomb": archive(
        lambda p: [("depth.npy", header(shape="(9, 20000, 4000)", rest=bytes(10**8)))]
    ),
    "npz: encrypted": zip_field(8, b"\1\0"),
    "npz: unknown packing": zip_field(10, b"\x63\0"),
    "npz: another size": zip_field(24, struct.pack("<I", 10**9)),
    "png: huge picture": ("png", lambda p, r: frame(p, r).write_bytes(png_bytes(100000, 100000))),
    "png: taller than its data": ("png", lambda p, r: frame(p, r).write_bytes(png_bytes(48, 3200))),
    "png: colour": ("png", lambda p, r: write_png(frame(p, r), np.zeros((32, 48, 3), np.uint8))),
    "png: 8 bits": ("png", lambda p, r: frame(p, r).write_bytes(png_bytes(48, 32, 8))),
    "points: four numbers": all_points(np.ones((32, 48, 4), "f4")),
    "points: flat": all_points(np.ones((32, 48), "f4")),
    "points: NaN": all_points(np.full((32, 48, 3), np.nan, "f4")),
    "points: far": all_points(np.full((32, 48, 3), 1e9, "f4")),
}


def points_of(place, w2c, K):
    """Points in the first camera's frame, from the depth files: the folder that replaces them."""
    z = torch.from_numpy(read_arrays(place / "depth")).double()
    return unproject(z[None], w2c[None], K[None])[0].numpy().astype(np.float32)
