"""train.py with an accident in one micro-step: `python tests/inject.py RANK STEP MICRO WHAT CONFIG.py [--key=value ...]`.

WHAT: term (SIGTERM to this rank), nan (a pixel of the first clip), hang (this rank sleeps)."""
import os
import pathlib
import signal
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import config            # noqa: E402
import train             # noqa: E402

ACTS = dict(term=lambda b: os.kill(os.getpid(), signal.SIGTERM),
            nan=lambda b: b["latents"][0, 0, 0, 0, 0].fill_(float("nan")),
            hang=lambda b: time.sleep(1000))


def at(step, micro, act):
    """Patches of train.py's functions: call act(batch) in one micro-step of the run (not of step 0, counted twice)."""
    counts, draw = {}, train.draw

    def disturbed(b, now, *rest):
        counts[now] = counts.get(now, -1) + 1
        if (now, counts[now]) == (step, micro):
            act(b)
        return draw(b, now, *rest)
    return dict(draw=disturbed)


if __name__ == "__main__":
    rank, step, micro, what, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        vars(train).update(at(int(step), int(micro), ACTS[what]))
    sys.argv = ["train.py", *arguments]
    train.main(config.apply(vars(train), arguments))
