"""Weights spread over the ranks (FSDP2): every rank stores 1/n of each tensor and gathers a step's for its own use.

What is gathered as one is a model.Step (a PCB block or an IRG step) or a head; the rest, the stem and the tokens, stays
gathered from forward to backward.  Gradients are averaged and cut as soon as a step's backward is done, so weights,
gradients and moments take 1/n of their bytes.  Checkpoints are the same files as without.
Sources: Rajbhandari et al. 2020 (ZeRO stage 3); torch.distributed.fsdp.fully_shard."""
import torch
from torch import nn

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:                              # before torch 2.5: nothing is ever sharded there
    DTensor = ()


def sharded_units(model):
    """The modules of a FantasyWorld that are gathered one at a time."""
    return [*model.steps, model.bridge, model.depth_head, model.point_head, model.camera_head]


def shard(model, group, device):
    """Spread a whole model, the same on every rank, over the ranks of a group; its tensors move to the device.

    To be called before the optimizer is made.   Errors: ValueError before torch 2.7, whose fully_shard can leave
    parameters to others."""
    if torch.__version__ < (2, 7):
        raise ValueError(f"shard_weights needs torch 2.7 or newer, this is {torch.__version__}; use shard_optimizer")
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    mesh = DeviceMesh.from_group(group, device.type)
    model.to(memory_format=torch.contiguous_format)                  # all that fully_shard takes
    model.steps, done = nn.ModuleList(model.steps), set()            # a root gathers for the modules below it
    for unit in sharded_units(model):
        fully_shard(unit, mesh=mesh)
        done.update(unit.parameters())
    fully_shard(model, mesh=mesh, ignored_params=done)
    return model


def whole(tensor):
    """A tensor that may be spread over the ranks, gathered; to be called on all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target, value):
    """Copy a whole value, the same on every rank, into a tensor that may be spread over them."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)
    target.copy_(value)
