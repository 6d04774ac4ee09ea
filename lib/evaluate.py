"""Evaluation of a model on cached clips: one row of metrics per condition, trivial baselines, table
and picture."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from geometry import decode_pose, relative_to_first, unproject
from lib.distributed import gathered
from lib.metrics import (
    ause,
    cloud_metrics,
    depth_metrics,
    head_agreement,
    point_metrics,
    pose_metrics,
    temporal_error,
)
from lib.pictures import (
    COMMANDED,
    PREDICTED,
    confidence_to_rgb,
    depth_legend,
    depth_to_rgb,
    enlarge,
    sheet,
    top_view,
    write_png,
)
from lib.weights import load_weights
from model import flow_matching_loss

COLUMNS = dict(
    abs_rel="AbsRel",
    delta1="delta1",
    tae="TAE",
    points="points",
    f_score="F",
    agreement="agree",
    ause="AUSE",
    rot_deg="rot deg",
    trans="transl",
    diffusion="diff",
)


def geometry_row(depth, points, w2c, b, out=None):
    """Metrics of one batch in scene units; translation is the mean distance of the camera centres.
    With the model's output `out` also how far its heads agree and how well its confidence sorts the
    errors.  TAE leaves out what moves by itself, if the clip says so (cameras alone do not explain
    its depth)."""
    gt, mask = b["depth"], b["mask"]
    still = mask & ~b["moving"] if "moving" in b else mask
    row = {
        name + ("" if align == "none" else f"_{align}"): value
        for align in ("none", "median", "scale_shift")
        for name, value in depth_metrics(depth, gt, mask, align).items()
    }
    p = point_metrics(points, b["points"], mask)
    row.update(
        points=p["dist"],
        points_rel=p["rel"],
        tae=temporal_error(depth, b["w2c"], b["intrinsics"], still),
        **cloud_metrics(points, b["points"], mask),
        **pose_metrics(w2c, b["w2c"]),
    )
    if out is not None:
        _, K = decode_pose(out["pose_enc"][-1], gt.shape[-2:])
        error = ((depth - gt).abs() / gt).where(mask, torch.zeros_like(gt))
        row.update(
            agreement=head_agreement(points, depth, w2c, K, mask),
            ause=ause(error, out["depth_conf"], mask),
            ause_points=ause((points - b["points"]).norm(dim=-1), out["points_conf"], mask),
        )
    return row


@dataclass(frozen=True)
class How:
    """How to evaluate: on what, how much, at which noise level, and by which of the ranks."""

    device: torch.device
    autocast: object
    clips: int  # of a split, at most
    sigma: float  # noise level of the geometry read-out
    rank: int = 0
    world: int = 1


DIFFUSION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def look(model, b, sigma, how, keep, **what):
    """The model's output on a prepared batch at a noise level; keep 0 hides the camera."""
    t = torch.full((1,), 1000 * sigma, device=how.device)
    x = (1 - sigma) * b["latents"] + sigma * b["noise"]
    camera = dict(plucker=b["plucker"], poses=b["pose_enc"])
    camera["keep"] = torch.full((1,), float(keep), device=how.device)
    with how.autocast:
        return model(x, t, b["text"], y=b["y"], clip=b.get("clip"), **camera, **what)


def rows_of_clip(model, b, how, more_sigmas, show):
    """Rows of one clip: name -> metrics, with poses given and without.

    show(out)   receives the output with poses given at the usual noise level"""
    rows = {}
    for given, title in ((1, "poses given"), (0, "no poses")):
        row = rows.setdefault(title, {})
        if model.stage != 1 or given:  # a stage 1 video does not know about poses
            row["diffusion"] = 0
            for sigma in DIFFUSION_SIGMAS:
                velocity = look(model, b, sigma, how, given, heads=False)["velocity"]
                loss = flow_matching_loss(velocity, b["latents"], b["noise"]).item()
                row["diffusion"] += loss / len(DIFFUSION_SIGMAS)
        for sigma in (how.sigma, *more_sigmas) if model.stage else ():
            out = look(model, b, sigma, how, given, video=model.stage == 2)
            w2c, _ = decode_pose(out["pose_enc"][-1], b["depth"].shape[-2:])
            name = title if sigma == how.sigma else f"{title}, sigma {sigma:g}"
            row = rows.setdefault(name, {})
            row.update(geometry_row(out["depth"], out["points"], w2c, b, out))
            if given and sigma == how.sigma:
                show(out)
    return rows


@torch.no_grad()
def evaluate(model, examples, how, picture=None, more_sigmas=()):
    """Mean metrics over clips -> {"poses given": row, "no poses": row}, shared by the ranks.

    examples     len(), [i] -> prepared batch of one clip with its "noise", frames(i)
    picture      receives the comparison of the first clip
    more_sigmas  further noise levels, in rows of their own
    The diffusion loss is the mean over DIFFUSION_SIGMAS."""
    n, found = min(len(examples), how.clips), []
    # As many turns on every rank: sharded weights are gathered in each.
    for turn in range(how.rank, n + -n % how.world, how.world):
        i = min(turn, n - 1)
        b = examples[i]

        def show(out, i=i, b=b):
            if picture and i == 0:
                picture(comparison(b, out, examples.frames(i)))

        rows = rows_of_clip(model, b, how, more_sigmas, show)
        if turn == i:
            found.append(rows)
    return mean_over_ranks(found)


def mean_over_ranks(found):
    """Mean rows over the clips of all ranks; found: name -> row of each clip of this rank."""
    sums = {}
    for rows in sum(gathered(found), []):
        for name, row in rows.items():
            for key, value in row.items():
                sums.setdefault(name, {}).setdefault(key, []).append(float(value))
    return {
        name: {key: sum(values) / len(values) for key, values in row.items()}
        for name, row in sums.items()
    }


