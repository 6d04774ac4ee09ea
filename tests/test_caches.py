"""A cache file in training: mapped while it is the one that was checked, else read whole, refused
by name."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import data
from lib import caches, rooms
from lib.files import read_json

ROOT = pathlib.Path(__file__).parents[1]

SIZE = (32, 48, 5)


@pytest.fixture
def place(tmp_path):
    """Two cached clips with every kind of tensor, and the dataset around them."""
    rooms.synth(
        tmp_path,
        rooms.Recipe(
            variety="simple", cache_only=True, moving=True, num=2, num_frames=5, height=32, width=48
        ),
    )
    return tmp_path


@pytest.fixture
def seen(monkeypatch):
    """Names of the files that read_clip reads whole from here on."""
    names, original = [], caches.read_clip
    monkeypatch.setattr(caches, "read_clip", lambda path: names.append(path.stem) or original(path))
    return names


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].flatten().view(torch.uint8), b[k].flatten().view(torch.uint8))
        for k in a
    )


def test_a_mapped_load_equals_a_full_read_bitwise_and_leaves_no_map_behind(place, seen):
    clips = data.CachedClips(place, "train", SIZE)
    seen.clear()
    for i, path in enumerate(clips.files):
        mapped, meta = caches.read_again(path, clips.stamps[path.stem])
        assert seen == [], "mapped"
        whole, same = caches.read_clip(path)
        assert same_bits(mapped, whole) and meta == same and "moving" in whole
        item = clips[i]
        assert same_bits({k: item[k] for k in whole}, whole)
        seen.clear()
    if sys.platform == "linux":
        assert str(place) not in open("/proc/self/maps").read()
    (batch,) = torch.utils.data.DataLoader(
        clips, batch_size=2, collate_fn=data.collate, num_workers=2
    )
    assert all(torch.equal(batch[k][1], whole[k]) for k in whole)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_file_changed_after_the_start_is_read_whole_and_refused_by_name(place, seen, skip_bad):
    clips = data.CachedClips(place, "train", SIZE, skip_bad=skip_bad)
    path, times, body = (
        clips.files[0],
        clips.files[0].stat(),
        bytearray(clips.files[0].read_bytes()),
    )
    body[-9] ^= 1
    path.write_bytes(body)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it had never been touched
    seen.clear()
    if skip_bad:
        assert clips[0]["id"] == "train_000001"
    else:
        with pytest.raises(
            ValueError, match="clip train_000000: damaged.*its values have the checksum"
        ):
            clips[0]
    assert seen == ["train_000000"]
    body[-9] ^= 1
    path.write_bytes(body)
    assert clips[0]["id"] == "train_000000" and len(seen) == 2, (
        "whole again, but another time of change"
    )


@pytest.mark.parametrize("length", [0, 100, 4096, 9999])
def test_a_file_cut_after_the_start_is_refused_and_kills_nothing(place, seen, length):
    clips = data.CachedClips(place, "train", SIZE)
    os.truncate(clips.files[1], length)
    with pytest.raises(ValueError, match="clip train_000001: damaged since the start"):
        clips[1]
    assert seen[-1] == "train_000001", "not mapped"


def test_a_file_cut_or_changed_while_it_is_loaded_is_not_trained_on(place, seen, monkeypatch):
    clips = data.CachedClips(place, "train", SIZE)
    seen.clear()
    copied, read_header = caches.copied, caches.read_header

    def touched(tensor):
        clips.files[0].touch()
        return copied(tensor)

    def cut(path):
        header = read_header(path)
        os.truncate(path, 9999)
        return header

    monkeypatch.setattr(caches, "copied", touched)
    # touched: read again, whole
    assert clips[0]["id"] == "train_000000" and seen == ["train_000000"]
    monkeypatch.setattr(caches, "read_header", cut)
    with pytest.raises(ValueError, match="clip train_000001: damaged since the start"):
        clips[1]


def test_training_gets_the_float32_that_the_stored_bits_mean(place):
    from data import prepare

    clips = data.CachedClips(place, "train", SIZE)
    b = prepare(data.collate([clips[0], clips[1]]), 32, torch.device("cpu"))
    whole = caches.read_clip(clips.files[1])[0]
    assert b["latents"].dtype == b["text"][1].dtype == torch.float32 != whole["latents"].dtype
    for name in ("latents", "text", "start_latents"):
        assert torch.equal(b[name][1], whole[name].float())
    assert b["moving"].dtype == torch.bool


def many(place, count):
    """`count` clips, all copies of the first one under names of their own."""
    found, folder = read_json(place / "metadata.json"), next(place.glob("cache/*"))
    entry = found["samples"][0]
    tensors, metadata = caches.read_values(folder / f"{entry['id']}.safetensors")
    names = [f"clip{n:06d}" for n in range(count)]
    for name in names:
        path = folder / f"{name}.safetensors"
        caches.save_tensors(path, tensors, metadata | dict(id=name, sample=name))
    found["samples"] = [entry | dict(id=name) for name in names]
    found["splits"]["train"] = names
    (place / "metadata.json").write_text(json.dumps(found))


def lines_run(work):
    """Lines of the program that run in this thread, each turn of a loop counted."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace if str(ROOT) in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_the_work_of_a_start_grows_with_the_number_of_clips_and_not_faster(place):
    def start():
        assert len(data.CachedClips(place, "train", SIZE)) == count

    first, later = {}, {}
    for count in (40, 80, 120):
        many(place, count)
        first[count], later[count] = lines_run(start), lines_run(start)
    for lines in (first, later):
        # Equal steps: each clip costs what the clip before it did.
        assert lines[120] - lines[80] == pytest.approx(lines[80] - lines[40], rel=0.05)


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1: writes and reads 20,000 clips")
def test_twenty_thousand_clips_start_within_ten_seconds_and_600_mb(place):
    many(place, 20_000)
    code = (
        "import time, torch, data; before = time.process_time()\n"
        "def held(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        f"empty = held(); clips = data.CachedClips({str(place)!r}, 'train', {SIZE})\n"
        "assert len(clips) == 20_000\n"
        "print(time.process_time() - before, (held() - empty) / 1024)"
    )
    for limit in (60, 10):  # the first start reads the values too
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        seconds, megabytes = map(float, run.stdout.split())
        assert seconds < limit and megabytes < 600
        print(f"{seconds:.1f} s, {megabytes:.0f} MB", file=sys.stderr)
