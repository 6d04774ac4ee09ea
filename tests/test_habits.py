"""Folders, names and files as people have them: nothing of theirs is lost, or wrong unnoticed."""

import json
import math
import os

import numpy as np
import pytest
import torch
from recordings import H, T, W, clip, colmap, counts, da3, nerfstudio, re10k, sevenscenes, tum
from small import command_here, options_of

import data
import sample
from data import load_samples
from encoders import MINIATURE, PromptTokenizer
from lib import caches, camera_files, files, importers
from lib.camera_paths import View, load_camera
from lib.distributed import check_device
from lib.evaluate import mean_rows
from lib.export import check_out
from lib.guards import one_line
from lib.jobs import PER_JOB, STAMPS, attempt, check_writable, plan_jobs, read_line
from lib.layouts import beside
from lib.listing import MARK, is_id
from lib.pictures import write_png, write_video
from lib.windows import Encoding


@pytest.fixture
def source(tmp_path):
    (tmp_path / "src").mkdir()
    re10k(tmp_path / "src", clip())
    return tmp_path / "src"


# ---- import
def test_an_import_deletes_no_folder_that_no_import_has_made(source, tmp_path):
    out = tmp_path / "out"
    for name in ("mine", "cache"):
        (out / name).mkdir(parents=True)
        (out / name / "kept.txt").write_text("a user's own")
        with pytest.raises(ValueError, match=f"{name}: is there and no import has made it"):
            importers.run(source, out, name=name)
        assert (out / name / "kept.txt").read_text() == "a user's own"
    for name in (".", "..", "./x", "a/b", "", "kitchen.2024", "x" * 201, "text_empty"):
        assert not is_id(name)
        if name:
            with pytest.raises(ValueError, match="wanted a folder's name"):
                importers.run(source, out, name=name)
    # What was killed between its folder and its entry is made again.
    (out / "one").mkdir()
    (out / "one" / MARK).touch()
    assert importers.run(source, out, name="one") == (["one"], 0)
    assert not (out / "one" / MARK).exists()


def test_samples_of_a_dataset_without_a_list_stay_in_it(source, tmp_path):
    out = tmp_path / "out"
    importers.run(source, out, name="first")
    (out / "metadata.json").unlink()
    importers.run(source, out, name="second")
    assert [s["id"] for s in load_samples(out)] == ["first", "second"]
    for text in ("null", '"abc"', '{"samples": null}', "[1]"):
        (out / "metadata.json").write_text(text)
        with pytest.raises(ValueError, match="metadata.json: wanted a list"):
            importers.run(source, out, name="third")


