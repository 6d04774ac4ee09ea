"""One way from a file's intrinsics to the model's: training, sampling and conversion agree."""

import numpy as np
import pytest
import torch

import data
from lib import camera_files, camera_paths
from lib.crop import Crop

ASPECTS = [(360, 640), (480, 640), (640, 360), (512, 512)]  # of the file's pictures
TARGETS = [(48, 64), (336, 592), (592, 336), (64, 64)]  # of the video
NAMES = dict(
    re10k="a.txt",
    nerfstudio="t.json",
    colmap="folder",
    npz="a.npz",
    fantasyworld="f.json",
    worldscore="w.json",
)
SAID = {"nerfstudio", "colmap", "npz"}  # formats that hold the size


def file_of(form, folder, source):
    """A camera file of square pixels whose centre is where the format can say it."""
    w2c, _ = camera_paths.camera_move("orbit", 5, 1.0)
    h, w = source
    centred = form in ("fantasyworld", "worldscore")
    pixels = np.array([0.8 * w, 0.8 * w, w / 2 if centred else 0.45 * w, h / 2])
    K = np.tile(pixels / [w, h, w, h], (5, 1))
    camera_files.write(folder / NAMES[form], form, w2c.double().numpy(), K, source)
    return folder / NAMES[form], K


@pytest.mark.parametrize("form", NAMES)
def test_training_sampling_and_conversion_agree(tmp_path, form):
    for n, source in enumerate(ASPECTS):
        folder = tmp_path / str(n)
        folder.mkdir()
        path, K = file_of(form, folder, source)
        interp = form if form in ("fantasyworld", "worldscore") else None
        told = source if form not in SAID else None
        # Centre crops of files without a size are of square pixels; a centre is theirs to say.
        view = camera_paths.View(form=interp, pictures=told)
        _, fractions, _ = camera_files.read(path, interp, told)
        np.testing.assert_allclose(fractions, K, atol=1e-6)
        for target in TARGETS:
            trained = Crop(source, target).intrinsics(fractions)  # cut in whole pixels
            _, sampled = camera_paths.load_camera(str(path), 5, target, view)
            step = max(target[0] / source[0], target[1] / source[1])
            assert (sampled[0] - trained).abs().max() <= 2 * step, (form, source, target)
            assert abs(sampled[0, 0, 0, 0] / sampled[0, 0, 1, 1] - 1) < 1e-4, "square pixels"


def test_re10k_of_16_to_9_at_592_x_336_by_hand(tmp_path):
    """fx = fy: 0.4752 of 1280 px is 608.3 px at 720 lines; at 592 of 720 lines: 500.1 px."""
    w2c, _ = camera_paths.camera_move("orbit", 5, 1.0)
    K = np.tile([0.4752, 0.4752 * 1280 / 720, 0.5, 0.5], (5, 1))
    camera_files.write(tmp_path / "a.txt", "re10k", w2c.double().numpy(), K, None)
    _, got = camera_paths.load_camera(str(tmp_path / "a.txt"), 5, (592, 336))
    want = 0.4752 * 1280 * 592 / 720
    torch.testing.assert_close(got[0, 0, 0, 0].item(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(got[0, 0, 1, 1].item(), want, rtol=1e-5, atol=0)


def test_pixels_without_a_size_are_asked_for(tmp_path):
    path, _ = file_of("fantasyworld", tmp_path, (480, 640))
    with pytest.raises(ValueError, match="f.json: .*pixels, but no image size; give --camera_size"):
        view = camera_paths.View(form="fantasyworld")
        camera_paths.load_camera(str(path), 5, (48, 64), view)


@pytest.mark.parametrize("text", ["480", "480x", "0x640", "480*640", "x", "480x640x3"])
def test_a_size_that_is_none_is_refused_by_name(text):
    with pytest.raises(ValueError, match="wanted HxW"):
        camera_files.size_of(text)


def test_a_longer_camera_file_says_which_part_is_used_and_can_be_spanned(tmp_path, capsys):
    w2c = np.tile(np.eye(4)[:3], (21, 1, 1))
    w2c[:, 0, 3] = -np.arange(21)
    lens = np.tile([1.0, 1.5, 0.5, 0.5], (21, 1))
    camera_files.write(tmp_path / "a.txt", "re10k", w2c, lens)
    first, _ = camera_paths.load_camera(str(tmp_path / "a.txt"), 5, (32, 48))
    assert first[0, :, 0, 3].tolist() == [0, -1, -2, -3, -4]
    said = capsys.readouterr().out
    assert "a.txt: 21 cameras, 0 .. 4 are used; --camera_stride 5 spans the path" in said
    camera_paths.load_camera(str(tmp_path / "a.txt"), 21, (32, 48), camera_paths.View(fov=50))
    assert "a.txt: its own intrinsics are taken, not --fov 50" in capsys.readouterr().out
    spanned, K = camera_paths.load_camera(
        str(tmp_path / "a.txt"), 5, (32, 48), camera_paths.View(stride=5)
    )
    assert spanned[0, :, 0, 3].tolist() == [0, -5, -10, -15, -20] and len(K[0]) == 5
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="--camera_stride 6 wants 25 or more"):
        camera_paths.load_camera(str(tmp_path / "a.txt"), 5, (32, 48), camera_paths.View(stride=6))


@pytest.mark.parametrize("option", ["--size=480,640", "--intrinsics=60,60,32"])
def test_an_option_of_another_form_is_told_its_own(capsys, option):
    """Seen: "invalid size_of value", "invalid lens value"."""
    with pytest.raises(SystemExit):
        data.make_parser().parse_args(["cameras", "a", "b", option])
    form = "HxW" if "size" in option else "fx,fy,cx,cy"
    assert f"invalid {form} value" in capsys.readouterr().err
