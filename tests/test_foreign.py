"""Other people's files: streaming, offload, sampling and fine-tuning a release, its export, VGGT as
a start."""

import json
import weakref
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pytest
import torch
from released_keys import RELEASE, TINY, measure_loading, release_tensors, write_zeros
from safetensors.torch import save_file
from test_released import inputs_of
from test_released import run as forward
from test_train import run
from torch.utils._python_dispatch import TorchDispatchMode
from wan_folder import write_wan_folder

import released
from data import Encoding, encode
from lib.checkpoints import save_checkpoint
from lib.files import read_video
from lib.offload import Visits, offload, visitors
from lib.rooms import Recipe, synth
from lib.weights import (
    export_release,
    load_release,
    load_weights,
    metadata_of,
    open_checkpoint,
)
from model import FantasyWorld
from sample import CORRECTIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Wan2.1-I2V folder and, beside it, a model.pth without the video branch."""
    root = tmp_path_factory.mktemp("release")
    write_wan_folder(root / "I2V", "i2v", in_dim=36, camera=False)
    torch.save(release_tensors(TINY, video=False), root / "model.pth")
    return root


# ---- memory
WIDE = dict(
    RELEASE,
    dim=384,
    ffn=1152,
    text=64,
    freq=64,
    pcb=2,
    irg=3,
    geo=192,
    bicross=192,
    plucker=200,
    adapted=3,
    encoder=384,
    dpt=(32, 48, 64, 64),
    features=32,
    trunk=2,
)


def test_a_release_streams_from_disk_into_bf16_with_at_most_1_2_times_its_memory(tmp_path):
    write_zeros(WIDE, tmp_path)
    ratio, _ = measure_loading(tmp_path)
    assert ratio < 1.2


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still referenced; peak is the largest
    sum, total that of all ever made.  The model's own weights do not count; copies of them do."""

    def __init__(self, model):
        super().__init__()
        self.now, self.peak, self.total = 0, 0, 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known.add(storage._cdata)
                self.now, self.total = self.now + storage.nbytes(), self.total + storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("share", [0, 0.25])
def test_offload_keeps_two_steps_on_the_device_beside_its_share_and_changes_no_value(
    share, monkeypatch
):
    sizes = dict(WIDE, dim=256, ffn=1024, geo=128, plucker=100, dpt=(16, 16, 16, 16), features=16)
    model, inputs = FantasyWorld.from_released(release_tensors(sizes)), inputs_of(sizes, frames=5)
    model.set_stage(2).requires_grad_(False)
    want = model(**inputs, heads=False)  # also fills the cache of RoPE tables
    with LiveBytes(model) as plain:
        model(**inputs, heads=False)
    steps = [visitors(step)[1] for step in (*model.pcb, *model.irg)]
    values = {n: p.clone() for n, p in model.named_parameters()}
    total, largest, sent = sum(steps), max(steps), []
    offload(model, "cpu", share * total / 1e9)
    send = Visits.send
    monkeypatch.setattr(Visits, "send", lambda self, n: sent.append(n) or send(self, n))
    with LiveBytes(model) as counted:
        got = model(**inputs, heads=False)
    assert torch.equal(got["velocity"], want["velocity"])
    model.visits.go_home()
    assert all(torch.equal(values[n], p) for n, p in model.named_parameters())
    assert counted.peak <= plain.peak + 2 * largest  # two steps beside the activations
    away = [len(home) for _, home, _ in model.visits.steps]
    assert total - share * total <= sum(away) < total - share * total + largest + 1
    assert sum(map(len, model.visits.buffers)) == 2 * max(away)
    assert sent == list(range(len(away))), "a forward copies every step once"


def test_offloaded_layers_compute_on_the_device(monkeypatch):
    model = offload(
        FantasyWorld.from_released(release_tensors(TINY)).set_stage(2).requires_grad_(False), "meta"
    )
    # knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    # mixing devices would raise
    out = model(**{k: v.to("meta") for k, v in inputs_of(TINY).items()})
    assert {v.device.type for v in out.values()} == {"meta"}
    assert model.dit.blocks[0].ffn[0].weight.device.type == "cpu"


def test_matrices_cast_once_give_what_autocast_gives(folder):
    inputs, outs = inputs_of(TINY, frames=5), []
    for dtype, trains in ((torch.bfloat16, True), (torch.bfloat16, False)):
        model = load_release(
            str(folder / "model.pth"), str(folder / "I2V"), dtype=dtype, trains=trains
        )
        assert model.frame_blocks[0].mlp.fc1.weight.dtype == (torch.float32 if trains else dtype)
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(forward(model, **inputs))
    assert all(torch.equal(a, b) for a, b in zip(*(out.values() for out in outs)))


# ---- the commands
@pytest.fixture(scope="module")
def clips(folder):
    """Two encoded clips, a camera file of the release's format and a depth map of the start
    image."""
    synth(
        folder / "clips",
        Recipe(num=2, num_frames=5, height=32, width=48, seed=0, variety="simple", val=1),
    )
    encode(folder / "clips", 32, 48, 5, how=Encoding(wan_dir=folder / "I2V"))
    c2w = torch.eye(4).repeat(5, 1, 1)
    c2w[:, 2, 3] = torch.linspace(0, 1, 5)
    (folder / "camera_data.json").write_text(
        json.dumps(dict(focal_length=40, cameras_interp=c2w.tolist()))
    )
    np.save(folder / "depth.npy", np.full((1, 20, 30), 3.0, np.float32))
    return folder / "clips"


