"""The damage that tests/bad_data.py does to a dataset: {name: (form of the dataset, function of (place, rng))}.

A place has root, outside (a folder beside it), video, depth, camera, points, cache, empty and folder (of the caches)."""
import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import imageio_ffmpeg
import numpy as np
import torch
from safetensors.torch import load_file, save

from caches import DTYPES, header_crc, read_header
from data import write_png, write_video
from readers import read_array, read_arrays, read_video

VICTIM = "train_000001"
RAW, CACHE = {}, {}


class Bomb:
    """Unpickled, it leaves a file behind."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# --- Any file ----------------------------------------------------------------------------------------------
def truncated(path, rng):
    path.write_bytes(path.read_bytes()[:rng.integers(1, path.stat().st_size)])


def flipped(path, rng):
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, len(data), rng.integers(1, 4)):
        data[at] ^= 1 << rng.integers(0, 8)
    path.write_bytes(data)


def blanked(path, rng):
    data = bytearray(path.read_bytes())
    at = 512 * rng.integers(0, len(data) // 512 + 1)                              # disks lose sectors
    data[at:at + 512] = bytes(len(data[at:at + 512]))
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


FILE = dict(truncated=truncated, emptied=lambda p, r: p.write_bytes(b""), missing=lambda p, r: p.unlink(),
            random=lambda p, r: p.write_bytes(r.bytes(p.stat().st_size)), text=lambda p, r: p.write_text("not found\n" * 99),
            folder=replaced(lambda p: p.mkdir()), pipe=replaced(os.mkfifo), unreadable=unreadable,
            endless=replaced(lambda p: p.symlink_to("/dev/zero")), loop=replaced(lambda p: p.symlink_to(p)))


def frame(place, rng):
    return sorted(place.depth.glob("*"))[rng.integers(0, 5)] if place.depth.is_dir() else place.depth


PARTS = dict(video=("npy", lambda p, r: p.video), avi=("avi", lambda p, r: p.video), mkv=("mkv", lambda p, r: p.video),
             cameras=("npy", lambda p, r: p.camera), npy=("npy", frame), npz=("npz", frame), png=("png", frame),
             one=("one", frame), points=("points", lambda p, r: sorted(p.points.glob("*"))[r.integers(0, 5)]))
for part, (form, find) in PARTS.items():
    RAW[f"{part}: a link that leaves the dataset"] = form, lambda p, r, find=find: linked_out(p, find(p, r))
    for what, damage in (FILE | dict(blanked=blanked)).items():
        RAW[f"{part}: {what}"] = form, lambda p, r, find=find, damage=damage: damage(find(p, r), r)
    RAW[f"{part}: flipped bits, with SHA256SUMS"] = form + "+sums", lambda p, r, find=find: flipped(find(p, r), r)
for part in ("npz", "png"):
    RAW[f"{part}: flipped bits"] = part, lambda p, r: flipped(frame(p, r), r)


# --- Videos ------------------------------------------------------------------------------------------------
def video(change):
    def damage(place, rng):
        frames, fps = read_video(place.video)
        write_video(place.video, change(frames), fps)
    return "npy", damage


def png_bytes(w, h, bits=16, colour=0):
    head = b"IHDR" + struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
                                           for c in (head, body, b"IEND"))


def sound(place, rng):
    place.video.write_bytes(b"RIFF" + struct.pack("<I", 2036) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000,
                                                                                        1, 8) + b"data"
                            + struct.pack("<I", 2000) + bytes(2000))


RAW |= {"video: first frame lost": video(lambda f: f[1:]), "video: middle frame lost": video(lambda f: np.delete(f, 4, 0)),
        "video: a frame too many": video(lambda f: f[[0, *range(9)]]), "video: last frames lost": video(lambda f: f[:6]),
        "video: portrait": video(lambda f: f.transpose(0, 2, 1, 3)), "video: cropped": video(lambda f: f[:, :, 16:]),
        "video: a sound": ("npy", sound),
        "video: huge picture": ("npy", lambda p, r: p.video.write_bytes(png_bytes(100000, 100000))),
        "video: one picture": ("npy", lambda p, r: write_png(p.video, np.zeros((32, 48, 3), np.uint8))),
        "video: a playlist": ("npy", lambda p, r: p.video.write_text(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{p.root}/train_000000/video.mp4\n#EXT-X-ENDLIST\n")),
        "video: a list of files": ("npy", lambda p, r: p.video.write_text(
            "ffconcat version 1.0\nfile ../train_000000/video.mp4\n"))}


# --- Depth -------------------------------------------------------------------------------------------------
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
        flat[rng.choice(flat.size, count if count > 1 else max(1, int(count * flat.size)), replace=False)] = value
        d[where] = flat.reshape(d[where].shape)
        return d
    return change


def header(descr="'<f4'", shape="(32, 48)", rest=b"\0" * 32 * 48 * 4, order="False"):
    text = (f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}" if descr else shape).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + rest


def raw_npy(*args, **kwargs):
    return "npy", lambda p, r: frame(p, r).write_bytes(header(*args, **kwargs))


def pickled(place, rng):
    np.save(frame(place, rng), np.array([Bomb(place.outside / "EXECUTED")], object), allow_pickle=True)


def archive(members, **kwargs):
    def damage(place, rng):
        with zipfile.ZipFile(place.depth, "w", zipfile.ZIP_DEFLATED) as file:
            for name, body in members(place):
                file.writestr(name, body)
    return "npz", damage


def pickle_npy(place):
    return b"\x93NUMPY\x01\0" + struct.pack("<H", 60) + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}".ljust(59) \
        + b"\n" + pickle.dumps([Bomb(place.outside / "EXECUTED")])


def npy_bytes(array):
    np.save(body := io.BytesIO(), array)
    return body.getvalue()


def zip_field(offset, value):
    """Overwrite a field of the archive's central directory."""
    def damage(place, rng):
        data = bytearray(place.depth.read_bytes())
        at = data.rindex(b"PK\1\2") + offset
        data[at:at + len(value)] = value
        place.depth.write_bytes(data)
    return "npz", damage


