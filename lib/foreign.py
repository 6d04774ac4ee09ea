"""Other people's weights: a FantasyWorld release sampled, fine-tuned and written again; VGGT-1B as a start for stage 1.

Tensor names and modules are in released.py; this file reads and writes the files.  A release is recognised by its
tensor names, so its model.pth goes wherever a checkpoint of ours does: sample.py --ckpt, train.py --init_from."""
import json
import os
import pathlib
import re
from dataclasses import replace

import torch
from safetensors.torch import save_file
from torch import nn

from lib import released
from lib.checkpoints import (build_model, config_from_metadata, lazy_tensors, load_trained, read_metadata,
                             read_tensors, wan_files, wan_tensors, write_whole)
from lib.sharding import fill
from model import Config, FantasyWorld, half_geometry, half_precision


def metadata_of(path):
    """Metadata of a checkpoint without its tensors; what ours would say for a release's model.pth or VGGT-1B."""
    meta = {} if str(path).endswith((".pth", ".pt")) and os.path.isfile(path) else read_metadata(path)
    if "stage" in meta:
        return meta
    names = lazy_tensors(str(path))
    if released.is_release(names):
        return dict(foreign="release", stage="2", step="0", release=os.path.abspath(path),
                    train_config=json.dumps(dict(num_frames=81, height=336, width=592, wan_dir="")))
    return dict(foreign="vggt", stage="vggt", step="0") if released.is_vggt(names) else meta


def tensor_shapes(tensors):
    return {name: shape for name, (shape, _) in tensors.items()}


def load_weights(model, path):
    """Copy a checkpoint's tensors into the model, a release's or VGGT-1B's by name; returns its metadata."""
    meta = metadata_of(path)
    if "foreign" not in meta:
        return load_trained(model, path)
    file, own = lazy_tensors(str(path)), {k: tuple(v.shape) for k, v in model.named_parameters()}
    if meta["foreign"] == "release":
        if not model.cfg.released:
            raise ValueError(f"{path}: a FantasyWorld release does not fit a model of our own; start from it alone")
        base = {k.removeprefix("dit."): shape for k, shape in own.items() if k.startswith("dit.")}
        plan = released.match(own, tensor_shapes(file), base, model.cfg.num_pcb, path)
        plan = {k: name for k, (of_release, name) in plan.items() if of_release}
    else:
        plan, left = released.from_vggt(tensor_shapes(file), own, model.cfg.geo_layers)
        kinds = sorted({".".join(re.sub(r"\d+", "*", name).split(".")[:3]) for name in left})
        if os.environ.get("RANK", "0") == "0":
            print(f"{path}: VGGT: {len(plan)} tensors taken, {len(left)} left behind: {', '.join(kinds)}", flush=True)
    parameters = dict(model.named_parameters())
    for k, name in plan.items():
        fill(parameters[k], file[name][1]().reshape(own[k]))
    return meta


def release_tensors(path):
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; a model fine-tuned from a release needs the release's model.pth too "
                         f"(sample.py --release=PATH, if it was moved)")
    return lazy_tensors(path)


def load_release(path, wan_dir="", device="cpu", dtype=None, trains=False, true_rays=False):
    """FantasyWorld from a release's model.pth, what it lacks from the Wan2.1 folder wan_dir.

    Tensors go to device one by one, the big matrices in dtype (None = fp32; trains=True keeps the trainable ones in
    fp32), so the host holds one copy at most.   Errors: ValueError for missing, unexpected, misshapen tensors."""
    files = release_tensors(path), wan_tensors(wan_dir) if wan_dir and wan_files(wan_dir) else {}
    shapes = [tensor_shapes(file) for file in files]
    cfg = Config(**released.sizes(*shapes), true_rays=true_rays)
    with torch.device("meta"):
        model = FantasyWorld(cfg)
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    plan = released.match(own, *shapes, cfg.num_pcb, where=path)
    if dtype:
        half_precision(model.dit, dtype)
        if not trains:
            half_geometry(model, dtype)
    wanted = model.state_dict()
    model.load_state_dict({k: files[not of_release][name][1]().reshape(own[k]).to(device, wanted[k].dtype, copy=True)
                           for k, (of_release, name) in plan.items()}, assign=True)
    for head in (model.depth_head, model.point_head):
        head.scratch.to(memory_format=torch.channels_last)
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: FantasyWorld release, {sum(r for r, _ in plan.values())} tensors of it and "
              f"{sum(not r for r, _ in plan.values())} of {wan_dir or 'no base'}: {cfg.num_pcb} + {cfg.geo_layers} video "
              f"blocks of width {cfg.dim}, geometry width {cfg.geo_dim}", flush=True)
    return model


