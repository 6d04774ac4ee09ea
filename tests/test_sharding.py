"""Weights spread over two gloo ranks: the same numbers, the same files, a share of the memory."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from safetensors.torch import load_file
from small import START, loss_of, tiny_inputs, tiny_model
from torch.nn.parallel import DistributedDataParallel

import config
import lib.evaluate
import train
from lib import plan
from lib.checkpoints import load_optimizer, save_checkpoint, training_state
from lib.distributed import Ranks, copy_into, own_part, part_like, shard
from lib.optimizer import clip_gradients
from lib.weights import load_trained
from model import PRESETS, FantasyWorld

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="fully_shard with ignored_params: torch 2.7"
)

FEW = dict(num_layers=3, taps=(0, 0, 0, 0))  # two steps of the PCB, one of the IRG
OPTIONS = config.apply(vars(train), ["--weight_decay=0.1", "--learning_rate=1e-3"])


def steps(model, wrapped, optimizer, numbers, stage):
    for n in numbers:
        optimizer.zero_grad()
        loss_of(wrapped(**tiny_inputs(seed=2 * n + dist.get_rank()), video=stage == 2)).backward()
        norm = clip_gradients([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()


def differences(model, reference):
    """name -> largest difference of this rank's part; the two must have the same names in the same
    order."""
    names = [n for n, _ in reference.named_parameters()]
    assert [n for n, _ in model.named_parameters()] == names
    return {
        n: F.pad((own_part(a) - part_like(b.detach(), a)).abs().flatten(), (0, 1)).max().item()
        for n, a, b in zip(names, model.parameters(), reference.parameters())
    }


def equality(folder, ranks, options, cases):
    """Two steps of a spread model and of DDP; then saved by the one and resumed by both."""
    for stage, how in cases:
        plain, spread = (tiny_model(stage, awake=True, **FEW) for _ in range(2))
        plain.checkpoint_activations = spread.checkpoint_activations = how
        shard(spread, ranks)
        ours, theirs = (train.make_optimizer(m, options) for m in (spread, plain))
        assert sum(p.to_local().numel() for p in spread.parameters()) < 0.51 * sum(
            p.numel() for p in plain.parameters()
        )
        wrapped = DistributedDataParallel(plain)
        for step in range(2):  # sums of gradients in another order
            steps(plain, wrapped, theirs, [step], stage)
            steps(spread, spread, ours, [step], stage)
            assert max(differences(spread, plain).values()) < 1e-6, (stage, how, step)
        assert not any(
            group.is_unsharded
            for m in spread.modules()
            if isinstance(m, torch.distributed.fsdp.FSDPModule)
            for group in m._get_fsdp_state()._fsdp_param_groups
        ), "left whole after the step"
    state = training_state(spread, ours)
    if dist.get_rank() == 0:
        save_checkpoint(folder, 2, state, dict(stage="2"), keep_last=1)
    dist.barrier()
    for spread_again in (False, True):
        model = tiny_model(2, **FEW)  # other weights than those saved
        if spread_again:
            shard(model, ranks)
        optimizer = train.make_optimizer(model, options)
        for p, frozen in zip(model.parameters(), plain.parameters()):
            if not p.requires_grad:
                copy_into(p, frozen)
        load_trained(model, folder / "step-2.safetensors")
        load_optimizer(folder / "step-2.optim.safetensors", model, optimizer)
        wrapped = model if spread_again else DistributedDataParallel(model)
        steps(model, wrapped, optimizer, range(2, 3), 2)
        if not spread_again:
            steps(spread, spread, ours, range(2, 3), 2)
        assert (
            max(differences(spread, model if not spread_again else plain_of(model)).values()) < 1e-6
        ), spread_again


def plain_of(model):
    copy = tiny_model(2, **FEW)
    for p, q in zip(copy.parameters(), model.parameters()):
        copy_into(p, q.full_tensor())
    return copy


def memory(ranks):
    """What the allocator hands out in the second micro-step of a step, beside the plan."""
    cfg, size = replace(PRESETS["tiny"], num_pcb=2, **FEW), (5, 48, 64)

    loss = train.loss_alone(OPTIONS.replaced(stage=2))
    model = FantasyWorld(cfg).set_stage(2)
    shard(model, ranks)
    model.checkpoint_activations = "full"
    loss(model, *plan.example_batch(cfg, 1, *size)).backward()
    if dist.get_rank():
        return loss(model, *plan.example_batch(cfg, 1, *size)).backward()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        loss(model, *plan.example_batch(cfg, 1, *size)).backward()
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    trained = sum(p.to_local().nbytes for p in model.parameters() if p.requires_grad)
    here = sum(p.to_local().nbytes for p in model.parameters()) + 3 * trained + peak
    how = dict(checkpointing="full", half=False)
    one = plan.count(cfg, 2, loss, (1, *size), **how)  # two clips are not asked for
    assert plan.needs({1: one, 2: one}, 1, "weights", 2) - plan.CONTEXT == pytest.approx(
        here, rel=0.1
    )


def compiled(ranks):
    """Steps compile inside what is gathered: every graph whole, values as without."""
    plain, spread = (tiny_model(2, awake=True, **FEW) for _ in range(2))
    shard(spread, ranks)
    train.compile_steps(SimpleNamespace(pcb=spread.pcb[-1:], irg=spread.irg[-1:]), "eager")
    spread.checkpoint_activations = "selective"
    a, b = spread(**tiny_inputs()), plain(**tiny_inputs())
    torch.testing.assert_close(a["velocity"], b["velocity"])
    loss_of(a).backward()


def evaluated(ranks):
    """A forward without a backward leaves the stem whole; after an evaluation it is spread again,
    so that a stop right then can save."""
    model = tiny_model(2, **FEW)
    shard(model, ranks)
    optimizer = train.make_optimizer(model, OPTIONS)
    steps(model, model, optimizer, [0], 2)
    forward = patch.object(lib.evaluate, "rows_of_clip", lambda m, b, *_: (m(**b) and {}, None))
    with forward:
        how = lib.evaluate.How(None, 1, 0.1, ranks)
        lib.evaluate.evaluate(model, [tiny_inputs(batch=1)], how)
    weights, moments = training_state(model, optimizer)
    assert len(moments) == 3 * len(weights) > 0


def one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    ranks = Ranks(rank, 2, group=dist.new_group())
    equality(folder, ranks, OPTIONS.replaced(optimizer="muon"), [(2, "none")])
    equality(folder, ranks, OPTIONS, [(1, "full"), (2, "selective")])
    memory(ranks)
    compiled(ranks)
    evaluated(ranks)
    ranks.leave()


def test_spread_weights_train_to_the_same_values_files_and_planned_memory(tmp_path):
    torch.multiprocessing.start_processes(one_rank, (tmp_path,), nprocs=2, start_method=START)
    assert all(
        v.isfinite().all() for v in load_file(tmp_path / "step-2.optim.safetensors").values()
    )
