"""What a run writes down: training.log, tensorboard/, config.json (last start), starts.jsonl (every start), warnings.

training.log lines are `step N/M | key value | ... | S s/step | H:MM:SS left`, `# val step N NAME | key value | ...` or
`# free text`.  After a crash the steps since the last checkpoint appear again; the later line holds.  On a full disk
lines are lost, not the run."""

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from lib.pictures import write_png

PACKAGES = ("torch", "safetensors", "numpy", "einops", "tokenizers", "tensorboard")


def git_hash():
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return result.stdout.strip() or "unknown"


def provenance(options):
    """Git hash, command, package versions and options, as the strings of a checkpoint's metadata."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return dict(
        git=git_hash(),
        command=" ".join(sys.argv),
        versions=json.dumps(versions),
        train_config=json.dumps(options),
    )


def changed_options(before, now):
    """ "key old -> new" for every option that differs from the run that wrote a checkpoint."""
    now = json.loads(json.dumps(now))  # tuples become lists, as in the file
    keys = [k for k in {**before, **now} if k not in ("resume", "init_from")]
    return [
        f"{k} {before.get(k, '(none)')} -> {now.get(k, '(none)')}"
        for k in keys
        if before.get(k) != now.get(k)
    ]


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
            self.attempt(
                "config.json", lambda: (out / "config.json").write_text(json.dumps(start, indent=2))
            )
            self.append("starts.jsonl", json.dumps(start))

    def attempt(self, name, write):
        try:
            write()
        except OSError as error:
            print(
                f"warning: {self.out / name}: {error.strerror or error}; this entry is lost, training goes on",
                flush=True,
            )
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
        self.to_board(
            step,
            lambda board: [board.add_scalar(key, value, step) for key, value in values.items()],
        )

    def picture(self, step, image):
        """uint8 (H, W, 3) -> eval/step-N.png and TensorBoard."""
        if self.out:
            self.attempt(
                f"eval/step-{step}.png",
                lambda: write_png(self.out / "eval" / f"step-{step}.png", image),
            )
            self.to_board(
                step, lambda board: board.add_image("val", image, step, dataformats="HWC")
            )

    def to_board(self, step, add):
        """purge_step makes TensorBoard forget what a killed run wrote after the checkpoint that we resume."""

        def write():
            if self.board is None:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.purge)
            add(self.board)

        if self.out and not self.attempt("tensorboard", write):
            self.board, self.purge = (
                None,
                step + 1,
            )  # its writer thread has died: a new file next time

    def flush(self):
        """With every checkpoint, or a kill after it would leave a gap in the curves."""
        if self.board:
            self.attempt("tensorboard", self.board.flush)

    def close(self):
        if self.board:
            self.attempt("tensorboard", self.board.close)
