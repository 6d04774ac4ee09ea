"""A run that is stopped, killed, fed bad numbers or a full disk: nothing is lost and nothing is
silent."""

import json
import re
import resource
import signal
import time

import kill
import pytest
import torch
from inject import ACTS, at
from kill import compare, end_run
from safetensors.torch import load_file
from small import Forked, as_agent, free_endpoint, train_here
from test_train import run

import data
import train
from lib import checkpoints
from lib.log import changed_options

STEPS = 5  # of the run survivor, in conftest.py


@pytest.fixture(scope="module", autouse=True)
def stuck(survivor):
    """A run of two ranks, one of which sleeps from step 3 on; it waits for its timeouts while the
    other tests run."""
    root, arguments = survivor
    command = ["tests/inject.py", "1,2,0,hang", *arguments, "--batch_size=1", "--step_timeout=10"]
    process = Forked(as_agent, 2, *command, f"--out_dir={root}/hang", said=root / "hang.txt")
    yield process
    end_run(process)


@pytest.fixture(scope="module", autouse=True)
def killer(tmp_path_factory):
    """The stress script with two kills, one of them while saving, on the other core meanwhile."""
    said = tmp_path_factory.mktemp("killer") / "said.txt"
    process = Forked(kill.main, "--kills=2", "--steps=16", said=said)
    yield process
    end_run(process)


# ---- stopping and going on
@pytest.mark.parametrize("step, micro, left", [(2, 0, 2), (3, 1, 4)])
def test_a_run_stopped_by_sigterm_goes_on_without_a_seam(survivor, step, micro, left):
    root, arguments = survivor
    out = root / f"stopped{step}"
    code, text = train_here(*arguments, f"--out_dir={out}", **at(step, micro, ACTS["term"]))
    assert code == 128 + signal.SIGTERM and f"stopped by SIGTERM after step {left};" in text
    assert max(checkpoints.saved_steps(out)) == left
    code, text = train_here(*arguments, f"--out_dir={out}")
    assert code == 0 and f"steps {left} .. {STEPS}" in text
    compare(root / "whole", out, STEPS)


def read_log(path):
    """training.log -> [{"step": N, key: value, ...}], one a step: its last line holds."""
    steps = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"step (\d+)/\d+ \| ", line):
            fields = (pair.rsplit(" ", 1) for pair in line.split(" | ")[1:-2])
            step = int(found[1])
            steps[step] = {"step": step, **{key: float(value) for key, value in fields}}
    return [steps[n] for n in sorted(steps)]


