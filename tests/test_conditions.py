"""What goes into the release on Wan2.2 beside its weights: a LoRA, start and end image, rays."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_experts import HERE, golden

import released
from encoders import WanVAE, encode_start
from lib.crop import load_image
from lib.lora import with_lora
from lib.pictures import write_png
from wan import LATENT, start_condition


# ---- LoRA
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_lora_is_merged_bit_for_bit_as_the_release_merges_it(tmp_path, kind):
    data = golden("lora")
    case, dtype = data["cases"][f"reward_layout_{kind}"], getattr(torch, kind)
    save_file(case["lora"], tmp_path / "lora.safetensors")
    base = {k: (tuple(v.shape), lambda v=v: v.to(dtype)) for k, v in data["base"].items()}
    got = {
        k: read() for k, (_, read) in with_lora(base, str(tmp_path / "lora.safetensors")).items()
    }
    assert len(case["merged"]) == 22 and got.keys() == base.keys()
    for name, value in got.items():
        assert torch.equal(value, case["merged"].get(name, base[name][1]())), name


def test_a_lora_of_another_model_is_refused_by_name_and_peft_names_are_read(tmp_path):
    path, base = str(tmp_path / "lora.safetensors"), {"blocks.0.q.weight": torch.randn(6, 4)}
    lazy = {k: (tuple(v.shape), lambda v=v: v) for k, v in base.items()}
    up, down = torch.randn(6, 2), torch.randn(2, 4)
    peft, kohya = ("B.weight", "A.weight"), ("up.weight", "down.weight")
    for start, ends in (
        ("diffusion_model.blocks.0.q.lora_", peft),
        ("diffusion_model.blocks.0.q.lora_", ("B.default.weight", "A.default.weight")),
        ("base_model.model.blocks.0.q.lora_", peft),
        ("transformer.blocks.0.q.lora_", peft),
        ("lora_unet_blocks_0_q.lora_", kohya),  # musubi-tuner: was another model's LoRA
        ("lora_unet__blocks_0_q.lora_", kohya),  # VideoX-Fun
    ):
        save_file({start + end: part for end, part in zip(ends, (up, down))}, path)
        got = with_lora(lazy, path)["blocks.0.q.weight"][1]()
        torch.testing.assert_close(got, base["blocks.0.q.weight"] + 0.55 * up @ down)
    wrong = {
        "no linear layer of this video branch": {"lora_unet__blocks_9_q.lora_up.weight": up},
        r"has \['up'\] alone; wanted down and up": {"lora_unet__blocks_0_q.lora_up.weight": up},
        r"is \(6, 4\), its LoRA \(6, 2\) x \(2, 5\)": {
            "lora_unet__blocks_0_q.lora_up.weight": up,
            "lora_unet__blocks_0_q.lora_down.weight": torch.randn(2, 5),
        },
    }
    for said, tensors in wrong.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=said):
            with_lora(lazy, path)


# ---- conditions
class MeanVAE:
    """The golden file's: means of 8 x 8 pixels and of a latent's frames, then a projection."""

    def __init__(self, projection):
        self.projection = projection

    def encode(self, video):
        x = F.avg_pool3d(video.float(), (1, 8, 8))  # (B, 3, T, h, w)
        rest = F.avg_pool3d(x[:, :, 1:], (LATENT.time, 1, 1))
        x = torch.cat([x[:, :, :1], rest], 2)
        return torch.einsum("bcfhw,dc->bdfhw", x, self.projection)


@pytest.mark.parametrize("n", range(5))
def test_the_condition_of_start_and_end_image_is_the_official_one(n):
    data = golden("conditions")
    case = data["cases"][n]
    kinds = ("start", "end") if case["end"] else ("start",)
    images = [case[f"{kind}_resized"].permute(2, 0, 1)[None, :, None] / 127.5 - 1 for kind in kinds]
    vae = released.Tiles(MeanVAE(data["projection"]))
    latents = encode_start(vae, torch.cat(images, 2), case["frames"], "constant")
    y = start_condition(latents, 36, latents.shape[2], case["end"])
    # In bf16 the official images and latents are rounded to 8 bits.
    bound = 1e-6 if case["dtype"] == "float32" else 0.005
    assert (y - case["y"].float()).abs().max() < bound
    assert torch.equal(y[:, :4], case["y"][:, :4].float())


def test_an_image_is_squeezed_as_pillow_squeezes_it(tmp_path):
    for case in golden("conditions")["cases"][:2]:
        write_png(tmp_path / "x.png", case["start_image"].numpy())
        got = (load_image(tmp_path / "x.png", *case["size"], squeeze=True) + 1) * 127.5
        off = (got[0, :, 0].permute(1, 2, 0) - case["start_resized"]).abs()
        assert off.max() < 1.01 and off.mean() < 0.005  # one level in 250 values


def test_tiles_of_the_vae_and_constant_rays_are_the_official_ones():
    data, vae = golden("conditions"), golden_vae()
    tiles = data["vae"]
    got = released.Tiles(vae, tiles["tile_size"], tiles["tile_stride"]).encode(tiles["video"])
    assert (got - tiles["encoded_tiled"]).abs().max() < 1e-5
    assert (vae.encode(tiles["video"]) - tiles["encoded_whole"]).abs().max() < 1e-5
    # As large as a tile: the same thing.
    whole = released.Tiles(vae, (8, 12), (4, 6)).encode(tiles["video"])
    assert torch.equal(whole, vae.encode(tiles["video"]))
    rays = data["rays"]
    w2c = torch.linalg.inv(rays["c2w"])[None, :, :3]
    got = released.constant_rays(w2c, rays["K"][None], rays["size"])[..., ::8, ::8]
    want = rays["plucker"].permute(0, 4, 1, 2, 3)
    assert (got - want).abs().max() < 1e-5


def golden_vae():
    return WanVAE.from_state_dict(torch.load(HERE / "vae_tiny.pt", weights_only=True)["state_dict"])
