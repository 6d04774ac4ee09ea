"""Files of a dataset, read as if somebody meant harm: measured before they are read.

A refusal is a ValueError that names the file, what was found and wanted, and the cure.  Only
regular files are opened (a pipe would hang), at most MAX_BYTES of one; ffmpeg opens local files of
FORMATS alone; arrays of objects are refused.  Depth: z-depth, metres, 0 = unknown."""

import errno
import functools
import json
import math
import os
import re
import secrets
import stat
import subprocess
import tempfile
import threading
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from lib import rasters
from lib.rasters import MAX_PIXELS

MAX_BYTES = 2**32  # of one file, and of what one read decodes
MAX_TEXT = 2**29  # of a JSON file: a million samples with captions
MAX_CAMERAS = 2**24  # of a camera file
FAR = 1e6  # metres; a depth or a camera beyond this is no measurement
FORMATS = "mov,avi,matroska,mpegts,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"

# ffmpeg: CPU seconds, stop at the first damage, local files of FORMATS alone, pictures of one size.
# fmt: off
STRICT = [
    "-hide_banner", "-nostdin", "-timelimit", "600", "-xerror", "-err_detect", "crccheck+explode",
    "-protocol_whitelist", "file", "-format_whitelist", FORMATS, "-max_pixels", str(MAX_PIXELS),
]
# fmt: on

PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
VIDEO = "not a readable video or picture: {}. Re-encode or remove it."  # {}: ffmpeg's words
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
RASTERS = (".exr", ".pfm", ".pgm", ".bin")
ARRAYS = (".npy", ".npz", ".png", *RASTERS)
MAPS = (*ARRAYS, ".tif", ".tiff")  # the last two are found in order to be refused by name
RGB = ("-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe")  # what `pictures` reads
GREY = ("-pix_fmt", "gray16be", "-c:v", "pgm", "-f", "image2pipe")


def check_file(path, limit=MAX_BYTES):
    """Size in bytes of a regular file that can be opened, is not empty and at most `limit` long."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError(f"{path}: not a regular file. Put the file itself there")
        open(path, "rb").close()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file. Check its name, or restore it") from None
    except OSError as error:
        cure = "Make it readable, or do without it"
        raise ValueError(f"{path}: cannot be opened: {error.strerror}. {cure}") from None
    if not 0 < info.st_size <= limit:
        found = f"{info.st_size:,} bytes; wanted 1 to {limit:,}"
        raise ValueError(f"{path}: {found}. Copy or make it again")
    return info.st_size


def check_lines(path):
    """A text file of a camera path: its last line has an end, or numbers at its end may be lost."""
    check_file(path, MAX_CAMERAS)
    if Path(path).read_bytes()[-1] not in b"\r\n":
        raise ValueError(f"{path}: the last line has no end: cut short? Else add a line break")


def unique_keys(pairs):
    """A JSON object; keys that stand there twice are refused."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = ", ".join(sorted(k for k, _ in pairs))
        raise ValueError(f"a key is there twice among {names[:200]}")
    return found


def read_json(path):
    """A JSON file whose objects name each key once."""
    check_file(path, MAX_TEXT)
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}. Write it again") from None


# --- Videos and pictures --------------------------------------------------------------------------
def head_of(path):
    check_file(path)
    with open(path, "rb") as file:
        return file.read(4096).ljust(64, b"\0")


def feed(pipe, paths):
    """Send PNG files into a pipe until one is cut short or unlike the first, or the reader ends."""
    with suppress(OSError, ValueError), open(pipe, "wb") as target:
        kind = png_kind(head_of(paths[0]))
        for path in paths:
            check_file(path)
            data = Path(path).read_bytes()
            if png_kind(data) != kind or not data.endswith(PNG_END):
                return
            target.write(data)


@contextmanager
def ffmpeg(path, *output, turned=True):
    """What ffmpeg makes of the first video stream of a file, or of a list of PNG files as one
    stream: output, and a file of its messages.  turned: as the file says that it be shown."""
    several = isinstance(path, list)
    first = path[0] if several else path
    form = rasters.reader_of(first, head_of(first))
    name = ["-protocol_whitelist", "pipe", "-i", "pipe:0"] if several else ["-i", f"file:{path}"]
    name = name if turned else ["-noautorotate", *name]
    source = [*form, *name, "-map", "0:V:0", "-fps_mode", "passthrough"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *STRICT, *source, *output, "pipe:1"]
    end, start = os.pipe() if several else (subprocess.DEVNULL, None)
    pipes = dict(stdin=end, stdout=subprocess.PIPE)
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stderr=log, **pipes) as process:
        if several:
            os.close(end)  # the process has it: when it ends, writing fails instead of waiting
            threading.Thread(target=feed, args=(start, path), daemon=True).start()
        try:
            yield process.stdout, log
            code = process.wait()
        finally:
            process.kill()
        if code:
            log.seek(max(0, log.tell() - 4000))
            said = log.read().decode(errors="replace").strip()
            if said.startswith("Unrecognized option"):
                cure = "Fix: pip install -U imageio-ffmpeg, and leave IMAGEIO_FFMPEG_EXE unset"
                raise OSError(f"{command[0]}: older than ffmpeg 5.1. {cure}")
            telling = re.search(r"[^\r\n]*(rror|nvalid|whitelist|exceed|not found)[^\r\n]*", said)
            said = (telling or re.search(r"[^\r\n]*$", said))[0] or f"ffmpeg ended with {code}"
            said = next((words for sign, words in rasters.UNREAD.items() if sign in said), said)
            raise ValueError(re.sub(r"\[.*? @ 0x\w+\] *", "", said)[:200])


