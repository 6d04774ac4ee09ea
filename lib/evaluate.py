"""Evaluation of a model on cached clips: rows of metrics, two baselines, a table, pictures.

A row is {metric: number}, a mean over clips; lengths are in scene units.  Every clip is read with
its camera poses given and without, from true latents made noisy; with How.draw some are also
sampled, see lib/sampled.py.  Definitions and sources of the metrics: lib/metrics.py."""

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

import torch

from geometry import decode_pose, relative_to_first, unproject
from lib import metrics, pictures, sampled
from lib.distributed import Ranks, from_first, gathered, say
from lib.weights import load_weights, metadata_of
from model import flow_matching_loss

# The headline metrics and the words above them.
COLUMNS = dict(abs_rel="AbsRel", delta1="delta1", tae="TAE", points="points", f_score="F")
COLUMNS |= dict(agreement="agree", ause="AUSE", rot_deg="rot deg", trans="transl", diffusion="diff")
FAIR = "baseline fair (train mean depth, identity pose)"
ORACLE = "baseline oracle (clip's own mean depth)"
DIFFUSION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
NOTES = """TAE: flicker of depth in percent.  points, transl: mean distances in scene units.
agree: the point head against the unprojected depth head.  AUSE: how badly confidence sorts errors.
Given poses only pass through: rot deg and transl then show nothing that was learned.
docs/evaluation.md explains every column.

Every other metric; its columns are the rows above, in their order:"""


@dataclass(frozen=True)
class How:
    """On how many clips to evaluate, at which noise level, and on which of the ranks."""

    autocast: object  # context of every forward
    eval_clips: int  # of a split, at most
    eval_sigma: float  # noise level of the geometry read-out
    ranks: Ranks = Ranks()
    window: tuple = (0.0, 1.0)  # noise levels that the model knows: an expert, a part
    eval_samples: int = 0  # clips that are sampled too
    draw: object = None  # samples one, see lib.sampled.sampled_row

    def levels(self, sigmas):
        """Those of sigmas inside the window, or its lower end."""
        low, high = self.window
        return [sigma for sigma in sigmas if low <= sigma <= high] or [low]


def finite(*tensors):
    """Whether all that a model gave is finite; None is what it does not give."""
    return all(x is None or bool(x.isfinite().all()) for x in tensors)


def geometry_row(depth, points, w2c, b, out=None):
    """Metrics of depth (B, T, H, W), points (B, T, H, W, 3) and w2c (B, T, 3, 4) of a batch.

    w2c   None: no metrics of cameras
    out   the model's output: also how far its heads agree, how well confidence sorts the errors
    TAE leaves out what moves by itself, if the clip says so: cameras do not explain its depth."""
    gt, mask = b["depth"], b["mask"]
    if not finite(depth, points, w2c, *(out or {}).values()):
        # The model's fault, in every number of a row; NaN is what the clip cannot say.
        truth = (gt, b["points"], None if w2c is None else b["w2c"])
        zero = out and {k: torch.zeros_like(v) for k, v in out.items() if v is not None}
        return dict.fromkeys(geometry_row(*truth, b, zero), math.inf)
    still = mask & ~b["moving"] if "moving" in b else mask
    row = metrics.depth_metrics(depth, gt, mask)
    for align in ("median", "scale", "scale_shift"):
        aligned = metrics.depth_metrics(depth, gt, mask, align)
        row |= {f"{name}_{align}": value for name, value in aligned.items()}
    distances = metrics.point_metrics(points, b["points"], mask)
    row |= dict(points=distances["dist"], points_rel=distances["rel"])
    row["tae"] = metrics.temporal_error(depth, b["w2c"], b["intrinsics"], still)
    row |= metrics.cloud_metrics(points, b["points"], mask)
    if w2c is not None:
        row |= metrics.pose_metrics(w2c, b["w2c"])
    if out is not None:
        _, K = decode_pose(out["pose_enc"][-1], gt.shape[-2:])
        row["agreement"] = metrics.head_agreement(points, depth, w2c, K, mask)
        error = ((depth - gt).abs() / gt).where(mask, torch.zeros_like(gt))
        row["ause"] = metrics.ause(error, out["depth_conf"], mask)
        error = (points - b["points"]).norm(dim=-1)
        row["ause_points"] = metrics.ause(error, out["points_conf"], mask)
    return row


def output_at(model, b, sigma, how, *, given, heads=True, video=True):
    """The model's output on a prepared batch at a noise level; given False hides the camera."""
    x = (1 - sigma) * b["latents"] + sigma * b["noise"]
    t, keep = x.new_full((1,), 1000 * sigma), x.new_full((1,), float(given))
    camera = dict(plucker=b["plucker"], poses=b["pose_enc"], keep=keep)
    with how.autocast:
        return model(x, t, b["text"], b["y"], b.get("clip"), heads=heads, video=video, **camera)


