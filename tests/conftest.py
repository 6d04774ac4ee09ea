"""The suite runs from any folder, its files on two processes."""

import os
import sys
from pathlib import Path

import pytest
import torch
from precision import REAL

pytest.register_assert_rewrite("loss_case")


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


# Two threads on two shared cores made a small training loop 15 times slower: one here, one in every
# process started here.
torch.set_num_threads(1)

os.environ["OMP_NUM_THREADS"] = "1"

# glibc gives large blocks back to the system at every step and asks for them anew: a tenth of a
# small training's time.  For the workers alone, which have read this when they get here: what they
# start has what users have.
ARENA = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="4000000000")
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ARENA:
        os.environ.pop(name, None)

LONGEST = (
    "test_survival.py test_speed.py test_sharding.py test_train.py test_fake_cuda.py test_pair.py "
    "test_verify.py test_sampled.py test_tiny.py test_wan.py test_learning.py test_lock.py"
).split()


def pytest_xdist_auto_num_workers(config):
    """-n auto of pyproject.toml: two workers for a folder; none for single files and tests, which
    end before they start."""
    if not all(Path(arg).is_dir() for arg in config.args):
        return 0
    os.environ |= ARENA
    return 2


def pytest_collection_modifyitems(items):
    """The longest files first, so that both workers end together."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def precision(request):
    REAL["dtype"] = request.param
    yield request.param
    REAL["dtype"] = torch.float64


@pytest.fixture
def src(tmp_path):
    """An empty folder for a recording, beside which its import has room."""
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


@pytest.fixture(scope="session")
def survivor(tmp_path_factory):
    """Arguments of a tiny run of 5 steps with an epoch of 2 steps and 2 micro-steps a step, and its
    undisturbed end."""
    from kill import tiny_run
    from small import train_here

    root = tmp_path_factory.mktemp("survival")
    arguments = [
        a
        for a in tiny_run(root, 5)[1:]
        if not a.startswith(("--log_every", "--save_every", "--keep_last"))
    ]
    arguments += ["--grad_accum=2", "--log_every=1", "--save_every=2", "--keep_last=9"]
    assert train_here(*arguments, f"--out_dir={root}/whole")[0] == 0
    return root, arguments
