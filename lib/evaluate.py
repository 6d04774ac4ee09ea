"""Evaluation of a model on cached clips: one row of metrics per condition, trivial baselines, table and picture."""

import json

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
    SEEN,
    TOLD,
    depth_legend,
    depth_to_rgb,
    enlarge,
    sheet,
    sure_to_rgb,
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
    """Metrics of one batch in scene units; translation is the mean distance of the camera centres.  With the model's
    output `out` also how far its heads agree and how well its confidence sorts the errors.  TAE leaves out what moves by
    itself, if the clip says so (cameras alone do not explain its depth)."""
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


@torch.no_grad()
def evaluate(model, clips, dev, autocast, options, rank=0, world=1, picture=None, more_sigmas=()):
    """Mean metrics over clips with fixed noise -> {"poses given": row, "no poses": row}, split over ranks.

    options: train.py's globals; picture(image) receives the comparison of the first clip.  The diffusion loss is the
    mean over five noise levels; geometry is read out at options.eval_sigma, and at more_sigmas in rows of their own."""
    eval_sigma = options.eval_sigma
    core = getattr(model, "module", model)
    sums = {}
    n = min(len(clips), options.eval_clips)
    for turn in range(
        rank, n + -n % world, world
    ):  # as many on every rank: sharded weights are gathered in each
        i = min(turn, n - 1)
        b = clips[i]
        noise = b["noise"]
        for given in (1, 0):
            row, keep = {}, torch.full((1,), float(given), device=dev)

            def look(sigma, **what):
                t = torch.full((1,), 1000 * sigma, device=dev)
                with autocast:
                    return core(
                        (1 - sigma) * b["latents"] + sigma * noise,
                        t,
                        b["text"],
                        y=b["y"],
                        clip=b.get("clip"),
                        plucker=b["plucker"],
                        poses=b["pose_enc"],
                        keep=keep,
                        **what,
                    )

            for sigma in (0.1, 0.3, 0.5, 0.7, 0.9) if core.stage != 1 or given else ():
                loss = flow_matching_loss(
                    look(sigma, heads=False)["velocity"], b["latents"], noise
                ).item()
                row["diffusion"] = row.get("diffusion", 0) + loss / 5
            title = "poses given" if given else "no poses"
            rows = {title: row}
            for sigma in (eval_sigma, *more_sigmas) if core.stage else ():
                out = look(sigma, video=core.stage == 2)
                w2c, _ = decode_pose(out["pose_enc"][-1], b["depth"].shape[-2:])
                name = title if sigma == eval_sigma else f"{title}, sigma {sigma:g}"
                rows.setdefault(name, {}).update(
                    geometry_row(out["depth"], out["points"], w2c, b, out)
                )
                if picture and i == 0 and given and sigma == eval_sigma:
                    picture(comparison(b, out, clips.frames(i)))
            for name, row in rows.items() if turn == i else ():
                for key, value in row.items():
                    sums.setdefault(name, {}).setdefault(key, []).append(float(value))
    everyone = gathered(sums)
    sums = {
        name: {key: sum((g.get(name, {}).get(key, []) for g in everyone), []) for key in row}
        for name, row in sums.items()
    }
    return {name: {key: sum(v) / len(v) for key, v in row.items()} for name, row in sums.items()}


def comparison(b, out, frames=None):
    """Frames, true depth, predicted depth, confidence of up to 5 frames of the first clip in a batch, bright is near, and
    sure; below them the true and the predicted camera path from above.   frames (T, H, W, 3) uint8, or None."""
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
        sure_to_rgb(conf[pick], conf.min(), conf.max()),
    ]
    titles = ["true depth, bright is near", "predicted depth", "confidence, bright is sure"]
    if frames is not None:
        rows, titles = [frames[pick], *rows], [f"frames {', '.join(map(str, pick))}", *titles]
    rows = [[enlarge(picture, 200) for picture in row] for row in rows]
    predicted, _ = decode_pose(out["pose_enc"][-1].float(), true.shape[-2:])
    paths = [relative_to_first(E.double())[0].cpu().numpy() for E in (b["w2c"], predicted)]
    h, w = rows[0][0].shape[:2]
    above = top_view(list(zip(paths, (TOLD, SEEN))), (max(200, h), 2 * w + 4))
    return sheet(
        rows,
        titles,
        [
            ("from above: cyan true, orange predicted", above),
            ("depth, scene units", depth_legend(low, high, 2 * w)),
        ],
    )


