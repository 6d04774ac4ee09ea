"""The ranks of a run: process groups, and weights spread over them (FSDP2).

Spread: every rank stores 1/n of each tensor and gathers a step's for its own use.  What is gathered
as one is a step of the model (a PCB block or an IRG step) or a head; the rest, the stem and the
tokens, stays gathered from forward to backward.  Gradients are averaged and cut as soon as a step's
backward is done, so weights, gradients and moments take 1/n of their bytes.  Checkpoints are the
same files as without.
Sources: Rajbhandari et al. 2020 (ZeRO stage 3); torch.distributed.fsdp.fully_shard."""

import os
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


# -------------------------------------------------------------------------------- process groups
@dataclass(frozen=True)
class Ranks:
    """This process among those of a run."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    group: object = None  # of the steps; None when alone

    def leave(self):
        """Wait for the other ranks and leave the groups."""
        if self.world == 1:
            return
        dist.barrier()
        # Before torch 2.8 destroying holds the interpreter lock while it joins gloo's threads; one
        # that is still freeing the tensors of the last calls waits for that lock: without a pause
        # two ranks hung after 1 to 41 such endings.
        time.sleep(0.2)
        dist.destroy_process_group()


def start_processes(device, step_timeout, wait_timeout):
    """Join the other ranks when torchrun started us -> Ranks.

    device         auto, cpu or cuda
    step_timeout   seconds that a rank waits for others in a step, then dies: torchrun ends the rest
    wait_timeout   the same around loading, saving and evaluation: the default group"""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device(check_device("cpu" if device == "cpu" else "auto"))
    backend = "gloo"
    if place.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(place)
        check_gpu(torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place))
    elif device == "cuda":
        raise ValueError("device = cuda: torch finds no GPU. Fix: use --device=cpu or auto")
    if world == 1:
        return Ranks(device=place)
    wait = timedelta(seconds=wait_timeout)
    store, _, _ = next(rendezvous("env://", timeout=wait))
    store = store_of_attempt(store, rank, world, wait_timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    return Ranks(rank, world, place, dist.new_group(timeout=timedelta(seconds=step_timeout)))


def store_of_attempt(store, rank, world, patience):
    """The part of the agents' store that belongs to this attempt.

    That store outlives an attempt, and a restarted rank must not read a dead one's address.  Nobody
    tells which attempt it is: each node counts its own deaths alone.  So rank 0 invites under a new
    name, the others answer with a word that no dead rank knew, and it lists whom it has heard."""
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("invitation", own)
        heard = [store.get(f"{own}/{other}").decode() for other in range(1, world)]
        store.set(f"{own}/heard", " ".join(heard))
        return dist.PrefixStore(own, store)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        name = store.get("invitation").decode()  # perhaps that of an attempt before
        store.set(f"{name}/{rank}", own)
        if store.check([f"{name}/heard"]) and own in store.get(f"{name}/heard").decode():
            return dist.PrefixStore(name, store)
        time.sleep(0.1)
    raise TimeoutError(f"rank {rank}: the other ranks did not come within {patience} s")


def check_device(name):
    """The name of a device, if torch has it, of auto this rank's; ValueError for another."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    with suppress(RuntimeError):  # no such kind
        device = torch.device(name)
        there = dict(cpu=1, cuda=torch.cuda.device_count() if torch.cuda.is_available() else 0)
        if (device.index or 0) < there.get(device.type, 0):
            return name
    raise ValueError(f"--device {name}: torch finds none here; wanted auto, cpu, cuda, cuda:1 ...")


def say(*words, of_all=False):
    """print, of the first rank or of_all.  A full disk or a tee that ended costs words, no run."""
    if sys.stdout and (of_all or os.environ.get("RANK", "0") == "0"):
        try:
            with tqdm.external_write_mode():  # above a bar, which comes back after the flush
                print(*words, flush=True)
        except OSError:  # a new buffer: the old one's words would fail again, also in a fork
            sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115


@dataclass(eq=False)
class Unheard:
    """stderr, whose words end nothing: a full disk is behind it, or a head that has left."""

    stream: object

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, words=""):
        with suppress(OSError):
            print(words, end="", file=self.stream, flush=True)

    flush = write


