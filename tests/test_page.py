"""scene.html: what is inside, and how it behaves in a browser without network."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from browser import BROWSER, opened
from test_export import H, T, W, sampled

from lib import page
from lib.page import write_page
from lib.pictures import off_edges

needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here (apt-get install chromium-headless-shell)"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    scene = sampled()[0]
    scene.report.update(prompt='a </script><b>"room"</b>', warnings=["lengths are unchecked"])
    path = tmp_path_factory.mktemp("page") / "scene.html"
    write_page(scene, path)
    return scene, path


def contents(path):
    return json.loads(re.search(r"<script>const S = (.*?);</script>", path.read_text(), re.S)[1])


def test_the_page_asks_for_nothing_from_outside_and_no_prompt_can_break_it(made):
    text, data = made[1].read_text(), contents(made[1])
    assert not re.search(r"""(src|href)\s*=\s*["']?(http|//)|import |fetch\(|url\(""", text)
    assert data["title"] == 'a </script><b>"room"</b>' and text.count("</script>") == 2
    assert base64.b64decode(data["video"])[4:8] == b"ftyp" and list(made[1].parent.iterdir()) == [
        made[1]
    ]


def test_the_page_holds_depth_to_a_thousandth_and_drops_edges(made):
    scene, data = made[0], contents(made[1])
    code = np.frombuffer(base64.b64decode(data["depth"]), "<u2").reshape(T, *data["grid"])
    assert data["stride"] == 1 and data["grid"] == [H, W]
    np.testing.assert_array_equal(code > 0, off_edges(scene.depth))
    depth = 1 / (1 / data["far"] + code / 65535 * (1 / data["near"] - 1 / data["far"]))
    inside = (code > 1) & (code < 65535)
    np.testing.assert_allclose(depth[inside], scene.depth[inside], rtol=1e-3)
    rank = np.frombuffer(base64.b64decode(data["colour"]), np.uint8).reshape(T, H, W, 4)[..., 3]
    assert abs(np.mean(rank < 0.2 * 255) - 0.2) < 0.02  # a rank: 20 % are below 20 %


