"""How many threads small CPU runs should take now: all cores, or one where others use them too.

Threads wait for each other at every operation, so on shared cores two of them can be many times
slower than one.  Measured, for a load average knows only the last minute: `demo.sh` asks here."""

import time

import torch


def seconds(threads):
    """Median time of a row of small operations, as a tiny training step is one."""
    torch.set_num_threads(threads)
    a, b, spent = torch.randn(960, 144), torch.randn(144, 432), []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(10):
            (a @ b).relu_()
        spent.append(time.perf_counter() - start)
    return sorted(spent)[len(spent) // 2]


if __name__ == "__main__":
    most = torch.get_num_threads()
    print(most if most == 1 or seconds(most) < seconds(1) else 1)
