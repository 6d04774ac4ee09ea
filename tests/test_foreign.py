"""Other people's files: streaming, offload, sampling and fine-tuning a release, its export, VGGT as
a start."""

import json
import weakref
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pytest
import torch
from released_keys import RELEASE, TINY, geo_block, measure_loading, release_tensors, write_zeros
from safetensors.torch import save_file
from small import tiny_model
from test_released import inputs_of
from test_released import run as forward
from test_train import run
from torch.utils._python_dispatch import TorchDispatchMode
from wan_folder import random_tensors, write_wan_folder

import released
from data import Encoding, encode
from geometry import GeoBlock, rope_2d
from lib.checkpoints import save_checkpoint
from lib.files import read_video
from lib.offload import Visits, offload, visitors
from lib.rooms import Recipe, synth
from lib.weights import (
    Origin,
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
    monkeypatch.setattr(
        torch, "autocast", lambda *args, **kwargs: nullcontext()
    )  # knows no meta device
    out = model(
        **{k: v.to("meta") for k, v in inputs_of(TINY).items()}
    )  # mixing devices would raise
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
    np.testing.assert_allclose(
        first["w2c"][-1, :, 3], [0, 0, -1], atol=1e-5
    )  # in the file's unit: 1 forward
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
    with pytest.raises(
        ValueError, match="elsewhere.pth: no such file"
    ):  # where it is said to be now
        open_checkpoint(str(tuned), str(wan), "cpu", origin=Origin(release="elsewhere.pth"))
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
    with pytest.raises(
        ValueError, match="gone.pth: no such file; a model fine-tuned from a release needs"
    ):
        load_release("gone.pth")
    torch.save(dict(x=torch.zeros(1)), tmp_path / "other.pth")
    assert "stage" not in metadata_of(tmp_path / "other.pth")


# ---- VGGT
def test_a_geometry_block_equals_a_hand_written_block_of_vggt_in_fp64():
    torch.manual_seed(0)
    c, heads, h, w = 32, 2, 2, 3
    d, n = c // heads, 5 + h * w
    block = GeoBlock(c, heads, 0.01).double()
    p = {
        k: (v + 0.3 * torch.randn_like(v)).detach()
        for k, v in block.state_dict().items()
        if k != "modulation"
    }
    block.load_state_dict(p, strict=False)
    z = torch.randn(2, n, c, dtype=torch.float64)

    def layer_norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]
            + p[f"{name}.bias"]
        )

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def rotate(x, token):  # one head's vector at one token: first half by row, second by column
        y, out = divmod(token - 5, w) if token >= 5 else (-1, -1), x.clone()
        for half, position in enumerate(p_ + 1 for p_ in y):
            for j in range(d // 4):
                a, b = half * d // 2 + j, half * d // 2 + j + d // 4
                angle = torch.tensor(position * 100.0 ** (-j / (d // 4)), dtype=torch.float64)
                out[a] = x[a] * angle.cos() - x[b] * angle.sin()
                out[b] = x[b] * angle.cos() + x[a] * angle.sin()
        return out

    want = z.clone()
    for clip in range(2):
        qkv, attended = (
            linear(layer_norm(z[clip], "norm1"), "attn.qkv"),
            torch.zeros(n, c, dtype=torch.float64),
        )
        for head in range(heads):
            q, k, v = (qkv[:, s * c + head * d : s * c + (head + 1) * d] for s in range(3))
            q, k = layer_norm(q, "attn.q_norm"), layer_norm(k, "attn.k_norm")
            q, k = (torch.stack([rotate(x[t], t) for t in range(n)]) for x in (q, k))
            attended[:, head * d : (head + 1) * d] = torch.softmax(q @ k.T / d**0.5, -1) @ v
        want[clip] += p["ls1.gamma"] * linear(attended, "attn.proj")
        x = linear(layer_norm(want[clip], "norm2"), "mlp.fc1")
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        want[clip] += p["ls2.gamma"] * linear(x, "mlp.fc2")
    rope = [table.double() for table in rope_2d(1, h, w, d, "cpu")]
    for rows in (
        None,
        torch.zeros(2, 6, c, dtype=torch.float64),
    ):  # plain, and modulated as a fresh model starts
        torch.testing.assert_close(block(z, rows, 1, rope), want, rtol=1e-6, atol=1e-6)


def vggt(c=32, layers=4, camera=64, trunk=2):
    """Names and shapes of VGGT-1B's checkpoint at small size, with some of what has no place
    here."""
    shapes = {
        "aggregator.camera_token": (1, 2, 1, c),
        "aggregator.register_token": (1, 2, 4, c),
        "aggregator.patch_embed.cls_token": (1, 1, c),
        "depth_head.norm.weight": (2 * c,),
        "track_head.tracker.mean": (2,),
        "camera_head.token_norm.weight": (camera,),
        "camera_head.token_norm.bias": (camera,),
    }
    for i in range(layers):
        for kind in ("frame", "global"):
            shapes.update(geo_block(f"aggregator.{kind}_blocks.{i}", c, c // 2))
    for i in range(trunk):
        shapes.update(geo_block(f"camera_head.trunk.{i}", camera))
    return {
        k: v
        for k, v in random_tensors(shapes, torch.float32).items()
        if not k.endswith("modulation")
    }


def test_vggt_starts_the_first_layers_tokens_and_camera_head_and_lists_the_rest(tmp_path, capsys):
    torch.save(vggt(), tmp_path / "model.pt")
    model = tiny_model(
        1, camera_dim=64, camera_heads=2, camera_layers=2
    )  # two geometry layers of VGGT's four
    load_weights(model, tmp_path / "model.pt")
    sd, own = vggt(), model.state_dict()
    for name in ("frame_blocks.1.attn.qkv.weight", "global_blocks.0.ls1.gamma", "register_token"):
        assert torch.equal(own[name], sd[f"aggregator.{name}"]), name
    assert torch.equal(
        own["camera_head.trunk.1.mlp.fc2.bias"], sd["camera_head.trunk.1.mlp.fc2.bias"]
    )
    assert own["frame_blocks.0.modulation"][:, 5].eq(1).all()  # the block starts as VGGT's
    text = capsys.readouterr().out
    assert "104 tensors taken, 75 left behind" in text and "aggregator.frame_blocks.*" in text
    assert "track_head.tracker.mean" in text and "depth_head.norm.weight" in text
    narrow = tiny_model(1)  # camera head of another width
    load_weights(narrow, tmp_path / "model.pt")
    assert "camera_head.trunk.*" in capsys.readouterr().out
    with pytest.raises(ValueError, match="blocks and tokens fit geo_dim = 32.*model_overrides"):
        load_weights(tiny_model(1, geo_dim=64), tmp_path / "model.pt")
