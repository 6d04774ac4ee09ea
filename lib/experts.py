"""A pair of experts, of high and of low noise, as the one model that sampling calls (Wan2.2).

Each is a whole FantasyWorld; which one works is a question of the noise level alone.  A pair's
--ckpt, --lora and --release are two files with a comma, high noise first."""

import json
import os
import re
from functools import partial
from pathlib import Path

import torch

from encoders import EXPERTS, expert_folders
from lib.frozen import check_frozen, frozen_digest
from lib.offload import offload
from lib.strangers import read_train_config
from lib.weights import metadata_of, open_checkpoint

BOUNDARY = 900.0  # t = 1000 sigma above which the high noise expert works.  Source: the release
# What an expert takes, whatever the preset: no CLIP tokens, rays through the control adapter.
INPUTS = dict(in_dim=36, has_clip=False, has_control=True)
# Noise levels that an expert is trained on, sigma.
WINDOWS = {"": (0.0, 1.0), "high": (BOUNDARY / 1000, 1.0), "low": (0.0, BOUNDARY / 1000)}


class Experts:
    """The model of every noise level, one in memory at a time.

    openers    two functions without arguments that load a model onto device, of high noise first
    boundary   the first one works above this t
    rounded    t is compared as the release does, in bf16: 900 to 902 count as 900
    keep       both stay in memory, where something else keeps them off the device (offload)
    Sampling asks of it what it asks of a FantasyWorld: at(t), to(device), cfg."""

    def __init__(self, openers, boundary=BOUNDARY, *, device="cpu", rounded=False, keep=False):
        self.openers, self.boundary, self.device = openers, boundary, torch.device(device)
        self.rounded, self.keep, self.loaded = rounded, keep, {}

    def choose(self, t):
        """0 (high noise) or 1 for t (B,), all equal."""
        level = t.bfloat16() if self.rounded else t
        return 0 if float(level[0]) > self.boundary else 1

    def at(self, t):
        """The model for t (B,), loaded now if it is not there."""
        n = self.choose(t)
        if n not in self.loaded:
            if not self.keep:
                self.clear()
            self.loaded[n] = self.openers[n]()
        return self.loaded[n]

    def clear(self):
        """Free the weights, whoever still holds the modules."""
        for model in self.loaded.values():
            model.to("meta")
        self.loaded = {}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def to(self, device):
        """Leave memory where the device is wanted for something else."""
        if torch.device(device) != self.device and not self.keep:
            self.clear()
        return self

    @property
    def cfg(self):
        """Of whichever is there: sampling asks for the inputs, which both have in common."""
        found = list(self.loaded.values()) or [self.at(torch.tensor([1000.0]))]
        return found[0].cfg


# ------------------------------------------------------------------------------ files of a pair
def files_in(text):
    """The files of an option: one, or those of a pair.  A file's own name may hold a comma."""
    if os.path.exists(text):  # pathlib's raises for a list that is longer than a name may be
        return [text]
    return [part.strip() for part in text.split(",")] if text else []


def of_each(text, count, option):
    """A file for each of `count` checkpoints, "" where the option is not given."""
    files = files_in(text) or [""] * count
    if len(files) != count:
        wanted = "one file" if count == 1 else "two, with a comma: high noise, low noise"
        raise ValueError(f"--{option} {text}: {len(files)} files; wanted {wanted}")
    for file, expert in zip(files, EXPERTS if count > 1 else ()):
        check_place(file, dict(expert="either"), expert)
    return files


def window_of(options):
    """(lowest, highest) sigma that a run of train.py draws."""
    levels = options.sigma_range or WINDOWS[options.expert]
    if len(levels) != 2 or levels[0] >= levels[1]:
        raise ValueError(f"sigma_range = {levels}; wanted two levels, the lower first: 0.9,1.0")
    return levels