def test_81_frames_stay_below_15_mb_at_default_density(made, tmp_path, monkeypatch):
    """6 bytes a sample and 4 MB of video, times 4/3 in base64, and 40 kB of page and poses."""
    for size in ((336, 592), (592, 336)):
        stride = page.page_stride(81, size)
        samples = 81 * -(-size[0] // stride) * -(-size[1] // stride)
        assert 0.9e6 < samples and (6 * samples + page.PAGE_VIDEO) * 4 / 3 + 4e4 < 15e6
    noise = replace(
        made[0], rgb=np.random.default_rng(0).integers(0, 255, made[0].rgb.shape, dtype=np.uint8)
    )
    for limit, check in ((10**9, lambda n: n > 5000), (5000, lambda n: n <= 5000)):
        monkeypatch.setattr(page, "PAGE_VIDEO", limit)
        write_page(noise, tmp_path / "scene.html")
        assert check(len(base64.b64decode(contents(tmp_path / "scene.html")["video"])))


def changed(a, b):
    return np.mean(np.abs(a.astype(int) - b.astype(int)).max(-1) > 12)


SLIDE = (
    "(e => { e.value = %d; e.dispatchEvent(new Event('input')); })(document.getElementById('%s'))"
)

PIXELS = """(() => { viewer.draw();
  const g = viewer.gl, w = g.drawingBufferWidth, h = g.drawingBufferHeight,
  a = new Uint8Array(4 * w * h); g.readPixels(0, 0, w, h, g.RGBA, g.UNSIGNED_BYTE, a);
  let s = "";
  for (let i = 0; i < a.length; i += 4) s += String.fromCharCode(a[i], a[i + 1], a[i + 2]);
  return [w, h, btoa(s)]; })()"""


def pixels(browser):
    w, h, data = browser.run(PIXELS)
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(h, w, 3)


def touch(browser, kind, *points):
    browser.call(
        "Input.dispatchTouchEvent",
        type=kind,
        touchPoints=[dict(x=x, y=y, id=i) for i, (x, y) in enumerate(points)],
    )


@needs_browser
def test_the_page_draws_reacts_and_reports_no_error(made):
    with opened(made[1], 900, 600) as browser:
        first = pixels(browser)
        background = (first == first[0, 0]).all(-1).mean()
        assert 0.1 < 1 - background < 0.95, background
        assert browser.run("document.querySelector('h1').textContent") == 'a </script><b>"room"</b>'
        assert "lengths are unchecked" in browser.run("document.body.innerText")

        def after(script, least=0.01):
            before = pixels(browser)
            browser.run(script)
            assert changed(before, pixels(browser)) > least, script

        after("document.querySelector('[data-v=\"0\"][title]').click()")  # this frame alone
        after(
            SLIDE % (4, "time"),
            0.002,
        )
        assert browser.run("viewer.state.frame") == 4 and "frame 5 of 5" in browser.run(
            "document.body.innerText"
        )
        for button in (1, 2, 0):
            after(f"document.getElementById('colour').children[{button}].click()", 0.03)
        after(SLIDE % (3, "size"))
        after(SLIDE % (80, "unsure"))
        after("document.getElementById('ride').click()", 0.02)
        after("document.getElementById('reset').click()", 0.02)
        after("viewer.choose('mode', 2), viewer.slide('unsure', 0)")  # all frames, nothing hidden
        after("document.getElementById('show').children[0].click()", 0.05)
        assert browser.problems == []


@needs_browser
def test_mouse_wheel_keys_and_two_fingers_move_the_view(made):
    view = "JSON.stringify(viewer.state.view)"
    with opened(made[1], 900, 600) as browser:

        def moved(*names):
            now = json.loads(browser.run(view))
            found = {k for k in now if now[k] != moved.before[k]}
            moved.before = now
            assert found == set(names), found

        moved.before = json.loads(browser.run(view))
        mouse = lambda kind, x, y, **more: browser.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, **more
        )
        mouse("mousePressed", 200, 200, button="left", buttons=1, clickCount=1)
        mouse("mouseMoved", 260, 230, button="left", buttons=1)
        mouse("mouseReleased", 260, 230, button="left", clickCount=1)
        moved("yaw", "pitch")
        mouse("mouseWheel", 200, 200, deltaX=0, deltaY=120)
        moved("distance")
        mouse("mousePressed", 200, 200, button="right", buttons=2, clickCount=1)
        mouse("mouseMoved", 260, 230, button="right", buttons=2)
        mouse("mouseReleased", 260, 230, button="right", clickCount=1)
        moved("target")
        touch(browser, "touchStart", (200, 200))
        touch(browser, "touchMove", (240, 200))
        touch(browser, "touchEnd")
        moved("yaw")
        touch(browser, "touchStart", (200, 200), (300, 200))
        touch(browser, "touchMove", (180, 200), (320, 220))
        touch(browser, "touchEnd")
        moved("distance", "target")
        for key, check in (
            ("2", "viewer.state.colour === 1"),
            ("s", "viewer.state.mode === 1"),
            ("]", "viewer.state.size > 1.3"),
            ("ArrowRight", "viewer.state.frame === 1"),
            ("c", "viewer.state.ride"),
            ("c", "document.querySelectorAll('#ride, #colour [aria-pressed=true]').length === 2"),
            ("c", "document.querySelector('#ride').ariaPressed === 'true'"),
            ("h", "!!document.querySelector('#help.open')"),
            ("Escape", "!document.querySelector('#help.open')"),
        ):
            browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
            assert browser.run(check), key
        moved()
        for key, what in (("ArrowLeft", "yaw"), ("ArrowUp", "pitch"), ("+", "distance")):
            browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, modifiers=8)  # shift
            moved(what)
        browser.resize(600, 620)  # as in the page of app.py: lower than the list of keys
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="h")
        browser.run("document.querySelector('#help').scrollTop = 999")
        low = "[...document.querySelectorAll(%r)].pop().getBoundingClientRect().bottom"
        assert browser.run(f"{low % '#help tr'} <= {low % '#help'}")
        assert browser.problems == []


