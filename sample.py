"""Sample worlds: checkpoint + prompts + start image + camera path -> video, depth, points, cameras.

    python sample.py --ckpt tiny/fantasyworld.safetensors --image examples/room.jpg --camera right

writes into --out: scene.html (open it: everything in one offline page), video.mp4, depth.mp4,
depth.npz, points.ply, cameras.txt (commanded), cameras_predicted.txt, sheet.png and report.json
(how far the sample obeys its cameras and agrees with itself); --export=all adds the files of other
tools. With several prompts or seeds, or a list of --jobs, every sample gets a folder of its own;
the same command again goes on where it stopped, torchrun's ranks share.  --help has all options."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import config
from config import option, section
from encoders import WanFolder, encode_start
from geometry import encode_pose
from lib import jobs as job_lists
from lib import worldscore as worldscore_folders
from lib.camera_files import FORMATS, size_of
from lib.camera_paths import View, load_camera, mean_distance
from lib.crop import check_video_size, load_image
from lib.distributed import check_device, from_first, gather_cat, say
from lib.experts import BOUNDARY, check_frozen_of, files_in, metadata_of_ckpt, open_models
from lib.export import EXPORTS, USUAL, describe, export_names, files_of, make_scene, write_exports
from lib.guards import printable, run_command
from lib.pictures import as_pixels, depth_to_rgb, write_png
from lib.strangers import config_from_metadata, read_train_config
from lib.weights import find_wan
from model import shift_sigma
from released import BASES, Tiles
from wan import LATENT, start_condition


# ---------------------------------------------------------------------------------------- samplers
# Before the options, which list them: a new sampler is a function and a line of SAMPLERS.
#   velocity(x, t)   noise - data at x, a call for every step; t (B,) = 1000 sigma
#   noise            (B, 16, f, h, w); latents stay fp32
#   progress         wraps what is iterated over
def sample_euler(velocity, noise, steps=50, *, shift=5.0, progress=iter):
    """Integrate dx/dsigma = velocity from sigma 1 to 0 on the shifted grid."""
    sigmas = shift_sigma(torch.linspace(1, 0, steps + 1), shift).tolist()  # fp32, as the releases
    x = noise
    for now, then in progress(list(zip(sigmas, sigmas[1:]))):
        t = torch.full((len(x),), 1000 * now, device=x.device)
        x = x + (then - now) * velocity(x, t).float()
    return x


def sample_unipc(velocity, noise, steps=50, *, shift=5.0, progress=iter):
    """UniPC of order 2 (bh2 variant, data prediction), Wan 2.1's default.  Source: Zhao 2023.

    As in the official code the grid starts at sigma 0.999 before the shift, and the model is told t
    rounded down to an integer while the step itself uses the exact sigma."""
    sigmas = shift_sigma(torch.linspace(0.999, 0, steps + 1, dtype=torch.float64), shift)
    log_snr = ((1 - sigmas) / sigmas).log()  # half of it; infinite at the end, where order is 1

    def step(x, i, data, *, order, data_there=None):
        """x from sigma i to i+1; data: x0 predicted at i-1 and i; data_there: at i+1, corrects."""
        h = log_snr[i + 1] - log_snr[i]
        b = torch.expm1(-h)
        phi2 = -b / h - 1
        slope = 0.0  # of the predicted data, times its weight
        if order == 2:
            ratio = (log_snr[i - 1] - log_snr[i]) / h
            rho = 0.5  # of the corrector: two equations of consistency in bh2
            if data_there is not None:
                b1, b2 = phi2 / b, 2 * (-phi2 / h - 0.5) / b
                rho = (b1 - b2) / (1 - ratio)
            slope = rho / ratio * (data[0] - data[1])
        if data_there is not None:
            slope = slope + (0.5 if order == 1 else b1 - rho) * (data_there - data[1])
        return sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * b * (data[1] + slope)

    x, before, data = noise, None, [None, None]
    for i in progress(range(steps)):
        t = torch.full((len(x),), float(int(1000 * sigmas[i])), device=x.device)
        now = x - sigmas[i] * velocity(x, t).float()
        if i:  # correct the last step with what its end predicts: no further call of the model
            x = step(before, i - 1, data, order=min(2, i), data_there=now)
        before, data = x, [data[1], now]
        x = step(x, i, data, order=min(2, i + 1, steps - i))
    return x


SAMPLERS = {"euler": sample_euler, "unipc": sample_unipc}


# ----------------------------------------------------------------------------------------- options
# What the release's sampling does unlike ours, by default with its weights.
CORRECTIONS = {
    "rays": "one ray per pixel; the release shows one per frame, and its weights know nothing else",
    "readout": "geometry of the finished sample; the release reads it in its last step",
    "image": "start image cropped to the aspect; the release squeezes it",
    "tiles": "images encoded whole; the release on Wan2.2 encodes them in tiles",
    "switch": "experts change at the exact noise level; the release on Wan2.2 rounds it to bf16",
}
OF_PAIRS = {"tiles", "switch"}  # of the release on Wan2.2 alone

section_1 = section("what to sample")
ckpt = option("", "checkpoint of stage 1 or 2, or a release's .pth; of a pair HIGH,LOW; needed")
wan_dir = option("", "folder of the video branch; empty: the one it was trained with")
other_wan = option(False, "go on although it holds other weights than those trained with")
prompt = option("a room", "words, or a .txt file with one prompt a line")
negative_prompt = option(None, "words to stay away from; Wan: its official ones, in Chinese")
image = option("", "picture or video file whose first frame starts the video")
worldscore = option("", "WorldScore's static.json or dynamic.json: make its worlds under --out")
end_image = option("", "picture that the video ends with; for families of 36 inputs")
jobs = option("", "list of samples: a JSON object a line, see lib/jobs.py")
section_2 = section("camera")
camera = option("orbit", "a move (forward, pan_left ...), a file, or 'x,y,z -> x,y,z | ...'")
camera_format = option(None, "of a camera file that does not show it", choices=(None, *FORMATS))
camera_size = option("", "HxW of a camera file's pictures, where it does not say")
camera_stride = option(1, "of a camera file: every so many cameras are used", low=1)
amount = option(1.0, "strength of a named move: 1 travels 0.3 scene units or turns by 30 degrees")
fov = option(65.0, "horizontal field of view where the camera has no intrinsics", low=1, high=170)
scene_scale = option("1", "your units per scene unit; or depth: FILE, or FILE*0.001 of mm", low=1)
section_3 = section("size")
frames = option(0, "4k + 1; 0: as in training", low=0, high=10**4)
height = option(0, "pixels, a multiple of 16; 0: as in training", low=0, high=2**13)
width = option(0, "pixels, a multiple of 16; 0: as in training", low=0, high=2**13)
fps = option(16.0, "frames a second of the written videos", low=0.1, high=1000)
section_4 = section("sampling")
# None: as the checkpoint asks for, or else WANS.
steps = option(None, "steps of the sampler; Wan: 50", low=1, high=1000, kind=int)
sampler = option(None, "usual: euler; unipc is the official code's", choices=(None, *SAMPLERS))
guidance = option(None, "1: no guidance, half the work; Wan: 5", kind=float)
shift = option(None, "more of the steps at high noise; Wan: 5", above=0, high=1000, kind=float)
seed = option(0, "of the first sample", low=0, high=2**62)
num_samples = option(1, "samples of every prompt, of seeds seed, seed + 1 ...", low=1, high=10**6)
section_5 = section("the released weights and what was fine-tuned from them")
correct = option("", f"do not as the release does: {', '.join(CORRECTIONS)}, with commas")
release = option("", "the release's .pth that ckpt was fine-tuned from, if it was moved")
lora = option("", "LoRA merged at 0.55 into what comes from wan_dir; of a pair HIGH,LOW")
boundary = option(BOUNDARY, "of a pair: 1000 sigma where the experts change", low=0, high=1000)
section_6 = section("machine")
device = option("auto", "auto, cpu, cuda, cuda:1 ...")
dtype = option("auto", "auto: bf16 on a GPU, fp32 on a CPU", choices=("auto", "bf16", "fp32"))
low_memory = option(False, "slower: encoders on the CPU, small chunks, the model leaves to decode")
offload = option(None, "GB of weights that stay on the device; others visit", kind=float, low=0)
section_7 = section("files")
out = option("outputs/sample", "folder", low=1)
export = option(USUAL, f"all, or names of {','.join(EXPORTS)}")
drop = option(0.0, "percent of the pixels, the least sure, left out of clouds", low=0, high=99)
lifts = (None, "commanded", "predicted")
lift = option(None, "cameras that lift depth to points; None: as its weights want", choices=lifts)
unit = option("units", "your unit of length, as a word")
preview_every = option(0, "write the depth so far every so many steps; 0: never", low=0, high=1000)

# The default of the official Wan 2.1 code (shared_config.py, sample_neg_prompt).
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，"
    "画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)

WANS = dict(steps=50, sampler="euler", guidance=5.0, shift=5.0, negative_prompt=NEGATIVE)
READOUT_SIGMA = 0.1  # where geometry is read; the release's last step has 0.0926


# -------------------------------------------------------------------------------------- conditions
@torch.no_grad()
def conditions(encoders, prompts, images, *, frames, tiles=False, progress=iter):
    """Encode prompts and images, to the CPU; each encoder is freed before the next one is loaded.

    images    {(path of the start image, of the end image or ""): (1, 3, 1 or 2, H, W) in [-1, 1]};
              a sample without one gets zeros, as a clip whose image training dropped
    tiles     images are encoded in tiles, as by the release on Wan2.2
    returns   {prompt: (L, dim)}, {paths: (start latents, clip (1, 257, 1280) or None)}, the VAE"""
    text = encoders.load_text()
    texts = {prompt: text([prompt])[0].cpu() for prompt in progress(prompts)}  # (L, dim) each
    del text
    look = encoders.load_image() if images and encoders.load_image else None
    clips = {k: look(image[:, :, 0]).cpu() if look else None for k, image in images.items()}
    del look
    vae, starts = encoders.load_vae(), {}
    coder = Tiles(vae) if tiles else vae
    for paths, image in images.items():
        start = encode_start(coder, image, frames, encoders.start_pad)  # (1, 16, 1 or f, h, w)
        starts[paths] = start.cpu(), clips[paths]
    return texts, starts, vae


# ---------------------------------------------------------------------------------------- sampling
@dataclass(frozen=True)
class Inputs:
    """What one video is made from, all of it on the device."""

    noise: torch.Tensor  # (1, 16, f, h, w)
    text: torch.Tensor  # (L, dim) of the prompt
    negative: torch.Tensor  # (L, dim) of the negative prompt
    y: torch.Tensor | None  # (1, in_dim - 16, f, h, w) start image
    clip: torch.Tensor | None  # (1, 257, 1280)
    w2c: torch.Tensor  # (1, T, 3, 4) relative to frame 0, scene units
    K: torch.Tensor  # (1, T, 3, 3) pixels


@dataclass(frozen=True)
class Sampling:
    """How a video is made."""

    sampler: str = "euler"
    steps: int = 50
    shift: float = 5.0
    guidance: float = 5.0
    read_last_step: bool = False  # the release: geometry of the last step's noisy latents


class Denoiser:
    """velocity(x, t) with guidance, v_neg + g (v_pos - v_neg), as a sampler calls it.

    Camera and image are the same in both passes.  What does not change with the noise level is made
    once for each model: text keys, rays, pose features.  pair: two ranks, each takes one pass."""

    def __init__(self, models, inputs, sampling, on_step=None, pair=None):
        """models: a FantasyWorld, or Experts."""
        self.models, self.inputs, self.sampling, self.on_step = models, inputs, sampling, on_step
        self.model, self.y, self.together, self.pair = None, inputs.y, True, pair
        self.step, self.last_geometry = 0, None

    def take_model(self, t):
        """Take the model of this noise level; if it is another one, with its constants."""
        if (model := self.models.at(t)) is self.model:
            return
        self.model, inputs = model, self.inputs
        contexts = [inputs.text, inputs.negative]
        if self.sampling.guidance == 1:  # v_neg + 1 (v_pos - v_neg): half the work
            contexts = contexts[:1]
        clip = inputs.clip if inputs.clip is None else inputs.clip.expand(len(contexts), -1, -1)
        size = tuple(LATENT.space * n for n in inputs.noise.shape[-2:])
        rays = model.rays(inputs.w2c, inputs.K, size)  # (1, 6, T, H, W)
        poses = encode_pose(inputs.w2c, inputs.K, size)  # (1, T, 9)
        # Keys of both prompts side by side, for all steps.
        both = model.conditions(contexts, clip, rays, poses).with_keys(model.dit.blocks)
        self.halves = [replace(both, keys=keys_of(both.keys, n)) for n in range(len(contexts))]
        # One batch of both prompts while it fits, else one after the other.
        self.passes = [both] if self.together else self.halves
        if self.pair:
            self.passes = [self.halves[dist.get_rank(self.pair)]]

    def __call__(self, x, t):
        self.take_model(t)
        self.step += 1
        if self.sampling.read_last_step and self.step == self.sampling.steps:
            self.last_geometry = self.read_geometry(x, t)
        v = self.velocity_that_fits(x, t)
        if self.on_step:
            foreseen = x - t / 1000 * v.float()
            self.on_step(self.step, foreseen, read_geometry=partial(self.read_geometry, x, t))
        return v

    def velocity_that_fits(self, x, t):
        try:
            return self.velocity(x, t)
        except torch.cuda.OutOfMemoryError:
            if self.pair or len(self.passes) == len(self.halves):
                raise
        # Out here: inside the block the exception would keep the failed pass alive.
        self.passes, self.together = self.halves, False
        torch.cuda.empty_cache()
        return self.velocity(x, t)

    def velocity(self, x, t):
        v = torch.cat([self.one_pass(x, t, constants) for constants in self.passes])
        if self.pair:  # once a step, as large as the latents
            v = gather_cat(v, self.pair)
        return v if len(self.halves) == 1 else torch.lerp(v[1:], v[:1], self.sampling.guidance)

    def one_pass(self, x, t, constants):
        count = len(constants.keys[0][0][0])
        x, t = (z.expand(count, *z.shape[1:]) for z in (x, t))
        y = None if self.y is None else self.y.expand(count, *self.y.shape[1:])
        if self.model.stage == 2:
            return self.model(x, t, None, y, heads=False, constants=constants)["velocity"]
        return self.model.dit(x, t, None, y, constants=constants)  # geometry does not reach it

    def read_geometry(self, x, t):
        """The whole output for the prompt alone: one more forward."""
        self.take_model(t)
        video = self.model.stage == 2
        return self.model(x, t, None, self.y, constants=self.halves[0], video=video)


def keys_of(keys, n):
    """Keys and values of sample n alone, for every block."""
    return [[(k[n : n + 1], v[n : n + 1]) for k, v in block] for block in keys]


@torch.no_grad()
def generate(model, inputs, sampling, *, decode=None, on_step=None, progress=iter, pair=None):
    """Sample latents (1, 16, f, h, w), then read the geometry once at READOUT_SIGMA.

    decode     latents -> video, which runs beside the read-out; None: no video
    on_step    called after every step with its number, from 1, the latents that it foresees, and
               read_geometry=, a function that reads the geometry so far (one forward)
    progress   wraps the steps
    pair       process group of two ranks that make one video: of lib.jobs.share
    returns    latents, geometry dict, video or None; of the second of a pair latents alone"""
    denoise = Denoiser(model, inputs, sampling, on_step, pair)
    run, how = SAMPLERS[sampling.sampler], dict(shift=sampling.shift, progress=progress)
    latents = run(denoise, inputs.noise, sampling.steps, **how)
    if pair and dist.get_rank(pair):
        return latents, None, None
    t = torch.full((1,), 1000 * READOUT_SIGMA, device=latents.device)
    # Training hardly ever shows the geometry branch sigma 0: it is read a little above.
    x = (1 - READOUT_SIGMA) * latents + READOUT_SIGMA * inputs.noise
    with ThreadPoolExecutor(1) as beside:
        video = beside.submit(decode, latents) if decode else None
        geometry = denoise.last_geometry or denoise.read_geometry(x, t)
        return latents, geometry, video.result() if video else None


def bar(phase, items, unit):
    """Progress with the time left; one bar for each phase, of the first rank."""
    others = os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=f"{phase:8s}", unit=unit, dynamic_ncols=True, disable=others)


def preview(folder, every, decode, step, latents, *, read_geometry):
    """Every so many steps folder/step-0008.png: the first frame, and the depth of up to five."""
    if not every or step % every:
        return
    first = as_pixels(decode(latents[:, :, :1]))  # latent 0 is frame 0 alone
    depth = read_geometry()["depth"][0].float().cpu().numpy()
    pick = np.linspace(0, len(depth) - 1, min(5, len(depth))).round().astype(int)
    folder.mkdir(parents=True, exist_ok=True)
    depths = depth_to_rgb(depth[pick], *np.quantile(depth, (0.01, 0.99)))  # bright is near
    shown = np.pad([*first, *depths], [(0, 0), (0, 0), (0, 2), (0, 0)], constant_values=255)
    write_png(folder / f"step-{step:04d}.png", np.concatenate(shown, 1)[:, :-2])


@dataclass(frozen=True)
class ClipSampler:
    """(model, prepared batch of one clip) -> what is sampled from its start image, prompt and
    cameras: video (3, T, H, W) in [-1, 1] and the output at the read-out.  For evaluation."""

    vae: object
    negative: torch.Tensor  # (L, dim)
    sampling: Sampling
    autocast: object  # context of the model, not of the decoder

    def __call__(self, model, b):
        start = (b["noise"], b["text"][0], self.negative, b["y"], b.get("clip"))
        inputs = Inputs(*start, b["w2c"], b["intrinsics"])
        with self.autocast:
            latents, out, _ = generate(model, inputs, self.sampling)
        # In stage 0 nothing but the velocity is there.
        return self.decode(latents), {k: v.float() for k, v in out.items() if v is not None}

    def decode(self, latents):
        return decode_video(self.vae, latents).to(latents.device)


def clip_sampler(own, wan_dir, device, autocast):
    """ClipSampler of a run with its `sampling` settings, which may differ from Wan's."""
    how = {**WANS, **checked_sampling(own, "sampling")}
    encoders = WanFolder(wan_dir, device)
    negative = encoders.load_text()([how.pop("negative_prompt")])[0]
    return ClipSampler(encoders.load_vae(), negative, Sampling(**how), autocast)


