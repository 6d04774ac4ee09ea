"""app.py in a real browser: a world, Stop, errors, a second visitor, no other server."""

import base64
import http.client
import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
from browser import BROWSER, opened

import config
import sample
from lib.files import read_video

ROOT = pathlib.Path(__file__).parents[1]
gradio = pytest.importorskip("gradio", reason="no gradio (pip install -r requirements-app.txt)")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here (apt-get install chromium-headless-shell)"
)

# Loaded by every Python that starts: writes down and refuses what leaves this machine.
GUARD = """
import os, socket
connect, find = socket.socket.connect, socket.getaddrinfo
def note(host):
    if str(host) not in ("127.0.0.1", "localhost", "0.0.0.0", "::1", "None"):
        open(os.environ["GUARD_LOG"], "a").write(f"{host}\\n")
        raise OSError("no network in this test")
def guarded(self, address):
    if self.family != socket.AF_UNIX:
        note(address[0])
    return connect(self, address)
def found(host, *more, **how):
    note(host)
    return find(host, *more, **how)
socket.socket.connect, socket.getaddrinfo = guarded, found
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The running page: address, folder, and the log of what left the machine."""
    home = tmp_path_factory.mktemp("app")
    (home / "sitecustomize.py").write_text(GUARD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = home / "network.log"
    environment = os.environ | dict(PYTHONPATH=str(home), GUARD_LOG=str(log), OMP_NUM_THREADS="1")
    environment.pop("PYTHONUNBUFFERED", None)  # its words go to a file, as of `app.py > log`
    arguments = [f"--out={home / 'out'}", f"--port={port}", "--frames=5", "--steps=2", "--keep=2"]
    arguments += ["--upload=1", "--preview_every=1"]
    with open(home / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, "app.py", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=said,
        )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    while "Running on" not in (home / "said").read_text():
        assert process.poll() is None and time.monotonic() < deadline, (home / "said").read_text()
        time.sleep(0.1)
    yield address, home / "out", log
    process.terminate()
    process.wait(20)


def wait(page, script, seconds=120):
    """Wait until a JavaScript expression is true."""
    deadline = time.monotonic() + seconds
    while not page.run(f"!!({script})"):
        shown = page.run("document.body.innerText")
        assert time.monotonic() < deadline, f"{script}: {shown}"
        time.sleep(0.05)


NOTES = "['seen', 'status'].map(x => document.getElementById(x).innerText).join(' ')"
BUTTON = "[...document.querySelectorAll('button')].find(x => x.textContent.includes('%s'))"
FIELD = (
    "[...document.querySelectorAll('label')].find(x => x.innerText.includes('%s'))"
    ".querySelector('input,textarea')"
)


def ready(page):
    """Wait until the form is there and the camera path is drawn; files can be chosen then."""
    page.call("DOM.enable")
    wait(page, BUTTON % "Make" + " && document.querySelectorAll('figure img').length")


def fill(page, label, value):
    """Type over what stands in a field."""
    page.run(f"{FIELD % label}.focus(), {FIELD % label}.select()")
    page.call("Input.insertText", text=str(value))
    page.run(f"{FIELD % label}.dispatchEvent(new Event('change', {{bubbles: true}}))")


LABEL_ENDS_BEFORE_X = """(() => {
  const x = document.querySelector('button[aria-label=Clear]').getBoundingClientRect();
  const words = document.createRange(), labels = [...document.querySelectorAll('label')];
  words.selectNodeContents(labels.find(l => l.innerText.includes('Start image')));
  return words.getBoundingClientRect().right <= x.left; })()"""


def press(page, key, code):
    text = {"text": "\r"} if key == "Enter" else {}
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)


def choose(page, file):
    """Choose a file as the start image, in place of the one that is there."""
    remove = "document.querySelector('button[aria-label=Clear]')?.click()"
    page.run(remove)
    wait(page, "document.querySelector('input[type=file]')")
    found = page.call("Runtime.evaluate", expression="document.querySelector('input[type=file]')")
    page.call("DOM.setFileInputFiles", objectId=found["result"]["objectId"], files=[str(file)])


