"""Camera files of strangers: flipped, cut and swapped bytes end in one line that names the file."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from recordings import WRITERS, c2w_of, clip, lens_of, seven

import data
from lib import camera_files

TRIALS = int(os.environ.get("MUTANTS", 12))
SIZE = (48, 64)


def write_all(root):
    """name -> (path, options) of a camera file of every format."""
    c = clip()
    for name in ("redwood", "sevenscenes", "kitti", "tartanair", "vipe", "da3", "megasam"):
        (root / name).mkdir()
        WRITERS[name](root / name, c)
    given = dict(w2c=c["w2c"], intrinsics=lens_of(c), size=SIZE)
    for form in ("re10k", "fantasyworld", "nerfstudio", "npz", "colmap"):
        camera_files.write(root / f"a.{form}", form, **given)
    camera_files.write(root / "b.colmap", "colmap", binary=True, **given)
    stamped = np.concatenate([np.arange(9.0)[:, None], seven(c2w_of(c))], 1)
    np.savetxt(root / "a.tum", stamped)
    np.save(root / "poses.npy", c2w_of(c))
    return dict(
        re10k=(root / "a.re10k", {}),
        fantasyworld=(root / "a.fantasyworld", {}),
        nerfstudio=(root / "a.nerfstudio", {}),
        npz=(root / "a.npz", {}),
        colmap=(root / "a.colmap" / "images.txt", {}),
        binary=(root / "b.colmap" / "images.bin", {}),
        lenses=(root / "b.colmap" / "cameras.bin", {}),
        tum=(root / "a.tum", {}),
        npy=(root / "poses.npy", dict(matrices="c2w")),
        log=(root / "redwood" / "trajectory.log", {}),
        folder=(root / "sevenscenes" / "seq-01" / "frame-000003.pose.txt", {}),
        matrices=(root / "kitti" / "poses.txt", dict(matrices="c2w")),
        tartanair=(root / "tartanair" / "pose_left.txt", {}),
        vipe=(root / "vipe" / "pose" / "walk.npz", {}),
        da3=(root / "da3" / "results.npz", {}),
        megasam=(root / "megasam" / "walk_sgd_cvd_hr.npz", {}),
    )


FORMS = dict(binary="colmap", lenses="colmap", vipe="npz", da3="npz", megasam="npz")
NAMES = """re10k fantasyworld nerfstudio npz colmap binary lenses tum npy log folder matrices
tartanair vipe da3 megasam""".split()
WORDS = [b"nan ", b"1e99", b"-inf", b"\xff\xff\xff\xff", b"\0\0\0\0"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("cameras"))


def mutant(data, rng):
    """Bytes changed, cut, doubled, or replaced by words that mean something to readers."""
    data = bytearray(data)
    kind, at = rng.randrange(6), rng.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + rng.randrange(1, 40)]
    elif kind == 3:
        data[at:at] = data[: rng.randrange(60)]
    elif kind == 4:
        data[at : at + 4] = rng.choice(
            [b"nan ", b"1e99", b"-inf", b"\xff\xff\xff\xff", b"\0\0\0\0"]
        )
    else:
        data[:] = rng.choice([b"", b"{}", b"[]", b"PK\5\6" + bytes(18), b"\xef\xbb\xbf", bytes(99)])
    return bytes(data)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_camera_file_is_refused_by_name_or_read_whole(files, name):
    path, options = files[name]
    whole, rng = path.read_bytes(), random.Random(name)
    source = path if path.parent.name not in ("a.colmap", "b.colmap", "seq-01") else path.parent
    form = FORMS.get(name, name)
    try:
        for _ in range(TRIALS):
            path.write_bytes(mutant(whole, rng))
            try:
                w2c, k, _ = camera_files.read(source, form, SIZE, **options)
            except ValueError as error:
                assert str(source) in str(error) or str(path) in str(error), error
                assert len(str(error)) < 2000
                continue
            assert np.isfinite(w2c).all() and w2c.shape[1:] == (3, 4) and len(w2c)
            assert k is None or (np.isfinite(k).all() and k[:, :2].min() > 0.1)
    finally:
        path.write_bytes(whole)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_devices_and_bombs_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(2**25)
    for name, words in (
        ("pipe.txt", "not a regular file"),
        ("zero.txt", "not a regular file"),
        ("huge.txt", "bytes; wanted"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{words}"):
            camera_files.read(tmp_path / name)
    bomb = dict(w2c=np.tile(np.eye(4), (5, 1, 1)), images=np.zeros((40, 600, 800, 3), "u1"))
    np.savez_compressed(tmp_path / "bomb.npz", **bomb)
    assert camera_files.read(tmp_path / "bomb.npz")[2] == (600, 800)  # its size, without its bytes


def test_no_source_file_unpickles_or_evaluates():
    """np.load and torch.load say so where they are called; config.py alone executes a file, the
    user's own."""
    root = Path(data.__file__).parent
    for path in [*root.glob("*.py"), *root.glob("lib/*.py")]:
        text = path.read_text()
        for call in ("np.load(", "torch.load(", "read_array(file"):
            for line in (x for x in text.splitlines() if call in x):
                assert "allow_pickle=False" in line or "weights_only=True" in line, (
                    path.name,
                    line,
                )
        words = "pickle.load", "import pickle", " eval(", " exec(", "os.system", "shell=True"
        assert not any(word in text for word in words), path.name