FIRST = slice(0, 1)
for form in ("npy", "npz", "one"):
    RAW |= {f"{form}: NaN in the whole first frame": depth(put(np.nan, .9999, FIRST), form),
            f"{form}: some NaN": depth(put(np.nan, .05), form), f"{form}: some infinity": depth(put(np.inf, .05), form),
            f"{form}: all NaN": depth(put(np.nan, .99999), form), f"{form}: all zero": depth(lambda d, r: 0 * d, form),
            f"{form}: negative": depth(lambda d, r: -d, form), f"{form}: one value of 1e30": depth(put(1e30, .0001), form),
            f"{form}: beyond float32": depth(lambda d, r: d.astype(np.float64) * 1e300, form),
            f"{form}: booleans": depth(lambda d, r: d > 3, form), f"{form}: complex": depth(lambda d, r: d + 1j, form),
            f"{form}: words": depth(lambda d, r: d.astype("<U8"), form),
            f"{form}: dates": depth(lambda d, r: d.astype("<i8").astype("<M8[ns]"), form),
            f"{form}: integers": depth(lambda d, r: (1000 * d).astype(np.int64), form),
            f"{form}: double precision": depth(lambda d, r: d.astype(np.float64), form),
            f"{form}: big-endian": depth(lambda d, r: d.astype(">f4"), form),
            f"{form}: rank too high": depth(lambda d, r: d[..., None], form),
            f"{form}: rank too low": depth(lambda d, r: d[..., 0], form),
            f"{form}: portrait": depth(lambda d, r: d.swapaxes(-1, -2), form)}
for form in ("npz", "one"):
    RAW |= {f"{form}: a frame too few": depth(lambda d, r: d[:, 1:], form),
            f"{form}: a frame too many": depth(lambda d, r: d[:, [0, *range(9)]], form)}
