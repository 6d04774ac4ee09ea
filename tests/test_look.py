"""data.py view: the sheet and the pages of the ground truth."""

import json
import sys

import numpy as np
import pytest
from browser import BROWSER, opened
from recordings import WRITERS, clip

import data
from lib import importers, look
from lib.camera_files import read_table
from lib.files import read_video
from lib.page import write_page


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("view")
    (root / "src").mkdir()
    for name in ("good", "bad"):
        (root / "src" / name).mkdir()
        WRITERS["kitti"](root / "src" / name, clip())
    importers.run(root / "src", root / "set", prompt="a room </script>")
    path = root / "set" / "bad" / "camera_params.txt"
    table = read_table(path)
    table[5, 10] += 1.0  # one pose is wrong
    np.savetxt(path, table)
    return root / "set"


def test_the_truth_is_a_scene_as_the_model_gets_it(dataset):
    (sample,) = [s for s in data.load_samples(dataset) if s["id"] == "good"]
    scene = look.true_scene(data.load_clip(sample, 48, 64, 9))
    c = clip()
    mean = np.linalg.norm(scene.points[0][scene.depth[0] > 0], axis=-1)
    assert abs(np.sort(mean)[: int(0.95 * len(mean))].mean() - 1) < 0.02  # scene units
    ratio = c["mm"][0] / 1000 / scene.depth[0]
    assert np.ptp(ratio) < 1e-4 * ratio.mean()
    assert np.abs(scene.w2c[0] - np.eye(3, 4)).max() < 1e-6 and scene.rgb.shape == (9, 48, 64, 3)
    assert f"1 scene unit = {ratio.mean():.4g} m" in scene.report["facts"]


def test_the_command_writes_a_sheet_pages_and_the_worst_pair(dataset, capsys, monkeypatch):
    command = ["data.py", "view", str(dataset), "good", "bad"]
    monkeypatch.setattr(sys, "argv", command)
    data.command()
    text = capsys.readouterr().out
    out = dataset / "view"
    assert f"{out}/sheet.png: 2 samples" in text and f"{out}/good/scene.html" in text
    sheet = read_video(out / "sheet.png")[0]
    assert sheet.shape[1] > 2 * look.HIGH and sheet.std() > 20
    page = (out / "good" / "scene.html").read_text()
    assert "a room \\u003c/script>" in page and "Agrees with itself" in page
    assert "mean angle between predicted" not in page
    assert "worst_pair.png (frames " in text and (out / "bad" / "worst_pair.png").is_file()
    found = text.split("worst_pair.png (frames ")[1].split(")")[0]
    assert "5" in found.split(" and ")
    monkeypatch.setattr(sys, "argv", ["data.py", "view", str(dataset), "none"])
    with pytest.raises(ValueError, match="no sample 'none'"):
        data.command()
    monkeypatch.setattr(sys, "argv", [*command, "--size", "33x64"])
    with pytest.raises(ValueError, match="--size 33x64: wanted even sides"):
        data.command()
    assert json.loads((dataset / "metadata.json").read_text())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (apt-get install chromium-headless-shell)")
def test_the_page_of_a_ground_truth_goes_to_another_frame_and_complains_of_nothing(
    dataset, tmp_path
):
    (sample,) = [s for s in data.load_samples(dataset) if s["id"] == "good"]
    write_page(look.true_scene(data.load_clip(sample, 48, 64, 9)), tmp_path / "scene.html")
    with opened(tmp_path / "scene.html") as page:
        assert page.run("viewer.show(3), viewer.state.frame") == 3
        assert "frame 4 of 9" in page.run("document.getElementById('clock').textContent")
        assert not page.problems


def test_a_failed_verify_ends_with_the_line_that_opens_it(dataset, capsys):
    assert data.verify(dataset) == 1
    assert f"python data.py view {dataset} bad" in capsys.readouterr().out