def test_curves_and_log_of_a_crashed_and_resumed_run_have_every_step_once(survivor):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root, arguments = survivor

    def crash(_b):
        raise RuntimeError("the cable was pulled")

    with pytest.raises(RuntimeError, match="cable"):
        train_here(*arguments, f"--out_dir={root}/crashed", **at(3, 1, crash))
    # event files sort by second, process and count: a new process would have a new second
    time.sleep(1.1)
    code, text = train_here(*arguments, f"--out_dir={root}/crashed")
    assert code == 0 and "steps 2 .. 5" in text
    board = EventAccumulator(str(root / "crashed" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss/total")] == [1, 2, 3, 4, 5]
    steps, whole = (read_log(root / name / "training.log") for name in ("crashed", "whole"))
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5] and "step 3/5" in (
        root / "crashed" / "training.log"
    ).read_text()
    assert [s["loss/total"] for s in steps] == [s["loss/total"] for s in whole]
    starts = [
        json.loads(line) for line in (root / "crashed" / "starts.jsonl").read_text().splitlines()
    ]
    assert [s["first_step"] for s in starts] == [0, 2]
    # +cu121, say
    assert (
        json.loads(starts[0]["versions"])["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )
    assert starts[1]["command"].startswith("train.py") and starts[0]["git"]


def test_the_result_does_not_depend_on_the_number_of_loader_workers(survivor):
    root, arguments = survivor
    assert train_here(*arguments, "--num_workers=2", f"--out_dir={root}/workers")[0] == 0
    compare(root / "whole", root / "workers", STEPS)


# ---- several ranks
def test_two_ranks_agree_on_stops_and_bad_steps_survive_a_kill_and_go_on_with_four(survivor):
    root, arguments = survivor
    two = [*arguments, "--batch_size=1"]
    short = [*two, "--max_steps=4"]
    text = run("tests/inject.py", "1,3,1,nan", *short, f"--out_dir={root}/two_whole", ranks=2)
    assert (
        text.count(
            "step 4 skipped on all ranks (1 in a row, 1 in all): loss not finite on clips ['train_"
        )
        == 1
    )
    text = run(
        "tests/inject.py", "1,3,0,term", *two, f"--out_dir={root}/two_stopped", ranks=2, ok=False
    )
    assert "stopped by SIGTERM after step 3;" in text and "exitcode  : 143" in text
    text = run(
        "tests/inject.py",
        "1,3,0,kill+1,3,1,nan",
        *short,
        f"--out_dir={root}/two_stopped",
        ranks=2,
        restarts=1,
    )
    assert text.count("steps 3 .. 4") == 2  # torchrun brought the run back by itself
    compare(root / "two_whole", root / "two_stopped", 4)
    command = ["tests/inject.py", "1,3,0,kill+1,3,1,nan", *short, f"--out_dir={root}/two_nodes"]
    two_nodes(root, command)
    starts = (root / "two_nodes" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["first_step"] for line in starts] == [0, 2]  # not one attempt more
    compare(root / "two_whole", root / "two_nodes", 4)
    text = run("train.py", *two, f"--out_dir={root}/two_stopped", ranks=4)
    assert (
        "global batch kept at 4 on 4 GPUs: batch_size 1, grad_accum 1" in text
        and "steps 4 .. 5" in text
    )


def two_nodes(root, arguments):
    """A command under two agents of one rank each, as on two machines; both must end well."""
    how = dict(restarts=1, nodes=2, endpoint=free_endpoint())
    agents = [Forked(as_agent, 1, *arguments, said=root / f"node{n}.txt", **how) for n in range(2)]
    ends = [process.wait(240) for process in agents]
    assert ends == [0, 0], "".join(process.said.read_text() for process in agents)


# ---- bad numbers
def patch_loss(change, when=3):
    """compute_loss with change(loss) in step `when` of the run; the FLOP count's fakes do not
    count."""
    calls, compute_loss = [], train.compute_loss

    def patched(model, b, noise, **how):
        loss, *rest = compute_loss(model, b, noise, **how)
        calls.extend([1] * (type(noise) is torch.Tensor))
        hit = type(noise) is torch.Tensor and (len(calls) - 1) // 2 == when
        return (change(loss) if hit else loss), *rest

    return dict(compute_loss=patched)


@pytest.mark.parametrize(
    "accident, more, words",
    [
        (at(3, 1, ACTS["nan"]), [], "loss not finite on clips ['train_"),
        (patch_loss(lambda loss: loss + float("inf")), [], "loss not finite on clips ['train_"),
        (patch_loss(lambda loss: 1e6 * loss), ["--spike_guard=20"], "gradient norm"),
    ],
)
def test_a_bad_step_is_skipped_and_its_clips_are_named(survivor, tmp_path, accident, more, words):
    code, text = train_here(*survivor[1], *more, f"--out_dir={tmp_path}", **accident)
    assert code == 0 and text.count("skipped on all ranks") == 1
    assert f"step 4 skipped on all ranks (1 in a row, 1 in all): {words}" in text
    moments = load_file(tmp_path / "step-5.optim.safetensors")
    counts = {int(v) for k, v in moments.items() if k.endswith("|step")}
    assert counts == {4} and all(v.isfinite().all() for v in moments.values())
    before, after = (load_file(tmp_path / f"step-{n}.safetensors") for n in (4, 5))
    assert any(not before[k].equal(after[k]) for k in before) and all(
        v.isfinite().all() for v in after.values()
    )
    code, text = train_here(*survivor[1], *more, f"--out_dir={tmp_path}", "--max_steps=6")
    assert code == 0 and "skipped on" not in text


def test_nan_weights_end_the_run_with_the_last_good_checkpoint_intact(survivor, tmp_path):
    models, make = [], train.make_optimizer
    poison = at(
        2, 0, lambda b: next(p for p in models[0].bridge.parameters()).data.fill_(float("nan"))
    )
    capture = dict(
        make_optimizer=lambda model, *rest: (models.append(model), make(model, *rest))[1]
    )
    code, text = train_here(
        *survivor[1], f"--out_dir={tmp_path}", "--max_bad_steps=2", **poison, **capture
    )
    assert (
        str(code).startswith("2 bad steps in a row (max_bad_steps), last at step 4")
        and text.count("skipped") == 2
    )
    assert checkpoints.saved_steps(tmp_path) == [2]
    assert "whole, and fits" in checkpoints.describe(tmp_path / "latest.safetensors")


def test_infinite_depth_is_masked_and_harms_nothing(survivor, tmp_path):
    prepare = data.prepare

    def broken(batch, *rest):
        batch["depth"][0, 0] = float("inf")
        batch["depth"][0, 1, 0] = float("nan")
        return prepare(batch, *rest)

    code, text = train_here(*survivor[1], f"--out_dir={tmp_path}", prepare=broken)
    assert code == 0 and "skipped" not in text
    assert all(v.isfinite().all() for v in load_file(tmp_path / "latest.safetensors").values())


# ---- full disks and damaged files
def full_disk(step):
    """save_checkpoint that runs against a file size limit in one step: a real write error inside
    the real code."""
    save = checkpoints.save_checkpoint

    def limited(out, now, *rest, **keep):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000 if now == step else soft, hard))
        try:
            save(out, now, *rest, **keep)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return dict(save_checkpoint=limited)


def test_a_full_disk_costs_one_checkpoint_and_ends_the_run_with_an_error_only_at_its_end(
    survivor, tmp_path
):
    code, text = train_here(*survivor[1], f"--out_dir={tmp_path}/on", **full_disk(4))
    assert (
        code == 0
        and "warning: step 4 is not saved" in text
        and checkpoints.saved_steps(tmp_path / "on") == [2, 5]
    )
    assert not list((tmp_path / "on").glob("*.tmp"))
    # a failed save is tried again before leaving
    accident = {
        **full_disk(4),
        **at(4, 0, ACTS["term"]),
    }
    code, text = train_here(
        *survivor[1], f"--out_dir={tmp_path}/again", "--log_every=9", **accident
    )
    assert code == 128 + signal.SIGTERM and "goes on from step 2" in text
    compare(survivor[0] / "whole", tmp_path / "on", STEPS)
    code, text = train_here(*survivor[1], f"--out_dir={tmp_path}/last", **full_disk(5))
    assert "step 5 is not saved" in code and "or permit to write, then start the" in code
    assert checkpoints.newest_valid(tmp_path / "last") == 4


# ---- words about the course of a run
def test_changed_options_are_listed_at_a_resume(survivor):
    root, arguments = survivor
    rate = "--learning_rate=1e-3"
    train_here(*arguments, f"--out_dir={root}/changed", rate, "--max_steps=2")
    text = train_here(
        *arguments, f"--out_dir={root}/changed", "--learning_rate=2e-3", "--max_steps=3"
    )[1]
    assert (
        "changed since step 2: max_steps 2 -> 3" in text
        and "learning rate changes at this resume: 6e-05 before, 0.00012 now" in text
    )
    assert changed_options(dict(a=[1, 2], b=1, resume=""), dict(a=(1, 2), b=2, resume="x")) == [
        "b 1 -> 2"
    ]
    code, _ = train_here(
        *arguments,
        "--stage=0",
        f"--out_dir={root}/new",
        f"--resume={root}/changed/latest.safetensors",
    )
    assert "is of stage 1, this run is stage 0" in code


def test_a_stuck_rank_ends_the_run_instead_of_hanging_it(stuck, survivor):
    """Its last test: 10 s of step_timeout and 30 s of torchrun's grace have passed meanwhile."""
    assert stuck.wait(120) == 1 and "Timed out waiting 10000ms" in stuck.said.read_text()
    assert checkpoints.newest_valid(survivor[0] / "hang") == 2


def test_killed_runs_end_bitwise_like_an_undisturbed_one(killer):
    code, told = killer.wait(240), killer.said.read_text()
    assert code == 0 and "2 kills" in told and "bitwise that of the undisturbed run" in told, told
