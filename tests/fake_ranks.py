"""DDP and FSDP2 on the GPU that is not there (fake_cuda.py): the first of two ranks, whose other
one agrees to everything.

Stubbed: that the ranks compare their shapes at the start, that buckets are ordered anew, and what
DDP measures of itself: those want true tensors or a true clock."""

# ruff: noqa: E402, I001
from fake_cuda import CUDA, on_a_gpu

from contextlib import ExitStack, contextmanager
from functools import lru_cache
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import lib.distributed
import lib.guards
from lib.distributed import Ranks


class Reducer:
    """DDP's, which keeps the buckets that it has: to order them anew it sends true tensors."""

    def __init__(self, reducer):
        self.reducer = reducer

    def __getattr__(self, name):
        return getattr(self.reducer, name)

    def _rebuild_buckets(self):
        return False


class Parallel(DistributedDataParallel):
    """DDP whose buckets come back from the other rank as they are."""

    def __init__(self, *args, **kwargs):
        checked = ("_verify_param_shape_across_processes", "_sync_module_states")
        with patch.multiple("torch.nn.parallel.distributed", **dict.fromkeys(checked, MagicMock())):
            super().__init__(*args, **kwargs)
        self.register_comm_hook(None, self.sent)
        self.reducer, self.logger = Reducer(self.reducer), MagicMock()  # the logger times on a GPU

    @staticmethod
    def sent(_, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


def dense(module, **_):
    """Module.to(memory_format=contiguous) of fake tensors."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and not p.is_contiguous():
                like = torch.empty(p.shape, dtype=p.dtype, device=p.device)
                part._parameters[name] = torch.nn.Parameter(like, requires_grad=p.requires_grad)
    return module


@lru_cache(maxsize=None)
def first_of_two():
    """This rank, and FSDP2's mesh; to be called first before any tensor is fake."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    with on_a_gpu():
        group = dist.group.WORLD
        return Ranks(0, 2, CUDA, group), DeviceMesh.from_group(group, "cuda")


def agree(values, value):
    """all_gather_object where the other rank says the same."""
    values[:] = [value] * len(values)


@contextmanager
def two_ranks():
    """What sends meets the other rank -> the Ranks of this one."""
    ranks, mesh = first_of_two()
    with ExitStack() as stack:
        for where, name, value in (
            (lib.distributed, "DistributedDataParallel", Parallel),
            (dist, "all_gather_object", agree),
            (DeviceMesh, "from_group", lambda *_: mesh),
            (lib.guards.Stop, "agreed", lambda _: 0),  # a fake number would read as 1
            (dist, "destroy_process_group", lambda *_: None),  # the next check's too
        ):
            stack.enter_context(patch.object(where, name, value))
        yield ranks


def parallel(model, spread):
    """What trains a model of fake tensors on the first of two ranks: DDP, or itself, spread."""
    with two_ranks() as ranks:
        if spread:
            with patch.object(torch.nn.Module, "to", dense):
                lib.distributed.shard(model, ranks)
        return lib.distributed.wrap(model, ranks, spread)
