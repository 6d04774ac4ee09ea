"""The least work, what is sent and what is kept: counted FLOPs, bytes, operations; never time."""

import os
import pathlib
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from small import START, TINY, loss_of, tiny_inputs, tiny_model
from torch._dynamo.utils import counters
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import config
import sample
import train
from lib import camera_paths, plan
from lib.checkpoints import load_optimizer, save_checkpoint, training_state
from lib.distributed import Ranks, check_gpu, wrap
from lib.optimizer import take_step
from lib.weights import load_trained
from model import PRESETS, FantasyWorld
from wan import VideoSizes, WanCrossAttention, WanDiT

ROOT = pathlib.Path(__file__).parents[1]

# True widths and clips, few layers; narrow heads, which else would be most of so shallow a model.
SHALLOW = replace(
    PRESETS["1.3b"],
    num_layers=3,
    num_pcb=1,
    taps=(0, 0, 1, 1),
    dpt_channels=(8, 16, 32, 32),
    dpt_features=16,
    dpt_tail=8,
    head_chunk=48,
    camera_layers=1,
    camera_iterations=1,
)


def geometry_and_diffusion(video):
    return train.loss_alone(bench.OPTIONS.replaced(stage=2 if video else 1))


# ---- least work
def test_stage_1_costs_the_video_forward_to_the_bridge_and_three_times_the_trainable_forward():
    least = bench.least_work(SHALLOW, 1, (21, 336, 592))
    N, T, D = 6 * 21 * 37, 512 + 257, 1536
    block = (
        8 * N * D**2 + 4 * N**2 * D + 4 * N * D**2 + 4 * T * D**2 + 4 * N * T * D + 4 * N * D * 8960
    )
    assert least["PCB"] == block  # by hand, training.md section 1
    C, P = 1408, 5 + 21 * 37
    assert least["geometry"] == 2 * (48 * C**2 * 6 * P + 4 * 6 * P * P * C + 4 * (6 * P) ** 2 * C)
    flops = plan.count(SHALLOW, 1, geometry_and_diffusion(False), (1, 21, 336, 592)).flops
    assert flops <= 1.01 * least["fused"] and flops <= 1.05 * least["ideal"]


def test_stage_2_recomputes_less_than_a_tenth_and_no_weight_gradient_of_wan():
    least = bench.least_work(SHALLOW, 2, (81, 592, 336))
    size, loss = (1, 81, 592, 336), geometry_and_diffusion(True)
    cost = plan.count(SHALLOW, 2, loss, size, checkpointing="selective")
    assert cost.flops <= 1.10 * least["fused"]


def test_keys_of_the_prompt_are_computed_once_per_clip_although_blocks_are_recomputed(monkeypatch):
    calls, original = [], WanCrossAttention.keys_values
    monkeypatch.setattr(
        WanCrossAttention,
        "keys_values",
        lambda self, *args: calls.append(1) or original(self, *args),
    )
    model = tiny_model(2)
    model.checkpoint_activations = "full"
    loss_of(model(**tiny_inputs())).backward()
    assert len(calls) == TINY.num_layers


# ---- memory plan
def test_planned_bytes_and_flops_of_the_demo_step_are_those_of_the_real_one():
    size, cfg, loss = (2, 9, 64, 96), PRESETS["tiny"], geometry_and_diffusion(True)
    planned = plan.count(cfg, 2, loss, size, checkpointing="full", half=False)
    model = FantasyWorld(cfg).set_stage(2)
    model.checkpoint_activations = "full"
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    watch = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=watch, profile_memory=True) as profile:
        with plan.Flops() as counter:  # as train.py counts the first micro-step
            loss(model, *plan.example_batch(cfg, *size)).backward()
    assert counter.flops == planned.flops
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert planned.peak == pytest.approx(peak, rel=0.1)
    assert planned.trainable == sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("stage", [0, 1])
def test_flops_of_a_step_are_those_of_the_real_one(stage):
    loss, size = geometry_and_diffusion(not stage), (2, 5, 32, 48)
    planned = plan.count(TINY, stage, loss, size, checkpointing="full", half=False).flops
    model = tiny_model(stage)
    model.checkpoint_activations = "full"
    with plan.Flops() as counter:  # as train.py counts the first micro-step
        loss(model, *plan.example_batch(TINY, *size)).backward()
    assert counter.flops == planned