def diffusion_error(model, b, how, given):
    """Mean flow matching loss of a clip over DIFFUSION_SIGMAS."""
    mean, sigmas = 0.0, how.levels(DIFFUSION_SIGMAS)
    for sigma in sigmas:
        velocity = output_at(model, b, sigma, how, given=given, heads=False)["velocity"]
        mean += flow_matching_loss(velocity, b["latents"], b["noise"]).item() / len(sigmas)
    return math.inf if math.isnan(mean) else mean


def rows_of_clip(model, b, how, more_sigmas=()):
    """Rows of one clip (B = 1) by name, and the output that a picture shows, None in stage 0."""
    rows, shown = {}, None
    sigmas = dict.fromkeys(how.levels((how.eval_sigma, *more_sigmas)) if model.stage else ())
    for title, given in (("poses given", True), ("no poses", False)):
        rows[title] = {}
        if model.stage != 1 or given:  # a stage 1 video does not know about poses
            rows[title]["diffusion"] = diffusion_error(model, b, how, given)
        for sigma in sigmas:
            out = output_at(model, b, sigma, how, given=given, video=model.stage == 2)
            w2c, _ = decode_pose(out["pose_enc"][-1], b["depth"].shape[-2:])
            usual = sigma == how.eval_sigma
            row = rows.setdefault(title if usual else f"{title}, sigma {sigma:g}", {})
            row |= geometry_row(out["depth"], out["points"], w2c, b, out)
            if given and usual:
                shown = out
    return rows, shown


@torch.no_grad()
def evaluate(model, examples, how, picture=None, more_sigmas=()):
    """Mean metrics over clips -> {"poses given": row, "no poses": row}, shared by the ranks.

    examples     len(), [i] -> prepared batch of one clip with its "noise", frames(i)
    picture      receives the comparison of the first clip, on rank 0
    more_sigmas  further noise levels, in rows of their own"""
    n, found = min(len(examples), how.eval_clips), []
    # As many turns on every rank: sharded weights are gathered in each.
    for turn in range(how.ranks.rank, n + -n % how.ranks.world, how.ranks.world):
        b, video = examples[min(turn, n - 1)], None
        rows, shown = rows_of_clip(model, b, how, more_sigmas)
        if turn < min(n, how.eval_samples):
            rows["sampled"], video, shown = sample_clip(model, b, examples.truth(turn), how)
        if turn == 0 and picture and shown and finite(*shown.values()):
            picture(comparison(b, shown, examples.frames(0), video))
        # In the order of the clips; here, not in a step, the others wait for the picture.
        found += gathered(rows if turn < n else {})
    if hasattr(model, "reshard"):  # spread: only a backward lets go of what stays gathered
        model.reshard()
    if hasattr(model, "visits"):  # offloaded: other weights would be loaded over a visitor's copy
        model.visits.go_home()
    return mean_rows(found)


def sample_clip(model, b, truth, how):
    """Sample a clip -> its row, the video as uint8 frames, the output (None in stage 0)."""
    row, video, out = sampled.sampled_row(model, b, truth, how.draw)
    video = pictures.as_pixels(video.cpu())
    if "depth" not in out:
        return row, video, None
    w2c, _ = decode_pose(out["pose_enc"][-1], b["depth"].shape[-2:])
    return row | geometry_row(out["depth"], out["points"], w2c, b, out), video, out


def mean_rows(found):
    """Mean rows by name; found: [{name: row}, ...], one for each clip.  A clip whose value is not
    known (NaN: no two frames share a pixel, say) is left out of that value."""
    values = defaultdict(lambda: defaultdict(list))
    for rows in found:
        for name, row in rows.items():
            for key, value in row.items():
                values[name][key].append(float(value))
    mean = lambda x: torch.tensor(x, dtype=torch.float64).nanmean().item()  # noqa: E731
    return {name: {k: mean(v) for k, v in row.items()} for name, row in values.items()}


