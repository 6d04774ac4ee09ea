"""The architecture: frozen and trained parts, batch correctness, starting point of each stage,
parameter table."""

import pathlib

import pytest
import torch
from small import TINY, loss_of, tiny_inputs, tiny_model

import wan
from model import (
    PRESETS,
    Config,
    FantasyWorld,
    clear_tables,
    flow_matching_loss,
    parameter_table,
    shift_sigma,
)
from sample import sample_euler, sample_unipc
from wan import WanDiT, half_precision, start_condition

GOLDEN = pathlib.Path(__file__).parent / "golden"

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "golden"


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- video branch against the official code
def test_wan_dit_matches_the_official_forward_with_ragged_prompts_and_two_timesteps():
    data = torch.load(GOLDEN / "dit_t2v_hd32.pt", weights_only=True)
    dit, inputs = WanDiT.from_state_dict(data["state_dict"], head_dim=32), data["inputs"]
    seen = {}
    for i, block in enumerate(dit.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: seen.update({f"block{i}": out}))
    with torch.no_grad():
        out = dit(inputs["x"], inputs["t"], inputs["context"])
        e, modulation = dit.modulation(inputs["t"])
        text = dit.conditions(inputs["context"]).text
    seen.update(time_e=e, time_e0=modulation.flatten(1), text=text)
    for name, tap in data["taps"].items():
        assert relative(seen[name], tap) < 1e-5, name
    assert relative(out, data["out_fp32"]) < 1e-5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (
            relative(dit(inputs["x"], inputs["t"], inputs["context"]).float(), data["out_fp32"])
            < 1e-2
        )


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs shared/golden (15 MB, not in the repository)"
)
def test_wan_camera_family_matches_the_official_forward(monkeypatch):
    data = torch.load(SHARED / "dit_camera_hd32.pt", weights_only=True)
    dit, inputs = WanDiT.from_state_dict(data["state_dict"], head_dim=32), data["inputs"]
    # The file holds packed rays (B, 24, f, H, W), random ones that no unpacked rays would give.
    monkeypatch.setattr(wan, "stacked_frames", lambda x: x.transpose(1, 2).flatten(0, 1))
    with torch.no_grad():
        args = [inputs[k] for k in ("x", "t", "context", "y", "clip_fea", "y_camera")]
        assert relative(dit(*args), data["out_fp32"]) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(dit(*args).float(), data["out_fp32"]) < 1e-2
        # as trained on a GPU: frozen matrices are stored in bf16
        with torch.autocast("cpu", torch.bfloat16):
            assert (
                relative(half_precision(dit, torch.bfloat16)(*args).float(), data["out_fp32"])
                < 1e-2
            )


def test_wan_loading_names_what_is_missing_or_of_another_shape():
    sd = torch.load(GOLDEN / "dit_t2v_hd32.pt", weights_only=True)["state_dict"]
    with pytest.raises(ValueError, match="blocks.1.norm3.bias"):
        WanDiT.from_state_dict(
            {k: v for k, v in sd.items() if k != "blocks.1.norm3.bias"}, head_dim=32
        )
    with pytest.raises(ValueError, match="stranger"):
        WanDiT.from_state_dict(dict(sd, stranger=torch.zeros(1)), head_dim=32)
    with pytest.raises(ValueError, match="another shape.*norm3"):
        WanDiT.from_state_dict(dict(sd, **{"blocks.2.norm3.bias": torch.zeros(3)}), head_dim=32)
    with pytest.raises(ValueError, match=r"differ: \d+ missing .'blocks.1.\S+, \S+, \S+\. Is it"):
        WanDiT.from_state_dict(  # a shard in the middle
            {k: v for k, v in sd.items() if not k.startswith("blocks.1.")}, head_dim=32
        )
    # As many layers were built first: minutes, or all memory.
    with pytest.raises(ValueError, match="1 unexpected .*99999999"):
        WanDiT.from_state_dict(dict(sd, **{"blocks.99999999.x": torch.zeros(1)}), head_dim=32)


# ---- parameter table
def test_parameter_table_is_within_ten_percent_of_the_guide():
    with torch.device("meta"):
        count = FantasyWorld(PRESETS["1.3b"]).count_parameters()
    assert count["wan"] == 1_616_313_152  # exactly Wan2.1-Fun-V1.1-1.3B-Control-Camera
    stage1 = sum(count[k] for k in FantasyWorld.TRAINED[1])
    stage2 = sum(count[k] for k in FantasyWorld.TRAINED[2])
    assert abs(stage1 / 956e6 - 1) < 0.1 and abs(stage2 / 1186e6 - 1) < 0.1
    assert "geodit" in parameter_table("1.3b")


