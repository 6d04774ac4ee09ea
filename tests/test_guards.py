"""What guards a run, piece by piece: signals, loader workers, records, pruning, warnings."""

import inspect
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from kill import ENV, ROOT

import data
import sample
from lib import checkpoints, guards, mix
from lib.distributed import say
from lib.guards import Watch, run_command
from lib.log import Records

BROKEN = """
import sys
import torch
from torch.utils.data import DataLoader
from lib import guards

class Clips(list):
    def __getitem__(self, i):
        if "damaged" in sys.argv:
            raise ValueError(f"clip {i}: damaged")
        return torch.zeros(1000, 1000)

def command():
    how = dict(num_workers=2, worker_init_fn=guards.ignore_signals)
    next(iter(DataLoader(Clips(range(3, 9)), sampler=[3, 4, 5, 6], batch_size=2, **how)))

if __name__ == "__main__":
    guards.run_command("train.py", command)
"""


def test_a_second_signal_exits_at_once():
    code = (
        "import os, signal, time\nfrom lib import guards\nstop = guards.Stop(None)\n"
        "os.kill(os.getpid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGTERM)\n"
        "assert stop.agreed() == signal.SIGINT\ntime.sleep(1.1)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(9)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (
        ended.returncode == 128 + signal.SIGTERM
        and ended.stderr.count("once more exits at once") == 1
    )


def talk_into(target):
    """What a run says and does at Ctrl-C, into an output that takes nothing."""
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    stop = guards.Stop(None)
    os.kill(os.getpid(), signal.SIGINT)
    say("step 1")
    sys.stdout.flush()  # as before each fork
    say("step 2", of_all=True)
    # run_command's promise about letters that a terminal lacks goes on.
    os._exit(stop.agreed() if sys.stdout.errors == "backslashreplace" else 1)


def test_a_tee_that_ctrl_c_ended_too_and_a_full_disk_behind_stdout_end_no_run():
    reader, writer = os.pipe()
    os.close(reader)
    for target in (writer, os.open("/dev/full", os.O_WRONLY)):
        process = multiprocessing.get_context("fork").Process(target=talk_into, args=(target,))
        process.start()  # forked wherever it runs: the handle is the child's too
        process.join(60)
        assert process.exitcode == signal.SIGINT
        os.close(target)


BAR = """
import sys, time
from tqdm import tqdm
from lib.distributed import say
from lib.guards import run_command

def command():
    for i in tqdm(range(3), mininterval=0):
        say("word", i)
        time.sleep(0.05)
    open(sys.argv[1], "w").write("done")

run_command("x.py", command)
"""


@pytest.mark.parametrize("to", ["2>&1 | head -c 9", ">/dev/full 2>&1", "2>&-", ">&- 2>&-", "2>&1"])
def test_a_bar_whose_reader_left_ends_nothing_and_words_stand_on_lines_of_their_own(to, tmp_path):
    """Seen: sample.py 2>&1 | head ended at its bar, and its first words hung behind one."""
    (tmp_path / "x.py").write_text(BAR)
    line = f'set -o pipefail; "{sys.executable}" x.py done {to}'
    env = dict(ENV, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="")
    ended = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True)
    assert ended.returncode == 0, ended
    assert (tmp_path / "done").read_text() == "done"
    if to == "2>&1":
        shown = ended.stdout.decode().replace("\r", "\n").splitlines()
        assert {"word 0", "word 1", "word 2"} <= {text.strip() for text in shown}


@pytest.mark.parametrize("words", [3, 99999])  # held back in the buffer, or not
def test_a_head_that_has_read_enough_is_no_error_and_a_full_disk_is_one(words, tmp_path):
    """data.py verify DIR | head ended with: data.py: [Errno 32] Broken pipe."""
    code = f"from lib.guards import run_command\nrun_command('x.py', lambda: print('a ' * {words}))"
    for to, status, said in (
        ("| (exec <&-; sleep 1)", 141, b""),
        ("> /dev/full", 2, b"x.py: [Errno"),
    ):
        line = f'set -o pipefail; (sleep 0.3; exec "{sys.executable}" -c "{code}") {to}'
        ended = subprocess.run(["bash", "-c", line], cwd=ROOT, env=ENV, capture_output=True)
        assert ended.returncode == status and ended.stderr.startswith(said), ended
        assert ended.stderr.count(b"\n") == bool(said), ended


