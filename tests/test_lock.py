"""One run a folder, with real processes and two loader workers, the default."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from kill import ENV, ROOT, start, tiny_run
from small import Forked, as_command, train_here

from lib import lock


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


def steps_in(out):
    log = out / "training.log"
    return log.read_text().count("\nstep ") if log.is_file() else 0


@pytest.fixture
def long_run(tmp_path):
    """A run that would last for minutes, killed with all its processes in the end."""
    command = [*tiny_run(tmp_path, 100_000), "--log_every=1", "--save_every=20"]
    arguments = [a for a in command if a not in ("--log_every=5", "--save_every=1")]
    arguments.append(f"--out_dir={tmp_path}/out")
    started = []

    def begin(ranks=1, **how):
        started.append(start(arguments, ranks, **how))
        assert wait_for(lambda: steps_in(tmp_path / "out") > 3)
        return started[-1]

    yield begin, arguments, tmp_path / "out"
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["pkill", "-9", "-f", f"{tmp_path}/out"], check=False)
        process.wait()


def again(arguments):
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)


def test_a_second_start_is_refused_by_name_and_a_dead_runs_lock_is_taken_over(long_run):
    begin, arguments, out = long_run
    first = begin()
    os.kill(first.pid, signal.SIGSTOP)  # it would train on, beside what is asked of others
    second = again(arguments)
    assert second.returncode == 2 and len(second.stderr.strip().splitlines()) == 1
    assert f"another run is in it (process {first.pid} on " in second.stderr
    assert "--out_dir" in second.stderr and first.poll() is None
    first.kill()  # -9: its lock goes with it, its two workers do not hold it
    first.wait()
    last = [a for a in arguments if not a.startswith("--max_steps")]
    last.append(f"--max_steps={steps_in(out) + 2}")
    code, text = train_here(*last[1:])
    assert code == 0, text
    assert f"taken over from a run that was cut off (process {first.pid} on " in text
    # Another process, to which this one has given the lock back.
    fourth = Forked(as_command, *last, said=out.parent / "fourth.txt")
    assert fourth.wait(120) == 0 and "taken over" not in fourth.said.read_text()


@pytest.mark.skipif(not os.path.exists("/proc"), reason="reads /proc")
def test_ranks_without_their_torchrun_end_and_save(long_run):
    begin, arguments, out = long_run
    agent = begin(ranks=2)
    ranks = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True)
    ranks = [int(pid) for pid in ranks.stdout.split()]
    assert len(ranks) >= 2
    os.kill(agent.pid, signal.SIGKILL)
    assert wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in ranks), 40)
    assert "stopped by SIGTERM" in (out / "training.log").read_text()


def test_locks_of_this_process(tmp_path):
    (tmp_path / "a").mkdir()
    assert lock.acquire(tmp_path / "a") == []
    assert lock.acquire(tmp_path / "a") == []  # it has it already
    code = "import sys; sys.path.insert(0, '.'); from lib import lock\n"
    code += f"lock.acquire({str(tmp_path / 'a')!r}, patience=0.1)"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "another run is in it" in other.stderr and f"process {os.getpid()}" in other.stderr
    lock.release()
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode
    (tmp_path / "a" / ".lock").write_text("half of")
    assert "taken over" in lock.acquire(tmp_path / "a")[0]
    lock.release()
