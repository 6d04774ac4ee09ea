"""train.py and sample.py as a user runs them: the three stages, two ranks, resume, records,
refusals."""

import json
import math
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import TINY, command_here, options_of, ranks_here, tiny_model, train_here

from encoders import MINIATURE
from lib.camera_files import read_cameras
from lib.distributed import Ranks
from lib.files import read_video
from lib.log import by_sigma
from lib.rooms import Recipe, synth

ROOT = pathlib.Path(__file__).parents[1]

SIZES = {k: v for k, v in TINY.__dict__.items()}


def run(*args, ranks=0, ok=True, restarts=0, alone=False):
    """One command as in the repository root, in this process unless it has ranks or runs alone;
    returns its output."""
    if not ranks and not alone:
        training = args[0] == "train.py" and args[1] != "--check"
        code, text = train_here(*args[1:]) if training else command_here(*args)
        assert (code == 0) == ok, (code, text)
        return text + str(code)
    if ranks:
        code, text = ranks_here(ranks, *args, restarts=restarts)
        assert (code == 0) == ok, text
        return text
    result = subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert (result.returncode == 0) == ok, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A rendered dataset and the options of a tiny run on it."""
    root = tmp_path_factory.mktemp("world")
    sizes = dict(num=8, num_frames=5, height=32, width=48)
    synth(root / "clips", Recipe(**sizes, seed=0, variety="simple", cache_only=True, val=2))
    options = [
        f"--data_dir={root}/clips",
        "--height=32",
        "--width=48",
        "--num_frames=5",
        "--num_workers=0",
        "--batch_size=2",
        "--warmup_steps=0",
        "--optimizer=adamw",
        "--log_every=1",
        "--eval_clips=2",
        f"--model_overrides={SIZES}",
        "--device=cpu",
    ]
    return root, options


@pytest.fixture(scope="session")
def stages(world):
    """Stages 0, 1 and 2, two steps each."""
    root, options = world
    shutil.copytree(MINIATURE, root / "wan")  # its encoders, and a random DiT of other widths
    dit = {name: value.contiguous() for name, value in tiny_model(0).dit.state_dict().items()}
    save_file(dit, root / "wan" / "diffusion_pytorch_model.safetensors")
    zero = [f"--wan_dir={root}/wan", f"--out_dir={root}/s0", "--max_steps=2"]
    run("train.py", "config/tiny0.py", *options, *zero)
    run(
        "train.py",
        "config/tiny1.py",
        *options,
        "--max_steps=2",
        f"--out_dir={root}/s1",
        f"--wan_dir={root}/s0",
        "--eval_every=2",
    )
    run(
        "train.py",
        "config/tiny2.py",
        *options,
        "--max_steps=2",
        f"--out_dir={root}/s2",
        f"--wan_dir={root}/s0",
        f"--init_from={root}/s1/latest.safetensors",
    )
    return root, options


def test_each_stage_leaves_its_trainable_tensors_a_latest_link_and_records(stages):
    root, _ = stages
    for stage, has, has_not in (
        (0, "dit.", "bridge."),
        (1, "bridge.", "exchange."),
        (2, "exchange.", "dit."),
    ):
        out = root / f"s{stage}"
        assert os.path.samefile(out / "latest.safetensors", out / "step-2.safetensors")
        with safe_open(out / "latest.safetensors", "pt") as file:
            meta, names = file.metadata(), list(file.keys())
        assert any(n.startswith(has) for n in names) and not any(
            n.startswith(has_not) for n in names
        )
        assert (
            meta["stage"] == str(stage)
            and meta["step"] == "2"
            and meta["git"]
            and json.loads(meta["train_config"])
        )
        assert (out / "config.json").is_file() and list((out / "tensorboard").iterdir())
        log = (out / "training.log").read_text()
        assert "step 2/2 | loss/" in log
        bins = [
            line.split(" | ")[1:] for line in log.splitlines() if line.startswith("# sigma step 2 ")
        ]
        names = {part.split()[0] for part in bins[0]}
        assert names == [{"diffusion"}, {"depth_l1"}, {"diffusion", "depth_l1"}][stage]
        for name, share, value in (part.split() for part in bins[0]):  # depth_l1 0.75-1.00 0.4
            low, high = map(float, share.split("-"))
            assert high - low == 0.25 and float(value) > 0
    assert (root / "s1" / "eval" / "step-2.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_has_the_scalars_of_the_guide(stages):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(stages[0] / "s2" / "tensorboard")).Reload()
    assert {
        "loss/diffusion",
        "loss/depth",
        "loss/point",
        "loss/camera",
        "loss/total",
        "learning_rate",
        "gpu_memory",
        "samples_per_second",
        "gradient_norm",
        "mfu",
    } <= set(board.Tags()["scalars"])
    assert {
        "loss/tgm",
        "loss/frame",
        "loss/depth_conf_mean",
        "loss/point_conf_mean",
        "loss/valid_fraction",
        "loss/tgm_fraction",
    } <= set(board.Tags()["scalars"])
    assert any(tag.startswith("sigma/depth_l1 ") for tag in board.Tags()["scalars"])


def test_evaluation_prints_both_stages_beside_both_baselines(stages):
    root, options = stages
    text = run(
        "train.py",
        "config/tiny2.py",
        *options,
        "--eval_only=True",
        f"--out_dir={root}/eval",
        f"--wan_dir={root}/s0",
        f"--init_from={root}/s1/latest.safetensors,{root}/s2/latest.safetensors",
    )
    for row in (
        "baseline fair",
        "baseline oracle",
        "stage 1 step 2, poses given",
        "stage 1 step 2, no poses",
        "stage 2 step 2, poses given",
        "stage 2 step 2, no poses",
    ):
        assert row in text
    rows = json.loads((root / "eval" / "eval.json").read_text())
    aligned = {
        f"{name}{how}"
        for name in ("abs_rel", "delta1", "delta2", "delta3", "rmse")
        for how in ("", "_median", "_scale_shift")
    }
    geometry = aligned | {
        "tae",
        "points",
        "points_rel",
        "accuracy",
        "completeness",
        "chamfer",
        "f_score",
    }
    cameras = {"rot_deg", "trans", "ate", "rpe_trans", "rpe_rot", "auc30"}
    own = geometry | cameras | {"agreement", "ause", "ause_points"}
    for name, row in rows.items():
        want = geometry if "oracle" in name else geometry | cameras if "fair" in name else own
        assert want <= set(row) and all(math.isfinite(row[k]) for k in want), (
            name,
            want ^ set(row),
        )
    for given in ("poses given", "no poses"):  # and read out at more noise levels
        assert {f"stage 2 step 2, {given}{s}" for s in ("", ", sigma 0.5", ", sigma 0.9")} <= set(
            rows
        )
    table = text[text.index("AbsRel") :]
    assert all(
        f"\n{key} " in table
        for key in own
        - {"abs_rel", "delta1", "tae", "points", "f_score", "agreement", "ause", "rot_deg", "trans"}
    )


def test_resumed_run_equals_uninterrupted_run_bitwise(stages):
    root, options = stages
    common = ["config/tiny1.py", *options, f"--wan_dir={root}/s0", "--lr_schedule=constant"]
    run("train.py", *common, "--max_steps=3", f"--out_dir={root}/whole")
    run("train.py", *common, "--max_steps=2", f"--out_dir={root}/parts")
    text = run("train.py", *common, "--max_steps=3", f"--out_dir={root}/parts")
    assert "steps 2 .. 3" in text
    whole, parts = (
        load_file(root / "whole" / "latest.safetensors"),
        load_file(root / "parts" / "latest.safetensors"),
    )
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    # a cut newest checkpoint is passed over: the run goes on from the one before, to the same end
    newest = root / "parts" / "step-3.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert "passed over" in run("train.py", *common, "--max_steps=3", f"--out_dir={root}/parts")
    parts = load_file(root / "parts" / "latest.safetensors")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    text = run(
        "train.py", *common, "--max_steps=1", "--resume=", f"--out_dir={root}/parts", ok=False
    )
    assert "holds checkpoints later than step 0" in text


def test_every_stage_resumes_by_the_same_command(stages):
    root, options = stages
    for stage, more in (
        (2, [f"--wan_dir={root}/s0", f"--init_from={root}/s1/latest.safetensors"]),
        (0, []),
    ):
        # A copy: what was trained on stage 0 as it is refuses one that went on.
        shutil.copytree(root / f"s{stage}", root / f"on{stage}")
        text = run(
            "train.py",
            f"config/tiny{stage}.py",
            *options,
            *more,
            "--max_steps=3",
            f"--out_dir={root}/on{stage}",
        )
        assert "steps 2 .. 3" in text and (root / f"on{stage}" / "step-3.safetensors").is_file()


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_with_whole_or_spread_weights_take_the_step_of_one_process_with_both_clips(
    stages, stage
):
    root, options = stages
    common = [f"config/tiny{stage}.py", *options, f"--wan_dir={root}/s0", "--max_steps=1"]
    common += [f"--init_from={root}/s1/latest.safetensors"] if stage == 2 else []
    run("train.py", *common, f"--out_dir={root}/one{stage}", "--batch_size=2")
    run("train.py", *common, f"--out_dir={root}/two{stage}", "--batch_size=1", ranks=2)
    others = [f"two{stage}"]
    if stage == 2 and torch.__version__ >= (2, 7):  # what shard_weights needs
        text = run(
            "train.py",
            *common,
            f"--out_dir={root}/spread2",
            "--batch_size=1",
            "--shard_weights=True",
            "--eval_every=1",
            "--eval_clips=1",
            ranks=2,
        )  # one clip on two ranks: both make its forwards
        assert "# val step 1 poses given" in text
        others.append("spread2")
    one = load_file(root / f"one{stage}" / "step-1.optim.safetensors")
    for other in others:
        found = load_file(root / other / "step-1.optim.safetensors")
        # first moments are the averaged gradients; AdamW's first step would hide their size
        for name in one:
            torch.testing.assert_close(found[name], one[name], rtol=1e-4, atol=1e-6)


def test_the_batch_of_a_step_does_not_depend_on_the_number_of_ranks():
    import train

    options = options_of(train, batch_size=2, grad_accum=2, max_steps=3, seed=5)
    one = list(train.Batches([7], options, Ranks()))
    options = options.replaced(grad_accum=1)
    two = [list(train.Batches([7], options, Ranks(rank, 2))) for rank in (0, 1)]
    for step in range(3):
        assert one[2 * step] + one[2 * step + 1] == two[0][step] + two[1][step]
    assert list(train.Batches([7], options, Ranks(0, 2), first_step=1)) == two[0][1:]


def test_values_are_summed_and_counted_in_four_bins_of_the_noise_level():
    """Sigma .1 .2 | .25 | none | .8 1: sums 1 + 2, 4, 0, 8 + 16 of the value, and how many there
    are."""
    sigma = torch.tensor([0.1, 0.2, 0.25, 0.8, 1])
    value = torch.tensor([1.0, 2, 4, 8, 16], requires_grad=True)
    sums = by_sigma(sigma, value)
    assert sums.tolist() == [[3, 2], [4, 1], [0, 0], [24, 2]] and not sums.requires_grad
    assert by_sigma(sigma, 10 * value).tolist() == [[30, 2], [40, 1], [0, 0], [240, 2]]


def test_sampling_writes_every_file_and_repeats_itself(stages):
    root, _ = stages
    for stage in (1, 2):
        common = [
            "sample.py",
            f"--ckpt={root}/s{stage}/latest.safetensors",
            "--prompt=a room with two boxes",
            "--camera=orbit",
            "--steps=2",
            "--device=cpu",
        ]
        text = run(*common, f"--out={root}/sample{stage}")
        assert "predicted against commanded" in text
        out = root / f"sample{stage}"
        assert read_video(out / "video.mp4")[0].shape == (5, 32, 48, 3)
        assert read_video(out / "depth.mp4")[0].shape == (5, 32 + 14, 48, 3)  # and its legend
        w2c, fractions = read_cameras(out / "cameras.txt")
        assert len(w2c) == 5 and abs(w2c[0] - torch.eye(4).numpy()[:3]).max() < 1e-6
        header, _, body = (out / "points.ply").read_bytes().partition(b"end_header\n")
        count = int(header.split(b"element vertex ")[1].split()[0])
        assert (
            count > 100 and len(body) == 15 * count and len(struct.unpack("<3f3B", body[:15])) == 6
        )
        assert (out / "sheet.png").read_bytes().startswith(b"\x89PNG") and (
            out / "depth.npz"
        ).is_file()
    run(*common, f"--out={root}/again", alone=True)
    assert (root / "again" / "video.mp4").read_bytes() == (
        root / "sample2" / "video.mp4"
    ).read_bytes()


# ---- refusals: each names the option or file, what was found and the cure
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_without_validation_clips_trains_on_and_says_so(world, tmp_path, workers):
    """The README's own single clip has "val": []."""
    root, options = world
    shutil.copytree(root / "clips", tmp_path / "clips")
    meta = json.loads((tmp_path / "clips" / "metadata.json").read_text())
    meta["splits"]["val"] = []
    (tmp_path / "clips" / "metadata.json").write_text(json.dumps(meta))
    more = [f"--data_dir={tmp_path}/clips", f"--num_workers={workers}", "--eval_every=1"]
    more += ["--max_steps=2", f"--out_dir={tmp_path}/s0"]
    text = run("train.py", "config/tiny0.py", *options, *more)
    assert "8 + no val: nothing is evaluated" in text and "step 2/2" in text
    meta["splits"]["train"] = []
    (tmp_path / "clips" / "metadata.json").write_text(json.dumps(meta))
    text = run("train.py", "config/tiny0.py", *options, *more, "--resume=", ok=False)
    assert "no samples in split 'train'" in text


def test_stage_2_refuses_a_checkpoint_of_stage_0(stages):
    text = run(
        "train.py", "config/tiny2.py", f"--init_from={stages[0]}/s0/latest.safetensors", ok=False
    )
    assert "starts from a stage 1 checkpoint" in text


def test_a_run_goes_on_when_the_checkpoint_that_it_started_from_is_gone(stages, tmp_path):
    root, options = stages
    common = ["train.py", "config/tiny2.py", *options, f"--wan_dir={root}/s0", "--max_steps=3"]
    for name, start in (("kept", root / "s1/latest.safetensors"), ("gone", "gone.safetensors")):
        shutil.copytree(root / "s2", tmp_path / name)
        run(*common, f"--init_from={start}", f"--out_dir={tmp_path}/{name}")
    kept, gone = (load_file(tmp_path / name / "step-3.safetensors") for name in ("kept", "gone"))
    assert kept.keys() == gone.keys() and all(torch.equal(kept[k], gone[k]) for k in kept)
    said = run(*common, "--init_from=gone.safetensors", f"--out_dir={tmp_path}/new", ok=False)
    assert "gone.safetensors: not a checkpoint" in said
