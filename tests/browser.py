"""Headless Chromium over its debugging pipe: open a page, run JavaScript, take a picture, read the
console.

Messages are JSON with a closing zero byte, on file descriptors 3 (to the browser) and 4 (from
it)."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

BROWSER = next(
    filter(
        None,
        map(
            shutil.which,
            ("chromium-headless-shell", "chromium", "google-chrome", "chromium-browser"),
        ),
    ),
    None,
)


class Page:
    def __init__(self, to, back):
        self.to, self.back, self.buffer, self.count, self.session = to, back, b"", 0, None
        self.problems = []  # console errors and uncaught exceptions
        self.requests = []  # addresses that the page asked for

    def receive(self, deadline):
        while b"\0" not in self.buffer:
            if not select.select([self.back], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            self.buffer += os.read(self.back, 1 << 20)
        message, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(message)
        what, detail = message.get("method"), message.get("params", {})
        if what == "Runtime.exceptionThrown":
            self.problems.append(
                detail["exceptionDetails"].get("exception", {}).get("description", "exception")
            )
        if what == "Runtime.consoleAPICalled" and detail["type"] in ("error", "warning"):
            self.problems.append(str([a.get("value") for a in detail["args"]]))
        if what == "Network.requestWillBeSent":
            self.requests.append(detail["request"]["url"])
        if what == "Log.entryAdded" and detail["entry"]["level"] == "error":
            self.problems.append(detail["entry"]["text"])
        return message

    def call(self, method, timeout=60, **parameters):
        self.count += 1
        message = dict(id=self.count, method=method, params=parameters)
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            answer = self.receive(deadline)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def run(self, script):
        """Value of a JavaScript expression; promises are awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def resize(self, width, height, ratio=1, mobile=False):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=ratio,
            mobile=mobile,
        )


@contextlib.contextmanager
def opened(path, width=1280, height=800):
    """The page of a file, loaded, without network, or of an address; software WebGL."""
    address = str(path) if str(path).startswith("http") else f"file://{os.path.abspath(path)}"
    to_read, to = os.pipe()
    back, back_write = os.pipe()
    script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                "bash",
                "-c",
                script,
                "sh",
                str(to_read),
                str(back_write),
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--use-gl=angle",
                "--use-angle=swiftshader",
                "--enable-unsafe-swiftshader",
                "--remote-debugging-pipe",
                "--disable-dev-shm-usage",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            pass_fds=(to_read, back_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read), os.close(back_write)
        page = Page(to, back)
        try:
            target = page.call("Target.createTarget", url="about:blank")["targetId"]
            page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
            for domain in ("Runtime", "Log", "Page", "Network"):
                page.call(f"{domain}.enable")
            page.call(
                "Network.emulateNetworkConditions",
                offline=address.startswith("file"),
                latency=0,
                downloadThroughput=-1,
                uploadThroughput=-1,
            )
            page.resize(width, height)
            page.call("Page.navigate", url=address)
            deadline = time.monotonic() + 60
            while not page.run("document.readyState === 'complete'"):
                assert time.monotonic() < deadline, "the page does not load"
                time.sleep(0.05)
            yield page
        finally:
            with contextlib.suppress(OSError, TimeoutError):
                os.write(to, b'{"id": 0, "method": "Browser.close"}\0')
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(to), os.close(back)
