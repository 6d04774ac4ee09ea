"""How many threads small CPU runs should take now: all cores, or one where others use them too.

Threads wait for each other at every operation, so on shared cores two of them can be many times
slower than one.  Measured, for a load average knows only the last minute: `demo.sh` asks here."""

import statistics
import timeit

import torch


def seconds(threads):
    """Median time of a row of small operations, as a tiny training step is one."""
    torch.set_num_threads(threads)
    a, b = torch.randn(960, 144), torch.randn(144, 432)
    return statistics.median(timeit.repeat(lambda: (a @ b).relu_(), repeat=7, number=10))


if __name__ == "__main__":
    most = torch.get_num_threads()
    print(most if most == 1 or seconds(most) < seconds(1) else 1)
