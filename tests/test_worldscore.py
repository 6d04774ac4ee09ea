"""WorldScore's instances, cameras and tree, by hand; the whole command on the miniature."""

import json
import math
import pathlib
from dataclasses import replace

import numpy as np
import pytest

import sample
from lib import camera_files
from lib.files import read_video
from lib.worldscore import (
    MOVES,
    WBenchModel,
    all_cameras,
    as_blender,
    as_opencv,
    from_wbench,
    key_cameras,
    read_list,
    write_instance,
)

ROOT = pathlib.Path(__file__).parents[1]
STATIC = dict(
    visual_movement="static",
    visual_style="photorealistic",
    scene_type="indoor",
    image="static/images/dining_spaces/001.png",
    camera_path=["push_in", "pan_left"],
    prompt_list=["A table.", "A chair", "A lamp."],
    style="DSLR 35mm",
    content_list=["table", "chair", "lamp"],
)
DYNAMIC = dict(
    visual_movement="dynamic",
    visual_style="stylized",
    motion_type="rigid",
    image="dynamic/images/7.png",
    camera_path=["fixed"],
    prompt="A car drives",
    style="ink",
)


def listed(tmp_path, *entries, kind="static"):
    path = tmp_path / "WorldScore-Dataset" / kind / f"{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


def test_an_instance_knows_its_folder_image_and_prompts(tmp_path):
    path = listed(tmp_path, STATIC)
    (one,) = read_list(path, tmp_path / "runs")
    tree = "worldscore_output/static/photorealistic/indoor/dining_spaces/001"
    assert one.folder == tmp_path / "runs" / tree
    assert one.image == tmp_path / "WorldScore-Dataset/static/images/dining_spaces/001.png"
    assert one.prompts == ["A chair. DSLR 35mm", "A lamp. DSLR 35mm"]
    (one,) = read_list(listed(tmp_path, DYNAMIC, kind="dynamic"), tmp_path / "runs")
    assert one.folder == tmp_path / "runs/worldscore_output/dynamic/stylized/rigid/7"
    assert one.prompts == ["A car drives. ink"]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(camera_path=["fly"]), "camera_path 'fly'; known: push_in"),
        (dict(prompt_list=["one"]), "0 prompts for 2 scenes"),
        (dict(image="../../etc/x.png"), "leads out of the dataset"),
        (dict(scene_type="../../x"), "cannot name a folder"),
        (dict(visual_movement="both"), "wanted static or dynamic"),
        (dict(style=None, prompt_list=3), "of another kind"),
    ],
)
def test_a_bad_entry_is_named(tmp_path, change, said):
    path = listed(tmp_path, STATIC, dict(STATIC, **change))
    with pytest.raises(ValueError, match="static.json: entry 1: ") as error:
        read_list(path, tmp_path)
    assert said in str(error.value)


# ---------------------------------------------------------------------------------------- cameras
def centre_and_view(move):
    """Where a camera stands after a move of speed 1, and where it looks, x right, y down."""
    w2c = as_opencv(key_cameras([move]))[1]
    return -w2c[:, :3].T @ w2c[:, 3], w2c[2, :3]


HALF = 0.5
SIN, COS = HALF, math.cos(math.radians(30))


@pytest.mark.parametrize(
    "move, centre, view",
    [
        ("push_in", (0, 0, 1), (0, 0, 1)),
        ("pull_out", (0, 0, -1), (0, 0, 1)),
        ("move_left", (-HALF, 0, 0), (0, 0, 1)),
        ("move_right", (HALF, 0, 0), (0, 0, 1)),
        ("pan_left", (0, 0, 0), (-SIN, 0, COS)),
        ("pan_right", (0, 0, 0), (SIN, 0, COS)),
        ("fixed", (0, 0, 0), (0, 0, 1)),
    ],
)
def test_moves_go_where_their_names_say(move, centre, view):
    found = centre_and_view(move)
    np.testing.assert_allclose(found[0], centre, atol=1e-12)
    np.testing.assert_allclose(found[1], view, atol=1e-12)


def test_orbits_circle_the_point_in_front_and_look_at_it():
    for move, side in (("orbit_left", -1), ("orbit_right", 1)):
        centre, view = centre_and_view(move)
        np.testing.assert_allclose(centre + view, (0, 0, 1), atol=1e-12)  # one unit ahead
        np.testing.assert_allclose(abs(centre[0]), SIN, atol=1e-12)
        assert np.sign(centre[0]) in (side, -side) and abs(centre[2] - (1 - COS)) < 1e-12
    assert centre_and_view("orbit_left")[0][0] == -centre_and_view("orbit_right")[0][0]


