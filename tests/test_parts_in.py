"""Parts of a recording that belong together, one of which is missing, damaged or unsure."""

import numpy as np
import pytest
from recordings import H, T, W, clip, monst3r

from data import load_clip, load_samples
from lib import importers

C = clip()


@pytest.fixture
def src(tmp_path):
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


def imported(src, capsys):
    """What the import of src says, and the clip that it has made, or None."""
    names, _ = importers.run(src, src.parent / "out")
    made = load_clip(load_samples(src.parent / "out")[0], H, W, 5) if names else None
    return capsys.readouterr().out, made


def test_each_frame_keeps_its_own_focal_length_where_others_have_no_depth(src, capsys):
    """Seen: "operands could not be broadcast together" for eight depth maps of nine pictures."""
    monst3r(src, C)
    (src / "frame_0002.npy").unlink()
    focal = 60 + np.arange(T)
    rows = [[f, 0, W / 2, 0, f, H / 2, 0, 0, 1] for f in focal]
    np.savetxt(src / "pred_intrinsics.txt", rows)
    said, made = imported(src, capsys)
    assert "1 frames without depth left out: 2" in said
    np.testing.assert_allclose(made["intrinsics"][:, 0, 0], focal[[0, 1, 3, 4, 5]])


def test_too_few_focal_lengths_are_named(src, capsys):
    monst3r(src, C)
    np.savetxt(src / "pred_intrinsics.txt", np.tile(np.eye(3).ravel(), (4, 1)))
    said = f"{src}/pred_intrinsics.txt: 4 lines for 9 poses; wanted one for each"
    assert said in imported(src, capsys)[0]