# -------------------------------------------------------------------------------------------- jobs
@dataclass(frozen=True)
class Resources:
    """What all jobs of a rank share."""

    model: object  # FantasyWorld, or Experts
    vae: object
    texts: dict  # prompt, also negative ones -> (L, dim)
    starts: dict  # paths of start and end image -> latents and what CLIP says of the first
    device: torch.device
    half: bool  # whether to run in bf16
    encoders: WanFolder
    pair: object = None  # the group of two ranks that make each sample together


def images_of(options, meta):
    """Start image, or start and end image of a job (1, 3, 1 or 2, H, W)."""
    if options.end_image and not options.image:
        raise ValueError("--end_image without --image; give both")
    how = dict(squeeze="image" in quirks_of(options, meta))
    names = filter(None, (options.image, options.end_image))
    return torch.cat([load_image(x, options.height, options.width, **how) for x in names], 2)


def load(options, meta, jobs, images, pair=None, *, model=None, bar=bar):
    """Encode the prompts and images of the jobs, then load the model, if it is not at hand."""
    device, quirks = torch.device(options.device), quirks_of(options, meta)
    words = [(job.options.prompt, job.options.negative_prompt) for job in jobs]
    prompts = list(dict.fromkeys(sum(words, ())))  # each once
    how = dict(frames=options.frames, tiles="tiles" in quirks)
    show = partial(bar, "text", unit="prompt")
    encoders = WanFolder(options.wan_dir, "cpu" if options.low_memory else options.device)
    texts, starts, vae = conditions(encoders, prompts, images, **how, progress=show)
    half = options.dtype == "bf16" or options.dtype == "auto" and device.type == "cuda"
    for _ in bar("load", (options.ckpt,), "model") if model is None else ():
        model = open_models(options, quirks, device, torch.bfloat16 if half else None)
    return Resources(model, vae, texts, starts, device, half, encoders, pair)