def test_a_table_whose_reader_left_ends_without_a_word_and_every_command_has_its_guard():
    """python model.py | head and tiny/ablate.py --table | head ended in a traceback."""
    for command in ("model.py --preset=tiny", "tiny/ablate.py --table"):
        line = f'(sleep 0.3; exec "{sys.executable}" {command}) | exec <&-; exit ${{PIPESTATUS[0]}}'
        ended = subprocess.run(["bash", "-c", line], cwd=ROOT, env=ENV, capture_output=True)
        assert (ended.returncode, ended.stderr) == (141, b""), ended
    for path in (*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("tiny/*.py")):
        _, here, command = path.read_text().partition('if __name__ == "__main__":')
        said = "run_command(" in command or "SIGPIPE" in command
        assert said or not here or path.name in ("threads.py", "make_text.py"), path  # one line


def test_the_half_of_a_connection_that_a_lost_worker_leaves_has_its_cure():
    """ulimit -n 34 with four workers: a traceback that ended in EOFError, now and then."""
    for error in (EOFError(), ConnectionResetError(104, "Connection reset by peer")):
        assert "ulimit -n 65536" in guards.one_line(error)
    with pytest.raises(EOFError):
        guards.one_line(EOFError("Ran out of input"))  # of a pickle: no worker's
    for lost in ("pair.cc:547] Read error [10.0.0.2]:5: Connection reset by peer", "Broken pipe"):
        with pytest.raises(RuntimeError):  # a rank's, in gloo's words
            guards.one_line(RuntimeError(f"[gloo/transport/tcp/{lost}"))


def test_no_word_of_a_list_of_worlds_or_of_a_loader_ends_it():
    for place in (sample, data.CachedClips, mix):  # say alone outlives a tee
        assert "print(" not in inspect.getsource(place), place


