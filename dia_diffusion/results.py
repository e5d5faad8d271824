"""What a run leaves in its output directory."""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from huggingface_hub import create_repo, upload_folder
from PIL.Image import Image

from .checkpoint import list_checkpoints
from .config import TrainingConfig, save_config
from .diffusion import held_out_loss
from .errors import UsageError
from .evaluation import DEFAULT_METRICS, evaluate
from .extractors import get_extractor
from .files import replace_text
from .generated import PipelineImages
from .model_card import write_model_card
from .models import DIAUNet2DModel
from .pipelines import DIAUNetPipeline
from .pixels import PixelDataset
from .plots import image_grid, read_metrics, save_curves
from .sampling import DEFAULT_SCHEDULER, make_scheduler, sample_images
from .training_state import TrainingState

CHECKPOINTS = "checkpoints"
METRICS_LOG = "metrics.jsonl"
CONFIG = "training_config.yaml"
_SAMPLES = "samples"
_BEST = "best"


def prepare_output_dir(config: TrainingConfig, resuming: bool) -> None:
    """Makes the output directory. One that holds a run is left alone unless it is resumed or overwritten.

    Raises:
        UsageError: if it holds a run, or cannot be made.
    """
    folder = Path(config.output_dir)
    # What took time to make, and what a run that was killed before its first checkpoint may have left.
    valuables = [*list_checkpoints(folder / CHECKPOINTS), folder / _BEST, folder / "model_index.json"]
    traces = [folder / METRICS_LOG, folder / _SAMPLES]
    if not resuming:
        found = [path for path in valuables if path.exists()]
        if config.resume_from_checkpoint is None:
            found += [path for path in traces if path.exists()]
        if found and not config.overwrite_output_dir:
            raise UsageError(
                f"'{folder}' already holds a run ({', '.join(path.name for path in found[:3])}), and there is no "
                "usable checkpoint that was asked for. Go on with it (--resume_from_checkpoint latest or a path), "
                "start anew there (--overwrite_output_dir), or choose another --output_dir."
            )
        for path in (folder / CHECKPOINTS, folder / _BEST, folder / "model_index.json", *traces):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the output directory '{folder}': {error.strerror}.") from error
    save_config(config, folder / CONFIG)


