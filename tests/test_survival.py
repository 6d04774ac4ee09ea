"""A run that is stopped, killed, fed bad numbers or a full disk: nothing is lost and nothing is
silent."""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import time

import kill
import pytest
import torch
from inject import ACTS, at
from kill import compare, end_run, tiny_run
from safetensors.torch import load_file, save_file
from small import Forked, as_agent, train_here
from test_train import run

import data
import train
from lib import checkpoints, files, frozen, weights
from lib.log import changed_options
from lib.tensors import write_tensors

STEPS = 5
FLIPS = int(os.environ.get("FLIPS", 300))


@pytest.fixture(scope="session")
def survivor(tmp_path_factory):
    """Arguments of a tiny run with an epoch of 2 steps and 2 micro-steps a step, and its
    undisturbed end."""
    root = tmp_path_factory.mktemp("survival")
    arguments = [
        a
        for a in tiny_run(root, STEPS)[1:]
        if not a.startswith(("--log_every", "--save_every", "--keep_last"))
    ]
    arguments += ["--grad_accum=2", "--log_every=1", "--save_every=2", "--keep_last=9"]
    assert train_here(*arguments, f"--out_dir={root}/whole")[0] == 0
    return root, arguments


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
    time.sleep(
        1.1
    )  # event files sort by second, process and count: a new process would have a new second
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
    assert (
        json.loads(starts[0]["versions"])["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )  # +cu121, say
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    how = dict(restarts=1, nodes=2, endpoint=place)
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
    accident = {
        **full_disk(4),
        **at(4, 0, ACTS["term"]),
    }  # a failed save is tried again before leaving
    code, text = train_here(
        *survivor[1], f"--out_dir={tmp_path}/again", "--log_every=9", **accident
    )
    assert code == 128 + signal.SIGTERM and "goes on from step 2" in text
    compare(survivor[0] / "whole", tmp_path / "on", STEPS)
    code, text = train_here(*survivor[1], f"--out_dir={tmp_path}/last", **full_disk(5))
    assert "step 5 is not saved" in code and checkpoints.newest_valid(tmp_path / "last") == 4


def test_a_flipped_byte_is_found_and_the_checkpoint_before_is_used(survivor):
    root, arguments = survivor
    out = root / "flipped"
    assert train_here(*arguments, f"--out_dir={out}")[0] == 0
    path = out / "step-5.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    (out / ".step-9.safetensors.123.tmp").write_bytes(b"half")
    (out / "mine.tmp").write_bytes(b"a user's own")
    (out / "step-9.optim.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="sha256"):
        checkpoints.describe(path)
    code, text = train_here(*arguments, f"--out_dir={out}")
    assert "passed over" in text and "steps 4 .. 5" in text and not list(out.glob("*step-9*"))
    assert (out / "mine.tmp").exists()
    compare(root / "whole", out, STEPS)


def test_every_flipped_bit_of_a_checkpoint_is_noticed(survivor, tmp_path):
    """Half of the flips hit the header; 2,000 of them are in docs/survival.md."""
    whole, rng = (survivor[0] / "whole" / "step-5.safetensors").read_bytes(), random.Random(0)
    path, header = tmp_path / "step-5.safetensors", 8 + int.from_bytes(whole[:8], "little")
    beside = tmp_path / "step-5.optim.safetensors"
    beside.write_bytes((survivor[0] / "whole" / "step-5.optim.safetensors").read_bytes())
    path.write_bytes(whole)
    checkpoints.check_step(tmp_path, 5)
    blank = len(whole[:header].rstrip(b" "))
    for trial in range(FLIPS):
        at = rng.randrange(blank if trial % 2 else len(whole))
        path.write_bytes(flipped(whole, at, rng.randrange(8)))
        if blank <= at < header:
            continue  # spaces between header and values hold nothing
        with pytest.raises((ValueError, KeyError)):
            checkpoints.check_step(tmp_path, 5)


def flipped(content, at, bit):
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


def test_moments_of_other_weights_are_refused(survivor, tmp_path, capsys):
    for name in ("step-5.safetensors", "step-4.safetensors"):
        shutil.copyfile(survivor[0] / "whole" / name, tmp_path / name)
    for step, of in ((4, 4), (5, 4)):
        source = survivor[0] / "whole" / f"step-{of}.optim.safetensors"
        shutil.copyfile(source, tmp_path / f"step-{step}.optim.safetensors")
    assert checkpoints.newest_valid(tmp_path) == 4
    assert "not the optimizer state of step-5.safetensors" in capsys.readouterr().out
    code, text = train_here(*survivor[1], f"--out_dir={tmp_path}", "--max_steps=5")
    assert code == 0 and "steps 4 .. 5" in text


@pytest.mark.parametrize("key", ["train_config", "model_config", "step", "stage"])
def test_a_checkpoint_without_what_resume_needs_is_passed_over(survivor, tmp_path, key, capsys):
    for step in (4, 5):
        for end in ("", ".optim"):
            name = f"step-{step}{end}.safetensors"
            shutil.copyfile(survivor[0] / "whole" / name, tmp_path / name)
    path = tmp_path / "step-5.safetensors"
    tensors, meta = weights.read_tensors(path)
    kept = {k: v for k, v in meta.items() if k not in (key, "sha256")}
    whole = dict(kept, sha256=weights.digest(tensors, kept))
    # Aside: the tensors are mapped from the file.
    files.write_aside(path, lambda aside: write_tensors(tensors, whole, aside))
    assert checkpoints.newest_valid(tmp_path) == 4 and "passed over" in capsys.readouterr().out


def test_files_have_the_permissions_that_the_user_asks_for(survivor, tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors({"a": torch.ones(3)}, {"b": "c"}, tmp_path / "x.safetensors")
        assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1, 1, 1]
    assert (survivor[0] / "whole" / "step-5.safetensors").stat().st_mode & 0o777 == 0o644


def test_pruning_keeps_the_newest_the_multiples_and_what_latest_points_to(survivor, tmp_path):
    code, _ = train_here(
        *survivor[1], f"--out_dir={tmp_path}", "--save_every=1", "--keep_last=1", "--keep_every=2"
    )
    assert code == 0 and checkpoints.saved_steps(tmp_path) == [2, 4, 5]
    assert [p.name for p in tmp_path.glob("*.optim.safetensors")] == ["step-5.optim.safetensors"]
    (tmp_path / "step-7.safetensors").write_bytes(b"a damaged later one")
    checkpoints.prune(tmp_path, 5, 1, 0)
    assert checkpoints.saved_steps(tmp_path) == [5, 7] and (
        tmp_path / "latest.safetensors"
    ).samefile(tmp_path / "step-5.safetensors")


def test_check_prints_what_a_checkpoint_holds_and_refuses_others(survivor, tmp_path):
    latest = survivor[0] / "whole" / "latest.safetensors"
    text = run("train.py", "--check", latest)
    tensors = load_file(latest)
    assert (
        "stage 1, step 5" in text
        and f"{len(tensors)} tensors, {sum(v.numel() for v in tensors.values()):,}" in text
    )
    assert (
        weights.read_metadata(latest)["sha256"] in text
        and min(tensors) in text
        and "optimizer state beside it" in text
    )
    meta = weights.read_metadata(latest)
    save_file(
        {k: v for k, v in tensors.items() if k != min(tensors)},
        tmp_path / "less.safetensors",
        {k: v for k, v in meta.items() if k not in ("sha256", "format")},
    )
    assert "1 tensors are not those of its model" in run(
        "train.py", "--check", tmp_path / "less.safetensors", ok=False
    )


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


def test_other_frozen_weights_are_refused_by_name(survivor, tmp_path):
    """A base of the same shapes: depth would be half as wrong again, without a word."""
    base, other = tmp_path / "base", tmp_path / "other"
    stage0 = ["--stage=0", "--max_steps=1", "--wan_dir=", "--random_wan=False"]
    for folder, seed in ((base, 0), (other, 1)):
        code, _ = train_here(*survivor[1], *stage0, f"--out_dir={folder}", f"--seed={seed}")
        assert code == 0
    on = ["--random_wan=False", "--max_steps=1", f"--out_dir={tmp_path}/one"]
    assert train_here(*survivor[1], *on, f"--wan_dir={base}")[0] == 0
    meta = weights.read_metadata(tmp_path / "one" / "latest.safetensors")
    assert meta["frozen"] == frozen.frozen_digest(base) != frozen.frozen_digest(other)
    assert (base / ".fantasyworld.json").exists()  # hashed once
    on[1] = "--max_steps=2"
    code, text = train_here(*survivor[1], *on, f"--wan_dir={other}")
    assert "was trained on other frozen weights" in f"{code}{text}" and "--other_wan" in f"{code}"
    assert train_here(*survivor[1], *on, f"--wan_dir={other}", "--other_wan=True")[0] == 0


def test_the_digest_of_frozen_weights_is_of_tensors_not_of_files(tmp_path):
    a = {"blocks.0.x": torch.randn(3, 4), "head.head.weight": torch.randn(2)}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file(a, tmp_path / "one" / "diffusion_pytorch_model.safetensors")
    for n, (key, value) in enumerate(a.items()):
        name = f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors"
        save_file({f"model.{key}": value}, tmp_path / "two" / name)
    assert frozen.frozen_digest(tmp_path / "one") == frozen.frozen_digest(tmp_path / "two")
    a["blocks.0.x"][0, 0] += 1e-6
    save_file(a, tmp_path / "one" / "diffusion_pytorch_model.safetensors")
    assert frozen.frozen_digest(tmp_path / "one") != frozen.frozen_digest(tmp_path / "two")


def test_what_a_stranger_wrote_into_a_checkpoint_commands_no_terminal(survivor, tmp_path):
    tensors, meta = weights.read_tensors(survivor[0] / "whole" / "latest.safetensors")
    facts = dict(meta, command="x\x1b]0;title\x07\ny", git="\x1b[2J")
    facts["sha256"] = weights.digest(tensors, facts)
    write_tensors(tensors, facts, tmp_path / "latest.safetensors")
    text = checkpoints.describe(tmp_path / "latest.safetensors")
    assert "\x1b" not in text and "\x07" not in text and "command x ]0;title y" in text
