"""Lists of samples, and samples shared among ranks: torchrun's agent on the shipped miniature."""

import json
from pathlib import Path

import numpy as np
import pytest
from small import command_here, ranks_here

import sample
from lib import jobs

ROOT = Path(__file__).parents[1]
# Half the size that it was trained for, two steps: quick, and every part works.
QUICK = f"--ckpt={ROOT}/tiny/fantasyworld.safetensors --device=cpu --steps=2 --export=npz".split()
QUICK += "--frames=5 --height=48 --width=80".split()
KNOWN = {key: value for key, value in vars(sample).items() if isinstance(value, sample.option)}


def depth(folder):
    return np.load(folder / "depth.npz")["depth"]


def write_list(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"--jobs={path}"


def test_two_ranks_share_a_list_skip_what_is_done_and_name_what_is_bad(tmp_path):
    room = str(ROOT / "examples" / "room.jpg")
    jobs_of = write_list(
        tmp_path / "list.jsonl",
        dict(id="plain", seed=1),
        dict(id="turn", image=room, camera="pan_left", seed=2),
        dict(id="lost", image="nowhere.jpg"),
        dict(id="../outside", seed=3),
        dict(id="loud", amount="very"),
        dict(id="last", prompt="a room with a red ball", seed=4, steps=1),
    )
    out = tmp_path / "out"
    code, text = command_here("sample.py", *QUICK, f"--out={tmp_path}/one", "--seed=1")
    assert code == 0, text
    code, text = ranks_here(2, "sample.py", *QUICK, jobs_of, f"--out={out}")
    assert code == 1 and 'sample.py", line' not in text  # no traceback of ours
    assert "3 of 6 jobs failed" in text
    for words in (
        "list.jsonl:4: id = '../outside'",
        "list.jsonl:5: amount = 'very'",
        "nowhere.jpg",
    ):
        assert words in text
    assert sorted(p.name for p in out.iterdir()) == ["last", "plain", "turn"]
    np.testing.assert_array_equal(depth(out / "plain"), depth(tmp_path / "one"))
    report = json.loads((out / "turn" / "report.json").read_text())
    assert (report["settings"]["camera"], report["settings"]["seed"]) == ("pan_left", 2)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("depth.npz")}
    (out / "last" / "report.json").unlink()  # as if it had been killed there
    code, text = command_here("sample.py", *QUICK, jobs_of, f"--out={out}")
    assert code == 2 and "2 of 6 samples are there already" in text and "3 of 6 jobs failed" in text
    again = {p.parent.name for p in out.rglob("depth.npz") if p.stat().st_mtime_ns != stamps[p]}
    assert again == {"last"}


def test_two_ranks_take_one_guidance_pass_each_of_a_single_job(tmp_path):
    code, text = command_here("sample.py", *QUICK, f"--out={tmp_path}/one", "--guidance=3")
    assert code == 0, text
    more = (f"--out={tmp_path}/two", "--guidance=3", "--preview_every=2")
    code, text = ranks_here(2, "sample.py", *QUICK, *more)
    assert code == 0, text
    assert text.count("depth.npz report.json") == 1  # the second rank writes nothing
    one, two = (depth(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)
    assert not np.array_equal(one, depth_without_guidance(tmp_path))
    assert [p.name for p in (tmp_path / "two" / "preview").iterdir()] == ["step-0002.png"]


def depth_without_guidance(tmp_path):
    assert command_here("sample.py", *QUICK, f"--out={tmp_path}/none", "--guidance=1")[0] == 0
    return depth(tmp_path / "none")


@pytest.mark.parametrize(
    "line, words",
    [
        ("\n{", "not JSON"),
        ("\n[1]", "wanted an object"),
        ('\n{"id": "a", "id": "b"}', "a key is there twice"),
        ("\n{" + '"a":{' * 10**5, "not JSON"),
        ("\n\xff\xfe", "not JSON"),
        ({}, "id = None"),
        ({"id": 7}, "id = 7"),
        ({"id": ".."}, "id = '..'"),
        ({"id": "a/b"}, "id = 'a/b'"),
        ({"id": "a\\b"}, "letters, digits"),
        ({"id": "x" * 61}, "up to 60"),
        ({"id": "a\n"}, "letters, digits"),
        ({"id": "First"}, "id First stands in "),
        ({"id": "b", "height": 64}, "unknown option 'height'"),
        ({"id": "b", "sede": 1}, "did you mean 'seed'"),
        ({"id": "b", "seed": -1}, "seed = -1, wanted at least 0"),
        ({"id": "b", "prompt": "words.txt"}, "--prompt words.txt: wanted words"),
        ({"id": "b", "amount": 2, "camera": "0,0,0 -> 0,0,1 | 0,0,1 -> 0,0,2"}, "--amount would"),
        ({"id": "b", "camera_stride": 2}, "--camera_stride would change nothing: --camera orbit"),
        ({"id": "b", "camera": "orbitt"}, "unknown camera move 'orbitt'"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_planned(tmp_path, line, words):
    text = line if isinstance(line, str) else "\n" + json.dumps(line)
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "first"}\n' + text[1:].encode("latin-1") + b"\n\n")
    given = sample.config.apply(vars(sample), [*QUICK, f"--jobs={path}", f"--out={tmp_path}/out"])
    meta = sample.metadata_of_ckpt(given.ckpt)
    prepare = sample.partial(sample.prepared, meta=meta)
    plan = jobs.plan_jobs(given, meta, ["npz"], prepare, KNOWN)
    assert [job.out.name for job in plan.jobs] == ["first"]
    assert len(plan.failed) == 1 and plan.failed[0].startswith(f"{path}:2: ")
    assert words in plan.failed[0] and len(plan.failed[0]) < 500


def test_an_option_that_the_camera_ignores_is_named_and_a_list_may_have_it_for_others(tmp_path):
    """Seen: --camera orbit --camera_stride 4 and --camera FILE --amount 2, without a word."""
    meta = sample.metadata_of_ckpt(QUICK[0].partition("=")[2])
    prepare = sample.partial(sample.prepared, meta=meta)
    frames = "--camera=0,0,0 -> 0,0,1 | 0,0,1 -> 0,0,2"

    def planned(*more):
        said = [*QUICK, *more, f"--out={tmp_path}/out"]
        given = sample.config.apply(vars(sample), said)
        return jobs.plan_jobs(given, meta, ["npz"], prepare, KNOWN)

    for more in (["--camera_stride=2"], ["--camera_size=4x5"], [frames, "--amount=2"]):
        with pytest.raises(ValueError, match=f"{more[-1][:8]}.* would change nothing: --camera"):
            planned(*more)
    usual = dict(camera_stride=1, camera_size="", amount=1.0)  # a table has a cell for each
    lines = [dict(id="a"), dict(id="b", camera=frames[9:]), dict(usual, id="c", camera=frames[9:])]
    assert len(planned(write_list(tmp_path / "l.jsonl", *lines), "--amount=2").jobs) == 3


def test_a_list_that_is_none_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for more, words in (
        ([f"--jobs={tmp_path}/empty.jsonl"], "no job in it"),
        (["--jobs=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ([f"--jobs={tmp_path}/empty.jsonl", "--num_samples=2"], "empty.jsonl is a list of jobs"),
    ):
        code, text = command_here("sample.py", *QUICK, *more)
        assert code == 2 and words in text and text.count("\n") == 1, text
