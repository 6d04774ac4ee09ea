"""Every way of tensors into a model: Wan folders, our checkpoints, the release, VGGT-1B; and out.

Which tensor goes where in the release's and VGGT's files is in released.py; this file reads and
writes the files.  A release is recognised by its tensor names, so its model.pth goes wherever a
checkpoint of ours does: sample.py --ckpt, train.py --init_from.
`python -m lib.weights export CKPT OUT` writes a fine-tuned release under the release's names."""

import hashlib
import json
import os
import pathlib
import re
import sys
from dataclasses import replace
from functools import partial

import torch
from safetensors import safe_open

import released
from encoders import check_whole, lazy_tensors, load_state_dict, tensor_shapes, wan_tensors
from lib.distributed import copy_into, say
from lib.files import write_aside
from lib.guards import run_command
from lib.lora import with_lora
from lib.strangers import config_from_metadata, floats, naming
from lib.tensors import bytes_of, write_tensors
from model import Config, FantasyWorld, half_geometry
from wan import WanDiT, check_names, count_layers, half_precision, shapes_of

# --- Files and Wan folders ------------------------------------------------------------------------
# md5 over the names and shapes of each release's DiT.  Source: DiffSynth-Studio's model detection.
FAMILIES = {
    "9269f8db9040a9d860eaca435be61814": "Wan2.1-T2V-1.3B",
    "aafcfd9672c3a2456dc46e1cb6e52c70": "Wan2.1-T2V-14B",
    "6d6ccde6845b95ad9114ab993d917893": "Wan2.1-Fun-1.3B-InP (or V1.1)",
    "ac6a5aa74f4a0aab6f64eb9a72f19901": "Wan2.1-Fun-V1.1-1.3B-Control-Camera",
    "b61c605c2adbd23124d152ed28e049ae": "Wan2.1-Fun-V1.1-14B-Control-Camera",
    "6bfcfb3b342cb286ce886889d519a77e": "Wan2.1-I2V-14B-480P (or 720P, Fun-14B-InP)",
    "47dbeab5e560db3180adf51dc0232fb1": "an expert of Wan2.2-Fun-A14B-Control-Camera",
}


def fingerprint(shapes):
    """md5 of the sorted "name:d0_d1" and "name" of every tensor."""
    items = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()]
    return hashlib.md5(",".join(sorted([*items, *shapes])).encode()).hexdigest()


def read_metadata(path):
    """Metadata of a checkpoint, without its tensors."""
    try:
        check_whole(path)
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint that can be read ({error})") from None


def read_tensors(path):
    """A file of ours -> (name -> tensor, metadata)."""
    meta = read_metadata(path)
    return load_state_dict(path), meta


def read_checked(path):
    """read_tensors of a checkpoint of ours; ValueError unless it is what was saved, bit for bit."""
    tensors, meta = read_tensors(path)
    signed = "sha256" in meta or meta.get("format") == "fantasyworld"
    if signed and meta.get("sha256") != digest(tensors, meta):
        raise ValueError(f"{path}: damaged, says its sha256. Use an older step, or copy it again")
    return tensors, meta


def digest(tensors, meta):
    """sha256 of a checkpoint's metadata (but for this digest) and of its tensors, by name.

    Files without "digest" in their metadata are older: names and bytes alone."""
    total, whole = hashlib.sha256(), "digest" in meta
    if whole:
        facts = sorted((k, v) for k, v in meta.items() if k != "sha256")
        total.update(json.dumps(facts).encode())
    for name in sorted(tensors):
        value = tensors[name]
        said = f"{name} {value.dtype} {tuple(value.shape)}" if whole else name
        total.update(said.encode())
        total.update(bytes_of(value))
    return total.hexdigest()


def find_wan(folder, ckpt):
    """The folder of the video branch that a checkpoint names, or its namesake beside the file."""
    beside = pathlib.Path(ckpt).parent / pathlib.Path(folder).name
    there = not folder or pathlib.Path(folder).is_dir()
    return str(beside) if beside.is_dir() and not there else folder


