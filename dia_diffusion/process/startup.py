"""Start of a command: quiet dependencies, memory and threads, and the processes that `accelerate launch` forgets."""

import ctypes
import logging
import math
import os
import signal
import sys
import tempfile
import warnings
from argparse import Namespace
from pathlib import Path

import psutil

from ..errors import UsageError
from .signals import end_with_parent

_INTERVAL = "10"
# Parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def quiet_dependencies() -> None:
    """Hide warnings for developers of other packages and, in a log, bars of quick work. Call before other imports.

    For command lines only. Warnings that a user asks for (`python -W`, `PYTHONWARNINGS`) stay.
    """
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        # diffusers passes on to huggingface_hub an argument that no longer does anything.
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
    # What a UNet or a VAE cannot do is found on fake tensors, and told in words.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        # The defaults of tqdm.
        for name in ("TQDM_DELAY", "TQDM_MININTERVAL"):
            os.environ.setdefault(name, _INTERVAL)


def ensure_home() -> None:
    """Give a user without a home directory one among the temporary files. Call before other imports.

    A container that runs with a bare user number has none, and then libraries fail that keep caches there.
    """
    if os.path.expanduser("~") != "~":  # noqa: PTH111 (Path's own raises an error)
        return
    home = Path(tempfile.gettempdir()) / f"dia-diffusion-{os.getuid()}"
    home.mkdir(exist_ok=True)
    os.environ["HOME"] = str(home)
    # Libraries look for HOME where the user has no account.
    os.environ.setdefault("USER", str(os.getuid()))
    print(f"there is no home directory: caches are kept in '{home}'. Set HOME to keep them.", file=sys.stderr)


def tune_process() -> None:
    """Set memory and threads for speed on a CPU. For command lines only: a library must not change its process."""
    _keep_freed_memory()
    _use_all_cores()


def end_with_launcher() -> None:
    """Pass on the end of `accelerate launch` as SIGTERM: it does not forward signals (Linux)."""
    if _launched_alone():
        end_with_parent(signal.SIGTERM)


def start_missing_processes() -> None:
    """Make `accelerate launch --cpu --num_processes N` mean N processes.

    Without MPI accelerate starts one process and does not tell it how many the user asked for; accelerate's command
    line and configuration do. This process then becomes torch's launcher of N, which also passes on signals.

    Raises:
        UsageError: if accelerate was asked for several processes in another way, and started one only.
    """
    # Clusters export the address of a master too, for one process as well as for several.
    asked = _launcher_arguments() if _launched_alone() and "MASTER_ADDR" in os.environ else None
    if asked is None:
        return
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    path = asked.config_file or default_config_file
    config = load_config_from_file(path) if Path(path).is_file() else None
    processes, machines, port = (
        getattr(asked, name) or getattr(config, name, None)
        for name in ("num_processes", "num_machines", "main_process_port")
    )
    if (processes or 1) == 1 and (machines or 1) == 1:
        return
    if (machines or 1) != 1 or os.environ.get("ACCELERATE_USE_CPU") != "True":
        raise UsageError(
            "accelerate launch was asked for several processes, but started one only. On the CPU of one machine: "
            "accelerate launch --cpu --num_processes N ...; on several machines: torchrun."
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    # Standalone takes a free port, so that two launches do not meet. Names of this machine may not resolve.
    command += ["--master_port", str(port)] if port else ["--standalone", "--local_addr", "127.0.0.1"]
    # By default torch's launcher ends its processes on SIGHUP under nohup too, and SIGUSR1 ends the launcher alone.
    names = [name for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    handled = [name for name in names if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN]
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(handled))
    command += ["--module"] if asked.module else []
    os.execv(sys.executable, [*command, asked.training_script, *asked.training_script_args])


def available_cores() -> int:
    """Return the number of cores for this process: its affinity (a cluster's share) and its container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, cpu_quota() or cores)


def cpu_quota(root: Path = Path("/")) -> int | None:
    """Return the whole cores that the CPU quota of control groups allows, rounded up, or None without a quota.

    Reads `cpu.max` (version 2) or `cpu.cfs_quota_us` (version 1) of the group of this process and of those above it.

    Args:
        root (`Path`, *optional*): Where `/proc` and `/sys` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # Inside of a container the group itself is often mounted in place of the top one.
        folder = base / group.strip("/")
        quotas += [_read_quota(place) for place in (folder, *folder.parents) if place.is_relative_to(base)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _read_quota(group: Path) -> int | None:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return max(1, math.ceil(int(quota) / int(period))) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _launcher_arguments() -> Namespace | None:
    """Return the arguments of the `accelerate launch` that started this process."""
    from accelerate.commands.launch import launch_command_parser

    launcher = psutil.Process(os.getppid()).cmdline()
    names = ("launch", "accelerate-launch", "accelerate.commands.launch")
    start = next((i for i, word in enumerate(launcher) if Path(word).name in names), None)
    return None if start is None else launch_command_parser().parse_args(launcher[start + 1 :])


def _launched_alone() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the system at once, and has to map and clear new ones at each step.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _use_all_cores() -> None:
    """Give torch one thread a core, unless the user asked for a number.

    `accelerate launch` sets one thread by itself, which is slow; torch does not know the CPU quota of a container, and
    takes a thread for each core of the machine.
    """
    if _launched_alone():
        chosen = os.environ.get("OMP_NUM_THREADS") != "1" or _asked_for_threads()
    else:
        chosen = "OMP_NUM_THREADS" in os.environ or cpu_quota() is None
    if not chosen:
        import torch

        torch.set_num_threads(available_cores())


def _asked_for_threads() -> bool:
    """Tell whether the environment or the command line of `accelerate launch` names a number of threads."""
    try:
        # The environment with which the launcher was started.
        if "OMP_NUM_THREADS" in psutil.Process(os.getppid()).environ():
            return True
    except (psutil.Error, OSError):
        return False
    asked = _launcher_arguments()
    return asked is not None and asked.num_cpu_threads_per_process is not None