def comparison(b, out, frames=None, video=None):
    """One picture of a batch's first clip: a row of its frames, true depth, predicted depth and
    confidence, at five moments at most; below them the camera paths from above.

    frames   (T, H, W, 3) uint8, or None;   video   the same of a sample, whose output is out"""
    maps = (b["depth"], out["depth"], out["depth_conf"])
    true, depth, conf = (x[0].float().cpu().numpy() for x in maps)
    pick = list(range(0, len(true), max(1, (len(true) - 1) // 4)))[:5]
    low, high = pictures.depth_range(true)
    sure = pictures.confidence_to_rgb(conf[pick], conf.min(), conf.max())
    shown = {} if frames is None else {f"frames {', '.join(map(str, pick))}": frames[pick]}
    shown |= {} if video is None else {"sampled": video[pick]}
    shown["true depth, bright is near"] = pictures.depth_to_rgb(true[pick], low, high)
    shown["predicted depth"] = pictures.depth_to_rgb(depth[pick], low, high)
    shown["confidence, bright is sure"] = sure
    rows = [[pictures.enlarge(image, 200) for image in row] for row in shown.values()]
    predicted, _ = decode_pose(out["pose_enc"][-1].float(), true.shape[-2:])
    paths = [relative_to_first(E.double())[0].cpu().numpy() for E in (b["w2c"], predicted)]
    coloured = list(zip(paths, (pictures.COMMANDED, pictures.PREDICTED)))
    h, w = rows[0][0].shape[:2]
    above = pictures.top_view(coloured, (max(200, h), 2 * w + 4))
    legend = pictures.depth_legend(low, high, 2 * w)
    below = [("from above: cyan true, orange predicted", above), ("depth, scene units", legend)]
    return pictures.sheet(rows, list(shown), below)


def mean_depth(b):
    """Of a batch's known pixels; 0 where there are none, and then no metric reads it."""
    known = b["depth"][b["mask"]]
    return known.mean().item() if len(known) else 0.0


def baselines(train, val, how):
    """Rows of two trivial predictors of depth and cameras, and with How.draw those of videos.

    fair     mean depth of the training set (256 clips at most), cameras that stand still; not there
             where none of these has depth
    oracle   each clip's own mean depth, lifted by its true cameras; no metrics of cameras"""
    found, means = [], [x for i in range(min(256, len(train))) if (x := mean_depth(train[i]))]
    if not means:
        say("warning: no training clip has depth: there is no fair baseline")
    for i in range(min(how.eval_clips, len(val))):
        b, rows = val[i], {}
        still = torch.eye(4, device=b["w2c"].device)[:3].expand_as(b["w2c"])
        flat = [(FAIR, sum(means) / len(means), still)] if means else []
        for name, value, cameras in (*flat, (ORACLE, mean_depth(b), b["w2c"])):
            depth = torch.full_like(b["depth"], value)
            points = unproject(depth, cameras, b["intrinsics"])
            rows[name] = geometry_row(depth, points, still if name == FAIR else None, b)
        if i < how.eval_samples:
            rows |= sampled.baseline_rows(b, val.truth(i), how.draw.decode(b["latents"]))
        found.append(rows)
    return mean_rows(found)


def print_table(rows):
    """The headline metrics, a row in a line, samples apart; then every other metric in a line."""
    wide = max([50, *(len(name) + 1 for name in rows)])

    def cells(pairs):
        return "".join(f"{row[key]:8.3f}" if key in row else f"{'-':>8s}" for row, key in pairs)

    def table(columns, rows):
        print(" " * wide + "".join(f"{title:>8s}" for title in columns.values()))
        for name, row in rows.items():
            print(f"{name:{wide}s}" + cells((row, key) for key in columns))

    made = {name: row for name, row in rows.items() if "psnr" in row}
    table(COLUMNS, {name: row for name, row in rows.items() if name not in made})
    if made:
        print("\nVideos, frames 1 .. T-1 (docs/evaluation.md says what the columns are):")
        table(sampled.COLUMNS, made)
    print(NOTES)
    for key in dict.fromkeys(key for row in rows.values() for key in row if key not in COLUMNS):
        print(f"{key:20s}" + cells((row, key) for row in rows.values()))


def name_checkpoints(sources):
    """Checkpoint files -> {file: words of its name}, all different; listed twice counts once.

    The words are "stage S", "step N"; where two would be equal the folder joins, or else the path.
    Raises ValueError for a file that no stage of train.py wrote and that is no release."""
    short = {}
    for source in sources:
        meta = metadata_of(source)
        if meta.get("stage") not in ("0", "1", "2") or "step" not in meta:
            found = "it is no checkpoint of stage 0, 1 or 2, so there is nothing to evaluate"
            raise ValueError(f"{source}: {found}. Fix: list checkpoints that train.py wrote")
        short[source] = (f"stage {meta['stage']}", f"step {meta['step']}")
    names = short
    for more in (lambda source: Path(source).resolve().parent.name, str):
        count = Counter(names.values())
        names = {s: n if count[n] == 1 else (*short[s], more(s)) for s, n in names.items()}
    return names


def evaluate_only(model, examples, out, sources, how, more_sigmas=()):
    """Baselines and the checkpoints of sources on val: a table, OUT/eval.json, a picture of each.

    examples   split -> examples, as evaluate takes them"""
    names = name_checkpoints(sources)
    stages = {words[0] for words in names.values()}
    if "stage 0" in stages and len(stages) > 1:
        raise ValueError("eval_only: stage 0 brings a video branch of its own; evaluate it alone")
    out.mkdir(parents=True, exist_ok=True)
    rows = baselines(examples["train"], examples["val"], how) if how.ranks.rank == 0 else {}
    rows = from_first(rows)  # the others wait here, as long as for a save
    for source, words in names.items():
        model.set_stage(int(load_weights(model, source)["stage"]))
        picture = "-".join(quote(word.replace(" ", ""), safe="") for word in ("eval", *words))
        show = partial(pictures.write_png, out / f"{picture}.png")
        found = evaluate(model, examples["val"], how, show, more_sigmas)
        rows |= {f"{' '.join(words)}, {title}": row for title, row in found.items()}
    if how.ranks.rank == 0:
        print_table(rows)  # first: a full disk does not cost it
        known = json.loads(json.dumps(rows), parse_constant=lambda _: None)  # no NaN in JSON
        (out / "eval.json").write_text(json.dumps(known, indent=2))
