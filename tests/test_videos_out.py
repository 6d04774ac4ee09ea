"""Videos that are written: wherever they go, in the colours that players show, or an error."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from lib.files import is_of_disk, read_video
from lib.pictures import depth_to_rgb, write_video

FRAMES = np.random.default_rng(0).integers(0, 255, (6, 96, 160, 3), dtype=np.uint8)


@pytest.mark.parametrize("folder", ["12:30", "-x", "a b%03d", "\u623f\u95f4"])
def test_a_folder_may_have_any_name(tmp_path, monkeypatch, folder):
    """12:30/video.mp4 was of the protocol 12, -x/video.mp4 an option: there was no video."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    write_video(f"{folder}/video.mp4", FRAMES, 29.97)
    found, told = read_video(f"{folder}/video.mp4")
    assert found.shape == FRAMES.shape and told[1] == 29.97


def test_a_video_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    """A full disk used to leave a cut file, and no word."""
    with pytest.raises(OSError, match="nowhere/v.mp4: not written: .*No such file"):
        write_video(tmp_path / "nowhere" / "v.mp4", FRAMES, 16)
    (tmp_path / "full").write_text('#!/bin/sh\necho "No space left on device" >&2\nexit 1\n')
    (tmp_path / "full").chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "full"))
    with pytest.raises(OSError, match="v.mp4: not written: No space left") as caught:
        write_video(tmp_path / "v.mp4", FRAMES, 16)
    assert is_of_disk(caught.value)  # or else each of a thousand jobs is sampled, and at fault


def test_the_file_says_which_matrix_its_colours_were_made_with(tmp_path):
    """Without a word Chromium takes BT.709 for 720 lines and more, which shifts colours by 15."""
    write_video(tmp_path / "v.mp4", FRAMES, 16)
    ask = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(tmp_path / "v.mp4")]
    said = subprocess.run(ask, capture_output=True, text=True).stderr
    assert "smpte170m/bt709/bt709" in said
    flat = np.full_like(FRAMES, [200, 40, 40])
    write_video(tmp_path / "flat.mp4", flat, 16)
    assert np.abs(read_video(tmp_path / "flat.mp4")[0].astype(int) - flat).max() <= 3


def test_depth_that_is_no_number_is_grey_although_its_range_is_none(tmp_path):
    """A preview of it ended the sampling with an IndexError."""
    depth = np.full((2, 4, 4), np.nan, np.float32)
    assert (depth_to_rgb(depth, *np.quantile(depth, (0.01, 0.99))) == 128).all()