def make_inputs(job, resources):
    """What one job's video is made from."""
    options, channels = job.options, resources.model.cfg.in_dim
    grid = LATENT.grid_of(options.frames, options.height, options.width)
    # Drawn on the CPU: the same seed is the same noise on every machine.
    generator = torch.Generator().manual_seed(options.seed)
    noise = torch.randn(1, LATENT.channels, *grid, generator=generator).to(resources.device)
    start, clip = resources.starts.get((options.image, options.end_image), (None, None))
    y = None
    if start is not None:
        family = (channels, grid[0], bool(options.end_image))
        y = start_condition(start.to(resources.device), *family)
        if y is None:
            raise ValueError(f"--image: {options.wan_dir} is a text-to-video family; leave it out")
    texts = (resources.texts[words] for words in (options.prompt, options.negative_prompt))
    return Inputs(noise, *texts, y, clip, *(x.to(resources.device) for x in job.camera))


def decode_video(vae, latents, progress=iter):
    """Latents (1, 16, f, h, w) -> video (3, T, H, W) in [-1, 1] on the CPU."""
    return vae.decode(latents.float().cpu(), progress=progress)[0].cpu()


def sample_one(job, meta, resources, bar=bar):
    """Run one job -> Scene with its report; None on the second rank of a pair."""
    options, device, pair = job.options, resources.device, resources.pair
    model = resources.model.to(device)
    inputs = make_inputs(job, resources)
    for old in (job.out / "preview").glob(f"step-{'[0-9]' * 4}.png"):  # of an earlier sample
        old.unlink(missing_ok=True)  # of a pair, both ranks are here
    numbers = (options.sampler, options.steps, options.shift, options.guidance)
    sampling = Sampling(*numbers, read_last_step="readout" in quirks_of(options, meta))
    glimpse = partial(decode_video, resources.vae)
    decode = partial(glimpse, progress=partial(bar, "decode", unit="step"))
    on_step = partial(preview, job.out / "preview", options.preview_every, glimpse)
    how = dict(on_step=on_step if not pair or dist.get_rank(pair) == 0 else None, pair=pair)
    how["progress"] = partial(bar, "sampling", unit="step")
    how["decode"] = None if options.low_memory else decode
    with torch.autocast(device.type, torch.bfloat16, enabled=resources.half):
        latents, geometry, video = generate(model, inputs, sampling, **how)
    if geometry is None:
        return None
    if options.low_memory:
        model.to("cpu")  # the decoder gets the device for itself; the next job brings it back
        video = decode(latents)
    geometry = {k: v.cpu() for k, v in geometry.items() if k != "velocity"}
    how = dict(scene_scale=options.scene_scale, drop=options.drop, lift=options.lift)
    scene = make_scene(video, geometry, *job.camera, **how)
    facts = (
        f"{options.frames} frames of {options.height} x {options.width}, camera {options.camera}, "
        f"{options.sampler} {options.steps} steps, guidance {options.guidance:g}, "
        f"seed {options.seed}; checkpoint stage {meta['stage']}, step {meta['step']}"
    )
    said = dict(prompt=options.prompt, settings=job.settings, facts=facts)
    said["warnings"] = list(filter(None, [scene.report["unit"]["warning"]]))
    return replace(scene, unit=options.unit, fps=options.fps, report=scene.report | said)