def baselines(train_clips, val_clips, dev, eval_clips):
    """Two trivial predictors.  fair: mean depth of the training set, identity cameras; oracle: each clip's own mean
    depth, and its true cameras for the points."""

    def prepared(clips, n):
        return (clips[i] for i in range(min(n, len(clips))))

    means = [b["depth"][b["mask"]].mean().item() for b in prepared(train_clips, 256)]
    fair_depth, rows = sum(means) / len(means), dict(fair=[], oracle=[])
    for b in prepared(val_clips, eval_clips):
        identity = torch.eye(4, device=dev)[:3].expand_as(b["w2c"])
        for name, value, cameras in (
            ("fair", fair_depth, identity),
            ("oracle", b["depth"][b["mask"]].mean(), b["w2c"]),
        ):
            depth = torch.full_like(b["depth"], float(value))
            rows[name].append(
                geometry_row(depth, unproject(depth, cameras, b["intrinsics"]), identity, b)
            )
    rows = {
        name: {k: sum(float(r[k]) for r in rs) / len(rs) for k in rs[0]}
        for name, rs in rows.items()
    }
    for key in ("rot_deg", "trans", "auc30", "ate", "rpe_trans", "rpe_rot"):
        rows["oracle"].pop(key)
    return {
        "baseline fair (train mean depth, identity pose)": rows["fair"],
        "baseline oracle (clip's own mean depth)": rows["oracle"],
    }


def print_table(rows, file=None):
    """The headline metrics of each condition in a row, then every other metric in a line of its own."""

    def cells(pairs):
        return "".join(f"{row[key]:8.3f}" if key in row else f"{'-':>8s}" for row, key in pairs)

    print(f"{'':50s}" + "".join(f"{title:>8s}" for title in COLUMNS.values()), file=file)
    for name, row in rows.items():
        print(f"{name:50s}" + cells((row, key) for key in COLUMNS), file=file)
    print(
        "AbsRel, delta1 of the depth head without alignment; TAE: its flicker in percent; points, F: mean distance of the "
        "point\nhead, F-score at 0.05; agree: point head against unprojected depth head; AUSE: confidence, 0 best; "
        "transl: mean distance\nof the camera centres; lengths in scene units.  With poses given, rotation and "
        "translation are a pass-through check, not\nlearning.  eval.json has all of it.\n\nEvery other metric; its "
        "columns are the rows above, in their order:",
        file=file,
    )
    for key in dict.fromkeys(key for row in rows.values() for key in row if key not in COLUMNS):
        print(f"{key:20s}" + cells((row, key) for row in rows.values()), file=file)


def evaluate_only(model, clips, out, sources, dev, autocast, options, rank=0, world=1):
    """The trivial baselines and every checkpoint of sources on the val split, as a table and OUT/eval.json; a picture of
    the first clip per checkpoint."""
    rows = baselines(clips["train"], clips["val"], dev, options.eval_clips) if rank == 0 else {}
    for source in sources:
        meta = load_weights(model, source)
        model.set_stage(int(meta["stage"]))
        out.mkdir(parents=True, exist_ok=True)
        picture = out / f"eval-stage{meta['stage']}-step{meta['step']}.png"
        found = evaluate(
            model,
            clips["val"],
            dev,
            autocast,
            options,
            rank,
            world,
            lambda image: write_png(picture, image),
            options.eval_more_sigmas,
        )
        rows.update(
            {
                f"stage {meta['stage']} step {meta['step']}, {name}": row
                for name, row in found.items()
            }
        )
    if rank == 0:
        (out / "eval.json").write_text(json.dumps(rows, indent=2))
        print_table(rows)
