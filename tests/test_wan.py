"""A Wan2.1 folder in use: caches hold what the encoders say, and encode -> stage 1 -> stage 2 ->
sample run as in the README on a tiny complete folder."""

import gc
import re
import shutil
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import options_of
from test_train import run
from wan_folder import OVERRIDES, write_wan_folder

import data
from encoders import WanFolder, wan_family, wan_tensors
from lib import caches
from lib.caches import read_header, save_tensors
from lib.files import read_video
from lib.rooms import Recipe, synth


# ---- caches
@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_wan_folder(tmp_path_factory.mktemp("wan") / "Camera")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    synth(root, Recipe(num=3, num_frames=13, height=32, width=48, seed=0, variety="simple", val=1))
    return root


def copy_of(clips, tmp_path):
    return shutil.copytree(clips, tmp_path / "clips", ignore=shutil.ignore_patterns("cache"))


def test_a_cache_file_holds_what_the_encoders_say(clips, wan, tmp_path):
    root = copy_of(clips, tmp_path)
    assert data.encode(root, 32, 48, 5, how=data.Encoding(wan_dir=wan, split="val")) == 0
    sample, encoders = data.load_samples(root, "val")[0], WanFolder(wan, "cpu")
    assert wan_family(wan) == "wan32clip" and encoders.fingerprint.startswith("wan32clip-")
    cached = load_file(next(root.glob("cache/5x32x48-wan32clip-*/val_000000.safetensors")))
    video, vae = data.load_clip(sample, 32, 48, 5)["video"][None], encoders.load_vae()
    want = dict(
        latents=vae.encode(video)[0],
        start_latents=vae.encode(video[:, :, :1])[0],
        clip=encoders.load_image()(video[:, :, 0])[0],
        text=encoders.load_text()([sample["prompt"]])[0],
    )
    for name, value in want.items():
        assert torch.equal(cached[name], value.bfloat16()), name
    assert cached["clip"].shape == (257, 1280)
    # words and </s>
    assert len(cached["text"]) == len(re.findall(r"\w+|[^\w\s]+", sample["prompt"])) + 1
    assert not list(root.glob("cache/*/.parts"))


def test_image_to_video_families_cache_the_image_followed_by_grey(clips, tmp_path):
    root, wan = (
        copy_of(clips, tmp_path),
        write_wan_folder(tmp_path / "InP", in_dim=36, camera=False, prefix="model."),
    )
    data.encode(root, 32, 48, 5, how=data.Encoding(wan_dir=wan, split="val"))
    clip = data.CachedClips(root, "val", (32, 48, 5), wan)[0]
    video = data.load_clip(data.load_samples(root, "val")[0], 32, 48, 5)["video"][None].clone()
    video[:, :, 1:] = 0
    want = WanFolder(wan, "cpu").load_vae().encode(video)[0]
    assert clip["start_latents"].shape == (16, 2, 4, 6)
    torch.testing.assert_close(clip["start_latents"].float(), want.bfloat16().float())


def test_each_encoder_is_freed_before_the_next_is_loaded(clips, wan, tmp_path, monkeypatch):
    alive, seen = [], []
    for name in ("load_text", "load_clip", "load_vae"):
        original = getattr(WanFolder, name)

        def load(self, original=original, name=name):
            gc.collect()
            seen.append((name, sum(ref() is not None for ref in alive)))
            part = original(self)
            alive.append(weakref.ref(part))
            return part

        monkeypatch.setattr(WanFolder, name, load)
    data.encode(copy_of(clips, tmp_path), 32, 48, 5, how=data.Encoding(wan_dir=wan, split="val"))
    assert seen == [("load_text", 0), ("load_clip", 0), ("load_vae", 0)]