def pictures(stream, limit=MAX_BYTES):
    """Frames (H, W, 3) uint8 or (H, W) uint16 of a stream of PPM or 16-bit PGM, of one size."""
    first = None
    while magic := stream.readline(8):
        size, deep = stream.readline(32), stream.readline(16) == b"65535\n"
        w, h = map(int, size.split())
        shape, dtype = ((h, w, 3), "u1") if magic == b"P6\n" else ((h, w), ">u2" if deep else "u1")
        first, data = first or shape, stream.read(math.prod(shape) * (2 if deep else 1))
        limit -= len(data)
        if shape != first:
            raise ValueError(f"a frame of {h}x{w} among frames of {first[0]}x{first[1]}")
        if limit < 0:
            raise ValueError(f"more than {MAX_BYTES:,} bytes of frames; cut it into shorter clips")
        yield np.frombuffer(data, dtype).reshape(shape).astype(dtype.lstrip(">"), copy=False)


def read_pngs(paths, read, output, *, turned=True, deep=False):
    """Pictures of files in turn: PNGs that are alike (deep: of 16 bits, grey) by one process, until
    one has a fault; all others by read(path), which names it."""
    while paths:
        done, kind = 0, png_kind(head_of(paths[0]))
        if kind and (kind[8:] == b"\x10\0" or not deep):
            with suppress(ValueError), ffmpeg([*paths], *output, turned=turned) as (stream, _):
                for frame in pictures(stream, math.inf):
                    yield frame
                    done += 1
        if not done:
            yield read(paths[0])
        paths = paths[done or 1 :]


def png_kind(data):
    """Size, bits and colours of a plain PNG by its bytes, or the first of them; or b"": in a stream
    several in a file would shift the others, and the first tells what is turned or HDR."""
    marked = any(chunk in data for chunk in (b"acTL", b"cICP", b"eXIf", b"tRNS"))
    plain = data.startswith(PNG) and data.count(PNG) == 1 and data[25:26] in (b"\0", b"\2")
    return data[16:26] if plain and not marked else b""  # \0, \2: grey or RGB, opaque


def read_stills(paths, turned=True):
    """uint8 (H, W, 3) of several files, of any sizes; turned: as EXIF says, or as they lie."""
    still = lambda path: read_video(path, 1, turned)[0][0]  # noqa: E731
    return read_pngs(paths, still, RGB, turned=turned)


def picture_files(folder):
    """Pictures of a folder that stands for a video, in order."""
    if not (found := listed(folder, STILLS)):
        raise ValueError(f"{folder}: no pictures; wanted {', '.join(STILLS)}, or a video file")
    return found


def iterate_video(path, max_frames=None):
    """Frames uint8 (H, W, 3) of a video, or of a folder of pictures, one at a time."""
    return (frame for frame, _ in decoded(path, max_frames, math.inf))


def decoded(path, max_frames, limit, turned=True, clear=False):
    """(frame (H, W, 3), rasters.told_by) of a file in turn; what is transparent lies over white.

    clear   whether some is, where its first bytes do not say so; others are begun again"""
    if Path(path).is_dir():
        names = picture_files(path)[:max_frames]
        for frame in alike(names, read_stills(names)):
            yield frame, (frame.shape[:2], 0.0, 1.0)
        return
    some = [] if max_frames is None else ["-frames:v", str(max_frames)]
    clear = clear or rasters.has_alpha(head_of(path))
    white = ["-vf", rasters.OVER_WHITE] if clear else []
    try:
        with ffmpeg(path, *some, *white, *RGB, turned=turned) as (stream, log):
            for n, frame in enumerate(pictures(stream, limit)):
                if n == 0:  # moves no place in the log: ffmpeg goes on writing
                    told = rasters.told_by(os.pread(log.fileno(), 2**20, 0), path, clear)
                yield frame, told
    except rasters.Transparent:
        yield from decoded(path, max_frames, limit, turned, True)
    except ValueError as error:
        raise damaged(path, error, VIDEO) from None


