"""What a stranger's weight file says of itself, believed as far as its tensors bear it out."""

import json
import math
from contextlib import contextmanager

import torch

from model import EXCHANGES, Config
from wan import INPUTS, LATENT

MOST = 2**17  # of a width or a count; no model of the field comes near
MOST_LAYERS = 512
MOST_PIXELS = 2**29  # of a video that a checkpoint asks for: 81 frames of 720p are 2**26
LAYERS = ("num_layers", "num_pcb", "bridge_layers", "camera_layers", "camera_iterations")
NONE_ALLOWED = ("num_pcb", "bridge_layers", "adapter_sizes", "ray_sizes", "taps")


@contextmanager
def naming(path):
    """Whatever goes wrong with a file names it: odd fields and shapes raise almost any class."""
    try:
        yield
        return
    except torch.cuda.OutOfMemoryError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        said = str(error)
        if isinstance(error, ValueError) and str(path) in said:
            raise
    except (RuntimeError, AssertionError, MemoryError) as error:
        said = str(error) or type(error).__name__
    raise ValueError(f"{path}: not a file that fits: {said.splitlines()[0]}. Copy it again")


def read_fields(meta, key, path):
    """A JSON object of a checkpoint's metadata."""
    try:
        found = json.loads(meta[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {key} of its metadata cannot be read ({error!r})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {key} of its metadata is no object")
    return found


def config_from_metadata(meta, path):
    """The Config that a checkpoint was trained with."""
    return checked_config(read_fields(meta, "model_config", path), path)


def checked_config(values, path):
    """The Config of fields from outside, which `path` has said."""
    usual = vars(Config())
    for key, value in values.items():
        if key not in usual or not plausible(key, value, type(usual[key])):
            raise ValueError(f"{path}: model_config {key!r:.60} = {value!r:.60} is no model's")
    cfg = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    # Heads; pairs that are rotated; sines and cosines, of one coordinate or of two.
    parts = dict(dim=cfg.head_dim, camera_dim=cfg.camera_heads, head_dim=2, freq_dim=2)
    parts |= dict(geo_dim=4 * cfg.geo_heads, irg_dim=2 * cfg.irg_heads, dpt_features=8)
    parts |= dict(bridge_width=max(1, cfg.bridge_width // 64))
    for key, n in parts.items():
        if vars(cfg)[key] % n:
            raise ValueError(f"{path}: {key} = {vars(cfg)[key]}; wanted a multiple of {n}")
    if len(cfg.taps) != 4 or len(cfg.dpt_channels) != 4 or any(c % 4 for c in cfg.dpt_channels):
        found = f"taps = {cfg.taps}, dpt_channels = {cfg.dpt_channels}"
        raise ValueError(f"{path}: {found}; wanted four layers, and four multiples of 4")
    if cfg.in_dim not in INPUTS:
        raise ValueError(f"{path}: in_dim = {cfg.in_dim}; wanted one of {sorted(INPUTS)}")
    return cfg


def plausible(key, value, kind):
    """Whether a field of Config has its type and a size that a model can have."""
    least = 0 if key in NONE_ALLOWED else 1
    if kind is tuple:
        whole = isinstance(value, (list, tuple)) and len(value) < 64
        return whole and all(plausible(key, each, int) for each in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if key == "exchange":
        return value in EXCHANGES
    if type(value) is not kind:
        return False
    return kind is not int or least <= value <= (MOST_LAYERS if key in LAYERS else MOST)


def read_train_config(meta, path):
    """The options of the run that made a checkpoint, as far as sampling reads them."""
    options = read_fields(meta, "train_config", path)
    size = [options.get(key) for key in ("num_frames", "height", "width")]
    if any(type(n) is not int or not 0 < n <= MOST for n in size):
        raise ValueError(f"{path}: train_config: frames, height, width {size!r:.99} are no size")
    if tuple(size) != LATENT.nearest(*size) or math.prod(size) > MOST_PIXELS:
        raise ValueError(f"{path}: train_config: nothing trains at {size} frames, height, width")
    folder = options.get("wan_dir")
    if not isinstance(folder, str) or "\0" in folder:
        raise ValueError(f"{path}: train_config: wan_dir {folder!r:.60} is no folder")
    if not isinstance(options.get("sampling", {}), dict):
        raise ValueError(f"{path}: train_config: sampling is no object")
    return options


def floats(value, name, path):
    """A tensor that must hold weights."""
    if not value.is_floating_point():
        raise ValueError(f"{path}: {name!r:.80} is {value.dtype}; weights are floating point")
    return value
