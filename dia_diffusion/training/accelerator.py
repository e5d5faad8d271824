"""Several processes that train together: set up, and kept in agreement."""

import time

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DynamoBackend,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from ..errors import UsageError
from ..options.output import OutputOptions
from ..process.distributed import PATIENCE, check_launcher, check_processes

_SECONDS_BETWEEN_CHECKS = 2.0
# Steps may become slower.
_MOST_STEPS_BETWEEN_CHECKS = 100


def make_accelerator(mixed_precision: str, options: OutputOptions) -> Accelerator:
    """The accelerator of a run.

    Raises:
        UsageError: for a tracker that is not installed, a precision that the device does not have, or processes that do
            not know of each other or that would share a model in a way that is not supported.
    """
    check_launcher()
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
    if not available[options.logger]():
        raise UsageError(f"--logger {options.logger} needs the package of that name: pip install {options.logger}.")
    folder = options.folder
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            log_with=options.logger,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / options.logging_dir)),
        )
    except ValueError as error:
        raise UsageError(f"mixed_precision '{mixed_precision}' cannot be used here: {error}") from error
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("mixed_precision 'fp16' needs a GPU; on a CPU use bf16 or no.")
    check_processes(accelerator)
    if accelerator.state.dynamo_plugin.backend is not DynamoBackend.NO:
        accelerator.print(f"compiled with {accelerator.state.dynamo_plugin.backend.value}, as accelerate was told.")
    return accelerator


def check_same_start(accelerator: Accelerator, start: int) -> None:
    """Processes on several machines may see different folders."""
    starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise UsageError(f"the processes would start at steps {starts}: --output_dir must be a folder that all share.")


class StopAgreement:
    """Whether any process wants to stop. They ask each other about every two seconds, because it makes them wait for
    their devices: after as many steps as take that long by the clock of the main process.

    Args:
        accelerator (`Accelerator`): Of the processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._last: tuple[int, float] | None = None
        self._next = 0

    def agreed(self, here: bool, step: int) -> bool:
        """Called after each step, with whether this process wants to stop."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1 or step < self._next:
            return here and accelerator.num_processes == 1
        now, pace = time.monotonic(), 0.0
        if self._last is not None and accelerator.is_main_process:
            pace = (now - self._last[1]) / (step - self._last[0])
        figures = torch.tensor([float(here), pace], device=accelerator.device)
        wanted, pace = accelerator.reduce(figures, "sum").tolist()
        steps = int(_SECONDS_BETWEEN_CHECKS / pace) if pace > 0 else 1
        self._last, self._next = (step, now), step + min(max(steps, 1), _MOST_STEPS_BETWEEN_CHECKS)
        return wanted > 0
