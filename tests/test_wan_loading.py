"""A Wan2.1 folder as tensors: every family loads or is refused by name, and loading is lean."""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from wan_folder import keys, write_wan_folder

import encoders
from encoders import PARTS, WanFolder
from lib import weights
from lib.weights import FAMILIES, fingerprint, load_wan
from model import Config
from wan import WanDiT

GOLDEN = pathlib.Path(__file__).parent / "golden"


ROOT = pathlib.Path(__file__).parents[1]


TINY = Config(head_dim=32)


def meta(release):
    return {name: torch.empty(shape, device="meta") for name, shape in keys.FAM[release][0].items()}


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


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    return write_wan_folder(tmp_path_factory.mktemp("downloaded") / "W")


@pytest.mark.parametrize("part", ["diffusion_pytorch_model-00002-of-00003.safetensors", *PARTS])
@pytest.mark.parametrize(
    "start", ["version https://git-lfs.github.com/spec/v1", "/annex/objects/S"]
)
def test_a_pointer_in_the_place_of_a_file_is_named_before_anything_is_loaded(
    downloaded, tmp_path, part, start
):
    folder = pathlib.Path(shutil.copytree(downloaded, tmp_path / "W", symlinks=True))
    (folder / PARTS.get(part, part)).write_text(f"{start}\noid sha256:4665\n")
    with pytest.raises(ValueError, match=f"{PARTS.get(part, part)}.*not finished.*git lfs pull"):
        WanFolder(folder, "cpu")


def test_a_pointer_in_the_place_of_a_checkpoint_is_named_too(tmp_path):
    path = tmp_path / "fantasyworld.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665\n")
    with pytest.raises(ValueError, match="fantasyworld.safetensors.*git lfs pull"):
        weights.metadata_of(path)


def test_a_file_that_aria2_has_not_finished_is_refused_though_it_has_its_full_length(
    downloaded, tmp_path
):
    folder = pathlib.Path(shutil.copytree(downloaded, tmp_path / "W", symlinks=True))
    for name in ("diffusion_pytorch_model-00001-of-00003.safetensors", "Wan2.1_VAE.pth"):
        control = folder / f"{name}.aria2"
        control.touch()
        with pytest.raises(ValueError, match=f"{name}: its download is not finished"):
            WanFolder(folder, "cpu")
        control.unlink()
    WanFolder(folder, "cpu").load_vae()


def test_a_folder_without_a_video_branch_is_refused_with_what_is_in_it(tmp_path):
    for name in ("blobs", "refs", "snapshots"):
        (tmp_path / name).mkdir()
    for load in (lambda: WanFolder(tmp_path, "cpu"), lambda: load_wan(str(tmp_path), TINY)):
        with pytest.raises(ValueError, match="but blobs, refs, snapshots. Fix: .*docs/wan.md"):
            load()
    # of "$W", unset
    with pytest.raises(ValueError, match="wan_dir = : no diffusion.* but nothing"):
        WanFolder("", "cpu")


def test_scales_of_fp8_and_pickled_objects_are_named_with_their_file_in_one_line(tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"blocks.0.ffn.0.scale_weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=f"{path}: fp8 with scales .*take the bf16 file"):
        load_wan(str(tmp_path), TINY)
    path.unlink()
    torch.save(dict(args=argparse.Namespace()), tmp_path / "diffusion_pytorch_model.pth")
    with pytest.raises(ValueError, match="Unsupported global: GLOBAL argparse.Namespace") as error:
        load_wan(str(tmp_path), TINY)
    assert "\n" not in str(error.value)


def test_loading_reads_every_tensor_once(golden, tmp_path, monkeypatch):
    shards(tmp_path, golden["state_dict"], 2)
    read, lazy = [], encoders.lazy_tensors

    def counting(path):
        return {
            name: (shape, lambda name=name, get=get: (read.append(name), get())[1])
            for name, (shape, get) in lazy(path).items()
        }

    monkeypatch.setattr(encoders, "lazy_tensors", counting)
    load_wan(tmp_path.as_posix(), TINY)
    assert sorted(read) == sorted(golden["state_dict"])


def test_what_is_loaded_and_a_preset_of_another_width_are_said_before_gigabytes_are_read(
    golden, tmp_path, monkeypatch, capsys
):
    shards(tmp_path, golden["state_dict"], 2)
    lazy, said = encoders.lazy_tensors, []

    def listening(path):
        tensors = lazy(path).items()
        hear = lambda get: (said.append(capsys.readouterr().out), get())[1]
        return {name: (shape, partial(hear, get)) for name, (shape, get) in tensors}

    monkeypatch.setattr(encoders, "lazy_tensors", listening)
    load_wan(str(tmp_path), TINY)
    assert "num_layers 3" in said[0] and "sized for width 1536" in said[0]
    load_wan(str(tmp_path), Config(head_dim=32, dim=64))
    assert "warning" not in "".join(said[1:]) + capsys.readouterr().out


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
    # 51 M parameters
    shapes = keys.dit(dim=512, ffn=2048, layers=12, in_dim=16, clip=False, text=64, freq=64)
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
