"""The log of a run: progress bar, metrics.jsonl and trackers."""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..data.folders import readable
from ..errors import NotFiniteError, UsageError, first_line
from ..files import replace_text, to_json
from ..process.output import duration, progress_bar

METRICS_LOG = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines of a metrics.jsonl, without those that a kill or a full disk left unfinished."""
    found = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with suppress(ValueError):
            found.append(json.loads(line) if line.endswith("\n") else None)
    return [line for line in found if isinstance(line, dict) and "step" in line]


class RunLog:
    """Collect the loss of each step on the device, and write a line every `logging_steps` steps.

    Args:
        path (`Path`): The metrics.jsonl.
        accelerator (`Accelerator`): The accelerator of the run, whose trackers get the same figures.
        logging_steps, batch_size, step, total_steps (`int`):
            Steps between lines, images in a step, the step to start from, and the last step.
        pending (list of `float`, *optional*): Losses since the last line, from a checkpoint.
    """

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        logging_steps: int,
        batch_size: int,
        step: int,
        total_steps: int,
        pending: list[float] | None = None,
    ):
        self.path = path
        self.accelerator = accelerator
        self.logging_steps = logging_steps
        self.batch_size = batch_size
        self._losses: list[float] = list(pending or [])
        self._unread: list[Tensor] = []
        self._start, self._estimated = step, not accelerator.is_main_process
        self._mark = (step, time.monotonic())
        self.progress = progress_bar(
            total=total_steps, initial=step, desc="Training", unit="step", disable=not accelerator.is_main_process
        )
        if accelerator.is_main_process:
            # An interrupted run's lines after the checkpoint will be written again.
            kept = [line for line in read_metrics(path) if line["step"] <= step] if path.exists() else []
            replace_text(path, "".join(to_json(line) + "\n" for line in kept))

    def add(self, step: int, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> None:
        """Add the figures of a step, counted from 1, without waiting for the device."""
        self._unread.append(torch.stack([loss.detach().float(), gradient_norm.detach().float()]))
        self.progress.update()
        if step % self.logging_steps == 0:
            self.read(step, learning_rate)
            loss_mean = sum(self._losses) / len(self._losses)
            self._losses = []
            speed = self._speed(step)
            self.write({"step": step, "loss": loss_mean, "learning_rate": learning_rate, "images_per_second": speed})
            # The first steps are slower than those that follow.
            if (
                step - self._start >= 2 * self.logging_steps
                and not self._estimated
                and speed
                and step < self.progress.total
            ):
                self._estimated = True
                left = self.progress.total - step
                time_left = duration(left * self.batch_size / speed)
                self.progress.write(f"Time:      about {time_left} for the {left:,} steps that are left.")
            self.progress.set_postfix(loss=f"{loss_mean:.4f}", img_s=f"{speed:.0f}", refresh=False)

    def read(self, step: int, learning_rate: float) -> None:
        """Read the figures of the steps since the last call, averaged over the processes.

        Raises:
            NotFiniteError: at a loss or a gradient norm that is not finite; names its step.
        """
        if not self._unread:
            return
        figures = self.accelerator.reduce(torch.stack(self._unread), reduction="mean").tolist()
        first = step - len(figures) + 1
        self._unread = []
        for number, (loss, norm) in enumerate(figures, first):
            # With fp16 a gradient that overflows is skipped and the loss scaled down: that is no divergence.
            overflow = self.accelerator.scaler is None and not math.isfinite(norm)
            if overflow or not math.isfinite(loss):
                what = f"the loss is {loss} and the norm of the gradient {norm}"
                raise NotFiniteError(number, what, learning_rate)
        self._losses += [loss for loss, _ in figures]

    @property
    def pending(self) -> list[float]:
        """Losses since the last line, for a checkpoint. Call `read` first."""
        return self._losses

    def write(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and to the trackers."""
        if self.accelerator.is_main_process:
            try:
                with self.path.open("a") as file:
                    file.write(to_json(line) + "\n")
            except OSError as error:
                raise UsageError(
                    f"'{self.path}' cannot be written: {error.strerror}. Earlier checkpoints are untouched; make room "
                    "and resume with --resume_from_checkpoint latest."
                ) from error
        self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def close(self) -> None:
        self.progress.close()

    def _speed(self, step: int) -> float:
        (before, then), now = self._mark, time.monotonic()
        self._mark = (step, now)
        return round((step - before) * self.batch_size / max(now - then, 1e-9), 1)


def start_trackers(accelerator: Accelerator, record: Mapping[str, Any]) -> None:
    """Start the tracker of a run, and give it the numbers and texts of the record.

    Raises:
        UsageError: if it cannot start.
    """
    try:
        # Names of files need not be text.
        texts = {k: readable(v) for k, v in record.items() if isinstance(v, str)}
        accelerator.init_trackers("training", {k: v for k, v in record.items() if isinstance(v, int | float)} | texts)
    except Exception as error:  # Of several packages' kinds: a folder that refuses, no login, no connection.
        name = str(accelerator.log_with[0])
        raise UsageError(
            f"--logger {name} cannot start: {first_line(error)}. Set it up as its package says, choose another "
            "--logger, or another --logging_dir."
        ) from error


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """Send a picture to the trackers."""
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            import trackio

            # accelerate's tracker for it knows numbers only.
            tracker.log({name: trackio.Image(str(path))}, step=step)
        else:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with Image.open(path) as picture:
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)
