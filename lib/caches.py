"""Cache files: what training reads.  Written aside and renamed, with checksums; read as if somebody
had damaged them.

One safetensors file per window of a clip in DIR/cache/TxHxW-FINGERPRINT/: ID.safetensors, or
ID.START.safetensors where a clip has several windows, and text_empty.safetensors, the empty prompt.
FINGERPRINT is of the encoders.
Tensors: those of data.save_clip.  Metadata: all that changes the result, and crc: of the values and
of the header. Before the first step every value of a file is checked; later it is copied unseen, as
long as its size and time of change are those of the checked one.  read_again says what that leaves
to chance."""

import json
import os
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from encoders import encode_start, load_state_dict
from lib.camera_files import off_rotation
from lib.distributed import gathered
from lib.files import FAR, check_file, read_json, write_aside
from lib.listing import WINDOW, check_inside
from lib.tensors import TYPES, bytes_of
from wan import CLIP_SHAPE, LATENT


@torch.no_grad()
def save_clip(path, clip, vae, pad, conditions, metadata):
    """Encode and write a clip of load_clip.

    bfloat16: latents (16, f, h, w), start_latents (16, 1 or f, h, w) of frame 0, where metadata
              asks for it end_latents (16, f, h, w) of the first and the last frame, and the
              conditions, which are
              text (L, dim) and, where the family has CLIP, clip (257, 1280)
    float32:  depth (T, H, W), w2c (T, 3, 4), intrinsics (T, 3, 3);   bool: moving (T, H, W), if the
                                                                      clip has it"""
    video = clip["video"][None]
    latents = vae.encode(video)
    start = latents[:, :, :1]  # of frame 0 alone: the VAE is causal
    start = encode_start(vae, video[:, :, :1], video.shape[2], pad) if pad else start
    half = dict(conditions, latents=latents[0], start_latents=start[0])
    if metadata.get("end_image"):
        half["end_latents"] = encode_start(vae, video[:, :, [0, -1]], video.shape[2], pad)[0]
    tensors = {name: x.bfloat16().cpu() for name, x in half.items()}
    tensors |= {name: clip[name].float() for name in ("depth", "w2c", "intrinsics")}
    save_tensors(path, tensors | ({"moving": clip["moving"]} if "moving" in clip else {}), metadata)


def header_crc(metadata, specs):
    """Checksum of all that a header says: metadata, {name: (type, shape)}."""
    items = sorted((k, v) for k, v in metadata.items() if k != "crc")
    tensors = sorted([k, *v] for k, v in specs.items())
    return f"{zlib.crc32(json.dumps([items, tensors]).encode()):08x}"


def save_tensors(path, tensors, metadata):
    """Write a cache file, whole or not at all, with its checksums.  Values must be finite."""
    tensors = {k: x.contiguous() for k, x in sorted(tensors.items())}
    metadata, crc = {k: str(x) for k, x in metadata.items()}, 0
    for name, x in tensors.items():
        if not torch.isfinite(x).all():
            why = "damaged encoder weights, or values that overflow?"
            raise ValueError(f"{path}: {name} is not finite; {why}")
        crc = zlib.crc32(bytes_of(x), crc)
    specs = {k: (TYPES[x.dtype], list(x.shape)) for k, x in tensors.items()}
    metadata["crc"] = f"{crc:08x}" + header_crc(metadata, specs)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not durable: a loss shows, and the clip is encoded again.
    write_aside(path, lambda aside: aside.write_bytes(save(tensors, metadata)), durable=False)


def read_header(path):
    """Metadata, {name: (type, shape)} of a file, which must be whole."""
    check_file(path)
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}
            specs = {name: (x.get_dtype(), x.get_shape()) for name, x in slices.items()}
        if metadata.get("crc", "")[8:] != header_crc(metadata, specs):
            said = "its header has another checksum, or none"
            raise ValueError(f"{said}: damaged, or of an older version")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole cache file: {error}") from None
    return metadata, specs


def read_unseen(path):
    """Tensors as stored, copied out of a map, and metadata of a cache file; no value is looked at.

    A cut file is never mapped; one that is cut in the milliseconds of the copy kills (SIGBUS)."""
    metadata, specs = read_header(path)
    tensors = load_state_dict(path)
    return {name: copied(tensors[name]) for name in sorted(specs)}, metadata


