"""Pictures, told by their first bytes; and depth that ffmpeg cannot read exactly: EXR, PFM, PGM.

EXR is what ViPE and MoGe write: scan lines, one channel of half or single floats, compression none,
ZIPS or ZIP; others are refused.  Sources: OpenEXR's file layout, the PFM and Netpbm formats."""

import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

MAX_PIXELS = 2**26  # of one picture: 8192 x 8192
EXR, PFM = b"\x76\x2f\x31\x01", b"Pf"
PIXEL_TYPES = {0: np.dtype("<u4"), 1: np.dtype("<f2"), 2: np.dtype("<f4")}
# What a picture begins with, and ffmpeg's reader for it: by name, it takes .jpg for a film strip.
READERS = {
    b"\xff\xd8\xff": "jpeg_pipe",
    b"\x89PNG\r\n": "png_pipe",
    b"BM": "bmp_pipe",
    b"II*\0": "tiff_pipe -err_detect crccheck",  # a tag that ffmpeg does not know is no damage
    b"MM\0*": "tiff_pipe -err_detect crccheck",
}
# Not a still of 3 colours and 8 bits that ffmpeg reads whole.
# fmt: off
REFUSED = {
    b"GIF8": "GIF", b"8BPS": "Photoshop", b"%PDF": "PDF", EXR: "OpenEXR",
    b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"#?RADIANCE": "Radiance HDR",
}
# fmt: on
HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis"}
# A TIFF's compression 6 or 7, JPEG, in either order of bytes: ffmpeg makes it black in silence.
JPEG_TIF = re.compile(rb"\x03\x01\x03\0\x01\0\0\0[\x06\x07]\0|\x01\x03\0\x03\0\0\0\x01\0[\x06\x07]")
# What hides behind transparent pixels is not shown.
OVER_WHITE = "format=rgba,split[a][b];[a]lutrgb=255:255:255:255[w];[w][b]overlay=format=rgb"
# What ffmpeg says of files that it would turn into wrong pictures, and options that cure them.
SDR = "zscale=t=linear:npl=100,tonemap=hable,zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p"
ALPHA = rb"Video: (?!mjpeg)[^\n]*, (yuva|ya|gbra|rgba|argb|bgra|abgr)"  # CMYK is no alpha
WRONG = {
    "HDR colours (HLG or PQ)": (rb"Video: [^\n]*(arib-std-b67|smpte2084)", f"-i IN -vf {SDR}"),
    "interlaced lines": (rb"Video: [^\n]*(top|bottom) (coded )?first", "-i IN -vf bwdif=0"),
    "VP9 with alpha": (rb"alpha_mode *: 1", f"-c:v libvpx-vp9 -i IN -vf '{OVER_WHITE}'"),
}
# What it says of files that it does not read, in other words.
NONE_OF = "no mp4, mov, mkv, webm, avi, ts, PNG, JPEG, WebP, BMP or TIFF, or cut short"
UNREAD = {"not on whitelist": NONE_OF, "opening input: Invalid data": NONE_OF}
UNREAD |= {"Failed to set value '0:V:0'": "there is no picture in it"}
# Every compression that OpenEXR knows, by its number; lines of a block of those that are read here.
COMPRESSIONS = "none RLE ZIPS ZIP PIZ PXR24 B44 B44A DWAA DWAB".split()
LINES = dict(none=1, ZIPS=1, ZIP=16)


def reader_of(path, head):
    """ffmpeg's options for a file that begins with `head`; a picture's, or none for a video."""
    kinds = [kind for magic, kind in REFUSED.items() if head.startswith(magic)]
    if head[4:8] == b"ftyp" and head[8:12] in HEIF:
        kinds.append("HEIC or AVIF")
    if head.startswith((b"II*\0", b"MM\0*")) and JPEG_TIF.search(Path(path).read_bytes()):
        kinds.append("TIFF with JPEG inside")
    if head[8:16] == b"WEBPVP8X" and head[20] & 2:
        kinds.append("animated WebP")
    if kinds:
        raise ValueError(f"{path}: a picture of kind {kinds[0]}: save it as JPEG or PNG")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ["-f", "webp_pipe"]
    found = [name for magic, name in READERS.items() if head.startswith(magic)]
    return ["-f", *found[0].split()] if found else []