def sample(ckpt, out, clips, *more):
    """sample.py with the release's kind of arguments -> depth.npz, video frames."""
    root = clips.parent
    run(
        "sample.py",
        "--ckpt",
        ckpt,
        "--wan_dir",
        root / "I2V",
        "--image",
        clips / "train_000000" / "video.mp4",
        "--camera",
        root / "camera_data.json",
        "--scene_scale",
        root / "depth.npy",
        "--prompt",
        "a room",
        "--steps",
        2,
        "--frames",
        5,
        "--height",
        32,
        "--width",
        48,
        "--device",
        "cpu",
        "--out",
        out,
        *more,
    )
    return np.load(out / "depth.npz"), read_video(out / "video.mp4")[0]


def test_a_release_is_sampled_its_way_and_with_corrections(folder, clips, tmp_path):
    first, video = sample(folder / "model.pth", tmp_path / "theirs", clips)
    assert video.shape == (5, 32, 48, 3)
    # in the file's unit: 1 forward
    np.testing.assert_allclose(first["w2c"][-1, :, 3], [0, 0, -1], atol=1e-5)
    ours, _ = sample(
        folder / "model.pth",
        tmp_path / "ours",
        clips,
        "--offload",
        0,
        f"--correct={','.join(CORRECTIONS)}",
        "--lift",
        "commanded",
    )
    assert not np.allclose(first["depth"], ours["depth"], rtol=1e-3)


def test_a_release_is_fine_tuned_loaded_back_sampled_and_written_again(folder, clips, tmp_path):
    wan, release, tuned = (
        folder / "I2V",
        folder / "model.pth",
        tmp_path / "run" / "latest.safetensors",
    )
    text = run(
        "train.py",
        "config/stage2.py",
        "--preset=14b",
        f"--wan_dir={wan}",
        f"--init_from={release}",
        f"--data_dir={clips}",
        "--height=32",
        "--width=48",
        "--num_frames=5",
        "--num_workers=0",
        "--batch_size=1",
        "--grad_accum=1",
        "--max_steps=1",
        "--log_every=1",
        "--eval_every=0",
        "--device=cpu",
        "--learning_rate=1e-2",
        "--warmup_steps=0",
        f"--out_dir={tmp_path}/run",
    )
    assert "step 1/1 | loss/diffusion" in text and "487 tensors of it and 183 of" in text
    sample(tuned, tmp_path / "sampled", clips)
    # where it is said to be now
    with pytest.raises(ValueError, match="elsewhere.pth: no such file"):
        open_checkpoint(str(tuned), str(wan), "cpu", release="elsewhere.pth")
    run("-m", "lib.weights", "export", tuned, tmp_path / "tuned.safetensors", alone=True)
    by_file, by_export, before = (load_release(str(release), str(wan)) for _ in range(3))
    load_weights(by_file, tuned)
    load_weights(by_export, tmp_path / "tuned.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(by_file.state_dict().values(), by_export.state_dict().values())
    )
    tuned = by_file.state_dict()
    changed = {k for k, v in before.named_parameters() if not torch.equal(v, tuned[k])}
    assert {"ray_encoder.fc.0.weight", "exchange.0.gamma_m1", "depth_head.norm.weight"} <= changed
    assert not any(k.startswith("dit.") or released.dead(k) for k in changed)


def test_a_release_that_was_loaded_and_saved_is_exported_as_it_was(tmp_path):
    release, sd = (
        tmp_path / "model.pth",
        dict(release_tensors(TINY), **{"pipe.vae.model.x": torch.ones(2)}),
    )
    torch.save(sd, release)
    model = load_release(str(release)).set_stage(2)
    meta = dict(stage="2", release=str(release), model_config=json.dumps(asdict(model.cfg)))
    state = model.trainable_state_dict(), {}
    save_checkpoint(tmp_path, 1, state, meta, keep_last=1)
    export_release(tmp_path / "latest.safetensors", tmp_path / "again.pth")
    before, after = (
        torch.load(path, weights_only=True) for path in (release, tmp_path / "again.pth")
    )
    assert before.keys() == after.keys() and all(
        torch.equal(after[k], v) for k, v in before.items()
    )
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match="wanted a stage 2 checkpoint of a run with --init_from=model.pth"
    ):
        export_release(tmp_path / "other.safetensors", tmp_path / "no.pth")


def test_what_a_release_lacks_is_asked_for_with_the_cure(folder, tmp_path):
    text = run("sample.py", "--ckpt", folder / "model.pth", "--camera", "forward", ok=False)
    assert "a release needs --wan_dir" in text
    with pytest.raises(ValueError, match="patch_embedding.weight is missing; without --wan_dir"):
        load_release(str(folder / "model.pth"))
    with pytest.raises(ValueError, match="wan_dir = .*nowhere: no diffusion_pytorch_model"):
        load_release(str(folder / "model.pth"), str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match="gone.pth: no such file; a model fine-tuned from a release needs"
    ):
        load_release("gone.pth")
    torch.save(dict(x=torch.zeros(1)), tmp_path / "other.pth")
    assert "stage" not in metadata_of(tmp_path / "other.pth")