def test_a_chain_starts_each_move_where_the_camera_stands():
    keys = key_cameras(["push_in", "pan_left", "push_in"])
    cameras = all_cameras(keys, 5)
    assert len(cameras) == 3 * 4 + 1
    np.testing.assert_allclose(cameras[::4], keys, atol=1e-12)
    w2c = as_opencv(keys)
    last = -w2c[3, :, :3].T @ w2c[3, :, 3]
    np.testing.assert_allclose(last, (-SIN, 0, 1 + COS), atol=1e-12)
    # half of the pan is half of its angle
    half = as_opencv(cameras)[6, 2, :3]
    np.testing.assert_allclose(half, (-math.sin(math.radians(15)), 0, math.cos(math.radians(15))))


def test_the_camera_file_reads_back_as_our_own_cameras(tmp_path):
    (one,) = read_list(listed(tmp_path, STATIC), tmp_path / "runs")
    video = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    write_instance(one, video, video[0], fps=10, seconds=1.5)
    w2c, intrinsics, _ = camera_files.read(
        one.folder / "camera_data.json", "worldscore", (512, 512)
    )
    wanted = as_opencv(all_cameras(key_cameras(one.moves, 0.3), 5))
    first = np.vstack([w2c[0], [0, 0, 0, 1]])
    relative = [np.vstack([E, [0, 0, 0, 1]]) @ np.linalg.inv(first) for E in w2c]
    np.testing.assert_allclose(np.stack(relative)[:, :3], wanted, atol=1e-6)
    np.testing.assert_allclose(intrinsics[0], (500 / 512, 500 / 512, 0.5, 0.5))
    data = json.loads((one.folder / "image_data.json").read_text())
    assert (data["num_scenes"], data["total_frames"], data["anchor_frame_idx"]) == (2, 9, [0, 4, 8])
    assert {k: data[k] for k in STATIC} == STATIC
    frames = sorted(path.name for path in (one.folder / "frames").iterdir())
    assert frames == [f"{n:03d}.png" for n in range(9)]
    names = {path.name for path in one.folder.iterdir()}
    assert names >= {"camera_data.json", "input_image.png", "videos", "time.txt"}
    assert one.finished(5) and not one.finished(9)
    made = replace(one, settings={"seed": 1})
    assert made.finished(5)  # what an older one was made with is not known
    write_instance(made, video[:5], video[0], fps=10, seconds=1.5)  # over the nine
    assert made.finished(3) and not replace(one, settings={"seed": 2}).finished(3)
    # An older one does not say which LoRA of its name it was made with.
    merged = [replace(one, settings=dict(seed=1, loras=sizes)) for sizes in ("9:1", "9:2")]
    assert merged[1].finished(3)
    write_instance(merged[0], video[:5], video[0], fps=10, seconds=1.5)
    assert [x.finished(3) for x in (*merged, made)] == [True, False, False]
    write_instance(made, video[:5], video[0], fps=10, seconds=1.5)
    for damaged in ('{"cut sho', "[]", '{"settings": [1]}'):
        (one.folder / "image_data.json").write_text(damaged)
        assert not made.finished(3)


def test_blender_axes_by_hand():
    """The first c2w looks along PyTorch3D's z with x left, y up: Blender's x and z turn around."""
    np.testing.assert_allclose(as_blender(key_cameras([]))[0], np.diag([-1.0, 1, -1, 1]))
    assert set(MOVES) >= {"push_in", "pull_left", "fixed"}