def test_the_plan_prefers_no_recomputation_then_little_sharding_and_refuses_what_cannot_fit():
    one = dict(
        frozen=0,
        trainable=4,
        moments=8,
        heads=0,
        backward=0,
        gathered_heads=1,
        gathered_backward=2,
    )

    def sized(peak):
        return dict(one, activations=peak, peak=peak)

    def cost(peak):
        return plan.Cost(**{k: v * plan.GIB for k, v in sized(peak).items()}, visiting=(0, 0))

    counts = {
        how: {b: cost(peak * b) for b in (1, 2)}
        for how, peak in (("none", 40), ("selective", 10), ("full", 5))
    }
    assert plan.settings(counts, 8, 80, 112)[:4] == ("none", "-", 1, 14)
    assert plan.settings(counts, 8, 41, 112)[:4] == ("selective", "-", 2, 7)
    assert plan.settings(counts, 8, 23, 112)[:4] == ("selective", "optimizer", 1, 14)
    assert plan.settings(counts, 8, 17, 112)[:4] == ("selective", "weights", 1, 14)
    assert plan.settings(counts, 8, 12, 112)[4] == (16 / 8 + 5 + 2) * plan.GIB + plan.CONTEXT
    assert plan.settings(counts, 1, 10, 112) is None
    # 16 ranks, by hand: a ring sends 15/16 of what is gathered, and twice that of what is summed.
    sent = [plan.network_bytes(counts["none"][1], how, 16, 3) / plan.GIB for how in plan.SHARDING]
    assert sent == [15 / 16 * 8, 15 / 16 * 12, 15 / 16 * 3 * (2 * 4 + 4)]
    line = "".join(plan.network_lines(counts["none"][1], plan.settings(counts, 16, 80, 112), 16))
    assert "sends 8.05 GB a step: 0.644, 0.322, 0.161 s at 100" in line


def test_the_plan_offloads_frozen_weights_where_nothing_else_fits():
    """10 frozen GiB, of which 1 stays on the device and 2 are the buffers."""
    sizes = dict(frozen=10, trainable=1, moments=2, heads=0, backward=0)
    sizes = {k: v * plan.GIB for k, v in sizes.items()}
    sizes |= dict(visiting=(9 * plan.GIB, 2 * plan.GIB), gathered_heads=0, gathered_backward=0)
    counts = {
        how: {b: plan.Cost(**sizes, activations=0, peak=b * peak * plan.GIB) for b in (1, 2)}
        for how, peak in (("none", 8), ("full", 4))
    }
    assert plan.settings(counts, 1, 24, 8)[:2] == ("full", "-")
    assert plan.settings(counts, 1, 18, 8, stage=1)[:2] == ("none", plan.OFFLOADED)
    assert plan.settings(counts, 1, 18, 8, stage=2)[:2] == ("full", plan.OFFLOADED)
    assert plan.settings(counts, 1, 18, 8)[4] == (1 + 2 + 1 + 1 + 2 + 8) * plan.GIB + plan.CONTEXT


def test_the_plan_command_needs_no_weights_and_no_data(capsys):
    size = ["--num_frames=5", "--height=32", "--width=48", f"--model_overrides={TINY.__dict__}"]
    argv = [f"{ROOT}/config/tiny0.py", *size, "--plan", "--plan_gpus=2"]
    train.main(config.apply(vars(train), argv))
    text = capsys.readouterr().out
    assert "global batch 128" in text and "8 x 40 GB" in text and "2 x 80 GB" in text


# ---- what a GPU runs, as far as a CPU can show it
class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_every_attention_of_a_step_is_fused_and_none_stores_its_scores():
    model = tiny_model(2, awake=True)
    with Operations() as seen:
        loss_of(model(**tiny_inputs())).backward()
    fused = [
        n for n in seen.names if n.startswith("_scaled_dot_product") and not n.endswith("backward")
    ]
    n = TINY.geo_layers
    cameras = TINY.camera_layers * TINY.camera_iterations
    assert set(fused) == {"_scaled_dot_product_flash_attention_for_cpu"}
    # Wan | geometry + exchange
    assert len(fused) == 2 * TINY.num_layers + 4 * n + TINY.bridge_layers + cameras
    assert not {"_softmax", "softmax", "bmm", "baddbmm"} & set(seen.names)


