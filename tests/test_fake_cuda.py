"""The program on a GPU that is not there: fake_checks.py in a process of its own, for its stub must
be loaded before torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fake_checks.py")


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the stub of a GPU")
def test_a_gpu_would_find_no_mismatch_no_host_wait_and_the_types_of_a_cpu():
    """SLOW=1 adds every way and true sizes: ten minutes to half an hour on an idle core."""
    slow = ["--slow"] if os.environ.get("SLOW") else []
    run = subprocess.run([sys.executable, SCRIPT, *slow], capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip(run.stdout.strip().splitlines()[-1])
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
