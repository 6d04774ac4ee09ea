"""Run FantasyWorld on a GPU that is not there: fake CUDA tensors (shapes, types, devices; no
storage) on a CPU build of torch.

Import this before torch; fake_checks.py is what runs on it.  An operation fails where a CPU tensor
meets a CUDA one and where types do not fit under CUDA's autocast.  A Watch notes by file:line where
the host would wait for the device, the type of every forward line, and tensors of 2^31 elements.
Attention goes to the kernel that a GPU from Ampere on chooses.  Values do not exist: a number that
is read is 1.  fake_ranks.py adds a second rank.
Not shown: values, speed, scratch memory inside kernels, NCCL, Triton.

How: autograd and autocast of a CPU build refuse "cuda" for want of a device guard and CUDAHooks; a
few lines of C++, loaded before torch, give them idle ones.  FakeTensorMode does the rest.
Exit status 77: the stub does not compile here, or torch is a CUDA build (test_fake_cuda.py then
skips)."""

import ctypes
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
struct FakeGuard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getNewStream(Device d, int) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)
}
namespace at {
struct CUDAHooks : CUDAHooksInterface {          // torch looks for this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return 91900; }
  long versionRuntimeCuDNN() const override { return 91900; }
  long versionCuDNNFrontend() const override { return 11400; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
"""


def load_guard():
    """Compile once, load before torch: its hooks are looked up once, at import."""
    root = Path(importlib.util.find_spec("torch").origin).parent
    if (root / "lib/libtorch_cuda.so").exists():
        raise OSError("this torch is a CUDA build, which has hooks of its own")
    made_for = SOURCE + str(root) + str((root / "version.py").stat().st_mtime)
    out = Path(tempfile.gettempdir(), f"fake_{hashlib.md5(made_for.encode()).hexdigest()[:10]}.so")
    if not out.exists():
        source, made = out.with_suffix(".cpp"), out.with_suffix(".tmp")
        source.write_text(SOURCE)
        command = ["g++", "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{root}/include", source]
        command += ["-o", made, f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
        subprocess.run([str(word) for word in command], check=True)
        made.rename(out)
    ctypes.CDLL(str(out), mode=ctypes.RTLD_GLOBAL)


assert "torch" not in sys.modules, "import fake_cuda before torch"
try:
    load_guard()
except (OSError, subprocess.CalledProcessError) as error:
    print(f"no GPU can be feigned here: {error}")
    raise SystemExit(77) from None

# ruff: noqa: E402
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from model import clear_tables

aten, CUDA = torch.ops.aten, torch.device("cuda", 0)
REAL_ATTENTION = F.scaled_dot_product_attention
# A CUDA build has a kernel for it; without one it is taken apart, and its parts are counted.
OWN_KERNELS = torch.library.Library("aten", "IMPL")
OWN_KERNELS.impl("silu_backward", torch.library.fallthrough_kernel, "AutogradCUDA")


@lru_cache(maxsize=None)
def ours(filename):
    """A file of the program, relative to it, or None where it is torch's or a test's."""
    path = Path(filename)
    mine = ROOT in path.parents and path.parent.name != "tests"
    return str(path.relative_to(ROOT)) if mine else None


def site():
    """file:line of the innermost frame of the program, "?" where there is none."""
    frame = sys._getframe(2)
    while frame and not ours(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{ours(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else "?"


class Watch(TorchDispatchMode):
    """Notes by file:line what a GPU would mind; gives numbers to what reads them."""

    def __init__(self):
        super().__init__()
        self.waits, self.kernels = Counter(), Counter()  # host waits; attention
        self.types = defaultdict(set)  # of every forward line's results
        self.faults = {}

    def wait(self, what, count=1):
        self.waits[f"{site()} {what}"] += count

    def value(self, x):
        """What reading a number gives."""
        if x.device.type == "cuda":
            self.wait("reads a value")
        return True if x.dtype == torch.bool else 1.0 if x.dtype.is_floating_point else 1

    def indices(self, x, given):
        """Boolean indices as numbers, whose count a fake tensor does not know."""
        found = []
        for i in given:
            if i is not None and i.dtype in (torch.bool, torch.uint8):
                self.wait("boolean index", x.device.type == "cuda")
                found += [i.new_empty(i.numel(), dtype=torch.long) for _ in range(i.dim())]
            else:
                self.wait("index from the host", i is not None and i.device != x.device)
                found.append(i)
        return found

    def copies(self, packet, args, kwargs):
        x, *rest = args
        there = torch.device(kwargs.get("device") or x.device)
        blocking = not kwargs.get("non_blocking")
        source, target = (rest[0], x.device) if packet is aten.copy_ else (x, there)
        blocking = blocking and not (packet is aten.copy_ and len(args) > 2 and args[2])
        if source.device.type == target.type:
            return
        source.constant = None  # else its value would be copied to a device that is not there
        if target.type == "cpu" and blocking:
            self.wait("copy to the host")
        pageable = target.type == "cuda" and not getattr(source, "pinned", False)
        if target.type == "cuda" and (blocking or pageable):
            self.wait("copy from pageable memory")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, x = kwargs or {}, args[0] if args else None
        if func is torch.ops.prim.device.default:  # two calls of three: what autograd asks
            return x.fake_device
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return self.value(x)
        if packet in (aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2):
            self.wait(packet.__name__, x.device.type == "cuda")
            return x.new_empty((x.numel(), x.dim()), dtype=torch.long)
        if packet in (aten.index, aten.index_put, aten.index_put_):
            args = (x, self.indices(x, args[1]), *args[2:])
        if packet is aten._to_copy or packet is aten.copy_:
            self.copies(packet, args, kwargs)
        out = func(*args, **kwargs)
        self.look_at(packet.__name__, [y for y in tree_iter(out) if torch.is_tensor(y)])
        return out

    def look_at(self, name, tensors):
        if "attention" in name:
            self.kernels[name] += 1
        for y in tensors:
            if y.numel() >= 2**31:
                self.faults[f"{site()} {name}"] = f"2^31 elements or more: {tuple(y.shape)}"
        forward = torch._C._current_graph_task_id() == -1
        if forward and tensors and tensors[0].dtype.is_floating_point:
            self.types[site()].add(tensors[0].dtype)


def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention as a GPU from Ampere on dispatches it."""
    if q.device.type != "cuda":
        return REAL_ATTENTION(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        q, k, v = (x if x.dtype == torch.float64 else x.to(half) for x in (q, k, v))
    assert q.dtype == k.dtype == v.dtype, f"attention on {q.dtype}, {k.dtype}, {v.dtype}"
    size, dense = q.shape[-1], all(x.stride(-1) == 1 for x in (q, k, v))
    four = q.dim() == 4 and all(x.shape[:2] == q.shape[:2] for x in (k, v))
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    fits = four and dense and attn_mask is None
    if fits and q.dtype in (torch.bfloat16, torch.float16) and size <= 256 and size % 8 == 0:
        if CUDNN_FIRST:
            kernel = aten._scaled_dot_product_cudnn_attention
            return kernel(q, k, v, None, grad, dropout_p, is_causal, scale=scale)[0]
        kernel = aten._scaled_dot_product_flash_attention
        return kernel(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if four and dense and size % (4 if q.dtype == torch.float32 else 8) == 0:
        bias = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[-2])
        kernel = aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, grad, dropout_p, is_causal, scale=scale)[0]
    WATCHES[-1].faults[site()] = f"attention by math: {q.dtype}, heads of {size}, dense {dense}"
    return REAL_ATTENTION(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)


CUDNN_FIRST = False  # recent torch with cuDNN on Hopper and newer
WATCHES = []  # the one that looks is last


def pinned(x):
    x.pinned = True
    return x


class Stream:
    """A stream or an event, on which nothing runs."""

    def __init__(self, *args, **kwargs):
        self.device = CUDA

    def nothing(self, *args, **kwargs):
        return self

    wait_stream = wait_event = record_event = record = synchronize = wait = nothing
    __enter__ = nothing

    def __exit__(self, *error):
        pass


CUDA_API = dict(
    is_available=lambda: True,
    is_bf16_supported=lambda *_, **__: True,
    Stream=Stream,
    Event=Stream,
    stream=lambda stream: stream or Stream(),
    current_stream=lambda *_: Stream(),
    default_stream=lambda *_: Stream(),
    current_device=lambda: 0,
    set_device=lambda *_: None,
    synchronize=lambda *_: None,
    empty_cache=lambda: None,
    get_device_name=lambda *_: "NVIDIA H200",
    get_device_capability=lambda *_: (9, 0),
    max_memory_allocated=lambda *_: 0,
    device_count=lambda: 1,
)


@contextmanager
def on_a_gpu():
    """torch.cuda and attention as they are on a GPU."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    with ExitStack() as stack:
        for name, value in CUDA_API.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attend))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", pinned))
        stack.enter_context(patch.object(torch.Tensor, "record_stream", lambda *_: None))
        yield


@contextmanager
def fakes():
    """Tensors made inside are fake; those on "cuda" behave as on a GPU -> what watches them."""
    clear_tables()
    WATCHES.append(Watch())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, on_a_gpu(), WATCHES[-1] as watch:  # the mode is entered before a GPU seems there
        yield watch
    clear_tables()


def build(make, device=CUDA):
    """The module that make() gives, with fake tensors on a device; Module.to cannot swap those."""
    with unset_fake_temporarily(), torch.device("meta"):
        module = make()
    return move(module, device)


def move(module, device, *_, **__):
    for part in module.modules():
        for kind in (part._parameters, part._buffers):
            for name, p in kind.items() if "_apply" not in vars(part) else ():
                if p is not None:
                    like = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=device)
                    grad = p.requires_grad
                    is_weight = isinstance(p, torch.nn.Parameter)
                    kind[name] = torch.nn.Parameter(like, requires_grad=grad) if is_weight else like
    return module
