"""Pictures at evaluations: what they show, and that training leaves them in the run folder and in
TensorBoard."""

import numpy as np
import pytest
import torch

from encoders import MINIATURE
from geometry import encode_pose
from lib import pictures
from lib.evaluate import comparison
from lib.files import read_video
from lib.log import Records
from lib.pictures import depth_to_rgb
from lib.rooms import Recipe, synth


def clip():
    depth = 1 + torch.rand(1, 5, 32, 48)
    w2c = torch.eye(4)[:3].repeat(1, 5, 1, 1)
    w2c[0, :, 2, 3] = -torch.linspace(0, 1, 5)  # the camera moves forward
    K = torch.tensor([[40.0, 0, 24], [0, 40, 16], [0, 0, 1]]).expand(1, 5, 3, 3)
    out = dict(
        depth=depth * 1.1,
        depth_conf=1 + depth,
        pose_enc=encode_pose(w2c * 0.5 + 0.5 * torch.eye(4)[:3], K, (32, 48))[None],
    )
    return dict(depth=depth, w2c=w2c), out


def test_the_comparison_shows_frames_both_depths_confidence_and_paths():
    b, out = clip()
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    image = comparison(b, out, frames)
    shown = lambda picture: any(
        (image[y : y + picture.shape[0], 4 : 4 + picture.shape[1]] == picture).all()
        for y in range(len(image) - picture.shape[0])
    )
    true = b["depth"][0].numpy()
    low, high = (float(x) for x in np.quantile(true, (0.01, 0.99)))
    assert shown(pictures.enlarge(frames[0], 200)) and shown(
        pictures.enlarge(depth_to_rgb(true[0], low, high), 200)
    )
    assert shown(pictures.enlarge(depth_to_rgb(out["depth"][0, 0].numpy(), low, high), 200))
    for colour in (pictures.COMMANDED, pictures.PREDICTED):
        assert (image == colour).all(-1).sum() > 20
    assert not shown(pictures.enlarge(frames[1], 200))  # in the next column
    assert comparison(b, out).shape[0] < image.shape[0]  # without frames: one row less


def test_the_top_view_has_the_path_at_true_scale_and_forward_up():
    """Hand computed: 1 unit forward and 0.5 right; right is right in the picture, forward is up."""
    E = np.tile(np.eye(4)[:3], (5, 1, 1))
    E[:, 0, 3], E[:, 2, 3] = -np.linspace(0, 0.5, 5), -np.linspace(0, 1, 5)
    image = pictures.top_view([(E, pictures.COMMANDED)], (200, 200))
    y, x = np.nonzero((image == pictures.COMMANDED).all(-1))
    first = y[x == x.min()].max(), x.min()
    assert first[0] > y.min() + 100 and x.max() - x.min() < 0.6 * (y.max() - y.min())


def test_words_are_drawn_with_gaps_and_at_their_scale():
    picture = pictures.words("T", 1)[..., 0] > 99
    assert picture[1:6].astype(int).tolist() == [
        [0, 1, 1, 1, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0],
    ]
    assert pictures.words("depth 0.5", 3).shape[0] == 21
    assert [pictures.number(x) for x in (0.00123456, 1.5, 12.345)] == ["0.00123", "1.5", "12.3"]


def test_records_write_the_picture_to_the_run_folder_and_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records, image = Records(tmp_path, {}, 0), np.full((20, 30, 3), 77, np.uint8)
    records.picture(7, image)
    records.flush()
    assert (tmp_path / "eval" / "step-7.png").read_bytes()[:4] == b"\x89PNG"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = events.Images("val")[0]
    assert (found.step, found.width, found.height) == (7, 30, 20)


def test_the_frames_of_a_cached_clip_are_its_video_or_the_codecs(tmp_path):
    import data

    root = tmp_path / "rooms"
    synth(root, Recipe(num=1, num_frames=5, height=32, width=48, seed=3, variety="simple"))
    data.encode(root, 32, 48, 5)
    synth(
        tmp_path / "cache",
        Recipe(num=1, num_frames=5, height=32, width=48, seed=3, variety="simple", cache_only=True),
    )
    video, coded = (
        data.CachedClips(folder, "train", (32, 48, 5), MINIATURE).frames(0)
        for folder in (root, tmp_path / "cache")
    )
    assert video.shape == coded.shape == (5, 32, 48, 3) and video.dtype == np.uint8
    assert np.abs(video.astype(int) - read_video(root / "train_000000" / "video.mp4")[0]).max() <= 1
    assert np.abs(video.astype(int) - coded).mean() < 12  # the codec blurs
    clips = data.CachedClips(root, "train", (32, 48, 5))
    (root / "train_000000" / "camera_params.txt").write_text("damaged since")
    assert clips.frames(0) is None  # training goes on without them
    (root / "train_000000" / "video.mp4").unlink()
    assert clips.frames(0) is None


@pytest.mark.parametrize("unit", ["", "m"])
def test_the_depth_legend_runs_from_near_to_far(unit):
    strip = pictures.depth_legend(0.5, 2.0, 240, unit)
    assert (
        strip.shape == (26, 240, 3)
        and (strip[0] == depth_to_rgb(1 / np.linspace(2, 0.5, 240)[None], 0.5, 2.0)[0]).all()
    )
    assert (strip[12:] == pictures.PALE).all(-1).any()
