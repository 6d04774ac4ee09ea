"""Muon: torch's own as the oracle, kernels, skipped steps, and what train.py gives to it."""

import pytest
import torch
from small import options_of, tiny_model

import train
from lib import plan
from lib.optimizer import Muon, is_orthogonal, make_optimizer, orthogonalise, take_step


def pair(shape, seed=0):
    """A parameter and three gradients."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=g)
    return start, [torch.randn(shape, generator=g) for _ in range(3)]


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_steps_are_those_of_torch(shape):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    start, grads = pair(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    how = dict(lr=1e-2, weight_decay=0.1)
    one = Muon([dict(params=[ours], orthogonal=True)], **how)
    how |= dict(momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    other = torch.optim.Muon([theirs], **how)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        one.step()
        other.step()
    assert (ours - start).norm() > 0.01
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()  # theirs iterates in bf16


def test_equal_shapes_share_a_product_and_change_nothing():
    alone, together = [], []
    for stacked in (False, True):
        params, gradients = zip(*(pair((6, 10), seed) for seed in range(4)))
        params = [torch.nn.Parameter(p.clone()) for p in params]
        groups = [params] if stacked else [[p] for p in params]
        optimizer = Muon([dict(params=g, orthogonal=True) for g in groups], lr=1e-2)
        for step in range(3):
            for p, g in zip(params, gradients):
                p.grad = g[step].clone()
            optimizer.step()
        (together if stacked else alone).extend(p.detach() for p in params)
    for a, b in zip(alone, together):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # products of another batch


def test_a_kernel_is_the_matrix_of_its_filters():
    kernel = torch.nn.Parameter(pair((5, 3, 1, 2, 2))[0])
    kernel.grad = pair(kernel.shape, 1)[1][0]
    before = kernel.detach().clone()
    Muon([dict(params=[kernel], orthogonal=True)], lr=1.0, weight_decay=0.0).step()
    update = (before - kernel.detach()).flatten(1) / (0.2 * 12**0.5)
    singular = torch.linalg.svdvals(update)
    assert 0.6 < singular.min() and singular.max() < 1.3
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_products_are_fp32_on_a_cpu_which_may_have_no_instructions_for_bf16():
    assert orthogonalise(torch.ones(1, 3, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_bad_step_changes_neither_weights_nor_state():
    model = tiny_model().set_stage(2)
    options = options_of(train, stage=2, optimizer="muon", learning_rate=1e-3)
    optimizer = make_optimizer(model, options)
    kinds = {g.get("orthogonal", False): len(g["params"]) for g in optimizer.param_groups}
    assert kinds[True] > 10

    def state():
        moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
        return [p.detach().clone() for p in model.parameters()] + moments

    def step(value, bad):
        for p in model.parameters():
            p.grad = torch.full_like(p, value) if p.requires_grad else None
        take_step(optimizer, torch.tensor(bad))

    step(1.0, 0.0)
    before = state()
    step(float("nan"), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    step(1.0, 0.0)
    assert not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_what_is_a_matrix_within_the_network():
    kinds = {n: is_orthogonal(n, p) for n, p in tiny_model().named_parameters()}
    assert kinds["frame_blocks.0.attn.qkv.weight"] and kinds["bridge.proj.weight"]
    assert not kinds["camera_token"] and not kinds["dit.patch_embedding.weight"]
    assert not kinds["dit.head.head.weight"] and not kinds["camera_head.pose_branch.fc2.weight"]
    assert not any(kind for name, kind in kinds.items() if name.endswith(("bias", "modulation")))


def test_the_plan_counts_the_moments_that_a_step_makes():
    options = options_of(train, stage=2, optimizer="muon")
    model = tiny_model().set_stage(2)
    optimizer = make_optimizer(model, options)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    take_step(optimizer, torch.tensor(0.0))
    found = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
    how = dict(half=False, muon=True)
    assert (
        plan.count(model.cfg, 2, train.loss_alone(options), (1, 5, 32, 48), **how).moments == found
    )


@pytest.mark.parametrize("stage, kind", [(0, "adamw"), (2, "adamw"), (2, "muon")])
def test_nothing_but_matrices_and_kernels_decays(stage, kind):
    """The gains of the time up-sampling have four axes and are gains: decay pulls them to zero."""
    model = tiny_model().set_stage(stage)
    groups = make_optimizer(model, options_of(train, stage=stage, optimizer=kind)).param_groups
    decaying = {p for group in groups if group["weight_decay"] for p in group["params"]}
    found = {name for name, p in model.named_parameters() if p in decaying}
    assert found and not [n for n in found if not n.endswith(".weight") or "norm" in n]
