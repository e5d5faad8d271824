"""Engines do the tasks of a study; this is the one for this machine.

An engine takes tasks (`submit`), returns those that ended (`wait`), and stops the rest at a checkpoint (`cancel`).
`LocalEngine` starts a process for each task, several side by side, each with one of the GPUs; `on_ray.py` has another.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from filelock import FileLock, Timeout

from ..errors import UsageError
from ..process.output import progress_bar
from ..process.signals import Interrupted, catch_interrupts, watch_parent
from ..process.startup import tune_process
from ..training.log import METRICS_LOG, read_metrics
from .description import StudyRun
from .single_run import RESULT

_LOG = "log.txt"
_LOCK = ".task-lock"
# Of a machine that was lost a shared disk may hold the lock for a while.
_PATIENCE_SECONDS = 180


class Task(NamedTuple):
    """A function to call with a run, which leaves a file in its folder."""

    function: Callable[[StudyRun], None]
    run: StudyRun


class Ended(NamedTuple):
    """A task that ended, and why it failed, or None if it is done."""

    task: Task
    failure: str | None


class Engine(Protocol):
    """Does the tasks of a study.

    Attributes:
        slots (`int`): How many tasks it is given at a time.
    """

    slots: int

    def submit(self, task: Task) -> None:
        """Start a task, now or as soon as there is room for it."""

    def wait(self, seconds: float) -> list[Ended]:
        """Return the tasks that ended since the last call; wait up to `seconds` for the first."""

    def cancel(self) -> None:
        """Stop the running tasks at a checkpoint, and wait until they have stopped."""


def run_tasks(
    engine: Engine, tasks: Sequence[Task], report: Callable[[bool], Any], slots: int | None = None
) -> list[str]:
    """Do tasks on an engine.

    Args:
        engine (`Engine`): Where.
        tasks (sequence of `Task`): What to do, in this order.
        report (`Callable`): Called about once a second, with whether a task has just ended.
        slots (`int`, *optional*): How many at a time; by default as many as the engine takes.

    Returns:
        A line for each task that failed; the others are done all the same.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C, when all runs have stopped at a checkpoint.
    """
    waiting, running, failures = deque(tasks), 0, []
    with catch_interrupts() as signals:
        try:
            while waiting or running:
                while waiting and running < (slots or engine.slots):
                    engine.submit(waiting.popleft())
                    running += 1
                ended = engine.wait(1.0)
                running -= len(ended)
                if not signals:
                    failures += [f"{task.run.name}: {failure}" for task, failure in ended if failure is not None]
                report(bool(ended))
                if signals:
                    raise Interrupted(signals[0], "stopped; the same command goes on.")
        finally:
            engine.cancel()
    return failures


def work(task: Task, threads: int, origin: str) -> int:
    """Do a task in this process; what it prints goes to the log of its run.

    Args:
        task (`Task`): What to do.
        threads (`int`): Of torch.
        origin (`str`): Where it is done, for the log.

    Returns:
        `int`: The exit status: 0, 1 after an error, 2 after a mistake, 128 plus the signal after an interruption.
    """
    folder = task.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with _printing_to(folder / _LOG):
        print(f"{task.run.name} {origin}.", flush=True)
        tune_process()
        torch.set_num_threads(threads)
        try:
            # A machine that was given up may still be at work on the run.
            with FileLock(folder / _LOCK, timeout=_PATIENCE_SECONDS):
                task.function(task.run)
        except Timeout:
            print("error: another process is at work on this run.", file=sys.stderr)
            return 2
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Interrupted as interruption:
            return 128 + interruption.signum
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def last_words(run: StudyRun, status: int) -> str:
    """Return why a task failed: the last line of its log, or the signal that ended its process (a negative status)."""
    if status < 0:
        return f"ended by signal {-status}"
    lines = (run.folder / _LOG).read_text().splitlines() or ["?"]
    return f"{lines[-1].removeprefix('error: ')} (see {run.folder / _LOG})"


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Redirect the output of this process, that of its libraries included, to the end of a file."""
    kept = [os.dup(stream) for stream in (1, 2)]
    with path.open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, stream)
            os.close(descriptor)


class Progress:
    """A bar over the steps of all runs of a study, or over the runs of a trainer of one's own."""

    def __init__(self, runs: Sequence[StudyRun]):
        self._total = {run.name: run.steps for run in runs}
        self._runs = runs
        total = sum(self._total.values())
        self._bar = progress_bar(
            total=total, initial=self._steps(), desc="Study", unit="run" if runs[0].trainer else "step"
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self) -> None:
        finished = sum((run.folder / RESULT).exists() for run in self._runs)
        self._bar.set_postfix_str(f"{finished} of {len(self._runs)} runs finished", refresh=False)
        self._bar.update(self._steps() - self._bar.n)

    def _steps(self) -> int:
        return sum(self._steps_done(run) for run in self._runs)

    def _steps_done(self, run: StudyRun) -> int:
        if (run.folder / RESULT).exists():
            return self._total[run.name]
        log = run.folder / METRICS_LOG
        lines = read_metrics(log) if log.exists() and run.trainer is None else []
        return int(lines[-1]["step"]) if lines else 0


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
        self._running: dict[Any, tuple[multiprocessing.Process, Task, str | None]] = {}
        # Processes forked from one that has imported everything start quickly; one that has seen a GPU must not fork.
        forks = sys.platform == "linux" and not gpus
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
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
    """Return the GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get(_VISIBLE)
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


@contextmanager
def _seeing(gpu: str | None) -> Iterator[None]:
    """Show one GPU to processes that start now, before they import anything."""
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
    """Do a task in a process that ends with the one that started it."""
    watch_parent()
    sys.exit(work(task, 1, "on this machine" if gpu is None else f"on GPU {gpu} of this machine"))
