"""Files that are small on the disk and huge when read: clips, arrays, checkpoints of strangers."""

import json
import resource
import shutil
import subprocess
import time
import zipfile

import imageio_ffmpeg
import mutant_kinds
import mutants
import numpy as np
import pytest
import torch
from mutant_kinds import write_checkpoint
from safetensors.torch import save_file
from small import tiny_model
from test_vggt import vggt

import data
from encoders import MINIATURE, WanFolder
from lib import files, weights
from lib.rooms import Recipe, synth
from lib.strangers import config_from_metadata, read_train_config
from lib.verify import smaller
from model import PRESETS


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def peak_mb():
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in both) / 1024


def zeros_npz(path, shape):
    """A compressed array of zeros, which nobody ever held in memory."""
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    head = b"\x93NUMPY\x01\0" + len(head).to_bytes(2, "little") + head
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("depth.npy", "w", force_zip64=True) as file:
            file.write(head)
            left = 4 * int(np.prod(shape))
            while left:
                left -= file.write(bytes(min(left, 2**22)))


def test_one_huge_clip_is_named_and_the_others_are_checked(tmp_path, capsys):
    """A small mp4 of 2304 x 2304 frames, and an npz of 600 kB that unpacks to 604 MB."""
    root = tmp_path / "data"
    synth(root, Recipe(3, 9, 32, 48, 7, "simple", val=0))
    wide = root / "train_000000" / "video.mp4"
    wide.unlink()
    source = ["-f", "lavfi", "-i", "color=gray:size=2304x2304:rate=8", "-frames:v", "9"]
    line = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, "-preset", "ultrafast"]
    subprocess.run([*line, str(wide)], check=True)
    zeros_npz(root / "train_000001" / "depth.npz", (9, 4096, 4096))
    meta = json.loads((root / "metadata.json").read_text())
    meta["samples"][1]["depth_dir"] = "train_000001/depth.npz"
    (root / "metadata.json").write_text(json.dumps(meta))
    before, began = peak_mb(), time.monotonic()
    failed = data.verify(root)
    said = capsys.readouterr().out
    assert failed == 2 and "3 samples, 2 failed" in said
    assert "depth.npz: 9 frames of (4096, 4096) values; at most" in said
    assert peak_mb() - before < 900 and time.monotonic() - began < 60


