"""Reading and writing weights: Wan2.1 folders in, our checkpoints in and out.

A run folder holds step-N.safetensors (the trainable tensors; config, git hash and command as metadata),
step-N.optim.safetensors (AdamW's moments) and latest.safetensors, a hard link to the newest."""
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from lib.control import gathered
from lib.sharding import DTensor, fill, whole
from model import Config, FantasyWorld, WanDiT, check_names, half_precision

# md5 over the names and shapes of each release's DiT.  Source: DiffSynth-Studio's model detection.
FAMILIES = {"9269f8db9040a9d860eaca435be61814": "Wan2.1-T2V-1.3B", "aafcfd9672c3a2456dc46e1cb6e52c70": "Wan2.1-T2V-14B",
            "6d6ccde6845b95ad9114ab993d917893": "Wan2.1-Fun-1.3B-InP (or V1.1)",
            "ac6a5aa74f4a0aab6f64eb9a72f19901": "Wan2.1-Fun-V1.1-1.3B-Control-Camera",
            "b61c605c2adbd23124d152ed28e049ae": "Wan2.1-Fun-V1.1-14B-Control-Camera",
            "6bfcfb3b342cb286ce886889d519a77e": "Wan2.1-I2V-14B-480P (or 720P, Fun-14B-InP)"}


# ------------------------------------------------------------------------------------------------------ frozen weights
def fingerprint(shapes):
    """md5 of the sorted "name:d0_d1" and "name" of every tensor."""
    items = [item for name, shape in shapes.items() for item in (f"{name}:{'_'.join(map(str, shape))}", name)]
    return hashlib.md5(",".join(sorted(items)).encode()).hexdigest()


def read_tensors(path):
    """One .safetensors file -> (name -> tensor, metadata)."""
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again") from None


def wan_files(folder):
    """Weight files of the DiT in a Wan2.1 folder, complete as its index says; [] when it is no such folder."""
    files = sorted(f for f in glob.glob(os.path.join(folder, "diffusion_pytorch_model*"))
                   if f.endswith((".safetensors", ".pth")))
    for index in glob.glob(os.path.join(folder, "diffusion_pytorch_model*.index.json")):
        with open(index) as file:
            wanted = {os.path.join(folder, name) for name in json.load(file)["weight_map"].values()}
        if absent := sorted(wanted - set(files)):
            raise ValueError(f"{index}: {len(absent)} of {len(wanted)} shards are missing, first {absent[0]}; "
                             f"download them too")
    return files


def lazy_tensors(path):
    """name -> (shape, read) of a .safetensors or .pth file; read() is what touches the tensor's bytes."""
    def read(name):             # opened per tensor: pages of a closed file do not count against this process
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                return {k: (tuple(file.get_slice(k).get_shape()), partial(read, k)) for k in file.keys()}
        return lazy_pth(path)
    except Exception as error:          # flipped bytes make the two readers raise almost any class of error
        raise ValueError(f"{path}: {os.path.getsize(path):,} bytes that cannot be read ({error}); an incomplete "
                         f"download? Fetch it again") from None


def lazy_pth(path):
    """lazy_tensors of a .pth file.  It is mapped anew after every 64th part of it (2 MB at least: each time unpickles the
    names): the pages of a mapping that were touched count against this process until it is closed."""
    mapped, part = {}, max(os.path.getsize(path) / 64, 2e6)

    def load():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def read(name):
        if not mapped or mapped["read"] > part:
            mapped.clear()
            mapped.update(tensors=load(), read=0)
        mapped["read"] += mapped["tensors"][name].nbytes
        return mapped["tensors"][name]
    return {k: (tuple(v.shape), partial(read, k)) for k, v in load().items()}


