"""A Wan2.1 folder: every family loads or is refused by name, loading is lean, caches hold what the
encoders say, and encode -> stage 1 -> stage 2 -> sample run as in the README on a tiny complete
folder."""

import gc
import json
import pathlib
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import options_of
from test_train import run
from wan_folder import OVERRIDES, keys, write_wan_folder

import data
from encoders import WanFolder, wan_family
from lib import caches, weights
from lib.caches import read_header, save_tensors
from lib.files import read_video
from lib.rooms import Recipe, synth
from lib.weights import FAMILIES, fingerprint, load_wan
from model import Config
from wan import WanDiT

GOLDEN = pathlib.Path(__file__).parent / "golden"

ROOT = pathlib.Path(__file__).parents[1]

TINY = Config(head_dim=32)


def meta(release):
    return {name: torch.empty(shape, device="meta") for name, shape in keys.FAM[release][0].items()}


# ---- families
@pytest.mark.parametrize(
    "release, inputs, clip, parameters",
    [
        ("Wan2.1-T2V-1.3B", 16, False, 1_418_996_800),
        ("Wan2.1-Fun-1.3B-InP (=V1.1-InP)", 36, True, 1_564_428_608),
        ("Wan2.1-Fun-V1.1-1.3B-Control-Camera", 32, True, 1_616_313_152),
        ("Wan2.1-T2V-14B", 16, False, 14_288_491_584),
        ("Wan2.1-I2V-14B-480P / Fun-14B-InP", 36, True, 16_394_878_784),
        ("Wan2.1-Fun-V1.1-14B-Control-Camera", 32, True, 16_898_128_704),
    ],
)
def test_the_names_and_shapes_of_a_release_load_strictly_and_are_recognised(
    release, inputs, clip, parameters
):
    sd = meta(release)
    dit = WanDiT.from_state_dict(sd)
    assert sum(p.numel() for p in dit.parameters()) == parameters
    assert (dit.sizes.in_dim, dit.img_emb is not None, dit.control_adapter is not None) == (
        inputs,
        clip,
        "Camera" in release,
    )
    assert FAMILIES[fingerprint({k: tuple(v.shape) for k, v in sd.items()})].split()[0] in release


@pytest.mark.parametrize(
    "release, what",
    [
        ("Wan2.1-FLF2V-14B-720P", "FLF2V"),
        ("Wan2.1-Fun-V1.1-1.3B-Control", "reference frame of Fun-V1.1-Control"),
        ("Wan2.1-Fun-1.3B-Control", "48 input channels"),
        ("Wan2.1_VAE.pth", "not a Wan2.1 DiT"),
        ("umt5-xxl encoder .pth", "not a Wan2.1 DiT.*patch_embedding.weight"),
    ],
)
def test_other_families_and_models_are_refused_with_what_is_unsupported(release, what):
    with pytest.raises(ValueError, match=what):
        WanDiT.from_state_dict(meta(release))


# ---- loading
@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN / "dit_t2v_hd32.pt", weights_only=True)


def shards(folder, sd, count):
    index = {}
    for i in range(count):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({k: sd[k] for k in list(sd)[i::count]}, folder / file)
        index.update(dict.fromkeys(list(sd)[i::count], file))
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(dict(weight_map=index))
    )


@pytest.mark.parametrize("form", ["one file", "shards", "pth", "model.", "pipe.dit."])
def test_a_folder_loads_from_one_file_shards_or_pth_with_and_without_prefix(
    golden, tmp_path, form, capsys
):
    sd = golden["state_dict"]
    if form == "shards":
        shards(tmp_path, sd, 3)
    elif form == "pth":
        torch.save(sd, tmp_path / "diffusion_pytorch_model.pth")
    else:
        prefix = form if form.endswith(".") else ""
        save_file(
            {prefix + k: v for k, v in sd.items()}, tmp_path / "diffusion_pytorch_model.safetensors"
        )
    dit, cfg = load_wan(tmp_path.as_posix(), TINY)
    assert all(torch.equal(v, sd[k]) for k, v in dit.state_dict().items())
    found = (cfg.dim, cfg.in_dim, cfg.num_layers, cfg.text_dim, cfg.has_clip, cfg.has_control)
    assert found == (64, 16, 3, 48, False, False)
    assert "no release has: dim 64" in capsys.readouterr().out
    half, _ = load_wan(tmp_path.as_posix(), TINY, "cpu", torch.bfloat16)
    assert (
        half.blocks[0].ffn[0].weight.dtype == torch.bfloat16
        and half.head.head.weight.dtype == torch.float32
    )
    assert half.blocks[0].modulation.dtype == half.blocks[0].norm3.weight.dtype == torch.float32


