"""The miniature that the repository carries: whole, loaded as a download is, as good as it says."""

import hashlib
import pathlib
import sys

import pytest
import torch
from safetensors.torch import load_file

import sample
from encoders import MINIATURE, WanFolder, WanVAE
from lib.frozen import check_frozen, frozen_digest
from lib.rooms import render_clip
from lib.weights import metadata_of, open_checkpoint, read_checked

ROOT = pathlib.Path(__file__).parents[1]
TINY = ROOT / "tiny"
VAE = TINY / "wan" / "Wan2.1_VAE.safetensors"
CKPT = TINY / "fantasyworld.safetensors"

sys.path.insert(0, str(TINY))
import ablate  # noqa: E402
import score  # noqa: E402
import train_vae  # noqa: E402


def test_every_weight_file_is_the_one_that_the_readme_names_and_all_are_small():
    said = (TINY / "README.md").read_text()
    files = [f for f in TINY.rglob("[!.]*") if f.suffix in (".safetensors", ".json")]
    assert len(files) == 5
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() in said, file
    assert sum(f.stat().st_size for f in files) < 16e6


def test_it_loads_as_a_downloaded_folder_does():
    """Strictly, by the readers that real weights go through."""
    meta = read_checked(CKPT)[1]
    assert meta["stage"] == "2" and metadata_of(CKPT)["step"] == meta["step"]
    check_frozen(meta, frozen_digest(MINIATURE), CKPT)
    folder = WanFolder(MINIATURE, "cpu")
    words = folder.load_text()(["a room with a teal box", "a quite unheard-of flibbertigibbet"])
    with pytest.raises(AssertionError, match="wanted a list"):  # each of its letters was a prompt
        folder.load_text()("a room")
    with pytest.raises(ValueError, match="uint8.*wanted floats"):  # 0 .. 255 was taken for -1 .. 1
        folder.load_vae().encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))
    assert all(w.shape[1] == 64 and w.isfinite().all() for w in words)
    assert len(words[1]) > len(words[0])  # what it does not know is spelt
    model = open_checkpoint(CKPT, MINIATURE, torch.device("cpu"))
    assert model.stage == 2 and sum(p.numel() for p in model.parameters()) < 7e6


@pytest.fixture(scope="module")
def scores():
    """What tiny/score.py measures on 4 rooms of seeds that no training saw."""
    how = sample.Sampling(steps=8, shift=3.0, guidance=1.0)
    return score.score(str(CKPT), MINIATURE, range(60_000_000, 60_000_004), (96, 160), how)


def test_sampled_rooms_are_nearer_to_the_truth_than_a_still_frame(scores):
    video = scores["video"]
    assert video["codec"] > 35 and video["sample"] > video["still"] + 5


def test_its_depth_points_and_given_cameras_are_right(scores):
    given, free, fair = (scores[k] for k in ("poses given", "no poses", "mean depth, still"))
    assert given["abs_rel"] < 0.07 and given["points"] < 0.07 and given["trans"] < 0.03
    assert free["abs_rel"] < 0.5 * fair["abs_rel"] and given["objects"] < fair["objects"]


def test_the_same_seed_makes_the_same_world(tmp_path, monkeypatch):
    """The README's line, without --wan_dir and sampling options: they come with the file."""
    for name in "ab":
        line = f"sample.py --ckpt {CKPT} --image {ROOT}/examples/room.jpg --camera right"
        line += f" --export npz --out {tmp_path / name} --device cpu"
        monkeypatch.setattr(sys, "argv", line.split())
        monkeypatch.chdir(tmp_path)  # the folder is found beside the checkpoint
        sample.command()
    first, second = ((tmp_path / name / "depth.npz").read_bytes() for name in "ab")
    assert first == second


def test_the_vae_shows_a_room_that_it_has_not_seen():
    """Strictly loaded; 4 rooms of seeds outside its training, as good as its README says."""
    vae = WanVAE.from_state_dict({k: t.float() for k, t in load_file(VAE).items()}).eval()
    rooms = [
        torch.tensor(render_clip(47_000_000 + n, 9, 64, 96, "simple")["rgb"]) for n in range(4)
    ]
    video = torch.stack(rooms).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        seen = vae.decode(vae.encode(video)).clamp(-1, 1)
    assert (found := score.psnr(seen, video)) > 28, f"{found:.1f} dB"


def test_the_training_of_the_vae_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    """It had stopped at its first step since Muon's groups have no constructor."""
    small = dict(FRAMES=5, BATCH=1, ROOMS={(1, 1, 64, 96, "simple"): 1.0})
    small |= dict(CHOICE=dict(simple=(2, 1, 64, 96, "simple")), OUT=tmp_path / "vae.safetensors")
    for name, value in small.items():
        monkeypatch.setattr(train_vae, name, value)
    for steps in "12":
        monkeypatch.setattr(sys, "argv", ["train_vae.py", f"--work={tmp_path}", "--steps", steps])
        train_vae.main()
    first, second = capsys.readouterr().out.splitlines()
    assert "'step': 1" in first and "'step': 2" in second
    made = WanVAE.from_state_dict({k: t.float() for k, t in load_file(small["OUT"]).items()})
    assert made.decode(torch.zeros(1, 16, 1, 2, 2)).isfinite().all()


def test_an_ablation_that_fails_costs_no_row_of_the_others(tmp_path, monkeypatch):
    def train(run, stage):
        if run.name == "pcb_2":
            raise OSError("of its disk")

    def score(run):
        train(run, 2)
        return dict(variant=run.name, seed=run.seed)

    monkeypatch.setattr(ablate, "ROWS", tmp_path / "rows.json")
    monkeypatch.setattr(ablate, "render", print)
    monkeypatch.setattr(ablate.Run, "train", train)
    monkeypatch.setattr(ablate.Run, "score", score)
    monkeypatch.setattr(sys, "argv", "ablate.py --seeds 0 --only pcb_2 full none".split())
    with pytest.raises(OSError, match="of its disk"):
        ablate.main()
    assert {row["variant"] for row in ablate.read_rows()} == {"full", "none"}
