"""Videos of phones and music players: HDR is refused with a cure that works, covers are none."""

import errno
import json
import os
import shutil
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from recordings import WRITERS, clip

import data
from lib import files, importers
from lib.crop import load_image
from lib.pictures import write_png
from lib.rooms import Recipe

FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
CLIP = ["-f", "lavfi", "-i", "testsrc2=size=160x96:rate=15:duration=0.4"]


def run(*words):
    subprocess.run([*FFMPEG, *map(str, words)], check=True, timeout=60)


@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
@pytest.mark.parametrize("ending", ["mp4", "mkv", "mov"])
def test_hdr_is_refused_with_a_command_that_converts_it(tmp_path, transfer, ending):
    hdr, sdr = tmp_path / f"phone.{ending}", tmp_path / "sdr.mp4"
    told = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    colours = ["-color_trc", transfer, "-color_primaries", "bt2020", "-colorspace", "bt2020nc"]
    ten = ["-pix_fmt", "yuv420p10le", "-c:v", "libx265", "-x265-params", told]
    run(*CLIP, *ten, *colours, hdr)
    with pytest.raises(ValueError, match=f"phone.{ending}: HDR colours") as refusal:
        files.read_video(hdr)
    with pytest.raises(ValueError, match=f"phone.{ending}: HDR colours"):  # frame by frame too
        list(files.iterate_video(hdr))
    filters = str(refusal.value).split("-vf ")[1].split()[0]
    run("-i", hdr, "-vf", filters, sdr)
    assert files.read_video(sdr)[0].shape == (6, 96, 160, 3)


@pytest.mark.parametrize("kind", ["interlaced", "ProRes", "VP9", "QuickTime"])
def test_lines_of_two_moments_and_hidden_colours_are_refused_or_cured(tmp_path, kind):
    """They came in as combs, and with the colours behind what is transparent."""
    source = "color=red@0.0:size=64x48:duration=0.4"
    how = dict(
        interlaced=["-vf", "interlace", "-c:v", "libx264", "-flags", "+ildct+ilme"],
        ProRes=["-c:v", "prores_ks", "-profile:v", "4", "-pix_fmt", "yuva444p10le"],
        VP9=["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p"],
        QuickTime=["-c:v", "qtrle", "-pix_fmt", "argb"],
    )[kind]
    path = tmp_path / dict(interlaced="a.mp4", VP9="a.webm").get(kind, "a.mov")
    clear = ["-f", "lavfi", "-i", f"{source},format=rgba"]
    run(*(CLIP if kind == "interlaced" else clear), *how, path)
    if kind in ("ProRes", "QuickTime"):  # ffmpeg decodes their alpha
        assert files.read_video(path)[0].min() > 250
        return
    what = "interlaced lines" if kind == "interlaced" else "VP9 with alpha"
    with pytest.raises(ValueError, match=f"{path.name}: {what}. Convert it: ffmpeg ") as refusal:
        files.read_video(path)
    filters = str(refusal.value).split("-vf ")[1].removesuffix(" OUT").strip("'")
    decoder = ["-c:v", "libvpx-vp9"] if kind == "VP9" else []
    run(*decoder, "-i", path, "-vf", filters, tmp_path / "b.mp4")
    shown = files.read_video(tmp_path / "b.mp4")[0]
    assert len(shown) == 3 if kind == "interlaced" else shown.min() > 250  # white


@pytest.mark.parametrize(
    "name, words", [("a.m4a", "there is no picture in it"), ("a.mp3", "mp4, mov")]
)
def test_sound_alone_is_called_so(tmp_path, name, words):
    """Seen: "Failed to set value '0:V:0' for option 'map'"."""
    run("-f", "lavfi", "-i", "sine=duration=0.2", tmp_path / name)
    for read in (files.read_video, files.video_facts):
        with pytest.raises(ValueError, match=f"{name}: not a readable video or picture: .*{words}"):
            read(tmp_path / name)


def test_ten_bits_without_hdr_are_read(tmp_path):
    run(*CLIP, "-pix_fmt", "yuv420p10le", "-c:v", "libx264", tmp_path / "ten.mp4")
    assert files.read_video(tmp_path / "ten.mp4")[0].shape == (6, 96, 160, 3)


def test_an_attached_cover_is_not_the_video(tmp_path):
    run(*CLIP[:3], "testsrc2=size=320x240", "-frames:v", "1", tmp_path / "cover.jpg")
    streams = ["-i", tmp_path / "cover.jpg", "-map", "1", "-map", "0", "-c:v:0", "mjpeg"]
    cover = ["-c:v:1", "libx264", "-disposition:v:0", "attached_pic"]
    run(*CLIP, *streams, *cover, tmp_path / "song.mp4")
    assert files.read_video(tmp_path / "song.mp4")[0].shape == (6, 96, 160, 3)
    assert files.video_facts(tmp_path / "song.mp4")[0] == 6