def test_slurms_signal_before_the_time_limit_saves_and_leaves_and_spares_the_loaders():
    kept = {number: signal.getsignal(number) for number in guards.STOPS}
    try:
        stop = guards.Stop(None)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed() == signal.SIGUSR1
        guards.ignore_signals(0)
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_a_terminal_that_closes_ends_a_run_as_sigterm_does_unless_nohup_says_no(monkeypatch):
    def gone(*_):
        raise OSError(5, "Input/output error")

    before = {number: signal.getsignal(number) for number in guards.STOPS}
    monkeypatch.setattr(os, "write", gone)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        guards.Stop(None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = guards.Stop(None)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.agreed() == signal.SIGHUP
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_outside_of_a_run_is_one_line_and_the_status_of_its_signal(capsys):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command("data.py", stopped)
    assert ended.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "data.py: stopped by Ctrl-C\n"


def test_an_error_out_of_a_loader_worker_is_one_line_and_ends_the_process(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    env = dict(ENV, PYTHONPATH=str(ROOT))
    command = [sys.executable, tmp_path / "broken.py", "damaged"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (2, "train.py: clip 3: damaged\n")


def test_workers_that_die_while_an_error_ends_the_run_add_no_traceback(tmp_path):
    """ulimit -n 36 with four workers, now and then: Exception ignored in ... __del__."""
    late = "how = dict(num_workers=2, worker_init_fn=lambda _: (time.sleep(0.5), os._exit(1)))"
    code = BROKEN.replace("import sys", "import os, sys, time").split("    how = ")[0]
    code += f"""    {late}
    batches = iter(DataLoader(Clips(range(3, 9)), batch_size=2, **how))
    raise ValueError("clip 3: damaged")
guards.run_command("train.py", command)
"""
    (tmp_path / "late.py").write_text(code)
    command, env = [sys.executable, tmp_path / "late.py"], dict(ENV, PYTHONPATH=str(ROOT))
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (2, "train.py: clip 3: damaged\n")


def lose_a_batch():
    guards.ignore_signals(0)
    multiprocessing.Queue().put(lambda: 0)  # what it cannot send, as without file handles
    time.sleep(20)


def test_a_worker_that_cannot_send_its_batch_ends_and_the_cure_is_named():
    """The queue between them dropped the batch, and the run waited for it for ever: ulimit -n."""
    process = multiprocessing.get_context("fork").Process(target=lose_a_batch)
    process.start()
    process.join(15)
    assert process.exitcode == 1
    for kind, said in (
        (RuntimeError, "Too many open files. Com"),
        (OSError, "Too many open files"),
    ):
        assert "Fix: --num_workers=0, ulimit -n 65536" in guards.one_line(kind(said))


def test_shared_memory_as_small_as_a_containers_is_told_in_a_line_with_the_cure(tmp_path):
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    small = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*small, "true"]).returncode:
        pytest.skip("needs unshare -m and the right to mount")
    (tmp_path / "broken.py").write_text(BROKEN)
    command = [*small, sys.executable, tmp_path / "broken.py", "whole"]
    env = dict(ENV, PYTHONPATH=str(ROOT))
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    own = "ERROR: Unexpected bus error"  # a line of torch 2.4 itself
    (line,) = [x for x in ended.stderr.splitlines() if not x.startswith(own)]
    assert ended.returncode == 2 and len(line) < 250 and "shared memory" in line
    assert line.endswith("Fix: --num_workers=0, ulimit -n 65536, or more room in /dev/shm")


def test_a_record_that_cannot_be_written_is_announced_and_lost(tmp_path, capsys):
    (tmp_path / "training.log").symlink_to("/dev/full")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    records = Records(tmp_path, {}, 0)
    records.line("step 1/2")
    records.scalars(1, {"loss": 1.0})
    told = capsys.readouterr().out
    assert (
        "training.log: No space left on device; this entry is lost" in told
        and "tensorboard: " in told
    )


def test_a_disk_that_takes_no_more_curves_is_told_in_lines_alone(tmp_path, capfd, monkeypatch):
    """A full one ended TensorBoard's thread with a traceback at every line of the log."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has its own
    records = Records(tmp_path, {}, 0)
    records.scalars(1, {"loss": 1.0})
    records.flush()
    shutil.rmtree(tmp_path / "tensorboard")
    for step in range(2, 9):
        records.scalars(step, {"loss": 1.0})
        records.flush()
    said = capfd.readouterr()
    assert "this entry is lost" in said.out and "Traceback" not in said.err
    worker = threading.Thread(target=lambda: 1 / 0)
    worker.start()
    worker.join()
    assert "ZeroDivisionError" in capfd.readouterr().err  # of other kinds and threads it says all


def test_names_that_the_terminal_cannot_show_end_no_run(tmp_path, monkeypatch):
    """A clip called so ended its training: LANG=en_US of a cluster, or bytes that are no UTF-8."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    records = Records(tmp_path, {}, 0)
    run_command("train.py", lambda: records.line("# clip \u5ba2 \udcff"))
    assert raw.getvalue() == b"# clip \\u5ba2 \\udcff\n"
    assert (tmp_path / "training.log").read_bytes() == b"# clip \xe5\xae\xa2 \\udcff\n"


def test_a_full_disk_behind_the_output_costs_its_words_and_not_the_run(tmp_path, monkeypatch):
    """As of nohup python train.py ... > log &."""
    full = open("/dev/full", "w", buffering=1)
    monkeypatch.setattr(sys, "stdout", full)
    records = Records(tmp_path, {}, 0)
    records.line("step 1/2")
    records.attempt("config.json", (tmp_path / "none" / "config.json").write_text, "")
    assert (tmp_path / "training.log").read_text() == "step 1/2\n"
    with suppress(OSError):
        full.close()


@pytest.mark.parametrize("keep_last", [1, 2, 3, 4, 8])
def test_pruning_keeps_as_many_as_it_was_told(tmp_path, keep_last):
    for step in range(1, 11):
        (tmp_path / f"step-{step}.safetensors").touch()
        checkpoints.prune(tmp_path, step, keep_last, 0)
        assert checkpoints.saved_steps(tmp_path) == list(
            range(max(1, step - keep_last + 1), step + 1)
        )


@pytest.mark.parametrize(
    "curve, words",
    [
        (lambda n: {"loss/diffusion": 1.0}, "is not falling"),
        (
            lambda n: {"loss/diffusion": 1.0 - n / 200 + (0.9 if n % 2 else -0.5 + n / 400)},
            "oscillates",
        ),
        (lambda n: {"loss/depth": 0.3}, "loss/depth is 0.3 late in the run"),
        (lambda n: {"gpu_memory": 1 + n / 50}, "memory keeps growing"),
        (lambda n: {"loss/diffusion": 1 / (1 + n), "loss/depth": 0.1 + 1 / (1 + n)}, ""),
    ],
)
def test_warnings_of_the_guide_are_given_once_and_not_to_a_good_run(curve, words):
    said = []
    watch = Watch(100, said.append)
    for n in range(1, 101):
        watch.update(n, {"gpu_memory": 1.0, **curve(n)})
    assert len(said) == bool(words) and all(words in line for line in said)