@needs_browser
def test_the_page_is_the_same_in_every_unit_of_length(made, tmp_path):
    """A world of a ten-thousandth unit had no lines, and lay elsewhere."""
    seen, scene, path = [], made[0], tmp_path / "scene.html"
    for k in (1.0, 1e-4):
        w2c, predicted = (
            np.concatenate([E[..., :3], k * E[..., 3:]], -1) for E in (scene.w2c, scene.predicted)
        )
        small = replace(scene, depth=scene.depth * np.float32(k), w2c=w2c, predicted=predicted)
        write_page(small, path)
        with opened(path, 600, 400) as browser:
            seen.append(pixels(browser))
    assert changed(*seen) < 1e-3


@needs_browser
def test_riding_a_camera_shows_its_picture_wherever_its_centre_is(made, tmp_path):
    K = made[0].intrinsics + [0, 0, -0.15, 0.1]
    write_page(replace(made[0], intrinsics=K), tmp_path / "scene.html")
    with opened(tmp_path / "scene.html", 900, 500) as browser:
        browser.run(
            "viewer.choose('mode', 0), viewer.slide('size', 2.5), viewer.slide('unsure', 0)"
        )
        browser.run("viewer.state.told = viewer.state.seen = false, viewer.ride(true)")
        shown = pixels(browser)[::-1].astype(int)
    h, w = shown.shape[:2]
    zoom = min(h / H, w / W)  # the picture fills the view one way
    rows = (h / 2 + (np.arange(H) + 0.5 - H / 2) * zoom).astype(int)
    columns = (w / 2 + (np.arange(W) + 0.5 - W / 2) * zoom).astype(int)
    gap = np.abs(shown[rows][:, columns] - made[0].rgb[0])[off_edges(made[0].depth)[0]]
    assert gap.mean() < 10  # 34 where the centre was taken for the middle


def test_pixels_of_equal_confidence_have_the_highest_rank(made):
    """1 % unsure hid every pixel of a map that is equally sure everywhere."""
    flat = replace(made[0], conf=np.ones_like(made[0].conf))
    assert (page.pack_maps(flat, 1)[1][..., 3] == 255).all()


@needs_browser
def test_nothing_lies_over_anything_on_a_phone(made):
    """The clock ran into the buttons beside it."""
    with opened(made[1], 390, 800) as browser:
        browser.resize(390, 800, mobile=True)
        wide = (
            "[...document.querySelectorAll('footer *')].filter(e => e.scrollWidth > e.clientWidth"
        )
        assert browser.run(f"{wide} && e.clientWidth).map(e => e.id)") == []
        assert browser.run("document.documentElement.scrollWidth") == 390


@needs_browser
def test_a_long_prompt_leaves_room_and_a_phone_on_its_side_shows_all(made, tmp_path):
    """Prompts of video models have a hundred words: the world lay behind them."""
    write_page(
        replace(made[0], report=dict(made[0].report, prompt="word " * 99)), tmp_path / "s.html"
    )
    with opened(tmp_path / "s.html", 390, 844) as browser:
        browser.resize(390, 844, mobile=True)
        tall = "document.querySelector('h1').clientHeight"
        assert browser.run(tall) < 100
        browser.run("document.querySelector('h1').click()")
        assert browser.run(tall) > 100
        for width in (844, 905):
            browser.resize(width, 390, mobile=True)
            assert browser.run("document.documentElement.scrollWidth") == width


