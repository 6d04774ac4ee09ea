"""The identity of a frozen video branch: a checkpoint goes with the one that it was trained on."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path, PureWindowsPath

from encoders import wan_sources, wan_tensors
from lib.distributed import from_first
from lib.files import write_aside
from lib.tensors import bytes_of
from lib.weights import metadata_of


def frozen_digest(folder):
    """sha256 of the DiT in a Wan folder, however it is cut into files and named.

    16 GB take a minute, so the digest is kept beside the weights, or where that cannot be written
    in the user's cache, with the sizes and times of the files that it is of."""
    files = [Path(file).resolve() for file in wan_sources(folder)]
    stamp = [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    name = hashlib.sha256(str(files).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Both experts of a pair may lie in one folder, as in a cache of the hub.
    places = [files[0].with_name(f".{files[0].name}.fantasyworld.json")]
    if os.path.isabs(home):  # else a container's user, who has no name and no HOME
        places.append(Path(home, "fantasyworld", f"{name}.json"))
    for place in places:
        with suppress(OSError, ValueError, AttributeError):
            said = json.loads(place.read_text())
            if said.get("files") == stamp:
                return said["sha256"]
    total = hashlib.sha256()
    for key, (shape, read) in sorted(wan_tensors(folder).items()):
        value = read()
        total.update(f"{key} {value.dtype} {shape}".encode())
        total.update(bytes_of(value))
    text = json.dumps(dict(files=stamp, sha256=total.hexdigest()))
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_aside(place, lambda path: path.write_text(text))
            break
    return total.hexdigest()


def check_frozen(meta, frozen, where, *, lora=None):
    """A checkpoint goes with the video branch that it was trained on, bit for bit.

    frozen   frozen_digest of the branch at hand, "" for a random one
    lora     the LoRA file that is merged into it, known by its name; None: whichever"""
    before, merged = meta.get("frozen"), meta.get("lora", "")
    if not before or not frozen:
        return
    cure = "or --other_wan=True to go on"
    if before != frozen:
        found = f"was trained on other frozen weights than those of wan_dir (sha256 {before[:12]})"
        raise ValueError(f"{where}: {found}; give the folder that it was trained on, {cure}")
    if lora is not None and PureWindowsPath(lora).name != PureWindowsPath(merged).name:  # / and \
        found = f"was trained with --lora={merged or None}, this run has {lora or None}"
        raise ValueError(f"{where}: {found}; give the same one, {cure}")


def identify_frozen(options, sources, master):
    """Digest of the frozen branch, "" for none; ValueError where a source had another one."""
    named = options.wan_dir if options.stage and master else ""
    frozen = from_first(named and frozen_digest(named))  # rank 0 alone reads gigabytes for it
    for path in sources if not options.other_wan else ():
        check_frozen(metadata_of(path), frozen, path, lora=options.lora)
    return frozen
