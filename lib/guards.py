"""What keeps a run in order: user errors in one line, stop signals that all ranks agree on, bad
steps that are skipped, warnings about its course."""

import math
import multiprocessing.queues
import os
import re
import signal
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from lib import lock
from lib.distributed import Unheard, gathered

# The guide's figures: a mean loss above them in the last fifth of a run earns a warning.
LATE_LIMITS = {"loss/depth": 0.2, "loss/point": 0.5, "loss/camera": 0.1}

# A loader worker that was killed, or that found no shared memory or no file handle for its batch;
# last what its half of a connection says that is read just then (in gloo's words: a lost rank).
LOST_WORKER = r"DataLoader worker|Too many open|unable to .*(shared memory|torch_)"
LOST_WORKER = re.compile(rf"{LOST_WORKER}|^EOFError\(\)|^\[Errno \d+\] (Connection reset|Broken)")


def run_command(program, command, advice=""):
    """command(); user errors become one line and exit status 2; advice: where memory runs out."""
    sys.stderr = Unheard(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
    with suppress(AttributeError):  # no stdout
        # Letters that a terminal lacks must not end a run; `app.py > log` says its address at once.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        command()
        return print(end="", flush=True)  # what a buffer held back fails here, not at the exit
    except KeyboardInterrupt:
        said, status = "stopped by Ctrl-C", 128 + signal.SIGINT
    except Exception as error:
        # Of stdout: head has read enough.
        head = isinstance(error, BrokenPipeError) and not multiprocessing.active_children()
        end_children()  # before the error lets go of a loader, which would hear of their ends
        said, status = ("", 128 + signal.SIGPIPE) if head else (one_line(error, advice), 2)
    finally:
        end_children()
    print(f"{program}: {said}\n" if said else "", end="", file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # what the buffer holds would fail once more at the exit: status 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)


def out_of_memory(error):
    """What a full GPU says, or a CPU, whose allocator raises a RuntimeError; "": another error."""
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    if isinstance(error, kinds) or "DefaultCPUAllocator" in str(error):
        return (str(error) or "out of memory").splitlines()[0]
    return ""


def one_line(error, advice=""):
    """A user error as its line; every other error goes on."""
    # Out of a loader worker comes its whole traceback, with the message at the end.
    said = str(error).rpartition(f"\n{type(error).__name__}: ")[2] or repr(error)
    if full := out_of_memory(error):
        said = f"{full} {advice}"
    elif isinstance(error, ModuleNotFoundError):
        said = f"{error}. Fix: pip install -r requirements.txt"
    elif isinstance(error, (RuntimeError, OSError, EOFError)) and LOST_WORKER.search(said):
        said += " Fix: --num_workers=0, ulimit -n 65536, or more room in /dev/shm"
    elif not isinstance(error, (ValueError, OSError, SafetensorError)):
        raise error
    return printable(said)


def printable(text):
    """A stranger's text as one line that no terminal obeys."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def end_children():
    """Kill loader workers that are left: they ignore signals, so Python would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for each
    for child in multiprocessing.active_children():
        child.kill()


# ---------------------------------------------------------------------------------------- signals
# Of a scheduler, Ctrl-C, slurm's --signal=USR1, a terminal that closes.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def ignore_signals(_worker):
    """For loader workers: a signal reaches the whole group, and the trainer still needs them."""
    lock.release(worker=True)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    # A batch that it cannot send (no file handles left) it would drop: the trainer waits for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)


class Stop:
    """The signals of STOPS as a flag that is read between micro-steps.

    A second one exits at once; within a second they are one, of a scheduler and of torchrun."""

    def __init__(self, group):
        self.group = group
        self.number = 0
        self.since = 0.0
        self.parent = os.getppid()
        for number in STOPS:
            under_nohup = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                signal.signal(number, self.handle)

    def handle(self, number, _frame):
        if self.number and time.monotonic() - self.since > 1:
            os._exit(128 + number)
        if not self.number:
            self.number = number
            self.since = time.monotonic()
            name = signal.Signals(number).name
            with suppress(OSError):  # the terminal or the tee behind it has ended, too
                os.write(2, f"{name}: saving, then leaving; once more exits at once\n".encode())

    def agreed(self):
        """The signal that any rank has received, 0 = none: the same answer on every rank.

        A rank whose torchrun is gone ends as if it had been asked to: nobody else will end it."""
        if os.getppid() != self.parent and dist.is_torchelastic_launched():
            self.number = self.number or signal.SIGTERM
        if self.group is None:
            return self.number
        flag = torch.tensor(self.number)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return int(flag)


# -------------------------------------------------------------------------------------- bad steps
class Judged(NamedTuple):
    """A step whose verdict still lies on the device."""

    step: int
    bad: torch.Tensor  # () 0 or 1, the same on every rank
    norm: torch.Tensor  # ()
    finite: torch.Tensor  # (micro-steps,) of this rank's losses
    ids: list  # of each micro-step: its clips


@dataclass
class BadSteps:
    """Skips steps with a non-finite loss or gradient, or a gradient spike, on all ranks alike.

    The verdict stays on the device: AdamW takes it as `found_inf` (as gradient scalers give it) and
    then leaves weights and moments as they are, so no step waits.  `report` reads it later."""

    group: object
    options: SimpleNamespace  # spike_guard, max_bad_steps
    mean: torch.Tensor  # () on the device, of the norms of good steps, running; 0 = none yet
    pending: list = field(default_factory=list)
    row: int = 0  # bad steps since the last good one
    count: int = 0

    def judge(self, step, norm, losses, *, ids):
        """Whether a step is bad, a tensor () of 0 or 1 on the device.

        norm () of the averaged gradient; losses, ids: of each micro-step of this rank"""
        finite = torch.stack(losses).isfinite()
        norm = norm.detach().float()
        bad = (~(finite.all() & norm.isfinite())).float()
        if spike := self.options.spike_guard:
            bad = bad.maximum(((self.mean > 0) & (norm > spike * self.mean)).float())
        if self.group is not None:
            dist.all_reduce(bad, dist.ReduceOp.MAX, self.group)
        good_mean = torch.where(self.mean > 0, torch.lerp(self.mean, norm, 0.05), norm)
        self.mean = torch.where(bad > 0, self.mean, good_mean)
        self.pending.append(Judged(step, bad, norm, finite, ids))
        return bad

    def report(self, log):
        """Log the bad steps since the last call with the clips behind them; SystemExit after
        max_bad_steps in a row.  To be called on all ranks."""
        pending, self.pending = self.pending, []
        # The one wait for the device.
        verdicts = torch.stack([judged.bad for judged in pending]).tolist() if pending else []
        for judged, bad in zip(pending, verdicts):
            self.row = self.row + 1 if bad else 0
            if bad:
                self.count += 1
                found = f"({self.row} in a row, {self.count} in all): {self.cause(judged)}"
                log(f"# warning: step {judged.step + 1} skipped on all ranks {found}")
            if self.row == self.options.max_bad_steps:
                last = f"last at step {judged.step + 1}"
                raise SystemExit(
                    f"{self.row} bad steps in a row (max_bad_steps), {last}: the weights are "
                    "those of the last good step and the saved checkpoints are untouched. Fix: look"
                    " at the clips named in training.log, lower --learning_rate, or go back to an "
                    "older checkpoint with --resume=FILE --out_dir=ANOTHER"
                )

    def cause(self, judged):
        """What made a step bad, with the clips of all ranks."""
        mine = [ids for ids, good in zip(judged.ids, judged.finite.tolist()) if not good]
        if culprits := sum(sum(gathered(mine), []), []):
            return f"loss not finite on clips {culprits}"
        clips = sum(sum(gathered(judged.ids), []), [])
        mean = float(self.mean)
        return f"gradient norm {float(judged.norm):.4g}, running mean {mean:.4g}, clips {clips}"


# --------------------------------------------------------------------------------------- warnings
@dataclass
class Watch:
    """Warnings about a run's course, each kind once a start; update() takes a line's scalars."""

    max_steps: int
    log: object
    said: set = field(default_factory=set)
    seen: list = field(default_factory=list)  # (step, scalars) of every line

    def update(self, step, scalars):
        self.seen.append((step, scalars))
        for kind, text in (*self.diffusion(step), *self.late(), *self.memory()):
            if kind not in self.said:
                self.said.add(kind)
                self.log(f"# warning: {text}")

    def values(self, key, after=0):
        """Finite values of a scalar so far, of steps beyond one."""
        found = [scalars.get(key, math.nan) for step, scalars in self.seen if step > after]
        return list(filter(math.isfinite, found))

    def diffusion(self, step):
        values = self.values("loss/diffusion")
        if (quarter := len(values) // 4) < 10:
            return
        first, last = (statistics.fmean(x) for x in (values[:quarter], values[-quarter:]))
        spread = statistics.pstdev(values[-quarter:])
        lines = f"over the last {quarter} log lines"
        if step > 0.4 * self.max_steps and last > 0.98 * first:
            cure = "lower --learning_rate (5e-6 is the guide's fallback)"
            found = f"{last:.4g} {lines}, {first:.4g} over the first"
            yield "falling", f"loss/diffusion is not falling: {found}; {cure}"
        if spread > 0.5 * last:
            cure = "raise the global batch (--grad_accum) or lower --learning_rate"
            found = f"{last:.4g} +- {spread:.4g} {lines}"
            yield "oscillating", f"loss/diffusion oscillates: {found}; {cure}"

    def late(self):
        for key, limit in LATE_LIMITS.items():
            values = self.values(key, after=0.8 * self.max_steps)
            if len(values) >= 5 and statistics.fmean(values) > limit:
                found = f"{statistics.fmean(values):.4g} late in the run; expected below {limit}"
                cure = "check the data (python data.py verify), or train longer"
                yield key, f"{key} is {found}: {cure}"

    def memory(self):
        values = self.values("gpu_memory")
        rises = sum(b > a for a, b in zip(values[-11:], values[-10:]))
        if len(values) > 30 and values[-1] > 1.2 * values[10] and rises >= 8:
            found = f"{values[10]:.2f} GB at log line 10, {values[-1]:.2f} GB now"
            yield "memory", f"memory keeps growing: {found}; something holds tensors of past steps"
