"""What a run writes down: training.log, tensorboard/, config.json (last start), starts.jsonl (every start), warnings.

training.log lines are `step N/M | key value | ... | S s/step | H:MM:SS left`, `# val step N NAME | key value | ...` or
`# free text`.  After a crash the steps since the last checkpoint appear again; the later line holds.  On a full disk
lines are lost, not the run."""
import importlib.metadata
import json
import math
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from data import write_png

PACKAGES = ("torch", "safetensors", "numpy", "einops", "tokenizers", "tensorboard")


def git_hash():
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent)
    return result.stdout.strip() or "unknown"


def provenance(options):
    """Git hash, command, package versions and options, as the strings of a checkpoint's metadata."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return dict(git=git_hash(), command=" ".join(sys.argv), versions=json.dumps(versions),
                train_config=json.dumps(options))


def changed_options(before, now):
    """"key old -> new" for every option that differs from the run that wrote a checkpoint."""
    now = json.loads(json.dumps(now))                           # tuples become lists, as in the file
    keys = [k for k in {**before, **now} if k not in ("resume", "init_from")]
    return [f"{k} {before.get(k, '(none)')} -> {now.get(k, '(none)')}" for k in keys if before.get(k) != now.get(k)]


def read_log(path):
    """training.log -> [{"step": N, key: value, ...}], one entry a step, the last line of a step holds."""
    steps = {}
    for line in Path(path).read_text().splitlines():
        if m := re.match(r"step (\d+)/\d+ \| ", line):
            fields = (field.rsplit(" ", 1) for field in line.split(" | ")[1:-2])
            steps[int(m[1])] = {"step": int(m[1]), **{key: float(value) for key, value in fields}}
    return [steps[n] for n in sorted(steps)]


class Records:
    """out: the run folder, or None on the ranks that write nothing."""

    def __init__(self, out, metadata, first_step):
        self.out, self.board, self.purge = out, None, first_step + 1
        if out:
            (out / "eval").mkdir(parents=True, exist_ok=True)
            start = dict(metadata, first_step=first_step, time=time.strftime("%Y-%m-%d %H:%M:%S"))
            self.attempt("config.json", lambda: (out / "config.json").write_text(json.dumps(start, indent=2)))
            self.append("starts.jsonl", json.dumps(start))

    def attempt(self, name, write):
        try:
            write()
        except OSError as error:
            print(f"warning: {self.out / name}: {error.strerror or error}; this entry is lost, training goes on", flush=True)
            return False
        return True

    def append(self, name, line):
        def write():
            with open(self.out / name, "a") as file:
                file.write(line + "\n")
        self.attempt(name, write)

    def line(self, text):
        if self.out:
            print(text, flush=True)
            self.append("training.log", text)

    def scalars(self, step, values):
        """TensorBoard."""
        self.to_board(step, lambda board: [board.add_scalar(key, value, step) for key, value in values.items()])

    def picture(self, step, image):
        """uint8 (H, W, 3) -> eval/step-N.png and TensorBoard."""
        if self.out:
            self.attempt(f"eval/step-{step}.png", lambda: write_png(self.out / "eval" / f"step-{step}.png", image))
            self.to_board(step, lambda board: board.add_image("val", image, step, dataformats="HWC"))

    def to_board(self, step, add):
        """purge_step makes TensorBoard forget what a killed run wrote after the checkpoint that we resume."""
        def write():
            if self.board is None:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.purge)
            add(self.board)
        if self.out and not self.attempt("tensorboard", write):
            self.board, self.purge = None, step + 1             # its writer thread has died: a new file next time

    def flush(self):
        """With every checkpoint, or a kill after it would leave a gap in the curves."""
        if self.board:
            self.attempt("tensorboard", self.board.flush)

    def close(self):
        if self.board:
            self.attempt("tensorboard", self.board.close)


class Watch:
    """Warnings about a run's course, each kind once a start; update() takes the scalars of a log line.

    late_limits   {"depth": 0.2, ...}: bounds for loss/NAME over the last fifth of the run"""

    def __init__(self, max_steps, late_limits, log):
        self.max_steps, self.late_limits, self.log, self.said, self.seen = max_steps, late_limits, log, set(), []

    def say(self, kind, text):
        if kind not in self.said:
            self.said.add(kind)
            self.log(f"# warning: {text}")

    def update(self, step, scalars):
        self.seen.append((step, scalars))
        diffusion = [s["loss/diffusion"] for _, s in self.seen if math.isfinite(s.get("loss/diffusion", math.nan))]
        quarter = len(diffusion) // 4
        if quarter >= 10:
            first, last = (sum(x) / quarter for x in (diffusion[:quarter], diffusion[-quarter:]))
            spread = math.sqrt(sum((x - last) ** 2 for x in diffusion[-quarter:]) / quarter)
            if step > 0.4 * self.max_steps and last > 0.98 * first:
                self.say("falling", f"loss/diffusion is not falling: {last:.4g} over the last {quarter} log lines, "
                         f"{first:.4g} over the first; lower --learning_rate (5e-6 is the guide's fallback)")
            if spread > 0.5 * last:
                self.say("oscillating", f"loss/diffusion oscillates: {last:.4g} +- {spread:.4g} over {quarter} log lines; "
                         f"raise the global batch (--grad_accum) or lower --learning_rate")
        late = [s for n, s in self.seen if n > 0.8 * self.max_steps]
        for name, limit in self.late_limits.items() if len(late) >= 5 else ():
            values = [s[f"loss/{name}"] for s in late if f"loss/{name}" in s]
            if values and sum(values) / len(values) > limit:
                self.say(name, f"loss/{name} is {sum(values) / len(values):.4g} late in the run; expected below {limit}: "
                         f"check the data (python data.py verify), or train longer")
        memory = [s["gpu_memory"] for _, s in self.seen]
        if len(memory) > 30 and memory[-1] > 1.2 * memory[10]:
            rises = sum(b > a for a, b in zip(memory[-11:], memory[-10:]))
            if rises >= 8:
                self.say("memory", f"memory keeps growing: {memory[10]:.2f} GB at log line 10, {memory[-1]:.2f} GB now; "
                         f"something holds on to tensors of past steps")