@needs_browser
def test_keys_belong_to_the_control_that_tab_has_reached_and_a_lost_context_comes_back(made):
    with opened(made[1], 900, 600) as browser:

        def press(key, text=""):
            how = dict(key=key, code="Space" if key == " " else key)
            browser.call("Input.dispatchKeyEvent", type="keyDown", text=text, **how)
            browser.call("Input.dispatchKeyEvent", type="keyUp", **how)

        box = "(b => [b.x + 9, b.y + 9])(document.querySelector('#colour').getBoundingClientRect())"
        x, y = browser.run(box)
        for kind in ("mousePressed", "mouseReleased"):
            browser.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )
        press(" ", " ")
        assert browser.run("viewer.state.playing"), "a click leaves the space bar to the video"
        browser.run("viewer.play(false), document.querySelectorAll('#colour button')[1].focus()")
        press(" ", " ")
        assert browser.run("viewer.state.colour === 1 && !viewer.state.playing")
        frame = browser.run("document.getElementById('size').focus(), viewer.state.frame")
        press("ArrowRight")
        assert browser.run("viewer.state.frame") == frame and browser.run("viewer.state.size > 1.2")

        before = pixels(browser)
        browser.run("window.ext = viewer.gl.getExtension('WEBGL_lose_context'); ext.loseContext()")
        browser.run("new Promise(done => setTimeout(done, 100))")
        browser.run("ext.restoreContext(); new Promise(done => setTimeout(done, 200))")
        np.testing.assert_array_equal(pixels(browser), before)


READY = (
    "new Promise(done => { const v = document.getElementById('video'), wait = () => "
    "v.readyState > 1 ? done('plays') : v.error ? done('no codec') : setTimeout(wait, "
    "20); wait(); })"
)


@needs_browser
def test_the_video_follows_the_slider_after_play_and_pause_in_a_hurry(made):
    """play() that pause() overtakes is rejected; the page took it for a video that cannot play."""
    with opened(made[1], 900, 600) as browser:
        if browser.run(READY) != "plays":
            pytest.skip("this Chromium has no codec for the video")
        for _ in range(8):
            browser.run("viewer.play(true), viewer.play(false)")
        browser.run("new Promise(done => setTimeout(done, 200))")
        browser.run("viewer.show(3); new Promise(done => setTimeout(done, 100))")
        assert abs(browser.run("document.getElementById('video').currentTime") - 3.5 / 16) < 1e-3


@needs_browser
def test_the_video_plays_and_without_its_codec_the_points_own_colours_do(made, tmp_path):
    ended = (
        "new Promise(done => { viewer.play(true); const wait = () => viewer.state.playing ? "
        "setTimeout(wait, 30) : done(viewer.state.frame); wait(); })"
    )
    with opened(made[1], 900, 600) as browser:
        ready = browser.run(READY)
        assert browser.run(ended) == T - 1 and browser.problems == []
        assert ready == "plays" or browser.run("!document.getElementById('frame').hidden")
    text, data = made[1].read_text(), contents(made[1])
    (tmp_path / "broken.html").write_text(
        text.replace(data["video"], base64.b64encode(b"no video at all").decode())
    )
    with opened(tmp_path / "broken.html", 900, 600) as browser:
        browser.run("new Promise(done => setTimeout(done, 300))")
        assert browser.run(
            "document.getElementById('video').hidden && !document.getElementById('frame').hidden"
        )
        assert browser.run(ended) == T - 1


def test_the_page_forbids_what_it_does_not_need_and_cuts_long_text(made, tmp_path):
    policy = re.search('Content-Security-Policy" content="([^"]*)"', made[1].read_text())[1]
    assert policy.startswith("default-src 'none'") and "connect" not in policy
    scene = replace(made[0], report=dict(made[0].report, prompt="x" * 2_000_000))
    write_page(scene, tmp_path / "scene.html")
    assert len(contents(tmp_path / "scene.html")["title"]) < 600
    assert (tmp_path / "scene.html").stat().st_size < made[1].stat().st_size + 1000