def check_place(path, meta, expert):
    """A checkpoint must be the expert that is wanted: of its place in --ckpt, or of --expert."""
    cure = "pairs are HIGH,LOW, train.py's --expert=high or --expert=low"
    if not (found := meta.get("expert")):
        raise ValueError(f"{path}: no expert of a pair, wanted the {expert} noise one; {cure}")
    if not expert:
        raise ValueError(f"{path}: one expert of a pair; say which: {cure}")
    if found == "either":  # the release's: only their names differ, or their folders'
        told = re.findall("(high|low)[-_ ]?noise", "/".join(Path(path).parts[-2:]).lower())
        found = (told or [expert])[-1]
    if found != expert:
        raise ValueError(f"{path}: the {found} noise expert, wanted the {expert} noise one; {cure}")


def metadata_of_ckpt(ckpt):
    """Metadata of --ckpt: of one file, or of a pair as that of its low noise expert, which ends
    every video and reads the geometry.  Raises ValueError for what is of no stage to sample, for
    half a pair, or a pair the wrong way round."""
    if not ckpt:
        raise ValueError("--ckpt is needed: a checkpoint of stage 1 or 2; --help lists all options")
    paths = files_in(ckpt)
    metas = [metadata_of(path) for path in paths]
    for path, meta in zip(paths, metas):
        if meta.get("stage") not in ("1", "2"):
            found = f"{path}: stage {meta.get('stage')}"
            raise ValueError(f"{found}; wanted a stage 1 or stage 2 checkpoint")
    if len(paths) == 1:
        if metas[0].get("expert"):
            cure = "give both: --ckpt HIGH,LOW"
            raise ValueError(f"{ckpt}: one expert of a pair, which knows half of the noise; {cure}")
        return metas[0]
    if len(paths) != 2:
        raise ValueError(f"--ckpt {ckpt}: {len(paths)} files; wanted one, or a pair: HIGH,LOW")
    for path, meta, expert in zip(paths, metas, EXPERTS):
        check_place(path, meta, expert)
    high, low = metas
    for key in ("stage", "foreign"):
        if high.get(key) != low.get(key):
            found = f"{key} {high.get(key)} and {low.get(key)}"
            raise ValueError(f"--ckpt {ckpt}: a pair of {found}; wanted two of a kind")
    trained = read_train_config(low, paths[1])
    if low.get("release"):  # its negative prompt is the empty one
        trained["sampling"] = dict(negative_prompt="") | trained.get("sampling", {})
    both = {key: f"{high.get(key, '')} {low.get(key, '')}".strip() for key in ("sha256", "step")}
    return dict(low, **both, train_config=json.dumps(trained))


def folders_of(wan_dir, count):
    """Wan folders of one checkpoint, or of the experts: those of a pair, or twice the same."""
    if count == 1:
        return [wan_dir]
    pair = expert_folders(wan_dir) or expert_folders(Path(wan_dir).parent)
    return list(map(str, pair)) or [wan_dir] * count


def check_frozen_of(options):
    """A checkpoint, or both of a pair, goes with the video branch that it was trained on."""
    paths = [] if options.other_wan else files_in(options.ckpt)
    for path, folder in zip(paths, folders_of(options.wan_dir, len(paths))):
        meta = metadata_of(path)
        if folder and "frozen" in meta:
            check_frozen(meta, frozen_digest(folder), path)


def open_models(options, quirks, device, weights):
    """The model of sample.py's --ckpt: one, or Experts that are loaded when their turn comes.

    quirks    what is done as the release does it: rays, switch and others
    weights   type of a release's matrices, None: fp32"""
    paths = files_in(options.ckpt)
    folders = folders_of(options.wan_dir, len(paths))
    files = (of_each(getattr(options, name), len(paths), name) for name in ("release", "lora"))
    share = options.offload and options.offload / len(paths)  # GB that stay on the device
    place = device if share is None else "cpu"

    def load_one(path, folder, release, lora):
        given = dict(release=release, lora=lora, true_rays="rays" not in quirks)
        model = open_checkpoint(path, folder, place, weights, **given)
        if options.low_memory:
            model.depth_head.chunk = model.point_head.chunk = 4  # frames that a head sees at a time
        return model if share is None else offload(model, device, share)

    openers = [partial(load_one, *each) for each in zip(paths, folders, *files)]
    if len(openers) == 1:
        return openers[0]()
    how = dict(device=device, rounded="switch" in quirks, keep=options.offload is not None)
    return Experts(openers, options.boundary, **how)
