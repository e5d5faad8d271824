"""Several processes that train together: set up, and kept in agreement."""

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DynamoBackend,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
    parse_flag_from_env,
)

from ..distributed import PATIENCE, check_processes
from ..errors import UsageError
from .options import OutputOptions

_STEPS_BETWEEN_MEETINGS = 10


def make_accelerator(mixed_precision: str, options: OutputOptions) -> Accelerator:
    """The accelerator of a run.

    Raises:
        UsageError: for a tracker that is not installed, a precision that the device does not have, or processes that do
            not know of each other.
    """
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
    if not available[options.logger]():
        raise UsageError(f"--logger {options.logger} needs the package of that name: pip install {options.logger}.")
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UsageError(
                f"accelerate is configured for {name}, which divides the model between processes; here each has all of "
                "it. Run `accelerate config` again, or name another file with `accelerate launch --config_file`."
            )
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


def any_process(accelerator: Accelerator, here: bool, step: int) -> bool:
    """Whether any process wants to stop. They compare every few steps only, because it makes the device wait."""
    if accelerator.num_processes == 1:
        return here
    if step % _STEPS_BETWEEN_MEETINGS:
        return False
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device), "sum").item())
