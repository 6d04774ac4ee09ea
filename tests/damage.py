"""The damage that tests/bad_data.py does to a dataset: {name: (form of the dataset, function of
(place, rng))}.

A place has root, outside (a folder beside it), video, depth, camera, points; cache, empty and
folder of the caches."""

import json
import os
import struct
import subprocess
import zlib

import imageio_ffmpeg
import numpy as np

from lib.files import read_video
from lib.pictures import write_png, write_video

VICTIM = "train_000001"

RAW = {}


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# --- Any file -------------------------------------------------------------------------------------
def truncated(path, rng):
    path.write_bytes(path.read_bytes()[: rng.integers(1, path.stat().st_size)])


def flipped(path, rng):
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, len(data), rng.integers(1, 4)):
        data[at] ^= 1 << rng.integers(0, 8)
    path.write_bytes(data)


def blanked(path, rng):
    data = bytearray(path.read_bytes())
    at = 512 * rng.integers(0, len(data) // 512 + 1)  # disks lose sectors
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    path.write_bytes(data)


def replaced(make):
    def damage(path, rng):
        path.unlink()
        make(path)

    return damage


def unreadable(path, rng):
    path.chmod(0)


def linked_out(place, path):
    path.rename(place.outside / path.name)
    path.symlink_to(place.outside / path.name)


FILE = dict(
    truncated=truncated,
    emptied=lambda p, r: p.write_bytes(b""),
    missing=lambda p, r: p.unlink(),
    random=lambda p, r: p.write_bytes(r.bytes(p.stat().st_size)),
    text=lambda p, r: p.write_text("not found\n" * 99),
    folder=replaced(lambda p: p.mkdir()),
    pipe=replaced(os.mkfifo),
    unreadable=unreadable,
    endless=replaced(lambda p: p.symlink_to("/dev/zero")),
    loop=replaced(lambda p: p.symlink_to(p)),
)


def frame(place, rng):
    return (
        sorted(place.depth.glob("*"))[rng.integers(0, 5)] if place.depth.is_dir() else place.depth
    )


PARTS = dict(
    video=("npy", lambda p, r: p.video),
    scan=("scan", lambda p, r: p.video),
    avi=("avi", lambda p, r: p.video),
    mkv=("mkv", lambda p, r: p.video),
    cameras=("npy", lambda p, r: p.camera),
    npy=("npy", frame),
    npz=("npz", frame),
    png=("png", frame),
    one=("one", frame),
    points=("points", lambda p, r: sorted(p.points.glob("*"))[r.integers(0, 5)]),
)

for part, (form, find) in PARTS.items():
    RAW[f"{part}: a link that leaves the dataset"] = (
        form,
        lambda p, r, find=find: linked_out(p, find(p, r)),
    )
    for what, damage in (FILE | dict(blanked=blanked)).items():
        RAW[f"{part}: {what}"] = form, lambda p, r, find=find, damage=damage: damage(find(p, r), r)
    RAW[f"{part}: flipped bits, with SHA256SUMS"] = (
        form + "+sums",
        lambda p, r, find=find: flipped(find(p, r), r),
    )

for part in ("npz", "png"):
    RAW[f"{part}: flipped bits"] = part, lambda p, r: flipped(frame(p, r), r)


# --- Videos ---------------------------------------------------------------------------------------
def video(change):
    def damage(place, rng):
        frames, told = read_video(place.video)
        write_video(place.video, change(frames), told[1])

    return "npy", damage


def png_bytes(w, h, bits=16, colour=0):
    head = b"IHDR" + struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in (head, body, b"IEND")
    )


def sound(place, rng):
    head = struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
    place.video.write_bytes(
        b"RIFF"
        + struct.pack("<I", 2036)
        + b"WAVEfmt "
        + head
        + b"data"
        + struct.pack("<I", 2000)
        + bytes(2000)
    )


RAW |= {
    "video: first frame lost": video(lambda f: f[1:]),
    "video: middle frame lost": video(lambda f: np.delete(f, 4, 0)),
    "video: a frame too many": video(lambda f: f[[0, *range(9)]]),
    "video: last frames lost": video(lambda f: f[:6]),
    "video: portrait": video(lambda f: f.transpose(0, 2, 1, 3)),
    "video: cropped": video(lambda f: f[:, :, 16:]),
    "video: a sound": ("npy", sound),
    "video: huge picture": ("npy", lambda p, r: p.video.write_bytes(png_bytes(100000, 100000))),
    "video: one picture": ("npy", lambda p, r: write_png(p.video, np.zeros((32, 48, 3), np.uint8))),
    "video: a playlist": (
        "npy",
        lambda p, r: p.video.write_text(
            "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
            f"file://{p.root}/train_000000/video.mp4\n#EXT-X-ENDLIST\n"
        ),
    ),
    "video: a list of files": (
        "npy",
        lambda p, r: p.video.write_text("ffconcat version 1.0\nfile ../train_000000/video.mp4\n"),
    ),
}


