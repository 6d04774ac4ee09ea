"""Make and turn a world in the browser: a page over sample.py, which does all of the work.

    pip install -r requirements-app.txt
    python app.py                        # then open http://127.0.0.1:7860

The options of sample.py are options here too: they are what the form starts with. A form becomes
the arguments of sample.py, so that its errors are those of the command line, and the page shows the
command that makes the same world again. --out receives worlds/, a folder for each of the newest
--keep, and uploads/; the page serves nothing else."""

import html
import os
import pathlib
import secrets
import shlex
import shutil
import sys
import tempfile
import threading
import time
import urllib.parse

import config
import sample
from config import Option, option, section
from lib.camera_files import FORMATS
from lib.camera_paths import TRAVEL, TURN_AXIS, ZOOM
from lib.export import EXPORTS, describe, export_names
from lib.files import STILLS, read_json
from lib.guards import one_line, run_command
from lib.pictures import COMMANDED, as_pixels, top_view

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
except ModuleNotFoundError as error:
    print(f"app.py: {error}. Fix: pip install -r requirements-app.txt", file=sys.stderr)
    sys.exit(2)

section_8 = section("this page")
ckpt = option("tiny/fantasyworld.safetensors", "checkpoint of stage 1 or 2, or a model.pth")
out = option("outputs/app", "folder of worlds and uploads")
host = option("127.0.0.1", "address to listen at; 0.0.0.0: open to everybody who can reach it")
port = option(7860, "of the page", low=1, high=65535)
keep = option(20, "worlds that are kept, the newest", low=1)
upload = option(100, "MB that a file may have", low=1)

HERE = pathlib.Path(__file__).resolve().parent
MOVES = [*TRAVEL, *TURN_AXIS, *ZOOM, "spiral"]
KINDS = ("named move", "key frames", "camera file")
COLUMNS = ["time 0 to 1", "x", "y", "z", "look at x", "look at y", "look at z"]
KEYS = [["", 0, 0, 0, 0, 0, 1], ["", 0.2, 0, 0.2, 0, 0, 1]]
MOVIES = [".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"]
TEXTS = [".txt", ".json", ".npz", ".npy", ".bin", ".log", ".csv"]
ADVICE = "Try fewer frames or a smaller size, or start app.py with --low_memory"
# Of a command that makes several samples, or of this page: not in a form.
ELSEWHERE = ("num_samples", "preview_every")
# Nothing from other servers, whatever a component would like to load.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
CSS = """.world iframe { width: 100%; height: 620px; border: 0; border-radius: 8px; }
.world video { width: 49%; border-radius: 8px; } .world pre { white-space: pre-wrap; }
.note img { width: 100%; image-rendering: pixelated; } .note progress { width: 100%; }
.note [role=alert] { border-left: 4px solid #e5484d; padding: 6px 12px; overflow-wrap: anywhere; }
@media (max-width: 600px) { .world iframe { height: 900px; } .world video { width: 100%; } }"""


class Stopped(Exception):
    """Somebody pressed Stop, or closed the page."""


class Job:
    """One world in the making: written by the thread that makes it, read by the page."""

    def __init__(self, folder):
        self.folder = folder
        self.stop = threading.Event()
        self.phase = "waiting for the world before"
        self.done, self.total, self.since = 0, 0, time.monotonic()
        self.preview = None  # a finished picture
        self.error = ""
        self.world = ""  # of a finished one: what the page shows

    def bar(self, phase, items, unit):
        """As sample.bar: pass the items on and note how far it is; ends the job where told to."""
        self.phase, self.total, self.since = f"{phase}, {unit}", len(items), time.monotonic()
        for self.done, item in enumerate(items):
            if self.stop.is_set():
                raise Stopped
            self.preview = max(self.folder.glob("preview/*.png"), default=None)
            yield item
        self.done = self.total

    def words(self):
        """Where it is, in HTML."""
        text = self.phase
        if self.total:
            left = (time.monotonic() - self.since) * (self.total - self.done) / max(self.done, 1)
            text += f" {min(self.done + 1, self.total)} of {self.total}"
            text += f", about {left:.0f} s left" if self.done else ""
        shown = f'<p role="status">{text}</p><progress max="{self.total or 1}" value="{self.done}" '
        shown += f'aria-label="{text}"></progress>'
        if self.preview:
            alt = "first frame so far, and the depth of five frames"
            shown += f'<img alt="{alt}" src="{address(self.preview)}">'
        return shown


