"""Does the exchange between the branches help?  Ablations on the miniature's video branch:

    python tiny/ablate.py [--seeds 0 1 2] [--only full none] [--jobs 2] [--work data/ablations]

Every variant trains stage 1 (shared by those that do not change it) and stage 2 with equal steps,
data and seeds on the frozen tiny/wan, then samples held-out rooms and scores them against the true
renderings.  A run's row goes to docs/ablations.json as soon as it is there; the same command goes
on where it stopped; --table prints means and spread; docs/ablations.png is drawn last.  Hours."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import encode  # noqa: E402
from encoders import MINIATURE  # noqa: E402
from lib import pictures  # noqa: E402
from lib.files import read_stills  # noqa: E402
from lib.guards import run_command  # noqa: E402
from lib.rooms import Recipe, synth  # noqa: E402
from lib.windows import Encoding  # noqa: E402

ROWS = ROOT / "docs/ablations.json"
STEPS, BATCH, ROOMS = {1: 500, 2: 400}, 4, 8  # rooms: held-out ones that are scored
# Fields of model.Config that differ from the preset "tiny".
VARIANTS = {
    "full": {},
    "none": {"exchange": "none"},
    "to_geometry": {"exchange": "to_geometry"},
    "to_video": {"exchange": "to_video"},
    "no_adapters": {"camera_adapters": False},
    "no_pose_tokens": {"pose_tokens": False},
    # one seed each
    "constant_rays": {"constant_rays": True},
    "pcb_2": {"num_pcb": 2, "taps": (0, 2, 3, 5)},
    "pcb_6": {"num_pcb": 6, "taps": (0, 0, 1, 1)},
    # The frozen branch sees no rays, as the base of the release: who tells it the camera?
    "hidden_rays": {"video_rays": False},
    "hidden_no_adapters": {"video_rays": False, "camera_adapters": False},
    "hidden_none": {"video_rays": False, "exchange": "none"},
    "hidden_neither": {"video_rays": False, "camera_adapters": False, "exchange": "none"},
}
THREE_SEEDS = tuple(VARIANTS)[:6]
# What stage 1 does not have yet, so that variants share it.
LATE = {"exchange", "camera_adapters"}
# glibc gives small blocks back at every step otherwise: a third of the time.
QUICK = dict(OMP_NUM_THREADS="1", MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="4000000000")
# Columns of the table: the row and number of an evaluation.
HEAD = {
    "PSNR": ("sampled", "psnr"),
    "warp": ("sampled", "warp_psnr"),
    "revisit": ("sampled", "revisit"),
    "al. deg": ("sampled", "align_rot"),
    "AbsRel": ("sampled", "abs_rel"),
    "points": ("sampled", "points"),
    "head, deg": ("sampled", "rot_deg"),
    "true: AbsRel": ("poses given", "abs_rel"),
    "no poses: AbsRel": ("no poses", "abs_rel"),
    "no poses: deg": ("no poses", "rot_deg"),
}


def switches_of(name, stage):
    own = VARIANTS[name]
    return own if stage == 2 else {k: v for k, v in own.items() if k not in LATE}


@dataclass(frozen=True)
class Run:
    """One training of a variant and a seed."""

    work: Path
    name: str
    seed: int

    def folder(self, stage):
        """That of the first variant which is the same up to this stage."""
        own = switches_of(self.name, stage)
        first = next(name for name in VARIANTS if switches_of(name, stage) == own)
        return self.work / f"stage{stage}-{first}-seed{self.seed}"

    def train(self, stage):
        if not (self.folder(stage) / f"step-{STEPS[stage]}.safetensors").exists():
            start = self.folder(1) / "latest.safetensors" if stage == 2 else ""
            self.call(self.folder(stage), stage, seed=100 * stage + self.seed, init_from=start)

    def score(self):
        """Train stage 2 -> what docs/ablations.json keeps of it."""
        self.train(2)
        out, source = self.folder(2) / "scored", self.folder(2) / "latest.safetensors"
        how = dict(eval_only=True, eval_samples=ROOMS, eval_clips=ROOMS, eval_more_sigmas="()")
        self.call(out, 2, init_from=source, data_dir=self.work / "val", **how)
        found = json.loads((out / "eval.json").read_text())
        told = dict(variant=self.name, seed=self.seed, steps=STEPS, batch=BATCH, rooms=ROOMS)
        return told | dict(rows={k.split(", ", 1)[-1]: row for k, row in found.items()})

    def call(self, out, stage, **options):
        """Run train.py into a folder, with its words in a file beside it."""
        usual = dict(data_dir=self.work / "rooms", max_steps=STEPS[stage], batch_size=BATCH)
        usual |= dict(precision="bf16", save_every=100, keep_last=1, out_dir=out)
        options = usual | dict(model_overrides=switches_of(self.name, stage)) | options
        command = [sys.executable, "train.py", f"config/tiny{stage}.py"]
        command += [f"--{key}={value}" for key, value in options.items()]
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "command.log", "a") as log:
            env = os.environ | QUICK
            subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=log, stderr=log)


def read_rows():
    """Rows of finished runs: those are not begun again."""
    return json.loads(ROWS.read_text()) if ROWS.exists() else []


def render(work):
    """Training rooms as caches, held-out rooms with their videos."""
    size = dict(num_frames=9, height=96, width=160)
    how = dict(size, variety="simple")
    synth(work / "rooms", Recipe(600, seed=120_000_000, cache_only=True, **how))
    synth(work / "val", Recipe(16, val=32, seed=130_000_000, **how))
    encode(work / "val", **size, how=Encoding(wan_dir=MINIATURE))


def draw(work, names, seed, file):
    """A picture of the first held-out room as it is and as these variants sample it."""
    rows = {}
    for row, kind in enumerate(("video", "depth")):
        for name in names:
            scored = Run(work, name, seed).folder(2) / "scored"
            if (found := scored / f"eval-stage2-step{STEPS[2]}.png").exists():
                sheet = next(read_stills([found]))
                rows.setdefault(f"true {kind}", cut(sheet, 2 * row))
                rows[f"{kind}, {name}"] = cut(sheet, 2 * row + 1)
    if rows:
        pictures.write_png(file, pictures.sheet(list(rows.values()), list(rows)))


def cut(sheet, row, height=192, width=320, gap=4):
    """Three of the five pictures in a row of lib.pictures.sheet, at the size that they had."""
    top = gap + row * (height + 16 + gap) + 16
    lefts = [gap + n * (width + gap) for n in (0, 2, 4)]
    return [sheet[top : top + height : 2, left : left + width : 2] for left in lefts]


def table(rows):
    """Markdown: mean and spread of the headline numbers, then each seed's difference to full."""
    values = {name: {} for name in VARIANTS}  # variant -> seed -> numbers
    for row in rows:
        numbers = [row["rows"][part][key] for part, key in HEAD.values()]
        values[row["variant"]][row["seed"]] = numbers
    print(f"| variant | seeds | {' | '.join(HEAD)} |\n|---|---|{'---|' * len(HEAD)}")
    for name, own in values.items():
        print_row(name, list(own.values()))
    full = values.pop("full")
    for name, own in values.items():
        shared = [zip(own[seed], full[seed]) for seed in own if seed in full]
        print_row(f"{name} - full", [[a - b for a, b in pairs] for pairs in shared], "+")


