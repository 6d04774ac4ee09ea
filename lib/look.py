"""Pictures of a dataset: `python data.py view DIR [ID ...]`.

sheet.png shows the first frame, its depth and the path from above of every sample, with the
doctor's verdict; ID/scene.html is the page of a sampled world, made from the ground truth as the
model gets it: cut, resized, the first camera as the world, lengths in scene units."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from geometry import normalize_scene
from lib import pictures
from lib.crop import focal_and_centre, fractions, stretched
from lib.distributed import say
from lib.export import Scene, measure
from lib.page import write_page
from lib.verify import inspect, load_raw

MOST = 64  # samples on a sheet
HIGH = 160  # pixels of a picture on it


def true_scene(clip):
    """Scene of a clip of load_clip."""
    rgb = pictures.as_pixels(clip["video"])
    size, mask = rgb.shape[1:3], clip["depth"] > 1e-3
    maps = (clip["depth"].double()[None], clip["w2c"][None], clip["intrinsics"][None], mask[None])
    depth, w2c, scale = normalize_scene(*maps)
    depth, w2c = depth[0].float().numpy(), w2c[0].double().numpy()
    depth[~mask.numpy()] = 0
    k = fractions(focal_and_centre(clip["intrinsics"]), size)
    known = pictures.off_edges(depth) & mask.numpy()
    flat = np.ones_like(depth)
    scene = Scene(rgb, depth, flat, known, w2c, k, w2c, k, clip["fps"], "scene units", drop=0.0)
    report = measure(scene) | dict(unit=dict(scale=1.0, fitted=True, residual=0.0))
    length = "units of its depth" if clip["relative"] else "m"
    facts = f"ground truth of {clip['id']}; 1 scene unit = {float(scale[0]):.4g} {length}"
    scene.report = dict(report, truth=True, prompt=clip["prompt"] or clip["id"], facts=facts)
    return scene


def fitted(picture):
    """Resized to the height of a row, nearest."""
    h, w = picture.shape[:2]
    size = HIGH, round(w * HIGH / h)
    return stretched(picture.transpose(2, 0, 1), size).permute(1, 2, 0).numpy()


def worst_pair(raw, pair, folder):
    """The two frames whose depth disagrees most, side by side."""
    shown = [raw["rgb"][t] for t in pair if t in raw["rgb"]]
    if len(shown) == 2:
        pictures.write_png(folder / "worst_pair.png", np.concatenate(shown, 1))
        return f"{folder}/worst_pair.png (frames {pair[0]} and {pair[1]})"


def view(samples, load, out, wanted=()):
    """Write the sheet and the pages of the wanted ids; load(sample): the clip of load_clip."""
    out, rows, titles = Path(out), [], []
    if unknown := sorted(set(wanted) - {s["id"] for s in samples}):
        raise ValueError(f"no sample {unknown[0]!r}; the first is {samples[0]['id']!r}")
    shown = [s for s in samples if s["id"] in wanted] or samples
    out.mkdir(parents=True, exist_ok=True)
    for sample in tqdm(shown[:MOST], desc="view", unit="clip", disable=None):
        try:
            report = inspect(raw := load_raw(sample))
            status = ", ".join([report.status, *report.suspects])
        except ValueError as error:
            report, status = None, str(error)
        try:
            scene = true_scene(load(sample))
        except ValueError as error:
            say(f"skipped {sample['id']}: {error}")
            continue
        near, far = map(pictures.number, np.quantile(scene.depth[scene.depth > 0], (0.02, 0.98)))
        said = f"{sample['id']}: {status}; depth {near} to {far}; {sample['prompt']}"
        depth = pictures.depth_to_rgb(scene.depth[0], *pictures.depth_range(scene.depth[0]))
        path = pictures.top_view([(scene.w2c, pictures.COMMANDED)], (HIGH, HIGH))
        rows.append([fitted(scene.rgb[0]), fitted(depth), path])
        titles.append(said[:90])
        if sample["id"] in wanted:
            folder = out / sample["id"]
            folder.mkdir(exist_ok=True)
            write_page(scene, folder / "scene.html")
            say(f"{folder}/scene.html")
            if report and report.status == "fail" and report.worst:
                say(worst_pair(raw, report.worst, folder) or "")
    if not rows:
        raise ValueError(f"{out}: no sample could be shown")
    pictures.write_png(out / "sheet.png", pictures.sheet(rows, titles))
    more = f", the first {MOST} of {len(shown)}" if len(shown) > MOST else ""
    print(f"{out}/sheet.png: {len(rows)} samples{more}")
