"""Weights that visit the device: for a model that is larger than its memory.

The frozen matrices of a step (a PCB block or an IRG step of model.py) lie in page-locked memory of
the host, one buffer a step.  Two buffers on the device hold the step that runs and the one that is
next: its copy is one transfer, on a stream of its own, beside the computation.  A step's buffer is
written again only after the computation that read it; nothing waits on the host.  Everything else
(stem, heads, norms, modulation, gates, tokens, whatever trains) is on the device for good.

In training backward comes to a step again and recomputes it, so the step visits a second time.
What would keep a step's matrices from forward to backward (no checkpointing) is refused by
train.py: the buffers are written anew meanwhile."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

ALIGNED = 256  # bytes: where a tensor may begin


class Matrix(NamedTuple):
    """A frozen tensor of a layer in its step's buffer."""

    layer: nn.Linear
    name: str
    like: torch.Tensor  # of its type and shape
    start: int  # byte


def visitors(step):
    """The step's frozen matrices and biases, [Matrix], and the bytes of its buffer."""
    found, end = [], 0
    for layer in step.modules():
        own = layer._parameters.items() if isinstance(layer, nn.Linear) else ()
        for name, p in own:
            if p is not None and not p.requires_grad:
                found.append(Matrix(layer, name, p, end))
                end += -(-p.nbytes // ALIGNED) * ALIGNED
    return found, end


def parameters_in(buffer, matrices):
    """A buffer's bytes as the layers' parameters."""
    made = []
    for _, _, like, start in matrices:
        part = buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
        made.append(nn.Parameter(part, requires_grad=False))
    return made


class Visits:
    """The steps that visit a device: which is there, which comes."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.steps = []  # of each: its matrices, its buffer, and its parameters there
        self.buffers = []  # two on the device
        self.there = []  # of each buffer and step: the parameters in it
        self.here = self.coming = None  # the step that runs, the one that is on its way
        self.at = 0  # the buffer of the step that runs
        self.next = {}  # (step, whether backward recomputes it) -> the step that came after it

    def add(self, step):
        """Move a step's frozen matrices to a buffer of the host."""
        matrices, size = visitors(step)
        home = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        parameters = parameters_in(home, matrices)
        for (layer, name, like, _), p in zip(matrices, parameters):
            p.data.copy_(like)
            layer._parameters[name] = p
            layer._apply = lambda *_, layer=layer, **__: layer  # a later .to() leaves it at home
        number = len(self.steps)
        for layer in dict.fromkeys(m.layer for m in matrices):
            layer.register_forward_pre_hook(lambda *_: self.need(number))
        self.steps.append((matrices, home, parameters))

    def make_buffers(self):
        size = max((len(home) for _, home, _ in self.steps), default=0)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.there = [[parameters_in(b, m) for m, _, _ in self.steps] for b in self.buffers]

    def need(self, number):
        """To be called before any layer of a step runs."""
        if number == self.here:
            return
        if self.here is not None:
            self.next[self.key] = number
        if self.coming != number:  # the first time, or another way than the last time
            self.send(number)
        self.arrive(number)
        # Not in forward: the same step has another neighbour on the way back.
        self.key = number, torch._C._current_graph_task_id() != -1
        if self.next.get(self.key, number) != number:
            self.send(self.next[self.key])

    @torch.no_grad()
    def send(self, number):
        """Start a step's copy into the buffer that nothing uses."""
        home = self.steps[number][1]
        self.coming = number
        copies = nullcontext()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # its reader is done
            copies = torch.cuda.stream(self.stream)
        # Selective checkpointing follows every operation inside a step; this one is not the step's.
        with copies, _disable_current_modes():
            self.buffers[1 - self.at][: len(home)].copy_(home, non_blocking=True)

    def arrive(self, number):
        """Let the layers read the copy, once it is there; the step before goes home."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.go_home()
        self.at, self.here, self.coming = 1 - self.at, number, None
        self.show(number, self.there[self.at][number])

    def go_home(self):
        if self.here is not None:
            self.show(self.here, self.steps[self.here][2])
        self.here = self.coming = None

    def show(self, number, parameters):
        for (layer, name, _, _), p in zip(self.steps[number][0], parameters):
            layer._parameters[name] = p


def offload(model, device, keep_gb=0.0):
    """Let the model run on a device that is too small for it: the frozen matrices of its steps, but
    keep_gb of them, stay on the host, and a step's visit the device when it runs.

    returns  the model; its `visits` tell what is where"""
    left, visits = keep_gb * 1e9, Visits(device)
    for step in (*model.pcb, *model.irg):
        size = visitors(step)[1]
        if size <= left:
            left -= size
        elif size:
            visits.add(step)
    visits.make_buffers()
    model.visits = visits
    return model.to(device)


def check_offload(options):
    """ValueError for what offload_frozen, where it is asked for, does not go with."""
    wrong = {
        "stage 0 has no frozen weights": options.stage == 0,
        "shard_weights spreads them already": options.shard_weights,
        "compile would read them where they no longer are": options.compile,
        "stage 2 needs checkpoint_activations other than none: backward would keep what has left": (
            options.stage == 2 and options.checkpoint_activations == "none"
        ),
    }
    for why in (why for why, found in wrong.items() if found and options.offload_frozen):
        raise ValueError(f"offload_frozen = True: {why}. Fix: leave one of the two out")


def visiting_bytes(model):
    """Bytes that leave the device when all steps are offloaded, and of the two buffers."""
    sizes = [visitors(step)[1] for step in (*model.pcb, *model.irg)]
    return sum(sizes), 2 * max(sizes)