def check_gpu(name, capability):
    """ValueError for a GPU whose attention would store its scores: 16,317 tokens squared."""
    if capability < (8, 0):
        found = f"{name} has compute capability {capability[0]}.{capability[1]}, wanted 8.0"
        raise ValueError(f"device = cuda: {found}. Fix: use another GPU or --device=cpu")


def from_first(value):
    """The value of rank 0, on every rank."""
    return gathered(value)[0]


def gathered(value):
    """The value of every rank, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_cat(tensor, group):
    """The tensors of all ranks of a group along axis 0; they travel by way of the host, on gloo."""
    mine = tensor.detach().float().cpu().contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group)
    return torch.cat(parts).to(tensor)


# ------------------------------------------------------------------------------------- gradients
def units(model):
    """The modules of a FantasyWorld as they run; spread weights are gathered by them."""
    heads = (model.depth_head, model.point_head, model.camera_head)
    return [*model.pcb, model.bridge, *model.irg, *heads]


@torch.enable_grad()
def link_gradients(ddp):
    """Make the gradients of a DDP views of its buckets, all zero; returns it.

    They are that only after a first backward that sends, and once more after the second forward,
    which orders the buckets anew.  Accumulation would meanwhile keep gradients twice.  So two
    backwards of 0 * weights go first; they arrive as a real one's will: last unit first."""
    inner = dict.fromkeys(p for unit in units(ddp.module) for p in unit.parameters())
    outer = [p for p in ddp.module.parameters() if p not in inner]
    order = [p for p in (*outer, *inner) if p.requires_grad]
    for _ in range(2):
        ddp.reducer._rebuild_buckets()  # does nothing the first time
        ddp.reducer.prepare_for_backward([])
        sum(0 * p.sum() for p in order).backward()
    return ddp


def wrap(model, ranks, spread):
    """DDP around a model, or the model itself where it is alone or its weights are spread."""
    if ranks.world == 1:
        return model
    dist.barrier()  # loading took each rank its own time; a step must not
    if spread:
        return model
    away = [n for n, p in model.named_parameters() if p.device.type != ranks.device.type]
    # What is offloaded stays on the host; DDP would refuse a model on two devices.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, away)
    ids = [ranks.device] if ranks.device.type == "cuda" else None
    how = dict(gradient_as_bucket_view=True, process_group=ranks.group, device_ids=ids)
    return link_gradients(DistributedDataParallel(model, **how))


# --------------------------------------------------------------------------------- spread weights
def shard(model, ranks):
    """Spread a model, the same on every rank, over the ranks; its tensors move to their devices.

    To be called before the optimizer is made.  ValueError before torch 2.7, whose fully_shard
    cannot leave parameters to others."""
    if torch.__version__ < (2, 7):
        found = f"shard_weights needs torch 2.7 or newer, this is {torch.__version__}"
        raise ValueError(f"{found}. Fix: use --shard_optimizer instead")
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
    model.to(memory_format=torch.contiguous_format)  # all that fully_shard takes
    # A root gathers for the modules below it; parameters keep their first names.
    model.pcb, model.irg = torch.nn.ModuleList(model.pcb), torch.nn.ModuleList(model.irg)
    done = set()
    for unit in units(model):
        fully_shard(unit, mesh=mesh)
        done.update(unit.parameters())
    fully_shard(model, mesh=mesh, ignored_params=done)


def is_spread(tensor):
    """Whether a tensor is a DTensor; importing that, half a second, is left to what shards."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, getattr(module, "DTensor", ()))


def own_part(tensor):
    """What this rank stores of a tensor: all of it, or its share."""
    return tensor.to_local() if is_spread(tensor) else tensor


def gather_like(part, p):
    """The whole of what is spread as the parameter p is, from this rank's part."""
    if not is_spread(p):
        return part
    where = (p.device_mesh, p.placements)
    return type(p).from_local(part, *where, shape=p.shape, stride=p.stride()).full_tensor()


def part_like(whole, p):
    """This rank's part of a tensor that all ranks have, as p is spread; sends nothing."""
    if not is_spread(p):
        return whole
    return type(p).from_local(whole, p.device_mesh).redistribute(placements=p.placements).to_local()


@torch.no_grad()
def copy_into(target, value):
    """Copy a whole value, the same on every rank, into a tensor that may be spread over them."""
    if is_spread(target):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)
