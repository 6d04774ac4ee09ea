"""The changes of docs/hacking.md, made on a copy of the source."""

import importlib
import pathlib
import re
from dataclasses import replace
from types import SimpleNamespace

import torch
from small import TINY, loss_of, tiny_inputs

import geometry
from lib.rooms import Recipe, synth
from model import PRESETS

ROOT = pathlib.Path(__file__).parents[1]
CFG = SimpleNamespace(
    depth_mode="metric", alpha_tgm=1, beta_frame=1, gamma_conf=1, camera_delta=0.1, camera_weight=5
)


def copied(name, old, new, tmp_path, monkeypatch):
    source = (ROOT / f"{name}.py").read_text()
    assert source.count(old) == 1, "docs/hacking.md and this test name a line that is gone"
    (tmp_path / f"changed_{name}.py").write_text(source.replace(old, new))
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(f"changed_{name}")


def test_a_new_loss_is_one_line(tmp_path, monkeypatch):
    line = '        ("half", 0.5, (pred["depth"] - gt).square().mean()),\n    ]\n    loss = sum('
    changed = copied("geometry", "    ]\n    loss = sum(", line, tmp_path, monkeypatch)
    torch.manual_seed(0)
    shape = (1, 2, 8, 8)
    pred = dict(
        depth=torch.rand(shape) + 1,
        depth_conf=torch.rand(shape) + 1,
        points=torch.rand(*shape, 3),
        points_conf=torch.rand(shape) + 1,
        pose_enc=torch.rand(2, 1, 2, 9),
    )
    truth = dict(depth=torch.rand(shape) + 1, mask=torch.ones(shape, dtype=torch.bool))
    truth |= dict(points=torch.rand(*shape, 3), pose_enc=torch.rand(1, 2, 9))
    before, _ = geometry.geometry_losses(pred, truth, CFG)
    after, parts = changed.geometry_losses(pred, truth, CFG)
    want = (pred["depth"] - truth["depth"]).square().mean()
    torch.testing.assert_close(parts["half"], want)
    torch.testing.assert_close(after, before + 0.5 * want)


def test_another_bridge_is_one_line_and_trains(tmp_path, monkeypatch):
    old = "self.bridge = LatentBridge(D, C, cfg.bridge_layers, cfg.bridge_width, cfg.layer_scale)"
    new = "self.bridge = Plain(D, C)"
    changed = copied("model", old, new, tmp_path, monkeypatch)

    class Plain(torch.nn.Linear):
        def forward(self, x, f):
            return super().forward(x)

    changed.Plain = Plain
    cfg = replace(changed.PRESETS["tiny"], num_layers=3, num_pcb=2, taps=(0, 0, 0, 0))
    assert PRESETS["tiny"].num_pcb != 2, "the copy alone is changed"
    model = changed.FantasyWorld(cfg)
    model.set_stage(1)
    assert model.bridge.weight.requires_grad
    assert "bridge.weight" in model.state_dict()
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith("wan."))


def test_a_video_branch_that_trains_gets_a_gradient_everywhere(tmp_path, monkeypatch):
    source, old = (ROOT / "model.py").read_text(), 'TRAINED[1] + ("camera_adapters", "irg")'
    assert source.count("with torch.no_grad():") == 5 and source.count(old) == 1
    source = source.replace("with torch.no_grad():", "with nullcontext():")
    (tmp_path / "all_train.py").write_text(source.replace(old, f'{old} + ("wan",)'))
    monkeypatch.syspath_prepend(tmp_path)
    changed = importlib.import_module("all_train")
    torch.manual_seed(0)
    model = changed.FantasyWorld(changed.Config(**vars(TINY)))
    with torch.no_grad():
        for p in model.parameters():  # no gate hides what is behind it
            p.add_(0.05 * torch.randn_like(p))
    loss_of(model(**tiny_inputs())).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_the_lines_for_a_notebook_run_on_a_small_clip(tmp_path, monkeypatch):
    synth(tmp_path, Recipe(1, 5, 32, 48, variety="simple", cache_only=True))
    text = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    (code,) = re.findall("```python\n(.*?)```", text, re.S)
    for told, here in (('"data/demo"', repr(str(tmp_path))), ("(96, 160, 9)", "(32, 48, 5)")):
        assert code.count(told) == 1
        code = code.replace(told, here)
    monkeypatch.chdir(ROOT)
    found = {}
    exec(code, found)
    assert found["out"]["depth"].shape == (1, 5, 32, 48) and 0 < found["error"] < 0.5