# -------------------------------------------------------------------------------------------- main
def quirks_of(options, meta):
    """What is done as the release does it: all but the names of --correct."""
    names = {name for name in options.correct.replace(" ", "").split(",") if name}
    if unknown := names - set(CORRECTIONS):
        raise ValueError(f"--correct {min(unknown)}: wanted {', '.join(CORRECTIONS)}")
    known = set(CORRECTIONS) if meta.get("expert") else set(CORRECTIONS) - OF_PAIRS
    return known - names if meta.get("release") else set()


def checked_sampling(own, where):
    """A run's `sampling` with names and ranges as those of the options here."""
    known = {key: globals()[key] for key in WANS}
    return {k: config.check(k, v, config.look_up(k, known, where), where) for k, v in own.items()}


def sampling_of(options, trained):
    """How to sample: as asked for, or as the checkpoint's run wrote down, or as Wan does."""
    own = checked_sampling(trained.get("sampling", {}), f"{options.ckpt}: sampling")
    given = {key: getattr(options, key) for key in WANS if getattr(options, key) is not None}
    return {**WANS, **own, **given}


def settled(options, meta):
    """Options with what the checkpoint says filled in; ValueError for what cannot work."""
    trained, foreign = read_train_config(meta, options.ckpt), bool(meta.get("release"))
    quirks_of(options, meta)  # its names are checked
    kinds = {"no release": foreign, "no pair of experts": meta.get("expert")}
    kinds["no run from a release"] = foreign and "foreign" not in meta
    for kind, is_other in kinds.items():
        if not is_other:
            job_lists.check_read(vars(options), globals(), f"--ckpt {options.ckpt}", kind)
    known = "model_config" in meta and not options.other_wan  # whose branch is read later
    inputs = config_from_metadata(meta, options.ckpt).in_dim if known else 36
    given = options.image or getattr(options, "worldscore", "")  # which app.py has not
    if inputs < (36 if options.end_image else 32 * bool(given)):
        kind = "an end image is for video branches of" if options.end_image else "images want 32 or"
        raise ValueError(f"{options.ckpt}: {kind} 36 inputs, this one has {inputs}; leave it out")
    frames = options.frames or trained["num_frames"]
    height, width = options.height or trained["height"], options.width or trained["width"]
    check_video_size((frames, height, width), "--frames {} --height {} --width {}")
    folder = options.wan_dir or find_wan(trained["wan_dir"], files_in(options.ckpt)[-1])
    if foreign and not folder:  # such a file does not say where its base lies
        wanted = f"the folder of {BASES[bool(meta.get('expert'))]}, for its encoders"
        raise ValueError(f"{options.ckpt}: a release needs --wan_dir, {wanted}")
    found = dict(frames=frames, height=height, width=width, wan_dir=folder)
    if foreign and options.camera.endswith(".json"):
        # The release's own layout, as WorldScore's looks the same; its focal length is the video's.
        found["camera_format"] = options.camera_format or "fantasyworld"
        found["camera_size"] = options.camera_size or f"{height}x{width}"
    # Points of a release are lifted as its own script lifts them.
    found["lift"] = options.lift or ("predicted" if foreign else "commanded")
    found["device"] = check_device(options.device)
    return options.replaced(**found, **sampling_of(options, trained))


