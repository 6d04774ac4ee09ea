"""Links that lead out of a dataset: refused by default, with the option's name, and followed when
told."""

import json
import os
import shutil
import sys

import pytest
from test_train import SIZES, run

import data
from encoders import MINIATURE
from lib import listing, rooms

SMALL = f"--wan_dir {MINIATURE} --height 32 --width 48 --num_frames 5"

SIZE = (32, 48, 5)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("rooms")
    rooms.synth(root, rooms.Recipe(variety="simple", num=2, num_frames=5, height=32, width=48))
    return root


@pytest.fixture
def root(rendered, tmp_path):
    """A dataset whose files lie elsewhere, as a download cache keeps them, and so does its cache
    folder."""
    root, blobs = tmp_path / "data", tmp_path / "blobs"
    shutil.copytree(rendered, root, ignore=shutil.ignore_patterns("cache"))
    blobs.mkdir()
    for n, path in enumerate(sorted(p for p in root.rglob("*") if p.is_file())):
        path.rename(blobs / f"{n:04d}")
        path.symlink_to(blobs / f"{n:04d}")
    (tmp_path / "scratch").mkdir()
    (root / "cache").symlink_to(tmp_path / "scratch")
    return root


def command(monkeypatch, text):
    """Exit status and words of `python data.py ...`."""
    monkeypatch.setattr(sys, "argv", ["data.py", *text.split()])
    try:
        data.command()
    except SystemExit as stop:
        return stop.code
    except ValueError as error:  # a line and status 2, as run_command prints it
        return f"error: {error}"
    return 0


def test_links_out_of_a_dataset_are_refused_with_the_name_of_the_option(root, monkeypatch, capsys):
    refused = "a link that leads out of .*--follow_links=True"
    with pytest.raises(ValueError, match=refused):
        data.load_samples(root)
    for what in (
        f"encode {root} {SMALL}",
        f"verify {root}",
    ):
        assert "--follow_links=True" in command(monkeypatch, what)
    text = (root / "metadata.json").read_text()
    (root / "metadata.json").unlink()
    (root / "metadata.json").write_text(text)  # the list itself, the files still links
    (root / "cache").unlink()
    assert command(monkeypatch, f"verify {root}") == 1
    assert "train_000000/video.mp4: a link that leads out" in capsys.readouterr().out
    assert (
        command(
            monkeypatch,
            f"encode {root} {SMALL}",
        )
        == 1
    )
    assert "--follow_links=True" in "".join(capsys.readouterr())


def test_links_are_followed_by_verify_encode_and_training_when_told(
    root, rendered, monkeypatch, tmp_path
):
    option = "--follow_links=True"  # as the message says it
    assert command(monkeypatch, f"verify {root} {option}") == 0
    assert (
        command(
            monkeypatch,
            f"encode {root} {SMALL} {option}",
        )
        == 0
    )
    assert len(list(tmp_path.glob("scratch/*/train_*.safetensors"))) == 2, (
        "written where the link leads"
    )
    with pytest.raises(ValueError, match="--follow_links=True"):
        data.CachedClips(root, "train", SIZE)
    clips = data.CachedClips(root, "train", SIZE, follow_links=True)
    data.encode(rendered, *SIZE)
    plain = data.CachedClips(rendered, "train", SIZE)
    assert (clips[1]["depth"] == plain[1]["depth"]).all() and clips.frames(1) is not None
    options = [
        "config/tiny0.py",
        f"--data_dir={root}",
        "--height=32",
        "--width=48",
        "--num_frames=5",
        "--batch_size=2",
        "--num_workers=0",
        "--max_steps=1",
        f"--model_overrides={SIZES}",
        "--device=cpu",
        "--eval_every=0",
    ]
    assert "--follow_links=True" in run("train.py", *options, f"--out_dir={tmp_path}/a", ok=False)
    assert "step 1/1" in run("train.py", *options, f"--out_dir={tmp_path}/b", option)


def test_with_links_followed_everything_else_stays_refused(root, monkeypatch):
    entries = json.loads((root / "metadata.json").read_text())["samples"]
    for path in ("../blobs/0000", "/etc/passwd", "train_000000/../../blobs/0000"):
        (root / "metadata.json").unlink()
        (root / "metadata.json").write_text(
            json.dumps([entries[0], dict(entries[1], video_path=path)])
        )
        with pytest.raises(ValueError, match="leaves the dataset folder"):
            data.load_samples(root, inside="/")
    (root / "metadata.json").write_text(json.dumps(entries))
    sample = data.load_samples(root, inside="/")[0]
    for target, message in (
        ("/dev/zero", "not a regular file"),
        ("absent", "no such file"),
        ("video.mp4", "cannot be followed|cannot be opened"),
    ):
        sample["video"].unlink()
        sample["video"].symlink_to(target)
        with pytest.raises(ValueError, match=message):
            listing.check_sample("/", sample)


def test_a_dataset_that_is_itself_a_link_needs_no_option(rendered, tmp_path):
    (tmp_path / "link").symlink_to(rendered)
    assert data.encode(tmp_path / "link", *SIZE) == 0
    assert len(data.CachedClips(tmp_path / "link", "train", SIZE)) == 2
    assert os.path.islink(tmp_path / "link")


def test_a_cache_file_that_leads_out_of_the_dataset_is_refused(rendered, tmp_path):
    inside, outside = tmp_path / "set", tmp_path / "elsewhere"
    shutil.copytree(rendered, inside)
    assert data.encode(inside, *SIZE) == 0
    path = sorted((inside / "cache").glob("*/train*.safetensors"))[0]
    outside.mkdir()
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)
    with pytest.raises(ValueError, match=f"{path.name}: a link that leads out of"):
        data.CachedClips(inside, "train", SIZE)
    assert len(data.CachedClips(inside, "train", SIZE, follow_links=True)) == 2
