"""train.py with accidents: `python tests/inject.py RANK,STEP,MICRO,WHAT[+...] CONFIG.py
[--key=value ...]`.

WHAT: nan (a pixel of the first clip of that micro-step), and on the first attempt of a torchrun
only: term (SIGTERM to this rank), kill (SIGKILL), hang (this rank sleeps)."""

import os
import pathlib
import signal
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import config  # noqa: E402
import train  # noqa: E402
from lib.guards import run_command  # noqa: E402

ACTS = dict(
    term=lambda b: os.kill(os.getpid(), signal.SIGTERM),
    kill=lambda b: os.kill(os.getpid(), signal.SIGKILL),
    nan=lambda b: b["latents"][0, 0, 0, 0, 0].fill_(float("nan")),
    hang=lambda b: time.sleep(1000),
)


def at(step, micro, act):
    """Patches of train.py's functions: call act(batch) in one micro-step of the run."""
    counts, draw = {}, train.draw

    def disturbed(b, now, positions, **how):
        counts[now] = counts.get(now, -1) + 1
        if (now, counts[now]) == (step, micro):
            act(b)
        return draw(b, now, positions, **how)

    return dict(draw=disturbed)


if __name__ == "__main__":
    accidents, *arguments = sys.argv[1:]
    for rank, step, micro, what in (a.split(",") for a in accidents.split("+")):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if os.environ.get("RANK", "0") == rank and (first or what == "nan"):
            vars(train).update(at(int(step), int(micro), ACTS[what]))
    sys.argv = ["train.py", *arguments]
    run_command("train.py", lambda: train.main(config.apply(vars(train), arguments)))