def copied(x):
    """By numpy, as all checks: torch's parallel operations can fail in threads of a fork."""
    return torch.from_numpy(bytes_of(x).copy()).view(x.dtype).view(x.shape)


def fits(path, key):
    """Whether a cache file is there, whole, and was made from this key."""
    try:
        return {k: str(v) for k, v in key.items()}.items() <= read_header(path)[0].items()
    except ValueError:
        return False


def check_header(path, name, sample, size, fingerprint):
    """Check a header of a sample's window, size (T, H, W) -> metadata, what encoders may change."""
    (T, H, W), (metadata, specs) = size, read_header(path)
    f, h, w = LATENT.grid_of(T, H, W)
    wanted = dict(id=name, sample=sample["id"], num_frames=T, height=H, width=W)
    wanted.update(fingerprint=fingerprint, prompt=sample["prompt"])
    for key, value in wanted.items():
        if metadata.get(key) != str(value):
            found = f"{key} is {str(metadata.get(key))[:80]!r}; wanted {str(value)[:80]!r}"
            why = "the file of another clip or encoder, or older than metadata.json"
            raise ValueError(f"{path}: {found}: {why}")
    text, start = (specs.get(k, ("", [0, 0]))[1] for k in ("text", "start_latents"))
    shapes = dict(depth=("F32", [T, H, W]), w2c=("F32", [T, 3, 4]), intrinsics=("F32", [T, 3, 3]))
    shapes["latents"] = ("BF16", [16, f, h, w])
    shapes["start_latents"] = ("BF16", [16, f if start[1:2] == [f] else 1, h, w])
    shapes["text"] = ("BF16", [min(max(text[0], 1), 512), text[-1]])
    shapes |= dict(end_latents=shapes["latents"]) if "end_latents" in specs else {}
    shapes |= dict(clip=("BF16", [*CLIP_SHAPE])) if "clip" in specs else {}
    shapes |= dict(moving=("BOOL", [T, H, W])) if "moving" in specs else {}
    for key in shapes | specs:
        if specs.get(key) != shapes.get(key):
            is_and_wanted = f"{specs.get(key, 'missing')}; wanted {shapes.get(key, 'none')}"
            raise ValueError(f"{path}: {key} is {is_and_wanted}")
    fps = float(metadata.get("fps", "nan"))  # the checksum has seen that it is a number
    if not 0 < fps < FAR or metadata.get("depth", "metric") not in ("metric", "relative"):
        found = f"fps {metadata.get('fps')!r}, depth {metadata.get('depth')!r}"
        raise ValueError(f"{path}: {found}; wanted a number, and metric or relative")
    return metadata, (text[-1], start[1], "clip" in specs)


def read_values(path):
    """read_unseen, whose values must be finite and fit the checksum.

    Checks are numpy's: in threads of a forked process torch's parallel operations can fail."""
    (tensors, metadata), crc = read_unseen(path), 0
    for x in tensors.values():
        crc = zlib.crc32(bytes_of(x), crc)
    if metadata["crc"][:8] != f"{crc:08x}":
        written = f"{metadata['crc'][:8]} was written"
        raise ValueError(f"{path}: its values have the checksum {crc:08x}; {written}: damaged")
    for name, x in tensors.items():
        values = bytes_of(x)
        if x.dtype == torch.bool:
            sound = values.max() < 2
        elif x.dtype == torch.float32:
            values = values.view(np.float32)
            sound = np.isfinite(values.min() + values.max())
        else:  # bfloat16: upper half of a float32, 0x7f80 is infinity
            sound = (values.view(np.uint16) & 0x7FFF).max() < 0x7F80
        if not sound:
            raise ValueError(f"{path}: {name} holds NaN, infinity or no truth values")
    return tensors, metadata


def read_clip(path):
    """read_values of a clip; its depth, cameras and intrinsics must be such."""
    tensors, metadata = read_values(path)
    depth, w2c, K = (tensors[name].numpy() for name in ("depth", "w2c", "intrinsics"))
    off, focal, share = off_rotation(w2c), K[:, (0, 1), (0, 1)].min(), (depth[0] > 1e-3).mean()
    if depth.min() < 0 or depth.max() > FAR or not share:
        found = f"depth from {depth.min():.3g} to {depth.max():.3g}, {share:.0%} of frame 0 has any"
        raise ValueError(f"{path}: {found}; wanted 0 to {FAR:.0e} m")
    if not off < 2e-3 or np.abs(w2c[0] - np.eye(3, 4)).max() > 1e-3 or focal <= 0:
        found = f"w2c off from rotations by {off:.2g}, or not relative to the first camera"
        raise ValueError(f"{path}: {found}, or a focal length of {focal:.3g}")
    return tensors, metadata


