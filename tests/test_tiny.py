"""The miniature Wan VAE that the repository carries."""

import hashlib
import pathlib

import torch
from safetensors.torch import load_file

from encoders import WanVAE
from lib.rooms import render_clip

ROOT = pathlib.Path(__file__).parents[1]
VAE = ROOT / "tiny" / "wan" / "Wan2.1_VAE.safetensors"


def test_the_vae_is_the_file_that_its_readme_names():
    digest = hashlib.sha256(VAE.read_bytes()).hexdigest()
    assert digest in (ROOT / "tiny" / "README.md").read_text()


def test_the_vae_shows_a_room_that_it_has_not_seen():
    """Strictly loaded; 4 rooms of seeds outside its training, as good as its README says."""
    vae = WanVAE.from_state_dict({k: t.float() for k, t in load_file(VAE).items()}).eval()
    rooms = [
        torch.tensor(render_clip(47_000_000 + n, 9, 64, 96, "simple")["rgb"]) for n in range(4)
    ]
    video = torch.stack(rooms).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        seen = vae.decode(vae.encode(video)).clamp(-1, 1)
    psnr = -10 * torch.log10((seen - video).square().mean() / 4)
    assert psnr > 28, f"{psnr:.1f} dB"