class Transparent(Exception):
    """Some of a picture is, which its first bytes did not say."""


def told_by(said, path, clear):
    """((H, W) upright, frames a second or 0, width of a pixel over its height (SAR); of pictures 1,
    theirs is for printers) by ffmpeg's messages; what comes out wrong is refused."""
    if re.search(ALPHA, said) and not clear:
        raise Transparent
    for what, (sign, cure) in WRONG.items():
        if re.search(sign, said):
            raise ValueError(f"{path}: {what}. Convert it: ffmpeg {cure} OUT")
    fps = re.search(rb"^  Stream #0.* Video: .*?\b([\d.]+)(k?) fps", said, re.M)
    fps = float(fps[1]) * (1000 if fps[2] else 1) if fps else 0.0
    # The last stream is what comes out, upright.
    *_, (w, h, sar) = re.findall(rb"^  Stream #0:0.* (\d+)x(\d+)(?: \[SAR (\d+:\d+))?", said, re.M)
    wide, high = map(int, (sar or b"1:1").split(b":"))
    video = not re.search(rb"^Input #0, \w+_pipe", said, re.M)
    return (int(h), int(w)), fps, wide / high if video else 1.0


def has_alpha(head):
    """Whether a PNG or WebP file is transparent somewhere, by its header."""
    if head.startswith(b"\x89PNG"):
        return head[25] in (3, 4, 6) or b"tRNS" in head  # of a palette it may come later
    flags = {b"VP8X": 20, b"VP8L": 24}.get(head[12:16]) if head[:4] == b"RIFF" else None
    return flags is not None and bool(head[flags] & 0x10)


def read_raster(data):
    """Bytes of an EXR, PFM or PGM file -> (H, W) in its own type: half, single, 8 or 16 bits."""
    try:
        if data[:4] == EXR:
            return read_exr(data)
        if head := re.match(rb"(\d+)&(\d+)&1&", data[:60]):  # COLMAP's, of its dense workspace
            return np.frombuffer(data[head.end() :], "<f4").reshape(int(head[2]), int(head[1]))
        return read_pfm(data) if data[:2] == PFM else read_pgm(data)
    except (struct.error, IndexError, KeyError, zlib.error) as error:
        raise ValueError(f"the file is cut short or damaged ({error})") from None


def check_size(height, width):
    if not (0 < height <= 2**16 and 0 < width <= 2**16 and height * width <= MAX_PIXELS):
        raise ValueError(f"a picture of {height}x{width}; at most {MAX_PIXELS:,} pixels are read")


# --- OpenEXR -------------------------------------------------------------------------------------
def end_of_name(data, at):
    if (end := data.find(b"\0", at)) < 0:
        raise IndexError("a name without an end")
    return end


def exr_header(data):
    """Attributes name -> bytes of a scan-line file, and where the table of its blocks begins."""
    version = struct.unpack_from("<i", data, 4)[0]
    for flag, name in ((0x200, "tiles"), (0x800, "deep pixels"), (0x1000, "several parts")):
        if version & flag:
            raise ValueError(f"an EXR file of {name}; only scan lines of one part are read")
    attributes, at = {}, 8
    while data[at]:
        name_end = end_of_name(data, at)
        type_end = end_of_name(data, name_end + 1)
        size = struct.unpack_from("<i", data, type_end + 1)[0]
        start = type_end + 5
        if size < 0 or start + size > len(data) or len(attributes) > 200:
            raise ValueError("an EXR header that does not fit the file")
        attributes[data[at:name_end].decode("latin-1")] = data[start : start + size]
        at = start + size
    return attributes, at + 1