def print_row(name, rows, sign=""):
    """Mean +- standard deviation of each column."""
    cells = []
    for x in zip(*rows):
        more = f" ± {statistics.stdev(x):.3f}" if len(x) > 1 else ""
        cells.append(f"{statistics.mean(x):{sign}.3f}{more}")
    if rows:
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    how = dict(choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--only", nargs="+", **how)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    parser.add_argument("--work", type=Path, default=ROOT / "data/ablations")
    parser.add_argument("--table", action="store_true", help="of docs/ablations.json, and stop")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="only the last seed's picture")
    how = parser.parse_args()
    if how.table:
        return table(read_rows())
    work = how.work.resolve()
    if how.draw:
        return draw(work, how.only, how.seeds[-1], how.draw)
    render(work)
    done = {(row["variant"], row["seed"]) for row in read_rows()}
    pairs = ((name, seed) for seed in how.seeds for name in how.only)
    wanted = [x for x in pairs if x not in done and (x[0] in THREE_SEEDS or x[1] == 0)]
    runs = [Run(work, *pair) for pair in wanted]
    with ThreadPoolExecutor(how.jobs) as pool:
        first = {run.folder(1): run for run in runs}.values()  # each stage 1 once
        tasks = [pool.submit(run.train, 1) for run in first]
        wait(tasks)
        tasks += [pool.submit(run.score) for run in runs]
        for task in as_completed(tasks):  # one that fails costs no row of the others
            row = None if task.exception() else task.result()
            if row:
                ROWS.write_text(json.dumps([*read_rows(), row], indent=0))
                print("scored", row["variant"], "seed", row["seed"], flush=True)
    for task in tasks:
        task.result()  # the first error
    draw(work, how.only, how.seeds[-1], ROOT / "docs/ablations.png")


if __name__ == "__main__":
    run_command("tiny/ablate.py", main)