def test_a_killed_run_goes_on_where_it_was_and_ranks_share_the_clips(
    clips, wan, tmp_path, monkeypatch
):
    root, whole, save = (
        copy_of(clips, tmp_path / "a"),
        copy_of(clips, tmp_path / "b"),
        caches.save_clip,
    )
    data.encode(whole, 32, 48, 5, how=data.Encoding(wan_dir=wan))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")

    def killed(path, *args):  # at its second clip of the last pass
        if list(path.parent.glob("*_0*.safetensors")):
            raise KeyboardInterrupt
        save(path, *args)

    monkeypatch.setattr(caches, "save_clip", killed)
    with pytest.raises(KeyboardInterrupt):
        data.encode(root, 32, 48, 5, how=data.Encoding(wan_dir=wan))
    parts = sorted(root.glob("cache/*/.parts/*"))
    assert [p.name for p in parts] == [
        "train_000002.clip.safetensors",
        "train_000002.text.safetensors",
    ]
    monkeypatch.setattr(caches, "save_clip", save)
    for path in parts:  # a mark that only reading, not computing again, leaves
        save_tensors(path, {k: v + 1 for k, v in load_file(path).items()}, read_header(path)[0])
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        data.encode(root, 32, 48, 5, how=data.Encoding(wan_dir=wan))
    for path in whole.glob("cache/*/*.safetensors"):
        want, got = load_file(path), load_file(next(root.glob(f"cache/*/{path.name}")))
        for name in want:
            added = path.stem == "train_000002" and name in ("clip", "text")
            assert torch.equal(got[name], want[name] + added if added else want[name])


def test_a_corrupt_clip_is_reported_left_out_and_fails_the_command(
    clips, wan, tmp_path, monkeypatch, capsys
):
    root = copy_of(clips, tmp_path)
    (root / "train_000001" / "video.mp4").write_bytes(b"broken")
    command = f"data.py encode {root} --wan_dir {wan} --height 32 --width 48 --num_frames 5"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stop:
        data.command()
    text = "".join(capsys.readouterr())
    assert stop.value.code == 1 and "train_000001/video.mp4: not a readable video" in text
    assert "3 encoded, 0 kept, skipped: train_000001" in text
    with pytest.raises(
        ValueError, match="1 of 3 train clips cannot be trained on\n  train_000001: not encoded"
    ):
        data.CachedClips(root, "train", (32, 48, 5), wan)
    assert len(data.CachedClips(root, "train", (32, 48, 5), wan, skip_bad=True)) == 2