def open_model(meta, cfg, wan_dir, device, dtype=None, trains=True):
    """The model that a run starts from, by the metadata of the checkpoint it starts from ({} = from scratch).

    cfg is that of the run; a release, and what was fine-tuned from one, brings its own sizes.  Weights that belong to a
    checkpoint of ours are not read: load_trained does that."""
    if meta.get("release"):
        return load_release(meta["release"], wan_dir, device, dtype, trains, cfg.true_rays)
    return build_model(cfg, wan_dir, device, dtype)


def open_checkpoint(path, wan_dir, device, dtype=None, keep_gb=None, true_rays=False, release=None):
    """Any checkpoint with its video branch, ready for sampling: the matrices of a release in dtype (None = fp32).

    keep_gb    None, or how many GB of weights stay on the device: see offload
    true_rays  a release is shown true per-pixel rays in place of the ones that it was trained on
    release    where the model.pth is now that the checkpoint was fine-tuned from"""
    meta = metadata_of(path)
    meta["release"] = meta.get("release") and (release or meta["release"])
    cfg = config_from_metadata(meta) if "model_config" in meta else Config()
    cfg = replace(cfg, true_rays=cfg.true_rays or true_rays)
    model = open_model(meta, cfg, wan_dir, device if keep_gb is None else "cpu", dtype, trains=False)
    if "foreign" not in meta:
        load_trained(model, path)
    model.set_stage(int(meta["stage"])).requires_grad_(False)
    return model if keep_gb is None else offload(model, device, keep_gb)


def offload(model, device, keep_gb=0.0):
    """Let the model run on a device that is too small for it: the blocks' layers, but keep_gb of them, stay on the host,
    and each visits the device for its own call.  Returns the model, for sampling, requires_grad off.

    Costs one copy of the layers over the bus per forward.  Everything else moves to the device for good: stem, heads,
    norms, modulation, gates, tokens."""
    left = keep_gb * 1e9
    blocks = [model.dit.blocks, model.frame_blocks, model.global_blocks, model.exchange, model.camera_adapters]
    for layer in (m for part in blocks for m in part.modules() if isinstance(m, nn.Linear)):
        size = sum(p.nbytes for p in layer.parameters())
        if size <= left:
            left -= size
            continue
        home = dict(layer.named_parameters())

        def arrive(layer, _, home=home):
            for name, p in home.items():
                layer.register_parameter(name, nn.Parameter(p.detach().to(device, copy=True), requires_grad=False))

        def leave(layer, *_, home=home):
            for name, p in home.items():
                layer.register_parameter(name, p)
        layer.register_forward_pre_hook(arrive)
        layer.register_forward_hook(leave, always_call=True)
        layer._apply = lambda *_: layer           # a later .to(device) must not bring it there after all
    return model.to(device)


def export_release(checkpoint, out):
    """Write a stage 2 checkpoint that was fine-tuned from a release under the release's names (.pth or .safetensors).

    The video branch and whatever else the release's file held are copied from it."""
    tensors, meta = read_tensors(checkpoint)
    cfg = config_from_metadata(meta) if "model_config" in meta else Config()
    if not cfg.released or meta["stage"] != "2":
        raise ValueError(f"{checkpoint}: wanted a stage 2 checkpoint of a run with --init_from=model.pth of the release")
    named = {released.release_name(k, cfg.num_pcb): v for k, v in tensors.items()}
    named["vggt.projection_head.weight"] = named["vggt.projection_head.weight"][..., None, None, None]
    rest = {k: read() for k, (_, read) in release_tensors(meta["release"]).items() if k not in named}
    save = save_file if str(out).endswith(".safetensors") else torch.save
    write_whole(pathlib.Path(out), lambda path: save({**rest, **named}, path))
    return f"{out}: {len(named)} tensors of {checkpoint}, {len(rest)} of {meta['release']}"
