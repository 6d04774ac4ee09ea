"""The run folder: checkpoints in and out, which are kept, from which a run goes on.

It holds step-N.safetensors (the trainable tensors; config, git hash and command as metadata),
step-N.optim.safetensors (AdamW's moments) and latest.safetensors, a hard link to the newest."""

import os
import pathlib
import re
import shutil
from functools import partial

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lib.distributed import DTensor, copy_into, gather_full, gathered
from lib.files import write_aside
from lib.weights import config_from_metadata, digest, read_checked, read_tensors
from model import FantasyWorld


def save_checkpoint(out, step, weights, moments, metadata, keep_last, keep_every=0):
    """OUT/step-N.safetensors (trainable tensors), its optimizer state beside it, latest as a hard
    link; prune.

    weights, moments   of training_state

    Raises OSError or SafetensorError when the disk is full or gone; what was saved before is then
    untouched."""
    for end, tensors in ((".optim", moments), ("", weights)):  # the weights make a checkpoint: last
        content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        told = {**metadata, "step": str(step), "sha256": digest(content)}
        write_aside(
            out / f"step-{step}{end}.safetensors", partial(save_file, content, metadata=told)
        )
        del content  # one of the two copies at a time
    link_latest(out, step)
    prune(out, step, keep_last, keep_every)


def link_latest(out, step):
    """latest.safetensors becomes a hard link to a checkpoint; it is replaced, so it is never
    missing."""
    path, latest, link = (
        out / f"step-{step}.safetensors",
        out / "latest.safetensors",
        out / "latest.tmp",
    )
    link.unlink(missing_ok=True)
    if latest.exists() and path.samefile(latest):
        return
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)
    os.replace(link, latest)


def prune(out, newest, keep_last, keep_every):
    """Delete checkpoints before the newest but keep_last; those at multiples of keep_every lose
    their optimizer only."""
    older = [step for step in saved_steps(out) if step < newest]
    for step in older[: max(0, len(older) - keep_last + 1)]:
        if not keep_every or step % keep_every:
            (out / f"step-{step}.safetensors").unlink()
        (out / f"step-{step}.optim.safetensors").unlink(missing_ok=True)


