"""What is missing, in the way or in another encoding is one line, status 2, and nothing is lost."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill import ENV, ROOT, tiny_run
from safetensors.torch import load_file
from small import command_here
from test_jobs import QUICK

from data import load_samples
from lib import checkpoints, log
from lib.jobs import read_prompts


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("one_line")
    return tiny_run(root, 1)


@pytest.mark.parametrize("place", ["a file", "a folder that nobody can make"])
@pytest.mark.parametrize("tool", ["train.py", "sample.py", "synth", "cameras"])
def test_an_output_that_cannot_be_written_is_one_line(clips, tmp_path, tool, place):
    (tmp_path / "taken").write_text("mine")
    out = f"{tmp_path}/taken" if place == "a file" else f"{tmp_path}/taken/inside"
    (tmp_path / "cameras.txt").write_text(("0 1 1 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n") * 5)
    size = "--num 2 --num_frames 5 --height 32 --width 48 --workers 0".split()
    arguments = {
        "train.py": [*clips, f"--out_dir={out}"],
        "sample.py": ["sample.py", *QUICK, "--steps=1", f"--out={out}"],
        "synth": ["data.py", "synth", out, *size],
        "cameras": ["data.py", "cameras", tmp_path / "cameras.txt", f"{out}/x.txt"],
    }[tool]
    code, text = command_here(*arguments)
    last = text.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in text and f"{tmp_path}/taken" in last, text
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_whose_folders_vanish_while_it_is_listed_is_named(tmp_path, monkeypatch):
    """Seen, of /proc: a bare "[Errno 2] No such file or directory"."""
    gone = FileNotFoundError(2, "No such file or directory", "123")
    monkeypatch.setattr(Path, "glob", lambda self, words: (_ for _ in ()).throw(gone))
    with pytest.raises(
        ValueError, match=f"{tmp_path}: not a folder now: No such.*wanted a dataset"
    ):
        load_samples(tmp_path)


def test_prompts_of_a_windows_editor_are_read_and_others_are_named(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf# aside\r\na red room\r\n\r\n")
    assert read_prompts(str(path)) == ["a red room"]
    path.rename(tmp_path / "PROMPTS.TXT")
    assert read_prompts(str(tmp_path / "PROMPTS.TXT")) == ["a red room"]
    path.write_bytes("a red room\n".encode("utf-16"))
    with pytest.raises(ValueError, match="prompts.txt: not a text in UTF-8"):
        read_prompts(str(path))


def test_a_step_is_saved_although_its_link_cannot_be_made(tmp_path, capsys):
    """The message used to say that the step was not saved."""
    (tmp_path / "latest.safetensors").mkdir()
    (tmp_path / "latest.safetensors" / "mine").write_text("a user's own")
    state = {"a": torch.ones(3)}, {"a|step": torch.ones(())}
    checkpoints.save_checkpoint(tmp_path, 4, state, dict(stage="1"), keep_last=1)
    assert "warning: step 4 is saved; what follows is not done" in capsys.readouterr().out
    assert load_file(tmp_path / "step-4.safetensors")["a"].tolist() == [1, 1, 1]


def test_a_missing_tensorboard_is_named_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="tensorboard"):
        log.Records(tmp_path, {}, 0)


def test_run_command_turns_a_missing_package_into_its_cure():
    code = "from lib.guards import run_command\n"
    code += "def f():\n    import no_such_package\n"
    code += "run_command('train.py', f)"
    line = [sys.executable, "-c", code]
    ended = subprocess.run(line, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "pip install -r requirements.txt" in ended.stderr


def test_a_dataset_that_cannot_be_written_is_refused_before_a_clip_is_rendered():
    """Seen: after the first of them, which takes minutes."""
    size = "--num 1 --num_frames 5 --height 32 --width 48 --workers 0".split()
    for out in ("/proc/x", "/proc"):
        code, text = command_here("data.py", "synth", out, *size)
        assert code == 2 and "render" not in text and out in text, text


EMPTY = {  # what is said: arguments
    "data.py: DIR is empty": ["verify", ""],
    "data.py: SRC is empty": ["import", "", "x"],
    "data.py: OUT is empty": ["cameras", "x.txt", ""],
    "data.py: --out is empty": ["view", "x", "--out="],
    "data.py: --wan_dir is empty": "encode x --wan_dir= --height 32 --width 32".split(),
    "sample.py: command line: out = '', wanted at least 1 letter": ["--out="],
    "train.py: command line: out_dir = '', wanted at least 1 letter": ["--out_dir="],
}


@pytest.mark.parametrize("said", EMPTY)
def test_a_path_that_is_empty_is_not_the_current_folder(said):
    more = ["--num_frames", "5"] if "wan_dir" in said else []
    code, text = command_here(said.partition(":")[0], *EMPTY[said], *more)
    assert code == 2 and text.strip().startswith(said), text
