"""Make and turn a world in the browser: a page over sample.py, which does all of the work.

    pip install -r requirements-app.txt && python app.py      # then open http://127.0.0.1:7860

The options of sample.py are options here too: the form starts with them. A form becomes arguments
of sample.py, so errors are those of the command line, and the command of a world is shown with it.
--out receives worlds/, a folder for each of the newest --keep, and uploads/."""

import os
import pathlib
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import config
import sample
from config import option, section
from encoders import WanFolder
from lib.camera_files import FORMATS
from lib.camera_paths import MOVES, kind_of
from lib.experts import check_frozen_of, metadata_of_ckpt
from lib.export import EXPORTS, export_names
from lib.files import STILLS
from lib.guards import one_line, run_command
from lib.jobs import UNREAD, check_writable, plan_jobs, start_images
from lib.pictures import COMMANDED, as_pixels, top_view
from lib.webpage import KINDS, Job, Stopped, alarm, figure, show_world, typed

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
except ModuleNotFoundError as error:
    print(f"app.py: {error}. Fix: pip install -r requirements-app.txt", file=sys.stderr)
    sys.exit(2)

section_8 = section("this page")
ckpt = option("tiny/fantasyworld.safetensors", "checkpoint of stage 1 or 2, or a model.pth")
out = option("outputs/app", "folder of worlds and uploads", low=1)
host = option("127.0.0.1", "address to listen at; 0.0.0.0: open to all who reach this machine")
port = option(7860, "of the page", low=1, high=65535)
keep = option(20, "worlds that are kept, the newest", low=1)
upload = option(100, "MB that a file may have", low=1)

ROOT = pathlib.Path(__file__).resolve().parent
EXAMPLES = sorted(map(str, ROOT.glob("examples/room*.jpg")))
SEVERAL = ("num_samples", "jobs", "worldscore")  # options of sample.py for more than one world
COLUMNS = ["time", "x", "y", "z", "to x", "to y", "to z"]
KEYS = [["", 0, 0, 0, 0, 0, 1], ["", 0.2, 0, 0.2, 0, 0, 1]]
ADVICE = "Try fewer frames or a smaller size, or start app.py with --low_memory"
# The browser asks no other server, whatever a component of gradio would like to load.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


