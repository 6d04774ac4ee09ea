"""What app.py shows, as HTML: pictures, errors, how far a world is, and a finished one; app.css is
its style."""

import base64
import html
import shutil
import threading
import time
import urllib.parse
from pathlib import Path

from lib.export import EXPORTS, describe
from lib.files import read_json
from lib.pictures import write_png


def address(path):
    """Where the page serves a file."""
    return "gradio_api/file=" + urllib.parse.quote(str(path))


def alarm(text):
    return f'<p role="alert">{html.escape(text)}</p>'


def figure(image, caption, folder):
    write_png(folder / "picture.png", image)
    data = base64.b64encode((folder / "picture.png").read_bytes()).decode()
    picture = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def show_world(folder, names, command):
    """A finished world: its page, videos, numbers, files, and the command that makes it."""
    report, files, videos, page = read_json(folder / "report.json"), [], [], ""
    for name in (*names, "report.json"):
        file = folder / EXPORTS.get(name, (name,))[0]
        if file.is_dir():
            file = Path(shutil.make_archive(file, "zip", file))
        size = file.stat().st_size / 1e3
        files.append(
            f'<li><a download href="{address(file)}">{file.name}</a> ({size:,.0f} kB)</li>'
        )
        if file.suffix == ".mp4":
            how = f'controls loop muted aria-label="{name}"'
            videos.append(f'<video {how} src="{address(file)}"></video>')
        if file.suffix == ".html":  # sandbox: it reads nothing of the page around it
            page = (
                f'<iframe title="the world" sandbox="allow-scripts" src="{address(file)}"></iframe>'
            )
    lines = map(html.escape, describe(report, report["settings"]["unit"]))
    return (
        f'<div class="world">{page}<div class="side">{"".join(videos)}</div>'
        f"<p>{'</p><p>'.join(lines)}</p><h3>Files</h3><ul>{''.join(files)}</ul>"
        f"<h3>The same world again</h3><pre tabindex=0>{html.escape(command)}</pre></div>"
    )


class Stopped(Exception):
    """Somebody pressed Stop, or closed the page."""


class Job:
    """One world in the making: noted by the thread that makes it, read by the page."""

    def __init__(self, folder):
        self.folder = folder
        self.stop = threading.Event()
        self.phase, self.done, self.total = "waiting for the world before", 0, 0
        self.since = time.monotonic()
        self.preview = None  # a finished picture

    def bar(self, phase, items, unit):
        """As sample.bar: pass the items on and note how far it is; ends the job where told to."""
        self.phase, self.total, self.since = f"{phase}, {unit}", len(items), time.monotonic()
        for self.done, item in enumerate(items):
            if self.stop.is_set():
                raise Stopped
            self.preview = max(self.folder.glob("preview/*.png"), default=None)
            yield item

    def show(self):
        """How far it is."""
        text = f"{self.phase} {self.done + 1} of {self.total}" if self.total else self.phase
        if self.done:
            left = (time.monotonic() - self.since) * (self.total - self.done) / self.done
            text += f", about {left:.0f} s left"
        bar = (
            f'<progress max="{self.total or 1}" value="{self.done}" aria-label="{text}"></progress>'
        )
        alt = "the first frame so far, and the depth of five frames"
        picture = f'<img alt="{alt}" src="{address(self.preview)}">' if self.preview else ""
        return f'<p role="status">{text}</p>{bar}{picture}'
