"""What app.py is told, as options of sample.py, and what it shows, as HTML: pictures, errors, how
far a world is, and a finished one; app.css is its style."""

import base64
import html
import shutil
import threading
import time
import urllib.parse
from concurrent.futures import wait
from pathlib import Path

from lib.export import describe, files_of
from lib.files import read_json
from lib.pictures import write_png

KINDS = ("named move", "key frames", "camera file")  # of a camera


def typed(form, settled, folder):
    """A form -> the options of sample.py that differ from the settled ones, which are left to the
    checkpoint; uploaded files are copied into the folder."""
    form = {k: v for k, v in form.items() if v not in (None, "", []) or k == "prompt"}
    kind, keys, files = form.pop("kind"), form.pop("keys", ()), form.pop("files", ())
    if form["prompt"].lower().endswith(".txt"):
        raise ValueError("--prompt: wanted words; a file of prompts is for sample.py")
    if kind == "key frames":
        form["camera"] = key_frames(keys)
    elif kind == "camera file":
        form["camera"] = placed(files, folder / "camera")
    for key in {"image", "end_image"} & set(form):
        form[key] = placed([form[key]], folder / key)
    form["export"] = ",".join(form.get("export", ()))
    form["scene_scale"] = f"{form.get('scene_scale', 1):.9g}"
    return {k: v for k, v in form.items() if v != getattr(settled, k)}


def placed(files, folder):
    """Copy uploaded files into a new folder -> the copy, or else the folder."""
    folder.mkdir()
    copies = [shutil.copy(file, folder) for file in files]
    return str(copies[0] if len(copies) == 1 else folder)


def key_frames(table):
    """Rows of time, from and to -> the text of --camera; empty rows are left out."""
    parts = []
    for row in table:
        at, *cells = (str(cell).strip() for cell in row)
        if any(cells):
            at = f"{at}: " if at else ""
            parts.append(f"{at}{','.join(cells[:3])} -> {','.join(cells[3:])}")
    return " | ".join(parts) or "->"


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
    for file in map(folder.joinpath, (*files_of(names), "report.json")):
        if file.is_dir():
            file = Path(shutil.make_archive(file, "zip", file))
        size, url = file.stat().st_size / 1e3, address(file)
        files.append(f'<li><a download href="{url}">{file.name}</a> ({size:,.0f} kB)</li>')
        if file.suffix == ".mp4":
            videos.append(f'<video controls loop muted title="{file.stem}" src="{url}"></video>')
        if file.suffix == ".html":  # sandbox: it reads nothing of the page around it
            page = f'<iframe title="the world" sandbox="allow-scripts" src="{url}"></iframe>'
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

    def __init__(self, folder, before=None):
        self.folder = folder
        self.spent, self.before = {}, before or {}  # seconds of each phase; of the world before
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
        self.spent[self.phase] = time.monotonic() - self.since

    def follow(self, made):
        """How far it is, again and again until the future is done; leaving earlier ends the job."""
        try:
            while not made.done():
                yield self.show()
                wait([made], 0.4)
        finally:
            self.stop.set()

    def show(self):
        """How far it is."""
        text = f"{self.phase} {self.done + 1} of {self.total}" if self.total else self.phase
        if self.done:
            left = (time.monotonic() - self.since) * (self.total - self.done) / self.done
            ahead = self.before.keys() - self.spent.keys() - {self.phase}
            text += f", about {left + sum(self.before[p] for p in ahead):.0f} s left"
        bar = f'<progress max={self.total or 1} value={self.done} aria-label="{text}"></progress>'
        alt = "the first frame so far, and the depth of five frames"
        picture = f'<img alt="{alt}" src="{address(self.preview)}">' if self.preview else ""
        return f'<p role="status">{text}</p>{bar}{picture}'