RAW |= {"npy: an extra frame": ("npy", lambda p, r: np.save(p.depth / "frame_0004b.npy", read_array(frame(p, r)))),
        "npy: one frame of another size": one_frame(lambda d: d[:16, :24]),
        "npy: one frame of another type": one_frame(lambda d: (1000 * d).astype(np.uint16)),
        "npy: records": one_frame(lambda d: np.zeros((32, 48), [("z", "<f4")])),
        "npy: code to execute": ("npy", pickled), "npy: 10^12 values": raw_npy(shape="(1000000, 1000000)"),
        "npy: 10^36 values": raw_npy(shape="(1000000000000,) * 3"), "npy: negative size": raw_npy(shape="(-32, -48)"),
        "npy: nested header": raw_npy(descr="", shape="[" * 9000), "npy: deep header": raw_npy(descr="", shape="-" * 9000 + "1"),
        "npy: calling header": raw_npy(shape="(__import__('os').system('touch EXECUTED'),)"),
        "npy: smaller than the file": raw_npy(shape="(16, 48)"), "npy: empty": raw_npy(shape="(0, 48)", rest=b""),
        "npz: code to execute": archive(lambda p: [("depth.npy", pickle_npy(p))]),
        "npz: nothing in it": archive(lambda p: []), "npz: no array": archive(lambda p: [("depth.npy", b"none")]),
        "npz: twice the array": archive(lambda p: [("depth.npy", npy_bytes(np.ones((9, 32, 48), "f4")))] * 2),
        "npz: 10^12 values": archive(lambda p: [("depth.npy", header(shape="(1000000, 1000, 1000)"))]),
        "npz: bomb": archive(lambda p: [("depth.npy", header(shape="(9, 20000, 4000)", rest=bytes(10 ** 8)))]),
        "npz: encrypted": zip_field(8, b"\1\0"), "npz: unknown packing": zip_field(10, b"\x63\0"),
        "npz: another size": zip_field(24, struct.pack("<I", 10 ** 9)),
        "png: huge picture": ("png", lambda p, r: frame(p, r).write_bytes(png_bytes(100000, 100000))),
        "png: taller than its data": ("png", lambda p, r: frame(p, r).write_bytes(png_bytes(48, 3200))),
        "png: colour": ("png", lambda p, r: write_png(frame(p, r), np.zeros((32, 48, 3), np.uint8))),
        "png: 8 bits": ("png", lambda p, r: frame(p, r).write_bytes(png_bytes(48, 32, 8))),
        "points: four numbers": ("points", lambda p, r: [np.save(f, np.ones((32, 48, 4), "f4")) for f in p.points.glob("*")]),
        "points: flat": ("points", lambda p, r: [np.save(f, np.ones((32, 48), "f4")) for f in p.points.glob("*")]),
        "points: NaN": ("points", lambda p, r: [np.save(f, np.full((32, 48, 3), np.nan, "f4")) for f in p.points.glob("*")]),
        "points: far": ("points", lambda p, r: [np.save(f, np.full((32, 48, 3), 1e9, "f4")) for f in p.points.glob("*")])}


# --- Cameras -----------------------------------------------------------------------------------------------
def rows(change):
    """Change the table of numbers, or the text of the file."""
    def damage(place, rng):
        table = change(np.loadtxt(place.camera))
        np.savetxt(place.camera, table, "%.10g") if isinstance(table, np.ndarray) else place.camera.write_bytes(table)
    return "npy", damage


def cell(value, columns=range(1, 19)):
    def damage(place, rng):
        lines = [line.split() for line in place.camera.read_text().splitlines()]
        lines[rng.integers(0, 5)][rng.choice(columns)] = value
        place.camera.write_text("\n".join(map(" ".join, lines)) + "\n")
    return "npy", damage


def times(columns, factor, plus=0.):
    def change(t):
        t[:, columns] = t[:, columns] * factor + plus
        return t
    return rows(change)


def as_text(t, separator=" "):
    return "".join(separator.join(f"{x:.10g}" for x in row) + "\n" for row in t)