def finished(page, seconds=120):
    wait(page, f"{NOTES}.includes('Done') && document.querySelector('.world pre')", seconds)


def pixels(page, path, box):
    """What the screen shows of a box (x, y, width, height)."""
    box = [box[0], box[1] + page.run("scrollY"), *box[2:]]
    clip = dict(zip(("x", "y", "width", "height"), box), scale=1)
    shot = page.call("Page.captureScreenshot", format="png", clip=clip)["data"]
    path.write_bytes(base64.b64decode(shot))
    return read_video(path)[0][0].astype(int)


@needs_browser
def test_a_world_is_made_turned_and_downloaded_and_its_command_makes_it_again(app, tmp_path):
    address, out, log = app
    with opened(address, 1280, 1000) as page:
        ready(page)
        choose(page, ROOT / "examples" / "room.jpg")
        wait(page, "document.querySelectorAll('figure img').length == 2")  # image and path
        for width in (1100, 390, 1280):  # the narrowest column of two, one column, as before
            page.resize(width, 1000)
            wait(page, LABEL_ENDS_BEFORE_X, 10)
        fill(page, "Prompt", "a room with <b>'quotes'</b> & \"more\"")
        page.run(BUTTON % "Make" + ".focus()")
        press(page, "Enter", 13)
        wait(page, f"/ of [0-9]/.test({NOTES})")
        wait(
            page,
            "document.querySelector('#status img')?.naturalWidth == 6 * 162 - 2",
        )
        finished(page)
        (folder,) = (out / "worlds").iterdir()

        page.run("document.querySelector('iframe').scrollIntoView()")
        box = page.run(
            "(b => [b.x + 20, b.y + 60, b.width - 60, 250])"
            "(document.querySelector('iframe').getBoundingClientRect())"
        )
        x, y = box[0] + 200, box[1] + 100
        deadline = time.monotonic() + 60  # until the points are drawn
        while np.ptp(before := pixels(page, tmp_path / "a.png", box)) < 100:
            assert time.monotonic() < deadline
        mouse = dict(button="left", buttons=1, clickCount=1)
        page.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **mouse)
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + 90, y=y + 20, **mouse)
        page.call("Input.dispatchMouseEvent", type="mouseReleased", x=x + 90, y=y + 20, **mouse)
        time.sleep(0.5)
        after = pixels(page, tmp_path / "b.png", box)
        assert (np.abs(after - before).max(-1) > 12).mean() > 0.02

        page.call(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "got")
        )
        names = page.run("[...document.querySelectorAll('a[download]')].map(a => a.pathname)")
        names = [pathlib.Path(urllib.parse.unquote(name)).name for name in names]
        assert {"points.ply", "depth.npz", "video.mp4", "scene.html", "report.json"} <= set(names)
        page.run(f"document.querySelectorAll('a[download]')[{names.index('points.ply')}].click()")
        got, deadline = tmp_path / "got" / "points.ply", time.monotonic() + 60
        while not got.exists() or got.stat().st_size != (folder / got.name).stat().st_size:
            assert time.monotonic() < deadline, list(tmp_path.iterdir())
            time.sleep(0.05)
        assert got.read_bytes() == (folder / "points.ply").read_bytes()

        outside = [u for u in page.requests if not u.startswith((address, "data:", "blob:"))]
        assert not outside and not log.exists(), (outside, log)
        command = page.run("document.querySelector('.world pre').innerText")
    same_again(command, folder, tmp_path / "again")