# ------------------------------------------------------------------------------------------- work
class Studio:
    """What all visitors share: what app.py was started with, and the model."""

    def __init__(self, options):
        self.asked, self.meta = options, metadata_of_ckpt(options.ckpt)
        self.settled = sample.settled(options, self.meta)
        check_frozen_of(self.settled)
        self.worlds = pathlib.Path(options.out).resolve() / "worlds"
        check_writable(self.worlds)
        self.worlds.mkdir(parents=True, exist_ok=True)
        self.model = self.job = None
        self.one = ThreadPoolExecutor(1)  # a job that was stopped ends its step before the next

    def read(self, form, folder):
        """A form -> arguments of sample.py and its options; uploaded files go to the folder."""
        values = typed(form, self.settled, folder)
        given = {k: v for k, v in vars(self.asked).items() if k in vars(sample)}
        unread = UNREAD[kind_of(values.get("camera", self.asked.camera))].split()
        if values.get("guidance", self.settled.guidance) == 1:
            unread += UNREAD["1, no guidance"].split()
        elsewhere = ("out", "preview_every", *SEVERAL, *unread)
        values = {k: v for k, v in (given | values).items() if k not in elsewhere}
        said = [f"--{k}={v}" for k, v in values.items() if v != vars(sample)[k].default]
        options = config.apply(vars(sample), said)
        return said, options.replaced(out=str(folder), preview_every=self.asked.preview_every or 2)

    def make(self, form, job):
        """Make a world; -> what the page shows of it.  What is not whole leaves."""
        try:
            job.folder.mkdir()
            said, options = self.read(form, job.folder)
            names, meta = export_names(options.export), self.meta
            jobs = plan_jobs(options, meta, names, partial(sample.prepared, meta=meta), {}).jobs
            _, images = start_images(jobs, None, partial(sample.images_of, meta=meta))
            how = dict(model=self.model, bar=job.bar)
            resources = sample.load(jobs[0].options, meta, jobs, images, **how)
            self.model = resources.model
            sample.make_one(jobs[0], meta, resources, names, job.bar)
        except BaseException:
            shutil.rmtree(job.folder, ignore_errors=True)
            raise
        for old in sorted(self.worlds.glob("2???????-??????-????????"))[: -self.asked.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return show_world(job.folder, names, shlex.join(["python", "sample.py", *said]))

    def run(self, form):
        """make in a thread of its own -> how far it is, then the world.

        gradio closes this generator when Stop is pressed or the page is closed."""
        # Its name sorts by time, and nobody guesses it.
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        job = Job(self.worlds / name, self.job and self.job.spent)
        made, self.job = self.one.submit(self.make, form, job), job
        for text in job.follow(made):
            yield text, gr.skip()
        try:
            yield '<p role="status">Done: the world is below.</p>', made.result()
        except Stopped:
            yield alarm("Stopped."), gr.skip()
        except Exception as error:
            yield alarm(one_line(error, ADVICE).replace(f"{job.folder}{os.sep}", "")), gr.skip()

    def look(self, form):
        """Before anything runs: the camera path from above, the start image, and what is wrong."""
        shown = ""
        with tempfile.TemporaryDirectory(dir=self.worlds.parent) as place:
            folder = pathlib.Path(place)
            try:
                _, options = self.read(form, folder)
                options, (w2c, _) = sample.prepared(options, self.meta)
                path = top_view([(w2c[0].double().numpy(), COMMANDED)], (240, 400))
                shown += figure(path, "camera path from above, scene units", folder)
                if options.image or options.end_image:
                    images = as_pixels(sample.images_of(options, self.meta)[0])
                    for image, word in zip(images, ("start", "end")):
                        shown += figure(image, f"{word} image as the model sees it", folder)
            except Exception as error:
                shown += alarm(one_line(error, ADVICE).replace(f"{place}{os.sep}", ""))
        return f'<div class="side">{shown}</div>'


# ------------------------------------------------------------------------------------------- form
def form_of(settled, meta):
    """The form -> its components by option."""
    number = partial(gr.Number, min_width=90)
    kinds = [*STILLS, ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"]
    image = gr.File(label="Start image, or a video", file_types=kinds)  # no longer: X hides it
    with gr.Row():
        for file in EXAMPLES:
            name = f"Example {pathlib.Path(file).stem}"
            button = gr.Button(name, icon=file, size="sm", min_width=90)
            button.click(partial(str, file), None, image, show_progress="hidden")
    ends = WanFolder(settled.wan_dir, "cpu").start_pad is not None  # 36 inputs
    end = gr.File(label="End image", file_types=list(STILLS), visible=ends)
    prompt = gr.Textbox(settled.prompt, label="Prompt", lines=2, max_length=2000)
    form = camera_form(settled, meta) | dict(image=image, end_image=end, prompt=prompt)
    with gr.Row():
        for key in ("frames", "height", "width", "steps", "seed"):
            form[key] = number(getattr(settled, key), label=key.title(), precision=0)
        form["guidance"] = number(settled.guidance, label="Guidance")
    form["export"] = gr.CheckboxGroup([*EXPORTS], value=export_names(settled.export), label="Files")
    return form


def camera_form(settled, meta):
    """A move, key frames, or a file -> components by option."""
    form = dict(kind=gr.Radio(KINDS, value=KINDS[0], label="Camera"))
    with gr.Group() as moves:
        known = list(dict.fromkeys([settled.camera, *MOVES]))
        form["camera"] = gr.Dropdown(known, value=settled.camera, label="Move")
        label = "Strength: 1 travels 0.3 scene units, turns by 30 degrees"
        form["amount"] = gr.Number(settled.amount, label=label)
    with gr.Group(visible=False) as table:
        label = "Key frames: share of the time, from, to; y is down"
        how = dict(type="array", interactive=True, headers=COLUMNS, label=label)
        form["keys"] = gr.Dataframe(KEYS, **how)
    with gr.Group(visible=False) as file:
        kinds = [".txt", ".json", ".npz", ".npy", ".bin", ".log", ".csv"]
        form["files"] = gr.File(label="Camera file", file_count="multiple", file_types=kinds)
        label = "Its format, where it does not show"
        form["camera_format"] = gr.Dropdown(["", *FORMATS], value="", label=label)
        # No text: it could name a file of this machine.
        scale = sample.scene_scale_of(settled, meta)
        form["scene_scale"] = gr.Number(scale, label="Its units per scene unit")
    form["fov"] = gr.Number(settled.fov, label="Field of view where the camera has none, degrees")

    def show(kind):
        return [gr.update(visible=kind == name) for name in KINDS]

    form["kind"].change(show, form["kind"], [moves, table, file], show_progress="hidden")
    return form


def build(studio):
    """The page."""
    with gr.Blocks(title="FantasyWorld", delete_cache=(3600, 86400)) as page:
        gr.Markdown("# A world from a picture, a prompt and a camera")
        with gr.Row():
            with gr.Column(min_width=320):
                form = form_of(studio.settled, studio.meta)
            with gr.Column(min_width=320, scale=2):
                seen = gr.HTML(elem_id="seen", elem_classes="note")
                with gr.Row():
                    go = gr.Button("Make the world", variant="primary")
                    stop = gr.Button("Stop")
                status = gr.HTML(elem_id="status", elem_classes="note")
                world = gr.HTML()

        def look(*values):
            return studio.look(dict(zip(form, values)))

        def run(*values):
            yield from studio.run(dict(zip(form, values)))

        unseen = ("prompt", "steps", "seed", "guidance", "export")
        changes = [form[key].change for key in form if key not in unseen]
        how = dict(show_progress="hidden", trigger_mode="always_last")
        gr.on([*changes, page.load], look, list(form.values()), seen, **how)
        how = dict(show_progress="minimal", show_progress_on=status, concurrency_limit=1)
        running = go.click(run, list(form.values()), [status, world], **how)
        stop.click(partial(alarm, "Stopped."), None, status, cancels=[running], queue=False)
    return page


def command():
    known = {k: v for k, v in vars(sample).items() if k not in SEVERAL}
    options = config.apply(known | globals(), sys.argv[1:])
    studio = Studio(options)
    os.environ["GRADIO_TEMP_DIR"] = str(studio.worlds.parent / "uploads")
    build(studio).queue(max_size=32).launch(
        server_name=options.host,
        server_port=options.port,
        allowed_paths=[str(studio.worlds), *EXAMPLES],
        max_file_size=f"{options.upload}mb",
        theme=gr.themes.Default(font="system-ui", font_mono="monospace"),
        css_paths=ROOT / "lib" / "app.css",
        head=f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        _frontend=False,  # no visit of its own first: it gives up after 3 s, on a busy machine too
    )
    if studio.job:  # Ctrl-C came in the middle of it
        studio.job.stop.set()


if __name__ == "__main__":
    run_command("app.py", command, ADVICE)
