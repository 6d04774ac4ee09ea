"""What keeps a run in order: stop signals that all ranks agree on, bad steps that are skipped,
warnings about its course, and user errors in one line."""

import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from lib.distributed import gathered

# The guide's figures: a mean loss above them in the last fifth of a run earns a warning.
LATE_LIMITS = dict(depth=0.2, point=0.5, camera=0.1)


def run_command(program, command, advice=""):
    """command(), whose user errors become one line on stderr and exit status 2.

    advice   what to do when memory runs out"""
    try:
        command()
    except torch.cuda.OutOfMemoryError as error:
        said = f"{str(error).splitlines()[0]} {advice}"
    except (ValueError, OSError, SafetensorError) as error:
        said = str(error)
    else:
        return
    line = " ".join("".join(c if c.isprintable() else " " for c in said).split())
    print(f"{program}: {line}", file=sys.stderr)
    sys.exit(2)


class Watch:
    """Warnings about a run's course, each kind once a start; update() takes a log line's
    scalars."""

    def __init__(self, max_steps, log):
        self.max_steps, self.log = max_steps, log
        self.said, self.seen = set(), []

    def say(self, kind, text):
        if kind not in self.said:
            self.said.add(kind)
            self.log(f"# warning: {text}")

    def update(self, step, scalars):
        self.seen.append((step, scalars))
        diffusion = [
            s["loss/diffusion"]
            for _, s in self.seen
            if math.isfinite(s.get("loss/diffusion", math.nan))
        ]
        quarter = len(diffusion) // 4
        if quarter >= 10:
            first, last = (sum(x) / quarter for x in (diffusion[:quarter], diffusion[-quarter:]))
            spread = math.sqrt(sum((x - last) ** 2 for x in diffusion[-quarter:]) / quarter)
            if step > 0.4 * self.max_steps and last > 0.98 * first:
                self.say(
                    "falling",
                    f"loss/diffusion is not falling: {last:.4g} over the last {quarter} log lines, "
                    f"{first:.4g} over the first; lower --learning_rate (5e-6 is the guide's "
                    "fallback)",
                )
            if spread > 0.5 * last:
                self.say(
                    "oscillating",
                    f"loss/diffusion oscillates: {last:.4g} +- {spread:.4g} over {quarter} log "
                    "lines; "
                    f"raise the global batch (--grad_accum) or lower --learning_rate",
                )
        late = [s for n, s in self.seen if n > 0.8 * self.max_steps]
        for name, limit in LATE_LIMITS.items() if len(late) >= 5 else ():
            values = [s[f"loss/{name}"] for s in late if f"loss/{name}" in s]
            if values and sum(values) / len(values) > limit:
                self.say(
                    name,
                    f"loss/{name} is {sum(values) / len(values):.4g} late in the run; expected "
                    f"below {limit}: "
                    f"check the data (python data.py verify), or train longer",
                )
        memory = [s["gpu_memory"] for _, s in self.seen]
        if len(memory) > 30 and memory[-1] > 1.2 * memory[10]:
            rises = sum(b > a for a, b in zip(memory[-11:], memory[-10:]))
            if rises >= 8:
                self.say(
                    "memory",
                    f"memory keeps growing: {memory[10]:.2f} GB at log line 10, {memory[-1]:.2f} "
                    "GB now; "
                    f"something holds on to tensors of past steps",
                )


def ignore_signals(_worker):
    """For loader workers: a terminal or torchrun signals the whole process group, and the trainer
    still needs them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Stop:
    """SIGTERM and SIGINT as a flag that is read between micro-steps.

    A second signal exits at once; signals within one second are one (a scheduler and torchrun may
    both send it)."""

    def __init__(self, group):
        self.group, self.number, self.since = group, 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, _frame):
        if self.number and time.monotonic() - self.since > 1:
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()
            name = signal.Signals(number).name
            os.write(2, f"{name}: saving, then leaving; once more exits at once\n".encode())

    def agreed(self):
        """The signal that any rank has received, 0 = none: the same answer on every rank."""
        if self.group is None:
            return self.number
        flag = torch.tensor(self.number)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return int(flag)


class BadSteps:
    """Skips steps with a non-finite loss or gradient, or a gradient spike, on all ranks alike.

    The verdict stays on the device: AdamW takes it as `found_inf` (the input that gradient scalers
    use) and then leaves weights and moments as they are, so no step waits for the host.  `report`
    reads the verdicts later.

    spike     skip when the gradient norm exceeds this many times its running mean; 0 = off
    limit     so many bad steps in a row end the run
    mean      running mean of the norms of good steps, from a checkpoint; 0 = none yet"""

    def __init__(self, group, spike, limit, mean, device):
        self.group, self.spike, self.limit = group, spike, limit
        self.mean, self.pending, self.row, self.count = torch.tensor(mean, device=device), [], 0, 0

    def judge(self, optimizer, step, norm, losses, ids):
        """norm () of the averaged gradient; losses: () of each micro-step of this rank; ids: its
        clips, likewise."""
        finite, norm = torch.stack(losses).isfinite(), norm.detach().float()
        bad = (~(finite.all() & norm.isfinite())).float()
        if self.spike:
            bad = bad.maximum(((self.mean > 0) & (norm > self.spike * self.mean)).float())
        if self.group is not None:
            dist.all_reduce(bad, dist.ReduceOp.MAX, self.group)
        good_mean = torch.where(self.mean > 0, torch.lerp(self.mean, norm, 0.05), norm)
        self.mean = torch.where(bad > 0, self.mean, good_mean)
        getattr(
            optimizer, "optim", optimizer
        ).found_inf = bad  # a sharded optimizer steps its own part
        self.pending.append((step, bad, norm, finite, ids))

    def report(self, log):
        """Log the bad steps since the last call with the clips behind them; SystemExit after
        `limit` in a row."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        verdicts = torch.stack(
            [bad for _, bad, *_ in pending]
        ).tolist()  # the one wait for the device
        found = {}
        for (step, _, norm, finite, ids), bad in zip(pending, verdicts):
            if bad:
                culprits = [i for ok, names in zip(finite.tolist(), ids) if not ok for i in names]
                found[step] = (culprits, sum(ids, []), float(norm))
        everyone = gathered(found) if found else []
        for (step, *_), bad in zip(pending, verdicts):
            self.row = self.row + 1 if bad else 0
            if bad:
                self.count += 1
                culprits = sum((f[step][0] for f in everyone), [])
                cause = (
                    f"loss not finite on clips {culprits}"
                    if culprits
                    else (
                        f"gradient norm {found[step][2]:.4g}, running mean "
                        f"{float(self.mean):.4g}, clips "
                        f"{sum((f[step][1] for f in everyone), [])}"
                    )
                )
                log(
                    f"# warning: step {step + 1} skipped on all ranks ({self.row} in a row, "
                    f"{self.count} in all): {cause}"
                )
            if self.row == self.limit:
                raise SystemExit(
                    f"{self.limit} bad steps in a row (max_bad_steps), last at step {step + 1}: "
                    "the weights "
                    "are those of the last good step and the saved checkpoints are untouched. "
                    "Look at the "
                    "clips named in training.log, lower --learning_rate, or go back to an older "
                    "checkpoint "
                    f"with --resume=FILE --out_dir=ANOTHER"
                )