def read_video(path, max_frames=None, turned=True):
    """The first frames (default all), uint8 (T, H, W, 3); what rasters.told_by tells."""
    found = list(decoded(path, max_frames, MAX_BYTES, turned))
    if not found:
        raise ValueError(f"{path}: the video has no frames. Re-encode or remove it.")
    return np.stack([frame for frame, _ in found]), found[0][1]


def stats_of(path):
    """Of a file, or of a folder and all in it; [] where there is none."""
    parts = [Path(path), *Path(path).glob("*")]
    return [part.stat() for part in parts if part.exists()]  # an editor's lock is a link to nowhere


def while_unchanged(function):
    """A function of a path, asked anew if files change there: windows of a clip ask in a row."""
    known = functools.lru_cache(maxsize=1)(lambda path, changed: function(path))
    return lambda path: known(path, tuple((s.st_size, s.st_mtime_ns) for s in stats_of(path)))


@while_unchanged
def video_facts(path):
    """Number of frames, rasters.told_by; decodes all of it, so that damage anywhere is seen."""
    if Path(path).is_dir():
        told = [told for _, told in decoded(path, None, math.inf)]
        return len(told), *told[0]
    try:
        with ffmpeg(path, "-nostats", "-progress", "pipe:1", "-f", "null") as (stream, log):
            counts = [0, *map(int, re.findall(rb"^frame=(\d+)", stream.read(), re.M))]
            said = os.pread(log.fileno(), 2**20, 0)
        if not counts[-1]:
            raise ValueError("it has no frames")
        return counts[-1], *rasters.told_by(said, path, True)
    except ValueError as error:
        raise damaged(path, error, VIDEO) from None


# --- Arrays ---------------------------------------------------------------------------------------
def array_header(file, size, mask):
    """Shape, type and order of an .npy stream of `size` bytes; truth values only for a mask."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f".npy version {version}")
    shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)
    if dtype.kind not in ("fiub" if mask else "fiu") or dtype.hasobject:
        raise ValueError(f"values of type {dtype}; wanted numbers")
    want = file.tell() + dtype.itemsize * math.prod(shape)
    if min(shape, default=1) < 1 or want != size or size > MAX_BYTES:
        told = f"its header speaks of {shape} values, that is {want:,}"
        raise ValueError(f"{size:,} bytes; {told}, and at most {MAX_BYTES:,} are read")
    return shape, dtype, fortran


def png_header(path, mask):
    """Shape of a 16-bit grey PNG, or with mask of any."""
    head = head_of(path)
    if head[:8] != PNG or not mask and head[24:26] != b"\x10\x00":
        raise ValueError("not a 16-bit grey PNG; other kinds do not hold metric depth")
    w, h = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    rasters.check_size(h, w)
    return h, w


def open_array(path, read, mask):
    """(shape, dtype) or, with read, the array of one file; of an .npz depth, or the only one."""
    check_file(path)
    if path.suffix.lower() not in ARRAYS:
        wanted = f"wanted {', '.join(ARRAYS)}: numpy.save what its own reader gives"
        raise ValueError(f"an ending {path.suffix or 'of none'}; {wanted}")
    if path.suffix.lower() == ".png":
        shape = png_header(path, mask)
        if not read:
            return shape, np.dtype("u2")
        with ffmpeg(path, "-frames:v", "1", *GREY) as (stream, _):
            image = next(pictures(stream), np.zeros(0))
        if image.shape != shape:
            raise ValueError(f"a picture of {image.shape}; its header says {shape}")
        return image
    if path.suffix.lower() in RASTERS:
        image = rasters.read_raster(path.read_bytes())
        return image if read else (image.shape, image.dtype)
    with array_stream(path, mask) as (file, size):
        header = array_header(file, size, mask)[:2]
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False) if read else header


@contextmanager
def array_stream(path, mask):
    """The .npy of a file and its bytes; of an .npz depth, points or the mask, or the only one."""
    size = check_file(path)
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as file:
            yield file, size
        return
    with zipfile.ZipFile(path) as archive:
        usual = ("mask.npy",) if mask else ("depth.npy", "points.npy")
        names = archive.namelist()
        name = next((n for n in usual if n in names), names[0])
        if names.count(name) > 1:
            raise ValueError(f"the array {name} is there twice")
        if name not in usual and len(names) > 1:
            raise ValueError(f"it holds {', '.join(names)}; which one? Name it {usual[0][:-4]}")
        with archive.open(name) as file:
            yield file, archive.getinfo(name).file_size


def stacked(path, mask=False):
    """Frames of one file with all of a clip, one at a time where they lie one after another."""
    try:
        if path.suffix.lower() in (".npy", ".npz"):
            with array_stream(path, mask) as (file, size):
                shape, dtype, fortran = array_header(file, size, mask)
                if len(shape) > 2 and not fortran:
                    for _ in range(shape[0]):
                        frame = file.read(dtype.itemsize * math.prod(shape[1:]))
                        yield np.frombuffer(frame, dtype).reshape(shape[1:])
                    file.read(1)  # an archive compares its checksum at the end
                    return
        array = open_array(path, True, mask)
    except Exception as error:
        raise damaged(path, error) from None
    yield from array if array.ndim > 2 else array[None]


def read_array(path, read=True, mask=False):
    """The array of one file; read=False: its shape and type alone; mask: of any kind of PNG."""
    try:
        return open_array(Path(path), read, mask)
    except Exception as error:  # flipped bytes make numpy and zipfile raise almost any class
        raise damaged(path, error) from None


def damaged(path, error, words="cannot be read: {}. Make it again or do without it"):
    said = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or repr(error)
    named = re.match(re.escape(str(path)) + r"\W", said)  # then it says all
    return ValueError(said if named else f"{path}: {words.format(said)}")


def natural(name):
    """Key of the one order of frames, of pictures, depth and cameras: 2 before 10."""
    return [int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", name))]


def listed(folder, kinds, pattern="*"):
    """Files of some endings in a folder, in order; hidden ones aside."""
    found = [f for f in Path(folder).glob(pattern) if f.suffix.lower() in kinds]
    return sorted((f for f in found if f.name[0] != "."), key=lambda f: natural(f.name))


def array_files(path):
    """Files of a clip's arrays in order: one for all frames, or a folder with one per frame."""
    return listed(path, MAPS) if path.is_dir() else []


