"""The results of a run: pictures, figures and the pipeline, on the way and at the end, and the page that shows them."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from ..data.grid import image_grid
from ..data.pixels import PixelDataset
from ..errors import UsageError
from ..files import replace_file, replace_files, set_aside, write_json
from ..latents.space import LatentDataset, LatentSpace, PixelSpace
from ..models.unet import DIAUNet2DModel
from ..objectives import Objective
from ..options.output import OutputOptions
from ..options.training import CONFIG
from ..page import definitions, folded, heading, markdown, picture, plot, prose, write_page
from ..pipelines.pipeline_dia_unet import DIAUNetPipeline
from ..process.output import duration, print_main
from ..sampling.generation import sample_images
from ..sampling.schedulers import make_scheduler
from ..scoring.evaluation import DEFAULT_METRICS, evaluate
from ..scoring.features.named import get_extractor
from ..scoring.images import PipelineImages, shares_of_labels
from ..scoring.score_report import explain_scores, format_scores
from .folder import BEST, SAMPLES, read_best
from .held_out import held_out_loss
from .log import METRICS_LOG, log_picture, read_metrics
from .state import TrainingState

REPORT = "report.html"
_LOSSES = {"loss": "Training loss", "held_out_loss": "Held-out loss"}


def check_results(
    options: OutputOptions, objective: Objective, data: PixelDataset, held_out: PixelDataset | None
) -> None:
    """Try the cheap parts of sampling and scoring before a run starts.

    Raises:
        UsageError: for what would fail when the run is trained.
    """
    steps, sampler = options.ddpm_num_inference_steps, make_scheduler(None, objective.scheduler.config)
    try:
        sampler.set_timesteps(steps)
    except (IndexError, ValueError) as error:
        raise UsageError(f"ddpm_num_inference_steps {steps} does not fit the noise schedule: {error}.") from error
    if objective.num_timesteps is not None and sampler.timesteps.min() < 0:
        raise UsageError(f"ddpm_num_inference_steps {steps} goes below the last timestep by rounding: take one less.")
    if options.score_features is not None:
        check_scores(options.score_features, data, held_out)


def check_scores(features: str, data: PixelDataset, held_out: PixelDataset | None) -> None:
    """Try the features of scores on an image.

    Raises:
        UsageError: for features that do not exist or do not take such images, and for too few images.
    """
    for kind, images in (("training", data), ("held-out", held_out)):
        if images is not None and len(images) < 2:
            raise UsageError(f"there is only 1 {kind} image, and scores need 2 or more: add images, or ask for none.")
    # A network that cannot take such images raises an error here.
    get_extractor(features, data.resolution, data.channels)(data.images_at(range(1)))


def save_curves(metrics: list[dict[str, float]], path: Path) -> None:
    """Draw training loss, held-out loss and learning rate over the steps.

    Args:
        metrics (list of `dict`): The lines of a metrics.jsonl.
        path (`Path`): The PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    losses = figure.subplots()
    rate = losses.twinx()
    for axis, key, label, style in (
        (losses, "loss", "training loss", {"color": "tab:blue", "alpha": 0.35, "linewidth": 1}),
        (losses, "held_out_loss", "held-out loss", {"color": "tab:red", "marker": "o", "markersize": 4}),
        (rate, "learning_rate", "learning rate", {"color": "tab:gray", "linestyle": ":"}),
    ):
        points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        if points:
            # A line of one point is invisible without a mark.
            axis.plot(*zip(*points, strict=True), label=label, **({"marker": "o"} if len(points) == 1 else {}) | style)
    losses.set(xlabel="step", ylabel="mean squared error", yscale="log")
    rate.set(ylabel="learning rate", ylim=(0, None))
    handles = [axis.get_legend_handles_labels() for axis in (losses, rate)]
    losses.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], loc="upper right")
    losses.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def write_run_report(folder: Path, figures: dict[str, Any], facts: Mapping[str, str]) -> None:
    """Write the `report.html` of a finished run.

    Args:
        folder (`Path`): The output directory, with the pictures and files that the page shows and links.
        figures (`dict`): The content of metrics.json.
        facts (`dict`): What was trained on what, by title.
    """
    losses = {name: f"{figures[key]:.5f}" for key, name in _LOSSES.items() if figures.get(key) is not None}
    parts = [heading("Samples"), picture(folder / "samples.png", "samples of the model", pixels=True)]
    if "features" in figures:
        parts += [heading("Scores"), markdown(format_scores(figures), sortable=False)]
        parts += map(prose, explain_scores(figures))
    if losses:
        parts += [heading("Training"), definitions(losses)]
        parts.append(plot(folder / "curves.png", "losses and learning rate over the steps"))
    parts += [heading("The run"), definitions(facts), folded("All options", (folder / CONFIG).read_text())]
    title = f"{folder.name}: {figures['step']:,} steps on {facts['Data'].split(': ')[0]}"
    write_page(folder / REPORT, title, parts, [folder / "metrics.json", folder / METRICS_LOG])


