"""The run folder: checkpoints in and out, which are kept, from which a run goes on.

It holds step-N.safetensors (the trainable tensors; config, git hash and command as metadata),
step-N.optim.safetensors (the optimizer's moments) and latest.safetensors, a hard link to the newest
(for one expert of a pair also high_noise_model.safetensors or low_noise_model.safetensors)."""

import json
import os
import pathlib
import re
import shutil
from functools import partial

import torch
import torch.distributed as dist

from lib.distributed import copy_into, gathered, is_spread, say
from lib.files import write_aside
from lib.guards import printable
from lib.strangers import config_from_metadata, naming
from lib.tensors import write_tensors
from lib.weights import digest, metadata_of, read_checked, read_metadata, read_tensors
from model import FantasyWorld
from wan import check_names, shapes_of


# ----------------------------------------------------------------------------------------- saving
def local_optimizer(optimizer):
    """The optimizer of this rank's parameters: its share of a sharded one, or itself."""
    return getattr(optimizer, "optim", optimizer)


def training_state(model, optimizer):
    """What a checkpoint holds: name -> trainable tensor, "name|key" -> AdamW's state.

    To be called on all ranks: what is spread is gathered on rank 0's host, tensor by tensor."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    names = {p: n for n, p in model.named_parameters()}

    def gather(tensor):
        if not is_spread(tensor):
            return tensor
        tensor = tensor.full_tensor()
        return tensor.cpu() if first else None

    sharded = local_optimizer(optimizer) is not optimizer
    states = gather_shares(optimizer) if sharded else optimizer.state
    weights = {name: gather(value) for name, value in model.trainable_state_dict().items()}
    moments = {}
    for p, state in states.items():
        moments.update({f"{names[p]}|{key}": gather(value) for key, value in state.items()})
    return weights, moments


def gather_shares(optimizer):
    """parameter -> AdamW state of a sharded optimizer, all of it on rank 0's host.

    Each owner sends its share; torch's consolidate_state_dict takes minutes for GBs."""
    mine, everything = local_optimizer(optimizer).state, {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    owned = gathered({i: list(mine[p]) for i, p in enumerate(parameters) if p in mine})
    rank = dist.get_rank()
    for owner, keys_of in enumerate(owned):
        for i, keys in keys_of.items():
            p = parameters[i]
            for key in keys:
                empty = torch.zeros((), device=p.device) if key == "step" else torch.empty_like(p)
                value = mine[p][key] if owner == rank else empty
                dist.broadcast(value, owner)
                if rank == 0:
                    everything.setdefault(p, {})[key] = value.detach().cpu()
    return everything


def save_checkpoint(out, step, state, metadata, *, keep_last, keep_every=0):
    """OUT/step-N.safetensors, its optimizer state beside it, latest as a hard link; then prune.

    state   weights and moments, of training_state
    Raises OSError when the disk is full or gone; what was saved before is then untouched."""
    weights, moments = state
    # A path of other bytes than UTF-8 would make the file unreadable.
    told = {k: v.encode("utf-8", "backslashreplace").decode() for k, v in metadata.items()}
    facts = {**told, "step": str(step), "digest": "2"}
    whole = dict(facts, sha256=digest(weights, facts))
    facts["weights"] = whole["sha256"]  # the moments name the weights that they are of
    beside = dict(facts, sha256=digest(moments, facts))
    # The weights make a checkpoint: last.  No more than a tensor of either is copied at a time.
    try:
        for end, tensors, told in ((".optim", moments, beside), ("", weights, whole)):
            path = out / f"step-{step}{end}.safetensors"
            write_aside(path, partial(write_tensors, tensors, told))
        try:
            link_latest(out, step)
            prune(out, step, keep_last, keep_every)
        except (OSError, ValueError) as error:  # the step itself is there, and a resume finds it
            say(f"warning: step {step} is saved; what follows is not done ({error})")
    finally:
        remove_leftovers(out)  # moments that found room where the weights did not; half a link


def link_latest(out, step):
    """latest.safetensors becomes a hard link to a checkpoint; it is replaced, never missing.  That
    of an expert is also called high_noise_model or low_noise_model."""
    path = out / f"step-{step}.safetensors"
    expert = read_metadata(path).get("expert")
    for name in ("latest", *([f"{expert}_noise_model"] if expert else [])):
        known, link = out / f"{name}.safetensors", out / f".{name}.tmp"
        link.unlink(missing_ok=True)
        if known.exists() and path.samefile(known):
            continue
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, known)


def prune(out, newest, keep_last, keep_every):
    """Delete all but the newest keep_last; multiples of keep_every lose their optimizer only."""
    older = [step for step in saved_steps(out) if step < newest]
    for step in older[: max(0, len(older) - keep_last + 1)]:
        if not keep_every or step % keep_every:
            (out / f"step-{step}.safetensors").unlink()
        (out / f"step-{step}.optim.safetensors").unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- going on
def saved_steps(out):
    """Steps of the checkpoints in a run folder, oldest first."""
    names = [path.name for path in out.glob("step-*.safetensors")]
    found = [re.fullmatch(r"step-(\d+)\.safetensors", name) for name in names]
    return sorted(int(match[1]) for match in found if match)


def check_step(out, step):
    """ValueError unless a step's files are whole, of one save, and say all that a resume needs."""
    path = out / f"step-{step}.safetensors"
    meta = read_checked(path)[1]
    config_from_metadata(meta, path)
    config, stage = json.loads(meta["train_config"]), meta["stage"]
    if not isinstance(config, dict) or stage not in ("0", "1", "2") or int(meta["step"]) != step:
        raise ValueError(f"{path}: its metadata is of step {meta['step']}, or without options")
    beside = out / f"step-{step}.optim.safetensors"
    check_pair(path, meta, beside, read_checked(beside)[1])