def test_a_stack_in_one_file_is_read_frame_by_frame(tmp_path):
    """Equal to a whole read, in C and in Fortran order, alone and packed; what is cut is named."""
    depth = np.random.default_rng(0).random((7, 5, 6)).astype("f4")
    for name, array in (("c", depth), ("f", np.asfortranarray(depth))):
        np.save(tmp_path / f"{name}.npy", array)
        np.savez_compressed(tmp_path / f"{name}.npz", depth=array)
        for end in ("npy", "npz"):
            path = tmp_path / f"{name}.{end}"
            np.testing.assert_array_equal(files.read_arrays(path, [6, 0, 3]), depth[[6, 0, 3]])
            np.testing.assert_array_equal(np.stack(list(files.iterate_arrays(path))), depth)
    packed = bytearray((tmp_path / "c.npz").read_bytes())
    packed[len(packed) // 2] ^= 16
    (tmp_path / "c.npz").write_bytes(packed)
    with pytest.raises(ValueError, match="c.npz: cannot be read"):
        files.read_arrays(tmp_path / "c.npz", [0])  # although frame 0 comes before the damage


def test_a_long_folder_is_listed_once_a_read(tmp_path, monkeypatch):
    """A part of 16 frames at a time: 9,000 small files took 130 s for 65."""
    for t in range(3):
        np.save(tmp_path / f"{t}.npy", np.ones((2, 3)))
    seen, listed = [], files.listed
    monkeypatch.setattr(files, "listed", lambda *a: seen.append(a) or listed(*a))
    assert files.read_arrays(tmp_path, [1]).shape == (1, 2, 3) and len(seen) == 1


def test_pictures_are_averaged_down_to_what_the_doctor_looks_at():
    frame = np.zeros((4096, 4100, 3), "u1")
    frame[::2] = 100
    small = smaller(frame)
    assert small.shape == (1365, 1366, 3) and 33 <= small.min() and small.max() <= 67
    assert smaller(frame[:100]) is not None and smaller(frame[:100]).shape == (100, 4100, 3)


def test_a_late_window_of_a_long_clip_costs_no_more_than_an_early_one(tmp_path):
    """1,500 frames: those before the window were all held before."""
    line = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i"]
    line += ["testsrc=size=320x240:rate=25", "-frames:v", "1500", "-preset", "ultrafast"]
    subprocess.run([*line, str(tmp_path / "long.mp4")], check=True)
    crop, before = data.Crop((240, 320), (32, 48)), peak_mb()
    video = data.read_window(tmp_path / "long.mp4", range(1450, 1471), crop)
    assert video.shape == (21, 3, 32, 48) and peak_mb() - before < 150  # 338 MB would be held


# ---- checkpoints
@pytest.mark.parametrize(
    "field, value",
    [
        ("num_layers", 10**9),
        ("num_layers", 1e9),
        ("dim", "x"),
        ("geo_dim", 10**7),
        ("geo_dim", -32),
        ("geo_heads", 0),
        ("geo_heads", 3),
        ("camera_layers", True),
        ("taps", [0, 10**9, 1, 1]),
        ("taps", [0, 0, 1, 99]),
        ("layer_scale", "1"),
        ("layer_scale", float("inf")),
        ("exchange", "all"),
        ("colour", 1),
        ("num_pcb", 9),
    ],
)
def test_sizes_that_a_checkpoint_claims_are_compared_before_anything_is_built(
    ckpt, tmp_path, field, value
):
    tensors, meta = weights.read_tensors(ckpt)
    claimed = dict(json.loads(meta["model_config"]), **{field: value})
    meta = dict(meta, model_config=json.dumps(claimed))
    meta["sha256"] = weights.digest(tensors, meta)
    path, before = tmp_path / "theirs.safetensors", peak_mb()
    save_file(tensors, path, {k: v for k, v in meta.items() if k != "format"})
    with pytest.raises(ValueError, match="theirs.safetensors"):
        weights.open_checkpoint(str(path), str(ckpt.parent / "s0"), torch.device("cpu"))
    assert peak_mb() - before < 100


def test_every_preset_is_believed():
    for preset in PRESETS.values():
        assert config_from_metadata(dict(model_config=json.dumps(vars(preset))), "x") == preset


@pytest.mark.parametrize("value", ["", "[]", "[" * 10**5, '{"num_frames": 6}', "null"])
def test_the_options_in_a_checkpoint_are_read_or_refused_by_name(value):
    with pytest.raises(ValueError, match="mine.safetensors: train_config"):
        read_train_config(dict(train_config=value), "mine.safetensors")


def test_a_vggt_file_of_which_little_fits_starts_no_run(tmp_path):
    model, whole = tiny_model(1, camera_dim=64, camera_heads=2, camera_layers=2), vggt()
    cut = {k: v for k, v in whole.items() if not k.startswith("aggregator.global_blocks.1.")}
    odd = dict(whole, **{"aggregator.frame_blocks.0.norm1.weight": torch.ones(32, dtype=torch.int)})
    for tensors, words in ((cut, "18 missing .*global_blocks.1."), (odd, "is torch.int32")):
        torch.save(tensors, tmp_path / "theirs.pt")
        with pytest.raises(ValueError, match=f"theirs.pt: .*{words}"):
            weights.load_weights(model, tmp_path / "theirs.pt")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 7}}'])
def test_an_index_of_shards_and_an_encoder_that_do_not_fit_are_named(tmp_path, text):
    folder = tmp_path / "wan"
    shutil.copytree(MINIATURE, folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match="index.json: no index of shards"):
        WanFolder(str(folder), "cpu")
    index.unlink()
    save_file({"a": torch.zeros(2)}, folder / "Wan2.1_VAE.safetensors")
    with pytest.raises(ValueError, match="Wan2.1_VAE.safetensors: "):
        WanFolder(str(folder), "cpu").load_vae()


def test_changed_lists_and_configs_end_in_one_line(tmp_path):
    """A few of the 1,600 mutants of docs/survival.md, in processes of their own."""
    table = mutants.campaign(tmp_path, 2, 5, "^(jobs|config)", [mutant_kinds.text_files])
    total = sum(table.values(), mutants.Counter())
    assert total.total() == 4 and not any(total[c] for c in mutants.COLUMNS[3:])
