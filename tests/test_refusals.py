"""Options that train.py refuses: each names the option or file, what was found and the cure."""

import pytest
import torch
from test_train import run


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["config/tiny1.py", "--learning_rat=1e-3"],
            ["learning_rat", "did you mean 'learning_rate'"],
        ),
        (["config/tiny1.py", "--batch_size=four"], ["batch_size", "'four'", "a whole number"]),
        (["config/missing.py"], ["config/missing.py", "No such file"]),
        (["config/tiny1.py", "--num_frames=10"], ["num_frames = 10", "4k + 1"]),
        (["config/tiny1.py", "--lr_schedule=cosin"], ["lr_schedule = 'cosin'", "cosine"]),
        (["config/tiny1.py", "--save_every=0"], ["save_every = 0", "at least 1"]),
        (
            ["config/tiny1.py", "--warmup_steps=-1"],
            ["warmup_steps = -1", "at least 0"],
        ),
        (["config/tiny2.py", "--init_from="], ["stage 2 starts from a stage 1 checkpoint"]),
        (["config/tiny2.py", "--init_from=nowhere.safetensors"], ["nowhere.safetensors"]),
        (["config/tiny1.py", "--wan_dir="], ["needs --wan_dir"]),
        (
            ["config/tiny1.py", "--model_overrides={'num_pbc': 2}"],
            ["model_overrides", "'num_pbc'", "did you mean 'num_pcb'"],
        ),
        (
            ["config/tiny1.py", "--model_overrides={'num_pcb': 'two'}"],
            ["model_overrides: num_pcb = 'two'", "a whole number"],
        ),
    ],
)
def test_bad_options_are_refused_by_name(arguments, words):
    text = run("train.py", *arguments, ok=False)
    assert all(word in text for word in words), text


def test_a_gpu_that_is_not_there_is_refused():
    assert "torch finds no GPU" in run("train.py", "config/tiny1.py", "--device=cuda", ok=False)


def test_compiling_is_refused_where_it_would_fail(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.4.1"))
    text = run("train.py", "config/tiny1.py", "--compile=True", ok=False)
    assert "needs torch 2.5 or newer, this is 2.4.1" in text
