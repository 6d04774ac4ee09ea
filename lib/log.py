"""What a run writes down: training.log, tensorboard/, config.json (last start), starts.jsonl (all).

training.log lines are `step N/M | key value | ... | S s/step | H:MM:SS left`, `# val step N NAME |
key value | ...` or `# free text`.  After a crash the steps since the last checkpoint appear again;
the later line holds.  On a full disk lines are lost, not the run."""

import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from lib.distributed import say
from lib.files import is_of_disk
from lib.pictures import write_png

PACKAGES = ("torch", "safetensors", "numpy", "einops", "tokenizers", "tensorboard")


def provenance(options):
    """Git hash, command, package versions and options, as strings of a checkpoint's metadata."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    ask = ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"]
    git = ""
    with suppress(OSError):  # not installed
        git = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    told = dict(git=git or "unknown", command=" ".join(sys.argv))
    return told | dict(versions=json.dumps(versions), train_config=json.dumps(options))


def changed_options(before, now):
    """["key old -> new"] of the options that differ from the run that wrote a checkpoint."""
    now = json.loads(json.dumps(now))  # tuples become lists, as in the file
    keys = [k for k in {**before, **now} if k not in ("resume", "init_from")]
    pairs = [(k, before.get(k, "(none)"), now.get(k, "(none)")) for k in keys]
    return [f"{k} {old} -> {new}" for k, old, new in pairs if old != new]


def by_sigma(sigma, value):
    """Sums of per-clip values in four bins of the noise level, and counts: (4, 2) on the device."""
    values = torch.stack([value.detach().float(), torch.ones_like(sigma)], 1)
    bins = (4 * sigma).long().clamp(max=3)
    return torch.zeros(4, 2, device=sigma.device).index_add(0, bins, values)


@dataclass
class Tally:
    """Sums that stay on the device until the next line of the log: .item() would stall a step."""

    parts: dict = field(default_factory=dict)  # of the last step, mean over micro-steps
    bins: dict = field(default_factory=dict)  # by_sigma since the last line
    steps: int = 0  # since the last line
    since: float = field(default_factory=time.perf_counter)

    def add(self, parts, bins, count):
        """One micro-step of `count` in a step."""
        for key, value in bins.items():
            self.bins[key] = self.bins.get(key, 0) + value
        for key, value in parts.items():
            self.parts[key] = self.parts.get(key, 0) + value / count

    def scalars(self, group):
        """Means over the ranks: "loss/NAME", and "sigma/NAME 0.25-0.50" by noise level."""
        values = torch.stack([torch.as_tensor(v).float() for v in self.parts.values()])
        if group is not None:
            dist.all_reduce(values, group=group)
            values /= dist.get_world_size()
        scalars = {f"loss/{key}": value for key, value in zip(self.parts, values.tolist())}
        for key, value in self.bins.items():
            if group is not None:
                dist.all_reduce(value, group=group)
            for k, (total, n) in enumerate(value.tolist()):
                if n:
                    scalars[f"sigma/{key} {k / 4:.2f}-{(k + 1) / 4:.2f}"] = total / n
        return scalars


def memory_gb(device):
    """The most that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def order_events(folder):
    """TensorBoard reads files in the order of their names, which tell a clock.  Where that was set
    back, or is another machine's, the earlier files get numbers in front, to stay the earlier."""
    files = sorted(folder.glob("*tfevents*"))
    if files and files[-1].name > f"events.out.tfevents.{time.time() + 1:010.0f}":
        for n, path in enumerate(files):
            path.rename(folder / f"{n:06d}.events{path.name.partition('events')[2]}")