# --- Cameras --------------------------------------------------------------------------------------
def rows(change):
    """Change the table of numbers, or the text of the file."""

    def damage(place, rng):
        table = change(np.loadtxt(place.camera))
        np.savetxt(place.camera, table, "%.10g") if isinstance(
            table, np.ndarray
        ) else place.camera.write_bytes(table)

    return "npy", damage


def cell(value, columns=range(1, 19)):
    def damage(place, rng):
        lines = [line.split() for line in place.camera.read_text().splitlines()]
        lines[rng.integers(0, 5)][rng.choice(columns)] = value
        place.camera.write_text("\n".join(map(" ".join, lines)) + "\n")

    return "npy", damage


def times(columns, factor, plus=0.0):
    def change(t):
        t[:, columns] = t[:, columns] * factor + plus
        return t

    return rows(change)


def as_text(t, separator=" "):
    return "".join(separator.join(f"{x:.10g}" for x in row) + "\n" for row in t)


RAW |= {
    f"cameras: {word!r} for a number": cell(word)
    for word in ("nan", "inf", "-inf", "1e999", "x", "1,5", "0x1p3", "\0", "--1")
}

RAW |= {
    "cameras: focal length 0": cell("0", (1, 2)),
    "cameras: negative focal length": cell("-0.8", (1, 2)),
    "cameras: centre outside": cell("3", (3, 4)),
    "cameras: far away": cell("1e9", (10, 14, 18)),
    "cameras: rotation scaled": times(slice(7, 10), 1.01),
    "cameras: mirrored": times(slice(7, 10), -1),
    "cameras: pixel intrinsics": times(slice(1, 3), 500),
    "cameras: rotation zero": times([7, 8, 9, 11, 12, 13], 0),
    "cameras: a column lost": rows(lambda t: np.delete(t, 5, 1)),
    "cameras: a column more": rows(lambda t: t[:, [0, *range(19)]]),
    "cameras: columns shifted": rows(lambda t: np.roll(t, 1, 1)),
    "cameras: matrices alone": rows(lambda t: t[:, 7:]),
    "cameras: a row lost": rows(lambda t: np.delete(t, 3, 0)),
    "cameras: a row twice": rows(lambda t: t[[0, *range(9)]]),
    "cameras: a row for another": rows(lambda t: t[[0, 1, 1, *range(3, 9)]]),
    "cameras: rows reversed": rows(lambda t: t[::-1]),
    "cameras: UTF-16": rows(lambda t: as_text(t).encode("utf-16")),
    "cameras: commas": rows(lambda t: as_text(t, ",").encode()),
    "cameras: JSON": rows(lambda t: json.dumps(t.tolist()).encode()),
    "cameras: random bytes": rows(lambda t: os.urandom(3000)),
    "cameras: end of the file lost": rows(lambda t: as_text(t)[:-3].encode()),
    "cameras: 20 MB": rows(lambda t: as_text(t).encode() * 20000),
}


# --- metadata.json --------------------------------------------------------------------------------
def entry(**values):
    """Set fields of the victim's entry; a function gets the place."""

    def damage(place, rng):
        path = place.root / "metadata.json"
        meta = json.loads(path.read_text())
        meta["samples"][1].update({k: v(place) if callable(v) else v for k, v in values.items()})
        path.write_text(json.dumps(meta))

    return "npy", damage


def meta(change):
    def damage(place, rng):
        path = place.root / "metadata.json"
        text = change(json.loads(path.read_text()))
        path.write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())

    return "npy", damage


def linked_folder(place, rng):
    place.depth.parent.rename(place.outside / VICTIM)
    (place.root / VICTIM).symlink_to(place.outside / VICTIM)


