"""Videos of phones and music players: HDR is refused with a cure that works, covers are none."""

import errno
import os
import subprocess

import imageio_ffmpeg
import pytest

from lib import files

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
    filters = str(refusal.value).split("-vf ")[1].split()[0]
    run("-i", hdr, "-vf", filters, sdr)
    assert files.read_video(sdr)[0].shape == (6, 96, 160, 3)


def test_ten_bits_without_hdr_are_read(tmp_path):
    run(*CLIP, "-pix_fmt", "yuv420p10le", "-c:v", "libx264", tmp_path / "ten.mp4")
    assert files.read_video(tmp_path / "ten.mp4")[0].shape == (6, 96, 160, 3)


def test_an_attached_cover_is_not_the_video(tmp_path):
    run(*CLIP[:3], "testsrc2=size=320x240", "-frames:v", "1", tmp_path / "cover.jpg")
    streams = ["-i", tmp_path / "cover.jpg", "-map", "1", "-map", "0", "-c:v:0", "mjpeg"]
    cover = ["-c:v:1", "libx264", "-disposition:v:0", "attached_pic"]
    run(*CLIP, *streams, *cover, tmp_path / "song.mp4")
    assert files.read_video(tmp_path / "song.mp4")[0].shape == (6, 96, 160, 3)
    assert files.count_frames(tmp_path / "song.mp4") == 6


def test_a_disk_that_cannot_flush_a_folder_keeps_the_file(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_aside(tmp_path / "a.txt", lambda path: path.write_text("whole"))
    assert (tmp_path / "a.txt").read_text() == "whole"
