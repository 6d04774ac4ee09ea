"""The suite runs from any folder."""
import sys
from pathlib import Path

import pytest
import torch
from precision import REAL

pytest.register_assert_rewrite("loss_case")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)   # two threads on two shared cores made a small training loop 15 times slower


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def precision(request):
    REAL["dtype"] = request.param
    yield request.param
    REAL["dtype"] = torch.float64
