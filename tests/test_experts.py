"""The release on Wan2.2, a pair of experts: names, numbers of the official modules, who works when.

Golden files: outputs of the official code on tiny random copies; those that hold a whole model
(22 MB) are in shared/golden alone, and pinned numbers of a synthesised expert stand in for them."""

import math
import pathlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from released_keys import (
    RELEASE,
    TINY,
    expert,
    release_shapes,
    release_tensors,
    wan_shapes,
)
from test_released import inputs_of, run, run_alone_and_together
from wan_folder import random_tensors

import released
import sample
from lib.experts import Experts
from lib.weights import FAMILIES, fingerprint
from model import PRESETS, Config, FantasyWorld
from wan import VideoConditions

HERE = pathlib.Path(__file__).parent / "golden"
SHARED = HERE.parents[2] / "shared" / "golden"
needs_model = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs shared/golden (22 MB, not in the repository)"
)


def golden(name, folder=HERE):
    return torch.load(folder / f"fantasyworld22_{name}.pt", weights_only=True)


def golden_model(tensors):
    heads = dict(dit_heads=4, irg_heads=4, camera_heads=4, taps=(3, 2, 1, 0))
    return FantasyWorld.from_released(tensors, **heads).set_stage(2).requires_grad_(False)


# ---- names
def test_an_expert_has_the_names_and_shapes_of_the_release_and_is_read_off_them():
    sizes = expert(RELEASE)
    shapes, base = release_shapes(sizes), {k: tuple(v) for k, v in wan_shapes(sizes).items()}
    assert len(shapes) == 2658 and sum(map(math.prod, shapes.values())) == 16_543_568_600
    assert len(base) == 1101 and sum(map(math.prod, base.values())) == 14_792_233_024
    assert FAMILIES[fingerprint(base)] == "an expert of Wan2.2-Fun-A14B-Control-Camera"
    cfg = replace(PRESETS["14b"], released=True, has_clip=False, has_control=True)
    cfg = replace(cfg, ray_sizes=(), adapter_sizes=(0, 0, 0))
    geometry = release_shapes(sizes, video=False)
    assert len(geometry) == 1557
    assert Config(**released.sizes(shapes)) == Config(**released.sizes(geometry, base)) == cfg
    with torch.device("meta"):
        own = {k: tuple(v.shape) for k, v in FantasyWorld(cfg).state_dict().items()}
    ours = {released.release_name(k, cfg.num_pcb): shape for k, shape in own.items()}
    ours["vggt.projection_head.weight"] += (1, 1, 1)
    assert ours == shapes
    plan = released.match(own, geometry, base, cfg.num_pcb)
    assert sum(of_release for of_release, _ in plan.values()) == 1557 and len(plan) == 2658


def test_a_base_of_the_other_variant_and_a_missing_tensor_are_named():
    one, pair = TINY, expert(TINY)
    bases = [random_tensors(wan_shapes(s), torch.float32) for s in (one, pair)]
    alone = [release_tensors(s, video=False) for s in (one, pair)]
    with pytest.raises(ValueError, match="control_adapter.conv.weight is missing"):
        FantasyWorld.from_released(alone[1], bases[0])
    with pytest.raises(ValueError, match="unexpected.*control_adapter.*than Wan2.1-I2V-14B-480P"):
        FantasyWorld.from_released(alone[0], bases[1])
    name = "IRGBlock.1.bicross_attention.gamma_m2"
    with pytest.raises(ValueError, match=f"1 missing .'{name}'.*Wan2.2-Fun-A14B-Control-Camera"):
        FantasyWorld.from_released({k: v for k, v in alone[1].items() if k != name}, bases[1])
    with pytest.raises(ValueError, match="folder of Wan2.2-Fun-A14B-Control-Camera"):
        FantasyWorld.from_released(alone[1])


# ---- one expert
def taps_of(model, i, y):
    """The intermediate values of the golden file, read with hooks."""
    seen = {}

    def keep(name, place=None):
        def hook(module, args, out=None):  # what a hook returns would take the output's place
            value = args if out is None else out
            seen[name] = (value if place is None else value[place]).detach()

        return hook

    steps = model.irg[0]
    hooks = [
        model.dit.control_adapter.register_forward_hook(keep("control_adapter")),
        model.pcb[0].register_forward_pre_hook(keep("tokens_in", 0)),
        model.pcb[-1].register_forward_hook(keep("pcb_out")),
        model.bridge.register_forward_hook(keep("bridge")),
        model.frame_blocks[0].register_forward_hook(keep("frame0")),
        steps.register_forward_hook(keep("irg0_video", 0)),
        steps.register_forward_hook(keep("irg0_geometry", 1)),
    ]
    rays = i["plucker"].permute(0, 4, 1, 2, 3)
    out = run(model, x=i["x"], t=i["timestep"], context=i["context"], y=i[y], plucker=rays)
    for hook in hooks:
        hook.remove()
    return out, seen


