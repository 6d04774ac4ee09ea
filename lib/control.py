"""What keeps a run alive: process groups with timeouts, stop signals that all ranks agree on, steps that are skipped."""
import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


def start_processes(device, step_timeout, wait_timeout):
    """Join the other ranks when torchrun started us.

    device         auto, cpu or cuda
    step_timeout   seconds that a rank waits for the others within a step; then it dies, and torchrun ends the rest
    wait_timeout   the same around loading, saving and evaluation: the default group
    returns        rank, world size, device, the group of the steps (None when alone)"""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
    if world == 1:
        return rank, world, torch.device(name), None
    wait = timedelta(seconds=wait_timeout)
    store, _, _ = next(rendezvous("env://", timeout=wait))
    # the agent's store outlives an attempt: without a prefix a restarted rank can read a dead one's address
    store = dist.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if name.startswith("cuda") else "gloo", store=store, rank=rank,
                            world_size=world, timeout=wait)
    return rank, world, torch.device(name), dist.new_group(timeout=timedelta(seconds=step_timeout))


def end_processes():
    """Wait for the other ranks and leave the groups."""
    dist.barrier()
    # Before torch 2.8 destroying holds the interpreter lock while it joins gloo's threads; one that is still freeing the
    # tensors of the last calls waits for that lock: without a pause two ranks hung after 1 to 41 such endings.
    time.sleep(0.2)
    dist.destroy_process_group()


def from_first(value):
    """The value of rank 0, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def gathered(value):
    """The value of every rank, in order of rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def ignore_signals(_worker):
    """For loader workers: a terminal or torchrun signals the whole process group, and the trainer still needs them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Stop:
    """SIGTERM and SIGINT as a flag that is read between micro-steps.

    A second signal exits at once; signals within one second are one (a scheduler and torchrun may both send it)."""

    def __init__(self, group):
        self.group, self.number, self.since = group, 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, _frame):
        if self.number and time.monotonic() - self.since > 1:
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()
            os.write(2, f"{signal.Signals(number).name}: saving, then leaving; once more exits at once\n".encode())

    def agreed(self):
        """The signal that any rank has received, 0 = none: the same answer on every rank."""
        if self.group is None:
            return self.number
        flag = torch.tensor(self.number)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return int(flag)


class BadSteps:
    """Skips steps with a non-finite loss or gradient, or a gradient spike, on all ranks alike.

    The verdict stays on the device: AdamW takes it as `found_inf` (the input that gradient scalers use) and then
    leaves weights and moments as they are, so no step waits for the host.  `report` reads the verdicts later.

    spike     skip when the gradient norm exceeds this many times its running mean; 0 = off
    limit     so many bad steps in a row end the run
    mean      running mean of the norms of good steps, from a checkpoint; 0 = none yet"""

    def __init__(self, group, spike, limit, mean, device):
        self.group, self.spike, self.limit = group, spike, limit
        self.mean, self.pending, self.row, self.count = torch.tensor(mean, device=device), [], 0, 0

    def judge(self, optimizer, step, norm, losses, ids):
        """norm () of the averaged gradient; losses: () of each micro-step of this rank; ids: its clips, likewise."""
        finite, norm = torch.stack(losses).isfinite(), norm.detach().float()
        bad = (~(finite.all() & norm.isfinite())).float()
        if self.spike:
            bad = bad.maximum(((self.mean > 0) & (norm > self.spike * self.mean)).float())
        if self.group is not None:
            dist.all_reduce(bad, dist.ReduceOp.MAX, self.group)
        good_mean = torch.where(self.mean > 0, torch.lerp(self.mean, norm, 0.05), norm)
        self.mean = torch.where(bad > 0, self.mean, good_mean)
        getattr(optimizer, "optim", optimizer).found_inf = bad        # a sharded optimizer steps its own part
        self.pending.append((step, bad, norm, finite, ids))

    def report(self, log):
        """Log the bad steps since the last call with the clips behind them; SystemExit after `limit` in a row."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        verdicts = torch.stack([bad for _, bad, *_ in pending]).tolist()          # the one wait for the device
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
                cause = f"loss not finite on clips {culprits}" if culprits else (
                    f"gradient norm {found[step][2]:.4g}, running mean {float(self.mean):.4g}, clips "
                    f"{sum((f[step][1] for f in everyone), [])}")
                log(f"# warning: step {step + 1} skipped on all ranks ({self.row} in a row, {self.count} in all): {cause}")
            if self.row == self.limit:
                raise SystemExit(f"{self.limit} bad steps in a row (max_bad_steps), last at step {step + 1}: the weights "
                                 f"are those of the last good step and the saved checkpoints are untouched. Look at the "
                                 f"clips named in training.log, lower --learning_rate, or go back to an older checkpoint "
                                 f"with --resume=FILE --out_dir=ANOTHER")
