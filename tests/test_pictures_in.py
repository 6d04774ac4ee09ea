"""Pictures of other people's programs as start images: content decides, not the name."""

import json
import re
import shutil
import struct
import subprocess
import zlib

import imageio_ffmpeg
import numpy as np
import pytest

import sample
from lib import files, importers, rasters
from lib.camera_files import read_cameras
from lib.files import read_video
from lib.pictures import write_png

FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """make(name) -> a test picture of that ending, larger than 2.7 kB, and one uncompressed."""
    folder = tmp_path_factory.mktemp("pictures")

    def make(name, *how, source="testsrc2=size=320x240"):
        path = folder / name
        lavfi = ["-f", "lavfi", "-i", source, "-frames:v", "1", *how]
        subprocess.run([*FFMPEG, *lavfi, str(path)], check=True, timeout=60)
        return path

    return make


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "tiff", "webp"])
@pytest.mark.parametrize("name", ["a.{}", "IMG 0001 [1] %03d.{}", "noname", "wrong.mp4"])
def test_a_picture_is_read_whatever_its_name_is(photo, tmp_path, ending, name):
    source = photo(f"source.{ending}")
    path = tmp_path / name.format(ending)
    shutil.copy(source, path)
    want = read_video(photo("same.png"), 1)[0][0].astype(float)
    got = read_video(path, 1)[0][0].astype(float)
    assert got.shape == (240, 320, 3) and np.abs(got - want).mean() < 8  # chroma at half size
    assert sample.load_image(path, 48, 64).shape == (1, 3, 1, 48, 64)


def test_names_in_capitals_and_lies(photo, tmp_path):
    jpeg, png = photo("b.jpg"), photo("b.png")
    shutil.copy(jpeg, tmp_path / "IMG_0001.JPG")
    shutil.copy(jpeg, tmp_path / "is_a_jpeg.png")
    shutil.copy(png, tmp_path / "is_a_png.jpeg")
    for path in tmp_path.iterdir():
        assert read_video(path, 1)[0].shape == (1, 240, 320, 3)


def test_what_follows_a_jpeg_is_no_damage(photo, tmp_path):
    """Phones append a second picture or notes of their own."""
    jpeg = photo("c.jpg").read_bytes()
    want = read_video(photo("c.jpg"), 1)[0]
    for tail in (jpeg, b"SEFH" + bytes(range(256)) * 20):
        (tmp_path / "c.jpg").write_bytes(jpeg + tail)
        np.testing.assert_array_equal(read_video(tmp_path / "c.jpg", 1)[0], want)


@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
def test_transparent_pixels_show_white(photo, ending):
    how = ["-lossless", "1"] if ending == "webp" else []
    path = photo(f"clear.{ending}", *how, source="color=red@0.0:size=64x48,format=rgba")
    assert (read_video(path, 1)[0] == 255).all()
    half = photo(f"half.{ending}", *how, source="color=red@0.5:size=64x48,format=rgba")
    assert np.abs(read_video(half, 1)[0].astype(int) - [255, 128, 128]).max() <= 2


def test_an_opaque_picture_with_an_alpha_channel_is_untouched(photo):
    noise = "testsrc2=size=64x48,format=rgb24"
    plain = read_video(photo("plain.png", source=noise), 1)[0]
    alpha = photo("alpha.png", source=f"{noise},format=rgba")
    np.testing.assert_array_equal(read_video(alpha, 1)[0], plain)
    alpha = photo("alpha.tiff", source=f"{noise},format=rgba")
    np.testing.assert_array_equal(read_video(alpha, 1)[0], plain)


def test_the_black_of_a_photo_for_print_is_no_transparency():
    """ffmpeg calls the four colours of a CMYK JPEG gbrap, and reads them right."""
    sign = rasters.ALPHA
    assert not re.search(sign, b"Video: mjpeg (Baseline), gbrap(bt470bg), 160x96, 25 fps")
    assert re.search(sign, b"Video: tiff, gbrap, 160x96, 25 fps")


@pytest.mark.parametrize(
    "head, kind",
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC or AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "HEIC or AVIF"),
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "HEIC or AVIF"),
        (b"GIF89a\x10\0\x10\0", "GIF"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (b"\x76\x2f\x31\x01\2\0\0\0", "OpenEXR"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"RIFF\x24\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0", "animated WebP"),
    ],
)
def test_other_pictures_are_refused_by_their_true_kind(tmp_path, head, kind):
    (tmp_path / "photo.jpg").write_bytes(head + bytes(5000))
    with pytest.raises(ValueError, match=f"photo.jpg: .*{kind}.*save it as JPEG or PNG"):
        read_video(tmp_path / "photo.jpg", 1)


