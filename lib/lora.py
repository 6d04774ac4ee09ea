"""Low-rank changes of a video branch's weights: W + 0.55 (alpha / rank) up @ down.

Names of a file: kohya's lora_unet_blocks_0_self_attn_q.{lora_down.weight, lora_up.weight, alpha},
the module's path with _ for its dots (musubi-tuner; VideoX-Fun has one _ more); or PEFT's
blocks.0.self_attn.q.lora_{A,B}[.default].weight, also with its base_model.model. before them.
Sources: Hu et al. 2021; the release of FantasyWorld on Wan2.2, which merges reward LoRAs so."""

import re

import torch

from encoders import WRAPPINGS, lazy_tensors, tensor_shapes

STRENGTH = 0.55  # the release's


def module_of(name):
    """The module that a LoRA's tensor changes, with _ for its dots, and its part; else ("", "")."""
    found = re.fullmatch(r"(.+?)\.(?:lora_(down|up|A|B)(?:\.default)?\.weight|alpha)", name)
    if not found:
        return "", ""
    module = found[1].removeprefix("lora_unet_").removeprefix("_")
    for prefix in ("base_model.", *WRAPPINGS, "transformer."):
        module = module.removeprefix(prefix)
    return module.replace(".", "_"), dict(A="down", B="up").get(found[2], found[2] or "alpha")


def read_lora(path, shapes):
    """What a LoRA file changes: name of the video branch -> dict(down=, up= [, alpha=]).

    shapes   name -> shape of the video branch
    Raises ValueError for names that it does not have, halves, and other shapes."""
    matrices = {
        name.removesuffix(".weight").replace(".", "_"): name
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    found = {}
    for name, (_, read) in lazy_tensors(path).items():
        module, part = module_of(name)
        if module not in matrices:
            what = "is for no linear layer of this video branch"
            raise ValueError(f"{path}: {name} {what}; another model's LoRA, or not one at all")
        found.setdefault(matrices[module], {})[part] = read()
    for name, parts in found.items():
        if not {"down", "up"} <= parts.keys():
            raise ValueError(f"{path}: {name} has {sorted(parts)} alone; wanted down and up")
        down, up = parts["down"].shape, parts["up"].shape
        if (up[0], down[1]) != tuple(shapes[name]) or up[1] != down[0]:
            sizes = f"{tuple(up)} x {tuple(down)}"
            raise ValueError(f"{path}: {name} is {tuple(shapes[name])}, its LoRA {sizes}")
    return found


def merged(weight, parts):
    """A weight with its change, in the weight's own type, as the release computes it."""
    down, up = (parts[part].to(weight.dtype) for part in ("down", "up"))
    scale = float(parts["alpha"]) / up.shape[1] if "alpha" in parts else 1.0
    return weight + STRENGTH * scale * torch.mm(up, down)


def with_lora(tensors, path):
    """name -> (shape, read) of a video branch with a LoRA file's changes ("": none)."""
    if not path:
        return tensors
    changes = read_lora(path, tensor_shapes(tensors))

    def changed(name, shape, read):
        return shape, lambda: merged(read(), changes[name])

    return {**tensors, **{name: changed(name, *tensors[name]) for name in changes}}
