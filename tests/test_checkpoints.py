"""A checkpoint as a file: damage is noticed, foreign ones are refused, old ones leave."""

import errno
import os
import random
import shutil

import pytest
import torch
from kill import compare
from safetensors.torch import load_file, save_file
from small import train_here
from test_train import run

from lib import checkpoints, files, frozen, weights
from lib.tensors import write_tensors

FLIPS = int(os.environ.get("FLIPS", 300))


def test_a_flipped_byte_is_found_and_the_checkpoint_before_is_used(survivor):
    root, arguments = survivor
    out = root / "flipped"
    assert train_here(*arguments, f"--out_dir={out}")[0] == 0
    path = out / "step-5.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    (out / ".step-9.safetensors.123.tmp").write_bytes(b"half")
    (out / "mine.tmp").write_bytes(b"a user's own")
    (out / "step-9.optim.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="sha256"):
        checkpoints.describe(path)
    code, text = train_here(*arguments, f"--out_dir={out}")
    assert "passed over" in text and "steps 4 .. 5" in text and not list(out.glob("*step-9*"))
    assert (out / "mine.tmp").exists()
    compare(root / "whole", out, 5)


def test_moments_that_found_room_where_their_weights_did_not_leave_the_disk(tmp_path, monkeypatch):
    state = {"a": torch.ones(2)}, {"a|step": torch.ones(())}
    meta = dict(stage="1", model_config="{}", train_config="{}")
    checkpoints.save_checkpoint(tmp_path, 1, state, meta, keep_last=3)
    kept = sorted(path.name for path in tmp_path.iterdir())

    def full(tensors, metadata, path):
        if "a" in tensors:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_tensors(tensors, metadata, path)

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save_checkpoint(tmp_path, 2, state, meta, keep_last=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_disk_that_leaves_between_a_save_and_its_link_does_not_end_the_run(
    tmp_path, monkeypatch, capsys
):
    def gone(tensors, metadata, path):
        write_tensors(tensors, metadata, path)
        if "a" in tensors:
            monkeypatch.setattr(
                checkpoints, "read_metadata", lambda _: weights.read_metadata("gone")
            )

    monkeypatch.setattr(checkpoints, "write_tensors", gone)
    state = {"a": torch.ones(2)}, {"a|step": torch.ones(())}
    checkpoints.save_checkpoint(tmp_path, 1, state, dict(stage="1"), keep_last=3)
    assert "step 1 is saved; what follows is not done" in capsys.readouterr().out


def test_every_flipped_bit_of_a_checkpoint_is_noticed(survivor, tmp_path):
    """Half of the flips hit the header; 2,000 of them are in docs/survival.md."""
    whole, rng = (survivor[0] / "whole" / "step-5.safetensors").read_bytes(), random.Random(0)
    path, header = tmp_path / "step-5.safetensors", 8 + int.from_bytes(whole[:8], "little")
    beside = tmp_path / "step-5.optim.safetensors"
    beside.write_bytes((survivor[0] / "whole" / "step-5.optim.safetensors").read_bytes())
    path.write_bytes(whole)
    checkpoints.check_step(tmp_path, 5)
    blank = len(whole[:header].rstrip(b" "))
    for trial in range(FLIPS):
        at = rng.randrange(blank if trial % 2 else len(whole))
        path.write_bytes(flipped(whole, at, rng.randrange(8)))
        if blank <= at < header:
            continue  # spaces between header and values hold nothing
        with pytest.raises((ValueError, KeyError)):
            checkpoints.check_step(tmp_path, 5)


def flipped(content, at, bit):
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


def test_moments_of_other_weights_are_refused(survivor, tmp_path, capsys):
    for name in ("step-5.safetensors", "step-4.safetensors"):
        shutil.copyfile(survivor[0] / "whole" / name, tmp_path / name)
    for step, of in ((4, 4), (5, 4)):
        source = survivor[0] / "whole" / f"step-{of}.optim.safetensors"
        shutil.copyfile(source, tmp_path / f"step-{step}.optim.safetensors")
    assert checkpoints.newest_valid(tmp_path) == 4
    assert "not the optimizer state of step-5.safetensors" in capsys.readouterr().out
    code, text = train_here(*survivor[1], f"--out_dir={tmp_path}", "--max_steps=5")
    assert code == 0 and "steps 4 .. 5" in text


@pytest.mark.parametrize("kept", ["latest.safetensors", "step-5.safetensors"])
def test_a_checkpoint_that_no_run_can_go_on_from_is_not_replaced_by_one_from_step_0(
    survivor, tmp_path, kept
):
    """Seen: whoever had kept latest.safetensors alone lost it to the same command."""
    shutil.copyfile(survivor[0] / "whole" / "step-5.safetensors", tmp_path / kept)
    said, _ = train_here(*survivor[1], f"--out_dir={tmp_path}")
    assert f"{kept}: a run from step 0 would replace it" in str(said)
    whole = (survivor[0] / "whole" / "step-5.safetensors").read_bytes()
    assert (tmp_path / kept).read_bytes() == whole


def test_a_file_that_a_run_would_not_touch_hinders_no_start(tmp_path):
    for name in ("step-best", "step-5-copy", "old-latest"):
        (tmp_path / f"{name}.safetensors").touch()
    assert checkpoints.choose_start(tmp_path, "auto") == ""
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("key", ["train_config", "model_config", "step", "stage"])
def test_a_checkpoint_without_what_resume_needs_is_passed_over(survivor, tmp_path, key, capsys):
    for step in (4, 5):
        for end in ("", ".optim"):
            name = f"step-{step}{end}.safetensors"
            shutil.copyfile(survivor[0] / "whole" / name, tmp_path / name)
    path = tmp_path / "step-5.safetensors"
    tensors, meta = weights.read_tensors(path)
    kept = {k: v for k, v in meta.items() if k not in (key, "sha256")}
    whole = dict(kept, sha256=weights.digest(tensors, kept))
    # Aside: the tensors are mapped from the file.
    files.write_aside(path, lambda aside: write_tensors(tensors, whole, aside))
    assert checkpoints.newest_valid(tmp_path) == 4 and "passed over" in capsys.readouterr().out


def test_files_have_the_permissions_that_the_user_asks_for(survivor, tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors({"a": torch.ones(3)}, {"b": "c"}, tmp_path / "x.safetensors")
        assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1, 1, 1]
    assert (survivor[0] / "whole" / "step-5.safetensors").stat().st_mode & 0o777 == 0o644


def test_pruning_keeps_the_newest_the_multiples_and_what_latest_points_to(survivor, tmp_path):
    code, _ = train_here(
        *survivor[1], f"--out_dir={tmp_path}", "--save_every=1", "--keep_last=1", "--keep_every=2"
    )
    assert code == 0 and checkpoints.saved_steps(tmp_path) == [2, 4, 5]
    assert [p.name for p in tmp_path.glob("*.optim.safetensors")] == ["step-5.optim.safetensors"]
    (tmp_path / "step-7.safetensors").write_bytes(b"a damaged later one")
    checkpoints.prune(tmp_path, 5, 1, 0)
    assert checkpoints.saved_steps(tmp_path) == [5, 7] and (
        tmp_path / "latest.safetensors"
    ).samefile(tmp_path / "step-5.safetensors")


def test_check_prints_what_a_checkpoint_holds_and_refuses_others(survivor, tmp_path):
    latest = survivor[0] / "whole" / "latest.safetensors"
    text = run("train.py", "--check", latest)
    tensors = load_file(latest)
    assert (
        "stage 1, step 5" in text
        and f"{len(tensors)} tensors, {sum(v.numel() for v in tensors.values()):,}" in text
    )
    assert (
        weights.read_metadata(latest)["sha256"] in text
        and min(tensors) in text
        and "optimizer state beside it" in text
    )
    meta = weights.read_metadata(latest)
    save_file(
        {k: v for k, v in tensors.items() if k != min(tensors)},
        tmp_path / "less.safetensors",
        {k: v for k, v in meta.items() if k not in ("sha256", "format")},
    )
    assert "not those of its model: tensors differ: 1 missing" in run(
        "train.py", "--check", tmp_path / "less.safetensors", ok=False
    )
    moments = latest.with_name("step-5.optim.safetensors")  # as --check OUT/*.safetensors has it
    assert checkpoints.describe(moments) == f"{moments}: whole, the optimizer state of step 5"
    with pytest.raises(ValueError, match="optimizer state beside .*name .*/step-5.safetensors"):
        weights.metadata_of(moments)  # was: does not fit this model, use its own preset


def test_other_frozen_weights_are_refused_by_name(survivor, tmp_path):
    """A base of the same shapes: depth would be half as wrong again, without a word."""
    base, other = tmp_path / "base", tmp_path / "other"
    stage0 = ["--stage=0", "--max_steps=1", "--wan_dir=", "--random_wan=False"]
    for folder, seed in ((base, 0), (other, 1)):
        code, _ = train_here(*survivor[1], *stage0, f"--out_dir={folder}", f"--seed={seed}")
        assert code == 0
    on = ["--random_wan=False", "--max_steps=1", f"--out_dir={tmp_path}/one"]
    assert train_here(*survivor[1], *on, f"--wan_dir={base}")[0] == 0
    meta = weights.read_metadata(tmp_path / "one" / "latest.safetensors")
    assert meta["frozen"] == frozen.frozen_digest(base) != frozen.frozen_digest(other)
    assert (base / ".latest.safetensors.fantasyworld.json").exists()  # hashed once
    on[1] = "--max_steps=2"
    code, text = train_here(*survivor[1], *on, f"--wan_dir={other}")
    assert "was trained on other frozen weights" in f"{code}{text}" and "--other_wan" in f"{code}"
    assert train_here(*survivor[1], *on, f"--wan_dir={other}", "--other_wan=True")[0] == 0


def test_the_digest_of_frozen_weights_is_of_tensors_not_of_files(tmp_path):
    a = {"blocks.0.x": torch.randn(3, 4), "head.head.weight": torch.randn(2)}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file(a, tmp_path / "one" / "diffusion_pytorch_model.safetensors")
    for n, (key, value) in enumerate(a.items()):
        name = f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors"
        save_file({f"model.{key}": value}, tmp_path / "two" / name)
    assert frozen.frozen_digest(tmp_path / "one") == frozen.frozen_digest(tmp_path / "two")
    a["blocks.0.x"][0, 0] += 1e-6
    save_file(a, tmp_path / "one" / "diffusion_pytorch_model.safetensors")
    assert frozen.frozen_digest(tmp_path / "one") != frozen.frozen_digest(tmp_path / "two")


def test_experts_whose_links_lead_into_one_folder_are_hashed_once_each(tmp_path, monkeypatch):
    (tmp_path / "blobs").mkdir()
    digests = {}
    for name in ("high_noise_model", "low_noise_model"):
        save_file({"x": torch.randn(3)}, tmp_path / "blobs" / f"of-{name}")
        (tmp_path / name).mkdir()
        link = tmp_path / name / "diffusion_pytorch_model.safetensors"
        link.symlink_to(tmp_path / "blobs" / f"of-{name}")
        digests[name] = frozen.frozen_digest(tmp_path / name)
    monkeypatch.setattr(frozen, "wan_tensors", lambda folder: pytest.fail("hashed again"))
    for name, digest in digests.items():
        assert frozen.frozen_digest(tmp_path / name) == digest


def test_what_a_stranger_wrote_into_a_checkpoint_commands_no_terminal(survivor, tmp_path):
    tensors, meta = weights.read_tensors(survivor[0] / "whole" / "latest.safetensors")
    facts = dict(meta, command="x\x1b]0;title\x07\ny", git="\x1b[2J")
    facts["sha256"] = weights.digest(tensors, facts)
    write_tensors(tensors, facts, tmp_path / "latest.safetensors")
    text = checkpoints.describe(tmp_path / "latest.safetensors")
    assert "\x1b" not in text and "\x07" not in text and "command x ]0;title y" in text


def test_a_whole_file_of_another_kind_is_not_called_broken(tmp_path):
    """A release of 30 GB would be downloaded again."""
    torch.save(dict(weight=torch.ones(2)), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        checkpoints.describe(tmp_path / "model.pth")