def test_a_tiff_with_jpeg_inside_is_refused_for_it_would_be_black(photo, tmp_path):
    for tag, text in ((b"\3\1\3\0\1\0\0\0", b"\7\0"), (b"\1\3\0\3\0\0\0\1", b"\0\7")):
        data = photo("lzw.tiff", "-compression_algo", "lzw").read_bytes()
        place = data.index(b"\3\1\3\0\1\0\0\0\5\0")  # Compression, a short, one, LZW
        (tmp_path / "a.tif").write_bytes(data[:place] + tag + text + data[place + 10 :])
        with pytest.raises(ValueError, match="TIFF with JPEG inside: save it as JPEG or PNG"):
            read_video(tmp_path / "a.tif", 1)
    assert read_video(photo("lzw.tiff"), 1)[0].any()


def test_a_picture_of_a_few_pixels_is_cut_to_one_of_them_at_least(photo):
    path = photo("thin.png", source="testsrc2=size=4x300")
    assert sample.load_image(path, 96, 1600).shape == (1, 3, 1, 96, 1600)


def test_a_cut_picture_is_damaged_not_grey(photo, tmp_path):
    for ending in ("jpg", "png", "bmp"):
        data = photo(f"d.{ending}").read_bytes()
        (tmp_path / f"d.{ending}").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"d.{ending}: not a readable video"):
            read_video(tmp_path / f"d.{ending}", 1)


def test_a_scene_that_says_no_size_has_that_of_its_photos_as_they_lie(photo, tmp_path):
    """Blender's layout with a phone's photos: their EXIF turns them, nerfstudio does not."""
    jpeg = photo("e.jpg").read_bytes()
    turn = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\6\0\0\0\0\0\0"
    frames = []
    for t in range(5):
        size = (len(turn) + 2).to_bytes(2, "big")
        (tmp_path / f"{t}.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + size + turn + jpeg[2:])
        matrix = np.eye(4)
        matrix[0, 3] = t
        frames.append(dict(file_path=str(t), transform_matrix=matrix.tolist()))
    assert read_video(tmp_path / "0.jpg", 1)[0].shape == (1, 320, 240, 3)
    text = json.dumps(dict(camera_angle_x=1.0, frames=frames))
    (tmp_path / "transforms_train.json").write_text(text)
    out = tmp_path.parent / f"{tmp_path.name}_out"
    assert importers.run(tmp_path, out)[1] == 0
    fx, fy = read_cameras(out / "transforms_train/camera_params.txt")[1][0, :2]
    assert fx * 320 == pytest.approx(fy * 240) == pytest.approx(160 / np.tan(0.5))


@pytest.mark.parametrize("text", ["# Read me\n", "<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_a_text_for_a_picture_is_told_what_kinds_are_read(tmp_path, text):
    """Seen: --image README.md: "Invalid data found when processing input"."""
    (tmp_path / "a.md").write_text(text * 50)
    with pytest.raises(ValueError, match="a.md: not a readable video or picture: no mp4.*PNG"):
        sample.load_image(tmp_path / "a.md", 32, 32)


@pytest.mark.parametrize("other", ["", "size", "twice", "turned", "HDR"])
def test_alike_pngs_are_decoded_by_one_process_and_others_each_by_its_own(
    tmp_path, monkeypatch, other
):
    """-autoscale 0 ends ffmpeg 7 and newer: 300 pictures took 301 processes, 7 s for 0.1.  In a
    stream, those of another size or turning come out wrong, and two in a file shift the rest."""
    paths = [tmp_path / f"{t}.png" for t in range(4)]
    for t, path in enumerate(paths):
        write_png(path, np.full((16, 24 + 8 * (other == "size" and t == 2), 3), 60 * t, np.uint8))
    body = paths[1].read_bytes()
    chunk = dict(turned=b"eXIfMM\0*\0\0\0\x08\0\x01\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    chunk = chunk.get(other, b"cICP\x09\x10\0\1" * (other == "HDR"))
    if chunk:
        ends = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
        paths[1].write_bytes(body[:33] + ends[0] + chunk + ends[1] + body[33:])
    paths[2].write_bytes(paths[2].read_bytes() * (1 + (other == "twice")))
    begun, popen = [], subprocess.Popen
    monkeypatch.setattr(
        files.subprocess, "Popen", lambda *a, **k: begun.append(a) or popen(*a, **k)
    )
    if other == "HDR":
        with pytest.raises(ValueError, match="1.png: HDR colours"):
            list(files.read_stills(paths))
        return
    seen = list(files.read_stills(paths))
    assert len(begun) == (3 if other else 1) and len(seen) == 4
    assert all((frame == 60 * t).all() for t, frame in enumerate(seen))
    assert [frame.shape[1] for frame in seen[1:3]] == dict(size=[24, 32], turned=[16, 24]).get(
        other, [24, 24]
    )
