"""bench.py runs whole at tiny sizes, and a GPU agrees with a CPU where there is one."""

import pytest
import torch
from small import TINY, tiny_model
from torch.utils._pytree import tree_map_only

import bench
from encoders import WanVAE
from lib.plan import example_batch, fake, fake_tensors
from model import FantasyWorld

CPU = torch.device("cpu")
CASE = bench.Case(
    TINY,
    {1: (2, 5, 32, 48), 2: (2, 5, 32, 48)},
    vae_dim=4,
    text=dict(vocab=64, dim=64, attn_dim=64, ffn_dim=64, heads=2, layers=1),
)


def lines_of(capsys):
    text = capsys.readouterr().out
    assert "nan" not in text and "inf" not in text, text
    return text.splitlines()


def test_one_clip_is_counted_without_its_values():
    """bench.py flops: the VAE's own kernel for one clip on a CPU takes no fake tensors."""
    with fake_tensors(), torch.no_grad():
        vae = fake(lambda: WanVAE(4))
        assert vae.encode(torch.zeros(1, 3, 5, 32, 48)).shape == (1, 16, 2, 4, 6)


def test_a_table_of_steps_has_a_line_of_each_way_and_our_ways_do_less(capsys):
    bench.step_table(CASE, CPU, 1)
    lines = lines_of(capsys)
    rows = ["ours, selective", "ours, none", "ours, full", "straightforward"]
    for stage in (1, 2):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"stage {stage}"))
        table = lines[start + 1 : start + 5]
        assert all(line.strip().startswith(name) for line, name in zip(table, rows))
        work = {name: float(line.split()[-3]) for line, name in zip(table, rows)}
        assert work["ours, none"] <= work["ours, selective"] <= work["ours, full"]
        assert work["straightforward"] > work["ours, none"]


def test_straightforward_steps_have_our_losses_and_gradients():
    torch.manual_seed(0)
    model = tiny_model(2, awake=True)
    steps = bench.Steps(model, bench.make_encoders(CASE), 2, CASE.clips[2])
    found = {}
    for name, call in steps.calls().items():
        call()
        found[name] = {n: p.grad for n, p in model.named_parameters() if n.startswith("exchange")}
    clips = len(steps.ids)
    for name, gradient in found["ours, none"].items():
        torch.testing.assert_close(found["straightforward"][name] / clips, gradient)


def test_a_table_of_sampling_has_both_loops_and_the_decoding(capsys):
    bench.sampling_table(CASE, CPU, 1, steps=2)
    names = [line.split()[0] for line in lines_of(capsys)]
    assert names == ["stage", "ours", "straightforward", "decoding"] * 2


def test_the_loader_is_measured_beside_what_a_gpu_takes(capsys):
    bench.data_table(CASE, count=16)
    assert [line.split(",")[0].strip() for line in lines_of(capsys)[-2:]] == ["stage 1", "stage 2"]


def test_what_does_not_fit_has_no_seconds(capsys):
    def too_large():
        raise torch.cuda.OutOfMemoryError("no room")

    calls = {"large": too_large, "small": lambda: torch.ones(4, 4) @ torch.ones(4, 4)}
    rows = bench.measure(calls, CPU, 1)
    bench.print_rows("two", rows, 1e9)
    large, small = lines_of(capsys)[1:]
    assert (
        large.endswith("does not fit") and rows["small"].flops == 128 and small.split()[3] == "1.00"
    )


@torch.no_grad()
def outputs(model, inputs, device, half=False):
    b, noise, sigma, _ = tree_map_only(torch.Tensor, lambda x: x.to(device), inputs)
    known = dict(y=b["y"], plucker=b["plucker"], poses=b["pose_enc"])
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        out = model.to(device)(noise, 1000 * sigma, b["text"], **known)
    return {k: v.float().cpu() for k, v in out.items()}


def agree(found, wanted, error):
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() < error * value.abs().max(), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_agrees_with_the_cpu_and_bf16_with_fp32():
    """By default cuDNN computes fp32 convolutions in TF32, whose error would hide the others."""
    torch.manual_seed(0)
    model, gpu = FantasyWorld(bench.SMALL.cfg), torch.device("cuda")
    for p in (*model.exchange.parameters(), *model.camera_adapters.parameters()):
        p.data.add_(0.02 * torch.randn_like(p))  # no part hides behind a zero gate
    inputs = example_batch(model.cfg, 1, *bench.SMALL.clips[2][1:])
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = outputs(model, inputs, gpu)
        agree(outputs(model, inputs, gpu, half=True), exact, 1e-2)
        agree(outputs(model, inputs, CPU), exact, 1e-2)