def test_recordings_of_one_name_get_one_each_and_go_on(tmp_path):
    for name in ("2024.01.05", "2024.01.06", "a b", "a_b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        colmap(tmp_path / "src" / name, clip())
    for _ in range(2):  # the second time all are there
        names, failed = importers.run(tmp_path / "src", tmp_path / "out")
        assert failed == 0 and sorted(names) == ["2024_01_05", "2024_01_06", "a_b", "a_b_2"]
    with pytest.raises(ValueError, match="--fps 0: wanted"):
        importers.run(tmp_path / "src", tmp_path / "out", fps=0.0)
    with pytest.raises(ValueError, match="--size 47x64: wanted even sides"):  # seen: after a frame
        importers.run(tmp_path / "src", tmp_path / "out", size=(47, 64))


def test_depth_counts_of_a_transforms_file_have_the_unit_that_it_says(tmp_path):
    (tmp_path / "src").mkdir()
    nerfstudio(tmp_path / "src", clip())
    path = tmp_path / "src" / "transforms.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(dict(said, depth_unit_scale_factor=0.0001)))
    importers.run(tmp_path / "src", tmp_path / "out")
    assert load_samples(tmp_path / "out")[0]["unit"].scale == 0.0001


def test_times_before_zero_and_blanks_before_them_are_read(tmp_path, capsys):
    """Lines that begin so were taken for headings; a pose of zeros, of a lost frame, for none."""
    src = tmp_path / "src"
    src.mkdir()
    tum(src, clip())
    start = 1305031102.3
    for kind in ("rgb", "depth"):
        rows = [x.split() for x in (src / f"{kind}.txt").read_text().splitlines()[1:]]
        text = "".join(f" {float(time) - start:.6f} {name}\n" for time, name in rows)
        (src / f"{kind}.txt").write_text("# heading\n" + text)
    rows = np.loadtxt(src / "groundtruth.txt")
    rows[:, 0] -= start
    rows[:2, 1:] = 0
    np.savetxt(src / "groundtruth.txt", rows, header="Büro", encoding="latin1")
    assert importers.run(src, tmp_path / "out", intrinsics=(51, 51, 32, 24)) == (["src"], 0)
    assert "1 frames whose pose was lost left out: 0" in capsys.readouterr().out
    assert len(camera_files.read(tmp_path / "out/src/camera_params.txt")[0]) == T - 2


def test_depth_of_7_scenes_that_others_have_projected_into_the_colours_is_the_one(tmp_path):
    """SimpleRecon's and the benchmarks' *.depth.proj.png lie beside *.depth.png, of one number."""
    src, c = tmp_path / "src", clip()
    src.mkdir()
    sevenscenes(src, c)
    counts(src / "seq-01", dict(c, mm=c["mm"] + 7), "frame-{:06d}.depth.proj.png")
    assert importers.run(src, tmp_path / "out") == (["seq-01"], 0)
    made = files.read_array(tmp_path / "out/seq-01/depth/frame_0000.png")
    assert (made == c["mm"][0] + 7).all()


def test_null_in_a_transforms_file_is_what_it_does_not_say(tmp_path):
    nerfstudio(tmp_path, clip())
    told = json.loads((tmp_path / "transforms.json").read_text())
    text = json.dumps(dict(told, distortion_params=None, applied_scale=None))
    (tmp_path / "transforms.json").write_text(text)
    assert importers.run(tmp_path, tmp_path.parent / "out")[1] == 0


def test_pictures_that_are_turned_against_their_camera_are_refused(tmp_path, capsys):
    """As photos that were turned after they had been labelled."""
    c = clip()
    (tmp_path / "src").mkdir()
    colmap(tmp_path / "src", dict(c, rgb=c["rgb"].swapaxes(1, 2)))
    assert importers.run(tmp_path / "src", tmp_path / "out") == ([], 1)
    assert f"picture 0 is {H}x{W}, its camera {W}x{H}" in capsys.readouterr().out


def test_a_video_of_more_frames_than_an_archive_has_depth_is_refused(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    c = clip()
    da3(tmp_path / "src", c)
    frames = np.concatenate([c["rgb"], c["rgb"]])
    write_video(tmp_path / "long.mp4", frames, 10)
    wishes = dict(pictures=str(tmp_path / "long.mp4"))
    assert importers.run(tmp_path / "src", tmp_path / "out", **wishes) == ([], 1)
    assert f"{2 * T} pictures, {T} depth maps; wanted one each" in capsys.readouterr().out


def test_depth_of_two_cameras_of_a_rig_is_not_mixed(tmp_path):
    for side in ("left", "right"):
        (tmp_path / side).mkdir()
        np.save(tmp_path / side / "0001.npy", np.zeros(1))
    np.save(tmp_path / "0001.npy", np.zeros(1))
    names = ["left/0001.png", "right/0001.png"]
    assert beside(tmp_path, names) == {n: (tmp_path / n).with_suffix(".npy") for n in names}
    (tmp_path / "left" / "0001.npy").unlink()  # 0001.npy could be of either
    assert list(beside(tmp_path, names)) == names[1:]
    assert beside(tmp_path, ["a/0001.jpg"]) == {"a/0001.jpg": tmp_path / "0001.npy"}


# ---- datasets and caches
def test_an_id_with_a_dot_is_no_window_of_another(tmp_path, monkeypatch):
    folder = tmp_path / "5x32x48-kind"
    folder.mkdir()
    for name in ("walk", "walk.2", "walk.0004"):
        (folder / f"{name}.safetensors").touch()
    seen = []
    monkeypatch.setattr(caches, "check_header", lambda path, name, *_: seen.append(name) or ({}, 1))
    monkeypatch.setattr(caches, "check_values", lambda *_: ({}, {}))
    caches.check_folder(folder, dict(walk={}), (5, 32, 48))
    assert sorted(seen) == ["walk", "walk.0004"]


def test_a_link_to_nowhere_beside_pictures_does_not_end_the_doctor(tmp_path):
    write_video(tmp_path / "v.mp4", clip()["rgb"], 10)
    (tmp_path / "frames").mkdir()
    for t, frame in enumerate(files.read_video(tmp_path / "v.mp4")[0]):
        write_png(tmp_path / "frames" / f"{t:03d}.png", frame)
    os.symlink("user@host.123:456", tmp_path / "frames" / ".#notes")
    assert files.video_facts(tmp_path / "frames")[0] == T


def test_windows_that_cannot_be_are_refused():
    for wrong in (dict(windows=0), dict(windows=0, window_seed=1), dict(start=-3)):
        with pytest.raises(ValueError, match="--windows of 1 or more"):
            Encoding(**wrong)


def test_a_clip_without_a_value_is_left_out_of_its_mean():
    rows = [dict(a=dict(x=1.0, y=math.nan)), dict(a=dict(x=math.nan, y=math.nan))]
    mean = mean_rows(rows)["a"]
    assert mean["x"] == 1.0 and math.isnan(mean["y"])


# ---- sampling
def test_reports_and_cameras_of_a_user_are_not_replaced(tmp_path):
    for name, exports in (("report.json", ["npz"]), ("cameras_predicted.txt", ["cameras"])):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} is there and was not made by sample.py"):
            check_out(tmp_path, exports)
        (tmp_path / name).unlink()
    assert check_out(tmp_path, ["npz", "cameras"]) == tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "0,0,0 -> nan,0,1 | 0,0,1 -> 0,0,2",
        "0,0,0 -> 0,0,inf | 0,0,1 -> 0,0,2",
        "0,0,0 -> 0,0,1",
        "0: 0,0,0 -> 0,0,2 | 5: 1,0,0 -> 0,0,2",  # seconds: a fifth of the way was gone
    ],
)
def test_a_camera_of_no_numbers_is_refused_before_the_sampling(text):
    with pytest.raises(ValueError, match="--camera"):
        load_camera(text, 5, (32, 48))


