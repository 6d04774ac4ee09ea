"""Damage to cache files, for tests/bad_data.py: see damage.py."""

import os
import struct
import zlib

import torch
from damage import FILE, Bomb, blanked, entry, flipped
from safetensors.torch import load_file, save

from lib.caches import header_crc, read_header
from lib.tensors import TYPES

CACHE = {}


def forge(path, tensors, metadata):
    """A cache file with right checksums, whatever it holds."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy(), crc)
    specs = {k: (TYPES[x.dtype], list(x.shape)) for k, x in tensors.items()}
    metadata = {k: v for k, v in metadata.items() if k != "crc"}
    path.write_bytes(
        save(
            {k: x.contiguous() for k, x in tensors.items()},
            dict(metadata, crc=f"{crc:08x}{header_crc(metadata, specs)}"),
        )
    )


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
        place.cache.write_bytes(
            struct.pack("<Q", len(body) if size is None else size) + body + bytes(1000)
        )

    return damage


def renamed_folder(place, rng):
    os.rename(
        place.folder,
        place.folder.with_name(place.folder.name.replace("wan32", "wan36clip")),
    )


def out_link(place, rng):
    os.rename(place.folder.parent, place.outside / "cache")
    place.folder.parent.symlink_to(place.outside / "cache")


CACHE |= {
    f"cache: {what}": lambda p, r, damage=damage: damage(p.cache, r)
    for what, damage in (FILE | dict(blanked=blanked)).items()
}

CACHE |= {
    f"empty text: {what}": lambda p, r, damage=damage: damage(p.empty, r)
    for what, damage in (FILE | {"flipped bits": flipped}).items()
}

CACHE |= {f"cache: flipped bits, draw {n}": lambda p, r: flipped(p.cache, r) for n in range(20)}

CACHE |= {
    "cache: longer": lambda p, r: p.cache.write_bytes(p.cache.read_bytes() + b"\0"),
    "cache: a pickle": lambda p, r: torch.save([Bomb(p.outside / "EXECUTED")], p.cache),
    "cache: header of 2^60 bytes": header_text("{}", 2**60),
    "cache: nested header": header_text("[" * 10**5),
    "cache: 10^12 values": header_text(
        '{"latents":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (10**12, 4 * 10**12)
    ),
    "cache: 10^300 values": header_text(
        '{"latents":{"dtype":"F32","shape":[%d],"data_offsets":[0,4]}}' % 10**300
    ),
    "cache: header is a list": header_text("[1, 2]"),
    "cache: metadata is a number": header_text('{"__metadata__": 7}'),
    "cache: another clip's": lambda p, r: p.cache.write_bytes(
        (p.folder / "train_000000.safetensors").read_bytes()
    ),
    "cache: no latents": tensors(latents=lambda x: None),
    "cache: no text": tensors(text=lambda x: None),
    "cache: a tensor more": tensors(more=lambda x: torch.ones(3)),
    "cache: float32 latents": tensors(latents=lambda x: x.float()),
    "cache: float16": tensors(latents=lambda x: x.half()),
    "cache: integers": tensors(depth=lambda x: x.long()),
    "cache: latents of rank 3": tensors(latents=lambda x: x[0]),
    "cache: depth of another size": tensors(depth=lambda x: x[:, ::2]),
    "cache: a frame less": tensors(w2c=lambda x: x[1:]),
    "cache: latents transposed": tensors(latents=lambda x: x.mT),
    "cache: text of another width": tensors(text=lambda x: x[:, :9]),
    "cache: CLIP in one alone": tensors(
        clip=lambda x: torch.zeros(257, 1280, dtype=torch.bfloat16)
    ),
    "cache: start of all frames": tensors(start_latents=lambda x: x.repeat(1, 2, 1, 1)),
    "cache: no word": tensors(text=lambda x: x[:0]),
    "cache: NaN latent": tensors(latents=set_one(torch.nan)),
    "cache: infinite depth": tensors(depth=set_one(torch.inf)),
    "cache: NaN text": tensors(text=set_one(torch.nan)),
    "cache: negative depth": tensors(depth=set_one(-1.0)),
    "cache: no depth": tensors(depth=lambda x: 0 * x),
    "cache: depth of 1e30": tensors(depth=set_one(1e30)),
    "cache: NaN camera": tensors(w2c=set_one(torch.nan)),
    "cache: no rotation": tensors(w2c=lambda x: 2 * x),
    "cache: no focal length": tensors(intrinsics=lambda x: 0 * x),
    "cache: absolute cameras": tensors(w2c=lambda x: x + torch.tensor([0, 0, 0, 1.0])),
    "cache: another encoder": metadata(fingerprint="wan32clip-0a1b2c3d"),
    "cache: another size": metadata(height="64"),
    "cache: another prompt": metadata(prompt="a cat"),
    "cache: id elsewhere": metadata(id="../../x", sample="../../x"),
    "cache: no frame rate": metadata(fps=None),
    "cache: frame rate NaN": metadata(fps="nan"),
    "cache: frame rate a word": metadata(fps="fast"),
    "cache: depth of a third kind": metadata(depth="green"),
    "cache: no checksum": lambda p, r: p.cache.write_bytes(
        save(load_file(p.cache), {k: v for k, v in read_header(p.cache)[0].items() if k != "crc"})
    ),
    "cache: of another video branch": renamed_folder,
    "cache: the folder is a link": out_link,
    "cache: two encoders": lambda p, r: os.mkdir(p.folder.with_name(p.folder.name + "0")),
    "cache: an unreadable folder": lambda p, r: p.folder.chmod(0),
    "cache: a file for the folder": lambda p, r: (
        p.folder.rename(p.outside / "x"),
        p.folder.write_text(""),
    ),
    "cache: the prompt has changed": lambda p, r: entry(prompt="a dog")[1](p, r),
    "cache: marker of nonsense": lambda p, r: (
        (p.folder / ".checked").write_bytes(r.bytes(99)),
        flipped(p.cache, r),
    ),
}