def test_a_missing_cache_or_encoder_file_is_named_with_the_cure(clips, wan, tmp_path):
    root = copy_of(clips, tmp_path)
    cure = f"python data.py encode {root} --wan_dir {wan} --height 32 --width 48 --num_frames 9"
    with pytest.raises(ValueError, match=cure):
        data.CachedClips(root, "train", (32, 48, 9), wan)
    (tmp_path / "wan").mkdir()
    for file in wan.glob("diffusion*"):
        (tmp_path / "wan" / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        data.encode(root, 32, 48, 5, how=data.Encoding(wan_dir=tmp_path / "wan"))


def test_random_windows_repeat_themselves_and_stay_inside_the_clip(clips):
    sample = data.load_samples(clips)[0]
    how = data.Encoding(stride=2, start=1, windows=6)
    found = [replace(how, window_seed=seed).places(sample, 5) for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]
    assert all(1 <= start <= 13 - 9 and stride == 2 for start, stride in found[0] + found[2])
    several = data.Encoding(stride="1,2,4", windows=8, window_seed=1).places(sample, 5)
    assert {stride for _, stride in several} == {1, 2}  # 13 frames have no room for 4 x 4 + 1
    assert all(start + 4 * stride < 13 for start, stride in several)
    with pytest.raises(ValueError, match="--stride 1,x: wanted a whole number"):
        data.Encoding(stride="1,x").places(sample, 5)
    assert data.Encoding(windows=3).places(sample, 5) == [(0, 1), (4, 1), (8, 1)]
    assert data.Encoding(start=2).places(sample, 5) == [(2, 1)]


def test_a_dropped_start_image_takes_its_clip_tokens_with_it():
    import train

    b = dict(
        latents=torch.randn(2, 16, 2, 4, 4),
        y=torch.ones(2, 16, 2, 4, 4),
        clip=torch.ones(2, 257, 8),
        text=["", ""],
    )
    for probability, left in ((1.0, 0), (0.0, 1)):
        options = options_of(train, image_dropout=probability)
        dropped = train.draw(b, 0, range(2), total=2, empty_text="", options=options)[3]
        assert dropped["clip"].eq(left).all() and dropped["y"].eq(left).all()


# ---- the commands of the README for real weights
def test_encode_stage_1_stage_2_and_sample_run_on_a_complete_folder(clips, wan, tmp_path):
    root = copy_of(clips, tmp_path)
    size = ["--height", 32, "--width", 48, "--num_frames", 5]
    run("data.py", "encode", root, "--wan_dir", wan, *size, alone=True)
    common = [
        f"--wan_dir={wan}",
        f"--data_dir={root}",
        "--height=32",
        "--width=48",
        "--num_frames=5",
        "--num_workers=0",
        "--batch_size=1",
        "--grad_accum=2",
        "--max_steps=2",
        "--log_every=1",
        "--eval_every=2",
        "--device=cpu",
        f"--model_overrides={OVERRIDES}",
    ]
    text = run("train.py", "config/stage1.py", *common, f"--out_dir={tmp_path}/s1")
    assert "step 2/2 | loss/depth" in text and "has_clip True, has_control True" in text
    text = run(
        "train.py",
        "config/stage2.py",
        *common,
        f"--out_dir={tmp_path}/s2",
        f"--init_from={tmp_path}/s1/latest.safetensors",
        "--precision=bf16",
    )
    assert "step 2/2 | loss/diffusion" in text
    run(
        "sample.py",
        "--ckpt",
        tmp_path / "s2" / "latest.safetensors",
        "--prompt",
        "a room with a red box",
        "--camera",
        "forward",
        "--image",
        root / "train_000000" / "video.mp4",
        "--sampler",
        "unipc",
        "--steps",
        2,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    assert read_video(tmp_path / "out" / "video.mp4")[0].shape == (5, 32, 48, 3)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "module._orig_mod.", "ema.model."])
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "old.pth", "nested.pth"])
def test_other_programs_wrappings_are_taken_off(wan, tmp_path, prefix, suffix):
    whole = wan_tensors(wan)
    sd = {f"{prefix}{name}": read().contiguous() for name, (_, read) in whole.items()}
    path = tmp_path / f"diffusion_pytorch_model.{suffix.split('.')[-1]}"
    if suffix == "safetensors":
        save_file(sd, path)
    elif suffix == "old.pth":
        torch.save(sd, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"epoch": 3, "state_dict": sd} if "nested" in suffix else sd, path)
    found = wan_tensors(tmp_path)
    assert {k: s for k, (s, _) in found.items()} == {k: s for k, (s, _) in whole.items()}
    assert wan_family(tmp_path) == wan_family(wan) != ""


def test_fp8_with_scales_and_a_missing_shard_are_named_by_every_reader(wan, tmp_path):
    whole = {name: read().contiguous() for name, (_, read) in wan_tensors(wan).items()}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({**whole, "blocks.0.ffn.0.scale_weight": torch.ones(1)}, path)
    for reader in (wan_family, wan_tensors):
        with pytest.raises(ValueError, match="fp8 with scales.*bf16"):
            reader(tmp_path)
    save_file({k: v for k, v in whole.items() if "blocks.0." not in k and "head" not in k}, path)
    with pytest.raises(ValueError, match="Wan2.1 DiT|sizes cannot be read|missing"):
        wan_family(tmp_path)
    path.unlink()
    for name in ("diffusion_pytorch_model-1", "diffusion_pytorch_model-2"):
        save_file(whole, tmp_path / f"{name}.safetensors")
    for reader in (wan_family, wan_tensors):  # data.py encode took it, train.py did not
        with pytest.raises(ValueError, match="is also in another file; remove one of them"):
            reader(tmp_path)