def test_a_move_beyond_all_lengths_is_refused():
    with pytest.raises(ValueError, match="--camera forward: its camera goes too far or nowhere"):
        load_camera("forward", 5, (32, 48), View(amount=1e300))


def test_sampling_names_the_command_that_settles_a_camera_file(tmp_path, monkeypatch):
    path, out = tmp_path / "kitti.txt", str(tmp_path / "out.npz")
    c2w = np.tile(np.eye(3, 4), (5, 1, 1))
    c2w[:, 0, 3] = range(5)
    np.savetxt(path, c2w.reshape(5, 12))
    with pytest.raises(ValueError, match="python data.py cameras IN OUT.npz") as caught:
        load_camera(str(path), 5, (32, 48))
    command = str(caught.value).split("give python ")[1].replace("w2c|c2w", "c2w").split()
    told = {"IN": str(path), "OUT.npz": out}
    monkeypatch.setattr("sys.argv", [told.get(word, word) for word in command])
    data.command()
    assert load_camera(out, 5, (32, 48))[0][0, :, 0, 3].tolist() == [0, -1, -2, -3, -4]
    with pytest.raises(ValueError, match="a name that ends with .npz, such as"):
        camera_files.write(tmp_path / "out.txt", "npz", c2w)  # was out.txt.npz


