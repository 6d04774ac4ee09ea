"""bench.py's GPU tables.  On a CPU they run at tiny sizes: every line is there and finite; what it says is of no GPU."""

import pytest
import torch
from tiny import TINY

import bench
from lib import gpu, variants


def test_the_tables_of_a_gpu_run_whole_at_tiny_sizes(monkeypatch, capsys):
    size, rows = (5, 32, 48), variants.variants
    counted = gpu.plan.Cost(*[10**6] * 11)
    monkeypatch.setattr(gpu.plan, "count", lambda *_, **__: counted)  # counted in other tests
    monkeypatch.setattr(
        gpu,
        "variants",
        lambda *given: {
            k: v
            for k, v in rows(*given).items()  # no encoders
            if k in ("ours", "(b) one clip at a time")
        },
    )
    gpu.tables(TINY, {2: size}, TINY, size, 1, torch.device("cpu"), gigabytes=1, totals=(2,))
    text = capsys.readouterr().out
    for line in (
        "stage 2, 2 clips",
        "whole step",
        "(b) one clip at a time",
        "sampling, stage 1",
        "decoding 5 frames",
        "bf16 against fp32",
    ):
        assert line in text, text
    assert "nan" not in text and "inf " not in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_agrees_with_the_cpu_and_bf16_with_fp32_at_reduced_width(capsys):
    gpu.agreement(bench.SMALL, bench.SMALL_SIZE, torch.device("cuda"))
    worst = [
        float(word)
        for word in capsys.readouterr().out.replace(",", " ").split()
        if word[0].isdigit() and "e-" in word
    ]
    assert worst and max(worst) < 1e-2