@needs_model
@pytest.mark.parametrize(
    "y, want, taps", [("y", "outputs", "taps"), ("y_end", "outputs_end", "taps_end")]
)
def test_an_expert_reproduces_the_official_forward_with_start_and_with_end_image(y, want, taps):
    data = golden("tiny", SHARED)
    model = golden_model(data["state_dict"])
    assert len(model.state_dict()) == len(data["state_dict"]) == 700
    used = {released.release_name(k, 2): v for k, v in model.state_dict().items()}
    assert all(torch.equal(used[k].flatten(), v.flatten()) for k, v in data["state_dict"].items())
    out, seen = taps_of(model, data["inputs"], y)
    want, taps = data[want], data[taps]
    pairs = {k: (out[k], want[k]) for k in ("velocity", "depth_conf")}
    pairs["pose_enc"] = out["pose_enc"][-1], want["pose_enc"]
    pairs["depth"] = out["depth"][..., None], want["depth"]
    pairs["points_conf"] = out["points_conf"], want["world_points_conf"]
    scale = want["world_points"].abs().clamp(min=1)
    pairs["points"] = out["points"] / scale, want["world_points"] / scale
    seen["time_embedding"] = model.dit.modulation(data["inputs"]["timestep"])[0]
    seen["bridge"] = rearrange(seen["bridge"], "b (f h w) c -> b c f h w", f=3, h=4)
    seen["frame0"] = seen["frame0"].reshape(taps["frame0"].shape)
    assert seen.keys() == taps.keys()
    pairs |= {k: (seen[k], taps[k]) for k in taps}
    error = {k: (a - b).abs().max().item() for k, (a, b) in pairs.items()}
    print(error)
    assert max(error.values()) < 3e-5, error  # the bound is 1e-4; points 1e-3 relative


# What this code gave when it agreed with the golden file; stands in for that file where it is
# absent.
PINNED = dict(
    velocity=[-1.15184, 0.77525, -0.84417],
    depth=[1.64496, 2.38532, 1.91343],
    depth_conf=[3.61741, 4.06168, 2.74104],
    points=[-0.01144, -0.82559, 0.10108],
    points_conf=[3.09161, 3.65482, 2.61335],
    pose_enc=[-2.00896, 2.36805, 1.38774],
)


def test_the_outputs_of_a_synthesised_expert_stay_what_they_were_at_parity():
    model, inputs = FantasyWorld.from_released(release_tensors(expert(TINY))), inputs_of(TINY)
    out = run(model, **dict(inputs, clip=None))
    got = {
        name: [value.flatten()[n].item() for n in (0, 1234 % value.numel(), -1)]
        for name, value in out.items()
    }
    print({k: [round(x, 5) for x in v] for k, v in got.items()})
    assert got.keys() == PINNED.keys()
    for name, values in PINNED.items():
        assert got[name] == pytest.approx(values, rel=1e-4, abs=1e-4), name


def test_a_batch_of_two_equals_two_batches_of_one_and_no_camera_equals_a_hidden_one():
    model = FantasyWorld.from_released(release_tensors(expert(TINY)))
    inputs = {k: v for k, v in inputs_of(TINY, batch=2).items() if k != "clip"}
    both = run_alone_and_together(model, inputs)
    hidden = run(model, **inputs, keep=torch.zeros(2))
    none = run(model, **dict(inputs, plucker=None))
    assert all(torch.equal(hidden[k], none[k]) for k in none)
    assert not torch.allclose(both["velocity"], none["velocity"], atol=1e-3)


# ---- the pair
@needs_model
def test_the_official_loop_with_two_experts_is_reproduced():
    data, loop = golden("tiny", SHARED), golden("twoexperts", SHARED)
    high = data["state_dict"]
    low = {k: -v if k.endswith("modulation") else v for k, v in high.items()}
    i, opened = data["inputs"], []
    rays = i["plucker"].permute(0, 4, 1, 2, 3)

    def opener(name, tensors):
        def load():
            opened.append(name)
            # Copies: what an expert leaves behind is emptied.
            model = golden_model({k: v.clone() for k, v in tensors.items()})
            # The file has rays, no cameras, and prompts that are not padded.
            model.rays = lambda *args: rays
            model.dit.sizes = replace(model.dit.sizes, text_len=7)
            return model

        return load

    pair = Experts([opener("high", high), opener("low", low)], loop["boundary"], rounded=True)
    noise = torch.randn(loop["noise"].shape, generator=torch.Generator().manual_seed(loop["seed"]))
    assert torch.equal(noise, loop["noise"])
    texts = (loop[f"context_{sign}"][0] for sign in ("positive", "negative"))
    w2c, K = torch.eye(4)[:3].expand(1, 9, 3, 4), torch.eye(3).expand(1, 9, 3, 3)
    inputs = sample.Inputs(noise, *texts, i["y_end"], None, w2c, K)
    how = sample.Sampling(steps=loop["steps"], guidance=loop["cfg"], read_last_step=True)
    with torch.no_grad():
        latents, geometry, _ = sample.generate(pair, inputs, how)
    assert opened == ["high", "low"]
    error = ((latents - loop["final"]).abs().max() / loop["final"].std()).item()
    pairs = {
        "pose_enc": (geometry["pose_enc"][-1], loop["pose_enc"]),
        "depth": (geometry["depth"][..., None], loop["depth"]),
        "points": (geometry["points"], loop["world_points"]),
    }
    errors = {k: (a - b).abs().max().item() for k, (a, b) in pairs.items()}
    print(error, errors)
    assert error < 1e-4 and max(errors.values()) < 1e-4