# ------------------------------------------------------------------------------------ the command
def test_the_command_chains_scenes_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """On the miniature, two scenes: the second starts with the last frame of the first."""
    path = listed(tmp_path, STATIC, dict(STATIC, image="static/images/dining_spaces/2.png"))
    image = path.parents[1] / STATIC["image"]
    image.parent.mkdir(parents=True)
    image.write_bytes((ROOT / "examples/room.jpg").read_bytes())
    line = f"sample.py --ckpt {ROOT}/tiny/fantasyworld.safetensors --worldscore {path} --frames 5 "
    line += f"--steps 2 --height 64 --width 64 --device cpu --out {tmp_path / 'runs'}"
    monkeypatch.setattr("sys.argv", line.split())
    with pytest.raises(ValueError, match="1 of 2 jobs failed"):  # the second has no image
        sample.command()
    assert "2.png" in capsys.readouterr().err
    one, other = read_list(path, tmp_path / "runs")
    assert one.finished(5) and not other.finished(5)
    frames = [read_video(one.folder / "frames" / f"{n:03d}.png", 1)[0][0] for n in range(9)]
    assert frames[0].shape == (512, 512, 3)
    steps = [np.abs(a.astype(float) - b).mean() for a, b in zip(frames, frames[1:])]
    assert 0 < steps[4] < 4 * np.mean(steps)  # no cut where the scenes meet
    made = (one.folder / "time.txt").stat().st_mtime_ns
    (path.parents[1] / other.entry["image"]).write_bytes(image.read_bytes())
    sample.command()
    assert other.finished(5) and (one.folder / "time.txt").stat().st_mtime_ns == made
    assert "1 of 2 worlds are there already and are kept" in capsys.readouterr().out


def test_worlds_of_another_release_are_told_by_its_name(monkeypatch):
    """Its file carries no digest: a second one's worlds were taken for the first one's."""
    ckpt, found = str(ROOT / "tiny/fantasyworld.safetensors"), []
    monkeypatch.setattr(sample.worldscore_folders, "read_list", lambda *x: found.append(x[2]) or [])
    said = [f"--ckpt={ckpt}", "--worldscore=x.json", "--height=64", "--width=64"]
    options = sample.config.apply(vars(sample), said)
    meta = sample.metadata_of_ckpt(ckpt)
    sample.make_worlds(options, meta)
    sample.make_worlds(options, {k: v for k, v in meta.items() if k != "sha256"})
    assert [x["sha256"] for x in found] == [meta["sha256"], ckpt]


def test_a_wide_size_is_refused_with_the_reason(tmp_path, monkeypatch):
    line = f"sample.py --ckpt {ROOT}/tiny/fantasyworld.safetensors --worldscore x.json --height 64"
    monkeypatch.setattr("sys.argv", [*line.split(), "--width", "96"])
    with pytest.raises(ValueError, match="64 x 96 pixels: its camera metrics"):
        sample.command()


@pytest.mark.parametrize(
    "more", ["--prompt=a", "--num_samples=2", "--export=all", "--camera=up", "--unit=m"]
)
def test_what_the_list_says_itself_is_refused_beside_it(more, monkeypatch):
    line = f"sample.py --ckpt {ROOT}/tiny/fantasyworld.safetensors --worldscore x.json {more}"
    monkeypatch.setattr("sys.argv", line.split())
    with pytest.raises(ValueError, match=f"{more.partition('=')[0]} would change nothing"):
        sample.command()


# ----------------------------------------------------------------------------------------- WBench
def test_wbench_commands_a_camera_for_every_latent():
    """A walk of one unit a latent: frames between stand a quarter apart; the wide picture's focal
    length counts for the cropped height."""
    c2w = np.tile(np.eye(4), (3, 1, 1))
    c2w[:, 2, 3] = [5, 6, 7]
    K = [[1080.0, 0, 960], [0, 1080, 540], [0, 0, 1]]
    poses = {str(n): dict(extrinsic=m.tolist(), K=K) for n, m in enumerate(c2w)}
    w2c, k = from_wbench(poses, 9, (64, 64))
    np.testing.assert_allclose(-w2c[0, :, 2, 3], np.arange(9) / 4, atol=1e-6)
    np.testing.assert_allclose(k[0, 4], [[64, 0, 32], [0, 64, 32], [0, 0, 1]], atol=1e-4)
    with pytest.raises(ValueError, match="poses of 3 latents for 13 frames"):
        from_wbench(poses, 13, (64, 64))
    seen = []

    def scene(image, prompt, w2c, K):
        seen.append((prompt, w2c.shape[1]))
        return np.zeros((w2c.shape[1], 64, 64, 3), np.uint8), None

    model = WBenchModel(scene, (64, 64), "a street")
    assert len(model.generate_with_poses(None, poses, 8)) == 8 and seen == [("a street", 9)]
    with pytest.raises(ValueError, match="gives 9 at most"):
        model.generate_with_poses(None, poses, 10)