def stamp(path):
    """Size and time of change, which a copy does not keep: the same until somebody writes."""
    info = os.stat(path)
    return [info.st_size, info.st_ctime_ns]


def read_again(path, checked):
    """read_clip of a file that was good when its stamp was `checked`: values unseen.

    With another stamp, before or after the copy, read_clip looks at all of it: damage since the
    check is refused by name.  Left to chance: a bit that the disk flips without a write is not
    seen, and what read_unseen says."""
    if stamp(path) == checked:
        found = read_unseen(path)
        if stamp(path) == checked:
            return found
    return read_clip(path)


# --- All caches of a split ------------------------------------------------------------------------
def is_whole(path):
    """Whether read_values takes the file."""
    try:
        return bool(read_values(path))
    except ValueError:
        return False


def check_values(folder, names):
    """{name: problem} of the windows that read_clip refuses, {name: stamp} of all when they were
    read.  One rank reads a file, once; FOLDER/.checked remembers the good ones for later starts."""

    def problem(name):
        try:
            read_clip(folder / f"{name}.safetensors")
        except (ValueError, OSError) as error:
            return str(error)

    try:
        known = dict(read_json(folder / ".checked"))
    except (ValueError, TypeError):  # none yet, or damaged
        known = {}
    stamps = {name: stamp(folder / f"{name}.safetensors") for name in names}
    new = [name for name in names if known.get(name) != stamps[name]]
    todo = sorted(set().union(*gathered(new)))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share, found = todo[rank::world], {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        how = dict(total=len(share), unit="clip", delay=3, disable=rank > 0)
        mine = dict(zip(share, tqdm(pool.map(problem, share), "check caches", **how)))
    for part, seen in gathered((mine, {name: stamps[name] for name in share})):
        found.update({name: text for name, text in part.items() if text})
        stamps.update(seen)  # the reader's: a rank with a disk of its own reads its files whole
    if rank == 0 and todo:
        good = {name: stamps[name] for name in todo if name not in found}
        # A disk that cannot be written: the next start reads again.
        with suppress(OSError, ValueError):
            text = json.dumps(known | good)
            write_aside(folder / ".checked", lambda aside: aside.write_text(text), durable=False)
    return found, stamps


def check_folder(folder, samples, size, inside="/"):
    """Look at every window of the samples {id: sample} -> {name: metadata} of those to train on,
    {name: stamp}, [(clip, problem)].

    inside   the folder that no link may leave"""
    kinds, metadata = {}, {}
    names = [path.stem for path in sorted(folder.glob("*.safetensors"))]
    windows = {name: WINDOW.sub("", name) for name in names if WINDOW.sub("", name) in samples}
    there, fingerprint = set(windows.values()), folder.name.split("-", 1)[1]
    bad = [(i, f"not encoded: nothing of it in {folder}") for i in samples if i not in there]
    for name, owner in windows.items():
        try:
            path = folder / f"{name}.safetensors"
            if path.is_symlink():
                check_inside(inside, path)
            found = check_header(path, name, samples[owner], size, fingerprint)
            metadata[name], kinds[name] = found
        except ValueError as error:
            bad.append((name, str(error)))
    usual = Counter(kinds.values()).most_common(1)[0][0] if kinds else None
    for name, kind in kinds.items():
        if kind != usual:
            said = f"widths of text, start latents, CLIP: {kind}; wanted {usual}, as others have"
            bad.append((name, f"{folder / name}.safetensors: {said}"))
    bad = sorted(set(sum(gathered(bad), [])))  # every rank leaves out the same
    wrong = {name for name, _ in bad}
    found, stamps = check_values(folder, [name for name in metadata if name not in wrong])
    bad += found.items()
    wrong = {name for name, _ in bad}
    return {name: m for name, m in metadata.items() if name not in wrong}, stamps, bad
