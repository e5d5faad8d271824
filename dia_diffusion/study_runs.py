"""The runs of a study: each in a process of its own, several side by side, and again from where they stopped."""

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from .diffusion import diffusion_loss, draw_step, held_out_loss
from .errors import NotFiniteError, UsageError
from .evaluation import evaluate
from .features import get_extractor
from .images import to_unit_range
from .interrupts import Interrupted, catch_interrupts
from .pipelines import DIAUNetPipeline
from .plots import read_metrics
from .presets import build_unet
from .process import tune_process
from .processes import make_accelerator
from .results import CHECKPOINTS, METRICS_LOG
from .study_config import StudyRun
from .training import load_pixels, make_noise_scheduler, train
from .training_state import TrainingState

RESULT = "result.json"
TIMING = "timing.json"
_LOG = "log.txt"
_BATCH_SIZE = 250
_STEPS_A_ROUND = 10
_SPIKE_FACTOR = 1.5
_SPIKE_WINDOW = 20
SPIKES = (
    f"A spike is a logged loss of more than {_SPIKE_FACTOR} times the median of the {_SPIKE_WINDOW} logged before it."
)


class Task(NamedTuple):
    """What a process does for a run: a function of it, which leaves a file in its folder."""

    function: Callable[[StudyRun], None]
    run: StudyRun


# 1. What is done


def complete(run: StudyRun) -> None:
    """Trains and scores a run, and leaves its `result.json`. A run that diverges has a result too: where it did."""
    result = {"variant": run.variant, "seed": run.config.seed, "scoring": run.scoring._asdict()}
    try:
        if not _is_trained(run):
            train(run.config)
        result |= _score(run)
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
    except NotFiniteError as error:
        result |= {"diverged_at_step": error.step}
    losses = [line["loss"] for line in read_metrics(run.folder / METRICS_LOG) if "loss" in line]
    _write_json(run.folder / RESULT, result | {"loss_spikes": count_spikes(losses)})


def read_result(run: StudyRun) -> dict[str, Any] | None:
    """What `complete` left, unless it was scored otherwise."""
    path = run.folder / RESULT
    result = json.loads(path.read_text()) if path.exists() else None
    if result is None or ("diverged_at_step" not in result and result["scoring"] != run.scoring._asdict()):
        return None
    return result


def read_timing(run: StudyRun) -> float | None:
    """The ratio that `time_step` left."""
    path = run.folder / TIMING
    return json.loads(path.read_text())["step_time_ratio"] if path.exists() else None


def count_spikes(losses: Sequence[float]) -> int:
    """How many logged losses are spikes, as `SPIKES` says."""
    return sum(
        loss > _SPIKE_FACTOR * statistics.median(losses[number - _SPIKE_WINDOW : number])
        for number, loss in enumerate(losses)
        if number >= _SPIKE_WINDOW
    )


def _is_trained(run: StudyRun) -> bool:
    path = run.folder / "metrics.json"
    return path.exists() and json.loads(path.read_text())["step"] == run.config.max_train_steps


def _score(run: StudyRun) -> dict[str, Any]:
    config, scoring = run.config, run.scoring
    pipeline = DIAUNetPipeline.from_pretrained(run.folder).to("cuda" if torch.cuda.is_available() else "cpu")
    unet = pipeline.unet
    data, held_out = load_pixels(config)
    if held_out is None:
        raise UsageError("a study needs held-out images, and this data set has none.")
    scores: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "attention_parameters": sum(p.numel() for name, p in unet.named_parameters() if name.startswith("dia.")),
        "held_out_loss": held_out_loss(
            unet, make_noise_scheduler(config), held_out, _BATCH_SIZE, limit=len(held_out), draws=scoring.loss_draws
        ),
    }
    if scoring.num_images:
        scores["fid"] = evaluate(
            pipeline,
            data,
            None,
            get_extractor(scoring.features, config.resolution, data.channels),
            metrics=("fid",),
            num_images=scoring.num_images,
            steps=config.ddpm_num_inference_steps,
            seed=config.seed,
            batch_size=_BATCH_SIZE,
        )["fid"]
    return scores


def make_step(run: StudyRun) -> Callable[[], None]:
    """A training step of a run on a batch that stays the same: what there is to time of it."""
    config = run.config
    data, _ = load_pixels(config)
    accelerator = make_accelerator(config)
    training = TrainingState(config, accelerator, build_unet(config, data.channels, data.num_classes), 10_000)
    scheduler = make_noise_scheduler(config)
    batch = data.fetch(range(config.train_batch_size))
    images = to_unit_range(batch["images"].to(accelerator.device)).contiguous(memory_format=torch.channels_last)
    labels = batch["labels"].to(accelerator.device) if data.num_classes else None
    draws = draw_step(0, 0, tuple(images.shape), scheduler.config.num_train_timesteps, accelerator.device)

    def step() -> None:
        loss = diffusion_loss(training.model, scheduler, images, draws.noise, draws.timesteps, labels, config.snr_gamma)
        accelerator.backward(loss)
        training.update(1)

    return step


def time_step(run: StudyRun, baseline: StudyRun, rounds: int) -> None:
    """Leaves in `timing.json` how many times the baseline's step a step takes: the median over rounds, in each of which
    both take ten steps, one after the other, in an order that alternates."""
    steps = [make_step(run), make_step(baseline)]
    ratios = []
    for number in range(rounds + 1):
        seconds = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):
            seconds[side] = _seconds(steps[side])
        ratios.append(seconds[0] / seconds[1])
    # The first round warms up.
    _write_json(run.folder / TIMING, {"step_time_ratio": statistics.median(ratios[1:]), "rounds": ratios[1:]})


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(_STEPS_A_ROUND):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


# 2. In which process


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


# 3. How far


class Progress:
    """A bar over the steps of all runs of a study."""

    def __init__(self, runs: Sequence[StudyRun]):
        self._runs = runs
        total = sum(run.config.max_train_steps for run in runs)
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
        return run.config.max_train_steps
    log = run.folder / METRICS_LOG
    lines = read_metrics(log) if log.exists() else []
    return lines[-1]["step"] if lines else 0
