"""The switches of the ablation table: what is off is not there, the rest trains, stage 2 starts
where stage 1 ended."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small import loss_of, tiny_inputs, tiny_model

from lib.strangers import config_from_metadata
from lib.weights import load_trained
from model import FantasyWorld

SWITCHES = [
    dict(exchange="none"),
    dict(exchange="to_geometry"),
    dict(exchange="to_video"),
    dict(camera_adapters=False),
    dict(exchange="none", camera_adapters=False),
    dict(pose_tokens=False),
    dict(constant_rays=True),
    dict(pose_tokens=False, camera_adapters=False),
    dict(num_pcb=1, taps=(0, 1, 1, 2)),
    dict(num_pcb=3, taps=(0, 0, 0, 0)),
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_trainable_parameter_of_an_ablation_gets_a_gradient(switches):
    model = tiny_model(2, awake=True, **switches)
    loss_of(model(**tiny_inputs())).backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    lost = [n for n, p in trained if p.grad is None or not p.grad.abs().sum() > 0]
    assert trained and not lost, lost


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_an_ablation_starts_stage_2_with_wans_velocity_and_stage_1s_geometry(switches):
    model, inputs = tiny_model(2, **switches), tiny_inputs()
    with torch.no_grad():
        both, alone = model.set_stage(2)(**inputs), model.set_stage(1)(**inputs, video=False)
        plain = model.dit(**{k: v for k, v in inputs.items() if k != "poses"})
    assert torch.equal(both["velocity"], plain)
    assert all(torch.equal(alone[k], both[k]) for k in alone if k != "velocity")


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)


def test_without_exchange_and_adapters_the_video_is_wans_and_geometry_trains_alone():
    model, inputs = tiny_model(2, awake=True, exchange="none", camera_adapters=False), tiny_inputs()
    count = model.count_parameters()
    assert count["irg"] == count["camera_adapters"] == 0 and count["geodit"] > 0
    plain = {k: v for k, v in inputs.items() if k != "poses"}
    assert torch.equal(outputs(model, inputs)["velocity"], outputs(model.dit, plain))


def test_without_pose_tokens_stage_1_does_not_see_the_pose_and_trains_no_encoder():
    model, inputs = tiny_model(1, awake=True, pose_tokens=False), tiny_inputs()
    moved = dict(inputs, poses=inputs["poses"] + 0.1)
    assert torch.equal(outputs(model, inputs)["depth"], outputs(model, moved)["depth"])
    assert not any(k.startswith("pose_encoder.") for k in model.trainable_state_dict())
    with_tokens = tiny_model(1, awake=True)
    assert not torch.equal(
        outputs(with_tokens, inputs)["depth"], outputs(with_tokens, moved)["depth"]
    )


def test_a_video_branch_without_rays_gets_none_and_the_geometry_its_poses():
    model, inputs = tiny_model(2, video_rays=False), tiny_inputs()
    assert model.rays(*[None] * 3) is None
    blind = dict(inputs, plucker=None)
    moved = dict(blind, poses=inputs["poses"] + 0.1)
    assert torch.equal(outputs(model, blind)["velocity"], outputs(model, moved)["velocity"])
    assert not torch.equal(outputs(model, blind)["depth"], outputs(model, moved)["depth"])


def test_to_geometry_leaves_the_video_alone_and_to_video_the_geometry():
    inputs = tiny_inputs()
    for ways, kept, moved in (
        ("to_geometry", "velocity", "depth"),
        ("to_video", "depth", "velocity"),
    ):
        model = tiny_model(2, awake=True, exchange=ways)
        with_exchange = outputs(model, inputs)
        for step in model.irg:
            step.exchange = None
        without = outputs(model, inputs)
        assert torch.equal(with_exchange[kept], without[kept]), ways
        assert not torch.equal(with_exchange[moved], without[moved]), ways


def test_one_way_exchange_holds_half_of_the_values_and_outputs():
    names = lambda ways: {n for n, _ in tiny_model(2, exchange=ways).exchange[0].named_parameters()}
    assert names("to_geometry") | names("to_video") == names("both") and "gamma_m1" not in names(
        "to_geometry"
    )
    assert names("to_geometry") & names("to_video") == {
        f"cross_attn.{m}_proj.{p}" for m in ("m1", "m2") for p in ("weight", "bias")
    }


def test_an_ablations_checkpoint_loads_into_its_own_config_only(tmp_path):
    model = tiny_model(2, awake=True, exchange="to_video", camera_adapters=False)
    meta = dict(stage="2", step="1", model_config=json.dumps(model.cfg.__dict__))
    save_file(
        {k: v.contiguous() for k, v in model.trainable_state_dict().items()},
        tmp_path / "x.safetensors",
        meta,
    )
    again = FantasyWorld(config_from_metadata(meta, "x"))
    load_trained(again, tmp_path / "x.safetensors")
    loaded = again.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in model.trainable_state_dict().items())
    with pytest.raises(ValueError, match="does not fit this model"):
        load_trained(tiny_model(2), tmp_path / "x.safetensors")


def test_an_unknown_way_is_refused_by_name():
    with pytest.raises(
        ValueError, match="exchange = 'sideways'; wanted both, to_geometry, to_video or none"
    ):
        tiny_model(exchange="sideways")
