"""Name -> shape of every tensor of the released FantasyWorld models, for any sizes.

Written from the list in the specification, not from our modules: at the release's sizes it has 3132
names and 18,542,823,881 parameters, at the golden file's sizes exactly the 814 names and shapes of
that file (tests).  An expert of the Wan2.2 variant (no encoder, nothing adapted): 2658 names,
16,543,568,600 parameters.

    python tests/released_keys.py DIR [--pcb 1 --irg 1]

writes a model.pth and its base at the release's true widths with fewer blocks, fp32, and measures
loading it in bf16."""

import argparse
import pathlib
import subprocess
import sys

import torch
from safetensors.torch import save_file
from wan_folder import keys, random_tensors

RELEASE = dict(
    dim=5120,
    ffn=13824,
    text=4096,
    freq=256,
    pcb=16,
    irg=24,
    geo=1024,
    geo_head=64,
    pose=128,
    bicross=1152,
    plucker=2048,
    adapted=25,
    encoder=5120,
    dpt=(256, 512, 1024, 1024),
    features=256,
    tail=32,
    trunk=4,
)

GOLDEN = dict(
    RELEASE,
    dim=96,
    ffn=160,
    text=48,
    pcb=2,
    irg=4,
    geo=64,
    geo_head=16,
    bicross=48,
    plucker=40,
    adapted=6,
    encoder=96,
    dpt=(16, 24, 32, 32),
    features=32,
)

# Head widths of the release (128, 96, 64, 128), so that no head count has to be told; adapters end
# inside the IRG part.
TINY = dict(
    RELEASE,
    dim=128,
    ffn=160,
    text=64,
    freq=64,
    pcb=2,
    irg=3,
    geo=64,
    bicross=96,
    plucker=40,
    adapted=3,
    encoder=72,
    dpt=(8, 12, 16, 20),
    features=16,
    tail=8,
    trunk=2,
)


def expert(sizes):
    """An expert of the Wan2.2 variant at the same sizes."""
    return dict(sizes, adapted=0, encoder=0)


def linear(name, n_in, n_out, *kernel):
    return {f"{name}.weight": (n_out, n_in, *kernel), f"{name}.bias": (n_out,)}


def norm(name, n):
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def geo_block(name, c, head=0):
    """VGGT's block with FantasyWorld's modulation; head = 0: without norms of queries and keys."""
    out = {f"{name}.modulation": (1, 6, c), f"{name}.ls1.gamma": (c,), f"{name}.ls2.gamma": (c,)}
    for part in (
        norm(f"{name}.norm1", c),
        norm(f"{name}.norm2", c),
        linear(f"{name}.attn.qkv", c, 3 * c),
        linear(f"{name}.attn.proj", c, c),
        linear(f"{name}.mlp.fc1", c, 4 * c),
        linear(f"{name}.mlp.fc2", 4 * c, c),
    ):
        out.update(part)
    for which in ("q", "k") if head else ():
        out.update(norm(f"{name}.attn.{which}_norm", head))
    return out


