"""Several datasets in one run: data_dir = "rooms:0.7,walks:0.3".

Which dataset and which of its clips stands at a place of the run's sequence is a pure function of
(seed, place): of every BLOCK places each dataset gets its share, rounded to whole clips, in an
order that the seed and the block decide; within a dataset the clips come epoch by epoch."""

import functools
import hashlib
from bisect import bisect_right

import numpy as np
from torch.utils.data import ConcatDataset

from lib.distributed import say
from lib.listing import check_sample

BLOCK = 1000


def parts_of(text):
    """ "a:0.7,b:0.3" or a single folder -> [(folder, weight)], weights of sum 1."""
    parts = []
    for part in text.split(","):
        folder, colon, weight = part.strip().rpartition(":")
        try:
            parts.append((folder, float(weight)) if colon else (weight, 1.0))
        except ValueError:  # a colon in a path
            parts.append((part.strip(), 1.0))
    if not all(folder and 0 < weight < float("inf") for folder, weight in parts):
        wanted = "wanted FOLDER, or FOLDER:WEIGHT,FOLDER:WEIGHT with weights above 0"
        raise ValueError(f"data_dir = {text!r}; {wanted}")
    if len({folder for folder, _ in parts}) < len(parts):
        raise ValueError(f"data_dir = {text!r}: a folder is there twice; raise its weight instead")
    total = sum(weight for _, weight in parts)
    return [(folder, weight / total) for folder, weight in parts]


@functools.lru_cache(maxsize=4)
def counts_of(weights):
    """Places of a block that each dataset gets: whole numbers of sum BLOCK, 1 at least."""
    exact = np.array(weights) * BLOCK
    counts = np.maximum(np.floor(exact).astype(int), 1)
    counts[np.argsort(counts - exact)[: max(0, BLOCK - counts.sum())]] += 1
    counts[np.argmax(counts)] += BLOCK - counts.sum()
    return counts


@functools.lru_cache(maxsize=4)
def block(weights, seed, number):
    """(BLOCK,) dataset at each place of a block, and how often it came before in the block."""
    order = np.repeat(np.arange(len(weights)), counts_of(weights))
    np.random.default_rng([seed, 4, number]).shuffle(order)
    before = np.zeros(BLOCK, int)
    for n in range(len(weights)):
        before[order == n] = np.arange((order == n).sum())
    return order, before


def pick(place, weights, seed):
    """(dataset, k): the clip at a place of the sequence is the k-th that its dataset gives."""
    if len(weights) == 1:
        return 0, place
    number, within = divmod(place, BLOCK)
    order, before = block(weights, seed, number)
    dataset = int(order[within])
    return dataset, int(number * counts_of(weights)[dataset] + before[within])


class Mix(ConcatDataset):
    """Cached clips of several datasets, one after another."""

    def __init__(self, parts, weights, text_dim=None):
        """text_dim: width of the model's text, which all parts must have."""
        for part in parts if text_dim else ():
            if (found := part[0]["text"].shape[-1]) != text_dim:
                where = f"{part.empty_text.parent}: text of width {found}"
                cure = "encode it with this model's --wan_dir, or train its preset"
                raise ValueError(f"{where}; the model takes {text_dim}. {cure}")
        super().__init__(parts)
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.sizes = [len(part) for part in parts]
        kinds = {part.empty_text.parent.name: part for part in parts}
        if len(kinds) > 1:
            found = " and ".join(str(part.empty_text.parent) for part in kinds.values())
            raise ValueError(f"{found}: encoded by other encoder files or at other sizes")
        self.empty_text = parts[0].empty_text

    @property
    def told(self):
        """What batches depend on, beside options, for a resume to compare."""
        clips = [part.metadata for part in self.datasets]
        told = dict(clip_names=list(map(list, clips)))
        told["clip_values"] = [m["crc"][:8] for part in clips for m in part.values()]
        short = {key: hashlib.md5(str(x).encode()).hexdigest()[:8] for key, x in told.items()}
        return dict(clips=self.sizes, **short)

    def of(self, i):
        """(dataset, its clip) of clip i."""
        n = bisect_right(self.cumulative_sizes, i)
        return self.datasets[n], i - (self.cumulative_sizes[n] - self.sizes[n])

    @functools.cached_property
    def turns(self):
        """The clips in an order in which the datasets take turns: an evaluation takes the first."""
        return sorted(range(len(self)), key=lambda i: self.of(i)[1])

    def frames(self, i):
        part, k = self.of(i)
        return part.frames(k)

    def count_relative(self):
        return sum(part.count_relative() for part in self.datasets)


# What the recipe asks of the clips, before the first step.
def check_clips(clips, options, master):
    """split -> Mix; ValueError for what cannot be trained on, or compared with a sample."""
    check_depth_kinds(clips, options, master)
    lacking = [part for part in clips["train"].datasets if not part.have_end_images()]
    if options.end_dropout < 1 and lacking:  # training on end images needs them encoded
        where = f"{lacking[0].empty_text.parent}: clips without an encoded end image"
        cure = "python data.py encode ... --end_image (families of 36 inputs), or --end_dropout=1"
        raise ValueError(f"end_dropout = {options.end_dropout}, {where}. Run {cure}")
    val, count = clips.get("val"), min(options.eval_samples, options.eval_clips)
    for part, k in [val.of(i) for i in val.turns[:count]] if val else ():
        try:
            check_sample("/", part.sample_of(k))
        except ValueError as error:
            raise ValueError(f"eval_samples compares with the true frames; {error}") from None


def check_depth_kinds(clips, options, master):
    """Clips whose depth has no unit train the depth head alone; what needs a unit refuses them."""
    count = {split: c.count_relative() for split, c in clips.items()}
    if not options.stage:
        return
    if count.get("val"):
        found = f"{count['val']} validation clips have depth without a unit"
        cure = "Give depth_scale in metadata.json, or choose other clips for the split val"
        raise ValueError(f"{options.data_dir}: {found}; their errors would mean nothing. {cure}")
    found = f"{count['train']} of {len(clips['train'])} clips have depth without a unit"
    if count["train"] and options.stage == 2:
        why = "stage 2 wants cameras in scene units. Train them in stage 1, or leave them out"
        raise ValueError(f"{options.data_dir}: {found}; {why}")
    if count["train"] and master:
        what = "they train the depth head alone, with depth_mode ssi"
        say(f"warning: {found} (8-bit or min-max normalised); {what}")
