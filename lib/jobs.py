"""What sample.py is asked to do: its options, what they may be, and one job for every prompt and seed."""

import argparse
import json
import pathlib
import re

import torch

from lib.camera_files import FORMATS
from lib.export import EXPORTS, USUAL, check_out, export_names

# What the release's sampling does unlike ours, by default with its weights; --correct NAME does it our way.
CORRECTIONS = {
    "rays": "true per-pixel rays; the release shows one ray per frame, and its weights have seen nothing else",
    "readout": "geometry in one extra forward on the finished sample; the release reads it in its last step",
    "image": "start image cropped to the aspect; the release squeezes it",
}


def length(text):
    """A number, or the path of a depth map."""
    try:
        return float(text)
    except ValueError:
        return pathlib.Path(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"sample.py: {message}; --help lists every option\n")


def parse_arguments(argv=None):
    parser = Parser(
        description="Sample worlds: checkpoint, prompts, camera path -> video, depth, points, cameras, a page.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )

    def add(group, name, help, **options):
        default = options.get("default")
        shown = "" if default is None or options.get("action") else " [%(default)s]"
        group.add_argument(f"--{name}", help=help + shown, **options)

    what = parser.add_argument_group("what to sample")
    add(what, "ckpt", "checkpoint of stage 1 or 2, or a release's model.pth", required=True)
    add(
        what,
        "wan_dir",
        "folder of the video branch; default: the one it was trained with; a release needs it",
    )
    add(what, "prompt", "words, or a text file with one prompt a line", default="a room")
    add(what, "negative_prompt", "default: Wan's official one, in Chinese; empty for the demo")
    add(what, "image", "picture or video file whose first frame starts the video")
    view = parser.add_argument_group("camera")
    add(
        view,
        "camera",
        "a move (orbit, forward, left, pan_left, zoom_in, ...), a camera file (formats: cameras.py), "
        "or key frames 'x,y,z -> x,y,z | ...' (stand -> look at, y down)",
        default="orbit",
    )
    add(view, "camera_format", "format of a camera file that does not show it", choices=FORMATS)
    add(
        view,
        "amount",
        "strength of a named move; 1 travels 0.3 scene units or turns by 30 degrees",
        type=float,
        default=1.0,
    )
    add(
        view,
        "fov",
        "horizontal field of view where the camera has no intrinsics, degrees",
        type=float,
        default=65.0,
    )
    add(
        view,
        "scene_scale",
        "your units per scene unit (mean distance of the first frame's points), a guess: the "
        "scene is scaled to the path afterwards; or a depth map of the start image, which is measured",
        type=length,
        default=1.0,
    )
    size = parser.add_argument_group("size")
    for name, rule in (
        ("frames", "4k + 1"),
        ("height", "multiple of 16"),
        ("width", "multiple of 16"),
    ):
        add(size, name, f"{rule}; default: the training size", type=int)
    add(size, "fps", "frames a second of the written videos", type=float, default=16.0)
    how = parser.add_argument_group("sampling")
    add(how, "steps", "steps of the sampler", type=int, default=50)
    add(how, "sampler", "unipc is Wan's own", default="euler", choices=["euler", "unipc"])
    add(how, "guidance", "1 = no guidance, half the work", type=float, default=5.0)
    add(how, "shift", "more of the steps at high noise", type=float, default=5.0)
    add(how, "seed", "seed of the first sample", type=int, default=0)
    add(
        how,
        "num_samples",
        "samples of every prompt, of seeds seed, seed + 1, ...",
        type=int,
        default=1,
    )
    theirs = parser.add_argument_group("the released weights and what was fine-tuned from them")
    add(
        theirs,
        "correct",
        "do not as the release does: "
        + "; ".join(f"{name}: {what}" for name, what in CORRECTIONS.items()),
        nargs="+",
        choices=CORRECTIONS,
        metavar="NAME",
        default=[],
        action="extend",
    )
    add(
        theirs,
        "release",
        "model.pth of the release that --ckpt was fine-tuned from, if it was moved since",
    )
    machine = parser.add_argument_group("machine")
    add(
        machine,
        "device",
        "cuda, cuda:1, cpu, ...",
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    add(
        machine,
        "dtype",
        "auto: bf16 on a GPU, fp32 on a CPU",
        default="auto",
        choices=["auto", "bf16", "fp32"],
    )
    add(
        machine,
        "low_memory",
        "slower: encoders on the CPU, heads in small chunks, the model leaves the device while "
        "the video is decoded",
        action="store_true",
    )
    add(
        machine,
        "offload",
        "keep so many GB of weights on the device (0 = the least), the others visit it layer by "
        "layer; for a GPU that is smaller than the model",
        type=float,
    )
    files = parser.add_argument_group("files")
    add(files, "out", "folder", default="outputs/sample", type=pathlib.Path)
    add(files, "export", f"all, or names of {','.join(EXPORTS)}", default=USUAL)
    add(
        files,
        "drop",
        "percent of the pixels, the least confident, left out of point clouds",
        type=float,
        default=20.0,
    )
    add(
        files,
        "lift",
        "cameras that lift depth to points: what was asked for (default), or what the model reports "
        "(default with a release's weights)",
        choices=["commanded", "predicted"],
    )
    add(files, "unit", "your unit of length, as a word", default="units")
    add(
        files,
        "preview_every",
        "write the depth seen so far as a picture every so many steps; 0 = never",
        type=int,
        default=0,
    )
    return parser.parse_args(argv)


def check_arguments(args, trained):
    """Refuses what cannot work before anything slow; fills sizes in."""
    args.frames = args.frames or trained["num_frames"]
    args.height, args.width = args.height or trained["height"], args.width or trained["width"]
    found = (args.frames, args.height, args.width)
    near = (
        max(5, round((found[0] - 1) / 4) * 4 + 1),
        *(max(16, round(x / 16) * 16) for x in found[1:]),
    )
    if found != near:
        raise ValueError(
            "--frames {} --height {} --width {}: wanted 4k + 1 frames and multiples of 16, such as "
            "--frames {} --height {} --width {}".format(*found, *near)
        )
    for name, low, high in (
        ("steps", 1, 1000),
        ("num_samples", 1, 10**6),
        ("fov", 1, 170),
        ("drop", 0, 99),
        ("fps", 0.1, 1000),
        ("scene_scale", 1e-9, 1e9),
        ("preview_every", 0, 1000),
    ):
        if (
            not isinstance(getattr(args, name), pathlib.Path)
            and not low <= getattr(args, name) <= high
        ):
            raise ValueError(f"--{name} {getattr(args, name):g}: wanted {low:g} to {high:g}")


def read_prompts(text):
    """The prompt itself, or the lines of a text file of that name; empty lines and # comments are skipped."""
    path = pathlib.Path(text)
    if path.suffix != ".txt":
        return [text]
    if not path.is_file():
        raise ValueError(f"--prompt {text}: no such file")
    lines = [
        line
        for line in map(str.strip, path.read_text().splitlines())
        if line and not line.startswith("#")
    ]
    if not lines:
        raise ValueError(f"--prompt {text}: no prompt in it; wanted one a line")
    return lines


def plan(args, prompts, meta):
    """One job for every prompt and seed: prompt, seed, out, settings.  A folder whose report.json holds the same
    settings is complete; among several jobs it is left out."""
    shared = {
        k: str(v)
        for k, v in vars(args).items()
        if k
        not in ("prompt", "seed", "num_samples", "out", "device", "low_memory", "preview_every")
    }
    jobs = [
        dict(prompt=prompt, seed=args.seed + n)
        for prompt in prompts
        for n in range(args.num_samples)
    ]
    for i, job in enumerate(jobs):
        slug = re.sub("[^a-z0-9]+", "-", job["prompt"].lower())[:40].strip("-")
        job["out"] = args.out / f"{i:03d}-{slug}-seed{job['seed']}" if len(jobs) > 1 else args.out
        job["settings"] = dict(
            shared,
            prompt=job["prompt"],
            seed=job["seed"],
            step=meta["step"],
            sha256=meta.get("sha256", ""),
        )
    left = [job for job in jobs if len(jobs) == 1 or not finished(job)]
    if len(left) < len(jobs):
        print(
            f"{args.out}: {len(jobs) - len(left)} of {len(jobs)} samples are there already and are kept"
        )
    for job in left:
        check_out(job["out"], export_names(args.export))
    return left


def finished(job):
    try:
        return (
            json.loads((job["out"] / "report.json").read_text()).get("settings") == job["settings"]
        )
    except (OSError, ValueError):
        return False
