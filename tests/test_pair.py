"""A Wan2.2 pair through the commands: the release's two files, and two experts of our own."""

import json
import pathlib
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from released_keys import RELEASE, TINY, expert, release_shapes, release_tensors, wan_shapes
from safetensors import safe_open
from safetensors.torch import save_file
from small import command_here, options_of, train_here
from wan_folder import OVERRIDES, write_pair_folder

import released
import sample
import train
from encoders import WanFolder, wan_family, wan_sources
from lib.checkpoints import save_checkpoint
from lib.experts import metadata_of_ckpt, of_each
from lib.files import read_video
from lib.plan import count
from lib.weights import export_release, load_release, read_metadata
from model import Config, FantasyWorld, shift_sigma

ROOT = pathlib.Path(__file__).parents[1]
SIZE = ("--num_frames=5", "--height=32", "--width=48")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two experts in their Wan2.2 folder, the release's two files without the video branch, encoded
    clips with end images, and a LoRA."""
    root = tmp_path_factory.mktemp("pair")
    write_pair_folder(root / "A14B")
    for n, name in enumerate(("high", "low")):
        tensors = release_tensors(expert(TINY), seed=n, video=False)
        torch.save(tensors, root / f"{name}_noise_model.pth")
    run("data.py", "synth", root / "clips", "--num=1", "--val=1", "--variety=simple", *SIZE)
    where = ("--wan_dir", root / "A14B", "--end_image")
    run("data.py", "encode", root / "clips", *SIZE, *where)
    parts = {"lora_down.weight": (2, 128), "lora_up.weight": (128, 2)}
    name = "lora_unet__blocks_0_self_attn_q"
    lora = {f"{name}.{part}": torch.ones(shape) for part, shape in parts.items()}
    save_file(lora, root / "lora.safetensors")
    return root


def run(script, *arguments, ok=True):
    code, text = command_here(script, *arguments)
    assert (code == 0) == ok, text
    return text


def sampled(root, out, ckpt, *more, ok=True):
    """sample.py as its users call it -> depth (T, H, W), video, or what it said."""
    picture = root / "clips" / "train_000000" / "video.mp4"
    size = ("--frames=5", "--height=32", "--width=48", "--steps=2", "--device=cpu", "--amount=2")
    told = ("--ckpt", ckpt, "--image", picture, "--out", out, "--export=video,npz", *size)
    text = run("sample.py", *told, *more, ok=ok)
    if not ok:
        return text
    return np.load(out / "depth.npz")["depth"], read_video(out / "video.mp4")[0]


# ---- loading
def test_encoders_of_a_pair_are_found_beside_it_and_where_the_release_has_them(tmp_path):
    home = tmp_path / "X/PAI/Wan2.2-Fun-A14B-Control-Camera"
    write_pair_folder(home, encoders="../../Wan-AI/Wan2.1-T2V-1.3B")
    for folder in (tmp_path / "X", home, home / "high_noise_model"):
        found = WanFolder(folder, "cpu")
        assert wan_family(folder) == "wan36" and found.start_pad and found.load_image is None
        assert found.files["vae"].parent.name == "Wan2.1-T2V-1.3B"
    with pytest.raises(ValueError, match="a pair of experts; name one of them"):
        wan_sources(home)


MEASURE = """
import re, sys, torch
from functools import partial
from lib.experts import Experts
from lib.weights import load_release
from model import PRESETS, FantasyWorld
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
with torch.device("meta"):
    FantasyWorld(PRESETS["tiny"])
before = peak()
load = lambda name: load_release(f"{sys.argv[1]}/{name}.pth", sys.argv[1], "cpu", torch.bfloat16)
pair = Experts([partial(load, "high"), partial(load, "low")])
pair.at(torch.tensor([1000.0]))
model = pair.at(torch.tensor([100.0]))
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