def load_wan(folder, cfg, device="cpu", dtype=None, lora=""):
    """Frozen WanDiT from the folder of a Wan release or of a stage 0 run, with a LoRA file merged.

    Tensors go to device one by one, big matrices in dtype (default fp32): one copy at most here.
    returns  the model, and cfg with the video sizes of what was found"""
    tensors = with_lora(wan_tensors(folder), lora)
    shapes = tensor_shapes(tensors)
    dit = WanDiT.from_shapes(shapes, cfg.head_dim, cfg.text_len, where=folder)
    found = vars(dit.sizes)
    family = FAMILIES.get(fingerprint(shapes), "a DiT of sizes that no release has")
    say(f"{folder}: {family}:", ", ".join(f"{key} {value}" for key, value in found.items()))
    if cfg.dim != dit.sizes.dim:
        say(f"warning: the geometry branch is sized for width {cfg.dim}. The wrong --preset?")
    wanted = (half_precision(dit, dtype) if dtype else dit).state_dict()
    sd = {name: tensors[name][1]().to(device, wanted[name].dtype, copy=True) for name in wanted}
    dit.load_state_dict(sd, assign=True)
    return dit, replace(cfg, **found)


def load_trained(model, path):
    """Copy a checkpoint's tensors into the model -> its metadata, strings: stage, step, config.

    A checkpoint holds what its stage trains; after stage 1 the interaction keeps its zero start.
    Anything else that is missing, left over or of another shape is a ValueError."""
    sd, meta = read_checked(path)
    own = dict(model.named_parameters())
    check_trained(model, shapes_of(sd), meta.get("stage"), path)
    check_unseen(model.cfg, meta, path)
    for name, value in sd.items():
        copy_into(own[name], value)
    return meta


def check_trained(model, found, stage, path):
    """ValueError unless a checkpoint's tensors, name -> shape, are those of its stage."""
    own = dict(model.named_parameters())
    trained_later = ("camera_adapters.", "exchange.", "ray_encoder.") if stage == "1" else ()
    untrained = trained_later + (() if model.cfg.pose_tokens else ("pose_encoder.",))
    absent = {k for k in own if k.startswith("dit.") != (stage == "0") or k.startswith(untrained)}
    what = f"{path} (stage {stage}) does not fit this model"
    check_names(shapes_of(own), found, what, cure="Use its own preset.", optional=absent)


# Fields of Config that no tensor shows.
UNSEEN = "head_dim text_len taps irg_heads camera_heads camera_iterations pose_tokens".split()
UNSEEN += ["constant_rays", "video_rays"]


def check_unseen(cfg, meta, path):
    """ValueError unless a model computes as the one that a checkpoint of stage 1 or 2 is of."""
    stage, own = meta.get("stage"), vars(cfg)
    known = "model_config" in meta and stage != "0"
    before = vars(config_from_metadata(meta, path)) if known else own
    for key in UNSEEN:
        if before[key] != own[key] and (stage, key) != ("1", "irg_heads"):
            found = f"trained with {key} = {before[key]!r}, this model has {own[key]!r}"
            cure = f"--model_overrides={{'{key}': {before[key]!r}}}"
            raise ValueError(f"{path}: {found}. Fix: {cure}")


# --- Checkpoints, releases, VGGT ------------------------------------------------------------------
# Frames, height, width that a release samples: the Wan2.1 variant, and an expert of Wan2.2's.
RELEASE_SIZES = {False: (81, 336, 592), True: (81, 480, 832)}


