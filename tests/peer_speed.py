"""The same work with the same weights on one thread: our classes, and those of diffusers and
transformers that a user would pick instead.

    python -m venv peers && peers/bin/pip install torch==2.13.0 -r requirements.txt \
        diffusers transformers
    OMP_NUM_THREADS=1 peers/bin/python tests/peer_speed.py [--rounds 7] [--rows dit,umt5]

A row is refused unless both outputs agree to 1e-5 of their norm.  Seconds are medians of the
thread's processor time over interleaved rounds, so that what else runs on the machine hits both.
Memory is the peak of all tensors that a call makes and holds, counted operation by operation;
weights and inputs, which both sides share, are left out, and so is what a kernel takes inside."""

import argparse
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import diffusers
    import transformers
except ImportError:
    sys.exit("tests/peer_speed.py needs diffusers and transformers; its first lines say how")

from test_encoders import LiveBytes  # noqa: E402

from encoders import LATENT_MEAN, LATENT_STD, UMT5Encoder, WanVAE  # noqa: E402
from wan import VideoSizes, WanDiT, rope_3d  # noqa: E402

# What our names, the official ones, become on the other side: patterns in their order.
DIT = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    r"head\.head": "proj_out",
    r"head\.modulation|modulation": "scale_shift_table",
    "norm3": "norm2",
    "self_attn": "attn1",
    "cross_attn": "attn2",
    r"(attn.)\.([qkv])\.": r"\1.to_\2.",
    r"(attn.)\.o\.": r"\1.to_out.0.",
    r"ffn\.0": "ffn.net.0.proj",
    r"ffn\.2": "ffn.net.2",
}
VAE = {
    r"^conv1": "quant_conv",
    r"^conv2": "post_quant_conv",
    r"coder\.conv1": "coder.conv_in",
    r"coder\.head\.0": "coder.norm_out",
    r"coder\.head\.2": "coder.conv_out",
    r"middle\.0": "mid_block.resnets.0",
    r"middle\.1": "mid_block.attentions.0",
    r"middle\.2": "mid_block.resnets.1",
    r"residual\.0": "norm1",
    r"residual\.2": "conv1",
    r"residual\.3": "norm2",
    r"residual\.6": "conv2",
    "shortcut": "conv_shortcut",
    "downsamples": "down_blocks",
}
UMT5 = {
    "token_embedding": "shared",
    r"^norm": "encoder.final_layer_norm",
    "blocks": "encoder.block",
    r"pos_embedding\.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "attn": "layer.0.SelfAttention",
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    r"ffn\.gate\.0": "layer.1.DenseReluDense.wi_0",
    r"ffn\.fc1": "layer.1.DenseReluDense.wi_1",
    r"ffn\.fc2": "layer.1.DenseReluDense.wo",
}


def upsampler(match):
    """Stage and place of a layer in one list of the decoder: three blocks and a resampler each."""
    stage, place = divmod(int(match[1]), 4)
    return f"up_blocks.{stage}.{f'resnets.{place}' if place < 3 else 'upsamplers.0'}."


def filled(model):
    """Random weights of the size that keeps lengths."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gamma" in name or p.dim() == 1 and "weight" in name:
                p.fill_(1).add_(torch.randn_like(p), alpha=0.1)
            else:
                p.normal_(0, 0.5 * (p[0].numel() if p.dim() > 1 else 100) ** -0.5)
    return model.eval().requires_grad_(False)


def twin(build, model, names):
    """The other side's model, which holds our model's own tensors."""
    sd = model.state_dict()
    for pattern, theirs in {**names, r"upsamples\.(\d+)\.": upsampler}.items():
        sd = {re.sub(pattern, theirs, name): value for name, value in sd.items()}
    # Buffers that are in no file are made on the CPU, so the whole model is.
    other = build()
    if "shared.weight" in sd:
        sd["encoder.embed_tokens.weight"] = sd["shared.weight"]
    other.load_state_dict(sd, assign=True)
    return other.eval().requires_grad_(False)


def dit_pair(layers):
    sizes = VideoSizes(num_layers=layers, in_dim=16, has_clip=False, has_control=False)
    ours = filled(WanDiT(sizes))
    how = dict(num_attention_heads=12, ffn_dim=8960, num_layers=layers)
    return ours, twin(lambda: diffusers.WanTransformer3DModel(**how), ours, DIT)


def block():
    """One block at the width of 1.3B, 960 tokens; the text's keys are part of it on both sides."""
    ours, theirs = dit_pair(1)
    x, text = torch.randn(1, 960, 1536), torch.randn(1, 512, 1536)
    modulation = torch.randn(1, 6, 1536) / 10
    rope, latents = rope_3d(5, 12, 16, 128, 0, x.device), torch.empty(1, 16, 5, 24, 32)
    rotary, mine, peer = theirs.rope(latents), ours.blocks[0], theirs.blocks[0]
    yield (
        "Wan block, 960 tokens",
        lambda: mine(x, modulation, mine.cross_attn.keys_values(text, None), rope),
        lambda: peer(x, text, modulation, rotary),
        ours,
    )