def scene_scale_of(options, meta):
    """--scene_scale as a number: given, or the mean distance of a depth map of the start image."""
    text, size = options.scene_scale, (options.height, options.width)
    try:
        scale = float(text)  # your units per scene unit
    except ValueError:
        # Of the camera only the intrinsics are used: how long its path is, is not known yet.
        _, K = load_camera(options.camera, options.frames, size, view_of(options, 1.0))
        squeezed = "image" in quirks_of(options, meta)
        scale = mean_distance(text, K, size, "" if squeezed else options.image)
    if not 1e-5 <= scale <= 1e9:  # below, its numbers take lengths for zero
        raise ValueError(f"--scene_scale {text}: wanted 1e-5 to 1e9")
    return scale


def view_of(options, scene_scale):
    pictures = size_of(options.camera_size) if options.camera_size else None
    of_file = (options.camera_format, pictures, options.camera_stride)
    return View(options.fov, options.amount, scene_scale, *of_file)


def prepared(options, meta):
    """Options of a job with everything filled in, and its camera (w2c, K)."""
    options = settled(options, meta)
    options = options.replaced(scene_scale=scene_scale_of(options, meta))
    view, size = view_of(options, options.scene_scale), (options.height, options.width)
    return options, load_camera(options.camera, options.frames, size, view)


