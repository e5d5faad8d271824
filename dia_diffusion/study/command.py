"""A study from its description to its report: `dia study`."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..errors import UsageError
from ..process import available_cores
from .description import Study, StudyRun, load_study
from .report import summarise, write_report
from .single_run import complete, read_result, read_timing, time_step
from .workers import Progress, Task, run_tasks


def run_study(path: str | Path, output_dir: str | Path, jobs: int | None = None) -> dict[str, Any]:
    """Does what is not done yet of a study, and writes its report.

    Args:
        path (`str` or `Path`): The description, a YAML file; see `Study`.
        output_dir (`str` or `Path`): Folder of the runs and of the report (`study.html`, `.md`, `.json`, `.png`).
        jobs (`int`, *optional*): Runs side by side, of one thread each; by default one for each core, or one on a GPU.

    Returns:
        `dict`: What is in study.json; see `summarise`.

    Raises:
        UsageError: for a description that cannot work, and at the end for runs that failed.
        Interrupted: after SIGTERM or Ctrl-C; the same call goes on.
    """
    study, folder = load_study(path), Path(output_dir)
    runs = study.runs(folder)
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else available_cores()
    if jobs < 1:
        raise UsageError(f"jobs must be at least 1, but is {jobs}.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            return _finish_study(study, runs, folder, jobs)
    except Timeout as error:
        raise UsageError(f"another process is at work on the study in '{folder}': wait for it or stop it.") from error


def _finish_study(study: Study, runs: list[StudyRun], folder: Path, jobs: int) -> dict[str, Any]:
    # 1. train and score; the table grows with each run
    with Progress(runs) as progress:

        def follow(finished: bool) -> None:
            progress.update()
            if finished:
                write_report(summarise(study, runs), folder)

        failures = run_tasks([Task(complete, run) for run in runs if read_result(run) is None], jobs, follow)

    # 2. time the steps, one variant after the other, with nothing else at work
    firsts = {run.variant: run for run in reversed(runs)}
    measure = partial(time_step, baseline=firsts[study.baseline], rounds=study.timing_rounds)
    untimed = [run for name, run in firsts.items() if name != study.baseline and read_timing(run) is None]
    if study.timing_rounds and not failures:
        with tqdm(total=len(untimed), desc="Timing", unit="variant") as bar:
            failures = run_tasks([Task(measure, run) for run in untimed], 1, bar.update)

    # 3. report
    if failures:
        raise UsageError("\n".join(["some runs failed; the others are kept, and the same command goes on.", *failures]))
    summary = summarise(study, runs)
    write_report(summary, folder)
    return summary
