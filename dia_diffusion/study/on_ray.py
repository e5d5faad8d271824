"""The engine that runs a study on a Ray cluster: a task of Ray for each run, with its share of a machine."""

import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .. import __version__
from ..errors import UsageError, first_line
from ..files import replace_files
from .engine import Ended, Task, last_words, work
from .single_run import RESULT

# How often Ray starts a task again whose machine is lost or stops: its own default.
_RETRIES = 3
# The seconds that a machine may take to answer.
_PATIENCE_SECONDS = 30
_NOT_SHARED = (
    "Not all of them see the study's folder: there the results of a run are brought back when it ends, and a run that "
    "loses its machine starts anew."
)
# The content of the files of a folder, by their place in it.
Files = dict[str, bytes]


class _Preempted(Exception):
    """The machine was told to stop, and not the study."""


class _Place(NamedTuple):
    """The location of the study: a marker file, which shows whether its folder is shared, and the working directory."""

    mark: Path
    start: Path


class RayEngine:
    """Does tasks on the machines of a Ray cluster; see `connect`.

    Args:
        place (`_Place`): Of the study.
        shared (`bool`): Whether all machines see its folder. Where they do not, the files of a run go along.
        slots (`int`): Tasks at a time.
        cpus (`int`), gpus (`float`): What a task takes.
    """

    def __init__(self, place: _Place, shared: bool, slots: int, cpus: int, gpus: float):
        self.slots = slots
        self._place, self._shared, self._cpus = place, shared, cpus
        # A process of its own for each task: accelerate has one configuration for a process.
        resources = {"num_cpus": cpus, "num_gpus": gpus, "max_calls": 1, "max_retries": _RETRIES}
        self._remote = ray.remote(**resources, retry_exceptions=[_Preempted])(_do)
        self._running: dict[ray.ObjectRef, tuple[Task, Files]] = {}

    def submit(self, task: Task) -> None:
        files = {} if self._shared else _read_files(task.run.folder)
        there = task._replace(run=replace(task.run, folder=task.run.folder.resolve()))
        versions = __version__, torch.__version__
        ref = self._remote.remote(there, self._place, files, self._cpus, versions)
        self._running[ref] = task, files

    def wait(self, seconds: float) -> list[Ended]:
        ready, _ = ray.wait(list(self._running), timeout=seconds) if self._running else ([], [])
        return [self._collect(ref) for ref in ready]

    def cancel(self) -> None:
        refs = list(self._running)
        for ref in refs:
            # Stop the task as Ctrl-C in its process would.
            ray.cancel(ref)
        if refs:
            ray.wait(refs, num_returns=len(refs))
        for ref in refs:
            self._collect(ref)

    def _collect(self, ref: "ray.ObjectRef") -> Ended:
        task, sent = self._running.pop(ref)
        try:
            status, files = ray.get(ref)
        except RayTaskError as error:
            return Ended(task, first_line(error.cause))
        except RayError as error:
            return Ended(task, f"lost by Ray ({type(error).__name__}): {first_line(error)}")
        if files is not None:
            _write_files(task.run.folder, files, sent)
        return Ended(task, last_words(task.run, status) if status else None)


@contextmanager
def connect(
    address: str, folder: Path, slots: int, cpus: int | None = None, gpus: float | None = None
) -> Iterator[RayEngine]:
    """Connect to the Ray cluster at an address, and yield an engine on it.

    Args:
        address (`str`): `HOST:PORT`, or `auto` for the cluster that this machine belongs to.
        folder (`Path`): Of the study. Machines that see the same folder work in it. Others work in a folder of their
            own, and the files of a run come back when it ends.
        slots (`int`): Tasks at a time.
        cpus (`int`, *optional*, defaults to 1): Cores, and threads of torch, of a task.
        gpus (`float`, *optional*): The share of a GPU; by default 1 if the cluster has GPUs.

    Raises:
        UsageError: if Ray is not installed, or there is no cluster of the same versions at the address.
    """
    before = ray.is_initialized()
    if not before:
        try:
            _knock(address)
            ray.init(address, log_to_driver=False, logging_level="error")
        except Exception as error:
            reason = first_line(error)
            raise UsageError(
                f"there is no Ray cluster to use at '{address}': {reason}. (ray start --head starts one.)"
            ) from error
    mark = folder.resolve() / f".shared-{secrets.token_hex(8)}"
    try:
        cpus, gpus = _take_resources(address, cpus or 1, gpus)
        mark.touch()
        shared = _is_seen(mark)
        print("All of them see its folder." if shared else _NOT_SHARED, flush=True)
        yield RayEngine(_Place(mark, Path.cwd()), shared, slots, cpus, gpus)
    finally:
        mark.unlink(missing_ok=True)
        if not before:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at the address: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if address != "auto":
        if not (host and port.isdecimal()) or "/" in host:
            raise ValueError("an address is HOST:PORT, or auto")
        socket.create_connection((host, int(port)), _PATIENCE_SECONDS).close()


def _take_resources(address: str, cpus: int, gpus: float | None) -> tuple[int, float]:
    """Return the CPUs and GPUs of a run. Print those of the cluster, and whether no machine is large enough now."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = {name: sum(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU")}
    if gpus is None:
        gpus = 1 if total["GPU"] else 0
    print(
        f"Ray at '{address}': {len(machines)} machines with {total['CPU']:g} CPUs and {total['GPU']:g} GPUs; each run "
        f"takes {cpus} CPUs and {gpus:g} GPUs.",
        flush=True,
    )
    if not any(machine.get("CPU", 0) >= cpus and machine.get("GPU", 0) >= gpus for machine in machines):
        print("No machine has as many now: the runs wait until one joins. Ctrl-C stops waiting.", flush=True)
    return cpus, gpus


def _is_seen(mark: Path) -> bool:
    """Return whether all machines see a file."""
    # A function that goes along as it is: the machines need not import this package to answer.
    probe = ray.remote(num_cpus=0)(lambda path: path.exists())
    places = (NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"])
    answers = [probe.options(scheduling_strategy=place).remote(mark) for place in places]
    try:
        return all(ray.get(answers, timeout=_PATIENCE_SECONDS))
    except RayError:
        return False


def _do(task: Task, place: _Place, files: Files, threads: int, versions: tuple[str, str]) -> tuple[int, Files | None]:
    """Do a task on a machine of the cluster; return its exit status, and its files if the folder is not shared."""
    host = socket.gethostname()
    if versions != (__version__, torch.__version__):
        raise UsageError(
            f"{host} has dia-diffusion {__version__} and torch {torch.__version__}, and the machine of the study "
            f"{' and '.join(versions)}: install the same on all."
        )
    origin = f"on {host}, node {ray.get_runtime_context().get_node_id()} of Ray"
    with suppress(OSError):
        os.chdir(place.start)
    if place.mark.exists():
        return _checked(work(task, threads, origin)), None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / task.run.name
        _write_files(folder, files)
        status = _checked(work(task._replace(run=replace(task.run, folder=folder)), threads, origin))
        return status, _read_files(folder)


def _checked(status: int) -> int:
    if status == 128 + signal.SIGTERM:
        raise _Preempted
    return status


def _read_files(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write_files(folder: Path, files: Files, before: Files | None = None) -> None:
    """Write files to a folder, the result last, and remove those of `before` that are gone."""

    def write(place: Path) -> None:
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)

    replace_files(folder, write, last=RESULT)
    for name in (before or {}).keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            # Remove folders that are empty now.
            os.removedirs((folder / name).parent)
