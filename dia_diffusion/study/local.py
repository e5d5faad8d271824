"""The tasks of a study on this machine: a process for each, several side by side, each with one of the GPUs."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait

import torch

from .engine import Ended, Task, last_words, work

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class LocalEngine:
    """Does tasks in processes of one thread each.

    Args:
        jobs (`int`): How many at a time.
        gpus (sequence of `str`): The GPUs that they share, as CUDA_VISIBLE_DEVICES names them; each task sees one.
    """

    def __init__(self, jobs: int, gpus: Sequence[str] = ()):
        self.slots = jobs
        self._gpus = gpus
        self._running: dict[int, tuple[multiprocessing.Process, Task, str | None]] = {}
        # Processes forked from one that has imported everything start quickly; one that has seen a GPU must not fork.
        forks = sys.platform == "linux" and not gpus
        self._context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload([__name__])

    def submit(self, task: Task) -> None:
        taken = [gpu for _, _, gpu in self._running.values()]
        gpu = min(self._gpus, key=taken.count, default=None)
        process = self._context.Process(target=_live, args=(task, gpu), name=task.run.name)
        with _seeing(gpu):
            process.start()
        self._running[process.sentinel] = process, task, gpu

    def wait(self, seconds: float) -> list[Ended]:
        ended = []
        for sentinel in wait(list(self._running), timeout=seconds):
            process, task, _ = self._running.pop(sentinel)
            process.join()
            ended.append(Ended(task, last_words(task.run, process.exitcode) if process.exitcode else None))
        return ended

    def cancel(self) -> None:
        for process, _, _ in self._running.values():
            process.terminate()
        for process, _, _ in self._running.values():
            process.join()
        self._running.clear()


def visible_gpus() -> list[str]:
    """The GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get(_VISIBLE)
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


@contextmanager
def _seeing(gpu: str | None) -> Iterator[None]:
    """What a process that starts now has in its environment, before it imports anything."""
    before = os.environ.get(_VISIBLE)
    if gpu is not None:
        os.environ[_VISIBLE] = gpu
    try:
        yield
    finally:
        if gpu is not None:
            os.environ.pop(_VISIBLE)
            if before is not None:
                os.environ[_VISIBLE] = before


def _live(task: Task, gpu: str | None) -> None:
    """The life of a process, which ends with the one that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(work(task, 1, "on this machine" if gpu is None else f"on GPU {gpu} of this machine"))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
