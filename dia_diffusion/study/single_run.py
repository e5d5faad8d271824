"""A run of a study: train, score and time it, and leave the files that say so."""

import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from ..data.loading import load_pixels
from ..data.pixels import PixelDataset
from ..errors import NotFiniteError, NotFiniteImagesError, UsageError
from ..files import json_digest, to_json, write_json
from ..latents.space import load_data, make_space, measure_std
from ..models.memory_format import lay_out
from ..objectives import make_objective
from ..options.model import DataOptions
from ..pipelines.pipeline_dia_unet import DIAUNetPipeline
from ..scoring.evaluation import evaluate
from ..scoring.features.named import get_extractor
from ..scoring.images import PipelineImages, shares_of_labels
from ..training.accelerator import make_accelerator
from ..training.architecture import build_unet, count_parameters
from ..training.batches import Batch, draw_step
from ..training.checkpoint import CHECKPOINTS
from ..training.held_out import held_out_loss
from ..training.log import METRICS_LOG, read_metrics
from ..training.loop import accumulate_gradients, train
from ..training.results import check_scores
from ..training.state import TrainingState
from .description import Scoring, StudyRun
from .trainers import run_trainer

RESULT = "result.json"
TIMING = "timing.json"
# The noise of all of them is drawn at once.
MOST_HELD_OUT = 50_000
_BATCH_SIZE = 250
_STEPS_A_ROUND = 10
_SPIKE_FACTOR = 1.5
_SPIKE_WINDOW = 20
SPIKES = (
    f"A spike is a logged loss of more than {_SPIKE_FACTOR} times the median of the {_SPIKE_WINDOW} logged before it."
)


def complete(run: StudyRun) -> None:
    """Train and score a run, and leave its `result.json`. A run that diverges has a result too: where it did."""
    result: dict[str, Any] = {"variant": run.variant, "seed": run.seed}
    if run.trainer is not None:
        # What the trainer itself calls options may be more than was asked for.
        asked = {"asked_for": run.options}
        try:
            figures = run_trainer(run.trainer, run.options | {"seed": run.seed, "output_dir": str(run.folder)})
        except NotFiniteError:
            figures = {"diverged_at_step": None}
        write_json(run.folder / RESULT, figures | result | asked)
        return
    result["scoring"] = _scoring(run)
    try:
        if not _is_trained(run):
            train(run.config)
        result |= _score(run)
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
    except NotFiniteError as error:
        result |= {"diverged_at_step": error.step}
    except NotFiniteImagesError:
        result |= {"diverged_at_step": run.config.optimisation.max_train_steps}
    losses = [line["loss"] for line in read_metrics(run.folder / METRICS_LOG) if "loss" in line]
    write_json(run.folder / RESULT, result | {"loss_spikes": count_spikes(losses)})


def read_result(run: StudyRun) -> dict[str, Any] | None:
    """Return what `complete` left, or None: nothing yet, or scores of another kind.

    Raises:
        UsageError: if a trainer of one's own left it with other options.
    """
    result = _read_json(run.folder / RESULT)
    if result is not None and run.trainer is not None:
        if "asked_for" not in result:
            return None  # A file of a trainer that was stopped.
        if result["asked_for"] != json.loads(to_json(run.options)):
            raise UsageError(
                f"'{run.folder}' was trained with other options: remove it, or choose another --output_dir."
            )
        return result
    if result is None or ("diverged_at_step" not in result and result.get("scoring") != _scoring(run)):
        return None
    return result


def _scoring(run: StudyRun) -> dict[str, Any]:
    """Return how a run is scored; results of before classes were drawn in proportion say nothing of classes."""
    drawn = run.config.data.class_conditional and run.scoring.num_images
    return run.scoring._asdict() | ({"classes": "as often as in the data"} if drawn else {})


def read_timing(run: StudyRun, baseline: StudyRun) -> float | None:
    """Return the ratio that `time_step` left, or None where there is none to this baseline."""
    timing = _read_json(run.folder / TIMING)
    if timing is None or timing.get("baseline") != _identity(baseline):
        return None
    return timing.get("step_time_ratio")


def _identity(run: StudyRun) -> dict[str, str]:
    return {"variant": run.variant, "options": json_digest(json.loads(to_json(run.options)))}


def count_spikes(losses: Sequence[float]) -> int:
    """Count the logged losses that are spikes, as `SPIKES` says."""
    return sum(
        loss > _SPIKE_FACTOR * statistics.median(losses[number - _SPIKE_WINDOW : number])
        for number, loss in enumerate(losses)
        if number >= _SPIKE_WINDOW
    )


