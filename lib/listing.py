"""What a dataset lists: metadata.json, checksums, and that no file lies outside of it."""

import functools
import hashlib
import os
import re
from pathlib import Path

from lib.files import MAX_TEXT, array_files, check_file, check_lines, picture_files, read_json


# --- Checksums ------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def sums_at(path, changed):
    check_file(path, MAX_TEXT)
    found = re.findall(r"^([0-9a-f]{64}) [ *](?:\./)?(.+)$", path.read_text(errors="replace"), re.M)
    return {name: digest for digest, name in found}


def sums_of(root):
    """{name: digest} of DIR/SHA256SUMS, None where there is no such file."""
    path = Path(root, "SHA256SUMS")
    return sums_at(path, path.stat().st_mtime_ns) if path.exists() else None


def check_sums(root, paths):
    """Files must be what DIR/SHA256SUMS says, where there is one (docs/data.md makes it)."""
    sums, known = Path(root, "SHA256SUMS"), sums_of(root)
    for path in paths if known is not None else ():
        name, digest = path.relative_to(root).as_posix(), hashlib.sha256()
        check_file(path)
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                digest.update(block)
        if known.get(name) != digest.hexdigest():
            both = f"{digest.hexdigest()[:12]}, listed: {known.get(name, 'nothing')[:12]}"
            cure = "Restore it; if it was meant, write SHA256SUMS again"
            raise ValueError(f"{path}: not the file that {sums} lists ({both}). {cure}")


def check_inside(root, path):
    """The path, links followed, must lie in the folder root; "/": they may lead anywhere."""
    try:
        if Path(path).resolve().is_relative_to(Path(root).resolve()):
            return
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        cure = "Put the file or folder itself there"
        raise ValueError(f"{path}: cannot be followed: {error}. {cure}") from None
    cure = "Put the file or folder itself there, or allow such links with --follow_links=True"
    raise ValueError(f"{path}: a link that leads out of {root}. {cure}")


# --- What a dataset lists -------------------------------------------------------------------------
EMPTY_TEXT = "text_empty"  # the cache beside those of the clips
MARK = ".importing"  # in a folder that is whole, until it is listed
WINDOW = re.compile(r"\.\d{4,}$")  # ID.0004: a cache of the clip ID, from frame 4 on


def is_id(name):
    """Whether a text can name a sample's folder, its caches and nothing else."""
    good = re.fullmatch(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*", name)
    alone = name != EMPTY_TEXT and not WINDOW.search(name)
    return bool(good) and alone and len(name.encode()) <= 200


def read_metadata(root, inside):
    """metadata.json as an object with its samples, a list; it must lie in the folder `inside`.
    Without that file: of the folders that hold parts of a sample."""
    path = root / "metadata.json"
    try:
        os.listdir(root)
        if not os.path.lexists(path):
            check_sums(root, [path] if "metadata.json" in (sums_of(root) or ()) else [])
            return dict(samples=scan_folders(root))
    except OSError as error:
        raise ValueError(f"{root}: not a folder now: {error.strerror}; wanted a dataset") from None
    check_inside(inside, path)
    check_sums(root, [path])
    said = read_json(path)
    said = said if isinstance(said, dict) else dict(samples=said)
    entries, splits = said.get("samples"), said.get("splits") or {}
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        wanted = "wanted a list of samples, or an object with a list called samples"
        raise ValueError(f"{path}: {wanted}")
    if not isinstance(splits, dict) or not all(isinstance(ids, list) for ids in splits.values()):
        example = '{"train": ["a"], "val": ["b"]}'
        raise ValueError(f"{path}: splits must be lists of ids, for instance {example}")
    return said


def scan_folders(root):
    """Entries of a dataset without metadata.json: its folders that hold parts of a sample."""
    folders = {}
    for f in sorted(root.glob("*/*")):
        part = f.stem in ("video", "depth", "points", "moving", "camera_params")
        # Not those of an import that was killed, .ID.part or ID with its mark.
        if part and f.parent.name[0] != "." and not (f.parent / MARK).exists():
            entry, file = folders.setdefault(f.parent.name, {}), f"{f.parent.name}/{f.name}"
            # One that is there twice becomes a list, which read_entry refuses.
            entry[f.stem] = [entry[f.stem], file] if f.stem in entry else file
    return [dict(entry, id=name) for name, entry in folders.items()]


def check_sample(inside, sample):
    """Files of a sample: there, regular, readable, in the folder `inside` -> all, listed."""
    files = []
    for path in (p for p in sample.values() if isinstance(p, Path)):
        check_inside(inside, path)
        try:
            parts = picture_files if path == sample["video"] else array_files
            files += parts(path) if path.is_dir() else [path]
        except OSError as error:
            cure = "Make it readable or remove it"
            raise ValueError(f"{path}: cannot be opened: {error.strerror}. {cure}") from None
    if sample["camera"]:
        check_lines(sample["camera"])
    for path in files:
        check_inside(inside, path)
        check_file(path)
    return files