def test_every_attention_at_true_widths_is_what_flash_attention_takes_on_a_gpu(monkeypatch):
    """On CUDA it takes bf16, heads of at most 256 channels and a multiple of 8, no mask, a dense
    last axis."""
    calls, original = [], torch.nn.functional.scaled_dot_product_attention

    def seen(q, k, v, *args, **kwargs):
        calls.append((q, k, v, args, kwargs))
        return original(q, k, v, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    for cfg in (SHALLOW, replace(PRESETS["14b"], num_layers=2, num_pcb=1, taps=(0, 0, 0, 0))):
        with plan.fake_tensors(), torch.autocast("cpu", torch.bfloat16):
            model = plan.fake_model(cfg, 2)
            geometry_and_diffusion(True)(model, *plan.example_batch(cfg, 1, 5, 32, 48))
    assert len(calls) > 20
    for q, k, v, args, kwargs in calls:
        assert not args and not kwargs
        for x in (q, k, v):
            assert (
                x.dtype == torch.bfloat16
                and x.shape[-1] <= 256
                and x.shape[-1] % 8 == 0
                and x.stride(-1) == 1
            )


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_never_waits_for_a_value_on_the_device(stage):
    # no values: .item(), float() or a data-dependent shape would raise here
    with plan.fake_tensors():
        model = plan.fake_model(TINY, stage, half=False)
        loss = geometry_and_diffusion(stage == 2)(model, *plan.example_batch(TINY, 2, 5, 32, 48))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        with pytest.raises(RuntimeError):
            loss.item()


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="compile needs torch 2.5")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_recompute_and_share_graphs_without_a_change_of_gradients(
    backend, monkeypatch
):
    if backend == "inductor" and not (shutil.which("g++") and os.environ.get("SLOW")):
        pytest.skip("needs g++ and SLOW=1: compiling the kernels of a step takes half a minute")
    torch._dynamo.reset()
    monkeypatch.setattr("model.KEEP_ABOVE", 16)  # the MLP's end is kept, the other layers are not
    # Compiling its kernels takes seconds a step: one of them.
    quick = backend == "inductor"
    sizes = dict(num_layers=2 if quick else 4, num_pcb=1 if quick else 3, taps=(0, 0, 0, 0))
    grads = {}
    for compiled in (False, True):
        model = tiny_model(2, awake=True, **sizes)
        if compiled:
            model.checkpoint_activations = "selective"
            train.compile_steps(SimpleNamespace(pcb=model.pcb, irg=[]) if quick else model, backend)
            before = counters["stats"]["unique_graphs"]
        loss_of(model(**tiny_inputs())).backward()
        named = model.named_parameters()
        grads[compiled] = {n: p.grad for n, p in named if p.grad is not None}
    torch.testing.assert_close(grads[True], grads[False], rtol=1e-3, atol=1e-5)
    # A step whose input needs no gradient, the other steps of its kind, and the IRG's.
    assert 0 < counters["stats"]["unique_graphs"] - before <= 3
    torch._dynamo.reset()


def test_a_gpu_before_ampere_is_refused_by_name():
    with pytest.raises(ValueError, match="V100 has compute capability 7.0"):
        check_gpu("V100", (7, 0))
    check_gpu("A100", (8, 0))


