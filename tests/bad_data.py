"""Damage a dataset in every way of damage*.py and see what a user would.

    python tests/bad_data.py [--trials N --seed S]

Each trial damages a fresh copy of a small dataset, then verifies, encodes and starts to train on it
in a process of its own, as a user who is not root, with limits on time and memory.  It ends as one
of

    refused         a ValueError, or a line and exit code, names clip or file; the other clips are
                    as before; training refuses to start, with skip_bad it has the others alone
    harmless        what training reads equals the clean data, but for depth pixels marked unknown
                    (0)
    silently wrong, crash (any other exception, much memory, a file executed or written elsewhere),
    hang"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import damage  # noqa: E402
from damage_arrays import (
    ARRAYS,  # noqa: E402
    points_of,  # noqa: E402
)
from damage_caches import CACHE  # noqa: E402

import data  # noqa: E402
from lib import (
    pictures,  # noqa: E402
    rooms,  # noqa: E402
)
from lib.files import read_array  # noqa: E402

RAW, SIZE, OTHER = damage.RAW | ARRAYS, (32, 48, 5), "train_000000"

OUTCOMES = ("refused", "harmless", "silently wrong", "crash", "hang")

NOBODY, SECONDS, MEGABYTES = 65534, 60, 600


def enterable(path):
    """Whether a user without rights gets to a file: into every folder above it."""
    return all(folder.stat().st_mode & 1 for folder in Path(path).resolve().parents)


# Root's trials become such a user, but where this checkout or ffmpeg lies below a closed /root.
DROPS = os.geteuid() == 0 and enterable(__file__) and enterable(get_ffmpeg_exe())


def at(root):
    """The paths of a place that damage.py wants."""
    victim = root / damage.VICTIM
    folder = next(root.glob("cache/*"), root)
    files = {f.stem: f for f in victim.iterdir()}
    return SimpleNamespace(
        root=root,
        outside=root.parent / "outside",
        video=files["video"],
        depth=files.get("depth"),
        points=files.get("points"),
        camera=files["camera_params"],
        folder=folder,
        cache=folder / f"{damage.VICTIM}.safetensors",
        empty=folder / "text_empty.safetensors",
    )


def build(base, form):
    """The clean dataset of a form, with its cache: two training clips of 9 frames, the second is
    the victim."""
    root, kind = base / form / "data", form.removesuffix("+sums")
    if root.exists():
        return root
    rooms.synth(
        root,
        rooms.Recipe(seed=7, variety="simple", val=1, num=2, num_frames=9, height=32, width=48),
    )
    place, entry = at(root), {}
    if kind in ("avi", "mkv"):
        entry["video_path"] = f"{damage.VICTIM}/{damage.remux(place.video, '.' + kind).name}"
    depth = np.stack([read_array(f) for f in sorted(place.depth.glob("*"))])
    if kind in ("one", "npz"):
        entry["depth_dir"] = f"{damage.VICTIM}/depth.{dict(one='npy').get(kind, kind)}"
        (np.save if kind == "one" else np.savez_compressed)(root / entry["depth_dir"], depth)
    elif kind == "png":
        entry.update(depth_dir=f"{damage.VICTIM}/png", depth_scale=0.001)
        (root / entry["depth_dir"]).mkdir()
        for t, image in enumerate(depth):
            pictures.write_png(
                root / entry["depth_dir"] / f"{t}.png", (1000 * image).astype(np.uint16)
            )
    elif kind == "points":
        clip = data.load_clip(data.load_samples(root)[1], 32, 48, 9)
        entry.update(points_dir=f"{damage.VICTIM}/points", depth_dir=None)
        (root / entry["points_dir"]).mkdir()
        for t, x in enumerate(points_of(place.depth.parent, clip["w2c"], clip["intrinsics"])):
            np.save(root / entry["points_dir"] / f"{t}.npy", x)
    if kind not in ("npy", "scan"):
        shutil.rmtree(place.depth)
        if "png" in form:
            (root / entry["depth_dir"]).rename(place.depth)
            entry["depth_dir"] = f"{damage.VICTIM}/depth"
    if kind in ("avi", "mkv"):  # depth as it was
        place.depth.mkdir()
        for t, x in enumerate(depth):
            np.save(place.depth / f"frame_{t:04d}.npy", x)
    path = root / "metadata.json"
    meta = json.loads(path.read_text())
    meta["samples"][1].update(entry)
    path.write_text(json.dumps(meta)) if kind != "scan" else path.unlink()
    if kind in ("avi", "mkv"):
        place.video.unlink()
    if "sums" in form:
        os.system(
            f"cd {root} && find . -type f -not -name SHA256SUMS -exec sha256sum {{}} + > SHA256SUMS"
        )
    assert data.encode(root, *SIZE, how=data.Encoding(split="train")) == 0
    return root


def equal(found, clean):
    """Whether two clips are the same, but for depth that is unknown in `found`."""
    known = found["depth"] > 0
    return (
        found.keys() == clean.keys()
        and torch.equal(found["depth"], torch.where(known, clean["depth"], 0))
        and known[0].any()
        and all(torch.equal(found[k], clean[k]) for k in clean if k != "depth")
    )


def heard(work, *args, also=ValueError, **kwargs):
    """Result and words of a command; a ValueError is words too, and what else its main() prints as
    one line."""
    out = StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        try:
            result = work(*args, **kwargs)
        except (ValueError, also) as error:
            return error, f"error: {error}"
    return result, out.getvalue()


def named(text):
    names = damage.VICTIM, "metadata.json", "text_empty", "5x32x48", "data: not a folder"
    return any(name in text for name in names) and "Traceback" not in text


def items(clips):
    return {
        clips[i]["id"]: {k: x for k, x in clips[i].items() if torch.is_tensor(x)}
        for i in range(len(clips))
    }


def start(root, skip_bad=False):
    """What train.py does at its start, and then reads: {id: tensors}, or the error."""
    return heard(lambda: items(data.CachedClips(root, "train", SIZE, skip_bad=skip_bad)))


def trained_on(root, clean):
    """Start training on a damaged dataset, without and with skip_bad -> outcome and words."""
    found, text = start(root)
    if not isinstance(found, Exception):
        same = found.keys() == clean.keys() and all(equal(found[k], clean[k]) for k in clean)
        return ("harmless" if same else "silently wrong"), text
    some, more = start(root, skip_bad=True)
    if not named(text) or isinstance(some, Exception) and not named(more):
        return "crash", f"not named: {text}{more}"
    rest = isinstance(some, Exception) or list(some) == [OTHER] and equal(some[OTHER], clean[OTHER])
    return ("refused" if rest and named(more) else "silently wrong"), text


def try_raw(place, clean):
    """Verify, encode, train."""
    failed, seen = heard(data.verify, place.root, "train")
    bad, text = heard(data.encode, place.root, *SIZE, how=data.Encoding(split="train"))
    folder = next(place.root.glob("cache/*"), place.root)
    found = {p.stem: load_file(p) for p in folder.glob("train*.safetensors")}
    halves = [
        str(p) for p in place.root.glob("cache/**/.*") if p.is_file() and p.name != ".checked"
    ]
    if halves or isinstance(failed, Exception) and not named(seen):
        return "crash", f"{halves} {seen}"
    stored = {k: {n: x.float() for n, x in v.items()} for k, v in found.items()}
    clean_values = {
        k: {n: x for n, x in v.items() if n in stored.get(k, v)} for k, v in clean.items()
    }
    if not bad:
        same = stored.keys() == clean.keys() and all(
            equal(stored[k], clean_values[k]) for k in clean
        )
        return ("harmless" if same else "silently wrong"), text + seen
    if not failed or not named(text):
        return (
            "silently wrong" if not failed else "crash",
            f"verify {failed}, encode {bad}: {seen}{text}",
        )
    if isinstance(bad, Exception) and not place.whole:
        return "crash", f"one clip's damage ends it all: {text}"
    if not isinstance(bad, Exception) and (
        set(stored) != {OTHER} or not equal(stored[OTHER], clean_values[OTHER])
    ):
        return "silently wrong", f"the others: {sorted(stored)} {text}"
    outcome, more = trained_on(place.root, clean)
    return (outcome if outcome != "harmless" else "silently wrong"), text + more


def try_cache(place, clean):
    """Train; then the cure that the error gives: delete what is damaged, encode."""
    outcome, text = trained_on(place.root, clean)
    # whatever it says of what is there
    heard(data.encode, place.root, *SIZE, how=data.Encoding(split="train"), also=OSError)
    if not os.access(
        place.folder, os.W_OK | os.X_OK, effective_ids=True
    ) or not place.folder.resolve().is_relative_to(place.root.resolve()):
        return outcome, text
    for path in (place.cache, place.empty):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(
            missing_ok=True
        )
    bad, said = heard(data.encode, place.root, *SIZE, how=data.Encoding(split="train"))
    extra = [p for p in place.root.glob("cache/*") if p != place.folder]
    found, more = start(place.root) if not extra else (clean, "")
    return (
        (outcome, text)
        if not bad and found.keys() == clean.keys()
        else ("crash", f"not cured: {said}{more}")
    )


def child(work, place, clean, pipe):
    """In a process of its own: limits, and no rights that a user would not have."""
    os.chdir(place.outside)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**33
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    if DROPS:
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        outcome, text = work(place, clean)
    except BaseException:
        outcome, text = "crash", traceback.format_exc()
    ours, ffmpegs = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    # ffmpeg's reading starts at what it is forked from
    used = max(ours - before, ffmpegs if ffmpegs > ours else 0)
    if used > MEGABYTES * 1024:
        outcome, text = "crash", f"{used // 1024} MB: {text}"
    pipe.send((outcome, text))


def tree(top, without):
    """What lies under a folder: to see what is written where it should not be."""
    return {
        p: (p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in top.rglob("*")
        if not p.is_relative_to(without) and not p.is_dir()
    }


def trial(base, name, seed):
    """One damage of one copy -> outcome and words."""
    raw = name in RAW
    form, change = RAW[name] if raw else ("npy", CACHE[name])
    clean_root = build(base, form)
    with redirect_stdout(StringIO()):
        clean = items(data.CachedClips(clean_root, "train", SIZE))
    work = Path(tempfile.mkdtemp(dir=base))
    root = work / "data"
    shutil.copytree(clean_root, root, ignore=shutil.ignore_patterns("cache") if raw else None)
    (work / "outside").mkdir()
    place = at(root)
    place.whole = name.startswith(("metadata", "SHA256SUMS"))  # damage that is not of one clip
    if not raw:
        # leaves its marker: the damage must show all the same
        data.CachedClips(root, "train", SIZE)
    change(place, np.random.default_rng([seed, sorted(RAW | CACHE).index(name)]))
    if DROPS:
        for path in (work, *work.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    before, (ours, theirs) = tree(work, root / "cache"), multiprocessing.Pipe(False)
    work_of = try_raw if raw else try_cache
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(work_of, place, clean, theirs)
    )
    process.start()
    theirs.close()
    try:
        outcome, text = ours.recv() if ours.poll(SECONDS) else ("hang", "")
    except EOFError:
        process.join()
        outcome, text = "crash", f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    if (after := tree(work, root / "cache")) != before:
        changed = sorted(map(str, after.items() ^ before.items()))
        outcome, text = "crash", f"written outside the cache: {changed} {text}"
    shutil.rmtree(work)
    return outcome, text


def unlisted_flips(base, trials, seed):
    """Bits flipped in raw files without SHA256SUMS: how many nobody can see."""
    RAW.update(
        {
            f"{part}: flipped bits, no SHA256SUMS": (
                form,
                lambda p, r, find=find: damage.flipped(find(p, r), r),
            )
            for part, (form, find) in damage.PARTS.items()
        }
    )
    return {
        part: Counter(
            trial(base, f"{part}: flipped bits, no SHA256SUMS", seed + n)[0] for n in range(trials)
        )
        for part in damage.PARTS
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=0, help="default: every kind of damage once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", help="part of the name of a damage; prints what a user reads"
    )
    parser.add_argument(
        "--flips",
        type=int,
        default=0,
        help="bits of raw files without SHA256SUMS, so many per format",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, found, harmless, kinds = (
        time.time(),
        {},
        [],
        [k for k in RAW | CACHE if args.only in k],
    )
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            for form in {form for form, _ in RAW.values()}:
                build(Path(base), form)
        if args.flips:
            for part, counts in unlisted_flips(Path(base), args.flips, args.seed).items():
                print(f"{part:10s} " + ", ".join(f"{counts[o]} {o}" for o in OUTCOMES), flush=True)
            return
        for n in range(args.trials or len(kinds)):
            name = kinds[n % len(kinds)]
            outcome, text = trial(Path(base), name, args.seed + n // len(kinds))
            found.setdefault(name.split(":")[0], Counter())[outcome] += 1
            harmless += [name] * (outcome == "harmless" and name not in harmless)
            if args.only or outcome not in ("refused", "harmless"):
                print(
                    f"--- {name}, seed {args.seed + n // len(kinds)}: {outcome}\n{text[-3000:]}",
                    flush=True,
                )
    print(f"{'':14s}" + "".join(f"{o:>16s}" for o in OUTCOMES))
    for part, counts in [*found.items(), ("all", sum(found.values(), Counter()))]:
        print(f"{part:14s}" + "".join(f"{counts[o]:16d}" for o in OUTCOMES))
    print(f"harmless: {', '.join(harmless)}")
    print(
        f"{args.trials or len(kinds)} trials of {len(kinds)} kinds, {time.time() - started:.0f} s"
    )
    raise SystemExit(any(c[o] for c in found.values() for o in OUTCOMES[2:]))


if __name__ == "__main__":
    main()
