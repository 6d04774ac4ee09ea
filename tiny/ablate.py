"""Does the exchange between the branches help?  Ablations on the miniature's video branch:

    python tiny/ablate.py [--seeds 0,1,2] [--only full,none] [--jobs 2] [--work data/ablations]

Every variant trains stage 1 (shared by those that do not change it) and stage 2 with equal steps,
data and seeds on the frozen tiny/wan, then samples held-out rooms and scores them against the true
renderings.  A run's row goes to docs/ablations.json as soon as it is there; the same command goes
on where it stopped, and --table prints means and spread.  At the end docs/ablations.png is drawn.
Hours of two cores in all."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib import pictures  # noqa: E402
from lib.files import read_stills  # noqa: E402

ROWS = ROOT / "docs/ablations.json"
STEPS, BATCH = {1: 500, 2: 400}, 4
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
lock = Lock()


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
        out = self.folder(stage)
        if not (out / f"step-{STEPS[stage]}.safetensors").exists():
            seed = 100 * stage + self.seed
            call(
                out, stage, switches_of(self.name, stage), seed=seed, init_from=self.start_of(stage)
            )

    def start_of(self, stage):
        return self.folder(1) / "latest.safetensors" if stage == 2 else ""

    def evaluate(self, rooms):
        """Append the row of a finished run."""
        out, source = self.folder(2) / "scored", self.folder(2) / "latest.safetensors"
        how = dict(eval_only=True, eval_samples=rooms, eval_clips=rooms, eval_more_sigmas="()")
        call(out, 2, switches_of(self.name, 2), init_from=source, data_dir=self.work / "val", **how)
        found = json.loads((out / "eval.json").read_text())
        rows = {k.split(", ", 1)[-1]: row for k, row in found.items()}
        with lock:
            told = dict(variant=self.name, seed=self.seed, steps=STEPS, batch=BATCH, rooms=rooms)
            told["rows"] = rows
            ROWS.write_text(json.dumps([*read_rows(), told], indent=0))
        print("scored", self.name, "seed", self.seed, flush=True)


def read_rows():
    """Rows of finished runs: those are not begun again."""
    return json.loads(ROWS.read_text()) if ROWS.exists() else []


def call(out, stage, switches, **options):
    """Run train.py into a folder, with its words in a file beside it."""
    command = [sys.executable, "train.py", f"config/tiny{stage}.py", f"--out_dir={out}"]
    options = dict(data_dir=out.parent / "rooms", max_steps=STEPS[stage]) | options
    usual = dict(batch_size=BATCH, precision="bf16", save_every=100, keep_last=1)
    for key, value in (usual | dict(model_overrides=switches) | options).items():
        command.append(f"--{key}={value}")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "command.log", "a") as log:
        env = os.environ | QUICK
        subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=log, stderr=log)


def render(work):
    """Training rooms as caches, held-out rooms with their videos."""
    size = ["--height", "96", "--width", "160", "--num_frames", "9"]
    for folder, num, val, seed, more in (
        ("rooms", 600, 0, 120_000_000, ["--cache_only", "True"]),
        ("val", 16, 32, 130_000_000, []),
    ):
        counts = ["--num", str(num), "--val", str(val), "--seed", str(seed), "--variety", "simple"]
        command = ["data.py", "synth", str(work / folder), *size, *counts, *more]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    command = ["data.py", "encode", str(work / "val"), *size, "--wan_dir", "tiny/wan"]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


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
    values = {
        (row["variant"], row["seed"]): {
            k: row["rows"][part][key] for k, (part, key) in HEAD.items()
        }
        for row in rows
    }
    print(f"| variant | seeds | {' | '.join(HEAD)} |\n|---|---|{'---|' * len(HEAD)}")
    for less in (False, True):
        for name in VARIANTS:
            beside = {s for n, s in values if n == "full" or not less}
            seeds = sorted(s for n, s in values if n == name and s in beside)
            own = [values[name, seed] for seed in seeds]
            if less:
                name, full = f"{name} - full", [values["full", seed] for seed in seeds]
                own = [{k: x[k] - y[k] for k in HEAD} for x, y in zip(own, full)]
            if own and not (less and name.startswith("full")):
                cells = [spread([x[k] for x in own], less) for k in HEAD]
                print(f"| {name} | {len(own)} | {' | '.join(cells)} |")


def spread(x, signed):
    """Mean +- standard deviation."""
    sign = "+" if signed else ""
    said = f"{statistics.mean(x):{sign}.3f}"
    return f"{said} ± {statistics.stdev(x):.3f}" if len(x) > 1 else said


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, with commas")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    parser.add_argument("--rooms", type=int, default=8, help="held-out rooms that are scored")
    parser.add_argument("--work", type=Path, default=ROOT / "data/ablations")
    parser.add_argument("--train_only", action="store_true")
    parser.add_argument("--table", action="store_true", help="of docs/ablations.json, and stop")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="only the last seed's picture")
    how = parser.parse_args()
    if how.table:
        return table(read_rows())
    work, names, last = how.work.resolve(), how.only.split(","), int(how.seeds.split(",")[-1])
    if how.draw:
        return draw(work, names, last, how.draw)
    render(work)
    done = {(row["variant"], row["seed"]) for row in read_rows()}
    runs = [
        Run(work, name, seed)
        for seed in map(int, how.seeds.split(","))
        for name in names
        if (name in THREE_SEEDS or seed == 0) and (name, seed) not in done
    ]
    with ThreadPoolExecutor(how.jobs) as pool:
        first = {run.folder(1): run for run in runs}
        first = {folder: pool.submit(run.train, 1) for folder, run in first.items()}
        # All first stages are begun by now: none of these waits for one that waits for its thread.
        rest = [pool.submit(finish, run, first[run.folder(1)], how) for run in runs]
        for task in rest:
            task.result()
    draw(work, names, last, ROOT / "docs/ablations.png")


def finish(run, stage_1, how):
    stage_1.result()
    run.train(2)
    if not how.train_only:
        run.evaluate(how.rooms)


if __name__ == "__main__":
    main()