def address(path):
    """Where the page serves a file."""
    return "gradio_api/file=" + urllib.parse.quote(str(path))


def alarm(text):
    return f'<p role="alert">{html.escape(text)}</p>'


def placed(files, folder, name):
    """Copy uploaded files into a folder -> the copy, or for several the folder of them."""
    target = folder / name
    if len(files) == 1:
        target = target.with_suffix(pathlib.Path(files[0]).suffix.lower())
        return str(shutil.copyfile(files[0], target))
    target.mkdir()
    for file in files:
        shutil.copy(file, target)
    return str(target)


def key_frames(table):
    """Rows of COLUMNS -> the text of --camera; rows without a number are left out."""
    parts = []
    for row in table:
        time_at, *cells = (str(cell).strip() for cell in row)
        if any(cells):
            at = f"{time_at}: " if time_at else ""
            parts.append(f"{at}{','.join(cells[:3])} -> {','.join(cells[3:])}")
    return " | ".join(parts) or "->"


def world_page(folder, names, command):
    """A finished world in HTML: its page, videos, numbers, files, and the command for it."""
    report, files = read_json(folder / "report.json"), []
    for name in (*names, "report.json"):
        file = folder / EXPORTS.get(name, (name,))[0]
        file = file.with_suffix(".zip") if file.is_dir() else file
        size = f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)"
        files.append(f'<li><a download href="{address(file)}">{size}</a></li>')
    shown = []
    if "html" in names:  # an origin of its own: it reads nothing of this page
        shown.append(f'<iframe title="the world" src="{address(folder / "scene.html")}" ')
        shown.append('sandbox="allow-scripts" allow="fullscreen"></iframe>')
    for name in (name for name in ("video", "depth") if name in names):
        source = address(folder / EXPORTS[name][0])
        shown.append(f'<video controls loop muted aria-label="{name}" src="{source}"></video>')
    lines = map(html.escape, describe(report, report["settings"]["unit"]))
    shown += [f"<p>{line}</p>" for line in lines]
    shown.append(f"<h3>Files</h3><ul>{''.join(files)}</ul><h3>The same world again</h3>")
    shown.append(f"<pre tabindex=0>{html.escape(command)}</pre>")
    return f'<div class="world">{"".join(shown)}</div>'