def metadata_of(path):
    """Metadata of a checkpoint; of a release's model.pth or VGGT-1B, what ours would say."""
    pickled = str(path).endswith((".pth", ".pt")) and os.path.isfile(path)
    meta = {} if pickled else read_metadata(path)
    if "weights" in meta:
        name = str(path).replace(".optim", "")
        raise ValueError(f"{path}: the optimizer state beside a checkpoint. Fix: name {name}")
    if "stage" in meta:
        return meta
    names = lazy_tensors(str(path))
    if released.is_release(names):
        pair = released.is_expert(names)
        trained = dict(zip(("num_frames", "height", "width"), RELEASE_SIZES[pair]), wan_dir="")
        told = dict(foreign="release", stage="2", step="0", release=os.path.abspath(path))
        # Which of the two it is, only its name says.
        return told | dict(expert="either" if pair else "", train_config=json.dumps(trained))
    vggt = dict(foreign="vggt", stage="vggt", step="0")
    return vggt if count_layers(names, "aggregator.frame_blocks.") else meta


def load_weights(model, path):
    """Copy a checkpoint's, a release's or VGGT-1B's tensors into the model -> its metadata."""
    meta = metadata_of(path)
    if "foreign" not in meta:
        return load_trained(model, path)
    file, parameters = lazy_tensors(str(path)), dict(model.named_parameters())
    own = shapes_of(parameters)
    if meta["foreign"] == "release":
        if not model.cfg.released:
            found = "a FantasyWorld release does not fit a model of our own"
            raise ValueError(f"{path}: {found}; start from it alone")
        base = {k.removeprefix("dit."): shape for k, shape in own.items() if k.startswith("dit.")}
        with naming(path):
            plan = released.match(own, tensor_shapes(file), base, model.cfg.num_pcb, path)
        plan = {k: name for k, (of_release, name) in plan.items() if of_release}
    else:
        with naming(path):
            plan, left = released.from_vggt(tensor_shapes(file), own, model.cfg.geo_layers)
        kinds = sorted({".".join(re.sub(r"\d+", "*", name).split(".")[:3]) for name in left})
        say(f"{path}: VGGT: {len(plan)} tensors taken, {len(left)} left behind: {', '.join(kinds)}")
    for k, name in plan.items():
        copy_into(parameters[k], floats(file[name][1](), name, path).reshape(own[k]))
    return meta


def release_tensors(path):
    if not os.path.isfile(path):
        why = "a model fine-tuned from a release needs the release's model.pth too"
        raise ValueError(f"{path}: no such file; {why} (sample.py --release=PATH, if it was moved)")
    return lazy_tensors(path)


def load_release(
    path, wan_dir="", device="cpu", dtype=None, trains=False, *, lora="", true_rays=False
):
    """FantasyWorld from a release's .pth, what it lacks from the Wan folder wan_dir.

    Tensors go to device one by one, the big matrices in dtype (None = fp32; trains=True keeps the
    trainable ones in fp32), so the host holds one copy at most.
    lora        a LoRA file for the tensors of the Wan folder (lib/lora.py)
    true_rays   true per-pixel rays in place of those that the release was trained on
    Raises ValueError for missing, unexpected, misshapen tensors."""
    files = release_tensors(path), with_lora(wan_tensors(wan_dir), lora) if wan_dir else {}
    shapes = [tensor_shapes(file) for file in files]
    with naming(path):
        cfg = Config(**released.sizes(*shapes), true_rays=true_rays)
        with torch.device("meta"):
            model = FantasyWorld(cfg)
        own = shapes_of(model.state_dict())
        plan = released.match(own, *shapes, cfg.num_pcb, where=path)
    if dtype:
        half_precision(model.dit, dtype)
        if not trains:
            half_geometry(model, dtype)
    wanted = model.state_dict()

    def read(k, of_release, name):
        value = floats(files[not of_release][name][1](), name, path).reshape(own[k])
        return value.to(device, wanted[k].dtype, copy=True)

    of_base = sum(not of_release for of_release, _ in plan.values())
    family = FAMILIES.get(fingerprint(shapes[1]), "other sizes") if wan_dir else "no base"
    parts = f"{len(plan) - of_base} tensors of it and {of_base} of {wan_dir or 'nothing else'}"
    sizes = f"{cfg.num_pcb} + {cfg.geo_layers} video blocks of width {cfg.dim}"
    say(f"{path}: FantasyWorld release, {parts} ({family}): {sizes}, geometry width {cfg.geo_dim}")
    if lora and not of_base:
        say(f"{lora}: without effect, the release holds the whole video branch")
    model.load_state_dict({k: read(k, *place) for k, place in plan.items()}, assign=True)
    for head in (model.depth_head, model.point_head):
        head.scratch.to(memory_format=torch.channels_last)
    return model