def dit():
    """The whole forward at the width of 1.3B, latents and prompt to velocity."""
    for layers, grid in ((4, (5, 24, 32)), (2, (6, 44, 50))):
        ours, theirs = dit_pair(layers)
        x, t, text = torch.randn(1, 16, *grid), torch.tensor([700.0]), torch.randn(1, 512, 4096)
        yield (
            f"DiT, {layers} layers, {x.shape[2:].numel() // 4} tokens",
            lambda: ours(x, t, text),
            lambda: theirs(x, t, text).sample,
            ours,
        )


def vae():
    """The exact VAE in its usual steps."""
    ours = filled(WanVAE())
    theirs = twin(diffusers.AutoencoderKLWan, ours, VAE)
    video, z = torch.rand(1, 3, 9, 96, 160) * 2 - 1, torch.randn(1, 16, 3, 12, 20)
    mean, std = torch.tensor([LATENT_MEAN, LATENT_STD]).view(2, 1, -1, 1, 1, 1)
    yield (
        "VAE encode, 9 x 96 x 160",
        lambda: ours.encode(video),
        lambda: (theirs.encode(video).latent_dist.mode() - mean) / std,
        ours,
    )
    yield (
        "VAE decode, 9 x 96 x 160",
        lambda: ours.decode(z),
        lambda: theirs.decode(z * std + mean).sample.clamp(-1, 1),
        ours,
    )


def umt5():
    """The width of umT5-xxl, 1 of 24 layers; their pipeline pads to 512 tokens."""
    ours = filled(UMT5Encoder(vocab=64, layers=1))
    how = transformers.UMT5Config(
        vocab_size=64, d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64
    )
    theirs = twin(lambda: transformers.UMT5EncoderModel(how), ours, UMT5)
    for tokens in (512, 40):
        ids = torch.randint(1, 64, (1, 512))
        mask = (torch.arange(512) < tokens).long()[None]
        yield (
            f"umT5 layer, prompt of {tokens} tokens in 512",
            lambda: ours(ids, mask),
            lambda: theirs(ids, mask).last_hidden_state * mask[..., None],
            ours,
        )


ROWS = dict(block=block, dit=dit, vae=vae, umt5=umt5)


def peak(call, model):
    with LiveBytes() as meter:
        meter.live.update({p.untyped_storage()._cdata: 0 for p in model.parameters()})
        call()
    return meter.peak


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def rounds(mine, peer, swapped):
    """Seconds of both; every second round the other one is first."""
    if swapped:
        return rounds(peer, mine, False)[::-1]
    return [seconds(mine), seconds(peer)]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", default=",".join(ROWS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    print(
        f"{cpu}, one thread, fp32, python {platform.python_version()}, torch {torch.__version__},"
    )
    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}\n")
    print("| | ours | theirs | time | ours | theirs | memory |\n|---|---|---|---|---|---|---|")
    for row in args.rows.split(","):
        for name, mine, peer, model in ROWS[row]():
            error = ((mine() - peer()).norm() / peer().norm()).item()
            assert error < 1e-5, f"{name}: the outputs differ by {error:.1e}"
            both = [rounds(mine, peer, i % 2) for i in range(args.rounds)]
            ours, theirs = map(statistics.median, zip(*both))
            ratios = sorted(a / b for a, b in both)
            held = [peak(call, model) / 2**20 for call in (mine, peer)]
            spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
            print(
                f"| {name} | {ours:.2f} s | {theirs:.2f} s | {ours / theirs:.2f} ({spread}) "
                f"| {held[0]:.0f} MiB | {held[1]:.0f} MiB | {held[0] / held[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