def test_a_move_is_a_move_although_a_folder_is_called_so(tmp_path, monkeypatch):
    """As after --camera orbit --out orbit, the second time."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("orbit")
    assert load_camera("orbit", 5, (32, 48))[0].shape == (1, 5, 3, 4)
    with pytest.raises(ValueError, match="unknown camera move ''"):
        load_camera("", 5, (32, 48))


def test_text_of_a_windows_editor_is_read(tmp_path):
    row = "{} .5 .7 .5 .5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n"
    tree = dict(w=48, h=32, fl_x=40, fl_y=40)
    tree["frames"] = [dict(file_path=str(t), transform_matrix=np.eye(4).tolist()) for t in range(5)]
    for name, text in (
        ("a.txt", "".join(map(row.format, range(5)))),
        ("b.txt", "0 0 0 0 0 0 0 1\n" * 5),
        ("c.json", json.dumps(tree)),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_camera(str(tmp_path / name), 5, (32, 48))[0].shape == (1, 5, 3, 4)
    (tmp_path / "d.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "d.json") == dict(a=1)


def test_half_letters_of_a_prompt_are_one_unknown_letter_each():
    """Of a command in Latin-1, or of JSON that was cut: the tokenizer raised a TypeError."""
    tokens = PromptTokenizer(f"{MINIATURE}/google/umt5-xxl")
    ids, mask = tokens(["caf\udce9", "caf\ufffd", "\ud83d\ude00", "\U0001f600"])
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[2], ids[3]) and mask.any(1).all()


def test_a_sample_of_another_file_of_the_same_name_is_not_there_already(tmp_path):
    image, lora, out = tmp_path / "start.png", tmp_path / "x.safetensors", tmp_path / "out" / "a"
    poses = tmp_path / "poses" / "0.txt"
    poses.parent.mkdir()
    image.write_bytes(b"one"), lora.write_bytes(b"one"), poses.write_bytes(b"one")
    (tmp_path / "list").write_text('{"id": "a"}\n')
    told = dict(jobs=str(tmp_path / "list"), image=str(image), out=str(out.parent))
    told |= dict(lora=f"{lora},{lora}", camera=str(poses.parent), amount=1.0)

    def plan():
        options = options_of(sample, **told)
        return plan_jobs(options, dict(step="1"), [], lambda job: (job, None), vars(sample))

    out.mkdir(parents=True)
    settings = plan().jobs[0].settings
    (out / ".sample").write_text("[]")
    assert settings["files"] == f"3:{image.stat().st_mtime_ns}"  # as a list of before says it
    for unsaid in (STAMPS, ("loras", "folders"), ("folders",), ()):  # by older ones
        same = {k: v for k, v in settings.items() if k not in unsaid}
        (out / "report.json").write_text(json.dumps(dict(settings=same)))
        assert (plan().there, plan().jobs) == (1, [])
    for file in (image, lora, poses):
        file.write_bytes(b"another")
        assert (plan().there, len(plan().jobs)) == (0, 1)
        settings = plan().jobs[0].settings
        (out / "report.json").write_text(json.dumps(dict(settings=settings)))


def test_results_without_a_place_are_refused_before_the_sampling(tmp_path):
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "inside" / "deeper"):
        with pytest.raises(ValueError, match="taken is no folder to write into"):
            check_writable(out)
        with pytest.raises(ValueError, match="taken is no folder to write into"):
            plan_jobs(options_of(sample, out=str(out)), {}, [], None, {})
    for out in (
        tmp_path / ("long" * 64),
        tmp_path.joinpath("/proc/worlds"),
    ):  # the last: of root too
        with pytest.raises(ValueError, match="is no folder to write into .* Choose another"):
            check_writable(out)
    with pytest.raises(ValueError, match="taken is there and was not made by sample.py"):
        check_out(tmp_path / "taken", ["npz"])  # one of several samples
    check_writable(tmp_path / "new" / "newer")
    assert not (tmp_path / "new").exists()


def test_binary_is_for_colmap(tmp_path):
    w2c = np.tile(np.eye(3, 4), (3, 1, 1))
    with pytest.raises(ValueError, match="--binary is for --to colmap, not for tum"):
        camera_files.write(tmp_path / "out.txt", "tum", w2c, binary=True)
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize("name", ["cuda:99", "foo", "meta", "mps"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"--device {name}: torch finds none here"):
        check_device(name)
    code, said = command_here(
        "sample.py", "--ckpt", "tiny/fantasyworld.safetensors", "--device", name
    )
    assert code == 2 and f"--device {name}: torch finds none here" in said
    assert check_device("cpu") == "cpu"
    assert check_device("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")


def test_memory_that_a_cpu_does_not_have_is_one_line_and_one_job():
    failed = []

    def large():
        return torch.empty(1 << 48)

    assert attempt(large, "out/a", failed) is None and failed[0].startswith("out/a: ")
    with pytest.raises(RuntimeError) as caught:
        large()
    assert one_line(caught.value, "Try less").endswith("Try less")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        attempt(lambda: (_ for _ in ()).throw(RuntimeError("a fault of ours")), "out/a", failed)


def test_a_scene_scale_of_a_job_may_be_a_number_or_a_text():
    known = {key: value for key, value in vars(sample).items() if key in PER_JOB}
    for value in (2.5, "2.5"):
        line = json.dumps(dict(id="a", scene_scale=value)).encode()
        assert read_line(line, "list:1", known) == ("a", dict(scene_scale="2.5"))


# ---- names and what was killed
def test_an_import_killed_before_its_entry_goes_on_where_nothing_is_listed_yet(source, tmp_path):
    out = tmp_path / "out"
    importers.run(source, out, name="walk")
    (out / "metadata.json").unlink()
    (out / "walk" / MARK).touch()
    assert importers.run(source, out, name="walk") == (["walk"], 0)
    assert len(load_samples(out)) == 1
    (out / "SHA256SUMS").write_text(f"{'0' * 64}  metadata.json\n")
    with pytest.raises(ValueError, match="its SHA256SUMS lists metadata.json"):
        importers.run(source, out, name="other")


def test_names_of_long_and_reserved_folders_are_ids(tmp_path):
    for name in ("\u6f22" * 60, "text_empty", "x" * 250, "...", "a.2024"):
        assert is_id(importers.name_of(tmp_path, tmp_path / name)), name