def training_state(model, optimizer):
    """What a checkpoint holds: name -> trainable tensor, "name|key" -> AdamW's state.

    To be called on all ranks: what is spread over them is gathered tensor by tensor, on the host of
    rank 0."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    names = {p: n for n, p in model.named_parameters()}

    def gather(tensor):
        if not isinstance(tensor, DTensor):
            return tensor
        tensor = gather_full(tensor)
        return tensor.cpu() if first else None

    states = gather_shares(optimizer) if hasattr(optimizer, "optim") else optimizer.state
    weights = {name: gather(value) for name, value in model.trainable_state_dict().items()}
    moments = {}
    for p, state in states.items():
        moments.update({f"{names[p]}|{key}": gather(value) for key, value in state.items()})
    return weights, moments


def gather_shares(optimizer):
    """parameter -> AdamW state of a sharded optimizer, all of it on rank 0's host.

    Each owner sends its share; torch's consolidate_state_dict takes minutes for GBs."""
    mine, everything = optimizer.optim.state, {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    owned = gathered({i: list(mine[p]) for i, p in enumerate(parameters) if p in mine})
    rank = dist.get_rank()
    for owner, share in enumerate(owned):
        for i, keys in share.items():
            p = parameters[i]
            for key in keys:
                empty = torch.zeros((), device=p.device) if key == "step" else torch.empty_like(p)
                value = mine[p][key] if owner == rank else empty
                dist.broadcast(value, owner)
                if rank == 0:
                    everything.setdefault(p, {})[key] = value.detach().cpu()
    return everything


def saved_steps(out):
    """Steps of the checkpoints in a run folder, oldest first."""
    found = (
        re.fullmatch(r"step-(\d+)\.safetensors", p.name) for p in out.glob("step-*.safetensors")
    )
    return sorted(int(m[1]) for m in found if m)


def newest_valid(out):
    """The newest step whose weights and optimizer state are undamaged, else None; damaged ones are
    named and stay."""
    for step in reversed(saved_steps(out)):
        try:
            for end in ("", ".optim"):
                read_checked(out / f"step-{step}{end}.safetensors")
            return step
        except ValueError as error:
            print(f"warning: checkpoint passed over: {error}", flush=True)


def remove_leftovers(out):
    """Remove what a killed save left: unfinished files, and optimizer states whose weights were
    never written."""
    for path in [*out.glob("*.tmp"), *out.glob("step-*.optim.safetensors")]:
        weights = path.with_name(path.name.replace(".optim", ""))
        if path.suffix == ".tmp" or not weights.exists():
            path.unlink()


def load_optimizer(path, model, optimizer):
    """Copy saved AdamW moments into an optimizer of the same parameters."""
    params, tensors = dict(model.named_parameters()), read_tensors(path)[0]
    wanted = {name for name, p in params.items() if p.requires_grad}
    if differ := wanted ^ {name.split("|")[0] for name in tensors}:
        raise ValueError(
            f"{path}: {len(differ)} parameters differ from this model's, first {min(differ)}; it "
            "belongs to "
            f"another stage or model_overrides"
        )
    local = getattr(optimizer, "optim", optimizer)
    own = {p for group in local.param_groups for p in group["params"]}  # sharded: a part of them
    for name, value in tensors.items():
        parameter, key = name.split("|")
        p = params[parameter]
        if p in own:
            local.state[p][key] = torch.empty_like(
                value if key == "step" else p, device=p.device, requires_grad=False
            )
            copy_into(local.state[p][key], value)


def describe(path):
    """What a checkpoint holds, as text; ValueError when it is damaged or does not fit the model
    that it names."""
    if str(path).endswith((".pth", ".pt")):
        raise ValueError(
            f"{path}: not a checkpoint of train.py; wanted a .safetensors file of a run folder"
        )
    tensors, meta = read_checked(path)
    if missing := [key for key in ("stage", "step", "model_config") if key not in meta]:
        raise ValueError(
            f"{path}: no {', '.join(missing)} in its metadata: not a checkpoint of train.py"
        )
    with torch.device("meta"):
        model = FantasyWorld(config_from_metadata(meta))
    wanted = {
        k: tuple(v.shape)
        for k, v in model.set_stage(int(meta["stage"])).trainable_state_dict().items()
    }
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if differ := [k for k in {**wanted, **found} if wanted.get(k) != found.get(k)]:
        raise ValueError(
            f"{path}: {len(differ)} tensors are not those of its model, first {differ[0]}: "
            f"{found.get(differ[0])}, wanted {wanted.get(differ[0])}"
        )
    lines = [
        f"{path}: whole, and fits its model",
        f"stage {meta['stage']}, step {meta['step']}, git {meta.get('git')}",
        f"command {meta.get('command')}",
        f"versions {meta.get('versions')}",
        f"{len(tensors)} tensors, {sum(v.numel() for v in tensors.values()):,} parameters, "
        f"{sum(v.nbytes for v in tensors.values()):,} bytes, sha256 "
        f"{meta.get('sha256', 'not recorded')}",
    ]
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(
            f"{path}: {len(bad)} tensors hold values that are not finite, first {bad[0]}"
        )
    lines += [
        f"  {name:60s} {str(tuple(v.shape)):20s} {str(v.dtype).removeprefix('torch.')}"
        for name, v in list(tensors.items())[:8]
    ]
    optimizer = pathlib.Path(path).with_name(f"step-{meta['step']}.optim.safetensors")
    lines.append(
        f"optimizer state {'beside it' if optimizer.exists() else 'absent'}: {optimizer.name}"
    )
    return "\n".join(lines)
