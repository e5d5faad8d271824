"""The processes of a study: one for each task, several side by side, and how far they are."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from ..errors import UsageError
from ..process import Interrupted, catch_interrupts, tune_process
from ..training import METRICS_LOG, read_metrics
from .description import StudyRun
from .single_run import RESULT

_LOG = "log.txt"


class Task(NamedTuple):
    """What a process does for a run: a function of it, which leaves a file in its folder."""

    function: Callable[[StudyRun], None]
    run: StudyRun


def run_tasks(tasks: Sequence[Task], jobs: int, report: Callable[[bool], Any]) -> list[str]:
    """Does tasks in processes of their own, of one thread each, with `jobs` side by side.

    Args:
        tasks (sequence of `Task`): What to do, in this order.
        jobs (`int`): How many at a time.
        report (`Callable`): Called about once a second, with whether a task has just finished.

    Returns:
        A line for each task that failed; the others are done all the same.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C, when all runs have stopped at a checkpoint.
    """
    context = _process_context()
    waiting, running, failures = list(tasks), {}, []
    with catch_interrupts() as signals:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    task = waiting.pop(0)
                    process = context.Process(target=_work, args=(task,), name=task.run.name)
                    process.start()
                    running[process.sentinel] = process, task
                finished = wait(list(running), timeout=1)
                for sentinel in finished:
                    process, task = running.pop(sentinel)
                    process.join()
                    if process.exitcode and not signals:
                        failures.append(f"{task.run.name}: {_last_words(task.run, process.exitcode)}")
                report(bool(finished))
                if signals:
                    raise Interrupted(signals[0], "stopped; the same command goes on.")
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join()
    return failures


def _process_context() -> multiprocessing.context.BaseContext:
    """Processes forked from one that has imported everything start quickly; one that has seen a GPU must not fork."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _work(task: Task) -> None:
    """The life of a process: it prints to the log of its run, and ends with the process that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    task.run.folder.mkdir(parents=True, exist_ok=True)
    with (task.run.folder / _LOG).open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    tune_process()
    torch.set_num_threads(1)
    try:
        task.function(task.run)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as interruption:
        sys.exit(128 + interruption.signum)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _last_words(run: StudyRun, exitcode: int) -> str:
    if exitcode < 0:
        return f"ended by signal {-exitcode}"
    lines = (run.folder / _LOG).read_text().splitlines() or ["?"]
    return f"{lines[-1].removeprefix('error: ')} (see {run.folder / _LOG})"


class Progress:
    """A bar over the steps of all runs of a study."""

    def __init__(self, runs: Sequence[StudyRun]):
        self._runs = runs
        total = sum(run.config.optimisation.max_train_steps for run in runs)
        self._bar = tqdm(total=total, initial=self._steps(), desc="Study", unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self) -> None:
        finished = sum((run.folder / RESULT).exists() for run in self._runs)
        self._bar.set_postfix_str(f"{finished} of {len(self._runs)} runs finished", refresh=False)
        self._bar.update(self._steps() - self._bar.n)

    def _steps(self) -> int:
        return sum(_steps_done(run) for run in self._runs)


def _steps_done(run: StudyRun) -> int:
    if (run.folder / RESULT).exists():
        return run.config.optimisation.max_train_steps
    log = run.folder / METRICS_LOG
    lines = read_metrics(log) if log.exists() else []
    return lines[-1]["step"] if lines else 0
