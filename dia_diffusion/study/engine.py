"""The tasks of a study and the engine that does them: what a local pool and a cluster have in common.

An engine takes tasks (`submit`), says which have ended (`wait`), and ends what is under way at a checkpoint (`cancel`).
`local.py` and `on_ray.py` are two; another one is a class with these three methods and `slots`.
"""

import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from filelock import FileLock, Timeout

from ..errors import UsageError
from ..process import Interrupted, catch_interrupts, tune_process
from .description import StudyRun

_LOG = "log.txt"
_LOCK = ".task-lock"
# Of a machine that was lost a shared disk may hold the lock for a while.
_PATIENCE_SECONDS = 180


class Task(NamedTuple):
    """What is done for a run: a function of it, which leaves a file in its folder."""

    function: Callable[[StudyRun], None]
    run: StudyRun


class Ended(NamedTuple):
    """A task that has ended, and what it failed of; `None` where it is done."""

    task: Task
    failure: str | None


class Engine(Protocol):
    """Where the tasks of a study are done.

    Attributes:
        slots (`int`): How many tasks it is given at a time.
    """

    slots: int

    def submit(self, task: Task) -> None:
        """Starts a task, now or as soon as there is room for it."""

    def wait(self, seconds: float) -> list[Ended]:
        """The tasks that have ended since the last call; waits so long for the first."""

    def cancel(self) -> None:
        """Lets what is under way stop at a checkpoint, and waits until it has."""


def run_tasks(
    engine: Engine, tasks: Sequence[Task], report: Callable[[bool], Any], slots: int | None = None
) -> list[str]:
    """Does tasks on an engine.

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
    """Does a task in this process; what it prints goes to the log of its run.

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
    """Why a task failed: the last line of its log, or the signal that ended its process (a negative status)."""
    if status < 0:
        return f"ended by signal {-status}"
    lines = (run.folder / _LOG).read_text().splitlines() or ["?"]
    return f"{lines[-1].removeprefix('error: ')} (see {run.folder / _LOG})"


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Lets all that this process and its libraries print go to the end of a file."""
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