@dataclass
class RunResults:
    """The results of a run, always from the averaged weights where there are any.

    Args:
        options (`OutputOptions`): The options that say what to leave, and when.
        training (`TrainingState`), objective (`Objective`): The model, and what it learns.
        space (`PixelSpace` or `LatentSpace`): Decodes what the model makes.
        data, held_out (`PixelDataset` or `LatentDataset`): The images as the model sees them.
        seed (`int`): Seed of the samples.
        batch_size (`int`): Held-out images at a time.
    """

    options: OutputOptions
    training: TrainingState
    objective: Objective
    space: PixelSpace | LatentSpace
    data: PixelDataset | LatentDataset
    held_out: PixelDataset | LatentDataset | None
    seed: int
    batch_size: int

    @property
    def folder(self) -> Path:
        return self.options.folder

    def due(self, step: int, epoch_steps: int, last: bool) -> list[Callable[[int], dict[str, float] | None]]:
        """Return what is to be done after a step: functions of the step, which return figures for the log or nothing.

        Args:
            step (`int`): The step that is finished.
            epoch_steps (`int`): Steps in a pass over the data.
            last (`bool`): Whether it is the last step of the run.
        """
        options, epochs = self.options, 0 if step % epoch_steps or last else step // epoch_steps
        plan = {
            self.held_out_loss: self.held_out is not None and (step % options.validation_steps == 0 or last),
            self.keep_if_best: options.eval_steps is not None and step % options.eval_steps == 0,
            self.save_sample_grid: epochs and epochs % options.save_images_epochs == 0,
            self.save_pipeline: epochs and epochs % options.save_model_epochs == 0,
        }
        return [function for function, now in plan.items() if now]

    def held_out_loss(self, step: int) -> dict[str, float]:
        assert self.held_out is not None
        with self.training.averaged() as unet:
            return {"held_out_loss": held_out_loss(unet, self.objective, self.held_out, self.batch_size)}

    def save_pipeline(self, step: int) -> None:
        with self.training.averaged() as unet:
            _save(self._pipeline(unet), self.folder)

    def save_sample_grid(self, step: int) -> None:
        """Save `samples/step-XXXXXXXX.png` and give it to the trackers."""
        with self.training.averaged() as unet:
            grid = self._sample_grid(self._pipeline(unet))
        (self.folder / SAMPLES).mkdir(exist_ok=True)
        path = self.folder / SAMPLES / f"step-{step:08d}.png"
        replace_file(path, partial(grid.save, format="PNG"))
        log_picture(self.training.accelerator, "samples", path, step)

    def keep_if_best(self, step: int) -> dict[str, float]:
        """Measure the Fréchet distance, and save the pipeline in `best/` if it is the smallest so far."""
        best = self.folder / BEST
        with self.training.averaged() as unet:
            pipeline = self._pipeline(unet)
            scores = self._score(pipeline, self.options.eval_num_images, ("fid",))
            # Distances in other features, or of other numbers of images, do not compare.
            before, settings = read_best(best), scores["settings_hash"]
            if before is not None and before.get("settings_hash", settings) != settings:
                set_aside(best)
                before = None
            if before is None or before.get("fid") is None or scores["fid"] < before["fid"]:
                # Without its record a pipeline that is being replaced counts as none.
                (best / "metrics.json").unlink(missing_ok=True)
                _save(pipeline, best)
                record = {"step": step, "fid": scores["fid"], "settings_hash": settings}
                write_json(best / "metrics.json", record)
        return {"fid": scores["fid"]}

    def finish(self, step: int, global_batch_size: int, facts: Mapping[str, str]) -> dict[str, Any]:
        """Save the pipeline, samples.png, curves.png, metrics.json and report.html. Return the figures."""
        options, folder = self.options, self.folder
        metrics = read_metrics(folder / METRICS_LOG)
        figures: dict[str, Any] = {"step": step, "global_batch_size": global_batch_size}
        for line in metrics:
            figures |= {key: line[key] for key in ("loss", "held_out_loss") if key in line}
        with self.training.averaged() as unet:
            pipeline = self._pipeline(unet)
            _save(pipeline, folder)
            start = time.monotonic()
            replace_file(folder / "samples.png", partial(self._sample_grid(pipeline).save, format="PNG"))
            seconds = (time.monotonic() - start) / options.eval_batch_size
            replace_file(folder / "curves.png", partial(save_curves, metrics))
            if options.score_features is not None:
                count, held_out = options.score_num_images, None if self.held_out is None else self.held_out.pixels
                print_main(
                    f"Scoring {count:,} generated images takes up to about {duration(count * seconds)}; "
                    "--score_num_images takes fewer."
                )
                figures |= self._score(pipeline, count, DEFAULT_METRICS, held_out)
            write_json(folder / "metrics.json", figures)
            # What JSON makes of them: `null` for what is not finite.
            figures = json.loads((folder / "metrics.json").read_text())
            write_run_report(folder, figures, facts)
        return figures

    def _score(
        self, pipeline: DIAUNetPipeline, num_images: int, metrics: Sequence[str], held_out: PixelDataset | None = None
    ) -> dict[str, Any]:
        options, data = self.options, self.data.pixels
        assert options.score_features is not None
        extractor = get_extractor(options.score_features, data.resolution, data.channels)
        shares = shares_of_labels(data.labels, data.num_classes)
        steps = options.ddpm_num_inference_steps
        images = PipelineImages(pipeline, num_images, steps, self.seed, class_shares=shares)
        device = self.training.accelerator.device
        scores = evaluate(images, data, extractor.to(device), metrics, held_out, options.eval_batch_size)
        assert scores is not None, "of the main process"
        return scores

    def _pipeline(self, unet: DIAUNet2DModel) -> DIAUNetPipeline:
        scheduler = make_scheduler(None, self.space.sampler_config(self.objective.scheduler.config))
        return DIAUNetPipeline(unet, scheduler, self.data.pixels.id2label, self.space.load_decoder(unet.device))

    def _sample_grid(self, pipeline: DIAUNetPipeline) -> Image:
        count, steps = self.options.eval_batch_size, self.options.ddpm_num_inference_steps
        batches = sample_images(pipeline, count, steps, self.seed, batch_size=count)
        # A class-conditional pipeline takes its classes in turn: one column for each.
        return image_grid(torch.cat(list(batches)), columns=self.data.num_classes)


def _save(pipeline: DIAUNetPipeline, folder: Path) -> None:
    """Save a pipeline in a folder. A kill leaves the one that was there before."""
    replace_files(folder, pipeline.save_pretrained, last="model_index.json")