def adapter(name, dim, plucker):
    hidden = min(dim, plucker) // 2
    return {
        **linear(f"{name}.k_proj.group1", plucker, plucker),
        **linear(f"{name}.k_proj.group2.0", dim, hidden),
        **linear(f"{name}.k_proj.group2.2", hidden, plucker),
        **linear(f"{name}.v_proj.group2.0", plucker, plucker // 5),
        **linear(f"{name}.v_proj.group2.2", plucker // 5, dim),
    }


def dpt_head(name, n_in, channels, features, tail, n_out):
    out = norm(f"{name}.norm", n_in)
    for i, c in enumerate(channels):
        out.update(linear(f"{name}.projects.{i}", n_in, c, 1, 1))
        if i != 2:
            out.update(linear(f"{name}.resize_layers.{i}", c, c, *((4, 2, 0, 3)[i],) * 2))
        up = f"{name}.temporal_upsamplers.{i}"
        out.update(linear(f"{up}.conv2", c, c, 1, 1, 1))
        for j in (0, 2):
            out.update(linear(f"{up}.decoder.upsamples.{j}.time_conv", c, 2 * c, 3, 1, 1))
            out[f"{up}.decoder.upsamples.{j + 1}.residual.0.gamma"] = (c, 1, 1, 1)
            out.update(linear(f"{up}.decoder.upsamples.{j + 1}.residual.2", c, c, 3, 3, 3))
        out[f"{name}.scratch.layer{i + 1}_rn.weight"] = (features, c, 3, 3)
        refine = f"{name}.scratch.refinenet{i + 1}"
        out.update(linear(f"{refine}.out_conv", features, features, 1, 1))
        for unit in (1, 2) if i < 3 else (2,):
            for conv in (1, 2):
                out.update(
                    linear(f"{refine}.resConfUnit{unit}.conv{conv}", features, features, 3, 3)
                )
    return {
        **out,
        **linear(f"{name}.scratch.output_conv1", features, features // 2, 3, 3),
        **linear(f"{name}.scratch.output_conv2.0", features // 2, tail, 3, 3),
        **linear(f"{name}.scratch.output_conv2.2", tail, n_out, 1, 1),
    }


def camera_head(name, c, trunk):
    out = {
        f"{name}.empty_pose_tokens": (1, 1, 9),
        **norm(f"{name}.token_norm", c),
        **norm(f"{name}.trunk_norm", c),
        **linear(f"{name}.embed_pose", 9, c),
        **linear(f"{name}.poseLN_modulation.1", c, 3 * c),
        **linear(f"{name}.pose_branch.fc1", c, c // 2),
        **linear(f"{name}.pose_branch.fc2", c // 2, 9),
    }
    for i in range(trunk):
        out.update(geo_block(f"{name}.trunk.{i}", c))
    return {**out, **linear(f"{name}.camera_time_upsample.expand_channels", c, 4 * c, 1)}


def wan_shapes(s):
    """The base in its official names: Wan2.1-I2V, or an expert of Wan2.2-Fun-Control-Camera."""
    return keys.dit(
        dim=s["dim"],
        ffn=s["ffn"],
        layers=s["pcb"] + s["irg"],
        in_dim=36,
        clip=s["encoder"] > 0,
        camera=s["encoder"] == 0,
        text=s["text"],
        freq=s["freq"],
    )


def release_shapes(s, video=True):
    """All tensors; video=False leaves out those of the base."""
    dim, c, b, out = s["dim"], s["geo"], s["bicross"], {}
    for name, shape in wan_shapes(s).items() if video else ():
        part, _, inner = name.removeprefix("blocks.").partition(".")
        late = name.startswith("blocks.") and int(part) >= s["pcb"]
        out[f"IRGBlock.{int(part) - s['pcb']}.x_dit.{inner}" if late else f"pipe.dit.{name}"] = (
            tuple(shape)
        )
    for i in range(s["adapted"]):
        block = f"pipe.dit.blocks.{i}" if i < s["pcb"] else f"IRGBlock.{i - s['pcb']}.x_dit"
        out.update(adapter(f"{block}.cross_attn.processor", dim, s["plucker"]))
    for i in range(s["irg"]):
        out.update(geo_block(f"IRGBlock.{i}.x_agg", c, s["geo_head"]))
        out.update(geo_block(f"vggt.aggregator.frame_blocks.{i}", c, s["geo_head"]))
        name = f"IRGBlock.{i}.bicross_attention"
        out.update({f"{name}.gamma_m1": (dim,), f"{name}.gamma_m2": (c,)})
        for m, width in (("m1", dim), ("m2", c)):
            out.update(
                {
                    **linear(f"{name}.cross_attn.{m}_proj", width, b),
                    **linear(f"{name}.cross_attn.values_{m}_proj", width, b),
                    **linear(f"{name}.cross_attn.out_{m}_proj", b, width),
                }
            )
    out.update(
        {
            "vggt.aggregator.camera_token": (1, 2, 1, c),
            "vggt.aggregator.register_token": (1, 2, 4, c),
        }
    )
    for part in (
        linear("vggt.projection_head", dim, c, 1, 1, 1),
        linear("vggt.time_embedding.0", s["freq"], c),
        linear("vggt.time_embedding.2", c, c),
        linear("vggt.time_projection.1", c, 6 * c),
        linear("vggt.aggregator.CamTokenProjector.mlp.0", 36, s["pose"]),
        linear("vggt.aggregator.CamTokenProjector.mlp.2", s["pose"], c),
        camera_head("vggt.camera_head", 2 * c, s["trunk"]),
        *(
            dpt_head(f"vggt.{head}_head", 2 * c, s["dpt"], s["features"], s["tail"], n)
            for head, n in (("depth", 2), ("point", 4))
        ),
    ):
        out.update(part)
    return {**out, **ray_encoder(s)} if s["encoder"] else out


def ray_encoder(s):
    out, e = {}, "camera_condition.pose_encoder"
    for i, (first, second) in enumerate(((384, 384), (384, 384))):
        out.update(
            {
                **linear(f"{e}.controlnet_encode_first.{2 * i}", first, second, 1, 1),
                **norm(f"{e}.controlnet_encode_first.{2 * i + 1}", second),
            }
        )
    width = s["encoder"]
    return {
        **out,
        **linear(f"{e}.controlnet_encode_second.0", 384, 768, 1, 1),
        **norm(f"{e}.controlnet_encode_second.1", 768),
        **linear(f"{e}.patch_embedding", 768, width, 1, 2, 2),
        **linear(f"{e}.fc.0", width, width // 2),
        **norm(f"{e}.fc.1", width // 2),
        **linear(f"{e}.fc.3", width // 2, s["plucker"]),
        **norm(f"{e}.fc.4", s["plucker"]),
    }


def release_tensors(s, seed=0, video=True, dtype=None):
    """Random tensors in the release's names: every part awake, gates and zero starts included."""
    sd = random_tensors(release_shapes(s, video), dtype or torch.float32, seed)
    g = torch.Generator().manual_seed(seed + 1)
    for name, value in sd.items():
        if value.dim() == 1 or name.endswith(("modulation", "_tokens", "_token")):
            value.add_(0.3 * torch.randn(value.shape, generator=g).to(value.dtype))
    return sd


def write_zeros(s, folder):
    """model.pth without the video branch and its base in one file, fp32."""
    torch.save(
        {name: torch.zeros(shape) for name, shape in release_shapes(s, video=False).items()},
        folder / "model.pth",
    )
    save_file(
        {name: torch.zeros(shape) for name, shape in wan_shapes(s).items()},
        folder / "diffusion_pytorch_model.safetensors",
    )


# VmHWM, not ru_maxrss: that one starts at the size of the process that we were started from.  A
# small model first: the meta device makes torch import 70 MB of its own code.
MEASURE = """
import re, sys, torch
from lib.weights import load_release
from model import PRESETS, FantasyWorld
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
with torch.device("meta"):
    FantasyWorld(PRESETS["tiny"])
before = peak()
model = load_release(sys.argv[1] + "/model.pth", sys.argv[1], "cpu", torch.bfloat16)
weights = sum(p.nbytes for p in model.parameters())
print((peak() - before) / weights, weights)
"""


def measure_loading(folder):
    """Peak host memory of loading model.pth over the base in bf16 as a multiple of the result's
    bytes, and those."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert result.returncode == 0, result.stderr
    ratio, weights = result.stdout.split()[-2:]
    return float(ratio), int(weights)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    for name in ("pcb", "irg"):
        parser.add_argument(f"--{name}", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_zeros(
        dict(RELEASE, pcb=args.pcb, irg=args.irg, adapted=min(25, args.pcb + args.irg)), args.folder
    )
    print(
        "peak host memory {:.3f} x the {:,} bytes of the result".format(
            *measure_loading(args.folder)
        )
    )
