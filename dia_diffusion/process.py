"""Settings of the process: speed on a CPU, and its end. They do nothing where they do not apply."""

import ctypes
import os
import signal
import sys

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
# Option of prctl(2).
_PR_SET_PDEATHSIG = 1


def tune_process() -> None:
    """For command lines only: a library should not change the process that it is imported into."""
    _keep_freed_memory()
    _use_all_cores()


def end_with_launcher() -> None:
    """Lets SIGTERM to `accelerate launch`, which it does not pass on, reach the process that it started (Linux)."""
    if _launched_alone() and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _launched_alone() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ


def _keep_freed_memory() -> None:
    """Lets glibc keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the system at once, and has to map and clear new ones at each step.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _use_all_cores() -> None:
    """`accelerate launch` leaves a single process one thread on a CPU unless it is told otherwise; that is slow."""
    if _launched_alone() and os.environ.get("OMP_NUM_THREADS") == "1":
        import torch

        torch.set_num_threads(available_cores())


def available_cores() -> int:
    """The cores that this process may use, which a cluster may have limited."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores or 1
