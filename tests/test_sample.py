"""sample.py as a person runs it: prompts, cameras, batches that go on, refusals in one line."""

import importlib
import json
import pathlib
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small import options_of, tiny_inputs, tiny_model

import config
import sample
from encoders import MINIATURE
from lib import camera_files, camera_paths
from lib.crop import crop_intrinsics
from lib.experts import metadata_of_ckpt
from lib.files import read_video

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A stage 2 checkpoint of a tiny untrained model and the stage 0 folder it stands on."""
    root, model = tmp_path_factory.mktemp("run"), tiny_model(2, awake=True, has_control=True)
    (root / "s0").mkdir()
    dit = {f"dit.{k}": v.contiguous() for k, v in model.dit.state_dict().items()}
    meta = dict(
        model_config=json.dumps(model.cfg.__dict__),
        step="3",
        train_config=json.dumps(dict(num_frames=5, height=32, width=48, wan_dir=str(root / "s0"))),
    )
    began = dict(meta, stage="0", train_config=json.dumps(dict(wan_dir=MINIATURE)))
    save_file(dit, root / "s0" / "latest.safetensors", began)
    own = {k: v.contiguous() for k, v in model.trainable_state_dict().items()}
    save_file(own, root / "two.safetensors", dict(meta, stage="2"))
    return root / "two.safetensors"


@pytest.mark.parametrize(
    "inputs, given, words",
    [
        (16, dict(image="a.png"), "images want 32 or 36 inputs, this one has 16"),
        (16, dict(worldscore="static.json"), "images want 32 or 36 inputs"),
        (32, dict(image="a.png", end_image="b.png"), "end image is for .* 36 inputs"),
    ],
)
def test_an_image_that_a_family_does_not_take_is_refused_before_anything_is_loaded(
    ckpt, inputs, given, words
):
    options = options_of(sample, ckpt=str(ckpt))
    meta = metadata_of_ckpt(options.ckpt)
    meta["model_config"] = json.dumps(json.loads(meta["model_config"]) | dict(in_dim=inputs))
    sample.settled(options, meta)
    with pytest.raises(ValueError, match=words):
        sample.settled(options.replaced(**given), meta)
    # Another branch than the one that it was trained on has inputs of its own.
    sample.settled(options.replaced(**given, other_wan=True), meta)


def run(monkeypatch, ckpt, out, *more):
    arguments = [f"--ckpt={ckpt}", f"--out={out}", "--steps=2", "--device=cpu", *more]
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    sample.command()


def test_a_file_of_prompts_and_two_seeds_gets_a_folder_each_and_goes_on_where_it_stopped(
    ckpt, tmp_path, monkeypatch, capsys
):
    (tmp_path / "prompts.txt").write_text(
        "a red room\n\n# not this one\na blue room, seen from above\n"
    )
    more = (
        f"--prompt={tmp_path}/prompts.txt",
        "--num_samples=2",
        "--seed=7",
        "--export=video,npz",
        "--guidance=1",
    )
    run(monkeypatch, ckpt, tmp_path / "out", *more)
    folders = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert folders == [
        "000-a-red-room-seed7",
        "001-a-red-room-seed8",
        "002-a-blue-room-seen-from-above-seed7",
        "003-a-blue-room-seen-from-above-seed8",
    ]
    frames = [read_video(tmp_path / "out" / f / "video.mp4")[0] for f in folders]
    assert not np.array_equal(frames[0], frames[1])
    (tmp_path / "out" / folders[2] / "report.json").unlink()  # as if it had been killed there
    stamps = {f: (tmp_path / "out" / f / "video.mp4").stat().st_mtime_ns for f in folders}
    capsys.readouterr()
    run(monkeypatch, ckpt, tmp_path / "out", *more)
    again = {f: (tmp_path / "out" / f / "video.mp4").stat().st_mtime_ns for f in folders}
    assert [f for f in folders if again[f] != stamps[f]] == [folders[2]]
    assert "3 of 4 samples are there already" in capsys.readouterr().out
    np.testing.assert_array_equal(
        read_video(tmp_path / "out" / folders[2] / "video.mp4")[0], frames[2]
    )
    run(monkeypatch, ckpt, tmp_path / "out", *more, "--steps=1")  # other settings: nothing is kept
    assert all((tmp_path / "out" / f / "video.mp4").stat().st_mtime_ns > again[f] for f in folders)


def test_low_memory_and_previews_change_no_result(ckpt, tmp_path, monkeypatch):
    run(monkeypatch, ckpt, tmp_path / "a", "--export=npz")
    run(monkeypatch, ckpt, tmp_path / "b", "--export=npz", "--low_memory", "--preview_every=1")
    a, b = (np.load(tmp_path / x / "depth.npz")["depth"] for x in "ab")
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert sorted(p.name for p in (tmp_path / "b" / "preview").iterdir()) == [
        "step-0001.png",
        "step-0002.png",
    ]
    picture = read_video(tmp_path / "b" / "preview" / "step-0002.png")[0][0]
    assert picture.shape == (32, 6 * (48 + 2) - 2, 3)  # the first frame, and the depth of five
    (tmp_path / "b" / "preview" / "step-by-step.png").touch()  # not ours
    run(monkeypatch, ckpt, tmp_path / "b", "--export=npz", "--preview_every=2")  # the others go
    left = sorted(p.name for p in (tmp_path / "b" / "preview").iterdir())
    assert left == ["step-0002.png", "step-by-step.png"]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert len(report["control"]["frames"]) == 5 and {"depth", "colour", "heads"} <= set(
        report["consistency"]
    )


def test_one_line_of_the_summary_names_control_error_scale_and_consistency(
    ckpt, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, ckpt, tmp_path / "x", "--export=video", "--camera=static", "--unit=m")
    said = capsys.readouterr().out
    assert "predicted against commanded cameras: rotation" in said and "depth differs by" in said
    assert (
        "warning: the commanded cameras move too little" in said and "video.mp4 report.json" in said
    )


# ---- sampling
def test_no_room_for_both_prompts_at_once_means_one_after_the_other_and_frees_the_failed_pass():
    """The hook stands for a GPU that holds one sample; its frame lives as long as the exception."""
    model, kept = tiny_model(2, awake=True, has_control=True), []
    given = tiny_inputs(batch=1)
    w2c, K = camera_paths.load_camera("orbit", 5, (32, 48))
    text, negative = torch.randn(3, 64), torch.randn(4, 64)
    inputs = sample.Inputs(given["x"], text, negative, given["y"], None, w2c, K)
    want, _, _ = sample.generate(model, inputs, sample.Sampling(steps=3))

    def full(_model, args):
        scratch = torch.zeros(8)
        if len(args[0]) == 2:
            kept.append(weakref.ref(scratch))
            raise torch.cuda.OutOfMemoryError("no room")
        assert kept[-1]() is None

    model.register_forward_pre_hook(full)
    got, _, _ = sample.generate(model, inputs, sample.Sampling(steps=3))
    assert len(kept) == 1, "what did not fit once is not tried again"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_new_sampler_is_one_function_and_one_line(ckpt, tmp_path, monkeypatch):
    """Made on a copy of sample.py: the option, its help and the report know it."""
    source = (ROOT / "sample.py").read_text()
    assert source.count("SAMPLERS = {") == 1
    function = (
        "def sample_still(velocity, noise, steps=50, *, shift=5.0, progress=iter):\n"
        "    return noise - velocity(noise, torch.full((1,), 1000.0)).float()\n\n\n"
    )
    line = 'SAMPLERS = {"still": sample_still, '
    (tmp_path / "copied.py").write_text(source.replace("SAMPLERS = {", function + line))
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copied")
    arguments = [f"--ckpt={ckpt}", f"--out={tmp_path}/out", "--export=npz", "--sampler=still"]
    copied.main(config.apply(vars(copied), [*arguments, "--device=cpu"]))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["sampler"] == "still"


# ---- cameras
def test_a_camera_file_of_any_format_gives_the_same_path(tmp_path):
    w2c, _ = camera_paths.camera_move("orbit", 5, 1.0)
    w2c, K = w2c.double().numpy(), np.tile([0.9, 1.2, 0.5, 0.5], (5, 1))  # square pixels at 4 : 3
    want, want_K = camera_paths.load_camera("orbit", 5, (48, 64))
    for form, name in (
        ("re10k", "a.txt"),
        ("nerfstudio", "t.json"),
        ("colmap", "folder"),
        ("npz", "a.npz"),
        ("tum", "b.txt"),
        ("fantasyworld", "f.json"),
        ("worldscore", "w.json"),
    ):
        camera_files.write(tmp_path / name, form, w2c * [[[1, 1, 1, 2]]], K, (48, 64))
        got, got_K = camera_paths.load_camera(
            str(tmp_path / name),
            5,
            (48, 64),
            camera_paths.View(
                scene_scale=2.0,
                form=form if form in ("fantasyworld", "worldscore") else None,
                pictures=(48, 64) if form in ("fantasyworld", "worldscore") else None,
            ),
        )
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        if form != "tum":
            assert (
                abs(got_K[0, 0, 0, 0] - 0.9 * 64) < 1e-3
                and abs(got_K[0, 0, 1, 1] - 1.2 * 48) < 1e-3
            ), form
    assert abs(want_K[0, 0, 0, 0] - 32 / np.tan(np.radians(32.5))) < 1e-3


def test_intrinsics_of_a_wide_picture_are_cropped_as_the_picture_would_be():
    """Hand computed: 1600 x 900, f = 800 px.  Filling 100 x 100 scales by 1/9 and cuts 350 px a
    side: f = 800/9 px."""
    K = crop_intrinsics(np.array([[0.5, 800 / 900, 0.5, 0.5]]), 1600 / 900, (100, 100))
    np.testing.assert_allclose(K * 100, [[800 / 9, 800 / 9, 50, 50]])
    # 400 px: 50 past the cut
    K = crop_intrinsics(np.array([[0.5, 800 / 900, 0.25, 0.5]]), 1600 / 900, (100, 100))
    np.testing.assert_allclose(K[0, 2] * 100, 50 / 9)


def test_key_frames_stand_where_they_say_and_look_at_their_targets():
    w2c, _ = camera_paths.load_camera(
        "0,0,0 -> 0,0,2 | 0.4: 1,0,0 -> 0,0,2 | 1: 0,0,1 -> 0,0,2", 11, (48, 64)
    )
    centre = -(w2c[0, :, :, :3].mT @ w2c[0, :, :, 3:])[..., 0]
    for t, where in ((0, (0, 0, 0)), (4, (1, 0, 0)), (10, (0, 0, 1))):
        torch.testing.assert_close(centre[t], torch.tensor(where).float(), atol=1e-5, rtol=0)
        seen = w2c[0, t, :, :3] @ torch.tensor([0.0, 0, 2]) + w2c[0, t, :, 3]
        assert seen[:2].abs().max() < 1e-5 and seen[2] > 0


# ---- refusals: one line, exit status 2
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--camera=orbitt"], ["unknown camera move 'orbitt'", "nearest: orbit"]),
        (["--camera=nowhere.txt"], ["nowhere.txt", "no such file"]),
        (
            ["--camera=0,0 -> 0,0,1 | 1,0,0 -> 0,0,1"],
            ["key frame '0,0 -> 0,0,1'", "wanted x,y,z -> x,y,z"],
        ),
        (
            ["--camera=0:0,0,0 -> 0,0,1 | 0:1,0,0 -> 0,0,1"],
            ["--camera 0:0,0,0", "times [0.0, 0.0]; wanted rising shares"],
        ),
        (
            ["--camera=0,0,0 -> 0,1,0 | 1,0,0 -> 0,0,1"],
            ["--camera, key frame", "straight up, down"],
        ),
        (["--frames=6"], ["--frames 6", "4k + 1", "such as --frames 5"]),
        (["--height=33"], ["--height 33", "--height 32"]),
        (["--steps=0"], ["steps = 0, wanted at least 1, at most 1000"]),
        (["--export=video, obj"], ["--export obj: unknown", "glb"]),
        (["--prompt=prompts.txt"], ["--prompt prompts.txt: no such file"]),
        (["--image=missing.png"], ["missing.png: no such file. Check its name"]),
        (
            ["--scene_scale=missing.npy"],
            ["missing.npy: no such file. Check its name, or restore it"],
        ),
        (["--wan_dir=missing"], ["missing"]),
        (["--ckpt=missing.safetensors"], ["missing.safetensors"]),
        (["--ckpt=tiny"], ["tiny: not a checkpoint", "a folder; name a file in it, as latest"]),
        (["--width=1000000"], ["width = 1000000, wanted at least 0, at most 8192"]),
        (["--scene_scale=1e-6"], ["--scene_scale 1e-6: wanted 1e-5 to 1e9"]),
        (["--sampler=ddim"], ["sampler = 'ddim', wanted None, euler, unipc"]),
        (["--shift=0"], ["shift = 0.0, wanted above 0"]),
        (["--shift=nan"], ["shift = 'nan' is a text, wanted a number"]),
        (["--guidance=nan"], ["guidance = 'nan' is a text, wanted a number"]),
        (["--correct=everything"], ["--correct everything", "rays"]),
        (["--correct=rays"], ["--correct", "change nothing", "is no release. Leave it out"]),
        (["--release=x.pth"], ["--release", "is no run from a release. Leave it out"]),
        (["--guidance=1", "--negative_prompt=fog"], ["--negative_prompt", "--guidance is 1, no"]),
        (["--boundary=800"], ["--boundary", "is no pair of experts. Leave it out"]),
    ],
)
def test_user_errors_are_one_line_with_exit_status_2(
    ckpt, tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.setattr(
        sys,
        "argv",
        ["sample.py", f"--ckpt={ckpt}", f"--out={tmp_path}/o", "--device=cpu", *arguments],
    )
    with pytest.raises((ValueError, SystemExit)) as caught:
        sample.command()
    said = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert all(word in said for word in words), said
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2 and said.count("\n") == 1


def test_the_command_itself_exits_with_2_and_one_line(ckpt, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "sample.py"),
        f"--ckpt={ckpt}",
        f"--out={tmp_path}/o",
        "--camera=orbitt",
    ]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("sample.py: unknown camera move")


def test_help_is_grouped_and_shows_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        config.apply(vars(sample), ["--help"])
    said = capsys.readouterr().out
    for words in (
        "what to sample:",
        "camera:",
        "size:",
        "sampling:",
        "machine:",
        "files:",
        "--fov=65.0",
        "--camera='orbit'",
        "--low_memory",
    ):
        assert words in said, words
    assert caught.value.code == 0


def test_sampling_is_as_typed_or_as_the_checkpoint_says_or_wans():
    options = config.apply(vars(sample), ["--steps=3", "--ckpt=x"])
    found = sample.sampling_of(options, dict(sampling=dict(steps=8, guidance=1.0)))
    assert found == {**sample.WANS, "steps": 3, "guidance": 1.0}
    for own, said in ((dict(step=8), "did you mean 'steps'"), (dict(steps="8"), "wanted")):
        with pytest.raises(ValueError, match=f"x: sampling.*{said}"):
            sample.sampling_of(options, dict(sampling=own))