class ClosedForm:
    """The golden file's expert: a tanh(x) + b mean(context) + c t."""

    stage, cfg, dit = 2, None, SimpleNamespace(blocks=[None])

    def __init__(self, name, coefficients, log):
        self.name, self.coefficients, self.log = name, coefficients, log

    def rays(self, w2c, K, size):
        return None

    def to(self, device):
        return self

    def conditions(self, contexts, clip, rays, poses):
        text = torch.stack(contexts)  # (n, L, 8)
        return VideoConditions(text, None, None, [[(text, text)]])

    def __call__(self, x, t, context, y, *, constants, heads=True, video=True):
        a, b, c = self.coefficients
        text = constants.keys[0][0][0]
        mean = text.mean((1, 2)).view(-1, 1, 1, 1, 1)
        self.log.append((self.name, text, float(t[0]), heads))
        return dict(velocity=a * x.tanh() + b * mean + c * t.view(-1, 1, 1, 1, 1))


@pytest.mark.parametrize("n", range(8))
def test_sigmas_timesteps_experts_and_calls_are_those_of_the_official_loop(n):
    data = golden("sampler")
    want, log, half = data["runs"][n], [], data["runs"][n]["dtype"] == "bfloat16"
    experts = [ClosedForm(e, data["coefficients"][e], log) for e in ("high", "low")]
    openers = [lambda e=e: e for e in experts]
    pair = Experts(openers, want["boundary"], rounded=half)
    texts = [want["context_positive"][0].float()]
    negative = want["context_negative"]
    texts.append(torch.zeros_like(texts[0]) if negative is None else negative[0].float())
    w2c, K = torch.eye(4)[:3].expand(1, 9, 3, 4), torch.eye(3).expand(1, 9, 3, 3)
    inputs = sample.Inputs(want["noise"].float(), *texts, None, None, w2c, K)
    # Without a negative prompt, too, there is one pass.
    guidance = want["cfg"] if len(want["calls"]) > want["steps"] else 1
    how = sample.Sampling(steps=want["steps"], guidance=guidance, read_last_step=True)
    grid = []
    latents, _, _ = sample.generate(pair, inputs, how, progress=lambda x: grid.extend(x) or x)
    assert torch.equal(torch.tensor([now for now, _ in grid]), want["sigmas"].float())
    passes = [entry for entry in log if not entry[3]]
    read = [entry[0] for entry in log if entry[3]]
    assert read == [want["prediction_by"]]
    assert [name for name, *_ in passes] == want["experts"]
    t = torch.tensor([t for _, _, t, _ in passes])
    assert torch.equal(t, want["timesteps"])
    assert torch.equal(t.bfloat16().float() if half else t, want["t_seen"])
    signs = ["positive", "negative"]
    calls = [[name, sign] for name, text, *_ in passes for sign, _ in zip(signs, text)]
    assert calls == [call[:2] for call in want["calls"]]
    if not half:  # the official latents of those runs are rounded at every step
        error = (latents - want["final"]).abs().max() / want["final"].std()
        assert error < 1e-5


def test_the_switch_counts_high_steps_as_the_release_does_and_its_rounding_is_optional():
    data = golden("sampler")
    sigmas = {n: sample.shift_sigma(torch.linspace(1, 0, n + 1)[:-1]) for n in range(1, 101)}
    rounded, exact = Experts([None] * 2, rounded=True), Experts([None] * 2)

    def high(pair, n):
        return sum(pair.choose(1000 * s[None]) == 0 for s in sigmas[n])

    assert {n: high(rounded, n) for n in data["high_steps_at"]} == data["high_steps_at"]
    moved = [[n, high(exact, n), high(rounded, n)] for n in sigmas]
    assert [m for m in moved if m[1] != m[2]] == [
        row[:3] for row in data["bf16_switch"] if row[0] <= 100
    ]


def test_one_expert_is_in_memory_at_a_time_and_both_where_something_else_keeps_them():
    def pair(keep):
        return Experts([lambda: torch.nn.Linear(2, 2) for _ in range(2)], keep=keep)

    levels = [torch.tensor([t]) for t in (1000.0, 950.0, 900.0, 10.0)]
    one = pair(False)
    models = [one.at(t) for t in levels]
    assert models[0] is models[1] and models[2] is models[3] and models[0] is not models[2]
    assert models[0].weight.is_meta and not models[2].weight.is_meta
    assert one.to("cpu") is one and not models[2].weight.is_meta  # where it is at home
    one.to("meta")  # any other device: the own one is wanted for something else
    assert models[2].weight.is_meta
    both = pair(True)
    models = [both.at(t) for t in (*levels, levels[0])]
    assert models[-1] is models[0] and not any(m.weight.is_meta for m in models)
