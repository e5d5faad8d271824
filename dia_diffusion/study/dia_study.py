"""A study from its description to its report: `dia study`."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from ..data.pixels import PixelDataset
from ..errors import UsageError
from ..files import check_output_folder
from ..options.training import check_folder_of_images
from ..process.output import progress_bar
from ..process.startup import available_cores
from ..training.accelerator import check_tracker, open_accelerator
from ..training.architecture import build_unet
from ..training.loop import make_model
from ..training.state import TrainingState
from .description import Study, StudyRun, load_study
from .engine import Engine, LocalEngine, Progress, Task, run_tasks, visible_gpus
from .single_run import complete, load_scored_images, read_result, read_timing, time_step
from .study_report import summarise, write_report


class Cluster(NamedTuple):
    """A Ray cluster that does the runs of a study: its address, and what each run takes; see `on_ray.connect`."""

    address: str
    cpus_per_run: int | None = None
    gpus_per_run: float | None = None


def run_study(
    path: str | Path, output_dir: str | Path, jobs: int | None = None, cluster: Cluster | None = None
) -> dict[str, Any]:
    """Do the remaining runs of a study, and write its report.

    Args:
        path (`str` or `Path`): The description, a YAML file; see `Study`.
        output_dir (`str` or `Path`): Folder of the runs and of the report (`study.html`, `.md`, `.json`, `.png`).
        jobs (`int`, *optional*): Runs side by side, of one thread each; by default one for each GPU, or for each core
            where there is none. On a cluster as many as it has room for.
        cluster (`Cluster`, *optional*): Where the runs are done instead of on this machine.

    Returns:
        `dict`: What is in study.json; see `summarise`.

    Raises:
        UsageError: for a description that cannot work, and at the end for runs that failed.
        Interrupted: after SIGTERM or Ctrl-C; the same call goes on.
    """
    study, folder = load_study(path), Path(output_dir)
    check_output_folder(folder)
    runs = study.runs(folder)
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs must be at least 1, but is {jobs}.")
    if study.trainer is None:
        _check_start([run for run in runs if read_result(run) is None], here=cluster is None)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0), _engine(folder, len(runs), jobs, cluster) as engine:
            return _finish_study(study, runs, folder, engine)
    except Timeout as error:
        raise UsageError(f"another process runs the study in '{folder}': wait for it or stop it.") from error


def _check_start(runs: list[StudyRun], here: bool) -> None:
    """Find before all work what a variant lacks: its images and features, a VAE, a UNet that can be built.

    Where the runs are done on other machines, only a UNet of its own description is tried.
    """
    images: dict[str, tuple[PixelDataset, PixelDataset]] = {}
    for run in reversed({run.variant: run for run in reversed(runs)}.values()):
        config = run.config
        data, model = config.data, config.model
        try:
            if not here:
                if data.vae is model.init_from is model.model_config_name_or_path is None:
                    build_unet(model, data.resolution, data.channels or 3, None)
                continue
            check_folder_of_images(config)
            check_tracker(config.output.logger)
            if (key := repr((data, run.scoring))) not in images:
                images[key] = load_scored_images(data, run.scoring)
            _, unet = make_model(config, *images[key])
            if not visible_gpus():  # A GPU would not release the memory of this.
                with open_accelerator(str(config.optimisation.mixed_precision), config.output) as accelerator:
                    TrainingState(config.optimisation, accelerator, unet, run.steps)
        except UsageError as error:
            raise UsageError(f"variant '{run.variant}': {error}") from error


def _engine(folder: Path, runs: int, jobs: int | None, cluster: Cluster | None) -> AbstractContextManager[Engine]:
    if cluster is not None:
        if find_spec("ray") is None:
            raise UsageError("--ray needs Ray, on each machine: pip install 'dia-diffusion[ray]'.")
        from .on_ray import connect

        return connect(cluster.address, folder, jobs or runs, cluster.cpus_per_run, cluster.gpus_per_run)
    gpus = visible_gpus()
    jobs = jobs or len(gpus) or available_cores()
    where = f", on {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}" if gpus else ""
    print(f"Runs side by side on this machine: {jobs}, of one thread each{where}.")
    return nullcontext(LocalEngine(jobs, gpus))


def _finish_study(study: Study, runs: list[StudyRun], folder: Path, engine: Engine) -> dict[str, Any]:
    # 1. train and score; the table grows with each run
    waiting = [run for run in runs if read_result(run) is None]
    with Progress(runs) as progress:

        def follow(ended: bool) -> None:
            progress.update()
            if ended:
                write_report(summarise(study, runs), study.scores, folder)

        failures = run_tasks(engine, [Task(complete, run) for run in waiting], follow)

    # 2. time the steps, one variant after the other, with nothing else at work
    firsts = {run.variant: run for run in reversed(runs)}
    baseline = firsts[study.baseline]
    measure = partial(time_step, baseline=baseline, rounds=study.timing_rounds)
    untimed = [run for run in firsts.values() if run is not baseline and read_timing(run, baseline) is None]
    if study.timing_rounds and study.trainer is None and not failures:
        with progress_bar(total=len(untimed), desc="Timing", unit="variant") as bar:
            failures = run_tasks(engine, [Task(measure, run) for run in untimed], bar.update, slots=1)

    # 3. report
    if failures:
        raise UsageError("\n".join(["some runs failed; the others are kept, and the same command goes on.", *failures]))
    summary = summarise(study, runs)
    write_report(summary, study.scores, folder)
    return summary