def test_14b_preset_has_the_released_sizes():
    with torch.device("meta"):
        model = FantasyWorld(PRESETS["14b"])
    count = model.count_parameters()
    assert count["wan"] == 16_394_878_784  # Wan2.1-I2V-14B-480P
    assert count["irg"] == 510_013_440 and count["bridge"] == 5_243_904  # fantasyworld.md section 7
    assert sum(p.numel() for p in model.frame_blocks.parameters()) == 302_512_128
    assert sum(p.numel() for p in model.depth_head.parameters()) == 195_143_650
    assert sum(p.numel() for p in model.point_head.parameters()) == 195_143_716


# ---- stages
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one_moves(stage):
    model, inputs = tiny_model(stage), tiny_inputs()
    # zero in a fresh DiT, which would hide the last exchange
    torch.nn.init.normal_(model.dit.head.head.weight)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    touched = set()
    for _ in range(3):  # zero-initialised gates hide what is behind them in the first step
        loss_of(model(**inputs, video=stage != 1)).backward()
        touched |= {
            n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
        }
        optimizer.step()
        optimizer.zero_grad()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert touched == trainable
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n not in trainable)
    wan = {n for n in before if n.startswith("dit.")}
    assert (wan == trainable) if stage == 0 else not (wan & trainable)


def test_zero_gates_leave_wan_velocity_untouched_and_geometry_equal_to_stage_1():
    model, inputs = tiny_model(2), tiny_inputs()
    inputs["poses"] = inputs["poses"] * 3
    with torch.no_grad():
        both = model.set_stage(2)(**inputs)
        alone = model.set_stage(1)(**inputs, video=False)
        plain = {k: v for k, v in inputs.items() if k != "poses"}
        assert torch.equal(both["velocity"], model.dit(**plain))
    assert alone.pop("velocity") is None
    assert all(torch.equal(alone[k], both[k]) for k in alone)


def test_awake_exchange_and_adapters_change_both_branches():
    model, inputs = tiny_model(2, awake=True), tiny_inputs()
    with torch.no_grad():
        both, alone = model(**inputs), model.set_stage(1)(**inputs)
    assert relative(both["velocity"], alone["velocity"]) > 1e-3
    assert relative(both["depth"], alone["depth"]) > 1e-5  # rounding alone gives 1e-7


def test_stage_1_builds_no_graph_through_wan():
    model, inputs = tiny_model(1), tiny_inputs()
    seen = []
    for block in model.dit.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(out.requires_grad))
    model(**inputs, video=False)
    assert seen == [False] * TINY.num_pcb, "only the PCB runs, and without autograd"


def test_stage_2_computes_no_weight_gradient_in_wan():
    model = tiny_model(2, awake=True)
    loss_of(model(**tiny_inputs())).backward()
    assert all(p.grad is None for p in model.dit.parameters())


def test_video_false_is_refused_when_stage_2_trains():
    with pytest.raises(ValueError, match="video=False"):
        tiny_model(2)(**tiny_inputs(), video=False)


# ---- batches
@pytest.mark.parametrize("stage", [1, 2])
def test_a_sample_in_a_batch_gives_what_it_gives_alone(stage):
    model, inputs = tiny_model(stage, awake=True), tiny_inputs(batch=3)
    with torch.no_grad():
        together = model(**inputs)
        for i in range(3):
            alone = model(**{k: v[i : i + 1] for k, v in inputs.items()})
            for key, value in alone.items():
                batch_axis = 1 if key == "pose_enc" else 0
                torch.testing.assert_close(
                    together[key].select(batch_axis, i),
                    value.select(batch_axis, 0),
                    rtol=1e-4,
                    atol=1e-5,
                )


def test_dropping_a_clips_camera_equals_not_giving_it():
    model, inputs = tiny_model(2, awake=True), tiny_inputs(batch=2)
    with torch.no_grad():
        mixed = model(**inputs, keep=torch.tensor([1.0, 0.0]))
        given = model(**inputs)
        without = model(**{**inputs, "poses": None, "plucker": None})
    for key in ("velocity", "depth", "points"):
        torch.testing.assert_close(mixed[key][0], given[key][0])
        torch.testing.assert_close(mixed[key][1], without[key][1])