class Studio:
    """What all visitors share: the options that app.py was started with, the model, one lock."""

    def __init__(self, options):
        shared = {k: v for k, v in vars(options).items() if isinstance(vars(sample).get(k), Option)}
        self.given = {k: v for k, v in shared.items() if k not in ELSEWHERE}
        self.meta = sample.checkpoint_of(options)
        self.settled = sample.settled(options, self.meta)
        sample.check_base(self.settled, self.meta)
        self.every = options.preview_every
        self.folder = pathlib.Path(options.out).resolve() / "worlds"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.keep = options.keep
        self.lock = threading.Lock()  # a job that was told to stop still ends its step
        self.model = None

    def arguments(self, form, folder):
        """The command line of a form; uploaded files are copied into the folder."""
        form = {key: value for key, value in form.items() if value not in (None, "", [])}
        kind, keys = form.pop("kind"), form.pop("keys", ())
        if form.get("prompt", "").endswith(".txt"):
            raise ValueError("--prompt: wanted words; a file of prompts is for sample.py")
        if "image" in form:
            form["image"] = placed([form["image"]], folder, "start")
        files = form.pop("files", ())
        if kind == "key frames":
            form["camera"] = key_frames(keys)
        elif kind == "camera file":
            if not files:
                raise ValueError("--camera: no camera file was chosen")
            form["camera"] = placed(files, folder, "camera")
        form["export"] = ",".join(form.get("export", ()))
        # What stands there as it stood at first is left to the checkpoint.
        same = {k for k, v in form.items() if v == getattr(self.settled, k, None)}
        values = self.given | {key: form[key] for key in form if key not in same}
        values["prompt"] = form.get("prompt", "")
        declared = {key: vars(sample)[key].default for key in values if key != "out"}
        return [f"--{k}={values[k]}" for k in declared if values[k] != declared[k]]

    def options(self, arguments, folder):
        """The options that sample.py makes of its arguments, for a world in the folder."""
        options = config.apply(vars(sample), arguments)
        return options.replaced(out=str(folder), preview_every=self.every or 2)

    def make(self, form, job):
        """Make a world; -> what the page shows of it."""
        job.folder.mkdir()
        arguments = self.arguments(form, job.folder)
        asked = self.options(arguments, job.folder)
        names = export_names(asked.export)
        options, camera = sample.prepared(asked, self.meta)
        (one,) = sample.plan_jobs(options, self.meta, names)
        how = dict(model=self.model, bar=job.bar)
        resources = sample.load(options, self.meta, [one], camera, **how)
        self.model = resources.model
        sample.make_one(options, one, self.meta, resources, names, job.bar)
        for place in filter(pathlib.Path.is_dir, [job.folder / EXPORTS[name][0] for name in names]):
            shutil.make_archive(place, "zip", job.folder, place.name)
        return world_page(job.folder, names, shlex.join(["python", "sample.py", *arguments]))

    def work(self, form, job):
        """make, whose every end is noted for the page; what is not whole leaves."""
        with self.lock:
            try:
                if not job.stop.is_set():
                    job.world = self.make(form, job)
                for old in sorted(self.folder.glob("[0-9]*-*-*"))[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
            except Stopped:
                job.error = "Stopped."
            except Exception as error:
                job.error = "a fault of the program; the terminal says more"
                job.error = one_line(error, ADVICE)
            finally:
                if not job.world:
                    shutil.rmtree(job.folder, ignore_errors=True)

    def look(self, form):
        """The start image as the model sees it, the camera path from above, and what is wrong."""
        start = path = None
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as folder:
            try:
                arguments = self.arguments(form, pathlib.Path(folder))
                options = self.options(arguments, folder)
                options, (w2c, _) = sample.prepared(options, self.meta)
                path = top_view([(w2c[0].double().numpy(), COMMANDED)], (240, 400))
                if options.image:
                    start = as_pixels(sample.image_of(options, self.meta)[0])[0]
            except Exception as error:
                return start, path, alarm(one_line(error, ADVICE).replace(folder + os.sep, ""))
        return start, path, ""

    def run(self, form):
        """Make a world in a thread, and yield what the page shows: where it is, and the world.

        gradio closes this generator when Stop is pressed or the page is closed."""
        name = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(4)  # not to be guessed
        job = Job(self.folder / name)
        thread = threading.Thread(target=self.work, args=(form, job), daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                yield job.words(), gr.skip()
                thread.join(0.4)
        finally:
            job.stop.set()
        if job.world:
            yield '<p role="status">Done. The world is below.</p>', job.world
        else:
            yield alarm(job.error.replace(f"{job.folder}{os.sep}", "")), gr.skip()


# -------------------------------------------------------------------------------------------- page
def image_part(settled):
    """Start image, examples, and the image as it is cut; -> components by option."""
    kinds = [*STILLS, *MOVIES]
    image = gr.File(label="Start image (a picture, or a video's first frame)", file_types=kinds)
    pictures = [[str(file)] for file in sorted((HERE / "examples").glob("room*.jpg"))]
    shown = gr.Image(render=False)
    examples = gr.Dataset(components=[shown], samples=pictures, type="values", label="Examples")
    examples.click(lambda row: row[0], examples, image, show_progress="hidden")
    prompt = gr.Textbox(settled.prompt, label="Prompt", lines=2, max_length=2000)
    return dict(image=image, prompt=prompt)


def camera_part(settled):
    """A move, key frames, or a file; -> components by option."""
    kind = gr.Radio(KINDS, value=KINDS[0], label="Camera")
    with gr.Group() as moves:
        known = list(dict.fromkeys([settled.camera, *MOVES]))
        camera = gr.Dropdown(known, value=settled.camera, label="Move")
        amount = gr.Number(settled.amount, label="Strength (1: 0.3 scene units, or 30 degrees)")
    with gr.Group(visible=False) as table:
        how = dict(type="array", row_count=len(KEYS), interactive=True)
        keys = gr.Dataframe(KEYS, headers=COLUMNS, label="Key frames (y is down)", **how)
    with gr.Group(visible=False) as file:
        files = gr.File(label="Camera file", file_count="multiple", file_types=TEXTS)
        form = gr.Dropdown(["", *FORMATS], value="", label="Its format, where it does not show")
        scale = gr.Textbox(settled.scene_scale, label="Its units per scene unit")
    kind.change(lambda k: [gr.update(visible=k == n) for n in KINDS], kind, [moves, table, file])
    fov = gr.Number(settled.fov, label="Field of view, degrees, where the camera has none")
    parts = dict(kind=kind, camera=camera, amount=amount, keys=keys, files=files, fov=fov)
    return parts | dict(camera_format=form, scene_scale=scale)


def size_part(settled):
    """Size and sampling; -> components by option."""
    labels = dict(frames="Frames (4k + 1)", height="Height", width="Width", steps="Steps")
    with gr.Row():
        made = {
            key: gr.Number(getattr(settled, key), label=text, precision=0, min_width=90)
            for key, text in (labels | dict(seed="Seed")).items()
        }
        made["guidance"] = gr.Number(settled.guidance, label="Guidance", min_width=90)
    names = export_names(settled.export)
    return made | dict(export=gr.CheckboxGroup(list(EXPORTS), value=names, label="Files"))


def build(studio):
    """The page."""
    settled = studio.settled
    with gr.Blocks(title="FantasyWorld", delete_cache=(3600, 86400)) as page:
        gr.Markdown("# A world from a picture, a prompt and a camera")
        with gr.Row():
            with gr.Column(min_width=320):
                form = image_part(settled) | camera_part(settled) | size_part(settled)
            with gr.Column(min_width=320, scale=2):
                with gr.Row():
                    how = dict(interactive=False, format="png", buttons=[], height=240)
                    start = gr.Image(label="Start image as the model sees it", **how)
                    path = gr.Image(label="Camera path from above, scene units", **how)
                wrong = gr.HTML(elem_classes="note")
                with gr.Row():
                    go = gr.Button("Make the world", variant="primary")
                    stop = gr.Button("Stop")
                status, world = gr.HTML(elem_classes="note"), gr.HTML()

        def read(values):
            return {key: values[component] for key, component in form.items()}

        def run(values):
            yield from studio.run(read(values))

        unseen = ("prompt", "steps", "seed", "guidance", "export")
        events = [form[key].change for key in form if key not in unseen]
        gr.on(
            [*events, page.load],
            lambda values: studio.look(read(values)),
            set(form.values()),
            [start, path, wrong],
            show_progress="hidden",
            trigger_mode="always_last",
        )
        how = dict(show_progress="minimal", show_progress_on=status, concurrency_limit=1)
        running = go.click(run, set(form.values()), [status, world], **how)
        stop.click(lambda: alarm("Stopped."), None, status, cancels=[running], queue=False)
    return page


def command():
    known = {key: value for key, value in vars(sample).items() if key not in ELSEWHERE[:1]}
    options = config.apply(known | globals(), sys.argv[1:])
    studio = Studio(options)
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder.parent / "uploads")
    system = ["system-ui", "sans-serif"]
    build(studio).queue(max_size=32).launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        allowed_paths=[str(studio.folder)],
        max_file_size=f"{options.upload}mb",
        theme=gr.themes.Default(font=system, font_mono=["monospace"]),
        css=CSS,
        head=HEAD,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
    )


if __name__ == "__main__":
    run_command("app.py", command, ADVICE)
