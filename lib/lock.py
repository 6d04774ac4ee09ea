"""Who owns a run folder: a lock that the system drops when its process dies, however it dies.

OUT/.lock says host, process and start of the run that holds it.  Source: flock(2)."""

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

HELD = {}  # path -> open file, until this process ends


def told(path):
    """What a lock file says of its owner, for people."""
    try:
        said = json.loads(path.read_text())
        return f"process {said['pid']} on {said['host']}, since {said['since']}: {said['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


def acquire(folder, patience=5.0):
    """Own a run folder until this process ends -> remarks for the log.

    patience   seconds to wait for a run that is just ending
    Raises ValueError that names the owner when another run has the folder."""
    path = Path(folder, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    if str(path) in HELD:
        return []
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (open as long as the process)
    deadline, before = time.monotonic() + patience, path.read_text() and told(path)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                cure = "wait for it, end it, or choose another --out_dir"
                raise ValueError(f"{folder}: another run is in it ({told(path)}); {cure}") from None
            time.sleep(0.5)
        except OSError as error:  # a file system without locks
            return [f"no lock on {folder} ({error.strerror}): two runs in it would mix"]
    facts = dict(pid=os.getpid(), host=socket.gethostname(), command=" ".join(sys.argv))
    file.truncate(0)
    file.write(json.dumps(dict(facts, since=time.strftime("%Y-%m-%d %H:%M:%S"))))
    file.flush()
    HELD[str(path)] = file
    return [f"taken over from a run that was cut off ({before})"] if before else []


def release(worker=False):
    """At the end of a run: the folder is free and says so.  A loader worker, which a run's death
    may outlive, closes its copy alone."""
    while HELD:
        file = HELD.popitem()[1]
        if not worker:
            file.truncate(0)
        file.close()