def comparison(b, out, frames=None):
    """Frames, true depth, predicted depth, confidence of up to 5 frames of the first clip in a
    batch, bright is near, and
    sure; below them the true and the predicted camera path from above.   frames (T, H, W, 3) uint8,
                                                                          or None."""
    true, depth, conf = (
        x[0].float().cpu().numpy() for x in (b["depth"], out["depth"], out["depth_conf"])
    )
    pick = list(range(0, len(true), max(1, (len(true) - 1) // 4)))[:5]
    low, high = (
        (float(x) for x in np.quantile(true[true > 0], (0.01, 0.99)))
        if (true > 0).any()
        else (1.0, 2.0)
    )
    rows = [
        depth_to_rgb(true[pick], low, high),
        depth_to_rgb(depth[pick], low, high),
        confidence_to_rgb(conf[pick], conf.min(), conf.max()),
    ]
    titles = ["true depth, bright is near", "predicted depth", "confidence, bright is sure"]
    if frames is not None:
        rows, titles = [frames[pick], *rows], [f"frames {', '.join(map(str, pick))}", *titles]
    rows = [[enlarge(picture, 200) for picture in row] for row in rows]
    predicted, _ = decode_pose(out["pose_enc"][-1].float(), true.shape[-2:])
    paths = [relative_to_first(E.double())[0].cpu().numpy() for E in (b["w2c"], predicted)]
    h, w = rows[0][0].shape[:2]
    above = top_view(list(zip(paths, (COMMANDED, PREDICTED))), (max(200, h), 2 * w + 4))
    return sheet(
        rows,
        titles,
        [
            ("from above: cyan true, orange predicted", above),
            ("depth, scene units", depth_legend(low, high, 2 * w)),
        ],
    )


def baselines(train, val, how):
    """Two trivial predictors of depth and cameras.

    fair     mean depth of the training set, identity cameras
    oracle   each clip's own mean depth, and its true cameras for the points"""
    means = []
    for i in range(min(256, len(train))):
        b = train[i]
        means.append(b["depth"][b["mask"]].mean().item())
    rows = dict(fair=[], oracle=[])
    for i in range(min(how.clips, len(val))):
        b = val[i]
        identity = torch.eye(4, device=how.device)[:3].expand_as(b["w2c"])
        own_mean = float(b["depth"][b["mask"]].mean())
        for name, value, cameras in (
            ("fair", sum(means) / len(means), identity),
            ("oracle", own_mean, b["w2c"]),
        ):
            depth = torch.full_like(b["depth"], value)
            points = unproject(depth, cameras, b["intrinsics"])
            rows[name].append(geometry_row(depth, points, identity, b))
    means = {
        name: {k: sum(float(r[k]) for r in rs) / len(rs) for k in rs[0]}
        for name, rs in rows.items()
    }
    for key in ("rot_deg", "trans", "auc30", "ate", "rpe_trans", "rpe_rot"):
        means["oracle"].pop(key)
    return {
        "baseline fair (train mean depth, identity pose)": means["fair"],
        "baseline oracle (clip's own mean depth)": means["oracle"],
    }


def print_table(rows, file=None):
    """The headline metrics of each condition in a row, then every other metric in a line of its
    own."""

    def cells(pairs):
        return "".join(f"{row[key]:8.3f}" if key in row else f"{'-':>8s}" for row, key in pairs)

    print(f"{'':50s}" + "".join(f"{title:>8s}" for title in COLUMNS.values()), file=file)
    for name, row in rows.items():
        print(f"{name:50s}" + cells((row, key) for key in COLUMNS), file=file)
    print(
        "AbsRel, delta1 of the depth head without alignment; TAE: its flicker in percent; points, "
        "F: mean distance of the "
        "point\nhead, F-score at 0.05; agree: point head against unprojected depth head; AUSE: "
        "confidence, 0 best; "
        "transl: mean distance\nof the camera centres; lengths in scene units.  With poses given, "
        "rotation and "
        "translation are a pass-through check, not\nlearning.  eval.json has all of it.\n\nEvery "
        "other metric; its "
        "columns are the rows above, in their order:",
        file=file,
    )
    for key in dict.fromkeys(key for row in rows.values() for key in row if key not in COLUMNS):
        print(f"{key:20s}" + cells((row, key) for row in rows.values()), file=file)


def evaluate_only(model, examples, out, sources, how, more_sigmas=()):
    """The baselines and every checkpoint of sources on the val split: a table, OUT/eval.json, and
    a picture of the first clip for each checkpoint.

    examples   split -> examples, as evaluate takes them"""
    rows = baselines(examples["train"], examples["val"], how) if how.rank == 0 else {}
    names = set()
    for source in sources:
        meta = load_weights(model, source)
        model.set_stage(int(meta["stage"]))
        out.mkdir(parents=True, exist_ok=True)
        name, file = f"stage {meta['stage']} step {meta['step']}", ""
        if name in names:  # two runs side by side: told apart by their folders
            file = "-" + Path(source).resolve().parent.name
            name += f" ({source})"
        names.add(name)
        picture = out / f"eval-stage{meta['stage']}-step{meta['step']}{file}.png"
        show = partial(write_png, picture)
        found = evaluate(model, examples["val"], how, show, more_sigmas)
        rows.update({f"{name}, {title}": row for title, row in found.items()})
    if how.rank == 0:
        (out / "eval.json").write_text(json.dumps(rows, indent=2))
        print_table(rows)
