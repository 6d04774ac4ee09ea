"""Kill -9 a training run again and again, also in the middle of saving, and compare its end with an
undisturbed run's.

    python tests/kill.py --kills 30              one process: killed, started again by the same
                                                 command
    python tests/kill.py --kills 20 --ranks 2    one rank killed at a time: torchrun --max-restarts
                                                 brings the run back

After every kill the newest checkpoint must read back whole; at the end weights and AdamW moments
must be equal bitwise."""

import argparse
import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).parents[1]

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small import TINY, Forked, as_command  # noqa: E402

from lib import checkpoints  # noqa: E402
from lib.rooms import Recipe, synth  # noqa: E402

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def tiny_run(root, steps, ranks=1):
    """A rendered dataset and a random video branch -> the arguments of a tiny stage 1 run that
    saves every step."""
    if not (root / "clips").exists():
        synth(
            root / "clips",
            Recipe(
                num=8,
                num_frames=5,
                height=32,
                width=48,
                seed=0,
                variety="simple",
                cache_only=True,
                val=2,
            ),
        )
    return [
        "train.py",
        "config/tiny1.py",
        f"--data_dir={root}/clips",
        "--wan_dir=",
        "--random_wan=True",
        "--height=32",
        "--width=48",
        "--num_frames=5",
        "--num_workers=2",
        f"--batch_size={2 // ranks}",
        "--eval_every=0",
        f"--max_steps={steps}",
        "--save_every=1",
        "--log_every=5",
        f"--model_overrides={vars(TINY)}",
        "--device=cpu",
        "--keep_last=2",
        "--step_timeout=30",
    ]


def start(arguments, ranks=1, restarts=0):
    """The command in processes of its own: one, forked from this one, or torchrun's."""
    if ranks == 1:
        return Forked(as_command, *arguments)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launcher += [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=ENV, **quiet)


def children(pid):
    """Process ids of the running children of a process: the ranks of a torchrun."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just gone
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def end_run(process):
    """SIGKILL to a process and its children: ranks outlive their torchrun, each leads a process
    group of its own."""
    for pid in (*children(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, process, seconds=120):
    """Poll until condition() or the process has ended; False when it ended first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise TimeoutError(f"nothing happened in {seconds} s")


def newest(out):
    """Step of the newest whole checkpoint, -1 for none; latest must be whole whenever it exists."""
    if (out / "latest.safetensors").exists():
        checkpoints.read_checked(out / "latest.safetensors")
    step = checkpoints.newest_valid(out)
    return -1 if step is None else step


def saved_further(out, step):
    """A condition: the run has gone beyond a step, so this attempt is in its loop."""
    return lambda: max(checkpoints.saved_steps(out), default=-1) > step


def kill_alone(arguments, out, kills, chance):
    """Kill one process `kills` times, every second time while it writes a checkpoint -> counts."""
    counts = dict(random=0, saving=0)
    for n in range(kills):
        before, process = newest(out), start([*arguments, f"--out_dir={out}"])
        assert wait_for(saved_further(out, before), process), (
            "the run ended before it could be killed: raise --steps"
        )
        if n % 2:
            assert wait_for(lambda: any(out.glob("*.tmp")), process)
        else:
            time.sleep(chance.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        counts["saving" if any(out.glob("*.tmp")) else "random"] += 1
        assert newest(out) >= before + 1, (
            f"kill {n}: the newest whole checkpoint is {newest(out)}, it was {before + 1}"
        )
    assert start([*arguments, f"--out_dir={out}"]).wait(600) == 0
    return counts


def kill_ranks(arguments, out, kills, chance, ranks):
    """Kill one rank of a torchrun at a time; its restarts must bring the run to its end ->
    counts."""
    process, slowest = start([*arguments, f"--out_dir={out}"], ranks, restarts=kills), 0.0
    try:
        for _ in range(kills):
            before, tick = max(checkpoints.saved_steps(out), default=-1), time.monotonic()
            assert wait_for(saved_further(out, before), process), "the run ended: raise --steps"
            slowest = max(slowest, time.monotonic() - tick)
            time.sleep(chance.uniform(0, 0.3))
            os.kill(chance.choice(children(process.pid)), signal.SIGKILL)
        assert process.wait(600) == 0, "torchrun gave up"
    finally:
        end_run(process)
    return dict(rank_kills=kills, slowest_recovery_s=round(slowest, 1))


def compare(one, two, step):
    for end in ("", ".optim"):
        a, b = (load_file(out / f"step-{step}{end}.safetensors") for out in (one, two))
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a), (
            f"step-{step}{end} differs"
        )


def stress(root, kills, steps, seed=0, ranks=1):
    """All of it in a folder -> counts; AssertionError when anything is lost or differs."""
    arguments, chance = tiny_run(root, steps, ranks), random.Random(seed)
    whole, broken = root / f"whole{ranks}", root / f"broken{ranks}"
    broken.mkdir()
    assert start([*arguments, f"--out_dir={whole}"], ranks).wait(600) == 0
    counts = (
        kill_alone(arguments, broken, kills, chance)
        if ranks == 1
        else kill_ranks(arguments, broken, kills, chance, ranks)
    )
    compare(whole, broken, steps)
    return counts


def main(*given):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, help="of the run; default: 40 for every kill")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        found = stress(
            pathlib.Path(folder), args.kills, args.steps or 40 * args.kills, args.seed, args.ranks
        )
    print(
        f"{args.kills} kills, {found}: every checkpoint whole, the end is bitwise that of the "
        "undisturbed run; "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