def same_again(command, folder, out):
    """Run the command that the page shows, into another folder: all that it makes is the same."""
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "sample.py")
    os.chdir(ROOT)
    sample.main(config.apply(vars(sample), [*arguments, f"--out={out}"]))
    for name in ("report.json", "points.ply", "cameras.txt", "sheet.png"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name


@needs_browser
def test_stop_ends_a_job_within_a_step_and_a_fault_is_the_line_of_the_command(app, tmp_path):
    address, out, _ = app
    with opened(address, 1280, 1000) as page:
        ready(page)
        fill(page, "Steps", 900)
        page.run(BUTTON % "Make" + ".click()")
        wait(page, f"{NOTES}.includes('sampling')")
        before = len(list((out / "worlds").iterdir()))
        page.run(BUTTON % "Stop" + ".click()")
        wait(page, f"{NOTES}.includes('Stopped')", 20)
        deadline = time.monotonic() + 5
        while len(list((out / "worlds").iterdir())) == before:  # what was not whole leaves
            assert time.monotonic() < deadline
        label = "[...document.querySelectorAll('label')].find(x => x.innerText == '%s').click()"
        page.run(label % "camera file")
        wait(page, f"{NOTES}.includes('camera: missing or of no known format')")
        page.run(label % "named move")
        wait(page, "document.querySelectorAll('figure img').length == 1")
        fill(page, "Steps", 2)
        fill(page, "Prompt", "kept")
        fill(page, "Frames", 6)
        page.run(BUTTON % "Make" + ".click()")
        said = "--frames 6 --height 96 --width 160: wanted 4k + 1 frames"
        wait(page, f"document.getElementById('status').innerText.includes('{said}')")
        assert page.run(FIELD % "Prompt" + ".value") == "kept"
        fill(page, "Frames", 5)

        (tmp_path / "words.jpg").write_text("no picture")
        choose(page, tmp_path / "words.jpg")
        wait(page, f"{NOTES}.includes('not a readable video')")
        with pytest.raises(ValueError) as error:
            sample.load_image(tmp_path / "words.jpg", 96, 160)
        line = str(error.value).partition("words.jpg")[2]
        wait(page, f"{NOTES}.includes({json.dumps(line)})")
        (tmp_path / "large.jpg").write_bytes(bytes(2_000_000))  # more than --upload=1
        choose(page, tmp_path / "large.jpg")
        wait(page, "document.body.innerText.includes('maximum')")
        assert page.run(FIELD % "Prompt" + ".value") == "kept"


@needs_browser
def test_a_second_visitor_sees_the_place_in_the_queue_and_a_closed_page_frees_it(app):
    address, out, _ = app
    with opened(address, 1280, 1000) as second:
        ready(second)
        with opened(address, 1280, 1000) as first:
            ready(first)
            fill(first, "Steps", 900)
            first.run(BUTTON % "Make" + ".click()")
            wait(first, f"{NOTES}.includes('sampling')")
            fill(second, "Prompt", "the second")
            second.run(BUTTON % "Make" + ".click()")
            wait(second, "/queue: 1.1/.test(document.body.innerText)")
            assert "sampling" not in second.run(NOTES)
        finished(second)  # the first is closed
        command = second.run("document.querySelector('.world pre').innerText")
        assert "--prompt=the second" in shlex.split(command)


TREE = "Accessibility.getFullAXTree"
CONTROLS = ("button", "textbox", "spinbutton", "checkbox", "radio", "combobox", "listbox")


@needs_browser
def test_every_control_has_a_name_the_keyboard_reaches_all_and_a_narrow_window_holds_them(app):
    with opened(app[0], 1280, 1000) as page:
        ready(page)
        nodes = [n for n in page.call(TREE)["nodes"] if not n.get("ignored")]
        controls = [n for n in nodes if n["role"]["value"] in CONTROLS]
        nameless = [n for n in controls if not n.get("name", {}).get("value", "").strip()]
        assert len(controls) > 25 and not nameless, [
            page.call("DOM.describeNode", backendNodeId=n["backendDOMNodeId"])["node"]["attributes"]
            for n in nameless
        ]
        wanted = page.run("[...document.querySelectorAll('button,input,textarea')].length")
        seen = set()
        for _ in range(wanted + 10):
            press(page, "Tab", 9)
            seen.add(
                page.run(
                    "(e => e.innerText || e.ariaLabel || e.value || e.name)(document.activeElement)"
                )
            )
        assert {"Make the world", "Stop", "a room", "Move", "named move"} <= seen, seen
        page.resize(390, 800, mobile=True)
        time.sleep(0.3)
        assert page.run("document.documentElement.scrollWidth") <= 390


def get(address, path):
    """Status of a request whose path is sent as it stands."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request("GET", path)
    return connection.getresponse().status


def test_files_outside_the_worlds_are_not_served(app):
    address, out, _ = app
    (out / "private.txt").write_text("mine")
    world = out / "worlds" / "00000000-000000-test"
    world.mkdir(exist_ok=True)
    (world / "scene.html").write_text("a page")
    (world / "link").symlink_to("/etc/passwd")
    assert get(address, f"/gradio_api/file={world}/scene.html") == 200
    for path in (
        "/etc/passwd",
        ROOT / "app.py",
        out / "private.txt",
        f"{world}/link",
        f"{world}/../../private.txt",
        f"{world}/%2e%2e/%2e%2e/private.txt",
        "app.py",
    ):
        assert get(address, f"/gradio_api/file={path}") == 403, path


def test_no_request_can_name_a_file_of_this_machine_as_its_upload_or_camera(app):
    address, _, _ = app
    with urllib.request.urlopen(f"{address}/config") as answer:
        page = json.load(answer)
    parts = {part["id"]: part["props"] for part in page["components"]}
    (look,) = (each for each in page["dependencies"] if each["api_name"] == "look")
    labels = [parts[i]["label"] for i in look["inputs"]]
    usual = [parts[i].get("value") for i in look["inputs"]]
    stolen = dict(path=str(ROOT / "docs" / "page.png"), meta={"_type": "gradio.FileData"})
    start = next(label for label in labels if label.startswith("Start image"))
    for label, value in ((None, None), (start, stolen), ("Move", str(ROOT / "cameras.txt"))):
        data = [value if name == label else now for name, now in zip(labels, usual)]
        body = json.dumps(dict(data=data)).encode()
        where = f"{address}/gradio_api/call/look"
        kind = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(where, body, kind)) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{where}/{event}") as answer:
            said = answer.read().decode()
        assert ("event: error" in said) == (label is not None), said


def test_a_command_holds_no_option_that_sample_py_refuses_as_unread(tmp_path):
    import app  # not above: without gradio it exits

    known = {k: v for k, v in vars(sample).items() if k not in app.SEVERAL} | vars(app)
    studio = app.Studio(config.apply(known, ["--amount=2", f"--out={tmp_path}"]))
    form = dict(kind="key frames", keys=app.KEYS, prompt="a room", export=["ply"], amount=3.0)
    said, options = studio.read(dict(form, camera_format="tum", fov=50.0), tmp_path)
    assert {"--fov=50.0", "--export=ply"} <= set(said) and "->" in options.camera
    assert not [text for text in said if text.startswith(("--amount", "--camera_format"))]
    afraid = app.Studio(config.apply(known, ["--negative_prompt=fog", f"--out={tmp_path}"]))
    for guidance, told in ((1.0, False), (3.0, True)):  # sample.py refuses it beside 1
        said, _ = afraid.read(dict(form, guidance=guidance), tmp_path)
        assert ("--negative_prompt=fog" in said) == told
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken is no folder to write into .* Choose another"):
        app.Studio(config.apply(known, [f"--out={tmp_path / 'taken'}"]))


def test_without_gradio_one_line_says_how_to_install_it(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError(\"No module named 'gradio'\")")
    environment = os.environ | dict(PYTHONPATH=str(tmp_path))
    command = [sys.executable, "app.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = "app.py: No module named 'gradio'. Fix: pip install -r requirements-app.txt\n"
    assert (done.returncode, done.stderr) == (2, said)
