"""Reading and writing weights: Wan2.1 folders in, our checkpoints in and out.

A run folder holds step-N.safetensors (the trainable tensors; config, git hash and command as metadata),
step-N.optim.safetensors (AdamW's moments) and latest.safetensors, a hard link to the newest."""
import glob
import hashlib
import json
import os
import pathlib
import re
import subprocess
from dataclasses import replace
from functools import partial

import torch
from safetensors import safe_open
from safetensors.torch import save_file

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
        sd = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {k: (tuple(v.shape), partial(lambda v: v, v)) for k, v in sd.items()}
    except Exception as error:          # flipped bytes make the two readers raise almost any class of error
        raise ValueError(f"{path}: {os.path.getsize(path):,} bytes that cannot be read ({error}); an incomplete "
                         f"download? Fetch it again") from None


def load_wan(folder, cfg, device="cpu", dtype=None):
    """Frozen WanDiT from a Wan2.1 hub folder (one file or shards) or from the run folder of a stage 0 demo run.

    Tensors go to device one by one, the big matrices in dtype (default fp32), so the host holds one copy at most.
    returns  the model, and cfg with the video sizes of what was found"""
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
    sd, meta = read_tensors(path)
    own, untrained = model.state_dict(), ("camera_adapters.", "exchange.") if meta.get("stage") == "1" else ()
    wanted = (k for k in own if k.startswith("dit.") == (meta.get("stage") == "0") and not k.startswith(untrained))
    missing = [k for k in wanted if k not in sd]
    extra = [k for k in sd if k not in own or sd[k].shape != own[k].shape]
    if missing or extra:
        raise ValueError(f"{path} (stage {meta.get('stage')}) does not fit this model: {len(missing)} tensors missing "
                         f"{missing[:3]}, {len(extra)} unknown or of another size {extra[:3]}; use the preset that it "
                         f"was trained with")
    model.load_state_dict(sd, strict=False)
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
def git_hash():
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=pathlib.Path(__file__).parent)
    return result.stdout.strip() or "unknown"


def write_whole(path, write):
    """write(temporary path), flush to the disk, rename: the file is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(out, step, model, optimizer, metadata, keep_last):
    """OUT/step-N.safetensors (trainable tensors), its optimizer state beside it, latest as a hard link; prune."""
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {f"{names[id(p)]}|{key}": value.detach().cpu().contiguous()
               for p, state in optimizer_state(optimizer).items() for key, value in state.items()}
    path = out / f"step-{step}.safetensors"
    write_whole(out / f"step-{step}.optim.safetensors", lambda p: save_file(moments, p))
    tensors = {name: p.cpu().contiguous() for name, p in model.trainable_state_dict().items()}
    write_whole(path, lambda p: save_file(tensors, p, metadata={**metadata, "step": str(step)}))
    link = out / "latest.tmp"
    link.unlink(missing_ok=True)
    os.link(path, link)
    os.replace(link, out / "latest.safetensors")
    for old in saved_steps(out)[:-keep_last]:
        (out / f"step-{old}.safetensors").unlink()
        (out / f"step-{old}.optim.safetensors").unlink(missing_ok=True)


def optimizer_state(optimizer):
    """parameter -> its state; of a sharded optimizer all ranks' shares, which it must have consolidated here."""
    if not hasattr(optimizer, "consolidate_state_dict"):
        return optimizer.state
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {parameters[i]: state for i, state in optimizer.state_dict()["state"].items()}


def saved_steps(out):
    """Steps of the checkpoints in a run folder, oldest first."""
    found = (re.fullmatch(r"step-(\d+)\.safetensors", p.name) for p in out.glob("step-*.safetensors"))
    return sorted(int(m[1]) for m in found if m)


def whole(out, step):
    """Whether a checkpoint and its optimizer state open; safetensors checks header and length."""
    for end in ("", ".optim"):
        try:
            with safe_open(out / f"step-{step}{end}.safetensors", "pt"):
                pass
        except Exception as error:
            print(f"warning: {out}/step-{step}{end}.safetensors is passed over: {error}", flush=True)
            return False
    return True


def load_optimizer(path, model, optimizer):
    params, local = dict(model.named_parameters()), getattr(optimizer, "optim", optimizer)
    own = {p for group in local.param_groups for p in group["params"]}              # sharded: a part of them
    for name, value in read_tensors(path)[0].items():
        parameter, key = name.split("|")
        p = params[parameter]
        if p not in own:
            continue
        local.state[p][key] = value.to(p.device) if key == "step" else torch.empty_like(p).copy_(value)