class Records:
    """out: the run folder, or None on the ranks that write nothing."""

    def __init__(self, out, metadata, first_step):
        self.out, self.board = out, None
        self.first, self.purge = first_step, first_step + 1
        if out:
            import torch.utils.tensorboard  # noqa: F401  (a missing one is named now, not later)

            # A full disk ends TensorBoard's thread with a traceback; its writer says it here, too.
            usual = threading.excepthook
            threading.excepthook = lambda told: isinstance(told.exc_value, OSError) or usual(told)
            (out / "eval").mkdir(parents=True, exist_ok=True)
            start = dict(metadata, first_step=first_step, time=time.strftime("%Y-%m-%d %H:%M:%S"))
            text = json.dumps(start, indent=2)
            self.attempt("config.json", (out / "config.json").write_text, text)
            self.append("starts.jsonl", json.dumps(start))
        self.since = time.perf_counter()  # of the steps, not of that import

    def attempt(self, name, write, *args):
        """write(*args) -> whether the disk took it."""
        try:
            write(*args)
        except OSError as error:
            found = f"{self.out / name}: {error.strerror or error}"
            say(f"warning: {found}; this entry is lost, training goes on")
            return False
        return True

    def append(self, name, line):
        def write():
            with open(self.out / name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")

        self.attempt(name, write)

    def line(self, text):
        if self.out:
            say(text)
            self.append("training.log", text)

    def clock(self, share=1.0):
        """H:MM:SS since this start, or a share of that."""
        minutes, seconds = divmod(int(share * (time.perf_counter() - self.since)), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

    def step(self, step, scalars, last, spent):
        """A line of training.log, to which the run's last step and the seconds of one belong; one
        of the losses by noise level; TensorBoard."""
        shown = [f"{k} {v:.4g}" for k, v in scalars.items() if not k.startswith("sigma/")]
        levels = [f"{k[6:]} {v:.4g}" for k, v in scalars.items() if k.startswith("sigma/")]
        # As if the rest took as long a step, evaluations and all.
        left = self.clock((last - step) / (step - self.first))
        tail = [f"{spent:.3f} s/step", f"{left} left"]
        self.line(" | ".join([f"step {step}/{last}", *shown, *tail]))
        self.line(f"# sigma step {step} | " + " | ".join(levels))
        self.scalars(step, scalars)

    def rows(self, step, rows):
        """The rows of an evaluation, a line each, and TensorBoard."""
        for name, row in rows.items():
            values = " | ".join(f"{k} {v:.4g}" for k, v in row.items())
            self.line(f"# val step {step} {name} | {values}")
            self.scalars(step, {f"val {name}/{key}": value for key, value in row.items()})

    def picture(self, step, image):
        """uint8 (H, W, 3) -> eval/step-N.png and TensorBoard."""
        if self.out:
            name = f"eval/step-{step}.png"
            self.attempt(name, write_png, self.out / name, image)
        self.to_board(lambda board: board.add_image("val", image, step, dataformats="HWC"), step)

    def scalars(self, step, values):
        """TensorBoard."""

        def add(board):
            for key, value in values.items():
                board.add_scalar(key, value, step)

        self.to_board(add, step)

    def to_board(self, add, step):
        """add(board); its purge_step makes TensorBoard forget what is repeated after a kill."""

        def write():
            if self.board is None:
                from torch.utils.tensorboard import SummaryWriter

                order_events(self.out / "tensorboard")
                self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.purge)
            add(self.board)

        if self.out and not self.attempt("tensorboard", write):
            self.board = None  # its writer thread has died: a new file next time
            self.purge = step + 1

    def flush(self):
        """TensorBoard writes in a thread: with every checkpoint, or a kill after it would leave a
        gap in the curves, and at the end."""
        if self.board:
            self.attempt("tensorboard", self.board.flush)


class Passes:
    """Work over many clips; a clip that fails is reported once and left out from there on."""

    def __init__(self, quiet):
        self.quiet, self.failed = quiet, []

    def fail(self, name, problem):
        self.failed.append(name)
        say(f"skipped {name}: {problem}", of_all=True)

    def each(self, items, what, work):
        """work(item) -> those that did not fail; items are samples, or have one."""
        done = []
        for item in tqdm(items, desc=f"encode: {what}", unit="clip", disable=self.quiet):
            name = getattr(item, "sample", item)["id"]
            try:
                if name not in self.failed:
                    work(item)
                    done.append(item)  # a later pass sees only these
            except (ValueError, OSError) as error:
                if is_of_disk(error):
                    raise
                self.fail(name, error)
        return done
