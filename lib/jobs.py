"""What one command samples: every prompt with every seed, or a list of jobs; shared among ranks.

    {"id": "lobby", "image": "lobby.jpg", "prompt": "a lobby", "camera": "orbit", "seed": 3}

is one line of a --jobs file and one job.  What it leaves out is as on the command line; its id is
its folder in --out.  Of several jobs, one that fails is named in the end and the others go on."""

import itertools
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

import config
from lib.camera_paths import kind_of
from lib.distributed import Ranks, gathered, say, start_processes
from lib.export import check_out
from lib.files import MAX_TEXT, check_file, is_of_disk, unique_keys
from lib.guards import out_of_memory, printable

# What a line may set beside its id: all that needs no other model and no other size.
OF_FILES = "camera_format camera_size camera_stride"
PER_JOB = f"prompt image end_image camera {OF_FILES} amount fov scene_scale".split()
PER_JOB += "seed steps sampler guidance shift negative_prompt".split()
# By what is sampled, how, or with what: options that would change nothing.
UNREAD = {
    "a file": "amount",
    "a move": OF_FILES,
    "key frames": f"amount {OF_FILES}",
    "1, no guidance": "negative_prompt",
    "a list of jobs": "num_samples",
    "a list of worlds": f"prompt image end_image jobs num_samples camera amount fov {OF_FILES} "
    "scene_scale export drop lift unit",
    "no release": "correct",
    "no run from a release": "release",
    "no pair of experts": "boundary",
}
ID = r"\w[\w.-]{0,59}"  # a folder's name: no separator, no dot in front, short in any alphabet


STAMPS = ("files", "loras", "folders")  # in settings: of what a sample is made from


def stamps(paths):
    """Sizes and times of the files among paths: other ones under the same names are told."""
    there = map(os.stat, filter(os.path.isfile, paths))
    return " ".join(f"{s.st_size}:{s.st_mtime_ns}" for s in there)


def check_read(given, known, what, kind):
    """ValueError for an option, not at its default, that nothing reads as `what` is `kind`."""
    for name in UNREAD[kind].split():
        if name in known and given.get(name, known[name].default) != known[name].default:
            raise ValueError(f"--{name} would change nothing: {what:.120} is {kind}. Leave it out")


# -------------------------------------------------------------------------------------- planning
def check_writable(out):
    """Results must find a folder, or one to make theirs in: to say so hours later is too late."""
    home = out.absolute()
    try:
        while not (home.is_dir() or os.path.lexists(home)):  # too long a name is an error here
            home = home.parent
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        why = f"{home} is no folder to write into ({error.strerror})"
        raise ValueError(f"--out {out}: {why}. Choose another --out") from None


@dataclass(frozen=True)
class Job:
    """One sample."""

    options: config.Options  # with everything filled in
    camera: tuple  # w2c (1, T, 3, 4), K (1, T, 3, 3)
    out: Path
    settings: dict  # what its report keeps

    def finished(self):
        """Whether its folder holds a complete sample of the same settings; older ones say less."""
        try:
            before = json.loads((self.out / "report.json").read_text())["settings"]
            return {k: self.settings[k] for k in STAMPS} | before == self.settings
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclass(frozen=True)
class Plan:
    """The jobs of a command."""

    jobs: list  # those to do
    there: int  # so many are finished
    failed: list | None  # a line for each that cannot be done; None: a single one, whose error ends


def plan_jobs(options, meta, names, prepare, known):
    """The jobs of --jobs, or one for every prompt and seed -> Plan, without the finished ones.

    names     of the exports
    prepare   options of a job -> the same with everything filled in, and its camera
    known     name -> declared option"""
    check_writable(Path(options.out))

    def make(read):
        given, camera, out = read()
        # Not in the settings: what changes no file, and what stands beside in the report.
        unsaid = ("jobs", "num_samples", "out", "device", "low_memory", "preview_every")
        said = {k: str(v) for k, v in vars(given).items() if k not in unsaid}
        inside = [Path(at, file) for at, _, files in os.walk(given.camera) for file in files]
        named = [given.image, given.end_image, given.camera], given.lora.split(","), sorted(inside)
        said.update(zip(STAMPS, map(stamps, named)))
        said.update(step=meta["step"], sha256=meta.get("sha256", ""))
        return Job(given, camera, out, dict(said, prompt=given.prompt, seed=given.seed))

    read_jobs = lines_of if options.jobs else prompted
    asked = list(read_jobs(options, known, prepare))
    failed = [] if options.jobs or len(asked) > 1 else None
    made = [attempt(partial(make, read), where, failed) for where, read in asked]
    jobs = [job for job in made if job]
    # One sample alone is always made anew.
    left = [job for job in jobs if failed is None or not job.finished()]
    free = [job for job in left if attempt(partial(check_out, job.out, names), job.out, failed)]
    if there := len(jobs) - len(left):
        say(f"{options.out}: {there} of {len(made)} samples are there already and are kept")
    return Plan(free, there, failed)


