"""Write a complete Wan2.1 folder with random weights under the official names: tiny for the tests,
or at true width.

    python tests/wan_folder.py DIR --size tiny | 1.3b

1.3b is Fun-V1.1-1.3B-Control-Camera at its exact shapes in bf16 (3.2 GB), the exact VAE and vision
tower, and umT5 at its width with 2 of 24 layers and a small vocabulary: 6 GB in all, to measure
memory and time without a download."""

import argparse
import importlib.util
import json
import pathlib

import torch
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).parent / "golden"

spec = importlib.util.spec_from_file_location("wan_ckpt_keys", GOLDEN / "wan_ckpt_keys.py")

keys = importlib.util.module_from_spec(spec)

spec.loader.exec_module(keys)


WORDS = (
    "a room with one two three box boxes red green blue grey ball the camera moves forward".split()
)

SIZES = {
    "tiny": dict(
        dit=dict(dim=64, ffn=96, layers=4, text=64, freq=64),
        vae=dict(dim=8),
        dtype=torch.float32,
        t5=dict(vocab=64, dim=64, attn=64, ffn=96, heads=4, layers=2),
        clip=dict(layers=2),
        shards=3,
    ),
    # I2V layout (in_dim 36, no camera) at the release's head widths, for tests/released_keys.py
    # TINY
    "i2v": dict(
        dit=dict(dim=128, ffn=160, layers=5, text=64, freq=64),
        vae=dict(dim=8),
        dtype=torch.float32,
        t5=dict(vocab=64, dim=64, attn=64, ffn=96, heads=4, layers=2),
        clip=dict(layers=2),
        shards=3,
    ),
    "1.3b": dict(
        dit=dict(dim=1536, ffn=8960, layers=30),
        vae=dict(dim=96),
        dtype=torch.bfloat16,
        t5=dict(vocab=64, layers=2),
        clip=dict(layers=32),
        shards=1,
    ),
}

# A geometry branch and head size to go with the tiny folder: the value of --model_overrides.
OVERRIDES = dict(
    head_dim=32,
    num_pcb=2,
    geo_dim=32,
    geo_heads=2,
    bridge_layers=1,
    bridge_width=32,
    pose_hidden=32,
    irg_dim=32,
    irg_heads=2,
    taps=(0, 0, 1, 1),
    dpt_channels=(8, 8, 8, 8),
    dpt_features=8,
    dpt_tail=4,
    camera_dim=16,
    camera_heads=2,
    camera_layers=1,
    camera_iterations=2,
)


def random_tensors(shapes, dtype, seed=0):
    """name -> tensor: ones for norms, matrices that keep the variance, small biases."""
    g, sd = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        if (
            "norm" in name
            and name.endswith("weight")
            or name.endswith("gamma")
            or ".proj.0.w" in name
        ):
            sd[name] = torch.ones(shape, dtype=dtype)
        else:
            fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 400
            x = torch.empty(shape).uniform_(-1, 1, generator=g) * (3 / fan_in) ** 0.5
            sd[name] = x.to(dtype)
    return sd


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(words[:3])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_wan_folder(folder, size="tiny", in_dim=32, clip=True, camera=True, prefix=""):
    """Sharded DiT with index, VAE, umT5, CLIP and tokenizer of a family; returns the folder."""
    folder, s = pathlib.Path(folder), SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    dit = random_tensors(keys.dit(**s["dit"], in_dim=in_dim, clip=clip, camera=camera), s["dtype"])
    names, index = list(dit), {}
    for i in range(s["shards"]):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{s['shards']:05d}.safetensors"
        part = {prefix + name: dit[name] for name in names[i :: s["shards"]]}
        save_file(part, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(dict(weight_map=index))
    )
    torch.save(random_tensors(keys.vae(**s["vae"]), torch.float32, 1), folder / "Wan2.1_VAE.pth")
    torch.save(
        random_tensors(keys.t5(**s["t5"]), torch.bfloat16, 2),
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    if clip:
        tower = keys.clip(**s["clip"], t_layers=1, t_dim=8, vocab=16, maxlen=8)
        torch.save(
            random_tensors(tower, torch.float16, 3),
            folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        )
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def write_pair_folder(folder, size="i2v", encoders="."):
    """A Wan2.2 pair: two experts of different weights (high in one file), encoders beside them or
    where else they should lie; returns the folder."""
    folder, dit = pathlib.Path(folder), SIZES[size]["dit"]
    write_wan_folder(folder / "low_noise_model", size, in_dim=36, clip=False, camera=True)
    (folder / "high_noise_model").mkdir()
    shapes = keys.dit(**dit, in_dim=36, clip=False, camera=True)
    high = random_tensors(shapes, SIZES[size]["dtype"], 7)
    save_file(high, folder / "high_noise_model" / "diffusion_pytorch_model.safetensors")
    (folder / encoders).mkdir(parents=True, exist_ok=True)
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google"):
        (folder / "low_noise_model" / name).rename(folder / encoders / name)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    args = parser.parse_args()
    print(write_wan_folder(args.folder, args.size))
