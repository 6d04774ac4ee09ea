"""Depth of a clip: what the values of its files mean, which of them are unknown, and metres.

Shapes: T frames of H x W pixels.  Z-depth, metres, 0 = unknown."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.files import FAR, iterate_arrays, read_arrays, while_unchanged


@dataclass(frozen=True)
class DepthUnit:
    """What the values of a depth file mean: fields of a sample in metadata.json."""

    scale: float | None = None  # metres per unit (per unit of 1 / value if inverse)
    inverse: bool = False  # the file holds 1 / z
    invalid: tuple = ()  # values of the file that mean unknown, beside those of unknown()
    most: float | None = None  # metres: what is farther is unknown, as sky at a far plane

    def stamp(self):
        """Of a cache made from it; caches of clips with nothing but a scale keep theirs."""
        return [self.scale] + [self] * (self != DepthUnit(self.scale))


METRES = DepthUnit()


def check_positive(field, value, where):
    if value is not None and not (type(value) in (int, float) and 0 < value < FAR):
        wanted = f"a number between 0 and {FAR:.0e}"
        raise ValueError(f"{where}: {field} = {value!r:.60}; wanted {wanted}")


def unit_of(entry, where):
    """DepthUnit of a sample's entry in metadata.json; `where` names it in a ValueError."""
    inverse, invalid = entry.get("inverse_depth"), entry.get("depth_invalid")
    for field in ("depth_scale", "depth_max"):
        check_positive(field, entry.get(field), where)
    if type(inverse) not in (bool, type(None)):
        raise ValueError(f"{where}: inverse_depth = {str(inverse)[:60]}; wanted true or false")
    values = invalid if isinstance(invalid, list) else [] if invalid is None else [invalid]
    if len(values) > 100 or any(type(v) not in (int, float) for v in values):
        wanted = "a number, or a list of at most 100: values of the file that mean unknown"
        raise ValueError(f"{where}: depth_invalid = {str(invalid)[:60]}; wanted {wanted}")
    return DepthUnit(entry.get("depth_scale"), bool(inverse), tuple(values), entry.get("depth_max"))


def largest(dtype):
    """The largest value that a type of whole numbers or half floats can hold, or None.

    Sensors, games and converters write it where nothing was measured (7-Scenes, Virtual KITTI)."""
    if dtype.kind in "iu" and dtype.itemsize > 1:
        return np.iinfo(dtype).max
    return float(np.finfo(dtype).max) if dtype == np.float16 else None


def unknown(raw, unit=METRES):
    """Pixels (T, H, W) bool without a depth: not finite, the type's largest value, as told."""
    out = ~np.isfinite(raw)
    for value in (largest(raw.dtype), *unit.invalid):
        if value is not None:
            out |= raw == value
    return out


def relative_depth(frames):
    """Why raw frames (H, W) cannot be metric: 8 bits, or stretched to a full range; or None."""
    lows, tops, below, whole, dtype = [], [], [], True, None
    for frame in frames:
        dtype = frame.dtype
        values = frame[np.isfinite(frame)]
        tops.append(float(values.max(initial=0)))
        if values.size:
            lows.append(float(values.min()))
            below.append(float(values[values < tops[-1]].max(initial=0)))
            whole &= bool((values[::7] == np.round(values[::7])).all())
    if dtype == np.uint8 or not lows:
        return "8-bit depth" if lows else None
    low, high = min(lows), max(tops)
    second = max([x for x in (*tops, *below) if x < high], default=0)
    if high in (255, 65535) and whole and second > 0.9 * high:
        # Far above the rest it would be a mark for unknown, not the end of a stretched range.
        return f"integers that reach exactly {high:.0f}: stretched to the full range"
    ends_at_one = abs(high - 1) < 1e-6 and (abs(np.array(tops) - 1) < 1e-6).mean() > 0.9
    if low >= 0 and ends_at_one or (low == 0 and high == 1):
        return "stretched to 0 .. 1 (min-max normalised)"
    return None


@while_unchanged
def why_relative(path):
    """relative_depth of a whole clip: a window of a stretched clip need not reach its ends."""
    return relative_depth(iterate_arrays(path))


def metres(raw, unit, path):
    """Values (T, H, W) of a file -> float32 z-depth, 0 where it is unknown.

    Raises ValueError for integers without a scale and for depth beyond FAR."""
    if raw.dtype.kind != "f" and unit.scale is None:
        alone = ", or --scene_scale FILE*0.001" if unit is METRES else ""  # no metadata tells of it
        cure = f"add depth_scale (metres per count) in metadata.json{alone}"
        raise ValueError(f"{path}: {raw.dtype} depth without a unit; {cure}")
    known = ~unknown(raw, unit)
    far = float(raw[known].max(initial=0)) * float(unit.scale or 1)
    if not unit.inverse and unit.most is None and far > FAR:
        cure = "Write 0 where it is unknown, sky included, or give depth_max; check depth_scale"
        raise ValueError(f"{path}: depth up to {far:.3g} m; wanted at most {FAR:.0e}. {cure}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        depth = raw.astype(np.float32)
        depth = (1 / depth if unit.inverse else depth) * np.float32(unit.scale or 1)
    most = min(FAR, unit.most or FAR)
    return np.where(known & (depth > 0) & (depth <= most), depth, np.float32(0))


def depth_of_points(points, w2c, path):
    """z (T, H, W) float64 of points (T, H, W, 3) of a file in each camera's frame; 0: unknown."""
    if points.ndim != 4 or points.shape[-1] != 3:
        raise ValueError(f"{path}: array of shape {points.shape}; wanted points (T, H, W, 3)")
    z = np.einsum("tc,thwc->thw", w2c[:, 2, :3], points.astype(np.float64))
    z += w2c[:, 2, 3, None, None]
    known = (points != 0).any(-1) & np.isfinite(z) & (z > 0)  # a point at the origin is unknown
    return np.where(known, z, 0)


def read_depth(path, unit=METRES, frames=None):
    """Z-depth (T, H, W) float32 metres, 0 = unknown; frames: chosen ones, default all.

    Depth without a unit (see relative_depth) comes back as it is, positive: order and ratios are
    all it has."""
    raw = read_arrays(path, frames)
    if raw.ndim != 3:
        raise ValueError(f"{path}: array of shape {raw.shape}; wanted z-depth (T, H, W)")
    relative = unit.scale is None and why_relative(Path(path))
    if relative and unit.inverse:
        why = f"relative inverse depth ({relative}): its shift is unknown, so 1 / d is no depth"
        cure = "Fit it to metric points first, or set depth_scale if it has a unit"
        raise ValueError(f"{path}: {why}. {cure}")
    if relative:
        depth = raw.astype(np.float32)
        return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))
    return metres(raw, unit, path)