RAW |= {f"cameras: {word!r} for a number": cell(word) for word in ("nan", "inf", "-inf", "1e999", "x", "1,5", "0x1p3", "\0", "--1")}
RAW |= {"cameras: focal length 0": cell("0", (1, 2)), "cameras: negative focal length": cell("-0.8", (1, 2)),
        "cameras: centre outside": cell("3", (3, 4)), "cameras: far away": cell("1e9", (10, 14, 18)),
        "cameras: rotation scaled": times(slice(7, 10), 1.01), "cameras: mirrored": times(slice(7, 10), -1),
        "cameras: pixel intrinsics": times(slice(1, 3), 500), "cameras: rotation zero": times([7, 8, 9, 11, 12, 13], 0),
        "cameras: a column lost": rows(lambda t: np.delete(t, 5, 1)), "cameras: a column more": rows(lambda t: t[:, [0, *range(19)]]),
        "cameras: columns shifted": rows(lambda t: np.roll(t, 1, 1)), "cameras: matrices alone": rows(lambda t: t[:, 7:]),
        "cameras: a row lost": rows(lambda t: np.delete(t, 3, 0)), "cameras: a row twice": rows(lambda t: t[[0, *range(9)]]),
        "cameras: a row for another": rows(lambda t: t[[0, 1, 1, *range(3, 9)]]), "cameras: rows reversed": rows(lambda t: t[::-1]),
        "cameras: UTF-16": rows(lambda t: as_text(t).encode("utf-16")), "cameras: commas": rows(lambda t: as_text(t, ",").encode()),
        "cameras: JSON": rows(lambda t: json.dumps(t.tolist()).encode()), "cameras: random bytes": rows(lambda t: os.urandom(3000)),
        "cameras: end of the file lost": rows(lambda t: as_text(t)[:-3].encode()),
        "cameras: 20 MB": rows(lambda t: as_text(t).encode() * 20000)}


# --- metadata.json -----------------------------------------------------------------------------------------
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


BAD = dict(id=["../x", "a/b", "a\\b", "..", ".parts", "text_empty", "x" * 5000, "a\0b", "a\nb", ["a"], {"a": 1}, 1.5, "\ud800",
               "val_000000"],
           prompt=[["a"], {"a": 1}, 7, "\udcff", "word " * 10 ** 5, "a\0b"], fps=["fast", -1, 0, 1e300, True, [15], "15"],
           depth_scale=["0.001", 0, -1, 1e308, True, [], {"a": 1}], inverse_depth=["false", 1, 0, "yes"],
           video_path=["../outside/video.mp4", "/etc/passwd", lambda p: str(p.outside / "v.mp4"), ".", "nowhere.mp4", 7, ["a"],
                       "a\0b", "x" * 9000, "train_000001/../../outside/v.mp4", "http://localhost/v.mp4", ""],
           depth_dir=["../outside", "/", ".", "nowhere", 7, "train_000001/video.mp4"],
           camera_file=["../../x.txt", "/dev/stdin", ".", "nowhere.txt", True])
RAW |= {f"metadata: {field} = {'a path outside' if callable(v) else repr(v)[:40]}": entry(**{field: v})
        for field, values in BAD.items() for v in values}
RAW |= {f"metadata.json: {what}": ("npy", lambda p, r, damage=damage: damage(p.root / "metadata.json", r))
        for what, damage in FILE.items() if what != "missing"}