def open_model(meta, cfg, wan_dir, device, dtype=None, trains=True):
    """The model that a run starts from, by the metadata of the checkpoint it starts from ({} = from
    scratch); the video branch from wan_dir ("" = random), its big matrices in dtype (None = fp32).

    cfg is that of the run; a release, and what was fine-tuned from one, brings its own sizes.
    Weights that belong to a checkpoint of ours are not read: load_trained does that."""
    lora = meta.get("lora", "")
    if meta.get("release"):
        how = dict(lora=lora, true_rays=cfg.true_rays)
        return load_release(meta["release"], wan_dir, device, dtype, trains, **how)
    dit, cfg = load_wan(wan_dir, cfg, device, dtype, lora) if wan_dir else (None, cfg)
    model = FantasyWorld(cfg, dit)
    if dtype and not wan_dir:
        half_precision(model.dit, dtype)
    return model.to(device)


def open_checkpoint(path, wan_dir, device, dtype=None, *, release="", lora="", true_rays=False):
    """Any checkpoint with its video branch, ready to sample; a release's matrices in dtype.

    release    where the model.pth is now that it was fine-tuned from; "": where it was
    lora, true_rays   as in load_release; "": the LoRA of training"""
    meta = metadata_of(path)
    meta["release"] = meta.get("release") and (release or meta["release"])
    meta["lora"] = lora or meta.get("lora", "")
    cfg = config_from_metadata(meta, path) if "model_config" in meta else Config()
    cfg = replace(cfg, true_rays=cfg.true_rays or true_rays)
    if "foreign" not in meta:
        with naming(path), torch.device("meta"):  # sizes first, before anything is allocated
            empty = FantasyWorld(cfg)
        check_trained(empty, tensor_shapes(lazy_tensors(str(path))), meta["stage"], path)
    model = open_model(meta, cfg, wan_dir, device, dtype, trains=False)
    if "foreign" not in meta:
        load_trained(model, path)
    return model.set_stage(int(meta["stage"])).requires_grad_(False)


def export_release(checkpoint, out):
    """Write what was fine-tuned from a release under its names, as .pth or .safetensors.

    The video branch and whatever else the release's file held are copied from it."""
    tensors, meta = read_tensors(checkpoint)
    cfg = config_from_metadata(meta, checkpoint) if "model_config" in meta else Config()
    if not cfg.released or meta["stage"] != "2":
        wanted = "a stage 2 checkpoint of a run with --init_from=model.pth of the release"
        raise ValueError(f"{checkpoint}: wanted {wanted}")
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)  # before gigabytes are read
    named = {released.release_name(k, cfg.num_pcb): v for k, v in tensors.items()}
    bridge, whole = "vggt.projection_head.weight", release_tensors(meta["release"])
    named[bridge] = named[bridge][..., None, None, None]
    rest = {k: read() for k, (_, read) in whole.items() if k not in named}
    tensors = {**rest, **named}
    plain = not str(out).endswith(".safetensors")
    save = partial(torch.save, tensors) if plain else partial(write_tensors, tensors, {})
    write_aside(pathlib.Path(out), save)
    return f"{out}: {len(named)} tensors of {checkpoint}, {len(rest)} of {meta['release']}"


def command():
    if len(sys.argv) != 4 or sys.argv[1] != "export" or not all(sys.argv):
        raise ValueError(f"wanted python -m lib.weights export CKPT OUT, got {sys.argv[1:]}")
    print(export_release(*sys.argv[2:]))


if __name__ == "__main__":
    run_command("lib.weights", command)
