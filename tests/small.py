"""A real FantasyWorld at the smallest sizes at which every part still has its shape, and train.py
on it in-process."""

import contextlib
import functools
import io
import multiprocessing
import os
import pathlib
import runpy
import signal
import socket
import sys
import tempfile
import traceback

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import config
from lib import plan
from lib.guards import STOPS
from model import Config, FantasyWorld

ROOT = pathlib.Path(__file__).parents[1]
# A fork spares importing torch again.  Autograd of a CUDA build keeps threads, which no fork can
# have: there a process starts anew.
START = "fork" if torch.version.cuda is None and torch.version.hip is None else "spawn"

TINY = Config(
    dim=32,
    ffn_dim=64,
    num_layers=4,
    in_dim=32,
    head_dim=16,
    text_dim=64,
    text_len=16,
    freq_dim=32,
    has_clip=False,
    num_pcb=2,
    geo_dim=32,
    geo_heads=2,
    bridge_layers=1,
    bridge_width=32,
    pose_hidden=32,
    irg_dim=32,
    irg_heads=2,
    taps=(0, 0, 1, 1),
    dpt_channels=(8, 8, 8, 8),
    dpt_features=8,
    dpt_tail=4,
    camera_dim=16,
    camera_heads=2,
    camera_layers=1,
    camera_iterations=2,
)


def tiny_model(stage=2, seed=0, awake=False, **overrides):
    """awake=True gives every zero-initialised parameter random values, so that nothing is hidden
    behind a zero gate."""
    torch.manual_seed(seed)
    model = FantasyWorld(Config(**{**TINY.__dict__, **overrides})).set_stage(stage)
    if awake:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return model


def tiny_inputs(batch=2, frames=5, height=32, width=48, seed=1):
    """Random arguments of FantasyWorld.forward."""
    g = torch.Generator().manual_seed(seed)
    f, h, w = (frames - 1) // 4 + 1, height // 8, width // 8
    randn = lambda *shape: torch.randn(*shape, generator=g)
    return dict(
        x=randn(batch, 16, f, h, w),
        t=1000 * torch.rand(batch, generator=g),
        context=[randn(3 + i % 3, 64) for i in range(batch)],
        y=randn(batch, 16, f, h, w),
        plucker=randn(batch, 6, frames, height, width),
        poses=randn(batch, frames, 9),
    )


def loss_of(out):
    return sum(v.float().square().mean() for v in out.values() if v is not None)


def options_of(script, **values):
    """The options of a script (a module), as the command line without arguments gives them, but for
    values."""
    return config.apply(vars(script), []).replaced(**values)


@functools.cache
def peak_flops(device):
    """Measured once, not at every start."""
    return plan.peak_flops(device)


def train_here(*arguments, **patches):
    """train.py in this process, four seconds quicker than a new one; patches replace its functions.

    returns  exit code (0, a number or a message) and everything printed"""
    import train

    patches = dict(peak_flops=peak_flops) | patches
    before, handlers = (
        dict(vars(train)),
        {n: signal.getsignal(n) for n in STOPS},
    )
    text, argv, code = io.StringIO(), sys.argv, 0
    arguments = [str(a) for a in arguments]
    arguments[0] = str(ROOT / arguments[0])
    try:
        vars(train).update(patches)
        sys.argv = ["train.py", *arguments]
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            train.main(config.apply(vars(train), arguments))
    except (SystemExit, ValueError) as left:  # the script turns a ValueError into a line and code 2
        code = left.code if isinstance(left, SystemExit) else f"train.py: {left}"
    finally:
        sys.argv = argv
        vars(train).clear()
        vars(train).update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, text.getvalue()


def command_here(script, *arguments):
    """Another command in this process: importing torch once more is most of what a small one costs.

    returns  as train_here"""
    text, argv, code = io.StringIO(), sys.argv, 0
    try:
        sys.argv = [script, *map(str, arguments)]
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as left:
        code = left.code or 0
    finally:
        sys.argv = argv
    return code, text.getvalue()


def ranks_here(count, script, *arguments, restarts=0, nodes=1, endpoint=None):
    """A command under torchrun's own agent, in this process, which forks the ranks where it can:
    importing torch in agent and ranks is most of what a small one costs.

    nodes    so many agents meet at the endpoint, each with `count` ranks
    returns  exit code (0 or 1) and all that agent and ranks said"""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with tempfile.TemporaryDirectory() as logs:
        how = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=count,
            max_restarts=restarts,
            # As torchrun without options: c10d reads the source of its callers at every event.
            rdzv_backend="static" if nodes == 1 else "c10d",
            rdzv_endpoint=endpoint or free_endpoint(),
            rdzv_configs=dict(rank=0) if nodes == 1 else {},
            run_id=pathlib.Path(logs).name if nodes == 1 else "nodes",
            local_addr=None if nodes == 1 else "127.0.0.1",
            monitor_interval=0.1,
            start_method=START,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=Std.ALL),
        )
        code, said = 0, ""
        try:
            elastic_launch(how, as_command)(script, *map(str, arguments))
        except ChildFailedError as error:
            code, said = 1, str(error)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        files = sorted(pathlib.Path(logs).rglob("std*.log"))
        return code, said + "".join(path.read_text() for path in files)


def free_endpoint():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def as_command(script, *arguments):
    """The command as a process of its own would run it."""
    os.chdir(ROOT)
    sys.argv, code = [script, *map(str, arguments)], 0
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as left:
        code = left.code
    except Exception:
        traceback.print_exc()
        code = 1
    sys.exit(code)  # out here: the exception would keep the loader's workers alive


def as_agent(*arguments, **how):
    """ranks_here, as torchrun would run it."""
    code, said = ranks_here(*arguments, **how)
    print(said)
    sys.exit(code)


class Forked(multiprocessing.get_context(START).Process):
    """A process of its own, which need not import torch again where it can fork; leads a group of
    processes, as a command of a shell does, and says what it says in a file."""

    def __init__(self, work, *arguments, said=os.devnull, **how):
        super().__init__(target=work, args=arguments, kwargs=how)
        self.said = pathlib.Path(said)
        self.start()

    def run(self):
        os.setsid()
        said = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(said, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        super().run()

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        """Its exit code; None where it runs on."""
        self.join(timeout)
        return self.exitcode
