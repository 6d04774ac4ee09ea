"""Damaged and hostile datasets end in a named error; training refuses at its start or leaves the
clip out."""

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bad_data
import damage
import damage_caches
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import SIZES, run

import data
from encoders import MINIATURE, WanVAE
from lib import caches, files, rooms
from lib.camera_files import read

SMALL = f"--wan_dir {MINIATURE} --height 32 --width 48 --num_frames 5"

SIZE = (32, 48, 5)

# torch ends a loader's workers by force after an error, and its queue complains
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="module")
def base():
    """pytest's folders are closed to the user without rights that a trial becomes."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def place(base, tmp_path):
    """A copy of the small dataset, encoded, and the folder beside it."""
    shutil.copytree(bad_data.build(base, "npy"), tmp_path / "data")
    (tmp_path / "outside").mkdir()
    return bad_data.at(tmp_path / "data")


SHORT = [
    "video: truncated",
    "npy: pipe",
    "npy: code to execute",
    "npz: 10^12 values",
    "npz: flipped bits",
    "npy: booleans",
    "cameras: 'nan' for a number",
    "metadata: depth_dir = '../outside'",
    "metadata: nested",
    "video: flipped bits, with SHA256SUMS",
    "cache: flipped bits, draw 0",
    "cache: NaN latent",
    "cache: another encoder",
    "cache: unreadable",
    "empty text: truncated",
]


@pytest.mark.parametrize("name", SHORT)
def test_damage_is_refused_by_name(base, name):
    if "unreadable" in name and os.geteuid() == 0 and not bad_data.DROPS:
        pytest.skip("root reads everything, and no other user can enter this checkout")
    outcome, text = bad_data.trial(base, name, 1)
    assert outcome == "refused", text


def test_there_are_four_hundred_kinds_of_damage():
    assert len(bad_data.RAW | bad_data.CACHE) >= 400


def spoil(path, name="latents", value=torch.nan):
    """A cache file with right checksums and one wrong value."""
    tensors, metadata = load_file(path), caches.read_header(path)[0]
    tensors[name].view(-1)[3] = value
    damage_caches.forge(path, tensors, metadata)


def test_training_refuses_at_its_start_and_names_the_first_five_and_the_count(tmp_path):
    rooms.synth(
        tmp_path,
        rooms.Recipe(variety="simple", cache_only=True, num=16, num_frames=5, height=32, width=48),
    )
    folder = next(tmp_path.glob("cache/*"))
    for n in range(7):
        spoil(folder / f"train_{n:06d}.safetensors")
    with pytest.raises(ValueError) as refused:
        data.CachedClips(tmp_path, "train", SIZE)
    text = str(refused.value)
    assert (
        "7 of 16 train clips cannot be trained on" in text
        and "and 2 more" in text
        and "--skip_bad=True" in text
    )
    assert text.count("latents holds NaN") == 5 and "render it again" in text
    clips = data.CachedClips(tmp_path, "train", SIZE, skip_bad=True)
    assert [f.stem for f in clips.files] == [f"train_{n:06d}" for n in range(7, 16)]
    for n in range(7, 10):
        spoil(folder / f"train_{n:06d}.safetensors")
    with pytest.raises(
        ValueError, match="10 of 16 .*\n(.*\n)*skip_bad leaves out the lesser part only"
    ):
        data.CachedClips(tmp_path, "train", SIZE, skip_bad=True)


def test_a_second_start_reads_only_the_files_that_changed(place, monkeypatch):
    seen = []
    original = caches.read_clip
    monkeypatch.setattr(caches, "read_clip", lambda path: seen.append(path.stem) or original(path))
    for _ in range(2):
        data.CachedClips(place.root, "train", SIZE)
    assert sorted(seen) == [bad_data.OTHER, damage.VICTIM]
    times = place.cache.stat()
    body = bytearray(place.cache.read_bytes())
    body[-9] ^= 1
    place.cache.write_bytes(body)
    # as if it had never been touched
    os.utime(place.cache, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        ValueError, match=f"{damage.VICTIM}.safetensors: its values have the checksum"
    ):
        data.CachedClips(place.root, "train", SIZE)


def batches(clips, workers):
    """All batches of a loader as train.py makes it."""
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = (
        0.1  # so long torch waits for a worker after an error: 5 s
    )
    return list(
        torch.utils.data.DataLoader(
            clips, batch_size=2, collate_fn=data.collate, num_workers=workers
        )
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_damaged_during_a_run_stops_it_by_name_or_the_next_clip_takes_its_place(
    place, workers, capfd
):
    clips, tolerant = (
        data.CachedClips(place.root, "train", SIZE, skip_bad=skip) for skip in (False, True)
    )
    place.cache.write_bytes(place.cache.read_bytes()[:500])
    with pytest.raises(ValueError, match=f"clip {damage.VICTIM}: damaged since the start"):
        batches(clips, workers)
    (batch,) = batches(tolerant, workers)
    assert batch["id"] == [bad_data.OTHER, bad_data.OTHER] and torch.equal(*batch["latents"])
    assert f"clip {damage.VICTIM}: damaged since the start" in capfd.readouterr().out


def test_any_exception_in_a_worker_carries_the_clip(place, monkeypatch):
    clips = data.CachedClips(place.root, "train", SIZE)

    def fail(path, checked):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(caches, "read_again", fail)
    with pytest.raises(ValueError, match=f"clip {bad_data.OTHER}: .*RuntimeError.*out of luck"):
        batches(clips, 2)


def test_a_bad_entry_counts_in_its_own_split_and_moves_no_other_clip(tmp_path):
    for named in (True, False):
        entries = [
            dict(id=f"c{n}", video=f"c{n}.mp4", fps=0 if n in (3, 4) else 10) for n in range(20)
        ]
        splits = dict(train=[f"c{n}" for n in range(18)], val=["c18", "c19"])
        (tmp_path / "metadata.json").write_text(
            json.dumps(dict(samples=entries, splits=splits) if named else entries)
        )
        for split, problems, ids in (("train", 2, 16), ("val", 0, 2), (None, 2, 18)):
            assert (
                len(data.load_samples(tmp_path, split, bad := [])) == ids and len(bad) == problems
            ), (named, split)
        assert [s["id"] for s in data.load_samples(tmp_path, "val")] == ["c18", "c19"]
        with pytest.raises(ValueError, match="sample 3: fps = 0; wanted"):
            data.load_samples(tmp_path, "train")


def test_an_id_that_stands_twice_means_neither_clip(tmp_path):
    entries = [dict(video=f"c{n}/video.mp4") for n in (0, 1, 1, 2)]
    (tmp_path / "metadata.json").write_text(json.dumps(entries))
    samples = data.load_samples(tmp_path, None, bad := [])
    assert [s["id"] for s in samples] == ["c0", "c2"] and [name for name, _ in bad] == ["c1"]


def test_encode_fails_by_default_skips_when_told_and_leaves_no_halves(place, capsys, monkeypatch):
    place.cache.unlink()
    place.video.write_bytes(place.video.read_bytes()[:700])
    command = f"data.py encode {place.root} {SMALL} --split train"
    for more, code in (("", 1), (" --skip_bad True", 0)):
        monkeypatch.setattr(sys, "argv", (command + more).split())
        try:
            data.command()
            left = 0
        except SystemExit as stop:
            left = stop.code
        assert left == code
        assert f"{damage.VICTIM}/video.mp4: not a readable video" in "".join(capsys.readouterr())
    left = {p.name for p in place.folder.rglob("*") if p.is_file()} - {".checked"}
    assert left == {
        "text_empty.safetensors",
        "train_000000.safetensors",
        f"{damage.VICTIM}.text.safetensors",
    }
    (place.folder / "train_000000.safetensors").unlink()
    (place.root / bad_data.OTHER / "video.mp4").unlink()
    with pytest.raises(SystemExit, match="1"):  # nothing is left
        data.command()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(place):
    before, limits = place.cache.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    # as a disk that fills up in the middle
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            caches.save_tensors(place.cache, dict(text=torch.ones(2, 999)), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert place.cache.read_bytes() == before and not list(place.folder.glob(".train*"))


def test_encode_writes_through_no_link(place):
    target = place.outside / "precious"
    target.write_text("precious")
    place.cache.unlink()
    place.cache.symlink_to(target)
    place.cache.with_name(f".{place.cache.name}.{os.getpid()}").symlink_to(target)
    assert data.encode(place.root, *SIZE, how=data.Encoding(split="train")) == 0
    assert target.read_text() == "precious" and not place.cache.is_symlink()
    (place.folder / ".parts").symlink_to(place.outside)
    with pytest.raises(ValueError, match="a link that leads out"):
        data.encode(place.root, *SIZE, how=data.Encoding(split="train"))


def test_encoders_that_give_nan_are_refused_by_clip(place, monkeypatch, capsys):
    place.cache.unlink()
    monkeypatch.setattr(
        WanVAE, "encode", lambda self, video: torch.full((1, 16, 2, 4, 6), torch.nan)
    )
    assert data.encode(place.root, *SIZE, how=data.Encoding(split="train")) == 1
    assert (
        f"skipped {damage.VICTIM}: " in (text := "".join(capsys.readouterr()))
        and "latents is not finite" in text
    )


def test_no_array_file_is_unpickled(tmp_path):
    bomb = np.array([damage.Bomb(tmp_path / "EXECUTED")], object)
    np.save(tmp_path / "a.npy", bomb, allow_pickle=True)
    np.savez(tmp_path / "a.npz", depth=bomb, w2c=bomb, allow_pickle=True)
    for name, what in (("a.npy", files.read_array), ("a.npz", files.read_array), ("a.npz", read)):
        with pytest.raises(ValueError, match="values of type object|Object arrays"):
            what(tmp_path / name)
    assert not (tmp_path / "EXECUTED").exists()


def test_a_video_that_names_other_files_is_not_followed(place):
    for text in (
        f"#EXTM3U\n#EXTINF:1,\nfile://{place.root}/train_000000/video.mp4\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile train_000000/video.mp4\n",
    ):
        playlist = place.root / "list.mp4"
        playlist.write_text(text)
        with pytest.raises(ValueError, match="list.mp4: not a readable video"):
            files.read_video(playlist)


def test_frame_counts_must_agree_and_are_counted_to_the_end(place):
    assert files.video_facts(place.video)[0] == 9 and files.count_arrays(place.depth) == 9
    (place.depth / "frame_0008.npy").unlink()  # behind the window of 5 frames
    with pytest.raises(ValueError, match="9 video frames, 9 cameras and 8 depth maps"):
        data.load_clip(data.load_samples(place.root)[1], *SIZE)


def test_sums_cover_what_nothing_else_can_see(place):
    text = (files.Path(__file__).parents[1] / "docs" / "data.md").read_text()
    command = text.split("cd DIR && ")[1].splitlines()[0]
    subprocess.run(command, shell=True, cwd=place.root, check=True)
    assert data.verify(place.root, "train") == 0
    place.camera.write_text(place.camera.read_text().replace("0.5", "0.6", 1))  # a plausible number
    assert data.verify(place.root, "train") == 1
    place.cache.unlink()
    assert data.encode(place.root, *SIZE, how=data.Encoding(split="train")) == 1


def on_two_ranks(work):
    """work() in two forked processes as torchrun would start them -> what it returns there."""
    # on a free port
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def rank_of(rank, pipe):
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="localhost",
            MASTER_PORT=str(store.port),
            TORCHELASTIC_RUN_ID="here",
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
        )
        pipe.send(work())

    context, found = multiprocessing.get_context("fork"), []
    for rank in range(2):
        ours, theirs = context.Pipe(False)
        found.append((context.Process(target=rank_of, args=(rank, theirs)), ours))
        found[-1][0].start()
    values = [pipe.recv() if pipe.poll(60) else "nothing" for _, pipe in found]
    for process, _ in found:
        process.kill()
        process.join()
    return values


def test_ranks_leave_out_the_same_clips_and_share_the_reading(tmp_path, monkeypatch):
    rooms.synth(
        tmp_path,
        rooms.Recipe(variety="simple", cache_only=True, num=6, num_frames=5, height=32, width=48),
    )
    folder = next(tmp_path.glob("cache/*"))
    spoil(folder / "train_000004.safetensors")
    os.truncate(folder / "train_000001.safetensors", 999)
    original, seen = caches.read_clip, []
    monkeypatch.setattr(caches, "read_clip", lambda path: seen.append(path.stem) or original(path))

    def start():
        torch.distributed.init_process_group("gloo")
        clips = data.CachedClips(tmp_path, "train", SIZE, skip_bad=True)
        return [f.stem for f in clips.files], seen

    (one, first), (two, second) = on_two_ranks(start)
    assert one == two == [f"train_{n:06d}" for n in (0, 2, 3, 5)]
    assert (
        sorted(first + second) == [f"train_{n:06d}" for n in (0, 2, 3, 4, 5)] and first and second
    )


def test_encode_under_torchrun_fails_on_every_rank_once_all_are_through(place):
    place.cache.unlink()
    place.camera.write_text("none\n")  # rank 1's clip
    assert on_two_ranks(
        lambda: data.encode(place.root, *SIZE, how=data.Encoding(split="train"))
    ) == [1, 1]


def test_train_refuses_in_one_message_and_goes_on_without_the_clip_when_told(tmp_path):
    rooms.synth(
        tmp_path / "clips",
        rooms.Recipe(
            variety="simple", cache_only=True, val=1, num=5, num_frames=5, height=32, width=48
        ),
    )
    spoil(next(tmp_path.glob("clips/cache/*/train_000002.safetensors")), "depth", torch.inf)
    options = [
        "config/tiny0.py",
        f"--data_dir={tmp_path}/clips",
        "--height=32",
        "--width=48",
        "--num_frames=5",
        "--batch_size=2",
        "--num_workers=2",
        "--max_steps=2",
        f"--model_overrides={SIZES}",
        "--device=cpu",
        "--eval_every=0",
        f"--out_dir={tmp_path}/out",
    ]
    text = run("train.py", *options, ok=False)
    assert (
        "1 of 5 train clips cannot be trained on" in text
        and "train_000002" in text
        and "Traceback" not in text
    )
    text = run("train.py", *options, "--skip_bad=True")
    assert (
        text.count("1 of 5 train clips are left out") == 1
        and "clips 4 + no val" in text
        and "step 2/2" in text
    )
