"""Weights that visit the device: the same values, two steps there at a time, copies beside work."""

import contextlib

import pytest
import torch
from small import TINY, loss_of, options_of, tiny_inputs, tiny_model

import lib.evaluate
import train
from lib import plan
from lib.offload import Visits, offload, visiting_bytes


def steps_sent(model, monkeypatch):
    """The numbers of the steps that were sent, in order, from now on."""
    sent, send = [], Visits.send
    monkeypatch.setattr(Visits, "send", lambda self, n: sent.append(n) or send(self, n))
    return sent


def gradients(model, seeds):
    found = []
    for seed in seeds:
        model.zero_grad()
        loss_of(model(**tiny_inputs(seed=seed))).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    return found


@pytest.mark.parametrize("how", ["selective", "attention", "full"])
def test_training_has_the_same_gradients_and_sends_every_step_once_a_way(how, monkeypatch):
    plain, visiting = (tiny_model(2, awake=True) for _ in range(2))
    plain.checkpoint_activations = visiting.checkpoint_activations = how
    want = gradients(plain, range(4))
    offload(visiting, "cpu")
    sent = steps_sent(visiting, monkeypatch)
    n, lengths = len(visiting.visits.steps), []
    for seed in range(4):
        before = len(sent)
        found = gradients(visiting, [seed])[0]
        assert all(torch.equal(found[k], v) for k, v in want[seed].items())
        lengths.append(len(sent) - before)
    # Forward to the last step and back to the first, which is still there for the next forward.
    assert lengths[2:] == [2 * n - 2] * 2  # the first two learn the way
    assert sent[-lengths[-1] :] == [*range(2, n), *range(n - 2, -1, -1), 1]


def test_sampling_has_the_same_values_and_a_share_may_stay(monkeypatch):
    plain, visiting = (tiny_model(2, awake=True).requires_grad_(False) for _ in range(2))
    total, two = visiting_bytes(visiting)
    homes = {n: p.clone() for n, p in visiting.named_parameters()}
    offload(visiting, "cpu", keep_gb=0.5 * total / 1e9)
    away = [len(home) for _, home, _ in visiting.visits.steps]
    assert 0.5 * total - max(away) <= sum(away) <= 0.5 * total + max(away)
    assert sum(map(len, visiting.visits.buffers)) == 2 * max(away) <= two
    with torch.no_grad():
        for seed in range(2):
            a, b = plain(**tiny_inputs(seed=seed)), visiting(**tiny_inputs(seed=seed))
            assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(homes[n], p) for n, p in visiting.named_parameters())
    visiting.visits.go_home()
    places = {p.untyped_storage().data_ptr() for p in visiting.parameters()}
    assert not places & {b.untyped_storage().data_ptr() for b in visiting.visits.buffers}


class Stream:
    """A stream that writes down what it is asked for."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


def test_a_step_waits_for_its_copy_alone_and_the_next_copy_runs_beside_it(monkeypatch):
    model, log = tiny_model(2).requires_grad_(False), []
    offload(model, "cpu")
    visits, main, side = model.visits, Stream("main", log), Stream("side", log)
    visits.stream = side
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    send = Visits.send

    def sent(self, n):
        send(self, n)
        log.append(f"side copies {n} to {1 - self.at}")

    monkeypatch.setattr(Visits, "send", sent)
    for number, (matrices, _, _) in enumerate(visits.steps):
        layer = matrices[0].layer
        layer.register_forward_pre_hook(lambda *_, n=number: log.append(f"main runs {n}"))
    with torch.no_grad():
        model(**tiny_inputs(), heads=False)
        log.clear()
        model(**tiny_inputs(), heads=False)
    log = [e for k, e in enumerate(log) if e != log[k - 1]]  # a layer may run twice: keys, queries
    n = len(visits.steps)
    for k in range(1, n - 1):
        start = log.index(f"main runs {k}")
        # The step's own copy, and the one of the next step, were both started before it runs; it
        # waited for the former only, and the latter for the step before it, whose buffer it takes.
        assert f"side copies {k + 1} to" in log[start - 1] and log[start - 2] == (
            "side waits for main"
        )
        assert log[start - 3] == "main waits for side", log[start - 5 : start + 1]
        copied = next(i for i, e in enumerate(log) if e.startswith(f"side copies {k} to"))
        assert copied < start - 3 and f"main runs {k - 1}" in log[copied:start]
    buffers = [int(e[-1]) for e in log if e.startswith("side copies")]
    assert all(a != b for a, b in zip(buffers, buffers[1:])), "two copies in a row into one buffer"


def test_the_plan_of_offloaded_training_has_two_steps_in_place_of_all():
    loss = train.loss_alone(options_of(train, stage=2))
    one = plan.count(TINY, 2, loss, (1, 5, 32, 48))
    counts, (away, buffers) = {1: one, 2: one}, one.visiting  # two clips are not asked for
    with plan.fake_tensors():
        assert (away, buffers) == visiting_bytes(plan.fake_model(TINY, 2))
    saved = plan.needs(counts, 1) - plan.needs(counts, 1, plan.OFFLOADED)
    assert saved == away - buffers > 0


def test_what_cannot_be_offloaded_is_refused():
    for wrong, why in (
        (dict(stage=0), "stage 0 has no frozen weights"),
        (dict(stage=2), "checkpoint_activations"),
        (dict(stage=1, shard_weights=True), "shard_weights"),
        (dict(stage=1, compile=True), "compile"),
    ):
        options = options_of(train, offload_frozen=True, plan=True, **wrong)
        with pytest.raises(ValueError, match=why):
            train.check_options(options)


def test_weights_that_are_loaded_after_an_evaluation_are_the_ones_that_run(monkeypatch):
    """eval_only of several in the config of stage 1: exchange and adapters visit too, and a copy
    on the device of the step that ran last, or comes next, is of the weights before."""
    first, second = (tiny_model(2, seed=seed, awake=True) for seed in (0, 1))
    second.dit.load_state_dict(first.dit.state_dict())
    visiting = offload(tiny_model(1, awake=True).requires_grad_(False), "cpu")
    monkeypatch.setattr(lib.evaluate, "rows_of_clip", lambda m, b, *_: (m(**b) and {}, None))
    how = lib.evaluate.How(None, 1, 0.1)
    for plain in (first, second):
        visiting.set_stage(2)
        own = dict(visiting.named_parameters())
        for name, p in plain.named_parameters():
            own[name].data.copy_(p.data)
        with torch.no_grad():
            a, b = plain(**tiny_inputs()), visiting(**tiny_inputs())
        assert all(torch.equal(a[k], b[k]) for k in a)
        lib.evaluate.evaluate(visiting, [tiny_inputs(batch=1)], how)