def make_hub_repository(config: TrainingConfig) -> str | None:
    """The full id of the repository that the run is pushed to, made where there is none; `None` for no repository.

    Raises:
        UsageError: if the Hub refuses, or cannot be reached.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or Path(config.output_dir).name
    try:
        return create_repo(name, token=config.hub_token, private=config.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:  # Of several libraries' kinds: no connection, no token, a bad name.
        raise UsageError(
            f"cannot use the repository '{name}' on the Hub: {_first_line(error)} Log in with "
            "`hf auth login` or give --hub_token, check --hub_model_id, or omit --push_to_hub."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class RunResults:
    """Pictures, figures and the pipeline of a run, always from the averaged weights where there are any.

    Args:
        config (`TrainingConfig`), training (`TrainingState`), scheduler (`DDPMScheduler`): The run.
        data, held_out (`PixelDataset`): Its images.
        global_batch_size (`int`): Images in a step.
        hub_id (`str`, *optional*): The repository on the Hub that the finished run is pushed to.
    """

    def __init__(
        self,
        config: TrainingConfig,
        training: TrainingState,
        scheduler: DDPMScheduler,
        data: PixelDataset,
        held_out: PixelDataset | None,
        global_batch_size: int,
        hub_id: str | None = None,
    ):
        self.config = config
        self.training = training
        self.scheduler = scheduler
        self.data = data
        self.held_out = held_out
        self.global_batch_size = global_batch_size
        self.hub_id = hub_id
        self.folder = Path(config.output_dir)

    def held_out_loss(self) -> float:
        with self.training.averaged() as unet:
            return held_out_loss(unet, self.scheduler, self.held_out, self.config.train_batch_size)

    def save_pipeline(self) -> None:
        with self.training.averaged() as unet:
            self._pipeline(unet).save_pretrained(self.folder)

    def save_sample_grid(self, step: int) -> None:
        """Saves `samples/step-XXXXXXXX.png` and gives it to the trackers."""
        with self.training.averaged() as unet:
            grid = self._sample_grid(self._pipeline(unet))
        (self.folder / _SAMPLES).mkdir(exist_ok=True)
        grid.save(self.folder / _SAMPLES / f"step-{step:08d}.png")
        for tracker in self.training.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **layout)

    def keep_if_best(self, step: int) -> float:
        """The Fréchet distance of the model now; if it is the smallest so far, the pipeline is kept in `best/`."""
        config, best = self.config, self.folder / _BEST
        with self.training.averaged() as unet:
            pipeline = self._pipeline(unet)
            scores = self._score(pipeline, config.eval_num_images, ("fid",))
            record = best / "metrics.json"
            before = json.loads(record.read_text())["fid"] if record.exists() else float("inf")
            if scores["fid"] < before:
                # Without its record a half-written pipeline counts as none.
                record.unlink(missing_ok=True)
                pipeline.save_pretrained(best)
                replace_text(record, json.dumps({"step": step, "fid": scores["fid"]}))
        return scores["fid"]

    def finish(self, step: int) -> dict[str, Any]:
        """Saves the pipeline, samples.png, curves.png, metrics.json and the model card. Returns the figures."""
        config, folder = self.config, self.folder
        metrics = read_metrics(folder / METRICS_LOG)
        figures: dict[str, Any] = {"step": step, "global_batch_size": self.global_batch_size}
        for line in metrics:
            figures |= {key: line[key] for key in ("loss", "held_out_loss") if key in line}
        with self.training.averaged() as unet:
            pipeline = self._pipeline(unet)
            pipeline.save_pretrained(folder)
            self._sample_grid(pipeline).save(folder / "samples.png")
            save_curves(metrics, folder / "curves.png")
            if config.score_features is not None:
                figures |= self._score(pipeline, config.score_num_images, DEFAULT_METRICS, self.held_out)
            replace_text(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")
            command = shlex.join(["accelerate", "launch", *sys.argv])
            if config.hub_token is not None:
                command = command.replace(config.hub_token, "TOKEN")
            write_model_card(folder, config, unet, figures, command, self.hub_id)
        if self.hub_id is not None:
            self._push()
        return figures

    def _score(
        self,
        pipeline: DIAUNetPipeline,
        num_images: int,
        metrics: Sequence[str],
        held_out: PixelDataset | None = None,
    ) -> dict[str, Any]:
        config = self.config
        extractor = get_extractor(config.score_features, config.resolution, self.data.channels)
        images = PipelineImages(pipeline, num_images, config.ddpm_num_inference_steps, config.seed)
        device = self.training.accelerator.device
        return evaluate(images, self.data, extractor.to(device), metrics, held_out, config.eval_batch_size)

    def _push(self) -> None:
        """Pushes the pipeline, the card and what the card shows."""
        rest = [f"{name}/*" for name in (CHECKPOINTS, self.config.logging_dir, _SAMPLES, _BEST)]
        try:
            upload_folder(
                repo_id=self.hub_id, folder_path=self.folder, token=self.config.hub_token, ignore_patterns=rest
            )
        except Exception as error:
            excluded = " ".join(f'--exclude "{pattern}"' for pattern in rest)
            raise UsageError(
                f"the run is finished and saved in '{self.folder}', but could not be pushed to '{self.hub_id}': "
                f"{_first_line(error)} To try again: hf upload {self.hub_id} {self.folder} {excluded}"
            ) from error

    def _pipeline(self, unet: DIAUNet2DModel) -> DIAUNetPipeline:
        return DIAUNetPipeline(unet, make_scheduler(DEFAULT_SCHEDULER, self.scheduler.config))

    def _sample_grid(self, pipeline: DIAUNetPipeline) -> Image:
        config = self.config
        batches = sample_images(
            pipeline, config.eval_batch_size, config.ddpm_num_inference_steps, config.seed, config.eval_batch_size
        )
        # A class-conditional pipeline takes its classes in turn: one column for each.
        return image_grid(torch.cat(list(batches)), columns=self.data.num_classes)
