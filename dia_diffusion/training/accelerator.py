"""The processes that train together: their accelerator, and agreement between them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from ..errors import UsageError, first_line
from ..options.output import OutputOptions
from ..process.distributed import PATIENCE, check_launcher, check_processes

_SECONDS_BETWEEN_CHECKS = 2.0
# Steps may grow slower during a run.
_MOST_STEPS_BETWEEN_CHECKS = 100


@contextmanager
def open_accelerator(mixed_precision: str, options: OutputOptions) -> Iterator[Accelerator]:
    """Make the accelerator of a run, and end its trackers and its processes' connection after the run.

    accelerate keeps one precision for a whole process. Each run gets its own here, and an accelerator that the caller
    made before keeps what it had.

    Raises:
        UsageError: see `make_accelerator`.
    """
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    try:
        accelerator = make_accelerator(mixed_precision, options)
        yield accelerator
        # The process group must outlive the distributed model: when that is the last to hold it, its threads are waited
        # for with Python's lock held, which they may need to end.
        accelerator.free_memory()
        accelerator.end_training()
    finally:
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(before)


def make_accelerator(mixed_precision: str, options: OutputOptions) -> Accelerator:
    """Make the accelerator of a run.

    Raises:
        UsageError: for a tracker that is not installed, a precision that the device lacks, processes that do not know
            of each other, or an engine that divides the model between processes.
    """
    check_launcher()
    check_tracker(options.logger)
    folder = options.folder
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            # The loop divides the loss itself. Without this accelerate reads a number of micro-batches from the
            # environment and divides once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=options.logger,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / options.logging_dir)),
        )
        # ACCELERATE_TORCH_DEVICE may name any.
        torch.zeros(1, device=accelerator.device).tolist()
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(
            f"accelerate refuses mixed_precision '{mixed_precision}' or its own settings (ACCELERATE_...): "
            f"{first_line(error)}."
        ) from error
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("mixed_precision 'fp16' needs a GPU; on a CPU use bf16 or no.")
    check_processes(accelerator)
    if accelerator.state.dynamo_plugin.backend is not DynamoBackend.NO:
        accelerator.print(f"compiled with {accelerator.state.dynamo_plugin.backend.value}, as accelerate was told.")
    return accelerator


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed."""
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
    if not available[name]():
        raise UsageError(f"--logger {name} needs the package of that name: pip install {name}.")


def check_same_start(accelerator: Accelerator, start: int) -> None:
    """Check that all processes start at the same step: processes on several machines may see different folders.

    Raises:
        UsageError: if they do not.
    """
    starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise UsageError(f"the processes would start at steps {starts}: --output_dir must be a folder that all share.")


class StopAgreement:
    """Agreement of all processes to stop after the same step.

    Asking makes the processes wait for their devices, so they ask each other about every two seconds only: after as
    many steps as take that long by the clock of the main process.

    Args:
        accelerator (`Accelerator`): The accelerator of the run.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._last: tuple[int, float] | None = None
        self._next = 0

    def agreed(self, here: bool, step: int) -> bool:
        """Return whether any process wants to stop. Call it after each step on every process.

        Args:
            here (`bool`): Whether this process wants to stop.
            step (`int`): The step that is finished.
        """
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