# ---- sampling
@pytest.mark.parametrize("stage", [1, 2])
def test_sampling_with_constants_computed_once_equals_the_literal_loop(stage):
    model = tiny_model(stage, awake=True).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    noise, y = torch.randn(1, 16, 2, 4, 6, generator=g), torch.randn(1, 16, 2, 4, 6, generator=g)
    text, negative = (torch.randn(n, 64, generator=g) for n in (5, 3))
    w2c, K = camera_paths.load_camera("orbit", 5, (32, 48))
    inputs = sample.Inputs(noise, text, negative, y, None, w2c, K)
    sampling = sample.Sampling(steps=3)
    ours = sample.generate(model, inputs, sampling, decode=lambda x: x + 1)
    literal = bench.literal_sample(model, inputs, sampling)
    torch.testing.assert_close(ours[0], literal[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[2], literal[0] + 1, rtol=0, atol=1e-4)
    for key in ("depth", "points", "pose_enc"):
        torch.testing.assert_close(ours[1][key], literal[1][key], rtol=0, atol=1e-4)


def test_constants_of_the_video_branch_stand_in_for_prompt_and_camera():
    torch.manual_seed(0)
    dit, x = WanDiT(VideoSizes(32, 64, 2, 16, 16, 64, 16, 32)), tiny_inputs()
    given = dict(context=x["context"], clip=torch.randn(2, 257, 1280), plucker=x["plucker"])
    with torch.no_grad():
        assert torch.equal(
            dit(x["x"], x["t"], **given),
            dit(x["x"], x["t"], None, constants=dit.conditions(**given).with_keys(dit.blocks)),
        )


# ---- ranks
def two_ranks(rank, folder):
    """One of two gloo ranks: what accumulation sends, and a sharded AdamW against a whole one."""
    sent = []

    def hook(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    options = bench.OPTIONS.replaced(weight_decay=0.1, learning_rate=1e-2)

    def start(shard):
        model = tiny_model(1, awake=True)
        return (
            model,
            DistributedDataParallel(model, gradient_as_bucket_view=True),
            train.make_optimizer(model, options.replaced(shard_optimizer=shard), Ranks(rank, 2)),
        )

    def steps(wrapped, optimizer, numbers):
        for n in numbers:
            optimizer.zero_grad()
            loss_of(wrapped(**tiny_inputs(seed=2 * n + rank), video=False)).backward()
            optimizer.step()

    model, wrapped, optimizer = start(False)
    wrapped.register_comm_hook(None, hook)
    steps(wrapped, optimizer, range(2))
    with wrapped.no_sync():
        sent.clear()
        loss_of(wrapped(**tiny_inputs(), video=False)).backward()
        assert sent == []
    steps(wrapped, optimizer, range(2, 3))
    assert sum(sent) == sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    gradients_stay_in_the_buckets(rank)
    sharded, wrapped, optimizer = start(True)
    steps(wrapped, optimizer, range(2))
    moments = sum(v.numel() for s in optimizer.optim.state.values() for v in s.values() if v.dim())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0.8 * trained < moments < 1.2 * trained, "two moments of half of the parameters"
    content = training_state(sharded, optimizer)
    if rank == 0:
        save_checkpoint(folder, 2, content, dict(stage="1"), keep_last=1)
    dist.barrier()
    sharded, wrapped, optimizer = start(True)  # resume
    load_trained(sharded, folder / "step-2.safetensors")
    load_optimizer(folder / "step-2.optim.safetensors", sharded, optimizer)
    steps(wrapped, optimizer, range(2, 3))
    for (name, a), b in zip(model.named_parameters(), sharded.parameters()):
        assert torch.equal(a, b), name
    Ranks(rank, 2).leave()


def gradients_stay_in_the_buckets(rank):
    """Accumulation over three steps: one copy of the gradients, of the values that a plain mean
    has."""
    model, alone = tiny_model(2, awake=True), tiny_model(2, awake=True)
    ddp = wrap(model, Ranks(rank, 2, group=dist.new_group()), False)
    trained = [p for p in model.parameters() if p.requires_grad]
    places = [p.grad.data_ptr() for p in trained]
    held = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage() for p in trained}
    assert sum(s.nbytes() for s in held.values()) == sum(p.nbytes for p in trained)
    optimizer = train.make_optimizer(model, bench.OPTIONS.replaced(learning_rate=1e-9))
    for step in range(3):
        alone.zero_grad()
        for micro in range(2):
            with ddp.no_sync() if micro == 0 else nullcontext():
                loss_of(ddp(**tiny_inputs(seed=2 * micro + rank))).backward()
            assert places == [p.grad.data_ptr() for p in trained], (step, micro)
            for other in range(2):
                (loss_of(alone(**tiny_inputs(seed=2 * micro + other))) / 2).backward()
        for p, q in zip(trained, (q for q in alone.parameters() if q.requires_grad)):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
        take_step(optimizer, torch.zeros(()), in_buckets=True)


def test_ranks_send_the_gradient_once_and_sharded_adamw_resumes_to_the_weights_of_the_whole_one(
    tmp_path,
):
    torch.multiprocessing.start_processes(two_ranks, (tmp_path,), nprocs=2, start_method=START)
    names = load_file(tmp_path / "step-2.optim.safetensors")
    assert {n.split("|")[0] for n in names} == set(load_file(tmp_path / "step-2.safetensors")), (
        "every rank's share"
    )
