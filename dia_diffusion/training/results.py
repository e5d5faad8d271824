"""What a run leaves in its output directory."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL.Image import Image

from ..data import PixelDataset, image_grid
from ..errors import UsageError
from ..files import replace_text
from ..models import DIAUNet2DModel
from ..pipelines import DIAUNetPipeline
from ..sampling import DEFAULT_SCHEDULER, make_scheduler, sample_images
from ..scoring import DEFAULT_METRICS, PipelineImages, evaluate, get_extractor
from .checkpoint import CHECKPOINTS, list_checkpoints
from .curves import save_curves
from .log import METRICS_LOG, read_metrics
from .objective import held_out_loss
from .options import OutputOptions
from .state import TrainingState

SAMPLES = "samples"
BEST = "best"


def prepare_output_dir(options: OutputOptions, resuming: bool) -> None:
    """Makes the output directory. One that holds a run is left alone unless it is resumed or overwritten.

    Raises:
        UsageError: if it holds a run, or cannot be made.
    """
    folder = options.folder
    # What took time to make, and what a run that was killed before its first checkpoint may have left.
    valuables = [*list_checkpoints(folder / CHECKPOINTS), folder / BEST, folder / "model_index.json"]
    traces = [folder / METRICS_LOG, folder / SAMPLES]
    if not resuming:
        found = [path for path in valuables if path.exists()]
        if options.resume_from_checkpoint is None:
            found += [path for path in traces if path.exists()]
        if found and not options.overwrite_output_dir:
            raise UsageError(
                f"'{folder}' already holds a run ({', '.join(path.name for path in found[:3])}), and there is no "
                "usable checkpoint that was asked for. Go on with it (--resume_from_checkpoint latest or a path), "
                "start anew there (--overwrite_output_dir), or choose another --output_dir."
            )
        for path in (folder / CHECKPOINTS, folder / BEST, folder / "model_index.json", *traces):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the output directory '{folder}': {error.strerror}.") from error


@dataclass
class RunResults:
    """Pictures, figures and the pipeline of a run, always from the averaged weights where there are any.

    Args:
        options (`OutputOptions`): What to leave.
        training (`TrainingState`), scheduler (`DDPMScheduler`): The run.
        data, held_out (`PixelDataset`): Its images.
        seed (`int`): Of the samples.
    """

    options: OutputOptions
    training: TrainingState
    scheduler: DDPMScheduler
    data: PixelDataset
    held_out: PixelDataset | None
    seed: int

    @property
    def folder(self) -> Path:
        return self.options.folder

    def held_out_loss(self, batch_size: int) -> float:
        with self.training.averaged() as unet:
            return held_out_loss(unet, self.scheduler, self.held_out, batch_size)

    def save_pipeline(self) -> None:
        with self.training.averaged() as unet:
            self._pipeline(unet).save_pretrained(self.folder)

    def save_sample_grid(self, step: int) -> None:
        """Saves `samples/step-XXXXXXXX.png` and gives it to the trackers."""
        with self.training.averaged() as unet:
            grid = self._sample_grid(self._pipeline(unet))
        (self.folder / SAMPLES).mkdir(exist_ok=True)
        grid.save(self.folder / SAMPLES / f"step-{step:08d}.png")
        for tracker in self.training.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **layout)

    def keep_if_best(self, step: int) -> float:
        """The Fréchet distance of the model now; if it is the smallest so far, the pipeline is kept in `best/`."""
        best = self.folder / BEST
        with self.training.averaged() as unet:
            pipeline = self._pipeline(unet)
            scores = self._score(pipeline, self.options.eval_num_images, ("fid",))
            record = best / "metrics.json"
            before = json.loads(record.read_text())["fid"] if record.exists() else float("inf")
            if scores["fid"] < before:
                # Without its record a half-written pipeline counts as none.
                record.unlink(missing_ok=True)
                pipeline.save_pretrained(best)
                replace_text(record, json.dumps({"step": step, "fid": scores["fid"]}))
        return scores["fid"]

    def finish(self, step: int, global_batch_size: int) -> dict[str, Any]:
        """Saves the pipeline, samples.png, curves.png and metrics.json. Returns the figures."""
        options, folder = self.options, self.folder
        metrics = read_metrics(folder / METRICS_LOG)
        figures: dict[str, Any] = {"step": step, "global_batch_size": global_batch_size}
        for line in metrics:
            figures |= {key: line[key] for key in ("loss", "held_out_loss") if key in line}
        with self.training.averaged() as unet:
            pipeline = self._pipeline(unet)
            pipeline.save_pretrained(folder)
            self._sample_grid(pipeline).save(folder / "samples.png")
            save_curves(metrics, folder / "curves.png")
            if options.score_features is not None:
                figures |= self._score(pipeline, options.score_num_images, DEFAULT_METRICS, self.held_out)
            replace_text(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")
        return figures

    def _score(
        self,
        pipeline: DIAUNetPipeline,
        num_images: int,
        metrics: Sequence[str],
        held_out: PixelDataset | None = None,
    ) -> dict[str, Any]:
        options = self.options
        extractor = get_extractor(options.score_features, self.data.resolution, self.data.channels)
        images = PipelineImages(pipeline, num_images, options.ddpm_num_inference_steps, self.seed)
        device = self.training.accelerator.device
        return evaluate(images, self.data, extractor.to(device), metrics, held_out, options.eval_batch_size)

    def _pipeline(self, unet: DIAUNet2DModel) -> DIAUNetPipeline:
        return DIAUNetPipeline(unet, make_scheduler(DEFAULT_SCHEDULER, self.scheduler.config), self.data.id2label)

    def _sample_grid(self, pipeline: DIAUNetPipeline) -> Image:
        count, steps = self.options.eval_batch_size, self.options.ddpm_num_inference_steps
        batches = sample_images(pipeline, count, steps, self.seed, batch_size=count)
        # A class-conditional pipeline takes its classes in turn: one column for each.
        return image_grid(torch.cat(list(batches)), columns=self.data.num_classes)
