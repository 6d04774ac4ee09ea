"""Several datasets in one run: shares, purity, resume, rank counts, refusals."""

import pathlib

import numpy as np
import pytest
from safetensors.torch import load_file
from small import options_of, train_here

import train
from data import EmptySplit
from lib.distributed import Ranks
from lib.mix import BLOCK, Mix, counts_of, parts_of, pick
from lib.rooms import Recipe, synth


def test_what_data_dir_says():
    assert parts_of("data/x") == [("data/x", 1.0)]
    assert parts_of("a:3,b:1") == [("a", 0.75), ("b", 0.25)]
    assert parts_of("a,b") == [("a", 0.5), ("b", 0.5)]
    assert parts_of("C:/sets/a") == [("C:/sets/a", 1.0)]
    for text in ("a:0,b:1", "a:-1", ",b", "a:nan"):
        with pytest.raises(ValueError, match="data_dir = .*wanted FOLDER"):
            parts_of(text)
    with pytest.raises(ValueError, match="twice"):
        parts_of("a:1,a:2")


def test_a_mix_that_goes_on_draws_the_clips_of_its_first_start():
    """Rounded once, not twice, a share moved to another dataset: 466 and 67."""
    weights = [weight for _, weight in parts_of("a:0.7,b:0.7,c:0.1")]
    shares = counts_of(tuple(weight / sum(weights) for weight in weights))  # as Mix does it
    assert shares.tolist() == [467, 467, 66]


def test_shares_are_exact_in_a_block_and_each_clip_comes_in_turn():
    weights = (0.7, 0.2, 0.1)
    found = [pick(n, weights, 5) for n in range(3 * BLOCK)]
    for number in range(3):
        datasets = [d for d, _ in found[number * BLOCK : (number + 1) * BLOCK]]
        assert np.bincount(datasets).tolist() == [700, 200, 100]
    for dataset in range(3):  # the k of a dataset are 0, 1, 2, ... without a gap
        ks = [k for d, k in found if d == dataset]
        assert ks == list(range(len(ks)))
    assert found[BLOCK + 7] == pick(BLOCK + 7, weights, 5) and counts_of((0.9999, 0.0001))[1] == 1
    assert [pick(n, weights, 6)[0] for n in range(99)] != [d for d, _ in found[:99]]
    assert pick(12345, (1.0,), 5) == (0, 12345)  # one dataset is what it always was


def test_batches_of_a_mix_do_not_depend_on_the_number_of_ranks():
    options = options_of(train, batch_size=2, max_steps=30, grad_accum=2, seed=3)
    how = dict(sizes=[5, 11], options=options, weights=(0.25, 0.75))
    one = list(train.Batches(ranks=Ranks(), **{**how, "options": options.replaced(batch_size=4)}))
    two = [list(train.Batches(ranks=Ranks(rank, 2), **how)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two)] == one
    assert (
        list(train.Batches(ranks=Ranks(), first_step=20, **how))
        == list(train.Batches(ranks=Ranks(), **how))[2 * 20 :]
    )
    drawn = np.bincount(np.concatenate(one), minlength=16)
    assert abs(drawn[:5].sum() / drawn.sum() - 0.25) < 0.05 and drawn.min() >= 3


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("mix")
    for name, seed, num in (("a", 1, 3), ("b", 50, 5)):
        recipe = Recipe(num, 5, 32, 48, seed=seed, variety="simple", cache_only=True, val=1)
        synth(root / name, recipe)
    return root


SMALL = """--height=32 --width=48 --num_frames=5 --batch_size=2 --num_workers=0 --save_every=2
--log_every=1 --eval_every=2 --eval_clips=9 --max_steps=4""".split()


def test_a_run_on_two_sets_resumes_bitwise_and_evaluates_on_both(two_sets, tmp_path):
    folders = f"--data_dir={two_sets}/a:0.5,{two_sets}/b:0.5"
    start = ["config/tiny0.py", folders, *SMALL]
    code, text = train_here(*start, f"--out_dir={tmp_path}/whole")
    assert code == 0 and "clips 8 + 2 val" in text
    train_here(*start[:2], *SMALL[:-1], "--max_steps=2", f"--out_dir={tmp_path}/cut")
    code, text = train_here(*start, f"--out_dir={tmp_path}/cut")
    assert code == 0
    a, b = (load_file(tmp_path / name / "step-4.safetensors") for name in ("whole", "cut"))
    assert all((a[k] == b[k]).all() for k in a)


class Part(list):
    def __init__(self, items, folder):
        super().__init__(items)
        self.empty_text = pathlib.Path(folder, "text_empty")


def test_a_mix_is_one_dataset_of_one_kind_of_caches():
    mix = Mix([Part("ab", "x/cache/k"), Part("cde", "y/cache/k")], [0.5, 0.5])
    assert len(mix) == 5 and "".join(mix[i] for i in range(5)) == "abcde" and mix.sizes == [2, 3]
    assert "".join(mix[i] for i in mix.turns) == "acbde"  # so an evaluation of few sees both
    with pytest.raises(ValueError, match="x/cache/k and y/cache/m: encoded by other encoder"):
        Mix([Part("ab", "x/cache/k"), Part("c", "y/cache/m")], [0.5, 0.5])


def test_a_dataset_without_training_clips_is_not_left_out_in_silence(monkeypatch):
    """Its share went to the others; one without validation clips is no fault."""
    lacking = {("b", "val")}

    def clips(folder, split, *_):
        if (folder, split) in lacking:
            raise EmptySplit(f"{folder}: no samples in split {split!r}")
        return Part("ab", "x/cache/k")

    monkeypatch.setattr(train, "CachedClips", clips)
    options = options_of(train, data_dir="a:0.5,b:0.5")
    found = train.open_clips(options, None)
    assert found["train"].sizes == [2, 2] and found["val"].sizes == [2]
    lacking.add(("b", "train"))
    with pytest.raises(ValueError, match="b: no samples in split 'train'"):
        train.open_clips(options, None)
    lacking.remove(("b", "val"))  # of an evaluation, the baseline alone asks for training clips
    found = train.open_clips(options.replaced(eval_only=True), None)
    assert found["train"].sizes == [2] and found["val"].sizes == [2, 2]


def test_an_epoch_of_each_dataset_of_a_mix_is_ordered_once():
    options = options_of(train, batch_size=8, max_steps=40, seed=3)
    train.order_of_epoch.cache_clear()
    list(train.Batches([200, 300, 400], options, Ranks(), weights=(0.2, 0.3, 0.5)))
    assert train.order_of_epoch.cache_info().misses == 3


def test_text_of_another_width_is_named_before_the_first_step(two_sets, tmp_path):
    start = ["config/tiny0.py", f"--data_dir={two_sets}/a", *SMALL, f"--out_dir={tmp_path}/o"]
    code, text = train_here(*start, "--model_overrides={'text_dim': 32}")
    said = f"{code}{text}"
    assert "text of width 64; the model takes 32" in said and "Traceback" not in said
