"""What dependencies print that is of no use to a user.

Stopping between steps when a scheduler preempts the job or someone presses Ctrl-C.

Settings of the process: speed on a CPU, and its end. They do nothing where they do not apply."""

import ctypes
import os
import signal
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from ..errors import UsageError

_INTERVAL = "10"


def quiet_dependencies() -> None:
    """For command lines only, and before anything is imported: leaves out what is meant for the developers of other
    packages, and in a log the bars of what is quick.

    Warnings that were asked for (`python -W`, `PYTHONWARNINGS`) stay.
    """
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        # diffusers passes on to huggingface_hub an argument that no longer does anything.
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
    if not sys.stderr.isatty():
        # The defaults of tqdm.
        for name in ("TQDM_DELAY", "TQDM_MININTERVAL"):
            os.environ.setdefault(name, _INTERVAL)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Training ended early on a signal, with a checkpoint written.

    Attributes:
        signum (`int`): The signal. The customary exit status is 128 plus its number.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


@contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in the list that it yields. A second one acts as if this were not here.

    Outside of the main thread, where Python allows no handlers, nothing is caught.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {}

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    previous |= {signum: signal.signal(signum, note) for signum in _SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


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
    if _launched_alone():
        end_with_parent(signal.SIGTERM)


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Lets the end of the process that started this one reach it as a signal (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signum))


def start_missing_processes() -> None:
    """Makes `accelerate launch --cpu --num_processes N` mean N processes.

    Without MPI accelerate starts one only, and does not tell it how many were asked for. The command line of accelerate
    does; this process then becomes torch's launcher of as many, which also passes on signals.

    Raises:
        UsageError: where accelerate was asked for several processes otherwise, and started one only.
    """
    # Clusters export the address of a master too, whether or not there are several processes.
    asked = _launcher_arguments() if _launched_alone() and "MASTER_ADDR" in os.environ else None
    if asked is None:
        return
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    path = asked.config_file or default_config_file
    config = load_config_from_file(path) if Path(path).is_file() else None
    processes, machines = (
        getattr(asked, name) or getattr(config, name, 1) for name in ("num_processes", "num_machines")
    )
    if processes == 1 and machines == 1:
        return
    if machines != 1 or os.environ.get("ACCELERATE_USE_CPU") != "True":
        raise UsageError(
            "accelerate launch was asked for several processes, but started one only. On the CPU of one machine: "
            "accelerate launch --cpu --num_processes N ...; on several machines: torchrun."
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", os.environ.get("MASTER_PORT", "29500"), *(["--module"] if asked.module else [])]
    os.execv(sys.executable, [*command, asked.training_script, *asked.training_script_args])


def _launcher_arguments() -> Namespace | None:
    """What `accelerate launch` was told that started this process."""
    from accelerate.commands.launch import launch_command_parser

    launcher = psutil.Process(os.getppid()).cmdline()
    names = ("launch", "accelerate-launch", "accelerate.commands.launch")
    start = next((i for i, word in enumerate(launcher) if Path(word).name in names), None)
    return None if start is None else launch_command_parser().parse_args(launcher[start + 1 :])


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