def check_pair(path, meta, beside, of):
    """The optimizer state of a checkpoint must be that of its weights."""
    if of.get("weights", meta.get("sha256")) != meta.get("sha256"):
        cure = "copy both files of one save"
        raise ValueError(f"{beside}: not the optimizer state of {path.name}; {cure}")


def newest_valid(out):
    """The newest step from which a run can go on, else None; others are named and stay."""
    for step in reversed(saved_steps(out)):
        try:
            check_step(out, step)
            return step
        except (ValueError, KeyError, TypeError) as error:
            said = error if isinstance(error, ValueError) else f"{out}/step-{step}: no {error}"
            say(f"warning: checkpoint passed over: {said}")


def remove_leftovers(out):
    """Remove what a killed save left: our unfinished files, optimizer states without weights."""
    names = r"\.(step-\d+(\.optim)?\.safetensors\.\d+|latest|\w+_noise_model)\.tmp"
    for path in [*out.glob(".*.tmp"), *out.glob("step-*.optim.safetensors")]:
        ours = re.fullmatch(names, path.name)
        weights = path.with_name(path.name.replace(".optim", ""))
        if ours or path.suffix != ".tmp" and not weights.exists():
            path.unlink()


def choose_start(out, asked):
    """The checkpoint to go on from ("" = none), after a killed run's leftovers; for rank 0.

    asked   a file, "" for a fresh start, or auto: the newest valid one of the run folder"""
    if out.is_dir():
        remove_leftovers(out)
    newest = newest_valid(out)
    if asked == "auto" and newest is not None:
        link_latest(out, newest)  # a kill may have come between the file and its link
        return f"{out}/step-{newest}.safetensors"
    if asked == "auto":
        left = [out / f"step-{step}.safetensors" for step in saved_steps(out)]
        if left := [*left, *out.glob("latest.safetensors")]:
            found = "a run from step 0 would replace it; no step with its optimizer state is whole"
            raise ValueError(f"{left[0]}: {found}. Fix: move it away, or choose another --out_dir")
        return ""
    first = int(metadata_of(asked).get("step", 0)) if asked else 0
    if newest is not None and newest > first:
        found = f"{out} holds checkpoints later than step {first}, up to {newest}"
        cure = "this run would mix with them. Use another --out_dir, or delete them"
        raise ValueError(f"{found}; {cure}")
    return asked


def load_optimizer(path, model, optimizer, of=None):
    """Copy saved moments into an optimizer of the same parameters.

    of   (path, metadata) of the weights that they must belong to"""
    params, (tensors, meta) = dict(model.named_parameters()), read_tensors(path)
    if of is not None:
        check_pair(*of, path, meta)
    wanted = {name for name, p in params.items() if p.requires_grad}
    if differ := wanted ^ {name.split("|")[0] for name in tensors}:
        found = f"{len(differ)} parameters differ from this model's, first {min(differ)}"
        raise ValueError(f"{path}: {found}; of another stage, --optimizer or model_overrides")
    local = local_optimizer(optimizer)
    own = {p: group for group in local.param_groups for p in group["params"]}  # sharded: a part
    for name, value in tensors.items():
        parameter, key = name.split("|")
        if (p := params[parameter]) in own:
            like = value if key == "step" else p
            moment = torch.empty_like(like, device=p.device, requires_grad=False)
            copy_into(moment, value)
            local.state[p][key] = moment
    keys = {True: {"momentum"}, False: {"step", "exp_avg", "exp_avg_sq"}}
    if any(local.state[p].keys() != keys["orthogonal" in group] for p, group in own.items()):
        cure = "keep it, or start another --out_dir with --init_from"
        raise ValueError(f"{path}: the state of another --optimizer; {cure}")


# --------------------------------------------------------------------------------------- checking
def describe(path):
    """What a checkpoint holds, as text; ValueError: it is damaged, or no state of its model."""
    tensors, meta = read_checked(path)
    if "weights" in meta:
        return printable(f"{path}: whole, the optimizer state of step {meta.get('step')}")
    if missing := [key for key in ("stage", "step", "model_config") if key not in meta]:
        raise ValueError(f"{path}: no {', '.join(missing)} in it: not a checkpoint of train.py")
    cfg = config_from_metadata(meta, path)
    if meta["stage"] not in ("0", "1", "2"):
        raise ValueError(f"{path}: stage {meta['stage']!r:.60}; wanted 0, 1 or 2")
    with naming(path), torch.device("meta"):
        model = FantasyWorld(cfg).set_stage(int(meta["stage"]))
    wanted, found = shapes_of(model.trainable_state_dict()), shapes_of(tensors)
    check_names(wanted, found, f"{path}: not those of its model", cure="Copy it again")
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{path}: {len(bad)} tensors are not finite, first {bad[0]}")
    optimizer = pathlib.Path(path).with_name(f"step-{meta['step']}.optim.safetensors")
    numbers = sum(v.numel() for v in tensors.values())
    size = sum(v.nbytes for v in tensors.values())
    lines = [
        f"{path}: whole, and fits its model",
        printable(f"stage {meta['stage']}, step {meta['step']}, git {meta.get('git')}"),
        printable(f"command {meta.get('command')}"),
        printable(f"versions {meta.get('versions')}"),
        f"{len(tensors)} tensors, {numbers:,} parameters, {size:,} bytes, sha256 "
        f"{meta.get('sha256', 'not recorded')}; the first is {min(tensors)}",
        f"optimizer state {'beside it' if optimizer.exists() else 'absent'}: {optimizer.name}",
    ]
    return "\n".join(lines)
