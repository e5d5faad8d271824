"""Several processes that train or score together: set up, and kept in agreement."""

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
    parse_flag_from_env,
)

from .errors import UsageError

if TYPE_CHECKING:
    # It imports datasets, which commands that do not train may not need.
    from .config import TrainingConfig

_STEPS_BETWEEN_MEETINGS = 10
# The other processes wait while the main one prepares images, samples or scores.
_PATIENCE = timedelta(hours=6)


def make_accelerator(config: "TrainingConfig") -> Accelerator:
    """The accelerator of a run.

    Raises:
        UsageError: for a tracker that is not installed, a precision that the device does not have, or processes that do
            not know of each other.
    """
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
    if not available[config.logger]():
        raise UsageError(f"--logger {config.logger} needs the package of that name: pip install {config.logger}.")
    folder = Path(config.output_dir)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=config.logger,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / config.logging_dir)),
        )
    except ValueError as error:
        raise UsageError(f"mixed_precision '{config.mixed_precision}' cannot be used here: {error}") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("mixed_precision 'fp16' needs a GPU; on a CPU use bf16 or no.")
    _check_processes(accelerator)
    return accelerator


def make_state() -> PartialState:
    """The processes of a command that does not train.

    Raises:
        UsageError: for processes that do not know of each other.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_PATIENCE)
    _check_processes(state)
    return state


def _check_processes(accelerator: Accelerator | PartialState) -> None:
    """Processes that do not know of each other would write over each other's files."""
    hint = "For several processes on a CPU: accelerate launch --cpu --num_processes N ..."
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UsageError(f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}. {hint}")
    if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ:
        raise UsageError(f"accelerate launch was asked for several processes, but started one only. {hint}")


def check_same_start(accelerator: Accelerator, start: int) -> None:
    """Processes on several machines may see different folders."""
    starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise UsageError(f"the processes would start at steps {starts}: --output_dir must be a folder that all share.")


def any_process(accelerator: Accelerator, here: bool, step: int) -> bool:
    """Whether any process wants to stop. They compare every few steps only, because it makes the device wait."""
    if accelerator.num_processes == 1:
        return here
    if step % _STEPS_BETWEEN_MEETINGS:
        return False
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device), "sum").item())