def test_a_disk_that_cannot_flush_a_folder_keeps_the_file(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_aside(tmp_path / "a.txt", lambda path: path.write_text("whole"))
    assert (tmp_path / "a.txt").read_text() == "whole"


def folder_clip(root, kind):
    """A sample whose video is a folder of pictures, 8 .. 16: text order is another."""
    c = clip()
    WRITERS["kitti"](root / "src", c)
    importers.run(root / "src", root / "set")
    folder = root / "set" / "src" / "video"
    folder.mkdir()
    for path in (root / "src" / "images").iterdir():
        target = folder / f"{path.stem}.{kind}"
        if kind == "png":
            shutil.copyfile(path, target)
        else:
            line = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-q:v", "1", target]
            subprocess.run(line, check=True)
    (folder / "._8.png").write_bytes(b"macOS")
    (folder.parent / "video.mp4").unlink()
    said = json.loads((root / "set" / "metadata.json").read_text())
    said["samples"][0]["video_path"] = "src/video"
    (root / "set" / "metadata.json").write_text(json.dumps(said))
    return c, data.load_samples(root / "set")[0]


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_folder_of_pictures_is_a_video(tmp_path, kind, capsys):
    (tmp_path / "src").mkdir()
    c, sample = folder_clip(tmp_path, kind)
    found = data.load_clip(sample, 48, 64, 9)
    rgb = (found["video"].permute(1, 2, 3, 0).numpy() + 1) * 127.5
    off = np.abs(rgb - c["rgb"]).mean()
    assert off < 1e-3 if kind == "png" else off < 4
    assert found["fps"] == 30  # of the sample's entry
    assert data.verify(tmp_path / "set") == 0
    assert data.encode(tmp_path / "set", 48, 64, 9) == 0
    first = sorted((tmp_path / "set" / "src" / "video").glob("[!.]*"))[0]
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(ValueError, match=first.name):
        data.load_clip(sample, 48, 64, 9)


def test_pictures_of_two_sizes_and_an_empty_folder_are_named(tmp_path):
    for n, size in enumerate([(32, 48), (32, 48), (32, 64)]):
        write_png(tmp_path / f"{n}.png", np.zeros((*size, 3), np.uint8))
    with pytest.raises(ValueError, match="2.png: 32x64, where 0.png is 32x48"):
        files.read_video(tmp_path)
    assert len(files.read_video(tmp_path, 2)[0]) == 2
    (tmp_path / "no").mkdir()
    with pytest.raises(ValueError, match="no: no pictures; wanted"):
        files.read_video(tmp_path / "no")


def test_an_ffmpeg_that_is_too_old_is_named_and_no_file_is_blamed(tmp_path, monkeypatch):
    """4.2.2, of imageio-ffmpeg before 0.6, or a distribution's behind IMAGEIO_FFMPEG_EXE."""
    old = tmp_path / "ffmpeg"
    old.write_text("#!/bin/sh\necho \"Unrecognized option 'fps_mode'.\" >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(old))
    for read in (files.read_video, files.video_facts):
        with pytest.raises(OSError, match=f"^{old}: older than ffmpeg 5.1. Fix: pip install -U"):
            read(files.Path(__file__).parents[1] / "examples/room.jpg")


def test_pixels_that_are_not_square_are_shown_as_players_show_them(tmp_path):
    """HDV's 1440x1080 is shown as 1920x1080; it was cut as it lies, a third too narrow."""
    how = ["-c:v", "libx264", "-crf", "1", "-pix_fmt", "yuv444p"]
    run(*CLIP, "-vf", "scale=120:96,setsar=4/3", *how, tmp_path / "narrow.mp4")
    run(*CLIP, *how, tmp_path / "square.mp4")
    run("-display_rotation", "90", "-i", tmp_path / "narrow.mp4", "-c", "copy", tmp_path / "up.mp4")
    seen = [load_image(tmp_path / f"{name}.mp4", 48, 80)[0] for name in ("narrow", "square")]
    assert (seen[0] - seen[1]).abs().mean() < 0.03
    assert files.read_video(tmp_path / "up.mp4", 1)[1][2] == pytest.approx(3 / 4)
    assert files.read_video(tmp_path / "square.mp4", 1)[1][2] == 1
    run(*CLIP, "-vf", "setsar=2", "-frames:v", "1", tmp_path / "print.jpg")  # dots an inch
    assert files.read_video(tmp_path / "print.jpg")[1][2] == 1


def test_verify_asks_whether_cameras_are_of_pixels_that_are_not_square(tmp_path, capsys):
    data.synth(tmp_path, workers=1, recipe=Recipe(num=1, num_frames=5, height=32, width=48))
    path = tmp_path / "train_000000/video.mp4"
    run(
        "-i",
        path,
        "-c",
        "copy",
        "-bsf:v",
        "h264_metadata=sample_aspect_ratio=4/3",
        tmp_path / "v.mp4",
    )
    shutil.move(tmp_path / "v.mp4", path)
    assert data.verify(tmp_path) == 0
    assert "warn pixels: 1.33 times as wide as high" in capsys.readouterr().out


def test_the_title_of_a_video_tells_neither_its_rate_nor_its_pixels(tmp_path):
    """Seen: 5 frames a second, and pixels three times as wide as high."""
    run(*CLIP, "-metadata", "title=Video: 8x8 [SAR 3:1, 5 fps", tmp_path / "a.mp4")
    assert files.video_facts(tmp_path / "a.mp4") == (6, (96, 160), 15, 1)