def test_missing_cut_double_and_foreign_files_are_named(golden, tmp_path):
    sd, folder = golden["state_dict"], tmp_path.as_posix()
    with pytest.raises(ValueError, match="no diffusion_pytorch_model.*latest.safetensors"):
        load_wan(folder, TINY)
    shards(tmp_path, sd, 3)
    last = tmp_path / "diffusion_pytorch_model-00003-of-00003.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match="00003-of-00003.safetensors: [0-9,]+ bytes that cannot be read"
    ):
        load_wan(folder, TINY)
    last.unlink()
    with pytest.raises(
        ValueError, match="index.json: 1 of 3 shards are missing, first .*00003-of-00003"
    ):
        load_wan(folder, TINY)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(
        ValueError, match="text_embedding.0.weight' is missing .*A shard is missing"
    ):
        load_wan(folder, TINY)
    last.write_bytes(whole)
    save_file({list(sd)[2]: sd[list(sd)[2]]}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="is also in another file"):
        load_wan(folder, TINY)
    with pytest.raises(ValueError, match="head_dim"):
        WanDiT.from_state_dict({k: v for k, v in sd.items()}, head_dim=128)


def test_loading_reads_every_tensor_once(golden, tmp_path, monkeypatch):
    shards(tmp_path, golden["state_dict"], 2)
    read, lazy = [], weights.lazy_tensors

    def counting(path):
        return {
            name: (shape, lambda name=name, get=get: (read.append(name), get())[1])
            for name, (shape, get) in lazy(path).items()
        }

    monkeypatch.setattr(weights, "lazy_tensors", counting)
    load_wan(tmp_path.as_posix(), TINY)
    assert sorted(read) == sorted(golden["state_dict"])


# VmHWM, not ru_maxrss: that one starts at the size of the process that we were started from.  A
# small model first: the meta device makes torch import 70 MB of its own code.
MEASURE = """
import re, sys, torch
from lib.weights import load_wan
from model import PRESETS, Config, FantasyWorld
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
with torch.device("meta"):
    FantasyWorld(PRESETS["tiny"])
before = peak()
dtype = torch.bfloat16 if sys.argv[2] == "bf16" else None
dit, _ = load_wan(sys.argv[1], Config(head_dim=32), "cpu", dtype)
print((peak() - before) / sum(p.nbytes for p in dit.parameters()))
"""


@pytest.mark.parametrize("stored, wanted", [("float32", "bf16"), ("bfloat16", "fp32")])
def test_loading_takes_no_more_host_memory_than_1_2_times_the_weights(tmp_path, stored, wanted):
    shapes = keys.dit(
        dim=512, ffn=2048, layers=12, in_dim=16, clip=False, text=64, freq=64
    )  # 51 M parameters
    shards(
        tmp_path,
        {name: torch.zeros(shape, dtype=getattr(torch, stored)) for name, shape in shapes.items()},
        2,
    )
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), wanted],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert float(result.stdout.split()[-1]) < 1.2, result.stdout + result.stderr


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
    assert (
        len(cached["text"]) == len(re.findall(r"\w+|[^\w\s]+", sample["prompt"])) + 1
    )  # words and </s>
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
    whole = weights.wan_tensors(wan)
    sd = {f"{prefix}{name}": read().contiguous() for name, (_, read) in whole.items()}
    path = tmp_path / f"diffusion_pytorch_model.{suffix.split('.')[-1]}"
    if suffix == "safetensors":
        save_file(sd, path)
    elif suffix == "old.pth":
        torch.save(sd, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"epoch": 3, "state_dict": sd} if "nested" in suffix else sd, path)
    found = weights.wan_tensors(tmp_path)
    assert {k: s for k, (s, _) in found.items()} == {k: s for k, (s, _) in whole.items()}
    assert wan_family(tmp_path) == wan_family(wan) != ""


def test_fp8_with_scales_and_a_missing_shard_are_named_by_every_reader(wan, tmp_path):
    whole = {name: read().contiguous() for name, (_, read) in weights.wan_tensors(wan).items()}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({**whole, "blocks.0.ffn.0.scale_weight": torch.ones(1)}, path)
    for reader in (wan_family, weights.wan_tensors):
        with pytest.raises(ValueError, match="fp8 with scales.*bf16"):
            reader(tmp_path)
    save_file({k: v for k, v in whole.items() if "blocks.0." not in k and "head" not in k}, path)
    with pytest.raises(ValueError, match="Wan2.1 DiT|sizes cannot be read|missing"):
        wan_family(tmp_path)