def test_a_pair_takes_at_most_1_2_times_the_memory_of_one_expert(tmp_path):
    wide = dict(RELEASE, dim=384, ffn=1152, text=64, freq=64, pcb=2, irg=3, geo=192, bicross=192)
    wide |= dict(dpt=(32, 48, 64, 64), features=32, trunk=2)
    shapes = release_shapes(expert(wide), video=False)
    for name in ("high", "low"):
        torch.save({k: torch.zeros(shape) for k, shape in shapes.items()}, tmp_path / f"{name}.pth")
    base = {k: torch.zeros(shape) for k, shape in wan_shapes(expert(wide)).items()}
    save_file(base, tmp_path / "diffusion_pytorch_model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    ratio = float(result.stdout.split()[-1])
    print(f"peak host memory {ratio:.3f} x one expert")
    assert ratio < 1.2


# ---- the release's two files
def test_the_released_pair_is_sampled_its_way_with_an_end_image_a_lora_and_corrections(
    pair, tmp_path
):
    files = [pair / f"{name}_noise_model.pth" for name in ("high", "low")]
    ckpt, wan = ",".join(map(str, files)), ("--wan_dir", pair / "A14B")
    plain, video = sampled(pair, tmp_path / "plain", ckpt, *wan)
    assert video.shape == (5, 32, 48, 3)
    settings = json.loads((tmp_path / "plain" / "report.json").read_text())["settings"]
    assert settings["negative_prompt"] == "" and settings["lift"] == "predicted"
    # Both in memory, a layer at a time on the device: the same numbers.
    kept, _ = sampled(pair, tmp_path / "kept", ckpt, *wan, "--offload=0")
    np.testing.assert_array_equal(plain, kept)
    low, _ = sampled(pair, tmp_path / "low", ckpt, *wan, "--low_memory")
    np.testing.assert_allclose(plain, low, rtol=1e-5)
    lora = f"{pair}/lora.safetensors,{pair}/lora.safetensors"
    changes = dict(
        end=("--end_image", pair / "clips" / "val_000000" / "video.mp4"),
        lora=("--lora", lora),
        boundary=("--boundary=100",),
        correct=(f"--correct={','.join(sample.CORRECTIONS)}",),
    )
    for name, more in changes.items():
        depth, _ = sampled(pair, tmp_path / name, ckpt, *wan, *more)
        assert depth.shape == plain.shape and not np.allclose(depth, plain, rtol=1e-4), name


def test_half_a_pair_the_wrong_order_and_a_strange_one_are_refused_in_one_line(pair, tmp_path):
    high, low = (str(pair / f"{name}_noise_model.pth") for name in ("high", "low"))
    wan = ("--wan_dir", pair / "A14B")
    refused = {
        high: "one expert of a pair, which knows half of the noise; give both: --ckpt HIGH,LOW",
        f"{low},{high}": "the low noise expert, wanted the high noise one",
        f"{high},{low},{low}": "3 files; wanted one, or a pair: HIGH,LOW",
        f"{high},{ROOT}/tiny/fantasyworld.safetensors": "no expert of a pair",
    }
    comma = tmp_path / "one, of a pair.pth"  # a single file, whatever its name
    comma.symlink_to(high)
    refused[str(comma)] = refused[high]
    for name in ("low_noise_model", "high-noise"):  # where folders alone tell them apart
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.pth").symlink_to(low if "low" in name else high)
    swapped = f"{tmp_path}/low_noise_model/a.pth,{tmp_path}/high-noise/a.pth"
    refused[swapped] = refused[f"{low},{high}"]
    for ckpt, said in refused.items():
        assert said in sampled(pair, tmp_path, ckpt, *wan, ok=False)
    for option in ("release", "lora"):
        with pytest.raises(ValueError, match=f"{low}: {refused[swapped]}"):
            of_each(f"{low},{high}", 2, option)
    assert of_each(f"{high},{low}", 2, "lora") == [high, low]
    text = sampled(pair, tmp_path, f"{high},{low}", *wan, "--lora=one.safetensors", ok=False)
    assert "--lora one.safetensors: 1 files; wanted two" in text
    assert "wanted two levels" in train_here("config/stage2.py", "--sigma_range=0.9")[0]
    code, _ = train_here("config/stage2.py", f"--init_from={high}", f"--wan_dir={pair}/A14B")
    assert "one expert of a pair; say which" in code


# ---- training
def trained(root, expert, out, *more):
    """train.py of one expert, one step, in this process -> the checkpoint under its name."""
    told = [f"--wan_dir={root}/A14B", f"--expert={expert}", f"--data_dir={root}/clips", *SIZE]
    told += ["--num_workers=0", "--batch_size=1", "--grad_accum=1", "--max_steps=1"]
    told += ["--log_every=1", "--eval_every=0", "--device=cpu", "--learning_rate=1e-2"]
    code, text = train_here(*more[:1], *told, "--warmup_steps=0", f"--out_dir={out}", *more[1:])
    assert code == 0, f"{code}\n{text}"
    return out / f"{expert}_noise_model.safetensors"


def test_an_expert_is_fine_tuned_sampled_and_exported_under_the_release_s_names(pair, tmp_path):
    tuned = []
    for name in ("high", "low"):
        release = pair / f"{name}_noise_model.pth"
        more = ("config/stage2.py", "--preset=14b", f"--init_from={release}", "--end_dropout=0.5")
        tuned.append(trained(pair, name, tmp_path / name, *more))
    ckpt = ",".join(map(str, tuned))
    assert metadata_of_ckpt(ckpt)["expert"] == "low"
    sampled(pair, tmp_path / "out", ckpt)  # the Wan folder is the one of training
    text = sampled(pair, tmp_path / "x", f"{tuned[1]},{tuned[0]}", ok=False)
    assert "the low noise expert, wanted the high noise one" in text
    export_release(tuned[1], tmp_path / "new" / "again.pth")
    before = torch.load(pair / "low_noise_model.pth", weights_only=True)
    after = torch.load(tmp_path / "new" / "again.pth", weights_only=True)
    assert after.keys() == before.keys()
    assert all(after[k].shape == v.shape for k, v in before.items())
    # What has trained is in it, bit for bit.
    with safe_open(tuned[1], "pt") as file:
        gate = file.get_tensor("exchange.0.gamma_m1")
    name = "IRGBlock.0.bicross_attention.gamma_m1"
    assert torch.equal(after[name], gate) and not torch.equal(before[name], gate)


def test_an_expert_that_was_loaded_and_saved_is_exported_as_it_was(tmp_path):
    release, sd = tmp_path / "low.pth", release_tensors(expert(TINY))
    torch.save(sd, release)
    model = load_release(str(release)).set_stage(2)
    meta = dict(stage="2", release=str(release), model_config=json.dumps(asdict(model.cfg)))
    meta |= dict(expert="low")
    save_checkpoint(tmp_path, 1, (model.trainable_state_dict(), {}), meta, keep_last=1)
    export_release(tmp_path / "low_noise_model.safetensors", tmp_path / "again.pth")
    after = torch.load(tmp_path / "again.pth", weights_only=True)
    assert after.keys() == sd.keys() and all(torch.equal(after[k], v) for k, v in sd.items())


def test_a_tiny_pair_of_our_own_goes_through_encode_both_stages_and_sample(pair, tmp_path):
    """The commands of docs/released.md, at the smallest sizes."""
    changes = f"--model_overrides={json.dumps(dict(OVERRIDES, num_pcb=3))}"
    ckpts = []
    for name in ("high", "low"):
        one, two = tmp_path / f"one-{name}", tmp_path / f"two-{name}"
        first = trained(pair, name, one, "config/stage1.py", changes, "--eval_every=1")
        more = ("config/stage2.py", changes, f"--init_from={first}")
        ckpts.append(trained(pair, name, two, *more))
        said = read_metadata(ckpts[-1])
        assert said["expert"] == name
        assert json.loads(said["train_config"])["wan_dir"] == f"{pair}/A14B/{name}_noise_model"
    depth, video = sampled(pair, tmp_path / "out", ",".join(map(str, ckpts)))
    assert video.shape == (5, 32, 48, 3) and np.isfinite(depth).all()
    end = ("--end_image", pair / "clips" / "val_000000" / "video.mp4")
    other, _ = sampled(pair, tmp_path / "end", ",".join(map(str, ckpts)), *end)
    assert not np.allclose(depth, other, rtol=1e-4)
    swapped = ["config/stage2.py", changes, f"--init_from={first}", f"--wan_dir={pair}/A14B"]
    assert "the low noise expert, wanted the high" in train_here(*swapped, "--expert=high")[0]


def draws(count, **changes):
    options = options_of(train, end_dropout=0.5, **changes)
    latents = torch.zeros(count, 16, 2, 4, 6)
    y = dict(y=torch.zeros(count, 20, 2, 4, 6), y_end=torch.ones(count, 20, 2, 4, 6))
    b = dict(latents=latents, text=[torch.zeros(1, 4)] * count, **y)
    how = dict(total=count, empty_text=torch.zeros(1, 4), options=options)
    return train.draw(b, 3, range(count), **how)


def test_noise_levels_stay_in_the_window_and_keep_the_schedule_s_shape_there():
    _, everything, _, b = draws(4000)
    assert 0.35 < b["y"].flatten(1).amax(1).mean() < 0.55  # half of them, but for dropped images
    for changes in (dict(expert="high"), dict(sigma_range=(0.9, 1.0))):
        _, sigma, _, _ = draws(4000, **changes)
        assert sigma.min() >= 0.9 and sigma.max() <= 1
        # The same distribution as the part of all draws that lies in the window.
        want = everything[everything > 0.9]
        for q in (0.25, 0.5, 0.75):
            assert abs(sigma.quantile(q) - want.quantile(q)) < 0.003
    _, sigma, _, _ = draws(100, expert="low")
    assert sigma.max() <= 0.9 and sigma.min() < 0.1
    # Without a window the draws are what they were: stratified levels of the whole schedule.
    u = shift_sigma(everything, 1 / 5) * 4000
    assert (u - torch.arange(4000) - 0.5).abs().max() < 0.51


def test_end_images_are_asked_for_where_they_are_not_encoded(pair, tmp_path):
    run("data.py", "synth", tmp_path / "c", "--num=1", "--variety=simple", *SIZE)
    run("data.py", "encode", tmp_path / "c", *SIZE, "--wan_dir", pair / "A14B")
    told = ["config/stage1.py", f"--wan_dir={pair}/A14B", "--expert=low", "--end_dropout=0.5"]
    told += [f"--data_dir={tmp_path}/c", *SIZE, "--device=cpu", f"--out_dir={tmp_path}/o"]
    changes = f"--model_overrides={json.dumps(dict(OVERRIDES, num_pcb=3))}"
    code, _ = train_here(*told, "--eval_every=0", "--num_workers=0", changes)
    assert "clips without an encoded end image" in code and "--end_image" in code
    said = run("sample.py", "--ckpt", ROOT / "tiny/fantasyworld.safetensors", "--steps=1",
               "--image", ROOT / "examples/room.jpg", "--end_image", ROOT / "examples/room.jpg",
               "--out", tmp_path / "s", ok=False)  # fmt: skip
    assert "an end image is for video branches of 36 inputs" in said


def test_the_plan_of_an_expert_counts_its_control_adapter_and_no_clip():
    options = options_of(train, preset="14b", expert="low", stage=2)
    cfg = train.model_config(options)
    assert (cfg.in_dim, cfg.has_clip, cfg.has_control) == (36, False, True)
    # The release's own, at small sizes: every part that is sharded is there.
    cfg = Config(**released.sizes(release_shapes(expert(TINY))))
    cost = count(cfg, 2, train.loss_alone(options), (1, 5, 32, 48))
    with torch.device("meta"):
        model = FantasyWorld(cfg).set_stage(2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (cost.trainable, cost.moments) == (4 * trained, 8 * trained) and cost.flops > 0
    assert 0 < cost.gathered_backward < cost.frozen + 2 * cost.trainable