RAW |= {"metadata.json: missing, with SHA256SUMS": ("npy+sums", lambda p, r: (p.root / "metadata.json").unlink()),
        "metadata.json: flipped bits, with SHA256SUMS": ("npy+sums", lambda p, r: flipped(p.root / "metadata.json", r)),
        "metadata: NaN": meta(lambda m: json.dumps(m).replace('"fps": 15', '"fps": NaN').encode()),
        "metadata: 5000 digits": meta(lambda m: json.dumps(m).replace('"fps": 15', '"fps": ' + "9" * 5000).encode()),
        "metadata: nested": meta(lambda m: b"[" * 10 ** 5), "metadata: nested objects": meta(lambda m: b'{"a":' * 10 ** 5),
        "metadata: UTF-16": meta(lambda m: json.dumps(m).encode("utf-16")), "metadata: a number": meta(lambda m: 7),
        "metadata: a key twice": meta(lambda m: json.dumps(m).replace('"fps"', '"prompt": "", "fps"').encode()),
        "metadata: samples are words": meta(lambda m: dict(m, samples=["a", "b"])), "metadata: empty": meta(lambda m: {}),
        "metadata: samples by id": meta(lambda m: dict(m, samples={e["id"]: e for e in m["samples"]})),
        "metadata: splits are a list": meta(lambda m: dict(m, splits=["train"])),
        "metadata: a split is a word": meta(lambda m: dict(m, splits=dict(train="train_000001", val=[]))),
        "metadata: unknown id in a split": meta(lambda m: dict(m, splits=dict(train=["train_000000", f"{VICTIM}_gone"], val=[]))),
        "metadata: in two splits": meta(lambda m: dict(m, splits=dict(train=["train_000000", VICTIM], val=[VICTIM]))),
        "metadata: other frame count": entry(num_frames=77), "metadata: unknown field": entry(colour="red"),
        "metadata: the folder is a link": ("npy", linked_folder),
        "metadata: an unreadable folder": ("npy", lambda p, r: p.camera.parent.chmod(0)),
        "metadata: the dataset unreadable": ("npy", lambda p, r: p.root.chmod(0)),
        "npy: an unreadable folder": ("npy", lambda p, r: p.depth.chmod(0)),
        "SHA256SUMS: missing line": ("npy+sums", lambda p, r: (p.root / "SHA256SUMS").write_text("\n".join(
            x for x in (p.root / "SHA256SUMS").read_text().splitlines() if f"{VICTIM}/camera" not in x) + "\n")),
        "SHA256SUMS: random bytes": ("npy+sums", lambda p, r: (p.root / "SHA256SUMS").write_bytes(r.bytes(999)))}


# --- Caches ------------------------------------------------------------------------------------------------
def forge(path, tensors, metadata):
    """A cache file with right checksums, whatever it holds."""
    names, crc = {x: name for name, x in DTYPES.items()}, 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy(), crc)
    specs = [(k, names.get(x.dtype, "I64"), list(x.shape)) for k, x in tensors.items()]
    metadata = {k: v for k, v in metadata.items() if k != "crc"}
    path.write_bytes(save({k: x.contiguous() for k, x in tensors.items()},
                          dict(metadata, crc=f"{crc:08x}{header_crc(metadata, specs)}")))


def tensors(**changes):
    """Change tensors; None removes one."""
    def damage(place, rng):
        metadata, found = read_header(place.cache)[0], load_file(place.cache)
        for name, change in changes.items():
            found[name] = change(found.get(name))
        forge(place.cache, {k: x for k, x in found.items() if x is not None}, metadata)
    return damage


def metadata(**changes):
    def damage(place, rng):
        known, found = read_header(place.cache)[0] | changes, load_file(place.cache)
        forge(place.cache, found, {k: v for k, v in known.items() if v is not None})
    return damage


def set_one(value):
    def change(x):
        x.view(-1)[7] = value
        return x
    return change


def header_text(text, size=None):
    def damage(place, rng):
        body = text.encode()
        place.cache.write_bytes(struct.pack("<Q", len(body) if size is None else size) + body + bytes(1000))
    return damage


def renamed_folder(place, rng):
    os.rename(place.folder, place.folder.with_name(place.folder.name.replace("transform-v1", "wan32clip-1234")))


def out_link(place, rng):
    os.rename(place.folder.parent, place.outside / "cache")
    place.folder.parent.symlink_to(place.outside / "cache")


CACHE |= {f"cache: {what}": lambda p, r, damage=damage: damage(p.cache, r)
          for what, damage in (FILE | dict(blanked=blanked)).items()}
CACHE |= {f"empty text: {what}": lambda p, r, damage=damage: damage(p.empty, r)
          for what, damage in (FILE | {"flipped bits": flipped}).items()}