def exr_channels(chlist):
    """[(name, dtype)] in the order of a scan line."""
    channels, at = [], 0
    while chlist[at]:
        end = end_of_name(chlist, at)
        kind, _, across, down = struct.unpack_from("<iB3x2i", chlist, end + 1)
        if kind not in PIXEL_TYPES or (across, down) != (1, 1):
            raise ValueError("an EXR channel of an unknown type, or one that is subsampled")
        channels.append((chlist[at:end].decode("latin-1"), PIXEL_TYPES[kind]))
        at = end + 17
    return channels


def unpredicted(data):
    """What ZIP and ZIPS do before deflating, undone: differences of bytes, interleaved halves."""
    deltas = np.frombuffer(data, np.uint8).astype(np.int64)
    plain = (np.cumsum(deltas) - 128 * np.arange(len(deltas))).astype(np.uint8)
    half = (len(plain) + 1) // 2
    out = np.empty_like(plain)
    out[0::2], out[1::2] = plain[:half], plain[half:]
    return out.tobytes()


def read_exr(data):
    attributes, at = exr_header(data)
    channels = exr_channels(attributes["channels"])
    names = [name for name, _ in channels]
    chosen = names[0] if len(names) == 1 else "Z"
    if chosen not in names:
        raise ValueError(f"an EXR file with channels {names[:8]}; wanted Z, or one channel alone")
    kind = attributes["compression"][0]
    name = COMPRESSIONS[kind] if kind < len(COMPRESSIONS) else f"number {kind}"
    if not (lines := LINES.get(name)):
        raise ValueError(f"EXR compression {name}; none, ZIPS and ZIP are read: save it again")
    left, top, right, bottom = struct.unpack("<4i", attributes["dataWindow"])
    height, width = bottom - top + 1, right - left + 1
    check_size(height, width)
    line = np.dtype([(name, dtype, (width,)) for name, dtype in channels])
    out = np.zeros((height, width), dict(channels)[chosen])
    for place in struct.unpack_from(f"<{math.ceil(height / lines)}Q", data, at):
        first, size = struct.unpack_from("<2i", data, place)
        rows = min(lines, bottom + 1 - first)
        body = data[place + 8 : place + 8 + size]
        if name != "none" and size < rows * line.itemsize:
            body = unpredicted(zlib.decompressobj().decompress(body, rows * line.itemsize))
        if not top <= first <= bottom or len(body) != rows * line.itemsize:
            raise ValueError("an EXR block that does not fit the file, or its lines")
        out[first - top :][:rows] = np.frombuffer(body, line)[chosen]
    return out


# --- PFM and PGM ---------------------------------------------------------------------------------
def read_pfm(data):
    """One channel of floats, bottom line first; the sign of the scale tells the order of bytes."""
    match = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\s", data[:100])
    if not match:
        raise ValueError("not a PFM file of one channel")
    width, height, scale = int(match[1]), int(match[2]), float(match[3])
    check_size(height, width)
    body = data[match.end() :]
    if len(body) != 4 * width * height:
        raise ValueError(f"a PFM file of {height}x{width} that holds {len(body):,} bytes")
    order = "<f4" if scale < 0 else ">f4"
    return np.frombuffer(body, order).reshape(height, width)[::-1].astype(np.float32)


def read_pgm(data):
    """Binary grey, 8 or 16 bits (most significant byte first); comments are skipped."""
    match = re.match(rb"P5" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"\s", data[:4096])
    if not match:
        raise ValueError("neither OpenEXR nor PFM nor a binary PGM")
    width, height, most = (int(match[n]) for n in (1, 2, 3))
    check_size(height, width)
    dtype = np.dtype(">u2" if most > 255 else "u1")
    body = data[match.end() :]
    if not 0 < most < 65536 or len(body) < dtype.itemsize * width * height:
        raise ValueError(f"a PGM file of {height}x{width}, values to {most}, cut short")
    image = np.frombuffer(body, dtype, width * height).reshape(height, width)
    return image.astype(image.dtype.newbyteorder("="))