def scene_sampler(options, meta, prompts):
    """A function that makes a video of one of the prompts, as worldscore.make calls it:

    (uint8 image (H, W, 3), prompt, w2c (1, T, 3, 4), K (1, T, 3, 3)) -> frames, depth of a Scene
    options   of `settled`"""
    jobs = [job_lists.Job(options.replaced(prompt=words), None, None, {}) for words in prompts]
    resources = load(options, meta, jobs, {})  # all words at once, then their encoder is freed
    look = resources.encoders.load_image and resources.encoders.load_image()
    coder = Tiles(resources.vae) if "tiles" in quirks_of(options, meta) else resources.vae

    def scene(image, prompt, w2c, K):
        video = torch.from_numpy(image).movedim(-1, 0)[None, :, None] / 127.5 - 1  # (1, 3, 1, H, W)
        start = encode_start(coder, video, w2c.shape[1], resources.encoders.start_pad)
        # The one start image that is in memory: a scene of a chain is known when it is reached.
        resources.starts["scene", ""] = start, look(video[:, :, 0]) if look else None
        changed = dict(prompt=prompt, image="scene", end_image="", frames=w2c.shape[1])
        given = options.replaced(scene_scale=1.0, **changed)
        made = sample_one(job_lists.Job(given, (w2c, K), Path(options.out), {}), meta, resources)
        return made.rgb, made.depth

    return scene


