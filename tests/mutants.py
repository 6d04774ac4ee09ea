"""Files of strangers, changed at random, through the tools that read them; a table of outcomes.

    python tests/mutants.py [--trials N --seed S --only KIND]

Each trial changes one file (bits, cuts, words that mean something, values of JSON, fields of a
checkpoint that is signed anew) and runs the tool on it, in a process of its own with limits on time
and memory.  It must end well or in one line that names the file, status 2 (of data.py also a failed
clip by its name, status 1).  Columns:

    refused      as it should be
    unchanged    the result is that of the whole file
    other        another valid file of its format, which has no checksum: read as what it says
    traceback, hang (60 s of processor time, 300 s by the clock), memory (2 GB), unnamed, silent (a
    result that is not finite, or that differs although a checksum covers the file)"""

import argparse
import hashlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from mutant_kinds import GROUPS, dataset_kinds  # noqa: E402

import config  # noqa: E402
import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from lib.guards import run_command  # noqa: E402

SECONDS, PATIENCE, BYTES = 60, 300, 2**31  # of processor time, by the clock, of memory
COLUMNS = "refused unchanged other traceback hang memory unnamed silent".split()


# ---------------------------------------------------------------------------------------- one trial
def tool(arguments):
    """The command line tool in this process."""
    script, *rest = map(str, arguments)
    sys.argv = [script, *rest]
    if script == "config":
        options = config.apply(vars(train), rest)
        train.check_options(options.replaced(plan=True))
        print(sorted(vars(options).items()))
    elif script == "sample.py":
        sample.command()
    else:
        dict([("data.py", data.command), ("train.py", train.command)])[script]()


def outcome_of(out, said):
    """A digest of what a tool has made, or None where it is not finite."""
    total = hashlib.sha256()
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if path.name in ("depth.npz", "cameras.npz"):
            with np.load(path) as file:
                arrays = {k: file[k] for k in ("depth", "w2c", "intrinsics") if k in file.files}
        elif path.suffix == ".safetensors":
            arrays = {k: v.float().numpy() for k, v in load_file(path).items()}
        else:
            continue
        for name, array in sorted(arrays.items()):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return None
            total.update(name.encode() + array.tobytes())
    return total.hexdigest() + hashlib.sha256(said.encode()).hexdigest()


def child(kind, out, pipe):
    os.chdir(ROOT)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + 2 * BYTES,) * 2)
    # By the clock a busy machine would decide; whoever waits for ever is caught by the clock.
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log = os.open(out / "said", os.O_RDWR | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w") for n in (1, 2))  # pytest has its own
    code = 0
    try:
        run_command(
            str(kind.arguments[0]),
            lambda: tool([str(a).replace("OUT", str(out)) for a in kind.arguments]),
        )
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = "traceback"
    sys.stdout.flush()
    sys.stderr.flush()
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = max(resource.getrusage(who).ru_maxrss for who in both) - before
    pipe.send((code, used * 1024))
    os._exit(0)


def run(kind, base):
    """(code, what was said, digest of the result, bytes used) of the tool on what lies there."""
    out = Path(tempfile.mkdtemp(dir=base))
    ours, theirs = multiprocessing.Pipe(False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(kind, out, theirs))
    process.start()
    theirs.close()
    try:
        code, used = ours.recv() if ours.poll(PATIENCE) else ("hang", 0)
    except EOFError:
        process.join()
        code, used = f"signal {process.exitcode}", 0
    process.kill()
    process.join()
    said = (out / "said").read_text(errors="replace") if (out / "said").exists() else ""
    result = outcome_of(out, "".join(table_lines(said, kind))) if code == 0 else ""
    shutil.rmtree(out)
    for cache in Path(base).glob("raw-*/cache"):
        shutil.rmtree(cache)
    return code, said, result, used


def table_lines(said, kind):
    """Of what was printed the part that is a result: verify's table, --check, a config."""
    return said if kind.arguments[0] == "config" or "verify" in kind.arguments[:2] else ""


def judge(kind, clean, found):
    code, said, result, used = found
    if code in ("hang", f"signal {-signal.SIGXCPU}"):
        return "hang"
    if used > BYTES:
        return "memory"
    if (
        code == "traceback"
        or "Traceback" in said
        or str(code).startswith("signal")
        or "panicked" in said
    ):
        return "traceback"
    if code in (1, 2):
        names = (str(kind.path), *kind.names)
        line = said.strip().splitlines()[-1] if said.strip() else ""
        named = any(name in (said if code == 1 else line) or name in said for name in names)
        return "refused" if named else "unnamed"
    if code != 0:
        return "traceback"
    if result is None or result != clean and kind.sure:
        return "silent"
    return "unchanged" if result == clean else "other"


def campaign(base, trials, seed, only="", groups=GROUPS):
    """kind -> Counter of outcomes; prints what should not be."""
    table = {}
    for make in groups:
        root = base / ("clips" if make is dataset_kinds else make.__name__)
        root.mkdir(exist_ok=True)
        for name, kind in list(make(root)):
            if not re.search(only, name):
                continue
            whole, rng = kind.path.read_bytes(), random.Random(f"{name} {seed}")
            code, said, clean, _ = run(kind, root)
            assert code == 0, f"{name}: the whole file is not read: {said[-800:]}"
            table[name] = Counter()
            for n in range(trials):
                content = kind.change(whole, rng)
                kind.path.write_bytes(content)
                found = run(kind, root)
                verdict = judge(kind, clean, found)
                table[name][verdict] += 1
                if verdict not in COLUMNS[:3]:
                    print(
                        f"--- {name}, trial {n}: {verdict}, code {found[0]}\n{found[1][-1500:]}",
                        flush=True,
                    )
            kind.path.write_bytes(whole)
            print(f"{name:26s}" + "".join(f"{table[name][c]:>10d}" for c in COLUMNS), flush=True)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    names = [make.__name__ for make in GROUPS]
    parser.add_argument("--groups", nargs="*", choices=names, default=names)
    parser.add_argument("--only", default="", help="a pattern for the names of kinds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    with tempfile.TemporaryDirectory() as base:
        print(f"{'':26s}" + "".join(f"{c:>10s}" for c in COLUMNS))
        groups = [make for make in GROUPS if make.__name__ in args.groups]
        table = campaign(Path(base), args.trials, args.seed, args.only, groups)
    total = sum(table.values(), Counter())
    print(f"{'all':26s}" + "".join(f"{total[c]:>10d}" for c in COLUMNS))
    print(f"{total.total()} mutants of {len(table)} kinds, {time.time() - began:.0f} s")
    raise SystemExit(any(total[c] for c in COLUMNS[3:]))


if __name__ == "__main__":
    main()
