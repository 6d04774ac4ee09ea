"""Tests of a module with `pytestmark = pytest.mark.usefixtures("precision")` (conftest.py) run in
fp64 and again in fp32; a test that only makes sense in one of them says so by @only_fp64."""

import pytest
import torch

REAL = dict(dtype=torch.float64)  # what such a test makes its tensors with

only_fp64 = pytest.mark.parametrize("precision", [torch.float64], indirect=True, ids=["fp64"])


def loose():
    """Relative tolerance: ten times fp32's rounding; in fp64 that of reference numbers of eight
    digits."""
    return 1e-6 if REAL["dtype"] == torch.float64 else 1e-5
