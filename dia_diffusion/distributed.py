"""Processes that share the work of a command."""

import os
from datetime import timedelta

from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from .errors import UsageError

# The other processes wait while the main one prepares images, samples or scores.
PATIENCE = timedelta(hours=6)


def make_state() -> PartialState:
    """The processes of a command that does not train.

    Raises:
        UsageError: for processes that do not know of each other.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    check_processes(state)
    return state


def check_processes(accelerator: Accelerator | PartialState) -> None:
    """Processes that do not know of each other would write over each other's files."""
    hint = "For several processes on a CPU: accelerate launch --cpu --num_processes N ..."
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UsageError(f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}. {hint}")
    if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ:
        raise UsageError(f"accelerate launch was asked for several processes, but started one only. {hint}")


def say(text: str) -> None:
    """Prints on the main process of those that `accelerate` or `torchrun` launched."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