def count_arrays(path, mask=False):
    """How many frames of arrays there are; a map of two sides is one."""
    if path.is_dir():
        return len(array_files(path))
    shape = read_array(path, False, mask)[0]
    return shape[0] if len(shape) > 2 else 1


def read_each(paths, mask=False):
    """The array of each file in turn."""
    return read_pngs(paths, functools.partial(read_array, mask=mask), GREY, deep=not mask)


def alike(paths, arrays):
    """The arrays of files in turn; ValueError names one of another shape or type than the first."""
    first = None
    for path, array in zip(paths, arrays):
        first = array if first is None else first
        if (array.shape, array.dtype) != (first.shape, first.dtype):
            own, other = ("x".join(map(str, a.shape)).removesuffix("x3") for a in (array, first))
            told = f"{own}, where {paths[0].name} is {other} ({array.dtype} and {first.dtype})"
            raise ValueError(f"{path}: {told}. Make all alike")
        yield array


def iterate_arrays(path):
    """Frames of read_arrays one at a time; a folder is never in memory as a whole."""
    names = array_files(Path(path))
    return alike(names, read_each(names)) if names else stacked(Path(path))


def read_arrays(path, frames=None, mask=False, limit=MAX_BYTES):
    """Chosen frames (default all) of one file (T, ...) or of a folder; limit: bytes of them all."""
    path = Path(path)
    source = array_files(path)
    count = len(source) or count_arrays(path, mask)  # a long folder is not listed twice
    frames = range(count) if frames is None else frames
    if count <= max(frames, default=0):
        raise ValueError(f"{path}: {count} frames found, {max(frames, default=0) + 1} wanted")
    first = read_array(source[frames[0]] if source else path, False, mask)
    shape = first[0] if source or len(first[0]) < 3 else first[0][1:]
    if math.prod(shape) * first[1].itemsize * len(frames) > limit:
        found = f"{len(frames)} frames of {shape} values"
        raise ValueError(f"{path}: {found}; at most {limit:,} bytes are read. Scale it down")
    if source:
        source = [source[t] for t in frames]
        return np.stack(list(alike(source, read_each(source, mask))))
    kept = {t: frame for t, frame in enumerate(stacked(path, mask)) if t in frames}
    return np.stack([kept[t] for t in frames])


def is_of_disk(error):
    """Whether an error is the disk's, which ends the work: no clip or job is at fault."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def write_aside(path, write, durable=True):
    """write(temporary path), then rename: a reader finds the whole file, or the one before.

    durable   flush to the disk first: for what cannot be made again
    The temporary file is new, never a link that somebody has put there."""
    number = f"{os.getpid()}{secrets.randbelow(10**9):09d}"  # containers have equal ids
    temporary = path.with_name(f".{path.name}.{number}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        write(temporary)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder where the file belongs. Delete it") from None
    finally:
        temporary.unlink(missing_ok=True)  # a full disk gets its space back
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):  # the rename itself reaches the disk; not all disks know how
            os.fsync(folder)
        os.close(folder)