BAD = dict(
    id=[
        "../x",
        "a/b",
        "a\\b",
        "..",
        ".parts",
        "text_empty",
        "x" * 5000,
        "a\0b",
        "a\nb",
        ["a"],
        {"a": 1},
        1.5,
        "\ud800",
        "val_000000",
    ],
    prompt=[["a"], {"a": 1}, 7, "\udcff", "word " * 10**5, "a\0b"],
    fps=["fast", -1, 0, 1e300, True, [15], "15"],
    depth_scale=["0.001", 0, -1, 1e308, True, [], {"a": 1}],
    inverse_depth=["false", 1, 0, "yes"],
    video_path=[
        "../outside/video.mp4",
        "/etc/passwd",
        lambda p: str(p.outside / "v.mp4"),
        ".",
        "nowhere.mp4",
        7,
        ["a"],
        "a\0b",
        "x" * 9000,
        "train_000001/../../outside/v.mp4",
        "http://localhost/v.mp4",
        "",
    ],
    depth_dir=["../outside", "/", ".", "nowhere", 7, "train_000001/video.mp4"],
    camera_file=["../../x.txt", "/dev/stdin", ".", "nowhere.txt", True],
)

RAW |= {
    f"metadata: {field} = {'a path outside' if callable(v) else repr(v)[:40]}": entry(**{field: v})
    for field, values in BAD.items()
    for v in values
}

RAW |= {
    f"metadata.json: {what}": (
        "npy",
        lambda p, r, damage=damage: damage(p.root / "metadata.json", r),
    )
    for what, damage in FILE.items()
    if what != "missing"
}

RAW |= {
    "metadata.json: missing, with SHA256SUMS": (
        "npy+sums",
        lambda p, r: (p.root / "metadata.json").unlink(),
    ),
    "metadata.json: flipped bits, with SHA256SUMS": (
        "npy+sums",
        lambda p, r: flipped(p.root / "metadata.json", r),
    ),
    "metadata: NaN": meta(lambda m: json.dumps(m).replace('"fps": 15', '"fps": NaN').encode()),
    "metadata: 5000 digits": meta(
        lambda m: json.dumps(m).replace('"fps": 15', '"fps": ' + "9" * 5000).encode()
    ),
    "metadata: nested": meta(lambda m: b"[" * 10**5),
    "metadata: nested objects": meta(lambda m: b'{"a":' * 10**5),
    "metadata: UTF-16": meta(lambda m: json.dumps(m).encode("utf-16")),
    "metadata: a number": meta(lambda m: 7),
    "metadata: a key twice": meta(
        lambda m: json.dumps(m).replace('"fps"', '"prompt": "", "fps"').encode()
    ),
    "metadata: samples are words": meta(lambda m: dict(m, samples=["a", "b"])),
    "metadata: empty": meta(lambda m: {}),
    "metadata: samples by id": meta(lambda m: dict(m, samples={e["id"]: e for e in m["samples"]})),
    "metadata: splits are a list": meta(lambda m: dict(m, splits=["train"])),
    "metadata: a split is a word": meta(
        lambda m: dict(m, splits=dict(train="train_000001", val=[]))
    ),
    "metadata: unknown id in a split": meta(
        lambda m: dict(m, splits=dict(train=["train_000000", f"{VICTIM}_gone"], val=[]))
    ),
    "metadata: in two splits": meta(
        lambda m: dict(m, splits=dict(train=["train_000000", VICTIM], val=[VICTIM]))
    ),
    "metadata: other frame count": entry(num_frames=77),
    "metadata: unknown field": entry(colour="red"),
    "metadata: the folder is a link": ("npy", linked_folder),
    "metadata: an unreadable folder": ("npy", lambda p, r: p.camera.parent.chmod(0)),
    "metadata: the dataset unreadable": ("npy", lambda p, r: p.root.chmod(0)),
    "npy: an unreadable folder": ("npy", lambda p, r: p.depth.chmod(0)),
    "SHA256SUMS: missing line": (
        "npy+sums",
        lambda p, r: (p.root / "SHA256SUMS").write_text(
            "\n".join(
                x
                for x in (p.root / "SHA256SUMS").read_text().splitlines()
                if f"{VICTIM}/camera" not in x
            )
            + "\n"
        ),
    ),
    "SHA256SUMS: random bytes": (
        "npy+sums",
        lambda p, r: (p.root / "SHA256SUMS").write_bytes(r.bytes(999)),
    ),
}


def remux(path, suffix):
    """The same packets in another container."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run(
        [ffmpeg, "-v", "error", "-y", "-i", path, "-c", "copy", path.with_suffix(suffix)],
        check=True,
    )
    return path.with_suffix(suffix)