def make_worlds(options, meta):
    """--worldscore: the worlds of a list that are not whole yet, shared among the ranks."""
    job_lists.check_read(vars(options), globals(), "--worldscore", "a list of worlds")
    side = worldscore_folders.square_side(options, read_train_config(meta, options.ckpt))
    options = settled(options.replaced(height=side, width=side), meta)
    ranks, options = job_lists.join_ranks(options)
    listed = []
    if ranks.rank == 0:  # once, so that all share the same list; before anything slow
        check_frozen_of(options)
        names = ("seed", "frames", "height", "fps", "correct", "lora", "boundary", *WANS)
        said = dict(loras=job_lists.stamps(options.lora.split(",")))
        said["sha256"] = meta.get("sha256") or options.ckpt  # of a release: its name
        said |= {k: getattr(options, k) for k in names}
        listed = worldscore_folders.read_list(options.worldscore, options.out, said)
    left = [one for one in listed if not one.finished(options.frames)]  # the rest is kept
    left, there = from_first((left, len(listed) - len(left)))
    if there:
        say(f"{options.out}: {there} of {there + len(left)} worlds are there already and are kept")
    mine, failed = left[ranks.rank :: ranks.world], []
    scene = scene_sampler(options, meta, [p for x in mine for p in x.prompts]) if mine else None

    def work(one):
        image = as_pixels(load_image(one.image, side, side)[0])[0]
        worldscore_folders.make(one, image, scene, frames=options.frames, fps=options.fps)

    for n, one in enumerate(mine, 1):
        say(f"{n} of {len(mine)}: {one.folder}", of_all=True)
        job_lists.attempt(partial(work, one), one.folder, failed)
    job_lists.finish(job_lists.Plan(left, there, []), failed, ranks)