def read_prompts(text):
    """The prompt itself, or the lines of a text file; empty lines and # comments are skipped."""
    path = Path(text)
    if path.suffix.lower() != ".txt":
        return [text]
    if not path.is_file():
        raise ValueError(f"--prompt {text}: no such file")
    check_file(path, MAX_TEXT)
    try:
        lines = map(str.strip, path.read_bytes().decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt {text}: not a text in UTF-8 ({error})") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"--prompt {text}: no prompt in it; wanted one a line")
    return lines


def prompted(options, known, prepare):
    """(folder, function that gives options, camera and folder) of every prompt and seed: one sample
    goes to --out itself, several to folders inside."""
    seeds = range(options.seed, options.seed + options.num_samples)
    pairs = list(itertools.product(read_prompts(options.prompt), seeds))
    check_read(vars(options), known, f"--camera {options.camera}", kind_of(options.camera))
    given, camera = prepare(options)  # once: only words and seed differ
    for i, (words, seed) in enumerate(pairs):
        slug = re.sub("[^a-z0-9]+", "-", words.lower())[:40].strip("-")
        name = f"{i:03d}-{slug}-seed{seed}" if len(pairs) > 1 else ""
        out = Path(options.out, name)
        yield out, partial(tuple, (given.replaced(prompt=words, seed=seed), camera, out))


def lines_of(options, known, prepare):
    """(where, function that gives options, camera and folder, or raises) of each line of --jobs."""
    path, first = options.jobs, {}
    check_read(vars(options), known, f"--jobs {path}", "a list of jobs")
    check_file(path, MAX_TEXT)
    lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    numbered = [(f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"--jobs {path}: no job in it; wanted one JSON object a line")

    def read(where, line):
        name, changes = read_line(line, where, known)
        # Not all file systems tell upper from lower case.
        if (before := first.setdefault(name.casefold(), where)) != where:
            raise ValueError(f"{where}: id {name} stands in {before} too; wanted one of its own")
        if (words := changes.get("prompt", options.prompt)).lower().endswith(".txt"):
            raise ValueError(f"{where}: --prompt {words:.80}: wanted words, for each line its own")
        asked = options.replaced(**changes)
        # Of the line alone: the command line's is for the others too.
        check_read(changes, known, f"--camera {asked.camera}", kind_of(asked.camera))
        return *prepare(asked), Path(options.out, name)

    return [(where, partial(read, where, line)) for where, line in numbered]


def read_line(line, where, known):
    """One line of a list -> id, {option: value}."""
    try:
        job = json.loads(line.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}; wanted an object a line") from None
    if not isinstance(job, dict):
        raise ValueError(f'{where}: wanted an object such as {{"id": "lobby", "seed": 1}}')
    name = job.pop("id", None)
    if not isinstance(name, str) or not re.fullmatch(ID, name):
        wanted = "wanted up to 60 letters, digits, _ . -, as it names a folder in --out"
        raise ValueError(f"{where}: id = {name!r:.99}; {wanted}")
    may = {key: known[key] for key in PER_JOB}
    if type(job.get("scene_scale")) in (int, float):  # a text, for it may name a file
        job["scene_scale"] = str(job["scene_scale"])
    found = {k: config.check(k, v, config.look_up(k, may, where), where) for k, v in job.items()}
    return name, found


# --------------------------------------------------------------------------------- doing and saying
def attempt(work, where, failed):
    """work(); of several jobs, what goes wrong in one becomes a line of `failed`, and None."""
    try:
        return work()
    except (ValueError, OSError, SafetensorError) as error:
        if failed is None or is_of_disk(error):
            raise
        said = str(error)
    except (RuntimeError, MemoryError) as error:
        if failed is None or not (said := out_of_memory(error)):
            raise
    said = printable(said)
    failed.append(said if said.startswith(str(where)) else f"{where}: {said}")


def start_images(jobs, failed, read):
    """The jobs whose images can be read, and {paths of both: images}; read: options -> images."""
    images, ready = {}, []
    for job in jobs:
        paths = (job.options.image, job.options.end_image)
        if any(paths) and paths not in images:
            if (found := attempt(partial(read, job.options), job.out, failed)) is None:
                continue
            images[paths] = found
        ready.append(job)
    return ready, images


# ------------------------------------------------------------------------------------------ ranks
def join_ranks(options):
    """This process among those of torchrun, and the options with its device.  The ranks share jobs
    and wait for the slowest at the end, 10**6 s: torchrun ends them when one dies."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Ranks(), options
    ranks = start_processes("cpu" if options.device == "cpu" else "auto", 10**6, 10**6)
    return ranks, options.replaced(device=str(ranks.device))


def share(jobs, ranks):
    """This rank's jobs, and the group of the two ranks that compute one together, or None.

    A single guided job on several ranks: the first two take one pass each."""
    if ranks.world == 1 or len(jobs) != 1 or jobs[0].options.guidance == 1:
        return jobs[ranks.rank :: ranks.world], None
    pair = dist.new_group([0, 1])  # to be called on all ranks
    return (jobs, pair) if ranks.rank < 2 else ([], None)


def finish(plan, failed, ranks):
    """Leave the other ranks; ValueError names what failed on any of them."""
    failed = (plan.failed or []) + sum(gathered(failed or []), [])
    ranks.leave()
    if failed and ranks.rank:
        raise SystemExit(2)  # the first rank says why
    if failed:
        print("".join(f"{line}\n" for line in failed), end="", file=sys.stderr)
        total = plan.there + len(plan.jobs) + len(plan.failed)
        cure = "The same command tries them again and keeps the rest"
        raise ValueError(f"{len(failed)} of {total} jobs failed, named above. {cure}")
