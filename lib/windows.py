"""Which windows of a clip `data.py encode` makes caches of."""

import zlib
from dataclasses import dataclass

import numpy as np

from encoders import MINIATURE
from lib.camera_files import read_cameras


@dataclass(frozen=True)
class Encoding:
    """What `data.py encode` is asked for beside the size."""

    wan_dir: str = MINIATURE  # whose encoders are used
    device: str = "auto"  # a GPU where there is one
    split: str | None = None
    start: int = 0  # first frame of a clip's first window
    stride: str | int = 1  # frames from one to the next; "1,2,4": each window draws one
    windows: int = 1  # of each clip: evenly spread, or
    window_seed: int = -1  # drawn at random when this is 0 or more
    end_image: bool = False  # also the condition of start and end image
    skip_bad: bool = False
    follow_links: bool = False

    def __post_init__(self):
        if self.windows < 1 or self.start < 0:
            raise ValueError("wanted --windows of 1 or more and --start of 0 or more")

    def strides(self):
        words = str(self.stride).split(",")
        if not all(word.strip().isdecimal() and int(word) for word in words):
            raise ValueError(f"--stride {self.stride}: wanted a whole number, or several as 1,2,4")
        return list(map(int, words))

    def places(self, sample, num_frames):
        """(first frame, stride) of a clip's windows; of several strides only those that fit."""
        strides = self.strides()
        if self.whole():
            return [(self.start, strides[0])]
        count = len(read_cameras(sample["camera"])[0]) if sample["camera"] else 0
        # By name: other clips do not move the windows of this one.
        key = [max(self.window_seed, 0), zlib.crc32(sample["id"].encode())]
        random = np.random.default_rng(key)
        if len(strides) == 1:
            chosen = strides * self.windows
        else:
            fit = [s for s in strides if self.start + s * (num_frames - 1) < count]
            chosen = random.choice(fit or [min(strides)], self.windows).tolist()
        last = [max(self.start, count - s * (num_frames - 1) - 1) for s in chosen]
        if self.window_seed < 0:
            shares = np.linspace(0, 1, self.windows)
            starts = [round(self.start + x * (end - self.start)) for x, end in zip(shares, last)]
        else:
            end = last[0] + 1 if len(strides) == 1 else np.array(last) + 1
            starts = random.integers(self.start, end, self.windows).tolist()
        return sorted(dict(zip(reversed(starts), reversed(chosen))).items())

    def whole(self):
        return self.windows == 1 and self.window_seed < 0 and len(self.strides()) == 1