def main(options):
    meta = metadata_of_ckpt(options.ckpt)
    if options.worldscore:
        return make_worlds(options, meta)
    given, options, names = options, settled(options, meta), export_names(options.export)
    if options.guidance == 1 and not options.jobs:  # as asked for, or the checkpoint's
        job_lists.check_read(vars(given), globals(), "--guidance", "1, no guidance")
    ranks, options = job_lists.join_ranks(options)
    plan = None
    if ranks.rank == 0:  # before anything slow
        check_frozen_of(options)
        plan = job_lists.plan_jobs(given, meta, names, partial(prepared, meta=meta), globals())
    plan = from_first(plan)
    mine, pair = job_lists.share(plan.jobs, ranks)
    failed = None if plan.failed is None else []
    mine, images = job_lists.start_images(mine, failed, partial(images_of, meta=meta))
    resources = load(options, meta, mine, images, pair) if mine else None
    for i, job in enumerate(mine, 1):
        if len(mine) > 1:
            line = f"{i} of {len(mine)}: {job.out.name}: {job.options.prompt}"
            say(printable(line), of_all=True)
        # The ranks of a pair wait for each other: an error of one has to end both.
        work = partial(make_one, job, meta, resources, names)
        job_lists.attempt(work, job.out, None if pair else failed)
    job_lists.finish(plan, failed, ranks)


def make_one(job, meta, resources, names, bar=bar):
    """Sample one job and write its files."""
    if (scene := sample_one(job, meta, resources, bar)) is None:
        return
    write_exports(scene, job.out, names, partial(bar, "export", unit="file"))
    made = f"{job.out}: {' '.join(files_of(names))} report.json"
    say("\n".join([made, *describe(scene.report, job.options.unit)]), of_all=True)


def command():
    main(config.apply(globals(), sys.argv[1:]))


if __name__ == "__main__":
    run_command("sample.py", command, "Try --low_memory, fewer --frames or a smaller size")