def _is_trained(run: StudyRun) -> bool:
    figures = _read_json(run.folder / "metrics.json")
    return figures is not None and figures.get("step") == run.config.optimisation.max_train_steps


def _score(run: StudyRun) -> dict[str, Any]:
    config, scoring, optimisation = run.config, run.scoring, run.config.optimisation
    pipeline = DIAUNetPipeline.from_pretrained(run.folder).to("cuda" if torch.cuda.is_available() else "cpu")
    if pipeline.vae is not None:
        pipeline.vae.enable_slicing()
    unet = pipeline.unet
    pixels, held_out_pixels = load_scored_images(config.data, scoring)
    data, held_out = make_space(config.data, pixels).encode_all(pixels, held_out_pixels)
    loss = held_out_loss(
        unet,
        make_objective(config.objective).fitted(partial(measure_std, data)),
        held_out,
        _BATCH_SIZE,
        limit=MOST_HELD_OUT,
        draws=scoring.loss_draws,
    )
    if not math.isfinite(loss):
        raise NotFiniteError(optimisation.max_train_steps, f"the held-out loss is {loss}", optimisation.learning_rate)
    scores: dict[str, Any] = {
        **dict(zip(("parameters", "attention_parameters"), count_parameters(unet), strict=True)),
        "held_out_loss": loss,
    }
    if scoring.num_images:
        steps = config.output.ddpm_num_inference_steps
        shares = shares_of_labels(pixels.labels, pixels.num_classes)
        images = PipelineImages(pipeline, scoring.num_images, steps, optimisation.seed, class_shares=shares)
        extractor = get_extractor(scoring.features, pixels.resolution, pixels.channels)
        scores["fid"] = evaluate(images, pixels, extractor, metrics=["fid"], batch_size=_BATCH_SIZE)["fid"]
    return scores


def load_scored_images(options: DataOptions, scoring: Scoring) -> tuple[PixelDataset, PixelDataset]:
    """Return the training images and the held-out ones of a run, after a try of the features of its scores.

    Raises:
        UsageError: if nothing is held out, or the images or features cannot be used.
    """
    data, held_out = load_pixels(options)
    if held_out is None:
        raise UsageError("a study needs held-out images, and this data set has none: set validation_split, say 0.1.")
    if scoring.num_images:
        check_scores(scoring.features, data, held_out)
    return data, held_out


def make_step(run: StudyRun) -> Callable[[], None]:
    """Return a training step of a run, all its micro-batches included, on a batch that stays the same."""
    config = run.config
    data, _ = load_data(config.data)
    # Another variant, of another precision perhaps, may have been made in this process.
    AcceleratorState._reset_state()
    accelerator = make_accelerator(config.optimisation.mixed_precision, config.output)
    objective = make_objective(config.objective).fitted(partial(measure_std, data))
    unet = build_unet(config.model, data.resolution, data.channels, data.num_classes, objective.num_timesteps)
    training = TrainingState(config.optimisation, accelerator, unet, 10_000)
    batch = data.fetch(range(config.optimisation.train_batch_size))
    batch = {name: values.to(accelerator.device) for name, values in batch.items()}
    images = lay_out(data.model_inputs(batch))
    draws = draw_step(0, 0, tuple(images.shape), objective, accelerator.device)
    batches = itertools.repeat(Batch(images, draws.noise, draws.levels, batch.get("labels"), seed=0))

    def step() -> None:
        accumulate_gradients(training, objective, batches, config.optimisation.gradient_accumulation_steps)
        training.update(1)

    return step


def time_step(run: StudyRun, baseline: StudyRun, rounds: int) -> None:
    """Leave in `timing.json` how many times the baseline's step a step takes: the median over rounds, in each of which
    both take ten steps, one after the other, in an order that alternates."""
    steps = [make_step(run), make_step(baseline)]
    ratios = []
    for number in range(rounds + 1):
        seconds = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):
            seconds[side] = _seconds(steps[side])
        ratios.append(seconds[0] / seconds[1])
    # The first round warms up.
    timing = {"step_time_ratio": statistics.median(ratios[1:]), "rounds": ratios[1:], "baseline": _identity(baseline)}
    write_json(run.folder / TIMING, timing)


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(_STEPS_A_ROUND):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping that a file holds, or None where it is not there or is of another kind."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
