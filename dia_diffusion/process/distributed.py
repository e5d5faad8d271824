"""Processes that share the work of a command."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from ..errors import UsageError, first_line

# The other processes wait while the main one prepares images, samples or scores.
PATIENCE = timedelta(hours=6)

_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def make_state() -> PartialState:
    """Return the processes of a command that does not train.

    Raises:
        UsageError: if the processes do not know each other, or accelerate is configured for an unsupported engine.
    """
    check_launcher()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    check_processes(state)
    return state


def check_launcher() -> None:
    """Refuse engines of `accelerate config` that divide a model between processes, before they start anything."""
    for variable, name in _ENGINES.items():
        if parse_flag_from_env(variable):
            raise UsageError(
                f"accelerate is configured for {name}, which is not supported: each process holds the whole model. "
                "Choose several GPUs without it in `accelerate config`, or use: accelerate launch --multi_gpu "
                "--num_processes N ..."
            )


def check_processes(accelerator: Accelerator | PartialState) -> None:
    """Refuse processes that do not know each other: they would overwrite each other's files."""
    launched = os.environ.get("WORLD_SIZE") or "1"
    if launched != str(accelerator.num_processes):
        raise UsageError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}. For several "
            "processes on a CPU: accelerate launch --cpu --num_processes N ..."
        )


def find_device(name: str | None, state: PartialState) -> torch.device:
    """Return the device of this name, by default that of the process.

    Raises:
        UsageError: if there is no such device, or it does not compute.
    """
    if name is None:
        return state.device
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} cannot be used here: {first_line(error)}.") from error
    return torch.device(name)
