"""How far the runs of a study are."""

from collections.abc import Sequence

from ..process import progress_bar
from ..training import METRICS_LOG, read_metrics
from .description import StudyRun
from .single_run import RESULT


class Progress:
    """A bar over the steps of all runs of a study."""

    def __init__(self, runs: Sequence[StudyRun]):
        self._runs = runs
        total = sum(run.config.optimisation.max_train_steps for run in runs)
        self._bar = progress_bar(total=total, initial=self._steps(), desc="Study", unit="step")

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