def test_checkpointed_activations_change_neither_values_nor_gradients():
    gradients = []
    for how in ("none", "selective", "full"):
        model = tiny_model(2, awake=True, head_chunk=16 if how == "none" else 2)
        model.checkpoint_activations = how
        loss_of(model(**tiny_inputs())).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, g in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(g, other[name], rtol=1e-4, atol=1e-5)


def test_a_look_in_inference_mode_leaves_nothing_that_a_later_training_step_meets():
    size = dict(height=16, width=80)  # of no other test: its tables of positions are made here
    model, inputs = tiny_model(awake=True), tiny_inputs(**size)
    with torch.inference_mode():
        model(**inputs)
    loss_of(model(**inputs)).backward()


def test_taps_beyond_the_last_layer_are_refused():
    with pytest.raises(ValueError, match="taps"):
        FantasyWorld(Config(**{**TINY.__dict__, "taps": (0, 1, 2, 9)}))


# ---- flow matching
def test_euler_with_the_true_velocity_recovers_the_data_in_any_number_of_steps():
    g = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 16, 2, 4, 4, generator=g), torch.randn(2, 16, 2, 4, 4, generator=g)
    for steps in (1, 3, 50):
        torch.testing.assert_close(
            sample_euler(lambda x, t: noise - data, noise, steps), data, rtol=0, atol=1e-5
        )


def test_euler_visits_the_shifted_grid():
    times = []
    sample_euler(lambda x, t: times.append(t[0].item()) or x, torch.zeros(1, 1), 50)
    assert (
        times[0] == 1000
        and times[1] == pytest.approx(995.93, abs=0.01)
        and times[-1] == pytest.approx(92.59, abs=0.01)
    )
    assert shift_sigma(0.5) == pytest.approx(0.8333, abs=1e-4)


@pytest.mark.parametrize("run", ["unipc_6_3", "unipc_6_5", "unipc_20_5", "unipc_20_8"])
def test_unipc_walks_the_official_trajectory(run):
    golden = torch.load(GOLDEN / "sched.pt", weights_only=True)
    want, (_, steps, shift), visited = golden["runs"][run], run.split("_"), []

    def velocity(x, t):  # of the golden file: 0.6 x + sin(3 sigma) c
        visited.append((t.item(), x))
        return 0.6 * x + torch.sin(3 * t / 1000) * golden["c"]

    out = sample_unipc(velocity, golden["noise"], int(steps), shift=float(shift))
    assert [t for t, _ in visited] == want["timesteps"].tolist()
    assert relative(out, want["traj"][-1]) < 1e-5
    for (_, x), there in zip(visited, want["traj"]):
        assert relative(x, there) < 1e-5  # fp32; the official steps are fp32 too


def test_flow_matching_loss_is_per_clip_and_zero_at_noise_minus_data():
    noise, data = torch.randn(2, 4), torch.randn(2, 4)
    assert flow_matching_loss(noise - data, data, noise).tolist() == [0, 0]
    assert flow_matching_loss(
        noise - data + torch.tensor([[0.0], [2.0]]), data, noise
    ).tolist() == pytest.approx([0, 4])


def test_start_condition_has_the_channels_of_the_family():
    start = torch.randn(2, 16, 1, 4, 4)
    assert start_condition(start, 16, 3) is None
    y = start_condition(start, 32, 3)
    assert torch.equal(y[:, :, :1], start) and y[:, :, 1:].abs().sum() == 0
    y = start_condition(torch.randn(2, 16, 3, 4, 4), 36, 3)
    assert y[:, :4, 0].eq(1).all() and y[:, :4, 1:].eq(0).all() and y.shape[1] == 20


def test_an_export_leaves_no_tables_that_later_forwards_would_take():
    """Seen: after torch.export a forward gave tensors without values."""
    model, inputs = tiny_model(2, num_layers=2, num_pcb=1, taps=(0,) * 4), tiny_inputs()
    model.requires_grad_(False)
    clear_tables()
    program = torch.export.export(model, (), dict(inputs, heads=False), strict=False)
    exported = program.module()(**inputs, heads=False)
    assert torch.equal(exported["velocity"], model(**inputs, heads=False)["velocity"])
