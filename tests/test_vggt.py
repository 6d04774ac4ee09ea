"""VGGT's weights start a geometry branch: its blocks are ours, its names become ours."""

import pytest
import torch
from released_keys import geo_block
from small import tiny_model
from wan_folder import random_tensors

from geometry import GeoBlock, rope_2d
from lib.weights import load_weights


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
    # plain, and modulated as a fresh model starts
    for rows in (
        None,
        torch.zeros(2, 6, c, dtype=torch.float64),
    ):
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
    # two geometry layers of VGGT's four
    model = tiny_model(1, camera_dim=64, camera_heads=2, camera_layers=2)
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
    sd.pop("aggregator.frame_blocks.1.mlp.fc1.bias")
    torch.save(dict(sd, **{"aggregator.camera_token": torch.zeros(1)}), tmp_path / "cut.pt")
    with pytest.raises(
        ValueError, match="first 2 layers: tensors differ: 1 missing .*1 of another"
    ):
        load_weights(tiny_model(1), tmp_path / "cut.pt")
    sd["aggregator.frame_blocks.0.stranger"] = torch.zeros(1)
    torch.save(sd, tmp_path / "more.pt")
    with pytest.raises(ValueError, match="1 missing .*1 unexpected"):
        load_weights(tiny_model(1), tmp_path / "more.pt")