def wan_tensors(folder):
    """name -> (shape, read) of the DiT in a Wan2.1 hub folder (one file or shards) or of a stage 0 demo run."""
    files = wan_files(folder) or glob.glob(os.path.join(folder, "latest.safetensors"))
    if not files:
        raise ValueError(f"wan_dir = {folder}: no diffusion_pytorch_model*.safetensors (a Wan2.1 folder) and no "
                         f"latest.safetensors (a stage 0 run) in it; train stage 0 first or download the weights")
    tensors = {}
    for file in files:
        found = lazy_tensors(file)
        if twice := set(found) & set(tensors):
            raise ValueError(f"{file}: {min(twice)} is also in another file of {folder}; remove one of the two copies")
        tensors.update(found)
    for prefix in ("pipe.", "model.", "dit."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def load_wan(folder, cfg, device="cpu", dtype=None):
    """Frozen WanDiT from the folder of a Wan2.1 release or of a stage 0 run.

    Tensors go to device one by one, the big matrices in dtype (default fp32), so the host holds one copy at most.
    returns  the model, and cfg with the video sizes of what was found"""
    tensors = wan_tensors(folder)
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    dit = WanDiT.from_shapes(shapes, cfg.head_dim, cfg.text_len, where=folder)
    check_names(dit, shapes, f"{folder}: Wan2.1 DiT")
    wanted = (half_precision(dit, dtype) if dtype else dit).state_dict()
    dit.load_state_dict({name: tensors[name][1]().to(device, wanted[name].dtype, copy=True) for name in wanted},
                        assign=True)
    found = dict(dim=dit.patch_embedding.out_channels, ffn_dim=dit.blocks[0].ffn[0].out_features, in_dim=dit.in_dim,
                 num_layers=len(dit.blocks), text_dim=dit.text_embedding[0].in_features, freq_dim=dit.freq_dim,
                 has_clip=dit.img_emb is not None, has_control=dit.control_adapter is not None)
    if os.environ.get("RANK", "0") == "0":
        print(f"{folder}: {FAMILIES.get(fingerprint(shapes), 'a DiT of sizes that no release has')}: "
              + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    return dit, replace(cfg, **found)


def load_trained(model, path):
    """Copy a checkpoint's tensors into the model; returns its metadata (stage, step, config as strings).

    A checkpoint holds what its stage trains; after stage 1 the interaction keeps its zero start.  Anything else that is
    missing, left over or of another shape is a ValueError."""
    sd, meta = read_checked(path)
    own = dict(model.named_parameters())
    untrained = ("camera_adapters.", "exchange.", "ray_encoder.") if meta.get("stage") == "1" else ()
    wanted = (k for k in own if k.startswith("dit.") == (meta.get("stage") == "0") and not k.startswith(untrained))
    missing = [k for k in wanted if k not in sd]
    extra = [k for k in sd if k not in own or sd[k].shape != own[k].shape]
    if missing or extra:
        raise ValueError(f"{path} (stage {meta.get('stage')}) does not fit this model: {len(missing)} tensors missing "
                         f"{missing[:3]}, {len(extra)} unknown or of another size {extra[:3]}; use the preset that it "
                         f"was trained with")
    for name, value in sd.items():
        fill(own[name], value)
    return meta


def read_metadata(path):
    """Metadata of a checkpoint, without its tensors."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint that can be read ({error})") from None


def build_model(cfg, wan_dir, device, dtype=None):
    """FantasyWorld on the device; frozen branch from wan_dir ("" = random), its big matrices in dtype (None = fp32)."""
    dit, cfg = load_wan(wan_dir, cfg, device, dtype) if wan_dir else (None, cfg)
    model = FantasyWorld(cfg, dit)
    if dtype and not wan_dir:
        half_precision(model.dit, dtype)
    return model.to(device)


def config_from_metadata(meta):
    """Config that a checkpoint was trained with."""
    values = json.loads(meta["model_config"])
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# --------------------------------------------------------------------------------------------------- our checkpoints
def digest(tensors):
    """sha256 over the names and bytes of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def write_whole(path, write):
    """write(temporary path), flush to the disk, rename: the file is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                # a full disk gets its space back
    folder = os.open(path.parent, os.O_RDONLY)           # the rename itself reaches the disk
    os.fsync(folder)
    os.close(folder)


def save_checkpoint(out, step, weights, moments, metadata, keep_last, keep_every=0):
    """OUT/step-N.safetensors (trainable tensors), its optimizer state beside it, latest as a hard link; prune.

    weights, moments   of training_state

    Raises OSError or SafetensorError when the disk is full or gone; what was saved before is then untouched."""
    for end, tensors in ((".optim", moments), ("", weights)):         # the weights make a checkpoint: last
        content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        told = {**metadata, "step": str(step), "sha256": digest(content)}
        write_whole(out / f"step-{step}{end}.safetensors", partial(save_file, content, metadata=told))
        del content                                      # one of the two copies at a time
    link_latest(out, step)
    prune(out, step, keep_last, keep_every)


def link_latest(out, step):
    """latest.safetensors becomes a hard link to a checkpoint; it is replaced, so it is never missing."""
    path, latest, link = out / f"step-{step}.safetensors", out / "latest.safetensors", out / "latest.tmp"
    link.unlink(missing_ok=True)
    if latest.exists() and path.samefile(latest):
        return
    try:
        os.link(path, link)
    except OSError:                                      # a file system without hard links
        shutil.copyfile(path, link)
    os.replace(link, latest)


def prune(out, newest, keep_last, keep_every):
    """Delete checkpoints before the newest but keep_last; those at multiples of keep_every lose their optimizer only."""
    older = [step for step in saved_steps(out) if step < newest]
    for step in older[:max(0, len(older) - keep_last + 1)]:
        if not keep_every or step % keep_every:
            (out / f"step-{step}.safetensors").unlink()
        (out / f"step-{step}.optim.safetensors").unlink(missing_ok=True)


def training_state(model, optimizer):
    """What a checkpoint holds: name -> trainable tensor, "name|key" -> AdamW's state.  To be called on all ranks: what
    is spread over them is gathered tensor by tensor, on the host of rank 0."""
    first, names = not dist.is_initialized() or dist.get_rank() == 0, {p: n for n, p in model.named_parameters()}

    def gather(tensor):
        if not isinstance(tensor, DTensor):
            return tensor
        tensor = whole(tensor)
        return tensor.cpu() if first else None
    states = shares(optimizer) if hasattr(optimizer, "optim") else optimizer.state
    return ({name: gather(value) for name, value in model.trainable_state_dict().items()},
            {f"{names[p]}|{key}": gather(value) for p, state in states.items() for key, value in state.items()})


def shares(optimizer):
    """parameter -> AdamW state of a sharded optimizer: each owner sends its share, and rank 0 gets all of it, on the
    host (torch's consolidate_state_dict takes minutes for GBs)."""
    mine, whole = optimizer.optim.state, {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shares = gathered({i: list(mine[p]) for i, p in enumerate(parameters) if p in mine})
    for owner, share in enumerate(shares):
        for i, keys in share.items():
            p = parameters[i]
            for key in keys:
                value = mine[p][key] if owner == dist.get_rank() else (
                    torch.zeros((), device=p.device) if key == "step" else torch.empty_like(p))
                dist.broadcast(value, owner)
                if dist.get_rank() == 0:
                    whole.setdefault(p, {})[key] = value.detach().cpu()
    return whole


def saved_steps(out):
    """Steps of the checkpoints in a run folder, oldest first."""
    found = (re.fullmatch(r"step-(\d+)\.safetensors", p.name) for p in out.glob("step-*.safetensors"))
    return sorted(int(m[1]) for m in found if m)


def newest_whole(out):
    """The newest step whose weights and optimizer state are undamaged, else None; damaged ones are named and stay."""
    for step in reversed(saved_steps(out)):
        try:
            for end in ("", ".optim"):
                read_checked(out / f"step-{step}{end}.safetensors")
            return step
        except ValueError as error:
            print(f"warning: checkpoint passed over: {error}", flush=True)


def tidy(out):
    """Remove what a killed save left: unfinished files, and optimizer states whose weights were never written."""
    for path in [*out.glob("*.tmp"), *out.glob("step-*.optim.safetensors")]:
        weights = path.with_name(path.name.replace(".optim", ""))
        if path.suffix == ".tmp" or not weights.exists():
            path.unlink()


def read_checked(path):
    """read_tensors of one of our checkpoints; ValueError when its bytes are not those that were saved."""
    tensors, meta = read_tensors(path)
    if "sha256" in meta and meta["sha256"] != digest(tensors):
        raise ValueError(f"{path}: its sha256 is not the one that it was saved with; the file is damaged. "
                         f"Use an older step, or copy it again")
    return tensors, meta


def load_optimizer(path, model, optimizer):
    """Copy saved AdamW moments into an optimizer of the same parameters."""
    params, tensors = dict(model.named_parameters()), read_tensors(path)[0]
    wanted = {name for name, p in params.items() if p.requires_grad}
    if differ := wanted ^ {name.split("|")[0] for name in tensors}:
        raise ValueError(f"{path}: {len(differ)} parameters differ from this model's, first {min(differ)}; it belongs to "
                         f"another stage or model_overrides")
    local = getattr(optimizer, "optim", optimizer)
    own = {p for group in local.param_groups for p in group["params"]}              # sharded: a part of them
    for name, value in tensors.items():
        parameter, key = name.split("|")
        p = params[parameter]
        if p in own:
            local.state[p][key] = torch.empty_like(value if key == "step" else p, device=p.device, requires_grad=False)
            fill(local.state[p][key], value)


def describe(path):
    """What a checkpoint holds, as text; ValueError when it is damaged or does not fit the model that it names."""
    if str(path).endswith((".pth", ".pt")):
        raise ValueError(f"{path}: not a checkpoint of train.py; wanted a .safetensors file of a run folder")
    tensors, meta = read_checked(path)
    if missing := [key for key in ("stage", "step", "model_config") if key not in meta]:
        raise ValueError(f"{path}: no {', '.join(missing)} in its metadata: not a checkpoint of train.py")
    with torch.device("meta"):
        model = FantasyWorld(config_from_metadata(meta))
    wanted = {k: tuple(v.shape) for k, v in model.set_stage(int(meta["stage"])).trainable_state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if differ := [k for k in {**wanted, **found} if wanted.get(k) != found.get(k)]:
        raise ValueError(f"{path}: {len(differ)} tensors are not those of its model, first {differ[0]}: "
                         f"{found.get(differ[0])}, wanted {wanted.get(differ[0])}")
    lines = [f"{path}: whole, and fits its model", f"stage {meta['stage']}, step {meta['step']}, git {meta.get('git')}",
             f"command {meta.get('command')}", f"versions {meta.get('versions')}",
             f"{len(tensors)} tensors, {sum(v.numel() for v in tensors.values()):,} parameters, "
             f"{sum(v.nbytes for v in tensors.values()):,} bytes, sha256 {meta.get('sha256', 'not recorded')}"]
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{path}: {len(bad)} tensors hold values that are not finite, first {bad[0]}")
    lines += [f"  {name:60s} {str(tuple(v.shape)):20s} {str(v.dtype).removeprefix('torch.')}"
              for name, v in list(tensors.items())[:8]]
    optimizer = pathlib.Path(path).with_name(f"step-{meta['step']}.optim.safetensors")
    lines.append(f"optimizer state {'beside it' if optimizer.exists() else 'absent'}: {optimizer.name}")
    return "\n".join(lines)