CACHE |= {f"cache: flipped bits, draw {n}": lambda p, r: flipped(p.cache, r) for n in range(20)}
CACHE |= {"cache: longer": lambda p, r: p.cache.write_bytes(p.cache.read_bytes() + b"\0"),
          "cache: a pickle": lambda p, r: torch.save([Bomb(p.outside / "EXECUTED")], p.cache),
          "cache: header of 2^60 bytes": header_text("{}", 2 ** 60), "cache: nested header": header_text("[" * 10 ** 5),
          "cache: 10^12 values": header_text('{"latents":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
          "cache: 10^300 values": header_text('{"latents":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("1" + 300 * "0")),
          "cache: header is a list": header_text("[1, 2]"), "cache: metadata is a number": header_text('{"__metadata__": 7}'),
          "cache: another clip's": lambda p, r: p.cache.write_bytes((p.folder / "train_000000.safetensors").read_bytes()),
          "cache: no latents": tensors(latents=lambda x: None), "cache: no text": tensors(text=lambda x: None),
          "cache: a tensor more": tensors(more=lambda x: torch.ones(3)),
          "cache: float32 latents": tensors(latents=lambda x: x.float()), "cache: float16": tensors(latents=lambda x: x.half()),
          "cache: integers": tensors(depth=lambda x: x.long()), "cache: latents of rank 3": tensors(latents=lambda x: x[0]),
          "cache: depth of another size": tensors(depth=lambda x: x[:, ::2]), "cache: a frame less": tensors(w2c=lambda x: x[1:]),
          "cache: latents transposed": tensors(latents=lambda x: x.mT), "cache: text of another width": tensors(text=lambda x: x[:, :9]),
          "cache: CLIP in one alone": tensors(clip=lambda x: torch.zeros(257, 1280, dtype=torch.bfloat16)),
          "cache: start of all frames": tensors(start_latents=lambda x: x.repeat(1, 2, 1, 1)),
          "cache: no word": tensors(text=lambda x: x[:0]), "cache: NaN latent": tensors(latents=set_one(torch.nan)),
          "cache: infinite depth": tensors(depth=set_one(torch.inf)), "cache: NaN text": tensors(text=set_one(torch.nan)),
          "cache: negative depth": tensors(depth=set_one(-1.)), "cache: no depth": tensors(depth=lambda x: 0 * x),
          "cache: depth of 1e30": tensors(depth=set_one(1e30)), "cache: NaN camera": tensors(w2c=set_one(torch.nan)),
          "cache: no rotation": tensors(w2c=lambda x: 2 * x), "cache: no focal length": tensors(intrinsics=lambda x: 0 * x),
          "cache: absolute cameras": tensors(w2c=lambda x: x + torch.tensor([0, 0, 0, 1.])),
          "cache: another encoder": metadata(fingerprint="wan32clip-0a1b2c3d"), "cache: another size": metadata(height="64"),
          "cache: another prompt": metadata(prompt="a cat"), "cache: id elsewhere": metadata(id="../../x", sample="../../x"),
          "cache: no frame rate": metadata(fps=None), "cache: frame rate NaN": metadata(fps="nan"),
          "cache: frame rate a word": metadata(fps="fast"), "cache: depth of a third kind": metadata(depth="green"),
          "cache: no checksum": lambda p, r: p.cache.write_bytes(save(load_file(p.cache), {
              k: v for k, v in read_header(p.cache)[0].items() if k != "crc"})),
          "cache: of another video branch": renamed_folder, "cache: the folder is a link": out_link,
          "cache: two encoders": lambda p, r: os.mkdir(p.folder.with_name(p.folder.name + "0")),
          "cache: an unreadable folder": lambda p, r: p.folder.chmod(0), "cache: a file for the folder": lambda p, r: (
              p.folder.rename(p.outside / "x"), p.folder.write_text("")),
          "cache: the prompt has changed": lambda p, r: entry(prompt="a dog")[1](p, r),
          "cache: marker of nonsense": lambda p, r: ((p.folder / ".checked").write_bytes(r.bytes(99)), flipped(p.cache, r))}


def remux(path, suffix):
    """The same packets in another container."""
    import subprocess
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", path, "-c", "copy", path.with_suffix(suffix)],
                   check=True)
    return path.with_suffix(suffix)


def points_of(place, w2c, K):
    """Points in the first camera's frame, from the depth files: the folder that replaces them."""
    from geometry import unproject
    z = torch.from_numpy(read_arrays(place / "depth")).double()
    return unproject(z[None], w2c[None], K[None])[0].numpy().astype(np.float32)
